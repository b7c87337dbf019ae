//! The space: notifiers, ranges, residency, GPU access, invalidation. No unsafe, no system calls.
//!
//! # Overview
//! A [`Space`] mirrors this process's address space for one device, with the bookkeeping of the kernel's drm_gpusvm:
//!
//! - [`notifier`]: aligned windows (512 MiB by default) with a sequence number, made with their first range and gone
//!   with their last; the protocol by which nothing old is committed.
//! - [`range`]: the unit of residency, an aligned block of one of the chunk sizes ([`chunk`]); found and inserted by
//!   [`Space::find_or_insert`], kept in one chunk tree (`tree`) for each notifier.
//! - [`invalidate`]: what happens to ranges when the process's mappings change, and the garbage collector.
//! - [`pages`]: what a range's pages are, and when that knowledge holds.
//! - [`timeslice`]: how long a range stays on the device.
//! - [`residency`]: where each page of a range is; [`mover`]: the moves between the places; [`svm`]: what serves device
//!   accesses, CPU faults and changes of the mappings with all of the above.
//! - [`ports`]: what the floors above do for the space.
//!
//! The upper floors attach their own state to each range: the `R` of `Space<R>`.
//!
//! # Locking
//! Outermost first: the space's update lock (read to find and to invalidate, write to insert and remove), a notifier's
//! lock (read to commit, write to invalidate), whatever the upper floors lock within a range. No lock is held while the
//! process is asked about its mappings or pages. What the kernel gets from the mmap lock, that a mapping cannot change
//! between looking it up and inserting a range for it, comes from the sequence numbers: the number is read before the
//! look-up and compared under the update lock at insertion; if an invalidation of the window came between, the mapping
//! is looked up again. Every change of the mappings is reported by [`Space::invalidate`] before the call that made it
//! returns to the application, so a range made from the mapping of before is either refused or already in the tree
//! when the report comes, and is flagged by it.
//!
//! # Differences from the kernel
//! Each can be switched off for replaying kernel traces with [`SpaceConfig::kernel_exact`].
//!
//! | drm_gpusvm | here |
//! |---|---|
//! | a fault at mm_start + mm_range, one past the end, is accepted | EINVAL |
//! | a chunk may reach over the limits | chunks lie inside the limits |
//! | pages that are still valid answer any caller | only one who asks for no more ([`pages`]) |
//!
//! Without a switch: the driver's lock is inside; removing a range twice does nothing; a range that was removed while
//! someone prepared a commit to it refuses that commit.
//!
//! # Limits
//! Pages are 4 KiB. Addresses end at 2^57. Ranges are never split or merged, as in the kernel.

pub mod chunk;
pub mod invalidate;
mod lookup;
pub mod mover;
pub mod notifier;
mod order;
pub mod pages;
pub mod ports;
mod primitive;
pub mod range;
pub mod residency;
mod served;
pub mod span_map;
pub mod svm;
pub mod timeslice;
mod tree;

#[cfg(test)]
mod commit_tests;
#[cfg(test)]
mod eviction_tests;
#[cfg(test)]
mod fake;
#[cfg(test)]
mod held_tests;
#[cfg(test)]
mod homeward_tests;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod reference_tests;
#[cfg(test)]
mod residency_fake;
#[cfg(test)]
mod residency_model_tests;
#[cfg(test)]
mod residency_thread_tests;

pub use chunk::Chunks;
pub use invalidate::{Event, EventKind, InvalidateInfo};
pub use notifier::{Commit, Notifier, RangeFlags, Stale, Ticket};
pub use range::Range;

use crate::ground::addr::{SZ_2M, SZ_4K, SZ_64K, Span, align_down};
use crate::ground::error::{Error, Result};
use chunk::{Levels, MAX_ADDRESS};
use crossbeam_utils::sync::{ShardedLock, ShardedLockReadGuard, ShardedLockWriteGuard};
use invalidate::Garbage;
use notifier::Clock;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tree::ChunkTree;

/// How a space is laid out (the arguments of drm_gpusvm_init).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpaceConfig {
    /// The addresses the device can mirror, page-aligned, ending at 2^57 at most.
    pub limits: Span,
    /// Bytes of a notifier: a power of two of at least 4 KiB.
    pub notifier_size: u64,
    /// Sizes of ranges in bytes: powers of two, descending, the last 4 KiB.
    pub chunk_sizes: Vec<u64>,
    /// Keep the kernel's oddities as well, see the module's chapter on differences. For replaying its traces.
    pub kernel_exact: bool,
}

impl Default for SpaceConfig {
    /// The user half of a 47-bit address space, 512 MiB notifiers, chunks of 2 MiB, 64 KiB and 4 KiB.
    fn default() -> Self {
        Self {
            limits: Span::new(0, 1 << 47),
            notifier_size: 512 << 20,
            chunk_sizes: vec![SZ_2M, SZ_64K, SZ_4K],
            kernel_exact: false,
        }
    }
}

