//! Serving a device's access: the fault handler.
//!
//! # Overview
//! One try after another until the mappings hold still; what stands in the way decides what is done before the next
//! try: wait for an event, bring a mixed range home, cut it anew, break copy-on-write, evict, or reach it over the link.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{BUSY_TRIES, FAULT_PATIENCE, GONE_TRIES, PIN_PATIENCE, ROOM, Svm, TRIES, Want, back_off};
use crate::ground::addr::{PageMask, SZ_4K, Span};
use crate::ground::error::{Error, Result};
use crate::observe::stats::Cause;
use crate::space::mover::Range;
use crate::space::notifier::RangeFlags;
use crate::space::ports::{Facts, GpuAccess, Placement, Vma};
use crate::space::residency::State;
use crate::space::{Ctx, EventKind};

/// What an access waits for that must not move what others hold.
const HELD: &str = "waiting for work that holds the memory";

impl Svm {
    /// Makes `[addr, addr + len)` usable by `device` as `want` says. Gives the ranges it pinned, for [`Svm::release`].
    pub fn gpu_access(&self, device: u32, addr: u64, len: u64, want: Want) -> Result<Vec<Arc<Range>>> {
        self.gpu_access_holding(device, addr, len, want, &[])
    }

    /// As [`Svm::gpu_access`], by a caller that has pinned `held` already and will not give that up while this waits.
    pub fn gpu_access_holding(
        &self,
        device: u32,
        addr: u64,
        len: u64,
        want: Want,
        held: &[Arc<Range>],
    ) -> Result<Vec<Arc<Range>>> {
        let span = Span::sized(addr, len.max(1));
        let mut pinned: Vec<Arc<Range>> = Vec::new();
        let mut at = span.start;
        while at < span.end {
            match self.gpu_access_one(device, Span::new(at, span.end), want, [held, &pinned]) {
                Ok(range) => {
                    at = range.span().end;
                    if want.pin {
                        pinned.push(range);
                    }
                }
                Err(e) => {
                    self.release(device, &pinned);
                    return Err(e);
                }
            }
        }
        Ok(pinned)
    }

    /// Waits until pins or device memory were given up, for a few milliseconds at most.
    pub fn wait_for_memory(&self) {
        let released = self.mover.released();
        released.wait(released.generation(), Duration::from_millis(2));
    }

    /// Ends the pins of [`Svm::gpu_access`] by `device`.
    pub fn release(&self, device: u32, pinned: &[Arc<Range>]) {
        let (mut last, is_firm) = (false, self.cannot_fault(device));
        for range in pinned {
            if is_firm && range.data.loosen() {
                last = true;
                self.space.no_longer_kept(range);
            }
            if range.data.unpin() {
                last = true;
                self.mover.used(range);
            }
        }
        if last {
            self.mover.released().announce();
        }
    }

