//! The heap in C's words.
//!
//! # Overview
//! Blocks up to 32 KiB come from the thread's slabs ([`crate::local`]), larger ones from jemalloc ([`crate::large`]). All
//! functions may be called by any thread at any time, also before `main`, from inside themselves through what they
//! call in libc, and in a forked child. Rust's global allocator is not used. A function that finds no memory gives NULL
//! and leaves `errno` to the caller.
//!
//! # Safety
//! The contracts are C's: a block is freed once, by this allocator, and not used afterwards.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ptr;

use crate::class::LARGEST;
use crate::{large, local, spans};

/// C's `malloc`.
///
/// # Safety
/// The block must be freed by this allocator.
#[inline]
pub unsafe fn malloc(size: usize) -> *mut c_void {
    alloc(size, 1).cast()
}

/// C's `calloc`: NULL also when the product overflows. Fresh memory above 32 KiB is not written.
///
/// # Safety
/// As [`malloc`].
#[inline]
pub unsafe fn calloc(count: usize, size: usize) -> *mut c_void {
    match count.checked_mul(size) {
        Some(size) => alloc_zeroed(size, 1).cast(),
        None => ptr::null_mut(),
    }
}

/// C's `realloc`: when it gives NULL the old block is still there. For size 0 it gives a block, as for 1.
///
/// # Safety
/// `block` is NULL or a block of this allocator that is not used under its old address afterwards.
#[inline]
pub unsafe fn realloc(block: *mut c_void, size: usize) -> *mut c_void {
    if block.is_null() {
        return alloc(size, 1).cast();
    }
    // SAFETY: the caller's contract.
    unsafe { resize(block.cast(), size, 1).cast() }
}

/// C's `aligned_alloc`: NULL also when `align` is no power of two. Any `size` will do.
///
/// # Safety
/// As [`malloc`].
#[inline]
pub unsafe fn aligned_alloc(align: usize, size: usize) -> *mut c_void {
    if !align.is_power_of_two() || size.checked_add(align).is_none_or(|sum| sum > isize::MAX as usize) {
        return ptr::null_mut();
    }
    alloc(size, align).cast()
}

/// C's `free`. Writes nothing into the block and reads nothing from it.
///
/// # Safety
/// `block` is NULL or a block of this allocator, not used afterwards.
#[inline]
pub unsafe fn free(block: *mut c_void) {
    // SAFETY: the caller's contract.
    unsafe {
        if !local::free(block.cast()) {
            large::free(block.cast());
        }
    }
}

/// C23's `free_sized`.
///
/// # Safety
/// `block` is NULL or a block that [`malloc`], [`calloc`] or [`realloc`] made with this size, not used afterwards.
#[inline]
pub unsafe fn free_sized(block: *mut c_void, size: usize) {
    if !block.is_null() {
        // SAFETY: the caller's contract.
        unsafe { dealloc(block.cast(), size, 1) }
    }
}

/// The bytes that `block` really has; 0 for NULL.
///
/// # Safety
/// `block` is NULL or a block of this allocator.
#[inline]
pub unsafe fn usable_size(block: *const c_void) -> usize {
    // SAFETY: the caller's contract.
    unsafe { local::block_size(block.cast()).unwrap_or_else(|| large::usable_size(block.cast())) }
}

/// Whether `block` is this allocator's. Never reads what is there. For blocks of this allocator it is a few comparisons; for
/// others jemalloc's records are asked too.
pub fn owns(block: *const c_void) -> bool {
    spans::owns(block.addr()) || large::knows(block.cast())
}

/// The size whose class is aligned enough, if such a block is small.
#[inline(always)]
fn small(size: usize, align: usize) -> Option<usize> {
    // Wrapping: what wraps is too large, and then so is `size`.
    let size = if align <= 16 { size } else { size.max(1).wrapping_add(align - 1) & !(align - 1) };
    (size <= LARGEST).then_some(size)
}

#[inline(always)]
pub(crate) fn alloc(size: usize, align: usize) -> *mut u8 {
    match small(size, align) {
        Some(size) => local::alloc(size),
        None => large::alloc(size, align, false),
    }
}

#[inline(always)]
pub(crate) fn alloc_zeroed(size: usize, align: usize) -> *mut u8 {
    let Some(small) = small(size, align) else { return large::alloc(size, align, true) };
    let block = local::alloc(small);
    if !block.is_null() {
        // SAFETY: the block has at least `size` bytes.
        unsafe { block.write_bytes(0, size) };
    }
    block
}

/// # Safety
/// `GlobalAlloc::dealloc`'s.
#[inline(always)]
pub(crate) unsafe fn dealloc(block: *mut u8, size: usize, align: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        if small(size, align).is_none() {
            large::free_sized(block, size, align);
        } else if !local::free(block) {
            large::free(block);
        }
    }
}

/// # Safety
/// `GlobalAlloc::realloc`'s, where `size` may be 0.
pub(crate) unsafe fn resize(block: *mut u8, size: usize, align: usize) -> *mut u8 {
    // SAFETY: the caller's contract; a new block is another one, and both have the bytes that are copied.
    unsafe {
        let old = match local::block_size(block) {
            // Half empty at most: moving to a smaller block is not worth it before.
            Some(old) if size <= old && size >= old / 2 => return block,
            Some(old) => old,
            None if small(size, align).is_none() => return large::resize(block, size, align),
            None => large::usable_size(block),
        };
        let new = alloc(size, align);
        if !new.is_null() {
            ptr::copy_nonoverlapping(block, new, old.min(size));
            free(block.cast());
        }
        new
    }
}
