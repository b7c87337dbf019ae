//! A value for each page of the address space, kept by spans.
//!
//! # Overview
//! [`SpanMap`] holds what a program said about its memory: advice, and where it asked memory to go. It knows nothing of
//! ranges, which come and go under it.
//!
//! # Locking
//! One reader-writer lock, held for a look-up or an update. A map that was never written takes none.
//!
//! # Limits
//! What was said about memory that is unmapped since still stands there: it holds for whatever is mapped next.

use std::collections::BTreeMap;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::ground::addr::Span;

/// Values by spans; everything else has the default value.
#[derive(Debug, Default)]
pub struct SpanMap<T> {
    map: RwLock<BTreeMap<u64, (u64, T)>>,
    any: AtomicBool,
}

impl<T: Copy + Default + PartialEq> SpanMap<T> {
    /// The value at `addr`.
    pub fn at(&self, addr: u64) -> T {
        if !self.any.load(Ordering::Relaxed) {
            return T::default();
        }
        let map = self.map.read().unwrap_or_else(|p| p.into_inner());
        match map.range(..=addr).next_back() {
            Some((_, (end, value))) if addr < *end => *value,
            _ => T::default(),
        }
    }

    /// Every value in `span`, in ascending order; neighbours may be equal.
    pub fn values(&self, span: Span) -> Vec<T> {
        let map = self.map.read().unwrap_or_else(|p| p.into_inner());
        let before = map.range(..span.start).next_back().filter(|(_, (end, _))| *end > span.start);
        let mut values = Vec::new();
        let mut at = span.start;
        for (start, (end, value)) in before.into_iter().chain(map.range(span.start..span.end)) {
            if at < *start {
                values.push(T::default());
            }
            values.push(*value);
            at = *end;
        }
        if at < span.end {
            values.push(T::default());
        }
        values
    }

    /// Changes the value of every page of `span` by `change`.
    pub fn update(&self, span: Span, change: impl Fn(&mut T)) {
        let mut map = self.map.write().unwrap_or_else(|p| p.into_inner());
        let mut pieces = Vec::new();
        let before =
            map.range(..span.start).next_back().map(|(s, v)| (*s, *v)).filter(|(_, (e, _))| *e > span.start);
        let inside: Vec<_> = map.range(span.start..span.end).map(|(s, v)| (*s, *v)).collect();
        let mut at = span.start;
        for (start, (end, value)) in before.into_iter().chain(inside) {
            map.remove(&start);
            if start < span.start {
                map.insert(start, (span.start, value));
            }
            let from = start.max(span.start);
            if at < from {
                pieces.push((at, from, T::default()));
            }
            pieces.push((from, end.min(span.end), value));
            if end > span.end {
                map.insert(span.end, (end, value));
            }
            at = end.min(span.end);
        }
        if at < span.end {
            pieces.push((at, span.end, T::default()));
        }
        for piece in &mut pieces {
            change(&mut piece.2);
        }
        pieces.dedup_by(|next, last| {
            let same = last.2 == next.2;
            if same {
                last.1 = next.1;
            }
            same
        });
        for (start, end, value) in pieces {
            if value != T::default() {
                map.insert(start, (end, value));
            }
        }
        self.any.store(!map.is_empty(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ground::addr::SZ_4K;
    use crate::space::ports::Advice;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn advice_agrees_with_a_map_of_pages(
            ops in proptest::collection::vec((0u64..64, 1u64..32, any::<bool>(), 0u32..3), 1..40)
        ) {
            let advices = SpanMap::<Advice>::default();
            let mut model = vec![Advice::default(); 128];
            for (start, len, read_mostly, device) in ops {
                let change = |a: &mut Advice| {
                    a.read_mostly = read_mostly;
                    a.accessed_by = (device > 0).then_some(device);
                };
                advices.update(Span::sized(start * SZ_4K, len * SZ_4K), change);
                (start..start + len).for_each(|p| change(&mut model[p as usize]));
                for (page, want) in model.iter().enumerate() {
                    prop_assert_eq!(advices.at(page as u64 * SZ_4K + 5), *want);
                }
                let part = start as usize..(start + len) as usize;
                let mut got = advices.values(Span::sized(start * SZ_4K, len * SZ_4K));
                let mut want = model[part].to_vec();
                got.dedup();
                want.dedup();
                prop_assert_eq!(got, want);
            }
        }
    }
}
