//! Chunk sizes: which block around an address becomes a range.
//!
//! # Overview
//! A range is an aligned block of one of the space's chunk sizes. [`Chunks`] holds the sizes, largest first, and says
//! which of their blocks around an address fit a mapping, a notifier and the device's limits: the geometric half of
//! drm_gpusvm_range_chunk_size. The other half, existing ranges and populated pages, needs the tree and the process
//! and is in [`super::Space::find_or_insert`].
//!
//! The same sizes shape the lookup tree: `Levels` is the list of block sizes its nodes divide a notifier into.
//!
//! # Limits
//! Sizes are powers of two, strictly descending, and end with 4 KiB. A size above the notifier's is accepted, as in the
//! kernel, and never fits.

use crate::ground::addr::{SZ_4K, Span};
use crate::ground::error::{Error, Result};

/// Slots of the largest tree node, as a power of two.
const MAX_FANOUT_BITS: u32 = 9;

/// The end of the largest address space this can mirror (five page-table levels).
pub const MAX_ADDRESS: u64 = 1 << 57;

/// A size that fits around an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Candidate {
    /// Its place in the list of sizes.
    pub index: usize,
    /// The block.
    pub span: Span,
}

/// The chunk sizes of a space, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunks {
    sizes: Box<[u64]>,
}

impl Chunks {
    /// Checks `sizes`: powers of two, strictly descending, the last 4 KiB.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the first size that is wrong.
    pub fn new(sizes: &[u64]) -> Result<Self> {
        let wrong = |reason: String| Err(Error::Invalid { argument: "chunk_sizes", reason });
        if let Some(odd) = sizes.iter().find(|s| !s.is_power_of_two() || **s > MAX_ADDRESS) {
            return wrong(format!("{odd:#x} is not a power of two up to {MAX_ADDRESS:#x}"));
        }
        if let Some(pair) = sizes.windows(2).find(|p| p[0] <= p[1]) {
            return wrong(format!("{:#x} is followed by {:#x}; they must descend", pair[0], pair[1]));
        }
        if sizes.last() != Some(&SZ_4K) {
            return wrong(format!("the last must be {SZ_4K:#x}"));
        }
        Ok(Self { sizes: sizes.into() })
    }

    /// The sizes in bytes, largest first.
    pub fn sizes(&self) -> &[u64] {
        &self.sizes
    }

    /// The blocks around `addr` that lie in every one of `bounds`, largest first, from the `from`th size on.
    pub(super) fn fitting<'a>(
        &'a self,
        addr: u64,
        bounds: &'a [Span],
        from: usize,
    ) -> impl Iterator<Item = Candidate> + 'a {
        let sizes = self.sizes.iter().enumerate().skip(from);
        sizes
            .map(move |(index, &size)| Candidate { index, span: Span::around(addr, size) })
            .filter(move |c| bounds.iter().all(|b| b.covers(c.span)))
    }
}

/// One level of the tree: how a block of the level above is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Level {
    /// log2 of a slot's bytes.
    pub shift: u8,
    /// Slots in a node, minus one.
    pub mask: u16,
}

impl Level {
    /// The slot of its node that holds `addr`.
    #[inline]
    pub fn slot(self, addr: u64) -> usize {
        (addr >> self.shift) as usize & self.mask as usize
    }

    /// Slots in a node.
    pub fn slots(self) -> usize {
        self.mask as usize + 1
    }

    /// Bytes of a slot.
    #[inline]
    pub fn size(self) -> u64 {
        1 << self.shift
    }
}

/// The block sizes a notifier is divided into, from the whole notifier (level 0, one slot) to 4 KiB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Levels {
    levels: Box<[Level]>,
}

