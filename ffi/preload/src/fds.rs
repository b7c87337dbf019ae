//! usvm's own descriptors stay open.
//!
//! # Overview
//! Daemons and sandboxes close every descriptor there may be, or put another one in its place. For the program usvm's
//! descriptors do not exist: closing one is EBADF and so is fstat, by which programs look what is open; ranges are closed
//! around them, and duplicating onto one is EBUSY.
//!
//! # Limits
//! /proc/self/fd lists them. A program that makes these system calls itself reaches them.
//!
//! # Safety
//! Only passes arguments on.

use std::ffi::{c_int, c_uint, c_void};

use usvm::ground::alloc;
use usvm::ground::fds::{self, PLACES};

use crate::next::Next;

// SAFETY: the C library's signatures.
static CLOSE: Next<unsafe extern "C" fn(c_int) -> c_int> = unsafe { Next::new(c"close") };
// SAFETY: as above.
static CLOSE_RANGE: Next<unsafe extern "C" fn(c_uint, c_uint, c_int) -> c_int> =
    unsafe { Next::new(c"close_range") };
// SAFETY: as above.
static DUP2: Next<unsafe extern "C" fn(c_int, c_int) -> c_int> = unsafe { Next::new(c"dup2") };
// SAFETY: as above.
static DUP3: Next<unsafe extern "C" fn(c_int, c_int, c_int) -> c_int> = unsafe { Next::new(c"dup3") };

// SAFETY: as above; the structure is only passed on.
static FSTAT: Next<unsafe extern "C" fn(c_int, *mut c_void) -> c_int> = unsafe { Next::new(c"fstat") };
// SAFETY: as above.
static FSTAT64: Next<unsafe extern "C" fn(c_int, *mut c_void) -> c_int> = unsafe { Next::new(c"fstat64") };

pub(crate) fn look_up() {
    FSTAT.look_up();
    FSTAT64.look_up();
    CLOSE.look_up();
    CLOSE_RANGE.look_up();
    DUP2.look_up();
    DUP3.look_up();
}

fn refuse(errno: c_int) -> c_int {
    // SAFETY: the calling thread's own errno.
    unsafe { *libc::__errno_location() = errno };
    -1
}

/// close(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    if fds::is_kept(fd) {
        return refuse(libc::EBADF);
    }
    // SAFETY: the caller's.
    unsafe { CLOSE.get()(fd) }
}

/// fstat(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fstat(fd: c_int, into: *mut c_void) -> c_int {
    if fds::is_kept(fd) && !alloc::is_internal() {
        return refuse(libc::EBADF);
    }
    // SAFETY: the caller's.
    unsafe { FSTAT.get()(fd, into) }
}

/// fstat(2), by its other name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fstat64(fd: c_int, into: *mut c_void) -> c_int {
    if fds::is_kept(fd) && !alloc::is_internal() {
        return refuse(libc::EBADF);
    }
    // SAFETY: the caller's.
    unsafe { FSTAT64.get()(fd, into) }
}

/// dup2(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup2(from: c_int, to: c_int) -> c_int {
    if fds::is_kept(to) {
        return refuse(libc::EBUSY);
    }
    // SAFETY: the caller's.
    unsafe { DUP2.get()(from, to) }
}

/// dup3(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup3(from: c_int, to: c_int, flags: c_int) -> c_int {
    if fds::is_kept(to) {
        return refuse(libc::EBUSY);
    }
    // SAFETY: the caller's.
    unsafe { DUP3.get()(from, to, flags) }
}

/// close_range(2), around usvm's own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    let real = CLOSE_RANGE.get();
    if !fds::any_kept() || first > last {
        // SAFETY: the caller's.
        return unsafe { real(first, last, flags) };
    }
    let mut kept = [0; PLACES];
    let count = fds::kept(&mut kept);
    let kept = &mut kept[..count];
    kept.sort_unstable();
    let mut from = first;
    for own in kept.iter().map(|fd| *fd as c_uint).filter(|fd| (first..=last).contains(fd)) {
        // SAFETY: a part of what the caller asked for.
        if own > from && unsafe { real(from, own - 1, flags) } != 0 {
            return -1;
        }
        from = own + 1;
    }
    if from > last {
        return 0;
    }
    // SAFETY: the rest of it.
    unsafe { real(from, last, flags) }
}

/// closefrom(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn closefrom(low: c_int) {
    let low = low.max(0) as c_uint;
    // SAFETY: what the caller asked for.
    if unsafe { close_range(low, c_uint::MAX, 0) } == 0 {
        return;
    }
    // A kernel or a filter without close_range: one by one.
    // SAFETY: asks for a limit.
    let limit = unsafe { libc::sysconf(libc::_SC_OPEN_MAX) }.clamp(0, 1 << 20) as c_uint;
    for fd in low..limit {
        // SAFETY: what the caller asked for; most are not open.
        unsafe { close(fd as c_int) };
    }
}
