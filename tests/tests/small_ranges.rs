//! Small ranges come home by a copy from device memory, where that can be read; what the device only read flips back.

use std::sync::atomic::Ordering;

use usvm::Config;
use usvm::device::sim::SimConfig;
use usvm_tests::support::*;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

const RANGES: u64 = 64;
const BYTES: u64 = RANGES * K64;

fn config() -> Config {
    let mut config = policy("gpusvm");
    config.set("chunk_sizes", "64K,4K").unwrap();
    config
}

/// The device writes one word of each range, the CPU reads all; then the device reads. Gives how many flips each of the
/// two returns took.
fn flips(device: SimConfig) -> [u64; 2] {
    let rt = usvm::Builder::new(config()).device(device).start().unwrap();
    let mem = Mem::small(BYTES);
    let at = mem.at;
    for (n, word) in mem.words::<u64>().iter().enumerate() {
        word.store(n as u64, Ordering::Relaxed);
    }
    let back = |first: u64| {
        let before = rt.stats().flips;
        mem.check_words(0, BYTES, |word| match word % (K64 / 8) {
            0 => first,
            _ => word,
        });
        assert_eq!(rt.residence(at, BYTES).unwrap().device, 0);
        rt.stats().flips - before
    };
    let mut counts = [0; 2];
    for round in 1..4u64 {
        on_gpu(&rt, move |gpu| (0..RANGES).try_for_each(|n| gpu.store_u64(at + n * K64, round))).unwrap();
        assert_eq!(rt.residence(at, BYTES).unwrap().device, BYTES);
        counts[0] += back(round);
        on_gpu(&rt, move |gpu| {
            (0..RANGES).try_for_each(|n| gpu.load_u64(at + n * K64).map(|read| assert_eq!(read, round)))
        })
        .unwrap();
        counts[1] += back(round);
    }
    rt.shutdown();
    counts
}

#[test]
fn what_the_device_wrote_is_copied_and_what_it_only_read_flips() {
    let _alone = alone("what_the_device_wrote_is_copied_and_what_it_only_read_flips", 60);
    let [written, read] = flips(device(4 * BYTES, true));
    assert_eq!(written, 0, "copied straight into fresh pages");
    assert!(read > 0, "their own pages were still there");
}

#[test]
fn memory_that_the_processor_cannot_read_goes_by_the_shadow() {
    let _alone = alone("memory_that_the_processor_cannot_read_goes_by_the_shadow", 60);
    let hidden = SimConfig { cpu_visible_bytes: Some(0), ..device(4 * BYTES, true) };
    let [written, read] = flips(hidden);
    assert!(written > 0 && read > 0);
}
