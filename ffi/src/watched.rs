//! The watched functions of the C library, as libusvm has them.
//!
//! # Overview
//! Each tells notifiers ([`usvm_capi::interpose`]) and makes the system call. The symbols here are `usvm_watched_munmap` and
//! so on, so that cargo's own programs keep the C library's; libusvm.so and libusvm.a have them as `munmap` (`ffi/link.sh`
//! renames them).
//!
//! # Safety
//! Each function has its namesake's contract and hands its arguments to the kernel as they are.
#![allow(unsafe_code)]
#![allow(clippy::missing_safety_doc, reason = "each has its namesake's contract")]

use std::ffi::c_int;

use usvm_capi::interpose::{self, Address, address};

/// munmap(2).
#[unsafe(export_name = "usvm_watched_munmap")]
pub unsafe extern "C" fn munmap(addr: Address, len: usize) -> c_int {
    // SAFETY: the caller's.
    interpose::munmap(addr, len, || unsafe { libc::syscall(libc::SYS_munmap, addr, len) }) as c_int
}

/// mmap(2).
#[unsafe(export_name = "usvm_watched_mmap")]
pub unsafe extern "C" fn mmap(
    addr: Address,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: libc::off_t,
) -> Address {
    // SAFETY: the caller's.
    let real = || unsafe { libc::syscall(libc::SYS_mmap, addr, len, prot, flags, fd, offset) };
    address(interpose::mmap(addr, len, flags, real))
}

/// mmap64(3), which is mmap where offsets have 64 bits.
#[unsafe(export_name = "usvm_watched_mmap64")]
pub unsafe extern "C" fn mmap64(
    addr: Address,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: libc::off64_t,
) -> Address {
    // SAFETY: the caller's.
    unsafe { mmap(addr, len, prot, flags, fd, offset) }
}

/// mremap(2). In C the last argument may be left out; what is then in its register is not looked at.
#[unsafe(export_name = "usvm_watched_mremap")]
pub unsafe extern "C" fn mremap(addr: Address, old: usize, new: usize, flags: c_int, to: Address) -> Address {
    let wants_place = flags & (libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP) != 0;
    let to = if wants_place { to } else { std::ptr::null_mut() };
    // SAFETY: the caller's.
    let real = || unsafe { libc::syscall(libc::SYS_mremap, addr, old, new, flags, to) };
    address(interpose::mremap(addr, old, new, flags, to, real))
}

/// madvise(2).
#[unsafe(export_name = "usvm_watched_madvise")]
pub unsafe extern "C" fn madvise(addr: Address, len: usize, advice: c_int) -> c_int {
    // SAFETY: the caller's.
    let real = || unsafe { libc::syscall(libc::SYS_madvise, addr, len, advice) };
    interpose::madvise(addr, len, advice, real) as c_int
}

/// mprotect(2).
#[unsafe(export_name = "usvm_watched_mprotect")]
pub unsafe extern "C" fn mprotect(addr: Address, len: usize, prot: c_int) -> c_int {
    // SAFETY: the caller's.
    let real = || unsafe { libc::syscall(libc::SYS_mprotect, addr, len, prot) };
    interpose::mprotect(addr, len, prot, real) as c_int
}
