//! What the layer remembers of the program's objects: kernels' pointer arguments, queues, and events of USM commands.
//!
//! # Overview
//! The driver owns the objects; here is only what cannot be asked of it later. Entries live as long as the reference
//! counts that the program keeps, which are counted along: a handle can be used again for another object as soon as the
//! last reference is given up, so an entry goes *before* the driver is told.
//!
//! # Locking
//! One mutex for each table shard, never held over a call into the driver, except while a queue is retained (so that it
//! is not given up meanwhile).
//!
//! # Limits
//! Objects that reached the program without the layer (made before it was loaded) are known from their first use on.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard};

use super::memory::{BLOCKS, Block, Kind};
use super::types::Uint;

const SHARDS: usize = 16;

/// Entries by handle, with the program's reference count.
pub struct Table<T> {
    shards: LazyLock<[Shard<T>; SHARDS]>,
    live: AtomicUsize,
}

type Shard<T> = Mutex<HashMap<usize, Counted<T>>>;

struct Counted<T> {
    references: usize,
    value: T,
}

impl<T> Table<T> {
    const fn new() -> Self {
        Self {
            shards: LazyLock::new(|| std::array::from_fn(|_| Mutex::default())),
            live: AtomicUsize::new(0),
        }
    }

    fn shard(&self, handle: usize) -> MutexGuard<'_, HashMap<usize, Counted<T>>> {
        let hash = handle.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 60;
        self.shards[hash % SHARDS].lock().unwrap_or_else(|p| p.into_inner())
    }

    /// A new object; whatever was known of an earlier one with this handle is forgotten.
    pub fn create(&self, handle: usize, value: T) {
        if self.shard(handle).insert(handle, Counted { references: 1, value }).is_none() {
            self.live.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// One reference more.
    pub fn retain(&self, handle: usize) {
        if !self.is_empty()
            && let Some(entry) = self.shard(handle).get_mut(&handle)
        {
            entry.references += 1;
        }
    }

    /// One reference less; the last takes the entry away.
    pub fn release(&self, handle: usize) {
        if self.is_empty() {
            return;
        }
        let mut shard = self.shard(handle);
        let Some(entry) = shard.get_mut(&handle) else { return };
        entry.references -= 1;
        if entry.references == 0 {
            shard.remove(&handle);
            self.live.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Runs `f` on the entry, if there is one.
    pub fn with<R>(&self, handle: usize, f: impl FnOnce(&mut T) -> R) -> Option<R> {
        if self.is_empty() {
            return None;
        }
        self.shard(handle).get_mut(&handle).map(|entry| f(&mut entry.value))
    }

    fn is_empty(&self) -> bool {
        self.live.load(Ordering::Acquire) == 0
    }
}

impl<T: Default> Table<T> {
    /// Runs `f` on the entry, made if it was not known.
    pub fn with_or_new<R>(&self, handle: usize, f: impl FnOnce(&mut T) -> R) -> R {
        let mut shard = self.shard(handle);
        let entry = shard.entry(handle).or_insert_with(|| {
            self.live.fetch_add(1, Ordering::AcqRel);
            Counted { references: 1, value: T::default() }
        });
        f(&mut entry.value)
    }
}

/// What a kernel will be able to reach.
#[derive(Debug, Clone, Default)]
pub struct Kernel {
    /// Its pointer arguments.
    pub arguments: BTreeMap<Uint, usize>,
    /// What the program named as reached indirectly, by `CL_KERNEL_EXEC_INFO_SVM_PTRS`.
    pub svm_pointers: Vec<usize>,
    /// The same, by `CL_KERNEL_EXEC_INFO_USM_PTRS_INTEL`.
    pub usm_pointers: Vec<usize>,
    /// It may reach every host, device, shared block of its context.
    pub indirect: Indirect,
    /// [`super::memory::Blocks::changes`] when the driver last heard of the blocks reached indirectly.
    pub told: Option<u64>,
    /// Its context; zero until asked for.
    pub context: usize,
}

/// Which blocks a kernel reaches without naming them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Indirect {
    /// Host USM.
    pub host: bool,
    /// Device USM.
    pub device: bool,
    /// Shared USM.
    pub shared: bool,
}

impl Indirect {
    /// Whether blocks of this kind are meant.
    pub fn has(self, kind: Kind) -> bool {
        match kind {
            Kind::Svm => false,
            Kind::Host => self.host,
            Kind::Device => self.device,
            Kind::Shared => self.shared,
        }
    }

    /// Whether any is.
    pub fn any(self) -> bool {
        self.host || self.device || self.shared
    }
}

/// What a launch uses.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// The blocks, each once, by address.
    pub blocks: Vec<Block>,
    /// Pointers that lie in no block known: memory of the system's allocator.
    pub foreign: Vec<usize>,
}

impl Kernel {
    /// What the pointers lead to that it was given.
    fn named(&self) -> WorkingSet {
        let pointers = self.arguments.values().chain(&self.svm_pointers).chain(&self.usm_pointers);
        let mut set = WorkingSet::default();
        for &pointer in pointers.filter(|p| **p != 0) {
            match BLOCKS.find(pointer) {
                Some(block) => set.blocks.push(block),
                None => set.foreign.push(pointer),
            }
        }
        set.tidy();
        set
    }

    /// All that a launch of it may touch.
    pub fn working_set(&self) -> WorkingSet {
        let mut set = self.named();
        if self.indirect.any() {
            set.blocks.extend(BLOCKS.of_context(self.context, |kind| self.indirect.has(kind)));
            set.tidy();
        }
        set
    }

    /// Bytes of that, and whether there are pointers to memory of the system's allocator. Does not look at each block
    /// that is reached indirectly.
    pub fn reach(&self) -> (u64, bool) {
        let set = self.named();
        let counted_below = |b: &&Block| b.context == self.context && self.indirect.has(b.kind);
        let named: u64 = set.blocks.iter().filter(|b| !counted_below(b)).map(|b| b.size as u64).sum();
        let kinds = BLOCKS.bytes_of_context(self.context, |kind| self.indirect.has(kind));
        (named + kinds, !set.foreign.is_empty())
    }
}

impl WorkingSet {
    fn tidy(&mut self) {
        self.blocks.sort_unstable_by_key(|b| b.base);
        self.blocks.dedup_by_key(|b| b.base);
        self.foreign.sort_unstable();
        self.foreign.dedup();
    }
}

/// Kernels.
pub static KERNELS: Table<Kernel> = Table::new();

/// Events of USM commands that the driver knows under another name: their `CL_EVENT_COMMAND_TYPE`.
pub static EVENTS: Table<Uint> = Table::new();

/// The live queues: handle → context and references.
static QUEUES: Mutex<BTreeMap<usize, (usize, usize)>> = Mutex::new(BTreeMap::new());

fn queues() -> MutexGuard<'static, BTreeMap<usize, (usize, usize)>> {
    QUEUES.lock().unwrap_or_else(|p| p.into_inner())
}

/// A queue was made.
pub fn queue_created(queue: usize, context: usize) {
    queues().insert(queue, (context, 1));
}

/// A queue got one reference more.
pub fn queue_retained(queue: usize) {
    if let Some((_, references)) = queues().get_mut(&queue) {
        *references += 1;
    }
}

/// A queue is about to lose a reference.
pub fn queue_released(queue: usize) {
    let mut queues = queues();
    if let Some((_, references)) = queues.get_mut(&queue) {
        *references -= 1;
        if *references == 0 {
            queues.remove(&queue);
        }
    }
}

/// The queues of `context` for which `retain` says that it holds them now.
pub fn queues_of(context: usize, retain: impl Fn(usize) -> bool) -> Vec<usize> {
    let queues = queues();
    queues.iter().filter(|(_, (of, _))| *of == context).map(|(q, _)| *q).filter(|q| retain(*q)).collect()
}
