//! Statistics: the same names in C, in JSON and in `usvm top`.
//!
//! # Overview
//! [`Stats`] is one relaxed atomic per name, each in its own cache line. [`Stats::snapshot`] reads them into a
//! [`StatsSnapshot`], which begins with its size and version so that it can cross the C interface.
//!
//! Counters are not sharded by thread. They change a few times per fault or migration, which takes tens of
//! microseconds; an increment costs 2 ns alone and 3 to 8 ns when two threads fight for the line (2-core VM, 2.6 GHz), so
//! sharding would only make reading dearer.
//!
//! # Locking
//! None. Numbers of one snapshot are read one after the other: under load they may differ by what happened meanwhile.
//!
//! # Limits
//! Counters only grow, until [`Stats::reset`] returns them to zero. The three gauges (`resident_device_bytes`,
//! `resident_shared_bytes`, `retained_host_bytes`) tell what is so now and survive a reset.

use super::latency::Latency;
use crate::ground::addr::{SZ_2M, SZ_64K};
use crossbeam_utils::CachePadded;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

macro_rules! statistics {
    (
        counters { $($(#[$cdoc:meta])* $counter:ident = $cvariant:ident: $cunit:ident,)* }
        gauges { $($(#[$gdoc:meta])* $gauge:ident = $gvariant:ident: $gunit:ident,)* }
        faults { $($(#[$fdoc:meta])* $fault:ident = $fpercentile:ident,)* }
    ) => {
        /// What only grows.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(usize)]
        pub enum Counter { $($(#[$cdoc])* $cvariant,)* }

        /// What is so now.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(usize)]
        pub enum Gauge { $($(#[$gdoc])* $gvariant,)* }

        const COUNTERS: usize = [$(Counter::$cvariant),*].len();
        const GAUGES: usize = [$(Gauge::$gvariant),*].len();

        /// The statistics at one moment. Times are in microseconds, rounded up.
        /// What a file of another version lacks reads as zero.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
        #[serde(default)]
        #[repr(C)]
        pub struct StatsSnapshot {
            /// Bytes of this structure.
            pub size: u64,
            /// [`StatsSnapshot::VERSION`]; grows when the layout changes.
            pub version: u64,
            $($(#[$cdoc])* pub $counter: u64,)*
            $($(#[$gdoc])* pub $gauge: u64,)*
            $($(#[$fdoc])* pub $fault: u64,)*
        }

        impl StatsSnapshot {
            /// The numbers with their names and units, in the order of the structure.
            pub fn rows(&self) -> Vec<Row> {
                vec![
                    $(Row { name: stringify!($counter), value: self.$counter, unit: Unit::$cunit },)*
                    $(Row { name: stringify!($gauge), value: self.$gauge, unit: Unit::$gunit },)*
                    $(Row { name: stringify!($fault), value: self.$fault, unit: Unit::Microseconds },)*
                ]
            }
        }

        impl Stats {
            /// All numbers now.
            pub fn snapshot(&self) -> StatsSnapshot {
                let faults = self.faults.percentiles();
                StatsSnapshot {
                    size: size_of::<StatsSnapshot>() as u64,
                    version: StatsSnapshot::VERSION,
                    $($counter: self.get(Counter::$cvariant),)*
                    $($gauge: self.gauge(Gauge::$gvariant),)*
                    $($fault: faults.$fpercentile.div_ceil(1000),)*
                }
            }
        }
    };
}

statistics! {
    counters {
        /// CPU accesses to device-resident memory that waited for usvm.
        cpu_faults = CpuFaults: Count,
        /// Device accesses that found no mapping.
        gpu_faults = GpuFaults: Count,
        /// Host mapping changes that took device mappings away.
        invalidations = Invalidations: Count,
        /// Bytes copied from host memory to device memory.
        bytes_to_device = BytesToDevice: Bytes,
        /// Bytes copied from device memory to host memory.
        bytes_to_host = BytesToHost: Bytes,
        /// Bytes that moved without a copy because the copy on the other side was still good.
        bytes_saved_clean = BytesSavedClean: Bytes,
        /// Bytes that were not copied because only the dirty pages of their range were.
        bytes_saved_delta = BytesSavedDelta: Bytes,
        /// Ranges of 4 KiB (to less than 64 KiB) that migrated.
        migrations_4k = Migrations4k: Count,
        /// Ranges of 64 KiB (to less than 2 MiB) that migrated.
        migrations_64k = Migrations64k: Count,
        /// Ranges of 2 MiB that migrated.
        migrations_2m = Migrations2m: Count,
        /// Ranges that left device memory to make room.
        evictions = Evictions: Count,
        /// Migrations that undid another one within its timeslice.
        thrash_events = ThrashEvents: Count,
        /// Moves of page-table entries between an application address and its shadow.
        flips = Flips: Count,
        /// Moves that a flip could not do and a copy did.
        flip_fallbacks = FlipFallbacks: Count,
        /// Trace events that were lost because the ring was full.
        dropped_events = DroppedEvents: Count,
        /// Migrations caused by a CPU fault.
        cause_cpu_fault = CauseCpuFault: Count,
        /// Migrations caused by a device access or fault.
        cause_gpu_access = CauseGpuAccess: Count,
        /// Migrations that a policy asked for ahead of use.
        cause_prefetch = CausePrefetch: Count,
        /// Migrations that made room.
        cause_evict = CauseEvict: Count,
        /// Migrations that the program asked for by name.
        cause_user = CauseUser: Count,
    }
    gauges {
        /// Bytes of application memory whose only current copy is in device memory.
        resident_device_bytes = ResidentDeviceBytes: Bytes,
        /// Bytes of application memory that host and device both hold.
        resident_shared_bytes = ResidentSharedBytes: Bytes,
        /// Bytes of host memory kept in the shadow for ranges that are on the device.
        retained_host_bytes = RetainedHostBytes: Bytes,
    }
    faults {
        /// Half of the CPU faults were served within this time.
        fault_us_p50 = p50,
        /// Nine tenths of the CPU faults were served within this time.
        fault_us_p90 = p90,
        /// All but a hundredth of the CPU faults were served within this time.
        fault_us_p99 = p99,
        /// The slowest CPU fault.
        fault_us_max = max,
    }
}

/// What a number counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Things.
    Count,
    /// Bytes.
    Bytes,
    /// Microseconds.
    Microseconds,
}

/// One statistic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Its name everywhere.
    pub name: &'static str,
    /// Its value.
    pub value: u64,
    /// What the value counts.
    pub unit: Unit,
}

/// Why a range migrated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Cause {
    /// The CPU touched it.
    CpuFault,
    /// The device touched it, or a launch announced that it would.
    GpuAccess,
    /// The policy expected an access.
    Prefetch,
    /// Room was needed.
    Evict,
    /// The program asked.
    User,
}

impl Cause {
    /// All of them, in order.
    pub const ALL: [Self; 5] = [Self::CpuFault, Self::GpuAccess, Self::Prefetch, Self::Evict, Self::User];

    /// The word in the statistics' names.
    pub fn name(self) -> &'static str {
        match self {
            Self::CpuFault => "cpu_fault",
            Self::GpuAccess => "gpu_access",
            Self::Prefetch => "prefetch",
            Self::Evict => "evict",
            Self::User => "user",
        }
    }

    fn counter(self) -> Counter {
        match self {
            Self::CpuFault => Counter::CauseCpuFault,
            Self::GpuAccess => Counter::CauseGpuAccess,
            Self::Prefetch => Counter::CausePrefetch,
            Self::Evict => Counter::CauseEvict,
            Self::User => Counter::CauseUser,
        }
    }
}

/// Which way data went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Direction {
    /// Host to device.
    ToDevice,
    /// Device to host.
    ToHost,
}

/// Everything counted. Shared freely between threads; nothing in it waits.
#[derive(Debug, Default)]
pub struct Stats {
    counters: [CachePadded<AtomicU64>; COUNTERS],
    gauges: [CachePadded<AtomicU64>; GAUGES],
    faults: Latency,
}

impl Stats {
    /// Adds `n` to a counter.
    #[inline]
    pub fn add(&self, counter: Counter, n: u64) {
        self.counters[counter as usize].fetch_add(n, Relaxed);
    }

    /// A counter now.
    pub fn get(&self, counter: Counter) -> u64 {
        self.counters[counter as usize].load(Relaxed)
    }

    /// Raises a gauge by `n`.
    #[inline]
    pub fn raise(&self, gauge: Gauge, n: u64) {
        self.gauges[gauge as usize].fetch_add(n, Relaxed);
    }

    /// Lowers a gauge by `n`.
    #[inline]
    pub fn lower(&self, gauge: Gauge, n: u64) {
        self.gauges[gauge as usize].fetch_sub(n, Relaxed);
    }

    /// A gauge now. One thread's `lower` may be counted before another's earlier `raise`: what would then be negative
    /// reads as zero.
    pub fn gauge(&self, gauge: Gauge) -> u64 {
        self.gauges[gauge as usize].load(Relaxed).cast_signed().max(0).cast_unsigned()
    }

    /// Counts a CPU fault that took `duration` from its arrival to its answer.
    pub fn cpu_fault(&self, duration: Duration) {
        self.add(Counter::CpuFaults, 1);
        self.faults.record(duration);
    }

    /// Counts the migration of a range of `range` bytes of which `copied` bytes were copied.
    pub fn migration(&self, direction: Direction, range: u64, copied: u64, cause: Cause) {
        self.add(cause.counter(), 1);
        self.add(
            match range {
                SZ_2M.. => Counter::Migrations2m,
                SZ_64K.. => Counter::Migrations64k,
                _ => Counter::Migrations4k,
            },
            1,
        );
        self.add(
            match direction {
                Direction::ToDevice => Counter::BytesToDevice,
                Direction::ToHost => Counter::BytesToHost,
            },
            copied,
        );
    }

    /// Returns counters and fault times to zero; gauges stay.
    pub fn reset(&self) {
        self.counters.iter().for_each(|c| c.store(0, Relaxed));
        self.faults.reset();
    }
}

impl StatsSnapshot {
    /// Version of the layout.
    pub const VERSION: u64 = 1;

    /// One JSON object with the names above.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a structure of numbers is always JSON")
    }
}

/// A table for people: one line for each number that is not zero, bytes and times with their units.
impl fmt::Display for StatsSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: Vec<_> = self.rows().into_iter().filter(|row| row.value != 0).collect();
        if rows.is_empty() {
            return writeln!(f, "usvm: nothing happened");
        }
        for row in rows {
            writeln!(f, "{:<24}{:>16}", row.name, row.unit.show(row.value))?;
        }
        Ok(())
    }
}

impl Unit {
    /// `value` with this unit, short.
    pub fn show(self, value: u64) -> String {
        match self {
            Self::Count => value.to_string(),
            Self::Microseconds => format!("{value} us"),
            Self::Bytes => show_bytes(value),
        }
    }
}

fn show_bytes(value: u64) -> String {
    let units = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.into_iter().find(|&(size, _)| value >= size) {
        Some((size, name)) => format!("{:.1} {name}", value as f64 / size as f64),
        None => format!("{value} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names that users rely on.
    const NAMES: [&str; 27] = [
        "cpu_faults",
        "gpu_faults",
        "invalidations",
        "bytes_to_device",
        "bytes_to_host",
        "bytes_saved_clean",
        "bytes_saved_delta",
        "migrations_4k",
        "migrations_64k",
        "migrations_2m",
        "evictions",
        "thrash_events",
        "flips",
        "flip_fallbacks",
        "resident_device_bytes",
        "resident_shared_bytes",
        "retained_host_bytes",
        "fault_us_p50",
        "fault_us_p90",
        "fault_us_p99",
        "fault_us_max",
        "dropped_events",
        "cause_cpu_fault",
        "cause_gpu_access",
        "cause_prefetch",
        "cause_evict",
        "cause_user",
    ];

    #[test]
    fn exactly_these_names() {
        let json: serde_json::Value = serde_json::from_str(&Stats::default().snapshot().to_json()).unwrap();
        let mut got: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        let mut want: Vec<_> = NAMES.into_iter().chain(["size", "version"]).collect();
        got.sort_unstable();
        want.sort_unstable();
        assert_eq!(got, want);
        assert_eq!(json["size"], size_of::<StatsSnapshot>());
        assert_eq!(size_of::<StatsSnapshot>(), 8 * (NAMES.len() + 2), "no padding");
    }

    #[test]
    fn json_reads_back() {
        let stats = Stats::default();
        stats.add(Counter::GpuFaults, 4);
        let taken = stats.snapshot();
        assert_eq!(serde_json::from_str::<StatsSnapshot>(&taken.to_json()).unwrap(), taken);
        let foreign = r#"{"version": 9, "gpu_faults": 3, "name_of_tomorrow": 1}"#;
        let read: StatsSnapshot = serde_json::from_str(foreign).unwrap();
        assert_eq!((read.version, read.gpu_faults, read.cpu_faults), (9, 3, 0));
    }

    #[test]
    fn a_migration_counts_size_bytes_and_cause() {
        let stats = Stats::default();
        stats.migration(Direction::ToDevice, SZ_2M, 8192, Cause::GpuAccess);
        stats.migration(Direction::ToHost, SZ_64K, SZ_64K, Cause::CpuFault);
        stats.migration(Direction::ToHost, 4096, 0, Cause::Evict);
        let got = stats.snapshot();
        assert_eq!((got.migrations_2m, got.migrations_64k, got.migrations_4k), (1, 1, 1));
        assert_eq!((got.bytes_to_device, got.bytes_to_host), (8192, SZ_64K));
        assert_eq!((got.cause_gpu_access, got.cause_cpu_fault, got.cause_evict), (1, 1, 1));
        assert_eq!((got.cause_user, got.cause_prefetch), (0, 0));
    }

    #[test]
    fn causes_are_named_as_their_statistics() {
        for cause in Cause::ALL {
            let stats = Stats::default();
            stats.migration(Direction::ToHost, 4096, 4096, cause);
            let name = format!("cause_{}", cause.name());
            assert!(stats.snapshot().rows().iter().any(|row| row.name == name && row.value == 1), "{name}");
        }
    }

    #[test]
    fn reset_keeps_gauges() {
        let stats = Stats::default();
        stats.raise(Gauge::ResidentDeviceBytes, 3 * SZ_2M);
        stats.lower(Gauge::ResidentDeviceBytes, SZ_2M);
        stats.add(Counter::Flips, 5);
        stats.cpu_fault(Duration::from_nanos(52_300));
        let before = stats.snapshot();
        assert_eq!((before.flips, before.cpu_faults, before.fault_us_max), (5, 1, 53));
        stats.reset();
        let after = stats.snapshot();
        assert_eq!(after.resident_device_bytes, 2 * SZ_2M);
        assert_eq!((after.flips, after.cpu_faults, after.fault_us_max, after.fault_us_p50), (0, 0, 0, 0));
        stats.lower(Gauge::ResidentDeviceBytes, 3 * SZ_2M);
        assert_eq!(stats.snapshot().resident_device_bytes, 0, "never a huge number");
    }

    #[test]
    fn threads_lose_nothing() {
        let stats = Stats::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        stats.migration(Direction::ToDevice, SZ_2M, 3, Cause::User);
                    }
                });
            }
        });
        let got = stats.snapshot();
        assert_eq!((got.migrations_2m, got.bytes_to_device, got.cause_user), (40_000, 120_000, 40_000));
    }

    #[test]
    fn people_can_read_it() {
        let stats = Stats::default();
        assert_eq!(stats.snapshot().to_string(), "usvm: nothing happened\n");
        stats.add(Counter::BytesToHost, 5 * SZ_2M / 2);
        stats.add(Counter::Evictions, 7);
        let text = stats.snapshot().to_string();
        assert_eq!(text.lines().count(), 2, "zeroes are left out");
        assert!(text.contains("5.0 MiB") && text.lines().last().unwrap().ends_with(" 7"));
        assert_eq!(show_bytes(1023), "1023 B");
    }
}
