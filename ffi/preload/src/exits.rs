//! Programs that leave without their exit handlers.
//!
//! # Overview
//! `_exit` ends the process where it stands. Nothing needs to come home for that; the statistics are told, if they are
//! asked for.
//!
//! # Safety
//! Only passes arguments on.

use std::ffi::c_int;

use crate::next::Next;
use crate::start;

// SAFETY: the C library's signature.
static EXIT: Next<unsafe extern "C" fn(c_int) -> !> = unsafe { Next::new(c"_exit") };

pub(crate) fn look_up() {
    EXIT.look_up();
}

/// _exit(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn _exit(status: c_int) -> ! {
    start::report();
    // SAFETY: the caller's.
    unsafe { EXIT.get()(status) }
}

/// _Exit(3), which is the same.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn _Exit(status: c_int) -> ! {
    // SAFETY: the caller's.
    unsafe { _exit(status) }
}
