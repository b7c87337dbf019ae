//! What the configuration chooses: least times on the device, no sharing, chaos.

use std::time::{Duration, Instant};

use usvm::{Config, Hint, Location, Runtime};
use usvm_tests::support::alone;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

fn started(options: &[(&str, &str)]) -> Runtime {
    let mut config = Config::default();
    options.iter().for_each(|(key, value)| config.set(key, value).unwrap());
    Runtime::start(config).unwrap()
}

/// Has the device add one to every word.
fn add_one(runtime: &Runtime, words: &[u64]) {
    let (at, len) = (words.as_ptr() as u64, std::mem::size_of_val(words) as u64);
    let kernel = move |gpu: &mut usvm::device::sim::Gpu<'_>| {
        gpu.update(at, len, |tile, _| {
            for word in tile.chunks_exact_mut(8) {
                let n = u64::from_le_bytes(word.try_into().unwrap());
                word.copy_from_slice(&(n + 1).to_le_bytes());
            }
        })
    };
    runtime.launch(0, kernel).wait(None).unwrap();
}

#[test]
fn a_range_stays_for_its_time() {
    let _alone = alone("a_range_stays_for_its_time", 60);
    let runtime = started(&[("timeslice_ms", "60")]);
    let words: Vec<u64> = vec![7; 64 << 10];
    add_one(&runtime, &words);
    let begin = Instant::now();
    assert_eq!(std::hint::black_box(&words)[5000], 8);
    let waited = begin.elapsed();
    assert!(waited >= Duration::from_millis(40), "came back after {waited:?}");
    runtime.shutdown();
    assert!(words.iter().all(|w| *w == 8));
}

#[test]
fn advice_says_where_memory_is_used() {
    let _alone = alone("advice_says_where_memory_is_used", 60);
    let runtime = started(&[]);
    let words: Vec<u64> = vec![1; 512 << 10];
    let (at, len) = (words.as_ptr() as u64, 8 * words.len() as u64);
    let away = || runtime.residence(at, len).unwrap().device > 0;
    let device = Some(Location::Device(0));
    // What is said, and whether a device that uses the memory draws it to itself then. Between, it is at home.
    let said: [(&[Hint], bool); 5] = [
        (&[], true),
        (&[Hint::PreferredLocation(Some(Location::Host))], false),
        (&[Hint::PreferredLocation(None), Hint::AccessedBy(Some(0))], false),
        (&[Hint::PreferredLocation(device)], true),
        (&[Hint::PreferredLocation(None), Hint::AccessedBy(None)], true),
    ];
    for (n, (hints, migrates)) in said.into_iter().enumerate() {
        runtime.evict(at, len).unwrap();
        hints.iter().for_each(|hint| runtime.advise(at, len, *hint).unwrap());
        add_one(&runtime, &words);
        assert_eq!(away(), migrates, "{hints:?}");
        assert!(words.iter().all(|w| *w == n as u64 + 2));
    }
}

#[test]
fn chaos_changes_no_result() {
    let _alone = alone("chaos_changes_no_result", 60);
    let mut config = Config::default();
    config.vram = Some(8 << 20);
    config.chaos = Some(usvm::ground::config::Chaos { rate: 3000, seed: 11 });
    let runtime = Runtime::start(config).unwrap();
    let mut words: Vec<u64> = (0..2 << 20).collect();
    for round in 0..12u64 {
        add_one(&runtime, &words);
        for at in (round as usize..words.len()).step_by(4099) {
            words[at] += 100;
        }
    }
    let mut want: Vec<u64> = (0..2 << 20).map(|n| n + 12).collect();
    for round in 0..12 {
        (round..want.len()).step_by(4099).for_each(|at| want[at] += 100);
    }
    assert!(words == want, "some word differs");
    let (done, stats) = (runtime.disturbances(), runtime.stats());
    assert!(stats.cause_prefetch > 20 && stats.cause_user > 20, "nothing was disturbed: {stats}");
    // Every kind happens, and what it says is what was done.
    assert!(done.iter().all(|(_, count)| *count > 5), "{done:?}");
    let count = |name: &str| done.iter().find(|(kind, _)| *kind == name).expect("a kind").1;
    assert!(stats.evictions >= count("evict"), "{stats} {done:?}");
    assert!(stats.invalidations >= count("invalidate"), "{stats} {done:?}");
}
