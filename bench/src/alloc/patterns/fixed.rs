//! glibc's bench-malloc-simple: rows of equal blocks on one thread.

use super::super::heap::{Block, Heap};

/// For sizes of 16 to 4096 bytes: rows of 25, 100, 400 and 1600 blocks, freed oldest first and newest first.
pub fn simple(heap: Heap, _: usize) -> u64 {
    const BLOCKS_EACH: usize = 100_000;
    let mut row: Vec<Block> = Vec::with_capacity(1600);
    let mut sum = 0;
    for size in [16, 32, 64, 128, 256, 512, 1024, 2048, 4096] {
        for count in [25, 100, 400, 1600] {
            for turn in 0..BLOCKS_EACH / count {
                row.extend((0..count).map(|_| heap.block(size)));
                sum += (row.len() * size) as u64;
                if turn % 2 == 0 {
                    row.drain(..).for_each(|b| heap.free(b));
                } else {
                    row.drain(..).rev().for_each(|b| heap.free(b));
                }
            }
        }
    }
    sum
}