    fn gpu_access_one(
        &self,
        device: u32,
        span: Span,
        mut want: Want,
        own: [&[Arc<Range>]; 2],
    ) -> Result<Arc<Range>> {
        let addr = span.start;
        let started = Instant::now();
        let (mut busy, mut gone) = (0, 0);
        let (mut remote, mut crowded) = (false, false);
        let (mut full_since, mut held_since) = (None, None::<Instant>);
        let mut attempt = 0;
        while attempt < TRIES {
            attempt += 1;
            if self.closed.load(Ordering::Acquire) {
                return Err(Error::NotRunning("it withdrew"));
            }
            self.barrier();
            let seen = self.mover.released().generation();
            if !self.settle_landings() {
                back_off(attempt);
                continue;
            }
            let result =
                self.collect_garbage().and_then(|()| self.try_gpu_access(device, span, want, remote, own));
            let error = match result {
                Ok(Some(range)) => {
                    if crowded {
                        // There may be room again some time.
                        self.mover.wait_more(&range, Instant::now());
                    }
                    if want.cause == Cause::GpuAccess {
                        self.mover.observer.gpu_fault(device, addr, range.span().len(), started);
                    }
                    return Ok(range);
                }
                Ok(None) => {
                    back_off(attempt);
                    continue;
                }
                Err(e) => e,
            };
            match error {
                Error::Again { what: HELD, .. } => {
                    if held_since.get_or_insert_with(Instant::now).elapsed() > PIN_PATIENCE || !want.wait {
                        return Err(error);
                    }
                    self.mover.released().wait(seen, Duration::from_millis(2));
                    attempt -= 1;
                }
                Error::Again { .. } => back_off(attempt),
                // Another page of the range went away. Its event was not handled yet; or there was none, because
                // memory that is at home need not be registered: then the range must be cut anew.
                Error::Gone { .. } if gone < GONE_TRIES && self.granted(want.access, addr).is_ok() => {
                    gone += 1;
                    if let Some(range) = self.space.find(addr)
                        && !self.in_one_mapping(range.span())
                    {
                        self.recut(range.span());
                    }
                    back_off(attempt);
                }
                Error::Mixed { span } => self.bring_home(span, Cause::GpuAccess)?,
                Error::Busy { span } if !self.in_one_mapping(span) => {
                    self.recut(span);
                    back_off(attempt);
                }
                Error::Busy { span } if busy < BUSY_TRIES => {
                    busy += 1;
                    self.mover.host.unshare(span, &PageMask::first(span.pages()));
                    back_off(attempt);
                }
                Error::Busy { .. }
                    if may_be_remote(want, self.mover.device(device).info().system_atomics) =>
                {
                    remote = true;
                }
                Error::OutOfHostMemory { .. } if !remote && want.access != GpuAccess::Atomic => {
                    // No VMA or no memory to spare: the range stays where it is and is reached over the link.
                    remote = true;
                }
                Error::OutOfDeviceMemory { needed, capacity, busy } => {
                    let since = *full_since.get_or_insert_with(Instant::now);
                    let is_fault = !want.bracketed && want.force.is_none();
                    let elsewhere =
                        is_fault && may_be_remote(want, self.mover.device(device).info().system_atomics);
                    let patience = if elsewhere { FAULT_PATIENCE } else { PIN_PATIENCE };
                    if since.elapsed() > patience || !self.others_hold_memory(device, own, seen) {
                        if let Some(smaller) = self.fits_in_pieces(device, needed) {
                            self.recut(Span::around(addr, needed));
                            want.chunk = Some(smaller);
                            full_since = None;
                            continue;
                        }
                        if elsewhere {
                            (remote, crowded) = (true, true);
                            continue;
                        }
                        let needed =
                            needed + own.iter().copied().flatten().map(|r| r.span().len()).sum::<u64>();
                        return Err(Error::OutOfDeviceMemory { needed, capacity, busy });
                    }
                    if !want.wait {
                        return Err(Error::Again { what: ROOM, tries: attempt });
                    }
                    self.mover.released().wait(seen, Duration::from_millis(2));
                    // Bounded by time, not by number.
                    attempt -= 1;
                }
                e => return Err(e),
            }
        }
        Err(Error::Again { what: "a device access", tries: TRIES })
    }

    /// Whether a range of `span` that is cut now could migrate.
    fn may_migrate_now(&self, span: Span) -> bool {
        let vma = self.mover.host.find_vma(span.start);
        self.ctx.devmem_possible && matches!(vma, Ok(Some(vma)) if vma.migratable() && vma.span.covers(span))
    }

    /// The next smaller size of ranges, if `device` has `needed` bytes free and only not in one piece.
    fn fits_in_pieces(&self, device: u32, needed: u64) -> Option<u64> {
        let enough = self.mover.device(device).vram_free_bytes() >= needed;
        let sizes = self.space.config().chunk_sizes.iter().copied();
        sizes.filter(|size| *size < needed).max().filter(|_| enough)
    }

    /// Whether `span` lies in one mapping. A range does when it is made, until mprotect or mlock cuts its mapping.
    fn in_one_mapping(&self, span: Span) -> bool {
        matches!(self.mover.host.find_vma(span.start), Ok(Some(vma)) if vma.span.covers(span))
    }

    /// Has the garbage collector bring the ranges of `span` home and forget them, so that new ones fit the mappings. What work
    /// holds on a device that cannot fault stays until that ends.
    pub fn recut(&self, span: Span) {
        self.invalidate_part(EventKind::Unmap, span, |hit| Span::new(hit.start, hit.start));
    }

    /// As [`Svm::recut`], also of what work holds, which loses it. Only while nothing goes to a device ([`Svm::freeze`]).
    pub fn recut_at_once(&self, span: Span) {
        let ranges = self.space.ranges_in(span);
        ranges.iter().for_each(|range| range.data.set_emptied(true));
        self.recut(span);
        ranges.iter().for_each(|range| self.space.no_longer_kept(range));
    }

    /// Takes the device mappings of `span` away, as a change of its protection does in the kernel. Ranges and pages stay as
    /// they are; the next access maps them anew.
    pub fn unmap_devices(&self, span: Span) -> bool {
        !self.invalidate(EventKind::ProtVma, span).is_empty()
    }

