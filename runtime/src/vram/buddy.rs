//! A buddy allocator of offsets.
//!
//! # Overview
//! Mirrors what i915's TTM backend asks of drm_buddy: blocks of 4 KiB and up, contiguous, naturally aligned,
//! from either end of the region, or only below an offset (the CPU-visible part of a small BAR). It hands out
//! numbers and never touches the memory behind them: all metadata is out of band.
//!
//! Free blocks are kept in one ordered set for each order. The region may have any size that is a multiple of
//! 4 KiB: it starts as the aligned powers of two that tile it, and since a block that reaches past the end is
//! never free, merging needs no special case for the odd tail. A length that is no power of two gets the
//! block of the next power, whose unused tail goes straight back, so accounting is exact to the page.
//!
//! # Locking
//! None; the owner wraps it.
//!
//! # Limits
//! Best fit by order, then by address: it does not search a larger order for a better address. An allocation
//! is aligned to the next power of two of its length, so a length just above a power of two needs a free
//! block of nearly twice its size.

use crate::ground::addr::{PAGE_SHIFT, SZ_4K, align_down, align_up};
use crate::ground::error::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};

/// How to choose the place of an allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Choose {
    /// Take the highest fitting place instead of the lowest: for memory that only the device touches.
    pub top_down: bool,
    /// End at or below this offset, in bytes.
    pub within: Option<u64>,
}

/// Free and allocated offsets of one region.
#[derive(Debug)]
pub struct Buddy {
    size: u64,
    free_bytes: u64,
    /// `free[k]`: offsets of the free blocks of `4 KiB << k`.
    free: Vec<BTreeSet<u64>>,
    /// What was given out, offset to length.
    taken: BTreeMap<u64, u64>,
}

impl Buddy {
    /// A region of `size` bytes, all free. Errors when `size` is zero or no multiple of 4 KiB.
    pub fn new(size: u64) -> Result<Self> {
        if size == 0 || !size.is_multiple_of(SZ_4K) {
            let reason = format!("{size} bytes is no positive multiple of {SZ_4K}: round it up");
            return Err(Error::Invalid { argument: "region size", reason });
        }
        let orders = (size >> PAGE_SHIFT).ilog2() as usize + 1;
        let mut buddy =
            Self { size, free_bytes: 0, free: vec![BTreeSet::new(); orders], taken: BTreeMap::new() };
        buddy.release(0, size);
        Ok(buddy)
    }

    /// Bytes of the region.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Free bytes, maybe in pieces.
    pub fn free_bytes(&self) -> u64 {
        self.free_bytes
    }

    /// Free bytes below `limit`.
    pub fn free_bytes_below(&self, limit: u64) -> u64 {
        let below = |(order, set): (usize, &BTreeSet<u64>)| -> u64 {
            set.range(..limit).map(|&at| block(order).min(limit - at)).sum()
        };
        self.free.iter().enumerate().map(below).sum()
    }

    /// Bytes of the largest allocation that would succeed now: the largest free block.
    pub fn largest_free(&self) -> u64 {
        self.free.iter().rposition(|set| !set.is_empty()).map_or(0, block)
    }

    /// Takes `len` bytes (rounded up to 4 KiB), contiguous, aligned to the next power of two of `len`. `None`
    /// when no free block fits, or `len` is zero.
    pub fn alloc(&mut self, len: u64, choose: Choose) -> Option<u64> {
        if len == 0 || len > self.size {
            return None;
        }
        let len = align_up(len, SZ_4K);
        let need = len.next_power_of_two();
        let want = order_of(need);
        let (order, at, start) = (want..self.free.len()).find_map(|order| {
            let at = self.candidate(order, need, choose)?;
            Some((order, at, place(at, order, need, choose)))
        })?;
        self.free[order].remove(&at);
        self.free_bytes -= block(order);
        // What the block has before and after the wanted piece stays free; neither can merge with what is
        // around.
        self.release(at, start - at);
        self.release(start + len, at + block(order) - (start + len));
        self.taken.insert(start, len);
        Some(start)
    }

