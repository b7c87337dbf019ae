//! Timeslice: how long a range stays on the device after it arrived.
//!
//! # Overview
//! The kernel refuses to bring a range back to the CPU before a fixed time since its migration has passed
//! (timeslice_expiration in drm_gpusvm_devmem). Here the time adapts: it doubles each time the range goes back to the
//! device soon after the CPU pulled it away, because that is a ping-pong, and halves when it stayed calm for longer.
//! A [`Timeslice`] is a pure state machine of one range; time comes in as an argument, from any monotonic start.
//!
//! # Limits
//! It decides nothing: whoever serves the CPU's fault asks [`Timeslice::remaining`] and waits or overrides. Slices are
//! kept in microseconds, at most a little over an hour.

use std::time::Duration;

/// The times that govern all ranges of a space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// The slice of a range that never ping-ponged.
    pub min: Duration,
    /// The longest slice.
    pub cap: Duration,
    /// A range that returns to the device within this time after leaving it ping-pongs; one that takes longer is calm.
    pub calm: Duration,
}

impl Default for Rule {
    fn default() -> Self {
        Self {
            min: Duration::from_millis(1),
            cap: Duration::from_millis(64),
            calm: Duration::from_millis(100),
        }
    }
}

/// Where a range is, as far as its timeslice knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum At {
    /// Never been on the device.
    #[default]
    Fresh,
    /// On the device since then.
    Device(Duration),
    /// Pulled back by the CPU then.
    Host(Duration),
}

/// The state of one range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timeslice {
    at: At,
    slice_us: u32,
    pongs: u32,
}

impl Timeslice {
    /// The range arrived on the device at `now`. Gives its slice from now on, between the rule's `min` and `cap`.
    pub fn arrive(&mut self, rule: &Rule, now: Duration) -> Duration {
        let slice = match self.at {
            At::Host(left) if now.saturating_sub(left) < rule.calm => {
                self.pongs = self.pongs.saturating_add(1);
                self.slice().saturating_mul(2)
            }
            At::Host(_) => self.slice() / 2,
            At::Fresh | At::Device(_) => self.slice(),
        };
        let slice = slice.min(rule.cap).max(rule.min);
        self.slice_us = slice.as_micros().try_into().unwrap_or(u32::MAX);
        self.at = At::Device(now);
        self.slice()
    }

    /// The CPU got the range back at `now`, whether the slice had passed or not.
    pub fn leave(&mut self, now: Duration) {
        if let At::Device(_) = self.at {
            self.at = At::Host(now);
        }
    }

    /// How long the range has still to stay; zero when it may leave or is not on the device.
    pub fn remaining(&self, now: Duration) -> Duration {
        match self.at {
            At::Device(since) => since.saturating_add(self.slice()).saturating_sub(now),
            At::Fresh | At::Host(_) => Duration::ZERO,
        }
    }

    /// The slice it was last given.
    pub fn slice(&self) -> Duration {
        Duration::from_micros(self.slice_us.into())
    }

    /// How often it ping-ponged, for statistics.
    pub fn pongs(&self) -> u32 {
        self.pongs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn doubles_on_ping_pong_up_to_the_cap_and_halves_after_calm() {
        let rule = Rule { min: 2 * MS, cap: 9 * MS, calm: 10 * MS };
        let mut t = Timeslice::default();
        let mut now = MS;
        assert_eq!(t.remaining(now), Duration::ZERO);
        assert_eq!(t.arrive(&rule, now), 2 * MS);
        for slice in [4, 8, 9, 9] {
            now += MS;
            t.leave(now);
            assert_eq!(t.remaining(now), Duration::ZERO);
            now += rule.calm - Duration::from_nanos(1);
            assert_eq!(t.arrive(&rule, now), slice * MS);
        }
        assert_eq!(t.pongs(), 4);
        for slice_us in [4500, 2250, 2000, 2000] {
            now += MS;
            t.leave(now);
            now += rule.calm;
            assert_eq!(t.arrive(&rule, now), Duration::from_micros(slice_us));
        }
        assert_eq!(t.pongs(), 4);
    }

    #[test]
    fn stays_for_its_slice_and_no_longer() {
        let rule = Rule { min: 5 * MS, cap: 5 * MS, calm: MS };
        let mut t = Timeslice::default();
        t.arrive(&rule, 100 * MS);
        assert_eq!(t.remaining(100 * MS), 5 * MS);
        assert_eq!(t.remaining(104 * MS), MS);
        assert_eq!(t.remaining(105 * MS), Duration::ZERO);
        // A second arrival (more of the range came) starts the time again without being a ping-pong.
        assert_eq!(t.arrive(&rule, 106 * MS), 5 * MS);
        assert_eq!(t.remaining(107 * MS), 4 * MS);
        assert_eq!(t.pongs(), 0);
    }

    proptest! {
        #[test]
        fn never_outside_its_bounds(
            min in 0u64..5000, more in 0u64..500_000, calm in 0u64..10_000,
            steps in proptest::collection::vec((any::<bool>(), 0u64..20_000), 0..60),
        ) {
            let us = Duration::from_micros;
            let rule = Rule { min: us(min), cap: us(min + more), calm: us(calm) };
            let (mut t, mut now) = (Timeslice::default(), Duration::ZERO);
            for (arrive, wait) in steps {
                now += us(wait);
                if arrive {
                    let slice = t.arrive(&rule, now);
                    prop_assert!(rule.min <= slice && slice <= rule.cap);
                    prop_assert_eq!(t.remaining(now), slice);
                } else {
                    t.leave(now);
                    prop_assert_eq!(t.remaining(now), Duration::ZERO);
                }
            }
        }
    }
}