impl Levels {
    /// One level for each chunk size that fits a notifier, and more between them where a node would have over 512
    /// slots. `notifier_size` is a power of two of at least 4 KiB.
    pub fn new(notifier_size: u64, chunks: &Chunks) -> Self {
        let mut above = notifier_size.trailing_zeros();
        let mut levels = vec![Level { shift: above as u8, mask: 0 }];
        for size in chunks.sizes().iter().filter(|s| **s < notifier_size) {
            let below = size.trailing_zeros();
            for steps in (1..=(above - below).div_ceil(MAX_FANOUT_BITS)).rev() {
                let bits = (above - below).div_ceil(steps);
                above -= bits;
                levels.push(Level { shift: above as u8, mask: ((1u32 << bits) - 1) as u16 });
            }
        }
        Self { levels: levels.into() }
    }

    /// The levels, the whole notifier first.
    #[inline]
    pub fn as_slice(&self) -> &[Level] {
        &self.levels
    }

    /// The level whose slots have `size` bytes.
    pub fn of_size(&self, size: u64) -> Option<usize> {
        self.levels.iter().position(|l| l.size() == size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ground::addr::{SZ_2M, SZ_64K};

    const SZ_512M: u64 = 512 << 20;

    #[test]
    fn sizes_are_checked() {
        assert!(Chunks::new(&[SZ_2M, SZ_64K, SZ_4K]).is_ok());
        assert!(Chunks::new(&[SZ_4K]).is_ok());
        for bad in
            [&[][..], &[SZ_2M], &[SZ_4K, SZ_4K], &[SZ_64K, SZ_2M, SZ_4K], &[3 * SZ_4K, SZ_4K], &[0, SZ_4K]]
        {
            assert_eq!(Chunks::new(bad).unwrap_err().errno(), libc::EINVAL, "{bad:?}");
        }
    }

    #[test]
    fn only_blocks_inside_every_bound_fit() {
        let chunks = Chunks::new(&[SZ_2M, SZ_64K, SZ_4K]).unwrap();
        let vma = Span::new(SZ_2M + SZ_4K, 4 * SZ_2M);
        let all = Span::new(0, MAX_ADDRESS);
        let fit = |addr, bounds: &[Span], from| {
            chunks.fitting(addr, bounds, from).map(|c| c.span.len()).collect::<Vec<_>>()
        };
        assert_eq!(fit(2 * SZ_2M, &[vma, all], 0), [SZ_2M, SZ_64K, SZ_4K]);
        assert_eq!(fit(2 * SZ_2M, &[vma, all], 1), [SZ_64K, SZ_4K]);
        assert_eq!(fit(SZ_2M + SZ_64K, &[vma, all], 0), [SZ_64K, SZ_4K]);
        assert_eq!(fit(SZ_2M + SZ_4K, &[vma, all], 0), [SZ_4K]);
        assert_eq!(fit(SZ_2M, &[vma, all], 0), [0; 0]);
    }

    #[test]
    fn levels_hold_every_chunk_and_no_large_node() {
        let gig = 1 << 30;
        let configs: [&[u64]; 5] =
            [&[SZ_2M, SZ_64K, SZ_4K], &[SZ_4K], &[gig, SZ_2M, SZ_4K], &[SZ_64K, SZ_4K], &[2 * SZ_4K, SZ_4K]];
        for sizes in configs {
            let chunks = Chunks::new(sizes).unwrap();
            for shift in 12..=57 {
                let levels = Levels::new(1 << shift, &chunks);
                let slice = levels.as_slice();
                assert_eq!((slice[0].shift, slice[0].mask), (shift, 0));
                assert_eq!(slice.last().unwrap().size(), SZ_4K);
                for pair in slice.windows(2) {
                    assert_eq!(pair[1].slots() as u64 * pair[1].size(), pair[0].size(), "{slice:?}");
                    assert!((2..=512).contains(&pair[1].slots()));
                }
                for size in sizes.iter().filter(|s| **s <= 1 << shift) {
                    assert!(levels.of_size(*size).is_some(), "{size:#x} in {slice:?}");
                }
            }
        }
        let usual = Levels::new(SZ_512M, &Chunks::new(&[SZ_2M, SZ_64K, SZ_4K]).unwrap());
        assert_eq!(usual.as_slice().iter().map(|l| l.slots()).collect::<Vec<_>>(), [1, 256, 32, 16]);
    }
}
