//! Flips of every kind of page, and what stops them.

use super::*;
use crate::space::ports::{AddressSpace, FlipError};

#[test]
fn small_pages_with_holes_go_out_and_in() {
    let _t = together();
    let area = Area::new(SZ_2M, false);
    let host = host();
    let there = mask(&[(0, 3), (7, 1), (100, 64), (511, 1)]);
    fill_pages(area.span, &there);
    host.register(area.span).unwrap();
    let shadow = host.shadow_alloc(SZ_2M).unwrap();
    assert_eq!(host.present(area.span), there);
    assert!(!host.populated(area.span) && host.populated(area.span.page_run(100, 64)));

    let wanted = mask(&[(0, 2), (5, 110), (511, 1)]);
    let moved = host.flip_out(area.span, &shadow, &wanted).unwrap();
    assert_eq!(moved, wanted.and(&there));
    assert_eq!(host.present(area.span), there.minus(&moved));
    assert_eq!(host.present(shadow.span), moved, "holes stay holes");
    verify_pages(shadow.span, &moved);

    host.flip_in(area.span, &shadow, &moved).unwrap();
    assert_eq!(host.present(area.span), there);
    assert!(host.present(shadow.span).is_empty());
    verify_pages(area.span, &there);
    host.shadow_free(shadow);
    assert_eq!(host.stats().pages_out.load(Ordering::Relaxed), moved.count() as u64);
    assert_eq!(host.stats().pages_in.load(Ordering::Relaxed), moved.count() as u64);
}

#[test]
fn a_huge_page_stays_huge() {
    let _t = together();
    let area = Area::huge();
    let host = host();
    host.register(area.span).unwrap();
    let shadow = host.shadow_alloc(SZ_2M).unwrap();
    assert!(host.is_huge(area.span));
    for _ in 0..5 {
        assert_eq!(host.flip_out(area.span, &shadow, &all(area.span)).unwrap(), all(area.span));
        assert!(host.is_huge(shadow.span) && host.present(area.span).is_empty());
        verify(shadow.span);
        host.flip_in(area.span, &shadow, &all(area.span)).unwrap();
        assert!(host.is_huge(area.span));
    }
    verify(area.span);
    host.shadow_free(shadow);
}

#[test]
fn slots_of_all_sizes_serve_ranges_of_all_sizes() {
    let _t = together();
    let area = Area::small(256 << 10);
    let host = host();
    host.register(area.span).unwrap();
    for len in [SZ_4K, 16 << 10, 64 << 10, 256 << 10] {
        let part = Span::sized(area.span.start, len);
        let shadow = host.shadow_alloc(len).unwrap();
        assert_eq!((shadow.span.len(), shadow.span.start % len), (len, 0));
        assert_eq!(host.flip_out(part, &shadow, &all(part)).unwrap(), all(part));
        host.flip_in(part, &shadow, &all(part)).unwrap();
        host.shadow_free(shadow);
    }
    verify(area.span);
    assert!(host.shadow_alloc(3 * SZ_4K).is_err());
}

#[test]
fn zero_pages_flip() {
    let _t = together();
    let (small, huge) = (Area::new(SZ_2M, false), Area::new(SZ_2M, true));
    for host in [host(), without(Features::MOVE_ZERO_PAGES)] {
        assert_eq!(get(small.span.start + SZ_4K) | get(huge.span.start), 0);
        put(small.span.start + 2 * SZ_4K, 5);
        let there = [(&small, mask(&[(1, 2)])), (&huge, all(huge.span))];
        for (area, there) in there {
            host.register(area.span).unwrap();
            assert_eq!(host.present(area.span), there);
            let shadow = host.shadow_alloc(SZ_2M).unwrap();
            assert_eq!(host.flip_out(area.span, &shadow, &all(area.span)).unwrap(), there);
            assert_eq!(get(shadow.span.start + SZ_4K), 0);
            put(shadow.span.start + SZ_4K, 77);
            host.flip_in(area.span, &shadow, &there).unwrap();
            assert_eq!(get(area.span.start + SZ_4K), 77);
            host.unregister(area.span);
            host.shadow_free(shadow);
            drop_pages(area.span);
        }
    }
}

