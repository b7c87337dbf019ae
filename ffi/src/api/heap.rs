//! The allocator's functions: C11's shapes around `crate::heap`.
//!
//! # Overview
//! These are called often and need nothing but the heap, so they are not framed as the other calls are. What the heap
//! unmaps is the program's memory, and told to notifiers.
//!
//! # Safety
//! The callers' contract is C's: a pointer is one that these functions gave, and is used no more once freed.
#![allow(unsafe_code)]

use std::ffi::c_void;

use super::result::{
    Failure, USVM_ERROR_INVALID_ARGUMENT, USVM_ERROR_OUT_OF_HOST_MEMORY, note, set_errno, usvm_result_t,
};
use crate::heap;

fn fail(code: usvm_result_t, errno: i32, message: std::fmt::Arguments<'_>) -> *mut c_void {
    usvm::ground::alloc::internal(|| note(&Failure::new(code, message)));
    set_errno(errno);
    std::ptr::null_mut()
}

fn given(block: *mut c_void, size: usize) -> *mut c_void {
    if block.is_null() {
        return fail(
            USVM_ERROR_OUT_OF_HOST_MEMORY,
            libc::ENOMEM,
            format_args!("size: no memory for {size} bytes"),
        );
    }
    block
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_malloc(size: usize) -> *mut c_void {
    // SAFETY: any size may be asked for.
    given(unsafe { heap::malloc(size) }, size)
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_calloc(count: usize, size: usize) -> *mut c_void {
    let Some(all) = count.checked_mul(size) else {
        let message = format_args!("count: {count} times {size} bytes is more than there can be");
        return fail(USVM_ERROR_OUT_OF_HOST_MEMORY, libc::ENOMEM, message);
    };
    // SAFETY: any size may be asked for.
    given(unsafe { heap::calloc(count, size) }, all)
}

/// See the header.
///
/// # Safety
/// `ptr` is NULL or came from these functions and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_realloc(ptr: *mut c_void, size: usize) -> *mut c_void {
    // SAFETY: the caller's.
    given(unsafe { heap::realloc(ptr, size) }, size)
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_aligned_alloc(alignment: usize, size: usize) -> *mut c_void {
    if !alignment.is_power_of_two() {
        let message = format_args!("alignment: {alignment} is not a power of two");
        return fail(USVM_ERROR_INVALID_ARGUMENT, libc::EINVAL, message);
    }
    // SAFETY: a power of two, and any size.
    given(unsafe { heap::aligned_alloc(alignment, size) }, size)
}

/// See the header.
///
/// # Safety
/// `ptr` is NULL or came from these functions and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_free(ptr: *mut c_void) {
    // SAFETY: the caller's.
    unsafe { heap::free(ptr) }
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
    unsafe { heap::usable_size(ptr) }
}
