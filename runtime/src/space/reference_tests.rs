//! What the kernel's drm_gpusvm was seen to do (7.2, 2M/64K/4K chunks, 512M notifiers), row by row.

use super::fake::{FakeMm, Page, anon};
use super::pages::{Folio, PageSource};
use super::ports::{Vma, VmaKind};
use super::{Ctx, Event, EventKind, Range, RangeFlags, Space, SpaceConfig};
use crate::ground::addr::{SZ_2M, SZ_4K, SZ_64K, Span};
use crate::ground::error::Result;
use std::cell::Cell;
use std::sync::Arc;

const SZ_1M: u64 = 1 << 20;
const SZ_512M: u64 = 512 << 20;
/// A 512M boundary.
const BASE: u64 = 16 << 30;
const ALL: Span = Span::new(0, 1 << 47);
/// As the kernel reports the whole address space.
const EVERYTHING: Span = Span::new(0, u64::MAX);
const WRITE: Ctx = Ctx {
    read_only: false,
    devmem_possible: true,
    devmem_only: false,
    allow_mixed: false,
    check_pages_threshold: 0,
    timeslice: std::time::Duration::ZERO,
};
const READ: Ctx = Ctx { read_only: true, ..WRITE };

fn threshold(bytes: u64) -> Ctx {
    Ctx { check_pages_threshold: bytes, ..WRITE }
}

fn space() -> Space<()> {
    Space::new(SpaceConfig::default()).unwrap()
}

/// The kernel's oddities too.
fn exact_space() -> Space<()> {
    Space::new(SpaceConfig { kernel_exact: true, ..SpaceConfig::default() }).unwrap()
}

fn fault(space: &Space<()>, mm: &FakeMm, addr: u64, ctx: &Ctx) -> Result<Arc<Range<()>>> {
    space.find_or_insert(mm, addr, ALL, ctx)
}

fn size(space: &Space<()>, mm: &FakeMm, addr: u64, ctx: &Ctx) -> u64 {
    fault(space, mm, addr, ctx).unwrap().size()
}

fn errno<T: std::fmt::Debug>(result: Result<T>) -> i32 {
    result.unwrap_err().errno()
}

/// Faults on all of `span` from left to right; gives runs of equal sizes.
fn sweep(space: &Space<()>, mm: &FakeMm, span: Span) -> Vec<(usize, u64)> {
    let mut runs: Vec<(usize, u64)> = Vec::new();
    let mut addr = span.start;
    while addr < span.end {
        let range = fault(space, mm, addr, &WRITE).unwrap();
        assert_eq!(range.start(), addr, "swept from its start");
        match runs.last_mut() {
            Some((n, size)) if *size == range.size() => *n += 1,
            _ => runs.push((1, range.size())),
        }
        addr = range.span().end;
    }
    space.validate().unwrap();
    runs
}

fn send(space: &Space<()>, events: &[Event]) -> Vec<usize> {
    events.iter().map(|e| space.invalidate(*e, |_, _| ())).collect()
}

fn event(kind: EventKind, start: u64, end: u64) -> Event {
    Event::new(kind, Span::new(BASE + start, BASE + end))
}

mod chunk_choices {
    use super::*;

    #[test]
    fn a_swept_mapping_gets_the_largest_chunks_its_place_allows() {
        let rows: [(u64, &[(usize, u64)]); 5] = [
            (0, &[(1, SZ_2M), (16, SZ_64K)]),
            (SZ_4K, &[(15, SZ_4K), (47, SZ_64K), (1, SZ_4K)]),
            (SZ_64K, &[(48, SZ_64K)]),
            (SZ_1M, &[(16, SZ_64K), (1, SZ_2M)]),
            (2044 << 10, &[(1, SZ_4K), (1, SZ_2M), (15, SZ_64K), (15, SZ_4K)]),
        ];
        for (offset, want) in rows {
            let span = Span::sized(BASE + SZ_2M + offset, 3 * SZ_1M);
            assert_eq!(sweep(&space(), &FakeMm::with(span), span), want, "at 2M+{offset:#x}");
        }
    }

