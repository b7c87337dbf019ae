//! Helper threads for large copies.
//!
//! # Overview
//! A large copy is cut into chunks. The caller publishes it in a job slot, rings the bell, and then claims and copies
//! chunks itself like everyone else; helpers that are awake claim chunks too. So a helper that sleeps or is not
//! scheduled costs the caller nothing but the wake-up call: nobody waits for a helper that has not begun. What the
//! caller waits for is only chunks that a helper has already claimed. A helper that is descheduled in the middle of one
//! (the machine is busy) makes the copy late; when that happens, the next copies go without helpers, the more the oftener it
//! happens. Who knows that a copy will come says so ([`CopyPool::rouse`]), because to wake a helper takes as long as a good
//! part of the copy.
//!
//! The pool is usvm's own, and not rayon's, for two reasons. A service thread that waits inside rayon steals whatever
//! task is queued, also the application's when both use the global pool: it would then run foreign code, touch tracked
//! memory and wait for itself. And rayon's wake-up goes through a mutex and a condition variable; here it is one futex
//! call, and none while the helper still spins.
//!
//! # Locking
//! None: atomics and futexes. A slot's `cursor` packs (generation, next chunk, chunks); a helper reads the job's fields
//! between loading the cursor and claiming a chunk by compare-exchange. Success proves that the fields were of this
//! generation: they are rewritten only after all chunks of the old one were claimed and done, and then the cursor
//! differs. (The generation has 32 bits: it would have to wrap exactly within those few instructions.)
//!
//! # Limits
//! After `fork` the child has no helpers; its copies are done by the caller alone, correctly, and dropping its copy of
//! the pool waits for nobody. Slots that were in use by other threads at the fork stay taken in the child.
//!
//! # Safety
//! Holds raw pointers of a copy between publication and completion; [`CopyPool::run`] does not return before every
//! chunk is done, so they never outlive the caller's promise.
#![allow(unsafe_code)]

use super::{Copier, CopyHint};
use crate::ground::sync::wait_on;
use crate::ground::thread;
use crossbeam_utils::CachePadded;
use rustix::thread::futex;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, AtomicUsize};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Large copies that can be under way at once; a further caller copies alone.
const SLOTS: usize = 4;
/// What one claim takes.
const CHUNK: usize = 256 << 10;
/// Chunks that a cursor can count.
const MOST_CHUNKS: usize = u16::MAX as usize;
/// How long at least a caller spins for a helper's last chunk before it sleeps. Otherwise the time of two of its own.
const PATIENCE: Duration = Duration::from_micros(30);
/// How long a roused helper stays awake for a copy that does not come.
const EXPECTED: Duration = Duration::from_micros(500);
/// Copies that go without helpers after one had to sleep for a helper: two at first, twice as many each time it happens
/// again, and so many at most.
const ALONE: u32 = 64;

/// One copy under way.
#[derive(Debug, Default)]
struct Job {
    taken: AtomicBool,
    cursor: AtomicU64,
    done: AtomicU32,
    waiting: AtomicBool,
    copier: AtomicU8,
    hint: AtomicU8,
    dst: AtomicPtr<u8>,
    src: AtomicPtr<u8>,
    len: AtomicUsize,
    chunk: AtomicUsize,
}

/// What a cursor says.
#[derive(Clone, Copy)]
struct Cursor {
    generation: u32,
    next: u16,
    total: u16,
}

impl Cursor {
    fn pack(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.next) << 16 | u64::from(self.total)
    }

    fn unpack(word: u64) -> Self {
        Self { generation: (word >> 32) as u32, next: (word >> 16) as u16, total: word as u16 }
    }
}

/// A piece of a copy.
struct Piece {
    copier: Copier,
    hint: CopyHint,
    dst: *mut u8,
    src: *const u8,
    len: usize,
}

