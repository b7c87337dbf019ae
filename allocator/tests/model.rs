//! The heap against a model: what is live never overlaps, keeps its contents, and is as large and as aligned as asked for.
#![allow(missing_docs, unsafe_code)]

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};

/// A live block: address, bytes, and the byte that it is filled with.
#[derive(Clone, Copy, Debug)]
struct Live {
    at: usize,
    size: usize,
    fill: u8,
}

impl Live {
    fn new(at: *mut u8, size: usize, fill: u8) -> Self {
        assert!(!at.is_null());
        // SAFETY: a block of `size` bytes of ours. Large ones are written at both ends and once in each page.
        unsafe {
            for i in Self::places(size) {
                at.add(i).write(fill);
            }
        }
        Self { at: at.expose_provenance(), size, fill }
    }

    fn places(size: usize) -> impl Iterator<Item = usize> {
        let step = if size > 8192 { 4096 } else { 1 };
        (0..size).step_by(step).chain(size.checked_sub(1))
    }

    fn ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.at)
    }

    fn check(&self, bytes: usize) {
        for i in Self::places(self.size).filter(|i| *i < bytes) {
            // SAFETY: inside the block.
            let found = unsafe { self.ptr().add(i).read() };
            assert_eq!(found, self.fill, "byte {i} of {self:x?}");
        }
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as usize % end
    }

    fn size(&mut self) -> usize {
        match self.below(100) {
            0 => self.below(6 << 20),
            1..4 => self.below(300_000),
            4..10 => 30_000 + self.below(6000),
            10..40 => self.below(5000),
            _ => self.below(300),
        }
    }
}

/// One thread's steps. Blocks go to the next thread and come from the one before.
fn drive(seed: u64, steps: usize, to: &Sender<Live>, from: &Receiver<Live>) {
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut live: BTreeMap<usize, Live> = BTreeMap::new();
    let insert = |live: &mut BTreeMap<usize, Live>, new: Live| {
        let before = live.range(..=new.at).next_back().map(|(_, b)| *b);
        let after = live.range(new.at..).next().map(|(_, b)| *b);
        assert!(before.is_none_or(|b| b.at + b.size.max(1) <= new.at), "{new:x?} is in {before:x?}");
        assert!(after.is_none_or(|b| new.at + new.size.max(1) <= b.at), "{new:x?} reaches into {after:x?}");
        live.insert(new.at, new);
    };
    let any = |live: &BTreeMap<usize, Live>, random: &mut Random| {
        let from = live.keys().nth(random.below(live.len().max(1))).copied();
        from.map(|at| live[&at])
    };
    for _ in 0..steps {
        let fill = random.below(256) as u8;
        // SAFETY: each block is freed or resized once, by whoever has it; contents are checked before.
        unsafe {
            match random.below(12) {
                0..4 => {
                    let size = random.size();
                    insert(&mut live, Live::new(usvm_alloc::malloc(size).cast(), size, fill));
                }
                4 => {
                    let (count, size) = (1 + random.below(8), random.size() / 4);
                    let block = usvm_alloc::calloc(count, size).cast::<u8>();
                    assert!(Live::places(count * size).all(|i| *block.add(i) == 0), "calloc is not zero");
                    insert(&mut live, Live::new(block, count * size, fill));
                }
                5 => {
                    let (align, size) = (1 << random.below(22), random.size());
                    let block = usvm_alloc::aligned_alloc(align, size).cast::<u8>();
                    assert!(block.addr().is_multiple_of(align));
                    insert(&mut live, Live::new(block, size, fill));
                }
                6..8 => {
                    let Some(old) = any(&live, &mut random) else { continue };
                    old.check(usize::MAX);
                    live.remove(&old.at);
                    let size = random.size();
                    let block = usvm_alloc::realloc(old.ptr().cast(), size).cast::<u8>();
                    Live { at: block.expose_provenance(), ..old }.check(size);
                    insert(&mut live, Live::new(block, size, fill));
                }
                8 => {
                    let Some(block) = any(&live, &mut random) else { continue };
                    assert!(usvm_alloc::owns(block.ptr().cast()));
                    assert!(usvm_alloc::usable_size(block.ptr().cast()) >= block.size);
                    block.check(usize::MAX);
                }
                9 => {
                    let Some(block) = any(&live, &mut random) else { continue };
                    live.remove(&block.at);
                    // The other thread may have ended: then nobody but this one can free it.
                    if to.send(block).is_err() {
                        usvm_alloc::free(block.ptr().cast());
                    }
                }
                10 if random.below(500) == 0 => usvm_alloc::trim(),
                _ => {
                    let Some(block) = any(&live, &mut random) else { continue };
                    live.remove(&block.at);
                    block.check(usize::MAX);
                    usvm_alloc::free(block.ptr().cast());
                }
            }
            for theirs in from.try_iter() {
                theirs.check(usize::MAX);
                usvm_alloc::free(theirs.ptr().cast());
            }
        }
    }
    for block in live.into_values() {
        block.check(usize::MAX);
        // SAFETY: live until here.
        unsafe { usvm_alloc::free(block.ptr().cast()) };
    }
}

