//! Calls that change mappings, watched for notifiers of the C interface.
//!
//! # Overview
//! While a notifier is registered ([`usvm_capi::interpose`]), callbacks are told before the change, as libusvm does it in a
//! program that only links with it. Otherwise a call is passed on, after one branch and a look at who calls:
//!
//! | who calls | what follows |
//! |---|---|
//! | the program | the function of the next library: another interposer (a heap profiler, a sanitizer, libusvm), or the C library |
//! | usvm itself | the system call: another library's code must not run on a thread that serves faults |
//! | anybody, before this library's constructor | the system call: the dynamic linker must not be asked from inside a malloc that is being set up |
//!
//! `mremap` is in [`crate::mappings`].
//!
//! # Limits
//! As for `usvm_notifier_register`: what the C library unmaps inside itself and direct system calls do not come here.
//!
//! # Safety
//! Each function has its namesake's contract and passes its arguments on as they are.

use std::ffi::c_int;

use usvm::ground::alloc;
use usvm_capi::interpose::{self, Address, address};

use crate::next::Next;
use crate::start;

type Map = unsafe extern "C" fn(Address, usize, c_int, c_int, c_int, i64) -> Address;
type Change = unsafe extern "C" fn(Address, usize, c_int) -> c_int;

// SAFETY: the C library's signature.
static MUNMAP: Next<unsafe extern "C" fn(Address, usize) -> c_int> = unsafe { Next::new(c"munmap") };
// SAFETY: as above.
static MMAP: Next<Map> = unsafe { Next::new(c"mmap") };
// SAFETY: as above.
static MMAP64: Next<Map> = unsafe { Next::new(c"mmap64") };
// SAFETY: as above.
static MADVISE: Next<Change> = unsafe { Next::new(c"madvise") };
// SAFETY: as above.
static MPROTECT: Next<Change> = unsafe { Next::new(c"mprotect") };

pub(crate) fn look_up() {
    MUNMAP.look_up();
    MMAP.look_up();
    MMAP64.look_up();
    MADVISE.look_up();
    MPROTECT.look_up();
}

/// The function that a call is passed on to; none where it is the system call.
#[inline]
pub(crate) fn behind<F: Copy>(next: &Next<F>) -> Option<F> {
    if alloc::is_internal() { None } else { next.known() }
}

/// munmap(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn munmap(addr: Address, len: usize) -> c_int {
    let next = behind(&MUNMAP);
    // SAFETY: the caller's.
    interpose::munmap(addr, len, || unsafe {
        match next {
            Some(next) => next(addr, len),
            None => libc::syscall(libc::SYS_munmap, addr, len) as c_int,
        }
    })
}

/// # Safety
/// As mmap.
#[inline]
unsafe fn map(
    next: &Next<Map>,
    addr: Address,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> Address {
    let next = behind(next);
    // SAFETY: the caller's.
    interpose::mmap(addr, len, flags, || unsafe {
        match next {
            Some(next) => next(addr, len, prot, flags, fd, offset),
            None => address(libc::syscall(libc::SYS_mmap, addr, len, prot, flags, fd, offset)),
        }
    })
}

/// mmap(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    addr: Address,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> Address {
    // SAFETY: the caller's.
    unsafe { map(&MMAP, addr, len, prot, flags, fd, offset) }
}

/// mmap(2), by its other name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    addr: Address,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> Address {
    // SAFETY: the caller's.
    unsafe { map(&MMAP64, addr, len, prot, flags, fd, offset) }
}

/// madvise(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(addr: Address, len: usize, advice: c_int) -> c_int {
    let next = behind(&MADVISE);
    // SAFETY: the caller's.
    let result = interpose::madvise(addr, len, advice, || unsafe {
        match next {
            Some(next) => next(addr, len, advice),
            None => libc::syscall(libc::SYS_madvise, addr, len, advice) as c_int,
        }
    });
    // userfaultfd tells nothing of guard regions: what is on a device would come back when they are removed.
    if result == 0
        && advice == interpose::MADV_GUARD_INSTALL
        && start::is_owner()
        && !alloc::is_internal()
        && let Some(runtime) = usvm_capi::process::current()
    {
        // An error: the runtime has ended, and everything is home.
        let _ = runtime.discard(addr.addr() as u64, len as u64);
    }
    result
}

/// mprotect(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mprotect(addr: Address, len: usize, prot: c_int) -> c_int {
    let next = behind(&MPROTECT);
    // SAFETY: the caller's.
    interpose::mprotect(addr, len, prot, || unsafe {
        match next {
            Some(next) => next(addr, len, prot),
            None => libc::syscall(libc::SYS_mprotect, addr, len, prot) as c_int,
        }
    })
}
