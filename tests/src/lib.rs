//! Shared by the tests that run whole runtimes: scenarios in processes of their own, memory by address.
pub mod area;
pub mod isolated;
pub mod live;
pub mod replay;
pub mod scenario;
pub mod support;
