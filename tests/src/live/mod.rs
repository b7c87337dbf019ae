//! Recorded traces, done again by a real program on a running usvm.
//!
//! # Overview
//! [`play`] does a trace's operations as real system calls, real loads and stores and kernels of the simulated device, in
//! an arena that usvm serves and in a twin that it never sees, and compares after each. [`rules`] is the table of meant
//! differences.

pub mod bench;
pub mod child;
pub mod freed;
pub mod kernel;
pub mod play;
pub mod probe;
pub mod report;
pub mod rules;
pub mod served;
pub mod side;
