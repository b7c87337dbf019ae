//! usvm's own file descriptors, kept out of the program's way.
//!
//! # Overview
//! A descriptor that lives as long as a runtime is [`Kept`]: it gets a high number, so that programs that expect small
//! ones find them, and stands in a table that [`is_kept`] reads. The preload library asks it when the program closes
//! descriptors that it did not open (daemons, sandboxes).
//!
//! # Locking
//! None: one atomic word for each place in the table. [`is_kept`] may be called anywhere, also in signal handlers.
//!
//! # Limits
//! The table has [`PLACES`] places; a descriptor beyond them works and is not protected. A forked child closes what is
//! in the table, see `close_all_in_child`.
//!
//! # Safety
//! Closes descriptors by number in a forked child, where nobody uses their owners any more.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use crate::ground::inject::{self, Call};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Descriptors that can be protected at once.
pub const PLACES: usize = 64;

/// Numbers from here on, or this far below RLIMIT_NOFILE if that is lower.
const HIGH: u64 = 4096;

const FREE: i32 = -1;

static KEPT: [AtomicI32; PLACES] = [const { AtomicI32::new(FREE) }; PLACES];
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// A descriptor of usvm's own.
#[derive(Debug)]
pub struct Kept(OwnedFd);

impl Kept {
    /// Gives `fd` a high number, if there is one, and protects it.
    pub fn new(fd: OwnedFd) -> Self {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(HIGH);
        let from = limit.min(HIGH).saturating_sub(PLACES as u64);
        let high = inject::check(Call::DupHigh).ok();
        let high = high.and_then(|()| rustix::io::fcntl_dupfd_cloexec(&fd, from as RawFd).ok());
        let fd = high.unwrap_or(fd);
        let number = fd.as_raw_fd();
        let free = |place: &&AtomicI32| {
            place.compare_exchange(FREE, number, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        if KEPT.iter().find(free).is_some() {
            COUNT.fetch_add(1, Ordering::Release);
        }
        Self(fd)
    }
}

impl Kept {
    /// The bare number, for an owner who closes it himself and says [`forget`] before.
    pub(crate) fn into_number(self) -> RawFd {
        let number = self.0.as_raw_fd();
        std::mem::forget(self);
        number
    }
}

impl AsFd for Kept {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // Before it is closed: afterwards the number may be the program's.
        forget(self.0.as_raw_fd());
    }
}

/// `number` is not usvm's any more.
pub(crate) fn forget(number: RawFd) {
    let taken = |place: &&AtomicI32| {
        place.compare_exchange(number, FREE, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    };
    if KEPT.iter().find(taken).is_some() {
        COUNT.fetch_sub(1, Ordering::Release);
    }
}

/// Whether `fd` is usvm's own and not the program's to close.
#[inline]
pub fn is_kept(fd: RawFd) -> bool {
    fd >= 0 && any_kept() && KEPT.iter().any(|place| place.load(Ordering::Acquire) == fd)
}

/// Whether there is any.
#[inline]
pub fn any_kept() -> bool {
    COUNT.load(Ordering::Acquire) > 0
}

/// The descriptors in the table, in no order, as far as they fit `into`; how many.
pub fn kept(into: &mut [RawFd; PLACES]) -> usize {
    let mut count = 0;
    for number in KEPT.iter().map(|place| place.load(Ordering::Acquire)).filter(|fd| *fd != FREE) {
        into[count] = number;
        count += 1;
    }
    count
}

/// Closes what the parent's runtime kept open: the child's copies serve nobody.
///
/// # Safety
/// For the only thread of a child right after fork, where the owners of these descriptors are never used or dropped.
pub(crate) unsafe fn close_all_in_child() {
    for place in &KEPT {
        let number = place.swap(FREE, Ordering::AcqRel);
        if number != FREE {
            // SAFETY: an open descriptor; its other owner is never dropped (the caller's promise).
            drop(unsafe { OwnedFd::from_raw_fd(number) });
        }
    }
    COUNT.store(0, Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_until_dropped() {
        let kept = Kept::new(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap());
        let number = kept.as_fd().as_raw_fd();
        assert!(number >= 256, "{number} is where programs look for theirs");
        assert!(is_kept(number) && !is_kept(0) && !is_kept(-1));
        let mut list = [0; PLACES];
        let count = super::kept(&mut list);
        assert!(list[..count].contains(&number));
        drop(kept);
        assert!(!is_kept(number));
    }
}
