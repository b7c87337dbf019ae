//! The embedded device: device memory, a page table, engines and faults, without hardware.
//!
//! # Overview
//! [`SimDevice`] is the device that usvm has when the machine has none, and the one that tests and policy
//! comparisons run on. Its memory is a memfd; its kernels are Rust closures that reach memory only through
//! its page table, by a [`Gpu`]; it faults as real devices do, recoverably or not.
//!
//! | room | what it does |
//! |---|---|
//! | `page_table` | four levels, entries of 4K, 64K and 2M |
//! | `tlb` | each engine's cached translations |
//! | `vram` | the memory, and the part of it that callers reach |
//! | `system` | the process's own pages, over the "link" |
//! | `shared` | what callers and engines share; the rule that makes an unbind final |
//! | `engine`, `inbox` | queues and threads |
//! | `gpu` | what a kernel sees |
//! | `profile` | modelled time |
//!
//! **Placement.** Device memory for data is taken anywhere: the CPU-visible part first, because copies to and
//! from it need no engine, and what is beyond when that is full. The device's own page tables take no device
//! memory.
//!
//! **Three engines.** Compute and copy run their users' jobs and may fault. With a small BAR a third one
//! copies what callers cannot reach. It is reserved for that, as xe reserves a copy engine for migration: a
//! job in the copy queue may be waiting for the very fault that this copy serves.
//!
//! # Locking
//! Submitting work, waiting for fences, [`SimDevice::lose`], statistics: lock-free, for any thread.
//! Everything in [`ports::Device`](crate::space::ports::Device) takes short internal locks and waits for
//! engines, each at most for one translation's worth of copying: for service threads, whose stacks never
//! migrate. Jobs are boxed and engines read them: an application thread must have its allocations routed to
//! usvm's own memory when it submits.
//!
//! # Limits
//! One address space. Kernels run one at a time in each queue. The link has no atomics. A forked child must
//! not use its parent's device: submitting answers ESHUTDOWN there and dropping does nothing.

mod engine;
mod gpu;
mod inbox;
mod page_table;
mod profile;
mod shared;
mod system;
#[cfg(test)]
mod tests;
mod tlb;
mod vram;

pub use gpu::Gpu;
pub use profile::{Modelled, Profile};

use self::engine::{Engine, Kind, Work};
use self::shared::Shared;
use self::vram::{HostPiece, Window};
use crate::ground::addr::{SZ_2M, SZ_4K, Span};
use crate::ground::error::{Error, Result};
use crate::ground::sync::Fence;
use crate::space::ports::{Backing, Bo, Device, DeviceInfo, FaultSink, GpuAccess, Shadow};
use crate::vram::buddy::{Buddy, Choose};
use crate::vram::copy::Copier;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Chooses for this process how bytes are copied between host and simulated devices, and by how many helper threads
/// (`None`: what suits the machine). Before the first device; the first choice stays.
pub fn choose_copies(copier: Copier, helpers: Option<usize>) {
    vram::choose_copies(copier, helpers);
}

/// What device to simulate.
#[derive(Debug, Clone, PartialEq)]
pub struct SimConfig {
    /// The device whose costs are modelled.
    pub profile: Profile,
    /// Bytes of device memory: a multiple of 4 KiB.
    pub vram_bytes: u64,
    /// Bytes of it that the CPU reaches, a multiple of 4 KiB; `None` for all (resizable BAR).
    pub cpu_visible_bytes: Option<u64>,
    /// Whether an access without a mapping waits for one, or ends the job.
    pub recoverable_faults: bool,
    /// Whether all memory is populated at the start, so that no later copy pays for fresh pages.
    pub prefault: bool,
    /// How far beyond a 2 MiB boundary the CPU sees device memory: a multiple of 4 KiB. With 0 the kernel may map huge
    /// pages. An emulated CPU whose TLB has one place for each page number wants another number than its copies' other
    /// side has, or every word misses the TLB twice.
    pub cpu_offset: u64,
}

