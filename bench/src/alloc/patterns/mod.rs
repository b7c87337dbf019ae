//! The patterns of mimalloc-bench's single programs, written anew. Each does a fixed amount of work and gives a number that
//! must be the same for every allocator.

mod bignum;
mod cross;
mod fixed;
mod slots;
mod smartheap;
mod stress;

use super::heap::Heap;

/// One pattern.
pub struct Pattern {
    /// mimalloc-bench's name.
    pub name: &'static str,
    /// What it does, in one line.
    pub about: &'static str,
    /// Does the work with this heap on so many threads.
    pub run: fn(Heap, usize) -> u64,
}

/// All of them, in mimalloc-bench's order.
pub const ALL: [Pattern; 11] = [
    Pattern {
        name: "cfrac",
        about: "continued fraction with heap numbers of 8 to 64 bytes",
        run: bignum::cfrac,
    },
    Pattern {
        name: "larson-sized",
        about: "server: threads inherit each other's blocks; sized frees",
        run: slots::larson,
    },
    Pattern {
        name: "mstress",
        about: "threads come and go, hand over and keep blocks of all sizes",
        run: stress::mstress,
    },
    Pattern {
        name: "rptest",
        about: "blocks up to 16000 bytes, some freed by another thread",
        run: stress::rptest,
    },
    Pattern { name: "alloc-test", about: "random replacing, every byte written", run: slots::alloc_test },
    Pattern {
        name: "sh6bench",
        about: "rows of blocks up to 1000 bytes, freed in three orders",
        run: smartheap::sh6bench,
    },
    Pattern {
        name: "sh8bench",
        about: "the same with half of the frees on another thread",
        run: smartheap::sh8bench,
    },
    Pattern {
        name: "xmalloc-test",
        about: "one half of the threads allocates, the other half frees",
        run: cross::xmalloc,
    },
    Pattern {
        name: "cscratch",
        about: "one small block for each thread, written very often",
        run: cross::cscratch,
    },
    Pattern {
        name: "glibc-simple",
        about: "rows of 25 to 1600 equal blocks, one thread",
        run: fixed::simple,
    },
    Pattern {
        name: "glibc-thread",
        about: "random replacing of 4 to 32768 bytes, mostly small",
        run: slots::glibc_thread,
    },
];

/// Numbers that look random and are the same in every run.
pub struct Random(u64);

impl Random {
    /// Another sequence for each seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next number.
    #[inline]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `end`.
    #[inline]
    pub fn below(&mut self, end: usize) -> usize {
        (((self.next() >> 32) * end as u64) >> 32) as usize
    }

    /// A number in `low..=high`, small ones more often: every power of two is about as likely.
    #[inline]
    pub fn skewed(&mut self, low: usize, high: usize) -> usize {
        let span = (high / low).max(2).ilog2() as usize;
        let base = low << self.below(span);
        (base + self.below(base + 1)).min(high)
    }
}

/// Runs `work` on so many threads, giving each its number, and adds up what they give.
pub fn on_threads(threads: usize, work: impl Fn(usize) -> u64 + Sync) -> u64 {
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads)
            .map(|index| {
                let work = &work;
                scope.spawn(move || work(index))
            })
            .collect();
        handles
            .into_iter()
            .map(|h| h.join().expect("a thread of a pattern failed"))
            .fold(0, u64::wrapping_add)
    })
}
