//! Moving ranges: to a device, back, shared; eviction to make room.
//!
//! # Overview
//! [`Mover`] has the two ends of every move, host memory and the devices, and runs the steps that
//! [`crate::space::residency`] describes. Each function leaves the masks true at every return, error or not.
//!
//! # Locking
//! The caller holds the state lock of the range it names. Eviction only tries other ranges' locks, so two movers can
//! never wait for each other. The LRU lock is innermost and never held over a move.
//!
//! # Limits
//! Eviction gives up only when everything that remains is pinned by running work or held by another mover; the caller
//! waits for one of these to end and tries again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::ground::addr::{PageMask, SZ_2M, SZ_4K, SZ_64K, Span};
use crate::ground::error::{Error, Result};
use crate::observe::observer::Observer;
use crate::observe::stats::{Cause, Counter, Direction};
use crate::space::notifier::RangeFlags;
use crate::space::order::{AGED, Class, Order};
use crate::space::ports::{Backing, Bo, Device, FlipError, GpuAccess, HostMemory, Placement, Policy, Shadow};
use crate::space::range::Range as SpaceRange;
use crate::space::residency::{Moved, Residency, State, bytes};
use crate::space::timeslice::Rule;
use crate::vram::copy::Copier;

/// Bytes of memory at home that are read before they are copied to the device.
const READ_AT_ONCE: u64 = 256 << 10;

/// A range with its residency.
pub type Range = SpaceRange<Residency>;

/// How soon after its arrival a return counts as thrashing, and an arrival after a return.
const THRASH_WINDOW: Duration = Duration::from_millis(5);
/// Shared copies that an eviction looks at before it takes others.
const FEW: usize = 16;
/// Ranges in use that an eviction passes over.
const SECOND_CHANCES: usize = 32;

/// Pages of a range that a copy into fresh ones brings home sooner than a flip, which has every other processor flush its
/// TLB.
const SMALL: usize = (SZ_64K / SZ_4K) as usize;

/// One device and the order in which its memory was used.
pub(crate) struct Place {
    pub(crate) device: Arc<dyn Device>,
    lru: Mutex<Order>,
}

/// Moves ranges between host and devices.
pub struct Mover {
    /// The process's memory.
    pub host: Arc<dyn HostMemory>,
    pub(crate) places: Vec<Place>,
    pub(crate) policy: std::sync::RwLock<Arc<dyn Policy>>,
    pub(crate) observer: Arc<Observer>,
    retained: AtomicU64,
    released: Released,
    options: Options,
    epoch: Instant,
}

/// What of moving can be chosen.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Whether a range may be valid on both sides at once.
    pub share: bool,
    /// How long ranges stay on the device.
    pub stay: Rule,
}

impl Default for Options {
    /// Sharing where the policy asks for it, no least time on the device.
    fn default() -> Self {
        Self { share: true, stay: Rule { min: Duration::ZERO, cap: Duration::ZERO, ..Rule::default() } }
    }
}

/// Tells waiters that pins or device memory were given up.
#[derive(Default)]
pub(crate) struct Released {
    generation: Mutex<u64>,
    changed: Condvar,
    waiters: std::sync::atomic::AtomicU32,
}

impl Released {
    pub(crate) fn announce(&self) {
        *self.generation.lock().unwrap_or_else(|p| p.into_inner()) += 1;
        // Who waits says so with the lock held, so nobody is missed. Most times nobody does, and a wake-up is a call.
        if self.waiters.load(Ordering::Acquire) > 0 {
            self.changed.notify_all();
        }
    }

