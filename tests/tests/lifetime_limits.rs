//! Little room: for mappings, for address space, for locked memory.

use usvm::{Error, Location, Runtime};
use usvm_tests::area::*;
use usvm_tests::isolated::{isolated, kernel_faults, skipped};

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

/// Maps single pages with alternating rights until the kernel has no more; gives the last `spare` back.
fn use_up_mappings(spare: usize) -> Option<(u64, u64)> {
    let limit: u64 = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok()?.trim().parse().ok()?;
    if limit > 300_000 {
        return None;
    }
    let len = (limit + 1000) * K4;
    let at = map(None, len, libc::PROT_NONE).ok()?;
    let mut cut = Vec::with_capacity(limit as usize);
    for off in (0..len).step_by(2 * K4 as usize) {
        // SAFETY: the test's own mapping.
        if unsafe { libc::mprotect((at + off) as *mut _, K4 as usize, libc::PROT_READ) } != 0 {
            break;
        }
        cut.push(at + off);
    }
    cut.iter().rev().take(spare.div_ceil(2)).for_each(|page| protect(*page, K4, libc::PROT_NONE));
    Some((at, len))
}

/// Uses up what is left, one mapping after another with other rights than its neighbours, and says that there was an end.
fn no_more_mappings() -> bool {
    (0..200).any(|n| map(None, K4, if n % 2 == 0 { RW } else { libc::PROT_READ }).is_err())
}

/// Uses `count` ranges of 64 KiB with a range's distance between them, and checks them all.
fn many_ranges(rt: &Runtime, area: &Area, copy: &mut Piece, count: u64, key: u8) -> u64 {
    for i in 0..count {
        let off = i * 2 * K64;
        match device_xor(rt, area.at + off, K64, key) {
            Ok(()) => xor(&mut copy.bytes[off as usize..(off + K64) as usize], key),
            // Refused is allowed, lost is not.
            Err(Error::OutOfHostMemory { detail, .. }) => {
                assert!(detail.contains("max_map_count"), "{detail}")
            }
            Err(e) => panic!("range {i}: {e}"),
        }
    }
    let away = rt.residence(area.at, area.len).unwrap().device;
    same(&cpu_read(copy.at, copy.len()), &copy.bytes, "all ranges");
    away
}

#[test]
fn the_limit_of_mappings() {
    isolated("the_limit_of_mappings", || {
        let rt = runtime(64 << 20);
        let count = 64;
        let (area, mut copy) = Area::filled(count * 2 * K64, false, &mut Rng::new(1));
        let (apart, mut inside) = Area::filled(4 * M2, false, &mut Rng::new(2));
        // Alternating rights keep chunks at 64 KiB.
        (0..count).for_each(|i| protect(area.at + i * 2 * K64 + K64, K64, libc::PROT_READ));
        many_ranges(&rt, &area, &mut copy, 2, 1);
        let Some((at, len)) = use_up_mappings(12) else {
            return skipped("vm.max_map_count is too large to reach");
        };
        let away = many_ranges(&rt, &area, &mut copy, count, 2);
        many_ranges(&rt, &area, &mut copy, count, 3);
        // No mapping to spare, and two ranges on the device: the CPU reads one, the other is evicted, taken again, and a
        // third is unmapped.
        let part = |i: u64| (area.at + i * 2 * K64, (i * 2 * K64) as usize..(i * 2 * K64 + K64) as usize);
        for i in 0..2 {
            device_xor(&rt, part(i).0, K64, 9).unwrap();
            xor(&mut copy.bytes[part(i).1], 9);
        }
        let there = |i: u64| rt.residence(part(i).0, K64).unwrap().device;
        assert_eq!([there(0), there(1)], [K64; 2], "they were registered before");
        assert!(map(None, K4, RW).is_err() || no_more_mappings(), "the limit is reached");
        // A range inside a mapping can only be registered by dividing it: it is reached over the link.
        let middle = (apart.at + M2, M2 as usize..(M2 + K64) as usize);
        device_xor(&rt, middle.0, K64, 9).unwrap();
        xor(&mut inside.bytes[middle.1], 9);
        assert_eq!(rt.residence(apart.at, apart.len).unwrap().device, 0, "there was a mapping to spare");
        same(&cpu_read(apart.at, apart.len), &inside.bytes, "over the link at the limit");
        same(&cpu_read(part(0).0, K64), &copy.bytes[part(0).1], "read at the limit");
        rt.evict(part(1).0, K64).unwrap();
        same(&cpu_read(part(1).0, K64), &copy.bytes[part(1).1], "evicted at the limit");
        device_xor(&rt, part(1).0, K64, 5).unwrap();
        xor(&mut copy.bytes[part(1).1], 5);
        same(&device_read(&rt, part(1).0, K64).unwrap(), &copy.bytes[part(1).1], "taken again at the limit");
        device_xor(&rt, part(0).0, K64, 0).unwrap();
        unmap(part(0).0, K64);
        assert!(device_read(&rt, part(0).0, 1).is_err(), "unmapped at the limit, and the device sees it");
        map(Some(part(0).0), K64, RW).unwrap();
        copy.bytes[part(0).1].fill(0);
        same(&cpu_read(copy.at, copy.len()), &copy.bytes, "all ranges at the limit");
        unmap(at, len);
        rt.prefetch(middle.0, K64, Location::Device(0)).wait(None).unwrap();
        assert!(rt.residence(apart.at, apart.len).unwrap().device >= K64, "with room again it moves");
        inside.check(&rt, "after the limit");
        // Room again: what was reached over the link may move from now on.
        (0..count).for_each(|i| advise(area.at + i * 2 * K64, K64, libc::MADV_DONTNEED).unwrap());
        (0..count).for_each(|i| {
            let off = (i * 2 * K64) as usize;
            copy.bytes[off..off + K64 as usize].fill(0);
        });
        let later = many_ranges(&rt, &area, &mut copy, count, 4);
        assert!(later >= away && later > count / 2 * K64, "{later:#x} on the device, {away:#x} before");
        rt.shutdown();
        same(&cpu_read(copy.at, copy.len()), &copy.bytes, "after the end");
    });
}

