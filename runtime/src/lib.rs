//! User-space shared virtual memory for GPUs.
//!
//! Any `malloc` pointer works on the device, at the same address; hot data moves into device memory and back by
//! itself; no kernel module is needed. See the repository's `ARCHITECTURE.md` for the floors and the way of a fault.
#![deny(unsafe_code)]

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("usvm needs 64-bit Linux: it stands on userfaultfd");

pub mod device;
pub mod ground;
pub mod host;
pub mod observe;
pub mod policy;
pub mod runtime;
pub mod space;
pub mod vram;

pub use ground::alloc::Routed;
pub use ground::config::Config;
pub use ground::error::{Error, Result};
pub use ground::sync::Fence;
pub use observe::watch::Change;

pub use runtime::{Access, Attributes, Bracket, Builder, Hint, Location, Need, Runtime, protection_changed};
pub use space::ports::GpuAccess;
pub use space::residency::Residence;
