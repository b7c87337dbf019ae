//! Generated operation sequences against a naive model, and threads against each other.
//!
//! The model is written from the kernel's text, not from this crate's: one flat list of ranges, inclusive ends,
//! ALIGN and ALIGN_DOWN, linear scans, negative errnos. Both are driven by the same fake process.

use super::fake::{FakeMm, Page, anon};
use super::pages::{PageKind, PageSource};
use super::ports::{AddressSpace, Vma, VmaKind};
use super::{Ctx, Event, EventKind, RangeFlags, Space, SpaceConfig};
use crate::ground::addr::{SZ_2M, SZ_4K, SZ_64K, Span};
use crate::ground::error::{Error, Result};
use proptest::prelude::*;
use std::sync::Arc;

const LONG_MAX: u64 = i64::MAX as u64;
const ALL: Span = Span::new(0, u64::MAX);
/// Where operations happen: around a boundary of every notifier size.
const MIDDLE: u64 = 8 << 30;
const PAGES: u64 = (12 << 20) / SZ_4K;
const LOW: u64 = MIDDLE - PAGES / 2 * SZ_4K;

#[derive(Debug, Clone)]
struct ModelRange {
    start: u64,
    last: u64,
    migrate_devmem: bool,
    unmapped: bool,
    partial_unmap: bool,
    has_devmem_pages: bool,
    has_dma_mapping: bool,
    /// Got for writing; got mixed: what the kernel does not remember.
    got: (bool, bool),
}

struct Model {
    config: SpaceConfig,
    ranges: Vec<ModelRange>,
    /// Starts of ranges, in the order they became garbage.
    garbage: Vec<u64>,
}

fn align_down(x: u64, a: u64) -> u64 {
    x / a * a
}

fn align(x: u64, a: u64) -> u64 {
    x.div_ceil(a) * a
}

impl Model {
    /// Ranges that share an address with `[start, end)`, by start.
    fn overlapping(&self, start: u64, end: u64) -> Vec<usize> {
        let hit = |i: &usize| self.ranges[*i].start < end && self.ranges[*i].last >= start;
        let mut all: Vec<usize> = (0..self.ranges.len()).filter(hit).collect();
        all.sort_by_key(|i| self.ranges[*i].start);
        all
    }

