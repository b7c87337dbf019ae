//! Nothing migrates by itself: the device reaches every page over the link, as Intel's driver does with host USM.
//! Atomics, which most links cannot do, and explicit prefetches still migrate.

use crate::space::ports::{Facts, GpuAccess, Placement, Policy, Return};

/// See the module.
#[derive(Debug)]
pub struct Remote;

impl Policy for Remote {
    fn name(&self) -> &'static str {
        "remote"
    }

    fn gpu_access(&self, facts: &Facts<'_>) -> Placement {
        if facts.access == GpuAccess::Atomic { Placement::Migrate } else { Placement::Remote }
    }

    fn cpu_fault(&self, _facts: &Facts<'_>) -> Return {
        Return::Range
    }
}
