//! What the space sees of this process's mappings, and the events about them.

use super::*;
use crate::ground::error::Error;
use crate::host::{exempt, pagemap};
use crate::space::ports::{AddressSpace, Vma, VmaKind};
use rustix::fd::{AsFd, AsRawFd};

fn hosts() -> [Host; 2] {
    [host(), without(Features::PROCMAP_QUERY)]
}

fn vma(host: &Host, addr: u64) -> Vma {
    host.find_vma(addr).unwrap().expect("mapped")
}

#[test]
fn registered_parts_do_not_show() {
    let _t = together();
    for host in hosts() {
        let area = Area::small(64 * SZ_4K);
        let whole = vma(&host, area.span.start);
        assert!(
            whole.span.covers(area.span) && whole.migratable() && whole.read && whole.write && !whole.exec
        );
        for part in [(8, 8), (30, 2), (16, 4), (50, 1)] {
            host.register(area.span.page_run(part.0, part.1)).unwrap();
            host.register(area.span.page_run(part.0, part.1)).unwrap();
            for page in [0, 8, 15, 16, 20, 31, 40, 63] {
                assert_eq!(vma(&host, area.span.start + page * SZ_4K), whole, "seen from page {page}");
            }
        }
        host.unregister(area.span.page_run(10, 8));
        assert_eq!(vma(&host, area.span.start), whole);
        assert!(!host.is_registered(area.span.page_run(8, 4)));
        assert!(
            host.is_registered(area.span.page_run(8, 2)) && host.is_registered(area.span.page_run(18, 2))
        );
        let mut left = PageMask::EMPTY;
        for (first, count) in [(8, 2), (18, 2), (30, 2), (50, 1)] {
            left.set_run(first, count);
        }
        assert_eq!(host.registered(area.span), left);
        assert_eq!(pagemap::registered_by_smaps(area.span), Some(left), "an older kernel's answer");
        assert_eq!(pagemap::all_registered_by_smaps(area.span), Some(false));
        assert_eq!(pagemap::all_registered_by_smaps(area.span.page_run(18, 2)), Some(true));
        drop(host);
    }
}

/// Each piece costs a system call; a program under chaos has thousands.
#[test]
fn a_mapping_in_many_pieces_is_joined_where_a_range_can_be() {
    let _t = together();
    let area = Area::new(6 * SZ_2M, false);
    for host in hosts() {
        for addr in (area.span.start..area.span.end).step_by(2 * SZ_4K as usize) {
            host.register(Span::sized(addr, SZ_4K)).unwrap();
        }
        for page in [600, 1024, 1535] {
            let addr = area.span.start + page * SZ_4K;
            let block = Span::around(addr, SZ_2M);
            let seen = vma(&host, addr).span;
            assert!(seen.covers(block.intersect(area.span).unwrap()), "{seen} of {block}");
            assert!(
                seen.start + SZ_4K >= block.start && seen.end <= block.end + SZ_4K,
                "{seen} beyond {block}"
            );
        }
        drop(host);
    }
}

#[test]
fn real_boundaries_show() {
    let _t = together();
    for host in hosts() {
        let area = Area::small(32 * SZ_4K);
        let read_only = area.span.page_run(10, 5);
        // SAFETY: the test's own memory.
        let done = unsafe {
            let at = std::ptr::with_exposed_provenance_mut(read_only.start as usize);
            libc::mprotect(at, read_only.len() as usize, libc::PROT_READ)
        };
        assert_eq!(done, 0);
        host.register(area.span.page_run(0, 10)).unwrap();
        host.register(area.span.page_run(15, 5)).unwrap();
        let middle = vma(&host, read_only.start);
        assert_eq!((middle.span, middle.write), (read_only, false));
        assert_eq!(vma(&host, area.span.start).span.end, read_only.start);
        assert_eq!(vma(&host, read_only.end).span.start, read_only.end);
        drop(host);
    }
}

