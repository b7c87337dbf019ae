//! Chaos: migrations that nobody asked for, to test a program and usvm.
//!
//! # Overview
//! `USVM_CHAOS=RATE[,SEED]` starts a thread that, RATE times a second, disturbs memory of the program in one of the ways of
//! [`Kind`]. None of this may change a program's results: any difference is a bug of usvm.
//!
//! All memory that could migrate is disturbed, whether a device ever used it or not: heap, stacks, data of the program and
//! of its libraries. [`Prey`] learns it from the mappings anew every [`FORESIGHT`]. One time in two a mapping is chosen, so
//! that the small and busy ones get their share, otherwise a byte, so that the large ones do.
//!
//! # Limits
//! A disturbance that finds the memory gone or in other hands is not done, and another one is tried, [`TRIES`] times. When
//! migrations take longer than the rate leaves time for, fewer are done.

use std::collections::VecDeque;
use std::sync::Weak;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Inner;
use crate::ground::addr::{PageMask, SZ_2M, SZ_4K, SZ_64K, Span};
use crate::ground::config::Chaos;
use crate::ground::thread;
use crate::host::Host;
use crate::observe::stats::Cause;
use crate::space::mover::Range;
use crate::space::ports::{GpuAccess, Placement};
use crate::space::svm::{Svm, Want};

/// Steps that are done without a pause between them; more often the clock cannot wake a thread usefully.
const SHORTEST_PAUSE: Duration = Duration::from_micros(200);
/// How far the steps may fall behind before the time that is lost is given up.
const BACKLOG: Duration = Duration::from_millis(20);
/// How long the list of mappings is believed.
const FORESIGHT: Duration = Duration::from_millis(20);
/// How often another disturbance is tried in the place of one that could not be done.
const TRIES: u32 = 8;
/// How many of the last places sent to a device are remembered.
const MEMORY: usize = 256;

/// The ways to disturb.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum Kind {
    /// Memory goes to a device.
    Send,
    /// A device has a copy, which it may read.
    Share,
    /// All of a range comes home.
    Return,
    /// One page of a range comes home, the rest stays.
    Part,
    /// A range leaves its device to make room, as when memory is short.
    Evict,
    /// Device mappings go, the data stays where it is.
    Invalidate,
    /// Ranges are forgotten, and cut anew at the next use.
    Split,
    /// Pages that are kept for the way home go back to the kernel.
    Release,
}

