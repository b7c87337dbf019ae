//! Where `usvm_malloc` and its family get memory: the C library's heap, with large blocks on huge pages.
//!
//! # Overview
//! Blocks of 2 MiB or more begin on 2 MiB and are as long as whole huge pages, so that no range has two owners.
//!
//! # Safety
//! Each function is its namesake of the C library, with the same contract.
#![allow(unsafe_code)]

use std::ffi::c_void;

const HUGE: usize = 2 << 20;
const LEAST_ALIGNMENT: usize = 16;

fn shaped(alignment: usize, size: usize) -> Option<(usize, usize)> {
    if size < HUGE {
        return Some((alignment.max(LEAST_ALIGNMENT), size.max(1)));
    }
    Some((alignment.max(HUGE), size.checked_next_multiple_of(HUGE)?))
        .filter(|(_, size)| *size <= isize::MAX as usize)
}

pub(crate) unsafe fn aligned_alloc(alignment: usize, size: usize) -> *mut c_void {
    let mut block = std::ptr::null_mut::<c_void>();
    let Some((alignment, size)) = shaped(alignment, size) else { return std::ptr::null_mut() };
    // SAFETY: a live place for the answer; the alignment is a power of two of at least 16.
    match unsafe { libc::posix_memalign(&mut block, alignment, size) } {
        0 => block,
        _ => std::ptr::null_mut(),
    }
}

pub(crate) unsafe fn malloc(size: usize) -> *mut c_void {
    // SAFETY: any size.
    unsafe { aligned_alloc(LEAST_ALIGNMENT, size) }
}

pub(crate) unsafe fn calloc(size: usize) -> *mut c_void {
    if size < HUGE {
        // SAFETY: any size.
        return unsafe { libc::calloc(1, size.max(1)) };
    }
    // SAFETY: any size; a block that was given has `size` bytes.
    unsafe {
        let block = malloc(size);
        if !block.is_null() {
            std::ptr::write_bytes(block.cast::<u8>(), 0, size);
        }
        block
    }
}

pub(crate) unsafe fn realloc(block: *mut c_void, size: usize) -> *mut c_void {
    // SAFETY: the caller's block, or none; both blocks have as many bytes as are copied.
    unsafe {
        let old = if block.is_null() { 0 } else { usable_size(block) };
        if old < HUGE && size < HUGE {
            return libc::realloc(block, size.max(1));
        }
        if old >= HUGE && size >= HUGE && old >= size && old - size < HUGE {
            return block;
        }
        let new = malloc(size);
        if !new.is_null() {
            std::ptr::copy_nonoverlapping(block.cast::<u8>(), new.cast(), old.min(size));
            free(block);
        }
        new
    }
}

pub(crate) unsafe fn free(block: *mut c_void) {
    // SAFETY: the caller's block, or none.
    unsafe { libc::free(block) }
}

pub(crate) unsafe fn usable_size(block: *const c_void) -> usize {
    // SAFETY: the caller's block, or none.
    unsafe { libc::malloc_usable_size(block.cast_mut()) }
}
