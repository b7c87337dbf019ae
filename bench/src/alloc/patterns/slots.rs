//! Patterns that replace random blocks of a table.

use super::super::heap::{Block, Heap};
use super::{Random, on_threads};
use std::sync::Mutex;

/// larson, with sized frees: each thread replaces random blocks of its table and ends; the next one goes on with the table.
pub fn larson(heap: Heap, threads: usize) -> u64 {
    const SLOTS: usize = 5000;
    const ROUNDS: usize = 8;
    const TURNS: usize = 250_000;
    let tables: Vec<Mutex<Vec<Block>>> = (0..threads)
        .map(|index| {
            let mut random = Random::new(index as u64 + 1);
            Mutex::new((0..SLOTS).map(|_| heap.block(8 + random.below(993))).collect())
        })
        .collect();
    let mut sum = 0u64;
    for round in 0..ROUNDS {
        sum = sum.wrapping_add(on_threads(threads, |index| {
            let mut table = tables[(index + round) % threads].lock().expect("no thread panics");
            let mut random = Random::new((round * threads + index) as u64 + 99);
            let mut sum = 0;
            for _ in 0..TURNS {
                let slot = random.below(SLOTS);
                let block = heap.block(8 + random.below(993));
                sum += block.size() as u64;
                heap.free_sized(std::mem::replace(&mut table[slot], block));
            }
            sum
        }));
    }
    for table in tables {
        table.into_inner().expect("no thread panics").into_iter().for_each(|b| heap.free_sized(b));
    }
    sum
}

/// alloc-test: empties or fills random slots and writes every byte.
pub fn alloc_test(heap: Heap, threads: usize) -> u64 {
    const SLOTS: usize = 1 << 14;
    const TURNS: usize = 1_500_000;
    on_threads(threads, |index| {
        let mut random = Random::new(index as u64 + 7);
        let mut table: Vec<Option<Block>> = (0..SLOTS).map(|_| None).collect();
        let mut sum = 0;
        for _ in 0..TURNS {
            let slot = &mut table[random.below(SLOTS)];
            if let Some(block) = slot.take() {
                heap.free(block);
            } else {
                let mut block = heap.block(random.skewed(8, 1024));
                block.fill();
                sum += block.size() as u64;
                *slot = Some(block);
            }
        }
        table.into_iter().flatten().for_each(|b| heap.free(b));
        sum
    })
}

/// glibc's bench-malloc-thread: replaces blocks whose sizes are a power of two apart in likelihood.
pub fn glibc_thread(heap: Heap, threads: usize) -> u64 {
    const SLOTS: usize = 1024;
    const TURNS: usize = 2_000_000;
    on_threads(threads, |index| {
        let mut random = Random::new(index as u64 + 31);
        // Twice as large is half as likely, or nearly: many small blocks, few large ones.
        let size = |random: &mut Random| {
            let shift = random.next().trailing_zeros().min(12) as usize;
            (4 << shift) + random.below(4 << shift)
        };
        let mut table: Vec<Block> = (0..SLOTS).map(|_| heap.block(size(&mut random))).collect();
        let mut sum = 0;
        for _ in 0..TURNS {
            let slot = random.below(SLOTS);
            let block = heap.block(size(&mut random));
            sum += block.size() as u64;
            heap.free(std::mem::replace(&mut table[slot], block));
        }
        table.into_iter().for_each(|b| heap.free(b));
        sum
    })
}