    /// The starts of the notifiers that must exist.
    fn notifiers(&self) -> Vec<u64> {
        let mut all: Vec<u64> =
            self.ranges.iter().map(|r| align_down(r.start, self.config.notifier_size)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    fn chunk_size(&self, mm: &FakeMm, vma: &Vma, addr: u64, gpuva: Span, threshold: u64) -> u64 {
        let notifier_start = align_down(addr, self.config.notifier_size);
        let notifier_end = align(addr + 1, self.config.notifier_size);
        for &size in &self.config.chunk_sizes {
            let (start, end) = (align_down(addr, size), align(addr + 1, size));
            let outside = start < vma.span.start
                || end > vma.span.end
                || start < notifier_start
                || end > notifier_end
                || start < gpuva.start
                || end > gpuva.end;
            let limits = self.config.limits;
            let clipped = !self.config.kernel_exact && (start < limits.start || end > limits.end);
            if outside || clipped {
                continue;
            }
            if end - start != SZ_4K
                && (!self.overlapping(start, end).is_empty()
                    || end - start <= threshold && !mm.populated(Span::new(start, end)))
            {
                continue;
            }
            return end - start;
        }
        LONG_MAX
    }

    fn find_or_insert(
        &mut self,
        mm: &FakeMm,
        addr: u64,
        gpuva: Span,
        ctx: &Ctx,
    ) -> std::result::Result<u64, i32> {
        let limits = self.config.limits;
        let past = if self.config.kernel_exact { addr > limits.end } else { addr >= limits.end };
        if addr < limits.start || past {
            return Err(-libc::EINVAL);
        }
        let vma = mm.find_vma(addr).unwrap().ok_or(-libc::ENOENT)?;
        if !ctx.read_only && !vma.write {
            return Err(-libc::EPERM);
        }
        if vma.kind == VmaKind::Special {
            return Err(-libc::EIO);
        }
        if let Some(&i) = self.overlapping(addr, addr + 1).first() {
            return Ok(self.ranges[i].start);
        }
        let size = self.chunk_size(mm, &vma, addr, gpuva, ctx.check_pages_threshold);
        if size == LONG_MAX {
            return Err(-libc::EINVAL);
        }
        self.ranges.push(ModelRange {
            start: align_down(addr, size),
            last: align(addr + 1, size) - 1,
            migrate_devmem: ctx.devmem_possible && vma.kind == VmaKind::Anonymous,
            unmapped: false,
            partial_unmap: false,
            has_devmem_pages: false,
            has_dma_mapping: false,
            got: (false, false),
        });
        Ok(align_down(addr, size))
    }

    /// `mm` is the model's own, in the same state as the space's.
    fn get_pages(&mut self, mm: &FakeMm, i: usize, ctx: &Ctx) -> std::result::Result<(), i32> {
        let exact = self.config.kernel_exact;
        let range = &mut self.ranges[i];
        let enough = (ctx.read_only || range.got.0)
            && (!ctx.devmem_only || range.has_devmem_pages && !range.got.1)
            && (!range.got.1 || ctx.allow_mixed);
        if (range.has_devmem_pages || range.has_dma_mapping) && (exact || enough) {
            return Ok(());
        }
        let npages = (range.last + 1 - range.start) / SZ_4K;
        let folios =
            mm.fault(Span::new(range.start, range.last + 1), !ctx.read_only).map_err(|e| -e.errno())?;
        if range.unmapped {
            return Err(-libc::EFAULT);
        }
        let (mut zdd, mut pagemap, mut system) = (0, 0, false);
        let (mut i, mut j) = (0, 0);
        while i < npages {
            match folios[j].kind {
                PageKind::Device { device, allocation } => {
                    if !ctx.allow_mixed && zdd != allocation && i > 0 {
                        return Err(-libc::EOPNOTSUPP);
                    }
                    zdd = allocation;
                    if pagemap != device {
                        if pagemap != 0 {
                            return Err(-libc::EOPNOTSUPP);
                        }
                        pagemap = device;
                    }
                }
                PageKind::System => {
                    if pagemap != 0 && !ctx.allow_mixed {
                        return Err(-libc::EOPNOTSUPP);
                    }
                    if ctx.devmem_only {
                        return Err(-libc::EFAULT);
                    }
                    system = true;
                }
                PageKind::Missing => unreachable!("the fake brings every page"),
            }
            i += 1 << folios[j].order;
            j += 1;
        }
        range.has_dma_mapping = true;
        range.has_devmem_pages = pagemap != 0;
        range.got = (!ctx.read_only, pagemap != 0 && system);
        Ok(())
    }

    fn unmap_pages(&mut self, i: usize) {
        (self.ranges[i].has_dma_mapping, self.ranges[i].has_devmem_pages) = (false, false);
    }

    fn invalidate(&mut self, event: Event) -> usize {
        let hit = self.overlapping(event.span.start, event.span.end);
        for &i in &hit {
            self.unmap_pages(i);
            if event.kind == EventKind::Unmap {
                let range = &mut self.ranges[i];
                if !self.garbage.contains(&range.start) {
                    self.garbage.push(range.start);
                }
                range.unmapped = true;
                if range.start < event.span.start || range.last + 1 > event.span.end {
                    range.partial_unmap = true;
                }
            }
        }
        hit.len()
    }

    fn remove(&mut self, start: u64) {
        self.ranges.retain(|r| r.start != start);
        self.garbage.retain(|s| *s != start);
    }

    /// What the space must hold: (start, last, flags).
    fn picture(&self) -> Vec<(u64, u64, [bool; 6])> {
        let mut all: Vec<_> = self
            .ranges
            .iter()
            .map(|r| {
                let queued = self.garbage.contains(&r.start);
                let flags = [
                    r.migrate_devmem,
                    r.unmapped,
                    r.partial_unmap,
                    r.has_devmem_pages,
                    r.has_dma_mapping,
                    queued,
                ];
                (r.start, r.last, flags)
            })
            .collect();
        all.sort_unstable();
        all
    }
}

fn picture<R>(space: &Space<R>) -> Vec<(u64, u64, [bool; 6])> {
    let bits = [
        RangeFlags::MIGRATE_DEVMEM,
        RangeFlags::UNMAPPED,
        RangeFlags::PARTIAL_UNMAP,
        RangeFlags::HAS_DEVMEM_PAGES,
        RangeFlags::HAS_DMA_MAPPING,
        RangeFlags::QUEUED,
    ];
    let all = space.ranges_in(ALL);
    all.iter().map(|r| (r.start(), r.span().end - 1, bits.map(|b| r.flags().contains(b)))).collect()
}

#[derive(Debug, Clone)]
enum Op {
    Map { span: Span, read: bool, write: bool, kind: VmaKind },
    Unmap(Span),
    Protect { span: Span, read: bool, write: bool },
    Touch(Span),
    Fill(Span, Page),
    Discard(Span),
    Foreign(bool),
    Fault { addr: u64, gpuva: Span, ctx: Ctx },
    GetPages { addr: u64, ctx: Ctx },
    UnmapPages(u64),
    Send(Event),
    Collect,
    Remove(u64),
    Clear,
}

fn addr() -> impl Strategy<Value = u64> {
    let page =
        prop_oneof![0..PAGES, (0..PAGES / 16).prop_map(|p| p * 16), (0..PAGES / 512).prop_map(|p| p * 512)];
    (page, 0..SZ_4K).prop_map(|(page, rest)| LOW + page * SZ_4K + rest)
}

fn span() -> impl Strategy<Value = Span> {
    let pages = prop_oneof![1u64..40, Just(16), Just(256), Just(512), Just(1024), 1u64..1600];
    (addr(), pages).prop_map(|(at, pages)| Span::sized(align_down(at, SZ_4K), pages * SZ_4K))
}

fn large_span() -> impl Strategy<Value = Span> {
    prop_oneof![9 => span(), 1 => Just(Span::sized(MIDDLE, 1 << 30)), 1 => Just(Span::sized(MIDDLE - SZ_2M, 1 << 30))]
}

fn ctx() -> impl Strategy<Value = Ctx> {
    let threshold = prop_oneof![Just(0), Just(SZ_4K), Just(SZ_64K), Just(SZ_2M), Just(1u64 << 30)];
    (any::<[bool; 4]>(), prop::bool::weighted(0.1), threshold).prop_map(
        |([read_only, devmem_possible, allow_mixed, _], devmem_only, check_pages_threshold)| Ctx {
            read_only,
            devmem_possible,
            devmem_only,
            allow_mixed,
            check_pages_threshold,
            ..Ctx::default()
        },
    )
}

fn rights() -> impl Strategy<Value = (bool, bool)> {
    prop_oneof![6 => Just((true, true)), 2 => Just((true, false)), 1 => Just((false, false))]
}

fn op() -> impl Strategy<Value = Op> {
    use VmaKind::*;
    let kind = prop_oneof![8 => Just(Anonymous), 1 => Just(File), 1 => Just(Shared), 1 => Just(Hugetlb), 1 => Just(Special)];
    let gpuva = prop_oneof![6 => Just(ALL), 2 => span(), 1 => addr().prop_map(|a| Span::new(LOW, a))];
    let page = prop_oneof![Just(Page::System(0)), Just(Page::Zero), (1u64..4).prop_map(Page::Device)];
    let event = prop_oneof![
        Just(EventKind::Unmap),
        Just(EventKind::Clear),
        Just(EventKind::ProtVma),
        Just(EventKind::SoftDirty),
        Just(EventKind::Migrate)
    ];
    prop_oneof![
        6 => (large_span(), rights(), kind)
            .prop_map(|(span, (read, write), kind)| Op::Map { span, read, write, kind }),
        3 => large_span().prop_map(Op::Unmap),
        2 => (span(), rights()).prop_map(|(span, (read, write))| Op::Protect { span, read, write }),
        3 => span().prop_map(Op::Touch),
        3 => (span(), page).prop_map(|(span, page)| Op::Fill(span, page)),
        1 => span().prop_map(Op::Discard),
        1 => any::<bool>().prop_map(Op::Foreign),
        16 => (addr(), gpuva, ctx()).prop_map(|(addr, gpuva, ctx)| Op::Fault { addr, gpuva, ctx }),
        8 => (addr(), ctx()).prop_map(|(addr, ctx)| Op::GetPages { addr, ctx }),
        1 => addr().prop_map(Op::UnmapPages),
        2 => (event, span()).prop_map(|(kind, span)| Op::Send(Event::new(kind, span))),
        3 => Just(Op::Collect),
        2 => addr().prop_map(Op::Remove),
        1 => Just(Op::Clear),
    ]
}

fn config() -> impl Strategy<Value = SpaceConfig> {
    let chunks = prop_oneof![
        4 => Just(vec![SZ_2M, SZ_64K, SZ_4K]),
        1 => Just(vec![SZ_4K]),
        1 => Just(vec![1 << 30, SZ_2M, SZ_4K]),
        1 => Just(vec![SZ_2M, 1 << 20, SZ_64K, 1 << 14, SZ_4K]),
    ];
    let limits = prop_oneof![
        4 => Just(Span::new(0, 1 << 47)),
        1 => span(),
        1 => Just(Span::new(LOW, MIDDLE + SZ_64K)),
    ];
    (chunks, 21u32..=30, limits, any::<bool>()).prop_map(|(chunk_sizes, shift, limits, kernel_exact)| {
        SpaceConfig { limits, notifier_size: 1 << shift, chunk_sizes, kernel_exact }
    })
}

/// The space, the model and their processes side by side.
struct Pair {
    space: Space<()>,
    mm: FakeMm,
    model: Model,
    model_mm: FakeMm,
}

impl Pair {
    fn new(config: SpaceConfig) -> Self {
        Self {
            space: Space::new(config.clone()).unwrap(),
            mm: FakeMm::default(),
            model: Model { config, ranges: Vec::new(), garbage: Vec::new() },
            model_mm: FakeMm::default(),
        }
    }

    /// Does one thing to both processes and sends the events to both sides.
    fn both(&mut self, f: impl Fn(&FakeMm) -> Vec<Event>) {
        let events = f(&self.mm);
        assert_eq!(events, f(&self.model_mm));
        for event in events {
            self.send(event);
        }
    }

    fn quietly(&self, f: impl Fn(&FakeMm)) {
        f(&self.mm);
        f(&self.model_mm);
    }

    fn send(&mut self, event: Event) {
        let mut seen = Vec::new();
        let count = self.space.invalidate(event, |range, info| {
            assert_eq!(info.after, range.flags());
            seen.push(range.start());
        });
        assert_eq!(count, self.model.invalidate(event));
        assert!(seen.is_sorted() && seen.len() == count);
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Map { span, read, write, kind } => {
                self.both(|mm| mm.map(Vma { kind, ..anon(span, read, write) }));
            }
            Op::Unmap(span) => self.both(|mm| mm.unmap(span)),
            Op::Protect { span, read, write } => self.both(|mm| mm.protect(span, read, write)),
            Op::Touch(span) => self.quietly(|mm| mm.touch(span)),
            Op::Fill(span, page) => self.quietly(|mm| mm.fill(span, page)),
            Op::Discard(span) => self.both(|mm| mm.discard(span)),
            Op::Foreign(foreign) => self.quietly(|mm| mm.set_foreign(foreign)),
            Op::Fault { addr, gpuva, ctx } => {
                let got = self.space.find_or_insert(&self.mm, addr, gpuva, &ctx);
                let got = got.map(|r| r.start()).map_err(|e| -e.errno());
                assert_eq!(got, self.model.find_or_insert(&self.model_mm, addr, gpuva, &ctx));
            }
            Op::GetPages { addr, ctx } => {
                let range = self.space.find(addr);
                let index = self.model.overlapping(addr, addr + 1).first().copied();
                assert_eq!(range.is_some(), index.is_some());
                if let (Some(range), Some(i)) = (range, index) {
                    let got = self.space.get_pages(&range, &self.mm, &ctx).map(drop).map_err(|e| -e.errno());
                    assert_eq!(got, self.model.get_pages(&self.model_mm, i, &ctx), "{ctx:?}");
                }
            }
            Op::UnmapPages(addr) => {
                if let Some(range) = self.space.find(addr) {
                    range.unmap_pages();
                    let i = self.model.overlapping(addr, addr + 1)[0];
                    self.model.unmap_pages(i);
                }
            }
            Op::Send(event) => self.send(event),
            Op::Collect => {
                let mut order = Vec::new();
                let removed = self.space.collect_garbage(|range| {
                    assert!(range.flags().contains(RangeFlags::UNMAPPED));
                    order.push(range.start());
                    Ok(())
                });
                assert_eq!(removed, Ok(order.len()));
                assert_eq!(order, self.model.garbage);
                order.into_iter().for_each(|start| self.model.remove(start));
            }
            Op::Remove(addr) => {
                if let Some(range) = self.space.find(addr) {
                    assert!(self.space.remove(&range));
                    assert!(!self.space.remove(&range), "once");
                    assert!(range.is_gone() && range.commit(range.begin()).is_err());
                    self.model.remove(range.start());
                }
            }
            Op::Clear => {
                let starts: Vec<u64> = self.space.clear().iter().map(|r| r.start()).collect();
                assert_eq!(starts, self.model.picture().iter().map(|r| r.0).collect::<Vec<_>>());
                self.model.ranges.clear();
                self.model.garbage.clear();
                assert_eq!(self.space.garbage_len(), 0);
            }
        }
    }

    fn check(&self) {
        assert_eq!(picture(&self.space), self.model.picture());
        let notifiers: Vec<u64> = self.space.notifiers().iter().map(|n| n.span().start).collect();
        assert_eq!(notifiers, self.model.notifiers());
        assert_eq!(self.space.range_count(), self.model.ranges.len());
        self.space.validate().unwrap();
    }

    fn check_queries(&self, span: Span) {
        let hit = self.model.overlapping(span.start, span.end).len();
        assert_eq!(self.space.ranges_in(span).len(), hit);
        assert_eq!(self.space.has_mapping(span), hit > 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_the_naive_model(
        config in config(),
        ops in proptest::collection::vec(op(), 1..80),
        queries in proptest::collection::vec(span(), 4),
    ) {
        let mut pair = Pair::new(config);
        for op in ops {
            pair.step(op);
            pair.check();
        }
        for span in queries {
            pair.check_queries(span);
        }
    }
}

/// A process whose mapping changes at the worst moment: between the look-up and the insertion.
struct Changes<'a, F: Fn() + Send + Sync> {
    mm: &'a FakeMm,
    change: F,
}

impl<F: Fn() + Send + Sync> AddressSpace for Changes<'_, F> {
    fn find_vma(&self, addr: u64) -> Result<Option<Vma>> {
        let found = self.mm.find_vma(addr);
        (self.change)();
        found
    }

    fn populated(&self, span: Span) -> bool {
        self.mm.populated(span)
    }
}

#[test]
fn a_mapping_that_went_away_during_the_call_gets_no_range() {
    for other_range in [false, true] {
        let span = Span::sized(MIDDLE, SZ_2M);
        let mm = FakeMm::with(Span::sized(MIDDLE, 2 * SZ_2M));
        let space: Space<()> = Space::new(SpaceConfig::default()).unwrap();
        if other_range {
            space.find_or_insert(&mm, MIDDLE + SZ_2M, ALL, &Ctx::default()).unwrap();
        }
        let unmaps = Changes {
            mm: &mm,
            change: || {
                for event in mm.unmap(span) {
                    space.invalidate(event, |_, _| ());
                }
            },
        };
        let got = space.find_or_insert(&unmaps, MIDDLE, ALL, &Ctx::default());
        assert_eq!(got.unwrap_err(), Error::NoVma { addr: MIDDLE });
        assert_eq!(space.range_count(), usize::from(other_range));
    }
}

#[test]
fn a_mapping_that_never_rests_is_given_up() {
    let mm = FakeMm::with(Span::sized(MIDDLE, SZ_2M));
    let space: Space<()> = Space::new(SpaceConfig::default()).unwrap();
    let event = Event::new(EventKind::Clear, Span::sized(MIDDLE, SZ_4K));
    let restless = Changes { mm: &mm, change: || _ = space.invalidate(event, |_, _| ()) };
    let got = space.find_or_insert(&restless, MIDDLE, ALL, &Ctx::default());
    assert_eq!(got.unwrap_err().errno(), libc::EAGAIN);
    assert_eq!((space.range_count(), space.notifier_count()), (0, 0));
}

/// A process in which another thread inserts a range while pages are checked.
struct Rival<'a> {
    mm: &'a FakeMm,
    space: &'a Space<()>,
    at: u64,
}

