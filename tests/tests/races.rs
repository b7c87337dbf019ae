//! CPU and device on the same memory at the same time: no store may be lost or torn.

use std::arch::x86_64::{__m128i, _mm_load_si128, _mm_set_epi64x, _mm_store_si128, _mm_storeu_si128};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use usvm::ground::addr::{PageMask, Span};
use usvm::ground::error::Error;
use usvm::host::Options;
use usvm::host::features::Features;
use usvm::{Config, Hint, Location, Runtime};
use usvm_tests::support::*;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

/// One cache line of a hammered range. Each CPU thread has the words of its number; the device has the last ones; two
/// words are everybody's.
const LINE: u64 = 256;
const SHARED_BY_ALL: u64 = 0;
const SHARED_BY_CPUS: u64 = 8;
const DEVICE_WORD: u64 = 16;
const DEVICE_COUNTER: u64 = 24;
const WIDE: u64 = 32;
const NARROW: u64 = 128;

/// A line of page `page` that differs from page to page, so that pages are touched in many places.
fn line_of(mem: &Mem, page: u64) -> u64 {
    page * K4 + (page * 7 % (K4 / LINE)) * LINE + if page * K4 >= mem.len { mem.len } else { 0 }
}

fn store16(at: u64, low: u64, high: u64) {
    // SAFETY: 16 bytes, aligned, of a mapping that outlives the threads; no reference to them exists.
    unsafe { _mm_store_si128(at as *mut __m128i, _mm_set_epi64x(high as i64, low as i64)) };
}

fn load16(at: u64) -> (u64, u64) {
    let mut out = [0u64; 2];
    // SAFETY: as in `store16`; the result goes to a local of 16 bytes.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm_load_si128(at as *const __m128i)) };
    (out[0], out[1])
}

/// What one CPU thread keeps true: what it stored last is what it finds, in every width.
struct Hammer<'a> {
    mem: &'a Mem,
    thread: u64,
    /// Number of the last store to each page.
    last: Vec<u64>,
    added: u64,
}

impl<'a> Hammer<'a> {
    fn new(mem: &'a Mem, thread: u64) -> Self {
        Self { mem, thread, last: vec![0; (mem.len / K4) as usize], added: 0 }
    }

    fn hit(&mut self, page: u64) {
        let line = line_of(self.mem, page);
        let last = &mut self.last[page as usize];
        let (wide, narrow) = (line + WIDE + self.thread * 16, line + NARROW + self.thread * 16);
        let tag = |n: u64| if n == 0 { 0 } else { n << 8 | self.thread };
        let (low, high) = load16(self.mem.at + wide);
        assert_eq!((low, high), (tag(*last), if *last == 0 { 0 } else { !tag(*last) }), "page {page}");
        let (bytes, halves) = (self.mem.words::<u8>(), self.mem.words::<u16>());
        let (words, longs) = (self.mem.words::<u32>(), self.mem.words::<u64>());
        let n = narrow as usize;
        assert_eq!(bytes[n].load(Relaxed), *last as u8, "byte of page {page}");
        assert_eq!(halves[n / 2 + 1].load(Relaxed), *last as u16, "half word of page {page}");
        assert_eq!(words[n / 4 + 1].load(Relaxed), *last as u32, "word of page {page}");
        assert_eq!(longs[n / 8 + 1].load(Relaxed), *last, "long word of page {page}");
        *last += 1;
        store16(self.mem.at + wide, tag(*last), !tag(*last));
        bytes[n].store(*last as u8, Relaxed);
        halves[n / 2 + 1].store(*last as u16, Relaxed);
        words[n / 4 + 1].store(*last as u32, Relaxed);
        longs[n / 8 + 1].store(*last, Relaxed);
        longs[((line + SHARED_BY_ALL) / 8) as usize].fetch_add(1, Relaxed);
        longs[((line + SHARED_BY_CPUS) / 8) as usize].fetch_add(1, Relaxed);
        self.added += 1;
    }
}

/// Sum over all pages of the word at `offset` of their lines.
fn sum(mem: &Mem, offset: u64) -> u64 {
    (0..mem.len / K4)
        .map(|p| mem.words::<u64>()[((line_of(mem, p) + offset) / 8) as usize].load(Relaxed))
        .sum()
}