impl Kind {
    const ALL: [(Self, &'static str); 8] = [
        (Self::Send, "send"),
        (Self::Share, "share"),
        (Self::Return, "return"),
        (Self::Part, "part"),
        (Self::Evict, "evict"),
        (Self::Invalidate, "invalidate"),
        (Self::Split, "split"),
        (Self::Release, "release"),
    ];
}

/// How often each kind was done.
#[derive(Debug, Default)]
pub(super) struct Done([AtomicU64; Kind::ALL.len()]);

impl Done {
    fn note(&self, kind: Kind) {
        self.0[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// The kinds' names and counts.
    pub(super) fn counts(&self) -> Vec<(&'static str, u64)> {
        Kind::ALL.iter().map(|(kind, name)| (*name, self.0[*kind as usize].load(Ordering::Relaxed))).collect()
    }
}

/// The thread's body; ends with the runtime.
pub(super) fn run(runtime: &Weak<Inner>, chaos: Chaos) {
    while !thread::all_started() {
        std::thread::sleep(SHORTEST_PAUSE);
    }
    let period = Duration::from_secs(1).checked_div(chaos.rate.clamp(1, u64::from(u32::MAX)) as u32);
    let period = period.unwrap_or_default();
    let mut prey = Prey::new(chaos.seed);
    let mut due = Instant::now();
    loop {
        let Some(runtime) = runtime.upgrade() else { return };
        prey.learn(&runtime.host);
        while due <= Instant::now() {
            if !runtime.is_running() {
                return;
            }
            let devices = runtime.devices.len() as u64;
            let done = (0..TRIES).find_map(|_| prey.disturb(&runtime.host, &runtime.svm, devices));
            done.inspect(|kind| runtime.disturbed.note(*kind));
            due = (due + period).max(Instant::now().checked_sub(BACKLOG).unwrap_or(due));
        }
        if !runtime.is_running() {
            return;
        }
        drop(runtime);
        std::thread::sleep(due.saturating_duration_since(Instant::now()).max(SHORTEST_PAUSE));
    }
}

/// What can be disturbed.
struct Prey {
    dice: Dice,
    spans: Vec<Span>,
    bytes: u64,
    learned: Option<Instant>,
    sent: VecDeque<u64>,
}

impl Prey {
    fn new(seed: u64) -> Self {
        let dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        Self { dice, spans: Vec::new(), bytes: 0, learned: None, sent: VecDeque::with_capacity(MEMORY) }
    }

    fn learn(&mut self, host: &Host) {
        if self.learned.is_some_and(|at| at.elapsed() < FORESIGHT) {
            return;
        }
        self.spans = host.movable();
        self.bytes = self.spans.iter().map(|span| span.len()).sum();
        self.learned = Some(Instant::now());
    }

    /// A page that is there, or was when nobody looked.
    fn page(&mut self, host: &Host) -> Option<u64> {
        let count = self.spans.len() as u64;
        let (span, at) = if self.dice.below(2) == 0 {
            let span = *self.spans.get(self.dice.below(count) as usize)?;
            (span, span.start + self.dice.below(span.len()))
        } else {
            let mut at = self.dice.below(self.bytes);
            let span = self.spans.iter().find(|span| match at.checked_sub(span.len()) {
                Some(rest) => {
                    at = rest;
                    false
                }
                None => true,
            })?;
            (*span, span.start + at)
        };
        let from = at & !(SZ_4K - 1);
        host.first_present(Span::new(from, span.end))
            .or_else(|| host.first_present(Span::new(span.start, from)))
    }

    /// One disturbance; of which kind, if there was something to do.
    fn disturb(&mut self, host: &Host, svm: &Svm, devices: u64) -> Option<Kind> {
        match self.dice.below(12) {
            0..6 => self.send(host, svm, devices),
            what => {
                let Some(at) = self.dice.pick(&self.sent) else { return self.send(host, svm, devices) };
                match svm.space.find(at) {
                    Some(range) => {
                        let kind = Kind::ALL[what as usize - 4].0;
                        self.disturb_range(svm, &range, kind).then_some(kind)
                    }
                    None => self.send(host, svm, devices),
                }
            }
        }
    }

    /// Sends a page, and what is around it, to a device, or shares it.
    fn send(&mut self, host: &Host, svm: &Svm, devices: u64) -> Option<Kind> {
        let page = self.page(host)?;
        let chunk = match self.dice.below(8) {
            0..4 => SZ_4K,
            4..7 => SZ_64K,
            _ => SZ_2M,
        };
        let shared = self.dice.below(16) == 0 && svm.mover.shares();
        let want = Want { chunk: Some(chunk), wait: false, ..Want::prefetch() };
        let want = match shared {
            true => Want {
                access: GpuAccess::Read,
                bracketed: true,
                pin: true,
                force: Some(Placement::Share),
                ..want
            },
            false => want,
        };
        let device = self.dice.below(devices) as u32;
        let pinned = svm.gpu_access(device, page, SZ_4K, want).ok()?;
        if shared {
            svm.release(device, &pinned);
        }
        self.sent.truncate(MEMORY - 1);
        self.sent.push_front(page);
        Some(if shared { Kind::Share } else { Kind::Send })
    }

    /// Disturbs a range that a device has or had. What work holds stays as it is, and its end is not waited for.
    fn disturb_range(&mut self, svm: &Svm, range: &std::sync::Arc<Range>, kind: Kind) -> bool {
        let span = range.span();
        let Some(mut state) = range.data.try_lock() else { return false };
        if range.data.is_pinned() {
            return false;
        }
        match kind {
            Kind::Return => {
                drop(state);
                svm.bring_home(span, Cause::User).is_ok()
            }
            Kind::Split => {
                svm.recut(span);
                true
            }
            Kind::Release => svm.mover.release_retained(range, &mut state) > 0,
            Kind::Evict => {
                let there = state.moved.as_ref().is_some_and(|moved| moved.bo.is_some());
                there && svm.mover.evict(range, &mut state).is_ok()
            }
            Kind::Invalidate => svm.unmap_devices(span),
            _ => {
                let pages =
                    PageMask::of(span, span.page_run(self.dice.below(span.len() / SZ_4K) as usize, 1));
                svm.mover.unshare_copy(range, &mut state);
                // An error leaves the rest where it is, recorded so.
                svm.mover.to_host(range, &mut state, &pages, Cause::User).is_ok()
            }
        }
    }
}

/// xorshift64: the same seed disturbs the same way, as far as the program does the same.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound.max(1)
    }

