//! The order in which a device's memory was used, and who goes next.
//!
//! # Overview
//! Every range with device memory is in one of three lists, each from cold to warm:
//!
//! | list | who | a reference by the device |
//! |---|---|---|
//! | copies | shared ranges: the program has the truth, so they are cheapest to give up and go first | tells nothing: uses of copies are announced |
//! | young | what arrived, was announced or looked at last, a quarter of the rest | tells nothing yet: who faults for a range uses it right after |
//! | old | the others: their references were cleared when they left the young | used since then: young again |
//!
//! An eviction takes the coldest. Who cannot go, or was used, becomes the warmest: nobody is looked at again before all
//! others had their turn, so that evictions are O(1), taken together. Each arrival lets at most [`AGED`] ranges grow old.
//!
//! # Locking
//! The owner wraps it in the LRU lock. Nothing here calls a device.
//!
//! # Limits
//! Of a use that is not announced hardware tells one bit, so ranges used since they grew old are equals.

use std::sync::Arc;

use lru::LruCache;

use super::mover::Range;

/// How many ranges grow old with each arrival, at most.
pub(crate) const AGED: usize = 4;

type List = LruCache<u64, Arc<Range>>;

/// Which list an eviction looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// Shared ranges' copies.
    Copies,
    /// All others.
    Owned,
}

/// See the module's documentation.
pub(crate) struct Order {
    copies: List,
    old: List,
    young: List,
    /// Ranges that evictions looked at.
    looks: u64,
}

impl Order {
    pub(crate) fn new() -> Self {
        Self { copies: List::unbounded(), old: List::unbounded(), young: List::unbounded(), looks: 0 }
    }

    fn lists(&mut self) -> [&mut List; 3] {
        [&mut self.copies, &mut self.old, &mut self.young]
    }

    /// `range` got device memory, or holds it in another way now: the warmest of its class.
    pub(crate) fn put(&mut self, range: &Arc<Range>, class: Class) {
        let at = range.span().start;
        self.lists().into_iter().for_each(|list| drop(list.pop(&at)));
        match class {
            Class::Copies => self.copies.put(at, range.clone()),
            Class::Owned => self.young.put(at, range.clone()),
        };
    }

    /// `range` gave its device memory up.
    pub(crate) fn remove(&mut self, range: &Range) {
        let at = range.span().start;
        for list in self.lists() {
            if list.peek(&at).is_some_and(|found| std::ptr::eq(&**found, range)) {
                list.pop(&at);
            }
        }
    }

    /// The program announced a use of the range at `at`.
    pub(crate) fn used(&mut self, at: u64) {
        match self.old.pop(&at) {
            Some(range) => drop(self.young.put(at, range)),
            None => {
                self.copies.promote(&at);
                self.young.promote(&at);
            }
        }
    }

    /// Ranges of `class`.
    pub(crate) fn len(&self, class: Class) -> usize {
        match class {
            Class::Copies => self.copies.len(),
            Class::Owned => self.old.len() + self.young.len(),
        }
    }

    /// The range that grows old next, if the young are more than their quarter. The caller clears its reference.
    pub(crate) fn age(&mut self) -> Option<Arc<Range>> {
        let quarter = (self.len(Class::Owned) / 4).max(1);
        if self.young.len() <= quarter {
            return None;
        }
        let (at, range) = self.young.pop_lru()?;
        self.old.put(at, range.clone());
        Some(range)
    }

    /// The coldest range of `class`, and whether a reference to it counts. It is the warmest from now on: whoever evicts it
    /// takes it out.
    pub(crate) fn next(&mut self, class: Class) -> Option<(Arc<Range>, bool)> {
        let (list, counts) = match class {
            Class::Copies => (&mut self.copies, false),
            Class::Owned if !self.old.is_empty() => (&mut self.old, true),
            Class::Owned => (&mut self.young, false),
        };
        let (at, range) = list.pop_lru()?;
        match class {
            Class::Copies => self.copies.put(at, range.clone()),
            Class::Owned => self.young.put(at, range.clone()),
        };
        self.looks += 1;
        Some((range, counts))
    }

    /// Everyone, coldest first.
    pub(crate) fn coldest_first(&self) -> Vec<Arc<Range>> {
        let lists = [&self.copies, &self.old, &self.young];
        lists.into_iter().flat_map(|list| list.iter().rev()).map(|(_, range)| range.clone()).collect()
    }

    /// Ranges that evictions have looked at so far.
    #[cfg(test)]
    pub(crate) fn looks(&self) -> u64 {
        self.looks
    }
}
