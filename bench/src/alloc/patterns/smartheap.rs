//! The patterns of the SmartHeap benchmarks: rows of small blocks, freed newest first, oldest first, and scattered.

use super::super::heap::{Block, Heap};
use super::{Random, on_threads};
use std::sync::Mutex;

const ROUNDS: usize = 60;
const ROW: usize = 2_000;
const LARGEST: usize = 1000;

/// One round: rows of blocks whose sizes grow, small ones more of them. `free` gets what is to be freed.
fn round(heap: Heap, random: &mut Random, kept: &mut Vec<Block>, mut free: impl FnMut(Block)) -> u64 {
    let mut sum = 0;
    let mut size = 8;
    while size <= LARGEST {
        let count = ROW * 8 / size.max(8).isqrt();
        let mut row: Vec<Block> = (0..count)
            .map(|_| {
                sum += size as u64;
                heap.block(size)
            })
            .collect();
        // A few live on until the next rounds, so that no page ever gets quite empty.
        for _ in 0..count / 50 {
            kept.push(row.swap_remove(random.below(row.len())));
        }
        match random.below(3) {
            0 => row.into_iter().rev().for_each(&mut free),
            1 => row.into_iter().for_each(&mut free),
            _ => {
                let mut rest = Vec::with_capacity(row.len() / 2 + 1);
                for (index, block) in row.into_iter().enumerate() {
                    if index % 2 == 0 { free(block) } else { rest.push(block) }
                }
                rest.into_iter().for_each(&mut free);
            }
        }
        size += size / 4 + 1;
    }
    if kept.len() > 10 * ROW {
        kept.drain(..kept.len() / 2).for_each(&mut free);
    }
    sum
}

/// Every thread frees its own blocks.
pub fn sh6bench(heap: Heap, threads: usize) -> u64 {
    on_threads(threads, |index| {
        let mut random = Random::new(index as u64 + 3);
        let mut kept = Vec::new();
        let sum = (0..ROUNDS).map(|_| round(heap, &mut random, &mut kept, |b| heap.free(b))).sum();
        kept.into_iter().for_each(|b| heap.free(b));
        sum
    })
}

/// Every second block is freed by the next thread.
pub fn sh8bench(heap: Heap, threads: usize) -> u64 {
    const BATCH: usize = 200;
    let mailboxes: Vec<Mutex<Vec<Block>>> = (0..threads).map(|_| Mutex::default()).collect();
    let sum = on_threads(threads, |index| {
        let mut random = Random::new(index as u64 + 3);
        let (mut kept, mut leaving, mut turn) = (Vec::new(), Vec::with_capacity(BATCH), 0usize);
        let give = |block: Block| {
            turn += 1;
            if turn.is_multiple_of(2) {
                heap.free(block);
                return;
            }
            leaving.push(block);
            if leaving.len() == BATCH {
                mailboxes[(index + 1) % threads].lock().expect("no thread panics").append(&mut leaving);
                let arrived = std::mem::take(&mut *mailboxes[index].lock().expect("no thread panics"));
                arrived.into_iter().for_each(|b| heap.free(b));
            }
        };
        let mut give = give;
        let sum = (0..ROUNDS).map(|_| round(heap, &mut random, &mut kept, &mut give)).sum();
        kept.into_iter().chain(leaving).for_each(|b| heap.free(b));
        sum
    });
    mailboxes.into_iter().flat_map(|m| m.into_inner().expect("no thread panics")).for_each(|b| heap.free(b));
    sum
}
