#![allow(unsafe_code)]
//! The shadow area: where pages wait that are not at their application's address.
//!
//! # Overview
//! Arenas are mapped on demand, 64 MiB first and twice as large each time up to a limit, half as large where the kernel
//! says no. Each is cut into 2 MiB blocks, and a block into slots of one size, buddy-style sizes from 4 KiB to 2 MiB.
//! A [`Shadow`] is one slot, owned by one range. Slots of 2 MiB have arenas of their own: only there may the kernel
//! make huge pages, which elsewhere would fill the slots of others.
//!
//! Where UFFDIO_MOVE exists, arenas are registered for write protection only: that makes them a valid destination,
//! while a page missing there is still the kernel's to serve. Without it, slots are filled by mremap and are not
//! registered.
//!
//! Pages that leave a slot go back to the kernel, never to another range: user space cannot see who else still refers
//! to a page that was once at an application address.
//!
//! # Safety
//! Arenas are mapped here and unmapped on drop; slots inside are disjoint; nobody makes Rust references into them but
//! the owner of the slot, while it owns it.
//!
//! # Locking
//! One lock over the books, never held over a system call that drops pages. Not for application threads.
//!
//! # Limits
//! MADV_DONTNEED on registered memory would send an event and wait for its reader, so a slot is unregistered for the
//! moment its pages are dropped. A slot whose pages could not be dropped is set aside and tried again later. Before Linux 6.14 an
//! emptied block keeps its page table, and a huge page that moves in there is split.

use super::exempt;
use super::sys::{self, RegisterMode};
use crate::ground::addr::{SZ_2M, SZ_4K, Span, align_up};
use crate::ground::error::{Errno, Error, Result};
use crate::space::ports::Shadow;
use rustix::fd::BorrowedFd;
use rustix::mm::Advice;
use rustix::process::{Resource, getrlimit};
use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The first arena, and the smallest that is tried before giving up.
const ARENA_FIRST: u64 = 64 << 20;
const ARENA_MIN: u64 = SZ_2M;
/// Discarded slots are emptied when a slot is wanted and they are this many bytes, and in any case when they are this
/// many.
const EMPTIED_TOGETHER: u64 = SZ_2M;
const DISCARDED_MOST: u64 = 32 << 20;
/// Slot sizes: 4 KiB << 0 … 4 KiB << 9.
const CLASSES: usize = 10;

/// How pages come into the shadow area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    /// By UFFDIO_MOVE, into registered arenas.
    ByMove,
    /// By mremap, which replaces the mapping of the slot.
    ByRemap,
}

/// The arenas and who has which slot.
#[derive(Debug)]
pub(super) struct ShadowArea {
    books: Mutex<Books>,
    filled: Filled,
    arena_max: u64,
}

#[derive(Debug, Default)]
struct Books {
    /// For each [`Family`].
    arenas: [Vec<Span>; 2],
    /// For each [`Family`], blocks without a slot in use.
    free: [Vec<u64>; 2],
    /// Blocks cut into slots.
    cut: HashMap<u64, Block>,
    /// For each class, the cut blocks with a free slot.
    partial: [BTreeSet<u64>; CLASSES],
    /// Slots given back that could not be emptied.
    stuck: Vec<Span>,
    /// Slots given back that still have to be emptied, and how many bytes they are.
    discarded: Vec<Span>,
    discarded_bytes: u64,
}

/// Which arenas a slot comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    /// Slots smaller than 2 MiB.
    Small,
    /// Slots of 2 MiB.
    Huge,
}

impl Family {
    fn of(class: usize) -> Self {
        if class == CLASSES - 1 { Family::Huge } else { Family::Small }
    }
}

/// A block cut into slots of one class.
#[derive(Debug)]
struct Block {
    class: usize,
    used: [u64; 8],
    count: usize,
}

impl Block {
    fn new(class: usize) -> Self {
        Self { class, used: [0; 8], count: 0 }
    }

    fn slots(&self) -> usize {
        1 << (CLASSES - 1 - self.class)
    }

    fn take(&mut self) -> usize {
        let slot = (0..self.slots()).find(|s| self.used[s / 64] >> (s % 64) & 1 == 0).expect("a free slot");
        self.used[slot / 64] |= 1 << (slot % 64);
        self.count += 1;
        slot
    }