impl Job {
    /// Makes the slot's next generation out of a copy. Only the caller that took the slot publishes.
    fn publish(&self, copier: Copier, dst: *mut u8, src: *const u8, len: usize, hint: CopyHint) -> u16 {
        let chunk = CHUNK.max(len.div_ceil(MOST_CHUNKS).next_multiple_of(4096));
        let total = len.div_ceil(chunk) as u16;
        self.copier.store(copier.kind() as u8, Relaxed);
        self.hint.store(hint as u8, Relaxed);
        self.dst.store(dst, Relaxed);
        self.src.store(src.cast_mut(), Relaxed);
        self.len.store(len, Relaxed);
        self.chunk.store(chunk, Relaxed);
        self.done.store(0, Relaxed);
        self.waiting.store(false, Relaxed);
        let generation = Cursor::unpack(self.cursor.load(Relaxed)).generation.wrapping_add(1);
        self.cursor.store(Cursor { generation, next: 0, total }.pack(), Release);
        total
    }

    /// Takes the next chunk, `None` when all are claimed.
    fn claim(&self) -> Option<Piece> {
        let mut word = self.cursor.load(Acquire);
        loop {
            let at = Cursor::unpack(word);
            if at.next >= at.total {
                return None;
            }
            let piece = self.piece(at.next.into());
            let after = Cursor { next: at.next + 1, ..at }.pack();
            match self.cursor.compare_exchange_weak(word, after, AcqRel, Acquire) {
                Ok(_) => return Some(piece),
                Err(now) => word = now,
            }
        }
    }

    /// Chunk `index` as the fields stand now; meaningful only if the claim then succeeds.
    fn piece(&self, index: usize) -> Piece {
        let chunk = self.chunk.load(Relaxed);
        let at = index.wrapping_mul(chunk);
        Piece {
            copier: Copier::from_index(self.copier.load(Relaxed)),
            hint: CopyHint::from_index(self.hint.load(Relaxed)),
            dst: self.dst.load(Relaxed).wrapping_add(at),
            src: self.src.load(Relaxed).wrapping_add(at).cast_const(),
            len: chunk.min(self.len.load(Relaxed).wrapping_sub(at)),
        }
    }

    /// Claims and copies until nothing is left to claim; tells how many chunks it did.
    fn work(&self) -> u32 {
        let mut chunks = 0;
        while let Some(piece) = self.claim() {
            // SAFETY: the claim succeeded, so these are the pointers of a `run` that has not returned and will not
            // before `done` counts this chunk; chunks partition its copy, so nobody else writes here.
            unsafe { piece.copier.copy(piece.dst, piece.src, piece.len, piece.hint) };
            self.done.fetch_add(1, SeqCst);
            if self.waiting.load(SeqCst) {
                wake(&self.done, 1);
            }
            chunks += 1;
        }
        chunks
    }

    /// Returns when all chunks are done, those of helpers too; tells whether that took more than `patience`.
    fn wait(&self, total: u16, patience: Duration) -> bool {
        let total = u32::from(total);
        let begin = Instant::now();
        while self.done.load(Acquire) != total {
            if begin.elapsed() >= patience {
                self.wait_asleep(total);
                return true;
            }
            spin();
        }
        false
    }

    fn wait_asleep(&self, total: u32) {
        self.waiting.store(true, SeqCst);
        loop {
            let done = self.done.load(SeqCst);
            if done == total {
                return;
            }
            sleep(&self.done, done);
        }
    }
}

/// What caller and helpers share.
#[derive(Debug, Default)]
struct Shared {
    jobs: [CachePadded<Job>; SLOTS],
    /// Rings with every publication.
    bell: CachePadded<AtomicU32>,
    sleepers: CachePadded<AtomicU32>,
    /// Whether helpers were roused for a copy that has not come yet.
    expected: AtomicBool,
    /// Copies that still go without helpers.
    alone: CachePadded<AtomicU32>,
    /// How many it was the last time; forgotten by halves while helpers are in time.
    late: AtomicU32,
    stop: AtomicBool,
}

