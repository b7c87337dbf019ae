//! Home again, or to where mremap took the pages.
//!
//! # Overview
//! Three ways lead home. A small range that the device wrote is copied from device memory straight into fresh pages
//! (`fill`). Any other first has its shadow made equal to device memory (`fetch`: nothing to do for pages that the device
//! never wrote), and then lands (`land`): flips where the kernel allows, copies where the mapping has become one that
//! nothing can be flipped into, and leaves alone what somebody else has filled.
//!
//! # Limits
//! Where a mapping is no longer what it was, landing ends with [`Error::Again`]: the event that is on its way tells where
//! the pages belong.

use std::sync::Arc;
use std::time::Instant;

use super::{Mover, Range, changed};
use crate::ground::addr::{PageMask, SZ_2M, SZ_4K, SZ_64K, Span};
use crate::ground::error::{Error, Result};
use crate::observe::stats::{Cause, Direction};
use crate::space::ports::{FlipError, Shadow};
use crate::space::residency::{Moved, State, bytes};

/// Pages of a range that a copy into fresh ones brings home sooner than a flip, which has every other processor flush its
/// TLB.
const SMALL: usize = (SZ_64K / SZ_4K) as usize;

impl Mover {
    /// Makes the truth of `pages` the application's again and wakes who waits for them.
    pub fn to_host(
        &self,
        range: &Arc<Range>,
        state: &mut State,
        pages: &PageMask,
        cause: Cause,
    ) -> Result<()> {
        if state.is_home() {
            return Ok(());
        }
        let State { bound, moved: Some(moved), .. } = state else { return Ok(()) };
        self.announce_copies(moved.device, &moved.vram.and(pages).minus(&moved.fresh));
        self.unbind(range, bound);
        let result = self.accounted(range, moved, |m| self.to_host_steps(range, m, pages, cause));
        if moved.vram.is_empty() && !moved.shared {
            self.free_bo(range, moved);
        }
        result
    }

    fn to_host_steps(&self, range: &Arc<Range>, m: &mut Moved, pages: &PageMask, cause: Cause) -> Result<()> {
        let span = range.span();
        let started = Instant::now();
        if let Some(copied) = self.fill(span, m, pages)? {
            self.note_return(m, &copied);
            self.observer.migrated(Direction::ToHost, cause, span, bytes(&copied), 0, m.device, started);
            return Ok(());
        }
        let from_vram = m.vram.and(pages);
        if !from_vram.is_empty() {
            let clean = bytes(&from_vram.and(&m.fresh));
            let copied = self.fetch(span, m, &from_vram)?;
            m.strayed = m.strayed.or(&from_vram.and(&m.fresh));
            m.vram = m.vram.minus(&from_vram);
            m.fresh = m.fresh.minus(&from_vram);
            self.note_return(m, &from_vram);
            self.observer.migrated(Direction::ToHost, cause, span, copied, clean, m.device, started);
        }
        let landing = m.strayed.and(pages);
        self.land(span, span, m, &landing)
    }

    /// Brings a small range home whole by copying from device memory straight into fresh pages, and gives those. `None`
    /// when that is not the way: the range is larger, or only a part comes, or the device wrote nothing and retained pages
    /// can go back as they are, or some page waits in the shadow already, or the device's memory is slow to read.
    ///
    /// An error leaves what did not arrive where it was. Pages that were all zero and never had memory stay holes.
    fn fill(&self, span: Span, m: &mut Moved, pages: &PageMask) -> Result<Option<PageMask>> {
        let whole = m.vram.minus(pages).is_empty() && m.strayed.is_empty() && m.leaving.is_empty();
        let (true, Some(bo)) = (whole && span.pages() <= SMALL, &m.bo) else { return Ok(None) };
        let dev = self.device(m.device);
        let mut coming = m.vram;
        for (first, count) in m.vram.minus(&m.retained).runs() {
            for page in first..first + count {
                if dev.is_zero(bo, page as u64 * SZ_4K, SZ_4K) {
                    coming.clear(page);
                }
            }
        }
        if coming.minus(&m.fresh).is_empty() {
            return Ok(None);
        }
        let Some(from) = dev.lend(bo, bytes(&coming)) else { return Ok(None) };
        if let Err(stop) = self.host.fill_from(span, from, &coming) {
            // Their old pages would be in the way of the next flip.
            let stale = m.forget(&stop.moved);
            if let Some(shadow) = &m.shadow {
                self.host.shadow_release(shadow, &stale);
            }
            return match stop.why {
                FlipError::Again | FlipError::NoMemory => Err(stop.why.to_error(span)),
                _ => Ok(None),
            };
        }
        m.vram = PageMask::EMPTY;
        m.fresh = PageMask::EMPTY;
        m.retained = PageMask::EMPTY;
        if let Some(shadow) = m.shadow.take() {
            self.host.shadow_discard(shadow);
        }
        Ok(Some(coming))
    }