fn limit(resource: u32, bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: a whole structure of this process's own limits.
    assert_eq!(unsafe { libc::setrlimit(resource as _, &limit) }, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn little_address_space() {
    isolated("little_address_space", || {
        // SAFETY: a parameter of malloc: its usual way, which needs the least address space.
        unsafe { libc::mallopt(libc::M_MMAP_MAX, 65536) };
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let used = statm.split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap() * K4;
        limit(libc::RLIMIT_AS, used + (1 << 30));
        let rt = match Runtime::start(config(16 << 20)) {
            Ok(rt) => rt,
            Err(e) => panic!("it starts with 1 GiB of address space: {e}"),
        };
        let (area, mut piece) = Area::filled(24 << 20, false, &mut Rng::new(2));
        for _ in 0..3 {
            piece.check(&rt, "with little address space");
        }
        assert!(rt.stats().bytes_to_device > 0, "{}", rt.stats());
        drop(area);
        rt.shutdown();
    });
}

#[test]
fn too_little_address_space_is_an_error() {
    isolated("too_little_address_space_is_an_error", || {
        let (area, mut piece) = Area::filled(M2, false, &mut Rng::new(3));
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let used = statm.split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap() * K4;
        limit(libc::RLIMIT_AS, used + (3 << 20));
        match Runtime::start(config(64 << 20)) {
            Err(e) => assert!(!e.to_string().is_empty(), "{e}"),
            Ok(rt) => piece.check(&rt, "with almost no address space"),
        }
        same(&cpu_read(piece.at, piece.len()), &piece.bytes, "data is as it was");
        drop(area);
    });
}

#[test]
fn no_locked_memory() {
    isolated("no_locked_memory", || {
        limit(libc::RLIMIT_MEMLOCK, 0);
        // Root is above the limit while it has CAP_IPC_LOCK (14).
        #[repr(C)]
        struct Header(u32, i32);
        let mut header = Header(0x2008_0522, 0);
        let mut sets = [[0u32; 3]; 2];
        // SAFETY: version 3 of the structures: a header and two sets of three words.
        unsafe {
            assert_eq!(libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()), 0);
            sets[0].iter_mut().for_each(|set| *set &= !(1 << 14));
            assert_eq!(libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()), 0);
        }
        let (area, mut piece) = Area::filled(4 * M2, true, &mut Rng::new(4));
        // SAFETY: asks to lock the test's own memory, which is refused.
        assert_ne!(unsafe { libc::mlock(area.at as *const _, K4 as usize) }, 0, "the limit holds");
        let rt = runtime(64 << 20);
        for _ in 0..3 {
            piece.check(&rt, "without locked memory");
        }
        assert!(rt.stats().bytes_to_device > 0);
        drop(area);
    });
}

