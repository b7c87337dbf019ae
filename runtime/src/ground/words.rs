//! Standard error, for what is told when the program has ended.
//!
//! # Overview
//! Many programs close their standard error when they end, before the destructors of libraries run (GNU's coreutils do).
//! A runtime that will have something to tell keeps a descriptor of its own of what was standard error at its start
//! (`keep`); [`write()`] takes that one, and the program's where there is none.
//!
//! # Locking
//! None: one atomic number. [`write()`] makes one system call for as much as the kernel takes, and allocates nothing: service
//! threads may call it.
//!
//! # Limits
//! Whoever reads the other end of a pipe sees its end when the runtime has ended, not when the program closes its own.
//!
//! # Safety
//! A system call with a live buffer. The kept descriptor is open until `Kept` is dropped, which takes the number away
//! first.
#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::fd::{AsFd, AsRawFd};

use crate::ground::fds;

const NONE: i32 = -1;

/// The kept one's number.
static KEPT: AtomicI32 = AtomicI32::new(NONE);

/// Standard error as it was when the runtime started.
#[derive(Debug)]
pub(crate) struct Kept(#[expect(dead_code, reason = "open as long as it lives")] fds::Kept);

/// Keeps standard error; `None` where it is closed already.
pub(crate) fn keep() -> Option<Kept> {
    let _arrival = fds::Arrival::new();
    let copy = rustix::io::fcntl_dupfd_cloexec(io::stderr(), 3).ok()?;
    let kept = fds::Kept::new(copy);
    KEPT.store(kept.as_fd().as_raw_fd(), Ordering::Release);
    Some(Kept(kept))
}

impl Drop for Kept {
    fn drop(&mut self) {
        KEPT.store(NONE, Ordering::Release);
    }
}

/// In a forked child: its parent's is closed with all else that the parent kept.
pub(crate) fn forget_in_child() {
    KEPT.store(NONE, Ordering::Release);
}

/// Writes `words` to standard error. Nobody is left to tell where that is impossible.
pub fn write(words: &[u8]) {
    let fd = match KEPT.load(Ordering::Acquire) {
        NONE => libc::STDERR_FILENO,
        kept => kept,
    };
    let mut rest = words;
    while !rest.is_empty() {
        // SAFETY: live bytes; a descriptor that is closed is an error.
        let wrote = unsafe { libc::write(fd, rest.as_ptr().cast(), rest.len()) };
        match usize::try_from(wrote) {
            Ok(0) => return,
            Ok(n) => rest = &rest[n..],
            Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}
