//! The heap while the system calls of usvm-alloc fail: null or a block, never lost contents, and as before afterwards.
//!
//! Each plan has a process to itself, for a heap begins only once.
//!
//! # Safety
//! Blocks are raw memory that this test made, used inside their sizes and freed or resized once.
#![allow(unsafe_code)]

use std::time::Duration;

use usvm::ground::inject::{self, Call};
use usvm::{Config, Runtime};
use usvm_tests::isolated::{fork_child, isolated};
use usvm_tests::support::{Dice, on_gpu, runtime};

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

/// A live block, and the number that its words are filled with.
struct Live {
    at: *mut u64,
    words: usize,
    seed: u64,
}

impl Live {
    /// A block of `words` words from `at`, filled; `None` for null.
    fn new(at: *mut std::ffi::c_void, words: usize, seed: u64) -> Option<Self> {
        let at = at.cast::<u64>();
        if at.is_null() {
            return None;
        }
        for i in Self::places(words) {
            // SAFETY: inside the block, which is this one's alone.
            unsafe { at.add(i).write(seed ^ i as u64) };
        }
        Some(Self { at, words, seed })
    }

    /// Every word of a small block, and of a large one some of each page.
    fn places(words: usize) -> impl Iterator<Item = usize> {
        (0..words).step_by(if words > 1024 { 128 } else { 1 }).chain(words.checked_sub(1))
    }

    fn check(&self, words: usize) {
        for i in Self::places(self.words).filter(|i| *i < words) {
            // SAFETY: inside the block.
            let found = unsafe { self.at.add(i).read() };
            assert_eq!(found, self.seed ^ i as u64, "word {i} of {} at {:p}", self.words, self.at);
        }
    }
}

/// The heap's user, who takes null for an answer, and a device that uses some of the blocks.
struct User {
    dice: Dice,
    live: Vec<Live>,
    refused: usize,
    runtime: Option<Runtime>,
}

impl User {
    /// Words of a block: most small, some of whole ranges, a few that make the heap reserve more.
    fn words(&mut self) -> usize {
        let below = match self.dice.below(100) {
            0..4 => 1 << 20,
            4..10 => 1 << 16,
            10..40 => 1024,
            _ => 40,
        };
        1 + self.dice.below(below) as usize
    }

    fn keep(&mut self, block: Option<Live>) {
        match block {
            Some(block) => self.live.push(block),
            None => self.refused += 1,
        }
    }

    fn any(&mut self) -> Option<Live> {
        let at = self.dice.below(self.live.len().max(1) as u64) as usize;
        (at < self.live.len()).then(|| self.live.swap_remove(at))
    }

    fn step(&mut self) {
        let (seed, words) = (self.dice.below(u64::MAX), self.words());
        match self.dice.below(10) {
            0..3 => {
                // SAFETY: a new block.
                let block = unsafe { usvm_alloc::malloc(words * 8) };
                self.keep(Live::new(block, words, seed));
            }
            3 => {
                // SAFETY: a new block, read inside its size.
                unsafe {
                    let block = usvm_alloc::calloc(words, 8);
                    let zero = block.is_null() || (0..words).all(|i| *block.cast::<u64>().add(i) == 0);
                    assert!(zero, "calloc is not zero");
                    self.keep(Live::new(block, words, seed));
                }
            }
            4 => {
                let align = 8 << self.dice.below(19);
                // SAFETY: a new block.
                let block = unsafe { usvm_alloc::aligned_alloc(align, words * 8) };
                assert!(block.addr().is_multiple_of(align));
                self.keep(Live::new(block, words, seed));
            }
            5..8 => {
                let Some(old) = self.any() else { return };
                // Growing is what moves pages.
                let words = if self.dice.below(2) == 0 { old.words * 2 } else { words };
                // SAFETY: the block is resized once; null leaves it as it was.
                let block = unsafe { usvm_alloc::realloc(old.at.cast(), words * 8) };
                if block.is_null() {
                    self.refused += 1;
                    old.check(usize::MAX);
                    return self.live.push(old);
                }
                Live { at: block.cast(), ..old }.check(words);
                self.keep(Live::new(block, words, seed));
            }
            8 => {
                let Some(block) = self.any() else { return };
                block.check(usize::MAX);
                // SAFETY: the block is freed once.
                unsafe { usvm_alloc::free(block.at.cast()) };
            }
            _ => {
                let Some(block) = self.any() else { return };
                if let Some(runtime) = &self.runtime {
                    // The second half is written on the device, with what it holds: then the block is several mappings,
                    // of which the kernel moves the first before it finds the next.
                    let half = block.words as u64 / 2 * 8;
                    let at = block.at.expose_provenance() as u64 + half;
                    let len = block.words as u64 * 8 - half;
                    on_gpu(runtime, move |gpu| gpu.update(at, len, |_, _| {})).unwrap();
                }
                self.live.push(block);
            }
        }
    }

