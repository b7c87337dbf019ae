//! usvm's C functions, for the two libraries that export them: libusvm and the preload library.
//!
//! # Overview
//! `include/usvm.h` is the contract, and its reader's documentation; each function of it is one function of [`api`], which
//! checks every argument and then calls the process's [`usvm::Runtime`] ([`process`]). [`interpose`] knows which calls of
//! the C library are watched for the sake of notifiers, and why.
//!
//! The allocator's functions (`usvm_malloc` and its family) are libusvm's alone (`ffi/src/heap.rs`): the preload library is
//! also loaded late, as a layer of OpenCL, and what it keeps for each thread must fit into the little room that is left for
//! static thread-local storage then. [`heap_error`] is what they need of whoever has the other functions.
//!
//! # Limits
//! The library that this is linked into has the `#[global_allocator]`.

pub mod api;
pub mod cancel;
pub mod heap_error;
pub mod interpose;
mod log;
pub mod process;

/// The tests' own: usvm's memory must not be migratable.
#[cfg(test)]
#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);