    #[test]
    fn a_fault_in_the_middle_takes_the_whole_block() {
        let span = Span::sized(BASE, SZ_2M);
        let space = space();
        let range = fault(&space, &FakeMm::with(span), BASE + SZ_1M + 123, &WRITE).unwrap();
        assert_eq!(range.span(), span);
        assert_eq!(range.flags(), RangeFlags::MIGRATE_DEVMEM);
        assert_eq!(range.notifier().span(), Span::sized(BASE, SZ_512M));
    }

    #[test]
    fn a_small_heap_by_position_and_threshold() {
        let heap = |at: u64| Span::sized(BASE + at, 136 << 10);
        // 100 KiB and a header, from the start of the heap: 26 pages.
        let pages = |s: Span| (0..26).map(move |i| s.start + i * SZ_4K);
        for (at, want) in [(0, vec![SZ_64K; 2]), (SZ_4K, [vec![SZ_4K; 15], vec![SZ_64K]].concat())] {
            let (space, mm) = (space(), FakeMm::with(heap(at)));
            pages(heap(at)).for_each(|addr| drop(fault(&space, &mm, addr, &WRITE).unwrap()));
            let sizes: Vec<u64> = space.ranges_in(ALL).iter().map(|r| r.size()).collect();
            assert_eq!(sizes, want);
        }
        let (space, mm) = (space(), FakeMm::with(heap(0)));
        pages(heap(0)).for_each(|addr| drop(fault(&space, &mm, addr, &threshold(SZ_64K)).unwrap()));
        assert_eq!(space.ranges_in(ALL).iter().map(|r| r.size()).collect::<Vec<_>>(), [SZ_4K; 26]);
    }

    #[test]
    fn the_devices_limits_cut_chunks() {
        let mm = FakeMm::with(Span::sized(BASE, SZ_2M));
        let at = BASE + SZ_1M;
        let with = |gpuva| space().find_or_insert(&mm, at, gpuva, &WRITE).map(|r| r.size());
        assert_eq!(with(Span::new(BASE + SZ_64K, BASE + SZ_2M)), Ok(SZ_64K));
        assert_eq!(with(Span::sized(at, 2 * SZ_4K)), Ok(SZ_4K));
        assert_eq!(errno(with(Span::new(BASE, at))), libc::EINVAL);
    }

    #[test]
    fn a_refused_fault_leaves_no_notifier() {
        let (space, mm) = (space(), FakeMm::with(Span::sized(BASE, SZ_2M)));
        assert_eq!(errno(space.find_or_insert(&mm, BASE, Span::new(0, BASE), &WRITE)), libc::EINVAL);
        assert_eq!(errno(fault(&space, &mm, BASE - SZ_4K, &WRITE)), libc::ENOENT);
        assert_eq!((space.notifier_count(), space.range_count()), (0, 0));
    }

    #[test]
    fn notifiers_divide_a_mapping() {
        let span = Span::new(BASE + SZ_512M - SZ_1M, BASE + SZ_512M + SZ_1M);
        let (space, mm) = (space(), FakeMm::with(span));
        assert_eq!(sweep(&space, &mm, span), [(32, SZ_64K)]);
        assert_eq!(space.notifier_count(), 2);
        for (half, notifier) in space.notifiers().iter().enumerate() {
            assert_eq!(notifier.span(), Span::sized(BASE + half as u64 * SZ_512M, SZ_512M));
            assert_eq!(space.ranges_in(notifier.span()).len(), 16);
        }
    }

