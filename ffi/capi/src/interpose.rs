//! Functions of the C library that change mappings, for the sake of notifiers.
//!
//! # Overview
//! While a notifier is registered, `munmap` and its like tell callbacks first and then do what they do. Otherwise, and for
//! usvm's own calls, they do just that: it costs one branch.
//!
//! Each function here is given its namesake's arguments, as far as they matter, and `real`, which makes the call. Who has
//! the C names is the business of the two libraries: libusvm makes the system call (`ffi/src/watched.rs`), the preload
//! library calls whatever library comes next (`ffi/preload/src/watched.rs`).
//!
//! For this to happen the library must come before the C library in the search order: a program that links with it or
//! preloads it. The names carry no symbol version, so that references to `munmap@GLIBC_2.2.5` of other libraries find
//! them too.
//!
//! # Limits
//! The C library's calls of itself (free, pthread_join, fclose) and direct system calls do not come here. `brk` and
//! `shmdt` are not watched.
//!
//! A child of vfork, or of a fork that runs no handlers, finds the notifiers of its parent; it tells nobody.

use std::ffi::{c_int, c_long, c_void};

use usvm::ground::addr::Span;
use usvm::ground::alloc;

use crate::api::notify::{self, Reason};
use crate::api::result::{errno, set_errno};

/// What mappings are named by.
pub type Address = *mut c_void;

/// What a system call that maps answered.
#[inline]
pub fn address(answer: c_long) -> Address {
    std::ptr::with_exposed_provenance_mut(answer as usize)
}

/// Whether somebody wants to hear of what this thread does.
#[inline]
fn heard() -> bool {
    notify::anybody() && !alloc::is_internal() && notify::is_owner()
}

#[inline]
fn telling<T, const N: usize>(changes: impl FnOnce() -> [(Reason, Span); N], real: impl FnOnce() -> T) -> T {
    if !heard() {
        return real();
    }
    alloc::internal(|| notify::telling(&changes(), real))
}

fn span(at: Address, len: usize) -> Span {
    Span::sized(at.addr() as u64, len as u64)
}

/// munmap(2).
#[inline]
pub fn munmap<T>(addr: Address, len: usize, real: impl FnOnce() -> T) -> T {
    telling(|| [(Reason::Unmap, span(addr, len))], real)
}

/// mmap(2).
#[inline]
pub fn mmap<T>(addr: Address, len: usize, flags: c_int, real: impl FnOnce() -> T) -> T {
    const REFUSES: c_int = libc::MAP_FIXED_NOREPLACE;
    if flags & libc::MAP_FIXED == 0 || flags & REFUSES == REFUSES {
        return real();
    }
    telling(|| [(Reason::Unmap, span(addr, len))], real)
}

/// mremap(2). What is in the last argument's register when a call leaves it out is not looked at.
pub fn mremap<T>(
    addr: Address,
    old: usize,
    new: usize,
    flags: c_int,
    to: Address,
    real: impl FnOnce() -> T,
) -> T {
    let from = span(addr, old);
    if flags & libc::MREMAP_FIXED != 0 {
        return telling(|| [(Reason::Remap, from), (Reason::Unmap, span(to, new))], real);
    }
    if flags & libc::MREMAP_MAYMOVE != 0 && (new > old || flags & libc::MREMAP_DONTUNMAP != 0) {
        return telling(|| [(Reason::Remap, from)], real);
    }
    if new >= old {
        return real();
    }
    let tail = Span::new(from.start.saturating_add(new as u64), from.end);
    telling(|| [(Reason::Unmap, tail)], real)
}

/// MADV_GUARD_INSTALL (Linux 6.13): contents are dropped, and whoever touches the memory gets SIGSEGV.
pub const MADV_GUARD_INSTALL: c_int = 102;

/// madvise(2).
#[inline]
pub fn madvise<T>(addr: Address, len: usize, advice: c_int, real: impl FnOnce() -> T) -> T {
    const DONTNEED_LOCKED: c_int = 24;
    match advice {
        libc::MADV_DONTNEED | libc::MADV_FREE | libc::MADV_REMOVE | DONTNEED_LOCKED | MADV_GUARD_INSTALL => {
            telling(|| [(Reason::Discard, span(addr, len))], real)
        }
        _ => real(),
    }
}

/// mprotect(2). The kernel has no event for it, so devices' mappings are taken away here when it takes rights away.
#[inline]
pub fn mprotect<T>(addr: Address, len: usize, prot: c_int, real: impl FnOnce() -> T) -> T {
    const ALL: c_int = libc::PROT_READ | libc::PROT_WRITE;
    let result = telling(|| [(Reason::Protect, span(addr, len))], real);
    if prot & ALL != ALL && !alloc::is_internal() {
        let errno = errno();
        usvm::protection_changed(addr.addr() as u64, len as u64);
        set_errno(errno);
    }
    result
}
