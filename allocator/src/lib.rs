//! A global allocator whose memory is laid out for shared virtual memory with GPUs.
//!
//! # Overview
//! ```
//! #[global_allocator]
//! static ALLOC: usvm_alloc::Usvm = usvm_alloc::Usvm::new();
//! # fn main() { assert!(usvm::ground::alloc::installed()); }
//! ```
//!
//! User memory lies in 2 MiB-aligned spans that use huge pages; what the allocator knows about blocks lies elsewhere, so
//! freeing a block that is on the device moves nothing. usvm's own threads and calls get usvm's own memory, as with
//! [`usvm::Routed`].
//!
//! The functions [`malloc`], [`calloc`], [`realloc`], [`aligned_alloc`], [`free`], [`usable_size`] and [`owns`] are the same
//! heap in C's words, for C interfaces; they use no other allocator and may be called from any thread at any time, also
//! before `main` and again from inside themselves. They do not route: that is their caller's matter.
//!
//! | size | where |
//! |---|---|
//! | up to 32 KiB | slabs of the thread's own (`local`, `slab`) |
//! | larger, and the slabs themselves | jemalloc, whose memory comes from `spans` (`large`) |
//!
//! # Limits
//! Zeroed blocks up to 32 KiB are written, larger ones only where memory is used again.
//!
//! # Safety
//! [`GlobalAlloc`] for [`Usvm`] only forwards.
#![allow(unsafe_code)]

pub mod changed;
mod class;
mod deferred;
mod functions;
mod large;
mod local;
mod post;
#[cfg(test)]
mod post_tests;
mod slab;
mod spans;

/// The atomics of [`post`], so that its source can be compiled a second time against a model checker's.
mod primitive {
    pub(super) use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU16, Ordering, fence};
}

use std::alloc::{GlobalAlloc, Layout};

pub use functions::{aligned_alloc, calloc, free, free_sized, malloc, owns, realloc, trim, usable_size};

/// The heap alone, without the routing.
#[derive(Debug, Default, Clone, Copy)]
struct Heap;

// SAFETY: C's contracts with these sizes and alignments are what GlobalAlloc asks for.
unsafe impl GlobalAlloc for Heap {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        functions::alloc(layout.size(), layout.align())
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        functions::alloc_zeroed(layout.size(), layout.align())
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if usvm::ground::alloc::is_service_thread() {
            return deferred::put(block, layout);
        }
        // SAFETY: the caller's contract.
        unsafe { functions::dealloc(block, layout.size(), layout.align()) }
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // A thread of usvm never comes here: what it resizes is moved to usvm's own memory.
        // SAFETY: the caller's contract.
        unsafe { functions::resize(block, new_size, layout.align()) }
    }
}

/// The allocator for `#[global_allocator]`.
#[derive(Debug, Default, Clone, Copy)]
pub struct Usvm {
    routed: usvm::Routed<Heap>,
}

impl Usvm {
    /// There is one heap in a process; this is its handle.
    pub const fn new() -> Self {
        Self { routed: usvm::Routed(Heap) }
    }
}

// SAFETY: forwards.
unsafe impl GlobalAlloc for Usvm {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract.
        unsafe { self.routed.alloc(layout) }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract.
        unsafe { self.routed.alloc_zeroed(layout) }
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { self.routed.dealloc(block, layout) }
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's contract.
        unsafe { self.routed.realloc(block, layout, new_size) }
    }
}