impl AddressSpace for Rival<'_> {
    fn find_vma(&self, addr: u64) -> Result<Option<Vma>> {
        self.mm.find_vma(addr)
    }

    fn populated(&self, span: Span) -> bool {
        let page = Span::around(self.at, SZ_4K);
        self.space.find_or_insert(self.mm, self.at, page, &Ctx::default()).unwrap();
        self.mm.populated(span)
    }
}

#[test]
fn a_range_that_came_during_the_call_is_respected() {
    let ctx = Ctx { check_pages_threshold: SZ_2M, ..Ctx::default() };
    for (rival, size) in [(0, SZ_4K), (SZ_4K, SZ_4K), (SZ_64K, SZ_64K)] {
        let mm = FakeMm::with(Span::sized(MIDDLE, SZ_2M));
        mm.touch(Span::sized(MIDDLE, SZ_2M));
        let space = Space::new(SpaceConfig::default()).unwrap();
        let aspace = Rival { mm: &mm, space: &space, at: MIDDLE + rival };
        let range = space.find_or_insert(&aspace, MIDDLE, ALL, &ctx).unwrap();
        assert_eq!(range.size(), size, "rival at {rival:#x}");
        space.validate().unwrap();
    }
}

mod garbage {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn with_garbage(ranges: u64) -> Space<()> {
        let span = Span::sized(MIDDLE, ranges * SZ_2M);
        let mm = FakeMm::with(span);
        let space = Space::new(SpaceConfig::default()).unwrap();
        for i in 0..ranges {
            space.find_or_insert(&mm, MIDDLE + i * SZ_2M, ALL, &Ctx::default()).unwrap();
        }
        space.invalidate(Event::new(EventKind::Unmap, span), |_, _| ());
        space
    }

