//! The SVM: serves device accesses, CPU faults and changes of the mappings, with the space, the mover and the policy.
//!
//! # Overview
//! [`Svm`] is drm_gpusvm's "expected driver": its fault handler is [`Svm::gpu_access`], its migrate_to_ram is
//! [`Svm::cpu_fault`], its notifier callback is [`Svm::unmapped`] and its siblings, its garbage collector
//! [`Svm::collect_garbage`].
//!
//! ```text
//! gpu_access: barrier -> garbage -> find_or_insert -> policy -> to_device | share | remote -> commit(bind)
//! cpu_fault:  find -> policy -> to_host(part) | zero-fill a hole
//! ```
//!
//! # Locking
//! Outermost first: update lock, notifier lock, a range's state, the LRU. A state lock may be held while a commit takes
//! its notifier's lock for read; an invalidation, which has it for write, therefore never takes a state lock: it takes
//! device mappings away, and the ranges' own records follow when it is over. Waiting for something that another thread
//! must do (unread events, pins, device memory in use) is done with no lock held.
//!
//! # Limits
//! Retries are bounded: [`TRIES`] for changing mappings, [`PIN_PATIENCE`] for running work that holds device memory.
//! Whoever gives up says what it waited for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use crate::ground::addr::{PageMask, SZ_4K, Span};
use crate::ground::error::{Error, Result};
use crate::observe::stats::{Cause, Counter};
use crate::observe::trace::EventKind as Traced;
use crate::space::mover::{Mover, Range};
use crate::space::notifier::RangeFlags;
use crate::space::ports::{Advice, Facts, FlipError, GpuAccess, Placement, Return, Vma};
use crate::space::residency::{Advices, Residence, Residency, State, bytes};
use crate::space::{Ctx, Event, EventKind, Space};

/// Tries while mappings change under an access.
pub const TRIES: u32 = 2000;
/// Tries to get pages that are pinned or shared before the range is reached over the link instead.
const BUSY_TRIES: u32 = 4;
/// How long after madvise(DONTNEED) was reported its pages may still be about to be dropped.
const DROPPING: Duration = Duration::from_millis(10);
/// How long an access waits for device memory that running work holds.
pub const PIN_PATIENCE: Duration = Duration::from_secs(10);

/// How a device access is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Want {
    /// Loads, stores or atomics.
    pub access: GpuAccess,
    /// Why, for the statistics.
    pub cause: Cause,
    /// Between begin and end of a launch: the program promises not to write what is only read meanwhile.
    pub bracketed: bool,
    /// Where it must go, whatever the policy says (prefetch).
    pub force: Option<Placement>,
    /// Hold the ranges where they are until [`Svm::release`].
    pub pin: bool,
}

impl Want {
    /// A fault of a device.
    pub fn fault(access: GpuAccess) -> Self {
        Self { access, cause: Cause::GpuAccess, bracketed: false, force: None, pin: true }
    }

    /// A launch that announces what it uses.
    pub fn launch(access: GpuAccess) -> Self {
        Self { access, cause: Cause::GpuAccess, bracketed: true, force: None, pin: true }
    }

    /// A prefetch that the program asked for.
    pub fn prefetch() -> Self {
        Self {
            access: GpuAccess::Read,
            cause: Cause::Prefetch,
            bracketed: false,
            force: Some(Placement::Migrate),
            pin: false,
        }
    }
}

/// What became of a CPU fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// The page is there, the waiters are awake.
    Done,
    /// Not now: an event is unread, or running work holds the range. Try again when that changed.
    Retry(Wait),
}

/// What a fault that must be tried again waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Unread events.
    Events,
    /// Running work that holds the range.
    Pins,
    /// The range is in another thread's hands.
    Lock,
}

/// A part of a range that mremap took elsewhere and that has not landed yet.
struct Landing {
    range: Arc<Range>,
    /// What is still wanted there.
    pages: PageMask,
    /// What was taken along, for the range's books.
    taken: PageMask,
    /// Where the range's span would be now.
    to: Span,
}

