//! The first thing a newcomer does: ordinary heap memory, changed by the device, read by the CPU.

use usvm::{Config, Runtime};

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

#[test]
fn the_device_changes_heap_memory_in_place() {
    let runtime = Runtime::start(Config::default()).unwrap();
    let mut numbers: Vec<u64> = (0..1 << 20).collect();
    let (at, len) = (numbers.as_ptr() as u64, numbers.len() as u64 * 8);
    for round in 1..=3u64 {
        runtime
            .launch(0, move |gpu| {
                gpu.update(at, len, |tile, _| {
                    for word in tile.chunks_exact_mut(8) {
                        let n = u64::from_le_bytes(word.try_into().unwrap());
                        word.copy_from_slice(&(n + 1).to_le_bytes());
                    }
                })
            })
            .wait(None)
            .unwrap();
        let residence = runtime.residence(at, len).unwrap();
        assert!(residence.device > 4 << 20, "{residence:?}");
        numbers[77] += 1000;
        assert_eq!(numbers[77], 77 + round * 1001);
        assert_eq!(numbers[1000], 1000 + round);
    }
    assert!(numbers.iter().enumerate().all(|(i, n)| *n == i as u64 + 3 + if i == 77 { 3000 } else { 0 }));
    println!("{}", runtime.stats());
}