/// What the caller of the space wants (struct drm_gpusvm_ctx). The default wants write access and system memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ctx {
    /// Reading is enough.
    pub read_only: bool,
    /// New ranges of anonymous memory may migrate ([`RangeFlags::MIGRATE_DEVMEM`]).
    pub devmem_possible: bool,
    /// System memory will not do: getting system pages is EFAULT.
    pub devmem_only: bool,
    /// Pages of one range may lie in several allocations, or partly in system memory.
    pub allow_mixed: bool,
    /// Chunks of up to so many bytes (4 KiB apart) become ranges only where every page is populated. Zero checks none.
    pub check_pages_threshold: u64,
    /// The least time on the device after migration; passed on, not used by the space itself.
    pub timeslice: Duration,
}

/// A notifier with its ranges.
struct Window<R> {
    notifier: Arc<Notifier>,
    tree: ChunkTree<Arc<Range<R>>>,
}

type Windows<R> = BTreeMap<u64, Window<R>>;

/// One device's mirror of this process (struct drm_gpusvm). Send and Sync when `R` is; all of it may be called from any
/// thread at once.
pub struct Space<R> {
    config: SpaceConfig,
    chunks: Chunks,
    levels: Levels,
    clock: Clock,
    /// The update lock and what it protects: windows by start address.
    windows: ShardedLock<Windows<R>>,
    ranges: AtomicUsize,
    garbage: Garbage<R>,
}

impl<R> Space<R> {
    /// An empty space. Mirrors drm_gpusvm_init, and checks what that leaves to the caller.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the field and what is wrong with it.
    pub fn new(config: SpaceConfig) -> Result<Self> {
        let wrong = |argument, reason: String| Err(Error::Invalid { argument, reason });
        let SpaceConfig { limits, notifier_size, .. } = config;
        if limits.is_empty() || limits.page_aligned() != limits || limits.end > MAX_ADDRESS {
            return wrong(
                "limits",
                format!("{limits} is empty, not page-aligned or ends above {MAX_ADDRESS:#x}"),
            );
        }
        if !notifier_size.is_power_of_two() || !(SZ_4K..=MAX_ADDRESS).contains(&notifier_size) {
            return wrong(
                "notifier_size",
                format!("{notifier_size:#x} is not a power of two from {SZ_4K:#x} to {MAX_ADDRESS:#x}"),
            );
        }
        let chunks = Chunks::new(&config.chunk_sizes)?;
        Ok(Self {
            levels: Levels::new(notifier_size, &chunks),
            chunks,
            config,
            clock: Clock::new(),
            windows: ShardedLock::new(BTreeMap::new()),
            ranges: AtomicUsize::new(0),
            garbage: Garbage::new(),
        })
    }

    /// How it is laid out.
    pub fn config(&self) -> &SpaceConfig {
        &self.config
    }

    /// The range that holds `addr`. Never waits for more than an insertion or removal.
    #[inline]
    pub fn find(&self, addr: u64) -> Option<Arc<Range<R>>> {
        let windows = self.windows();
        let window = windows.get(&align_down(addr, self.config.notifier_size))?;
        window.tree.find(&self.levels, addr).cloned()
    }

    /// The ranges that share an address with `span`, in ascending order, as they are now.
    pub fn ranges_in(&self, span: Span) -> Vec<Arc<Range<R>>> {
        let windows = self.windows();
        let mut found = Vec::new();
        for (start, window) in self.windows_in(&windows, span) {
            let _ = window.tree.visit(&self.levels, start, span, &mut |range| {
                found.push(range.clone());
                ControlFlow::<()>::Continue(())
            });
        }
        found
    }

    /// The range number `n` in ascending order. Takes time that grows with `n`: for tests and tools.
    pub fn nth(&self, n: usize) -> Option<Arc<Range<R>>> {
        let windows = self.windows();
        let mut left = n;
        for (start, window) in windows.iter() {
            let span = window.notifier.span();
            let found = window.tree.visit(&self.levels, *start, span, &mut |range| match left {
                0 => ControlFlow::Break(range.clone()),
                _ => {
                    left -= 1;
                    ControlFlow::Continue(())
                }
            });
            if let ControlFlow::Break(range) = found {
                return Some(range);
            }
        }
        None
    }

    /// Calls `f` with each of [`Space::ranges_in`] (drm_gpusvm_for_each_range). `f` runs with no lock held, so a range
    /// may have been removed meanwhile; [`Range::is_gone`] tells.
    pub fn for_each_range(&self, span: Span, f: impl FnMut(&Arc<Range<R>>)) {
        self.ranges_in(span).iter().for_each(f);
    }

