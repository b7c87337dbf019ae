//! The functions of `include/usvm.h`, one file for each of its sections but the allocator's.
//!
//! # Overview
//! [`types`] has the C types; `result` the error codes, the thread's last error and the frame around every call;
//! `user` reads and writes the caller's memory without trusting its pointers; `handles` keeps what handles name; `watched`
//! knows where notifiers are.
//! Then the sections: [`init`], [`device`], [`space`], [`memory`], [`access`], [`attribute`], [`notify`],
//! [`stats`].
//!
//! # Locking
//! One mutex over all handles (`handles::lock`), for application threads only: usvm's service threads never take it,
//! so a holder whose stack is on a device gets it back. It is never held over a call into the runtime or a callback.
//!
//! # Limits
//! A pointer that is mapped but not meant is the caller's error and not seen here.

pub mod access;
pub mod attribute;
pub mod device;
pub(crate) mod fork;
pub mod handles;
#[cfg(test)]
mod header_tests;
pub mod init;
pub mod memory;
pub mod notify;
pub mod result;
pub mod space;
pub mod stats;
pub mod types;
pub(crate) mod user;
mod watched;