    #[test]
    fn an_error_keeps_the_range_for_next_time() {
        let space = with_garbage(3);
        let mut seen = 0;
        let busy = Error::Busy { span: Span::sized(MIDDLE, SZ_2M) };
        let got = space.collect_garbage(|_| {
            seen += 1;
            if seen == 2 { Err(busy.clone()) } else { Ok(()) }
        });
        assert_eq!((got, space.garbage_len(), space.range_count()), (Err(busy), 2, 2));
        let mut again = Vec::new();
        let got = space.collect_garbage(|range| {
            again.push(range.start() - MIDDLE);
            Ok(())
        });
        assert_eq!((got, again), (Ok(2), vec![SZ_2M, 2 * SZ_2M]));
        assert_eq!((space.garbage_len(), space.range_count(), space.notifier_count()), (0, 0, 0));
    }

    #[test]
    fn what_is_kept_is_set_aside_until_it_may_go() {
        let space = with_garbage(3);
        let second = space.find(MIDDLE + SZ_2M).unwrap();
        let collect = |kept: bool| {
            space.collect_garbage_but(|range| kept && range.start() == second.start(), |_| Ok(()))
        };
        space.no_longer_kept(&second);
        assert_eq!((collect(true), space.garbage_len(), space.range_count()), (Ok(2), 0, 1));
        assert_eq!(collect(false), Ok(0), "nobody said that it may go");
        space.no_longer_kept(&second);
        assert_eq!((space.garbage_len(), collect(true), space.garbage_len()), (1, Ok(0), 0));
        space.no_longer_kept(&second);
        assert_eq!((collect(false), space.range_count()), (Ok(1), 0));
        space.no_longer_kept(&second);
        assert_eq!(space.garbage_len(), 0);
    }