    #[test]
    fn an_existing_range_keeps_larger_chunks_out() {
        let (space, mm) = (space(), FakeMm::with(Span::sized(BASE, SZ_2M)));
        let page = Span::sized(BASE + SZ_64K, SZ_4K);
        assert_eq!(space.find_or_insert(&mm, page.start, page, &WRITE).unwrap().span(), page);
        assert_eq!(size(&space, &mm, page.start + 8 * SZ_4K, &WRITE), SZ_4K);
        assert_eq!(size(&space, &mm, BASE + SZ_1M, &WRITE), SZ_64K);
    }

    #[test]
    fn a_partly_unmapped_range_stays_until_it_is_removed() {
        let (space, mm) = (space(), FakeMm::with(Span::sized(BASE, SZ_2M)));
        let old = fault(&space, &mm, BASE, &WRITE).unwrap();
        send(&space, &mm.unmap(Span::sized(BASE + SZ_1M, SZ_4K)));

        let left = fault(&space, &mm, BASE, &WRITE).unwrap();
        assert!(Arc::ptr_eq(&left, &old));
        assert!(left.flags().contains(RangeFlags::UNMAPPED | RangeFlags::PARTIAL_UNMAP));
        assert_eq!(errno(space.get_pages(&left, &mm, &WRITE)), libc::EFAULT);
        assert_eq!(errno(fault(&space, &mm, BASE + SZ_1M, &WRITE)), libc::ENOENT);

        assert!(space.remove(&left));
        assert_eq!(sweep(&space, &mm, Span::new(BASE, BASE + SZ_1M)), [(16, SZ_64K)]);
        let right = Span::new(BASE + SZ_1M + SZ_4K, BASE + SZ_2M);
        assert_eq!(sweep(&space, &mm, right), [(15, SZ_4K), (15, SZ_64K)]);
    }

    #[test]
    fn an_untouched_block_passes_a_smaller_threshold() {
        for bytes in [0, SZ_4K, SZ_64K] {
            let mm = FakeMm::with(Span::sized(BASE, SZ_2M));
            assert_eq!(size(&space(), &mm, BASE, &threshold(bytes)), SZ_2M, "threshold {bytes:#x}");
        }
    }

    #[test]
    fn a_threshold_wants_every_page() {
        let span = Span::sized(BASE, SZ_2M);
        let touched = |part: Span, page| {
            let mm = FakeMm::with(span);
            mm.fill(part, page);
            size(&space(), &mm, part.start, &threshold(SZ_2M))
        };
        let part = |bytes| Span::sized(BASE + SZ_1M, bytes);
        assert_eq!(touched(part(0), Page::System(0)), SZ_4K);
        assert_eq!(touched(part(SZ_4K), Page::System(0)), SZ_4K);
        assert_eq!(touched(part(SZ_64K), Page::System(0)), SZ_64K);
        assert_eq!(touched(span, Page::System(0)), SZ_2M);
        assert_eq!(touched(span, Page::Zero), SZ_2M);
        assert_eq!(touched(Span::sized(BASE, SZ_4K), Page::System(9)), SZ_2M, "one touch of a huge page");
    }

