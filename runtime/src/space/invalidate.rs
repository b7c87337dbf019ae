//! Invalidation and the garbage collector.
//!
//! # Overview
//! The host floor reports each change of the process's mappings as an [`Event`]; [`Space::invalidate`] is the notifier
//! callback of drm_gpusvm's third example. Under the write lock of every notifier that the event meets it draws a new
//! sequence number and, for each range the event overlaps: forgets the range's pages, hands it to the caller (who takes
//! down device mappings) and, if memory was unmapped, flags it UNMAPPED and puts it on the garbage list, once.
//!
//! [`Space::collect_garbage`] is the second example: it takes each range off the list, lets the caller bring the
//! remaining pages of a partly unmapped one home and unbind it, and removes it. It must run before a device access is
//! served, or the access finds the old range; a second collector waits until the ranges of the first are removed, so
//! that both can go on to find_or_insert. Ranges that the caller wants kept for a while are set aside until it says that they
//! may go.
//!
//! # Locking
//! The callback of `invalidate` runs with the space's update lock held for read and the notifier's for write: it may
//! look at the range, lock what belongs to it and call the device, but nothing of the space. The callback of
//! `collect_garbage` runs with no lock held; whoever calls `collect_garbage` must hold none.
//!
//! # Limits
//! In the kernel the mapping changes between the notifier's start and end calls. User space hears of munmap, mremap and
//! the like when the change is done and before the call returns, so one call here stands for both.

use super::notifier::RangeFlags;
use super::range::Range;
use super::{Space, lock};
use crate::ground::addr::Span;
use crate::ground::error::Result;
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex};

/// What happened to a mapping (enum mmu_notifier_event).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// Addresses are gone or replaced: munmap, mremap's old place, mmap over something.
    Unmap,
    /// Pages changed under the same mapping: madvise, reclaim, copy-on-write, a mapping split.
    Clear,
    /// mprotect.
    ProtVma,
    /// Pages became read-only: fork.
    ProtPage,
    /// Writes are tracked anew: clear_refs.
    SoftDirty,
    /// The address space goes away: exit, exec.
    Release,
    /// Pages move to or from device memory.
    Migrate,
    /// The device asks for pages of its own, for atomics.
    Exclusive,
}

/// One change of the process's mappings (struct mmu_notifier_range).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// Where.
    pub span: Span,
}

impl Event {
    /// An event.
    pub const fn new(kind: EventKind, span: Span) -> Self {
        Self { kind, span }
    }
}

/// What an event did to one range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InvalidateInfo {
    /// The event.
    pub event: Event,
    /// The part of the range it meets. Never empty.
    pub hit: Span,
    /// The range's flags before: whether pages were got, and device pages among them.
    pub before: RangeFlags,
    /// The range's flags now.
    pub after: RangeFlags,
}

impl InvalidateInfo {
    /// Whether the range was put on the garbage list by this event.
    pub fn queued(&self) -> bool {
        self.after.difference(self.before).contains(RangeFlags::QUEUED)
    }
}

/// What an unmap of `hole` makes of a range at `range` (drm_gpusvm_range_set_unmapped).
fn unmap_flags(range: Span, hole: Span) -> RangeFlags {
    let mut set = RangeFlags::UNMAPPED | RangeFlags::QUEUED;
    set.set(RangeFlags::PARTIAL_UNMAP, !hole.covers(range));
    set
}

impl<R> Space<R> {
    /// Takes note that the process's mappings changed. When it returns no commit made from the mappings of before
    /// stands or can still happen. `f` sees each range that the event overlaps, in ascending order, its pages
    /// forgotten already. Gives the number of those ranges.
    ///
    /// Mirrors drm_gpusvm_notifier_invalidate with the callback of drm_gpusvm's example 3. Safe from any thread; see
    /// the chapter Locking of this module for what `f` may do.
    pub fn invalidate(&self, event: Event, mut f: impl FnMut(&Arc<Range<R>>, InvalidateInfo)) -> usize {
        if event.span.is_empty() {
            return 0;
        }
        let windows = self.windows();
        // Before the windows, so that one made from a mapping of before this event sees that it came too late.
        self.clock.tick();
        let mut ranges = 0;
        for (start, window) in self.windows_in(&windows, event.span) {
            let invalidation = window.notifier.invalidate(&self.clock);
            let _ = window.tree.visit(&self.levels, start, event.span, &mut |range| {
                let set = match event.kind {
                    EventKind::Unmap => unmap_flags(range.span(), event.span),
                    _ => RangeFlags::empty(),
                };
                let before = range.state.hit(&invalidation, set);
                let after = before.difference(RangeFlags::PAGES) | set;
                let hit = range.span().intersect(event.span).unwrap_or(range.span());
                let info = InvalidateInfo { event, hit, before, after };
                if info.queued() {
                    self.garbage.push(range.clone());
                }
                ranges += 1;
                f(range, info);
                ControlFlow::<()>::Continue(())
            });
        }
        ranges
    }

    /// Removes every range on the garbage list, those included that are added meanwhile. `f` first gets each of them,
    /// to bring home what a [`RangeFlags::PARTIAL_UNMAP`] left mapped and to unbind it. Ranges that were removed
    /// otherwise are skipped. Gives the number of ranges removed here; when it returns all that were on the list when
    /// it was called are out of the space, whoever collected them.
    ///
    /// Mirrors the garbage collector of drm_gpusvm's example 2. `f` runs with no lock held and may call the space,
    /// except `collect_garbage`.
    ///
    /// # Errors
    /// The first that `f` gives. Its range stays in the space and on the list, for the next call.
    pub fn collect_garbage(&self, f: impl FnMut(&Arc<Range<R>>) -> Result<()>) -> Result<usize> {
        self.collect_garbage_but(|_| false, f)
    }

