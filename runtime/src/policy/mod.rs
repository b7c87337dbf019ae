//! Migration policies: who lives where.
//!
//! # Overview
//! A [`Policy`] answers two questions from facts alone: where does a range go that a device is about to use, and how
//! much of it comes back when the CPU touches it. Each policy is one file.
//!
//! | name | a device access | a CPU access brings back |
//! |---|---|---|
//! | `adaptive` (default) | migrates; shares read-mostly ranges inside brackets; respects a preferred location and `accessed by`; leaves what keeps being evicted at home for a while | the range; smaller and growing blocks once a range has gone back and forth |
//! | `gpusvm` | migrates, as the kernel's drivers do | the range |
//! | `remote` | never migrates | – |
//!
//! # Limits
//! Policies see one range at a time. Prefetching of neighbours is not done yet.

mod adaptive;
mod gpusvm;
mod remote;

use std::sync::Arc;

pub use crate::space::ports::Policy;

use crate::ground::error::{Error, Result};

/// The names [`by_name`] knows, the default first.
pub const NAMES: [&str; 3] = ["adaptive", "gpusvm", "remote"];

/// The policy called `name`.
pub fn by_name(name: &str) -> Result<Arc<dyn Policy>> {
    match name {
        "adaptive" => Ok(Arc::new(adaptive::Adaptive)),
        "gpusvm" => Ok(Arc::new(gpusvm::Gpusvm)),
        "remote" => Ok(Arc::new(remote::Remote)),
        _ => Err(Error::Invalid {
            argument: "policy",
            reason: format!("{name:?} is not one of {}", NAMES.join(", ")),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_name_is_a_policy_of_that_name() {
        for name in NAMES {
            assert_eq!(by_name(name).unwrap().name(), name);
        }
        let message = by_name("lru").err().unwrap().to_string();
        assert!(message.contains("adaptive, gpusvm, remote"), "{message}");
    }
}