    fn end(mut self) {
        for block in std::mem::take(&mut self.live) {
            block.check(usize::MAX);
            // SAFETY: the block is freed once.
            unsafe { usvm_alloc::free(block.at.cast()) };
        }
        self.runtime.take().inspect(Runtime::shutdown);
    }
}

/// Uses a heap whose `call` fails as planned, from its beginning or from later on. How often it failed.
fn use_heap(call: Call, errno: i32, [skip, every, count]: [u16; 3], begun: bool) -> u64 {
    let runtime = begun.then(|| runtime(Config::default(), &[64 << 20]));
    let mut user = User { dice: Dice::new(7), live: Vec::new(), refused: 0, runtime };
    if begun {
        (0..400).for_each(|_| user.step());
        assert_eq!(user.refused, 0);
    }
    // Of this thread only: the runtime's are others' tests.
    inject::plan_here(call, errno, skip, every, count);
    (0..1500).for_each(|_| user.step());
    let hits = inject::hits(call);
    inject::clear();
    user.refused = 0;
    (0..400).for_each(|_| user.step());
    assert_eq!(user.refused, 0, "memory is refused although nothing fails any more");
    user.end();
    hits
}

/// How calls fail, as in `injection.rs`.
const PLANS: [[u16; 3]; 4] = [[0, 1, 1], [3, 5, 40], [0, 2, 0], [0, 1, 0]];

/// Every plan for each case (call, errno, whether the heap has begun before), each in a child that has no heap yet.
fn all(name: &str, cases: &[(Call, i32, bool)]) {
    isolated(name, || {
        for &(call, errno, begun) in cases {
            for plan in PLANS {
                let what = format!("{call:?} fails with errno {errno}, plan {plan:?}, begun before: {begun}");
                // A heap that makes fewer calls than a plan lets pass sees no failure.
                let child = fork_child(false, || use_heap(call, errno, plan, begun) > 0 || plan[0] > 0);
                assert_eq!(child.wait(Duration::from_secs(30)), 0, "{what}");
            }
        }
    });
}

#[test]
fn the_heap_cannot_begin() {
    all("the_heap_cannot_begin", &[(Call::Mmap, libc::ENOMEM, false), (Call::Mprotect, libc::ENOMEM, false)]);
}

#[test]
fn the_heap_cannot_grow() {
    all(
        "the_heap_cannot_grow",
        &[(Call::Mprotect, libc::ENOMEM, true), (Call::Mprotect, libc::EAGAIN, true)],
    );
}

#[test]
fn pages_are_not_dropped() {
    all("pages_are_not_dropped", &[(Call::Madvise, libc::ENOMEM, true), (Call::Madvise, libc::EAGAIN, true)]);
}

#[test]
fn blocks_do_not_move() {
    // EFAULT is how Linux says it for a block that is several mappings.
    all("blocks_do_not_move", &[(Call::Mremap, libc::ENOMEM, true), (Call::Mremap, libc::EFAULT, true)]);
}