    /// Whether somebody else has device memory that will be given up: work that will end, or a mover in whose hands it
    /// is. The latter is in no list yet, so what counts is what is allocated beyond the caller's own. `seen`: the
    /// generation before the memory was found to be full.
    fn others_hold_memory(&self, device: u32, own: [&[Arc<Range>]; 2], seen: u64) -> bool {
        let port = self.mover.device(device);
        let allocated = port.info().vram_bytes.saturating_sub(port.vram_free_bytes());
        let mut mine: Vec<&Arc<Range>> = own.into_iter().flatten().collect();
        mine.sort_unstable_by_key(|range| range.span().start);
        mine.dedup_by_key(|range| range.span().start);
        let held: u64 = mine
            .into_iter()
            .filter_map(|range| {
                let state = range.data.lock();
                let moved = state.moved.as_ref().filter(|m| m.device == device)?;
                moved.bo.as_ref().map(|bo| bo.len)
            })
            .sum();
        allocated > held || self.mover.released().generation() != seen
    }

    /// One try for the first range of `span`. `None`: the mappings changed meanwhile.
    fn try_gpu_access(
        &self,
        device: u32,
        span: Span,
        want: Want,
        remote: bool,
        own: [&[Arc<Range>]; 2],
    ) -> Result<Option<Arc<Range>>> {
        let frozen = self.frozen.read().unwrap_or_else(|p| p.into_inner());
        if *frozen > 0 || self.closed.load(Ordering::Acquire) {
            return Ok(None);
        }
        let (mover, addr) = (&self.mover, span.start);
        let ctx = Ctx { read_only: !want.access.writes(), ..self.ctx };
        let aspace = &*mover.host;
        let limits = self.space.config().limits;
        let within = want.chunk.and_then(|size| Span::around(addr, size).intersect(limits)).unwrap_or(limits);
        let range = self.space.find_or_insert(aspace, addr, within, &ctx)?;
        let mut state = range.data.lock();
        let ticket = range.begin();
        let is_kept = range.data.is_held_firmly();
        if range.is_gone() && !is_kept {
            return Ok(None);
        }
        let strangers = self.strangers(&range, &state, range.span());
        if !strangers.is_empty() {
            // What mremap took away looks like what was unmapped. Only the event tells which, and here it was not handled
            // yet: the range is locked.
            let told_later = mover.host.mappings_change();
            drop(state);
            if !told_later {
                self.replaced(&range, &strangers);
            }
            return Ok(None);
        }
        let outdated = state.moved.as_ref().is_some_and(|m| m.outdated);
        if is_kept && (range.is_gone() || outdated || state.cut.is_some()) {
            if self.joins(&range, &state, device, span, want) {
                drop(state);
                return Ok(Some(range));
            }
            if range.is_gone() || outdated {
                return Err(Error::Again { what: HELD, tries: 1 });
            }
        }
        let migratable = range.flags().contains(RangeFlags::MIGRATE_DEVMEM);
        if !migratable && self.may_migrate_now(range.span()) {
            // Another mapping took the place of the one it was cut for, which was never registered: there was no event.
            drop(state);
            self.recut(range.span());
            return Ok(None);
        }
        let placement = match want.force {
            _ if remote || want.leaves(range.span()) => Placement::Remote,
            Some(Placement::Migrate) if migratable && mover.fits(device, range.span()) => Placement::Migrate,
            Some(Placement::Share) if migratable && mover.fits(device, range.span()) => Placement::Share,
            Some(_) => Placement::Remote,
            None => self.place(&range, &state, device, want, migratable),
        };
        let mine = own.iter().copied().flatten().filter(|r| Arc::ptr_eq(r, &range)).count();
        let placement = match range.data.pins() as usize > mine {
            true => self.beside_others(&range, &state, device, want, placement)?,
            false => placement,
        };
        if placement != Placement::Remote
            && (self.being_dropped(range.span()) || mover.awaits_landings(range.span()))
        {
            return Ok(None);
        }
        let to_migrate = state.is_home() && placement == Placement::Migrate;
        self.served.note(range.span());
        match placement {
            Placement::Migrate => mover.to_device(&range, &mut state, device, want.cause)?,
            Placement::Share if state.is_home() => {
                let is_copy = state.moved.as_ref().is_some_and(|m| m.shared);
                let held = is_copy && is_kept && range.data.pins() as usize > mine;
                match mover.share(&range, &mut state, device, want.cause, held) {
                    Err(_) if held => return Err(Error::Again { what: HELD, tries: 1 }),
                    // Writes cannot be tracked, or a page of the range cannot be read: the move tells what can be done.
                    Err(Error::NotSupported(_) | Error::Gone { .. }) => {
                        mover.to_device(&range, &mut state, device, want.cause)?
                    }
                    other => other?,
                }
            }
            Placement::Share => mover.to_device(&range, &mut state, device, want.cause)?,
            Placement::Remote => {
                self.settle_for_remote(&range, &mut state, device, want)?;
                if let (None, Some(m)) = (want.force, &mut state.moved) {
                    mover.passed_over(&range, m);
                }
            }
        }
        // What was just flipped out lay in writable mappings: only those can be. Holes prove nothing.
        let flipped = state.moved.as_ref().map_or(0, |m| m.retained.count());
        if !to_migrate || flipped < range.span().pages() {
            let vma = self.granted(want.access, addr)?;
            if !self.granted_throughout(want.access, range.span(), vma) {
                if range.data.is_pinned() && self.is_firm(&state) {
                    return Err(Error::Again { what: HELD, tries: 1 });
                }
                drop(state);
                self.recut(range.span());
                return Ok(None);
            }
        }
        let Ok(commit) = range.commit(ticket) else { return Ok(None) };
        let flags = mover.bind(&range, &mut state, device, want.access)?;
        commit.set_pages(flags);
        if want.pin {
            state.left = want.leaves(range.span()) || state.left && range.data.is_pinned();
            self.pin(&range, device);
        }
        drop(commit);
        drop(state);
        Ok(Some(range))
    }

