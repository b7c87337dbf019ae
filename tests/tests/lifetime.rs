//! The end: of the process with work in flight, of the runtime under fire, and beginnings after it.

use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use usvm::Runtime;
use usvm_tests::area::*;
use usvm_tests::isolated::{isolated, spawned};

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

/// A device that never stops, a thread that faults all the time, and memory to use.
fn keep_busy(rt: &Runtime) -> Area {
    let (area, _) = Area::filled(4 * M2, false, &mut Rng::new(1));
    let (at, len) = (area.at, area.len);
    let _ = rt.launch(0, move |gpu| {
        loop {
            gpu.update(at, len, |tile, _| tile[0] = tile[0].wrapping_add(1))?;
        }
    });
    std::thread::spawn(move || {
        let mut off = 0;
        loop {
            cpu_peek(at + off % len);
            off += 13 * K4;
        }
    });
    let deadline = Instant::now() + Duration::from_secs(10);
    while rt.stats().cpu_faults == 0 || rt.stats().gpu_faults == 0 {
        assert!(Instant::now() < deadline, "{}", rt.stats());
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(50));
    area
}

fn ends(name: &'static str, how: impl FnOnce(Runtime, Area)) -> Option<std::process::ExitStatus> {
    let started = Instant::now();
    let status = spawned(name, || {
        let rt = runtime(64 << 20);
        let area = keep_busy(&rt);
        how(rt, area);
    });
    assert!(started.elapsed() < Duration::from_secs(15), "{name} took {:?}", started.elapsed());
    status
}

#[test]
fn exit_with_work_in_flight() {
    let status = ends("exit_with_work_in_flight", |rt, area| {
        std::mem::forget((rt, area));
        std::process::exit(0)
    });
    assert_eq!(status.and_then(|s| s.code()), Some(0), "{status:?}");
}

#[test]
fn exit_from_a_thread() {
    let status = ends("exit_from_a_thread", |rt, area| {
        let _ = std::thread::spawn(|| std::process::exit(7)).join();
        drop((rt, area));
    });
    assert_eq!(status.and_then(|s| s.code()), Some(7), "{status:?}");
}

#[test]
fn return_with_work_in_flight() {
    // The runtime is dropped while the device is busy: it ends all the same.
    let status = ends("return_with_work_in_flight", |rt, area| {
        let started = Instant::now();
        drop(rt);
        assert!(started.elapsed() < Duration::from_secs(12), "{:?}", started.elapsed());
        std::mem::forget(area);
    });
    assert!(status.is_none_or(|s| s.success()), "{status:?}");
}

#[test]
fn abort_with_work_in_flight() {
    let status = ends("abort_with_work_in_flight", |_rt, _area| std::process::abort());
    assert_eq!(status.and_then(|s| s.signal()), Some(libc::SIGABRT), "{status:?}");
}

/// Bytes that say which thread and round wrote them.
fn stamp(thread: u64, round: u64) -> [u8; 8] {
    (thread << 48 | round).to_le_bytes()
}

#[test]
fn shutdown_while_threads_fault() {
    isolated("shutdown_while_threads_fault", || {
        for round in 0..6 {
            let rt = runtime(16 << 20);
            let (area, mut piece) = Area::filled(4 * M2, round % 2 == 1, &mut Rng::new(round));
            piece.change(&rt, "before");
            let stop = Arc::new(AtomicBool::new(false));
            let threads: Vec<_> = (0..3u64)
                .map(|t| {
                    let (stop, at, len) = (stop.clone(), area.at, area.len);
                    std::thread::spawn(move || {
                        let (mut n, mut rng) = (0, Rng::new(t + 1));
                        let mut last = std::collections::BTreeMap::new();
                        while !stop.load(Ordering::Relaxed) {
                            // Word `t` of a page is this thread's.
                            let at = at + rng.below(len / K4) * K4 + 64 + t * 8;
                            if let Some(want) = last.get(&at) {
                                assert_eq!(cpu_read(at, 8), stamp(t, *want), "a store was lost");
                            }
                            n += 1;
                            cpu_write(at, &stamp(t, n));
                            last.insert(at, n);
                        }
                        (t, last)
                    })
                })
                .collect();
            let (at, len) = (area.at, area.len);
            let launched = AtomicU64::new(0);
            while launched.fetch_add(1, Ordering::Relaxed) < 4 {
                // Touches a byte that no thread owns.
                rt.launch(0, move |gpu| {
                    (0..len).step_by(K4 as usize).try_for_each(|off| gpu.store_u8(at + off + 200, 3))
                })
                .wait(None)
                .unwrap();
            }
            rt.shutdown();
            assert!(rt.launch(0, |_| Ok(())).wait(None).is_err(), "it is over");
            std::thread::sleep(Duration::from_millis(2));
            stop.store(true, Ordering::Relaxed);
            for thread in threads {
                let (t, last) = thread.join().unwrap();
                for (at, n) in last {
                    let off = (at - piece.at) as usize;
                    piece.bytes[off..off + 8].copy_from_slice(&stamp(t, n));
                }
            }
            (0..len as usize).step_by(K4 as usize).for_each(|off| piece.bytes[off + 200] = 3);
            same(&cpu_read(at, len), &piece.bytes, "after the shutdown");
        }
    });
}

#[test]
fn shutdown_with_a_busy_device_keeps_data() {
    isolated("shutdown_with_a_busy_device_keeps_data", || {
        let rt = runtime(32 << 20);
        let (area, mut piece) = Area::filled(4 * M2, false, &mut Rng::new(3));
        piece.change(&rt, "before");
        let (at, len) = (area.at, area.len);
        // Writes nothing new, for ever.
        let work = rt.launch(0, move |gpu| {
            loop {
                gpu.update(at, len, |_, _| {})?;
            }
        });
        std::thread::sleep(Duration::from_millis(20));
        let started = Instant::now();
        rt.shutdown();
        assert!(started.elapsed() < Duration::from_secs(11), "{:?}", started.elapsed());
        same(&cpu_read(at, len), &piece.bytes, "after the shutdown");
        drop(rt);
        assert!(work.wait(Some(Duration::from_secs(10))).is_err(), "endless work ends with an error");
    });
}

#[test]
fn it_starts_again_ten_times() {
    isolated("it_starts_again_ten_times", || {
        let (area, mut piece) = Area::filled(2 * M2, false, &mut Rng::new(4));
        let names = || -> Vec<String> {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap();
            tasks.filter_map(|t| std::fs::read_to_string(t.ok()?.path().join("comm")).ok()).collect()
        };
        let threads = || names().len();
        let files = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let mut after_first = None;
        for round in 0..10 {
            let rt = runtime(16 << 20);
            piece.check(&rt, "in each life");
            assert!(usvm::Runtime::start(config(16 << 20)).is_err(), "one at a time");
            piece.change(&rt, "left on the device");
            if round % 2 == 0 {
                rt.shutdown();
            }
            drop(rt);
            same(&cpu_read(piece.at, piece.len()), &piece.bytes, "after each life");
            let deadline = Instant::now() + Duration::from_secs(5);
            let (t, f) = *after_first.get_or_insert_with(|| {
                std::thread::sleep(Duration::from_millis(300));
                (threads(), files())
            });
            while threads() > t || files() > f {
                assert!(
                    Instant::now() < deadline,
                    "left behind: threads {:?} of {t}, files {} of {f}",
                    names(),
                    files()
                );
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        drop(area);
    });
}