    #[test]
    fn a_panic_keeps_the_range_too() {
        let space = with_garbage(1);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            space.collect_garbage(|_| panic!("the callback's own"))
        }));
        assert!(caught.is_err());
        assert_eq!(space.garbage_len(), 1);
        assert_eq!(space.collect_garbage(|_| Ok(())), Ok(1));
    }

    #[test]
    fn what_was_removed_otherwise_is_skipped_and_additions_are_not() {
        let space = with_garbage(2);
        space.remove(&space.find(MIDDLE).unwrap());
        assert_eq!((space.garbage_len(), space.range_count()), (2, 1));
        let mm = FakeMm::with(Span::sized(MIDDLE, SZ_2M));
        let mut calls = 0;
        let got = space.collect_garbage(|_| {
            calls += 1;
            if calls == 1 {
                space.find_or_insert(&mm, MIDDLE, ALL, &Ctx::default())?;
                space.invalidate(Event::new(EventKind::Unmap, Span::sized(MIDDLE, SZ_4K)), |_, _| ());
            }
            Ok(())
        });
        assert_eq!((got, calls, space.range_count(), space.garbage_len()), (Ok(2), 2, 0, 0));
    }

    #[test]
    fn a_second_collector_waits_for_the_first() {
        let space = with_garbage(1);
        let first_is_in = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                space.collect_garbage(|_| {
                    first_is_in.store(1, Ordering::Release);
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    Ok(())
                })
            });
            while first_is_in.load(Ordering::Acquire) == 0 {
                std::thread::yield_now();
            }
            assert_eq!(space.collect_garbage(|_| Ok(())), Ok(0));
            assert!(space.find(MIDDLE).is_none(), "collected before either goes on");
        });
    }
}

