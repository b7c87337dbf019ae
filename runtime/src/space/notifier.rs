//! Notifiers, and the protocol by which nothing old is ever committed.
//!
//! # Overview
//! A [`Notifier`] is an aligned window of the address space with the sequence number of an mmu interval notifier. A
//! thread that prepares something out of the process's mappings (collects pages, fills a copy) does so without a lock
//! and then commits it only if no invalidation came between:
//!
//! ```text
//! preparing                                   invalidating
//! ticket = read_begin()                       lock for write
//!   (waits while an invalidation runs)        sequence = a new number, odd: "running"
//! look at the mappings, prepare               every range that is hit: flags, stamp = that number
//! commit(ticket): lock for read               sequence = the number, even
//!   stamp <= ticket? publish : start over     unlock
//! ```
//!
//! The kernel compares the notifier's sequence number, which changes with every invalidation in 512 MiB, and then asks
//! each range whether its pages still hold (drm_gpusvm_range_pages_valid). Here each range also keeps the number of
//! the last invalidation that hit it, its *stamp*, so `RangeState::commit` answers exactly at once and an
//! invalidation elsewhere in the window costs a preparing thread nothing. [`Notifier::read_retry`] is the coarse
//! question, for what is not tied to one range.
//!
//! Numbers are drawn from one clock of the space and only grow, so a ticket of a notifier that was removed and made
//! again cannot pass by accident.
//!
//! # Locking
//! Lock order: space update lock, then a notifier's lock, then whatever the upper floors lock. While a [`Commit`] or an
//! `Invalidation` is held, nothing of the space may be called and [`Notifier::read_begin`] of the same notifier
//! neither.

use super::primitive::{AtomicU64, Ordering, RwLock, RwLockReadGuard, RwLockWriteGuard};
use crate::ground::addr::Span;
use std::fmt;

/// A sequence number taken before looking at the process's mappings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub(super) u64);

/// The space's clock: draws the numbers of invalidations.
#[derive(Debug)]
pub(super) struct Clock(AtomicU64);

impl Clock {
    /// Starts above zero, so that a stamp of zero means "never hit".
    pub fn new() -> Self {
        Self(AtomicU64::new(2))
    }

    /// The last number drawn. Even.
    #[inline]
    pub fn now(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// The next number. Even, above all drawn before.
    pub fn tick(&self) -> u64 {
        self.0.fetch_add(2, Ordering::AcqRel) + 2
    }
}

/// An aligned window of the space that is invalidated as one (struct drm_gpusvm_notifier with its
/// mmu_interval_notifier).
pub struct Notifier {
    span: Span,
    /// The number of the last invalidation; one more while it runs.
    seq: AtomicU64,
    lock: RwLock<()>,
}

impl Notifier {
    pub(super) fn new(span: Span, seq: u64) -> Self {
        Self { span, seq: AtomicU64::new(seq), lock: RwLock::new(()) }
    }

    /// The window.
    pub fn span(&self) -> Span {
        self.span
    }

    /// The number of the last invalidation that met this window.
    pub(super) fn seq(&self) -> u64 {
        self.seq.load(Ordering::Acquire)
    }

    /// mmu_interval_read_begin: a ticket for what is looked at from now on. Waits while an invalidation runs.
    pub fn read_begin(&self) -> Ticket {
        loop {
            let seq = self.seq();
            if seq & 1 == 0 {
                return Ticket(seq);
            }
            drop(self.lock());
        }
    }

    /// mmu_interval_read_retry: whether any invalidation met this window since `ticket` was taken. The answer lasts as
    /// long as the lock is held.
    pub fn read_retry(&self, ticket: Ticket) -> bool {
        self.seq() != ticket.0
    }

    /// drm_gpusvm_notifier_lock: keeps invalidations out. Many may hold it.
    pub fn lock(&self) -> NotifierGuard<'_> {
        NotifierGuard { _guard: self.lock.read().unwrap_or_else(|poison| poison.into_inner()) }
    }

    /// Keeps commits and invalidations out.
    pub(super) fn lock_exclusive(&self) -> RwLockWriteGuard<'_, ()> {
        self.lock.write().unwrap_or_else(|poison| poison.into_inner())
    }

    /// Begins an invalidation: waits for commits to end, then draws a number that fails every ticket out there.
    pub(super) fn invalidate(&self, clock: &Clock) -> Invalidation<'_> {
        let guard = self.lock_exclusive();
        let stamp = clock.tick();
        self.seq.store(stamp | 1, Ordering::Release);
        Invalidation { notifier: self, stamp, _guard: guard }
    }
}

impl fmt::Debug for Notifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notifier").field("span", &self.span).field("seq", &self.seq()).finish()
    }
}

/// Keeps invalidations of one notifier out.
pub struct NotifierGuard<'a> {
    _guard: RwLockReadGuard<'a, ()>,
}

impl fmt::Debug for NotifierGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NotifierGuard")
    }
}

/// A running invalidation: the notifier's lock held for write. Ends when dropped.
pub(super) struct Invalidation<'a> {
    notifier: &'a Notifier,
    stamp: u64,
    _guard: RwLockWriteGuard<'a, ()>,
}

impl Invalidation<'_> {
    /// This invalidation's number.
    pub fn stamp(&self) -> u64 {
        self.stamp
    }
}

impl Drop for Invalidation<'_> {
    fn drop(&mut self) {
        self.notifier.seq.store(self.stamp, Ordering::Release);
    }
}

