//! Where each page of a range lives, and the moves between the places.
//!
//! # Overview
//! Every page of a range has exactly one place that holds its *truth*:
//!
//! | truth | the CPU | the device | recorded in |
//! |---|---|---|---|
//! | application | reads and writes it | reaches it over the link, or has a read-only copy (`shared`) | neither mask |
//! | shadow | waits: the page is not at its address | nothing | `strayed` |
//! | device memory | waits | reads and writes it | `vram` |
//!
//! *Strayed* pages are a step on the way, kept as a state of its own: the kernel may stop a flip anywhere (an unread
//! event, a pinned page), and whoever comes next, a CPU fault or a device access, goes on from the masks. Nothing is
//! ever undone by guessing.
//!
//! Going to the device: flip out (truth: shadow), copy, then the truth is device memory. Coming back: copy into the
//! range's own retained pages (truth: shadow), flip in. A retained page the device never wrote (`fresh`) needs no copy.
//! Only a part may come back: then only that part is copied when the device wants the range again.
//!
//! ```text
//!              flip out              upload
//!  application ---------> shadow ------------> device memory
//!       ^                  |  ^                     |
//!       +------------------+  +---------------------+
//!              flip in            download, or nothing when fresh
//! ```
//!
//! A *shared* range keeps its truth with the application: writes are tracked first and the copy is made afterwards, so
//! that no store can fall between; the device maps the copy read-only inside brackets, and each bracket first copies
//! the pages written since.
//!
//! # Locking
//! All of this is under the range's state lock. Other ranges are only ever tried, never waited for.
//!
//! # Limits
//! A range that came back by a flip is not write-tracked: UFFDIO_MOVE maps pages writable at once, and a store between
//! that instant and the tracking could not be seen. What is kept instead is exact: the parts that did not come back.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use crate::ground::addr::{PageMask, SZ_4K, Span};
use crate::space::ports::{Advice, Bo, History, Shadow};
use crate::space::span_map::SpanMap;
use crate::space::timeslice::Timeslice;

/// A range's payload: its residency and its pins.
#[derive(Debug, Default)]
pub struct Residency {
    state: Mutex<State>,
    pins: AtomicU32,
    /// How many of the pins are of work on devices that cannot fault.
    firm: AtomicU32,
    /// Whether devices lost all of it, page by page, while such work had it.
    emptied: AtomicBool,
    /// Whether a device may have a copy of it for reading: a hint, for who does not want to lock the state.
    copied: AtomicBool,
}

impl Residency {
    /// Locks the state. A panic of a holder is a bug of usvm; the masks are consistent between any two statements that
    /// can panic, so the state is taken over.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Locks the state if nobody holds it.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, State>> {
        match self.state.try_lock() {
            Ok(guard) => Some(guard),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        }
    }

    /// Keeps the range where it is until [`Residency::unpin`]. Called with the state locked.
    pub fn pin(&self) {
        self.pins.fetch_add(1, Ordering::AcqRel);
    }

    /// Ends one [`Residency::pin`]; `true` when it was the last.
    pub fn unpin(&self) -> bool {
        let before = self.pins.fetch_sub(1, Ordering::AcqRel);
        debug_assert!(before > 0, "unpinned more often than pinned");
        before == 1
    }

    /// As [`Residency::pin`], by work on a device that cannot fault. Called with invalidations kept out, too.
    pub fn pin_firmly(&self) {
        self.pin();
        self.firm.fetch_add(1, Ordering::AcqRel);
    }

    /// As [`Residency::pin_firmly`], with nothing kept out: only where such work holds it already, and so without a moment in
    /// which none does. `false` where none does.
    pub fn pin_firmly_too(&self) -> bool {
        let held = |count: u32| (count > 0).then(|| count + 1);
        let done = self.firm.fetch_update(Ordering::AcqRel, Ordering::Acquire, held).is_ok();
        if done {
            self.pin();
        }
        done
    }

    /// The first half of the end of a [`Residency::pin_firmly`], before [`Residency::unpin`]; `true` when it was the last.
    pub fn loosen(&self) -> bool {
        let before = self.firm.fetch_sub(1, Ordering::AcqRel);
        debug_assert!(before > 0, "loosened more often than pinned");
        before == 1
    }

    /// Whether work holds some of it on a device that cannot fault.
    pub fn is_held_firmly(&self) -> bool {
        self.firm.load(Ordering::Acquire) > 0 && !self.emptied.load(Ordering::Acquire)
    }

    /// Devices have lost all of it: nothing is left for whoever holds it. Or one has mapped it anew.
    pub fn set_emptied(&self, emptied: bool) {
        if self.emptied.load(Ordering::Relaxed) != emptied {
            self.emptied.store(emptied, Ordering::Release);
        }
    }

    /// How often it is pinned.
    pub fn pins(&self) -> u32 {
        self.pins.load(Ordering::Acquire)
    }

    /// A device gets a copy of it for reading.
    pub fn note_copy(&self) {
        self.copied.store(true, Ordering::Release);
    }

    /// Whether a device may have such a copy. Who asks looks at the state next; asked again it says no.
    pub fn take_copied(&self) -> bool {
        self.copied.load(Ordering::Acquire) && self.copied.swap(false, Ordering::AcqRel)
    }

    /// Whether running work uses the range where it is.
    pub fn is_pinned(&self) -> bool {
        self.pins.load(Ordering::Acquire) > 0
    }
}

