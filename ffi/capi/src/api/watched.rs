//! Which addresses notifiers watch, to be asked without a lock.
//!
//! # Overview
//! Allocators call munmap and its like with locks of their own held, and a thread that forks holds the interface's locks
//! while it waits for theirs. So whether a change concerns any notifier is read from a table that needs no lock. It has
//! [`PLACES`] spans; what is beyond goes into the last one, which then covers all of them.
//!
//! # Locking
//! Writers hold the tables' lock. The version is odd while one writes, and readers look again when it was or has changed.
//!
//! # Limits
//! Readers wait for a writer, which has some stores to do: service threads use [`Watched::hull`], which never waits.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

use usvm::ground::addr::Span;

/// Spans that are told apart.
const PLACES: usize = 64;

/// The table.
pub(super) struct Watched {
    version: AtomicU32,
    used: AtomicUsize,
    places: [(AtomicU64, AtomicU64); PLACES],
    low: AtomicU64,
    high: AtomicU64,
}

impl Watched {
    pub(super) const fn new() -> Self {
        Self {
            version: AtomicU32::new(0),
            used: AtomicUsize::new(0),
            places: [const { (AtomicU64::new(0), AtomicU64::new(0)) }; PLACES],
            low: AtomicU64::new(u64::MAX),
            high: AtomicU64::new(0),
        }
    }

    /// Makes it `spans`. The caller holds the lock of writers.
    pub(super) fn set(&self, spans: impl Iterator<Item = Span>) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        let (mut used, mut low, mut high) = (0, u64::MAX, 0);
        for span in spans {
            low = low.min(span.start);
            high = high.max(span.end);
            if used < PLACES {
                self.place(used, span);
                used += 1;
            } else {
                self.widen_last(span);
            }
        }
        self.used.store(used, Ordering::Relaxed);
        self.low.store(low, Ordering::Relaxed);
        self.high.store(high, Ordering::Relaxed);
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    fn place(&self, index: usize, span: Span) {
        let (start, end) = &self.places[index];
        start.store(span.start, Ordering::Relaxed);
        end.store(span.end, Ordering::Relaxed);
    }

    fn widen_last(&self, span: Span) {
        let (start, end) = &self.places[PLACES - 1];
        start.fetch_min(span.start, Ordering::Relaxed);
        end.fetch_max(span.end, Ordering::Relaxed);
    }

    /// Whether some of `span` may be watched; exactly so while there are no more than [`PLACES`].
    pub(super) fn concerns(&self, span: Span) -> bool {
        loop {
            let version = self.version.load(Ordering::Acquire);
            let found = self.look(span);
            fence(Ordering::Acquire);
            if version.is_multiple_of(2) && version == self.version.load(Ordering::Relaxed) {
                return found;
            }
            std::thread::yield_now();
        }
    }

    fn look(&self, span: Span) -> bool {
        let used = self.used.load(Ordering::Relaxed).min(PLACES);
        self.places[..used].iter().any(|(start, end)| {
            span.start < end.load(Ordering::Relaxed) && start.load(Ordering::Relaxed) < span.end
        })
    }

    /// Whether `span` reaches between the first and the last watched address.
    pub(super) fn hull(&self, span: Span) -> bool {
        span.start < self.high.load(Ordering::Relaxed) && self.low.load(Ordering::Relaxed) < span.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(number: u64) -> Span {
        Span::sized(number << 20, 4096)
    }

    #[test]
    fn spans_are_told_apart_until_there_are_too_many() {
        let watched = Watched::new();
        assert!(!watched.concerns(Span::sized(0, u64::MAX)) && !watched.hull(at(1)));
        watched.set([at(1), at(9)].into_iter());
        assert!(watched.concerns(at(1)) && watched.concerns(at(9)) && !watched.concerns(at(5)));
        assert!(watched.hull(at(5)) && !watched.hull(at(10)));
        let many = PLACES as u64 + 8;
        watched.set((1..=many).map(at));
        assert!((1..=many).all(|number| watched.concerns(at(number))));
        assert!(!watched.concerns(at(0)) && !watched.concerns(at(many + 1)));
        // Between spans that have a place of their own nothing is watched, between the others it may be.
        let beside = |number: u64| Span::sized((number << 20) + 4096, 4096);
        assert!(!watched.concerns(beside(7)) && watched.concerns(beside(many - 1)));
        watched.set(std::iter::empty());
        assert!(!watched.concerns(at(1)) && !watched.hull(at(1)));
    }

    #[test]
    fn a_reader_sees_one_state_or_the_other() {
        static WATCHED: Watched = Watched::new();
        // Both states watch the fifth span, at different places of the table.
        WATCHED.set([at(5)].into_iter());
        let writer = std::thread::spawn(|| {
            for round in 0..20_000u64 {
                let first = at(100 + round % 7);
                if round % 2 == 0 {
                    WATCHED.set([first, at(5)].into_iter());
                } else {
                    WATCHED.set([at(5), first].into_iter());
                }
            }
        });
        while !writer.is_finished() {
            assert!(WATCHED.concerns(at(5)) && !WATCHED.concerns(at(6)));
        }
        writer.join().unwrap();
    }
}