    #[test]
    fn a_threshold_counts_the_owners_device_pages() {
        let span = Span::sized(BASE, SZ_2M);
        let mm = FakeMm::with(span);
        mm.fill(span, Page::Device(1));
        mm.set_foreign(true);
        assert_eq!(size(&space(), &mm, BASE, &threshold(SZ_2M)), SZ_4K);
        mm.set_foreign(false);
        assert_eq!(size(&space(), &mm, BASE, &threshold(SZ_2M)), SZ_2M);
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_the_kernels_errors() {
        let span = Span::sized(BASE, SZ_2M);
        let refused = |vma: Vma, ctx: &Ctx| {
            let (space, mm) = (space(), FakeMm::default());
            mm.map(vma);
            let result = errno(fault(&space, &mm, BASE, ctx));
            assert_eq!(space.notifier_count(), 0);
            result
        };
        assert_eq!(refused(anon(span, true, false), &WRITE), libc::EPERM);
        assert_eq!(refused(anon(Span::sized(BASE + SZ_2M, SZ_2M), true, true), &WRITE), libc::ENOENT);
        let vvar = Vma { kind: VmaKind::Special, ..anon(span, true, false) };
        assert_eq!(refused(vvar, &WRITE), libc::EPERM);
        assert_eq!(refused(Vma { write: true, ..vvar }, &WRITE), libc::EIO);
        assert_eq!(refused(vvar, &READ), libc::EIO);

        let (space, mm) = (space(), FakeMm::default());
        mm.map(anon(span, false, false));
        let range = fault(&space, &mm, BASE, &READ).unwrap();
        assert_eq!(errno(space.get_pages(&range, &mm, &READ)), libc::EFAULT);
    }

    #[test]
    fn only_anonymous_memory_may_migrate_and_only_if_wanted() {
        let span = Span::sized(BASE, SZ_2M);
        for (kind, ctx, flags) in [
            (VmaKind::Anonymous, WRITE, RangeFlags::MIGRATE_DEVMEM),
            (VmaKind::Anonymous, Ctx { devmem_possible: false, ..WRITE }, RangeFlags::empty()),
            (VmaKind::File, WRITE, RangeFlags::empty()),
            (VmaKind::Shared, WRITE, RangeFlags::empty()),
            (VmaKind::Hugetlb, WRITE, RangeFlags::empty()),
        ] {
            let mm = FakeMm::default();
            mm.map(Vma { kind, ..anon(span, true, true) });
            assert_eq!(fault(&space(), &mm, BASE, &ctx).unwrap().flags(), flags, "{kind:?}");
        }
    }

    #[test]
    fn the_limits_end_where_they_say_unless_the_kernel_is_asked_for() {
        let limits = Span::new(BASE + SZ_64K, BASE + SZ_2M);
        let mm = FakeMm::with(Span::sized(BASE, 2 * SZ_2M));
        let with = |kernel_exact, addr| {
            let config = SpaceConfig { limits, kernel_exact, ..SpaceConfig::default() };
            let space: Space<()> = Space::new(config).unwrap();
            fault(&space, &mm, addr, &WRITE).map(|r| r.span())
        };
        for exact in [false, true] {
            assert_eq!(errno(with(exact, limits.start - 1)), libc::EINVAL);
            assert_eq!(errno(with(exact, limits.end + 1)), libc::EINVAL);
        }
        assert_eq!(errno(with(false, limits.end)), libc::EINVAL);
        assert_eq!(with(true, limits.end), Ok(Span::sized(limits.end, SZ_2M)));
        assert_eq!(with(false, BASE + SZ_1M).unwrap().len(), SZ_64K);
        assert_eq!(with(true, BASE + SZ_1M).unwrap(), Span::sized(BASE, SZ_2M), "not clipped to the limits");
    }
}

mod invalidations {
    use super::*;
    use EventKind::{Clear, Migrate, ProtPage, ProtVma, Release, SoftDirty, Unmap};

    const PAGES: RangeFlags = RangeFlags::HAS_DMA_MAPPING.union(RangeFlags::WRITABLE);
    const MIGRATE: RangeFlags = RangeFlags::MIGRATE_DEVMEM;
    const STALE: RangeFlags = MIGRATE.union(RangeFlags::UNMAPPED).union(RangeFlags::QUEUED);
    const PARTIAL: RangeFlags = STALE.union(RangeFlags::PARTIAL_UNMAP);
    const FRESH: RangeFlags = MIGRATE.union(PAGES);

    /// A 4M mapping with two 2M ranges that hold pages.
    struct Two {
        space: Space<()>,
        mm: FakeMm,
        ranges: [Arc<Range<()>>; 2],
    }

    impl Two {
        fn new() -> Self {
            Self::holding(None)
        }