    /// Gives back what [`Buddy::alloc`] gave at `offset` and says how many bytes that were. Errors when
    /// nothing was given out there.
    pub fn free(&mut self, offset: u64) -> Result<u64> {
        let len = self.taken.remove(&offset).ok_or_else(|| Error::Invalid {
            argument: "offset",
            reason: format!("nothing is allocated at {offset:#x} of this region"),
        })?;
        self.release(offset, len);
        Ok(len)
    }

    /// The free block of `order` to take `need` bytes from.
    fn candidate(&self, order: usize, need: u64, choose: Choose) -> Option<u64> {
        let set = &self.free[order];
        let Some(limit) = choose.within else {
            return if choose.top_down { set.last() } else { set.first() }.copied();
        };
        let mut fitting = set.range(..=limit.checked_sub(need)?);
        if choose.top_down { fitting.next_back() } else { fitting.next() }.copied()
    }

    /// Makes `[at, at + len)` free: the aligned powers of two that tile it, each merged as far as it goes.
    fn release(&mut self, mut at: u64, len: u64) {
        self.free_bytes += len;
        let end = at + len;
        while at < end {
            let by_length = (end - at).ilog2() - PAGE_SHIFT;
            let by_alignment = at.trailing_zeros() - PAGE_SHIFT;
            let order = by_length.min(by_alignment) as usize;
            self.insert_merged(at, order);
            at += block(order);
        }
    }

    fn insert_merged(&mut self, mut at: u64, mut order: usize) {
        while order + 1 < self.free.len() && self.free[order].remove(&(at ^ block(order))) {
            at = align_down(at, block(order + 1));
            order += 1;
        }
        self.free[order].insert(at);
    }
}

/// Bytes of a block of `order`.
fn block(order: usize) -> u64 {
    SZ_4K << order
}

/// The order of a block of `len` bytes, a power of two of at least 4 KiB.
fn order_of(len: u64) -> usize {
    (len.ilog2() - PAGE_SHIFT) as usize
}

