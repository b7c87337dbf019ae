//! The commit protocol under the model checker loom: every interleaving, and what the memory model lets each thread
//! see. `notifier.rs` is compiled here a second time, with loom's locks and atomics.
//!
//! The process is one mapping word, the device one table word. A mapper looks at the mapping, prepares, and commits a
//! device entry that points at what it saw. The host changes the mapping and invalidates, which clears the entry. No
//! device entry may be left that points at an old mapping.

/// What `notifier.rs` takes from its parent.
mod primitive {
    pub(super) use loom::sync::atomic::{AtomicU64, Ordering};
    pub(super) use loom::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
}

#[path = "notifier.rs"]
#[allow(dead_code, clippy::duplicate_mod)]
mod notifier;

use crate::ground::addr::Span;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use notifier::{Clock, Notifier, RangeFlags, RangeState, Stale};

/// One range, the mapping behind it and the device's entry for it. Entry 0 points at nothing.
struct World {
    clock: Clock,
    notifier: Notifier,
    state: RangeState,
    mapping: AtomicU64,
    entry: AtomicU64,
}

impl World {
    fn new() -> Arc<Self> {
        let clock = Clock::new();
        Arc::new(Self {
            notifier: Notifier::new(Span::sized(0, 512 << 20), clock.now()),
            clock,
            state: RangeState::new(RangeFlags::empty()),
            mapping: AtomicU64::new(1),
            entry: AtomicU64::new(0),
        })
    }

    /// One try of get pages and bind.
    fn map(&self) -> Result<(), Stale> {
        let ticket = self.notifier.read_begin();
        let seen = self.mapping.load(Ordering::Relaxed);
        let commit = self.state.commit(&self.notifier, ticket)?;
        self.entry.store(seen, Ordering::Relaxed);
        commit.set_pages(RangeFlags::WRITABLE);
        Ok(())
    }

    /// What an invalidation does to the range.
    fn invalidate(&self, during: impl FnOnce(), set: RangeFlags) {
        let invalidation = self.notifier.invalidate(&self.clock);
        during();
        self.state.hit(&invalidation, set);
        self.entry.store(0, Ordering::Relaxed);
    }

    fn check(&self) {
        let entry = self.entry.load(Ordering::Relaxed);
        let (flags, _) = self.state.load();
        assert!(
            entry == 0 || entry == self.mapping.load(Ordering::Relaxed),
            "the device sees an old mapping"
        );
        assert_eq!(
            flags.contains(RangeFlags::HAS_DMA_MAPPING),
            entry != 0,
            "flags tell what the device sees"
        );
    }
}

#[test]
fn no_commit_from_before_an_event_survives_it() {
    // munmap and the like: the mapping has changed when the event is handled.
    loom::model(|| {
        let world = World::new();
        let mapper = thread::spawn({
            let world = world.clone();
            move || world.map()
        });
        world.mapping.store(2, Ordering::Relaxed);
        world.invalidate(|| (), RangeFlags::empty());
        let _ = mapper.join().unwrap();
        world.check();
    });
}

#[test]
fn no_commit_from_within_an_invalidation_survives_it() {
    // The mapping changes while the invalidation runs: a ticket taken inside must not pass afterwards.
    loom::model(|| {
        let world = World::new();
        let mapper = thread::spawn({
            let world = world.clone();
            move || world.map()
        });
        world.invalidate(|| world.mapping.store(2, Ordering::Relaxed), RangeFlags::empty());
        let _ = mapper.join().unwrap();
        world.check();
    });
}

#[test]
fn two_mappers_and_an_event() {
    // All interleavings take minutes; with at most two preemptions, a moment.
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(|| {
        let world = World::new();
        let mappers = [(); 2].map(|()| {
            let world = world.clone();
            thread::spawn(move || world.map())
        });
        world.mapping.store(2, Ordering::Relaxed);
        world.invalidate(|| (), RangeFlags::empty());
        for mapper in mappers {
            let _ = mapper.join().unwrap();
        }
        world.check();
    });
}

#[test]
fn nothing_is_committed_to_an_unmapped_range() {
    loom::model(|| {
        let world = World::new();
        let mapper = thread::spawn({
            let world = world.clone();
            move || world.map()
        });
        world.invalidate(|| (), RangeFlags::UNMAPPED);
        assert_eq!(world.map(), Err(Stale::Gone));
        let first = mapper.join().unwrap();
        assert!(matches!(first, Ok(()) | Err(Stale::Gone)), "UNMAPPED goes before Changed: {first:?}");
        assert_eq!(world.entry.load(Ordering::Relaxed), 0);
    });
}

#[test]
fn nothing_is_committed_to_a_removed_range() {
    loom::model(|| {
        let world = World::new();
        let mapper = thread::spawn({
            let world = world.clone();
            move || world.map().is_ok()
        });
        let guard = world.notifier.lock_exclusive();
        world.state.retire();
        let bound = world.entry.load(Ordering::Relaxed) != 0;
        drop(guard);
        assert_eq!(mapper.join().unwrap(), bound, "committed before the removal, or not at all");
    });
}

#[test]
fn a_mapper_gets_through_once_events_stop() {
    loom::model(|| {
        let world = World::new();
        let host = thread::spawn({
            let world = world.clone();
            move || world.invalidate(|| (), RangeFlags::empty())
        });
        let tries = (1..).find(|_| world.map().is_ok());
        assert!(tries <= Some(2), "one event costs one try at most");
        host.join().unwrap();
        world.check();
    });
}