bitflags::bitflags! {
    /// What is known of a range (drm_gpusvm_range_flags, and five of usvm's own).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct RangeFlags: u16 {
        /// Its mapping may migrate to device memory, and the caller who made the range had some.
        const MIGRATE_DEVMEM = 1 << 0;
        /// Some of it was unmapped; it waits for the garbage collector.
        const UNMAPPED = 1 << 1;
        /// An unmap left some of it mapped, which the garbage collector must bring home.
        const PARTIAL_UNMAP = 1 << 2;
        /// Its pages were got, and some are device memory.
        const HAS_DEVMEM_PAGES = 1 << 3;
        /// Its pages were got and no invalidation met it since.
        const HAS_DMA_MAPPING = 1 << 4;
        /// Its pages were got for writing (usvm's own).
        const WRITABLE = 1 << 5;
        /// Its pages are partly system and partly device memory (usvm's own).
        const MIXED = 1 << 6;
        /// It is on the garbage list (usvm's own).
        const QUEUED = 1 << 7;
        /// It is no longer in the space (usvm's own).
        const REMOVED = 1 << 8;

        /// All that getting pages sets and losing them clears.
        const PAGES = 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6;
    }
}

/// Why a commit was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stale {
    /// An invalidation hit the range since the ticket was taken: look again.
    Changed,
    /// The range is unmapped or removed: find it again, after the garbage collector.
    Gone,
}

/// Flags and stamp of a range in one word, so that one load sees both of the same moment.
#[derive(Debug)]
pub(super) struct RangeState(AtomicU64);

const FLAG_BITS: u32 = 16;

fn pack(flags: RangeFlags, stamp: u64) -> u64 {
    stamp << FLAG_BITS | u64::from(flags.bits())
}

fn unpack(word: u64) -> (RangeFlags, u64) {
    (RangeFlags::from_bits_retain(word as u16), word >> FLAG_BITS)
}

impl RangeState {
    pub fn new(flags: RangeFlags) -> Self {
        Self(AtomicU64::new(pack(flags, 0)))
    }

    /// Flags and stamp.
    #[inline]
    pub fn load(&self) -> (RangeFlags, u64) {
        unpack(self.0.load(Ordering::Acquire))
    }

    /// Replaces both and gives what was there before.
    fn update(&self, f: impl Fn(RangeFlags, u64) -> (RangeFlags, u64)) -> (RangeFlags, u64) {
        let mut word = self.0.load(Ordering::Acquire);
        loop {
            let (flags, stamp) = unpack(word);
            let (flags, stamp) = f(flags, stamp);
            match self.0.compare_exchange(word, pack(flags, stamp), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return unpack(word),
                Err(now) => word = now,
            }
        }
    }

    /// An invalidation met the range: its pages are lost, `set` becomes true. Gives the flags of before.
    pub fn hit(&self, invalidation: &Invalidation<'_>, set: RangeFlags) -> RangeFlags {
        self.update(|flags, _| (flags.difference(RangeFlags::PAGES) | set, invalidation.stamp())).0
    }

    /// The pages that `before` tells of were not lost in the invalidation that runs.
    pub fn keep_pages(&self, before: RangeFlags) {
        self.update(|flags, stamp| (flags | before.intersection(RangeFlags::PAGES), stamp));
    }

    /// Forgets the pages (drm_gpusvm_range_unmap_pages); the caller keeps invalidations out.
    pub fn drop_pages(&self) -> RangeFlags {
        self.update(|flags, stamp| (flags.difference(RangeFlags::PAGES), stamp)).0
    }

    /// Marks the range as out of the space; the caller keeps commits out.
    pub fn retire(&self) {
        self.update(|flags, stamp| (flags.difference(RangeFlags::PAGES) | RangeFlags::REMOVED, stamp));
    }

    /// Keeps invalidations out and checks that none hit this range since `ticket`.
    pub fn commit<'a>(&'a self, notifier: &'a Notifier, ticket: Ticket) -> Result<Commit<'a>, Stale> {
        let guard = notifier.lock();
        let (flags, stamp) = self.load();
        if flags.intersects(RangeFlags::UNMAPPED | RangeFlags::REMOVED) {
            return Err(Stale::Gone);
        }
        if stamp > ticket.0 {
            return Err(Stale::Changed);
        }
        Ok(Commit { state: self, ticket, _guard: guard })
    }
}

/// The moment in which what was prepared may be published: no invalidation of the range happened since the ticket, and
/// none can until this is dropped. Keep it short: an munmap of the application may be waiting.
pub struct Commit<'a> {
    state: &'a RangeState,
    ticket: Ticket,
    _guard: NotifierGuard<'a>,
}

impl Commit<'_> {
    /// Records that the range's pages were got: [`RangeFlags::HAS_DMA_MAPPING`], and of `more` those in
    /// [`RangeFlags::PAGES`].
    pub fn set_pages(&self, more: RangeFlags) {
        let set = RangeFlags::HAS_DMA_MAPPING | more.intersection(RangeFlags::PAGES);
        self.state
            .update(|flags, stamp| (flags.difference(RangeFlags::PAGES) | set, stamp.max(self.ticket.0)));
    }
}

impl Commit<'_> {
    /// Records that the range's pages were found valid again.
    pub(super) fn touch(&self) {
        self.state.update(|flags, stamp| (flags, stamp.max(self.ticket.0)));
    }
}

impl fmt::Debug for Commit<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Commit").field("ticket", &self.ticket).finish()
    }
}
