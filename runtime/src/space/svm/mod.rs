//! The SVM: serves device accesses, CPU faults and changes of the mappings, with the space, the mover and the policy.
//!
//! # Overview
//! [`Svm`] is drm_gpusvm's "expected driver": its fault handler is [`Svm::gpu_access`], its migrate_to_ram is
//! [`Svm::cpu_fault`], its notifier callback is [`Svm::unmapped`] and its siblings, its garbage collector
//! [`Svm::collect_garbage`].
//!
//! ```text
//! gpu_access: barrier -> garbage -> find_or_insert -> policy -> to_device | share | remote -> commit(bind)
//! cpu_fault:  find -> policy -> to_host(part) | zero-fill a hole
//! ```
//!
//! # Locking
//! Outermost first: update lock, notifier lock, a range's state, the LRU. A state lock may be held while a commit takes
//! its notifier's lock for read; an invalidation, which has it for write, therefore never takes a state lock: it takes
//! device mappings away, and the ranges' own records follow when it is over. Waiting for something that another thread
//! must do (unread events, pins, device memory in use) is done with no lock held.
//!
//! # Limits
//! Retries are bounded: [`TRIES`] for changing mappings, [`PIN_PATIENCE`] for running work that holds device memory.
//! Whoever gives up says what it waited for.

mod access;
mod events;
mod fault;
mod whole;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use crate::ground::addr::Span;
use crate::ground::error::Result;
use crate::observe::stats::{Cause, Counter};
use crate::space::mover::{Mover, Range};
use crate::space::ports::{GpuAccess, Placement, Vma};
use crate::space::residency::{Advices, Residency};
use crate::space::served::Served as EverServed;
use crate::space::{Ctx, Space};

/// Tries while mappings change under an access.
pub const TRIES: u32 = 2000;
/// Tries to get pages that are pinned or shared before the range is reached over the link instead.
const BUSY_TRIES: u32 = 4;
/// Tries to get a range of which some page is not mapped any more.
const GONE_TRIES: u32 = 200;
/// How long after madvise(DONTNEED) was reported its pages may still be about to be dropped.
const DROPPING: Duration = Duration::from_millis(10);
/// How long an access waits for device memory that running work holds.
pub const PIN_PATIENCE: Duration = Duration::from_secs(10);

/// How long a fault waits for such memory that can be served over the link as well.
const FAULT_PATIENCE: Duration = Duration::from_millis(500);

/// What an access waits for that found device memory full of what others hold.
pub const ROOM: &str = "waiting for device memory";

/// How a device access is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Want {
    /// Loads, stores or atomics.
    pub access: GpuAccess,
    /// Why, for the statistics.
    pub cause: Cause,
    /// Between begin and end of a launch: the program promises not to write what is only read meanwhile.
    pub bracketed: bool,
    /// Where it must go, whatever the policy says (prefetch).
    pub force: Option<Placement>,
    /// Hold the ranges where they are until [`Svm::release`].
    pub pin: bool,
    /// A range that reaches beyond this span stays with the CPU and is reached over the link: what else lies in it must not
    /// wait for the end of the hold.
    pub within: Option<Span>,
    /// New ranges are no larger than this.
    pub chunk: Option<u64>,
    /// Wait for device memory that others hold; otherwise that is [`Error::Again`](crate::Error::Again).
    pub wait: bool,
}

impl Want {
    /// A fault of a device.
    pub fn fault(access: GpuAccess) -> Self {
        Self {
            access,
            cause: Cause::GpuAccess,
            bracketed: false,
            force: None,
            pin: true,
            within: None,
            chunk: None,
            wait: true,
        }
    }

    /// A launch that announces what it uses.
    pub fn launch(access: GpuAccess) -> Self {
        Self {
            access,
            cause: Cause::GpuAccess,
            bracketed: true,
            force: None,
            pin: true,
            within: None,
            chunk: None,
            wait: true,
        }
    }

    /// A bracket around `span`, of which nobody knows when it ends. Atomics need device memory and take the whole range.
    pub fn bracket(access: GpuAccess, span: Span) -> Self {
        let within = (access != GpuAccess::Atomic).then_some(span);
        Self { within, wait: false, ..Self::launch(access) }
    }

