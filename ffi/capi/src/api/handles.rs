//! What handles name.
//!
//! # Overview
//! A handle is a number: kind, generation, index. `Slots` is a table of one kind; a slot's generation grows when its
//! entry goes, so an old handle never names the new entry. `Tables` has them all, and counts `usvm_init`.
//!
//! # Locking
//! `lock` is for application threads only and for a few instructions; nothing is called with it held. It is held across
//! fork (`super::fork`).
//!
//! # Limits
//! A slot is used 2^28 times before one of its handles comes again.

use std::cell::Cell;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::Duration;

use usvm::{Bracket, Fence, Runtime};

use super::notify::{Hub, Notifier, Told};
use super::result::{Done, Failure, USVM_ERROR_INVALID_HANDLE, USVM_ERROR_NOT_RUNNING};
use super::types::{usvm_device_t, usvm_fence_t, usvm_notifier_t, usvm_space_t};
use crate::process;

/// Kinds of handles: the topmost four bits, never zero, so that no handle looks like an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Kind {
    Device = 0x9,
    Space = 0xa,
    Fence = 0xb,
    Notifier = 0xc,
}

const GENERATION: u64 = 0x0fff_ffff;

/// The number that a handle is.
pub(crate) type Id = u64;

fn id(kind: Kind, generation: u32, index: u32) -> Id {
    (kind as u64) << 60 | (u64::from(generation) & GENERATION) << 32 | u64::from(index)
}

fn parts(id: Id, kind: Kind) -> Option<(u64, usize)> {
    (id >> 60 == kind as u64).then_some((id >> 32 & GENERATION, (id & 0xffff_ffff) as usize))
}

/// The pointer that stands for `id` in C.
pub(crate) fn shape(id: Id) -> *mut c_void {
    std::ptr::without_provenance_mut(id as usize)
}

fn refused(name: &str, at: *mut c_void, what: &str) -> Failure {
    let why =
        if at.is_null() { "is NULL".to_owned() } else { format!("{at:p} is not {what}, or not any more") };
    Failure::new(USVM_ERROR_INVALID_HANDLE, format_args!("{name}: {why}"))
}

/// A space: a device of the runtime, and what threads began on it without a fence.
#[derive(Debug)]
pub(crate) struct Space {
    pub(crate) device: u32,
    pub(crate) begun: Mutex<Vec<(u64, Bracket)>>,
}

/// Work that ends; and an access, where it is the beginning of one.
#[derive(Debug)]
pub(crate) struct Work {
    /// Set a moment after the handle is out.
    pub(crate) fence: OnceLock<Fence>,
    pub(crate) space: Id,
    pub(crate) access: bool,
    pub(crate) bracket: Mutex<Option<Bracket>>,
}

struct Slot<T> {
    generation: u32,
    entry: Option<Arc<T>>,
}

/// The entries of one kind.
pub(crate) struct Slots<T> {
    kind: Kind,
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

impl<T> Slots<T> {
    const fn new(kind: Kind) -> Self {
        Self { kind, slots: Vec::new(), free: Vec::new() }
    }

    pub(crate) fn add(&mut self, entry: Arc<T>) -> Id {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 1, entry: None });
            self.slots.len() as u32 - 1
        });
        let slot = &mut self.slots[index as usize];
        slot.entry = Some(entry);
        id(self.kind, slot.generation, index)
    }

    pub(crate) fn get(&self, id: Id) -> Option<&Arc<T>> {
        let (generation, index) = parts(id, self.kind)?;
        let slot = self.slots.get(index)?;
        slot.entry.as_ref().filter(|_| u64::from(slot.generation) & GENERATION == generation)
    }

    pub(crate) fn remove(&mut self, id: Id) -> Option<Arc<T>> {
        self.get(id)?;
        let (_, index) = parts(id, self.kind)?;
        self.free.push(index as u32);
        let slot = self.slots.get_mut(index)?;
        slot.generation = slot.generation.wrapping_add(1);
        slot.entry.take()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Id, &Arc<T>)> {
        self.slots.iter().enumerate().filter_map(|(index, slot)| {
            slot.entry.as_ref().map(|entry| (id(self.kind, slot.generation, index as u32), entry))
        })
    }

    /// Takes all entries out.
    pub(crate) fn clear(&mut self) -> Vec<Arc<T>> {
        let ids: Vec<Id> = self.iter().map(|(id, _)| id).collect();
        ids.into_iter().filter_map(|id| self.remove(id)).collect()
    }
}

/// All that handles name in this process.
pub(crate) struct Tables {
    /// `usvm_init`s without their `usvm_shutdown`.
    pub(crate) users: usize,
    /// The process that called them; 0 before anybody did.
    owner: u32,
    /// Times that the first of them came.
    pub(crate) epoch: u32,
    pub(crate) spaces: Slots<Space>,
    pub(crate) works: Slots<Work>,
    pub(crate) notifiers: Slots<Notifier>,
    pub(crate) hub: Option<Arc<Hub>>,
    /// Changes that the thread which makes them has told already.
    pub(crate) told: Vec<Told>,
}

