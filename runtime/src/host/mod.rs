//! The host floor.