    /// A bracket around memory that stays with the CPU: no range lies wholly in nothing.
    pub fn at_home(access: GpuAccess, addr: u64) -> Self {
        Self { within: Some(Span::sized(addr, 0)), wait: false, ..Self::launch(access) }
    }

    fn leaves(&self, range: Span) -> bool {
        self.within.is_some_and(|span| !span.covers(range))
    }

    /// Whether it is [`Want::at_home`], whatever the range.
    fn leaves_all(&self) -> bool {
        self.within.is_some_and(Span::is_empty)
    }

    /// A prefetch that the program asked for.
    pub fn prefetch() -> Self {
        Self {
            access: GpuAccess::Read,
            cause: Cause::Prefetch,
            bracketed: false,
            force: Some(Placement::Migrate),
            pin: false,
            within: None,
            chunk: None,
            wait: true,
        }
    }
}

/// What became of a CPU fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// The page is there, the waiters are awake.
    Done,
    /// Not now: an event is unread, or running work holds the range. Try again when that changed.
    Retry(Wait),
}

/// What a fault that must be tried again waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Unread events.
    Events,
    /// Running work that holds the range.
    Pins,
    /// The range is in another thread's hands.
    Lock,
    /// The range's time on the device to pass.
    Slice(Duration),
}

/// The running whole of space, mover and policy.
pub struct Svm {
    /// The bookkeeping.
    pub space: Space<Residency>,
    /// The moves.
    pub mover: Mover,
    /// What the program advised.
    pub advices: Advices,
    ctx: Ctx,
    served: EverServed,
    /// Spans whose contents the kernel is about to drop, and when it said so.
    dropping: Mutex<Vec<(Span, Instant)>>,
    /// Above zero while a fork is prepared: nothing goes to a device. Each try of a device access holds it for read.
    frozen: RwLock<u32>,
    closed: AtomicBool,
    barrier: RwLock<Option<Arc<dyn Fn() + Send + Sync>>>,
}

impl Svm {
    /// An SVM over an empty space.
    pub fn new(space: Space<Residency>, mover: Mover, check_pages_threshold: u64) -> Self {
        Self {
            space,
            mover,
            advices: Advices::default(),
            ctx: Ctx { devmem_possible: true, check_pages_threshold, ..Ctx::default() },
            served: EverServed::default(),
            dropping: Mutex::default(),
            frozen: RwLock::new(0),
            closed: AtomicBool::new(false),
            barrier: RwLock::new(None),
        }
    }

    /// Sets what waits until every event that the kernel has queued by now was handled.
    pub fn set_barrier(&self, barrier: Arc<dyn Fn() + Send + Sync>) {
        *self.barrier.write().unwrap_or_else(|p| p.into_inner()) = Some(barrier);
    }

    /// Waits until every change of the mappings that the kernel has reported by now is known to the device. Not for
    /// the threads that read those reports.
    pub fn barrier(&self) {
        let barrier = self.barrier.read().unwrap_or_else(|p| p.into_inner()).clone();
        if let Some(barrier) = barrier {
            barrier();
        }
    }

    /// Whether a device may ever have been served in `span`. Any thread; takes no lock.
    pub fn was_served(&self, span: Span) -> bool {
        self.served.perhaps(span)
    }

    /// The mapping around `addr`.
    pub fn vma(&self, addr: u64) -> Result<Option<Vma>> {
        self.mover.host.find_vma(addr)
    }

    /// Counts of one kind, for tests and tools.
    pub fn count(&self, counter: Counter) -> u64 {
        self.mover.observer.stats.get(counter)
    }
}

pub(super) fn index_of(range: &Range, page: u64) -> usize {
    range.span().page_index(page)
}

/// Waits a little, longer the more often: the first tries cost almost nothing, the last wait 5 ms.
pub(super) fn back_off(attempt: u32) {
    match attempt {
        0..16 => std::thread::yield_now(),
        16..64 => std::thread::sleep(Duration::from_micros(50)),
        _ => std::thread::sleep(Duration::from_micros(200 + u64::from(attempt.min(200)) * 24)),
    }
}
