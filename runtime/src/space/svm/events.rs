//! What the kernel reports of the mappings: unmapped, dropped, moved; and the garbage that leaves.
//!
//! # Overview
//! Each report takes the device's mappings away first and corrects the ranges' records after. Work that holds a range on a
//! device that cannot fault loses only what the report is about, and the range stays until that work ends. Contents
//! that mremap took elsewhere wait in the list of landings until the kernel lets them land.

use std::sync::{Arc, MutexGuard};
use std::time::Instant;

use super::{DROPPING, Svm, back_off};
use crate::ground::addr::{PageMask, Span};
use crate::ground::error::{Error, Result};
use crate::observe::stats::Cause;
use crate::observe::watch::Change;
use crate::space::mover::{Landing, Range};
use crate::space::notifier::RangeFlags;
use crate::space::ports::GpuAccess;
use crate::space::residency::State;
use crate::space::{Event, EventKind};

impl Svm {
    /// Pages of `part` whose truth is away although the mapping it was taken from is not there any more. A mapping that
    /// replaced one was never registered.
    pub(super) fn strangers(&self, range: &Range, state: &State, part: Span) -> PageMask {
        let Some(m) = &state.moved else { return PageMask::EMPTY };
        let span = range.span();
        let away = m.vram.or(&m.strayed).and(&PageMask::of(span, part));
        let all_there = away.runs().all(|(first, count)| {
            let run = span.page_run(first, count);
            self.mover.host.is_registered(run)
        });
        if all_there { PageMask::EMPTY } else { away.minus(&self.mover.host.registered(span)) }
    }

    /// Mappings under `strangers` of the range were replaced and no event says so: their old contents are nobody's. The
    /// range's other pages are as good as before.
    pub(super) fn replaced(&self, range: &Arc<Range>, strangers: &PageMask) {
        for (first, count) in strangers.runs() {
            self.unmapped(range.span().page_run(first, count));
        }
    }

    /// mprotect changed the rights to `span`, and nothing else tells: the device's mappings of it are gone when this
    /// returns. The next access asks for the protection anew. A device that cannot fault keeps what work holds there, as far
    /// as the rights are enough.
    pub fn protected(&self, span: Span) {
        let mut at = span.start;
        for range in self.space.ranges_in(span) {
            if range.data.is_pinned() && self.is_still_granted(&range) {
                let kept = range.span();
                if at < kept.start {
                    self.invalidate(EventKind::ProtVma, Span::new(at, kept.start));
                }
                at = kept.end;
            }
        }
        if at < span.end {
            self.invalidate(EventKind::ProtVma, Span::new(at, span.end));
        }
    }

    /// Whether a device that cannot fault has the range, with no more rights than its mappings give. While its state is locked
    /// nobody is between asking for the rights and using them.
    fn is_still_granted(&self, range: &Range) -> bool {
        let Some(state) = range.data.try_lock() else { return false };
        let writes = range.flags().contains(RangeFlags::WRITABLE);
        let access = if writes { GpuAccess::Write } else { GpuAccess::Read };
        let span = range.span();
        let is_granted = || match &state.cut {
            None => {
                self.granted(access, span.start).is_ok_and(|vma| self.granted_throughout(access, span, vma))
            }
            Some(cut) => {
                let left = PageMask::first(span.pages()).minus(cut);
                left.runs()
                    .all(|(first, count)| self.granted_where_mapped(access, span.page_run(first, count)))
            }
        };
        self.is_firm(&state) && is_granted()
    }

    /// Destroys ranges whose mappings went away, as the kernel does before each device access. What work holds on a device that
    /// cannot fault goes when that ends.
    pub fn collect_garbage(&self) -> Result<()> {
        if self.space.garbage_len() == 0 {
            return Ok(());
        }
        if !self.settle_landings() {
            return Err(Error::Again { what: "landing what mremap moved", tries: 1 });
        }
        let kept = |range: &Range| range.data.is_held_firmly();
        self.space.collect_garbage_but(kept, |range| self.destroy(range, Cause::User)).map(|_| ())
    }

