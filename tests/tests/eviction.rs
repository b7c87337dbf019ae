//! More data than device memory; memory that is held; devices that cannot wait for a fault.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use usvm::device::sim::{Gpu, SimConfig};
use usvm::{Builder, Config, Error, Hint, Location, Runtime};
use usvm_tests::support::*;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

fn without_faults(vram: u64) -> Runtime {
    Builder::new(Config::default()).device(device(vram, false)).start().unwrap()
}

/// Streams over all of `mem` `rounds` times, checking and changing every word, with a few CPU looks in between.
fn stream(runtime: &Runtime, mem: &Mem, rounds: u64) {
    let (at, len) = (mem.at, mem.len);
    for round in 1..=rounds {
        let pass = move |gpu: &mut Gpu<'_>| {
            for from in (0..len).step_by(K64 as usize) {
                let part = K64.min(len - from);
                gpu_check(gpu, at + from, part, from / 8, round)?;
                gpu_fill(gpu, at + from, part, from / 8, round + 1)?;
            }
            Ok(())
        };
        on_gpu(runtime, pass).unwrap();
        let look = (round * 11 * K4) % len;
        mem.check_words(look, K4, |i| value(round + 1, i));
    }
    mem.check(rounds + 1);
}

/// Random pages, each with its own last seed, by two queues: compute and, for copies, the copy engine.
fn scatter(runtime: &Runtime, mem: &Mem, jobs: u64) {
    let (at, pages) = (mem.at, mem.len / K4);
    let mut dice = Dice::new(jobs);
    let mut seeds: Vec<(u64, u64)> = (0..pages).map(|p| (1, p)).collect();
    for job in 0..jobs {
        let page = dice.below(pages);
        let (seed, from) = seeds[page as usize];
        let word = at + page * K4;
        match dice.below(4) {
            0 => {
                // The copy engine: another page becomes a copy of this one.
                let other = dice.below(pages);
                let device = runtime.device(0).unwrap();
                device.copy_async(&[], at + other * K4, word, K4).wait(None).unwrap();
                seeds[other as usize] = (seed, from);
            }
            1 => mem.check_words(page * K4, K4, |i| value(seed, i - page * K4 / 8 + from * K4 / 8)),
            _ => {
                let new = job + 2;
                let change = move |gpu: &mut Gpu<'_>| {
                    gpu_check(gpu, word, K4, from * K4 / 8, seed)?;
                    gpu_fill(gpu, word, K4, page * K4 / 8, new)
                };
                on_gpu(runtime, change).unwrap();
                seeds[page as usize] = (new, page);
            }
        }
    }
    for page in 0..pages {
        let (seed, from) = seeds[page as usize];
        mem.check_words(page * K4, K4, |i| value(seed, i - page * K4 / 8 + from * K4 / 8));
    }
}

#[test]
fn device_memory_of_one_chunk() {
    let _alone = alone("one chunk", 60);
    for name in ["adaptive", "gpusvm"] {
        let runtime = runtime(policy(name), &[M2]);
        let mem = Mem::filled(5 * M2, 1);
        stream(&runtime, &mem, 3);
        let stats = runtime.stats();
        let least = if name == "gpusvm" { 12 } else { 5 };
        assert!(stats.evictions >= least, "{name}: {stats}");
        mem.fill(1);
        scatter(&runtime, &mem, 200);
        drop(mem);
    }
}

#[test]
fn device_memory_of_three_chunks() {
    let _alone = alone("three chunks", 60);
    for name in ["adaptive", "gpusvm"] {
        let runtime = runtime(policy(name), &[3 * M2]);
        let mem = Mem::filled(8 * M2, 1);
        stream(&runtime, &mem, 3);
        mem.fill(1);
        scatter(&runtime, &mem, 300);
        let resident = runtime.stats().resident_device_bytes;
        assert!(resident <= 3 * M2, "{resident} bytes on a device of {}", 3 * M2);
    }
}

/// One word of `mem` here, one there.
fn words_anywhere(runtime: &Runtime, mem: &Mem, count: u64) {
    let (at, words) = (mem.at, mem.len / 8);
    let pass = move |gpu: &mut Gpu<'_>| {
        let mut dice = Dice::new(at);
        (0..count).try_for_each(|_| {
            let place = at + dice.below(words) * 8;
            let word = gpu.load_u64(place)?;
            gpu.store_u64(place, word)
        })
    };
    on_gpu(runtime, pass).unwrap();
}

