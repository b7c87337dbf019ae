//! A set of addresses as disjoint spans.
//!
//! # Overview
//! What is registered with userfaultfd, and what is exempt from it, are both a few spans that grow, shrink and join.
//!
//! # Locking
//! None of its own; owners wrap it.

use crate::ground::addr::Span;
use std::collections::BTreeMap;

/// Disjoint spans; those that touch are one.
#[derive(Debug, Default, Clone)]
pub(crate) struct SpanSet {
    /// start → end
    spans: BTreeMap<u64, u64>,
}

impl SpanSet {
    /// Nothing.
    pub(crate) const fn new() -> Self {
        Self { spans: BTreeMap::new() }
    }

    /// Adds `span`.
    pub(crate) fn insert(&mut self, span: Span) {
        if span.is_empty() {
            return;
        }
        let Span { mut start, mut end } = span;
        while let Some((&s, &e)) = self.spans.range(..=end).next_back() {
            if e < start {
                break;
            }
            start = start.min(s);
            end = end.max(e);
            self.spans.remove(&s);
        }
        self.spans.insert(start, end);
    }

    /// Takes `span` out.
    pub(crate) fn remove(&mut self, span: Span) {
        if span.is_empty() {
            return;
        }
        while let Some((&s, &e)) = self.spans.range(..span.end).next_back() {
            if e <= span.start {
                break;
            }
            self.spans.remove(&s);
            if s < span.start {
                self.spans.insert(s, span.start);
            }
            if e > span.end {
                self.spans.insert(span.end, e);
            }
        }
    }

    /// The member span that holds `addr`.
    pub(crate) fn around(&self, addr: u64) -> Option<Span> {
        let (&s, &e) = self.spans.range(..=addr).next_back()?;
        (addr < e).then_some(Span::new(s, e))
    }

    /// Whether all of `span` is in.
    pub(crate) fn covers(&self, span: Span) -> bool {
        span.is_empty() || self.around(span.start).is_some_and(|s| s.covers(span))
    }

    /// The parts of members inside `span`, ascending.
    pub(crate) fn within(&self, span: Span) -> Vec<Span> {
        let first = self.around(span.start).map_or(span.start, |s| s.start);
        self.spans.range(first..span.end).filter_map(|(&s, &e)| Span::new(s, e).intersect(span)).collect()
    }

    /// The parts of `span` that are not in, ascending.
    pub(crate) fn missing(&self, span: Span) -> Vec<Span> {
        let mut gaps = Vec::new();
        let mut at = span.start;
        for part in self.within(span) {
            gaps.push(Span::new(at, part.start));
            at = part.end;
        }
        gaps.push(Span::new(at, span.end));
        gaps.retain(|g| !g.is_empty());
        gaps
    }

    /// The widest span around `addr`, which is not in, without a member in it.
    pub(crate) fn gap_around(&self, addr: u64) -> Span {
        let start = self.spans.range(..=addr).next_back().map_or(0, |(_, &e)| e);
        let end = self.spans.range(addr..).next().map_or(u64::MAX, |(&s, _)| s);
        Span::new(start, end)
    }

    /// Whether `addr` is where a member starts or ends.
    pub(crate) fn is_boundary(&self, addr: u64) -> bool {
        self.spans.contains_key(&addr)
            || self.spans.range(..addr).next_back().is_some_and(|(_, &e)| e == addr)
    }

    /// All members, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Span> + '_ {
        self.spans.iter().map(|(&s, &e)| Span::new(s, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const N: u64 = 40;

    fn ops() -> impl Strategy<Value = Vec<(bool, u64, u64)>> {
        proptest::collection::vec((any::<bool>(), 0..N, 0..10u64), 1..40)
    }

    proptest! {
        #[test]
        fn agrees_with_a_bit_array(ops in ops(), probe in 0..N, len in 0..10u64) {
            let mut set = SpanSet::new();
            let mut bits = [false; 64];
            for (add, start, len) in ops {
                let span = Span::sized(start, len);
                if add { set.insert(span) } else { set.remove(span) }
                bits[start as usize..(start + len) as usize].fill(add);
            }
            let members: Vec<Span> = set.iter().collect();
            prop_assert!(members.windows(2).all(|w| w[0].end < w[1].start), "disjoint, not touching: {members:?}");
            let mut from_set = [false; 64];
            for m in &members {
                from_set[m.start as usize..m.end as usize].fill(true);
            }
            prop_assert_eq!(bits, from_set);

            let span = Span::sized(probe, len);
            let inside = |s: &Span| &bits[s.start as usize..s.end as usize];
            prop_assert_eq!(set.covers(span), inside(&span).iter().all(|&b| b));
            let (within, missing) = (set.within(span), set.missing(span));
            prop_assert!(within.iter().all(|s| inside(s).iter().all(|&b| b)));
            prop_assert!(missing.iter().all(|s| inside(s).iter().all(|&b| !b)));
            let total: u64 = within.iter().chain(&missing).map(|s| s.len()).sum();
            prop_assert_eq!(total, len);
            prop_assert_eq!(set.around(probe).is_some(), bits[probe as usize]);
            if !bits[probe as usize] {
                let gap = set.gap_around(probe);
                prop_assert!(gap.contains(probe) && set.within(gap).is_empty());
            }
            let before = probe > 0 && bits[probe as usize - 1];
            prop_assert_eq!(set.is_boundary(probe), before != bits[probe as usize]);
        }
    }
}
