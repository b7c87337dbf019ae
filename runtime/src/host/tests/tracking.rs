//! Which pages were written, and whether that is certain.

use super::*;
use crate::space::ports::FlipError;

#[test]
fn exactly_the_written_pages_are_told() {
    let _t = together();
    let area = Area::new(SZ_2M, false);
    let host = host();
    let there = mask(&[(0, 50), (60, 10), (500, 12)]);
    fill_pages(area.span, &there);
    host.register(area.span).unwrap();
    assert_eq!(host.take_written(area.span), Some(there), "untracked pages count as written");
    assert_eq!(host.take_written(area.span), Some(PageMask::EMPTY), "and are tracked from then on");
    assert_eq!(host.present(area.span), there, "tracking leaves nothing in holes");
    let dirty = mask(&[(3, 1), (49, 1), (60, 2), (511, 1)]);
    fill_pages(area.span, &dirty);
    assert_eq!(host.take_written(area.span), Some(dirty));
    assert_eq!(host.take_written(area.span), Some(PageMask::EMPTY), "what was taken is clean again");
    fill_pages(area.span, &dirty);
    // Out and in: what comes back is untracked until it is tracked again.
    let shadow = host.shadow_alloc(SZ_2M).unwrap();
    let moved = host.flip_out(area.span, &shadow, &mask(&[(0, 20)])).unwrap();
    host.flip_in(area.span, &shadow, &moved).unwrap();
    assert_eq!(host.take_written(area.span), Some(dirty.or(&moved)));
    host.track(area.span).unwrap();
    assert_eq!(host.take_written(area.span), Some(PageMask::EMPTY));
    verify_pages(area.span, &there);
}

#[test]
fn reading_is_not_writing() {
    let _t = together();
    let area = Area::small(64 * SZ_4K);
    let host = host();
    host.register(area.span).unwrap();
    host.track(area.span).unwrap();
    verify(area.span);
    assert_eq!(host.take_written(area.span), Some(PageMask::EMPTY));
}

#[test]
fn a_tracked_huge_page_stays_huge_until_it_is_written() {
    let _t = together();
    let area = Area::huge();
    let host = host();
    host.register(area.span).unwrap();
    host.track(area.span).unwrap();
    assert!(host.is_huge(area.span));
    assert_eq!(host.take_written(area.span), Some(PageMask::EMPTY));
    let shadow = host.shadow_alloc(SZ_2M).unwrap();
    host.flip_out(area.span, &shadow, &all(area.span)).unwrap();
    host.flip_in(area.span, &shadow, &all(area.span)).unwrap();
    assert!(host.is_huge(area.span));
    host.track(area.span).unwrap();
    fill_pages(area.span, &mask(&[(17, 1), (300, 2)]));
    assert_eq!(host.take_written(area.span), Some(mask(&[(17, 1), (300, 2)])));
    assert!(!host.is_huge(area.span));
    host.flip_out(area.span, &shadow, &all(area.span)).unwrap();
    verify(shadow.span);
}

#[test]
fn markers_in_holes_do_not_stop_flips() {
    let _t = together();
    let area = Area::new(16 * SZ_4K, false);
    let host = host();
    fill_pages(area.span, &mask(&[(0, 4)]));
    host.register(area.span).unwrap();
    // What UFFDIO_WRITEPROTECT over holes leaves there.
    sys::uffd_write_protect(host.channel.uffd(), area.span, true).unwrap();
    let shadow = host.shadow_alloc(16 * SZ_4K).unwrap();
    fill_pages(shadow.span, &mask(&[(6, 3)]));
    host.flip_in(area.span, &shadow, &mask(&[(6, 3)])).unwrap();
    sys::uffd_write_protect(host.channel.uffd(), area.span, true).unwrap();
    let there = mask(&[(0, 4), (6, 3)]);
    assert_eq!(host.flip_out(area.span, &shadow, &all(area.span)).unwrap(), there);
    verify_pages(shadow.span, &there);
}

#[test]
fn a_mapping_that_is_not_registered_cannot_be_tracked() {
    let _t = together();
    let area = Area::small(4 * SZ_4K);
    let host = host();
    assert_eq!(host.track(area.span), Err(FlipError::NoMapping));
    let blind = without(Features::WP_ASYNC);
    blind.register(area.span).unwrap();
    assert!(blind.track(area.span).is_err());
    assert_eq!(blind.take_written(area.span), None);
    blind.unregister(area.span);
}

#[test]
fn guard_regions_are_holes() {
    let _t = together();
    const MADV_GUARD_INSTALL: i32 = 102;
    let area = Area::small(8 * SZ_4K);
    let host = host();
    let guard = area.span.page_run(2, 2);
    let at = std::ptr::with_exposed_provenance_mut(guard.start as usize);
    // SAFETY: the test's own memory.
    if unsafe { libc::madvise(at, guard.len() as usize, MADV_GUARD_INSTALL) } != 0 {
        skipped("no guard regions in this kernel");
        return;
    }
    host.register(area.span).unwrap();
    let there = mask(&[(0, 2), (4, 4)]);
    assert_eq!(host.present(area.span), there);
    let shadow = host.shadow_alloc(8 * SZ_4K).unwrap();
    assert_eq!(host.flip_out(area.span, &shadow, &all(area.span)).unwrap(), there);
    host.flip_in(area.span, &shadow, &there).unwrap();
    verify_pages(area.span, &there);
}
