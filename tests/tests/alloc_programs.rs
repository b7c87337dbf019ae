//! Whole Rust programs on usvm's allocator: the demo's own logic, and collections under chaos.

use std::collections::{BTreeMap, HashMap};

use usvm::ground::config::Chaos;
use usvm::{Config, Runtime};
use usvm_tests::support::{alone, runtime};

#[path = "../../examples/rust/demo/blocks.rs"]
#[expect(dead_code, reason = "the demo uses more of it")]
mod blocks;
#[path = "../../examples/rust/demo/index.rs"]
mod index;

/// What the demo's steps fail with.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[global_allocator]
static ALLOC: usvm_alloc::Usvm = usvm_alloc::Usvm::new();

#[test]
fn the_demo_computes_on_this_heap() -> Result<()> {
    let _alone = alone("demo", 170);
    let runtime = runtime(Config::default(), &[8 << 20]);
    let mut heap = blocks::Blocks::read(&std::env::current_exe()?, 16 << 20)?;
    let words = index::Index::build(heap.bytes(0));
    for round in 0..2 {
        heap.check_histogram(&runtime)?;
        heap.transform(&runtime, round)?;
        words.check_lookups(&runtime)?;
        words.check_list(&runtime)?;
        heap.edit(round)?;
        heap.compare()?;
    }
    // What the demo's last word rests on: one wrong byte is noticed.
    heap.spoil(&runtime)?;
    let noticed = heap.compare().expect_err("the device changed a byte").to_string();
    assert!(noticed.starts_with(&format!("block {}, byte ", heap.count() - 1)), "{noticed}");
    runtime.shutdown();
    Ok(())
}

#[test]
fn large_collections_under_chaos() -> Result<()> {
    let _alone = alone("collections", 170);
    let mut config = Config::default();
    config.chaos = Some(Chaos { rate: 2000, seed: 7 });
    let runtime = runtime(config, &[8 << 20]);
    let threads: Vec<_> = (0..3u64)
        .map(|thread| {
            let runtime = runtime.clone();
            std::thread::spawn(move || collections(&runtime, thread))
        })
        .collect();
    for thread in threads {
        thread.join().expect("a thread panicked")?;
    }
    Ok(())
}

fn collections(runtime: &Runtime, thread: u64) -> Result<()> {
    let mut map: HashMap<u64, String> = HashMap::new();
    let mut tree: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for round in 0..4u64 {
        for i in 0..4000u64 {
            let key = i * 7 + round;
            map.insert(key, format!("{thread}/{key}"));
            tree.entry(key).or_default().extend([key, key + 1]);
        }
        // The device adds up what the tree's vectors hold, which makes ranges that chaos disturbs from then on.
        let vectors: Vec<u64> =
            tree.values().take(300).flat_map(|v| [v.as_ptr() as u64, v.len() as u64]).collect();
        let wanted: u64 = tree.values().take(300).flatten().sum();
        let total = Box::new(std::sync::atomic::AtomicU64::new(0));
        let (table, count, to) = (vectors.as_ptr() as u64, vectors.len() as u64 / 2, total.as_ptr() as u64);
        let sum = move |gpu: &mut usvm::device::sim::Gpu<'_>| {
            let mut sum = 0;
            for entry in 0..count {
                let (at, len) = (gpu.load_u64(table + entry * 16)?, gpu.load_u64(table + entry * 16 + 8)?);
                for i in 0..len {
                    sum += gpu.load_u64(at + i * 8)?;
                }
            }
            gpu.fetch_add_u64(to, sum).map(|_| ())
        };
        runtime.launch(0, sum).wait(None)?;
        assert_eq!(total.load(std::sync::atomic::Ordering::Relaxed), wanted);
        map.retain(|key, _| key % 3 != round % 3);
        tree.retain(|key, _| key % 3 != round % 3);
        assert!(map.iter().all(|(key, text)| *text == format!("{thread}/{key}")));
        assert!(tree.iter().all(|(key, v)| v.chunks(2).all(|pair| pair == [*key, key + 1])));
    }
    Ok(())
}