/// Until `stop`: launches that check the device's own word on some pages, store to it and add to the shared one. Gives the additions to
/// the word that everybody adds to, and to its own.
fn device_side(runtime: &Runtime, mem: &Mem, device: u32, atomics: bool, stop: &AtomicBool) -> (u64, u64) {
    let (pages, at) = (mem.len / K4, mem.at);
    let lines: Arc<Vec<u64>> = Arc::new((0..pages).map(|p| at + line_of(mem, p)).collect());
    let own: Arc<Vec<AtomicU64>> = Arc::new((0..pages).map(|_| AtomicU64::new(0)).collect());
    let added = Arc::new(AtomicU64::new(0));
    let mut dice = Dice::new(77 + u64::from(device));
    while !stop.load(Relaxed) {
        let first = dice.below(pages);
        let count = 1 + dice.below(4);
        let (lines, own, sum) = (lines.clone(), own.clone(), added.clone());
        let job = move |gpu: &mut usvm::device::sim::Gpu<'_>| {
            for page in (first..first + count).map(|p| (p % pages) as usize) {
                let (line, before) = (lines[page], own[page].load(Relaxed));
                let word = line + DEVICE_WORD + u64::from(device) * 64;
                let found = gpu.load_u64(word)?;
                assert_eq!(found, before, "the device's own word of page {page}");
                gpu.store_u64(word, before + 1)?;
                own[page].store(before + 1, Relaxed);
                if atomics {
                    gpu.fetch_add_u64(line + SHARED_BY_ALL, 1)?;
                    gpu.fetch_add_u64(line + DEVICE_COUNTER, 1)?;
                    sum.fetch_add(1, Relaxed);
                }
            }
            Ok(())
        };
        runtime.launch(device, job).wait(None).unwrap();
    }
    let n = added.load(Relaxed);
    (n, n)
}

/// `threads` CPU threads and all devices hammer `mem` for `time` and until so many migrations; a machine that is busy with
/// other things gets eight times as long and must do a tenth.
fn hammer(runtime: &Runtime, mem: &Mem, threads: u64, atomics: bool, time: Duration, migrations: u64) {
    let stop = AtomicBool::new(false);
    let moved = || {
        let s = runtime.stats();
        s.migrations_2m + s.migrations_64k + s.migrations_4k
    };
    let (by_cpus, by_devices) = std::thread::scope(|scope| {
        let stop = &stop;
        let cpus: Vec<_> = (0..threads)
            .map(|t| {
                scope.spawn(move || {
                    let (mut hammer, mut dice) = (Hammer::new(mem, t), Dice::new(t));
                    while !stop.load(Relaxed) {
                        let first = dice.below(mem.len / K4);
                        (0..32).for_each(|n| hammer.hit((first + n) % (mem.len / K4)));
                    }
                    hammer.added
                })
            })
            .collect();
        let devices: Vec<_> = (0..runtime.devices().len() as u32)
            .map(|d| scope.spawn(move || device_side(runtime, mem, d, atomics, stop)))
            .collect();
        let (began, limit) = (Instant::now(), time * 8);
        while (began.elapsed() < time || moved() < migrations)
            && began.elapsed() < limit
            && !cpus.iter().any(|t| t.is_finished())
            && !devices.iter().any(|t| t.is_finished())
        {
            std::thread::sleep(Duration::from_millis(20));
        }
        stop.store(true, Relaxed);
        let by_cpus: u64 = cpus.into_iter().map(|t| t.join().unwrap()).sum();
        let by_devices: u64 = devices.into_iter().map(|t| t.join().unwrap().0).sum();
        (by_cpus, by_devices)
    });
    assert!(moved() >= migrations / 10, "{} migrations, not {migrations}\n{}", moved(), runtime.stats());
    assert_eq!(sum(mem, SHARED_BY_CPUS), by_cpus, "additions of the CPUs");
    assert_eq!(sum(mem, DEVICE_COUNTER), by_devices, "additions of the devices");
    assert_eq!(sum(mem, SHARED_BY_ALL), by_cpus + by_devices, "additions of all");
    println!("{by_cpus} by CPUs, {by_devices} by devices, {} migrations", moved());
}

fn zeroed(mem: Mem) -> Mem {
    mem.words::<u64>().iter().for_each(|w| w.store(0, Relaxed));
    mem
}