    fn cannot_fault(&self, device: u32) -> bool {
        !self.mover.device(device).info().recoverable_faults
    }

    fn pin(&self, range: &Range, device: u32) {
        match self.cannot_fault(device) {
            true => range.data.pin_firmly(),
            false => range.data.pin(),
        }
    }

    /// Whether `device` has what is wanted of `span` in a range that work holds on a device that cannot fault and that lost
    /// another part: then it is held once more, as it is. Not a copy, which the program may have written since.
    fn joins(&self, range: &Range, state: &State, device: u32, span: Span, want: Want) -> bool {
        let flags = range.flags();
        let moved = state.moved.as_deref();
        let is_local = moved.is_some_and(|m| !m.vram.is_empty());
        let is_copy = moved.is_some_and(|m| m.shared);
        let allowed = match want.access {
            GpuAccess::Read => true,
            GpuAccess::Write => flags.contains(RangeFlags::WRITABLE),
            GpuAccess::Atomic => {
                flags.contains(RangeFlags::WRITABLE)
                    && (is_local || self.mover.device(device).info().system_atomics)
            }
        };
        // The flags tell of the last device that mapped it.
        let is_mapped = state.bound == 1 << device && flags.contains(RangeFlags::HAS_DMA_MAPPING);
        let wanted = PageMask::of(range.span(), span);
        let is_whole = state.cut.as_ref().is_none_or(|cut| cut.and(&wanted).is_empty());
        if is_copy || !(allowed && is_mapped && is_whole) {
            return false;
        }
        match (want.pin, self.cannot_fault(device)) {
            (false, _) => {}
            (true, false) => range.data.pin(),
            (true, true) => return range.data.pin_firmly_too(),
        }
        true
    }

    /// Where a range goes that others hold. What they left at home, because they hold a part and the program uses the rest
    /// meanwhile, is reached over the link. What a device holds that cannot fault is not taken from it: [`HELD`].
    fn beside_others(
        &self,
        range: &Range,
        state: &State,
        device: u32,
        want: Want,
        placement: Placement,
    ) -> Result<Placement> {
        let held = || Error::Again { what: HELD, tries: 1 };
        let Some(m) = state.moved.as_ref().filter(|m| m.shared || !state.is_home()) else {
            if !state.left && !self.is_firm(state) {
                return Ok(placement);
            }
            let atomics = self.mover.device(device).info().system_atomics;
            let remote = placement == Placement::Remote || may_be_remote(want, atomics);
            return remote.then_some(Placement::Remote).ok_or_else(held);
        };
        if want.leaves_all() && !m.shared {
            // Or it would stay there when the others have ended, held, and the processor would wait.
            return Err(held());
        }
        if self.is_firm_copy(state, device) && !want.access.writes() {
            // Who only reads can do so where the copy was made from.
            return Ok(Placement::Remote);
        }
        let stays = match m.shared {
            true => m.device == device && placement == Placement::Share,
            false => m.device == device && m.vram.count() == range.span().pages(),
        };
        if stays || self.mover.device(m.device).info().recoverable_faults {
            Ok(placement)
        } else {
            Err(held())
        }
    }

