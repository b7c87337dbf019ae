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
use std::sync::{Arc, Mutex, MutexGuard, RwLock, TryLockError};
use std::time::{Duration, Instant};

use crate::ground::addr::{PageMask, SZ_4K, Span};
use crate::ground::error::{Error, Result};
use crate::observe::stats::{Cause, Counter};
use crate::observe::trace::EventKind as Traced;
use crate::observe::watch::Change;
use crate::space::mover::{Mover, Range};
use crate::space::notifier::RangeFlags;
use crate::space::ports::{Advice, Facts, FlipError, GpuAccess, Placement, Return, Vma};
use crate::space::residency::{Advices, Residence, Residency, State, bytes};
use crate::space::{Ctx, Event, EventKind, Space};

/// Tries while mappings change under an access.
pub const TRIES: u32 = 2000;
/// Tries to get pages that are pinned or shared before the range is reached over the link instead.
const BUSY_TRIES: u32 = 4;
/// Tries to get a range of which some page is not mapped any more.
const GONE_TRIES: u32 = 200;
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
    /// A range that reaches beyond this span stays with the CPU and is reached over the link: what else lies in it must not
    /// wait for the end of the hold.
    pub within: Option<Span>,
    /// Wait for device memory that others hold; otherwise that is [`Error::Again`].
    pub wait: bool,
}

impl Want {
    /// A fault of a device.
    pub fn fault(access: GpuAccess) -> Self {
        Self {
            access,
            cause: Cause::GpuAccess,
            bracketed: false,
            force: None,
            pin: true,
            within: None,
            wait: true,
        }
    }

    /// A launch that announces what it uses.
    pub fn launch(access: GpuAccess) -> Self {
        Self {
            access,
            cause: Cause::GpuAccess,
            bracketed: true,
            force: None,
            pin: true,
            within: None,
            wait: true,
        }
    }

    /// A bracket around `span`, of which nobody knows when it ends. Atomics need device memory and take the whole range.
    pub fn bracket(access: GpuAccess, span: Span) -> Self {
        let within = (access != GpuAccess::Atomic).then_some(span);
        Self { within, wait: false, ..Self::launch(access) }
    }

    fn leaves(&self, range: Span) -> bool {
        self.within.is_some_and(|span| !span.covers(range))
    }

