//! Which memory migrates, and that the rest works all the same.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use usvm::ground::alloc;
use usvm::{Error, Location, Runtime};
use usvm_tests::area::*;
use usvm_tests::isolated::{isolated, skipped};

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

/// Bytes of `[at, at + len)` on the device.
fn away(rt: &Runtime, at: u64, len: u64) -> u64 {
    rt.residence(at, len).unwrap().device
}

/// Memory that must go to the device and come back whole.
#[track_caller]
fn migrates(rt: &Runtime, mut piece: Piece, what: &str) {
    piece.change(rt, what);
    let (at, len) = (piece.at, piece.len());
    // The copy may lie in the same mapping and share a range with it at either end.
    assert!(away(rt, at, len) >= len / 2, "{what}: {:?}", rt.residence(at, len));
    piece.check(rt, what);
}

/// Memory that must stay, and be reached where it is.
#[track_caller]
fn stays(rt: &Runtime, mut piece: Piece, what: &str) {
    piece.check(rt, what);
    assert_eq!(away(rt, piece.at, piece.len()), 0, "{what}");
    let _ = rt.prefetch(piece.at, piece.len(), Location::Device(0)).wait(None);
    assert_eq!(away(rt, piece.at, piece.len()), 0, "{what}: prefetched");
    piece.check(rt, what);
}

fn fill(at: u64, len: u64, seed: u64) -> Piece {
    let piece = Piece { at, bytes: Rng::new(seed).bytes(len) };
    cpu_write(at, &piece.bytes);
    piece
}

#[test]
fn large_and_small_malloc_migrate() {
    isolated("large_and_small_malloc_migrate", || {
        // SAFETY: a parameter of malloc: its usual threshold again.
        unsafe { libc::mallopt(libc::M_MMAP_MAX, 65536) };
        let rt = runtime(64 << 20);
        // SAFETY: plain malloc; written before it is read.
        let large = unsafe { libc::malloc(8 << 20) } as u64;
        migrates(&rt, fill(large, 8 << 20, 1), "large malloc");
        // SAFETY: as above.
        unsafe { libc::free(large as *mut _) };
        // A list of small nodes, walked by the device.
        let nodes: Vec<u64> = (0..20_000u64)
            // SAFETY: as above.
            .map(|i| unsafe { libc::malloc(40 + (i % 7) as usize * 16) } as u64)
            .collect();
        for (i, node) in nodes.iter().enumerate() {
            cpu_write(*node, &nodes.get(i + 1).copied().unwrap_or(0).to_le_bytes());
            cpu_write(*node + 8, &(i as u64 * 3).to_le_bytes());
        }
        let sum = alloc::internal(|| std::sync::Arc::new(AtomicU64::new(0)));
        let (head, total) = (nodes[0], sum.clone());
        rt.launch(0, move |gpu| {
            let (mut at, mut n) = (head, 0);
            while at != 0 {
                n += gpu.load_u64(at + 8)?;
                gpu.store_u64(at + 8, n)?;
                at = gpu.load_u64(at)?;
            }
            total.store(n, Ordering::Release);
            Ok(())
        })
        .wait(None)
        .unwrap();
        assert!(rt.stats().bytes_to_device > 1 << 20, "{}", rt.stats());
        let mut expected = 0;
        for (i, node) in nodes.iter().enumerate() {
            expected += i as u64 * 3;
            let got = u64::from_le_bytes(cpu_read(node + 8, 8).try_into().unwrap());
            assert_eq!(got, expected, "node {i}");
        }
        assert_eq!(sum.load(Ordering::Acquire), expected);
        // SAFETY: each is freed once.
        nodes.iter().for_each(|n| unsafe { libc::free(*n as *mut _) });
    });
}