mod threads {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Blocks of 64K, each mapped at a generation; an odd one is unmapped.
    struct Blocks(Vec<AtomicU64>);

    impl Blocks {
        fn block(&self, addr: u64) -> Option<(Span, &AtomicU64)> {
            let i = addr.checked_sub(LOW)? / SZ_64K;
            Some((Span::sized(LOW + i * SZ_64K, SZ_64K), self.0.get(i as usize)?))
        }
    }

    impl AddressSpace for Blocks {
        fn find_vma(&self, addr: u64) -> Result<Option<Vma>> {
            let mapped = |(span, generation): (Span, &AtomicU64)| {
                (generation.load(Ordering::SeqCst) & 1 == 0).then(|| anon(span, true, true))
            };
            Ok(self.block(addr).and_then(mapped))
        }

        fn populated(&self, span: Span) -> bool {
            span.start & SZ_64K == 0
        }
    }

    /// What the "device" maps: the generation of the mapping plus one, zero for nothing.
    #[derive(Debug, Default)]
    struct Entry(AtomicU64);

    fn random(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }

    /// One device access: collect, find, look, commit.
    fn access(space: &Space<Entry>, blocks: &Blocks, addr: u64, ctx: &Ctx) {
        space.collect_garbage(|_| Ok(())).unwrap();
        let Ok(range) = space.find_or_insert(blocks, addr, ALL, ctx) else { return };
        assert!(range.span().contains(addr));
        let ticket = range.begin();
        let (_, generation) = blocks.block(addr).unwrap();
        let seen = generation.load(Ordering::SeqCst);
        if let Ok(commit) = range.commit(ticket) {
            range.data.0.store(seen + 1, Ordering::SeqCst);
            commit.set_pages(RangeFlags::WRITABLE);
        }
    }