    fn give(&mut self, slot: usize) {
        assert!(self.used[slot / 64] >> (slot % 64) & 1 == 1, "a slot is given back once");
        self.used[slot / 64] &= !(1 << (slot % 64));
        self.count -= 1;
    }
}

/// The class of slots of `len` bytes.
fn class_of(len: u64) -> Option<usize> {
    (len.is_power_of_two() && (SZ_4K..=SZ_2M).contains(&len)).then(|| (len / SZ_4K).trailing_zeros() as usize)
}

impl Books {
    /// A slot of `class`, if there is a block left.
    fn take(&mut self, class: usize) -> Option<u64> {
        let block = match self.partial[class].first() {
            Some(&block) => block,
            None => {
                let block = self.free[Family::of(class) as usize].pop()?;
                self.cut.insert(block, Block::new(class));
                self.partial[class].insert(block);
                block
            }
        };
        let state = self.cut.get_mut(&block).expect("a partial block is cut");
        let slot = state.take();
        if state.count == state.slots() {
            self.partial[class].remove(&block);
        }
        Some(block + (slot as u64) * (SZ_4K << class))
    }

    fn give(&mut self, span: Span) {
        let block = span.start & !(SZ_2M - 1);
        let state = self.cut.get_mut(&block).expect("a slot's block is cut");
        let class = state.class;
        state.give(((span.start - block) / (SZ_4K << class)) as usize);
        if state.count == 0 {
            self.cut.remove(&block);
            self.partial[class].remove(&block);
            self.free[Family::of(class) as usize].push(block);
        } else {
            self.partial[class].insert(block);
        }
    }
}

