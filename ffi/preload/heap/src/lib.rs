//! usvm's malloc for unmodified programs.
//!
//! # Overview
//! A library of its own, because whoever exports `malloc` replaces it: `usvm run` preloads it before libusvm_preload.so
//! when `USVM_HEAP=1`. It exports the whole family, from `malloc` to C23's names, over [`usvm_alloc`], so that the program's
//! blocks lie in 2 MiB spans and freeing a block that is on a device moves nothing.
//!
//! C++'s operators are not among them. Those of libstdc++ and libc++ call `malloc`, `aligned_alloc` and `free`, which are the
//! ones here; and their other forms (arrays, nothrow, with a size) call the plain ones, also where a program has its own:
//! forms from here would pass those by.
//!
//! # Locking
//! The allocator's.
//!
//! # Limits
//! `mallopt`, `mallinfo`, `malloc_trim` and `malloc_stats` stay the C library's and speak of its own heap, which is empty.
//! `realloc(p, 0)` frees, as the C library's does.
//!
//! # Safety
//! The functions have C's contracts, which their callers keep. No function here allocates on its way, so none is
//! entered again from itself.
#![allow(unsafe_code)]
// The exported functions are the C library's: their contracts are in its manual.
#![allow(clippy::missing_safety_doc)]

#[cfg(target_arch = "x86_64")]
#[path = "../../src/tls.rs"]
mod tls;

use std::ffi::{c_int, c_void};
use std::ptr::null_mut;

const PAGE: usize = 4096;

#[cold]
fn out_of_memory() -> *mut c_void {
    set_errno(libc::ENOMEM);
    null_mut()
}

fn set_errno(errno: c_int) {
    // SAFETY: the calling thread's own errno.
    unsafe { *libc::__errno_location() = errno };
}

#[inline(always)]
fn checked(block: *mut c_void) -> *mut c_void {
    if block.is_null() { out_of_memory() } else { block }
}

/// Whether `block` is of this heap. Tells the preload library, too, that this one is loaded.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_heap_owns(block: *const c_void) -> bool {
    usvm_alloc::owns(block)
}

/// malloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc(size: usize) -> *mut c_void {
    // SAFETY: the caller's.
    checked(unsafe { usvm_alloc::malloc(size) })
}

/// calloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
    // SAFETY: the caller's.
    checked(unsafe { usvm_alloc::calloc(count, size) })
}

/// realloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn realloc(block: *mut c_void, size: usize) -> *mut c_void {
    if size == 0 && !block.is_null() {
        // SAFETY: the caller's.
        unsafe { usvm_alloc::free(block) };
        return null_mut();
    }
    // SAFETY: the caller's.
    checked(unsafe { usvm_alloc::realloc(block, size) })
}

/// reallocarray(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn reallocarray(block: *mut c_void, count: usize, size: usize) -> *mut c_void {
    match count.checked_mul(size) {
        // SAFETY: the caller's.
        Some(bytes) => unsafe { realloc(block, bytes) },
        None => out_of_memory(),
    }
}

/// free(3). Keeps errno.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free(block: *mut c_void) {
    // SAFETY: the caller's.
    unsafe { usvm_alloc::free(block) }
}

/// C23's free_sized.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free_sized(block: *mut c_void, _: usize) {
    // SAFETY: the caller's.
    unsafe { usvm_alloc::free(block) }
}

/// C23's free_aligned_sized.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free_aligned_sized(block: *mut c_void, _: usize, _: usize) {
    // SAFETY: the caller's.
    unsafe { usvm_alloc::free(block) }
}

/// The name that free had with some old compilers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cfree(block: *mut c_void) {
    // SAFETY: the caller's.
    unsafe { usvm_alloc::free(block) }
}

/// aligned_alloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aligned_alloc(align: usize, size: usize) -> *mut c_void {
    // SAFETY: the caller's.
    unsafe { memalign(align, size) }
}

/// memalign(3): an alignment that is no power of two is rounded up, as the C library's does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memalign(align: usize, size: usize) -> *mut c_void {
    let Some(align) = align.max(1).checked_next_power_of_two().filter(|a| *a <= 1 << 47) else {
        set_errno(libc::EINVAL);
        return null_mut();
    };
    // SAFETY: the caller's.
    checked(unsafe { usvm_alloc::aligned_alloc(align, size) })
}

/// posix_memalign(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_memalign(into: *mut *mut c_void, align: usize, size: usize) -> c_int {
    if !align.is_power_of_two() || align < size_of::<*mut c_void>() {
        return libc::EINVAL;
    }
    // SAFETY: the caller's.
    let block = unsafe { usvm_alloc::aligned_alloc(align, size) };
    if block.is_null() {
        return libc::ENOMEM;
    }
    // SAFETY: the caller's pointer to a pointer.
    unsafe { *into = block };
    0
}

/// valloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn valloc(size: usize) -> *mut c_void {
    // SAFETY: the caller's.
    unsafe { memalign(PAGE, size) }
}

/// pvalloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvalloc(size: usize) -> *mut c_void {
    match size.max(1).checked_next_multiple_of(PAGE) {
        // SAFETY: the caller's.
        Some(size) => unsafe { memalign(PAGE, size) },
        None => out_of_memory(),
    }
}

/// malloc_usable_size(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc_usable_size(block: *mut c_void) -> usize {
    if block.is_null() {
        return 0;
    }
    // SAFETY: the caller's.
    unsafe { usvm_alloc::usable_size(block) }
}
