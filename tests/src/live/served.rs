//! What usvm is asked during a live run, and how its state is looked at.
//!
//! # Overview
//! All of it runs on a service thread of the runtime: the arena is the program's memory, which usvm may have taken away.
//!
//! # Safety
//! Device memory is read by having the device download into a mapping of this module's own, which is not tracked.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use usvm::device::sim::{Profile, SimConfig, SimDevice};
use usvm::ground::addr::{PageMask, SZ_2M, SZ_4K, SZ_64K, Span};
use usvm::host::Options;
use usvm::observe::stats::Cause;
use usvm::space::mover::Range;
use usvm::space::ports::{Device, HostMemory, Placement, Shadow};
use usvm::space::svm::{Svm, Want};
use usvm::space::{Ctx, Space};
use usvm::{Builder, Config, GpuAccess, Location, Runtime};

use super::side::{Page, WORDS, pattern};

/// Where usvm has a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// With the application.
    Host,
    /// In device memory only.
    Device,
    /// On its way: nothing may be between two operations.
    Astray,
}

/// A range of usvm's and how many of its pages are on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Its addresses.
    pub span: Span,
    /// Its pages in device memory.
    pub device: usize,
}

/// usvm's state between two operations.
#[derive(Debug, Clone, Default)]
pub struct Look {
    /// Where each page of the arena is.
    pub places: Vec<Place>,
    /// usvm's ranges.
    pub held: Vec<Held>,
    /// Bytes of the largest free piece of device memory.
    pub free: u64,
}

/// Device memory of a space that the trace does not limit.
const VRAM: u64 = 64 << 20;

/// The runtime of one `create`.
#[derive(Debug)]
pub struct Served {
    runtime: Runtime,
    arena: Span,
    scratch: u64,
}

/// How a live run is set up.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The policy's name.
    pub policy: String,
    /// This machine is for nothing else: its settings may be changed.
    pub own_machine: bool,
    /// Operations of a trace at most.
    pub operations: usize,
    /// What to break after which operation.
    pub sabotage: Option<(usize, Sabotage)>,
}

impl Default for Setup {
    /// The kernel's policy, on a machine that others use, too.
    fn default() -> Self {
        Self { policy: "gpusvm".into(), own_machine: false, operations: usize::MAX, sabotage: None }
    }
}

/// What a test of the comparer breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// A byte of device memory.
    Byte,
    /// Where a range is.
    Place,
}

/// Chunk sizes that usvm can move.
fn movable(sizes: &[u64]) -> Vec<u64> {
    let known = |size: &u64| [SZ_2M, SZ_64K, SZ_4K].contains(size);
    sizes.iter().copied().filter(known).collect()
}

impl Served {
    /// Starts usvm for a space of the trace.
    pub fn start(
        setup: &Setup,
        arena: Span,
        notifier: u64,
        chunks: &[u64],
        vram: u64,
    ) -> Result<Self, String> {
        let mut config = Config::default();
        config.policy.clone_from(&setup.policy);
        config.notifier_size = notifier;
        config.chunk_sizes = movable(chunks);
        let vram = if vram == 0 { VRAM } else { vram };
        let device = SimConfig { recoverable_faults: true, ..SimConfig::of(Profile::GENERIC, vram) };
        let options = Options { prepared: 1, ..Options::default() };
        let runtime = Builder::new(config).host(options).device(device).start().map_err(|e| e.to_string())?;
        Ok(Self { runtime, arena, scratch: scratch() })
    }

