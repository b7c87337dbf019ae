//! Memory that usvm takes for itself, for each range.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use usvm::ground::addr::{SZ_2M, SZ_4K, SZ_64K, Span};
use usvm::space::ports::{AddressSpace, Vma, VmaKind};
use usvm::space::residency::Residency;
use usvm::space::{Ctx, Space, SpaceConfig};

/// The system's allocator, with a count of what it has given out.
struct Counted;

static HELD: AtomicUsize = AtomicUsize::new(0);

/// What malloc takes for so many bytes: a header, and a multiple of 16.
fn cost(layout: Layout) -> usize {
    (layout.size() + 8).next_multiple_of(16).max(32)
}

// SAFETY: passes everything on and counts.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(cost(layout), Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        HELD.fetch_sub(cost(layout), Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOC: Counted = Counted;

/// One endless writable anonymous mapping whose pages are never populated, so that chunks of 4 KiB come of it.
struct Endless;

impl AddressSpace for Endless {
    fn find_vma(&self, _addr: u64) -> usvm::Result<Option<Vma>> {
        let span = Span::new(SZ_2M, 1 << 46);
        Ok(Some(Vma { span, read: true, write: true, exec: false, kind: VmaKind::Anonymous }))
    }

    fn populated(&self, _span: Span) -> bool {
        false
    }
}

const RANGES: u64 = 1_000_000;

fn filled(apart: u64) -> (Space<Residency>, usize) {
    let before = HELD.load(Relaxed);
    let space = Space::new(SpaceConfig::default()).unwrap();
    let ctx = Ctx { devmem_possible: true, check_pages_threshold: SZ_2M, ..Ctx::default() };
    for n in 0..RANGES {
        space.find_or_insert(&Endless, SZ_2M + n * apart, space.config().limits, &ctx).unwrap();
    }
    assert_eq!(space.range_count(), RANGES as usize);
    (space, HELD.load(Relaxed) - before)
}

/// Side by side: range, place in the tree, share of the notifier. Then with the residency of one that has moved.
#[test]
fn a_million_ranges() {
    let (space, bytes) = filled(SZ_4K);
    let each = bytes as u64 / RANGES;
    println!("side by side: {each} bytes a range");
    let before = HELD.load(Relaxed);
    space.for_each_range(Span::new(0, 1 << 46), |range| {
        range.data.lock().moved.get_or_insert_default();
    });
    let moved = (HELD.load(Relaxed) - before) as u64 / RANGES;
    println!("that have moved: {moved} bytes more");
    space.clear();
    drop(space);
    assert!(each <= 112, "{each} bytes for a range");
    assert!(moved <= 704, "{moved} bytes for a range's residency");

    let (space, bytes) = filled(SZ_64K);
    let alone = bytes as u64 / RANGES;
    println!("one in each 64 KiB: {alone} bytes a range");
    drop(space);
    assert!(alone <= 320, "{alone} bytes for a range that is alone in its 64 KiB");
    let left = HELD.load(Relaxed) as i64 - before as i64;
    assert!(left < 1 << 20, "{left} bytes stay behind");
}
