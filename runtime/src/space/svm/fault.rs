//! Serving the CPU's access to memory that is away: drm_gpusvm's migrate_to_ram.
//!
//! # Overview
//! A fault finds its range away, home meanwhile, or a hole. What comes back with the page is the policy's choice. Memory
//! that a lost device took with it is reported as lost, the rest is kept.

use std::sync::{Arc, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use super::{Served, Svm, Wait, index_of};
use crate::ground::addr::{PageMask, SZ_4K, Span};
use crate::ground::error::Error;
use crate::observe::stats::Cause;
use crate::observe::trace::EventKind as Traced;
use crate::space::mover::Range;
use crate::space::ports::{Advice, Facts, FlipError, GpuAccess, Return};
use crate::space::residency::{Moved, State};

impl Svm {
    /// Serves a CPU access to `addr` that found no page. `patient`: the caller may wait for a lock.
    pub fn cpu_fault(&self, addr: u64, patient: bool) -> Served {
        let page = addr & !(SZ_4K - 1);
        if !self.settle_landings() && self.awaits_landing(page) {
            return Served::Retry(Wait::Events);
        }
        let Some(range) = self.space.find(page) else { return self.rangeless(page) };
        let mut state = match range.data.try_lock() {
            Some(state) => state,
            // Whoever has it may wait for an event that only a thread like this one reads: never wait for it long.
            None if patient => match try_a_while(&range) {
                Some(state) => state,
                None => return Served::Retry(Wait::Lock),
            },
            None => return Served::Retry(Wait::Lock),
        };
        if !is_away(&range, &state, page) {
            if range.is_gone() {
                drop(state);
                return self.rangeless(page);
            }
            return self.not_away(&range, &mut state, page);
        }
        if range.data.is_pinned() && !self.is_reached(&state, page) {
            return Served::Retry(Wait::Pins);
        }
        let stay = state.moved.as_ref().map(|m| self.mover.must_stay(m)).unwrap_or_default();
        if !stay.is_zero() {
            return Served::Retry(Wait::Slice(stay));
        }
        let pages = self.returning(&range, &state, page);
        let lands = state.moved.as_ref().is_some_and(|m| m.retained.get(index_of(&range, page)));
        match self.mover.to_host(&range, &mut state, &pages, Cause::CpuFault) {
            Ok(()) if lands => Served::Done,
            // The page may have been all zero and never had memory: then it is a hole now.
            Ok(()) => self.zero(page),
            Err(
                Error::Again { .. } | Error::OutOfHostMemory { .. } | Error::Busy { .. } | Error::Gone { .. },
            ) => Served::Retry(Wait::Events),
            // The device has answered: nothing is lost, whatever the kernel does not do now.
            Err(Error::Os { .. }) => Served::Retry(Wait::Events),
            Err(e) => self.lost(&range, &mut state, e),
        }
    }

    /// Whether work itself waits for `page`: its access over the link had begun when the range was taken to a device. Who
    /// holds the range there can do without it for a while, for it faults; one that cannot is waited for.
    fn is_reached(&self, state: &State, page: u64) -> bool {
        let faults = |m: &Moved| self.mover.device(m.device).info().recoverable_faults;
        state.moved.as_deref().is_some_and(faults)
            && self.mover.places.iter().any(|place| place.device.reaches(Span::sized(page, SZ_4K)))
    }

    /// How much comes back with `page`.
    fn returning(&self, range: &Range, state: &State, page: u64) -> PageMask {
        let span = range.span();
        let all = PageMask::first(span.pages());
        let Some(m) = &state.moved else { return all };
        let facts = Facts {
            span,
            access: GpuAccess::Read,
            bracketed: false,
            device: m.device,
            advice: Advice::default(),
            sequential: m.home_before(span, page),
            history: &m.history,
        };
        match self.mover.policy().cpu_fault(&facts) {
            Return::Range => all,
            // Strayed pages always come along: they are one flip away.
            Return::Block(size) => {
                PageMask::of(span, Span::around(page, size.clamp(SZ_4K, span.len()))).or(&m.strayed)
            }
        }
    }

    /// The device is gone and took data with it.
    fn lost(&self, range: &Arc<Range>, state: &mut State, error: Error) -> Served {
        self.write_off(range, state, error);
        match self.mover.to_host(range, state, &PageMask::first(range.span().pages()), Cause::CpuFault) {
            Ok(()) => Served::Done,
            Err(_) => Served::Retry(Wait::Events),
        }
    }

    /// Keeps what is in the shadow, reports the rest of what is on the device as lost.
    pub(super) fn write_off(&self, range: &Arc<Range>, state: &mut State, error: Error) {
        let span = range.span();
        let gone = state.moved.as_ref().map(|m| m.vram.minus(&m.fresh)).unwrap_or_default();
        tracing::error!(%span, pages = gone.count(), "data that lived only on the device is lost: {error}");
        self.mover.drop_pages(range, state, &gone, false);
        self.poison(span, &gone);
    }

    /// The page came back meanwhile, or it is a hole in memory that usvm watches. Then the whole range, if it is home
    /// and no work uses a copy of it, goes back to the kernel, which serves the next holes by itself and faster.
    fn not_away(&self, range: &Arc<Range>, state: &mut State, page: u64) -> Served {
        let span = Span::sized(page, SZ_4K);
        if !self.mover.host.present(span).is_empty() {
            self.mover.host.wake(span);
            return Served::Done;
        }
        if !state.is_home() || range.data.is_pinned() {
            return self.zero(page);
        }
        self.mover.unshare_copy(range, state);
        self.hole(range.span(), page)
    }

    /// A hole that no range holds, or one that waits to be collected. It goes back to the kernel, but only while no device
    /// access can make a new range there and take the page away.
    fn rangeless(&self, page: u64) -> Served {
        let _alone = match self.frozen.try_write() {
            Ok(alone) => alone,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Served::Retry(Wait::Lock),
        };
        let alone = Span::sized(page, SZ_4K);
        let Some(range) = self.space.find(page) else { return self.hole(alone, page) };
        match range.data.try_lock() {
            Some(state) if range.is_gone() && !is_away(&range, &state, page) => self.hole(alone, page),
            _ => Served::Retry(Wait::Lock),
        }
    }

    /// Gives `span`, all home, back to the kernel, for the fault at `page`. What mremap brought there and has not landed
    /// needs its registration: then only the page is filled.
    fn hole(&self, span: Span, page: u64) -> Served {
        // Landings come before a range's state in the order of locks: only tried.
        let Ok(landings) = self.mover.landings.try_lock() else { return Served::Retry(Wait::Lock) };
        if landings.iter().any(|l| l.to.overlaps(span)) {
            drop(landings);
            return if self.awaits_landing(page) { Served::Retry(Wait::Events) } else { self.zero(page) };
        }
        // Filled first: while an event is unread the kernel refuses, and what mremap brought here may be unknown yet.
        let served = self.zero(page);
        if served == Served::Done {
            self.mover.host.let_go(span);
            self.mover.host.wake(span);
        }
        served
    }

    fn zero(&self, page: u64) -> Served {
        match self.mover.host.zero_fill(page) {
            Ok(()) => Served::Done,
            Err(FlipError::Again | FlipError::NoMemory) => Served::Retry(Wait::Events),
            // The mapping is gone: the access is tried again and gets what the kernel has to say.
            Err(_) => {
                self.mover.host.wake(Span::sized(page, SZ_4K));
                Served::Done
            }
        }
    }

    /// Makes `pages` of `span`, which are lost, answer SIGBUS.
    pub(super) fn poison(&self, span: Span, pages: &PageMask) {
        for (first, count) in pages.runs() {
            for page in first..first + count {
                self.mover.host.poison(span.page_run(page, 1).start);
            }
        }
        if !pages.is_empty() {
            tracing::error!(%span, pages = pages.count(), "memory is lost");
        }
    }

    /// Counts and traces a CPU fault that was served.
    pub fn note_cpu_fault(&self, addr: u64, arrived: Instant) {
        self.mover.observer.stats.cpu_fault(arrived.elapsed());
        self.mover.observer.trace_since(Traced::CpuFault, None, addr, SZ_4K, 0, arrived);
    }
}

/// Whether the CPU cannot have `page` before it comes back.
fn is_away(range: &Range, state: &State, page: u64) -> bool {
    let index = index_of(range, page);
    state.moved.as_ref().is_some_and(|m| m.vram.get(index) || m.strayed.get(index))
}

/// Locks the range's state if that is possible soon: about as long as a copy takes.
fn try_a_while(range: &Range) -> Option<MutexGuard<'_, State>> {
    let until = Instant::now() + Duration::from_micros(300);
    while Instant::now() < until {
        if let Some(state) = range.data.try_lock() {
            return Some(state);
        }
        std::thread::yield_now();
    }
    None
}
