//! What callers and engines of one device share: memory, translations, the fault sink, and whether the device
//! lives.
//!
//! # Locking
//! Two locks matter, taken in this order: a [`Unit`]'s TLB, held by its engine while it uses one translation;
//! then the page table, held for reading while it walks. Whoever changes an entry takes the page table alone,
//! releases it, and then takes each unit's TLB in turn to invalidate. So an engine either walked before the
//! change and its copy is thrown away, or walks after it and finds the new entry; and as the visitor got the
//! TLB's lock, no engine is in the middle of using the old one.
//!
//! The lock is not fair, and an engine takes it again at once. Tried: letting the engine stand back for
//! visitors made no difference to how long they wait (tens of microseconds, rarely milliseconds, with an
//! engine at full speed).

use super::page_table::{PageTable, Translation};
use super::profile::{Ledger, Modelled, Profile};
use super::tlb::Tlb;
use super::vram::Vram;
use super::{SimConfig, SimStats};
use crate::ground::addr::Span;
use crate::ground::error::{Error, Result};
use crate::space::ports::{Backing, DeviceInfo, FaultSink, GpuAccess};
use crossbeam_utils::CachePadded;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

/// A sum that one engine adds to and anyone reads.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    /// Only the engine that owns it may call this: it is no read-modify-write.
    pub(super) fn add(&self, n: u64) {
        self.0.store(self.get() + n, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What one engine did.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) local_read: Counter,
    pub(super) local_written: Counter,
    pub(super) remote_read: Counter,
    pub(super) remote_written: Counter,
    /// Bytes of the lines that were read and written.
    pub(super) local_lines: Counter,
    pub(super) remote_lines: Counter,
    pub(super) tlb_hits: Counter,
    pub(super) tlb_misses: Counter,
    pub(super) walks: Counter,
    pub(super) faults: Counter,
}

/// One engine, as those who change translations see it.
#[derive(Debug)]
pub(super) struct Unit {
    tlb: Mutex<Tlb>,
    /// Start and end of the access over the link that is under way; nowhere if both are zero.
    reached: CachePadded<[AtomicU64; 2]>,
    pub(super) counters: CachePadded<Counters>,
}

impl Unit {
    fn new() -> Self {
        Self {
            tlb: Mutex::new(Tlb::new()),
            reached: CachePadded::default(),
            counters: CachePadded::default(),
        }
    }

    /// Holds the engine's TLB. The engine does, for as long as it uses a translation; every invalidation
    /// waits.
    pub(super) fn hold(&self) -> MutexGuard<'_, Tlb> {
        self.tlb.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `op`, an access to `span` over the link.
    pub(super) fn reaching<T>(&self, span: Span, op: impl FnOnce() -> T) -> T {
        struct Over<'a>(&'a [AtomicU64; 2]);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.iter().for_each(|bound| bound.store(0, Ordering::Release));
            }
        }
        let [start, end] = &*self.reached;
        start.store(span.start, Ordering::Release);
        end.store(span.end, Ordering::Release);
        let _over = Over(&self.reached);
        op()
    }

    /// Whether an access over the link is under way in `span`. While one begins or ends the answer may be wrong, but not while
    /// it waits.
    pub(super) fn reaches(&self, span: Span) -> bool {
        let [start, end] = &*self.reached;
        let (start, end) = (start.load(Ordering::Acquire), end.load(Ordering::Acquire));
        start < end && Span::new(start, end).overlaps(span)
    }

    /// Returns when the engine has no cached translation of `span` and is using none.
    fn invalidate(&self, span: Span) {
        self.hold().invalidate(span);
    }
}

/// See the module's documentation.
pub(super) struct Shared {
    pub(super) info: DeviceInfo,
    pub(super) profile: Profile,
    pub(super) vram: Vram,
    pub(super) ledger: Ledger,
    /// The engines that translate: compute, copy.
    pub(super) compute: Unit,
    pub(super) copy: Unit,
    table: RwLock<PageTable>,
    sink: RwLock<Option<Arc<dyn FaultSink>>>,
    stopping: AtomicBool,
    lost: OnceLock<String>,
    owner: rustix::process::Pid,
}

impl Shared {
    /// The memory and tables that `config`, a valid one, asks for.
    pub(super) fn new(config: &SimConfig) -> Result<Self> {
        let visible = config.cpu_visible_bytes.unwrap_or(config.vram_bytes);
        Ok(Self {
            info: DeviceInfo {
                name: format!("sim:{}", config.profile.name),
                vram_bytes: config.vram_bytes,
                cpu_visible_bytes: visible,
                recoverable_faults: config.recoverable_faults,
                min_page: crate::ground::addr::SZ_4K,
                system_atomics: false,
            },
            profile: config.profile,
            vram: Vram::new(config.vram_bytes, visible, config.prefault, config.cpu_offset)?,
            ledger: Ledger::default(),
            compute: Unit::new(),
            copy: Unit::new(),
            table: RwLock::default(),
            sink: RwLock::default(),
            stopping: AtomicBool::new(false),
            lost: OnceLock::new(),
            owner: rustix::process::getpid(),
        })
    }

