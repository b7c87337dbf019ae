//! usvm-tests.
