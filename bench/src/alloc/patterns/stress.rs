//! Patterns with all sizes whose blocks cross threads.

use super::super::heap::{Block, Heap};
use super::{Random, on_threads};
use std::sync::Mutex;

/// mimalloc's stress test: each generation of threads allocates, frees, keeps a part, and exchanges another part with the
/// other threads through a common table.
pub fn mstress(heap: Heap, threads: usize) -> u64 {
    const GENERATIONS: usize = 25;
    const SHARED: usize = 1000;
    let shared: Vec<Mutex<Option<Block>>> = (0..SHARED).map(|_| Mutex::new(None)).collect();
    let mut sum = 0u64;
    for generation in 0..GENERATIONS {
        sum = sum.wrapping_add(on_threads(threads, |index| {
            let mut random = Random::new((generation * threads + index) as u64 + 5);
            let mut live: Vec<Block> = Vec::new();
            let mut kept: Vec<Block> = Vec::new();
            let mut sum = 0;
            for _ in 0..20_000 {
                match random.below(10) {
                    0..5 => {
                        let block = item(heap, &mut random);
                        sum += block.size() as u64;
                        live.push(block);
                    }
                    5..8 if !live.is_empty() => {
                        let victim = random.below(live.len());
                        heap.free(live.swap_remove(victim));
                    }
                    8 => kept.push(item(heap, &mut random)),
                    _ => {
                        let mine = item(heap, &mut random);
                        let place = &shared[random.below(SHARED)];
                        let theirs = place.lock().expect("no thread panics").replace(mine);
                        theirs.into_iter().for_each(|b| heap.free(b));
                    }
                }
            }
            live.into_iter().chain(kept).for_each(|b| heap.free(b));
            sum
        }));
    }
    shared.into_iter().filter_map(|s| s.into_inner().expect("no thread panics")).for_each(|b| heap.free(b));
    sum
}

/// Mostly small, now and then a thousand words, seldom tens of thousands; every word written.
fn item(heap: Heap, random: &mut Random) -> Block {
    let words = match random.below(1000) {
        0 => 1 + random.below(20_000),
        1..20 => 1 + random.below(1000),
        _ => 1 + random.below(30),
    };
    let mut block = heap.block(words * 8);
    block.fill();
    block
}

/// rpmalloc's benchmark: each thread replaces blocks of 8 to 16000 bytes, small ones more often; every other round it hands
/// blocks to the next thread, which frees them.
pub fn rptest(heap: Heap, threads: usize) -> u64 {
    const LOOPS: usize = 300;
    const BLOCKS: usize = 1000;
    const TURNS: usize = 1000;
    let mailboxes: Vec<Mutex<Vec<Block>>> = (0..threads).map(|_| Mutex::default()).collect();
    let sum = on_threads(threads, |index| {
        let mut random = Random::new(index as u64 + 77);
        // The smaller of two: twice as many in the lower half.
        let size = |random: &mut Random| 8 + random.below(15_993).min(random.below(15_993));
        let mut table: Vec<Block> = (0..BLOCKS).map(|_| heap.block(size(&mut random))).collect();
        let mut sum = 0;
        for round in 0..LOOPS {
            let mut leaving = Vec::new();
            for turn in 0..TURNS {
                let slot = random.below(BLOCKS);
                let block = heap.block(size(&mut random));
                sum += block.size() as u64;
                let old = std::mem::replace(&mut table[slot], block);
                if round % 2 == 1 && turn % 4 == 0 { leaving.push(old) } else { heap.free(old) }
            }
            mailboxes[(index + 1) % threads].lock().expect("no thread panics").append(&mut leaving);
            let arrived = std::mem::take(&mut *mailboxes[index].lock().expect("no thread panics"));
            arrived.into_iter().for_each(|b| heap.free(b));
        }
        table.into_iter().for_each(|b| heap.free(b));
        sum
    });
    mailboxes.into_iter().flat_map(|m| m.into_inner().expect("no thread panics")).for_each(|b| heap.free(b));
    sum
}
