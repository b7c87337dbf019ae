//! Which addresses usvm registered with userfaultfd.
//!
//! # Overview
//! Registration splits mappings. The books here say where, so that [`super::vma`] can hide those boundaries: the ends of
//! what is registered now, and boundaries inside that the kernel may not have joined again. They also keep what nobody
//! needs registered and what could not be let go of yet.
//!
//! # Locking
//! None of its own; [`super::Host`] wraps it.

use super::spanset::SpanSet;
use crate::ground::addr::Span;
use std::collections::BTreeSet;

/// The books.
#[derive(Debug, Default)]
pub(super) struct Registered {
    spans: SpanSet,
    /// Boundaries that registering and unregistering ever made, as long as the mapping lives.
    cuts: BTreeSet<u64>,
    /// Parts of `spans` to let go of when mappings rest.
    unneeded: SpanSet,
}

impl Registered {
    pub(super) fn covers(&self, span: Span) -> bool {
        self.spans.covers(span)
    }

    pub(super) fn missing(&self, span: Span) -> Vec<Span> {
        self.spans.missing(span)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Span> + '_ {
        self.spans.iter()
    }

    /// Those parts of `span` that are registered are not needed any more.
    pub(super) fn not_needed(&mut self, span: Span) {
        for part in self.spans.within(span) {
            self.unneeded.insert(part);
        }
    }

    /// What is registered and not needed.
    pub(super) fn unneeded(&self) -> Vec<Span> {
        self.unneeded.iter().collect()
    }

    /// `span` is needed, whether it was registered before or not.
    pub(super) fn needed(&mut self, span: Span) {
        self.unneeded.remove(span);
    }

    /// `span` was registered.
    pub(super) fn add(&mut self, span: Span) {
        self.spans.insert(span);
        self.cuts.extend([span.start, span.end]);
    }

    /// `span` was unregistered; its mapping lives on, maybe cut.
    pub(super) fn take(&mut self, span: Span) {
        self.spans.remove(span);
        self.unneeded.remove(span);
        self.cuts.extend([span.start, span.end]);
    }

    /// The mapping at `span` is gone.
    pub(super) fn forget(&mut self, span: Span) {
        self.spans.remove(span);
        self.unneeded.remove(span);
        let gone: Vec<u64> = self.cuts.range(span.start..=span.end).copied().collect();
        for cut in gone {
            // An end of what is still registered beside it stays a boundary of ours.
            if !self.spans.is_boundary(cut) {
                self.cuts.remove(&cut);
            }
        }
    }

    /// The mapping at `from` is at `to` now, with its registration.
    pub(super) fn moved(&mut self, from: Span, to: u64) {
        let parts = self.spans.within(from);
        let cuts: Vec<u64> = self.cuts.range(from.start..=from.end).copied().collect();
        self.forget(from);
        let there = |addr: u64| addr - from.start + to;
        for part in parts {
            self.spans.insert(Span::new(there(part.start), there(part.end)));
        }
        // Contents may be on their way there.
        self.unneeded.remove(Span::sized(to, from.len()));
        self.cuts.extend(cuts.into_iter().map(there));
    }

    /// Whether a boundary at `addr` may be usvm's doing.
    pub(super) fn is_cut(&self, addr: u64) -> bool {
        self.cuts.contains(&addr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_live_as_long_as_their_mapping() {
        let mut r = Registered::default();
        r.add(Span::new(10, 20));
        r.add(Span::new(20, 30));
        assert!([10, 20, 30].iter().all(|c| r.is_cut(*c)) && !r.is_cut(15));
        assert!(r.covers(Span::new(12, 28)));
        r.take(Span::new(14, 16));
        assert!(r.is_cut(14) && r.is_cut(16) && !r.covers(Span::new(13, 15)));
        r.forget(Span::new(5, 20));
        assert!(![10, 14, 16].iter().any(|c| r.is_cut(*c)));
        assert!(r.is_cut(20) && r.is_cut(30), "20 is still where the registered part starts");
        r.forget(Span::new(20, 30));
        assert!(!r.is_cut(20) && r.iter().next().is_none());
    }

    #[test]
    fn what_is_not_needed_is_registered() {
        let mut r = Registered::default();
        r.add(Span::new(10, 20));
        r.not_needed(Span::new(5, 15));
        assert_eq!(r.unneeded(), [Span::new(10, 15)]);
        r.needed(Span::new(12, 13));
        assert_eq!(r.unneeded(), [Span::new(10, 12), Span::new(13, 15)]);
        r.take(Span::new(10, 11));
        r.forget(Span::new(14, 15));
        assert_eq!(r.unneeded(), [Span::new(11, 12), Span::new(13, 14)]);
        r.add(Span::new(30, 40));
        r.moved(Span::new(30, 31), 11);
        assert_eq!(r.unneeded(), [Span::new(13, 14)]);
        r.moved(Span::new(13, 14), 50);
        assert_eq!(r.unneeded(), []);
    }

    #[test]
    fn moving_takes_the_books_along() {
        let mut r = Registered::default();
        r.add(Span::new(100, 110));
        r.add(Span::new(120, 130));
        r.moved(Span::new(90, 125), 1000);
        assert_eq!(
            r.iter().collect::<Vec<_>>(),
            [Span::new(125, 130), Span::new(1010, 1020), Span::new(1030, 1035)]
        );
        assert!(r.is_cut(1010) && r.is_cut(1020) && !r.is_cut(110));
    }
}
