//! The space: notifiers, ranges, residency, GPU access, invalidation. No unsafe, no system calls.

pub mod ports;
