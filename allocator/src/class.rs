//! The sizes of small blocks: multiples of 16 bytes up to 128, then four for each doubling, up to 32 KiB.
//!
//! A size that is a multiple of a power of two gets a class that is one too, so rounding a size up to its alignment
//! is all that an aligned block needs.

/// The step of sizes and alignments.
pub(crate) const GRANULE: usize = 16;
/// The largest small block.
pub(crate) const LARGEST: usize = 32 << 10;
/// How many classes there are.
pub(crate) const CLASSES: usize = number(LARGEST) + 1;

const fn number(size: usize) -> usize {
    let granules = size.div_ceil(GRANULE);
    if granules <= 8 {
        return granules.saturating_sub(1);
    }
    let top = (granules - 1).ilog2() as usize;
    8 + (top - 3) * 4 + ((granules - 1 - (1 << top)) >> (top - 2))
}

static NUMBERS: [u8; LARGEST / GRANULE + 1] = {
    let mut table = [0; LARGEST / GRANULE + 1];
    let mut granules = 0;
    while granules < table.len() {
        table[granules] = number(granules * GRANULE) as u8;
        granules += 1;
    }
    table
};

const SIZES: [u16; CLASSES] = {
    let mut table = [0; CLASSES];
    let mut size = GRANULE;
    while size <= LARGEST {
        // The largest size with this number comes last.
        table[number(size)] = size as u16;
        size += GRANULE;
    }
    table
};

/// The class of blocks of `size` bytes, at most [`LARGEST`].
#[inline(always)]
pub(crate) fn of(size: usize) -> usize {
    NUMBERS[size.div_ceil(GRANULE)] as usize
}

/// The bytes of a block of this class.
#[inline]
pub(crate) const fn size(class: usize) -> usize {
    SIZES[class] as usize
}

/// The granules of a block of this class.
#[inline]
pub(crate) const fn granules(class: usize) -> usize {
    SIZES[class] as usize / GRANULE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_fits_and_wastes_little() {
        for wanted in 0..=LARGEST {
            let got = size(of(wanted));
            assert!(got >= wanted && got.is_multiple_of(GRANULE), "{got} for {wanted}");
            assert!(got <= wanted + 16 || got * 4 <= wanted * 5, "{got} for {wanted}");
            assert!(of(wanted) == 0 || size(of(wanted) - 1) < wanted, "{wanted} fits a smaller class");
        }
        assert_eq!((CLASSES, size(CLASSES - 1)), (40, LARGEST));
    }

    #[test]
    fn rounding_up_to_an_alignment_aligns_the_class() {
        for shift in 0..=15 {
            let align = 1usize << shift;
            for multiple in 1..=LARGEST / align {
                assert!(
                    size(of(multiple * align)).is_multiple_of(align.max(GRANULE)),
                    "{multiple} x {align}"
                );
            }
        }
    }
}
