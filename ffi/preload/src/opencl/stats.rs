//! What the OpenCL layer counts, and how it is told at exit.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// A count that many threads add to.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counts.
        pub struct Counts {
            $($(#[$doc])* pub $name: Count,)*
        }

        /// Those of this process.
        pub static COUNTS: Counts = Counts { $($name: Count::new(),)* };

        impl Counts {
            fn each(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name.get()),)*].into_iter()
            }
        }
    };
}

counts! {
    /// Loaders that took the layer.
    layers,
    /// Loaders that the program reached through the preloaded library's entry points.
    preloads,
    /// Kernel launches seen.
    launches,
    /// Bytes of the SVM and USM blocks that launches could reach, summed over launches.
    working_set_bytes,
    /// Launches with pointers to memory of the system's allocator.
    system_pointer_launches,
    /// `clSVMAlloc` calls that succeeded.
    svm_allocations,
    /// USM blocks that usvm provided.
    usm_provided,
    /// Their bytes.
    usm_provided_bytes,
    /// USM blocks that the driver provided.
    usm_native,
    /// USM copies and fills that usvm provided.
    usm_commands,
    /// Migrate, map, unmap and advise calls understood as prefetches or advice.
    hints,
    /// Launches whose working set was sent to usvm's device first.
    launches_migrated,
    /// Launches whose working set was held in the host's memory until they were complete.
    launches_held,
    /// Launches whose working set usvm could not take.
    launches_refused,
}

/// Devices seen: handle → what is told of it.
static DEVICES: Mutex<BTreeMap<usize, String>> = Mutex::new(BTreeMap::new());

/// Notes a device that the program uses; `describe` is asked once.
pub fn saw_device(device: usize, describe: impl FnOnce() -> String) {
    let known = DEVICES.lock().unwrap_or_else(|p| p.into_inner()).contains_key(&device);
    if !known {
        let text = describe();
        DEVICES.lock().unwrap_or_else(|p| p.into_inner()).insert(device, text);
    }
}

/// What was seen, for people; empty if the program did not use OpenCL.
pub struct Report;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if COUNTS.layers.get() + COUNTS.preloads.get() == 0 {
            return Ok(());
        }
        // A forked child may have inherited the lock from a thread that does not exist here.
        if let Ok(devices) = DEVICES.try_lock() {
            for text in devices.values() {
                writeln!(f, "opencl_device            {text}")?;
            }
        }
        for (name, count) in COUNTS.each().filter(|(_, count)| *count > 0) {
            writeln!(f, "opencl_{name:<23} {count:>12}")?;
        }
        Ok(())
    }
}
