//! The vram floor: device memory as a resource.
//!
//! # Overview
//! [`buddy`] hands out offsets of a region and touches no memory; [`copy`] moves bytes as fast as the processor can.

pub mod buddy;
pub mod copy;
