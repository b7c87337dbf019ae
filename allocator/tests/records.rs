//! What the heap's own records take of the program's limits.
#![allow(missing_docs, unsafe_code)]

/// What counts in RLIMIT_DATA, in bytes.
fn data() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmData:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

#[test]
fn records_count_as_data_where_they_are_used() {
    let before = data();
    let blocks: Vec<usize> = (0..100_000)
        .map(|i| {
            // SAFETY: new blocks, freed below.
            let block = unsafe { usvm_alloc::malloc(100 + i % 2000) };
            assert!(!block.is_null());
            block.expose_provenance()
        })
        .collect();
    let used = data() - before;
    assert!(used < 256 << 20, "{} MiB for 100 MiB of blocks", used >> 20);
    for block in blocks {
        // SAFETY: freed once.
        unsafe { usvm_alloc::free(std::ptr::with_exposed_provenance_mut(block)) };
    }
}
