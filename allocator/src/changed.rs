//! What the heap did to the contents of memory that programs had: pages given back, pages moved.
//!
//! # Overview
//! The heap makes these calls past whoever watches `madvise` and `mremap`, with locks of its own held. So it takes note of
//! them, and who hands the heap's functions to a program asks with [`take`] when a function is over and no lock is held.
//!
//! # Locking
//! None. Notes are the thread's own; a counter of threads that have some makes asking cost one load where nobody has.
//!
//! # Limits
//! A thread keeps `MOST` notes; what is beyond widens the last of its kind, or the last. A thread that ends keeps its notes.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Notes of one thread.
const MOST: usize = 8;

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The pages were given back to the system and read as zeroes.
    Dropped,
    /// The pages went elsewhere.
    Moved,
}

/// What was done to `[start, end)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// What.
    pub kind: Kind,
    /// First byte.
    pub start: usize,
    /// Behind the last byte.
    pub end: usize,
}

/// The changes that one thread made.
#[derive(Debug, Clone, Copy)]
pub struct Changes {
    all: [Change; MOST],
    used: usize,
}

impl Changes {
    const NONE: Self = Self { all: [Change { kind: Kind::Dropped, start: 0, end: 0 }; MOST], used: 0 };

    fn add(&mut self, change: Change) {
        let noted = &mut self.all[..self.used];
        if let Some(before) = noted.last_mut()
            && before.kind == change.kind
            && (before.end == change.start || change.end == before.start)
        {
            *before = joined(*before, change);
        } else if self.used < MOST {
            self.all[self.used] = change;
            self.used += 1;
        } else {
            let at = noted.iter().rposition(|c| c.kind == change.kind).unwrap_or(MOST - 1);
            noted[at] = joined(noted[at], change);
        }
    }

    /// Each of them, in the order they were made as far as there was room.
    pub fn iter(&self) -> impl Iterator<Item = Change> + '_ {
        self.all[..self.used].iter().copied()
    }
}

fn joined(a: Change, b: Change) -> Change {
    Change { kind: a.kind, start: a.start.min(b.start), end: a.end.max(b.end) }
}

/// Threads with notes.
static NOTED: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static MINE: Cell<Changes> = const { Cell::new(Changes::NONE) };
}

pub(crate) fn note(kind: Kind, at: *const u8, size: usize) {
    let mut mine = MINE.get();
    if mine.used == 0 {
        NOTED.fetch_add(1, Ordering::Relaxed);
    }
    mine.add(Change { kind, start: at.addr(), end: at.addr() + size });
    MINE.set(mine);
}

/// What this thread did since it was last asked. Costs a load where no thread did anything.
#[inline]
pub fn take() -> Option<Changes> {
    if NOTED.load(Ordering::Relaxed) == 0 { None } else { take_mine() }
}

#[cold]
fn take_mine() -> Option<Changes> {
    let mine = MINE.get();
    if mine.used == 0 {
        return None;
    }
    MINE.set(Changes::NONE);
    NOTED.fetch_sub(1, Ordering::Relaxed);
    Some(mine)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(page: usize) -> *const u8 {
        std::ptr::without_provenance(page << 12)
    }

    #[test]
    fn changes_are_told_once_joined_and_never_lost() {
        let _ = take();
        assert!(take().is_none());
        note(Kind::Dropped, at(10), 4096);
        note(Kind::Dropped, at(11), 8192);
        note(Kind::Moved, at(13), 4096);
        let told: Vec<Change> = take().unwrap().iter().collect();
        let (first, second) = (
            Change { kind: Kind::Dropped, start: 10 << 12, end: 13 << 12 },
            Change { kind: Kind::Moved, start: 13 << 12, end: 14 << 12 },
        );
        assert_eq!(told, [first, second]);
        assert!(take().is_none());
        (0..100).for_each(|n| note(Kind::Dropped, at(1000 + 2 * n), 4096));
        std::thread::spawn(|| assert!(take().is_none(), "another thread's")).join().unwrap();
        let told = take().unwrap();
        assert_eq!(told.iter().count(), MOST);
        assert!((0..100).all(|n| told.iter().any(|c| (c.start..c.end).contains(&((1000 + 2 * n) << 12)))));
    }
}
