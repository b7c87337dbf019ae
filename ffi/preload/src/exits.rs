//! Programs that leave without their exit handlers.
//!
//! # Overview
//! `_exit` ends the process where it stands. Nothing needs to come home for that; the statistics are told, if they are
//! asked for. So they are at `quick_exit`, before the functions that the program had registered for it when the runtime
//! started.
//!
//! # Limits
//! A signal handler that leaves from the middle of a call into usvm tells nothing: what telling needs may be locked.
//!
//! # Safety
//! Only passes arguments on, and registers a function of this library, which stays.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

use usvm::ground::alloc;

use crate::next::Next;
use crate::start;

// SAFETY: the C library's signature.
static EXIT: Next<unsafe extern "C" fn(c_int) -> !> = unsafe { Next::new(c"_exit") };

pub(crate) fn look_up() {
    EXIT.look_up();
}

unsafe extern "C" {
    /// What `at_quick_exit` is inside, which the C library does not export.
    fn __cxa_at_quick_exit(f: extern "C" fn(*mut c_void), object: *mut c_void) -> c_int;
}

/// Once: a forked child has what its parent registered.
pub(crate) fn tell_at_quick_exit() {
    extern "C" fn tell(_: *mut c_void) {
        if !alloc::is_internal() {
            start::report();
        }
    }
    static REGISTERED: AtomicBool = AtomicBool::new(false);
    if !REGISTERED.swap(true, Ordering::Relaxed) {
        // SAFETY: a function that is never unloaded, registered for no object.
        unsafe { __cxa_at_quick_exit(tell, std::ptr::null_mut()) };
    }
}

/// _exit(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn _exit(status: c_int) -> ! {
    if !alloc::is_internal() {
        start::report();
    }
    // SAFETY: the caller's.
    unsafe { EXIT.get()(status) }
}

/// _Exit(3), which is the same.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn _Exit(status: c_int) -> ! {
    // SAFETY: the caller's.
    unsafe { _exit(status) }
}