        fn holding(page: Option<Page>) -> Self {
            let (space, mm) = (space(), FakeMm::with(Span::sized(BASE, 2 * SZ_2M)));
            if let Some(page) = page {
                mm.fill(Span::sized(BASE, 2 * SZ_2M), page);
            }
            let ranges = [0, SZ_2M].map(|at| {
                let range = fault(&space, &mm, BASE + at, &WRITE).unwrap();
                space.get_pages(&range, &mm, &WRITE).unwrap();
                range
            });
            let two = Self { space, mm, ranges };
            assert!(two.ranges.iter().all(|r| r.pages_valid_hint()));
            two
        }

        fn flags(&self) -> [RangeFlags; 2] {
            [self.ranges[0].flags(), self.ranges[1].flags()]
        }

        /// Sends `events` and gives how many ranges each hit.
        fn send(&self, events: &[Event]) -> Vec<usize> {
            let hits = send(&self.space, events);
            self.space.validate().unwrap();
            hits
        }
    }

    #[test]
    fn munmap_of_all() {
        let two = Two::new();
        let events = two.mm.unmap(Span::sized(BASE, 2 * SZ_2M));
        assert_eq!(events, [event(Unmap, 0, 2 * SZ_2M)]);
        assert_eq!(two.send(&events), [2]);
        assert_eq!(two.flags(), [STALE; 2]);
        assert_eq!(two.space.garbage_len(), 2);
    }

    #[test]
    fn munmap_across_both() {
        let two = Two::new();
        let events = two.mm.unmap(Span::new(BASE + SZ_1M, BASE + 3 * SZ_1M));
        let want = [event(Clear, 0, SZ_2M), event(Clear, SZ_2M, 2 * SZ_2M), event(Unmap, SZ_1M, 3 * SZ_1M)];
        assert_eq!(events, want);
        assert_eq!(two.send(&events), [1, 1, 2]);
        assert_eq!(two.flags(), [PARTIAL; 2]);
        assert_eq!(two.space.garbage_len(), 2);
    }

    #[test]
    fn small_changes_inside_a_block_clear_it_first() {
        for bytes in [SZ_4K, SZ_64K] {
            let hole = Span::sized(BASE + SZ_1M, bytes);
            let block = event(Clear, 0, SZ_2M);
            let two = Two::new();
            let events = two.mm.unmap(hole);
            assert_eq!(events, [block, Event::new(Unmap, hole)]);
            assert_eq!(two.send(&events), [1, 1]);
            assert_eq!(two.flags(), [PARTIAL, FRESH]);

            let two = Two::new();
            let events = two.mm.map(anon(hole, true, false));
            assert_eq!(events, [block, Event::new(Unmap, hole)]);
            two.send(&events);
            assert_eq!(two.flags(), [PARTIAL, FRESH]);

            let two = Two::new();
            let events = two.mm.protect(hole, true, false);
            assert_eq!(events, [block, Event::new(ProtVma, hole)]);
            two.send(&events);
            assert_eq!(two.flags(), [MIGRATE, FRESH]);
        }
    }

    #[test]
    fn discarding_pages_only_forgets_them() {
        let two = Two::new();
        assert_eq!(two.send(&two.mm.discard(Span::sized(BASE, SZ_64K))), [1]);
        assert_eq!(two.flags(), [MIGRATE, FRESH]);
        // Of a huge page the block is cleared as well.
        assert_eq!(two.send(&[event(Clear, SZ_2M, 2 * SZ_2M), event(Clear, SZ_2M, SZ_2M + SZ_64K)]), [1, 1]);
        assert_eq!(two.flags(), [MIGRATE; 2]);
        assert_eq!(two.space.garbage_len(), 0);
        // COLD or PAGEOUT of a huge page without swap: the block.
        let two = Two::new();
        two.send(&[event(Clear, 0, SZ_2M)]);
        assert_eq!(two.flags(), [MIGRATE, FRESH]);
    }

