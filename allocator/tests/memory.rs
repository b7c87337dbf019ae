//! What the heap takes from the system and gives back: each test in a process of its own would be best, so there is one.
#![allow(missing_docs, unsafe_code)]

/// Resident bytes of this process.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// Bytes of `[at, at + len)` that have memory behind them.
fn backed(at: *mut u8, len: usize) -> usize {
    let mut pages = vec![0u8; len.div_ceil(4096)];
    // SAFETY: the addresses are mapped, and there is a byte for each page.
    let asked = unsafe { libc::mincore(at.cast(), len, pages.as_mut_ptr()) };
    assert_eq!(asked, 0);
    pages.iter().filter(|p| **p & 1 != 0).count() * 4096
}

const MIB: usize = 1 << 20;

#[test]
fn memory_is_taken_late_and_given_back() {
    // SAFETY: blocks are used inside their sizes and freed once.
    unsafe {
        // Zeroed memory is not written.
        let before = resident();
        let fresh = usvm_alloc::calloc(1, 64 * MIB).cast::<u8>();
        assert!(resident() < before + MIB, "{} KiB for zeroes", (resident() - before) >> 10);
        assert_eq!(backed(fresh, 64 * MIB), 0);
        let medium = usvm_alloc::calloc(1, MIB).cast::<u8>();
        assert_eq!(backed(medium.map_addr(|a| a.next_multiple_of(4096)), MIB - 8192), 0);
        usvm_alloc::free(medium.cast());

        // Whole ranges begin at one.
        assert!(fresh.addr().is_multiple_of(2 * MIB));

        // Used and freed memory reads as zero again when asked for, without being written.
        fresh.write_bytes(7, 64 * MIB);
        usvm_alloc::free(fresh.cast());
        let again = usvm_alloc::calloc(1, 64 * MIB).cast::<u8>();
        assert_eq!(again, fresh, "the heap used other memory: this test shows nothing");
        assert_eq!(backed(again, 64 * MIB), 0);
        assert!((0..64 * MIB).step_by(4096).all(|i| *again.add(i) == 0));
        usvm_alloc::free(again.cast());

        // Growing a large block moves its pages.
        let block = usvm_alloc::malloc(8 * MIB).cast::<u8>();
        block.write_bytes(5, 8 * MIB);
        let _wall = usvm_alloc::malloc(2 * MIB);
        let grown = usvm_alloc::realloc(block.cast(), 40 * MIB).cast::<u8>();
        assert_ne!(grown, block, "it grew in place: this test shows nothing");
        assert!((0..8 * MIB).step_by(512).all(|i| *grown.add(i) == 5));
        assert_eq!(backed(block, 8 * MIB), 0, "the pages went along");
        usvm_alloc::free(grown.cast());

        // Small and large blocks go back to the system, those of ended threads too.
        usvm_alloc::trim();
        let start = resident();
        let mine: Vec<usize> = (0..200_000)
            .map(|i| {
                let block = usvm_alloc::malloc(16 + i % 300).cast::<u8>();
                block.write_bytes(1, 16 + i % 300);
                block.expose_provenance()
            })
            .collect();
        let theirs: Vec<usize> = std::thread::spawn(|| {
            (0..100)
                .map(|i| {
                    let block = usvm_alloc::malloc(3000 * i + 1).cast::<u8>();
                    block.write_bytes(1, 3000 * i + 1);
                    block.expose_provenance()
                })
                .collect()
        })
        .join()
        .unwrap();
        let full = resident();
        assert!(full > start + 40 * MIB);
        for block in mine.into_iter().chain(theirs) {
            usvm_alloc::free(std::ptr::with_exposed_provenance_mut(block));
        }
        usvm_alloc::trim();
        let kept = resident().saturating_sub(start);
        assert!(kept < (full - start) / 10, "{} of {} MiB stayed", kept / MIB, (full - start) / MIB);

        // Without being told to as well, while the program goes on.
        let block = usvm_alloc::malloc(48 * MIB).cast::<u8>();
        block.write_bytes(1, 48 * MIB);
        let full = resident();
        usvm_alloc::free(block.cast());
        let begin = std::time::Instant::now();
        while resident() + 40 * MIB > full {
            assert!(begin.elapsed().as_secs() < 60, "{} MiB are still there", (resident() - start) / MIB);
            for _ in 0..1000 {
                usvm_alloc::free(usvm_alloc::malloc(100_000));
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}
