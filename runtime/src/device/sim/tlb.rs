//! The translation cache of one engine.
//!
//! # Overview
//! Set-associative, one array for each page size, replaced round robin. It holds copies of page-table
//! entries, so it can be stale exactly as hardware's can: whoever changes an entry must invalidate it here,
//! in every engine.
//!
//! # Locking
//! The owner wraps it in a lock that an engine holds while it uses one translation. See [`super::engine`].

use super::page_table::{PageSize, Translation};
use crate::ground::addr::{Span, align_down};

const WAYS: usize = 4;

/// The cached translations of one page size.
#[derive(Debug)]
struct Class {
    size: u64,
    /// `WAYS` neighbours for each set.
    ways: Box<[Option<Translation>]>,
    /// Which way of each set goes next.
    victim: Box<[u8]>,
    /// Valid entries.
    used: usize,
}

impl Class {
    fn new(size: PageSize, sets: usize) -> Self {
        Self {
            size: size.bytes(),
            ways: vec![None; sets * WAYS].into(),
            victim: vec![0; sets].into(),
            used: 0,
        }
    }

    fn sets(&self) -> usize {
        self.victim.len()
    }

    fn set_of(&self, va: u64) -> usize {
        (va / self.size) as usize % self.sets()
    }

    fn lookup(&self, va: u64) -> Option<Translation> {
        if self.used == 0 {
            return None;
        }
        let page = align_down(va, self.size);
        let first = self.set_of(va) * WAYS;
        self.ways[first..first + WAYS].iter().flatten().find(|t| t.va == page).copied()
    }

    fn fill(&mut self, translation: Translation) {
        let set = self.set_of(translation.va);
        let ways = &mut self.ways[set * WAYS..(set + 1) * WAYS];
        let same = ways.iter().position(|w| w.is_some_and(|t| t.va == translation.va));
        let way = same.or_else(|| ways.iter().position(Option::is_none)).unwrap_or_else(|| {
            self.victim[set] = (self.victim[set] + 1) % WAYS as u8;
            usize::from(self.victim[set])
        });
        self.used += usize::from(ways[way].replace(translation).is_none());
    }

    fn invalidate(&mut self, span: Span) {
        if self.used == 0 || span.is_empty() {
            return;
        }
        let first = span.start / self.size;
        let pages = (span.end - 1) / self.size - first + 1;
        for page in first..first + pages.min(self.sets() as u64) {
            let set = (page % self.sets() as u64) as usize;
            for way in &mut self.ways[set * WAYS..(set + 1) * WAYS] {
                if way.is_some_and(|t| Span::new(t.va, t.end()).overlaps(span)) {
                    *way = None;
                    self.used -= 1;
                }
            }
        }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Tlb {
    /// Largest pages first: they hit most.
    classes: [Class; 3],
}

impl Tlb {
    pub(super) fn new() -> Self {
        Self {
            classes: [
                Class::new(PageSize::M2, 16),
                Class::new(PageSize::K64, 32),
                Class::new(PageSize::K4, 64),
            ],
        }
    }

    /// The cached translation of `va`, right or stale.
    pub(super) fn lookup(&self, va: u64) -> Option<Translation> {
        self.classes.iter().find_map(|c| c.lookup(va))
    }

    /// Caches what a walk found.
    pub(super) fn fill(&mut self, translation: Translation) {
        let size = translation.entry.size().bytes();
        if let Some(class) = self.classes.iter_mut().find(|c| c.size == size) {
            class.fill(translation);
        }
    }

    /// Drops every translation, of any size, that shares an address with `span`.
    pub(super) fn invalidate(&mut self, span: Span) {
        self.classes.iter_mut().for_each(|c| c.invalidate(span));
    }
}

#[cfg(test)]
mod tests {
    use super::super::page_table::PageTable;
    use super::*;
    use crate::ground::addr::{SZ_2M, SZ_4K, SZ_64K};
    use crate::space::ports::{Backing, GpuAccess};
    use proptest::prelude::*;

    fn table(span: Span) -> PageTable {
        let mut table = PageTable::default();
        table.bind(span, Backing::Vram(0), GpuAccess::Write).unwrap();
        table
    }

    #[test]
    fn invalidation_drops_pages_of_every_size_that_overlap_and_no_others() {
        for size in [SZ_4K, SZ_64K, SZ_2M] {
            let whole = Span::sized(4 * SZ_2M, 2 * size);
            let table = table(whole);
            let mut tlb = Tlb::new();
            for va in [whole.start, whole.start + size] {
                tlb.fill(table.translate(va, GpuAccess::Read).unwrap());
            }
            tlb.invalidate(Span::sized(whole.start + size - SZ_4K, SZ_4K));
            assert_eq!(tlb.lookup(whole.start), None, "one page of it changed");
            assert_eq!(tlb.lookup(whole.end - 1).map(|t| t.va), Some(whole.start + size));
            tlb.invalidate(Span::new(0, u64::MAX));
            assert_eq!(tlb.lookup(whole.end - 1), None);
        }
    }

    #[test]
    fn a_refilled_page_is_cached_once() {
        let span = Span::sized(0, SZ_4K);
        let mut read_only = PageTable::default();
        read_only.bind(span, Backing::System, GpuAccess::Read).unwrap();
        let mut tlb = Tlb::new();
        tlb.fill(read_only.translate(0, GpuAccess::Read).unwrap());
        let newer = table(span).translate(0, GpuAccess::Read).unwrap();
        tlb.fill(newer);
        assert_eq!(tlb.lookup(0), Some(newer));
        assert_eq!(tlb.classes[2].used, 1);
    }

    proptest! {
        /// Whatever is found was filled and not invalidated since; what fits is found.
        #[test]
        fn never_gives_what_was_invalidated(ops in proptest::collection::vec((0u64..600, 0u64..40, any::<bool>()), 1..200)) {
            let whole = Span::sized(SZ_2M, 600 * SZ_4K);
            let table = {
                let mut t = PageTable::default();
                // Offset by a page, so that all entries are small.
                t.bind(whole, Backing::Vram(SZ_4K), GpuAccess::Write).unwrap();
                t
            };
            let mut tlb = Tlb::new();
            let mut valid = vec![false; 600];
            for (page, len, fill) in ops {
                let va = whole.start + page * SZ_4K;
                if fill {
                    tlb.fill(table.translate(va, GpuAccess::Read).unwrap());
                    valid[page as usize] = true;
                    prop_assert!(tlb.lookup(va).is_some(), "the newest is always there");
                } else {
                    let span = Span::sized(va, len * SZ_4K);
                    tlb.invalidate(span);
                    let end = (page + len).min(600) as usize;
                    valid[page as usize..end].fill(false);
                }
                for p in 0..600u64 {
                    let hit = tlb.lookup(whole.start + p * SZ_4K);
                    prop_assert!(hit.is_none() || valid[p as usize]);
                }
            }
        }
    }
}
