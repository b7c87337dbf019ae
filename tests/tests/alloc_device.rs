//! usvm's allocator under a running usvm: what it does to blocks that are on the device.
//!
//! Each test has a process to itself: what another thread does with the heap nearby would be counted.
//!
//! # Safety
//! Blocks are raw memory that this test made, used inside their sizes and freed once.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

use usvm::observe::stats::StatsSnapshot;
use usvm::{Config, Location, Runtime};
use usvm_tests::isolated::isolated;
use usvm_tests::support::{M2, Mem, gpu_check, gpu_fill, on_gpu, runtime, value};

#[global_allocator]
static ALLOC: usvm_alloc::Usvm = usvm_alloc::Usvm::new();

/// A block of raw memory.
#[derive(Clone, Copy)]
struct Block {
    at: u64,
    len: u64,
}

impl Block {
    fn new(len: u64) -> Self {
        // SAFETY: freed by `free` or moved by `grow`.
        let at = unsafe { usvm_alloc::malloc(len as usize) };
        assert!(!at.is_null());
        let block = Self { at: at.expose_provenance() as u64, len };
        for (i, word) in block.words().enumerate() {
            word.store(i as u64, Ordering::Relaxed);
        }
        block
    }

    fn ptr(self) -> *mut std::ffi::c_void {
        std::ptr::with_exposed_provenance_mut(self.at as usize)
    }

    fn words(self) -> impl Iterator<Item = &'static AtomicU64> {
        // SAFETY: the block's own bytes, aligned to 8; the test does not use them after the block is freed.
        unsafe { std::slice::from_raw_parts(self.ptr().cast::<AtomicU64>(), self.len as usize / 8) }.iter()
    }

    fn free(self) {
        // SAFETY: the test frees each block once.
        unsafe { usvm_alloc::free(self.ptr()) }
    }

    fn grow(self, len: u64) -> Self {
        // SAFETY: the test does not use the old block afterwards.
        let at = unsafe { usvm_alloc::realloc(self.ptr(), len as usize) };
        assert!(!at.is_null());
        Self { at: at.expose_provenance() as u64, len }
    }
}

/// Blocks of one size. The list is not in the heap: its neighbours there go to the device with the blocks.
struct Blocks {
    list: Mem,
    len: u64,
    count: usize,
}

impl Blocks {
    fn new(len: u64, count: usize) -> Self {
        let list = Mem::small(count as u64 * 8);
        for place in list.words::<u64>().iter().take(count) {
            place.store(Block::new(len).at, Ordering::Relaxed);
        }
        Self { list, len, count }
    }

    fn iter(&self) -> impl Iterator<Item = Block> {
        let at = self.list.words::<u64>().iter().take(self.count);
        at.map(|place| Block { at: place.load(Ordering::Relaxed), len: self.len })
    }

    fn free(self) {
        self.iter().for_each(Block::free);
    }
}

/// Blocks that the device wrote and that are there now.
fn on_the_device(runtime: &Runtime, len: u64, count: usize) -> Blocks {
    let blocks = Blocks::new(len, count);
    for (index, block) in blocks.iter().enumerate() {
        on_gpu(runtime, move |gpu| gpu_fill(gpu, block.at, block.len, 0, index as u64)).unwrap();
    }
    for block in blocks.iter() {
        // Launching touched the heap nearby and may have fetched a page: all of it must be there when the count begins.
        runtime.prefetch(block.at, block.len, Location::Device(0)).wait(None).unwrap();
        let residence = runtime.residence(block.at, len).unwrap();
        assert!(residence.device >= len, "{len}: {residence:?}");
    }
    blocks
}

/// The statistics, with what making them allocates kept out of the heap under test.
fn stats(runtime: &Runtime) -> StatsSnapshot {
    usvm::ground::alloc::internal(|| runtime.stats())
}

fn moved(before: &StatsSnapshot, after: &StatsSnapshot) -> (u64, u64) {
    (after.bytes_to_host - before.bytes_to_host, after.cpu_faults - before.cpu_faults)
}

