//! The device's page table: four levels over a 48-bit address space, with 4 KiB, 64 KiB and 2 MiB entries.
//!
//! # Overview
//! An [`Entry`] is one 64-bit word as hardware has it: valid, writable, system, referenced, size, address.
//! Third-level slots hold a 2 MiB entry or a table of 512 small ones; a 64 KiB entry lives in the first of
//! its sixteen slots and the other fifteen stay empty. Binding replaces whatever was there, and unbinding
//! part of a larger entry splits it and keeps the rest. A table that became empty is freed at once.
//!
//! # Locking
//! The owner wraps it in a read-write lock: engines walk it under the read side and set the referenced bit
//! there with an atomic or; binding and unbinding take the write side.
//!
//! # Limits
//! One referenced bit for each entry, whatever its size. A split hands the bit of the whole to all of its
//! parts.

use crate::ground::addr::{SZ_2M, SZ_4K, SZ_64K, Span};
use crate::ground::error::{Error, Result};
use crate::space::ports::{Backing, GpuAccess};
use std::sync::atomic::{AtomicU64, Ordering};

/// First address that the device cannot form.
pub(super) const VA_END: u64 = 1 << 48;

const FAN: usize = 512;
/// Slots of a table that one 64 KiB entry stands for.
const GROUP: usize = (SZ_64K / SZ_4K) as usize;
const SHIFT_2M: u32 = 21;
const SHIFT_1G: u32 = 30;
const SHIFT_512G: u32 = 39;

/// Sizes an entry can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PageSize {
    K4,
    K64,
    M2,
}

impl PageSize {
    pub(super) const fn bytes(self) -> u64 {
        match self {
            PageSize::K4 => SZ_4K,
            PageSize::K64 => SZ_64K,
            PageSize::M2 => SZ_2M,
        }
    }
}

/// A page-table entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry(u64);

impl Entry {
    const VALID: u64 = 1 << 0;
    const WRITABLE: u64 = 1 << 1;
    const SYSTEM: u64 = 1 << 2;
    const REFERENCED: u64 = 1 << 3;
    const SIZE_64K: u64 = 1 << 4;
    const SIZE_2M: u64 = 1 << 5;
    const FLAGS: u64 = SZ_4K - 1;

    fn new(address: u64, size: PageSize, writable: bool, system: bool) -> Self {
        let size = match size {
            PageSize::K4 => 0,
            PageSize::K64 => Self::SIZE_64K,
            PageSize::M2 => Self::SIZE_2M,
        };
        let flag = |on, bit| if on { bit } else { 0 };
        Self(address | Self::VALID | size | flag(writable, Self::WRITABLE) | flag(system, Self::SYSTEM))
    }

    fn from_word(word: u64) -> Option<Self> {
        (word & Self::VALID != 0).then_some(Self(word))
    }

    /// The entry of `size` for the part of this one that begins `offset` bytes in.
    fn part(self, offset: u64, size: PageSize) -> Self {
        let kept = self.0 & (Self::WRITABLE | Self::SYSTEM | Self::REFERENCED);
        Self(Self::new(self.address() + offset, size, false, false).0 | kept)
    }

    pub(super) fn size(self) -> PageSize {
        match self.0 & (Self::SIZE_64K | Self::SIZE_2M) {
            0 => PageSize::K4,
            Self::SIZE_64K => PageSize::K64,
            _ => PageSize::M2,
        }
    }

    /// Offset in device memory, or the process's own address.
    pub(super) fn address(self) -> u64 {
        self.0 & !Self::FLAGS
    }

    /// Whether it leads over the link to the process's own pages.
    pub(super) fn is_system(self) -> bool {
        self.0 & Self::SYSTEM != 0
    }

    /// Whether `access` may go through it. The link carries no atomics.
    pub(super) fn allows(self, access: GpuAccess) -> bool {
        let writable = self.0 & Self::WRITABLE != 0;
        match access {
            GpuAccess::Read => true,
            GpuAccess::Write => writable,
            GpuAccess::Atomic => writable && !self.is_system(),
        }
    }

