//! The vram floor: device memory as a resource.
//!
//! # Overview
//! [`buddy`] hands out offsets of a region and touches no memory.

pub mod buddy;
