//! Find or insert: from an address to its range.
//!
//! # Overview
//! [`Space::find_or_insert`] is drm_gpusvm_range_find_or_insert: limits, mapping, permission, existing range, chunk
//! choice, in that order. The chunk is the largest that lies in the mapping, the notifier and the given GPU VA, overlaps
//! no range, and, up to the check-pages threshold, is populated.
//!
//! # Locking
//! A range that exists is found under the update lock for read, and a chunk is chosen under it, while no lock is held when
//! pages are checked. Insertion takes the lock for write and chooses again, so that whatever changed meanwhile is seen (see
//! [`super`], Locking).

use super::chunk::Candidate;
use super::notifier::{Notifier, RangeFlags};
use super::ports::{AddressSpace, Vma, VmaKind};
use super::range::Range;
use super::tree::ChunkTree;
use super::{Ctx, Space, Window, Windows};
use crate::ground::addr::{SZ_4K, Span, align_down};
use crate::ground::error::{Errno, Error, Result};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// How often a mapping is looked up again because it may have changed, before [`Error::Again`].
const MAX_RACES: u32 = 64;

/// What is asked for: the same for every try of one call.
struct Request<'a> {
    addr: u64,
    gpuva: Span,
    ctx: &'a Ctx,
}

/// What an insertion comes to.
enum Step<R> {
    /// The range is in, now or already.
    Done(Arc<Range<R>>),
    /// An invalidation came since the mapping was looked up.
    Changed,
    /// This chunk may be taken if its pages are populated.
    Check(Candidate),
    /// This chunk, of this level in the tree, is to be taken.
    Take(Candidate, usize),
}

/// Which chunks are out of the question by now, and which was found populated.
#[derive(Clone, Copy)]
struct Progress {
    from: usize,
    checked: Option<usize>,
}

impl<R: Default> Space<R> {
    /// Finds the range that holds `addr`, or makes one of the largest chunk that fits there and lies inside `gpuva`.
    /// Mirrors drm_gpusvm_range_find_or_insert; safe from any thread, asks `aspace` with no lock held.
    ///
    /// A range that was unmapped and still waits for the garbage collector is found as well, as in the kernel: collect
    /// garbage first.
    ///
    /// # Errors
    /// In this order: [`Error::OutsideSpace`] (EINVAL) outside the limits; what `aspace` gives; [`Error::NoVma`]
    /// (ENOENT); [`Error::NotWritable`] (EPERM); EIO for the kernel's own mappings (vvar, device registers);
    /// [`Error::OutsideSpace`] if no chunk fits; [`Error::Again`] if the mappings changed at every one of 64 tries.
    /// No notifier is left behind.
    pub fn find_or_insert(
        &self,
        aspace: &(impl AddressSpace + ?Sized),
        addr: u64,
        gpuva: Span,
        ctx: &Ctx,
    ) -> Result<Arc<Range<R>>> {
        let limits = self.config.limits;
        if !(limits.contains(addr) || self.kernel_exact() && addr == limits.end) {
            return Err(Error::OutsideSpace { addr });
        }
        let request = Request { addr, gpuva, ctx };
        for _ in 0..MAX_RACES {
            let before = self.clock.now();
            let vma = usable_vma(aspace, addr, ctx)?;
            if let Some(range) = self.find(addr) {
                return Ok(range);
            }
            if let Some(range) = self.insert(aspace, &request, &vma, before)? {
                return Ok(range);
            }
        }
        Err(Error::Again { what: "finding memory for the device", tries: MAX_RACES })
    }

    /// Inserts a range; `None` if the mapping may have changed since the clock stood at `before`.
    #[cold]
    fn insert(
        &self,
        aspace: &(impl AddressSpace + ?Sized),
        request: &Request<'_>,
        vma: &Vma,
        before: u64,
    ) -> Result<Option<Arc<Range<R>>>> {
        let mut progress = Progress { from: 0, checked: None };
        loop {
            // Chunks are passed over with the lock held for read, which keeps nobody out.
            let step = self.next(&self.windows(), request, vma, before, progress)?;
            let step = match step {
                Step::Take(..) => self.link(request, vma, before, progress)?,
                step => step,
            };
            match step {
                Step::Done(range) => return Ok(Some(range)),
                Step::Changed => return Ok(None),
                Step::Check(chunk) if aspace.populated(chunk.span) => progress.checked = Some(chunk.index),
                Step::Check(chunk) => progress.from = chunk.index + 1,
                Step::Take(..) => unreachable!("linking takes it"),
            }
        }
    }