    fn is_referenced(self) -> bool {
        self.0 & Self::REFERENCED != 0
    }
}

/// A page of the device's address space and the entry that translates it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Translation {
    /// First address of the page, aligned to the entry's size.
    pub(super) va: u64,
    /// What translates it.
    pub(super) entry: Entry,
}

impl Translation {
    /// First address after the page.
    pub(super) fn end(&self) -> u64 {
        self.va + self.entry.size().bytes()
    }

    /// Where `addr`, inside the page, leads to.
    pub(super) fn target(&self, addr: u64) -> u64 {
        self.entry.address() + (addr - self.va)
    }
}

/// What was in a span that is now unmapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Removed {
    /// Anything at all.
    pub(super) any: bool,
    /// Something the device had referenced.
    pub(super) referenced: bool,
}

impl Removed {
    fn note(&mut self, word: u64) {
        if let Some(e) = Entry::from_word(word) {
            self.any = true;
            self.referenced |= e.is_referenced();
        }
    }
}

/// A table whose slots own what is below them, and how many are in use.
#[derive(Debug)]
struct Node<T> {
    slots: Box<[Option<T>]>,
    used: usize,
}

impl<T> Default for Node<T> {
    fn default() -> Self {
        Self { slots: std::iter::repeat_with(|| None).take(FAN).collect(), used: 0 }
    }
}

impl<T> Node<T> {
    fn get_or_insert(&mut self, index: usize, make: impl FnOnce() -> T) -> &mut T {
        if self.slots[index].is_none() {
            self.used += 1;
        }
        self.slots[index].get_or_insert_with(make)
    }

    fn remove(&mut self, index: usize) {
        if self.slots[index].take().is_some() {
            self.used -= 1;
        }
    }
}

/// 512 slots of 4 KiB: small entries.
#[derive(Debug)]
struct Leaves {
    words: Box<[AtomicU64]>,
    used: usize,
}

impl Default for Leaves {
    fn default() -> Self {
        Self { words: std::iter::repeat_with(|| AtomicU64::new(0)).take(FAN).collect(), used: 0 }
    }
}

impl Leaves {
    /// The 32 entries of 64 KiB that say what `huge` said.
    fn split_of(huge: Entry) -> Self {
        let mut leaves = Self::default();
        for slot in (0..FAN).step_by(GROUP) {
            leaves.put(slot, huge.part(slot as u64 * SZ_4K, PageSize::K64));
        }
        leaves
    }

    fn entry(&self, slot: usize) -> Option<Entry> {
        Entry::from_word(self.words[slot].load(Ordering::Relaxed))
    }

    /// The 64 KiB entry that covers `slot`.
    fn big(&self, slot: usize) -> Option<Entry> {
        self.entry(slot / GROUP * GROUP).filter(|e| e.size() == PageSize::K64)
    }

    /// The slot of the entry that translates `slot`.
    fn find(&self, slot: usize) -> Option<usize> {
        if self.big(slot).is_some() {
            return Some(slot / GROUP * GROUP);
        }
        self.entry(slot).map(|_| slot)
    }

    /// Calls `f` once for each entry that translates some of `first..end`.
    fn for_each(&self, first: usize, end: usize, f: &mut impl FnMut(&AtomicU64)) {
        let mut last = None;
        for slot in (first..end).filter_map(|page| self.find(page)) {
            if last.replace(slot) != Some(slot) {
                f(&self.words[slot]);
            }
        }
    }

    fn put(&mut self, slot: usize, entry: Entry) {
        let old = std::mem::replace(self.words[slot].get_mut(), entry.0);
        self.used += usize::from(old == 0);
    }

    fn take(&mut self, slot: usize) -> u64 {
        let old = std::mem::take(self.words[slot].get_mut());
        self.used -= usize::from(old != 0);
        old
    }

