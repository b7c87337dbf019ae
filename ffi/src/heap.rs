//! The allocator's functions: C11's shapes around `crate::blocks`.
//!
//! # Overview
//! These are called often and need nothing but the heap, so they are not framed as the other calls are.
//!
//! # Safety
//! The callers' contract is C's: a pointer is one that these functions gave, and is used no more once freed.
#![allow(unsafe_code)]

use std::ffi::c_void;

use usvm_capi::heap_error::{ALIGNMENT, NO_MEMORY, TOO_MANY};

use crate::blocks;

unsafe extern "C" {
    // By its C name, because the preload library may have it (see `usvm_capi::heap_error`).
    safe fn usvm_heap_error(what: u32, first: usize, second: usize);
}

fn fail(what: u32, first: usize, second: usize) -> *mut c_void {
    usvm_heap_error(what, first, second);
    std::ptr::null_mut()
}

fn given(block: *mut c_void, size: usize) -> *mut c_void {
    if block.is_null() { fail(NO_MEMORY, size, 0) } else { block }
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_malloc(size: usize) -> *mut c_void {
    // SAFETY: any size may be asked for.
    given(unsafe { blocks::malloc(size) }, size)
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_calloc(count: usize, size: usize) -> *mut c_void {
    let Some(all) = count.checked_mul(size) else { return fail(TOO_MANY, count, size) };
    // SAFETY: any size may be asked for.
    given(unsafe { blocks::calloc(all) }, all)
}

/// See the header.
///
/// # Safety
/// `ptr` is NULL or came from these functions and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_realloc(ptr: *mut c_void, size: usize) -> *mut c_void {
    // SAFETY: the caller's.
    given(unsafe { blocks::realloc(ptr, size) }, size)
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_aligned_alloc(alignment: usize, size: usize) -> *mut c_void {
    if !alignment.is_power_of_two() {
        return fail(ALIGNMENT, alignment, 0);
    }
    // SAFETY: a power of two, and any size.
    given(unsafe { blocks::aligned_alloc(alignment, size) }, size)
}

/// See the header.
///
/// # Safety
/// `ptr` is NULL or came from these functions and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_free(ptr: *mut c_void) {
    // SAFETY: the caller's.
    unsafe { blocks::free(ptr) }
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
    // SAFETY: the caller's.
    unsafe { blocks::usable_size(ptr) }
}
