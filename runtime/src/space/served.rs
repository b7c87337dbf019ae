//! Where devices were ever served.
//!
//! # Overview
//! Asked by application threads that changed a protection, before they trouble anybody: most of what mprotect is called
//! for no device ever used. One bit stands for 2 MiB of address space, and for every other 2 MiB that are a multiple of
//! 128 GiB away; it is set before a mapping is looked at and never cleared, so the answer can be wrong in one way only.
//!
//! # Locking
//! None: a device access sets the bit and then asks for the protection, who changed the protection asks for the bit
//! afterwards. One of them sees the other.
//!
//! # Limits
//! A program that used much memory on devices is answered "perhaps" more and more often.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::ground::addr::{SZ_2M, Span};

const BITS: u64 = 1 << 16;

/// The bits.
#[derive(Debug)]
pub(crate) struct Served([AtomicU64; (BITS / 64) as usize]);

impl Default for Served {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; (BITS / 64) as usize])
    }
}

impl Served {
    /// A device is about to be served in `span`.
    pub(crate) fn note(&self, span: Span) {
        self.bits(span).for_each(|(word, bit)| {
            if word.load(Ordering::SeqCst) & bit == 0 {
                word.fetch_or(bit, Ordering::SeqCst);
            }
        });
    }

    /// Whether a device may have been served in `span`.
    pub(crate) fn perhaps(&self, span: Span) -> bool {
        self.bits(span).any(|(word, bit)| word.load(Ordering::SeqCst) & bit != 0)
    }

    fn bits(&self, span: Span) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let units = span.start / SZ_2M..span.end.div_ceil(SZ_2M);
        units.take(BITS as usize).map(|unit| (&self.0[(unit % BITS / 64) as usize], 1 << (unit % 64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_served_is_told_and_its_neighbours_are_not() {
        let served = Served::default();
        let whole = Span::new(0, u64::MAX - SZ_2M);
        assert!(!served.perhaps(whole));
        let span = Span::sized((70 << 30) + 3 * SZ_2M - 4096, 8192);
        served.note(span);
        assert!(served.perhaps(span) && served.perhaps(whole));
        assert!(served.perhaps(Span::sized((70 << 30) + 2 * SZ_2M, 1)));
        assert!(served.perhaps(Span::sized((70 << 30) + 3 * SZ_2M, SZ_2M)));
        assert!(!served.perhaps(Span::sized(70 << 30, 2 * SZ_2M)));
        assert!(!served.perhaps(Span::sized((70 << 30) + 4 * SZ_2M, 100 * SZ_2M)));
        assert!(!served.perhaps(Span::sized((70 << 30) + 3 * SZ_2M, 0)));
    }
}
