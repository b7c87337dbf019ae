//! usvm-tests.
pub mod scenario;
pub mod support;