impl Shared {
    /// A slot for a copy that is to have helpers.
    fn take_slot(&self) -> Option<&Job> {
        if self.alone.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() {
            return None;
        }
        let free =
            |job: &&CachePadded<Job>| job.taken.compare_exchange(false, true, Acquire, Relaxed).is_ok();
        self.jobs.iter().find(free).map(|job| &**job)
    }

    /// Decides after a copy how many go without helpers.
    fn judge(&self, late: bool) {
        let before = self.late.load(Relaxed);
        if late {
            let now = (before * 2).clamp(2, ALONE);
            self.late.store(now, Relaxed);
            self.alone.store(now, Relaxed);
        } else if before > 0 {
            self.late.store(before / 2, Relaxed);
        }
    }

    fn ring(&self) {
        self.bell.fetch_add(1, SeqCst);
        let sleepers = self.sleepers.load(SeqCst);
        if sleepers > 0 {
            wake(&self.bell, sleepers);
        }
    }

    /// A helper's life: work, spin for the next bell, sleep.
    fn help(&self, spin_for: Duration) {
        loop {
            let heard = self.bell.load(SeqCst);
            if self.stop.load(SeqCst) {
                return;
            }
            let worked = self.jobs.iter().map(|job| job.work()).sum::<u32>() > 0;
            if !worked && !self.rang_within(heard, spin_for) {
                self.sleepers.fetch_add(1, SeqCst);
                sleep(&self.bell, heard);
                self.sleepers.fetch_sub(1, SeqCst);
            }
        }
    }

    fn rang_within(&self, heard: u32, limit: Duration) -> bool {
        let begin = Instant::now();
        while self.bell.load(Acquire) == heard {
            let limit = if self.expected.load(Relaxed) { EXPECTED } else { limit };
            if begin.elapsed() >= limit {
                self.expected.store(false, Relaxed);
                return false;
            }
            spin();
        }
        true
    }
}

/// usvm's own helper threads for large copies. Shared freely between threads; dropped, it ends its helpers.
#[derive(Debug)]
pub struct CopyPool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// The process that has the helpers.
    process: u32,
}

impl CopyPool {
    /// A helper spins this long for the next copy before it sleeps.
    pub const SPIN: Duration = Duration::from_micros(50);

    /// A pool of `helpers` threads (none is fine: callers then copy alone) that spin for `spin_for` before they sleep.
    pub fn new(helpers: usize, spin_for: Duration) -> io::Result<Self> {
        let mut pool = Self {
            shared: Arc::default(),
            helpers: Vec::with_capacity(helpers),
            process: std::process::id(),
        };
        for index in 0..helpers {
            let shared = Arc::clone(&pool.shared);
            pool.helpers.push(thread::spawn(&format!("copy{index}"), move || shared.help(spin_for))?);
        }
        Ok(pool)
    }

    /// How many helpers to have on this machine: one for every four processors, at most three. Where there are fewer, the
    /// helper's spinning costs the program more than its help gains; a few cores already fill the path to memory.
    pub fn default_helpers() -> usize {
        std::thread::available_parallelism().map_or(0, |n| (n.get() / 4).min(3))
    }

    /// Number of helper threads.
    pub fn helpers(&self) -> usize {
        self.helpers.len()
    }

    /// Wakes sleeping helpers for a copy that comes soon: waking takes as long as a good part of the copy.
    pub fn rouse(&self) {
        if self.shared.alone.load(Relaxed) == 0 {
            self.shared.expected.store(true, Relaxed);
            self.shared.ring();
        }
    }