#[test]
fn brk_mmap_and_older_memory_migrate() {
    isolated("brk_mmap_and_older_memory_migrate", || {
        let old = Area::new(4 * M2);
        let old_piece = fill(old.at, old.len, 2);
        // SAFETY: grows the data segment; nobody gives it back.
        let brk = unsafe { libc::sbrk(6 << 20) } as u64;
        assert_ne!(brk as i64, -1);
        let brk = brk.next_multiple_of(M2);
        let brk_piece = fill(brk, 2 << 20, 3);
        let rt = runtime(64 << 20);
        migrates(&rt, old_piece, "memory from before the start");
        migrates(&rt, brk_piece, "brk");
        let new = Area::new(4 * M2);
        migrates(&rt, fill(new.at, new.len, 4), "mmap");
    });
}

#[test]
fn another_threads_stack_migrates_while_it_waits() {
    isolated("another_threads_stack_migrates_while_it_waits", || {
        let rt = runtime(64 << 20);
        let (to_main, from_thread) = std::sync::mpsc::channel::<(u64, u64)>();
        let go = std::sync::Arc::new(std::sync::Barrier::new(2));
        let wait = go.clone();
        let thread = std::thread::Builder::new().stack_size(4 << 20).spawn(move || {
            let mut here = [0u8; 1 << 20];
            here.iter_mut().enumerate().for_each(|(i, b)| *b = (i % 251) as u8);
            let here = std::hint::black_box(&mut here);
            to_main.send((here.as_ptr() as u64, here.len() as u64)).unwrap();
            wait.wait();
            std::hint::black_box(&*here).iter().enumerate().all(|(i, b)| *b == (i % 251) as u8 ^ 0x5a)
        });
        let thread = thread.unwrap();
        let (at, len) = from_thread.recv().unwrap();
        device_xor(&rt, at, len, 0x5a).unwrap();
        assert!(away(&rt, at, len) > 0, "{:?}", rt.residence(at, len));
        go.wait();
        assert!(thread.join().unwrap(), "the thread finds its stack as the device left it");
    });
}

#[test]
fn files_and_shared_memory_stay() {
    isolated("files_and_shared_memory_stay", || {
        let rt = runtime(64 << 20);
        let len = 4 * K64;
        let mut file = tempfile::tempfile().unwrap();
        let contents = Rng::new(5).bytes(len);
        file.write_all(&contents).unwrap();
        // SAFETY: a new name for a memory file.
        let memfd = unsafe { libc::memfd_create(c"test".as_ptr(), 0) };
        assert!(memfd >= 0);
        // SAFETY: sizes our own file.
        assert_eq!(unsafe { libc::ftruncate(memfd, len as i64) }, 0);
        let fd = file.as_raw_fd();
        let anonymous = libc::MAP_ANONYMOUS;
        for (what, flags, fd) in [
            ("private file", libc::MAP_PRIVATE, fd),
            ("shared file", libc::MAP_SHARED, fd),
            ("shared anonymous", libc::MAP_SHARED | anonymous, -1),
            ("memfd, shared", libc::MAP_SHARED, memfd),
            ("memfd, private", libc::MAP_PRIVATE, memfd),
        ] {
            // SAFETY: new mappings at addresses of the kernel's choice.
            let at = unsafe { libc::mmap(std::ptr::null_mut(), len as usize, RW, flags, fd, 0) } as u64;
            assert_ne!(at as i64, -1, "{what}");
            if what == "private file" {
                let seen = device_read(&rt, at, len).unwrap();
                same(&seen, &contents, "a file's contents");
            }
            stays(&rt, fill(at, len, 6), what);
            unmap(at, len);
        }
        assert!(rt.stats().bytes_to_device == 0, "{}", rt.stats());
    });
}