/// Where in the free block at `at` the `need` bytes go.
fn place(at: u64, order: usize, need: u64, choose: Choose) -> u64 {
    if !choose.top_down {
        return at;
    }
    let end = (at + block(order)).min(choose.within.unwrap_or(u64::MAX));
    align_down(end - need, need)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = SZ_4K;

    /// Blocks of every order in a fresh region: the least a region can be split into.
    fn shape(b: &Buddy) -> Vec<Vec<u64>> {
        b.free.iter().map(|s| s.iter().copied().collect()).collect()
    }

    #[derive(Debug, Clone)]
    enum Op {
        Alloc { len: u64, choose: Choose },
        Free(usize),
    }

    fn op(region: u64) -> impl Strategy<Value = Op> {
        let choose = (any::<bool>(), proptest::option::of(0..region + 2 * PAGE))
            .prop_map(|(top_down, within)| Choose { top_down, within });
        prop_oneof![
            3 => (1..region / 3, choose).prop_map(|(len, choose)| Op::Alloc { len, choose }),
            2 => any::<usize>().prop_map(Op::Free),
        ]
    }

    /// Whether the naive page map has an aligned free place for `need` bytes that ends by `limit`.
    fn model_fits(used: &[bool], need: u64, limit: u64) -> bool {
        let pages = (need / PAGE) as usize;
        let end = (limit / PAGE) as usize;
        (0..used.len())
            .step_by(pages)
            .any(|p| p + pages <= used.len().min(end) && used[p..p + pages].iter().all(|u| !u))
    }

    fn scenario() -> impl Strategy<Value = (u64, Vec<Op>)> {
        (8u64..300).prop_flat_map(|pages| {
            let region = pages * PAGE;
            (Just(region), proptest::collection::vec(op(region), 1..120))
        })
    }

    proptest! {
        #[test]
        fn agrees_with_a_page_map((region, ops) in scenario()) {
            let mut buddy = Buddy::new(region).unwrap();
            let fresh = shape(&buddy);
            let mut used = vec![false; (region / PAGE) as usize];
            let mut live: Vec<(u64, u64)> = Vec::new();
            for op in ops {
                match op {
                    Op::Alloc { len, choose } => {
                        let rounded = align_up(len, PAGE);
                        let need = rounded.next_power_of_two();
                        let limit = choose.within.unwrap_or(region).min(region);
                        // A block is a buddy block: it may be refused only if no aligned place is free.
                        let fits = model_fits(&used, need, limit);
                        match buddy.alloc(len, choose) {
                            Some(at) => {
                                prop_assert!(fits, "given although the model has no place");
                                prop_assert_eq!(at % need, 0, "aligned to its size");
                                prop_assert!(at + rounded <= limit);
                                for p in at / PAGE..(at + rounded) / PAGE {
                                    prop_assert!(!std::mem::replace(&mut used[p as usize], true), "overlap");
                                }
                                live.push((at, rounded));
                            }
                            None => prop_assert!(!fits, "refused although an aligned place is free"),
                        }
                    }
                    Op::Free(pick) if !live.is_empty() => {
                        let (at, len) = live.swap_remove(pick % live.len());
                        prop_assert_eq!(buddy.free(at).unwrap(), len);
                        used[(at / PAGE) as usize..((at + len) / PAGE) as usize].fill(false);
                    }
                    Op::Free(_) => {}
                }
                let free = used.iter().filter(|u| !**u).count() as u64 * PAGE;
                prop_assert_eq!(buddy.free_bytes(), free);
                let half = region / 2;
                let below = used[..(half / PAGE) as usize].iter().filter(|u| !**u).count() as u64 * PAGE;
                prop_assert_eq!(buddy.free_bytes_below(align_down(half, PAGE)), below);
                let largest = buddy.largest_free();
                prop_assert!(largest == 0 || model_fits(&used, largest, region));
                prop_assert!(largest * 2 > region || !model_fits(&used, (largest * 2).max(PAGE), region));
            }
            for (at, _) in live {
                buddy.free(at).unwrap();
            }
            prop_assert_eq!(shape(&buddy), fresh, "everything merged back");
        }
    }

    #[test]
    fn low_first_high_first_and_below_a_limit() {
        let mut b = Buddy::new(1 << 20).unwrap();
        assert_eq!(b.alloc(PAGE, Choose::default()), Some(0));
        let top = Choose { top_down: true, within: None };
        assert_eq!(b.alloc(64 << 10, top), Some(64 << 10), "best fit keeps the upper half whole");
        assert_eq!(b.alloc(512 << 10, top), Some(512 << 10));
        let below = Choose { top_down: true, within: Some(256 << 10) };
        assert_eq!(b.alloc(PAGE, below), Some(PAGE), "the smallest fitting block first");
        assert_eq!(b.alloc(256 << 10, below), None);
        assert_eq!(b.alloc(128 << 10, below), Some(128 << 10));
    }

    #[test]
    fn a_limit_inside_a_block_is_kept() {
        let mut b = Buddy::new(1 << 20).unwrap();
        let choose = Choose { top_down: true, within: Some(100 << 10) };
        assert_eq!(b.alloc(16 << 10, choose), Some(80 << 10));
        assert_eq!(b.alloc(PAGE, Choose { top_down: true, within: Some(PAGE - 1) }), None);
    }

    #[test]
    fn sizes_that_make_no_sense_are_refused() {
        assert!(Buddy::new(0).is_err());
        assert!(Buddy::new(PAGE + 1).is_err());
        let mut b = Buddy::new(3 * PAGE).unwrap();
        assert_eq!(b.alloc(0, Choose::default()), None);
        assert_eq!(b.alloc(u64::MAX, Choose::default()), None);
        assert_eq!(b.largest_free(), 2 * PAGE);
        assert_eq!(b.alloc(2 * PAGE, Choose::default()), Some(0));
        assert_eq!(b.alloc(1, Choose::default()), Some(2 * PAGE));
        assert!(b.free(PAGE).is_err(), "nothing was given out there");
        assert_eq!(b.free(0), Ok(2 * PAGE));
        assert!(b.free(0).is_err(), "twice");
    }
}