    /// Empties `first..end`; a 64 KiB entry that sticks out is split and its rest stays.
    fn clear(&mut self, first: usize, end: usize, removed: &mut Removed) {
        let mut at = first;
        while at < end {
            let group = at / GROUP * GROUP;
            if let Some(big) = self.big(at) {
                if group < first || group + GROUP > end {
                    self.take(group);
                    for page in 0..GROUP {
                        self.put(group + page, big.part(page as u64 * SZ_4K, PageSize::K4));
                    }
                } else {
                    removed.note(self.take(group));
                    at = group + GROUP;
                    continue;
                }
            }
            removed.note(self.take(at));
            at += 1;
        }
    }
}

/// 2 MiB of address space.
#[derive(Debug)]
enum Block {
    Huge(AtomicU64),
    Small(Leaves),
}

type Directory = Node<Block>;

/// The tables of one address space.
#[derive(Debug, Default)]
pub(super) struct PageTable {
    root: Node<Node<Directory>>,
}

fn index(va: u64, shift: u32) -> usize {
    (va >> shift) as usize % FAN
}

/// First address after the slot of `1 << shift` bytes that holds `va`.
fn next(va: u64, shift: u32) -> u64 {
    ((va >> shift) + 1) << shift
}

impl PageTable {
    /// Whether no table but the root is left.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.root.used == 0
    }

    /// Translates `va` for `access` and marks the entry as referenced. `None` is a fault.
    pub(super) fn translate(&self, va: u64, access: GpuAccess) -> Option<Translation> {
        if va >= VA_END {
            return None;
        }
        let word = match self.block(va)? {
            Block::Huge(word) => word,
            Block::Small(leaves) => &leaves.words[leaves.find(index(va, 12))?],
        };
        let entry = Entry::from_word(word.load(Ordering::Relaxed)).filter(|e| e.allows(access))?;
        if !entry.is_referenced() {
            word.fetch_or(Entry::REFERENCED, Ordering::Relaxed);
        }
        Some(Translation { va: va & !(entry.size().bytes() - 1), entry })
    }

    /// Maps `span` to `backing`, with the largest entries that the alignment of both sides allows. Says what
    /// was there. Errors when the span is empty, not page-aligned or past the 48-bit space, or the offset is
    /// not page-aligned.
    pub(super) fn bind(&mut self, span: Span, backing: Backing, access: GpuAccess) -> Result<Removed> {
        check(span)?;
        let (base, system) = match backing {
            Backing::Vram(offset) => (offset, false),
            Backing::System => (span.start, true),
        };
        if base % SZ_4K != 0 {
            let reason = format!("offset {base:#x} is no multiple of {SZ_4K}");
            return Err(Error::Invalid { argument: "backing", reason });
        }
        let removed = self.unbind(span);
        let mut at = span.start;
        while at < span.end {
            let target = base + (at - span.start);
            let size = largest(at | target, span.end - at);
            self.put(at, Entry::new(target, size, access.writes(), system));
            at += size.bytes();
        }
        Ok(removed)
    }

    /// Empties the part of `span` that lies in the 48-bit space, and says what was there.
    pub(super) fn unbind(&mut self, span: Span) -> Removed {
        let mut removed = Removed::default();
        let end = span.end.min(VA_END);
        let mut at = span.start;
        while at < end {
            let (i, j) = (index(at, SHIFT_512G), index(at, SHIFT_1G));
            let Some(upper) = &mut self.root.slots[i] else {
                at = next(at, SHIFT_512G);
                continue;
            };
            let Some(directory) = &mut upper.slots[j] else {
                at = next(at, SHIFT_1G);
                continue;
            };
            let stop = end.min(next(at, SHIFT_1G));
            clear_directory(directory, Span::new(at, stop), &mut removed);
            if directory.used == 0 {
                upper.remove(j);
            }
            if upper.used == 0 {
                self.root.remove(i);
            }
            at = stop;
        }
        removed
    }

    /// Whether an entry that overlaps `span` was referenced; none of them is afterwards.
    pub(super) fn take_referenced(&self, span: Span) -> bool {
        let mut referenced = false;
        self.for_each(span, |word| {
            let old = word.fetch_and(!Entry::REFERENCED, Ordering::Relaxed);
            referenced |= Entry::from_word(old).is_some_and(Entry::is_referenced);
        });
        referenced
    }

    fn block(&self, va: u64) -> Option<&Block> {
        let upper = self.root.slots[index(va, SHIFT_512G)].as_ref()?;
        let directory = upper.slots[index(va, SHIFT_1G)].as_ref()?;
        directory.slots[index(va, SHIFT_2M)].as_ref()
    }

    /// Calls `f` for the word of each valid entry that overlaps `span`.
    fn for_each(&self, span: Span, mut f: impl FnMut(&AtomicU64)) {
        let end = span.end.min(VA_END);
        let mut at = span.start;
        while at < end {
            let Some(upper) = &self.root.slots[index(at, SHIFT_512G)] else {
                at = next(at, SHIFT_512G);
                continue;
            };
            let Some(directory) = &upper.slots[index(at, SHIFT_1G)] else {
                at = next(at, SHIFT_1G);
                continue;
            };
            let stop = end.min(next(at, SHIFT_2M));
            match &directory.slots[index(at, SHIFT_2M)] {
                None => {}
                Some(Block::Huge(word)) => f(word),
                Some(Block::Small(leaves)) => leaves.for_each(index(at, 12), index(stop - 1, 12) + 1, &mut f),
            }
            at = stop;
        }
    }

    /// Puts an entry where nothing is.
    fn put(&mut self, va: u64, entry: Entry) {
        let directory = self
            .root
            .get_or_insert(index(va, SHIFT_512G), Node::default)
            .get_or_insert(index(va, SHIFT_1G), Node::default);
        if entry.size() == PageSize::M2 {
            directory.get_or_insert(index(va, SHIFT_2M), || Block::Huge(AtomicU64::new(entry.0)));
            return;
        }
        match directory.get_or_insert(index(va, SHIFT_2M), || Block::Small(Leaves::default())) {
            Block::Small(leaves) => leaves.put(index(va, 12), entry),
            Block::Huge(_) => unreachable!("the place was unbound first"),
        }
    }
}