#[test]
fn read_only_memory_stays_and_refuses_writes() {
    isolated("read_only_memory_stays_and_refuses_writes", || {
        let rt = runtime(64 << 20);
        let (area, piece) = Area::filled(M2, false, &mut Rng::new(7));
        protect(area.at, area.len, libc::PROT_READ);
        let seen = device_read(&rt, piece.at, piece.len()).unwrap();
        same(&seen, &piece.bytes, "read-only");
        assert_eq!(away(&rt, area.at, area.len), 0);
        let refused = device_xor(&rt, area.at, area.len, 1);
        assert!(matches!(refused, Err(Error::NotWritable { .. })), "{refused:?}");
        same(&cpu_read(piece.at, piece.len()), &piece.bytes, "after the refusal");
        // A constant of the program.
        static CONSTANT: [u8; 4096] = [0x77; 4096];
        let at = CONSTANT.as_ptr() as u64;
        assert_eq!(device_read(&rt, at, 4096).unwrap(), CONSTANT);
        assert!(device_xor(&rt, at, 4096, 1).is_err());
    });
}

#[test]
fn huge_tlb_pages_stay() {
    isolated("huge_tlb_pages_stay", || {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
        // SAFETY: a new mapping.
        let mut at = unsafe { libc::mmap(std::ptr::null_mut(), M2 as usize, RW, flags, -1, 0) };
        let pool = "/proc/sys/vm/nr_hugepages";
        let before = std::fs::read_to_string(pool).unwrap_or_default();
        if at == libc::MAP_FAILED && before.trim() == "0" && std::fs::write(pool, "2").is_ok() {
            // SAFETY: as above.
            at = unsafe { libc::mmap(std::ptr::null_mut(), M2 as usize, RW, flags, -1, 0) };
        }
        if at == libc::MAP_FAILED {
            let _ = std::fs::write(pool, &before);
            return skipped("no huge pages are reserved (vm.nr_hugepages) and none could be");
        }
        let rt = runtime(64 << 20);
        stays(&rt, fill(at as u64, M2, 8), "hugetlb");
        unmap(at as u64, M2);
        let _ = std::fs::write(pool, &before);
    });
}

#[test]
fn usvms_own_memory_stays() {
    isolated("usvms_own_memory_stays", || {
        let rt = runtime(64 << 20);
        let (area, mut piece) = Area::filled(2 * M2, false, &mut Rng::new(9));
        for span in alloc::spans() {
            assert!(!span.is_empty());
            device_read(&rt, span.start, K64).unwrap();
            let _ = rt.prefetch(span.start, M2, Location::Device(0)).wait(None);
            assert_eq!(away(&rt, span.start, M2), 0, "an arena of usvm");
        }
        // The stacks of a control thread and of an engine.
        let control = rt
            .on_service_thread(|_| {
                let local = 1u8;
                Ok(std::ptr::from_ref(std::hint::black_box(&local)) as u64)
            })
            .unwrap();
        let found = alloc::internal(|| std::sync::Arc::new(AtomicU64::new(0)));
        let tell = found.clone();
        rt.launch(0, move |_| {
            let local = 1u8;
            tell.store(std::ptr::from_ref(std::hint::black_box(&local)) as u64, Ordering::Release);
            Ok(())
        })
        .wait(None)
        .unwrap();
        for (what, at) in [("control", control), ("engine", found.load(Ordering::Acquire))] {
            let page = at / K4 * K4;
            device_read(&rt, page, K4).unwrap();
            let _ = rt.prefetch(page, K4, Location::Device(0)).wait(None);
            assert_eq!(away(&rt, page - K64, 2 * K64), 0, "the stack of a {what} thread");
        }
        // All of it still works.
        piece.check(&rt, "afterwards");
        drop(area);
    });
}

#[test]
fn what_takes_the_place_of_a_file_migrates() {
    isolated("what_takes_the_place_of_a_file_migrates", || {
        let rt = runtime(64 << 20);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; M2 as usize]).unwrap();
        let reserved = map(None, 2 * M2, libc::PROT_NONE).unwrap();
        let at = reserved.next_multiple_of(M2);
        // SAFETY: replaces memory of the test's own.
        let got = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
            libc::mmap(at as *mut _, M2 as usize, RW, flags, file.as_raw_fd(), 0)
        };
        assert_eq!(got as u64, at, "{}", std::io::Error::last_os_error());
        device_xor(&rt, at, M2, 1).unwrap();
        assert_eq!(away(&rt, at, M2), 0, "a file stays");
        // Nobody is told of this: files are not registered.
        map(Some(at), M2, RW).unwrap();
        let mut piece = fill(at, M2, 9);
        rt.prefetch(at, M2, Location::Device(0)).wait(None).unwrap();
        assert_eq!(away(&rt, at, M2), M2, "ordinary memory migrates, whatever was there before");
        piece.check(&rt, "in the place of a file");
        unmap(reserved, 2 * M2);
    });
}