#[test]
fn no_store_is_lost_in_a_huge_page_that_migrates() {
    let _alone = alone("huge page", 60);
    let runtime = runtime(policy("gpusvm"), &[16 << 20]);
    let mem = zeroed(Mem::huge(M2));
    hammer(&runtime, &mem, 3, true, Duration::from_secs(2), 2000);
}

#[test]
fn no_store_is_lost_in_small_pages_that_migrate() {
    let _alone = alone("small pages", 60);
    let runtime = runtime(policy("gpusvm"), &[16 << 20]);
    let mem = zeroed(Mem::small(M2));
    hammer(&runtime, &mem, 2, true, Duration::from_secs(1), 500);
    drop(mem);
    // Ranges of 4 KiB and 64 KiB.
    let mem = zeroed(Mem::small(K64 * 2 + K4 * 3));
    hammer(&runtime, &mem, 2, true, Duration::from_secs(1), 2000);
}

#[test]
fn no_store_is_lost_when_blocks_come_back() {
    let _alone = alone("adaptive", 60);
    let runtime = runtime(policy("adaptive"), &[16 << 20]);
    let mem = zeroed(Mem::huge(M2));
    hammer(&runtime, &mem, 3, true, Duration::from_secs(2), 1000);
    let stats = runtime.stats();
    assert!(stats.bytes_saved_clean + stats.bytes_saved_delta > 0, "no block came back alone\n{stats}");
}

#[test]
fn no_store_is_lost_over_the_link() {
    let _alone = alone("remote", 60);
    let runtime = runtime(policy("remote"), &[16 << 20]);
    let mem = zeroed(Mem::huge(M2));
    hammer(&runtime, &mem, 2, false, Duration::from_secs(1), 0);
    let remote = runtime.device(0).unwrap().stats();
    assert!(remote.remote_bytes_written > 0, "{remote:?}");
    // Atomics migrate under this policy, too: both ways alternate.
    let mem = zeroed(Mem::huge(M2));
    hammer(&runtime, &mem, 2, true, Duration::from_secs(1), 200);
}

#[test]
fn two_devices_use_the_same_memory_at_the_same_time() {
    let _alone = alone("two devices", 60);
    let runtime = runtime(policy("gpusvm"), &[16 << 20, 8 << 20]);
    let mem = zeroed(Mem::huge(M2));
    hammer(&runtime, &mem, 1, true, Duration::from_secs(2), 500);
    assert!(runtime.residence(mem.at, mem.len).unwrap().strayed == 0);
}

#[test]
fn two_devices_use_the_same_memory_in_turn() {
    let _alone = alone("in turn", 60);
    let runtime = runtime(Config::default(), &[8 << 20, 8 << 20]);
    let mem = Mem::filled(6 << 20, 1);
    let (at, len) = (mem.at, mem.len);
    for round in 1..40u64 {
        let check = move |gpu: &mut usvm::device::sim::Gpu<'_>| {
            gpu_check(gpu, at, len, 0, round)?;
            gpu_fill(gpu, at, len, 0, round + 1)
        };
        runtime.launch((round % 2) as u32, check).wait(None).unwrap();
        if round % 5 == 0 {
            mem.check_words((round * K4) % len, K4, |i| value(round + 1, i));
        }
    }
    mem.check(40);
}

#[test]
fn many_threads_fault_many_ranges_and_the_same_one() {
    let _alone = alone("many threads", 60);
    let runtime = runtime(policy("gpusvm"), &[64 << 20]);
    let mem = Mem::filled(12 << 20, 1);
    for round in 2..12 {
        to_device(&runtime, &mem, round);
        let together = std::sync::Barrier::new(8);
        std::thread::scope(|scope| {
            for t in 0..8u64 {
                let (mem, together) = (&mem, &together);
                scope.spawn(move || {
                    together.wait();
                    // Two by two the same range, even the same page.
                    let mut dice = Dice::new(t / 2 + round);
                    for _ in 0..200 {
                        let page = dice.below(mem.len / K4);
                        mem.check_words(page * K4, K4, |i| value(round, i));
                    }
                });
            }
        });
        mem.check(round);
    }
    let stats = runtime.stats();
    assert!(stats.cpu_faults >= 60, "{stats}");
}