/// The running whole of space, mover and policy.
pub struct Svm {
    /// The bookkeeping.
    pub space: Space<Residency>,
    /// The moves.
    pub mover: Mover,
    /// What the program advised.
    pub advices: Advices,
    ctx: Ctx,
    landings: Mutex<Vec<Landing>>,
    /// Spans whose contents the kernel is about to drop, and when it said so.
    dropping: Mutex<Vec<(Span, Instant)>>,
    /// Set while a fork is prepared: nothing goes to a device.
    frozen: RwLock<u32>,
    closed: AtomicBool,
    barrier: RwLock<Option<Arc<dyn Fn() + Send + Sync>>>,
}

impl Svm {
    /// An SVM over an empty space.
    pub fn new(space: Space<Residency>, mover: Mover, check_pages_threshold: u64) -> Self {
        Self {
            space,
            mover,
            advices: Advices::default(),
            ctx: Ctx { devmem_possible: true, check_pages_threshold, ..Ctx::default() },
            landings: Mutex::default(),
            dropping: Mutex::default(),
            frozen: RwLock::new(0),
            closed: AtomicBool::new(false),
            barrier: RwLock::new(None),
        }
    }

    /// Sets what waits until every event that the kernel has queued by now was handled.
    pub fn set_barrier(&self, barrier: Arc<dyn Fn() + Send + Sync>) {
        *self.barrier.write().unwrap_or_else(|p| p.into_inner()) = Some(barrier);
    }