    fn note_return(&self, m: &mut Moved, pages: &PageMask) {
        let now = Instant::now();
        m.returned = Some(now);
        m.slice.leave(self.epoch.elapsed());
        let history = &mut m.history;
        history.to_host += 1;
        if history.to_device > 1 && history.returns_this_visit == 0 {
            history.round_trips += 1;
        }
        history.returns_this_visit += 1;
        if m.vram.is_empty() {
            history.whole_returns += 1;
        } else if history.returns_this_visit == 1 && m.vram.count() > pages.count() {
            history.whole_returns = 0;
        }
    }

    /// Makes the shadow hold the contents of `pages`, whose truth is device memory, and records them as fresh. A page
    /// that has no shadow page and is all zero stays a hole. Gives the bytes copied. An error leaves recorded what came before
    /// it, and nothing else in the shadow.
    fn fetch(&self, span: Span, m: &mut Moved, pages: &PageMask) -> Result<u64> {
        let (Some(bo), Some(shadow)) = (&m.bo, &m.shadow) else { return Ok(0) };
        let dev = self.device(m.device);
        let mut stale = pages.minus(&m.fresh);
        let unbacked = stale.minus(&m.retained);
        for (first, count) in unbacked.runs() {
            for page in first..first + count {
                if dev.is_zero(bo, page as u64 * SZ_4K, SZ_4K) {
                    stale.clear(page);
                }
            }
        }
        let whole = span.len() == SZ_2M && stale.count() == span.pages();
        if whole && m.retained.is_empty() && self.host.shadow_adopt_prepared(shadow) {
            m.retained = PageMask::first(span.pages());
        }
        let touched = stale.minus(&m.retained);
        let (mut fetched, mut stop) = (PageMask::EMPTY, None);
        for (first, count) in stale.runs() {
            if let Err(e) = dev.download(bo, shadow, first as u64 * SZ_4K, count as u64 * SZ_4K) {
                stop = Some(e);
                break;
            }
            fetched.set_run(first, count);
        }
        m.retained = m.retained.or(&fetched);
        m.fresh = m.fresh.or(&fetched);
        if !touched.is_empty() && (span.len() == SZ_2M || stop.is_some()) {
            // The first touch of an empty shadow may have brought a huge page, and a copy that failed some pages. What nobody
            // knows of would refuse the next flip: it is as good for the zero pages, and is given back elsewhere.
            let surplus = self.host.present(shadow.span).minus(&m.retained);
            let zeroes = surplus.and(&unbacked.minus(&stale));
            m.retained = m.retained.or(&zeroes);
            m.fresh = m.fresh.or(&zeroes);
            let useless = surplus.minus(&zeroes);
            if !useless.is_empty() {
                self.host.shadow_release(shadow, &useless);
            }
        }
        stop.map_or(Ok(bytes(&stale)), Err)
    }

    /// Flips strayed `pages` of the range at `span` to `to` (the range's own addresses, or where mremap took them).
    pub(super) fn land(&self, span: Span, to: Span, m: &mut Moved, pages: &PageMask) -> Result<()> {
        debug_assert_eq!(span.len(), to.len());
        let mut left = *pages;
        let mut busy = 0;
        let mut unmapped = false;
        while !left.is_empty() {
            let Some(shadow) = &m.shadow else { return Ok(()) };
            let Err(stop) = self.host.flip_in(to, shadow, &left) else {
                m.landed(&left);
                break;
            };
            m.landed(&stop.moved);
            left = left.minus(&stop.moved);
            let Some((first, _)) = left.runs().next() else { break };
            match stop.why {
                FlipError::Exists => self.skip_page(to, m, &mut left, first),
                FlipError::NoMapping => {
                    // Unmapped, or taken elsewhere by mremap: the event that is on its way tells which.
                    left.clear(first);
                    unmapped = true;
                }
                FlipError::Mismatch => self.land_by_copy(to, m, &mut left)?,
                FlipError::Busy if busy >= 8 => self.land_by_copy(to, m, &mut left)?,
                FlipError::Busy => {
                    busy += 1;
                    std::thread::yield_now();
                }
                why => return Err(why.to_error(to)),
            }
        }
        if unmapped { Err(Error::Again { what: "landing in a changed mapping", tries: 1 }) } else { Ok(()) }
    }

