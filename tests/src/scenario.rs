//! One story that every fallback and every injected failure goes through, with a model of what memory must hold.
//!
//! # Overview
//! [`Scenario::play`] has the device and the CPU change memory in turn: more than the device holds, in chunks of all sizes,
//! with brackets on read-mostly memory, prefetches, evictions, and a fork. After each step that failed, every word must be
//! as it was or as the step would have made it; after all others, as the model says. Whoever finds another word panics.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use crate::support::{Dice, K4, K64, M2, Mem, reads, value};
use usvm::device::sim::Gpu;
use usvm::{Error, Fence, Hint, Location, Runtime};

/// Device memory the scenario expects.
pub const VRAM: u64 = 2 * M2;

/// One piece of memory with the words it must hold.
struct Piece {
    mem: Mem,
    model: Vec<u64>,
}

/// The memory and its model.
pub struct Scenario {
    pieces: Vec<Piece>,
    dice: Dice,
    /// Errors of steps, in order.
    pub errors: Vec<Error>,
    /// Whether a child is forked, which checks what it sees.
    pub fork: bool,
}

impl Scenario {
    /// Memory for the scenario: a large piece in huge pages and one in small pages.
    pub fn new(seed: u64) -> Self {
        let pieces = [Mem::huge(3 * M2), Mem::small(3 * K64 + 3 * K4)].map(|mem| {
            mem.fill(seed);
            let model = (0..mem.len / 8).map(|i| value(seed, i)).collect();
            Piece { mem, model }
        });
        Self { pieces: pieces.into(), dice: Dice::new(seed), errors: Vec::new(), fork: true }
    }

    /// Plays it all on device 0 of `runtime`.
    pub fn play(&mut self, runtime: &Runtime) {
        for round in 1..=2u64 {
            for piece in 0..self.pieces.len() {
                self.device_writes(runtime, piece, round * 10);
                self.cpu_edits(piece, 6, round * 10 + 1);
                self.device_checks(runtime, piece);
                self.shared(runtime, piece, round * 10 + 2);
                self.moves(runtime, piece);
                self.device_edits(runtime, piece, 12, round * 10 + 3);
                self.cpu_checks(piece, 4);
            }
            if round == 1 {
                self.holes(runtime, 15);
                self.over_the_link(runtime, 16);
            }
            if self.fork {
                self.forks(runtime, round);
            }
        }
        self.check_all();
    }

    /// Every word, by the CPU.
    pub fn check_all(&self) {
        for piece in &self.pieces {
            piece.mem.check_words(0, piece.mem.len, |i| piece.model[i as usize]);
        }
    }

    /// A number for all contents.
    pub fn sum(&self) -> u64 {
        let words = self.pieces.iter().flat_map(|p| p.mem.words::<u64>());
        words.fold(0, |sum, w| sum.rotate_left(5).wrapping_add(w.load(Relaxed)))
    }

    /// Notes an error; a device that read wrong words is a failure of the test.
    fn note(&mut self, result: usvm::Result<bool>) -> bool {
        match result {
            Ok(_) => true,
            Err(Error::Invalid { argument, reason }) => panic!("{argument}: {reason}"),
            Err(e) => {
                self.errors.push(e);
                false
            }
        }
    }

    /// After a step that would have stored `new` in words `from..`: all of them if it went well, else each or none.
    fn stored(&mut self, piece: usize, well: bool, from: usize, new: impl Iterator<Item = u64>) {
        let Piece { mem, model } = &mut self.pieces[piece];
        for (word, new) in (from..).zip(new) {
            if !well {
                let got = mem.words::<u64>()[word].load(Relaxed);
                assert!(
                    got == model[word] || got == new,
                    "word {word:#x} is {got:#x}: neither {:#x} as before nor {new:#x}; errors: {:?}",
                    model[word],
                    self.errors
                );
                model[word] = got;
            } else {
                model[word] = new;
            }
        }
    }

    fn device_writes(&mut self, runtime: &Runtime, piece: usize, seed: u64) {
        let (at, len) = (self.pieces[piece].mem.at, self.pieces[piece].mem.len);
        let done = runtime.launch(0, move |gpu| crate::support::gpu_fill(gpu, at, len, 0, seed)).wait(None);
        let well = self.note(done);
        self.stored(piece, well, 0, (0..len / 8).map(|i| value(seed, i)));
    }