    /// Brings home what is left of a range and gives up what it holds. Work that had it pinned lost its mapping with the
    /// event already and faults again, for its device can; to wait for that work here could be to wait for the caller's own.
    fn destroy(&self, range: &Arc<Range>, cause: Cause) -> Result<()> {
        // Held until the range's own lock is: what mremap takes away is on this list before it can be collected.
        let landings = self.landings();
        if landings.iter().any(|landing| Arc::ptr_eq(&landing.range, range)) {
            return Err(Error::Again { what: "landing what mremap moved", tries: 1 });
        }
        // Not waited for with the list in hand: who has the range may wait for an event, and its reader for the list.
        let Some(mut state) = range.data.try_lock() else {
            return Err(Error::Again { what: "collecting a range that another thread has", tries: 1 });
        };
        drop(landings);
        self.salvage(range, &mut state, cause)?;
        self.mover.dissolve(range, &mut state);
        Ok(())
    }

    /// Brings all of the range home. What a lost device took with it is reported as lost.
    pub(super) fn salvage(&self, range: &Arc<Range>, state: &mut State, cause: Cause) -> Result<()> {
        let all = PageMask::first(range.span().pages());
        match self.mover.to_host(range, state, &all, cause) {
            Err(e @ Error::DeviceLost { .. }) => {
                self.write_off(range, state, e);
                self.mover.to_host(range, state, &all, cause)
            }
            other => other,
        }
    }

    /// Takes the devices' mappings of the ranges in `span` away, and gives those. Of a range that work holds on a device that
    /// cannot fault only the part that the event meets, unless it is about rights.
    pub(super) fn invalidate(&self, kind: EventKind, span: Span) -> Vec<Arc<Range>> {
        self.invalidate_part(kind, span, |hit| hit)
    }

    /// As [`Svm::invalidate`], with what such work loses of the part that the event meets.
    pub(super) fn invalidate_part(
        &self,
        kind: EventKind,
        span: Span,
        lost: impl Fn(Span) -> Span,
    ) -> Vec<Arc<Range>> {
        let started = Instant::now();
        let mut hit = Vec::new();
        self.space.invalidate(Event::new(kind, span), |range, info| {
            // Pins begin with a commit, which this keeps out. One that ends meanwhile leaves translations that are right; they
            // go with the range's record.
            let keeps = kind != EventKind::ProtVma && range.data.is_held_firmly();
            let lost = if keeps { lost(info.hit) } else { range.span() };
            if !lost.is_empty() {
                for place in &self.mover.places {
                    place.device.unbind(lost);
                }
            }
            if keeps {
                range.keep_pages(info.before);
            }
            hit.push(range.clone());
        });
        if !hit.is_empty() {
            self.mover.observer.invalidated(span, started);
        }
        hit
    }

    /// Nothing of the range may be left for the work that holds it: then it is collected without waiting for that.
    fn let_go_if_emptied(&self, range: &Arc<Range>) {
        if !range.data.is_held_firmly() {
            self.space.no_longer_kept(range);
        }
    }

    /// munmap, or a mapping placed over `span`: its contents are gone. Device mappings are gone when this returns.
    pub fn unmapped(&self, span: Span) {
        self.unmapped_meanwhile(span, &|| ());
    }