    /// A prefetch that the program asked for.
    pub fn prefetch() -> Self {
        Self {
            access: GpuAccess::Read,
            cause: Cause::Prefetch,
            bracketed: false,
            force: Some(Placement::Migrate),
            pin: false,
            within: None,
            wait: true,
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
    /// The range's time on the device to pass.
    Slice(Duration),
}

/// A part of a range that mremap took elsewhere and that has not landed yet.
struct Landing {
    range: Arc<Range>,
    pages: PageMask,
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
    /// Above zero while a fork is prepared: nothing goes to a device. Each try of a device access holds it for read.
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

    /// Waits until pins or device memory were given up, for a few milliseconds at most.
    pub fn wait_for_memory(&self) {
        let released = self.mover.released();
        released.wait(released.generation(), Duration::from_millis(2));
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
        let (mut busy, mut gone) = (0, 0);
        let mut remote = false;
        let mut full_since = None;
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
                    if since.elapsed() > PIN_PATIENCE || !self.others_hold_memory(device, own, seen) {
                        let needed =
                            needed + own.iter().copied().flatten().map(|r| r.span().len()).sum::<u64>();
                        return Err(Error::OutOfDeviceMemory { needed, capacity, busy });
                    }
                    if !want.wait {
                        return Err(Error::Again { what: "waiting for device memory", tries: attempt });
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

    /// Whether `span` lies in one mapping. A range does when it is made, until mprotect or mlock cuts its mapping.
    fn in_one_mapping(&self, span: Span) -> bool {
        matches!(self.mover.host.find_vma(span.start), Ok(Some(vma)) if vma.span.covers(span))
    }

    /// Has the garbage collector bring the ranges of `span` home and forget them, so that new ones fit the mappings.
    fn recut(&self, span: Span) {
        self.invalidate(EventKind::Unmap, span);
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

    /// One try. `None`: the mappings changed meanwhile.
    fn try_gpu_access(&self, device: u32, addr: u64, want: Want, remote: bool) -> Result<Option<Arc<Range>>> {
        let frozen = self.frozen.read().unwrap_or_else(|p| p.into_inner());
        if *frozen > 0 || self.closed.load(Ordering::Acquire) {
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
        let strangers = self.strangers(&range, &state, range.span());
        if !strangers.is_empty() {
            drop(state);
            self.replaced(&range, &strangers);
            return Ok(None);
        }
        let migratable = range.flags().contains(RangeFlags::MIGRATE_DEVMEM);
        let placement = match want.force {
            _ if remote || want.leaves(range.span()) => Placement::Remote,
            Some(Placement::Migrate) if migratable && mover.fits(device, range.span()) => Placement::Migrate,
            Some(_) => Placement::Remote,
            None => self.place(&range, &state, device, want, migratable),
        };
        if placement != Placement::Remote && self.being_dropped(range.span()) {
            return Ok(None);
        }
        // What was just flipped out lay in a writable mapping: only those can be.
        let proven = state.is_home() && placement == Placement::Migrate;
        match placement {
            Placement::Migrate => mover.to_device(&range, &mut state, device, want.cause)?,
            Placement::Share if state.is_home() => {
                match mover.share(&range, &mut state, device, want.cause) {
                    // Writes cannot be tracked, or a page of the range cannot be read: the move tells what can be done.
                    Err(Error::NotSupported(_) | Error::Gone { .. }) => {
                        mover.to_device(&range, &mut state, device, want.cause)?
                    }
                    other => other?,
                }
            }
            Placement::Share => mover.to_device(&range, &mut state, device, want.cause)?,
            Placement::Remote => self.settle_for_remote(&range, &mut state, device, want)?,
        }
        if !proven {
            self.granted(want.access, addr)?;
        }
        let Ok(commit) = range.commit(ticket) else { return Ok(None) };
        let flags = mover.bind(&range, &mut state, device, want.access)?;
        commit.set_pages(flags);
        if want.pin {
            range.data.pin();
        }
        drop(commit);
        drop(state);
        Ok(Some(range))
    }

    /// Whether the mapping at `addr` allows the access: read-only mappings are never bound writable.
    fn granted(&self, access: GpuAccess, addr: u64) -> Result<()> {
        let vma = self.mover.host.find_vma(addr)?.ok_or(Error::NoVma { addr })?;
        if !vma.read && !vma.write {
            return Err(Error::Gone { addr });
        }
        if access.writes() && !vma.write {
            return Err(Error::NotWritable { addr });
        }
        Ok(())
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
        self.mover.unshare_copy(range, state);
        self.mover.to_host(range, state, &PageMask::first(range.span().pages()), want.cause)
    }

    /// Pages of `part` whose truth is away although the mapping it was taken from is not there any more. A mapping that
    /// replaced one was never registered.
    fn strangers(&self, range: &Range, state: &State, part: Span) -> PageMask {
        let mut found = PageMask::EMPTY;
        let Some(m) = &state.moved else { return found };
        let span = range.span();
        let away = m.vram.or(&m.strayed).and(&PageMask::of(span, part));
        let mut runs: Vec<(usize, usize)> = away.runs().collect();
        while let Some((first, count)) = runs.pop() {
            if self.mover.host.is_registered(span.page_run(first, count)) {
                continue;
            }
            if count == 1 {
                found.set(first);
                continue;
            }
            let half = count / 2;
            runs.extend([(first, half), (first + half, count - half)]);
        }
        found
    }

    /// Mappings under `strangers` of the range were replaced and the event that says so is late: their old contents are
    /// nobody's. The range's other pages are as good as before.
    fn replaced(&self, range: &Arc<Range>, strangers: &PageMask) {
        for (first, count) in strangers.runs() {
            self.unmapped(range.span().page_run(first, count));
        }
    }

    /// The pages of `span` that lie in registered mappings now.
    fn registered(&self, span: Span) -> PageMask {
        let mut mask = PageMask::EMPTY;
        let mut todo = vec![span];
        while let Some(part) = todo.pop() {
            if self.mover.host.is_registered(part) {
                mask = mask.or(&PageMask::of(span, part));
            } else if part.pages() > 1 {
                let half = part.pages() / 2;
                todo.extend([part.page_run(0, half), part.page_run(half, part.pages() - half)]);
            }
        }
        mask
    }

    /// Destroys ranges whose mappings went away, as the kernel does before each device access.
    pub fn collect_garbage(&self) -> Result<()> {
        if self.space.garbage_len() == 0 {
            return Ok(());
        }
        if !self.settle_landings() {
            return Err(Error::Again { what: "landing what mremap moved", tries: 1 });
        }
        self.space.collect_garbage(|range| self.destroy(range, Cause::User)).map(|_| ())
    }

    /// Brings home what is left of a range and gives up what it holds. Work that had it pinned lost its mapping with the
    /// event already and faults again; to wait for that work here could be to wait for the caller's own.
    fn destroy(&self, range: &Arc<Range>, cause: Cause) -> Result<()> {
        // Held until the range's own lock is: what mremap takes away is on this list before it can be collected.
        let landings = self.landings();
        if landings.iter().any(|landing| Arc::ptr_eq(&landing.range, range)) {
            return Err(Error::Again { what: "landing what mremap moved", tries: 1 });
        }
        let mut state = range.data.lock();
        drop(landings);
        self.salvage(range, &mut state, cause)?;
        self.mover.dissolve(range, &mut state);
        Ok(())
    }

    /// Brings all of the range home. What a lost device took with it is reported as lost.
    fn salvage(&self, range: &Arc<Range>, state: &mut State, cause: Cause) -> Result<()> {
        let all = PageMask::first(range.span().pages());
        match self.mover.to_host(range, state, &all, cause) {
            Err(e @ Error::DeviceLost { .. }) => {
                self.write_off(range, state, e);
                self.mover.to_host(range, state, &all, cause)
            }
            other => other,
        }
    }

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
        if range.data.is_pinned() {
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

    /// The device is gone and took data with it.
    fn lost(&self, range: &Arc<Range>, state: &mut State, error: Error) -> Served {
        self.write_off(range, state, error);
        match self.mover.to_host(range, state, &PageMask::first(range.span().pages()), Cause::CpuFault) {
            Ok(()) => Served::Done,
            Err(_) => Served::Retry(Wait::Events),
        }
    }

    /// Keeps what is in the shadow, reports the rest of what is on the device as lost.
    fn write_off(&self, range: &Arc<Range>, state: &mut State, error: Error) {
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
        let Ok(landings) = self.landings.try_lock() else { return Served::Retry(Wait::Lock) };
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
        self.unmapped_meanwhile(span, &|| ());
    }

    /// [`Svm::unmapped`] as an event: `read_on` is done again and again while another thread has a range in its hands, which
    /// may be waiting for an event of its own to be read.
    pub fn unmapped_meanwhile(&self, span: Span, read_on: &dyn Fn()) {
        self.mover.observer.watch.tell(Change::Unmapped, span);
        self.abandon_landings(span, read_on);
        let mut kept = Vec::new();
        for range in self.invalidate(EventKind::Unmap, span) {
            let mut state = lock_meanwhile(&range, read_on);
            let part = range.span().intersect(span).unwrap_or(range.span());
            // An event may be older than the mapping that stands there now and has gone to the device already: a mapping
            // is only ever registered by a migration, so what is registered is the newer one's. The garbage collector
            // brings that home.
            let newer = self.registered(part);
            let mut gone = PageMask::EMPTY;
            for (first, count) in PageMask::first(part.pages()).minus(&newer).runs() {
                let run = part.page_run(first, count);
                gone = gone.or(&PageMask::of(range.span(), run));
            }
            self.mover.drop_pages(&range, &mut state, &gone, true);
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
        self.abandon_landings(span, read_on);
        for range in self.invalidate(EventKind::Clear, span) {
            let mut state = lock_meanwhile(&range, read_on);
            self.mover.unshare_copy(&range, &mut state);
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
        self.abandon_landings(Span::sized(to, len), read_on);
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
        }
    }

    /// What was to land in `span` is nobody's any more.
    fn abandon_landings(&self, span: Span, read_on: &dyn Fn()) {
        for landing in self.landings().iter_mut().filter(|landing| landing.to.overlaps(span)) {
            let gone = landing.pages.and(&PageMask::of(landing.to, span));
            self.mover.abandon(&landing.range, &mut lock_meanwhile(&landing.range, read_on), &gone);
            landing.pages = landing.pages.minus(&gone);
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

    fn landings(&self) -> MutexGuard<'_, Vec<Landing>> {
        self.landings.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Also when that cannot be told now.
    fn awaits_landing(&self, page: u64) -> bool {
        let Ok(landings) = self.landings.try_lock() else { return true };
        landings.iter().any(|l| l.to.contains(page) && l.pages.get(l.to.page_index(page)))
    }

    /// Lands what mremap took elsewhere; `false` if some could not yet.
    pub fn settle_landings(&self) -> bool {
        let mut landings = self.landings();
        landings.retain(|landing| {
            // Not waited for: see `unmapped_meanwhile`.
            let Some(mut state) = landing.range.data.try_lock() else { return true };
            self.mover.land_elsewhere(&landing.range, &mut state, &landing.pages, landing.to).is_err()
        });
        landings.is_empty()
    }

    /// Brings everything in `span` home, whoever has it, waiting for running work. What is lost with its device is
    /// reported and does not keep the rest from coming home.
    pub fn bring_home(&self, span: Span, cause: Cause) -> Result<()> {
        let deadline = Instant::now() + PIN_PATIENCE;
        let mut looks = 0;
        while !self.settle_landings() && Instant::now() < deadline {
            back_off(looks);
            looks += 1;
        }
        let mut lost = Ok(());
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
                        let all = PageMask::first(range.span().pages());
                        match self.mover.to_host(&range, &mut state, &all, cause) {
                            Err(error @ Error::DeviceLost { .. }) => {
                                lost = Err(error.clone());
                                self.write_off(&range, &mut state, error);
                                self.mover.to_host(&range, &mut state, &all, cause)
                            }
                            other => other,
                        }
                    }
                };
                match result {
                    Ok(()) => break,
                    Err(Error::Again { .. }) if Instant::now() < deadline => {
                        self.barrier();
                        back_off(attempt);
                    }
                    Err(Error::Busy { .. }) if Instant::now() < deadline => {
                        self.mover.released().wait(seen, Duration::from_millis(2));
                    }
                    Err(e) => return Err(e),
                }
                attempt += 1;
            }
        }
        lost
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
        // What mremap took elsewhere and has not landed belongs where it was to land.
        for landing in self.landings().iter() {
            let state = landing.range.data.lock();
            let Some(m) = &state.moved else { continue };
            let pages = m.leaving.and(&landing.pages);
            if let Some(shadow) = m.shadow.as_ref().filter(|_| !pages.is_empty()) {
                f(landing.to, &pages, shadow);
            }
        }
    }

    /// Ends it all: everything comes home and no access is served any more. What cannot come home is reported.
    pub fn close(&self) -> Result<()> {
        self.closed.store(true, Ordering::Release);
        // Device accesses that did not see it are over then.
        drop(self.frozen.write().unwrap_or_else(|p| p.into_inner()));
        let everything = Span::new(0, u64::MAX);
        let result = self.bring_home(everything, Cause::User);
        for range in self.space.clear() {
            let mut state = range.data.lock();
            let mut tries = 0;
            while let Err(error) = self.salvage(&range, &mut state, Cause::User) {
                tries += 1;
                if !matches!(error, Error::Again { .. } | Error::OutOfHostMemory { .. }) || tries == TRIES {
                    self.poison(
                        range.span(),
                        &state.moved.as_ref().map(|m| m.vram.or(&m.strayed)).unwrap_or_default(),
                    );
                    break;
                }
                back_off(tries);
            }
            if state.is_home() {
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
            self.poison(range.span(), &lost);
        }
    }

    /// Makes `pages` of `span`, which are lost, answer SIGBUS.
    fn poison(&self, span: Span, pages: &PageMask) {
        for (first, count) in pages.runs() {
            for page in first..first + count {
                self.mover.host.poison(span.page_run(page, 1).start);
            }
        }
        if !pages.is_empty() {
            tracing::error!(%span, pages = pages.count(), "memory is lost");
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
            sum.dirty += bytes(&m.vram.minus(&m.fresh).and(&part));
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

fn index_of(range: &Range, page: u64) -> usize {
    range.span().page_index(page)
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

/// Locks the range's state; does `read_on` again and again until it has it.
fn lock_meanwhile<'a>(range: &'a Range, read_on: &dyn Fn()) -> MutexGuard<'a, State> {
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