    /// Whether a device that cannot fault has it mapped: while work holds it, that must stay so.
    pub(super) fn is_firm(&self, state: &State) -> bool {
        let mut bound = (0..self.mover.places.len() as u32).filter(|d| state.bound >> d & 1 == 1);
        bound.any(|d| self.cannot_fault(d))
    }

    /// Whether another device than `device`, which cannot fault, has a copy for reading.
    fn is_firm_copy(&self, state: &State, device: u32) -> bool {
        let cannot_fault = |device| !self.mover.device(device).info().recoverable_faults;
        state.moved.as_ref().is_some_and(|m| m.shared && m.device != device && cannot_fault(m.device))
    }

    /// Whether work holds some of `span` on a device that cannot fault.
    pub fn is_held_firmly(&self, span: Span) -> bool {
        let holds = |range: &Arc<Range>| range.data.is_pinned() && self.is_firm(&range.data.lock());
        self.space.ranges_in(span).iter().any(holds)
    }

    /// The mapping at `addr`, if it allows the access: read-only mappings are never bound writable.
    pub(super) fn granted(&self, access: GpuAccess, addr: u64) -> Result<Vma> {
        let vma = self.mover.host.find_vma(addr)?.ok_or(Error::NoVma { addr })?;
        allows(&vma, access, addr).map(|()| vma)
    }

    /// Whether all mappings of `span` allow the access, as `known` does: a range is bound as a whole, and mprotect may have
    /// divided it. A gap is the unmapping event's business.
    pub(super) fn granted_throughout(&self, access: GpuAccess, span: Span, known: Vma) -> bool {
        let mut at = if known.span.start <= span.start { known.span.end } else { span.start };
        while at < span.end {
            match self.mover.host.find_vma(at) {
                Ok(Some(vma)) if allows(&vma, access, at).is_ok() => at = vma.span.end.max(at + SZ_4K),
                Ok(None) => return true,
                _ => return false,
            }
        }
        true
    }

    /// Whether whatever is mapped in `span` allows the access.
    pub(super) fn granted_where_mapped(&self, access: GpuAccess, span: Span) -> bool {
        let mut at = span.start;
        while at < span.end {
            at = match self.mover.host.find_vma(at) {
                Ok(Some(vma)) if allows(&vma, access, at).is_ok() => vma.span.end.max(at + SZ_4K),
                Ok(None) => at + SZ_4K,
                _ => return false,
            };
        }
        true
    }

    fn place(&self, range: &Range, state: &State, device: u32, want: Want, migratable: bool) -> Placement {
        let history = state.moved.as_ref().map(|m| m.history).unwrap_or_default();
        let facts = Facts {
            span: range.span(),
            access: want.access,
            bracketed: want.bracketed,
            device,
            advice: self.advices.at(range.span().start),
            sequential: 0,
            history: &history,
        };
        self.mover.placement(&facts, migratable)
    }

    /// Remote access needs the truth with the application; device-resident truth of this device may stay.
    fn settle_for_remote(
        &self,
        range: &Arc<Range>,
        state: &mut State,
        device: u32,
        want: Want,
    ) -> Result<()> {
        if want.access == GpuAccess::Atomic && !self.mover.device(device).info().system_atomics {
            return Err(Error::NotSupported(format!(
                "atomics on {} over the link: it cannot move to device memory (file, shared, pinned or locked memory)",
                range.span()
            )));
        }
        let whole = state.moved.as_ref().is_some_and(|m| {
            m.device == device && m.strayed.is_empty() && m.vram.count() == range.span().pages()
        });
        if whole && (!want.leaves(range.span()) || range.data.is_pinned()) {
            return Ok(());
        }
        // The copy is as good as before while this device only reads.
        if self.is_firm_copy(state, device) && range.data.is_pinned() && !want.access.writes() {
            return Ok(());
        }
        self.mover.unshare_copy(range, state);
        self.mover.to_host(range, state, &PageMask::first(range.span().pages()), want.cause)
    }
}

fn allows(vma: &Vma, access: GpuAccess, addr: u64) -> Result<()> {
    if !vma.read && !vma.write {
        return Err(Error::Gone { addr });
    }
    if access.writes() && !vma.write {
        return Err(Error::NotWritable { addr });
    }
    Ok(())
}

fn may_be_remote(want: Want, atomics: bool) -> bool {
    want.access != GpuAccess::Atomic || atomics
}
