//! What was allocated: SVM and USM blocks of this process, by address.
//!
//! # Overview
//! A launch's arguments are pointers, often into the middle of a block; what the launch may touch is the whole block. The
//! map answers which block an address lies in.
//!
//! # Locking
//! One read-write lock, held for the look-up only, never over a call into the driver.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::types::{Bitfield, MEM_TYPE_DEVICE, MEM_TYPE_HOST, MEM_TYPE_SHARED, MEM_TYPE_UNKNOWN, Uint};

/// Who asked for a block, and in which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `clSVMAlloc`.
    Svm,
    /// `clHostMemAllocINTEL`.
    Host,
    /// `clDeviceMemAllocINTEL`.
    Device,
    /// `clSharedMemAllocINTEL`.
    Shared,
}

impl Kind {
    /// The answer to `CL_MEM_ALLOC_TYPE_INTEL`.
    pub fn usm_type(self) -> Uint {
        match self {
            Kind::Svm => MEM_TYPE_UNKNOWN,
            Kind::Host => MEM_TYPE_HOST,
            Kind::Device => MEM_TYPE_DEVICE,
            Kind::Shared => MEM_TYPE_SHARED,
        }
    }
}

/// One block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// First address.
    pub base: usize,
    /// Bytes.
    pub size: usize,
    /// How it was allocated.
    pub kind: Kind,
    /// The context it belongs to.
    pub context: usize,
    /// The device it was allocated for, or zero.
    pub device: usize,
    /// The flags that the program asked for.
    pub flags: Bitfield,
}

/// The blocks of this process.
pub struct Blocks {
    books: RwLock<Books>,
    changes: AtomicU64,
}

struct Books {
    blocks: BTreeMap<usize, Block>,
    /// Bytes of each kind in each context: what a kernel reaches that may reach a whole kind.
    bytes: BTreeMap<(usize, Kind), u64>,
}

/// All of them.
pub static BLOCKS: Blocks = Blocks::new();

impl Blocks {
    const fn new() -> Self {
        let books = Books { blocks: BTreeMap::new(), bytes: BTreeMap::new() };
        Self { books: RwLock::new(books), changes: AtomicU64::new(0) }
    }

    fn read(&self) -> RwLockReadGuard<'_, Books> {
        self.books.read().unwrap_or_else(|p| p.into_inner())
    }

    fn write(&self) -> RwLockWriteGuard<'_, Books> {
        self.books.write().unwrap_or_else(|p| p.into_inner())
    }

    /// Adds a block. One that was there at the same address is gone without our having been told.
    pub fn insert(&self, block: Block) {
        let mut books = self.write();
        books.take(block.base);
        *books.bytes.entry((block.context, block.kind)).or_default() += block.size as u64;
        books.blocks.insert(block.base, block);
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Takes the block that begins at `base` out, if it is one of those that `wanted` accepts.
    pub fn remove(&self, base: usize, wanted: impl FnOnce(&Block) -> bool) -> Option<Block> {
        let mut books = self.write();
        if !books.blocks.get(&base).is_some_and(wanted) {
            return None;
        }
        self.changes.fetch_add(1, Ordering::Release);
        books.take(base)
    }

    /// Forgets the blocks of a context that is gone: nobody can free them any more.
    pub fn forget_context(&self, context: usize) {
        let mut books = self.write();
        let mut of_it = books.bytes.range((context, Kind::Svm)..=(context, Kind::Shared));
        if of_it.next().is_none() {
            return;
        }
        books.blocks.retain(|_, block| block.context != context);
        books.bytes.retain(|(of, _), _| *of != context);
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// The block that `addr` lies in.
    pub fn find(&self, addr: usize) -> Option<Block> {
        let books = self.read();
        let (_, block) = books.blocks.range(..=addr).next_back()?;
        (addr - block.base < block.size).then_some(*block)
    }

    /// The blocks of `context` whose kind `wanted` accepts.
    pub fn of_context(&self, context: usize, wanted: impl Fn(Kind) -> bool) -> Vec<Block> {
        let books = self.read();
        books.blocks.values().filter(|b| b.context == context && wanted(b.kind)).copied().collect()
    }

    /// Bytes of the blocks of `context` whose kind `wanted` accepts.
    pub fn bytes_of_context(&self, context: usize, wanted: impl Fn(Kind) -> bool) -> u64 {
        let books = self.read();
        let kinds = books.bytes.range((context, Kind::Svm)..=(context, Kind::Shared));
        kinds.filter(|((_, kind), _)| wanted(*kind)).map(|(_, bytes)| bytes).sum()
    }

    /// Grows whenever a block comes or goes.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }
}

impl Books {
    fn take(&mut self, base: usize) -> Option<Block> {
        let block = self.blocks.remove(&base)?;
        let key = (block.context, block.kind);
        if let Some(bytes) = self.bytes.get_mut(&key) {
            *bytes -= block.size as u64;
            if *bytes == 0 {
                self.bytes.remove(&key);
            }
        }
        Some(block)
    }
}