#[test]
fn accesses_in_no_order_to_more_than_fits_settle() {
    let _alone = alone("settling", 90);
    let runtime = runtime(policy("adaptive"), &[4 * M2]);
    let (first, second) = (Mem::filled(4 * M2, 1), Mem::filled(4 * M2, 2));
    for _ in 0..20 {
        words_anywhere(&runtime, &first, 200);
        words_anywhere(&runtime, &second, 200);
    }
    let stats = runtime.stats();
    // Without a rest at home every second access would move 2 MiB.
    assert!(stats.bytes_to_device < 5 * 8 * M2, "{stats}");
    assert!(stats.resident_device_bytes >= 3 * M2, "what is there stays there: {stats}");
    // When there is room again, what the device uses goes there.
    first.check(1);
    drop(first);
    let there = || runtime.residence(second.at, second.len).unwrap().device;
    let until = Instant::now() + Duration::from_secs(30);
    while there() < 4 * M2 {
        assert!(Instant::now() < until, "{} bytes of {} are there: {}", there(), 4 * M2, runtime.stats());
        words_anywhere(&runtime, &second, 200);
        std::thread::sleep(Duration::from_millis(20));
    }
    second.check(2);
}

#[test]
fn the_longest_unused_goes_first() {
    let _alone = alone("the longest unused", 60);
    for name in ["adaptive", "gpusvm"] {
        let runtime = runtime(policy(name), &[3 * M2]);
        let [a, b, c, d] = std::array::from_fn(|n| Mem::filled(M2, n as u64));
        for mem in [&a, &b, &c, &a, &d] {
            let at = mem.at;
            on_gpu(&runtime, move |gpu| gpu.load_u64(at).map(drop)).unwrap();
        }
        let there = [&a, &b, &c, &d].map(|m| runtime.residence(m.at, m.len).unwrap().device == M2);
        assert_eq!(there, [true, false, true, true], "{name}");
        for (n, mem) in [a, b, c, d].iter().enumerate() {
            mem.check(n as u64);
        }
    }
}

#[test]
fn shared_copies_go_before_anything_else_the_longest_unused_first() {
    let _alone = alone("shared copies", 60);
    let runtime = runtime(policy("adaptive"), &[4 * M2]);
    let [owned, one, two, three, more] = std::array::from_fn(|n| Mem::filled(M2, n as u64));
    let read =
        |mem: &Mem| runtime.end_access(runtime.begin_access(0, &[reads(mem.at, mem.len)]).unwrap()).unwrap();
    to_device(&runtime, &owned, 9);
    for mem in [&one, &two, &three] {
        runtime.advise(mem.at, mem.len, Hint::ReadMostly(true)).unwrap();
        read(mem);
        assert_eq!(runtime.residence(mem.at, mem.len).unwrap().shared, M2);
    }
    read(&one);
    let there = || [&one, &two, &three].map(|m| runtime.residence(m.at, m.len).unwrap().shared == M2);
    assert_eq!(there(), [true; 3]);
    to_device(&runtime, &more, 9);
    assert_eq!(there(), [true, false, true]);
    assert_eq!(runtime.residence(owned.at, owned.len).unwrap().device, M2, "colder, but no copy");
    owned.check(9);
    one.check(1);
    two.check(2);
}

#[test]
fn less_device_memory_than_a_chunk() {
    let _alone = alone("half a chunk", 60);
    for name in ["adaptive", "gpusvm"] {
        let runtime = runtime(policy(name), &[M2 / 2]);
        let mem = Mem::filled(M2 * 2, 1);
        stream(&runtime, &mem, 2);
        let small = Mem::small(40 * K64);
        small.fill(1);
        stream(&runtime, &small, 2);
    }
}

