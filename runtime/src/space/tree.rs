//! The chunk tree: the ranges of one notifier.
//!
//! # Overview
//! drm_gpusvm keeps a notifier's ranges in an interval tree. But ranges are not any intervals: each is an aligned block
//! of one of a few sizes, so a block of one size either holds another block or is apart from it. That is a radix tree
//! with one level for each chunk size ([`super::chunk::Levels`]): a slot is empty, holds the range that fills it, or
//! holds a node of smaller slots. With 512 MiB notifiers and chunks of 2 MiB, 64 KiB and 4 KiB the nodes have 256, 32
//! and 16 slots.
//!
//! | question | work |
//! |---|---|
//! | which range holds this address | one index for each level, at most three, no comparison |
//! | does any range overlap this chunk | the same walk: its slot is empty or it is not |
//! | ranges that meet a span, in order | the slots of the span, empty nodes never |
//! | insert, remove | the same walk; a node that becomes empty is freed with it |
//!
//! # Limits
//! A node is allocated whole: ranges that lie alone cost more than those that lie together (figures in [`super`]).

use super::chunk::{Level, Levels};
use crate::ground::addr::Span;
use std::ops::ControlFlow;

/// A place for one aligned block.
#[derive(Debug)]
enum Slot<T> {
    Empty,
    /// An item that fills the block.
    Item(T),
    /// Smaller blocks, of which one at least is not empty.
    Inner(Box<[Slot<T>]>),
    /// Smaller blocks that are filled or empty but not divided further, a third of the size of
    /// [`Slot::Inner`]: so a node starts whose first item fills one of its blocks.
    Leaf(Box<[Option<T>]>),
}

/// Items that each fill one aligned block of a notifier. The levels are the notifier's and are given with each call.
#[derive(Debug)]
pub(super) struct ChunkTree<T> {
    root: Slot<T>,
}

impl<T> ChunkTree<T> {
    /// No items.
    pub const fn new() -> Self {
        Self { root: Slot::Empty }
    }

    /// Whether there are no items.
    pub fn is_empty(&self) -> bool {
        matches!(self.root, Slot::Empty)
    }

    /// The item whose block holds `addr`, an address of this notifier.
    #[inline]
    pub fn find(&self, levels: &Levels, addr: u64) -> Option<&T> {
        let mut slot = &self.root;
        for level in &levels.as_slice()[1..] {
            match slot {
                Slot::Empty => return None,
                Slot::Item(item) => return Some(item),
                Slot::Inner(slots) => slot = &slots[level.slot(addr)],
                Slot::Leaf(slots) => return slots[level.slot(addr)].as_ref(),
            }
        }
        match slot {
            Slot::Item(item) => Some(item),
            _ => None,
        }
    }

    /// Whether the block of `level` that holds `addr` shares an address with any item.
    pub fn overlaps(&self, levels: &Levels, addr: u64, level: usize) -> bool {
        let mut slot = &self.root;
        for below in &levels.as_slice()[1..=level] {
            match slot {
                Slot::Empty => return false,
                Slot::Item(_) => return true,
                Slot::Inner(slots) => slot = &slots[below.slot(addr)],
                Slot::Leaf(slots) => return slots[below.slot(addr)].is_some(),
            }
        }
        !matches!(slot, Slot::Empty)
    }

    /// Puts `item` into the block of `level` that holds `addr`, or gives it back if the block overlaps another item.
    pub fn insert(&mut self, levels: &Levels, addr: u64, level: usize, item: T) -> Result<(), T> {
        if self.overlaps(levels, addr, level) {
            return Err(item);
        }
        let mut slot = &mut self.root;
        for (depth, below) in levels.as_slice().iter().enumerate().take(level + 1).skip(1) {
            match slot {
                Slot::Empty if depth == level => {
                    *slot = Slot::Leaf((0..below.slots()).map(|_| None).collect())
                }
                Slot::Empty => *slot = Slot::Inner((0..below.slots()).map(|_| Slot::Empty).collect()),
                _ if depth < level => slot.divide(),
                _ => {}
            }
            match slot {
                Slot::Inner(slots) => slot = &mut slots[below.slot(addr)],
                Slot::Leaf(slots) => {
                    slots[below.slot(addr)] = Some(item);
                    return Ok(());
                }
                Slot::Empty | Slot::Item(_) => return Err(item),
            }
        }
        *slot = Slot::Item(item);
        Ok(())
    }

    /// Takes out the item whose block holds `addr`, and the nodes that only led to it.
    pub fn remove(&mut self, levels: &Levels, addr: u64) -> Option<T> {
        remove(&mut self.root, &levels.as_slice()[1..], addr)
    }