    /// Errors when the device is lost or shutting down.
    pub(super) fn status(&self) -> Result<()> {
        self.not_lost()?;
        if self.stopping.load(Ordering::Relaxed) {
            return Err(Error::NotRunning("the device was shut down"));
        }
        Ok(())
    }

    /// Errors when the device is lost.
    pub(super) fn not_lost(&self) -> Result<()> {
        match self.lost.get() {
            None => Ok(()),
            Some(reason) => Err(Error::DeviceLost { reason: reason.clone() }),
        }
    }

    /// The first reason stays.
    pub(super) fn lose(&self, reason: String) {
        let _ = self.lost.set(reason);
    }

    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Whether this is the process that made the device: a forked child has neither its threads nor its
    /// memory.
    pub(super) fn is_ours(&self) -> bool {
        rustix::process::getpid() == self.owner
    }

    pub(super) fn set_sink(&self, sink: Option<Arc<dyn FaultSink>>) {
        let old = std::mem::replace(&mut *self.sink.write().unwrap_or_else(PoisonError::into_inner), sink);
        // The sink may own much, even this device: it is dropped outside the lock.
        drop(old);
    }

    pub(super) fn sink(&self) -> Option<Arc<dyn FaultSink>> {
        self.sink.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Walks the page table. The caller holds its TLB.
    pub(super) fn walk(&self, addr: u64, access: GpuAccess) -> Option<Translation> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).translate(addr, access)
    }

    pub(super) fn bind(&self, va: Span, backing: Backing, access: GpuAccess) -> Result<()> {
        self.status()?;
        if let Backing::Vram(offset) = backing
            && offset.checked_add(va.len()).is_none_or(|end| end > self.vram.len())
        {
            let reason = format!("{} bytes at {offset:#x} reach past the device's memory", va.len());
            return Err(Error::Invalid { argument: "backing", reason });
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let removed = table.bind(va, backing, access)?;
        drop(table);
        // Whoever binds a span holds the lock of its range, so no unbind of it is under way: where nothing
        // was, nothing is cached, and a fault is served without visiting the engines.
        if removed.any {
            self.invalidate(va);
        }
        Ok(())
    }

    pub(super) fn unbind(&self, va: Span) -> bool {
        let removed = self.table.write().unwrap_or_else(PoisonError::into_inner).unbind(va);
        // Even if nothing was there: another thread may have cleared the entry and not yet come to the
        // engines.
        self.invalidate(va);
        removed.referenced
    }

    pub(super) fn take_referenced(&self, va: Span) -> bool {
        let referenced = self.table.read().unwrap_or_else(PoisonError::into_inner).take_referenced(va);
        if referenced {
            // A cached translation would not set the bit again.
            self.invalidate(va);
        }
        referenced
    }

    fn invalidate(&self, va: Span) {
        self.compute.invalidate(va);
        self.copy.invalidate(va);
    }

    pub(super) fn stats(&self) -> SimStats {
        let sum =
            |f: fn(&Counters) -> &Counter| f(&self.compute.counters).get() + f(&self.copy.counters).get();
        SimStats {
            local_bytes_read: sum(|c| &c.local_read),
            local_bytes_written: sum(|c| &c.local_written),
            remote_bytes_read: sum(|c| &c.remote_read),
            remote_bytes_written: sum(|c| &c.remote_written),
            tlb_hits: sum(|c| &c.tlb_hits),
            tlb_misses: sum(|c| &c.tlb_misses),
            walks: sum(|c| &c.walks),
            faults: sum(|c| &c.faults),
            bytes_uploaded: self.ledger.uploaded.get(),
            bytes_downloaded: self.ledger.downloaded.get(),
            bytes_cleared: self.ledger.cleared.get(),
            submissions: self.ledger.submitted.get(),
        }
    }

    pub(super) fn modelled(&self) -> Modelled {
        let sum =
            |f: fn(&Counters) -> &Counter| f(&self.compute.counters).get() + f(&self.copy.counters).get();
        let (local, remote) = (sum(|c| &c.local_lines), sum(|c| &c.remote_lines));
        self.profile.model(&self.ledger, sum(|c| &c.faults), local, remote)
    }
}
