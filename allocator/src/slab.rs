//! Slabs: 64 KiB of user memory cut into equal blocks, and all that is known about them, which lies elsewhere.
//!
//! # Overview
//! The record of a slab is found from a block's address by arithmetic alone: records lie in one table with an entry for
//! each 64 KiB of the first reservation. Free blocks are numbers on a stack outside the slab, so neither taking nor
//! freeing a block reads or writes user memory.
//!
//! # Locking
//! | part of a record | who may use it |
//! |---|---|
//! | `own` | the heap that owns the slab |
//! | `heap`, `links`, `class`, for reading | whoever frees a block of the slab: they stay as they are while it has live blocks |
//! | `remote`, the links, `mail_next` | any thread, as told at [`Slab::hand_over`] |
//!
//! The table can be read up to `TABLE.len`, which grows, and is written after `base` and `records`, and after what it covers
//! was opened. Who frees a block has seen the length that covers it, for it was there before the block was given out.
//!
//! # Limits
//! Where there is no room for records, and beyond the first reservation, small blocks are jemalloc's own. Whether there can be
//! slabs again is tried after [`PAUSE`] blocks.
//!
//! # Safety
//! Records are memory that is zero at first and never unmapped; a record of zeroes means that no slab is there. The
//! stack has `room` entries and is followed by as many links; `room` is at least `capacity`.
#![allow(unsafe_code)]

use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU16, AtomicU32, AtomicUsize, Ordering};

use crate::class::{self, CLASSES, GRANULE};
use crate::large;
use crate::local::Heap;
use crate::post::Freed;
use crate::spans::{self, SPAN};

/// Bytes and alignment of a slab.
pub(crate) const SLAB: usize = 64 << 10;
const SHIFT: u32 = SLAB.trailing_zeros();
/// Entries that a slab's stack has at least, so that most slabs can change their class and keep it.
const LEAST_ROOM: usize = 64;
/// Free blocks that are put on the stack at once when it is empty.
const CARVE: usize = 64;
/// How many slabs are not tried for after one that there could be no record of.
const PAUSE: u32 = 256;
/// Bytes of the heap that the table covers at least.
const COVERED: usize = 64 << 20;
/// The alarm of a slab that needs none.
const NEVER: u16 = u16::MAX;

/// Where a slab is in its heap.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Place {
    /// There is no slab, or it is spare.
    Nowhere = 0,
    /// Its blocks are being given out.
    Current,
    /// It has no free block and is in no list.
    Full,
    /// It has free blocks and is in its class's list.
    Listed,
}

/// What is known about a slab: a cache line for everybody, which changes seldom, and one for the owner.
#[repr(C, align(128))]
pub(crate) struct Slab {
    /// The owner; null if there is no slab here.
    heap: *mut Heap,
    /// For each block that another thread freed, the next one in the list, plus one.
    links: *mut AtomicU16,
    /// The next slab in the owner's mail.
    pub(crate) mail_next: AtomicPtr<Slab>,
    /// Blocks that other threads freed.
    remote: Freed,
    class: u8,
    own: Own,
}

/// The owner's part of a record.
#[repr(C, align(64))]
struct Own {
    /// Free blocks, as granules from `base`.
    stack: *mut u16,
    base: *mut u8,
    /// Entries on the stack.
    count: u16,
    /// The owner looks at the slab when a free makes `count` this.
    alarm: u16,
    /// Blocks that were ever on the stack; the rest of the slab was not used yet.
    carved: u16,
    capacity: u16,
    /// Entries that there is room for on the stack, and in the links behind it.
    room: u16,
    place: Place,
    /// Neighbours in the list of the class.
    next: *mut Slab,
    previous: *mut Slab,
}

const _: () = assert!(size_of::<Slab>() == 128 && std::mem::offset_of!(Slab, own) == 64);

/// Blocks of one slab of another heap, freed and not yet handed over.
#[derive(Clone, Copy)]
pub(crate) struct Chain {
    pub(crate) slab: *mut Slab,
    head: u16,
    tail: u16,
    pub(crate) len: u16,
}

/// Where the records are and what they cover.
#[repr(align(64))]
struct Table {
    base: AtomicUsize,
    len: AtomicUsize,
    records: AtomicPtr<Slab>,
}

static TABLE: Table =
    Table { base: AtomicUsize::new(0), len: AtomicUsize::new(0), records: AtomicPtr::new(ptr::null_mut()) };

struct Nothing(Slab);

// SAFETY: never written, and its pointers lead nowhere.
unsafe impl Sync for Nothing {}