    /// [`Svm::unmapped`] as an event: `read_on` is done again and again while another thread has a range in its hands, which
    /// may be waiting for an event of its own to be read.
    pub fn unmapped_meanwhile(&self, span: Span, read_on: &dyn Fn()) {
        self.mover.observer.watch.tell(Change::Unmapped, span);
        // What is to land here may have come after: its mapping is registered then, for it took that along.
        self.abandon_landings(span, &|to| self.mover.host.registered(to), read_on);
        let mut kept = Vec::new();
        for range in self.invalidate(EventKind::Unmap, span) {
            let mut state = lock_meanwhile(&range, read_on);
            let part = range.span().intersect(span).unwrap_or(range.span());
            let newer = self.mover.host.registered(part);
            // Whatever is away was there before: while an event is under way nothing leaves. (Without UFFDIO_MOVE it can:
            // then what is registered is a newer mapping's, and the garbage collector brings it home.)
            let stays = if self.mover.host.refuses_while_changing() { PageMask::EMPTY } else { newer };
            let mut gone = PageMask::EMPTY;
            for (first, count) in PageMask::first(part.pages()).minus(&stays).runs() {
                let run = part.page_run(first, count);
                gone = gone.or(&PageMask::of(range.span(), run));
            }
            self.mover.take_from_devices(&range, &mut state, &PageMask::of(range.span(), part));
            self.mover.drop_pages(&range, &mut state, &gone, true);
            self.let_go_if_emptied(&range);
            kept.extend(newer.runs().map(|(first, count)| part.page_run(first, count)));
        }
        self.forget_all_but(span, &kept);
    }

    /// Forgets the registration of `span`, without the ascending spans `kept`.
    fn forget_all_but(&self, span: Span, kept: &[Span]) {
        let mut at = span.start;
        for next in kept.iter().chain([&Span::new(span.end, span.end)]) {
            if at < next.start {
                self.mover.host.forget(Span::new(at, next.start));
            }
            at = next.end;
        }
    }

    /// madvise(DONTNEED, FREE, REMOVE) is about to drop the contents of `span`, the mapping stays. `read_on` as in
    /// [`Svm::unmapped_meanwhile`].
    ///
    /// The kernel reports before it drops, and lets the caller go on when the report is read. A page that leaves in
    /// between would escape, and its old contents would come back: see `Svm::being_dropped`.
    pub fn discarded(&self, span: Span, read_on: &dyn Fn()) {
        self.mover.observer.watch.tell(Change::Dropped, span);
        self.dropping().push((span, Instant::now()));
        self.abandon_landings(span, &none, read_on);
        for range in self.invalidate(EventKind::Clear, span) {
            let mut state = lock_meanwhile(&range, read_on);
            self.mover.drop_pages(&range, &mut state, &PageMask::of(range.span(), span), false);
        }
    }

    /// mremap took `[from, from + len)` to `to`; what was on the device follows it. `read_on` as in
    /// [`Svm::unmapped_meanwhile`].
    ///
    /// The kernel says that the old place is unmapped in an event of its own, after this one, and refuses flips until that
    /// is read. So the contents leave their range here and land when the kernel lets them.
    pub fn moved(&self, from: u64, to: u64, len: u64, read_on: &dyn Fn()) {
        let old = Span::sized(from, len);
        self.mover.observer.watch.tell(Change::Moved, old);
        let shift = to.wrapping_sub(from);
        self.unmapped_ranges_only(Span::sized(to, len), read_on);
        self.mover.host.moved(from, to, len);
        self.abandon_landings(Span::sized(to, len), &none, read_on);
        let mut landings = self.landings();
        shift_landings(&mut landings, old, shift);
        for range in self.invalidate(EventKind::Unmap, old) {
            let pages = PageMask::of(range.span(), old);
            let to = Span::sized(range.span().start.wrapping_add(shift), range.span().len());
            let mut state = lock_meanwhile(&range, read_on);
            if let Err(e) = self.mover.leave(&range, &mut state, &pages) {
                tracing::error!(span = %to, "memory moved by mremap is lost: {e}");
            }
            drop(state);
            self.let_go_if_emptied(&range);
            landings.push(Landing { range, pages, to });
        }
        drop(landings);
        self.settle_landings();
    }

    /// Contents at the destination of an mremap are gone; its registration is about to be another's.
    fn unmapped_ranges_only(&self, span: Span, read_on: &dyn Fn()) {
        for range in self.invalidate(EventKind::Unmap, span) {
            let mut state = lock_meanwhile(&range, read_on);
            self.mover.drop_pages(&range, &mut state, &PageMask::of(range.span(), span), true);
            self.let_go_if_emptied(&range);
        }
    }

