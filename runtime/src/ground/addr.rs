//! Addresses, spans and page masks.
//!
//! # Overview
//! usvm mirrors one CPU address space on a GPU at the same addresses, so one integer type serves both sides.
//! A [`Span`] is a half-open, page-aligned interval of that space; a [`PageMask`] says something about each 4 KiB
//! page of a span no longer than the largest range (2 MiB).
//!
//! # Limits
//! Pages are 4 KiB: the sizes of x86-64, and of drm_gpusvm's smallest chunk.

use std::fmt;

/// Bytes in a page, the smallest unit of residency.
pub const SZ_4K: u64 = 4 << 10;
/// Bytes in a big page, local memory's smallest unit on Intel discrete parts.
pub const SZ_64K: u64 = 64 << 10;
/// Bytes in a huge page, the largest range.
pub const SZ_2M: u64 = 2 << 20;
/// log2 of [`SZ_4K`].
pub const PAGE_SHIFT: u32 = 12;

/// Rounds `value` down to a multiple of `align`, a power of two.
#[inline]
pub const fn align_down(value: u64, align: u64) -> u64 {
    value & !(align - 1)
}

/// Rounds `value` up to a multiple of `align`, a power of two; saturates at the last multiple.
#[inline]
pub const fn align_up(value: u64, align: u64) -> u64 {
    match value.checked_add(align - 1) {
        Some(v) => v & !(align - 1),
        None => !(align - 1),
    }
}

/// A half-open interval `[start, end)` of addresses.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Span {
    /// First address inside.
    pub start: u64,
    /// First address after.
    pub end: u64,
}

impl Span {
    /// `[start, end)`. An inverted pair becomes the empty span at `start`.
    #[inline]
    pub const fn new(start: u64, end: u64) -> Self {
        Self { start, end: if end < start { start } else { end } }
    }

    /// `len` bytes from `start`; saturates at the end of the address space.
    #[inline]
    pub const fn sized(start: u64, len: u64) -> Self {
        Self { start, end: start.saturating_add(len) }
    }

    /// The aligned block of `size` bytes (a power of two) around `addr`.
    #[inline]
    pub const fn around(addr: u64, size: u64) -> Self {
        Self::sized(align_down(addr, size), size)
    }

    /// The smallest page-aligned span that holds this one.
    #[inline]
    pub const fn page_aligned(self) -> Self {
        Self::new(align_down(self.start, SZ_4K), align_up(self.end, SZ_4K))
    }

    /// Bytes inside.
    #[inline]
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whole pages inside.
    #[inline]
    pub const fn pages(self) -> usize {
        (self.len() >> PAGE_SHIFT) as usize
    }

    /// Whether nothing is inside.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether `addr` is inside.
    #[inline]
    pub const fn contains(self, addr: u64) -> bool {
        self.start <= addr && addr < self.end
    }

    /// Whether all of `other` is inside.
    #[inline]
    pub const fn covers(self, other: Span) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Whether the two share an address.
    #[inline]
    pub const fn overlaps(self, other: Span) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// What the two share, `None` if nothing.
    #[inline]
    pub fn intersect(self, other: Span) -> Option<Span> {
        let s = Span { start: self.start.max(other.start), end: self.end.min(other.end) };
        (s.start < s.end).then_some(s)
    }

    /// The span `[start, end)` of pages `first..first + count` counted from this span's start.
    #[inline]
    pub const fn page_run(self, first: usize, count: usize) -> Span {
        Span::sized(self.start + ((first as u64) << PAGE_SHIFT), (count as u64) << PAGE_SHIFT)
    }

    /// The index of the page that holds `addr`, counted from this span's start.
    #[inline]
    pub const fn page_index(self, addr: u64) -> usize {
        ((addr - self.start) >> PAGE_SHIFT) as usize
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.start, self.end)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One bit for each page of a span of at most 2 MiB.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct PageMask {
    words: [u64; PageMask::WORDS],
}

impl PageMask {
    const WORDS: usize = 8;
    /// Pages a mask can speak of.
    pub const CAPACITY: usize = Self::WORDS * 64;
    /// No page.
    pub const EMPTY: Self = Self { words: [0; Self::WORDS] };

    /// The first `pages` pages.
    pub fn first(pages: usize) -> Self {
        Self::run(0, pages)
    }

    /// `count` pages from `first`.
    pub fn run(first: usize, count: usize) -> Self {
        let mut mask = Self::EMPTY;
        mask.set_run(first, count);
        mask
    }

    /// The pages of `part` (clipped to `whole`), counted from the start of `whole`.
    pub fn of(whole: Span, part: Span) -> Self {
        let mut mask = Self::EMPTY;
        if let Some(p) = whole.intersect(part.page_aligned()) {
            mask.set_run(whole.page_index(p.start), p.pages());
        }
        mask
    }

