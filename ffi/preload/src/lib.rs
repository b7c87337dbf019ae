//! usvm under an unmodified program: the library that `usvm run` preloads.
//!
//! # Overview
//! | room | what it does |
//! |---|---|
//! | `start` | decides once, before `main`, whether there is anything to do; chaos; the end of the process |
//! | `threads` | keeps the control blocks of the program's threads on the host |
//! | `fds` | keeps usvm's own descriptors from programs that close everything |
//! | `exits` | statistics of programs that leave by `_exit` |
//! | `mappings` | calls that show where usvm divided mappings |
//! | `watched` | calls that change mappings, for notifiers |
//! | `opencl` | the layer of the OpenCL loader; unified shared memory for drivers without it |
//! | `next` | the functions behind those that are interposed |
//! | `tls` | thread-local storage without the dynamic linker |
//!
//! The library starts no runtime of its own unless `USVM_CHAOS` asks for one: whoever uses it first does
//! (`usvm_capi::process::acquire`). Until then it costs a program its loading and one branch for each interposed call.
//!
//! # What is interposed, and why
//! fork and exec need nothing: userfaultfd tells of the first, and the last ends it all. It tells of munmap and madvise,
//! too, but after the fact, and notifiers want to hear of it before (`munmap`, `mmap`, `mmap64`, `madvise`, `mprotect`). What
//! userfaultfd cannot tell: that a thread is about to end (`pthread_create`, `thrd_create`: the kernel writes to the
//! control block of an ended thread and no fault is served then), that a program closes descriptors it did not open
//! (`close`, `close_range`, `closefrom`, `dup2`, `dup3`, `fstat`), that it leaves without its exit handlers (`_exit`, `_Exit`).
//! What it does to mappings that programs can see: `mremap`, `pthread_getattr_np`.
//!
//! # Limits
//! A program that lowers its own RLIMIT_AS after usvm started has usvm's reservations counted against it; a limit that it
//! was started with is kept. glibc before 2.33 has no `fstat` to pass on to.
//!
//! In set-uid programs and with `USVM_ENABLE=0` everything is passed through. Statically linked programs do not load
//! libraries at all. Threads made by clone(2) itself are not noticed: their memory migrates like any other, and
//! CLONE_CHILD_CLEARTID of such a thread must not point into memory that a device uses.
//!
//! # Safety
//! Each room says why it holds. Interposed functions have the C library's own signatures.
#![allow(unsafe_code)]
// The exported functions are the C library's: their contracts are in its manual.
#![allow(clippy::missing_safety_doc)]

mod exits;
mod fds;
mod mappings;
mod next;
mod opencl;
mod pieces;
mod start;
mod threads;
#[cfg(target_arch = "x86_64")]
mod tls;
mod watched;

/// usvm's own memory must not be migratable: service threads' allocations go to usvm's own arena.
#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);
