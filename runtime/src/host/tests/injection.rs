//! Every call fails in every way: there is an error or another way, and no page is lost.

use super::*;
use crate::ground::error::Error;
use crate::ground::inject::{self, Call};
use crate::space::ports::{AddressSpace, Shadow};
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard};

const ERRNOS: [i32; 9] = [
    libc::EAGAIN,
    libc::ENOMEM,
    libc::EINVAL,
    libc::EBUSY,
    libc::EEXIST,
    libc::ENOENT,
    libc::EFAULT,
    libc::EPERM,
    libc::ENOSYS,
];

/// The calls of this floor.
const CALLS: [Call; 28] = [
    Call::UffdDevice,
    Call::UffdOpen,
    Call::UffdApi,
    Call::Register,
    Call::Unregister,
    Call::Move,
    Call::Copy,
    Call::Zeropage,
    Call::WriteProtect,
    Call::Wake,
    Call::PagemapScan,
    Call::PagemapRead,
    Call::ProcmapQuery,
    Call::Open,
    Call::Mmap,
    Call::Munmap,
    Call::Mprotect,
    Call::Madvise,
    Call::Mremap,
    Call::MemfdCreate,
    Call::Read,
    Call::Poll,
    Call::Eventfd,
    Call::Seek,
    Call::Stat,
    Call::DupHigh,
    Call::Write,
    Call::Dup,
];

/// Plans are one for each call: tests with plans take turns.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls that failed on purpose, since the last plan's turn began.
static STRUCK: AtomicU64 = AtomicU64::new(0);

/// Clears the plans even when a test fails.
struct Plan(Call);

impl Plan {
    fn new(call: Call, errno: i32, skip: u16, every: u16, count: u16) -> Self {
        inject::clear();
        inject::plan_here(call, errno, skip, every, count);
        Self(call)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        STRUCK.fetch_add(inject::hits(self.0), Ordering::Relaxed);
        inject::clear();
    }
}

const PAGES: usize = 24;

/// Flips out and in while the plan strikes; then, without it, everything must be found again.
fn survive(host: &Arc<Host>, area: &Area, there: &PageMask, plan: impl Fn() -> Plan) {
    let span = area.span;
    if plan_during(&plan, || host.register(span)).is_err() {
        host.register(span).unwrap();
    }
    let shadow: Shadow = match plan_during(&plan, || host.shadow_alloc(64 << 10)) {
        Ok(shadow) => shadow,
        Err(_) => host.shadow_alloc(64 << 10).unwrap(),
    };
    // A slot of 16 pages serves the first 16.
    let part = span.page_run(0, 16);
    let there = there.and(&all(part));
    let mut out = plan_during(&plan, || {
        let _ = (host.present(part), host.populated(part), host.is_registered(part), host.is_huge(part));
        let _ = host.find_vma(part.start);
        let _ = (host.track(part), host.take_written(part));
        host.flip_out(part, &shadow, &all(part)).unwrap_or_else(|stop| stop.moved)
    });
    assert_eq!(out.minus(&there), PageMask::EMPTY);
    assert_eq!(host.present(shadow.span), out, "what moved is told exactly");
    assert_eq!(host.present(part), there.minus(&out));
    verify_pages(shadow.span, &out);
    let stopped = plan_during(&plan, || host.flip_in(part, &shadow, &out));
    if let Err(stop) = stopped {
        out = out.minus(&stop.moved);
        flip_in(host, part, &shadow, &out);
    }
    assert_eq!(host.present(part), there);
    verify_pages(part, &there);
    // A slot that is given back under failures is clean or not given out.
    fill_pages(shadow.span, &mask(&[(0, 16)]));
    plan_during(&plan, || host.shadow_free(shadow));
    let slots: Vec<Shadow> = (0..40).map(|_| host.shadow_alloc(64 << 10).unwrap()).collect();
    assert!(slots.iter().all(|s| host.present(s.span).is_empty()));
    slots.into_iter().for_each(|s| host.shadow_free(s));
    assert_eq!(host.shadow_stuck_bytes(), 0, "stuck slots are emptied with the next ones");
    // The same of slots that are emptied later, and together.
    let later: Vec<Shadow> = (0..3).map(|_| host.shadow_alloc(64 << 10).unwrap()).collect();
    later.iter().for_each(|slot| fill_pages(slot.span, &mask(&[(0, 16)])));
    plan_during(&plan, || {
        later.into_iter().for_each(|slot| host.shadow_discard(slot));
        host.empty_discarded();
    });
    let slots: Vec<Shadow> = (0..40).map(|_| host.shadow_alloc(64 << 10).unwrap()).collect();
    assert!(
        slots.iter().all(|s| host.present(s.span).is_empty()),
        "a discarded slot was given out as it was"
    );
    slots.into_iter().for_each(|s| host.shadow_free(s));
    plan_during(&plan, || host.unregister(span));
    host.unregister(span);
    assert!(!host.is_registered(span));
    verify_pages(span, &there);
}

fn plan_during<T>(plan: &impl Fn() -> Plan, f: impl FnOnce() -> T) -> T {
    let _plan = plan();
    f()
}

