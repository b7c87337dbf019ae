//! usvm-tests.
pub mod support;