    #[test]
    fn mprotect_to_none_and_back() {
        let two = Two::new();
        let whole = Span::sized(BASE, 2 * SZ_2M);
        let events = two.mm.protect(whole, false, false);
        assert_eq!(events, [Event::new(ProtVma, whole)]);
        assert_eq!(two.send(&events), [2]);
        assert_eq!(two.flags(), [MIGRATE; 2]);
        assert_eq!(errno(two.space.get_pages(&two.ranges[0], &two.mm, &READ)), libc::EFAULT);
        assert_eq!(two.send(&two.mm.protect(whole, true, true)), [2]);
        two.space.get_pages(&two.ranges[0], &two.mm, &WRITE).unwrap();
        assert_eq!(two.flags(), [FRESH, MIGRATE]);
    }

    #[test]
    fn a_part_that_becomes_read_only_stays_in_its_range() {
        let two = Two::new();
        let part = Span::sized(BASE + SZ_1M, SZ_64K);
        two.send(&two.mm.protect(part, true, false));
        let range = fault(&two.space, &two.mm, BASE, &WRITE).unwrap();
        assert!(Arc::ptr_eq(&range, &two.ranges[0]));
        assert_eq!(errno(fault(&two.space, &two.mm, part.start, &WRITE)), libc::EPERM);
        assert_eq!(errno(two.space.get_pages(&range, &two.mm, &WRITE)), libc::EPERM);
        two.space.get_pages(&range, &two.mm, &READ).unwrap();
        assert_eq!(range.flags(), MIGRATE | RangeFlags::HAS_DMA_MAPPING);
    }

    #[test]
    fn mremap() {
        let whole = event(Unmap, 0, 2 * SZ_2M);
        // Move: twice; the ranges are queued once.
        let two = Two::new();
        two.mm.unmap(whole.span);
        assert_eq!(two.send(&[whole, whole]), [2, 2]);
        assert_eq!((two.flags(), two.space.garbage_len()), ([STALE; 2], 2));
        // DONTUNMAP: the mapping is still there, the old range stays UNMAPPED until removed.
        let two = Two::new();
        assert_eq!(two.send(&[whole]), [2]);
        let range = fault(&two.space, &two.mm, BASE, &WRITE).unwrap();
        assert!(Arc::ptr_eq(&range, &two.ranges[0]));
        assert_eq!(errno(two.space.get_pages(&range, &two.mm, &WRITE)), libc::EFAULT);
        assert_eq!(two.space.collect_garbage(|_| Ok(())), Ok(2));
        let range = fault(&two.space, &two.mm, BASE, &WRITE).unwrap();
        assert!(!Arc::ptr_eq(&range, &two.ranges[0]));
        two.space.get_pages(&range, &two.mm, &WRITE).unwrap();
        // Shrink: the tail.
        let two = Two::new();
        let tail = Span::new(BASE + SZ_2M, BASE + 2 * SZ_2M);
        let events = two.mm.unmap(tail);
        assert_eq!(events, [Event::new(Unmap, tail)]);
        two.send(&events);
        assert_eq!(two.flags(), [FRESH, STALE]);
        // Grow: no event.
        let two = Two::new();
        assert_eq!(two.mm.map(anon(Span::sized(BASE + 2 * SZ_2M, SZ_2M), true, true)), []);
        assert_eq!(two.flags(), [FRESH; 2]);
    }

    /// Breaks copy-on-write page by page, with an event each, the first time it is asked.
    struct BreaksCow<'a> {
        two: &'a Two,
        events: Cell<usize>,
    }