    pub(crate) fn generation(&self) -> u64 {
        *self.generation.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Waits until something was released after `seen`, or `timeout`.
    pub(crate) fn wait(&self, seen: u64, timeout: Duration) {
        let guard = self.generation.lock().unwrap_or_else(|p| p.into_inner());
        self.waiters.fetch_add(1, Ordering::AcqRel);
        let _ = self.changed.wait_timeout_while(guard, timeout, |now| *now == seen);
        self.waiters.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Mover {
    /// A mover between `host` and `devices`.
    pub fn new(
        host: Arc<dyn HostMemory>,
        devices: Vec<Arc<dyn Device>>,
        policy: Arc<dyn Policy>,
        observer: Arc<Observer>,
    ) -> Self {
        let places =
            devices.into_iter().map(|device| Place { device, lru: Mutex::new(Order::new()) }).collect();
        Self {
            host,
            places,
            policy: std::sync::RwLock::new(policy),
            observer,
            retained: AtomicU64::new(0),
            released: Released::default(),
            options: Options::default(),
            epoch: Instant::now(),
        }
    }

    /// With these choices.
    #[must_use]
    pub fn with(mut self, options: Options) -> Self {
        self.options = options;
        self
    }

    /// How long the range must still stay on the device.
    pub fn must_stay(&self, m: &Moved) -> Duration {
        m.slice.remaining(self.epoch.elapsed())
    }

    /// Takes `policy` from now on.
    pub fn set_policy(&self, policy: Arc<dyn Policy>) -> Result<()> {
        *self.policy.write().unwrap_or_else(|p| p.into_inner()) = policy;
        Ok(())
    }

    pub(crate) fn policy(&self) -> Arc<dyn Policy> {
        self.policy.read().unwrap_or_else(|p| p.into_inner()).clone()
    }

    pub(crate) fn device(&self, device: u32) -> &dyn Device {
        &*self.places[device as usize].device
    }

    pub(crate) fn released(&self) -> &Released {
        &self.released
    }

    fn lru(&self, device: u32) -> MutexGuard<'_, Order> {
        self.places[device as usize].lru.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Bytes of pages kept in shadows although their truth is elsewhere.
    pub fn retained_bytes(&self) -> u64 {
        self.retained.load(Ordering::Relaxed)
    }

    /// Runs `f` on the record of a moved range and accounts for what it did to retained and resident pages.
    fn accounted<T>(&self, range: &Range, m: &mut Moved, f: impl FnOnce(&mut Moved) -> T) -> T {
        let span = range.span();
        let count = |m: &Moved| {
            let resident = bytes(&m.vram);
            (bytes(&m.retained), resident, if m.shared { span.len() } else { 0 })
        };
        let before = count(m);
        let result = f(m);
        m.check(span);
        let after = count(m);
        let change = |from: u64, to: u64| to as i64 - from as i64;
        self.retained.fetch_add(after.0.wrapping_sub(before.0), Ordering::Relaxed);
        self.observer.gauges(change(before.1, after.1), change(before.2, after.2), change(before.0, after.0));
        result
    }

    /// Takes the range's translations away from every device that has one.
    fn unbind(&self, range: &Range, bound: &mut u32) {
        for (index, place) in self.places.iter().enumerate() {
            if *bound >> index & 1 == 1 {
                place.device.unbind(range.span());
            }
        }
        *bound = 0;
        range.unmap_pages();
    }

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
        let State { bound, moved } = state;
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
        m.shared = false;
        self.unbind(range, bound);
        let (Some(shadow), Some(bo)) = (&m.shadow, &m.bo) else { unreachable!("made above") };

        let (flipped, stopped) = match self.host.flip_out(span, shadow, &wanted) {
            Ok(flipped) => (flipped, None),
            Err(stop) => (stop.moved, Some(stop.why)),
        };
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

    /// Tells the device that so many pages will be copied, if they are worth it.
    fn announce_copies(&self, device: u32, pages: &PageMask) {
        if bytes(pages) >= Copier::THREADED_MIN as u64 {
            self.device(device).expect_copies();
        }
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
        let State { bound, moved: Some(moved) } = state else { return Ok(()) };
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
    /// that has no shadow page and is all zero stays a hole. Gives the bytes copied.
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
        for (first, count) in stale.runs() {
            dev.download(bo, shadow, first as u64 * SZ_4K, count as u64 * SZ_4K)?;
        }
        m.retained = m.retained.or(&stale);
        m.fresh = m.fresh.or(&stale);
        if span.len() == SZ_2M && !touched.is_empty() {
            // The first touch of an empty shadow may have brought a huge page. What nobody knows of would refuse the next
            // flip: it is as good for the zero pages, and is given back elsewhere.
            let surplus = self.host.present(shadow.span).minus(&m.retained);
            let zeroes = surplus.and(&unbacked.minus(&stale));
            m.retained = m.retained.or(&zeroes);
            m.fresh = m.fresh.or(&zeroes);
            let useless = surplus.minus(&zeroes);
            if !useless.is_empty() {
                self.host.shadow_release(shadow, &useless);
            }
        }
        Ok(bytes(&stale))
    }

    /// Flips strayed `pages` of the range at `span` to `to` (the range's own addresses, or where mremap took them).
    fn land(&self, span: Span, to: Span, m: &mut Moved, pages: &PageMask) -> Result<()> {
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

    /// mremap took `pages` of the range elsewhere: their contents wait in the shadow for [`Mover::land_elsewhere`].
    pub fn leave(&self, range: &Arc<Range>, state: &mut State, pages: &PageMask) -> Result<()> {
        let State { bound, moved: Some(moved) } = state else { return Ok(()) };
        self.unbind(range, bound);
        let result = self.accounted(range, moved, |m| {
            m.shared = false;
            let from_vram = m.vram.and(pages);
            let result = self.fetch(range.span(), m, &from_vram);
            m.leave(pages);
            result.map(|_| ())
        });
        if moved.vram.is_empty() {
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
    /// child that gets its own copy). Gives `f` the pages, those that are lost with their device, and the place.
    pub fn snapshot(
        &self,
        range: &Arc<Range>,
        state: &mut State,
        f: impl FnOnce(&PageMask, &PageMask, &Shadow),
    ) -> Result<()> {
        let State { bound, moved: Some(moved) } = state else { return Ok(()) };
        self.unbind(range, bound);
        self.accounted(range, moved, |m| {
            let from_vram = m.vram;
            let fetched = self.fetch(range.span(), m, &from_vram);
            let held = m.strayed.or(&from_vram.and(&m.fresh));
            let lost = if fetched.is_ok() { PageMask::EMPTY } else { from_vram.minus(&m.fresh) };
            if let Some(shadow) = &m.shadow {
                f(&held, &lost, shadow);
            }
            fetched.map(drop)
        })
    }

    /// Drops `pages`: the program said their contents may go, or unmapped them (`dead`).
    pub fn drop_pages(&self, range: &Arc<Range>, state: &mut State, pages: &PageMask, dead: bool) {
        let State { bound, moved } = state;
        self.unbind(range, bound);
        let Some(moved) = moved else { return };
        self.accounted(range, moved, |m| {
            m.shared = false;
            let stale = m.forget(pages);
            if dead {
                m.dead = m.dead.or(pages).minus(&m.vram);
            }
            if let Some(shadow) = &m.shadow {
                self.host.shadow_release(shadow, &stale);
            }
        });
        if moved.vram.is_empty() {
            self.free_bo(range, moved);
        }
    }

    /// Gives up everything the range holds; its truth must be home or nobody's.
    pub fn dissolve(&self, range: &Arc<Range>, state: &mut State) {
        self.unbind(range, &mut state.bound);
        let Some(mut moved) = state.moved.take() else { return };
        debug_assert!(moved.vram.is_empty() && moved.strayed.is_empty() && moved.leaving.is_empty());
        let alive = moved.alive(range.span());
        self.accounted(range, &mut moved, |m| {
            m.shared = false;
            m.retained = PageMask::EMPTY;
            m.fresh = PageMask::EMPTY;
        });
        self.free_bo(range, &mut moved);
        if let Some(shadow) = moved.shadow.take() {
            self.host.shadow_free(shadow);
        }
        for (first, count) in alive.runs() {
            self.host.unregister(range.span().page_run(first, count));
        }
    }

    fn free_bo(&self, range: &Range, m: &mut Moved) {
        if let Some(bo) = m.bo.take() {
            debug_assert!(m.vram.is_empty());
            self.accounted_shared_off(m, range.span());
            m.fresh = PageMask::EMPTY;
            self.lru(m.device).remove(range);
            self.device(m.device).vram_free(bo);
            self.released.announce();
        }
    }

    fn accounted_shared_off(&self, m: &mut Moved, span: Span) {
        if m.shared {
            m.shared = false;
            self.observer.gauges(0, -(span.len() as i64), 0);
        }
    }

    /// Makes a read-only copy of the range on `device`, or brings the one it has up to date: copies the pages written
    /// since.
    pub fn share(&self, range: &Arc<Range>, state: &mut State, device: u32, cause: Cause) -> Result<()> {
        let span = range.span();
        if !state.is_home() {
            return Err(Error::Mixed { span });
        }
        if state.moved.as_ref().is_some_and(|m| m.shared && m.device != device) {
            self.unshare_copy(range, state);
        }
        let State { bound, moved } = state;
        let moved = &mut **moved.get_or_insert_default();
        let result = self.accounted(range, moved, |m| self.share_steps(range, bound, m, device, cause));
        if result.is_err() {
            self.unbind(range, bound);
            self.free_bo(range, moved);
        }
        if result.is_ok() {
            self.arrived(range, device, Class::Copies);
        }
        result
    }

    fn share_steps(
        &self,
        range: &Arc<Range>,
        bound: &mut u32,
        m: &mut Moved,
        device: u32,
        cause: Cause,
    ) -> Result<()> {
        let span = range.span();
        let started = Instant::now();
        let written = if m.shared { self.host.take_written(span) } else { None };
        let tracked = written.is_some();
        let pages = match written {
            Some(written) => written,
            None => {
                // A device that writes over the link would change pages unseen.
                self.unbind(range, bound);
                self.host.register(span)?;
                self.host.track(span).map_err(|why| match why {
                    // The caller migrates instead.
                    FlipError::Os(_) => Error::NotSupported("tracking writes".into()),
                    why => why.to_error(span),
                })?;
                if m.bo.is_none() {
                    m.bo = Some(self.allocate(device, span)?);
                    m.device = device;
                }
                PageMask::first(span.pages())
            }
        };
        let Some(bo) = &m.bo else { unreachable!("made above or shared") };
        let present = self.host.present(span);
        let copying = pages.and(&present);
        let dev = self.device(device);
        let mut buffer = vec![0; bytes(&copying).min(READ_AT_ONCE) as usize];
        for (first, count) in copying.runs() {
            let (mut at, end) = (first as u64 * SZ_4K, (first + count) as u64 * SZ_4K);
            while at < end {
                let piece = &mut buffer[..(end - at).min(READ_AT_ONCE) as usize];
                // A page that the program drops in this moment is an error: to wait for it with the range locked would be
                // to wait for whoever needs the lock.
                let read = self.host.read_home(span.start + at, piece)?;
                dev.upload_bytes(bo, at, &piece[..read])?;
                at += read as u64;
            }
        }
        if !tracked {
            for (first, count) in pages.minus(&present).runs() {
                dev.clear(bo, first as u64 * SZ_4K, count as u64 * SZ_4K)?;
            }
        }
        m.shared = true;
        let copied = bytes(&copying);
        let saved = bytes(&present.minus(&pages));
        self.observer.migrated(Direction::ToDevice, cause, span, copied, saved, device, started);
        Ok(())
    }

    /// Maps the range on `device` for `access`, at what its truth is, and gives the flags to commit. Called with
    /// invalidations kept out.
    pub fn bind(
        &self,
        range: &Arc<Range>,
        state: &mut State,
        device: u32,
        access: GpuAccess,
    ) -> Result<RangeFlags> {
        let span = range.span();
        let bit = 1u32 << device;
        // A reader takes nothing away from work that holds the range for writing.
        let held_writable =
            range.data.is_pinned() && state.bound & bit != 0 && range.flags().contains(RangeFlags::WRITABLE);
        let access = if held_writable { access.max(GpuAccess::Write) } else { access };
        let backing = match state.moved.as_deref_mut() {
            Some(m) if !m.strayed.is_empty() || !m.dead.is_empty() => {
                return Err(Error::Gone { addr: span.start });
            }
            Some(m) if !m.vram.is_empty() => {
                if m.vram.count() != span.pages() || m.device != device {
                    return Err(Error::Mixed { span });
                }
                if access.writes() {
                    m.fresh = PageMask::EMPTY;
                    m.history.device_wrote = true;
                }
                m.bo.as_ref().map_or(Backing::System, |bo| Backing::Vram(bo.offset))
            }
            Some(Moved { shared: true, device: d, bo: Some(bo), .. }) if *d == device && !access.writes() => {
                Backing::Vram(bo.offset)
            }
            _ => Backing::System,
        };
        self.device(device).bind(span, backing, access)?;
        state.bound |= bit;
        let mut flags = RangeFlags::empty();
        if access.writes() {
            flags |= RangeFlags::WRITABLE;
        }
        if matches!(backing, Backing::Vram(_)) {
            self.lru(device).used(span.start);
            flags |= RangeFlags::HAS_DEVMEM_PAGES;
        }
        Ok(flags)
    }

    /// The range is the warmest of `device`; some that were warm before grow old.
    fn arrived(&self, range: &Arc<Range>, device: u32, class: Class) {
        self.lru(device).put(range, class);
        for _ in 0..AGED {
            let Some(old) = self.lru(device).age() else { break };
            self.device(device).test_and_clear_referenced(old.span());
        }
    }

    /// Device memory for `span`, evicting the longest unused if there is no room.
    fn allocate(&self, device: u32, span: Span) -> Result<Bo> {
        let dev = self.device(device);
        loop {
            if let Some(bo) = dev.vram_alloc(span.len()) {
                return Ok(bo);
            }
            if !self.evict_one(device)? {
                // Somebody else's free may have made room between the two.
                if let Some(bo) = dev.vram_alloc(span.len()) {
                    return Ok(bo);
                }
                return Err(Error::OutOfDeviceMemory {
                    needed: span.len(),
                    capacity: dev.info().vram_bytes,
                    busy: dev.info().vram_bytes - dev.vram_free_bytes(),
                });
            }
        }
    }

    /// Evicts the coldest range that can go. Shared copies are cheapest and go first; a range the device referenced
    /// since it grew old gets a second chance. `false` when nothing can go now; a lost device is an error.
    fn evict_one(&self, device: u32) -> Result<bool> {
        let (copies, owned) = {
            let lru = self.lru(device);
            (lru.len(Class::Copies), lru.len(Class::Owned))
        };
        // Copies in use are passed over, a few with each eviction, and all of them only when nothing else can go.
        Ok(self.evict_of(device, Class::Copies, copies.min(FEW))?
            || self.evict_of(device, Class::Owned, owned + SECOND_CHANCES)?
            || copies > FEW && self.evict_of(device, Class::Copies, copies)?)
    }

    /// Evicts the coldest range of `class` that can go, looking at so many.
    fn evict_of(&self, device: u32, class: Class, looks: usize) -> Result<bool> {
        let mut chances = SECOND_CHANCES;
        for _ in 0..looks {
            let Some((range, counts)) = self.lru(device).next(class) else { return Ok(false) };
            if range.data.is_pinned() {
                continue;
            }
            let Some(mut state) = range.data.try_lock() else { continue };
            if range.data.is_pinned() {
                continue;
            }
            let holds =
                |state: &State| state.moved.as_ref().is_some_and(|m| m.bo.is_some() && m.device == device);
            if !holds(&state) {
                continue;
            }
            if counts && chances > 0 && self.device(device).test_and_clear_referenced(range.span()) {
                chances -= 1;
                continue;
            }
            match self.evict(&range, &mut state) {
                Err(e @ Error::DeviceLost { .. }) => return Err(e),
                // What could not land is in the shadow, and its device memory is free.
                _ if !holds(&state) => return Ok(true),
                _ => {}
            }
        }
        Ok(false)
    }

    /// Moves the range out of device memory.
    pub fn evict(&self, range: &Arc<Range>, state: &mut State) -> Result<()> {
        let started = Instant::now();
        let mut result = Ok(());
        if state.moved.as_ref().is_some_and(|m| m.shared) {
            self.unshare_copy(range, state);
        } else {
            result = self.to_host(range, state, &PageMask::first(range.span().pages()), Cause::Evict);
        }
        if state.moved.as_ref().is_none_or(|m| m.bo.is_none()) {
            self.observer.evicted(range.span(), started);
        }
        result
    }

    /// Gives up a shared range's copy; the application has the truth already.
    pub fn unshare_copy(&self, range: &Arc<Range>, state: &mut State) {
        let State { bound, moved: Some(moved) } = state else { return };
        if moved.shared {
            self.unbind(range, bound);
            self.free_bo(range, moved);
        }
    }

    /// Returns retained pages whose truth is elsewhere to the kernel.
    pub fn release_retained(&self, range: &Range, state: &mut State) -> u64 {
        let Some(moved) = &mut state.moved else { return 0 };
        let idle = moved.retained.minus(&moved.strayed).minus(&moved.leaving);
        self.accounted(range, moved, |m| {
            if let Some(shadow) = &m.shadow {
                self.host.shadow_release(shadow, &idle);
            }
            m.retained = m.retained.minus(&idle);
            m.fresh = m.fresh.minus(&idle);
        });
        bytes(&idle)
    }

    /// The ranges with memory on `device`, coldest first.
    pub fn by_use(&self, device: u32) -> Vec<Arc<Range>> {
        self.lru(device).coldest_first()
    }

    /// Ranges that evictions have looked at so far.
    #[cfg(test)]
    pub(crate) fn looks(&self, device: u32) -> u64 {
        self.lru(device).looks()
    }

    /// Whether a range of this length may live on `device` at all.
    pub fn fits(&self, device: u32, span: Span) -> bool {
        let info = self.device(device).info();
        span.len() >= info.min_page.min(SZ_64K) && span.len() <= info.vram_bytes
    }

    /// What the policy says of a device access, with what the device cannot do taken out.
    pub(crate) fn placement(&self, facts: &crate::space::ports::Facts<'_>, migratable: bool) -> Placement {
        if !migratable || !self.fits(facts.device, facts.span) {
            return Placement::Remote;
        }
        match self.policy().gpu_access(facts) {
            Placement::Share if !self.options.share => Placement::Migrate,
            other => other,
        }
    }
}

/// The mapping that pages were to land in is another one now, and its event was not handled yet.
fn changed() -> Error {
    Error::Again { what: "bringing pages home", tries: 1 }
}
