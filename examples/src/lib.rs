//! usvm-examples.