#[test]
fn mixed_sizes_fragment_device_memory_and_all_still_fit() {
    let _alone = alone("mixed sizes", 60);
    let runtime = runtime(policy("gpusvm"), &[2 * M2]);
    // Islands of 4 KiB and 64 KiB between large ranges.
    let islands: Vec<Mem> =
        (0..24).map(|n| Mem::small(if n % 3 == 0 { K64 } else { K4 * (1 + n % 5) })).collect();
    islands.iter().for_each(|m| m.fill(1));
    let large = Mem::filled(4 * M2, 1);
    for round in 1..6u64 {
        for mem in islands.iter().chain([&large]) {
            let (at, len) = (mem.at, mem.len);
            let pass = move |gpu: &mut Gpu<'_>| {
                gpu_check(gpu, at, len, 0, round)?;
                gpu_fill(gpu, at, len, 0, round + 1)
            };
            on_gpu(&runtime, pass).unwrap();
        }
    }
    islands.iter().chain([&large]).for_each(|m| m.check(6));
    let stats = runtime.stats();
    assert!(stats.migrations_4k > 0 && stats.migrations_64k > 0 && stats.migrations_2m > 0, "{stats}");
    assert!(stats.evictions > 10, "{stats}");
}

#[test]
fn two_engines_compete_for_one_chunk() {
    let _alone = alone("two engines", 60);
    let runtime = runtime(policy("gpusvm"), &[M2]);
    let (a, b) = (Mem::filled(2 * M2, 1), Mem::filled(2 * M2, 2));
    let began = Instant::now();
    for round in 0..6 {
        let (src, dst, len) = (a.at, b.at, a.len);
        // Each piece of the copy needs two ranges, one after the other; the compute engine wants the same chunk.
        let copied = runtime.device(0).unwrap().copy_async(&[], dst, src, len);
        let read = runtime.launch(0, move |gpu| gpu_check(gpu, src, len, 0, 1));
        copied.wait(None).unwrap();
        read.wait(None).unwrap();
        b.check(1);
        b.fill(2 + round);
    }
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn a_working_set_that_fits_exactly() {
    let _alone = alone("fits exactly", 60);
    for recoverable in [true, false] {
        let runtime = Builder::new(Config::default()).device(device(3 * M2, recoverable)).start().unwrap();
        let (a, b) = (Mem::filled(3 * M2, 1), Mem::filled(3 * M2, 1));
        for round in 1..8u64 {
            for mem in [&a, &b] {
                let (at, len) = (mem.at, mem.len);
                let held = [writes(at, M2), writes(at + M2, 2 * M2)];
                let pass = move |gpu: &mut Gpu<'_>| {
                    gpu_check(gpu, at, len, 0, round)?;
                    gpu_fill(gpu, at, len, 0, round + 1)
                };
                runtime.launch_with(0, &held, pass).wait(None).unwrap();
            }
        }
        a.check(8);
        b.check(8);
    }
}

#[test]
fn a_working_set_that_cannot_fit_is_refused_with_both_sizes() {
    let _alone = alone("cannot fit", 60);
    for recoverable in [true, false] {
        let runtime = Builder::new(Config::default()).device(device(3 * M2, recoverable)).start().unwrap();
        let mem = Mem::filled(4 * M2, 1);
        let (at, len) = (mem.at, mem.len);
        let began = Instant::now();
        let refused = runtime.launch_with(0, &[writes(at, len)], |_| panic!("it must not run")).wait(None);
        match refused {
            Err(Error::OutOfDeviceMemory { needed, capacity, .. }) => {
                assert_eq!((needed, capacity), (4 * M2, 3 * M2), "recoverable faults: {recoverable}");
            }
            other => panic!("recoverable faults: {recoverable}: {other:?}"),
        }
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        mem.check(1);
        // And the next launch that fits works.
        runtime
            .launch_with(0, &[writes(at, 2 * M2)], move |gpu| gpu_fill(gpu, at, 2 * M2, 0, 2))
            .wait(None)
            .unwrap();
        mem.check_words(0, 2 * M2, |i| value(2, i));
        mem.check_words(2 * M2, 2 * M2, |i| value(1, i));
    }
}

#[test]
fn held_memory_is_not_evicted() {
    let _alone = alone("held", 60);
    let runtime = runtime(Config::default(), &[3 * M2]);
    let (held, other) = (Mem::filled(M2, 1), Mem::filled(6 * M2, 1));
    to_device(&runtime, &held, 2);
    let bracket = runtime.begin_access(0, &[writes(held.at, held.len)]).unwrap();
    stream(&runtime, &other, 2);
    let residence = runtime.residence(held.at, held.len).unwrap();
    assert_eq!(residence.device, M2, "{residence:?}");
    assert!(runtime.stats().evictions > 5);
    runtime.end_access(bracket).unwrap();
    other.fill(1);
    stream(&runtime, &other, 1);
    held.check(2);
}

