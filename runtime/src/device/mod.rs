//! The device floor: what implements [`crate::space::ports::Device`].
//!
//! # Overview
//! Backends are sibling modules. [`sim`] is the embedded default and always built.

pub mod sim;