#[test]
fn a_page_in_the_way_stops_exactly_there() {
    let _t = together();
    let area = Area::small(16 * SZ_4K);
    let host = host();
    host.register(area.span).unwrap();
    let shadow = host.shadow_alloc(16 * SZ_4K).unwrap();
    // Outward: the shadow has a page already.
    put(shadow.span.start + 9 * SZ_4K, 1);
    let stop = host.flip_out(area.span, &shadow, &mask(&[(2, 12)])).unwrap_err();
    assert_eq!((stop.moved, stop.why), (mask(&[(2, 7)]), FlipError::Exists));
    assert_eq!(host.present(area.span), mask(&[(0, 2), (9, 7)]));
    // Inward: the application has a page already.
    host.zero_fill(area.span.start + 5 * SZ_4K).unwrap();
    let stop = host.flip_in(area.span, &shadow, &mask(&[(2, 7)])).unwrap_err();
    assert_eq!((stop.moved, stop.why), (mask(&[(2, 3)]), FlipError::Exists));
    // The same for copies.
    let stop = host.copy_in(area.span, &shadow, &mask(&[(5, 4)])).unwrap_err();
    assert_eq!((stop.moved, stop.why), (PageMask::EMPTY, FlipError::Exists));
    host.flip_in(area.span, &shadow, &mask(&[(6, 3)])).unwrap();
    assert_eq!(get(area.span.start + 5 * SZ_4K), 0);
    verify_pages(area.span, &mask(&[(0, 5), (6, 10)]));
    verify_pages(shadow.span, &mask(&[(5, 1)]));
}

#[test]
fn a_hole_in_the_shadow_is_an_error_not_zeroes() {
    let _t = together();
    let area = Area::new(8 * SZ_4K, false);
    let host = host();
    let there = mask(&[(0, 3), (5, 3)]);
    fill_pages(area.span, &there);
    host.register(area.span).unwrap();
    let shadow = host.shadow_alloc(8 * SZ_4K).unwrap();
    assert_eq!(host.flip_out(area.span, &shadow, &all(area.span)).unwrap(), there);
    let stop = host.flip_in(area.span, &shadow, &mask(&[(0, 4)])).unwrap_err();
    assert_eq!((stop.moved, stop.why), (mask(&[(0, 3)]), FlipError::Os(libc::ENOENT)));
    host.flip_in(area.span, &shadow, &mask(&[(5, 3)])).unwrap();
    verify_pages(area.span, &there);
}

#[test]
fn copies_fill_holes_and_keep_the_shadow() {
    let _t = together();
    let area = Area::new(16 * SZ_4K, false);
    let host = host();
    host.register(area.span).unwrap();
    let shadow = host.shadow_alloc(16 * SZ_4K).unwrap();
    fill(shadow.span);
    let pages = mask(&[(0, 1), (3, 9)]);
    host.copy_in(area.span, &shadow, &pages).unwrap();
    assert_eq!(host.present(area.span), pages);
    verify_pages(area.span, &pages);
    verify(shadow.span);
    assert_eq!(host.stats().flip_fallbacks.load(Ordering::Relaxed), 1);
}

#[test]
fn pages_shared_with_a_child_flip_once_they_are_unshared() {
    let _t = alone();
    for area in [Area::small(SZ_2M), Area::huge()] {
        let host = host();
        host.register(area.span).unwrap();
        let shadow = host.shadow_alloc(SZ_2M).unwrap();
        let child = Child::fork();
        let stop = host.flip_out(area.span, &shadow, &all(area.span)).unwrap_err();
        assert_eq!((stop.moved, stop.why), (PageMask::EMPTY, FlipError::Busy));
        assert!(host.stats().busy.load(Ordering::Relaxed) > 0);
        host.unshare(area.span, &all(area.span));
        assert_eq!(host.flip_out(area.span, &shadow, &all(area.span)).unwrap(), all(area.span));
        verify(shadow.span);
        host.flip_in(area.span, &shadow, &all(area.span)).unwrap();
        drop(child);
        verify(area.span);
    }
}