    impl PageSource for BreaksCow<'_> {
        fn fault(&self, span: Span, write: bool) -> Result<Vec<Folio>> {
            if self.events.get() == 0 {
                for page in 0..span.pages() {
                    send(&self.two.space, &[Event::new(Clear, span.page_run(page, 1))]);
                }
                self.events.set(span.pages());
            }
            self.two.mm.fault(span, write)
        }
    }

    #[test]
    fn fork_then_write() {
        let two = Two::new();
        assert_eq!(two.send(&[event(ProtPage, 0, 2 * SZ_2M)]), [2]);
        assert_eq!(two.flags(), [MIGRATE; 2]);
        let source = BreaksCow { two: &two, events: Cell::new(0) };
        two.space.get_pages(&two.ranges[0], &source, &WRITE).unwrap();
        assert_eq!(source.events.get(), 512);
        assert_eq!(two.flags(), [FRESH, MIGRATE]);
        // The child's munmap sends nothing here.
    }

    #[test]
    fn soft_dirty_reaches_everything() {
        let two = Two::new();
        assert_eq!(two.send(&[Event::new(SoftDirty, EVERYTHING)]), [2]);
        assert_eq!((two.flags(), two.space.garbage_len()), ([MIGRATE; 2], 0));
    }

    #[test]
    fn what_sends_no_event_changes_nothing() {
        // mlock, first touch, a read get.
        let two = Two::new();
        two.mm.touch(Span::sized(BASE, 2 * SZ_2M));
        let stamp = two.ranges[0].stamp();
        two.space.get_pages(&two.ranges[0], &two.mm, &READ).unwrap();
        assert_eq!((two.flags(), two.ranges[0].stamp()), ([FRESH; 2], stamp));
    }

    #[test]
    fn writes_over_zero_pages_clear_page_by_page() {
        let (space, mm) = (space(), FakeMm::with(Span::sized(BASE, SZ_2M)));
        mm.fill(Span::sized(BASE, SZ_2M), Page::Zero);
        let range = fault(&space, &mm, BASE, &READ).unwrap();
        space.get_pages(&range, &mm, &READ).unwrap();
        assert_eq!(send(&space, &[event(Clear, SZ_4K, 2 * SZ_4K)]), [1]);
        assert_eq!(range.flags(), MIGRATE);
    }

    #[test]
    fn an_unrelated_unmap_in_the_same_notifier_hits_nothing() {
        let two = Two::new();
        let before = two.ranges[0].begin();
        let far = event(Unmap, 64 * SZ_1M, 65 * SZ_1M);
        assert_eq!(two.send(&[far]), [0]);
        assert_eq!(two.flags(), [FRESH; 2]);
        assert!(two.ranges[0].notifier().read_retry(before), "delivered");
        assert!(two.ranges[0].commit(before).is_ok(), "but nothing of this range is old");
    }

    #[test]
    fn migration_and_back() {
        let two = Two::new();
        for page in [Page::Device(5), Page::System(0)] {
            let span = two.ranges[0].span();
            assert_eq!(two.send(&[Event::new(Migrate, span)]), [1]);
            assert_eq!(two.flags(), [MIGRATE, FRESH]);
            two.mm.fill(span, page);
            two.space.get_pages(&two.ranges[0], &two.mm, &WRITE).unwrap();
            let devmem = two.ranges[0].flags().contains(RangeFlags::HAS_DEVMEM_PAGES);
            assert_eq!(devmem, page == Page::Device(5));
        }
    }

    #[test]
    fn munmap_with_device_pages() {
        let two = Two::holding(Some(Page::Device(1)));
        let devmem = FRESH | RangeFlags::HAS_DEVMEM_PAGES;
        assert_eq!(two.flags(), [devmem; 2]);
        let ranges = [event(Migrate, 0, SZ_2M), event(Migrate, SZ_2M, 2 * SZ_2M), event(Unmap, 0, 2 * SZ_2M)];
        assert_eq!(two.send(&ranges), [1, 1, 2]);
        assert_eq!(two.flags(), [STALE; 2]);

        let two = Two::holding(Some(Page::Device(1)));
        let events = two.mm.unmap(Span::sized(BASE + SZ_1M, SZ_64K));
        assert_eq!(events, [event(Clear, 0, SZ_2M), event(Unmap, SZ_1M, SZ_1M + SZ_64K)]);
        two.send(&events);
        assert_eq!(two.flags(), [PARTIAL, devmem]);
    }

    #[test]
    fn exit() {
        let two = Two::new();
        assert_eq!(two.send(&[Event::new(Release, EVERYTHING)]), [2]);
        assert_eq!(two.flags(), [MIGRATE; 2]);
        assert_eq!(two.send(&[Event::new(Unmap, EVERYTHING)]), [2]);
        assert_eq!(two.flags(), [STALE; 2]);
    }

    #[test]
    fn a_later_full_unmap_does_not_undo_a_partial_one() {
        let two = Two::new();
        two.send(&[event(Unmap, SZ_1M, SZ_2M)]);
        two.send(&[event(Unmap, 0, 2 * SZ_2M)]);
        assert_eq!((two.flags(), two.space.garbage_len()), ([PARTIAL, STALE], 2));
    }

    #[test]
    fn the_callback_sees_what_was_and_what_is() {
        let two = Two::new();
        let mut seen = Vec::new();
        let event = event(Unmap, SZ_1M, 2 * SZ_2M);
        two.space.invalidate(event, |range, info| {
            assert_eq!(range.flags(), info.after);
            seen.push((range.start() - BASE, info.hit.len(), info.before, info.after, info.queued()));
        });
        let want = [(0, SZ_1M, FRESH, PARTIAL, true), (SZ_2M, SZ_2M, FRESH, STALE, true)];
        assert_eq!(seen, want);
    }
}