    /// Whether any range shares an address with `span` (drm_gpusvm_has_mapping).
    pub fn has_mapping(&self, span: Span) -> bool {
        let windows = self.windows();
        self.windows_in(&windows, span).any(|(start, w)| {
            w.tree.visit(&self.levels, start, span, &mut |_| ControlFlow::Break(())).is_break()
        })
    }

    /// Takes `range` out of the space, and its notifier if it was the last (drm_gpusvm_range_remove). No commit to it
    /// can happen any more. Gives `false` if it was not in.
    pub fn remove(&self, range: &Arc<Range<R>>) -> bool {
        let mut windows = self.windows_mut();
        let start = align_down(range.start(), self.config.notifier_size);
        let Some(window) = windows.get_mut(&start) else { return false };
        if !window.tree.find(&self.levels, range.start()).is_some_and(|found| Arc::ptr_eq(found, range)) {
            return false;
        }
        self.retire(range);
        let removed = window.tree.remove(&self.levels, range.start());
        if window.tree.is_empty() {
            windows.remove(&start);
        }
        drop(windows);
        // The payload, if this was the last owner, goes without the lock.
        drop(removed);
        true
    }

    /// Takes every range out of the space and gives them, in ascending order (drm_gpusvm_fini).
    pub fn clear(&self) -> Vec<Arc<Range<R>>> {
        let mut windows = self.windows_mut();
        let mut all = Vec::with_capacity(self.range_count());
        for (start, window) in std::mem::take(&mut *windows) {
            let _ = window.tree.visit(&self.levels, start, window.notifier.span(), &mut |range| {
                self.retire(range);
                all.push(range.clone());
                ControlFlow::<()>::Continue(())
            });
        }
        drop(windows);
        self.garbage.clear();
        all
    }

    fn retire(&self, range: &Range<R>) {
        let _guard = range.notifier().lock_exclusive();
        range.state.retire();
        self.ranges.fetch_sub(1, Ordering::Relaxed);
    }

    /// Ranges in the space.
    pub fn range_count(&self) -> usize {
        self.ranges.load(Ordering::Relaxed)
    }

    /// Notifiers in the space.
    pub fn notifier_count(&self) -> usize {
        self.windows().len()
    }

    /// The notifiers' windows, in ascending order.
    pub fn notifiers(&self) -> Vec<Arc<Notifier>> {
        self.windows().values().map(|w| w.notifier.clone()).collect()
    }

    /// Checks everything that must always hold, for tests: windows are aligned and not empty, ranges lie where their
    /// trees keep them, inside their notifier, disjoint and not removed, and the counts are right.
    ///
    /// # Errors
    /// What does not hold.
    pub fn validate(&self) -> std::result::Result<(), String> {
        let windows = self.windows();
        let mut count = 0;
        for (&start, window) in windows.iter() {
            let span = Span::around(start, self.config.notifier_size);
            if span.start != start || window.notifier.span() != span || window.tree.is_empty() {
                return Err(format!("notifier {:?} is kept at {start:#x} or has no range", window.notifier));
            }
            count += window.tree.validate(&self.levels, start, &|r| r.span())?;
            let mut end = start;
            let bad = window.tree.visit(&self.levels, start, span, &mut |range| {
                let ok = range.start() >= end
                    && self.chunks.sizes().contains(&range.size())
                    && !range.flags().contains(RangeFlags::REMOVED)
                    && std::ptr::eq(range.notifier(), &*window.notifier);
                end = range.span().end;
                if ok { ControlFlow::Continue(()) } else { ControlFlow::Break(range.span()) }
            });
            if let ControlFlow::Break(span) = bad {
                return Err(format!("the range {span} overlaps, was removed or has another notifier"));
            }
        }
        match self.range_count() == count {
            true => Ok(()),
            false => Err(format!("{count} ranges, counted as {}", self.range_count())),
        }
    }

    fn kernel_exact(&self) -> bool {
        self.config.kernel_exact
    }

    fn windows(&self) -> ShardedLockReadGuard<'_, Windows<R>> {
        self.windows.read().unwrap_or_else(|poison| poison.into_inner())
    }

    fn windows_mut(&self) -> ShardedLockWriteGuard<'_, Windows<R>> {
        self.windows.write().unwrap_or_else(|poison| poison.into_inner())
    }

    /// The windows that share an address with `span`, ascending.
    fn windows_in<'a>(
        &self,
        windows: &'a Windows<R>,
        span: Span,
    ) -> impl Iterator<Item = (u64, &'a Window<R>)> + use<'a, R> {
        let first = align_down(span.start, self.config.notifier_size);
        windows.range(first..span.end.max(first)).map(|(&start, window)| (start, window))
    }
}

impl<R> fmt::Debug for Space<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space")
            .field("config", &self.config)
            .field("notifiers", &self.notifier_count())
            .field("ranges", &self.range_count())
            .field("garbage", &self.garbage_len())
            .finish()
    }
}

/// Locks, also after a panic elsewhere: what these mutexes protect is never left half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}