#[test]
fn how_far_a_block_came_is_not_told() {
    let cases = [(Call::Open, libc::EMFILE, true), (Call::ProcmapQuery, libc::ENOTTY, true)];
    all("how_far_a_block_came_is_not_told", &cases);
}

/// A block of which a part has arrived at a new place that cannot be opened: null, and all is where it was.
#[test]
fn a_block_comes_back_from_where_it_cannot_stay() {
    let name = "a_block_comes_back_from_where_it_cannot_stay";
    isolated(name, || {
        let runtime = runtime(Config::default(), &[64 << 20]);
        for (moves, protects) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let words = (8 << 20) / 8;
            // SAFETY: new blocks; the second leaves room for the first to grow, and the third keeps it from doing so in
            // place.
            let (block, room, wall) = unsafe {
                (usvm_alloc::malloc(words * 8), usvm_alloc::malloc(80 << 20), usvm_alloc::malloc(2 << 20))
            };
            let block = Live::new(block, words, 11).unwrap();
            let wall = Live::new(wall, 4, 1).unwrap();
            // SAFETY: freed once.
            unsafe { usvm_alloc::free(room) };
            // The kernel moves what is before the part that the device used.
            let at = block.at.expose_provenance() as u64 + (4 << 20);
            on_gpu(&runtime, move |gpu| gpu.update(at, 2 << 20, |_, _| {})).unwrap();
            inject::plan_here(Call::Mremap, libc::ENOMEM, moves, 1, 0);
            inject::plan_here(Call::Mprotect, libc::ENOMEM, protects, 1, 0);
            // SAFETY: resized once; null leaves it as it was.
            let grown = unsafe { usvm_alloc::realloc(block.at.cast(), 40 << 20) };
            let hits = inject::hits(Call::Mprotect);
            inject::clear();
            assert!(hits > 0 && grown.is_null(), "{hits} hits after {moves} and {protects}: {grown:p}");
            block.check(usize::MAX);
            // As good as before.
            // SAFETY: as above.
            let grown = unsafe { usvm_alloc::realloc(block.at.cast(), 48 << 20) };
            assert!(!grown.is_null());
            Live { at: grown.cast(), ..block }.check(usize::MAX);
            // SAFETY: freed once.
            unsafe {
                usvm_alloc::free(grown);
                usvm_alloc::free(wall.at.cast());
            }
        }
        runtime.shutdown();
    });
}

/// Memory that is refused costs no address space: there is room afterwards for more than was ever asked for.
#[test]
fn what_cannot_be_opened_is_not_used_up() {
    isolated("what_cannot_be_opened_is_not_used_up", || {
        // SAFETY: a new block, freed once.
        let try_it = || unsafe {
            let block = usvm_alloc::malloc(256 << 30);
            usvm_alloc::free(block);
            !block.is_null()
        };
        inject::plan_here(Call::Mprotect, libc::ENOMEM, 0, 1, 0);
        assert!((0..2000).all(|_| !try_it()));
        inject::clear();
        assert!(try_it(), "its address space is gone");
    });
}

/// Without records small blocks are not slabs', and not every one of them asks for records again.
#[test]
fn records_are_not_asked_for_again_and_again() {
    isolated("records_are_not_asked_for_again_and_again", || {
        // The first is the heap's memory.
        inject::plan_here(Call::Mmap, libc::ENOMEM, 1, 1, 0);
        let take = |n: u64| -> Vec<Live> {
            // SAFETY: new blocks, freed below.
            (0..n).map(|seed| Live::new(unsafe { usvm_alloc::malloc(80) }, 10, seed).unwrap()).collect()
        };
        let mut blocks = take(5000);
        let asked = inject::calls(Call::Mmap);
        assert!((2..100).contains(&asked), "{asked} times");
        inject::clear();
        blocks.extend(take(5000));
        for block in blocks {
            block.check(usize::MAX);
            // SAFETY: freed once.
            unsafe { usvm_alloc::free(block.at.cast()) };
        }
    });
}