static NOTHING: Nothing = Nothing(Slab {
    heap: ptr::null_mut(),
    links: ptr::null_mut(),
    mail_next: AtomicPtr::new(ptr::null_mut()),
    remote: Freed { head: AtomicU16::new(0) },
    class: 0,
    own: Own {
        stack: ptr::null_mut(),
        base: ptr::null_mut(),
        count: 0,
        alarm: NEVER,
        carved: 0,
        capacity: 0,
        room: 0,
        place: Place::Nowhere,
        next: ptr::null_mut(),
        previous: ptr::null_mut(),
    },
});

/// A slab that has nothing to give; only to be read.
pub(crate) const fn nothing() -> *mut Slab {
    (&raw const NOTHING.0).cast_mut()
}

/// For each class: multiplied with an offset in granules and shifted, the number of the block there.
const RECIPROCAL_SHIFT: u32 = 24;
static RECIPROCALS: [u32; CLASSES] = {
    let mut table = [0; CLASSES];
    let mut number = 0;
    while number < CLASSES {
        table[number] = (1 << RECIPROCAL_SHIFT) / class::granules(number) as u32 + 1;
        number += 1;
    }
    table
};

#[inline]
fn block_number(class: usize, granules: u16) -> u16 {
    ((u64::from(granules) * u64::from(RECIPROCALS[class])) >> RECIPROCAL_SHIFT) as u16
}

/// The record for `block` and the block's offset in granules, if a slab may be there.
#[inline(always)]
pub(crate) fn record_of(block: *const u8) -> Option<(*mut Slab, u16)> {
    // First: the others are there before it.
    let len = TABLE.len.load(Ordering::Acquire);
    let offset = block.addr().wrapping_sub(TABLE.base.load(Ordering::Relaxed));
    if offset >= len {
        return None;
    }
    // SAFETY: the table has a record for each 64 KiB of these addresses.
    let slab = unsafe { TABLE.records.load(Ordering::Relaxed).add(offset >> SHIFT) };
    Some((slab, ((offset % SLAB) / GRANULE) as u16))
}

/// Bytes of the table for so many of the heap's: a page for each span.
const fn table(bytes: usize) -> usize {
    (bytes >> SHIFT) * size_of::<Slab>()
}

const _: () = assert!(table(SPAN) == 4096);

/// Makes the table cover `memory`, and some more. False if it cannot.
#[cold]
fn cover(memory: *const u8) -> bool {
    let Some((base, all)) = spans::first() else { return false };
    let offset = memory.addr().wrapping_sub(base);
    let covered = TABLE.len.load(Ordering::Acquire);
    if offset >= all || offset < covered {
        return offset < all;
    }
    let mut records = TABLE.records.load(Ordering::Acquire);
    if records.is_null() {
        let Some(new) = spans::Apart::new(table(all)) else { return false };
        records = new.at.cast();
        let published =
            TABLE.records.compare_exchange(ptr::null_mut(), records, Ordering::AcqRel, Ordering::Acquire);
        if let Err(theirs) = published {
            new.discard();
            records = theirs;
        }
    }
    let needed = (offset + 1).next_multiple_of(SPAN);
    let ample = needed.max(2 * covered).max(COVERED).min(all);
    for until in [ample, needed] {
        // What is covered is open already, whoever opened it, so everything up to there is open afterwards.
        // SAFETY: inside the table, which is never unmapped.
        if unsafe { spans::open_apart(records.cast::<u8>().add(table(covered)), table(until - covered)) } {
            // Whoever comes first, all write the same.
            TABLE.base.store(base, Ordering::Relaxed);
            TABLE.len.fetch_max(until, Ordering::AcqRel);
            return true;
        }
    }
    false
}

/// A new slab of this class for `heap`, current and with nothing on its stack yet; null when there is no memory.
///
/// # Safety
/// The caller owns `heap`.
pub(crate) unsafe fn make(heap: *mut Heap, arena: large::Arena, class: usize) -> *mut Slab {
    static PAUSED: AtomicU32 = AtomicU32::new(0);
    let paused = PAUSED.load(Ordering::Relaxed);
    if paused > 0 {
        PAUSED.store(paused - 1, Ordering::Relaxed);
        return ptr::null_mut();
    }
    let memory = large::slab(arena);
    if memory.is_null() {
        return memory.cast();
    }
    let Some((slab, _)) = record_of(memory).or_else(|| if cover(memory) { record_of(memory) } else { None })
    else {
        // A thread that is about to end gets memory from elsewhere, which says nothing.
        if spans::owns(memory.addr()) {
            PAUSED.store(PAUSE, Ordering::Relaxed);
        }
        large::free_slab(memory);
        return ptr::null_mut();
    };
    // SAFETY: the memory is new, so its record is nobody else's.
    unsafe {
        (*slab).own.base = memory;
        (*slab).heap = heap;
        if !Slab::reuse(slab, class) {
            (*slab).heap = ptr::null_mut();
            large::free_slab(memory);
            return ptr::null_mut();
        }
    }
    slab
}