    /// Waits until every change of the mappings that the kernel has reported by now is known to the device. Not for
    /// the threads that read those reports.
    pub fn barrier(&self) {
        let barrier = self.barrier.read().unwrap_or_else(|p| p.into_inner()).clone();
        if let Some(barrier) = barrier {
            barrier();
        }
    }

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
            match self.gpu_access_one(device, at, want, [held, &pinned]) {
                Ok(range) => {
                    at = range.span().end;
                    if want.pin {
                        pinned.push(range);
                    }
                }
                Err(e) => {
                    self.release(&pinned);
                    return Err(e);
                }
            }
        }
        Ok(pinned)
    }

    /// Ends the pins of [`Svm::gpu_access`].
    pub fn release(&self, pinned: &[Arc<Range>]) {
        let mut last = false;
        for range in pinned {
            last |= range.data.unpin();
        }
        if last {
            self.mover.released().announce();
        }
    }

    fn gpu_access_one(
        &self,
        device: u32,
        addr: u64,
        want: Want,
        own: [&[Arc<Range>]; 2],
    ) -> Result<Arc<Range>> {
        let started = Instant::now();
        let mut busy = 0;
        let mut remote = false;
        let mut full_since = None;
        for attempt in 0..TRIES {
            if self.closed.load(Ordering::Acquire) {
                return Err(Error::NotRunning("it withdrew"));
            }
            self.barrier();
            if !self.settle_landings() {
                back_off(attempt);
                continue;
            }
            let seen = self.mover.released().generation();
            let result =
                self.collect_garbage().and_then(|()| self.try_gpu_access(device, addr, want, remote));
            let error = match result {
                Ok(Some(range)) => {
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
                Error::Again { .. } => back_off(attempt),
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
                    if since.elapsed() > PIN_PATIENCE || !self.others_hold_memory(device, own) {
                        let needed =
                            needed + own.iter().copied().flatten().map(|r| r.span().len()).sum::<u64>();
                        return Err(Error::OutOfDeviceMemory { needed, capacity, busy });
                    }
                    self.mover.released().wait(seen, Duration::from_millis(2));
                }
                e => return Err(e),
            }
        }
        Err(Error::Again { what: "a device access", tries: TRIES })
    }

    /// Whether `span` lies in one mapping. A range does when it is made, until mprotect or mlock cuts its mapping.
    fn in_one_mapping(&self, span: Span) -> bool {
        matches!(self.mover.host.find_vma(span.start), Ok(Some(vma)) if vma.span.covers(span))
    }

    /// Has the garbage collector bring the ranges of `span` home and forget them, so that new ones fit the mappings.
    fn recut(&self, span: Span) {
        self.invalidate(EventKind::Unmap, span);
    }

    /// Whether some range on the device may still be given up by somebody else: pinned by work that will end, or in
    /// another thread's hands.
    fn others_hold_memory(&self, device: u32, own: [&[Arc<Range>]; 2]) -> bool {
        self.mover
            .by_use(device)
            .iter()
            .any(|range| !own.iter().copied().flatten().any(|mine| Arc::ptr_eq(mine, range)))
    }

    /// One try. `None`: the mappings changed meanwhile.
    fn try_gpu_access(&self, device: u32, addr: u64, want: Want, remote: bool) -> Result<Option<Arc<Range>>> {
        let frozen = self.frozen.read().unwrap_or_else(|p| p.into_inner());
        if *frozen > 0 {
            return Ok(None);
        }
        let mover = &self.mover;
        let ctx = Ctx { read_only: !want.access.writes(), ..self.ctx };
        let aspace = &*mover.host;
        let range = self.space.find_or_insert(aspace, addr, self.space.config().limits, &ctx)?;
        let mut state = range.data.lock();
        let ticket = range.begin();
        if range.is_gone() {
            return Ok(None);
        }
        if !state.is_home() && !self.still_ours(&range, &state, range.span()) {
            drop(state);
            self.replaced(&range);
            return Ok(None);
        }
        let migratable = range.flags().contains(RangeFlags::MIGRATE_DEVMEM);
        let placement = match want.force {
            _ if remote => Placement::Remote,
            Some(Placement::Migrate) if migratable && mover.fits(device, range.span()) => Placement::Migrate,
            Some(_) => Placement::Remote,
            None => self.place(&range, &state, device, want, migratable),
        };
        if placement != Placement::Remote && self.being_dropped(range.span()) {
            return Ok(None);
        }
        match placement {
            Placement::Migrate => mover.to_device(&range, &mut state, device, want.cause)?,
            Placement::Share if state.is_home() => {
                match mover.share(&range, &mut state, device, want.cause) {
                    Err(Error::NotSupported(_)) => mover.to_device(&range, &mut state, device, want.cause)?,
                    other => other?,
                }
            }
            Placement::Share => mover.to_device(&range, &mut state, device, want.cause)?,
            Placement::Remote => self.settle_for_remote(&range, &mut state, device, want)?,
        }
        let access = self.granted(&range, want.access, addr)?;
        let Ok(commit) = range.commit(ticket) else { return Ok(None) };
        let flags = mover.bind(&range, &mut state, device, access)?;
        commit.set_pages(flags);
        if want.pin {
            range.data.pin();
        }
        drop(commit);
        drop(state);
        Ok(Some(range))
    }

    /// What the access is mapped for: read-only mappings are never bound writable.
    fn granted(&self, range: &Range, access: GpuAccess, addr: u64) -> Result<GpuAccess> {
        let vma = self.mover.host.find_vma(addr)?.ok_or(Error::NoVma { addr })?;
        if !vma.span.covers(range.span()) && !vma.span.contains(addr) {
            return Err(Error::Gone { addr });
        }
        if !vma.read && !vma.write {
            return Err(Error::Gone { addr });
        }
        if access.writes() && !vma.write {
            return Err(Error::NotWritable { addr });
        }
        Ok(access)
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
        if whole {
            return Ok(());
        }
        self.mover.unshare_copy(range, state);
        self.mover.to_host(range, state, &PageMask::first(range.span().pages()), want.cause)
    }

    /// Whether the mappings that the range's truth in `part` was taken from are still there. A mapping that replaced one
    /// was never registered.
    fn still_ours(&self, range: &Range, state: &State, part: Span) -> bool {
        let Some(m) = &state.moved else { return true };
        let span = range.span();
        let away = m.vram.or(&m.strayed).and(&PageMask::of(span, part));
        away.runs().all(|(first, count)| self.mover.host.is_registered(span.page_run(first, count)))
    }

    /// The range's mapping was replaced and the event that says so is late: the old contents are nobody's.
    fn replaced(&self, range: &Arc<Range>) {
        self.unmapped(range.span());
    }

    /// Destroys ranges whose mappings went away, as the kernel does before each device access.
    pub fn collect_garbage(&self) -> Result<()> {
        if self.space.garbage_len() == 0 {
            return Ok(());
        }
        self.space.collect_garbage(|range| self.destroy(range, Cause::User)).map(|_| ())
    }

    /// Brings home what is left of a range and gives up what it holds.
    fn destroy(&self, range: &Arc<Range>, cause: Cause) -> Result<()> {
        self.settle_landings();
        let mut state = range.data.lock();
        if range.data.is_pinned() {
            return Err(Error::Again { what: "collecting a range in use", tries: 1 });
        }
        if state.moved.as_ref().is_some_and(|m| !m.leaving.is_empty()) {
            return Err(Error::Again { what: "collecting a range that mremap moved", tries: 1 });
        }
        self.mover.to_host(range, &mut state, &PageMask::first(range.span().pages()), cause)?;
        self.mover.dissolve(range, &mut state);
        Ok(())
    }

    /// Serves a CPU access to `addr` that found no page. `patient`: the caller may wait for a lock.
    pub fn cpu_fault(&self, addr: u64, patient: bool) -> Served {
        let page = addr & !(SZ_4K - 1);
        if !self.settle_landings() && self.awaits_landing(page) {
            return Served::Retry(Wait::Events);
        }
        let Some(range) = self.space.find(page) else { return self.hole_without_range(page) };
        let mut state = match range.data.try_lock() {
            Some(state) => state,
            None if patient => range.data.lock(),
            None => return Served::Retry(Wait::Lock),
        };
        if range.flags().contains(RangeFlags::REMOVED) {
            // Its successor may be away already.
            return Served::Retry(Wait::Lock);
        }
        let span = range.span();
        let index = span.page_index(page);
        let away = state.moved.as_ref().is_some_and(|m| m.vram.get(index) || m.strayed.get(index));
        if !away {
            return self.not_away(&range, &mut state, page);
        }
        if range.data.is_pinned() {
            return Served::Retry(Wait::Pins);
        }
        let pages = self.returning(&range, &state, page);
        match self.mover.to_host(&range, &mut state, &pages, Cause::CpuFault) {
            // The page itself may have been all zero and never had memory: then it is a hole now.
            Ok(()) => self.zero(page),
            Err(Error::Again { .. }) => Served::Retry(Wait::Events),
            Err(Error::OutOfHostMemory { .. }) => Served::Retry(Wait::Events),
            Err(e) => self.lost(&range, &mut state, e),
        }
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

    /// The device is gone and took data with it: what is in the shadow is kept, the rest is reported as lost.
    fn lost(&self, range: &Arc<Range>, state: &mut State, error: Error) -> Served {
        let span = range.span();
        let gone = state.moved.as_ref().map(|m| m.vram.minus(&m.fresh)).unwrap_or_default();
        tracing::error!(%span, pages = gone.count(), "data that lived only on the device is lost: {error}");
        self.mover.drop_pages(range, state, &gone, false);
        for (first, count) in gone.runs() {
            for page in first..first + count {
                self.mover.host.poison(span.page_run(page, 1).start);
            }
        }
        match self.mover.to_host(range, state, &PageMask::first(span.pages()), Cause::CpuFault) {
            Ok(()) => Served::Done,
            Err(_) => Served::Retry(Wait::Events),
        }
    }

    /// The page came back meanwhile, or it is a hole in memory that usvm watches. Then the whole range, if it is home,
    /// goes back to the kernel, which serves the next holes by itself and faster.
    fn not_away(&self, range: &Arc<Range>, state: &mut State, page: u64) -> Served {
        let span = Span::sized(page, SZ_4K);
        if !self.mover.host.present(span).is_empty() {
            self.mover.host.wake(span);
            return Served::Done;
        }
        if !state.is_home() {
            return self.zero(page);
        }
        self.mover.unshare_copy(range, state);
        self.hole(range.span(), page)
    }

    /// Gives a page without a range back to the kernel, while no device access can make a range of it: a page that is
    /// away must stay registered.
    fn hole_without_range(&self, page: u64) -> Served {
        let Ok(_no_access) = self.frozen.try_write() else { return Served::Retry(Wait::Lock) };
        if self.space.find(page).is_some() {
            return Served::Retry(Wait::Lock);
        }
        self.hole(Span::sized(page, SZ_4K), page)
    }

    /// Gives `span`, all home, back to the kernel, for the fault at `page`. What mremap brought there and has not landed
    /// needs its registration: then only the page is filled.
    fn hole(&self, span: Span, page: u64) -> Served {
        // Landings come before a range's state in the order of locks: only tried.
        let Ok(landings) = self.landings.try_lock() else { return Served::Retry(Wait::Lock) };
        let overlap = |l: &Landing| l.to.overlaps(span) || l.range.span().overlaps(span);
        if landings.iter().any(overlap) {
            drop(landings);
            return if self.awaits_landing(page) { Served::Retry(Wait::Events) } else { self.zero(page) };
        }
        self.mover.host.unregister(span);
        self.mover.host.wake(span);
        Served::Done
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

    fn invalidate(&self, kind: EventKind, span: Span) -> Vec<Arc<Range>> {
        let started = Instant::now();
        let mut hit = Vec::new();
        self.space.invalidate(Event::new(kind, span), |range, _| {
            for place in &self.mover.places {
                place.device.unbind(range.span());
            }
            hit.push(range.clone());
        });
        if !hit.is_empty() {
            self.mover.observer.invalidated(span, started);
        }
        hit
    }

    /// munmap, or a mapping placed over `span`: its contents are gone. Device mappings are gone when this returns.
    pub fn unmapped(&self, span: Span) {
        self.change_landings(|landing| landing.pages = landing.pages.minus(&PageMask::of(landing.to, span)));
        for range in self.invalidate(EventKind::Unmap, span) {
            let mut state = range.data.lock();
            // An event may be older than the mapping that stands there now and has gone to the device already: a mapping
            // is only ever registered by a migration, so what is registered and away is the newer one's. The garbage
            // collector brings that home.
            if state.is_home() || !self.still_ours(&range, &state, span) {
                self.mover.drop_pages(&range, &mut state, &PageMask::of(range.span(), span), true);
            }
        }
        self.mover.host.forget(span);
    }

    /// madvise(DONTNEED, FREE, REMOVE) is about to drop the contents of `span`, the mapping stays.
    ///
    /// The kernel reports before it drops, and lets the caller go on when the report is read. A page that leaves in
    /// between would escape, and its old contents would come back: see [`Svm::being_dropped`].
    pub fn discarded(&self, span: Span) {
        self.dropping().push((span, Instant::now()));
        self.change_landings(|landing| landing.pages = landing.pages.minus(&PageMask::of(landing.to, span)));
        for range in self.invalidate(EventKind::Clear, span) {
            let mut state = range.data.lock();
            self.mover.unshare_copy(&range, &mut state);
            self.mover.drop_pages(&range, &mut state, &PageMask::of(range.span(), span), false);
        }
    }

    /// mremap took `[from, from + len)` to `to`; what was on the device follows it.
    pub fn moved(&self, from: u64, to: u64, len: u64) {
        let old = Span::sized(from, len);
        let shift = to.wrapping_sub(from);
        self.unmapped_ranges_only(Span::sized(to, len));
        self.mover.host.moved(from, to, len);
        let mut landings = self.landings();
        let mut again = Vec::new();
        for landing in landings.iter_mut().filter(|l| l.to.overlaps(old)) {
            let part = PageMask::of(landing.to, old);
            let to = Span::sized(landing.to.start.wrapping_add(shift), landing.to.len());
            let (pages, taken) = (landing.pages.and(&part), landing.taken.and(&part));
            again.push(Landing { range: landing.range.clone(), pages, taken, to });
            landing.pages = landing.pages.minus(&part);
            landing.taken = landing.taken.minus(&part);
        }
        landings.append(&mut again);
        for range in self.invalidate(EventKind::Unmap, old) {
            let mut state = range.data.lock();
            let Some(m) = &mut state.moved else { continue };
            let pages = PageMask::of(range.span(), old).and(&m.vram.or(&m.strayed)).minus(&m.leaving);
            m.leaving = m.leaving.or(&pages);
            // What was home went along by itself; what is away is nobody's here once it has landed there.
            let gone = PageMask::of(range.span(), old).minus(&m.vram).minus(&m.strayed);
            m.dead = m.dead.or(&gone);
            drop(state);
            let to = Span::sized(range.span().start.wrapping_add(shift), range.span().len());
            landings.push(Landing { range, pages, taken: pages, to });
        }
        drop(landings);
        self.settle_landings();
    }

    /// Contents at the destination of an mremap are gone; its registration is about to be another's.
    fn unmapped_ranges_only(&self, span: Span) {
        for range in self.invalidate(EventKind::Unmap, span) {
            let mut state = range.data.lock();
            self.mover.drop_pages(&range, &mut state, &PageMask::of(range.span(), span), true);
        }
    }

    fn dropping(&self) -> MutexGuard<'_, Vec<(Span, Instant)>> {
        self.dropping.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Whether pages of `span` are there that a madvise may be about to drop. They stay until that is certainly over.
    fn being_dropped(&self, span: Span) -> bool {
        let mut dropping = self.dropping();
        dropping.retain(|(_, since)| since.elapsed() < DROPPING);
        let parts: Vec<Span> = dropping.iter().filter_map(|(at, _)| at.intersect(span)).collect();
        drop(dropping);
        let marked = parts.iter().fold(PageMask::EMPTY, |sum, part| sum.or(&PageMask::of(span, *part)));
        !marked.is_empty() && !marked.and(&self.mover.host.present(span)).is_empty()
    }

    fn change_landings(&self, f: impl FnMut(&mut Landing)) {
        self.landings().iter_mut().for_each(f);
    }

    fn landings(&self) -> MutexGuard<'_, Vec<Landing>> {
        self.landings.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Also when that cannot be told now.
    fn awaits_landing(&self, page: u64) -> bool {
        let Ok(landings) = self.landings.try_lock() else { return true };
        let expected = |span: Span, pages: &PageMask| span.contains(page) && pages.get(span.page_index(page));
        landings.iter().any(|l| expected(l.to, &l.pages) || expected(l.range.span(), &l.taken))
    }

    /// Lands what mremap took elsewhere; `false` if some could not yet.
    pub fn settle_landings(&self) -> bool {
        let mut landings = self.landings();
        landings.retain(|landing| {
            let mut state = landing.range.data.lock();
            if self.mover.land_elsewhere(&landing.range, &mut state, &landing.pages, landing.to).is_err() {
                return true;
            }
            if let Some(m) = &mut state.moved {
                m.leaving = m.leaving.minus(&landing.taken);
            }
            self.mover.drop_pages(&landing.range, &mut state, &landing.taken, true);
            false
        });
        landings.is_empty()
    }

    /// Brings everything in `span` home, whoever has it, waiting for running work.
    pub fn bring_home(&self, span: Span, cause: Cause) -> Result<()> {
        let deadline = Instant::now() + PIN_PATIENCE;
        let mut looks = 0;
        while !self.settle_landings() && Instant::now() < deadline {
            back_off(looks);
            looks += 1;
        }
        for range in self.space.ranges_in(span) {
            let mut attempt = 0;
            loop {
                let seen = self.mover.released().generation();
                let result = {
                    let mut state = range.data.lock();
                    if state.is_home() {
                        self.mover.unshare_copy(&range, &mut state);
                        break;
                    }
                    if range.data.is_pinned() {
                        Err(Error::Busy { span: range.span() })
                    } else {
                        self.mover.to_host(&range, &mut state, &PageMask::first(range.span().pages()), cause)
                    }
                };
                match result {
                    Ok(()) => break,
                    Err(Error::Again { .. }) if Instant::now() < deadline => back_off(attempt),
                    Err(Error::Busy { .. }) if Instant::now() < deadline => {
                        self.mover.released().wait(seen, Duration::from_millis(2));
                    }
                    Err(e) => return Err(e),
                }
                attempt += 1;
            }
        }
        Ok(())
    }

    /// Drops the contents of `span` (usvm_discard): what is on the device is not copied back and reads as zero or as it
    /// was at some earlier time.
    pub fn discard(&self, span: Span) {
        for range in self.space.ranges_in(span) {
            let mut state = range.data.lock();
            if !range.data.is_pinned() {
                self.mover.drop_pages(&range, &mut state, &PageMask::of(range.span(), span), false);
            }
        }
    }

    /// Nothing goes to a device from now on, and nothing that is going is still on its way when this returns.
    pub fn freeze(&self) {
        *self.frozen.write().unwrap_or_else(|p| p.into_inner()) += 1;
    }

    /// Ends one [`Svm::freeze`].
    pub fn thaw(&self) {
        *self.frozen.write().unwrap_or_else(|p| p.into_inner()) -= 1;
    }

    /// A child was forked by a call that no handler announced: calls `f` with the contents of everything that is away,
    /// range by range.
    pub fn for_child(&self, mut f: impl FnMut(Span, &PageMask, &crate::space::ports::Shadow)) {
        for range in self.space.ranges_in(Span::new(0, u64::MAX)) {
            let mut state = range.data.lock();
            if let Err(e) =
                self.mover.snapshot(&range, &mut state, |pages, shadow| f(range.span(), pages, shadow))
            {
                tracing::error!(span = %range.span(), "a forked child does not see this memory: {e}");
            }
        }
    }

    /// Ends it all: everything comes home and no access is served any more. What cannot come home is reported.
    pub fn close(&self) -> Result<()> {
        self.closed.store(true, Ordering::Release);
        let everything = Span::new(0, u64::MAX);
        let result = self.bring_home(everything, Cause::User);
        for range in self.space.clear() {
            let mut state = range.data.lock();
            if self
                .mover
                .to_host(&range, &mut state, &PageMask::first(range.span().pages()), Cause::User)
                .is_ok()
            {
                self.mover.dissolve(&range, &mut state);
            }
        }
        result
    }

    /// One try to bring everything home by a thread that must not wait for any lock, because its holder may be dead.
    /// `true` when all is home.
    pub fn rescue(&self) -> bool {
        self.closed.store(true, Ordering::Release);
        let mut all_home = true;
        for range in self.space.ranges_in(Span::new(0, u64::MAX)) {
            let Some(mut state) = range.data.try_lock() else {
                all_home = false;
                continue;
            };
            let everything = PageMask::first(range.span().pages());
            all_home &= self.mover.to_host(&range, &mut state, &everything, Cause::User).is_ok();
        }
        all_home
    }

    /// What no thread can bring home any more answers SIGBUS instead of waiting for ever or reading as zeroes.
    pub fn poison_the_rest(&self) {
        for range in self.space.ranges_in(Span::new(0, u64::MAX)) {
            let lost = match range.data.try_lock() {
                Some(state) => state.moved.as_ref().map(|m| m.vram.or(&m.strayed)).unwrap_or_default(),
                // Its holder is gone: which pages are home is only known by what is present, which stays as it is.
                None => PageMask::first(range.span().pages()).minus(&self.mover.host.present(range.span())),
            };
            for (first, count) in lost.runs() {
                for page in first..first + count {
                    self.mover.host.poison(range.span().page_run(page, 1).start);
                }
            }
            if !lost.is_empty() {
                tracing::error!(span = %range.span(), pages = lost.count(), "memory is lost");
            }
        }
    }

    /// Bytes of `span` in each place.
    pub fn residence(&self, span: Span) -> Residence {
        let mut sum = Residence::default();
        for range in self.space.ranges_in(span) {
            let state = range.data.lock();
            let Some(m) = &state.moved else { continue };
            let part = PageMask::of(range.span(), span);
            sum.device += bytes(&m.vram.and(&part));
            sum.strayed += bytes(&m.strayed.and(&part));
            sum.retained += bytes(&m.retained.and(&part));
            if m.shared {
                sum.shared += bytes(&part);
            }
        }
        sum
    }

    /// Returns retained pages to the kernel until at most `allowed` bytes are kept, the longest unused first.
    pub fn shrink(&self, allowed: u64) {
        for device in 0..self.mover.places.len() as u32 {
            for range in self.mover.by_use(device) {
                if self.mover.retained_bytes() <= allowed {
                    return;
                }
                if let Some(mut state) = range.data.try_lock() {
                    self.mover.release_retained(&range, &mut state);
                }
            }
        }
    }

    /// The mapping around `addr`.
    pub fn vma(&self, addr: u64) -> Result<Option<Vma>> {
        self.mover.host.find_vma(addr)
    }

    /// Counts and traces a CPU fault that was served.
    pub fn note_cpu_fault(&self, addr: u64, arrived: Instant) {
        self.mover.observer.stats.cpu_fault(arrived.elapsed());
        self.mover.observer.trace_since(Traced::CpuFault, None, addr, SZ_4K, 0, arrived);
    }

    /// Counts of one kind, for tests and tools.
    pub fn count(&self, counter: Counter) -> u64 {
        self.mover.observer.stats.get(counter)
    }
}

fn may_be_remote(want: Want, atomics: bool) -> bool {
    want.access != GpuAccess::Atomic || atomics
}

/// Waits a little, longer the more often: the first tries cost almost nothing, the last wait 5 ms.
fn back_off(attempt: u32) {
    match attempt {
        0..16 => std::thread::yield_now(),
        16..64 => std::thread::sleep(Duration::from_micros(50)),
        _ => std::thread::sleep(Duration::from_micros(200 + u64::from(attempt.min(200)) * 24)),
    }
}