impl Default for SimConfig {
    /// 256 MiB of the generic profile, all visible, recoverable faults, not prefaulted.
    fn default() -> Self {
        Self::of(Profile::GENERIC, 256 << 20)
    }
}

impl SimConfig {
    /// `vram_bytes` of `profile`, all visible, with faults as the real device has them, not prefaulted.
    pub fn of(profile: Profile, vram_bytes: u64) -> Self {
        let recoverable_faults = profile.recoverable_faults;
        Self {
            profile,
            vram_bytes,
            cpu_visible_bytes: None,
            recoverable_faults,
            prefault: false,
            cpu_offset: 0,
        }
    }

    /// Whether there can be such a device.
    ///
    /// # Errors
    /// They name the field and what to set it to.
    pub fn validate(&self) -> Result<()> {
        let invalid = |argument, reason| Err(Error::Invalid { argument, reason });
        if self.vram_bytes == 0 {
            return invalid("vram_bytes", "a device needs memory: set 4 KiB or more".into());
        }
        let odd = |bytes: u64| !bytes.is_multiple_of(SZ_4K);
        let rounded = |bytes: u64| bytes / SZ_4K * SZ_4K;
        if odd(self.vram_bytes) {
            let fix = rounded(self.vram_bytes).max(SZ_4K);
            return invalid("vram_bytes", format!("{} is no multiple of 4096: set {fix}", self.vram_bytes));
        }
        if self.vram_bytes > page_table::VA_END {
            return invalid(
                "vram_bytes",
                format!("more than the 48-bit space: set {} or less", page_table::VA_END),
            );
        }
        if odd(self.cpu_offset) || self.cpu_offset >= SZ_2M {
            let fix = rounded(self.cpu_offset % SZ_2M);
            return invalid("cpu_offset", format!("{} is no page of 2 MiB: set {fix}", self.cpu_offset));
        }
        match self.cpu_visible_bytes {
            Some(v) if v > self.vram_bytes => {
                let fix = self.vram_bytes;
                invalid("cpu_visible_bytes", format!("{v} is more than the device has: set {fix} or less"))
            }
            Some(v) if odd(v) => {
                invalid("cpu_visible_bytes", format!("{v} is no multiple of 4096: set {}", rounded(v)))
            }
            _ => Ok(()),
        }
    }
}

/// What a [`SimDevice`] did since it was made. Local is device memory, remote is system memory over the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct SimStats {
    /// Bytes that kernels read from device memory.
    pub local_bytes_read: u64,
    /// Bytes that kernels wrote to device memory.
    pub local_bytes_written: u64,
    /// Bytes that kernels read from system memory.
    pub remote_bytes_read: u64,
    /// Bytes that kernels wrote to system memory.
    pub remote_bytes_written: u64,
    /// Translations found in a TLB.
    pub tlb_hits: u64,
    /// Translations not found in a TLB, or not sufficient for the access.
    pub tlb_misses: u64,
    /// Page-table walks.
    pub walks: u64,
    /// Accesses that found no sufficient translation, recovered from or not.
    pub faults: u64,
    /// Bytes copied to device memory by `upload`.
    pub bytes_uploaded: u64,
    /// Bytes copied from device memory by `download`.
    pub bytes_downloaded: u64,
    /// Bytes zeroed by `clear`.
    pub bytes_cleared: u64,
    /// Jobs given to the engines, the device's own among them.
    pub submissions: u64,
}

/// A simulated device. See the module's documentation. Several may exist at once.
pub struct SimDevice {
    shared: Arc<Shared>,
    buddy: Mutex<Buddy>,
    compute: Engine,
    copy: Engine,
    /// Only with a small BAR.
    paging: Option<Engine>,
}

impl fmt::Debug for SimDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDevice").field("info", &self.shared.info).finish_non_exhaustive()
    }
}

