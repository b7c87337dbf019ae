//! Handlers of fork that stay to the end.
//!
//! # Overview
//! The C library takes the handlers of pthread_atfork away when the destructors of the library that registered them run, at
//! the end of the process. A thread that is in one of them just then ends the process (glibc 2.36 and later: "array index
//! not less than array length"), and ours wait while a runtime ends. [`register`] says that they belong to no library.
//!
//! # Safety
//! The C library's own function, with the arguments that its pthread_atfork gives it.
#![allow(unsafe_code)]

use std::ffi::c_int;

/// What runs around a fork.
pub type Handler = Option<unsafe extern "C" fn()>;

/// pthread_atfork(3), for good. Gives an errno, or 0.
///
/// # Safety
/// The handlers' code is never unloaded.
pub unsafe fn register(prepare: Handler, parent: Handler, child: Handler) -> c_int {
    #[cfg(target_env = "gnu")]
    {
        unsafe extern "C" {
            fn __register_atfork(
                prepare: Handler,
                parent: Handler,
                child: Handler,
                library: *mut std::ffi::c_void,
            ) -> c_int;
        }
        // SAFETY: the caller's.
        unsafe { __register_atfork(prepare, parent, child, std::ptr::null_mut()) }
    }
    #[cfg(not(target_env = "gnu"))]
    // SAFETY: the caller's.
    unsafe {
        libc::pthread_atfork(prepare, parent, child)
    }
}