#[test]
fn read_mostly_memory_shows_every_write_between_brackets() {
    let _alone = alone("read mostly", 60);
    let runtime = runtime(Config::default(), &[16 << 20]);
    let mem = Mem::filled(4 << 20, 1);
    let (at, len) = (mem.at, mem.len);
    runtime.advise(at, len, Hint::ReadMostly(true)).unwrap();
    let mut seeds = vec![1u64; (len / K4) as usize];
    let mut dice = Dice::new(3);
    for round in 2..200u64 {
        let seen = seeds.clone();
        let check = move |gpu: &mut usvm::device::sim::Gpu<'_>| {
            (0..len / K4).try_for_each(|p| gpu_check(gpu, at + p * K4, K4, p * K4 / 8, seen[p as usize]))
        };
        runtime.launch_with(0, &[reads(at, len)], check).wait(None).unwrap();
        if round == 100 {
            let shared = runtime.residence(at, len).unwrap().shared;
            assert_eq!(shared, len, "nothing is shared");
        }
        for _ in 0..dice.below(6) {
            let page = dice.below(len / K4);
            for i in page * K4 / 8..(page + 1) * K4 / 8 {
                mem.words::<u64>()[i as usize].store(value(round, i), Relaxed);
            }
            seeds[page as usize] = round;
        }
        if round % 50 == 0 {
            // The device writes, too: the share ends and begins anew.
            let page = dice.below(len / K4);
            let fill = move |gpu: &mut usvm::device::sim::Gpu<'_>| {
                gpu_fill(gpu, at + page * K4, K4, page * K4 / 8, round)
            };
            runtime.launch(0, fill).wait(None).unwrap();
            seeds[page as usize] = round;
        }
    }
    for page in 0..len / K4 {
        mem.check_words(page * K4, K4, |i| value(seeds[page as usize], i));
    }
    let stats = runtime.stats();
    assert!(
        stats.bytes_saved_delta + stats.bytes_saved_clean > 100 << 20,
        "everything was copied every time\n{stats}"
    );
}

/// A thread of usvm has a range in its hands and uses its pages at home (to share or unshare them), while the program drops
/// some of them. It must not wait for pages that only it could bring: an event may wait for its range.
#[test]
fn pages_are_dropped_while_usvm_reads_them() {
    let _alone = alone("dropped while read", 20);
    let runtime = runtime(Config::default(), &[16 << 20]);
    let mem = Mem::filled(K64, 1);
    let (at, len) = (mem.at, mem.len);
    runtime.advise(at, len, Hint::ReadMostly(true)).unwrap();
    runtime.launch_with(0, &[reads(at, len)], |_| Ok(())).wait(None).unwrap();
    let svm = runtime.svm();
    let range = svm.space.find(at).unwrap();
    let drop_page = |page: u64| {
        // SAFETY: nothing refers to this page.
        assert_eq!(unsafe { libc::madvise(mem.ptr(page * K4), 4096, libc::MADV_DONTNEED) }, 0);
    };
    let host = &svm.mover.host;
    let read = |page: u64| {
        let mut bytes = [1; 8];
        let addr = at + page * K4;
        match host.read_home(addr, &mut bytes) {
            Ok(read) => assert_eq!(read, 8),
            Err(e) => assert_eq!(e, Error::Gone { addr }),
        }
        u64::from_ne_bytes(bytes)
    };
    const MISSING: u64 = u64::from_ne_bytes([1; 8]);
    drop_page(1);
    drop_page(2);
    runtime.barrier().unwrap();
    let state = range.data.lock();
    assert_eq!(read(1), MISSING, "a page dropped before");
    // The call returns when its event was read. To handle the event takes the range.
    drop_page(3);
    assert_eq!(read(3), MISSING, "a page whose event is not handled yet");
    assert_eq!(read(4), value(1, 4 * K4 / 8), "one that is there");
    let span = Span::sized(at, len);
    host.unshare(span, &PageMask::first(span.pages()));
    assert_eq!(
        host.present(span),
        PageMask::first(span.pages()).minus(&PageMask::run(1, 3)),
        "nothing was filled"
    );
    drop(state);
    assert_eq!([1, 2, 3].map(|page| mem.words::<u64>()[(page * K4 / 8) as usize].load(Relaxed)), [0; 3]);
    mem.check_words(5 * K4, len - 5 * K4, |i| value(1, i));
}

/// Where no service thread stays awake, and the second rests while one thread faults.
#[test]
fn service_threads_that_rest_are_there_in_time() {
    let _alone = alone("rest", 60);
    let mut config = policy("gpusvm");
    config.set("spin_us", "0").unwrap();
    let runtime = runtime(config, &[16 << 20]);
    let mem = zeroed(Mem::huge(M2));
    for threads in [1, 3, 1, 2] {
        hammer(&runtime, &mem, threads, true, Duration::from_millis(500), 100);
        mem.words::<u64>().iter().for_each(|w| w.store(0, Relaxed));
    }
}

