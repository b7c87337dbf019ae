//! The observe floor.
