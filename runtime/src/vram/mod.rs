//! The vram floor.
