//! Many threads change their own parts of one mapping at random while the device works on all of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use usvm::{Fence, Location, Runtime};
use usvm_tests::area::*;
use usvm_tests::isolated::isolated;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

/// A thread's part of the mapping: no multiple of a chunk, so that ranges have several owners.
const PART: u64 = 3 * M2 / 2 + 3 * K64 + 5 * K4;
const THREADS: u64 = 4;
/// Runs of several pages that one mremap moved.
static MANY: AtomicU64 = AtomicU64::new(0);

/// One owner.
struct Owner {
    rt: Runtime,
    piece: Piece,
    /// A place of the same length to move memory to and back from.
    aside: Area,
    rng: Rng,
    /// Work in flight and what it is about.
    flying: Option<(Fence, u64, u64, u8)>,
    /// The last calls, for whoever reads a failure.
    log: Vec<String>,
}

impl Owner {
    /// A random run of whole pages.
    fn run(&mut self) -> (u64, u64) {
        let pages = self.piece.len() / K4;
        let first = self.rng.below(pages);
        let most = match self.rng.below(4) {
            0 => 1,
            1 => 16,
            _ => pages,
        };
        let count = 1 + self.rng.below((pages - first).min(most));
        (first * K4, count * K4)
    }

    fn land(&mut self) {
        if let Some((fence, off, len, key)) = self.flying.take() {
            fence.wait(None).unwrap_or_else(|e| panic!("work in flight: {e}; {:?}", self.log));
            xor(&mut self.piece.bytes[off as usize..(off + len) as usize], key);
        }
    }

    /// A run that no work in flight is about; waits for that work if there is none.
    fn free_run(&mut self) -> (u64, u64) {
        for _ in 0..4 {
            let (off, len) = self.run();
            match &self.flying {
                Some((_, o, l, _)) if off < o + l && *o < off + len => {}
                _ => return (off, len),
            }
        }
        self.land();
        self.run()
    }

    fn want(&self, off: u64, len: u64) -> &[u8] {
        &self.piece.bytes[off as usize..(off + len) as usize]
    }

