//! Whether this is the process that claimed to be it, asked without a system call: a thread under a seccomp filter may not
//! even ask for its process id.
//!
//! # Overview
//! One page of memory that the kernel empties in every child (MADV_WIPEONFORK), also in those that a raw clone makes. A
//! child of vfork shares its parent's memory and so counts as its parent, whose mappings it changes.
//!
//! # Locking
//! None.
//!
//! # Safety
//! The page is mapped once and never unmapped; only atomic accesses reach it.
#![allow(unsafe_code)]

use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::ground::addr::Span;
use crate::ground::inject::{self, Call};
use crate::host::exempt;

const LEN: usize = 4096;

/// The page, whose first word is 1 in the process that claimed.
static PAGE: AtomicPtr<AtomicU32> = AtomicPtr::new(null_mut());
/// The process, for want of a page.
static PID: AtomicU32 = AtomicU32::new(0);

/// From now on this is the process.
pub(crate) fn claim() {
    PID.store(std::process::id(), Ordering::Relaxed);
    let page = PAGE.load(Ordering::Acquire);
    let page = if page.is_null() { make() } else { page };
    if !page.is_null() {
        // SAFETY: a page that was mapped below and stays.
        unsafe { &*page }.store(1, Ordering::Release);
    }
}

/// Whether it is.
pub(crate) fn is_here() -> bool {
    match PAGE.load(Ordering::Acquire) {
        page if page.is_null() => PID.load(Ordering::Relaxed) == std::process::id(),
        // SAFETY: as above.
        page => unsafe { &*page }.load(Ordering::Acquire) == 1,
    }
}

/// Whether this is a child with memory of its own. `false` also where that cannot be told from a child of vfork.
pub(crate) fn is_child() -> bool {
    let page = PAGE.load(Ordering::Acquire);
    // SAFETY: as above.
    !page.is_null() && unsafe { &*page }.load(Ordering::Acquire) != 1
}

/// Maps the page; null where the kernel gives none.
fn make() -> *mut AtomicU32 {
    if inject::check(Call::Mmap).is_err() {
        return null_mut();
    }
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nobody.
    let Ok(page) = (unsafe { mmap_anonymous(null_mut(), LEN, prot, MapFlags::PRIVATE) }) else {
        return null_mut();
    };
    // SAFETY: the page just mapped, which nobody knows yet.
    let wiped = unsafe { madvise(page, LEN, Advice::LinuxWipeOnFork) };
    let mine = page.cast::<AtomicU32>();
    if wiped.is_ok() && PAGE.compare_exchange(null_mut(), mine, Ordering::AcqRel, Ordering::Acquire).is_ok() {
        exempt::exempt(Span::sized(page.addr() as u64, LEN as u64));
        return mine;
    }
    // SAFETY: still nobody else's.
    let _ = unsafe { munmap(page, LEN) };
    PAGE.load(Ordering::Acquire)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_not_here() {
        claim();
        assert!(is_here());
        // SAFETY: the child makes no call but its end.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let code = i32::from(is_here() || !is_child());
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(code) };
        }
        let mut status = -1;
        // SAFETY: waits for the child just made.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0, "the child found the page as it was");
        assert!(is_here() && !is_child());
    }
}