    fn pages(&self, piece: usize) -> u64 {
        self.pieces[piece].mem.len / K4
    }

    fn cpu_edits(&mut self, piece: usize, count: u64, seed: u64) {
        for _ in 0..count {
            let page = self.dice.below(self.pages(piece));
            let Piece { mem, model } = &mut self.pieces[piece];
            for i in (page * K4 / 8..(page + 1) * K4 / 8).step_by(3) {
                let word = &mem.words::<u64>()[i as usize];
                assert_eq!(word.load(Relaxed), model[i as usize], "word {i:#x}; errors: {:?}", self.errors);
                word.store(value(seed, i), Relaxed);
                model[i as usize] = value(seed, i);
            }
        }
    }

    fn cpu_checks(&mut self, piece: usize, count: u64) {
        for _ in 0..count {
            let page = self.dice.below(self.pages(piece));
            let Piece { mem, model } = &self.pieces[piece];
            mem.check_words(page * K4, K4, |i| model[i as usize]);
        }
    }

    fn device_edits(&mut self, runtime: &Runtime, piece: usize, count: u64, seed: u64) {
        for _ in 0..count {
            let page = self.dice.below(self.pages(piece));
            let at = self.pieces[piece].mem.at + page * K4;
            let first = page * K4 / 8;
            let done =
                runtime.launch(0, move |gpu| crate::support::gpu_fill(gpu, at, K4, first, seed)).wait(None);
            let well = self.note(done);
            self.stored(piece, well, first as usize, (first..first + K4 / 8).map(|i| value(seed, i)));
        }
    }

    fn checking(&self, piece: usize) -> impl FnOnce(&mut Gpu<'_>) -> usvm::Result<()> + Send + use<> {
        let Piece { mem, model } = &self.pieces[piece];
        let (at, len, model) = (mem.at, mem.len, Arc::new(model.clone()));
        move |gpu| {
            let mut wrong = None;
            gpu.for_each_tile(at, len, |tile, offset| {
                for (word, i) in tile.chunks_exact(8).zip(offset as usize / 8..) {
                    let got = u64::from_le_bytes(word.try_into().unwrap());
                    if got != model[i] && wrong.is_none() {
                        wrong = Some((i, got));
                    }
                }
            })?;
            let Some((i, got)) = wrong else { return Ok(()) };
            let reason = format!("the device reads {got:#x} in word {i:#x}, not {:#x}", model[i]);
            Err(Error::Invalid { argument: "data", reason })
        }
    }

    fn device_checks(&mut self, runtime: &Runtime, piece: usize) {
        let done = runtime.launch(0, self.checking(piece)).wait(None);
        self.note(done);
    }

    /// Read-mostly brackets with CPU writes in between.
    fn shared(&mut self, runtime: &Runtime, piece: usize, seed: u64) {
        let (at, len) = (self.pieces[piece].mem.at, self.pieces[piece].mem.len);
        let span = len.min(M2);
        let advised = runtime.advise(at, span, Hint::ReadMostly(true));
        self.note(advised.map(|()| true));
        for round in 0..3 {
            let done = runtime.launch_with(0, &[reads(at, span)], self.checking(piece)).wait(None);
            self.note(done);
            self.cpu_edits(piece, 3, seed + round * 100);
        }
        let advised = runtime.advise(at, span, Hint::ReadMostly(false));
        self.note(advised.map(|()| true));
    }

    fn moves(&mut self, runtime: &Runtime, piece: usize) {
        let Mem { at, len, .. } = self.pieces[piece].mem;
        let fences: Vec<Fence> = vec![
            runtime.prefetch(at, len.min(M2), Location::Device(0)),
            runtime.prefetch(at + len / 2, K4, Location::Host),
        ];
        for fence in fences {
            let done = fence.wait(None);
            self.note(done);
        }
        let evicted = runtime.evict(at + K4, len / 3);
        self.note(evicted.map(|()| true));
    }

