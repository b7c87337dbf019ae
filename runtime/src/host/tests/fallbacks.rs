//! The same work with parts of the kernel switched off.

use super::*;
use crate::space::ports::{AddressSpace, FlipError};

/// Everything once: register, look, flip, track, copy, release.
fn everything(host: Host) {
    let area = Area::new(SZ_2M, false);
    let huge = Area::huge();
    let there = mask(&[(0, 10), (20, 5), (300, 1)]);
    fill_pages(area.span, &there);
    let host = Arc::new(host);
    let reader = Reader::ordinary(&host);
    let before = host.find_vma(area.span.start).unwrap().unwrap();
    for span in [area.span, huge.span] {
        assert!(!host.is_registered(span));
        host.register(span).unwrap();
        assert!(host.is_registered(span));
    }
    assert_eq!(host.find_vma(area.span.start).unwrap().unwrap(), before);
    assert_eq!(host.present(area.span), there);

    let shadow = host.shadow_alloc(SZ_2M).unwrap();
    for _ in 0..3 {
        let moved = host.flip_out(area.span, &shadow, &all(area.span)).unwrap();
        assert_eq!(moved, there);
        assert!(host.present(area.span).is_empty());
        verify_pages(shadow.span, &there);
        // The device changed something.
        put(shadow.span.start + 16, 4711);
        let half = mask(&[(0, 7)]);
        flip_in(&host, area.span, &shadow, &half);
        assert_eq!(host.present(shadow.span), there.minus(&half));
        flip_in(&host, area.span, &shadow, &there.minus(&half));
        assert_eq!(get(area.span.start + 16), 4711);
        assert_eq!(host.present(area.span), there);
        assert!(host.present(shadow.span).is_empty());
    }
    verify_pages(area.span, &there);

    if host.track(area.span).is_ok() {
        let exact = host.report().has.contains(Features::PAGEMAP_SCAN);
        assert_eq!(host.take_written(area.span), exact.then_some(PageMask::EMPTY));
        fill_pages(area.span, &mask(&[(3, 1), (300, 1)]));
        assert_eq!(host.take_written(area.span), exact.then(|| mask(&[(3, 1), (300, 1)])));
        let moved = host.flip_out(area.span, &shadow, &all(area.span)).unwrap();
        assert_eq!(moved, there);
        all_in(&there, |left| host.copy_in(area.span, &shadow, left));
    } else {
        assert!(!host.report().has.contains(Features::WP_ASYNC));
    }
    host.shadow_free(shadow);

    let shadow = host.shadow_alloc(SZ_2M).unwrap();
    assert!(host.present(shadow.span).is_empty());
    assert_eq!(get(shadow.span.start), 0);
    host.shadow_release(&shadow, &all(shadow.span));
    assert_eq!(host.flip_out(huge.span, &shadow, &all(huge.span)).unwrap(), all(huge.span));
    verify(shadow.span);
    flip_in(&host, huge.span, &shadow, &all(huge.span));
    verify(huge.span);
    host.shadow_free(shadow);
    for span in [area.span, huge.span] {
        host.unregister(span);
        assert!(!host.is_registered(span));
    }
    verify_pages(area.span, &there);
    assert_eq!(get(area.span.start + 15 * SZ_4K), 0, "holes are the kernel's again");
    assert_eq!(host.shadow_stuck_bytes(), 0);
    drop(reader);
}

#[test]
fn with_everything() {
    let _t = together();
    everything(host());
}

#[test]
fn without_move() {
    let _t = together();
    let host = without(Features::MOVE);
    assert!(!host.shadow_adopt_prepared(&host.shadow_alloc(SZ_2M).unwrap()));
    everything(host);
}

#[test]
fn without_pagemap_scan() {
    let _t = together();
    everything(without(Features::PAGEMAP_SCAN));
}

#[test]
fn without_procmap_query() {
    let _t = together();
    everything(without(Features::PROCMAP_QUERY));
}

#[test]
fn without_asynchronous_write_protection() {
    let _t = together();
    everything(without(Features::WP_ASYNC));
    everything(without(Features::WP_UNPOPULATED));
}

#[test]
fn without_write_protection() {
    let _t = together();
    let host = without(Features::WP);
    assert!(!host.report().has.intersects(Features::MOVE | Features::WP_ASYNC));
    everything(host);
}

#[test]
fn with_next_to_nothing() {
    let _t = together();
    everything(without(Features::all().difference(Features::KERNEL_FAULTS | Features::EVENT_UNMAP)));
}

#[test]
fn user_mode_only() {
    let _t = together();
    let host = Host::open(&Options { user_mode_only: true, ..options() }).unwrap();
    assert!(!host.report().has.contains(Features::KERNEL_FAULTS));
    everything(host);
}

#[test]
fn without_move_the_slot_is_the_callers_alone() {
    let _t = together();
    let area = Area::small(16 * SZ_4K);
    let host = Arc::new(without(Features::MOVE));
    let reader = Reader::ordinary(&host);
    host.register(area.span).unwrap();
    let shadow = host.shadow_alloc(16 * SZ_4K).unwrap();
    host.flip_out(area.span, &shadow, &mask(&[(0, 8)])).unwrap();
    assert!(!host.is_registered(shadow.span), "a missing page of the slot is not ours to serve");
    assert!(host.is_registered(area.span), "the application's side stays");
    // What stops it: no mapping, and one that differs.
    let gone = Span::sized(0x1000, 16 * SZ_4K);
    assert_eq!(host.flip_out(gone, &shadow, &all(gone)).unwrap_err().why, FlipError::NoMapping);
    flip_in(&host, area.span, &shadow, &mask(&[(0, 8)]));
    verify(area.span);
    assert!(host.stats().flip_fallbacks.load(Ordering::Relaxed) >= 3);
    drop(reader);
}
