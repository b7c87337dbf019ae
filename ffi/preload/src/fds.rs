//! usvm's own descriptors stay open.
//!
//! # Overview
//! Daemons and sandboxes close every descriptor there may be, or put another one in its place. For the program usvm's
//! descriptors do not exist: closing one is EBADF and so is fstat, by which programs look what is open; ranges are closed
//! around them, duplicating onto one is EBUSY, and readdir leaves them out of /proc/self/fd.
//!
//! # Limits
//! A program that makes these system calls itself reaches them, and scandir(3) lists them. Other processes see them.
//!
//! # Safety
//! Only passes arguments on. A directory entry is looked at before the caller gets it; it stays until the next readdir.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::io::Write as _;

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

// SAFETY: as above.
static READDIR: Next<unsafe extern "C" fn(*mut libc::DIR) -> *mut libc::dirent> =
    unsafe { Next::new(c"readdir") };
// SAFETY: as above.
static READDIR64: Next<unsafe extern "C" fn(*mut libc::DIR) -> *mut libc::dirent64> =
    unsafe { Next::new(c"readdir64") };

pub(crate) fn look_up() {
    READDIR.look_up();
    READDIR64.look_up();
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

/// readdir(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn readdir(dir: *mut libc::DIR) -> *mut libc::dirent {
    loop {
        // SAFETY: the caller's; an entry is valid until the next call.
        unsafe {
            let entry = READDIR.get()(dir);
            if entry.is_null() || !is_own(dir, &raw const (*entry).d_name) {
                return entry;
            }
        }
    }
}

/// readdir(3), by its other name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn readdir64(dir: *mut libc::DIR) -> *mut libc::dirent64 {
    loop {
        // SAFETY: as above.
        unsafe {
            let entry = READDIR64.get()(dir);
            if entry.is_null() || !is_own(dir, &raw const (*entry).d_name) {
                return entry;
            }
        }
    }
}

/// Whether an entry named `name` of `dir` is one of usvm's descriptors in /proc/self/fd or fdinfo.
///
/// # Safety
/// An open directory and a string that ends with a zero.
unsafe fn is_own(dir: *mut libc::DIR, name: *const [c_char; 256]) -> bool {
    if !fds::any_kept() || alloc::is_internal() {
        return false;
    }
    // SAFETY: the caller's.
    let (name, dir) = unsafe { (CStr::from_ptr(name.cast()), libc::dirfd(dir)) };
    let number = name.to_str().ok().and_then(|name| name.parse().ok());
    number.is_some_and(fds::is_kept) && lists_descriptors(dir)
}

/// Whether `dir` lists this process's descriptors.
fn lists_descriptors(dir: c_int) -> bool {
    // Nothing here may allocate: the caller may be inside its malloc.
    let (mut link, mut place, mut own) = ([0u8; 48], [0u8; 64], [0u8; 32]);
    let asked = write!(&mut link[..47], "/proc/self/fd/{dir}").is_ok();
    let mut rest = &mut own[..];
    let written = write!(rest, "/proc/{}/", std::process::id()).map(|()| rest.len());
    let (true, Ok(left)) = (asked, written) else { return false };
    let own = &own[..32 - left];
    // SAFETY: a path that ends with a zero, and a buffer of that length.
    let len = unsafe { libc::readlink(link.as_ptr().cast(), place.as_mut_ptr().cast(), place.len()) };
    let Some(place) = usize::try_from(len).ok().and_then(|len| place.get(..len)) else { return false };
    place.starts_with(own) && (place.ends_with(b"/fd") || place.ends_with(b"/fdinfo"))
}
