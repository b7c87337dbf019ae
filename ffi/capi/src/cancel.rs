//! Calls that are not cancellation points.
//!
//! # Overview
//! What usvm does inside a call of the program may open and read files, where the C library ends a thread that
//! pthread_cancel has marked. That would leave a mapping half moved, or unwind through code that must not be unwound.
//! [`shielded`] puts it off until the call is over.
//!
//! # Safety
//! The C library's own function, with a live place for the result.
#![allow(unsafe_code)]

use std::ffi::c_int;

const DISABLE: c_int = 1;

unsafe extern "C" {
    fn pthread_setcancelstate(state: c_int, before: *mut c_int) -> c_int;
}

/// Gives the thread its state back.
struct Restore(c_int);

impl Drop for Restore {
    fn drop(&mut self) {
        let mut now = 0;
        // SAFETY: see the module. It cannot fail for a state that was the thread's.
        unsafe { pthread_setcancelstate(self.0, &mut now) };
    }
}

/// Runs `f` on a thread that is not cancelled meanwhile.
pub fn shielded<T>(f: impl FnOnce() -> T) -> T {
    let mut before = 0;
    // SAFETY: see the module.
    let known = unsafe { pthread_setcancelstate(DISABLE, &mut before) } == 0;
    let _restore = known.then(|| Restore(before));
    f()
}