    fn step(&mut self) {
        let (off, len) = self.free_run();
        let at = self.piece.at + off;
        let op = self.rng.below(25);
        if self.log.len() == 10 {
            self.log.remove(0);
        }
        self.log.push(format!("{op}:{:x}+{:x}", off, len));
        let why = |this: &Self| format!("{:x} {}", this.piece.at, this.log.join(" "));
        match op {
            0..=2 => {
                let bytes = self.rng.bytes(len);
                cpu_write(at, &bytes);
                self.piece.bytes[off as usize..(off + len) as usize].copy_from_slice(&bytes);
            }
            3..=4 => same(&cpu_read(at, len), self.want(off, len), why(self)),
            5..=6 => {
                let seen = device_read(&self.rt, at, len).unwrap_or_else(|e| panic!("{e} {}", why(self)));
                same(&seen, self.want(off, len), why(self));
            }
            7..=9 => {
                self.land();
                let key = self.rng.word() as u8;
                self.flying = Some((device_xor_later(&self.rt, at, len, key), off, len, key));
            }
            10 => {
                unmap(at, len);
                // Nobody else maps here: everything in this process that maps does so elsewhere.
                map(Some(at), len, RW).unwrap();
                self.piece.bytes[off as usize..(off + len) as usize].fill(0);
            }
            11 => {
                map(Some(at), len, RW).unwrap();
                self.piece.bytes[off as usize..(off + len) as usize].fill(0);
            }
            12 => {
                advise(at, len, libc::MADV_DONTNEED).unwrap();
                self.piece.bytes[off as usize..(off + len) as usize].fill(0);
            }
            13..=14 => {
                let len = len.min(24 * K4);
                let there = self.aside.at + off;
                shift(at, len, there);
                same(&cpu_read(there, len.min(K64)), self.want(off, len.min(K64)), why(self));
                if op == 14 {
                    device_xor(&self.rt, there, len, 0x33).unwrap_or_else(|e| panic!("{e} {}", why(self)));
                    xor(&mut self.piece.bytes[off as usize..(off + len) as usize], 0x33);
                }
                shift(there, len, at);
                map(Some(there), len, libc::PROT_NONE).unwrap();
            }
            15 => {
                protect(at, len, libc::PROT_READ);
                same(&cpu_read(at, len), self.want(off, len), why(self));
                protect(at, len, RW);
            }
            16 => {
                protect(at, len, libc::PROT_NONE);
                protect(at, len, RW);
            }
            17 => {
                let advices = [
                    libc::MADV_HUGEPAGE,
                    libc::MADV_NOHUGEPAGE,
                    libc::MADV_COLLAPSE,
                    libc::MADV_POPULATE_WRITE,
                ];
                let _ = advise(at, len, advices[self.rng.below(4) as usize]);
            }
            18 => {
                let to = if self.rng.below(2) == 0 { Location::Host } else { Location::Device(0) };
                self.rt.prefetch(at, len, to).wait(None).unwrap_or_else(|e| panic!("{e} {}", why(self)));
            }
            19 => {
                // DONTUNMAP: the contents go, the mapping stays and is empty.
                let len = len.min(8 * K4);
                let there = self.aside.at + off;
                for page in (0..len).step_by(K4 as usize) {
                    let to = Some(there + page);
                    remap(at + page, K4, K4, libc::MREMAP_DONTUNMAP, to)
                        .unwrap_or_else(|e| panic!("{e} {}", why(self)));
                }
                same(&cpu_read(there, len), self.want(off, len), why(self));
                same(&cpu_read(at, len), &vec![0; len as usize], why(self));
                let seen = device_read(&self.rt, at, len).unwrap_or_else(|e| panic!("{e} {}", why(self)));
                same(&seen, &vec![0; len as usize], why(self));
                shift(there, len, at);
                map(Some(there), len, libc::PROT_NONE).unwrap();
            }
            20 => {
                // Grown and moved in one call; what is new is empty.
                let there = self.aside.at + off;
                let room = (PART - off).min(4 * K4) / K4 * K4;
                remap(at, K4, room, 0, Some(there)).unwrap_or_else(|e| panic!("{e} {}", why(self)));
                let mut want = self.want(off, K4).to_vec();
                want.resize(room as usize, 0);
                let seen = device_read(&self.rt, there, room).unwrap_or_else(|e| panic!("{e} {}", why(self)));
                same(&seen, &want, why(self));
                same(&cpu_read(there, room), &want, why(self));
                shift(there, K4, at);
                map(Some(there), room, libc::PROT_NONE).unwrap();
            }
            21 => {
                // Many pages in one call, where they are one mapping.
                let there = self.aside.at + off;
                match remap(at, len, len, 0, Some(there)) {
                    Ok(_) => {
                        MANY.fetch_add(1, Ordering::Relaxed);
                        same(&cpu_read(there + len - K4, K4), self.want(off + len - K4, K4), why(self));
                        shift(there, len, at);
                    }
                    Err(e) => {
                        assert_eq!(e.raw_os_error(), Some(libc::EFAULT), "{}", why(self));
                        // Since 6.17 the kernel moves mapping after mapping, and what it moved before it stopped is there.
                        for page in (0..len).step_by(K4 as usize).filter(|page| !mapped(at + page)) {
                            shift(there + page, K4, at + page);
                        }
                    }
                }
                map(Some(there), len, libc::PROT_NONE).unwrap();
            }
            22 => {
                advise(at, len, libc::MADV_FREE).unwrap();
                for page in (0..len).step_by(K4 as usize) {
                    let seen = cpu_read(at + page, K4);
                    let well = seen == self.want(off + page, K4) || seen.iter().all(|b| *b == 0);
                    assert!(well, "foreign contents after MADV_FREE: {}", why(self));
                }
                // Written, contents are certain again.
                let bytes = self.rng.bytes(len);
                cpu_write(at, &bytes);
                self.piece.bytes[off as usize..(off + len) as usize].copy_from_slice(&bytes);
            }
            23 => {
                let answer = advise(at, len, libc::MADV_REMOVE);
                assert_eq!(answer.unwrap_err().raw_os_error(), Some(libc::EINVAL), "{}", why(self));
            }
            _ => {
                // SAFETY: locks and unlocks memory of this owner.
                unsafe {
                    libc::mlock(at as *const _, len.min(K64) as usize);
                    libc::munlock(at as *const _, len.min(K64) as usize);
                }
            }
        }
    }
}

