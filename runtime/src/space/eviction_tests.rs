//! Who is evicted, and how many are looked at: on the fake process, with one range for each page.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::mover::Mover;
use super::ports::{Device, GpuAccess, Placement, Policy};
use super::residency_fake::{AnyPolicy, Dice, Engine, FakeDevice, FakeHost};
use super::svm::{Svm, Want};
use super::{Space, SpaceConfig};
use crate::ground::addr::{SZ_4K, Span};
use crate::observe::observer::Observer;
use crate::observe::stats::Counter;

const BASE: u64 = 16 << 30;
const MIGRATE: u32 = 0;
const SHARE: u32 = 2;

struct World {
    device: Arc<FakeDevice>,
    policy: Arc<AnyPolicy>,
    svm: Svm,
}

impl World {
    /// A device with memory for `room` of `pages` pages.
    fn new(room: u64, pages: u64) -> Self {
        let host = FakeHost::new(1);
        host.map(Span::sized(BASE, pages * SZ_4K));
        let device = FakeDevice::new(host.clone(), room, true, 1);
        let space = Space::new(SpaceConfig { chunk_sizes: vec![SZ_4K], ..SpaceConfig::default() }).unwrap();
        let policy = AnyPolicy::new(1, MIGRATE);
        let ports: Vec<Arc<dyn Device>> = vec![device.clone()];
        let mover = Mover::new(host, ports, policy.clone() as Arc<dyn Policy>, Arc::new(Observer::new()));
        Self { device, policy, svm: Svm::new(space, mover, 0) }
    }

    /// The device uses the page as a device with faults does.
    fn uses(&self, page: u64) {
        let addr = BASE + page * SZ_4K;
        if self.device.engine(addr, |_| None) == Engine::Faults {
            let pinned = self.svm.gpu_access(0, addr, SZ_4K, Want::fault(GpuAccess::Write)).unwrap();
            self.svm.release(0, &pinned);
            assert!(matches!(self.device.engine(addr, |_| None), Engine::Value(_)));
        }
    }

    /// A bracket around reads of the page, which share it.
    fn shares(&self, page: u64) -> Vec<Arc<super::mover::Range>> {
        self.policy.mode.store(SHARE, Ordering::Relaxed);
        let want = Want { force: Some(Placement::Share), ..Want::launch(GpuAccess::Read) };
        let pinned = self.svm.gpu_access(0, BASE + page * SZ_4K, SZ_4K, want).unwrap();
        self.policy.mode.store(MIGRATE, Ordering::Relaxed);
        pinned
    }

    fn there(&self, page: u64) -> bool {
        let seen = self.svm.residence(Span::sized(BASE + page * SZ_4K, SZ_4K));
        seen.device + seen.shared > 0
    }

    fn gone(&self, pages: std::ops::Range<u64>) -> Vec<u64> {
        pages.filter(|page| !self.there(*page)).collect()
    }

    /// Ranges looked at, and evictions, while `f` runs.
    fn looks(&self, f: impl FnOnce()) -> (u64, u64) {
        let count = || (self.svm.mover.looks(0), self.svm.count(Counter::Evictions));
        let before = count();
        f();
        let after = count();
        (after.0 - before.0, after.1 - before.1)
    }
}

#[test]
fn what_was_used_again_stays() {
    let world = World::new(3, 4);
    (0..3).for_each(|page| world.uses(page));
    world.uses(0);
    world.uses(3);
    assert_eq!(world.gone(0..4), [1]);
}

#[test]
fn any_that_were_used_again_stay() {
    let mut dice = Dice::new(7);
    for _ in 0..300 {
        let world = World::new(8, 16);
        (0..8).for_each(|page| world.uses(page));
        let used: Vec<u64> = (0..6).filter(|_| dice.roll(2) == 0).collect();
        used.iter().rev().for_each(|page| world.uses(*page));
        let unused: Vec<u64> = (0..6).filter(|page| !used.contains(page)).collect();
        for (n, _) in unused.iter().enumerate() {
            world.uses(8 + n as u64);
            assert_eq!(world.gone(0..8), unused[..=n], "{used:?} were used again, {n} evictions");
        }
    }
}