    fn on<T: Send + Sync + 'static>(
        &self,
        f: impl FnOnce(&Svm) -> usvm::Result<T> + Send + 'static,
    ) -> usvm::Result<T> {
        self.runtime.on_service_thread(f)
    }

    fn device(&self) -> Arc<SimDevice> {
        self.runtime.device(0).expect("it was started with one").clone()
    }

    /// Waits until usvm has done all that the last operation asked of it.
    pub fn settle(&self) -> usvm::Result<()> {
        self.on(settle)
    }

    /// Where everything is, when usvm has done all that the last operation asked of it.
    pub fn look(&self) -> usvm::Result<Look> {
        let arena = self.arena;
        let device = self.device();
        self.on(move |svm| {
            settle(svm)?;
            let mut places = vec![Place::Host; arena.pages()];
            let mut held = Vec::new();
            for range in svm.space.ranges_in(arena) {
                let span = range.span();
                let state = range.data.lock();
                held.push(Held { span, device: state.moved.as_ref().map_or(0, |m| m.vram.count()) });
                let Some(moved) = &state.moved else { continue };
                for (mask, place) in [(&moved.vram, Place::Device), (&moved.strayed, Place::Astray)] {
                    for (first, count) in mask.runs() {
                        let at = arena.page_index(span.start) + first;
                        places[at..at + count].fill(place);
                    }
                }
            }
            Ok(Look { places, held, free: device.vram_largest_free() })
        })
    }

    /// Makes the ranges of `span`, as far as there are none.
    pub fn insert(&self, span: Span) -> usvm::Result<()> {
        let runtime = self.runtime.clone();
        self.on(move |svm| {
            let ctx = Ctx { read_only: true, devmem_possible: true, ..Ctx::default() };
            forget(svm, span, |range| !span.covers(range))?;
            let mut at = span.start;
            while at < span.end {
                at = Space::find_or_insert(&svm.space, runtime.host(), at, span, &ctx)?.span().end;
            }
            Ok(())
        })
    }

    /// Brings the ranges of `span` home and forgets them.
    pub fn remove(&self, span: Span) -> usvm::Result<()> {
        self.on(move |svm| forget(svm, span, |_| true))
    }

    /// Whether any of `span` is under userfaultfd.
    pub fn has_registered(&self, span: Span) -> bool {
        self.runtime.host().registered_spans().iter().any(|s| s.overlaps(span))
    }

    /// Takes `span`, all home, from under userfaultfd.
    pub fn let_go(&self, span: Span) -> usvm::Result<()> {
        let runtime = self.runtime.clone();
        self.on(move |_| {
            for start in (span.start..span.end).step_by(SZ_2M as usize) {
                runtime.host().let_go(Span::new(start, span.end.min(start + SZ_2M)));
            }
            Ok(())
        })
    }

    /// Brings `span` home.
    pub fn evict(&self, span: Span) -> usvm::Result<()> {
        self.runtime.evict(span.start, span.len())
    }

    /// Has the ranges of `span` go to the device: by a prefetch, or by a load of a kernel at `at` that faults.
    pub fn migrate(&self, span: Span, at: u64, by_fault: bool) -> usvm::Result<()> {
        if !by_fault {
            return self.runtime.prefetch(span.start, span.len(), Location::Device(0)).wait(None).map(drop);
        }
        let device = self.device();
        self.on(move |svm| {
            for range in svm.space.ranges_in(span) {
                range.unmap_pages();
                device.unbind(range.span());
            }
            Ok(())
        })?;
        let seen = Arc::new(AtomicU64::new(0));
        let kernel = move |gpu: &mut usvm::device::sim::Gpu<'_>| {
            seen.store(gpu.load_u64(at)?, Ordering::Relaxed);
            Ok(())
        };
        self.runtime.launch(0, kernel).wait(None).map(drop)
    }

    /// Maps `span` for the device where it is, and does `f` with it held there.
    fn held<T>(&self, span: Span, access: GpuAccess, f: impl FnOnce() -> usvm::Result<T>) -> usvm::Result<T> {
        let want = Want { cause: Cause::User, force: Some(Placement::Remote), ..Want::fault(access) };
        let pinned = self.on(move |svm| svm.gpu_access(0, span.start, span.len(), want))?;
        let done = f();
        self.on(move |svm| {
            svm.release(0, &pinned);
            Ok(())
        })?;
        done
    }

    /// Maps `span` for the device where it is.
    pub fn map(&self, span: Span, access: GpuAccess) -> usvm::Result<()> {
        self.held(span, access, || Ok(()))
    }

    /// A kernel stores `pattern(value + i)` in page `i` of `span`.
    pub fn store(&self, span: Span, value: u64) -> usvm::Result<()> {
        self.held(span, GpuAccess::Write, || {
            let kernel = move |gpu: &mut usvm::device::sim::Gpu<'_>| {
                for i in 0..span.pages() as u64 {
                    gpu.write(span.start + i * SZ_4K, &bytes_of(&pattern(value + i)))?;
                }
                Ok(())
            };
            self.runtime.launch(0, kernel).wait(None).map(drop)
        })
    }

    /// A kernel sums the first words of the pages of `span`.
    pub fn load(&self, span: Span) -> usvm::Result<u64> {
        let sum = Arc::new(AtomicU64::new(0));
        let total = sum.clone();
        self.held(span, GpuAccess::Read, || {
            let kernel = move |gpu: &mut usvm::device::sim::Gpu<'_>| {
                for page in (span.start..span.end).step_by(SZ_4K as usize) {
                    total.fetch_add(gpu.load_u64(page)?, Ordering::Relaxed);
                }
                Ok(())
            };
            self.runtime.launch(0, kernel).wait(None).map(drop)
        })?;
        Ok(sum.load(Ordering::Relaxed))
    }

    /// A thread that has `span` go to the device again and again, `rounds` times.
    pub fn hammer(&self, span: Span, rounds: u64) -> std::thread::JoinHandle<usvm::Result<()>> {
        let runtime = self.runtime.clone();
        std::thread::spawn(move || {
            for _ in 0..rounds {
                runtime.prefetch(span.start, span.len(), Location::Device(0)).wait(None)?;
            }
            Ok(())
        })
    }

    /// What device memory holds for `pages`, which are there.
    pub fn device_pages(&self, pages: Vec<u64>) -> usvm::Result<Vec<Page>> {
        let (device, scratch) = (self.device(), self.scratch);
        self.on(move |svm| {
            let mut found = Vec::with_capacity(pages.len());
            let mut range: Option<Arc<Range>> = None;
            for page in pages {
                if !range.as_ref().is_some_and(|r| r.span().contains(page)) {
                    range = svm.space.find(page);
                }
                found.push(device_page(range.as_deref(), &device, page, scratch)?);
            }
            Ok(found)
        })
    }

    /// Which pages of `span` are present on the host.
    pub fn present(&self, span: Span) -> Vec<bool> {
        let mut all = Vec::with_capacity(span.pages());
        for start in (span.start..span.end).step_by(SZ_2M as usize) {
            let part = Span::new(start, span.end.min(start + SZ_2M));
            let mask = self.runtime.host().present(part);
            all.extend((0..part.pages()).map(|page| mask.get(page)));
        }
        all
    }

    /// Changes one byte of device memory behind usvm's back: what a test of the comparer does.
    pub fn flip_a_byte(&self) -> usvm::Result<bool> {
        let (device, scratch, arena) = (self.device(), self.scratch, self.arena);
        self.on(move |svm| {
            for range in svm.space.ranges_in(arena) {
                let state = range.data.lock();
                let Some(moved) = &state.moved else { continue };
                let Some(((page, _), bo)) = moved.vram.runs().next().zip(moved.bo.as_ref()) else { continue };
                let at = page as u64 * SZ_4K;
                let window = Shadow { span: Span::sized(scratch, SZ_2M) };
                device.download(bo, &window, at, SZ_4K)?;
                // SAFETY: the scratch mapping has room for 2 MiB, and only this thread uses it now.
                unsafe { *((scratch + at) as *mut u8).add(1234) ^= 1 };
                device.upload(bo, &window, at, SZ_4K)?;
                return Ok(true);
            }
            Ok(false)
        })
    }

    /// Ends usvm; everything comes home.
    pub fn end(self) {
        self.runtime.shutdown();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // SAFETY: the scratch mapping is this value's own.
        unsafe { libc::munmap(self.scratch as *mut _, SZ_2M as usize) };
    }
}

