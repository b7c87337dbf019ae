//! Ways home that break off.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::mover::{Mover, Range};
use super::ports::{Device, Policy};
use super::residency_fake::{AnyPolicy, Engine, FakeDevice, FakeHost, Touch};
use super::svm::{Served, Svm, Wait, Want};
use super::{Space, SpaceConfig};
use crate::ground::addr::{PageMask, SZ_4K, SZ_64K, Span};
use crate::ground::error::Error;
use crate::observe::observer::Observer;
use crate::observe::stats::Cause;
use crate::space::ports::GpuAccess;

const BASE: u64 = 16 << 30;
const PAGES: u64 = 16;
const MIGRATE: u32 = 0;

fn page(n: u64) -> u64 {
    BASE + n * SZ_4K
}

/// A range whose only contents are the device's: page n holds 100 + n.
fn away() -> (Arc<FakeHost>, Arc<FakeDevice>, Svm, Arc<Range>) {
    let host = FakeHost::new(1);
    host.map(Span::sized(BASE, SZ_64K));
    (0..PAGES).for_each(|n| assert_eq!(host.touch(page(n), Some(n)), Touch::Value(n)));
    let device = FakeDevice::new(host.clone(), 2 * PAGES, true, 1);
    let space =
        Space::new(SpaceConfig { chunk_sizes: vec![SZ_64K, SZ_4K], ..SpaceConfig::default() }).unwrap();
    let policy = AnyPolicy::new(1, MIGRATE) as Arc<dyn Policy>;
    let ports: Vec<Arc<dyn Device>> = vec![device.clone()];
    let svm = Svm::new(space, Mover::new(host.clone(), ports, policy, Arc::new(Observer::new())), 0);
    let held = svm.gpu_access(0, BASE, SZ_64K, Want::launch(GpuAccess::Write)).unwrap();
    for n in 0..PAGES {
        assert_eq!(device.engine(page(n), |_| Some(100 + n)), Engine::Value(n));
    }
    svm.release(0, &held);
    let range = svm.space.find(BASE).unwrap();
    (host, device, svm, range)
}

/// What a download brought before it failed is known and kept, and of what it was about to bring nothing stays unknown.
#[test]
fn a_download_that_fails_leaves_the_record_right() {
    let (host, device, svm, range) = away();
    let mut state = range.data.lock();
    // Nothing is kept at home for it: each page of the shadow is one that the download made.
    svm.mover.release_retained(&range, &mut state);
    let mut wanted = PageMask::EMPTY;
    wanted.set_run(0, 3);
    wanted.set_run(8, 4);
    device.lasts.store(5, Ordering::Relaxed);
    let stopped = svm.mover.to_host(&range, &mut state, &wanted, Cause::User);
    assert!(matches!(stopped, Err(Error::DeviceLost { .. })), "{stopped:?}");
    let moved = state.moved.as_ref().unwrap();
    assert_eq!(moved.retained, host.shadow_pages(moved.shadow.as_ref().unwrap()));
    assert_eq!((moved.fresh, moved.vram), (PageMask::first(3), PageMask::first(16)));
    drop(state);
    assert!(matches!(svm.bring_home(range.span(), Cause::User), Err(Error::DeviceLost { .. })));
    for n in 0..PAGES {
        let expected = if n < 3 { Touch::Value(100 + n) } else { Touch::Sigbus };
        assert_eq!(host.touch(page(n), None), expected, "page {n}");
    }
}

/// An error of the kernel is no loss: what is on the device is kept for the next try.
#[test]
fn an_error_on_the_way_home_loses_nothing() {
    let (host, _device, svm, range) = away();
    host.set_refusing(true);
    for n in 0..PAGES {
        assert_eq!(svm.cpu_fault(page(n), true), Served::Retry(Wait::Events), "page {n}");
    }
    host.set_refusing(false);
    svm.bring_home(range.span(), Cause::User).unwrap();
    for n in 0..PAGES {
        assert_eq!(host.touch(page(n), None), Touch::Value(100 + n), "page {n}");
    }
}
