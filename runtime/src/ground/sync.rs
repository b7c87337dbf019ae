//! Waiting without locks: events and fences on a futex word.
//!
//! # Overview
//! An [`Event`] is signalled once, with success or with an error; a [`Fence`] is the waiting half of one,
//! which is all that whoever submitted work gets to see. Both are an `Arc` and cheap to clone. They stand for
//! a kernel's dma_fence: signalled at most once, never unsignalled, with an error that stays readable for as
//! long as someone holds it.
//!
//! # Locking
//! None on the waiting side: a waiter reads one atomic word and sleeps on it with futex(2), so an application
//! thread may wait here while its own stack is being migrated. The outcome is stored before the word says
//! that it is there (release), and read only after the word said so (acquire). Signalling takes no lock
//! either: the first signaller claims the word, the others leave at once.
//!
//! # Limits
//! A forked child has copies that nobody signals. An event that nobody signals is waited for in vain; whoever
//! owns the signalling half must signal it on every path.

use crate::ground::error::{Error, Result};
use crate::ground::inject::{self, Call};
use rustix::fs::Timespec;
use rustix::io::Errno;
use rustix::thread::futex;
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Someone sleeps on the word.
const WAITERS: u32 = 1;
/// A signaller is about to store the outcome.
const CLAIMED: u32 = 2;
/// The outcome is stored.
const DONE: u32 = 4;

#[derive(Default)]
struct State {
    word: AtomicU32,
    failure: OnceLock<Error>,
}

impl State {
    fn signal(&self, outcome: Result<()>) -> bool {
        if self.word.fetch_or(CLAIMED, Ordering::Relaxed) & CLAIMED != 0 {
            return false;
        }
        if let Err(e) = outcome {
            // The claim makes this the only store, so it cannot fail.
            let _ = self.failure.set(e);
        }
        if self.word.swap(CLAIMED | DONE, Ordering::AcqRel) & WAITERS != 0 {
            // Waking can only fail for a bad address, which a live `&AtomicU32` is not.
            let _ = futex::wake(&self.word, futex::Flags::PRIVATE, i32::MAX as u32);
        }
        true
    }

    fn is_signaled(&self) -> bool {
        self.word.load(Ordering::Acquire) & DONE != 0
    }

    fn outcome(&self) -> Result<()> {
        self.failure.get().map_or(Ok(()), |e| Err(e.clone()))
    }

    fn status(&self) -> Option<Result<()>> {
        self.is_signaled().then(|| self.outcome())
    }

    fn wait(&self, timeout: Option<Duration>) -> Result<bool> {
        // A deadline beyond the clock's range is no deadline.
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        loop {
            let seen = self.word.load(Ordering::Acquire);
            if seen & DONE != 0 {
                return self.outcome().map(|()| true);
            }
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(false);
            }
            if seen & WAITERS == 0 {
                let marked =
                    self.word.compare_exchange(seen, seen | WAITERS, Ordering::Relaxed, Ordering::Relaxed);
                if marked.is_err() {
                    continue;
                }
            }
            self.sleep(seen | WAITERS, left);
        }
    }

    /// Sleeps while the word is `seen`, at most `left`. Waking early is no harm: the caller looks again.
    fn sleep(&self, seen: u32, left: Option<Duration>) {
        let left = left.and_then(|d| {
            let tv_sec = i64::try_from(d.as_secs()).ok()?;
            Some(Timespec { tv_sec, tv_nsec: i64::from(d.subsec_nanos()) })
        });
        match wait_on(&self.word, seen, left.as_ref()) {
            Ok(()) | Err(Errno::AGAIN | Errno::INTR | Errno::TIMEDOUT) => {}
            // No reason to return before the event; without the system call, looking again is all there is.
            Err(_) => std::thread::yield_now(),
        }
    }

    fn debug(&self, name: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple(name).field(&self.status()).finish()
    }
}

/// Sleeps while `word` is `seen`, at most `left`. An error or an early return means no more than to look again.
pub(crate) fn wait_on(
    word: &AtomicU32,
    seen: u32,
    left: Option<&Timespec>,
) -> std::result::Result<(), Errno> {
    inject::check(Call::Futex).map_err(|e| Errno::from_raw_os_error(e.0))?;
    futex::wait(word, futex::Flags::PRIVATE, seen, left)
}

/// Something that happens once and may fail: both halves of a [`Fence`]. Clones are the same event.
#[derive(Clone, Default)]
pub struct Event(Arc<State>);

impl Event {
    /// An event that has not happened.
    pub fn new() -> Self {
        Self::default()
    }

