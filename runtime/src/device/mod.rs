//! The device floor.