    /// Calls `f` with each item whose block shares an address with `span`, in ascending order, until it breaks.
    /// `base` is where the notifier starts.
    pub fn visit<'a, B>(
        &'a self,
        levels: &Levels,
        base: u64,
        span: Span,
        f: &mut impl FnMut(&'a T) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        let whole = Span::sized(base, levels.as_slice()[0].size());
        match whole.intersect(span) {
            Some(part) => visit(&self.root, &levels.as_slice()[1..], base, part, f),
            None => ControlFlow::Continue(()),
        }
    }

    /// Nodes that are allocated, and the slots in them, for the memory account.
    #[cfg(test)]
    pub fn nodes(&self) -> usize {
        fn count<T>(slot: &Slot<T>) -> usize {
            match slot {
                Slot::Empty | Slot::Item(_) => 0,
                Slot::Leaf(_) => 1,
                Slot::Inner(slots) => 1 + slots.iter().map(count).sum::<usize>(),
            }
        }
        count(&self.root)
    }

    /// Checks that no node is empty, that nodes have the sizes of their levels and that `block` of each item is the
    /// block where it is.
    pub fn validate(&self, levels: &Levels, base: u64, block: &impl Fn(&T) -> Span) -> Result<usize, String> {
        validate(&self.root, levels.as_slice(), base, block)
    }
}

impl<T> Slot<T> {
    /// Lets the blocks of a leaf be divided.
    fn divide(&mut self) {
        if let Slot::Leaf(slots) = self {
            let slots = std::mem::take(slots).into_iter();
            *self = Slot::Inner(slots.map(|item| item.map_or(Slot::Empty, Slot::Item)).collect());
        }
    }
}

fn remove<T>(slot: &mut Slot<T>, below: &[Level], addr: u64) -> Option<T> {
    let (taken, emptied) = match slot {
        Slot::Empty => return None,
        Slot::Item(_) => {
            let Slot::Item(item) = std::mem::replace(slot, Slot::Empty) else { return None };
            return Some(item);
        }
        Slot::Inner(slots) => {
            let taken = remove(&mut slots[below[0].slot(addr)], &below[1..], addr)?;
            (taken, slots.iter().all(|s| matches!(s, Slot::Empty)))
        }
        Slot::Leaf(slots) => {
            let taken = slots[below[0].slot(addr)].take()?;
            (taken, slots.iter().all(Option::is_none))
        }
    };
    if emptied {
        *slot = Slot::Empty;
    }
    Some(taken)
}

/// Visits the items of `slot`, whose block starts at `base`; `part` is the share of the block that is asked for.
fn visit<'a, T, B>(
    slot: &'a Slot<T>,
    below: &[Level],
    base: u64,
    part: Span,
    f: &mut impl FnMut(&'a T) -> ControlFlow<B>,
) -> ControlFlow<B> {
    match slot {
        Slot::Empty => ControlFlow::Continue(()),
        Slot::Item(item) => f(item),
        Slot::Leaf(slots) => slots[slot_run(below[0], part)].iter().flatten().try_for_each(&mut *f),
        Slot::Inner(slots) => {
            let (level, run) = (below[0], slot_run(below[0], part));
            for (at, slot) in run.clone().zip(&slots[run]) {
                let block = Span::sized(base + ((at as u64) << level.shift), level.size());
                if let Some(part) = block.intersect(part) {
                    visit(slot, &below[1..], block.start, part, f)?;
                }
            }
            ControlFlow::Continue(())
        }
    }
}

/// The slots of a node that `part`, inside the node's block and not empty, meets.
fn slot_run(level: Level, part: Span) -> std::ops::Range<usize> {
    level.slot(part.start)..level.slot(part.end - 1) + 1
}

fn validate<T>(
    slot: &Slot<T>,
    levels: &[Level],
    base: u64,
    block: &impl Fn(&T) -> Span,
) -> Result<usize, String> {
    let here = Span::sized(base, levels[0].size());
    let place = |at: usize| base + ((at as u64) << levels[1].shift);
    let check = |item: &T, at: Span| match block(item) == at {
        true => Ok(1),
        false => Err(format!("{} is kept at {at}", block(item))),
    };
    let node = |slots: usize, leaf: bool| match slots == levels[1].slots() && (leaf || levels.len() > 2) {
        true => Ok(()),
        false => Err(format!("the node at {here} has {slots} slots")),
    };
    let count = match slot {
        Slot::Empty => return Ok(0),
        Slot::Item(item) => return check(item, here),
        Slot::Leaf(slots) => {
            node(slots.len(), true)?;
            let items = slots.iter().enumerate().filter_map(|(at, s)| Some((at, s.as_ref()?)));
            items
                .map(|(at, item)| check(item, Span::sized(place(at), levels[1].size())))
                .sum::<Result<_, _>>()?
        }
        Slot::Inner(slots) => {
            node(slots.len(), false)?;
            let slots = slots.iter().enumerate();
            slots.map(|(at, s)| validate(s, &levels[1..], place(at), block)).sum::<Result<_, _>>()?
        }
    };
    if count == 0 { Err(format!("the node at {here} is empty")) } else { Ok(count) }
}