    /// One strayed page has no place to go: somebody else filled it.
    fn skip_page(&self, to: Span, m: &mut Moved, left: &mut PageMask, page: usize) {
        left.clear(page);
        let mut one = PageMask::EMPTY;
        one.set(page);
        m.landed(&one);
        if let Some(shadow) = &m.shadow {
            self.host.shadow_release(shadow, &one);
        }
        self.host.wake(to.page_run(page, 1));
    }

    /// Where a flip cannot go (the mapping became read-only, locked or executable): a copy can.
    fn land_by_copy(&self, to: Span, m: &mut Moved, left: &mut PageMask) -> Result<()> {
        let Some(shadow) = &m.shadow else { return Ok(()) };
        let (done, why) = match self.host.copy_in(to, shadow, left) {
            Ok(()) => (*left, None),
            Err(stop) => (stop.moved, Some(stop.why)),
        };
        self.host.shadow_release(shadow, &done);
        m.landed(&done);
        *left = left.minus(&done);
        match why {
            None => Ok(()),
            Some(FlipError::NoMapping) => Err(changed()),
            Some(FlipError::Exists) => {
                if let Some((first, _)) = left.runs().next() {
                    self.skip_page(to, m, left, first);
                }
                Ok(())
            }
            Some(why) => Err(why.to_error(to)),
        }
    }

    /// mremap took `pages` of the range elsewhere: their contents wait in the shadow for [`Mover::land_elsewhere`]. What else of
    /// it work holds on a device that cannot fault stays as it is.
    pub fn leave(&self, range: &Arc<Range>, state: &mut State, pages: &PageMask) -> Result<()> {
        let rest_stays = self.take_from_devices(range, state, pages);
        let Some(moved) = &mut state.moved else { return Ok(()) };
        let result = self.accounted(range, moved, |m| {
            m.shared &= rest_stays;
            m.outdated = m.shared;
            let from_vram = m.vram.and(pages);
            let result = self.fetch(range.span(), m, &from_vram);
            m.leave(pages);
            result.map(|_| ())
        });
        if moved.vram.is_empty() && !moved.shared {
            self.free_bo(range, moved);
        }
        result
    }

    /// Lands those of `pages` that left the range at `to`, where the range's span would be now. What could not land yet is
    /// still leaving.
    pub fn land_elsewhere(
        &self,
        range: &Arc<Range>,
        state: &mut State,
        pages: &PageMask,
        to: Span,
    ) -> Result<()> {
        let Some(moved) = &mut state.moved else { return Ok(()) };
        let landing = moved.leaving.and(pages);
        self.accounted(range, moved, |m| self.land(range.span(), to, m, &landing))
    }

    /// The place where `pages` of the range were to land is gone.
    pub fn abandon(&self, range: &Arc<Range>, state: &mut State, pages: &PageMask) {
        let Some(moved) = &mut state.moved else { return };
        let gone = moved.leaving.and(pages);
        self.accounted(range, moved, |m| {
            if let Some(shadow) = &m.shadow {
                self.host.shadow_release(shadow, &gone);
            }
            m.landed(&gone);
        });
    }

    /// Makes the shadow hold the contents of all pages whose truth is away, without changing any truth (for a forked
    /// child that gets its own copy). Gives `f` the pages, those that are lost with their device, and the place. Work that
    /// holds the range goes on meanwhile, as other threads do while one forks.
    pub fn snapshot(
        &self,
        range: &Arc<Range>,
        state: &mut State,
        f: impl FnOnce(&PageMask, &PageMask, &Shadow),
    ) -> Result<()> {
        let State { bound, moved: Some(moved), .. } = state else { return Ok(()) };
        let held_by_work = range.data.is_pinned();
        if !held_by_work {
            self.unbind(range, bound);
        }
        self.accounted(range, moved, |m| {
            let from_vram = m.vram;
            let fetched = self.fetch(range.span(), m, &from_vram);
            let held = m.strayed.or(&from_vram.and(&m.fresh));
            let lost = if fetched.is_ok() { PageMask::EMPTY } else { from_vram.minus(&m.fresh) };
            if let Some(shadow) = &m.shadow {
                f(&held, &lost, shadow);
            }
            if held_by_work {
                // The device may write on: what was fetched is as old as this.
                m.fresh = PageMask::EMPTY;
            }
            fetched.map(drop)
        })
    }
}