/// What a range that never moved does not carry.
#[derive(Debug, Default)]
pub struct State {
    /// Devices that may map the range now, one bit each.
    pub bound: u32,
    /// Pages that were taken from these devices, where the rest was left to work that holds it.
    pub cut: Option<Box<PageMask>>,
    /// Some who pinned it hold a part and left the range at home for the program's use of the rest. Of past pins until the next.
    pub left: bool,
    /// Residency, once the range moved.
    pub moved: Option<Box<Moved>>,
}

impl State {
    /// Whether all truth is with the application.
    pub fn is_home(&self) -> bool {
        self.moved.as_ref().is_none_or(|m| m.vram.is_empty() && m.strayed.is_empty())
    }
}

/// Where the pages of a range are.
#[derive(Debug, Default)]
pub struct Moved {
    /// The device that `bo` belongs to.
    pub device: u32,
    /// Device memory for the whole range.
    pub bo: Option<Bo>,
    /// The place that pages are flipped to.
    pub shadow: Option<Shadow>,
    /// Pages whose truth is in device memory.
    pub vram: PageMask,
    /// Pages whose truth is in the shadow.
    pub strayed: PageMask,
    /// Pages present in the shadow, whatever they hold.
    pub retained: PageMask,
    /// Retained pages equal to device memory.
    pub fresh: PageMask,
    /// Pages unmapped by the program: nobody's.
    pub dead: PageMask,
    /// Dead pages that mremap took elsewhere and that have not landed there yet. Their truth is in the shadow.
    pub leaving: PageMask,
    /// `bo` is a read-only copy and writes are tracked.
    pub shared: bool,
    /// That copy has pages whose contents were dropped, unmapped or moved: it is good for the work that holds the rest.
    pub outdated: bool,
    /// What policies decide by.
    pub history: History,
    /// How long it is to stay there.
    pub slice: Timeslice,
    /// When it last arrived on the device.
    pub arrived: Option<Instant>,
    /// When it last came back.
    pub returned: Option<Instant>,
    /// When it last had to leave for others.
    pub evicted: Option<Instant>,
    /// Whether it is among those that stay at home for a while because of that.
    pub waits: bool,
}

impl Moved {
    /// Pages of `span` that still belong to the program.
    pub fn alive(&self, span: Span) -> PageMask {
        PageMask::first(span.pages()).minus(&self.dead)
    }

    /// Forgets `pages` (unmapped, or their contents dropped): their truth is nowhere, or with the application again.
    /// Gives the shadow pages that must be released before anything is flipped there again.
    #[must_use]
    pub fn forget(&mut self, pages: &PageMask) -> PageMask {
        let pages = pages.minus(&self.leaving);
        let stale = self.retained.and(&pages);
        for mask in [&mut self.vram, &mut self.strayed, &mut self.fresh, &mut self.retained] {
            *mask = mask.minus(&pages);
        }
        stale
    }