    /// Whether `page` is in.
    #[inline]
    pub fn get(&self, page: usize) -> bool {
        self.words[page / 64] >> (page % 64) & 1 == 1
    }

    /// Puts `page` in.
    #[inline]
    pub fn set(&mut self, page: usize) {
        self.words[page / 64] |= 1 << (page % 64);
    }

    /// Takes `page` out.
    #[inline]
    pub fn clear(&mut self, page: usize) {
        self.words[page / 64] &= !(1 << (page % 64));
    }

    /// Puts `count` pages from `first` in.
    pub fn set_run(&mut self, first: usize, count: usize) {
        assert!(first + count <= Self::CAPACITY, "a mask speaks of {} pages at most", Self::CAPACITY);
        let mut at = first;
        let end = first + count;
        while at < end {
            let bit = at % 64;
            let n = (64 - bit).min(end - at);
            let ones = if n == 64 { u64::MAX } else { (1 << n) - 1 };
            self.words[at / 64] |= ones << bit;
            at += n;
        }
    }

    /// How many pages are in.
    #[inline]
    pub fn count(&self) -> usize {
        self.words.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Whether no page is in.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.words == [0; Self::WORDS]
    }

    /// Pages in both.
    #[inline]
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & b)
    }

    /// Pages in either.
    #[inline]
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a | b)
    }

    /// Pages in this one and not in `other`.
    #[inline]
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & !b)
    }

    fn zip(&self, other: &Self, f: impl Fn(u64, u64) -> u64) -> Self {
        Self { words: std::array::from_fn(|i| f(self.words[i], other.words[i])) }
    }

    /// The runs of neighbouring pages, as `(first, count)`, ascending.
    pub fn runs(&self) -> Runs<'_> {
        Runs { mask: self, at: 0 }
    }

    /// The first page at or after `from` whose bit is `value`.
    fn next(&self, from: usize, value: bool) -> Option<usize> {
        let mut word = from / 64;
        let mut skip = u64::MAX << (from % 64);
        while word < Self::WORDS {
            let bits = if value { self.words[word] } else { !self.words[word] } & skip;
            if bits != 0 {
                return Some(word * 64 + bits.trailing_zeros() as usize);
            }
            word += 1;
            skip = u64::MAX;
        }
        None
    }
}

impl fmt::Debug for PageMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.runs().map(|(first, count)| first..first + count)).finish()
    }
}

/// Iterator of [`PageMask::runs`].
#[derive(Debug)]
pub struct Runs<'a> {
    mask: &'a PageMask,
    at: usize,
}

impl Iterator for Runs<'_> {
    type Item = (usize, usize);

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= PageMask::CAPACITY {
            return None;
        }
        let first = self.mask.next(self.at, true)?;
        let end = self.mask.next(first, false).unwrap_or(PageMask::CAPACITY);
        self.at = end;
        Some((first, end - first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn mask_agrees_with_a_set(pages in proptest::collection::btree_set(0usize..PageMask::CAPACITY, 0..80)) {
            let mut mask = PageMask::EMPTY;
            for &p in &pages {
                mask.set(p);
            }
            prop_assert_eq!(mask.count(), pages.len());
            let from_runs: Vec<usize> = mask.runs().flat_map(|(f, n)| f..f + n).collect();
            prop_assert_eq!(from_runs, pages.iter().copied().collect::<Vec<_>>());
            for (first, count) in mask.runs() {
                prop_assert!(first == 0 || !mask.get(first - 1), "runs are maximal");
                prop_assert!(first + count == PageMask::CAPACITY || !mask.get(first + count));
            }
        }

        #[test]
        fn set_run_sets_exactly_that(first in 0usize..512, count in 0usize..512) {
            let count = count.min(512 - first);
            let mut mask = PageMask::EMPTY;
            mask.set_run(first, count);
            for p in 0..512 {
                prop_assert_eq!(mask.get(p), p >= first && p < first + count);
            }
        }
    }

    #[test]
    fn spans() {
        let s = Span::sized(0x1000, 0x3000);
        assert_eq!(s.pages(), 3);
        assert!(s.contains(0x3fff) && !s.contains(0x4000));
        assert_eq!(s.intersect(Span::new(0x2000, 0x9000)), Some(Span::new(0x2000, 0x4000)));
        assert_eq!(s.intersect(Span::new(0x4000, 0x9000)), None);
        assert_eq!(Span::around(0x12345, SZ_64K), Span::new(0x10000, 0x20000));
        assert_eq!(align_up(u64::MAX, SZ_4K), !(SZ_4K - 1));
        assert_eq!(PageMask::of(s, Span::new(0x2fff, 0x3001)).runs().collect::<Vec<_>>(), [(1, 2)]);
    }
}
