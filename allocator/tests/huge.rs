//! Which blocks ask for huge pages, at the beginning of the heap, where small pages are the rule.
#![allow(missing_docs, unsafe_code)]

use std::io::Write;

/// Whether huge pages were asked for where `block` begins.
fn asked(block: *const u8) -> bool {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if let Some((from, to)) = first.split_once('-') {
            let bound = |text| usize::from_str_radix(text, 16).unwrap();
            inside = (bound(from)..bound(to)).contains(&block.addr());
        } else if inside && first == "VmFlags:" {
            return line.split(' ').any(|flag| flag == "hg");
        }
    }
    panic!("no mapping holds {block:p}");
}

#[test]
fn blocks_of_whole_ranges_ask_for_huge_pages_however_they_came_to_be() {
    if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
        writeln!(std::io::stderr(), "skipped: this kernel has no huge pages").unwrap();
        return;
    }
    // SAFETY: blocks are resized and freed once.
    unsafe {
        let small = usvm_alloc::malloc(1 << 20);
        let made = usvm_alloc::malloc(4 << 20);
        assert!(!asked(small.cast()) && asked(made.cast()));
        let grown = usvm_alloc::realloc(small, 4 << 20);
        assert!(asked(grown.cast()), "grown from below");
        usvm_alloc::free(made);
        usvm_alloc::free(grown);

        // A program that asks for much and uses little of it stays on small pages, until its heap is large.
        let ample: Vec<_> = (0..4).map(|_| usvm_alloc::malloc(16 << 20)).collect();
        let heap: Vec<_> = (0..128).map(|_| usvm_alloc::malloc(1 << 20)).collect();
        assert!(ample.iter().all(|block| asked(block.cast())));
        let asked = heap.iter().map(|block| asked(block.cast())).collect::<Vec<_>>();
        let small = asked.iter().filter(|asked| !**asked).count();
        // Some begin in what was left over beside the others.
        assert!((16..=32).contains(&small), "{small} of {asked:?}");
        ample.into_iter().chain(heap).for_each(|block| usvm_alloc::free(block));
    }
}