/// Whether anything is mapped there.
fn mapped(page: u64) -> bool {
    let mut there = 0u8;
    // SAFETY: asks about one page; the answer is one byte.
    unsafe { libc::mincore(page as *mut _, K4 as usize, &mut there) == 0 }
}

/// mremap of `[at, at + len)` to `to`, page by page: one call cannot move several mappings, and usvm's other threads cut
/// and join mappings at any time.
fn shift(at: u64, len: u64, to: u64) {
    for off in (0..len).step_by(K4 as usize) {
        remap(at + off, K4, K4, 0, Some(to + off)).unwrap();
    }
}

/// One mapping, an owner thread for each part, for so long.
fn owners(rt: &Runtime, seed: u64, time: Duration) -> u64 {
    let whole = Area::new(THREADS * PART);
    let deadline = Instant::now() + time;
    let steps = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..THREADS)
        .map(|i| {
            let (rt, at, steps) = (rt.clone(), whole.at + i * PART, steps.clone());
            std::thread::spawn(move || {
                let mut rng = Rng::new(seed * 100 + i);
                let piece = Piece { at, bytes: rng.bytes(PART) };
                cpu_write(at, &piece.bytes);
                let aside = Area::new(PART);
                protect(aside.at, PART, libc::PROT_NONE);
                let mut owner = Owner { rt, piece, aside, rng, flying: None, log: Vec::new() };
                while Instant::now() < deadline {
                    owner.step();
                    steps.fetch_add(1, Ordering::Relaxed);
                }
                owner.land();
                let what = format!("seed {seed} at the end: {:?}", owner.log);
                same(&cpu_read(at, PART), &owner.piece.bytes, &what);
                let seen = device_read(&owner.rt, at, PART).unwrap();
                same(&seen, &owner.piece.bytes, &what);
            })
        })
        .collect();
    let results: Vec<_> = threads.into_iter().map(|t| t.join()).collect();
    assert!(results.iter().all(Result::is_ok), "seed {seed}");
    steps.load(Ordering::Relaxed)
}

fn seeds(name: &'static str, vram: u64, from: u64) {
    isolated(name, || {
        let rt = runtime(vram);
        let seed = std::env::var("USVM_TEST_SEED").ok().and_then(|s| s.parse().ok());
        let first = seed.unwrap_or(from);
        for seed in first..first + 3 {
            let steps = owners(&rt, seed, Duration::from_millis(1500));
            assert!(steps > 40, "only {steps} steps");
        }
        println!("{} runs moved by one call", MANY.load(Ordering::Relaxed));
        assert!(rt.stats().cpu_faults > 20 && rt.stats().bytes_to_device > 8 << 20, "{}", rt.stats());
        rt.shutdown();
    });
}

#[test]
fn random_calls_with_room() {
    seeds("random_calls_with_room", 64 << 20, 1);
}

#[test]
fn random_calls_with_evictions() {
    seeds("random_calls_with_evictions", 6 << 20, 1000);
}

