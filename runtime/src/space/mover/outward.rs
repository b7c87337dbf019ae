//! To a device: flip out, copy, and device memory is the truth.
//!
//! What an error leaves on the way is put back at once where the kernel allows, or by the CPU's next touch.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Mover, Range, changed};
use crate::ground::addr::{PageMask, SZ_4K, Span};
use crate::ground::error::{Error, Result};
use crate::observe::stats::{Cause, Counter, Direction};
use crate::space::order::Class;
use crate::space::ports::FlipError;
use crate::space::residency::{Moved, State, bytes};

/// How soon after its arrival a return counts as thrashing, and an arrival after a return.
const THRASH_WINDOW: Duration = Duration::from_millis(5);

/// Looks at the list of landings that another thread has, before it is taken to be busy with it.
const LOOKS: u32 = 200;

impl Mover {
    /// Makes all of the range's truth device memory of `device`. Everything or nothing: what an error leaves strayed is
    /// put back at once where the kernel allows, or by the CPU's next touch.
    pub fn to_device(&self, range: &Arc<Range>, state: &mut State, device: u32, cause: Cause) -> Result<()> {
        if state
            .moved
            .as_ref()
            .is_some_and(|m| m.device != device && (m.bo.is_some() || !m.strayed.is_empty()))
        {
            self.unshare_copy(range, state);
            self.to_host(range, state, &PageMask::first(range.span().pages()), cause)?;
        }
        let State { bound, moved, .. } = state;
        let moved = &mut **moved.get_or_insert_default();
        let result = self.accounted(range, moved, |m| self.to_device_steps(range, bound, m, device, cause));
        if result.is_err() && moved.vram.is_empty() {
            self.put_back(range, moved);
            self.unbind(range, bound);
            self.free_bo(range, moved);
        }
        if result.is_ok() {
            self.arrived(range, device, Class::Owned);
        }
        result
    }

    fn to_device_steps(
        &self,
        range: &Arc<Range>,
        bound: &mut u32,
        m: &mut Moved,
        device: u32,
        cause: Cause,
    ) -> Result<()> {
        let span = range.span();
        let alive = m.alive(span);
        if alive.minus(&m.vram).is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        let wanted = alive.minus(&m.vram).minus(&m.strayed);
        self.announce_copies(device, &wanted);
        // What is away is registered, or its mapping was replaced: a new one must not be taken for the old.
        for (first, count) in wanted.runs() {
            self.host.register(span.page_run(first, count))?;
        }
        if m.shadow.is_none() {
            m.shadow = Some(self.host.shadow_alloc(span.len())?);
        }
        if m.bo.is_none() {
            m.bo = Some(self.allocate(device, span)?);
            m.device = device;
        }
        (m.shared, m.outdated) = (false, false);
        self.unbind(range, bound);
        let (Some(shadow), Some(bo)) = (&m.shadow, &m.bo) else { unreachable!("made above") };

        let flip = |pages: &PageMask| match self.host.flip_out(span, shadow, pages) {
            Ok(flipped) => (flipped, None),
            Err(stop) => (stop.moved, Some(stop.why)),
        };
        let (mut flipped, mut stopped) = flip(&wanted);
        if stopped == Some(FlipError::Exists) {
            // Pages lie in the shadow that are in no record: their release failed, or mlockall filled it. They hold nothing.
            self.host.shadow_release(shadow, &wanted.minus(&m.retained).minus(&flipped));
            let (more, why) = flip(&wanted.minus(&flipped));
            (flipped, stopped) = (flipped.or(&more), why);
        }
        m.strayed = m.strayed.or(&flipped);
        m.retained = m.retained.or(&flipped);
        match stopped {
            None => {}
            // Read-only, locked or executable pages stay where they are, as pinned ones do.
            Some(FlipError::Mismatch) => return Err(Error::Busy { span }),
            Some(FlipError::NoMapping) => return Err(changed()),
            Some(why) => return Err(why.to_error(span)),
        }

        let dev = self.device(device);
        for (first, count) in m.strayed.runs() {
            dev.upload(bo, shadow, (first as u64) * SZ_4K, (count as u64) * SZ_4K)?;
        }
        let holes = wanted.minus(&flipped);
        if self.may_be_landings(span, &holes) {
            return Err(changed());
        }
        for (first, count) in holes.runs() {
            dev.clear(bo, (first as u64) * SZ_4K, (count as u64) * SZ_4K)?;
        }
        let copied = bytes(&m.strayed);
        let saved = bytes(&alive.minus(&wanted).minus(&m.strayed));
        m.fresh = m.fresh.or(&m.strayed);
        m.vram = alive;
        m.strayed = PageMask::EMPTY;
        let now = Instant::now();
        if m.returned.is_some_and(|at| now.duration_since(at) < THRASH_WINDOW) {
            self.observer.stats.add(Counter::ThrashEvents, 1);
        }
        m.history.to_device += 1;
        m.history.returns_this_visit = 0;
        m.history.device_wrote = false;
        m.arrived = Some(now);
        m.slice.arrive(&self.options.stay, self.epoch.elapsed());
        self.observer.migrated(Direction::ToDevice, cause, span, copied, saved, device, started);
        Ok(())
    }

    /// Whether contents are to land in `span`. Also when that cannot be told now.
    pub fn awaits_landings(&self, span: Span) -> bool {
        // Not waited for: who has the list may wait for the caller's range. Others only look, as this does.
        for _ in 0..LOOKS {
            if let Ok(landings) = self.landings.try_lock() {
                return landings.iter().any(|l| !l.pages.and(&PageMask::of(l.to, span)).is_empty());
            }
            std::hint::spin_loop();
        }
        true
    }

    /// Whether holes were perhaps what mremap has brought and what is still to land: the flip asks the kernel only for pages
    /// that are there. Its event is not handled, or it waits to land, or it has landed since; asked in this order.
    fn may_be_landings(&self, span: Span, holes: &PageMask) -> bool {
        !holes.is_empty()
            && (self.host.mappings_change()
                || self.awaits_landings(span)
                || !self.host.present(span).and(holes).is_empty())
    }

    /// Puts strayed pages back where the application left them, as far as the kernel lets.
    fn put_back(&self, range: &Range, m: &mut Moved) {
        if m.strayed.is_empty() {
            return;
        }
        let strayed = m.strayed;
        // What cannot go back now is fetched by the CPU's own fault: the truth is in the shadow and recorded so.
        let _ = self.accounted(range, m, |m| self.land(range.span(), range.span(), m, &strayed));
    }
}
