//! Blocks of the program that a thread of usvm drops.
//!
//! # Overview
//! A kernel's closure may own memory of the program, and usvm's threads drop it. They must not free it themselves: freeing
//! may take jemalloc's locks and may return memory to the system, which makes the kernel tell usvm and wait until usvm has
//! read that. So they put it into a list, which the program's threads free when they next need memory.
//!
//! # Locking
//! None: entries are added one by one and taken all at once.
//!
//! # Safety
//! An entry owns its block; whoever takes the list owns all entries.
#![allow(unsafe_code)]

use std::alloc::Layout;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::functions;

/// A block to be freed. It lies in usvm's own memory, as everything that a thread of usvm allocates.
struct Entry {
    block: *mut u8,
    layout: Layout,
    next: *mut Entry,
}

static LIST: AtomicPtr<Entry> = AtomicPtr::new(ptr::null_mut());

/// Keeps `block`, which was allocated with `layout` and is not used any more, for [`free_all`].
#[cold]
pub(crate) fn put(block: *mut u8, layout: Layout) {
    let entry = Box::into_raw(Box::new(Entry { block, layout, next: ptr::null_mut() }));
    let mut head = LIST.load(Ordering::Relaxed);
    loop {
        // SAFETY: not in the list yet, so ours.
        unsafe { (*entry).next = head };
        match LIST.compare_exchange_weak(head, entry, Ordering::Release, Ordering::Relaxed) {
            Ok(_) => return,
            Err(now) => head = now,
        }
    }
}

/// Frees what was put.
#[inline]
pub(crate) fn free_all() {
    if !LIST.load(Ordering::Relaxed).is_null() {
        free_list();
    }
}

#[cold]
fn free_list() {
    let mut at = LIST.swap(ptr::null_mut(), Ordering::Acquire);
    while !at.is_null() {
        // SAFETY: the list owned the entry, made by `put`, and the entry its block, allocated with this layout.
        unsafe {
            let entry = Box::from_raw(at);
            functions::dealloc(entry.block, entry.layout.size(), entry.layout.align());
            at = entry.next;
        }
    }
}
