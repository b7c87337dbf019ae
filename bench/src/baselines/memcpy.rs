//! `memcpy_2m`: the C library's memcpy of 2 MiB between warm huge pages.
//!
//! # Safety
//! Calls memcpy on slots of two buffers that the baseline owns.
#![allow(unsafe_code)]

use super::time;
use crate::case::Result;
use crate::memory::{Pages, SLOT, Slots};

/// The baseline.
#[derive(Debug)]
pub struct Memcpy2m {
    from: Slots,
    to: Slots,
}

impl Memcpy2m {
    /// Its name.
    pub const NAME: &'static str = "memcpy_2m";

    /// Huge pages on both sides.
    pub fn new() -> Result<Self> {
        Ok(Self { from: Slots::new(Pages::Huge)?, to: Slots::new(Pages::Huge)? })
    }

    /// One copy; microseconds.
    pub fn sample(&mut self) -> f64 {
        let (to, from) = (self.to.next(), self.from.next());
        // SAFETY: both are slots of SLOT bytes of two different buffers. libc's own function, so that the compiler
        // cannot see through the call.
        time(|| unsafe {
            libc::memcpy(to.cast(), from.cast(), SLOT);
        })
    }
}