    /// Memory with pages that nobody has touched: they read as zeroes on both sides, and the CPU can write them.
    fn holes(&mut self, runtime: &Runtime, seed: u64) {
        // A whole chunk: smaller ones are cut so that they have no holes.
        let mem = Mem::small(M2);
        let per_page = (K4 / 8) as usize;
        let mut model = vec![0; (mem.len / 8) as usize];
        let set = |model: &mut [u64], page: usize| {
            let words = mem.words::<u64>().iter().zip(model).enumerate();
            for (i, (word, model)) in words.skip(page * per_page).take(per_page) {
                *model = value(seed, i as u64);
                word.store(*model, Relaxed);
            }
        };
        (0..32).step_by(2).for_each(|page| set(&mut model, page));
        let (at, len, words) = (mem.at, mem.len, Arc::new(model.clone()));
        let seen = runtime.launch(0, move |gpu| {
            let mut bytes = vec![0; len as usize];
            gpu.read(at, &mut bytes)?;
            let right = bytes
                .chunks_exact(8)
                .zip(&*words)
                .all(|(b, w)| u64::from_le_bytes(b.try_into().unwrap()) == *w);
            let wrong = || Error::Invalid { argument: "data", reason: "the device reads holes wrong".into() };
            if right { Ok(()) } else { Err(wrong()) }
        });
        let seen = seen.wait(None);
        self.note(seen);
        (1..32).step_by(4).for_each(|page| set(&mut model, page));
        mem.check_words(0, 32 * K4, |i| model[i as usize]);
    }

    /// Memory that never migrates: the device stores into it and reads it where it is.
    fn over_the_link(&mut self, runtime: &Runtime, seed: u64) {
        let mem = Mem::shared(2 * K4);
        mem.fill(seed);
        let (at, len, half) = (mem.at, mem.len, mem.len / 2);
        let stored =
            runtime.launch(0, move |gpu| crate::support::gpu_fill(gpu, at, half, 0, seed + 1)).wait(None);
        let well = self.note(stored);
        let stored: Vec<u64> = mem.words::<u64>().iter().map(|word| word.load(Relaxed)).collect();
        for (i, got) in (0..half / 8).zip(&stored) {
            let (old, new) = (value(seed, i), value(seed + 1, i));
            assert!(
                *got == new || !well && *got == old,
                "word {i:#x} is {got:#x}; errors: {:?}",
                self.errors
            );
        }
        mem.check_words(half, half, |i| value(seed, i));
        let seen = runtime.launch(0, move |gpu| {
            let mut bytes = vec![0; len as usize];
            gpu.read(at, &mut bytes)?;
            let right = bytes.chunks_exact(8).zip(&stored).all(|(b, word)| b == word.to_le_bytes());
            let wrong =
                || Error::Invalid { argument: "data", reason: "the device reads over the link wrong".into() };
            if right { Ok(()) } else { Err(wrong()) }
        });
        let seen = seen.wait(None);
        self.note(seen);
    }

    /// A child sees everything as it was at the fork, wherever it was.
    fn forks(&mut self, runtime: &Runtime, round: u64) {
        self.device_writes(runtime, 0, round * 10 + 7);
        // SAFETY: the child only reads memory and ends.
        #[allow(unsafe_code)]
        let child = unsafe { libc::fork() };
        if child == 0 {
            let wrong = self.pieces.iter().any(|piece| {
                let words = piece.mem.words::<u64>();
                words.iter().zip(&piece.model).any(|(word, model)| word.load(Relaxed) != *model)
            });
            // SAFETY: ends the child without running anything of the parent's.
            #[allow(unsafe_code)]
            unsafe {
                libc::_exit(if wrong { 2 } else { 0 })
            };
        }
        if child < 0 {
            let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
            self.errors.push(Error::Os { call: "fork", errno: usvm::ground::error::Errno(errno) });
            return;
        }
        // The parent goes on writing while the child reads.
        self.cpu_edits(0, 4, round * 10 + 8);
        let mut status = 0;
        // SAFETY: waits for our child.
        #[allow(unsafe_code)]
        let waited = unsafe { libc::waitpid(child, &mut status, 0) };
        assert_eq!((waited, status), (child, 0), "the child saw other words; errors: {:?}", self.errors);
    }
}