#[test]
fn only_the_pages_that_are_shared_stay_behind() {
    let _t = alone();
    let area = Area::small(16 * SZ_4K);
    let host = host();
    host.register(area.span).unwrap();
    let shadow = host.shadow_alloc(16 * SZ_4K).unwrap();
    let _child = Child::fork();
    // Written since: these are the parent's own.
    fill_pages(area.span, &mask(&[(0, 6), (8, 8)]));
    let stop = host.flip_out(area.span, &shadow, &all(area.span)).unwrap_err();
    assert_eq!((stop.moved, stop.why), (mask(&[(0, 6)]), FlipError::Busy));
    host.flip_in(area.span, &shadow, &stop.moved).unwrap();
    verify(area.span);
}

/// An io_uring that holds one registered buffer; `None` where io_uring is not allowed.
fn pin(span: Span) -> Option<rustix::fd::OwnedFd> {
    use rustix::fd::FromRawFd;
    let mut params = [0u64; 15];
    // SAFETY: io_uring_params is 120 bytes; the descriptor is ours.
    let ring = unsafe {
        let fd = libc::syscall(libc::SYS_io_uring_setup, 4, params.as_mut_ptr());
        if fd < 0 {
            return None;
        }
        rustix::fd::OwnedFd::from_raw_fd(fd as i32)
    };
    let buffer = [span.start, span.len()];
    const REGISTER_BUFFERS: i32 = 0;
    use rustix::fd::AsRawFd;
    // SAFETY: one iovec, which names this test's memory.
    let done = unsafe {
        libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), REGISTER_BUFFERS, buffer.as_ptr(), 1)
    };
    (done == 0).then_some(ring)
}

