//! usvm's C interface, and what it shares with the preload library.
//!
//! # Overview
//! `include/usvm.h` is the contract, and its reader's documentation; each function of it is one function of [`api`], which
//! checks every argument and then calls the process's [`usvm::Runtime`] ([`process`]). [`interpose`] has the functions of
//! the C library that are watched for the sake of notifiers.
//!
//! The rlib is for the preload library and the `usvm` program; `ffi/link.sh` makes libusvm.so and libusvm.a of the
//! staticlib.

pub mod api;
mod heap;
pub mod interpose;
pub mod process;

/// usvm's own memory must not be migratable: service threads' allocations go to usvm's own arena.
#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);