impl ShadowArea {
    pub(super) fn new(filled: Filled, arena_max: u64) -> Self {
        let arena_max = align_up(arena_max.max(ARENA_MIN), SZ_2M);
        Self { books: Mutex::default(), filled, arena_max }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of slots that could not be emptied and are out of use for now.
    pub(super) fn stuck_bytes(&self) -> u64 {
        self.books().stuck.iter().map(|s| s.len()).sum()
    }

    /// Bytes of address space in arenas.
    pub(super) fn mapped_bytes(&self) -> u64 {
        self.books().arenas.iter().flatten().map(|a| a.len()).sum()
    }

    /// A slot of `len` bytes (a power of two from 4 KiB to 2 MiB), aligned to its size, without pages.
    pub(super) fn alloc(&self, uffd: BorrowedFd<'_>, len: u64) -> Result<Shadow> {
        let class = class_of(len).ok_or_else(|| Error::Invalid {
            argument: "len",
            reason: format!("a shadow slot is a power of two from 4 KiB to 2 MiB long, not {len} bytes"),
        })?;
        let mut books = self.books();
        if books.discarded_bytes >= EMPTIED_TOGETHER {
            drop(books);
            self.empty_discarded(uffd);
            books = self.books();
        }
        let start = match books.take(class) {
            Some(start) => start,
            None => {
                self.grow(&mut books, Family::of(class), uffd)?;
                books.take(class).expect("a new arena has free blocks")
            }
        };
        Ok(Shadow { span: Span::sized(start, len) })
    }

    /// Takes back a slot and returns its pages to the kernel.
    pub(super) fn free(&self, uffd: BorrowedFd<'_>, shadow: Shadow) {
        self.empty(uffd, shadow.span);
        let stuck = self.books().stuck.pop();
        if let Some(span) = stuck {
            self.empty(uffd, span);
        }
    }

    /// Takes back a slot and returns its pages to the kernel later, together with others: each time costs three system
    /// calls and a flush of every processor's TLB. At the latest [`ShadowArea::empty_discarded`] does it.
    pub(super) fn discard(&self, uffd: BorrowedFd<'_>, shadow: Shadow) {
        if self.filled == Filled::ByRemap {
            return self.free(uffd, shadow);
        }
        let mut books = self.books();
        books.discarded_bytes += shadow.span.len();
        books.discarded.push(shadow.span);
        if books.discarded_bytes >= DISCARDED_MOST {
            drop(books);
            self.empty_discarded(uffd);
        }
    }

    /// Empties the slots that were discarded, neighbours at once.
    pub(super) fn empty_discarded(&self, uffd: BorrowedFd<'_>) {
        let mut slots = {
            let mut books = self.books();
            books.discarded_bytes = 0;
            std::mem::take(&mut books.discarded)
        };
        slots.sort_unstable_by_key(|slot| slot.start);
        for run in slots.chunk_by(|a, b| a.end == b.start) {
            let all = Span::new(run[0].start, run[run.len() - 1].end);
            match self.release(uffd, all) {
                Ok(()) => {
                    let mut books = self.books();
                    run.iter().for_each(|slot| books.give(*slot));
                }
                // One by one, so that only those are set aside that cannot be emptied.
                Err(_) => run.iter().for_each(|slot| self.empty(uffd, *slot)),
            }
        }
    }

    /// Empties a slot that nobody owns and offers it again, or sets it aside.
    fn empty(&self, uffd: BorrowedFd<'_>, span: Span) {
        let emptied = self.release(uffd, span);
        let mut books = self.books();
        match emptied {
            Ok(()) => books.give(span),
            Err(errno) => {
                books.stuck.push(span);
                drop(books);
                tracing::warn!(%errno, slot = %span, "shadow pages cannot be dropped now");
            }
        }
    }

    /// Returns the pages of the slot `span` to the kernel; the slot stays usable, or an error says that it may still
    /// have pages or may not take any.
    pub(super) fn release(&self, uffd: BorrowedFd<'_>, span: Span) -> std::result::Result<(), Errno> {
        match self.filled {
            Filled::ByMove => {
                sys::uffd_unregister(uffd, span)?;
                // SAFETY: the slot belongs to the caller, who gives its pages up.
                let dropped = unsafe { sys::advise(span, Advice::LinuxDontNeed) };
                sys::uffd_register(uffd, span, MODE)?;
                dropped
            }
            Filled::ByRemap => {
                // A mapping that came by mremap may still be registered; replacing it so would send an event.
                sys::uffd_unregister(uffd, span)?;
                // SAFETY: the slot belongs to the caller, who gives its pages up.
                unsafe { sys::map_fresh_at(span) }?;
                prepare(span);
                Ok(())
            }
        }
    }

    /// Registers the slot `span` again, after a [`ShadowArea::release`] that could not.
    pub(super) fn repair(&self, uffd: BorrowedFd<'_>, span: Span) -> std::result::Result<(), Errno> {
        match self.filled {
            Filled::ByMove => sys::uffd_register(uffd, span, MODE),
            Filled::ByRemap => Ok(()),
        }
    }

    fn grow(&self, books: &mut Books, family: Family, uffd: BorrowedFd<'_>) -> Result<()> {
        let arenas = &mut books.arenas[family as usize];
        let doubled = arenas.last().map_or(ARENA_FIRST, |last| last.len().saturating_mul(2));
        let mut len = doubled.min(self.arena_max).min(fair_share());
        let arena = loop {
            match self.map_arena(uffd, len, family) {
                Ok(arena) => break arena,
                Err(Errno(libc::ENOMEM)) if len / 2 >= ARENA_MIN => len = align_up(len / 2, SZ_2M),
                Err(errno) => return Err(out_of_memory(errno)),
            }
        };
        let blocks = arena.len() / SZ_2M;
        books.free[family as usize].extend((0..blocks).rev().map(|i| arena.start + i * SZ_2M));
        books.arenas[family as usize].push(arena);
        Ok(())
    }

    /// Maps and registers `len` bytes on a 2 MiB boundary.
    fn map_arena(&self, uffd: BorrowedFd<'_>, len: u64, family: Family) -> std::result::Result<Span, Errno> {
        let raw = sys::reserve(len + SZ_2M)?;
        let arena = Span::sized(align_up(raw.start, SZ_2M), len);
        for rest in [Span::new(raw.start, arena.start), Span::new(arena.end, raw.end)] {
            if !rest.is_empty() {
                // SAFETY: just reserved, nothing refers into it. What stays mapped is only address space.
                let _ = unsafe { sys::unmap(rest) };
            }
        }
        // Reserved without access and unlocked first: under mlockall(MCL_FUTURE) it would be filled at once.
        let _ = sys::unlock(arena);
        // SAFETY: access is only added.
        let ready = unsafe { sys::protect(arena, true) }.and_then(|()| {
            advise(arena, family);
            match self.filled {
                Filled::ByMove => sys::uffd_register(uffd, arena, MODE),
                Filled::ByRemap => Ok(()),
            }
        });
        if let Err(errno) = ready {
            // SAFETY: as above.
            let _ = unsafe { sys::unmap(arena) };
            return Err(errno);
        }
        exempt::exempt(arena);
        Ok(arena)
    }
}

const MODE: RegisterMode = RegisterMode { missing: false, write_protect: true };

/// Gives a slot's (part of a) new mapping the advice of its arena.
pub(super) fn prepare(span: Span) {
    advise(span, if span.len() == SZ_2M { Family::Huge } else { Family::Small });
}

/// Keeps `span` out of children, and lets it have huge pages or none. Where huge pages are not compiled in, the kernel
/// refuses the advice and makes none.
fn advise(span: Span, family: Family) {
    let pages = match family {
        Family::Huge => Advice::LinuxHugepage,
        Family::Small => Advice::LinuxNoHugepage,
    };
    for advice in [Advice::LinuxDontFork, pages] {
        // SAFETY: neither changes contents in this process.
        if let Err(errno) = unsafe { sys::advise(span, advice) } {
            tracing::debug!(%errno, ?advice, "not taken");
        }
    }
}

/// The most that one arena may take of a limited address space: the program needs the rest.
fn fair_share() -> u64 {
    getrlimit(Resource::As).current.map_or(u64::MAX, |limit| (limit / 32 / SZ_2M * SZ_2M).max(ARENA_MIN))
}

/// Names the limit that was met.
fn out_of_memory(errno: Errno) -> Error {
    let what = "mapping the shadow area";
    if errno != Errno(libc::ENOMEM) {
        return Error::os(what, errno);
    }
    let detail = match getrlimit(Resource::As).current {
        Some(limit) => format!(
            "the address-space limit (RLIMIT_AS) is {limit} bytes; raise it with ulimit -v, or shrink the program"
        ),
        None => {
            "neither memory nor a mapping is left; raise vm.max_map_count, or relax vm.overcommit_memory=2"
                .to_owned()
        }
    };
    Error::OutOfHostMemory { what, detail }
}

impl Drop for ShadowArea {
    fn drop(&mut self) {
        for arena in std::mem::take(&mut self.books().arenas).into_iter().flatten() {
            exempt::unexempt(arena);
            // SAFETY: slots are owned by ranges of the runtime that is going away, and the userfaultfd is closed.
            if let Err(errno) = unsafe { sys::unmap(arena) } {
                tracing::warn!(%errno, %arena, "arena stays mapped");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn slots_are_disjoint_aligned_and_come_back(ops in proptest::collection::vec((0..CLASSES, 0..64usize), 1..300)) {
            let mut books = Books::default();
            let blocks: Vec<u64> = (1..=8).map(|i| i * SZ_2M).collect();
            books.free = [blocks[..6].to_vec(), blocks[6..].to_vec()];
            let mut held: Vec<Span> = Vec::new();
            for (class, pick) in ops {
                if pick < 24 && !held.is_empty() {
                    books.give(held.swap_remove(pick % held.len()));
                    continue;
                }
                let Some(start) = books.take(class) else { continue };
                let span = Span::sized(start, SZ_4K << class);
                prop_assert_eq!(span.start % span.len(), 0);
                prop_assert!(held.iter().all(|h| !h.overlaps(span)), "{span} is given twice");
                held.push(span);
            }
            held.drain(..).for_each(|h| books.give(h));
            books.free.iter_mut().for_each(|f| f.sort_unstable());
            prop_assert_eq!(books.free.concat(), blocks, "small blocks stay small, huge ones huge");
            prop_assert!(books.cut.is_empty() && books.partial.iter().all(BTreeSet::is_empty));
        }
    }

    #[test]
    fn only_powers_of_two_have_a_class() {
        assert_eq!([SZ_4K, 64 << 10, SZ_2M].map(class_of), [Some(0), Some(4), Some(9)]);
        assert_eq!([0, 100, 3 * SZ_4K, 2 * SZ_2M].map(class_of), [None; 4]);
    }
}
