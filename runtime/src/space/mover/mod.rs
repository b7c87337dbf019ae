//! Moving ranges: to a device, back, shared; eviction to make room.
//!
//! # Overview
//! [`Mover`] has the two ends of every move, host memory and the devices, and runs the steps that
//! [`crate::space::residency`] describes. Each function leaves the masks true at every return, error or not.
//!
//! | module | what it does |
//! |---|---|
//! | `outward` | to a device |
//! | `homeward` | home again, or to where mremap took the pages |
//! | `share` | read-only copies of ranges that stay at home |
//! | `evict` | device memory, and who has to leave it |
//! | `pressed` | who keeps being evicted, and until when it stays at home for that |
//! | `released` | waiting for room when everything is pinned |
//!
//! # Locking
//! The caller holds the state lock of the range it names. Eviction only tries other ranges' locks, so two movers can
//! never wait for each other. The LRU lock is innermost and never held over a move.

mod evict;
mod homeward;
mod outward;
pub mod pressed;
mod released;
mod share;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::ground::addr::{PageMask, SZ_64K, Span};
use crate::ground::error::{Error, Result};
use crate::observe::observer::Observer;
use crate::space::notifier::RangeFlags;
use crate::space::order::Order;
use crate::space::ports::{Backing, Device, GpuAccess, HostMemory, Placement, Policy};
use crate::space::range::Range as SpaceRange;
use crate::space::residency::{Moved, Residency, State, bytes};
use crate::space::timeslice::Rule;
use crate::vram::copy::Copier;
use released::Released;

/// A range with its residency.
pub type Range = SpaceRange<Residency>;

/// A part of a range that mremap took elsewhere and that has not landed yet.
pub(crate) struct Landing {
    pub(crate) range: Arc<Range>,
    pub(crate) pages: PageMask,
    /// Where the range's span would be now.
    pub(crate) to: Span,
}

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
    pressed: pressed::Pressed,
    /// What mremap took elsewhere, until it lands there.
    pub(crate) landings: Mutex<Vec<Landing>>,
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
            pressed: pressed::Pressed::default(),
            landings: Mutex::default(),
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

    /// Whether ranges may be valid on both sides at once.
    pub fn shares(&self) -> bool {
        self.options.share
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
    pub(crate) fn unbind(&self, range: &Range, bound: &mut u32) {
        for (index, place) in self.places.iter().enumerate() {
            if *bound >> index & 1 == 1 {
                place.device.unbind(range.span());
            }
        }
        *bound = 0;
        range.unmap_pages();
    }

    /// Takes the translations of `pages` away from every device: of all the range, but for what work holds on a device that
    /// cannot fault, which does not lose the rest for them. Says whether it was left.
    pub(crate) fn take_from_devices(&self, range: &Range, state: &mut State, pages: &PageMask) -> bool {
        let cut = state.cut.as_deref().map_or(*pages, |cut| cut.or(pages));
        let is_held = range.data.is_held_firmly();
        if is_held && cut.count() < range.span().pages() {
            state.cut = Some(Box::new(cut));
        } else {
            self.unbind(range, &mut state.bound);
            if is_held {
                range.data.set_emptied(true);
            }
            return false;
        }
        for (first, count) in pages.runs() {
            let part = range.span().page_run(first, count);
            for place in &self.places {
                place.device.unbind(part);
            }
        }
        true
    }

    /// Tells the device that so many pages will be copied, if they are worth it.
    fn announce_copies(&self, device: u32, pages: &PageMask) {
        if bytes(pages) >= Copier::THREADED_MIN as u64 {
            self.device(device).expect_copies();
        }
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
        state.cut = None;
        range.data.set_emptied(false);
        state.bound |= bit;
        let mut flags = RangeFlags::empty();
        // The flag is all devices': another's right to write goes on.
        let others_write = state.bound != bit && range.flags().contains(RangeFlags::WRITABLE);
        if access.writes() || others_write && range.data.is_pinned() {
            flags |= RangeFlags::WRITABLE;
        }
        if matches!(backing, Backing::Vram(_)) {
            self.lru(device).used(span.start);
            flags |= RangeFlags::HAS_DEVMEM_PAGES;
        }
        Ok(flags)
    }

    /// Drops `pages`: the program said their contents may go, or unmapped them (`dead`). What else of the range work holds on a
    /// device that cannot fault stays as it is.
    pub fn drop_pages(&self, range: &Arc<Range>, state: &mut State, pages: &PageMask, dead: bool) {
        let rest_stays = self.take_from_devices(range, state, pages);
        let Some(moved) = &mut state.moved else { return };
        self.accounted(range, moved, |m| {
            m.shared &= rest_stays;
            m.outdated = m.shared;
            let stale = m.forget(pages);
            if dead {
                m.dead = m.dead.or(pages).minus(&m.vram);
            }
            if let Some(shadow) = &m.shadow {
                self.host.shadow_release(shadow, &stale);
            }
        });
        if moved.vram.is_empty() && !moved.shared {
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
            (m.shared, m.outdated) = (false, false);
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
            m.outdated = false;
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