impl SimDevice {
    /// Starts a device. Errors when `config` makes no sense (the message says what to set instead), or the
    /// machine has no memory or threads for it.
    pub fn new(config: SimConfig) -> Result<Arc<Self>> {
        config.validate()?;
        let buddy = Mutex::new(Buddy::new(config.vram_bytes)?);
        let shared = Arc::new(Shared::new(&config)?);
        let mut started = Engines { shared: Arc::clone(&shared), engines: Vec::new() };
        started.start(Kind::Compute)?;
        started.start(Kind::Copy)?;
        if shared.vram.visible_len() < shared.vram.len() {
            started.start(Kind::Paging)?;
        }
        let mut engines = std::mem::take(&mut started.engines).into_iter();
        match (engines.next(), engines.next()) {
            (Some(compute), Some(copy)) => {
                Ok(Arc::new(Self { shared, buddy, compute, copy, paging: engines.next() }))
            }
            _ => Err(Error::NotRunning("the device's engines did not start")),
        }
    }

    /// Who serves this device's faults from now on. The device keeps it until
    /// [`SimDevice::clear_fault_sink`]; a sink that owns the device is a cycle which only that breaks.
    pub fn set_fault_sink(&self, sink: Arc<dyn FaultSink>) {
        self.shared.set_sink(Some(sink));
    }

    /// From now on nobody serves this device's faults: they are errors.
    pub fn clear_fault_sink(&self) {
        self.shared.set_sink(None);
    }

    /// Runs `kernel` on the compute engine, after everything launched before. Lock-free. The fence ends with
    /// the kernel's own result; a panic is an error of that kernel alone.
    pub fn launch(&self, kernel: impl FnOnce(&mut Gpu<'_>) -> Result<()> + Send + 'static) -> Fence {
        self.launch_after(&[], kernel)
    }

    /// As [`SimDevice::launch`], when all of `after` is over too. If one of them failed, the kernel does not
    /// run and its fence ends with that error.
    pub fn launch_after(
        &self,
        after: &[Fence],
        kernel: impl FnOnce(&mut Gpu<'_>) -> Result<()> + Send + 'static,
    ) -> Fence {
        self.submit(&self.compute, after, Box::new(kernel))
    }

    /// Has the copy engine copy `len` bytes from `src` to `dst` (GPU virtual addresses; they may overlap)
    /// after everything given to it before and all of `after`. Lock-free.
    pub fn copy_async(&self, after: &[Fence], dst: u64, src: u64, len: u64) -> Fence {
        self.submit(&self.copy, after, Box::new(move |gpu| gpu.copy(dst, src, len)))
    }

    /// Has the copy engine set `len` bytes at `dst` to `byte`, as [`SimDevice::copy_async`].
    pub fn fill_async(&self, after: &[Fence], dst: u64, len: u64, byte: u8) -> Fence {
        self.submit(&self.copy, after, Box::new(move |gpu| gpu.fill(dst, len, byte)))
    }

    /// The device is gone, as after a reset that failed. Running jobs end at their next access and queued
    /// ones at once, all with [`Error::DeviceLost`]; so does every later operation. Unbinding and freeing
    /// still work. The first reason stays.
    pub fn lose(&self, reason: impl Into<String>) {
        self.shared.lose(reason.into());
    }

    /// Takes device memory that the CPU reaches, or `None`.
    pub fn vram_alloc_visible(&self, len: u64) -> Option<Bo> {
        self.take(len, Some(self.shared.vram.visible_len()))
    }

    /// Free bytes of the part that the CPU reaches.
    pub fn vram_free_visible_bytes(&self) -> u64 {
        self.buddy().free_bytes_below(self.shared.vram.visible_len())
    }

    /// Bytes of the largest piece that [`Device::vram_alloc`] could give now.
    pub fn vram_largest_free(&self) -> u64 {
        self.buddy().largest_free()
    }

    /// What it did so far.
    pub fn stats(&self) -> SimStats {
        self.shared.stats()
    }

    /// How long that would have taken on the profile's device: modelled, not measured.
    pub fn modelled(&self) -> Modelled {
        self.shared.modelled()
    }

    /// Whose costs are modelled.
    pub fn profile(&self) -> Profile {
        self.shared.profile
    }

    fn submit(&self, engine: &Engine, after: &[Fence], work: Work) -> Fence {
        if !self.shared.is_ours() {
            return Fence::signaled(Err(Error::NotRunning("the device belongs to the parent process")));
        }
        self.shared.ledger.submitted.add(1);
        engine.submit(after, work)
    }

    fn buddy(&self) -> MutexGuard<'_, Buddy> {
        self.buddy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, len: u64, within: Option<u64>) -> Option<Bo> {
        self.shared.status().ok()?;
        let offset = self.buddy().alloc(len, Choose { top_down: false, within })?;
        Some(Bo { offset, len })
    }

    /// The device offset of `len` bytes at `at` of `bo`.
    fn place(&self, bo: &Bo, at: u64, len: u64) -> Result<u64> {
        let inside = at.checked_add(len).is_some_and(|end| end <= bo.len);
        let exists = bo.offset.checked_add(bo.len).is_some_and(|end| end <= self.shared.vram.len());
        if inside && exists {
            return Ok(bo.offset + at);
        }
        let reason = format!("{len} bytes at {at:#x} are not inside {bo:?} of {}", self.shared.info.name);
        Err(Error::Invalid { argument: "bo", reason })
    }

    /// Does `action` to `len` bytes at `offset`: here as far as the caller can reach, by the paging engine
    /// beyond. Says whether it held for all of them.
    fn perform(&self, offset: u64, len: u64, action: Action) -> Result<bool> {
        self.shared.status()?;
        let reach = self.shared.vram.visible_len().saturating_sub(offset).min(len);
        let (here, beyond) = action.split(reach as usize);
        let mut held = true;
        if reach > 0 {
            let window = self.shared.vram.visible(offset, reach as usize);
            held = here.apply(window.ok_or(Error::OutsideSpace { addr: offset })?);
        }
        if reach < len && held {
            held = self.perform_remotely(offset + reach, (len - reach) as usize, beyond)?;
        }
        Ok(held)
    }

    /// [`SimDevice::perform`] by the paging engine; returns when it is done.
    fn perform_remotely(&self, offset: u64, len: usize, action: Action) -> Result<bool> {
        let paging = self.paging.as_ref().ok_or(Error::OutsideSpace { addr: offset })?;
        let held = Arc::new(AtomicBool::new(true));
        let work = {
            let (shared, held) = (Arc::clone(&self.shared), Arc::clone(&held));
            move |_: &mut Gpu<'_>| {
                let window = shared.vram.device(offset, len).ok_or(Error::OutsideSpace { addr: offset })?;
                held.store(action.apply(window), Ordering::Release);
                Ok(())
            }
        };
        self.submit(paging, &[], Box::new(work)).wait(None)?;
        Ok(held.load(Ordering::Acquire))
    }
}

