//! The vram floor.

pub mod copy;