static TABLES: Mutex<Tables> = Mutex::new(Tables {
    users: 0,
    owner: 0,
    epoch: 0,
    spaces: Slots::new(Kind::Space),
    works: Slots::new(Kind::Fence),
    notifiers: Slots::new(Kind::Notifier),
    hub: None,
    told: Vec::new(),
});

/// The tables. For application threads; see the module for how long.
pub(crate) fn lock() -> MutexGuard<'static, Tables> {
    TABLES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The tables, if they can be had within a while.
pub(crate) fn try_lock() -> Option<MutexGuard<'static, Tables>> {
    (0..1000).find_map(|_| match TABLES.try_lock() {
        Ok(tables) => Some(tables),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => {
            std::thread::sleep(Duration::from_micros(50));
            None
        }
    })
}

impl Tables {
    /// For a forked child: nothing of the parent's is touched or freed, and its handles name nothing.
    pub(crate) fn forget(&mut self) {
        self.users = 0;
        std::mem::forget(self.spaces.clear());
        std::mem::forget(self.works.clear());
        std::mem::forget(self.notifiers.clear());
        std::mem::forget(self.hub.take());
        std::mem::forget(std::mem::take(&mut self.told));
    }

    /// Before this process is counted: forgets a parent's, where no handler of fork did.
    pub(crate) fn forget_the_parents(&mut self) {
        let me = std::process::id();
        if std::mem::replace(&mut self.owner, me) != me && self.users > 0 {
            self.forget();
            super::notify::forget();
        }
    }

    fn check(&self) -> Done {
        if self.users == 0 || self.owner != std::process::id() {
            return Err(Failure::new(
                USVM_ERROR_NOT_RUNNING,
                "usvm_init was not called, or usvm_shutdown was",
            ));
        }
        Ok(())
    }

    pub(crate) fn space(&self, space: usvm_space_t) -> Done<Arc<Space>> {
        self.check()?;
        let found = self.spaces.get(space.0.addr() as Id);
        found.cloned().ok_or_else(|| refused("space", space.0, "a space"))
    }

    pub(crate) fn work(&self, fence: usvm_fence_t) -> Done<Arc<Work>> {
        self.check()?;
        let found = self.works.get(fence.0.addr() as Id);
        found.cloned().ok_or_else(|| refused("fence", fence.0, "a fence"))
    }

    pub(crate) fn notifier(&self, notifier: usvm_notifier_t) -> Done<Arc<Notifier>> {
        self.check()?;
        let found = self.notifiers.get(notifier.0.addr() as Id);
        found.cloned().ok_or_else(|| refused("notifier", notifier.0, "a notifier"))
    }
}

/// The runtime, if `usvm_init` was called.
pub(crate) fn runtime() -> Done<Runtime> {
    lock().check()?;
    process::current()
        .ok_or_else(|| Failure::new(USVM_ERROR_NOT_RUNNING, "usvm was shut down by another thread just now"))
}

/// The space and the runtime.
pub(crate) fn space(space: usvm_space_t) -> Done<(Arc<Space>, Runtime)> {
    let found = lock().space(space)?;
    Ok((found, runtime()?))
}

/// Handle of device `index` in this epoch.
pub(crate) fn device_handle(index: u32) -> usvm_device_t {
    usvm_device_t(shape(id(Kind::Device, lock().epoch, index)))
}

/// The index of the device, and the runtime.
pub(crate) fn device(device: usvm_device_t) -> Done<(u32, Runtime)> {
    let runtime = runtime()?;
    let epoch = u64::from(lock().epoch) & GENERATION;
    match parts(device.0.addr() as Id, Kind::Device) {
        Some((generation, index)) if generation == epoch && index < runtime.devices().len() => {
            Ok((index as u32, runtime))
        }
        _ => Err(refused("device", device.0, "a device")),
    }
}

/// A number that no other thread of this process has.
pub(crate) fn this_thread() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    thread_local!(static NUMBER: Cell<u64> = const { Cell::new(0) });
    if NUMBER.get() == 0 {
        NUMBER.set(NEXT.fetch_add(1, Ordering::Relaxed));
    }
    NUMBER.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_handle_names_nothing() {
        let mut slots = Slots::new(Kind::Space);
        let first = slots.add(Arc::new(1));
        assert_eq!(slots.get(first).map(|v| **v), Some(1));
        assert_eq!(slots.remove(first).as_deref(), Some(&1));
        assert!(slots.get(first).is_none() && slots.remove(first).is_none());
        let second = slots.add(Arc::new(2));
        assert_ne!(first, second);
        assert_eq!(first & 0xffff_ffff, second & 0xffff_ffff, "the slot is used again");
        assert!(slots.get(first).is_none());
        assert_eq!(slots.iter().map(|(id, v)| (id, **v)).collect::<Vec<_>>(), [(second, 2)]);
        assert_eq!(slots.clear().len(), 1);
        assert!(slots.get(second).is_none());
    }

    #[test]
    fn kinds_and_rubbish_are_told_apart() {
        let mut slots = Slots::new(Kind::Fence);
        let fence = slots.add(Arc::new(()));
        for wrong in [0, 1, fence ^ 1 << 60, fence + 1, fence ^ 1 << 32, u64::MAX, 0x7fff_ffff_f000] {
            assert!(slots.get(wrong).is_none(), "{wrong:#x}");
        }
    }
}