    /// munmap and mmap of one block, with the event before either returns to the application.
    fn remap(space: &Space<Entry>, blocks: &Blocks, addr: u64) {
        let (span, generation) = blocks.block(addr).unwrap();
        let now = generation.load(Ordering::SeqCst);
        if now & 1 == 1
            || generation.compare_exchange(now, now + 1, Ordering::SeqCst, Ordering::SeqCst).is_err()
        {
            return;
        }
        space.invalidate(Event::new(EventKind::Unmap, span), |range, info| {
            assert!(info.after.contains(RangeFlags::UNMAPPED));
            range.data.0.store(0, Ordering::SeqCst);
        });
        generation.store(now + 2, Ordering::SeqCst);
    }

    #[test]
    fn many_threads_leave_a_sound_space_that_sees_nothing_old() {
        let blocks = Blocks((0..64).map(|_| AtomicU64::new(0)).collect());
        let config = SpaceConfig { notifier_size: 1 << 20, ..SpaceConfig::default() };
        let space: Space<Entry> = Space::new(config).unwrap();
        std::thread::scope(|scope| {
            for seed in 1..=6u64 {
                let (space, blocks) = (&space, &blocks);
                scope.spawn(move || {
                    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    for _ in 0..6000 {
                        let addr = LOW + random(&mut state) % (64 * SZ_64K);
                        let check_pages_threshold = if random(&mut state) & 1 == 0 { 0 } else { SZ_64K };
                        let ctx = Ctx { check_pages_threshold, ..Ctx::default() };
                        match random(&mut state) % 16 {
                            0..=10 => access(space, blocks, addr, &ctx),
                            11 => drop(space.find(addr).map(|range| space.remove(&range))),
                            12 => drop(space.ranges_in(Span::sized(addr, 3 * SZ_64K))),
                            13 if state % 97 == 0 => drop(space.clear()),
                            _ => remap(space, blocks, addr),
                        }
                    }
                });
            }
        });
        space.validate().unwrap();
        for range in space.ranges_in(ALL) {
            let entry = range.data.0.load(Ordering::SeqCst);
            let (_, generation) = blocks.block(range.start()).unwrap();
            let now = generation.load(Ordering::SeqCst);
            assert!(entry == 0 || entry == now + 1, "{range:?} maps {entry}, the mapping is {now}");
            assert_eq!(range.pages_valid_hint(), entry != 0);
        }
        space.collect_garbage(|_| Ok(())).unwrap();
        assert_eq!(space.garbage_len(), 0);
        assert!(space.ranges_in(ALL).iter().all(|r| !r.is_gone()), "no garbage was forgotten");
        let all: Vec<Arc<_>> = space.clear();
        assert_eq!((space.range_count(), space.notifier_count()), (0, 0));
        assert!(all.iter().all(|r| r.is_gone()));
    }
}