#[cfg(test)]
mod tests {
    use super::super::chunk::Chunks;
    use super::*;
    use crate::ground::addr::{SZ_2M, SZ_4K, SZ_64K};
    use proptest::prelude::*;

    fn collect(tree: &ChunkTree<Span>, levels: &Levels, base: u64, span: Span) -> Vec<Span> {
        let mut found = Vec::new();
        let _ = tree.visit(levels, base, span, &mut |s| {
            found.push(*s);
            ControlFlow::<()>::Continue(())
        });
        found
    }

    fn configs() -> impl Strategy<Value = (u64, Vec<u64>)> {
        let chunks = prop_oneof![
            Just(vec![SZ_2M, SZ_64K, SZ_4K]),
            Just(vec![SZ_4K]),
            Just(vec![1 << 30, SZ_2M, SZ_4K]),
            Just(vec![SZ_2M, 1 << 20, 1 << 14, SZ_4K]),
        ];
        (12u32..=30, chunks).prop_map(|(shift, chunks)| (1 << shift, chunks))
    }

    proptest! {
        #[test]
        fn agrees_with_a_list(
            (size, sizes) in configs(),
            ops in proptest::collection::vec((0u8..5, any::<u64>(), any::<u64>()), 1..120),
        ) {
            let chunks = Chunks::new(&sizes).unwrap();
            let levels = Levels::new(size, &chunks);
            let base = 5 * size;
            let mut tree = ChunkTree::new();
            let mut list: Vec<Span> = Vec::new();
            for (op, a, b) in ops {
                // Few distinct places, so that operations meet.
                let addr = base + (a % 64) * (size / 64).max(SZ_4K) % size + (b % 3) * SZ_4K % size.min(SZ_2M);
                let addr = base + (addr - base) % size;
                match op {
                    0..=2 => {
                        let fitting: Vec<u64> = sizes.iter().copied().filter(|s| *s <= size).collect();
                        let span = Span::around(addr, fitting[b as usize % fitting.len()]);
                        let level = levels.of_size(span.len()).unwrap();
                        let taken = list.iter().any(|s| s.overlaps(span));
                        prop_assert_eq!(tree.overlaps(&levels, addr, level), taken);
                        prop_assert_eq!(tree.insert(&levels, addr, level, span).is_err(), taken);
                        if !taken {
                            list.push(span);
                        }
                    }
                    3 => {
                        let at = list.iter().position(|s| s.contains(addr));
                        prop_assert_eq!(tree.remove(&levels, addr), at.map(|i| list.swap_remove(i)));
                    }
                    _ => {
                        let span = Span::new(base.saturating_sub(7) + a % size, base + b % (size + 9));
                        let mut want = list.clone();
                        want.retain(|s| s.intersect(span).is_some());
                        want.sort();
                        prop_assert_eq!(collect(&tree, &levels, base, span), want);
                    }
                }
                prop_assert_eq!(tree.find(&levels, addr), list.iter().find(|s| s.contains(addr)));
                prop_assert_eq!(tree.validate(&levels, base, &|s| *s), Ok(list.len()));
                prop_assert_eq!(tree.is_empty(), list.is_empty());
            }
        }
    }

    #[test]
    fn nodes_come_and_go_with_their_items() {
        let levels = Levels::new(512 << 20, &Chunks::new(&[SZ_2M, SZ_64K, SZ_4K]).unwrap());
        let leaf = levels.of_size(SZ_4K).unwrap();
        let mut tree = ChunkTree::new();
        assert!(tree.insert(&levels, 0, leaf, Span::sized(0, SZ_4K)).is_ok());
        assert!(tree.insert(&levels, SZ_4K, leaf, Span::sized(SZ_4K, SZ_4K)).is_ok());
        assert_eq!(tree.nodes(), 3);
        tree.remove(&levels, 0);
        assert_eq!(tree.nodes(), 3);
        tree.remove(&levels, SZ_4K);
        assert_eq!(tree.nodes(), 0);
    }

    #[test]
    fn validate_sees_a_misplaced_item() {
        let levels = Levels::new(512 << 20, &Chunks::new(&[SZ_2M, SZ_64K, SZ_4K]).unwrap());
        let mut tree = ChunkTree::new();
        let leaf = levels.of_size(SZ_4K).unwrap();
        assert!(tree.insert(&levels, SZ_4K, leaf, Span::sized(0, SZ_4K)).is_ok());
        assert!(tree.validate(&levels, 0, &|s| *s).is_err());
    }
}