    /// What to do, as the tree is now: the largest chunk of those from the `from`th on is to be taken; one that needs its
    /// pages checked only if it is the one that was `checked`.
    fn next(
        &self,
        windows: &Windows<R>,
        request: &Request<'_>,
        vma: &Vma,
        before: u64,
        progress: Progress,
    ) -> Result<Step<R>> {
        let addr = request.addr;
        let window = windows.get(&align_down(addr, self.config.notifier_size));
        if window.map_or_else(|| self.clock.now(), |w| w.notifier.seq()) > before {
            return Ok(Step::Changed);
        }
        if let Some(range) = window.and_then(|w| w.tree.find(&self.levels, addr)) {
            return Ok(Step::Done(range.clone()));
        }
        let Some((chunk, level)) = self.choose(request, vma, window, progress.from) else {
            return Err(Error::OutsideSpace { addr });
        };
        let size = chunk.span.len();
        let unchecked = progress.checked != Some(chunk.index);
        if size != SZ_4K && size <= request.ctx.check_pages_threshold && unchecked {
            return Ok(Step::Check(chunk));
        }
        Ok(Step::Take(chunk, level))
    }

    /// Under the update lock: asks again what to do, and does it if a chunk is to be taken.
    fn link(&self, request: &Request<'_>, vma: &Vma, before: u64, progress: Progress) -> Result<Step<R>> {
        let addr = request.addr;
        let mut windows = self.windows_mut();
        let (chunk, level) = match self.next(&windows, request, vma, before, progress)? {
            Step::Take(chunk, level) => (chunk, level),
            step => return Ok(step),
        };
        let window = windows.entry(align_down(addr, self.config.notifier_size)).or_insert_with(|| Window {
            notifier: Arc::new(Notifier::new(self.window_of(addr), self.clock.now())),
            tree: ChunkTree::new(),
        });
        let mut flags = RangeFlags::empty();
        flags.set(RangeFlags::MIGRATE_DEVMEM, request.ctx.devmem_possible && vma.migratable());
        let range = Arc::new(Range::new(chunk.span, window.notifier.clone(), flags, R::default()));
        match window.tree.insert(&self.levels, addr, level, range.clone()) {
            Ok(()) => {
                self.ranges.fetch_add(1, Ordering::Relaxed);
                Ok(Step::Done(range))
            }
            Err(_) => unreachable!("the chunk was chosen to be free"),
        }
    }

    /// The largest chunk from the `from`th on that fits and is free, with its level in the tree
    /// (drm_gpusvm_range_chunk_size, without its look at the pages).
    fn choose(
        &self,
        request: &Request<'_>,
        vma: &Vma,
        window: Option<&Window<R>>,
        from: usize,
    ) -> Option<(Candidate, usize)> {
        let addr = request.addr;
        let limits = if self.kernel_exact() { Span::new(0, u64::MAX) } else { self.config.limits };
        let bounds = [vma.span, self.window_of(addr), request.gpuva, limits];
        let mut fitting = self.chunks.fitting(addr, &bounds, from);
        fitting.find_map(|chunk| {
            let level = self.levels.of_size(chunk.span.len())?;
            let free = !window.is_some_and(|w| w.tree.overlaps(&self.levels, addr, level));
            free.then_some((chunk, level))
        })
    }

    fn window_of(&self, addr: u64) -> Span {
        Span::around(addr, self.config.notifier_size)
    }
}

/// The mapping at `addr`, if the device may use it as `ctx` asks.
fn usable_vma(aspace: &(impl AddressSpace + ?Sized), addr: u64, ctx: &Ctx) -> Result<Vma> {
    let vma = aspace.find_vma(addr)?.filter(|vma| vma.span.contains(addr));
    let vma = vma.ok_or(Error::NoVma { addr })?;
    if !ctx.read_only && !vma.write {
        return Err(Error::NotWritable { addr });
    }
    if vma.kind == VmaKind::Special {
        return Err(Error::os("mapping the kernel's own pages for a device", Errno(libc::EIO)));
    }
    Ok(vma)
}
