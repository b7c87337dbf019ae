//! A lock-free histogram of durations.
//!
//! # Overview
//! Log-linear buckets, as in HdrHistogram: each power of two of nanoseconds is cut into 32 equal parts, so a percentile
//! is at most 1/32 (3.2 %) above the truth, over the whole range of 64 bits, in 15 KiB. Recording is one relaxed
//! increment and one relaxed maximum.
//!
//! The `hdrhistogram` crate has the same buckets but records through `&mut self`; its shared variant hands every thread
//! a recorder that allocates on first use and merges through a channel. Service threads may do neither in the middle
//! of a fault, so the buckets here are atomics.
//!
//! # Limits
//! A percentile read while others record counts each of their samples wholly or not at all, but may mix samples from
//! before and after a concurrent [`Latency::reset`].

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// log2 of the parts of a power of two.
const PART_BITS: u32 = 5;
const PARTS: usize = 1 << PART_BITS;
const BUCKETS: usize = (64 - PART_BITS as usize + 1) * PARTS;

/// Which bucket holds `ns`.
fn bucket(ns: u64) -> usize {
    if ns < PARTS as u64 {
        return ns as usize;
    }
    let octave = 63 - ns.leading_zeros() - PART_BITS;
    let part = (ns >> octave) as usize & (PARTS - 1);
    (octave as usize + 1) * PARTS + part
}

/// The largest value that `index` holds.
fn upper(index: usize) -> u64 {
    if index < PARTS {
        return index as u64;
    }
    let octave = (index / PARTS - 1) as u32;
    let first = ((PARTS + index % PARTS) as u64) << octave;
    first + ((1 << octave) - 1)
}

/// The histogram. Shared freely between threads.
#[derive(Debug)]
pub struct Latency {
    buckets: Box<[AtomicU64]>,
    max: AtomicU64,
}

/// What a [`Latency`] says, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Percentiles {
    /// Samples.
    pub count: u64,
    /// Half of the samples are at most this.
    pub p50: u64,
    /// Nine tenths are at most this.
    pub p90: u64,
    /// All but a hundredth are at most this.
    pub p99: u64,
    /// The longest, exactly.
    pub max: u64,
}

impl Default for Latency {
    fn default() -> Self {
        let buckets = std::iter::repeat_with(AtomicU64::default).take(BUCKETS).collect();
        Self { buckets, max: AtomicU64::new(0) }
    }
}

impl Latency {
    /// Counts one duration; longer than 584 years counts as that.
    #[inline]
    pub fn record(&self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(ns)].fetch_add(1, Relaxed);
        self.max.fetch_max(ns, Relaxed);
    }

    /// Median, tail and maximum of what was recorded; all zero when nothing was.
    pub fn percentiles(&self) -> Percentiles {
        let counts: Vec<u64> = self.buckets.iter().map(|b| b.load(Relaxed)).collect();
        let max = self.max.load(Relaxed);
        let count = counts.iter().sum();
        let at = |percent| value_at(&counts, count, percent).min(max);
        Percentiles { count, p50: at(50), p90: at(90), p99: at(99), max }
    }

    /// Forgets everything.
    pub fn reset(&self) {
        self.buckets.iter().for_each(|b| b.store(0, Relaxed));
        self.max.store(0, Relaxed);
    }
}

/// The upper bound of the bucket that holds the nearest-rank percentile.
fn value_at(counts: &[u64], count: u64, percent: u64) -> u64 {
    let rank = (u128::from(count) * u128::from(percent)).div_ceil(100).max(1);
    let mut seen = 0u128;
    let holds = counts.iter().position(|&n| {
        seen += u128::from(n);
        seen >= rank
    });
    holds.map_or(0, upper)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_bucket_holds_its_values(ns: u64) {
            let index = bucket(ns);
            prop_assert!(index < BUCKETS);
            prop_assert!(upper(index) >= ns);
            prop_assert!(index == 0 || upper(index - 1) < ns);
            prop_assert!(upper(index) - ns <= ns / PARTS as u64);
        }

        #[test]
        fn percentiles_are_near_the_truth(mut samples in proptest::collection::vec(0u64..1 << 40, 1..400)) {
            let latency = Latency::default();
            for &ns in &samples {
                latency.record(Duration::from_nanos(ns));
            }
            samples.sort_unstable();
            let got = latency.percentiles();
            for (percent, value) in [(50, got.p50), (90, got.p90), (99, got.p99)] {
                let truth = samples[(samples.len() * percent).div_ceil(100) - 1];
                prop_assert!(value >= truth && value - truth <= truth / PARTS as u64, "p{percent}: {value} for {truth}");
            }
            prop_assert_eq!(got.max, *samples.last().unwrap());
            prop_assert_eq!(got.count, samples.len() as u64);
        }
    }

    #[test]
    fn empty_and_extreme() {
        let latency = Latency::default();
        assert_eq!(latency.percentiles(), Percentiles::default());
        latency.record(Duration::MAX);
        assert_eq!(latency.percentiles().max, u64::MAX);
        assert_eq!(latency.percentiles().p50, u64::MAX);
        latency.reset();
        assert_eq!(latency.percentiles(), Percentiles::default());
    }

    #[test]
    fn nothing_is_lost_between_threads() {
        let latency = Latency::default();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let latency = &latency;
                scope.spawn(move || {
                    (0..10_000).for_each(|i| latency.record(Duration::from_nanos(i * thread)))
                });
            }
        });
        assert_eq!(latency.percentiles().count, 40_000);
        assert_eq!(latency.percentiles().max, 3 * 9_999);
    }
}