impl Device for SimDevice {
    fn info(&self) -> &DeviceInfo {
        &self.shared.info
    }

    fn vram_alloc(&self, len: u64) -> Option<Bo> {
        self.vram_alloc_visible(len).or_else(|| self.take(len, None))
    }

    fn vram_free(&self, bo: Bo) {
        if let Err(e) = self.buddy().free(bo.offset) {
            // It is another device's, or nobody's: leaking it is the one thing that corrupts nothing.
            tracing::error!("{bo:?} was not freed: {e}");
        }
    }

    fn vram_free_bytes(&self) -> u64 {
        self.buddy().free_bytes()
    }

    fn expect_copies(&self) {
        vram::expect_copies();
    }

    fn upload(&self, bo: &Bo, shadow: &Shadow, at: u64, len: u64) -> Result<()> {
        let host = HostPiece::of(shadow, at, len)?;
        self.perform(self.place(bo, at, len)?, len, Action::Upload(host))?;
        self.shared.ledger.uploaded.add(len);
        Ok(())
    }

    fn upload_bytes(&self, bo: &Bo, at: u64, bytes: &[u8]) -> Result<()> {
        let len = bytes.len() as u64;
        self.perform(self.place(bo, at, len)?, len, Action::Upload(HostPiece::own(bytes)))?;
        self.shared.ledger.uploaded.add(len);
        Ok(())
    }

