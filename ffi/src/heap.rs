//! The allocator's functions: C11's shapes around [`usvm_alloc`].
//!
//! # Overview
//! These are called often and need nothing but the heap, so they are not framed as the other calls are, and they may be
//! called when usvm does not run. Blocks of 2 MiB or more are as long as whole huge pages, so that no range has two owners.
//!
//! The heap makes its system calls itself, past the watched functions: a callback would run with the heap's locks held.
//! What it dropped or moved is told when the function is over, and before it returns (`settled`).
//!
//! # Limits
//! Threads of usvm do not come here: callbacks run on others.
//!
//! # Safety
//! The callers' contract is C's: a pointer is one that these functions gave, and is used no more once freed.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ptr::null_mut;

use usvm_alloc::changed;
use usvm_capi::heap_error::{ALIGNMENT, DROPPED, FOREIGN, MOVED, NO_MEMORY, TOO_MANY};

unsafe extern "C" {
    // By its C name, because the preload library may have it (see `usvm_capi::heap_error`).
    safe fn usvm_heap_error(what: u32, first: usize, second: usize);
    safe fn usvm_heap_changed(reason: u32, at: usize, size: usize);
}

const HUGE: usize = 2 << 20;

/// Gives `result` when notifiers were told of what the heap did on the way to it. Costs a load where it did nothing.
#[inline]
fn settled<T>(result: T) -> T {
    if let Some(changes) = changed::take() {
        for change in changes.iter() {
            let reason = match change.kind {
                changed::Kind::Dropped => DROPPED,
                changed::Kind::Moved => MOVED,
            };
            usvm_heap_changed(reason, change.start, change.end - change.start);
        }
    }
    result
}

/// Whether the heap has nothing to do with `ptr`. A comparison for its own blocks.
fn is_foreign(ptr: *const c_void) -> bool {
    !ptr.is_null() && !usvm_alloc::owns(ptr)
}

fn fail(what: u32, first: usize, second: usize) -> *mut c_void {
    usvm_heap_error(what, first, second);
    null_mut()
}

/// What `make` makes of `size`, in whole huge pages from one on.
fn whole(size: usize, make: impl FnOnce(usize) -> *mut c_void) -> *mut c_void {
    let shaped = if size < HUGE { Some(size) } else { size.checked_next_multiple_of(HUGE) };
    let block = shaped.map_or(null_mut(), make);
    if block.is_null() { fail(NO_MEMORY, size, 0) } else { settled(block) }
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_malloc(size: usize) -> *mut c_void {
    // SAFETY: any size may be asked for.
    whole(size, |size| unsafe { usvm_alloc::malloc(size) })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_calloc(count: usize, size: usize) -> *mut c_void {
    match count.checked_mul(size) {
        // SAFETY: any size may be asked for.
        Some(all) => whole(all, |all| unsafe { usvm_alloc::calloc(1, all) }),
        None => fail(TOO_MANY, count, size),
    }
}

/// See the header.
///
/// # Safety
/// `ptr` is NULL or came from these functions and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_realloc(ptr: *mut c_void, size: usize) -> *mut c_void {
    if is_foreign(ptr) {
        return fail(FOREIGN, ptr.addr(), 0);
    }
    // SAFETY: the caller's.
    whole(size, |size| unsafe { usvm_alloc::realloc(ptr, size) })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_aligned_alloc(alignment: usize, size: usize) -> *mut c_void {
    if !alignment.is_power_of_two() {
        return fail(ALIGNMENT, alignment, 0);
    }
    // SAFETY: a power of two, and any size.
    whole(size, |size| unsafe { usvm_alloc::aligned_alloc(alignment, size) })
}

/// See the header.
///
/// # Safety
/// `ptr` is NULL or came from these functions and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_free(ptr: *mut c_void) {
    if is_foreign(ptr) {
        fail(FOREIGN, ptr.addr(), 0);
        return;
    }
    // SAFETY: the caller's.
    unsafe { usvm_alloc::free(ptr) };
    settled(());
}

/// See the header.
///
/// # Safety
/// `ptr` is NULL or came from these functions and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_usable_size(ptr: *const c_void) -> usize {
    if ptr.is_null() {
        return 0;
    }
    if is_foreign(ptr) {
        fail(FOREIGN, ptr.addr(), 0);
        return 0;
    }
    // SAFETY: the caller's.
    unsafe { usvm_alloc::usable_size(ptr) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_blocks_are_whole_huge_pages() {
        for size in [HUGE, HUGE + 1, 3 * HUGE - 1, 5 * HUGE / 2, 9 << 20, 17 * HUGE + 5] {
            let block = usvm_malloc(size);
            // SAFETY: a live block.
            let usable = unsafe { usvm_usable_size(block) };
            assert!(block.addr().is_multiple_of(HUGE) && usable.is_multiple_of(HUGE) && usable >= size);
            // SAFETY: freed once, under its last address.
            unsafe { usvm_free(usvm_realloc(block, size + HUGE)) };
        }
    }

    #[test]
    fn sizes_that_cannot_be_are_no_memory() {
        for size in [usize::MAX, usize::MAX - HUGE, isize::MAX as usize] {
            assert!(usvm_malloc(size).is_null() && usvm_calloc(1, size).is_null());
            assert!(usvm_aligned_alloc(1 << 30, size).is_null());
            // SAFETY: no block.
            assert!(unsafe { usvm_realloc(null_mut(), size) }.is_null());
        }
        assert!(usvm_calloc(usize::MAX / 2, 3).is_null() && usvm_aligned_alloc(24, 8).is_null());
    }
}