mod valid_pages {
    use super::*;

    /// Read first, then write: (write answer, flags after).
    fn read_then_write(space: Space<()>) -> (std::result::Result<bool, i32>, RangeFlags) {
        let mm = FakeMm::with(Span::sized(BASE, SZ_2M));
        let range = fault(&space, &mm, BASE, &READ).unwrap();
        assert!(space.get_pages(&range, &mm, &READ).unwrap().fresh.is_some());
        assert!(space.get_pages(&range, &mm, &READ).unwrap().fresh.is_none(), "still valid");
        mm.protect(Span::sized(BASE, SZ_64K), true, false);
        let got = space.get_pages(&range, &mm, &WRITE);
        (got.map(|g| g.fresh.is_some()).map_err(|e| e.errno()), range.flags())
    }

    #[test]
    fn a_write_after_a_read_is_served_in_earnest_unless_the_kernel_is_asked_for() {
        let held = RangeFlags::MIGRATE_DEVMEM | RangeFlags::HAS_DMA_MAPPING;
        assert_eq!(read_then_write(exact_space()), (Ok(false), held));
        assert_eq!(read_then_write(space()), (Err(libc::EPERM), held), "what was held stays valid");
    }

    #[test]
    fn device_only_is_not_answered_with_system_pages() {
        let only = Ctx { devmem_only: true, ..READ };
        for (space, answer) in [(exact_space(), Ok(())), (space(), Err(libc::EFAULT))] {
            let mm = FakeMm::with(Span::sized(BASE, SZ_2M));
            let range = fault(&space, &mm, BASE, &READ).unwrap();
            space.get_pages(&range, &mm, &READ).unwrap();
            let got = space.get_pages(&range, &mm, &only);
            assert_eq!(got.map(drop).map_err(|e| e.errno()), answer);
        }
    }

    #[test]
    fn mixed_pages_answer_only_who_allows_them() {
        let mixed = Ctx { allow_mixed: true, ..READ };
        for (space, answer) in [(exact_space(), Ok(())), (space(), Err(libc::EOPNOTSUPP))] {
            let mm = FakeMm::with(Span::sized(BASE, SZ_2M));
            mm.fill(Span::sized(BASE, SZ_1M), Page::Device(3));
            let range = fault(&space, &mm, BASE, &READ).unwrap();
            space.get_pages(&range, &mm, &mixed).unwrap();
            assert!(range.flags().contains(RangeFlags::MIXED | RangeFlags::HAS_DEVMEM_PAGES));
            let got = space.get_pages(&range, &mm, &READ);
            assert_eq!(got.map(drop).map_err(|e| e.errno()), answer);
        }
    }
}