/// Calls that change no contents, over and over, while the device and a CPU thread use all of the memory.
#[test]
fn harmless_calls_during_migrations() {
    isolated("harmless_calls_during_migrations", || {
        let rt = runtime(32 << 20);
        for huge in [false, true] {
            let (area, piece) = Area::filled(3 * M2 + 7 * K64, huge, &mut Rng::new(5));
            let stop = Arc::new(AtomicBool::new(false));
            let (at, len) = (area.at, area.len);
            for off in (0..len).step_by(K4 as usize) {
                cpu_write(at + off + K4 - 8, &0u64.to_le_bytes());
            }
            let cpu = {
                let stop = stop.clone();
                std::thread::spawn(move || {
                    let (mut n, mut off) = (0u64, 0);
                    while !stop.load(Ordering::Relaxed) {
                        // The last word of each page is the CPU's.
                        let word = at + off + K4 - 8;
                        let was = u64::from_le_bytes(cpu_read(word, 8).try_into().unwrap());
                        cpu_write(word, &(was + 1).to_le_bytes());
                        off = (off + 37 * K4) % (len / K4 * K4);
                        n += 1;
                    }
                    n
                })
            };
            let device = {
                let (rt, stop) = (rt.clone(), stop.clone());
                std::thread::spawn(move || {
                    let mut rounds = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        rt.launch(0, move |gpu| {
                            for off in (0..len).step_by(K4 as usize) {
                                // The first word of each page is the device's.
                                let n = gpu.load_u64(at + off)?;
                                gpu.store_u64(at + off, n.wrapping_add(1))?;
                            }
                            Ok(())
                        })
                        .wait(None)
                        .unwrap();
                        rounds += 1;
                    }
                    rounds
                })
            };
            let mut rng = Rng::new(77);
            let deadline = Instant::now() + Duration::from_millis(1500);
            let mut calls = 0u64;
            while Instant::now() < deadline {
                let first = rng.below(len / K4);
                let count = 1 + rng.below(len / K4 - first);
                let (from, bytes) = (at + first * K4, count * K4);
                match rng.below(8) {
                    0 => drop(advise(from, bytes, libc::MADV_HUGEPAGE)),
                    1 => drop(advise(from, bytes, libc::MADV_NOHUGEPAGE)),
                    2 => drop(advise(from, bytes, libc::MADV_COLLAPSE)),
                    3 => drop(advise(from, bytes, libc::MADV_POPULATE_READ)),
                    // SAFETY: locks and unlocks the test's own memory.
                    4 => unsafe {
                        libc::mlock(from as *const _, K4 as usize);
                        libc::munlock(from as *const _, K4 as usize);
                    },
                    5 => {
                        advise(from, bytes, libc::MADV_DONTFORK).unwrap();
                        advise(from, bytes, libc::MADV_DOFORK).unwrap();
                    }
                    // SAFETY: as above.
                    6 => unsafe {
                        assert_eq!(libc::mlock(at as *const _, len as usize), 0);
                        assert_eq!(libc::munlock(at as *const _, len as usize), 0);
                    },
                    _ => protect(from, bytes, RW | if rng.below(2) == 0 { libc::PROT_EXEC } else { 0 }),
                }
                calls += 1;
            }
            stop.store(true, Ordering::Relaxed);
            let (cpu, device) = (cpu.join().unwrap(), device.join().unwrap());
            assert!(cpu > 10 && device > 0 && calls > 10, "cpu {cpu}, device {device}, calls {calls}");
            let mut counted = 0;
            for off in (0..len).step_by(K4 as usize) {
                let page = cpu_read(at + off, K4);
                let was = &piece.bytes[off as usize..(off + K4) as usize];
                let word = |b: &[u8]| u64::from_le_bytes(b.try_into().unwrap());
                assert_eq!(
                    word(&page[..8]),
                    word(&was[..8]).wrapping_add(device),
                    "page {off:#x}: the device's word"
                );
                same(&page[8..K4 as usize - 8], &was[8..K4 as usize - 8], format_args!("page {off:#x}"));
                counted += word(&page[K4 as usize - 8..]);
            }
            assert_eq!(counted, cpu, "no count of the CPU is lost");
            drop(area);
        }
    });
}