/// A bracket around a part of a range leaves the rest to the program: nobody else may take that away meanwhile, or the
/// thread that is to end the bracket could wait for itself.
#[test]
fn the_rest_of_a_range_stays_at_home_while_a_part_is_held() {
    let _alone = alone("rest at home", 60);
    let runtime = runtime(Config::default(), &[3 * M2]);
    let mem = Mem::filled(M2, 1);
    let (at, len) = (mem.at, mem.len);
    let bracket = runtime.begin_access(0, &[writes(at + 64, 100)]).unwrap();
    runtime.prefetch(at, len, Location::Device(0)).wait(None).unwrap();
    on_gpu(&runtime, move |gpu| gpu_fill(gpu, at + M2 / 2, M2 / 2, M2 / 16, 2)).unwrap();
    assert_eq!(runtime.residence(at, len).unwrap().device, 0);
    mem.check_words(0, M2 / 2, |i| value(1, i));
    mem.check_words(M2 / 2, M2 / 2, |i| value(2, i));
    runtime.end_access(bracket).unwrap();
    to_device(&runtime, &mem, 3);
    assert_eq!(runtime.residence(at, len).unwrap().device, len, "afterwards it goes there as ever");
    mem.check(3);
}

#[test]
fn a_kernel_that_panics_lets_go_of_what_was_held_for_it() {
    let _alone = alone("panics", 60);
    let runtime = runtime(Config::default(), &[3 * M2]);
    let mem = Mem::filled(M2, 1);
    let (at, len) = (mem.at, mem.len);
    let fence = runtime.launch_with(0, &[writes(at, len)], |_| panic!("as a kernel may"));
    assert!(fence.wait(None).is_err());
    mem.check(1);
    to_device(&runtime, &mem, 2);
    mem.check(2);
}

/// A copy that work reads belongs to it until its end: who brings the memory home waits, and a fork leaves the copy.
#[test]
fn a_copy_that_is_held_stays() {
    let _alone = alone("held copy", 60);
    let runtime = without_faults(4 * M2);
    let mem = Mem::filled(M2, 1);
    let (at, len) = (mem.at, mem.len);
    runtime.advise(at, len, Hint::ReadMostly(true)).unwrap();
    let bracket = runtime.begin_access(0, &[reads(at, len)]).unwrap();
    let copied = || runtime.residence(at, len).unwrap().shared;
    assert_eq!(copied(), len);
    usvm_tests::isolated::fork_child(false, || true).good("forked while a copy is held");
    assert_eq!(copied(), len);
    std::thread::scope(|scope| {
        let evicts = scope.spawn(|| runtime.evict(at, len));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!evicts.is_finished(), "it did not wait");
        assert_eq!(copied(), len);
        // The device, which cannot fault, still has it.
        runtime.launch(0, move |gpu| gpu_check(gpu, at, len, 0, 1)).wait(None).unwrap();
        runtime.end_access(bracket).unwrap();
        evicts.join().unwrap().unwrap();
    });
    assert_eq!(copied(), 0);
    mem.check(1);
}

#[test]
fn a_cpu_access_to_held_memory_waits_for_its_end() {
    let _alone = alone("waits", 60);
    let runtime = runtime(Config::default(), &[3 * M2]);
    let mem = Mem::filled(M2, 1);
    let (at, len) = (mem.at, mem.len);
    let bracket = runtime.begin_access(0, &[writes(at, len)]).unwrap();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            mem.check_words(M2 - K4, K4, |i| value(2, i));
            ended.load(Relaxed)
        });
        std::thread::sleep(Duration::from_millis(150));
        assert!(!reader.is_finished(), "the access did not wait");
        // Meanwhile the device writes; no announcement is needed, it is held.
        on_gpu(&runtime, move |gpu| gpu_fill(gpu, at, len, 0, 2)).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert!(!reader.is_finished(), "the access did not wait");
        ended.store(true, Relaxed);
        runtime.end_access(bracket).unwrap();
        assert!(reader.join().unwrap(), "it was served before the end");
    });
    mem.check(2);
}