    /// Copies with the helpers' help; see [`Copier::copy_threaded`].
    ///
    /// # Safety
    /// As [`Copier::copy`].
    pub(super) unsafe fn run(
        &self,
        copier: Copier,
        dst: *mut u8,
        src: *const u8,
        len: usize,
        hint: CopyHint,
    ) {
        let slot = if self.helpers.is_empty() { None } else { self.shared.take_slot() };
        let Some(job) = slot else {
            // SAFETY: the caller's promise, passed on.
            return unsafe { copier.copy(dst, src, len, hint) };
        };
        let total = job.publish(copier, dst, src, len, hint);
        self.shared.expected.store(false, Relaxed);
        self.shared.ring();
        let begin = Instant::now();
        let own = job.work().max(1);
        let late = job.wait(total, PATIENCE.max(begin.elapsed() * 2 / own));
        self.shared.judge(late);
        job.taken.store(false, Release);
    }
}

impl Drop for CopyPool {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            // A forked child: the handles are of threads that are not here, and joining them would wait for ever.
            return std::mem::forget(std::mem::take(&mut self.helpers));
        }
        self.shared.stop.store(true, SeqCst);
        self.shared.ring();
        for helper in self.helpers.drain(..) {
            // A helper cannot panic; if one did, the pool ends all the same.
            let _ = helper.join();
        }
    }
}

fn spin() {
    std::hint::spin_loop();
}

/// Sleeps while `word` is `value`; may return early.
fn sleep(word: &AtomicU32, value: u32) {
    // EAGAIN (the word changed) and EINTR both mean: look again, which every caller does.
    let _ = wait_on(word, value, None);
}