/// Empties `span`, which lies in one directory.
fn clear_directory(directory: &mut Directory, span: Span, removed: &mut Removed) {
    let mut at = span.start;
    while at < span.end {
        let stop = span.end.min(next(at, SHIFT_2M));
        let i = index(at, SHIFT_2M);
        let slot = &mut directory.slots[i];
        if let Some(Block::Huge(word)) = slot {
            let word = *word.get_mut();
            if stop - at == SZ_2M {
                removed.note(word);
                directory.remove(i);
                at = stop;
                continue;
            }
            *slot = Some(Block::Small(Leaves::split_of(Entry(word))));
        }
        if let Some(Block::Small(leaves)) = slot {
            leaves.clear(index(at, 12), index(stop - 1, 12) + 1, removed);
            if leaves.used == 0 {
                directory.remove(i);
            }
        }
        at = stop;
    }
}

/// The largest entry for an address and target of that alignment, not longer than `left`.
fn largest(alignment: u64, left: u64) -> PageSize {
    let fits = |size: &PageSize| alignment.is_multiple_of(size.bytes()) && size.bytes() <= left;
    [PageSize::M2, PageSize::K64].into_iter().find(fits).unwrap_or(PageSize::K4)
}

fn check(span: Span) -> Result<()> {
    if span.end > VA_END {
        return Err(Error::OutsideSpace { addr: span.start });
    }
    if span.is_empty() || span.page_aligned() != span {
        let reason = format!("{span} is empty or not aligned to {SZ_4K}");
        return Err(Error::Invalid { argument: "span", reason });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// 6 MiB that straddle a 512 GiB boundary: every level changes inside.
    const BASE: u64 = (512 << 30) - (4 << 20);
    const PAGES: u64 = (6 << 20) / SZ_4K;

    #[derive(Debug, Clone)]
    struct Step {
        span: Span,
        bind: Option<(Backing, GpuAccess)>,
    }

    fn span() -> impl Strategy<Value = Span> {
        let any = (0..PAGES, 1..PAGES).prop_map(|(at, len)| (at, len.min(PAGES - at)));
        let small = (0..PAGES, 1..40u64).prop_map(|(at, len)| (at, len.min(PAGES - at)));
        let big = (0..PAGES / 16).prop_map(|i| (i * 16, 16));
        let huge = (0..PAGES / 512).prop_map(|i| (i * 512, 512));
        prop_oneof![any, small, big, huge].prop_map(|(at, len)| Span::sized(BASE + at * SZ_4K, len * SZ_4K))
    }

    fn step() -> impl Strategy<Value = Step> {
        let access = prop_oneof![Just(GpuAccess::Read), Just(GpuAccess::Write), Just(GpuAccess::Atomic)];
        let offset = prop_oneof![
            Just(0u64),
            Just(SZ_2M),
            (0..64u64).prop_map(|n| n * SZ_64K),
            (0..900u64).prop_map(|n| n * SZ_4K)
        ];
        let backing = prop_oneof![Just(Backing::System), offset.prop_map(Backing::Vram)];
        (span(), proptest::option::of((backing, access))).prop_map(|(span, bind)| Step { span, bind })
    }

    type Model = BTreeMap<u64, (u64, bool, bool)>;

    fn agree(table: &PageTable, model: &Model) -> std::result::Result<(), TestCaseError> {
        for page in 0..PAGES {
            let va = BASE + page * SZ_4K;
            let probe = va + 5;
            let got = table.translate(probe, GpuAccess::Read);
            let want = model.get(&va);
            prop_assert_eq!(
                got.map(|t| (t.target(probe), t.entry.allows(GpuAccess::Write), t.entry.is_system())),
                want.map(|&(to, write, system)| (to + 5, write, system))
            );
            let write = table.translate(probe, GpuAccess::Write).is_some();
            prop_assert_eq!(write, want.is_some_and(|w| w.1));
            let atomic = table.translate(probe, GpuAccess::Atomic).is_some();
            prop_assert_eq!(atomic, want.is_some_and(|w| w.1 && !w.2));
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        #[test]
        fn agrees_with_a_map_of_pages(steps in proptest::collection::vec(step(), 1..24)) {
            let mut table = PageTable::default();
            let mut model = Model::new();
            for Step { span, bind } in steps {
                let pages = (0..span.pages() as u64).map(|p| (p, span.start + p * SZ_4K));
                let had = model.range(span.start..span.end).next().is_some();
                let removed = match bind {
                    Some((backing, access)) => {
                        let removed = table.bind(span, backing, access).unwrap();
                        for (p, va) in pages {
                            let (to, system) = match backing {
                                Backing::Vram(offset) => (offset + p * SZ_4K, false),
                                Backing::System => (va, true),
                            };
                            model.insert(va, (to, access.writes(), system));
                        }
                        removed
                    }
                    None => {
                        pages.for_each(|(_, va)| { model.remove(&va); });
                        table.unbind(span)
                    }
                };
                prop_assert_eq!(removed.any, had);
                agree(&table, &model)?;
            }
            table.unbind(Span::sized(BASE, PAGES * SZ_4K));
            prop_assert!(table.is_empty(), "empty tables are freed");
        }
    }

    fn bound(span: Span, offset: u64) -> PageTable {
        let mut table = PageTable::default();
        table.bind(span, Backing::Vram(offset), GpuAccess::Write).unwrap();
        table
    }

    #[test]
    fn entries_are_as_large_as_both_sides_allow() {
        let size = |t: &PageTable, va| t.translate(va, GpuAccess::Read).unwrap().entry.size();
        let table = bound(
            Span::sized(SZ_2M - SZ_64K - SZ_4K, SZ_4K + SZ_64K + SZ_2M + SZ_4K),
            8 * SZ_2M - SZ_64K - SZ_4K,
        );
        assert_eq!(size(&table, SZ_2M - SZ_64K - SZ_4K), PageSize::K4);
        assert_eq!(size(&table, SZ_2M - 1), PageSize::K64);
        assert_eq!(size(&table, SZ_2M + 12345), PageSize::M2);
        assert_eq!(size(&table, 2 * SZ_2M), PageSize::K4);
        let shifted = bound(Span::sized(SZ_2M, SZ_2M), SZ_64K);
        assert_eq!(size(&shifted, SZ_2M), PageSize::K64);
    }

    #[test]
    fn a_split_keeps_the_rest_and_its_referenced_bit() {
        let whole = Span::sized(SZ_2M, SZ_2M);
        let mut table = bound(whole, 0);
        table.translate(SZ_2M, GpuAccess::Read).unwrap();
        let hole = Span::sized(SZ_2M + 3 * SZ_64K + SZ_4K, SZ_4K);
        assert_eq!(table.unbind(hole), Removed { any: true, referenced: true });
        assert_eq!(table.translate(hole.start, GpuAccess::Read), None);
        let beside = table.translate(hole.end, GpuAccess::Write).unwrap();
        assert_eq!((beside.entry.size(), beside.target(hole.end)), (PageSize::K4, hole.end - SZ_2M));
        let far = table.translate(SZ_2M, GpuAccess::Write).unwrap();
        assert_eq!(far.entry.size(), PageSize::K64);
        assert_eq!(table.unbind(whole), Removed { any: true, referenced: true });
        assert!(table.is_empty());
    }

    #[test]
    fn referenced_is_set_by_translations_only_and_taken_once() {
        for size in [SZ_4K, SZ_64K, SZ_2M] {
            let span = Span::sized(8 * SZ_2M, size);
            let mut table = bound(span, 0);
            assert!(!table.take_referenced(span));
            assert!(table.translate(span.end - 1, GpuAccess::Atomic).is_some());
            assert!(!table.take_referenced(Span::sized(span.end, SZ_2M)), "next door");
            assert!(table.take_referenced(Span::sized(span.end - SZ_4K, SZ_4K)));
            assert!(!table.take_referenced(Span::new(0, u64::MAX)), "the whole space, quickly");
            assert_eq!(table.unbind(span), Removed { any: true, referenced: false });
        }
    }

    #[test]
    fn a_refused_access_is_no_reference() {
        let span = Span::sized(0, SZ_64K);
        let mut table = PageTable::default();
        table.bind(span, Backing::System, GpuAccess::Read).unwrap();
        assert_eq!(table.translate(0, GpuAccess::Write), None);
        assert!(!table.take_referenced(span));
    }

    #[test]
    fn spans_that_make_no_sense_are_refused() {
        let mut table = PageTable::default();
        let mut bind = |span, offset| table.bind(span, Backing::Vram(offset), GpuAccess::Read);
        assert!(matches!(bind(Span::sized(VA_END - SZ_4K, 2 * SZ_4K), 0), Err(Error::OutsideSpace { .. })));
        assert!(matches!(bind(Span::sized(5, SZ_4K), 0), Err(Error::Invalid { .. })));
        assert!(matches!(bind(Span::sized(0, 0), 0), Err(Error::Invalid { .. })));
        assert!(matches!(bind(Span::sized(0, SZ_4K), 7), Err(Error::Invalid { .. })));
        assert!(bind(Span::sized(VA_END - SZ_4K, SZ_4K), 0).is_ok());
        assert_eq!(table.translate(VA_END + 5, GpuAccess::Read), None);
        assert!(table.unbind(Span::new(0, u64::MAX)).any);
        assert!(table.is_empty());
    }
}