#[test]
fn everything_locked_now_and_later() {
    if !kernel_faults() {
        return;
    }
    isolated("everything_locked_now_and_later", || {
        let lock_all = |flags| {
            // SAFETY: locks this process's own memory; contents stay.
            assert_eq!(unsafe { libc::mlockall(flags) }, 0, "{}", std::io::Error::last_os_error());
        };
        let rt = runtime(16 << 20);
        let (before, mut early) = Area::filled(2 * M2, true, &mut Rng::new(5));
        early.check(&rt, "before anything is locked");
        device_xor(&rt, before.at, before.len, 7).unwrap();
        xor(&mut early.bytes, 7);
        assert_eq!(rt.residence(before.at, before.len).unwrap().device, before.len);
        // The kernel fetches what is on the device, because locked memory is there.
        lock_all(libc::MCL_CURRENT);
        assert_eq!(rt.residence(before.at, before.len).unwrap().device, 0, "locked memory is home");
        same(&cpu_read(early.at, early.len()), &early.bytes, "locked now");
        early.check(&rt, "locked now");

        lock_all(libc::MCL_CURRENT | libc::MCL_FUTURE);
        let (after, mut late) = Area::filled(2 * M2, true, &mut Rng::new(6));
        early.check(&rt, "locked now and later");
        late.check(&rt, "locked from its begin");

        // SAFETY: unlocks this process's own memory.
        assert_eq!(unsafe { libc::munlockall() }, 0);
        let moved = rt.stats().bytes_to_device;
        early.check(&rt, "unlocked");
        late.check(&rt, "unlocked");
        assert!(rt.stats().bytes_to_device > moved, "it moves again: {}", rt.stats());
        rt.shutdown();
        same(&cpu_read(early.at, early.len()), &early.bytes, "after the end");
        same(&cpu_read(late.at, late.len()), &late.bytes, "after the end");
        drop((before, after));
    });
}

#[test]
fn a_start_with_everything_locked() {
    if !kernel_faults() {
        return;
    }
    isolated("a_start_with_everything_locked", || {
        // SAFETY: locks what this process maps from now on.
        assert_eq!(unsafe { libc::mlockall(libc::MCL_FUTURE) }, 0, "{}", std::io::Error::last_os_error());
        let rt = runtime(16 << 20);
        let (area, mut piece) = Area::filled(2 * M2, true, &mut Rng::new(7));
        piece.check(&rt, "locked from the start");
        // SAFETY: unlocks this process's own memory.
        assert_eq!(unsafe { libc::munlockall() }, 0);
        // What a device has reached over the link stays so until somebody asks for more.
        rt.prefetch(area.at, area.len, Location::Device(0)).wait(None).unwrap();
        assert_eq!(rt.residence(area.at, area.len).unwrap().device, area.len, "unlocked memory moves");
        piece.check(&rt, "unlocked");
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let locked = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap().trim().to_owned();
        let kib: u64 = locked.split(' ').next().unwrap().parse().unwrap();
        assert!(kib < 400 << 10, "usvm's reserved memory was filled: {locked} resident");
        rt.shutdown();
        drop(area);
    });
}

/// mlockall fills usvm's own places, too; what is in no record there must not keep memory at home afterwards.
#[test]
fn what_was_locked_for_a_while_goes_to_the_device_again() {
    if !kernel_faults() {
        return;
    }
    isolated("what_was_locked_for_a_while_goes_to_the_device_again", || {
        let rt = runtime(64 << 20);
        for len in [K64, M2] {
            let (area, mut piece) = Area::filled(len, false, &mut Rng::new(3));
            piece.change(&rt, "before");
            // SAFETY: this process only, which is the test's own.
            if unsafe { libc::mlockall(libc::MCL_CURRENT) } != 0 {
                skipped(format_args!("mlockall: {}", std::io::Error::last_os_error()));
                return;
            }
            piece.check(&rt, "locked");
            // SAFETY: as it was.
            assert_eq!(unsafe { libc::munlockall() }, 0);
            let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while rt.residence(area.at, len).unwrap().device < len {
                assert!(std::time::Instant::now() < until, "{:?}", rt.residence(area.at, len));
                rt.prefetch(area.at, len, usvm::Location::Device(0)).wait(None).unwrap();
            }
            let at = area.at;
            rt.launch(0, move |gpu| gpu.fetch_add_u64(at, 0).map(drop)).wait(None).unwrap();
            piece.check(&rt, "afterwards");
        }
        rt.shutdown();
    });
}