fn wake(word: &AtomicU32, waiters: u32) {
    // Waking cannot fail on a live, aligned word.
    let _ = futex::wake(word, futex::Flags::PRIVATE, waiters);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vram::copy::CopyKind;

    fn pattern(len: usize, seed: usize) -> Vec<u8> {
        (0..len).map(|i| (i.wrapping_mul(2654435761).wrapping_add(seed) >> 7) as u8).collect()
    }

    #[test]
    fn every_kind_and_odd_lengths() {
        let pool = CopyPool::new(3, CopyPool::SPIN).unwrap();
        for kind in CopyKind::ALL.into_iter().filter(|k| k.is_supported()) {
            let copier = Copier::with(kind).unwrap();
            for len in [0, 1, 4095, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 77] {
                let src = pattern(len + 2, len);
                let mut dst = vec![0xa5u8; len + 2];
                // SAFETY: both buffers have `len` bytes after the first; they are different allocations.
                unsafe {
                    pool.run(copier, dst.as_mut_ptr().add(1), src.as_ptr().add(1), len, CopyHint::ToDevice)
                };
                assert_eq!(dst[1..=len], src[1..=len], "{kind} {len}");
                assert_eq!((dst[0], dst[len + 1]), (0xa5, 0xa5), "{kind} {len}: wrote outside");
            }
        }
    }

    #[test]
    fn many_callers_share_few_slots() {
        let pool = CopyPool::new(2, Duration::ZERO).unwrap();
        std::thread::scope(|scope| {
            for caller in 0..SLOTS + 3 {
                let pool = &pool;
                scope.spawn(move || {
                    let src = pattern(3 * CHUNK + caller, caller);
                    let mut dst = vec![0; src.len()];
                    for round in 0..40 {
                        dst.fill(round);
                        // SAFETY: two live buffers of one length.
                        unsafe {
                            pool.run(
                                Copier::detect(),
                                dst.as_mut_ptr(),
                                src.as_ptr(),
                                src.len(),
                                CopyHint::FromDevice,
                            )
                        };
                        assert!(dst == src, "caller {caller}, round {round}");
                    }
                });
            }
        });
        assert!(pool.shared.jobs.iter().all(|j| !j.taken.load(Acquire)), "every slot was given back");
    }

    #[test]
    fn a_forked_child_copies_alone_and_lets_go() {
        let mut pool = CopyPool::new(2, Duration::ZERO).unwrap();
        let (src, mut dst) = (pattern(3 * CHUNK, 9), vec![0; 3 * CHUNK]);
        // SAFETY: the child copies between live buffers, allocates nothing, and leaves by _exit; the alarm ends it if it
        // hangs.
        let child = unsafe {
            let pid = libc::fork();
            if pid == 0 {
                libc::alarm(10);
                pool.run(Copier::detect(), dst.as_mut_ptr(), src.as_ptr(), src.len(), CopyHint::ToDevice);
                std::ptr::drop_in_place(&mut pool);
                libc::_exit(if dst == src { 0 } else { 1 });
            }
            pid
        };
        let mut status = -1;
        // SAFETY: waits for the child just made; the status is a live integer.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0, "the child hung, crashed or copied wrongly");
    }

    #[test]
    fn helpers_really_help() {
        let pool = CopyPool::new(1, Duration::from_millis(200)).unwrap();
        let job = &pool.shared.jobs[0];
        let src = pattern(8 * CHUNK, 3);
        let mut dst = vec![0; src.len()];
        // The caller publishes and rings but does not work: only the helper can finish it.
        let total =
            job.publish(Copier::detect(), dst.as_mut_ptr(), src.as_ptr(), src.len(), CopyHint::ToDevice);
        pool.shared.ring();
        job.wait(total, PATIENCE);
        assert!(dst == src);
    }

    #[test]
    fn a_late_helper_is_waited_for_and_then_left_alone() {
        let shared = Shared::default();
        let job = shared.take_slot().unwrap();
        let (src, mut dst) = (pattern(CHUNK, 1), vec![0; CHUNK]);
        let total = job.publish(Copier::detect(), dst.as_mut_ptr(), src.as_ptr(), CHUNK, CopyHint::ToDevice);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(5));
                job.work()
            });
            assert!(job.wait(total, PATIENCE), "that was late");
        });
        assert!(dst == src);
        assert!(!job.wait(total, PATIENCE), "nothing to wait for any more");

        shared.judge(true);
        let taken = [(); 3].map(|()| shared.take_slot().is_some());
        assert_eq!(taken, [false, false, true]);
    }

    #[test]
    fn helpers_that_are_late_again_and_again_are_asked_less_and_less() {
        let shared = Shared::default();
        let alone = |late| {
            shared.judge(late);
            shared.alone.load(Relaxed)
        };
        assert_eq!([true; 7].map(alone), [2, 4, 8, 16, 32, 64, 64]);
        shared.alone.store(0, Relaxed);
        assert_eq!([false, false, true].map(alone), [0, 0, 32], "halved twice, then doubled");
    }

    #[test]
    fn who_expects_a_copy_stays_awake_for_it_but_not_for_ever() {
        let pool = CopyPool::new(0, Duration::ZERO).unwrap();
        let heard = pool.shared.bell.load(SeqCst);
        pool.rouse();
        assert!(pool.shared.rang_within(heard, Duration::ZERO), "who slept is woken");
        let begin = Instant::now();
        assert!(!pool.shared.rang_within(heard.wrapping_add(1), Duration::ZERO));
        assert!(begin.elapsed() >= EXPECTED);
        assert!(!pool.shared.expected.load(Relaxed), "the next sleep is not put off");
        pool.shared.judge(true);
        pool.rouse();
        assert!(!pool.shared.expected.load(Relaxed), "copies go alone now");
    }

    #[test]
    fn cursor_packs() {
        let word = Cursor { generation: 0xdead_beef, next: 0x1234, total: 0xfffe }.pack();
        let c = Cursor::unpack(word);
        assert_eq!((c.generation, c.next, c.total), (0xdead_beef, 0x1234, 0xfffe));
    }

    #[test]
    fn huge_lengths_fit_the_cursor() {
        let job = Job::default();
        let total = job.publish(
            Copier::detect(),
            std::ptr::null_mut(),
            std::ptr::null(),
            1 << 40,
            CopyHint::ToDevice,
        );
        let chunk = job.chunk.load(Relaxed);
        assert!(chunk * usize::from(total) >= 1 << 40 && chunk * (usize::from(total) - 1) < 1 << 40);
    }
}