impl Chain {
    /// No blocks.
    pub(crate) const NONE: Self = Self { slab: ptr::null_mut(), head: 0, tail: 0, len: 0 };
}

impl Slab {
    /// The heap that owns it; null if there is no slab.
    ///
    /// # Safety
    /// `slab` is a record, of a block that is live or of a place where no slab is.
    #[inline(always)]
    pub(crate) unsafe fn owner(slab: *const Self) -> *mut Heap {
        // SAFETY: the caller's contract.
        unsafe { (*slab).heap }
    }

    /// Bytes of its blocks.
    ///
    /// # Safety
    /// As [`Slab::owner`], and there is a slab.
    #[inline]
    pub(crate) unsafe fn block_size(slab: *const Self) -> usize {
        // SAFETY: the caller's contract.
        class::size(unsafe { (*slab).class } as usize)
    }

    /// The class of its blocks.
    ///
    /// # Safety
    /// As [`Slab::block_size`].
    #[inline]
    pub(crate) unsafe fn class(slab: *const Self) -> usize {
        // SAFETY: the caller's contract.
        unsafe { (*slab).class as usize }
    }

    /// Makes an empty slab one of this class, current, with an empty stack. False when there is no memory for a stack.
    ///
    /// # Safety
    /// The caller owns the slab, which has no live block.
    pub(crate) unsafe fn reuse(slab: *mut Self, class: usize) -> bool {
        let capacity = SLAB / class::size(class);
        // SAFETY: the caller's contract.
        unsafe {
            let s = &mut *slab;
            if usize::from(s.own.room) < capacity {
                let room = capacity.max(LEAST_ROOM);
                let stack = large::bookkeeping(room * 2 * size_of::<u16>()).cast::<u16>();
                if stack.is_null() {
                    return false;
                }
                large::free_bookkeeping(s.own.stack.cast());
                s.own.stack = stack;
                s.own.room = room as u16;
                s.links = stack.add(room).cast();
            }
            s.class = class as u8;
            s.own.capacity = capacity as u16;
            s.own.carved = 0;
            s.own.count = 0;
            s.own.alarm = NEVER;
            s.own.place = Place::Current;
        }
        true
    }

    /// Gives an empty slab back.
    ///
    /// # Safety
    /// The caller owns the slab, which has no live block and is in no list.
    pub(crate) unsafe fn release(slab: *mut Self) {
        // SAFETY: the caller's contract. The record is of zeroes again before anybody can get the memory.
        unsafe {
            let memory = (*slab).own.base;
            large::free_bookkeeping((*slab).own.stack.cast());
            ptr::write_bytes(slab, 0, 1);
            large::free_slab(memory);
        }
    }

    /// A free block; null if none is on the stack.
    ///
    /// # Safety
    /// The caller owns the slab, or it is [`nothing`].
    #[inline(always)]
    pub(crate) unsafe fn pop(slab: *mut Self) -> *mut u8 {
        // SAFETY: the stack has `count` entries; an entry is a block inside the slab.
        unsafe {
            let count = (*slab).own.count;
            if count == 0 {
                return ptr::null_mut();
            }
            (*slab).own.count = count - 1;
            let granules = *(*slab).own.stack.add(count as usize - 1);
            (*slab).own.base.add(granules as usize * GRANULE)
        }
    }

    /// Takes a block back. True if the owner must look at the slab: see [`Slab::calm`].
    ///
    /// # Safety
    /// The caller owns the slab and the block, which begins at `granules`.
    #[inline(always)]
    pub(crate) unsafe fn push(slab: *mut Self, granules: u16) -> bool {
        // SAFETY: there are never more free blocks than entries.
        unsafe {
            let count = (*slab).own.count;
            *(*slab).own.stack.add(count as usize) = granules;
            (*slab).own.count = count + 1;
            count + 1 == (*slab).own.alarm
        }
    }