/// Mappings that the kernel says are under userfaultfd for missing pages.
fn watched() -> Vec<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut found, mut at) = (Vec::new(), (0, 0));
    for line in text.lines() {
        let first = line.split(' ').next().unwrap();
        let span = first
            .split_once('-')
            .and_then(|(a, b)| Some((u64::from_str_radix(a, 16).ok()?, u64::from_str_radix(b, 16).ok()?)));
        at = span.unwrap_or(at);
        if line.strip_prefix("VmFlags:").is_some_and(|flags| flags.split(' ').any(|f| f == "um")) {
            found.push(at);
        }
    }
    found
}

/// Without what usvm keeps for itself (its shadow): those that are the program's.
fn watched_of_the_program(own: &[(u64, u64)]) -> Vec<(u64, u64)> {
    watched().into_iter().filter(|(a, b)| !own.iter().any(|(c, d)| a >= c && b <= d)).collect()
}

#[test]
fn only_what_the_device_used_is_registered() {
    isolated("only_what_the_device_used_is_registered", || {
        let (used, mut piece) = Area::filled(2 * M2, false, &mut Rng::new(1));
        let (_beside, _bytes) = Area::filled(2 * M2, false, &mut Rng::new(2));
        assert_eq!(watched(), [], "before usvm runs");
        let rt = runtime(64 << 20);
        assert_eq!(rt.host().registered_spans(), []);
        let own = watched();
        let bytes: u64 = own.iter().map(|(a, b)| b - a).sum();
        assert!(bytes <= rt.host().shadow_mapped_bytes(), "{bytes:#x} bytes are watched: {own:x?}");
        // A range at home is read by nobody, and a launch that uses no memory watches none.
        rt.launch(0, |_| Ok(())).wait(None).unwrap();
        assert_eq!(watched_of_the_program(&own), []);
        let at = used.at;
        rt.launch(0, move |gpu| gpu.load_u64(at + K4).map(drop)).wait(None).unwrap();
        let now = watched_of_the_program(&own);
        assert!(!now.is_empty() && now.iter().all(|(a, b)| *a >= at && *b <= at + used.len), "{now:x?}");
        assert!(now.iter().any(|(a, b)| (*a..*b).contains(&(at + K4))), "{now:x?}");
        piece.check(&rt, "all of it");
        let now = watched_of_the_program(&own);
        assert!(now.iter().all(|(a, b)| *a >= at && *b <= at + used.len), "{now:x?}");
        rt.shutdown();
        assert_eq!(watched_of_the_program(&own), [], "after the end");
    });
}

#[test]
fn a_hole_in_a_shared_mapping_reads_as_zeroes() {
    isolated("a_hole_in_a_shared_mapping_reads_as_zeroes", || {
        let rt = runtime(64 << 20);
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), M2 as usize, RW, flags, -1, 0) } as u64;
        let mut piece = fill(at, M2, 3);
        piece.check(&rt, "shared");
        for (off, len) in [(3 * K4, 5 * K4), (K64, K64), (0, M2)] {
            advise(at + off, len, libc::MADV_REMOVE).unwrap();
            piece.bytes[off as usize..(off + len) as usize].fill(0);
            // The device looks first: it has it mapped.
            same(
                &device_read(&rt, at, M2).unwrap(),
                &piece.bytes,
                format_args!("the device, hole at {off:#x}"),
            );
            piece.check(&rt, "with a hole");
        }
        unmap(at, M2);
    });
}
