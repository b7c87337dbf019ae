//! Publishing: what the live page shows, gathered only while somebody looks.
//!
//! # Overview
//! The watchdog's thread calls [`Publisher::round`] in each of its rounds. Without a viewer that is one load. With one,
//! the statistics are published every [`EVERY`], and the ranges are walked for the hottest ones every [`WALK_EVERY`].
//!
//! # Locking
//! A walk holds the space's update lock (for read) for one notifier at a time and only tries the state of a range:
//! whoever serves a fault is never waited for, and never waits for more than the listing of one notifier's ranges.
//!
//! # Limits
//! A range that is busy during a walk is left out of it. A walk never takes more than one [`SHARE`]th of the time: with
//! very many ranges the list is renewed more rarely.

use std::cmp::Reverse;
use std::time::{Duration, Instant};

use super::Inner;
use crate::observe::live::{HotRange, Live, LiveDevice};
use crate::space::ports::Device;
use crate::space::residency::bytes;

/// Time between two publications.
const EVERY: Duration = Duration::from_millis(200);

/// Time between two walks, at least.
const WALK_EVERY: Duration = Duration::from_secs(1);

/// A walk is followed by so many times its own duration without one.
const SHARE: u32 = 20;

/// Ranges listed.
const HOTTEST: usize = 32;

/// One process's publisher; belongs to the watchdog's thread.
#[derive(Debug)]
pub(super) struct Publisher {
    started: Instant,
    published: Option<Instant>,
    walked: Walk,
    next_walk: Option<Instant>,
}

/// What a walk found.
#[derive(Debug, Default)]
struct Walk {
    hottest: Vec<HotRange>,
    /// Resident, shared and retained bytes of each device.
    devices: Vec<[u64; 3]>,
}

impl Publisher {
    /// One whose clock begins now.
    pub(super) fn new() -> Self {
        Self { started: Instant::now(), published: None, walked: Walk::default(), next_walk: None }
    }

    /// Publishes if somebody looks and it is time.
    pub(super) fn round(&mut self, inner: &Inner) {
        let Some(page) = inner.live.as_ref().filter(|page| page.is_watched()) else { return };
        let now = Instant::now();
        if self.published.is_some_and(|last| now.duration_since(last) < EVERY) {
            return;
        }
        if self.next_walk.is_none_or(|due| now >= due) {
            self.walked = walk(inner);
            self.next_walk = Some(Instant::now() + WALK_EVERY.max(now.elapsed() * SHARE));
        }
        page.publish(&self.gather(inner));
        self.published = Some(now);
    }

    fn gather(&self, inner: &Inner) -> Live {
        let stats = inner.snapshot();
        let totals = [stats.resident_device_bytes, stats.resident_shared_bytes, stats.retained_host_bytes];
        let only = inner.devices.len() == 1;
        let devices = inner.devices.iter().enumerate().map(|(index, device)| {
            let info = device.info();
            // The gauges are exact at any time but do not tell devices apart.
            let walked = self.walked.devices.get(index).copied().unwrap_or_default();
            let [resident_bytes, shared_bytes, retained_bytes] = if only { totals } else { walked };
            LiveDevice {
                name: info.name.clone(),
                vram_bytes: info.vram_bytes,
                allocated_bytes: info.vram_bytes.saturating_sub(device.vram_free_bytes()),
                resident_bytes,
                shared_bytes,
                retained_bytes,
            }
        });
        Live {
            usvm: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_us: self.started.elapsed().as_micros() as u64,
            policy: inner.config.policy.clone(),
            chaos_per_second: inner.config.chaos.map_or(0, |chaos| chaos.rate),
            devices: devices.collect(),
            stats,
            ranges: inner.svm.space.range_count() as u64,
            hottest: self.walked.hottest.clone(),
        }
    }
}

/// Looks at every range that moved.
fn walk(inner: &Inner) -> Walk {
    let mut hottest = Vec::new();
    let mut devices = vec![[0; 3]; inner.devices.len()];
    for notifier in inner.svm.space.notifiers() {
        for range in inner.svm.space.ranges_in(notifier.span()) {
            let Some(state) = range.data.try_lock() else { continue };
            let Some(m) = &state.moved else { continue };
            let span = range.span();
            let found = HotRange {
                start: span.start,
                bytes: span.len(),
                device: m.device,
                resident_bytes: bytes(&m.vram),
                shared: m.shared,
                to_device: m.history.to_device,
                to_host: m.history.to_host,
            };
            if let Some(sum) = devices.get_mut(m.device as usize) {
                sum[0] += found.resident_bytes;
                sum[1] += if m.shared { found.bytes } else { 0 };
                sum[2] += bytes(&m.retained);
            }
            hottest.push(found);
            if hottest.len() == 4 * HOTTEST {
                keep_hottest(&mut hottest);
            }
        }
    }
    keep_hottest(&mut hottest);
    Walk { hottest, devices }
}

fn keep_hottest(ranges: &mut Vec<HotRange>) {
    ranges.sort_by_key(|range| (Reverse(range.moves()), range.start));
    ranges.truncate(HOTTEST);
}
