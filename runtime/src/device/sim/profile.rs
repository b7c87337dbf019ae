//! Profiles of real devices, and the time that they would have taken.
//!
//! # Overview
//! The simulated device runs at the speed of the machine it runs on. A [`Profile`] says what a real one
//! costs, and a ledger counts what was moved, so that [`Modelled`] can say how long that would have taken
//! there. Modelled time is a sum of costs, never a measurement, and is never mixed with one: everything that
//! shows it must call it modelled.
//!
//! # Limits
//! No overlap, no contention, no latency of single accesses: each part is bytes over bandwidth (an access is
//! of whole lines of 64 bytes) or a count times a cost. Nothing overlaps, so the parts may add up to more than
//! a real device would take.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a device costs. Bandwidths are in gigabytes (10⁹ bytes) per second, one direction; times in
/// microseconds.
///
/// Where the numbers come from: bandwidths are the vendor's published peak figures (product pages). Links are
/// PCI Express peak rates after line coding: 4.0 ×8 15.75, 4.0 ×16 31.5, 5.0 ×16 63.0. Of faults, one
/// breakdown is published for Intel's driver, on Battlemage: 132 µs for 2 MiB with huge device pages, of
/// which the copy is 106 (F. Dugast, dri-devel, January 2026); the 26 that are left are used for every Intel
/// profile. A submission through the GuC is about 30 µs (intel-xe list, March 2026).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Profile {
    /// Name for people and for `USVM_DEVICE=sim:<name>`.
    pub name: &'static str,
    /// Link bandwidth, GB/s.
    pub link_gbps: f64,
    /// Device-memory bandwidth, GB/s.
    pub vram_gbps: f64,
    /// One recoverable fault without its copy, µs.
    pub fault_us: f64,
    /// One submission of work, µs.
    pub submit_us: f64,
    /// Whether the real device has recoverable faults with its upstream driver.
    pub recoverable_faults: bool,
}

impl Profile {
    /// The constants of the UVM simulation literature (gpgpu-sim UVMSmart): PCIe 3.0 ×16 at 16 GB/s, a far
    /// fault of 45 µs; a GTX 1080 Ti's 484 GB/s of memory, and the submission cost of the others.
    pub const GENERIC: Self = Self {
        name: "generic",
        link_gbps: 16.0,
        vram_gbps: 484.0,
        fault_us: 45.0,
        submit_us: 30.0,
        recoverable_faults: true,
    };
    /// Arc A770 16 GB: PCIe 4.0 ×16, 256-bit GDDR6 at 17.5 Gbit/s. DG2 has no recoverable faults; the fault
    /// cost counts only where a simulation switches them on.
    pub const ARC_A770: Self = Self {
        name: "arc-a770",
        link_gbps: 31.5,
        vram_gbps: 560.0,
        fault_us: 26.0,
        submit_us: 30.0,
        recoverable_faults: false,
    };
    /// Arc B580: PCIe 4.0 ×8, 192-bit GDDR6 at 19 Gbit/s.
    pub const ARC_B580: Self = Self {
        name: "arc-b580",
        link_gbps: 15.75,
        vram_gbps: 456.0,
        fault_us: 26.0,
        submit_us: 30.0,
        recoverable_faults: true,
    };
    /// Data Center GPU Flex 170: a DG2, PCIe 4.0 ×16, 256-bit GDDR6 at 18 Gbit/s.
    pub const FLEX_170: Self = Self {
        name: "flex-170",
        link_gbps: 31.5,
        vram_gbps: 576.0,
        fault_us: 26.0,
        submit_us: 30.0,
        recoverable_faults: false,
    };
    /// Data Center GPU Max 1550: PCIe 5.0 ×16, 128 GB of HBM2e on two stacks.
    pub const MAX_1550: Self = Self {
        name: "max-1550",
        link_gbps: 63.0,
        vram_gbps: 3276.8,
        fault_us: 26.0,
        submit_us: 30.0,
        recoverable_faults: true,
    };
    /// Every profile, the default first.
    pub const ALL: [Self; 5] =
        [Self::GENERIC, Self::ARC_A770, Self::ARC_B580, Self::FLEX_170, Self::MAX_1550];

    /// The profile of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.name == name)
    }
}

/// Modelled nanoseconds: what the profile's device would have taken. Never a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Modelled {
    /// Host to device copies, over the link.
    pub upload_ns: u64,
    /// Device to host copies, over the link.
    pub download_ns: u64,
    /// Zeroing device memory.
    pub clear_ns: u64,
    /// Recoverable faults, without their copies.
    pub fault_ns: u64,
    /// Submissions to the engines.
    pub submit_ns: u64,
    /// The engines' own loads and stores of device memory.
    pub local_ns: u64,
    /// The engines' own loads and stores of system memory, over the link.
    pub remote_ns: u64,
}

impl Modelled {
    /// The sum, as if nothing overlapped.
    pub fn total_ns(&self) -> u64 {
        let parts = [self.upload_ns, self.download_ns, self.clear_ns, self.fault_ns];
        let more = [self.submit_ns, self.local_ns, self.remote_ns];
        parts.iter().chain(&more).sum()
    }
}

/// What the device did that is not an engine's access.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    pub(super) uploaded: Tally,
    pub(super) downloaded: Tally,
    pub(super) cleared: Tally,
    pub(super) submitted: Tally,
}

/// A sum that any thread may add to.
#[derive(Debug, Default)]
pub(super) struct Tally(AtomicU64);

impl Tally {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Profile {
    /// Nanoseconds for `bytes` at `gbps`: 1 GB/s is one byte per nanosecond.
    fn moving(bytes: u64, gbps: f64) -> u64 {
        (bytes as f64 / gbps).round() as u64
    }

    /// Nanoseconds for `count` times `us`.
    fn events(count: u64, us: f64) -> u64 {
        (count as f64 * us * 1000.0).round() as u64
    }

    /// The modelled time of what `ledger` and the engines' sums say.
    pub(super) fn model(&self, ledger: &Ledger, faults: u64, local: u64, remote: u64) -> Modelled {
        Modelled {
            upload_ns: Self::moving(ledger.uploaded.get(), self.link_gbps),
            download_ns: Self::moving(ledger.downloaded.get(), self.link_gbps),
            clear_ns: Self::moving(ledger.cleared.get(), self.vram_gbps),
            fault_ns: Self::events(faults, self.fault_us),
            submit_ns: Self::events(ledger.submitted.get(), self.submit_us),
            local_ns: Self::moving(local, self.vram_gbps),
            remote_ns: Self::moving(remote, self.link_gbps),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_are_found_by_name() {
        for p in Profile::ALL {
            assert_eq!(Profile::named(p.name), Some(p));
            assert!(p.link_gbps < p.vram_gbps);
        }
        assert_eq!(Profile::named("arc"), None);
    }

    #[test]
    fn modelled_time_is_bytes_over_bandwidth_and_counts_times_costs() {
        let ledger = Ledger::default();
        ledger.uploaded.add(31_500_000);
        ledger.downloaded.add(63_000);
        ledger.cleared.add(560_000);
        ledger.submitted.add(3);
        let m = Profile::ARC_A770.model(&ledger, 2, 5600, 315);
        let want = Modelled {
            upload_ns: 1_000_000,
            download_ns: 2000,
            clear_ns: 1000,
            fault_ns: 52_000,
            submit_ns: 90_000,
            local_ns: 10,
            remote_ns: 10,
        };
        assert_eq!(m, want);
        assert_eq!(m.total_ns(), 1_145_020);
    }
}