#[test]
fn exempt_parts_are_cut_off() {
    let _t = together();
    for host in hosts() {
        let area = Area::small(32 * SZ_4K);
        let own = area.span.page_run(8, 4);
        exempt::exempt(own);
        let inside = vma(&host, own.start + SZ_4K);
        assert_eq!((inside.span, inside.migratable(), inside.write), (own, false, true));
        let (left, right) = (vma(&host, area.span.start), vma(&host, own.end));
        assert!(left.migratable() && right.migratable());
        assert_eq!((left.span.end, right.span.start), (own.start, own.end));
        exempt::unexempt(own);
        assert!(vma(&host, own.start).span.covers(area.span));
    }
}

#[test]
fn the_shadow_is_exempt() {
    let _t = together();
    let host = host();
    let shadow = host.shadow_alloc(SZ_4K).unwrap();
    assert!(exempt::is_exempt(shadow.span));
    assert!(!vma(&host, shadow.span.start).migratable());
    let span = shadow.span;
    host.shadow_free(shadow);
    drop(host);
    let _ = span;
}

#[test]
fn kinds_are_told() {
    let _t = together();
    let map = |flags: i32, fd: i32| {
        // SAFETY: a new mapping at a place of the kernel's choice.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), SZ_2M as usize, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0)
        };
        (at != libc::MAP_FAILED).then(|| at.expose_provenance() as u64)
    };
    let memfd = memfd::MemfdOptions::default().create("kinds").unwrap();
    memfd.as_file().set_len(SZ_2M).unwrap();
    use rustix::fd::AsRawFd;
    let fd = memfd.as_file().as_raw_fd();
    let anonymous = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
    let cases = [
        (map(anonymous, -1), VmaKind::Anonymous),
        (map(libc::MAP_ANONYMOUS | libc::MAP_SHARED, -1), VmaKind::Shared),
        (map(libc::MAP_SHARED, fd), VmaKind::Shared),
        (map(libc::MAP_PRIVATE, fd), VmaKind::File),
        (map(anonymous | libc::MAP_HUGETLB | libc::MAP_NORESERVE, -1), VmaKind::Hugetlb),
    ];
    // SAFETY: asks the kernel for the address of its vdso.
    let vdso = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    for host in hosts() {
        for (addr, kind) in cases {
            let Some(addr) = addr else {
                skipped(format!("no {kind:?} mapping to be had here"));
                continue;
            };
            assert_eq!(vma(&host, addr).kind, kind);
        }
        assert_eq!(vma(&host, vdso).kind, VmaKind::Special);
        assert_eq!(vma(&host, kinds_are_told as *const () as u64).kind, VmaKind::File);
        assert_eq!(host.find_vma(0x1000).unwrap(), None);
    }
    for addr in cases.iter().filter_map(|(addr, _)| *addr) {
        // SAFETY: mapped above.
        unsafe { sys::unmap(Span::sized(addr, SZ_2M)) }.unwrap();
    }
}

#[test]
fn what_cannot_be_registered_says_why() {
    let _t = together();
    let host = host();
    let addr = 0x1000;
    assert_eq!(host.register(Span::sized(addr, SZ_4K)), Err(Error::Gone { addr }));
    let area = Area::small(4 * SZ_4K);
    let other = self::host();
    other.register(area.span).unwrap();
    assert_eq!(host.register(area.span), Err(Error::Busy { span: area.span }));
    drop(other);
    host.register(area.span).unwrap();
    drop(host);
}

