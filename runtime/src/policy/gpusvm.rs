//! What the kernel's drivers on drm_gpusvm do: every device access migrates, every CPU access brings the range back.

use crate::space::ports::{Facts, Placement, Policy, Return};

/// See the module.
#[derive(Debug)]
pub struct Gpusvm;

impl Policy for Gpusvm {
    fn name(&self) -> &'static str {
        "gpusvm"
    }

    fn gpu_access(&self, _facts: &Facts<'_>) -> Placement {
        Placement::Migrate
    }

    fn cpu_fault(&self, _facts: &Facts<'_>) -> Return {
        Return::Range
    }
}