#[test]
fn announced_uses_count() {
    let world = World::new(8, 16);
    (0..8).for_each(|page| world.uses(page));
    for page in [0, 2, 4] {
        let want = Want::launch(GpuAccess::Write);
        let pinned = world.svm.gpu_access(0, BASE + page * SZ_4K, SZ_4K, want).unwrap();
        world.svm.release(0, &pinned);
    }
    (8..11).for_each(|page| world.uses(page));
    assert_eq!(world.gone(0..8), [1, 3, 5]);
}

#[test]
fn shared_copies_go_first_and_make_nothing_else_warm() {
    let world = World::new(6, 16);
    (0..3).for_each(|page| world.uses(page));
    (3..6).for_each(|page| world.svm.release(0, &world.shares(page)));
    // Of the copies, the one that was used again goes last.
    world.svm.release(0, &world.shares(3));
    for (n, left) in [4, 5, 3, 0, 1, 2].into_iter().enumerate() {
        world.uses(8 + n as u64);
        assert!(!world.there(left), "eviction {n} took another than {left}: {:?} are gone", world.gone(0..6));
        assert_eq!(world.gone(0..6).len(), n + 1);
    }
}

#[test]
fn copies_in_use_are_passed_over_and_the_last_resort_finds_the_others() {
    let world = World::new(64, 256);
    let mut held: Vec<_> = (0..64).flat_map(|page| world.shares(page)).collect();
    world.svm.release(0, &held.split_off(63));
    let (looks, evictions) = world.looks(|| world.uses(100));
    assert!(!world.there(63) && evictions == 1 && looks <= 16 + 64, "{looks} looks");
    let refused = world.svm.gpu_access(
        0,
        BASE + 101 * SZ_4K,
        2 * SZ_4K,
        Want { wait: false, ..Want::fault(GpuAccess::Write) },
    );
    assert!(refused.is_err(), "there is room for one of them only");
    world.svm.release(0, &held);
}

/// With many ranges on the device an eviction looks at few of them, whatever was used and whatever is held.
#[test]
fn an_eviction_looks_at_few() {
    const MANY: u64 = 1024;
    const MORE: u64 = 128;
    let world = World::new(MANY, 4 * MANY);
    (0..MANY).for_each(|page| world.uses(page));
    let (looks, evictions) = world.looks(|| (MANY..MANY + MORE).for_each(|page| world.uses(page)));
    assert_eq!((looks, evictions), (MORE, MORE), "nothing was used twice");
    // The device uses all of it between evictions.
    let (looks, evictions) = world.looks(|| {
        for page in MANY + MORE..MANY + MORE + 64 {
            (0..MANY + MORE).filter(|page| world.there(*page)).for_each(|page| world.uses(page));
            world.uses(page);
        }
    });
    assert_eq!(evictions, 64);
    assert!(looks <= 64 * 33, "{looks} looks");
    // A launch holds half, the coldest, and more and more of the rest.
    let held: Vec<_> = (0..MANY + MORE)
        .filter(|page| world.there(*page))
        .take(MANY as usize / 2)
        .flat_map(|page| {
            let want = Want { cause: crate::observe::stats::Cause::User, ..Want::fault(GpuAccess::Read) };
            world.svm.gpu_access(0, BASE + page * SZ_4K, SZ_4K, want).unwrap()
        })
        .collect();
    assert_eq!(held.len(), MANY as usize / 2);
    let (looks, evictions) = world.looks(|| {
        let mut more = Vec::new();
        for page in 2 * MANY..2 * MANY + MORE {
            let addr = BASE + page * SZ_4K;
            more.extend(world.svm.gpu_access(0, addr, SZ_4K, Want::fault(GpuAccess::Write)).unwrap());
        }
        world.svm.release(0, &more);
    });
    assert_eq!(evictions, MORE);
    assert!(looks < MANY + MORE * 5, "{looks} looks: one at each that is held, not at all each time");
    world.svm.release(0, &held);
}
