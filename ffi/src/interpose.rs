//! Functions of the C library that change mappings, for the sake of notifiers.
//!
//! # Overview
//! While a notifier is registered, `munmap` and its like tell callbacks first and then make the system call. Otherwise,
//! and for usvm's own calls, they are the system call and nothing else.
//!
//! Their symbols here are `usvm_watched_munmap` and so on; libusvm.so and libusvm.a have them as `munmap` (ffi/link.sh
//! renames them), and the preload library's own functions of these names call them.
//!
//! For this to happen the library must come before the C library in the search order: a program that links with it or
//! preloads it. The names carry no symbol version, so that references to `munmap@GLIBC_2.2.5` of other libraries find
//! them too.
//!
//! # Limits
//! The C library's calls of itself (free, pthread_join, fclose) and direct system calls do not come here. `brk` and
//! `shmdt` are not watched.
//!
//! # Safety
//! Each function has its namesake's contract and hands its arguments to the kernel as they are.
#![allow(unsafe_code)]
#![allow(clippy::missing_safety_doc, reason = "each has its namesake's contract")]

use std::ffi::{c_int, c_long, c_void};

use usvm::ground::addr::Span;
use usvm::ground::alloc;

use crate::api::notify::{self, Reason};
use crate::api::result;

type Address = *mut c_void;

/// Whether somebody wants to hear of what this thread does.
fn heard() -> bool {
    notify::anybody() && !alloc::is_service_thread() && !result::is_inside()
}

fn telling(changes: &[(Reason, Span)], real: impl FnOnce() -> c_long) -> c_long {
    if !heard() {
        return real();
    }
    alloc::internal(|| notify::telling(changes, real))
}

fn span(at: Address, len: usize) -> Span {
    Span::sized(at.addr() as u64, len as u64)
}

/// munmap(2).
#[unsafe(export_name = "usvm_watched_munmap")]
pub unsafe extern "C" fn munmap(addr: Address, len: usize) -> c_int {
    // SAFETY: the caller's.
    let real = || unsafe { libc::syscall(libc::SYS_munmap, addr, len) };
    telling(&[(Reason::Unmap, span(addr, len))], real) as c_int
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
    let mapped =
        if flags & libc::MAP_FIXED != 0 && flags & libc::MAP_FIXED_NOREPLACE != libc::MAP_FIXED_NOREPLACE {
            telling(&[(Reason::Unmap, span(addr, len))], real)
        } else {
            real()
        };
    std::ptr::with_exposed_provenance_mut(mapped as usize)
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
    let from = span(addr, old);
    let tail = Span::new(from.start.saturating_add(new as u64), from.end);
    let mapped = if flags & libc::MREMAP_FIXED != 0 {
        telling(&[(Reason::Remap, from), (Reason::Unmap, span(to, new))], real)
    } else if flags & libc::MREMAP_MAYMOVE != 0 && (new > old || wants_place) {
        telling(&[(Reason::Remap, from)], real)
    } else if new < old {
        telling(&[(Reason::Unmap, tail)], real)
    } else {
        real()
    };
    std::ptr::with_exposed_provenance_mut(mapped as usize)
}

/// madvise(2).
#[unsafe(export_name = "usvm_watched_madvise")]
pub unsafe extern "C" fn madvise(addr: Address, len: usize, advice: c_int) -> c_int {
    // SAFETY: the caller's.
    let real = || unsafe { libc::syscall(libc::SYS_madvise, addr, len, advice) };
    const DONTNEED_LOCKED: c_int = 24;
    let dropped = match advice {
        libc::MADV_DONTNEED | libc::MADV_FREE | libc::MADV_REMOVE | DONTNEED_LOCKED => {
            telling(&[(Reason::Discard, span(addr, len))], real)
        }
        _ => real(),
    };
    dropped as c_int
}

/// mprotect(2).
#[unsafe(export_name = "usvm_watched_mprotect")]
pub unsafe extern "C" fn mprotect(addr: Address, len: usize, prot: c_int) -> c_int {
    // SAFETY: the caller's.
    let real = || unsafe { libc::syscall(libc::SYS_mprotect, addr, len, prot) };
    telling(&[(Reason::Protect, span(addr, len))], real) as c_int
}