#[test]
fn freeing_a_block_on_the_device_moves_nothing() {
    isolated("freeing_a_block_on_the_device_moves_nothing", || {
        let runtime = runtime(Config::default(), &[256 << 20]);
        for (len, count) in [(64, 1500), (1000, 600), (30_000, 60), (200_000, 20), (M2, 4), (9 << 20, 2)] {
            let blocks = on_the_device(&runtime, len, count);
            let before = stats(&runtime);
            blocks.free();
            let after = stats(&runtime);
            assert_eq!(moved(&before, &after), (0, 0), "freeing {count} blocks of {len}");

            // Giving the memory back to the system moves nothing either.
            usvm_alloc::trim();
            let purged = stats(&runtime);
            assert_eq!(moved(&after, &purged), (0, 0), "giving back {count} blocks of {len}");

            // The memory is good for new blocks.
            let again = Blocks::new(len, count);
            for block in again.iter() {
                assert!(block.words().enumerate().all(|(i, w)| w.load(Ordering::Relaxed) == i as u64));
            }
            again.free();
        }
    });
}

#[test]
fn taking_a_block_whose_memory_is_on_the_device_moves_nothing() {
    isolated("taking_a_block_whose_memory_is_on_the_device_moves_nothing", || {
        let runtime = runtime(Config::default(), &[256 << 20]);
        on_the_device(&runtime, 500, 1000).free();
        let large = on_the_device(&runtime, 3 << 20, 1);
        let list = Mem::small(8 * 500);
        list.fill(0);
        let before = stats(&runtime);
        large.free();
        // SAFETY: freed below.
        let zeroed = unsafe { usvm_alloc::calloc(3, 1 << 20).cast::<u8>() };
        for place in list.words::<u64>().iter().take(500) {
            // SAFETY: as above.
            place.store(unsafe { usvm_alloc::malloc(500) }.expose_provenance() as u64, Ordering::Relaxed);
        }
        assert_eq!(moved(&before, &stats(&runtime)), (0, 0), "taking blocks");
        // SAFETY: the block has 3 MiB.
        assert!((0..3 << 20).step_by(512).all(|i| unsafe { *zeroed.add(i) } == 0));
        for place in list.words::<u64>().iter().take(500) {
            Block { at: place.load(Ordering::Relaxed), len: 500 }.free();
        }
        // SAFETY: made above, freed once.
        unsafe { usvm_alloc::free(zeroed.cast()) };
    });
}

#[test]
fn a_large_block_grows_where_its_data_is() {
    isolated("a_large_block_grows_where_its_data_is", || {
        let runtime = runtime(Config::default(), &[256 << 20]);
        let blocks = on_the_device(&runtime, 4 << 20, 1);
        // Nothing can grow in place.
        let wall = Block::new(M2);
        let before = stats(&runtime);
        let grown = blocks.iter().next().unwrap().grow(32 << 20);
        assert_ne!(blocks.iter().next().unwrap().at, grown.at);
        assert_eq!(moved(&before, &stats(&runtime)), (0, 0), "its pages are moved, not copied");
        let at = grown.at;
        on_gpu(&runtime, move |gpu| gpu_check(gpu, at, 4 << 20, 0, 0)).unwrap();
        for (i, word) in grown.words().take((4 << 20) / 8).enumerate() {
            assert_eq!(word.load(Ordering::Relaxed), value(0, i as u64));
        }
        grown.free();
        wall.free();
    });
}

/// What a device used of a block is registered, the rest is not: mappings of their own, which the kernel moves one by one.
#[test]
fn a_large_block_grows_of_which_the_device_used_a_part() {
    isolated("a_large_block_grows_of_which_the_device_used_a_part", || {
        let runtime = runtime(Config::default(), &[256 << 20]);
        let mut kept = Vec::with_capacity(8);
        for (used, len) in [(6 << 20, M2), (2 << 20, M2), (0, M2), ((3 << 20) + 8192, 4096)] {
            let block = Block::new(8 << 20);
            let at = block.at + used;
            on_gpu(&runtime, move |gpu| gpu_fill(gpu, at, len, used / 8, 3)).unwrap();
            let wall = Block::new(M2);
            let grown = block.grow(32 << 20);
            assert_ne!(block.at, grown.at, "it grew in place: this shows nothing");
            for (i, word) in grown.words().take((8 << 20) / 8).enumerate() {
                let (byte, i) = (i as u64 * 8, i as u64);
                let want = if (used..used + len).contains(&byte) { value(3, i) } else { i };
                assert_eq!(
                    word.load(Ordering::Relaxed),
                    want,
                    "word {i}, the device used {len} bytes from {used}"
                );
            }
            grown.words().for_each(|word| word.store(9, Ordering::Relaxed));
            kept.extend([grown, wall]);
        }
        kept.into_iter().for_each(Block::free);
    });
}