    /// mremap took `pages` elsewhere: of those in the shadow the truth goes with them, the others are nobody's here.
    pub fn leave(&mut self, pages: &PageMask) {
        let held = self.strayed.or(&self.fresh).and(pages);
        self.leaving = self.leaving.or(&held);
        self.dead = self.dead.or(pages);
        for mask in [&mut self.vram, &mut self.strayed, &mut self.fresh] {
            *mask = mask.minus(pages);
        }
    }

    /// `pages` of the shadow arrived at the application's address.
    pub fn landed(&mut self, pages: &PageMask) {
        for mask in [&mut self.strayed, &mut self.fresh, &mut self.retained, &mut self.leaving] {
            *mask = mask.minus(pages);
        }
    }

    /// Bytes right before `addr` whose truth is with the application while the rest of the range is away.
    pub fn home_before(&self, span: Span, addr: u64) -> u64 {
        let away = self.vram.or(&self.strayed);
        let page = span.page_index(addr);
        (0..page).rev().take_while(|p| !away.get(*p)).count() as u64 * SZ_4K
    }

    /// Checks what must hold between any two steps.
    pub fn check(&self, span: Span) {
        let all = PageMask::first(span.pages());
        debug_assert!(self.vram.and(&self.strayed).is_empty(), "a page has one truth");
        debug_assert!(self.strayed.minus(&self.retained).is_empty(), "strayed pages are in the shadow");
        debug_assert!(self.fresh.minus(&self.retained).is_empty(), "fresh pages are in the shadow");
        debug_assert!(self.fresh.and(&self.strayed).is_empty(), "fresh pages equal device memory");
        debug_assert!(
            self.leaving.minus(&self.retained.and(&self.dead)).is_empty(),
            "what leaves is in the shadow"
        );
        debug_assert!(self.vram.and(&self.dead).is_empty(), "dead pages have no truth");
        debug_assert!(self.vram.minus(&all).is_empty() && self.retained.minus(&all).is_empty());
        debug_assert!(self.vram.is_empty() || self.bo.is_some(), "truth in device memory has device memory");
        debug_assert!(self.retained.is_empty() || self.shadow.is_some(), "retained pages have a shadow");
        debug_assert!(!self.outdated || self.shared, "only a copy can be out of date");
        debug_assert!(
            !self.shared || (self.vram.is_empty() && self.bo.is_some()),
            "a shared range is at home"
        );
    }
}

/// How much of a span is where, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Residence {
    /// In device memory only.
    pub device: u64,
    /// With the application, and a read-only copy on a device.
    pub shared: u64,
    /// On its way: in the shadow area.
    pub strayed: u64,
    /// Host pages kept for memory that is in device memory.
    pub retained: u64,
    /// Device memory that a return to the host has to copy: no kept host page equals it.
    pub dirty: u64,
}

/// Bytes that `pages` are.
pub fn bytes(pages: &PageMask) -> u64 {
    pages.count() as u64 * SZ_4K
}

/// What advice applies to addresses; kept apart from ranges, so that it outlives them.
pub type Advices = SpanMap<Advice>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgetting_and_landing_keep_the_invariants() {
        let span = Span::sized(0x20_0000, 16 * SZ_4K);
        let mut m = Moved {
            bo: Some(Bo { offset: 0, len: span.len() }),
            shadow: Some(Shadow { span: Span::sized(0x100_0000, span.len()) }),
            vram: PageMask::first(8),
            ..Moved::default()
        };
        m.strayed.set_run(8, 4);
        m.retained.set_run(4, 8);
        m.fresh.set_run(4, 2);
        m.check(span);
        let mut gone = PageMask::EMPTY;
        gone.set_run(5, 4);
        let stale = m.forget(&gone);
        m.check(span);
        assert_eq!(stale.runs().collect::<Vec<_>>(), [(5, 4)]);
        assert_eq!(m.vram.count(), 5);
        let strayed = m.strayed;
        m.landed(&strayed);
        m.check(span);
        assert!(m.strayed.is_empty() && m.retained.runs().eq([(4, 1)]));
    }
}