    fn pick(&mut self, from: &VecDeque<u64>) -> Option<u64> {
        from.get(self.below(from.len() as u64) as usize).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::sim::{Profile, SimConfig, SimDevice};
    use crate::host::Options;
    use crate::host::features::Features;
    use crate::observe::observer::Observer;
    use crate::observe::stats::Counter;
    use crate::policy;
    use crate::space::mover::Mover;
    use crate::space::{Space, SpaceConfig};
    use std::sync::Arc;

    /// What is counted was done: each kind has its effect on a range that is on the device, or on one beside it that is home.
    #[test]
    fn every_kind_has_its_effect() {
        // Before the host: then the userfaultfd is closed when it goes.
        let data = vec![7u8; 2 * SZ_2M as usize];
        let block = Span::sized((data.as_ptr() as u64).next_multiple_of(SZ_2M), SZ_2M);
        let there = Span::sized(block.start, SZ_64K);
        let home = Span::sized(there.end, SZ_64K);
        // No fork events, which would make a forking test wait for a reader.
        let options = Options { forbid: Features::EVENT_FORK, prepared: 0, ..Options::default() };
        let host = Arc::new(Host::open(&options).unwrap());
        let device = SimDevice::new(SimConfig::of(Profile::GENERIC, 8 << 20)).unwrap();
        let observer = Arc::new(Observer::new());
        let policy = policy::by_name("gpusvm").unwrap();
        let mover = Mover::new(host.clone(), vec![device], policy, observer.clone());
        let svm = Svm::new(Space::new(SpaceConfig::default()).unwrap(), mover, SZ_64K);
        let count = |counter| observer.stats.get(counter);
        let mut prey = Prey::new(3);
        (prey.spans, prey.bytes) = (vec![home], home.len());
        let mut seen = [0; Kind::ALL.len()];
        let tracks = host.report().has.contains(Features::WP_ASYNC);
        for round in 0.. {
            assert!(round < 5000, "{seen:?}");
            if seen.iter().all(|count| *count >= 3) {
                break;
            }
            svm.bring_home(block, Cause::User).unwrap();
            let want = Want { chunk: Some(SZ_64K), ..Want::prefetch() };
            svm.gpu_access(0, there.start, there.len(), want).unwrap();
            let range = svm.space.find(there.start).unwrap();
            let before = svm.residence(there);
            if (range.span(), before.device) != (there, there.len()) {
                // A page was busy for a moment.
                continue;
            }
            prey.sent = VecDeque::from([there.start]);
            let (evictions, invalidations) = (count(Counter::Evictions), count(Counter::Invalidations));
            let Some(kind) = prey.disturb(&host, &svm, 1) else { continue };
            let (is, beside) = (svm.residence(there), svm.residence(home));
            let has_effect = match kind {
                Kind::Send => beside.device > 0,
                Kind::Share => beside.shared > 0 && beside.device == 0 || !tracks,
                Kind::Return => is.device == 0 && is.strayed == 0,
                Kind::Part => is.device == there.len() - SZ_4K,
                Kind::Evict => is.device == 0 && count(Counter::Evictions) == evictions + 1,
                Kind::Invalidate => is.device == there.len() && count(Counter::Invalidations) > invalidations,
                Kind::Split => svm.collect_garbage().is_ok() && range.is_gone(),
                Kind::Release => before.retained > 0 && is.retained == 0 && is.device == there.len(),
            };
            assert!(has_effect, "{kind:?} in round {round}: {before:?}, then {is:?}, beside it {beside:?}");
            seen[kind as usize] += 1;
        }
        svm.close().unwrap();
        assert!(data.iter().all(|byte| *byte == 7));
    }

    /// What work holds on a device that cannot fault is in its hands until it ends, and nobody waits for that.
    #[test]
    fn what_is_held_is_not_disturbed() {
        let data = vec![7u8; 2 * SZ_2M as usize];
        let there = Span::sized((data.as_ptr() as u64).next_multiple_of(SZ_2M), SZ_64K);
        let options = Options { forbid: Features::EVENT_FORK, prepared: 0, ..Options::default() };
        let host = Arc::new(Host::open(&options).unwrap());
        let config = SimConfig { recoverable_faults: false, ..SimConfig::of(Profile::GENERIC, SZ_64K) };
        let device = SimDevice::new(config).unwrap();
        let policy = policy::by_name("gpusvm").unwrap();
        let mover = Mover::new(host.clone(), vec![device.clone()], policy, Arc::new(Observer::new()));
        let svm = Svm::new(Space::new(SpaceConfig::default()).unwrap(), mover, SZ_64K);
        let want = Want { chunk: Some(SZ_64K), ..Want::launch(GpuAccess::Write) };
        let held = svm.gpu_access(0, there.start, there.len(), want).unwrap();
        let mut prey = Prey::new(3);
        for (kind, name) in Kind::ALL {
            if !matches!(kind, Kind::Send | Kind::Share) {
                assert!(!prey.disturb_range(&svm, &held[0], kind), "{name}");
            }
            let at = there.start;
            let used = device.launch(move |gpu| gpu.store_u64(at, 8)).wait(None);
            assert_eq!(used, Ok(true), "after {name}");
        }
        // All of the device's memory is held.
        (prey.spans, prey.bytes) = (vec![Span::sized(there.end, SZ_64K)], SZ_64K);
        assert_eq!(prey.send(&host, &svm, 1), None);
        svm.release(0, &held);
        svm.close().unwrap();
        assert_eq!(data[(there.start - data.as_ptr() as u64) as usize], 8);
    }

    #[test]
    fn the_same_seed_gives_the_same_numbers_and_all_of_them() {
        let rolls = |seed| {
            let mut dice = Prey::new(seed).dice;
            (0..4096).map(|_| dice.below(8)).collect::<Vec<_>>()
        };
        assert_eq!(rolls(7), rolls(7));
        assert_ne!(rolls(7), rolls(8));
        for what in 0..8 {
            let count = rolls(3).into_iter().filter(|n| *n == what).count();
            assert!((400..640).contains(&count), "{what} came {count} times of 4096");
        }
    }
}
