//! C++'s operators new and delete.
//!
//! # Overview
//! All forms of the Itanium ABI, for 64-bit sizes. When memory is short, `new` calls the program's new-handler and tries
//! again, or throws `std::bad_alloc` by the C++ library's own function, found when it is needed.
//!
//! # Safety
//! As the parent's. The functions that throw are declared so ("C-unwind").
#![allow(non_snake_case)]

use std::ffi::{CStr, c_void};
use std::mem::transmute;

fn find(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: a name that ends with a zero.
    let at = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!at.is_null()).then_some(at)
}

/// The program's new-handler, if it has set one.
fn handler() -> Option<unsafe extern "C-unwind" fn()> {
    let get = find(c"_ZSt15get_new_handlerv")?;
    // SAFETY: std::get_new_handler, which gives a function pointer or null.
    unsafe {
        transmute::<*mut c_void, unsafe extern "C" fn() -> Option<unsafe extern "C-unwind" fn()>>(get)()
    }
}

fn allocate(size: usize, align: usize) -> *mut c_void {
    // SAFETY: given to the caller of `new`.
    unsafe { if align <= 16 { usvm_alloc::malloc(size) } else { usvm_alloc::aligned_alloc(align, size) } }
}

/// Out of memory: handlers until one helps, then the exception.
#[cold]
unsafe extern "C-unwind" fn throw_or_retry(size: usize, align: usize) -> *mut c_void {
    while let Some(handler) = handler() {
        // SAFETY: the program's own handler, which may throw.
        unsafe { handler() };
        let block = allocate(size, align);
        if !block.is_null() {
            return block;
        }
    }
    if let Some(throw) = find(c"_ZSt17__throw_bad_allocv").or_else(|| find(c"_ZNSt3__117__throw_bad_allocEv"))
    {
        // SAFETY: std::__throw_bad_alloc of libstdc++ or libc++, which throws.
        unsafe { transmute::<*mut c_void, unsafe extern "C-unwind" fn()>(throw)() };
    }
    // SAFETY: ends the process: there is nobody to throw.
    unsafe { libc::abort() }
}

unsafe extern "C-unwind" fn new(size: usize, align: usize) -> *mut c_void {
    let block = allocate(size, align);
    if block.is_null() {
        // SAFETY: as above.
        return unsafe { throw_or_retry(size, align) };
    }
    block
}

/// Without exceptions the handler is called, too, as long as there is one. One that throws ends the program.
unsafe extern "C" fn new_nothrow(size: usize, align: usize) -> *mut c_void {
    let mut block = allocate(size, align);
    while block.is_null()
        && let Some(handler) = handler()
    {
        // SAFETY: the program's own handler.
        unsafe { handler() };
        block = allocate(size, align);
    }
    block
}

macro_rules! operators {
    (new { $($new:ident)* } aligned { $($aligned:ident)* } nothrow { $($nothrow:ident)* }
     nothrow aligned { $($quiet:ident)* } delete { $($delete:ident($($rest:ty),*))* }) => {
        $(
            /// operator new.
            #[unsafe(no_mangle)]
            pub unsafe extern "C-unwind" fn $new(size: usize) -> *mut c_void {
                // SAFETY: the caller's.
                unsafe { new(size, 1) }
            }
        )*
        $(
            /// operator new with an alignment.
            #[unsafe(no_mangle)]
            pub unsafe extern "C-unwind" fn $aligned(size: usize, align: usize) -> *mut c_void {
                // SAFETY: the caller's.
                unsafe { new(size, align) }
            }
        )*
        $(
            /// operator new that gives null.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $nothrow(size: usize, _: *const c_void) -> *mut c_void {
                // SAFETY: the caller's.
                unsafe { new_nothrow(size, 1) }
            }
        )*
        $(
            /// operator new with an alignment that gives null.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $quiet(size: usize, align: usize, _: *const c_void) -> *mut c_void {
                // SAFETY: the caller's.
                unsafe { new_nothrow(size, align) }
            }
        )*
        $(
            /// operator delete.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $delete(block: *mut c_void, $(_: $rest),*) {
                // SAFETY: the caller's.
                unsafe { usvm_alloc::free(block) }
            }
        )*
    };
}

operators! {
    new { _Znwm _Znam }
    aligned { _ZnwmSt11align_val_t _ZnamSt11align_val_t }
    nothrow { _ZnwmRKSt9nothrow_t _ZnamRKSt9nothrow_t }
    nothrow aligned { _ZnwmSt11align_val_tRKSt9nothrow_t _ZnamSt11align_val_tRKSt9nothrow_t }
    delete {
        _ZdlPv() _ZdaPv()
        _ZdlPvm(usize) _ZdaPvm(usize)
        _ZdlPvSt11align_val_t(usize) _ZdaPvSt11align_val_t(usize)
        _ZdlPvmSt11align_val_t(usize, usize) _ZdaPvmSt11align_val_t(usize, usize)
        _ZdlPvRKSt9nothrow_t(*const c_void) _ZdaPvRKSt9nothrow_t(*const c_void)
        _ZdlPvSt11align_val_tRKSt9nothrow_t(usize, *const c_void) _ZdaPvSt11align_val_tRKSt9nothrow_t(usize, *const c_void)
    }
}