    /// What was to land in `span` is nobody's any more, but for what `kept` says of a landing's place.
    fn abandon_landings(&self, span: Span, kept: &dyn Fn(Span) -> PageMask, read_on: &dyn Fn()) {
        for landing in self.landings().iter_mut().filter(|landing| landing.to.overlaps(span)) {
            let gone = landing.pages.and(&PageMask::of(landing.to, span)).minus(&kept(landing.to));
            self.mover.abandon(&landing.range, &mut lock_meanwhile(&landing.range, read_on), &gone);
            landing.pages = landing.pages.minus(&gone);
        }
    }

    /// Whether anything of `span` is away, or is to land there.
    pub fn holds(&self, span: Span) -> bool {
        let is_away = |range: &Arc<Range>| {
            let state = range.data.try_lock();
            state.is_none_or(|state| {
                let away = state.moved.as_ref().map_or(PageMask::EMPTY, |m| m.vram.or(&m.strayed));
                !away.and(&PageMask::of(range.span(), span)).is_empty()
            })
        };
        self.mover.awaits_landings(span) || self.space.ranges_in(span).iter().any(is_away)
    }

    fn dropping(&self) -> MutexGuard<'_, Vec<(Span, Instant)>> {
        self.dropping.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Whether pages of `span` are there that a madvise may be about to drop. They stay until that is certainly over.
    pub(super) fn being_dropped(&self, span: Span) -> bool {
        let mut dropping = self.dropping();
        dropping.retain(|(_, since)| since.elapsed() < DROPPING);
        let parts: Vec<Span> = dropping.iter().filter_map(|(at, _)| at.intersect(span)).collect();
        drop(dropping);
        let marked = parts.iter().fold(PageMask::EMPTY, |sum, part| sum.or(&PageMask::of(span, *part)));
        !marked.is_empty() && !marked.and(&self.mover.host.present(span)).is_empty()
    }

    pub(super) fn landings(&self) -> MutexGuard<'_, Vec<Landing>> {
        self.mover.landings.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Also when that cannot be told now.
    pub(super) fn awaits_landing(&self, page: u64) -> bool {
        let Ok(landings) = self.mover.landings.try_lock() else { return true };
        landings.iter().any(|l| l.to.contains(page) && l.pages.get(l.to.page_index(page)))
    }

    /// Lands what mremap took elsewhere; `false` if some could not yet.
    pub fn settle_landings(&self) -> bool {
        if self.landings().is_empty() {
            return true;
        }
        // While the kernel has changes to tell it lets nothing land. Trying all the same, again and again, with the list in
        // hand keeps those from it who handle what it tells.
        let host = &self.mover.host;
        if host.refuses_while_changing() && host.mappings_change() {
            return false;
        }
        let mut landings = self.landings();
        landings.retain(|landing| {
            // Not waited for: see `unmapped_meanwhile`.
            let Some(mut state) = landing.range.data.try_lock() else { return true };
            self.mover.land_elsewhere(&landing.range, &mut state, &landing.pages, landing.to).is_err()
        });
        landings.is_empty()
    }
}

/// Nothing is kept.
fn none(_: Span) -> PageMask {
    PageMask::EMPTY
}

/// What was to land in `old` lands `shift` further: mremap moved its place before it arrived.
fn shift_landings(landings: &mut Vec<Landing>, old: Span, shift: u64) {
    let mut shifted = Vec::new();
    for landing in landings.iter_mut() {
        let pages = landing.pages.and(&PageMask::of(landing.to, old));
        if !pages.is_empty() {
            landing.pages = landing.pages.minus(&pages);
            let to = Span::sized(landing.to.start.wrapping_add(shift), landing.to.len());
            shifted.push(Landing { range: landing.range.clone(), pages, to });
        }
    }
    landings.append(&mut shifted);
}

/// Locks the range's state; does `read_on` again and again until it has it.
pub(super) fn lock_meanwhile<'a>(range: &'a Range, read_on: &dyn Fn()) -> MutexGuard<'a, State> {
    let mut tries = 0;
    loop {
        if let Some(state) = range.data.try_lock() {
            return state;
        }
        read_on();
        back_off(tries.min(63));
        tries += 1;
    }
}