/// Several mappings before the first that the kernel cannot move: all of them arrive with the first call.
#[test]
fn a_large_block_grows_that_is_many_mappings() {
    isolated("a_large_block_grows_that_is_many_mappings", || {
        let runtime = runtime(Config::default(), &[256 << 20]);
        let block = Block::new(10 << 20);
        for mib in [1, 3] {
            let at = block.ptr().cast::<u8>().wrapping_add(mib << 20).cast();
            // SAFETY: the block's own pages; huge pages are only a wish.
            assert_eq!(unsafe { libc::madvise(at, 1 << 20, libc::MADV_NOHUGEPAGE) }, 0);
        }
        let at = block.at + (6 << 20);
        on_gpu(&runtime, move |gpu| gpu_fill(gpu, at, M2, (6 << 20) / 8, 3)).unwrap();
        let wall = Block::new(M2);
        let grown = block.grow(32 << 20);
        assert_ne!(block.at, grown.at, "it grew in place: this shows nothing");
        for (i, word) in grown.words().take((10 << 20) / 8).enumerate() {
            let used = (6 << 20..8 << 20).contains(&(i * 8));
            let want = if used { value(3, i as u64) } else { i as u64 };
            assert_eq!(word.load(Ordering::Relaxed), want, "word {i}");
        }
        grown.free();
        wall.free();
    });
}

/// realloc is no place where a cancelled thread ends, however it finds out how far a block came.
#[test]
fn a_cancelled_thread_does_not_end_in_realloc() {
    unsafe extern "C" {
        fn pthread_setcancelstate(state: libc::c_int, old: *mut libc::c_int) -> libc::c_int;
    }
    const DISABLE: libc::c_int = 1;
    isolated("a_cancelled_thread_does_not_end_in_realloc", || {
        let runtime = runtime(Config::default(), &[64 << 20]);
        let block = Block::new(8 << 20);
        let at = block.at + (4 << 20);
        on_gpu(&runtime, move |gpu| gpu_fill(gpu, at, M2, 0, 3)).unwrap();
        let wall = Block::new(M2);
        let thread = std::thread::spawn(move || {
            // So that it has a heap already.
            Block::new(64).free();
            // SAFETY: its own thread, which lets itself be cancelled in realloc only: nothing there would be left undone.
            unsafe {
                libc::pthread_cancel(libc::pthread_self());
                let grown = block.grow(32 << 20);
                pthread_setcancelstate(DISABLE, &mut 0);
                grown
            }
        });
        let grown = thread.join().unwrap();
        assert_ne!(block.at, grown.at, "it grew in place: this shows nothing");
        grown.free();
        wall.free();
    });
}

#[test]
fn threads_allocate_and_free_while_the_device_uses_their_blocks() {
    isolated("threads_allocate_and_free_while_the_device_uses_their_blocks", || {
        let runtime = runtime(Config::default(), &[8 << 20]);
        std::thread::scope(|scope| {
            for thread in 0..3u64 {
                let runtime = &runtime;
                scope.spawn(move || {
                    for round in 0..12u64 {
                        let blocks: Vec<Vec<u64>> =
                            (1..60).map(|i| (0..i * 211).map(|w| value(thread, w)).collect()).collect();
                        for block in blocks.iter().step_by(5) {
                            let (at, len, seed) = (block.as_ptr() as u64, block.len() as u64 * 8, round);
                            on_gpu(runtime, move |gpu| gpu_fill(gpu, at, len, 0, seed)).unwrap();
                        }
                        for (index, block) in blocks.into_iter().enumerate() {
                            let seed = if index % 5 == 0 { round } else { thread };
                            for (i, word) in block.iter().enumerate() {
                                assert_eq!(*word, value(seed, i as u64), "thread {thread}, block {index}");
                            }
                        }
                    }
                });
            }
        });
    });
}