    /// Says how it went and wakes everyone who waits. Only the first call counts; `false` for any later one.
    pub fn signal(&self, outcome: Result<()>) -> bool {
        self.0.signal(outcome)
    }

    /// The waiting half.
    pub fn fence(&self) -> Fence {
        Fence(Arc::clone(&self.0))
    }

    /// Whether it happened.
    pub fn is_signaled(&self) -> bool {
        self.0.is_signaled()
    }

    /// Waits as [`Fence::wait`] does.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<bool> {
        self.0.wait(timeout)
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.debug("Event", f)
    }
}

/// The waiting half of an [`Event`]: work that was submitted and ends, well or with an error.
#[derive(Clone)]
pub struct Fence(Arc<State>);

impl Fence {
    /// A fence of work that is already over.
    pub fn signaled(outcome: Result<()>) -> Self {
        let event = Event::new();
        event.signal(outcome);
        event.fence()
    }

    /// Waits until the work is over: `Ok(true)`. `Ok(false)` when `timeout` passed first; `None` waits for
    /// ever, zero only looks. The only error is the work's own, given to every waiter. Any thread may wait,
    /// any number at once.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<bool> {
        self.0.wait(timeout)
    }

    /// Whether the work is over.
    pub fn is_signaled(&self) -> bool {
        self.0.is_signaled()
    }

    /// How the work went, `None` while it is not over.
    pub fn status(&self) -> Option<Result<()>> {
        self.0.status()
    }
}

impl fmt::Debug for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.debug("Fence", f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn only_the_first_signal_counts() {
        let event = Event::new();
        let fence = event.fence();
        assert!(!fence.is_signaled() && fence.status().is_none());
        assert_eq!(fence.wait(Some(Duration::ZERO)), Ok(false));
        assert!(event.signal(Err(Error::Gone { addr: 7 })));
        assert!(!event.signal(Ok(())));
        assert_eq!(fence.wait(None), Err(Error::Gone { addr: 7 }));
        assert_eq!(fence.clone().status(), Some(Err(Error::Gone { addr: 7 })));
    }

    #[test]
    fn a_timeout_is_kept_and_huge_ones_are_for_ever() {
        let event = Event::new();
        let start = Instant::now();
        assert_eq!(event.wait(Some(Duration::from_millis(30))), Ok(false));
        assert!(start.elapsed() >= Duration::from_millis(30));
        let waiter = {
            let fence = event.fence();
            thread::spawn(move || fence.wait(Some(Duration::MAX)))
        };
        event.signal(Ok(()));
        assert_eq!(waiter.join().unwrap(), Ok(true));
    }

    /// Several signallers and waiters meet on each of many events: every waiter wakes, all see the one
    /// winner's outcome. A lost wake-up shows as a timeout.
    #[test]
    fn every_waiter_sees_the_one_outcome() {
        const ROUNDS: u64 = 2000;
        for round in 0..ROUNDS {
            let event = Event::new();
            let outcomes: Vec<_> = thread::scope(|s| {
                let waiters: Vec<_> = (0..2)
                    .map(|_| {
                        let fence = event.fence();
                        s.spawn(move || (fence.wait(Some(Duration::from_secs(20))), fence.status()))
                    })
                    .collect();
                let winners: Vec<_> = (0..2)
                    .map(|i| {
                        let event = event.clone();
                        s.spawn(move || event.signal(Err(Error::Gone { addr: round * 2 + i })).then_some(i))
                    })
                    .collect();
                let won: Vec<u64> = winners.into_iter().filter_map(|w| w.join().unwrap()).collect();
                assert_eq!(won.len(), 1);
                let want = Err(Error::Gone { addr: round * 2 + won[0] });
                waiters.into_iter().map(|w| (w.join().unwrap(), want.clone())).collect()
            });
            for ((waited, status), want) in outcomes {
                assert_eq!(waited, want.clone().map(|()| true));
                assert_eq!(status, Some(want));
            }
        }
    }

    /// What was written before the signal is seen after the wait.
    #[test]
    fn a_signal_publishes_what_came_before() {
        use std::sync::atomic::AtomicU64;
        for round in 0..500u64 {
            let event = Event::new();
            let data = AtomicU64::new(0);
            thread::scope(|s| {
                s.spawn(|| {
                    data.store(round + 1, Ordering::Relaxed);
                    event.signal(Ok(()));
                });
                assert_eq!(event.fence().wait(Some(Duration::from_secs(20))), Ok(true));
                assert_eq!(data.load(Ordering::Relaxed), round + 1);
            });
        }
    }
}
