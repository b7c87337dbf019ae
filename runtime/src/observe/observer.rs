//! One place to tell what happened: counts it and traces it.

use std::sync::Arc;
use std::time::Instant;

use super::stats::{Cause, Counter, Direction, Gauge, Stats};
use super::trace::{EventKind, Trace, What};
use super::watch::{Change, Watch};
use crate::ground::addr::Span;

/// Statistics and trace of one runtime.
#[derive(Debug)]
pub struct Observer {
    /// Counters and gauges.
    pub stats: Arc<Stats>,
    /// The timeline.
    pub trace: Trace,
    /// Who wants to hear of changes.
    pub watch: Watch,
}

impl Observer {
    /// An observer that counts, and traces once its trace is started.
    pub fn new() -> Self {
        let stats = Arc::new(Stats::default());
        Self { trace: Trace::new(stats.clone()), stats, watch: Watch::default() }
    }

    /// Changes of the gauges, in bytes: resident on a device, shared with one, retained on the host.
    pub fn gauges(&self, resident: i64, shared: i64, retained: i64) {
        let changes = [
            (Gauge::ResidentDeviceBytes, resident),
            (Gauge::ResidentSharedBytes, shared),
            (Gauge::RetainedHostBytes, retained),
        ];
        for (gauge, change) in changes {
            match change {
                0 => {}
                1.. => self.stats.raise(gauge, change.unsigned_abs()),
                _ => self.stats.lower(gauge, change.unsigned_abs()),
            }
        }
    }

    /// A range of `span` moved; `copied` bytes were copied and `saved` bytes did not have to be.
    #[expect(clippy::too_many_arguments, reason = "one event, told whole")]
    pub fn migrated(
        &self,
        direction: Direction,
        cause: Cause,
        span: Span,
        copied: u64,
        saved: u64,
        device: u32,
        started: Instant,
    ) {
        self.stats.migration(direction, span.len(), copied, cause);
        self.watch.tell(Change::Migrated, span);
        let saving = match direction {
            Direction::ToDevice => Counter::BytesSavedDelta,
            Direction::ToHost => Counter::BytesSavedClean,
        };
        self.stats.add(saving, saved);
        self.trace_since(direction.into(), Some(cause), span.start, copied, device, started);
    }

    /// A range left device memory to make room.
    pub fn evicted(&self, span: Span, started: Instant) {
        self.stats.add(Counter::Evictions, 1);
        self.trace_since(EventKind::Evict, Some(Cause::Evict), span.start, span.len(), 0, started);
    }

    /// The host mapping of `span` changed and a device mapping was taken away.
    pub fn invalidated(&self, span: Span, started: Instant) {
        self.stats.add(Counter::Invalidations, 1);
        self.trace_since(EventKind::Invalidate, None, span.start, span.len(), 0, started);
    }

    /// A device access was made possible.
    pub fn gpu_fault(&self, device: u32, addr: u64, bytes: u64, started: Instant) {
        self.stats.add(Counter::GpuFaults, 1);
        self.trace_since(EventKind::GpuFault, None, addr, bytes, device, started);
    }

    /// A launch on `device` ended.
    pub fn launched(&self, device: u32, started: Instant) {
        self.trace_since(EventKind::Launch, None, 0, 0, device, started);
    }

    /// Traces an event that began at `started`.
    pub fn trace_since(
        &self,
        kind: EventKind,
        cause: Option<Cause>,
        address: u64,
        bytes: u64,
        device: u32,
        started: Instant,
    ) {
        self.trace.since(started, What { kind, cause, device: device as u16, address, bytes });
    }
}

impl Default for Observer {
    fn default() -> Self {
        Self::new()
    }
}