#[test]
fn prefetch_evict_and_faults_race() {
    let _alone = alone("prefetch and evict", 60);
    let runtime = runtime(Config::default(), &[4 << 20]);
    let mem = zeroed(Mem::huge(6 << 20));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (runtime, mem, stop) = (&runtime, &mem, &stop);
        scope.spawn(move || {
            let mut dice = Dice::new(9);
            while !stop.load(Relaxed) {
                let (at, len) = (mem.at + dice.below(mem.len / K4) * K4, K4 * (1 + dice.below(300)));
                let len = len.min(mem.at + mem.len - at);
                match dice.below(3) {
                    0 => runtime.evict(at, len).unwrap(),
                    1 => assert!(runtime.prefetch(at, len, Location::Host).wait(None).unwrap()),
                    _ => assert!(runtime.prefetch(at, len, Location::Device(0)).wait(None).unwrap()),
                }
            }
        });
        let _stops = Stops(stop);
        hammer(runtime, mem, 2, true, Duration::from_secs(2), 300);
    });
}

#[test]
fn no_store_is_lost_where_the_kernel_cannot_move_pages() {
    let _alone = alone("no MOVE", 60);
    let options = Options { forbid: Features::MOVE, prepared: 1, ..Options::default() };
    let runtime = runtime_with(policy("gpusvm"), options, &[16 << 20]).unwrap();
    let mem = zeroed(Mem::huge(M2));
    hammer(&runtime, &mem, 2, true, Duration::from_secs(2), 100);
}

/// The device uses most of `mem`, another thread drops and unmaps other pages of the very same ranges.
fn drop_pages_beside(options: Options) {
    let runtime = runtime_with(policy("gpusvm"), options, &[16 << 20]).unwrap();
    let mem = Mem::filled(2 * M2, 1);
    let (at, len) = (mem.at, mem.len);
    let used = len - 16 * K4;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (mem, stop) = (&mem, &stop);
        scope.spawn(move || {
            let mut dice = Dice::new(1);
            while !stop.load(Relaxed) {
                let page = mem.ptr(used + dice.below(16) * K4);
                let protection = libc::PROT_READ | libc::PROT_WRITE;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                // SAFETY: nothing refers to these pages; the new mapping is like the old one.
                unsafe {
                    match dice.below(8) {
                        0 => assert_ne!(libc::mmap(page, 4096, protection, flags, -1, 0), libc::MAP_FAILED),
                        _ => assert_eq!(libc::madvise(page, 4096, libc::MADV_DONTNEED), 0),
                    }
                    page.cast::<u64>().write_volatile(7);
                    let found = page.cast::<u64>().read_volatile();
                    assert!(found == 7, "{found:#x}");
                }
            }
        });
        let stops = Stops(stop);
        let began = Instant::now();
        let mut round = 1;
        while began.elapsed() < Duration::from_secs(2) {
            let pass = move |gpu: &mut usvm::device::sim::Gpu<'_>| {
                gpu_check(gpu, at + len - M2, M2 - 16 * K4, (len - M2) / 8, round)?;
                gpu_fill(gpu, at + len - M2, M2 - 16 * K4, (len - M2) / 8, round + 1)
            };
            if let Err(e) = runtime.launch(0, pass).wait(None) {
                panic!("round {round}: {e}");
            }
            round += 1;
            mem.check_words(len - M2, K4, |i| value(round, i));
        }
        drop(stops);
        mem.check_words(0, len - M2, |i| value(1, i));
        mem.check_words(len - M2, M2 - 16 * K4, |i| value(round, i));
        println!("{round} rounds");
        assert!(round > 5, "{round}");
    });
}

#[test]
fn pages_are_dropped_beside_those_the_device_uses() {
    let _alone = alone("dropped beside", 20);
    drop_pages_beside(Options::default());
}

#[test]
fn pages_are_dropped_beside_those_the_device_uses_and_the_kernel_cannot_move_pages() {
    let _alone = alone("dropped beside, no MOVE", 30);
    drop_pages_beside(Options { forbid: Features::MOVE, ..Options::default() });
}