#[test]
fn events_are_told_and_booked() {
    let _t = together();
    let area = Area::small(64 * SZ_4K);
    let host = host();
    host.register(area.span).unwrap();
    let span = area.span;
    let (removed, unmapped, moved) = (span.page_run(4, 2), span.page_run(10, 4), span.page_run(20, 4));
    let busy = std::thread::spawn(move || {
        drop_pages(removed);
        // SAFETY: the test's own memory.
        unsafe {
            sys::unmap(unmapped).unwrap();
            let len = moved.len() as usize;
            let old = std::ptr::with_exposed_provenance_mut(moved.start as usize);
            let new = libc::mremap(old, len, len, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, {
                std::ptr::with_exposed_provenance_mut::<libc::c_void>(unmapped.start as usize)
            });
            assert_eq!(new.addr() as u64, unmapped.start);
        }
    });
    let mut messages = Vec::new();
    while messages.len() < 4 && host.poll(Some(Duration::from_secs(10))).unwrap().messages {
        host.read_batch(&mut messages).unwrap();
    }
    handled(&host, &messages);
    busy.join().unwrap();
    let mut seen = (false, 0, false);
    for message in messages {
        match message {
            Message::Remove(s) => seen.0 = s == removed,
            Message::Unmap(s) => {
                assert!(s == unmapped || s == moved, "{s}");
                seen.1 += 1;
                host.forget(s);
            }
            Message::Remap { from, to, len } => {
                assert!(!host.is_own_remap(from, to));
                assert_eq!((from, to, len), (moved.start, unmapped.start, moved.len()));
                host.moved(from, to, len);
                seen.2 = true;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(seen.0 && seen.1 >= 1 && seen.2, "{seen:?}");
    assert!(host.is_registered(unmapped), "the moved part took its registration along");
    assert!(!host.is_registered(moved));
    verify_pages(span, &mask(&[(0, 4), (6, 4), (24, 40)]));
    for (page, offset) in (10..14).zip(20..) {
        assert_eq!(get(span.start + page * SZ_4K), pattern(offset * SZ_4K));
    }
    drop(host);
}

#[test]
fn fork_is_told_where_it_may_be() {
    let _t = alone();
    let area = Area::small(4 * SZ_4K);
    let host = Host::open(&Options { forbid: Features::empty(), ..options() }).unwrap();
    if !host.report().has.contains(Features::EVENT_FORK) {
        skipped("no CAP_SYS_PTRACE");
        return;
    }
    host.register(area.span).unwrap();
    let forker = std::thread::spawn(Child::fork);
    assert!(host.poll(Some(Duration::from_secs(10))).unwrap().messages);
    let mut messages = Vec::new();
    host.read_batch(&mut messages).unwrap();
    handled(&host, &messages);
    let [Message::Fork(childs)] = &messages[..] else { panic!("{messages:?}") };
    assert!(crate::ground::fds::is_kept(childs.as_fd().as_raw_fd()), "other children would keep it open");
    drop(forker.join().unwrap());
}

#[test]
fn the_reader_can_be_woken() {
    let _t = together();
    let host = host();
    let none = host.poll(Some(Duration::from_millis(1))).unwrap();
    assert!(!none.messages && !none.woken);
    host.channel().wake_reader();
    host.channel().wake_reader();
    assert!(host.poll(None).unwrap().woken);
    assert!(!host.poll(Some(Duration::ZERO)).unwrap().woken);
    assert_eq!(host.read_batch(&mut Vec::new()).unwrap(), 0);
}

#[test]
fn faults_name_address_kind_and_thread() {
    let _t = together();
    let area = Area::new(4 * SZ_4K, false);
    let host = host();
    host.register(area.span).unwrap();
    let addr = area.span.start + SZ_4K + 24;
    let writer = std::thread::spawn(move || {
        put(addr, 9);
        // SAFETY: asks for the thread's own number.
        unsafe { libc::gettid() as u32 }
    });
    assert!(host.poll(Some(Duration::from_secs(10))).unwrap().messages);
    let mut messages = Vec::new();
    host.read_batch(&mut messages).unwrap();
    let Message::Fault { addr: at, write, wp, minor, tid } = messages[0] else { panic!("{messages:?}") };
    assert_eq!((at, write, wp, minor), (addr, true, false, false));
    host.zero_fill(addr).unwrap();
    host.zero_fill(addr).unwrap();
    assert_eq!(writer.join().unwrap(), tid);
    assert_eq!(get(addr), 9);
    // A wake without a page makes the thread fault again.
    let reader = std::thread::spawn(move || get(addr + SZ_4K));
    for _ in 0..2 {
        messages.clear();
        assert!(host.poll(Some(Duration::from_secs(10))).unwrap().messages);
        host.read_batch(&mut messages).unwrap();
        assert!(matches!(messages[0], Message::Fault { write: false, .. }), "{messages:?}");
        host.wake(area.span);
    }
    host.unregister(area.span);
    assert_eq!(reader.join().unwrap(), 0, "unregistering lets the kernel serve");
}

/// mremap changes the mappings first and tells afterwards. What it brings needs its registration, for contents that are
/// away and still to land, and is not what the books know of that place.
#[test]
fn what_mremap_brings_stays_registered() {
    let _t = alone();
    // Over memory that the books have, and over memory that was never registered.
    for known in [true, false] {
        let source = Area::small(16 * SZ_4K);
        let place = Area::small(16 * SZ_4K);
        let host = host();
        host.register(source.span).unwrap();
        if known {
            host.register(place.span).unwrap();
        }
        let (from, to, len) = (source.span.start, place.span.start, source.span.len());
        let caller = std::thread::spawn(move || {
            let at = |addr: u64| std::ptr::with_exposed_provenance_mut::<libc::c_void>(addr as usize);
            // SAFETY: nothing refers to either place.
            let new = unsafe {
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                libc::mremap(at(from), len as usize, len as usize, flags, at(to))
            };
            assert_eq!(new.addr() as u64, to);
        });
        let let_go = || {
            host.unregister(place.span);
            host.let_go(place.span.page_run(3, 1));
            host.kernel_registered(place.span).expect("the kernel tells")
        };
        assert!(host.poll(Some(Duration::from_secs(10))).unwrap().messages);
        assert!(let_go(), "while the event is unread");
        let mut messages = Vec::new();
        while !caller.is_finished() {
            host.read_batch(&mut messages).unwrap();
        }
        caller.join().unwrap();
        assert!(let_go(), "while it is not handled");
        assert_eq!(host.zero_fill(place.span.start), Err(FlipError::Again), "a page may be on its way");
        for message in &messages {
            match *message {
                Message::Unmap(span) if span == place.span => assert!(known),
                Message::Unmap(span) => host.forget(span),
                Message::Remap { from, to, len } => host.moved(from, to, len),
                _ => panic!("{message:?}"),
            }
        }
        assert!(let_go(), "until the last one is");
        handled(&host, &messages);
        assert!(host.is_registered(place.span));
        assert!(!let_go(), "now it is not needed any more");
        assert!(!host.mappings_change());
    }
}

#[test]
fn the_shadow_names_the_limit_it_meets() {
    const LIMITED: &str = "USVM_TEST_LIMITED";
    if std::env::var_os(LIMITED).is_some() {
        let host = host();
        let held = host.shadow_alloc(SZ_2M).unwrap();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let kib = |name: &str| -> u64 {
            let line = status.lines().find(|l| l.starts_with(name)).unwrap();
            line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let limit = (kib("VmSize:") << 10) + (40 << 20);
        let new = rustix::process::Rlimit { current: Some(limit), maximum: None };
        rustix::process::setrlimit(rustix::process::Resource::As, new).unwrap();
        let mut slots = vec![held];
        let error = loop {
            match host.shadow_alloc(SZ_2M) {
                Ok(slot) => slots.push(slot),
                Err(error) => break error,
            }
        };
        // 64 MiB fit no more, but half as much did, and then smaller ones.
        assert!(slots.len() > 32 + 16, "{}", slots.len());
        let text = error.to_string();
        assert!(matches!(error, Error::OutOfHostMemory { .. }) && text.contains("RLIMIT_AS"), "{text}");
        let area_ok = slots.pop().unwrap();
        host.shadow_free(area_ok);
        host.shadow_alloc(SZ_2M).unwrap();
        return;
    }
    let name = "host::tests::mappings::the_shadow_names_the_limit_it_meets";
    let done = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(LIMITED, "1")
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}
