//! Patterns about what threads do to each other: frees by others, and cache lines shared without need.

use super::super::heap::{Block, Heap};
use super::on_threads;
use std::sync::Mutex;
use std::sync::mpsc::sync_channel;

/// xmalloc-test: allocating threads send batches of 64-byte blocks to freeing threads.
pub fn xmalloc(heap: Heap, threads: usize) -> u64 {
    const BATCH: usize = 120;
    const BATCHES: usize = 20_000;
    let pairs = (threads / 2).max(1);
    let channels: Vec<_> = (0..pairs)
        .map(|_| {
            let (tx, rx) = sync_channel::<Vec<Block>>(16);
            (Mutex::new(Some(tx)), Mutex::new(Some(rx)))
        })
        .collect();
    on_threads(2 * pairs, |index| {
        let (tx, rx) = &channels[index / 2];
        if index % 2 == 0 {
            let tx = tx.lock().expect("no thread panics").take().expect("one sender each");
            for _ in 0..BATCHES {
                let batch = (0..BATCH).map(|_| heap.block(64)).collect();
                tx.send(batch).expect("the other side listens");
            }
            return 0;
        }
        let rx = rx.lock().expect("no thread panics").take().expect("one receiver each");
        let mut sum = 0;
        for batch in rx {
            sum += batch.len() as u64;
            batch.into_iter().for_each(|b| heap.free(b));
        }
        sum
    })
}

/// cache-scratch: one thread makes neighbouring small blocks, each thread frees one and then writes a small block of its own
/// again and again. Slow if the allocator gives threads the same cache line.
pub fn cscratch(heap: Heap, threads: usize) -> u64 {
    const TURNS: usize = 2_000;
    const WRITES: usize = 5_000;
    let given: Vec<Mutex<Option<Block>>> = (0..threads).map(|_| Mutex::new(Some(heap.block(8)))).collect();
    on_threads(threads, |index| {
        given[index].lock().expect("no thread panics").take().into_iter().for_each(|b| heap.free(b));
        let mut sum = 0;
        for turn in 0..TURNS {
            let mut block = heap.block(8);
            for write in 0..WRITES {
                let word = &mut block.words()[0];
                // Opaque, so that each store happens.
                *std::hint::black_box(&mut *word) = write as u64;
                sum += *std::hint::black_box(&mut *word) & 1;
            }
            block.fill();
            heap.free(block);
            sum += turn as u64;
        }
        sum
    })
}
