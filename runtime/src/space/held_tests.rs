//! What becomes of memory that work holds over the link when somebody wants it on the device.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::mover::{Mover, Range};
use super::ports::{Backing, Device, GpuAccess, Placement, Policy};
use super::residency_fake::{AnyPolicy, FakeDevice, FakeHost, Touch};
use super::svm::{Served, Svm, Wait, Want};
use super::{Space, SpaceConfig};
use crate::ground::addr::{SZ_4K, Span};
use crate::ground::error::{Error, Result};
use crate::observe::observer::Observer;

const BASE: u64 = 16 << 30;
const MIGRATE: u32 = 0;

/// One page that holds 7, and a device.
fn world(recoverable_faults: bool) -> (Arc<FakeHost>, Arc<FakeDevice>, Svm) {
    let host = FakeHost::new(1);
    host.map(Span::sized(BASE, SZ_4K));
    assert_eq!(host.touch(BASE, Some(7)), Touch::Value(7));
    let device = FakeDevice::with_faults(host.clone(), 4, true, 1, recoverable_faults);
    let space = Space::new(SpaceConfig { chunk_sizes: vec![SZ_4K], ..SpaceConfig::default() }).unwrap();
    let policy = AnyPolicy::new(1, MIGRATE) as Arc<dyn Policy>;
    let ports: Vec<Arc<dyn Device>> = vec![device.clone()];
    let mover = Mover::new(host.clone(), ports, policy, Arc::new(Observer::new()));
    (host, device, Svm::new(space, mover, 0))
}

/// What a launch holds that reaches the page over the link.
fn holds_over_the_link(svm: &Svm) -> Vec<Arc<Range>> {
    let want = Want { force: Some(Placement::Remote), ..Want::launch(GpuAccess::Write) };
    svm.gpu_access(0, BASE, SZ_4K, want).unwrap()
}

#[test]
fn an_access_over_the_link_is_served_although_its_work_holds_the_memory() {
    let (host, device, svm) = world(true);
    let held = holds_over_the_link(&svm);
    svm.gpu_access(0, BASE, SZ_4K, Want::prefetch()).unwrap();
    assert!(matches!(device.table()[..], [(BASE, Backing::Vram(_), _)]), "it went there");
    assert_eq!(svm.cpu_fault(BASE, true), Served::Retry(Wait::Pins), "the program waits");
    // The launch's access had found the translation to the link, and finds no page now.
    device.reached.store(BASE, Ordering::Relaxed);
    assert_eq!(svm.cpu_fault(BASE, true), Served::Done);
    assert_eq!((host.touch(BASE, None), device.table().len()), (Touch::Value(7), 0));
    device.reached.store(0, Ordering::Relaxed);
    svm.release(0, &held);
}

#[test]
fn what_a_device_that_cannot_fault_holds_over_the_link_stays() {
    let (host, device, svm) = world(false);
    let held = holds_over_the_link(&svm);
    svm.gpu_access(0, BASE, SZ_4K, Want::prefetch()).unwrap();
    assert!(
        matches!(device.table()[..], [(BASE, Backing::System, GpuAccess::Write)]),
        "{:?}",
        device.table()
    );
    assert_eq!(host.touch(BASE, None), Touch::Value(7));
    svm.release(0, &held);
    svm.gpu_access(0, BASE, SZ_4K, Want::prefetch()).unwrap();
    assert!(matches!(device.table()[..], [(BASE, Backing::Vram(_), _)]), "it goes when the work has ended");
    // Now it is on the device that work holds it: another device's engine, if any, waits for its end.
    let held = svm.gpu_access(0, BASE, SZ_4K, Want::launch(GpuAccess::Write)).unwrap();
    device.reached.store(BASE, Ordering::Relaxed);
    assert_eq!(svm.cpu_fault(BASE, true), Served::Retry(Wait::Pins));
    svm.release(0, &held);
    assert_eq!(svm.cpu_fault(BASE, true), Served::Done);
}

/// Work that uses memory where the processor is.
fn holds_at_home(svm: &Svm) -> Result<Vec<Arc<Range>>> {
    svm.gpu_access(0, BASE, SZ_4K, Want::at_home(GpuAccess::Write, BASE))
}

/// The processor would wait for who holds it at home, if that left it on the device; perhaps for itself.
#[test]
fn what_is_held_at_home_waits_for_who_holds_it_on_the_device() {
    for recoverable_faults in [true, false] {
        let (host, device, svm) = world(recoverable_faults);
        let there = svm.gpu_access(0, BASE, SZ_4K, Want::launch(GpuAccess::Write)).unwrap();
        assert!(matches!(holds_at_home(&svm), Err(Error::Again { .. })));
        assert!(matches!(device.table()[..], [(BASE, Backing::Vram(_), _)]), "{:?}", device.table());
        svm.release(0, &there);
        let at_home = holds_at_home(&svm).unwrap();
        assert!(matches!(device.table()[..], [(BASE, Backing::System, _)]), "{:?}", device.table());
        assert_eq!(host.touch(BASE, None), Touch::Value(7));
        svm.release(0, &at_home);
    }
}

/// What lost everything is nobody's: a new range can take its place at once.
#[test]
fn what_a_device_that_cannot_fault_holds_goes_when_nothing_is_left_of_it() {
    let (host, device, svm) = world(false);
    let page = Span::sized(BASE, SZ_4K);
    let held = svm.gpu_access(0, BASE, SZ_4K, Want::launch(GpuAccess::Write)).unwrap();
    host.unmap(page);
    host.map(page);
    svm.unmapped(page);
    let again = svm.gpu_access(0, BASE, SZ_4K, Want::launch(GpuAccess::Write)).unwrap();
    assert!(!Arc::ptr_eq(&held[0], &again[0]) && held[0].is_gone() && !again[0].is_gone());
    svm.release(0, &held);
    assert!(matches!(device.table()[..], [(BASE, Backing::Vram(_), GpuAccess::Write)]));
    svm.release(0, &again);
    // Dropped is not gone: it is used again, and held by both.
    let held = svm.gpu_access(0, BASE, SZ_4K, Want::launch(GpuAccess::Write)).unwrap();
    svm.discarded(page, &|| ());
    host.zap(page);
    assert!(device.table().is_empty());
    let again = svm.gpu_access(0, BASE, SZ_4K, Want::launch(GpuAccess::Write)).unwrap();
    assert!(Arc::ptr_eq(&held[0], &again[0]));
    svm.recut(page);
    svm.collect_garbage().unwrap();
    svm.release(0, &held);
    assert!(matches!(device.table()[..], [(BASE, Backing::Vram(_), GpuAccess::Write)]));
    svm.collect_garbage().unwrap();
    assert_eq!(svm.space.range_count(), 1, "one of two has ended");
    svm.release(0, &again);
    svm.collect_garbage().unwrap();
    assert_eq!((svm.space.range_count(), device.table().len()), (0, 0));
    assert_eq!(host.touch(BASE, None), Touch::Value(0));
    // What has to be at home is not kept, whoever holds it.
    let held = svm.gpu_access(0, BASE, SZ_4K, Want::launch(GpuAccess::Write)).unwrap();
    svm.recut(page);
    svm.collect_garbage().unwrap();
    assert_eq!((svm.space.range_count(), device.table().len()), (1, 1));
    svm.freeze();
    svm.recut_at_once(page);
    svm.thaw();
    svm.collect_garbage().unwrap();
    assert_eq!((svm.space.range_count(), device.table().len()), (0, 0));
    svm.release(0, &held);
}