/// Has everything read and done that the kernel has reported by now.
fn settle(svm: &Svm) -> usvm::Result<()> {
    svm.barrier();
    for _ in 0..1000 {
        if svm.settle_landings() && svm.collect_garbage().is_ok() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_micros(100));
        svm.barrier();
    }
    svm.collect_garbage()
}

/// Brings the ranges of `span` that `which` names home and forgets them.
fn forget(svm: &Svm, span: Span, which: impl Fn(Span) -> bool) -> usvm::Result<()> {
    for range in svm.space.ranges_in(span).into_iter().filter(|range| which(range.span())) {
        svm.bring_home(range.span(), Cause::User)?;
        svm.mover.dissolve(&range, &mut range.data.lock());
        svm.space.remove(&range);
    }
    Ok(())
}

/// 2 MiB to download into.
fn scratch() -> u64 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), SZ_2M as usize, protection, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    at as u64
}

fn device_page(range: Option<&Range>, device: &SimDevice, page: u64, scratch: u64) -> usvm::Result<Page> {
    let gone = usvm::Error::Gone { addr: page };
    let Some(range) = range else { return Err(gone) };
    let state = range.data.lock();
    let Some(moved) = &state.moved else { return Err(gone) };
    let index = range.span().page_index(page);
    let (true, Some(bo)) = (moved.vram.and(&PageMask::first(range.span().pages())).get(index), &moved.bo)
    else {
        return Err(gone);
    };
    let at = index as u64 * SZ_4K;
    device.download(bo, &Shadow { span: Span::sized(scratch, SZ_2M) }, at, SZ_4K)?;
    let mut copy = [0; WORDS];
    // SAFETY: the scratch mapping has room for 2 MiB, `at` is inside, and only this thread uses it now.
    unsafe { std::ptr::copy_nonoverlapping((scratch + at) as *const u64, copy.as_mut_ptr(), WORDS) };
    Ok(copy)
}

fn bytes_of(page: &Page) -> [u8; SZ_4K as usize] {
    let mut bytes = [0; SZ_4K as usize];
    for (to, word) in bytes.chunks_exact_mut(8).zip(page) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}