    fn download(&self, bo: &Bo, shadow: &Shadow, at: u64, len: u64) -> Result<()> {
        let host = HostPiece::of(shadow, at, len)?;
        self.perform(self.place(bo, at, len)?, len, Action::Download(host))?;
        self.shared.ledger.downloaded.add(len);
        Ok(())
    }

    fn lend(&self, bo: &Bo, len: u64) -> Option<u64> {
        self.shared.status().ok()?;
        let offset = self.place(bo, 0, bo.len).ok()?;
        let window = self.shared.vram.visible(offset, bo.len as usize)?;
        self.shared.ledger.downloaded.add(len);
        Some(window.address())
    }

    fn clear(&self, bo: &Bo, at: u64, len: u64) -> Result<()> {
        self.perform(self.place(bo, at, len)?, len, Action::Clear)?;
        self.shared.ledger.cleared.add(len);
        Ok(())
    }

    fn is_zero(&self, bo: &Bo, at: u64, len: u64) -> bool {
        let looked =
            self.place(bo, at, len).and_then(|offset| self.perform(offset, len, Action::LookForZero));
        looked.unwrap_or(false)
    }

    fn bind(&self, va: Span, backing: Backing, access: GpuAccess) -> Result<()> {
        self.shared.bind(va, backing, access)
    }

    fn unbind(&self, va: Span) -> bool {
        self.shared.unbind(va.page_aligned())
    }

    fn reaches(&self, va: Span) -> bool {
        self.shared.compute.reaches(va) || self.shared.copy.reaches(va)
    }

    fn test_and_clear_referenced(&self, va: Span) -> bool {
        self.shared.take_referenced(va.page_aligned())
    }
}

impl Drop for SimDevice {
    /// Queued jobs end with an error; a running one ends at its next access and is waited for a few seconds.
    fn drop(&mut self) {
        stop(&self.shared, [&mut self.compute, &mut self.copy].into_iter().chain(&mut self.paging));
    }
}

/// Engines that have no device yet: stops them if it never comes to one.
struct Engines {
    shared: Arc<Shared>,
    engines: Vec<Engine>,
}

impl Engines {
    fn start(&mut self, kind: Kind) -> Result<()> {
        self.engines.push(Engine::start(kind, &self.shared)?);
        Ok(())
    }
}

impl Drop for Engines {
    fn drop(&mut self) {
        if !self.engines.is_empty() {
            stop(&self.shared, self.engines.iter_mut());
        }
    }
}

fn stop<'a>(shared: &Shared, engines: impl Iterator<Item = &'a mut Engine>) {
    let engines: Vec<_> = engines.collect();
    if !shared.is_ours() {
        engines.into_iter().for_each(Engine::abandon);
        return;
    }
    // The sink is kept: a job that is in it, or faults on its way out, needs it. It goes with the last
    // engine.
    shared.stop();
    engines.iter().for_each(|e| e.wake());
    engines.into_iter().for_each(Engine::join);
}

/// Something done to a stretch of device memory.
#[derive(Debug, Clone, Copy)]
enum Action {
    Upload(HostPiece),
    Download(HostPiece),
    Clear,
    LookForZero,
}

impl Action {
    /// The action on the first `len` bytes, and on the rest.
    fn split(self, len: usize) -> (Self, Self) {
        match self {
            Action::Upload(host) => {
                let (a, b) = host.split(len);
                (Action::Upload(a), Action::Upload(b))
            }
            Action::Download(host) => {
                let (a, b) = host.split(len);
                (Action::Download(a), Action::Download(b))
            }
            same => (same, same),
        }
    }

    /// Does it to all of `window`; says whether it held, which only looking can deny.
    fn apply(self, window: Window<'_>) -> bool {
        match self {
            Action::Upload(host) => window.upload(host),
            Action::Download(host) => window.download(host),
            Action::Clear => window.fill(0),
            Action::LookForZero => return window.is_zero(),
        }
        true
    }
}