    /// As [`Space::collect_garbage`], but sets aside what is `kept`: not removed, not counted as waiting and not looked at
    /// again until [`Space::no_longer_kept`]. `kept` runs with the list locked. A range that was unmapped never becomes kept again.
    pub fn collect_garbage_but(
        &self,
        kept: impl Fn(&Range<R>) -> bool,
        mut f: impl FnMut(&Arc<Range<R>>) -> Result<()>,
    ) -> Result<usize> {
        let mut removed = 0;
        while let Some(mut item) = self.garbage.take(&kept) {
            let Some(range) = &item.range else { break };
            if !range.flags().contains(RangeFlags::REMOVED) {
                f(range)?;
                removed += usize::from(self.remove(range));
            }
            item.range = None;
        }
        Ok(removed)
    }

    /// Nothing that [`Space::collect_garbage_but`] asks about keeps `range` any more: if it was set aside it is collected.
    pub fn no_longer_kept(&self, range: &Arc<Range<R>>) {
        self.garbage.put_back(range);
    }

    /// Ranges that wait for the garbage collector, or are in its hands.
    pub fn garbage_len(&self) -> usize {
        self.garbage.pending.load(Ordering::Acquire)
    }
}

/// The garbage list.
#[derive(Debug)]
pub(super) struct Garbage<R> {
    /// Ranges on the list or in a collector's hands, so that the usual "nothing" takes no lock.
    pending: AtomicUsize,
    /// Ranges set aside, for the same reason.
    aside: AtomicUsize,
    list: Mutex<Waiting<R>>,
    /// Signalled when a collector lets go of a range.
    settled: Condvar,
}

#[derive(Debug)]
struct Waiting<R> {
    ranges: VecDeque<Arc<Range<R>>>,
    /// Ranges that are kept for a while.
    aside: Vec<Arc<Range<R>>>,
    /// Ranges in collectors' hands.
    taken: usize,
}

/// A range in a collector's hands. If it is still in here when dropped, it goes back to the head of the list.
struct Taken<'a, R> {
    garbage: &'a Garbage<R>,
    range: Option<Arc<Range<R>>>,
}

impl<R> Garbage<R> {
    pub fn new() -> Self {
        let list = Mutex::new(Waiting { ranges: VecDeque::new(), aside: Vec::new(), taken: 0 });
        Self { pending: AtomicUsize::new(0), aside: AtomicUsize::new(0), list, settled: Condvar::new() }
    }

    fn push(&self, range: Arc<Range<R>>) {
        self.pending.fetch_add(1, Ordering::AcqRel);
        lock(&self.list).ranges.push_back(range);
    }

    /// The head of the list. When all are in other hands, waits until they are settled; `None` when none is left.
    fn take(&self, kept: &impl Fn(&Range<R>) -> bool) -> Option<Taken<'_, R>> {
        if self.pending.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut list = lock(&self.list);
        loop {
            if let Some(range) = list.ranges.pop_front() {
                if self.is_kept(&range, kept) {
                    list.aside.push(range);
                    self.pending.fetch_sub(1, Ordering::AcqRel);
                    continue;
                }
                list.taken += 1;
                return Some(Taken { garbage: self, range: Some(range) });
            }
            if list.taken == 0 {
                return None;
            }
            list = self.settled.wait(list).unwrap_or_else(|poison| poison.into_inner());
        }
    }

    /// Whether the range is to be set aside. Who ends what keeps it looks at `aside` afterwards: one of the two sees the other.
    fn is_kept(&self, range: &Range<R>, kept: &impl Fn(&Range<R>) -> bool) -> bool {
        self.aside.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let is_kept = kept(range);
        if !is_kept {
            self.aside.fetch_sub(1, Ordering::SeqCst);
        }
        is_kept
    }

    fn put_back(&self, range: &Arc<Range<R>>) {
        fence(Ordering::SeqCst);
        if self.aside.load(Ordering::SeqCst) == 0 {
            return;
        }
        let mut list = lock(&self.list);
        if let Some(at) = list.aside.iter().position(|other| Arc::ptr_eq(other, range)) {
            let range = list.aside.swap_remove(at);
            list.ranges.push_back(range);
            self.pending.fetch_add(1, Ordering::AcqRel);
            self.aside.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Drops the list.
    pub fn clear(&self) {
        let mut list = lock(&self.list);
        self.aside.fetch_sub(list.aside.len(), Ordering::SeqCst);
        let (ranges, aside) = (std::mem::take(&mut list.ranges), std::mem::take(&mut list.aside));
        drop(list);
        drop(aside);
        self.pending.fetch_sub(ranges.len(), Ordering::AcqRel);
    }
}

impl<R> Drop for Taken<'_, R> {
    fn drop(&mut self) {
        let mut list = lock(&self.garbage.list);
        list.taken -= 1;
        match self.range.take() {
            Some(range) => list.ranges.push_front(range),
            None => {
                self.garbage.pending.fetch_sub(1, Ordering::AcqRel);
            }
        }
        drop(list);
        self.garbage.settled.notify_all();
    }
}