#[test]
fn one_thread_follows_the_model() {
    for seed in 1..=6 {
        let (to, from) = channel();
        let (_other, nothing) = channel();
        drive(seed, 4000, &to, &nothing);
        // What was sent came to nobody: freed here, by the same thread.
        for block in from.try_iter() {
            block.check(usize::MAX);
            // SAFETY: sent by `drive`, freed once.
            unsafe { usvm_alloc::free(block.ptr().cast()) };
        }
    }
}

#[test]
fn threads_that_come_and_go_follow_the_model() {
    const THREADS: usize = 4;
    for round in 0..6u64 {
        let (senders, mut receivers): (Vec<_>, Vec<_>) = (0..THREADS).map(|_| channel::<Live>()).unzip();
        receivers.rotate_left(1);
        std::thread::scope(|scope| {
            for (index, (to, from)) in senders.into_iter().zip(receivers).enumerate() {
                scope.spawn(move || {
                    drive(round * 100 + index as u64 + 50, 1500, &to, &from);
                    drop(to);
                    // What arrives late is freed by a thread of its own, after the sender may have ended.
                    std::thread::spawn(move || {
                        for block in from {
                            block.check(usize::MAX);
                            // SAFETY: sent once, freed once.
                            unsafe { usvm_alloc::free(block.ptr().cast()) };
                        }
                    })
                    .join()
                    .unwrap();
                });
            }
        });
    }
}

#[test]
fn a_forked_child_goes_on_while_the_parents_threads_were_busy() {
    let stop = std::sync::atomic::AtomicBool::new(false);
    let blocks: Vec<Live> = (0..2000)
        // SAFETY: freed once in the parent, once in each child's copy.
        .map(|i| Live::new(unsafe { usvm_alloc::malloc(i * 7) }.cast(), i * 7, i as u8))
        .collect();
    std::thread::scope(|scope| {
        for seed in 0..3 {
            let stop = &stop;
            scope.spawn(move || {
                let (to, _from) = channel();
                let (_to, from) = channel();
                let mut round = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    round += 1;
                    drive(seed * 1000 + round, 300, &to, &from);
                }
            });
        }
        for _ in 0..40 {
            // SAFETY: the child only uses the heap under test, and leaves by _exit.
            let child = unsafe { libc::fork() };
            assert!(child >= 0);
            if child == 0 {
                // SAFETY: as above; SIGALRM ends a child that hangs.
                unsafe {
                    libc::alarm(20);
                    for block in &blocks {
                        block.check(usize::MAX);
                        usvm_alloc::free(block.ptr().cast());
                    }
                    for size in (0..200_000).step_by(999) {
                        let new = Live::new(usvm_alloc::malloc(size).cast(), size, 9);
                        new.check(usize::MAX);
                        usvm_alloc::free(new.ptr().cast());
                    }
                    libc::_exit(0);
                }
            }
            let mut status = 0;
            // SAFETY: waits for the child made above.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert_eq!(status, 0, "the child hung or crashed");
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    for block in blocks {
        block.check(usize::MAX);
        // SAFETY: live until here.
        unsafe { usvm_alloc::free(block.ptr().cast()) };
    }
}