    /// Puts unused blocks on the stack, the lowest on top. False if all are in use or were.
    ///
    /// # Safety
    /// The caller owns the slab, whose stack is empty.
    pub(crate) unsafe fn carve(slab: *mut Self) -> bool {
        // SAFETY: the caller's contract; no more than `capacity` entries are written.
        unsafe {
            let carved = usize::from((*slab).own.carved);
            let more = (usize::from((*slab).own.capacity) - carved).min(CARVE);
            let step = class::granules((*slab).class as usize);
            for entry in 0..more {
                *(*slab).own.stack.add(entry) = ((carved + more - 1 - entry) * step) as u16;
            }
            (*slab).own.carved = (carved + more) as u16;
            (*slab).own.count = more as u16;
            more > 0
        }
    }

    /// Whether no block is live.
    ///
    /// # Safety
    /// The caller owns the slab.
    pub(crate) unsafe fn is_empty(slab: *const Self) -> bool {
        // SAFETY: the caller's contract.
        unsafe { (*slab).own.count == (*slab).own.carved }
    }

    /// Whether something is on the stack.
    ///
    /// # Safety
    /// The caller owns the slab.
    pub(crate) unsafe fn has_free(slab: *const Self) -> bool {
        // SAFETY: the caller's contract.
        unsafe { (*slab).own.count > 0 }
    }

    /// Where it is.
    ///
    /// # Safety
    /// The caller owns the slab.
    pub(crate) unsafe fn place(slab: *const Self) -> Place {
        // SAFETY: the caller's contract.
        unsafe { (*slab).own.place }
    }

    /// Its neighbours in the list: previous and next.
    ///
    /// # Safety
    /// The caller owns the slab and uses this as the list's.
    pub(crate) unsafe fn neighbours<'a>(slab: *mut Self) -> (&'a mut *mut Self, &'a mut *mut Self) {
        // SAFETY: the caller's contract; the two are different fields.
        unsafe { (&mut (*slab).own.previous, &mut (*slab).own.next) }
    }

    /// Sets the alarm for its place: a full slab wakes its owner with the first free block, a listed one with the last, the
    /// current one never.
    ///
    /// # Safety
    /// The caller owns the slab.
    pub(crate) unsafe fn put(slab: *mut Self, place: Place) {
        // SAFETY: the caller's contract.
        unsafe {
            (*slab).own.place = place;
            (*slab).own.alarm = match place {
                Place::Full => 1,
                Place::Listed => (*slab).own.carved,
                Place::Current | Place::Nowhere => NEVER,
            };
        }
    }

    /// Adds a block to a chain of its slab, or begins one.
    ///
    /// # Safety
    /// The block, which begins at `granules`, is live and the caller's; the chain, if it has a block, is of this slab.
    #[inline]
    pub(crate) unsafe fn chain(slab: *mut Self, granules: u16, chain: Chain) -> Chain {
        // SAFETY: the slab has a live block (this one, until the chain is handed over), so its class and links stay.
        unsafe {
            let number = block_number((*slab).class as usize, granules);
            if chain.len == 0 {
                return Chain { slab, head: number, tail: number, len: 1 };
            }
            (*Self::link(slab, number)).store(chain.head + 1, Ordering::Relaxed);
            Chain { head: number, len: chain.len + 1, ..chain }
        }
    }

    /// Hands a chain over to the slab's owner. True if the slab must go into its owner's mail, by this thread: nobody but it may
    /// do so until the owner has read the mail.
    ///
    /// The slab stays where it is until its owner has taken these blocks: it is the last thing done here.
    ///
    /// # Safety
    /// The chain has a block and is used up.
    pub(crate) unsafe fn hand_over(chain: Chain) -> bool {
        // SAFETY: the slab has live blocks until they are added, so its links stay until then; records stay for ever.
        unsafe { (*chain.slab).remote.add(chain.head, &*Self::link(chain.slab, chain.tail)) }
    }

    #[inline]
    unsafe fn link(slab: *const Self, number: u16) -> *const AtomicU16 {
        // SAFETY: there are as many links as blocks, or more.
        unsafe { (*slab).links.add(number as usize) }
    }

    /// Puts what others freed on the stack.
    ///
    /// # Safety
    /// The caller owns the slab and has taken it out of the mail.
    pub(crate) unsafe fn collect(slab: *mut Self) {
        // SAFETY: the list's blocks are ours now; each is on the stack once.
        unsafe {
            let step = class::granules((*slab).class as usize) as u16;
            let own = &raw mut (*slab).own;
            let link = |number| &*Self::link(slab, number);
            (*slab).remote.take(link, |number| {
                *(*own).stack.add((*own).count as usize) = number * step;
                (*own).count += 1;
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_numbers_are_quotients() {
        for class in 0..CLASSES {
            let granules = class::granules(class);
            for number in 0..SLAB / class::size(class) {
                assert_eq!(usize::from(block_number(class, (number * granules) as u16)), number);
            }
        }
    }
}