#[test]
fn an_access_during_a_launch_waits_for_the_launch() {
    let _alone = alone("waits for launch", 60);
    let runtime = runtime(Config::default(), &[3 * M2]);
    let mem = Mem::filled(M2, 1);
    let (at, len) = (mem.at, mem.len);
    for round in 2..20 {
        let begun = Arc::new(AtomicU64::new(0));
        let begins = begun.clone();
        let fence = runtime.launch_with(0, &[writes(at, len)], move |gpu| {
            begins.store(1, Relaxed);
            gpu_fill(gpu, at, len / 2, 0, round)?;
            std::thread::sleep(Duration::from_millis(5));
            gpu_fill(gpu, at + len / 2, len / 2, len / 16, round)
        });
        while begun.load(Relaxed) == 0 {
            std::thread::yield_now();
        }
        // All or nothing of the launch: here, all.
        mem.check(round);
        fence.wait(None).unwrap();
    }
}

#[test]
fn a_device_that_cannot_fault_needs_everything_announced() {
    let _alone = alone("no faults", 60);
    let runtime = without_faults(4 * M2);
    let (mem, other) = (Mem::filled(M2, 1), Mem::filled(M2, 7));
    let (at, len, beyond) = (mem.at, mem.len, other.at);
    for round in 1..6u64 {
        let pass = move |gpu: &mut Gpu<'_>| {
            gpu_check(gpu, at, len, 0, round)?;
            gpu_fill(gpu, at, len, 0, round + 1)
        };
        runtime.launch_with(0, &[writes(at, len)], pass).wait(None).unwrap();
        let stray = runtime
            .launch_with(0, &[writes(at, len)], move |gpu| {
                gpu.load_u64(at)?;
                gpu.store_u64(beyond + 64, 5)
            })
            .wait(None);
        match stray {
            Err(Error::DeviceFault { addr, .. }) => assert_eq!(addr, beyond + 64),
            other => panic!("{other:?}"),
        }
        if round % 2 == 0 {
            mem.check(round + 1);
        }
        other.check(7);
    }
    mem.check(6);
}

#[test]
fn a_device_that_cannot_fault_evicts_for_the_next_launch() {
    let _alone = alone("no faults, eviction", 60);
    let runtime = without_faults(2 * M2);
    let mem = Mem::filled(6 * M2, 1);
    let at = mem.at;
    let mut dice = Dice::new(4);
    let mut seeds = [1u64; 6];
    for job in 2..60u64 {
        let chunk = dice.below(6);
        let (from, seed) = (at + chunk * M2, seeds[chunk as usize]);
        let pass = move |gpu: &mut Gpu<'_>| {
            gpu_check(gpu, from, M2, chunk * M2 / 8, seed)?;
            gpu_fill(gpu, from, M2, chunk * M2 / 8, job)
        };
        runtime.launch_with(0, &[writes(from, M2)], pass).wait(None).unwrap();
        seeds[chunk as usize] = job;
    }
    for chunk in 0..6 {
        mem.check_words(chunk * M2, M2, |i| value(seeds[chunk as usize], i));
    }
    assert!(runtime.stats().evictions > 10);
}

#[test]
fn memory_that_the_cpu_cannot_reach_works_as_well() {
    let _alone = alone("small BAR", 60);
    let config = SimConfig { cpu_visible_bytes: Some(M2), ..device(3 * M2, true) };
    let runtime = Builder::new(Config::default()).device(config).start().unwrap();
    let mem = Mem::filled(5 * M2, 1);
    stream(&runtime, &mem, 3);
}

#[test]
fn launches_that_together_do_not_fit_take_turns() {
    let _alone = alone("take turns", 60);
    let runtime = Builder::new(Config::default())
        .device(device(2 * M2, true))
        .device(device(2 * M2, true))
        .start()
        .unwrap();
    let mem = Mem::filled(4 * M2, 1);
    let at = mem.at;
    let mut fences = Vec::new();
    for job in 0..24u64 {
        let from = at + (job % 3) * M2;
        let pass = move |gpu: &mut Gpu<'_>| {
            for word in (0..2 * M2).step_by(K4 as usize) {
                gpu.fetch_add_u64(from + word, 1)?;
            }
            Ok(())
        };
        fences.push(runtime.launch_with((job % 2) as u32, &[writes(from, 2 * M2)], pass));
    }
    fences.into_iter().for_each(|f| assert!(f.wait(None).unwrap()));
    // Chunk 0 and 3 were in 8 jobs each, 1 and 2 in 16.
    mem.check_words(0, mem.len, |i| {
        let jobs = [8, 16, 16, 8][(i * 8 / M2) as usize];
        value(1, i).wrapping_add(if i % (K4 / 8) == 0 { jobs } else { 0 })
    });
}