fn under_all_plans(forbid: Features) {
    let _t = together();
    let _turn = turn();
    let area = Area::new(PAGES as u64 * SZ_4K, false);
    let there = mask(&[(0, 5), (6, 7), (15, 9)]);
    fill_pages(area.span, &there);
    STRUCK.store(0, Ordering::Relaxed);
    for call in CALLS {
        for errno in ERRNOS {
            for (skip, every, count) in [(0, 1, 1), (1, 1, 1), (0, 2, 0), (0, 1, 0)] {
                let host = Arc::new(without(forbid));
                let reader = (!host.has(Features::MOVE)).then(|| Reader::ordinary(&host));
                survive(&host, &area, &there, || Plan::new(call, errno, skip, every, count));
                drop(reader);
            }
        }
    }
    let struck = STRUCK.load(Ordering::Relaxed);
    assert!(struck > 400, "{struck}");
}

#[test]
fn no_page_is_lost_whatever_fails() {
    under_all_plans(Features::empty());
}

#[test]
fn no_page_is_lost_whatever_fails_without_move() {
    under_all_plans(Features::MOVE);
}

#[test]
fn no_page_is_lost_whatever_fails_without_queries() {
    under_all_plans(Features::PAGEMAP_SCAN | Features::PROCMAP_QUERY);
}

#[test]
fn opening_falls_back_or_says_why() {
    let _t = together();
    let _turn = turn();
    let mut opened = 0;
    for call in CALLS {
        for errno in ERRNOS {
            for count in [1, 0] {
                let _plan = Plan::new(call, errno, 0, 1, count);
                match Host::open(&options()) {
                    Ok(_) => opened += 1,
                    Err(error) => assert!(matches!(error, Error::Os { .. }), "{call:?} {errno}: {error}"),
                }
            }
        }
    }
    assert!(opened > 300, "{opened}");
}

#[test]
fn the_ladder_is_climbed_down() {
    use crate::host::features::Way;
    let _t = together();
    let _turn = turn();
    {
        let _plan = Plan::new(Call::UffdDevice, libc::EACCES, 0, 1, 0);
        let host = host();
        if host.report().way == Way::UserModeOnly {
            skipped("this user may use the last way only");
            return;
        }
        assert_eq!(host.report().way, Way::Syscall);
        assert_eq!(host.report().failed_ways[0].0, Way::Device);
        inject::plan_here(Call::UffdOpen, libc::EPERM, 0, 1, 1);
        let host = Host::open(&options());
        // The first user-mode-only call is let through, those of the probe as well.
        assert_eq!(host.unwrap().report().way, Way::UserModeOnly);
    }
    let _plan = Plan::new(Call::PagemapScan, libc::ENOTTY, 0, 1, 0);
    let host = host();
    assert!(!host.report().has.contains(Features::PAGEMAP_SCAN));
    assert!(host.report().to_string().contains("pagemap_scan: no"), "{}", host.report());
}

#[test]
fn the_limit_of_mappings_is_named() {
    let _t = together();
    let _turn = turn();
    let area = Area::small(4 * SZ_4K);
    let host = host();
    let _plan = Plan::new(Call::Register, libc::ENOMEM, 0, 1, 1);
    let error = host.register(area.span).unwrap_err();
    assert!(error.to_string().contains("vm.max_map_count"), "{error}");
    drop(host);
}

#[test]
fn poison_and_zero_outlast_unread_events() {
    let _t = together();
    let _turn = turn();
    let area = Area::new(4 * SZ_4K, false);
    let host = host();
    host.register(area.span).unwrap();
    let _plan = Plan::new(Call::Poison, libc::EAGAIN, 0, 1, 5);
    host.poison(area.span.start);
    assert_eq!(host.stats().poisoned.load(Ordering::Relaxed), 1);
    inject::plan_here(Call::Zeropage, libc::EAGAIN, 0, 1, 1);
    let page = area.span.start + SZ_4K;
    assert!(host.zero_fill(page).is_err());
    host.zero_fill(page).unwrap();
    assert_eq!(get(page), 0);
}

/// The end wakes who waits, with no descriptor to be had, and where the one there is cannot be replaced.
#[test]
fn no_descriptor_for_the_end() {
    let _t = together();
    let _turn = turn();
    for call in [Call::Eventfd, Call::Dup] {
        let area = Area::new(4 * SZ_4K, false);
        let host = host();
        host.register(area.span).unwrap();
        let (at, asked) = (area.span.start, Instant::now());
        let waits = std::thread::spawn(move || get(at));
        while !host.channel().has_messages() {
            assert!(asked.elapsed() < Duration::from_secs(5), "nobody waits");
            std::thread::yield_now();
        }
        let _plan = Plan::new(call, libc::EMFILE, 0, 1, 0);
        host.close();
        while !waits.is_finished() {
            assert!(asked.elapsed() < Duration::from_secs(5), "{call:?}: it waits for ever");
            std::thread::yield_now();
        }
        assert_eq!(waits.join().unwrap(), 0);
        assert!(inject::hits(call) > 0);
    }
}

#[test]
fn a_pool_without_memory_gives_nothing() {
    let _t = together();
    let _turn = turn();
    let host = host();
    host.set_prepared(1);
    for call in [Call::Madvise, Call::Move] {
        let _plan = Plan::new(call, libc::ENOMEM, 0, 1, 1);
        let _ = host.refill();
        let shadow = host.shadow_alloc(SZ_2M).unwrap();
        let _ = host.shadow_adopt_prepared(&shadow);
        host.shadow_free(shadow);
    }
    assert!(host.refill_wanted() <= 1);
    host.refill().unwrap();
    let shadow = host.shadow_alloc(SZ_2M).unwrap();
    assert!(host.shadow_adopt_prepared(&shadow) && host.is_huge(shadow.span));
}
