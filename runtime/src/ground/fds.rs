//! usvm's own file descriptors, kept out of the program's way.
//!
//! # Overview
//! A descriptor that lives as long as a runtime is [`Kept`]: it gets a high number, so that programs that expect small
//! ones find them, and stands in a table that [`is_kept`] reads. The preload library asks it when the program closes
//! descriptors that it did not open (daemons, sandboxes).
//!
//! A forked child closes what is in the table. A child's userfaultfd that it did not close would be one that its sibling,
//! whose it is, waits for without end. So none is outside the table while a fork copies the descriptors: one that arrives
//! is waited for (`Arrival`), one that goes stays until the fork is over, and one thread forks after the other.
//!
//! # Locking
//! For the table none: one atomic word for each place. [`is_kept`] may be called anywhere, also in signal handlers. The
//! lock of what stays until a fork is over is innermost and never held over one.
//!
//! # Limits
//! The table has [`PLACES`] places; a descriptor beyond them works and is not protected. A forked child closes what is
//! in the table, see `close_all_in_child`. Forks without handlers (a raw clone) that two threads do at one time are not
//! kept apart; neither are forks that take longer than a second.
//!
//! # Safety
//! Closes descriptors by number in a forked child, where nobody uses their owners any more.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::ground::atfork::Nesting;
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
pub struct Kept(Option<OwnedFd>);

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
        Self(Some(fd))
    }

    /// Closes it at once, also beside a fork: for one that does no harm in a child.
    pub(crate) fn close_now(mut self) {
        if let Some(fd) = self.0.take() {
            release(fd);
        }
    }

    fn fd(&self) -> &OwnedFd {
        self.0.as_ref().expect("there until it is dropped")
    }
}

impl Kept {
    /// The bare number, for an owner who closes it himself and says [`forget`] before.
    pub(crate) fn into_number(self) -> RawFd {
        let number = self.fd().as_raw_fd();
        std::mem::forget(self);
        number
    }
}

impl AsFd for Kept {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd().as_fd()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let Some(fd) = self.0.take() else { return };
        let mut gate = gate();
        if gate.forking > 0 {
            gate.late.push(fd);
        } else {
            release(fd);
        }
    }
}

fn release(fd: OwnedFd) {
    // Before it is closed: afterwards the number may be the program's.
    forget(fd.as_raw_fd());
}

/// What forks and descriptors that go have to do with each other.
struct Gate {
    /// Threads between their fork's first handler and its last.
    forking: u32,
    /// What was dropped meanwhile.
    late: Vec<OwnedFd>,
}

static GATE: Mutex<Gate> = Mutex::new(Gate { forking: 0, late: Vec::new() });
/// Threads that may be given a descriptor by the kernel just now.
static ARRIVING: AtomicU32 = AtomicU32::new(0);

thread_local! {
    static FORKS: Nesting = const { Nesting::new() };
}

/// How long a fork waits for another one, and then for what arrives. Both take microseconds, if their threads run.
const PATIENCE: Duration = Duration::from_secs(1);

fn gate() -> MutexGuard<'static, Gate> {
    GATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While this lives the calling thread may be given a descriptor that is not yet [`Kept`].
pub(crate) struct Arrival(());

impl Arrival {
    pub(crate) fn new() -> Self {
        ARRIVING.fetch_add(1, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        ARRIVING.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Lets the calling thread fork, if no other does, or anyhow if it does not wait for that.
fn take_turn(waits: bool) -> bool {
    let mut gate = gate();
    let turn = gate.forking == 0 || !waits;
    gate.forking += u32::from(turn);
    turn
}

/// The calling thread is about to fork.
pub(crate) fn before_fork() {
    // A fork inside a handler of a fork has its turn already.
    if FORKS.with(Nesting::enter) {
        // Where no descriptor is kept and none arrives, a child cannot get another's.
        let mut waits = any_kept() || ARRIVING.load(Ordering::SeqCst) > 0;
        let mut begun = None;
        while !take_turn(waits) {
            waits = wait(&mut begun);
        }
    }
    // Whatever the forks before this one brought was read before they returned.
    let mut begun = None;
    while ARRIVING.load(Ordering::SeqCst) > 0 && wait(&mut begun) {}
}

/// Waits a little; whether to go on with it. `begun`: when the waiting did.
fn wait(begun: &mut Option<Instant>) -> bool {
    let begun = *begun.get_or_insert_with(Instant::now);
    std::thread::sleep(Duration::from_micros(20));
    begun.elapsed() < PATIENCE
}

/// The calling thread has forked, or could not.
pub(crate) fn after_fork() {
    if !FORKS.with(Nesting::leave) {
        return;
    }
    let mut gate = gate();
    gate.forking -= 1;
    if gate.forking == 0 {
        gate.late.drain(..).for_each(release);
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

/// In a child nobody forks and nothing arrives.
///
/// # Safety
/// For the only thread of a child right after fork.
pub(crate) unsafe fn forget_forks() {
    ARRIVING.store(0, Ordering::SeqCst);
    FORKS.with(Nesting::clear);
    // SAFETY: no other thread exists, and this one does not hold the lock. What is in there is closed, and not dropped.
    unsafe {
        std::ptr::write((&raw const GATE).cast_mut(), Mutex::new(Gate { forking: 0, late: Vec::new() }))
    };
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