#[test]
fn pinned_pages_are_busy_until_they_are_let_go() {
    let _t = together();
    for area in [Area::small(64 * SZ_4K), Area::huge()] {
        let host = host();
        host.register(area.span).unwrap();
        let shadow = host.shadow_alloc(area.span.len()).unwrap();
        let Some(ring) = pin(area.span.page_run(20, 2)) else {
            skipped("io_uring cannot pin here");
            return;
        };
        let stop = host.flip_out(area.span, &shadow, &all(area.span)).unwrap_err();
        assert_eq!(stop.why, FlipError::Busy);
        assert_eq!(stop.moved, mask(if area.span.len() == SZ_2M { &[] } else { &[(0, 20)] }));
        drop(ring);
        // The kernel lets go of the buffers a moment after the descriptor is closed.
        let rest = all(area.span).minus(&stop.moved);
        let mut moved = stop.moved;
        for _ in 0..2000 {
            match host.flip_out(area.span, &shadow, &rest) {
                Ok(more) => {
                    moved = moved.or(&more);
                    break;
                }
                Err(stop) => {
                    assert_eq!(stop.why, FlipError::Busy);
                    moved = moved.or(&stop.moved);
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        assert_eq!(moved, all(area.span));
        host.flip_in(area.span, &shadow, &moved).unwrap();
        verify(area.span);
    }
}

#[test]
fn a_mapping_cut_in_two_still_flips_whole() {
    let _t = together();
    let area = Area::small(32 * SZ_4K);
    let host = host();
    // SAFETY: changes no contents.
    unsafe { sys::advise(area.span.page_run(10, 7), Advice::LinuxDontDump) }.unwrap();
    host.register(area.span).unwrap();
    let shadow = host.shadow_alloc(32 * SZ_4K).unwrap();
    assert_eq!(host.flip_out(area.span, &shadow, &all(area.span)).unwrap(), all(area.span));
    verify(shadow.span);
    host.flip_in(area.span, &shadow, &mask(&[(0, 12)])).unwrap();
    host.copy_in(area.span, &shadow, &mask(&[(12, 20)])).unwrap();
    verify(area.span);
}

#[test]
fn protection_and_locking_that_differ_are_told() {
    let _t = together();
    let area = Area::small(16 * SZ_4K);
    let host = host();
    host.register(area.span).unwrap();
    let shadow = host.shadow_alloc(16 * SZ_4K).unwrap();
    let part = area.span.page_run(4, 4);
    let at = std::ptr::with_exposed_provenance_mut(part.start as usize);
    let len = part.len() as usize;
    let protect = |flags: i32| {
        // SAFETY: the test's own memory.
        assert_eq!(unsafe { libc::mprotect(at, len, flags) }, 0);
    };
    let expect = |why: FlipError| {
        let stop = host.flip_out(area.span, &shadow, &all(area.span)).unwrap_err();
        assert_eq!((stop.moved, stop.why), (mask(&[(0, 4)]), why));
        host.flip_in(area.span, &shadow, &stop.moved).unwrap();
    };
    protect(libc::PROT_READ);
    expect(FlipError::Mismatch);
    protect(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
    expect(FlipError::Mismatch);
    protect(libc::PROT_READ | libc::PROT_WRITE);
    // SAFETY: locking changes no contents.
    if unsafe { libc::mlock(at, len) } == 0 {
        expect(FlipError::Mismatch);
        // SAFETY: as above.
        unsafe { libc::munlock(at, len) };
    }
    assert_eq!(host.flip_out(area.span, &shadow, &all(area.span)).unwrap(), all(area.span));
    host.flip_in(area.span, &shadow, &all(area.span)).unwrap();
    verify(area.span);
}

#[test]
fn a_new_mapping_at_the_old_place_is_left_alone() {
    let _t = together();
    let area = Area::small(16 * SZ_4K);
    let host = Arc::new(host());
    let _reader = Reader::ordinary(&host);
    host.register(area.span).unwrap();
    let shadow = host.shadow_alloc(16 * SZ_4K).unwrap();
    host.flip_out(area.span, &shadow, &mask(&[(0, 4)])).unwrap();
    let part = area.span.page_run(2, 6);
    // SAFETY: the test's own memory.
    unsafe { sys::map_fresh_at(part) }.unwrap();
    all_handled(&host);
    fill_pages(area.span, &mask(&[(2, 6)]));
    assert!(!host.is_registered(area.span) && host.is_registered(area.span.page_run(8, 8)));
    let stop = host.flip_out(area.span, &shadow, &mask(&[(6, 6)])).unwrap_err();
    assert_eq!((stop.moved, stop.why), (PageMask::EMPTY, FlipError::NoMapping));
    drop_pages(part);
    let stop = host.flip_in(area.span, &shadow, &mask(&[(0, 4)])).unwrap_err();
    assert_eq!((stop.moved, stop.why), (mask(&[(0, 2)]), FlipError::NoMapping));
    let stop = host.copy_in(area.span, &shadow, &mask(&[(2, 2)])).unwrap_err();
    assert_eq!((stop.moved, stop.why), (PageMask::EMPTY, FlipError::NoMapping));
    // Registered anew, it takes part again.
    host.register(area.span).unwrap();
    assert!(host.is_registered(area.span));
    host.flip_in(area.span, &shadow, &mask(&[(2, 2)])).unwrap();
    verify_pages(area.span, &mask(&[(0, 4), (8, 8)]));
    assert_eq!(host.zero_fill(0x1000), Err(FlipError::NoMapping));
}

#[test]
fn an_unread_event_says_again() {
    let _t = together();
    let area = Area::small(16 * SZ_4K);
    let host = host();
    host.register(area.span).unwrap();
    let shadow = host.shadow_alloc(16 * SZ_4K).unwrap();
    let dropped = area.span.page_run(12, 2);
    let dropper = std::thread::spawn(move || drop_pages(dropped));
    assert!(host.poll(Some(Duration::from_secs(10))).unwrap().messages);
    let stop = host.flip_out(area.span, &shadow, &all(area.span)).unwrap_err();
    assert_eq!((stop.moved, stop.why), (PageMask::EMPTY, FlipError::Again));
    assert_eq!(host.zero_fill(area.span.start), Err(FlipError::Again));
    assert_eq!(host.stats().again.load(Ordering::Relaxed), 1);
    let mut messages = Vec::new();
    assert_eq!(host.read_batch(&mut messages).unwrap(), 1);
    assert_eq!(
        host.flip_out(area.span, &shadow, &all(area.span)).unwrap_err().why,
        FlipError::Again,
        "read, not handled"
    );
    handled(&host, &messages);
    assert!(matches!(messages[0], Message::Remove(span) if span == dropped), "{messages:?}");
    dropper.join().unwrap();
    let kept = mask(&[(0, 12), (14, 2)]);
    assert_eq!(host.flip_out(area.span, &shadow, &all(area.span)).unwrap(), kept);
    verify_pages(shadow.span, &kept);
}

#[test]
fn shadow_pages_never_come_back() {
    let _t = together();
    let area = Area::small(SZ_2M);
    let host = host();
    host.register(area.span).unwrap();
    for _ in 0..3 {
        let shadow = host.shadow_alloc(SZ_2M).unwrap();
        assert!(host.present(shadow.span).is_empty());
        let moved = host.flip_out(area.span, &shadow, &mask(&[(0, 100)])).unwrap();
        host.shadow_release(&shadow, &all(shadow.span));
        assert!(host.present(shadow.span).is_empty());
        assert_eq!(get(shadow.span.start), 0, "a released slot reads as zeroes, by the kernel's doing");
        host.shadow_release(&shadow, &all(shadow.span));
        // Still good for flips.
        let more = host.flip_out(area.span, &shadow, &mask(&[(100, 100)])).unwrap();
        verify_pages(shadow.span, &more);
        let free = shadow.span;
        host.shadow_free(shadow);
        assert!(host.present(free).is_empty());
        let _ = moved;
        // The holes are served again, or the next round would wait for ever.
        host.unregister(area.span);
        fill(area.span);
        host.register(area.span).unwrap();
    }
    assert_eq!(host.shadow_stuck_bytes(), 0);
    assert_eq!(host.shadow_mapped_bytes(), 64 << 20);
}

#[test]
fn copies_from_anywhere_fill_holes_and_stop_where_a_page_is() {
    let _t = together();
    let (area, source) = (Area::new(16 * SZ_4K, false), Area::small(16 * SZ_4K));
    let host = host();
    host.register(area.span).unwrap();
    let pages = mask(&[(0, 1), (3, 9)]);
    host.fill_from(area.span, source.span.start, &pages).unwrap();
    assert_eq!(host.present(area.span), pages);
    verify_pages(area.span, &pages);
    verify(source.span);
    assert_eq!(host.stats().flip_fallbacks.load(Ordering::Relaxed), 0, "it is no fallback");
    let stop = host.fill_from(area.span, source.span.start, &mask(&[(1, 4)])).unwrap_err();
    assert_eq!((stop.moved, stop.why), (mask(&[(1, 2)]), FlipError::Exists));
}

#[test]
fn discarded_places_are_empty_when_they_are_given_out_again() {
    let _t = together();
    let area = Area::small(SZ_2M);
    let host = host();
    host.register(area.span).unwrap();
    const SLOT: u64 = 16 * SZ_4K;
    let parts: Vec<Span> = (0..32).map(|n| Span::sized(area.span.start + n * SLOT, SLOT)).collect();
    let away = |part: &Span| {
        let shadow = host.shadow_alloc(SLOT).unwrap();
        assert!(host.present(shadow.span).is_empty(), "{} has somebody's pages", shadow.span);
        assert_eq!(host.flip_out(*part, &shadow, &all(*part)).unwrap(), all(*part));
        shadow
    };
    // The second time as much is discarded as is emptied together, and the same places come again.
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..2 {
        let shadows: Vec<_> = parts.iter().map(away).collect();
        for (part, shadow) in parts.iter().zip(shadows) {
            seen.insert(shadow.span.start);
            host.fill_from(*part, shadow.span.start, &all(*part)).unwrap();
            host.shadow_discard(shadow);
        }
        verify(area.span);
    }
    assert_eq!(seen.len(), 32);
    // Those that are few are emptied by housekeeping.
    let shadow = away(&parts[0]);
    let place = shadow.span;
    host.shadow_discard(shadow);
    assert_eq!(host.present(place), all(place), "not yet");
    host.empty_discarded();
    assert!(host.present(place).is_empty());
    assert_eq!(host.shadow_stuck_bytes(), 0);
}

#[test]
fn a_block_of_small_pages_takes_a_huge_page_afterwards() {
    let _t = together();
    let (small, huge) = (Area::small(SZ_2M), Area::huge());
    let host = host();
    host.register(small.span).unwrap();
    host.register(huge.span).unwrap();
    let shadow = host.shadow_alloc(SZ_2M).unwrap();
    host.flip_out(small.span, &shadow, &all(small.span)).unwrap();
    host.shadow_free(shadow);
    let shadow = host.shadow_alloc(SZ_2M).unwrap();
    host.flip_out(huge.span, &shadow, &all(huge.span)).unwrap();
    verify(shadow.span);
    println!("huge after small: {}", host.is_huge(shadow.span));
    host.flip_in(huge.span, &shadow, &all(huge.span)).unwrap();
    verify(huge.span);
}

#[test]
fn prepared_huge_pages_are_adopted() {
    let _t = together();
    let host = host();
    assert!(!host.refill().unwrap(), "nothing is wanted");
    host.set_prepared(2);
    assert_eq!(host.refill_wanted(), 2);
    while host.refill().unwrap() {}
    assert_eq!((host.refill_wanted(), host.prepared_bytes()), (0, 2 * SZ_2M));
    let shadow = host.shadow_alloc(SZ_2M).unwrap();
    let small = host.shadow_alloc(SZ_4K).unwrap();
    assert!(!host.shadow_adopt_prepared(&small));
    assert!(host.shadow_adopt_prepared(&shadow));
    assert!(host.is_huge(shadow.span));
    assert_eq!(get(shadow.span.start + SZ_2M - 8), 0);
    assert!(!host.shadow_adopt_prepared(&shadow), "not into a slot with pages");
    assert_eq!((host.refill_wanted(), host.prepared_bytes()), (1, SZ_2M));
    assert!(host.refill().unwrap());
    assert_eq!(host.drain(), 2 * SZ_2M);
    assert_eq!(host.prepared_bytes(), 0);
    let empty = host.shadow_alloc(SZ_2M).unwrap();
    assert!(!host.shadow_adopt_prepared(&empty), "none is ready");
    assert_eq!(host.stats().adopted.load(Ordering::Relaxed), 1);
    [shadow, small, empty].into_iter().for_each(|s| host.shadow_free(s));
}

#[test]
fn lost_pages_answer_with_an_error_never_with_zeroes() {
    let _t = together();
    for (forbid, missing) in [(Features::empty(), true), (Features::POISON, true), (Features::empty(), false)]
    {
        let area = Area::small(4 * SZ_4K);
        let host = without(forbid);
        host.register(area.span).unwrap();
        let shadow = host.shadow_alloc(SZ_4K).unwrap();
        let page = area.span.page_run(1, 1);
        if missing {
            host.flip_out(page, &shadow, &all(page)).unwrap();
        }
        host.poison(page.start);
        let (from, to) = rustix::pipe::pipe().unwrap();
        use rustix::fd::AsRawFd;
        // SAFETY: the kernel reads the test's memory, or says EFAULT.
        let wrote =
            unsafe { libc::write(to.as_raw_fd(), std::ptr::with_exposed_provenance(page.start as usize), 8) };
        drop(from);
        if missing {
            assert_eq!(wrote, -1);
            assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EFAULT));
            assert_eq!(host.stats().poisoned.load(Ordering::Relaxed), 1);
        } else {
            assert_eq!(wrote, 8, "a page that is there was not lost");
            assert_eq!(host.stats().poisoned.load(Ordering::Relaxed), 0);
        }
        verify_pages(area.span, &mask(&[(0, 1), (2, 2)]));
        if forbid.is_empty() && missing {
            let shadow = host.shadow_alloc(4 * SZ_4K).unwrap();
            let stop = host.flip_out(area.span, &shadow, &all(area.span)).unwrap_err();
            assert_eq!((stop.moved, stop.why), (mask(&[(0, 1)]), FlipError::Os(libc::EFAULT)));
        }
    }
}
