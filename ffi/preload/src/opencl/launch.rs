//! Launches: what they will use is known, counted, and if asked for, moved.
//!
//! # Overview
//! A launch's working set is what its kernel's pointers lead to ([`super::objects::Kernel::working_set`]). On a device
//! that shares the host's memory it is counted and left where it is. If migrations are asked for (a policy or chaos in the
//! environment), usvm's device plays the one that computes: the working set is brought there before the launch, and again
//! when the launch's event is complete. The processor's own accesses fetch back what they need, so results cannot change;
//! that they do not is what this is for.
//!
//! With the policy `remote` nothing is to move: each launch is a bracket then. Its working set is in the host's memory, mapped
//! for usvm's device, from before the driver hears of the launch until its event is complete
//! ([`Runtime::begin_access_at_home`]); neither chaos nor a hint takes it away meanwhile. Programs need not wait for their
//! launches: what is held at home when the process ends holds up nothing.
//!
//! With the other policies nothing is *held* on usvm's device: the driver's threads are CPU threads, whose accesses would wait
//! for the end of a bracket that ends when they are done; and the working set can contain pages of the very thread that
//! launches, its stack or the pages that small blocks share with the rest of the heap.
//!
//! # Limits
//! Drivers of devices with memory of their own move their buffers themselves, and no device of the runtime stands for
//! theirs yet: their launches are counted only.
//!
//! A driver that does not tell of the end of a launch that fails (PoCL 3.1, where an event that is waited for fails) leaves
//! what that uses held until the exit. A launch of which a pointer leads nowhere is not held at all.

use std::ffi::c_void;

use usvm::ground::addr::Span;
use usvm::{Access, Bracket, Error, Fence, GpuAccess, Hint, Location, Runtime};

use super::capability::{Device, info};
use super::dispatch::Dispatch;
use super::memory::{BLOCKS, Block};
use super::objects::{KERNELS, Kernel, WorkingSet};
use super::settings;
use super::stats::COUNTS;
use super::types::*;

/// usvm's device that stands for the one that computes.
const STAND_IN: u32 = 0;

/// A launch that is about to be queued.
pub struct Launch {
    bytes: u64,
    system: bool,
    used: Option<Used>,
    own_event: Handle,
}

/// What was done with a launch's working set, and is to be done when it is complete.
enum Used {
    /// It was sent to the stand-in, and goes there again.
    Moved(WorkingSet),
    /// It is held.
    Held(Bracket),
}

impl Launch {
    /// Looks at the launch of `kernel` on `queue`, before the driver does.
    pub fn begin(driver: &Dispatch, queue: Handle, kernel: Handle) -> Self {
        let known = KERNELS.with(kernel as usize, |k| (untold(k), k.reach()));
        let (untold, (bytes, system)) = known.unwrap_or_default();
        if let Some((changes, pointers)) = untold {
            let result = tell(driver, kernel, &pointers);
            // Not before: another launch of the kernel must not find it told when it is not.
            KERNELS.with(kernel as usize, |k| match &mut k.told {
                Some(told) if result == SUCCESS => *told = changes.max(*told),
                _ => {}
            });
        }
        let used = stand_in(driver, queue).and_then(|runtime| {
            let set = KERNELS
                .with(kernel as usize, |k| k.working_set())
                .filter(|set| *set != WorkingSet::default())?;
            if settings::get().hold {
                return hold(runtime, &set).map(Used::Held);
            }
            bring(runtime, &set);
            Some(Used::Moved(set))
        });
        Self { bytes, system, used, own_event: std::ptr::null_mut() }
    }

    /// Where the driver shall put the launch's event: where the program wants it, or here if only we need it.
    pub fn event(&mut self, wanted: *mut Handle) -> *mut Handle {
        if wanted.is_null() && self.used.is_some() { &raw mut self.own_event } else { wanted }
    }

    /// The driver has queued the launch, or not.
    ///
    /// # Safety
    /// `event` is what [`Launch::event`] gave, filled by the driver if `result` is success.
    pub unsafe fn queued(self, driver: &Dispatch, result: Int, event: *const Handle) {
        if result != SUCCESS {
            if let Some(used) = self.used {
                used.give_up();
            }
            return;
        }
        COUNTS.launches.add(1);
        COUNTS.working_set_bytes.add(self.bytes);
        COUNTS.system_pointer_launches.add(self.system.into());
        let Some(used) = self.used else { return };
        // SAFETY: the driver has filled it. What was used goes to the callback, which is called once, or stays ours.
        unsafe {
            let event = if event.is_null() { self.own_event } else { *event };
            let used = Box::into_raw(Box::new(used));
            let told = driver
                .clSetEventCallback
                .map(|set_callback| set_callback(event, COMPLETE, completed, used.cast()));
            if told != Some(SUCCESS) {
                Box::from_raw(used).give_up();
            }
            if !self.own_event.is_null()
                && let Some(release) = driver.clReleaseEvent
            {
                release(self.own_event);
            }
        }
    }
}

impl Used {
    /// The launch is complete: its data goes to the stand-in again, or is let go of.
    fn complete(self) {
        let Used::Moved(set) = self else { return self.give_up() };
        let Some(runtime) = settings::runtime() else { return };
        let alive = set.blocks.iter().filter(|b| BLOCKS.find(b.base) == Some(**b));
        drop(send(runtime, alive.map(pages_of).collect()));
    }

    /// There is no launch, or none whose end will be told.
    fn give_up(self) {
        if let (Used::Held(bracket), Some(runtime)) = (self, settings::runtime()) {
            let _ = runtime.end_access(bracket);
        }
    }
}

/// Holds the working set where the driver's threads reach it. What is behind a pointer that lies in no block may be for
/// reading only.
fn hold(runtime: &Runtime, set: &WorkingSet) -> Option<Bracket> {
    let writes = |s: Span| Access { addr: s.start, len: s.len(), access: GpuAccess::Write };
    let mut accesses: Vec<Access> = joined(set.blocks.iter().map(pages_of)).into_iter().map(writes).collect();
    let blocks = accesses.len();
    accesses.extend(joined(set.foreign.iter().map(|p| page_of(*p))).into_iter().map(writes));
    loop {
        match runtime.begin_access_at_home(STAND_IN, &accesses) {
            Ok(bracket) => {
                COUNTS.launches_held.add(1);
                return Some(bracket);
            }
            Err(Error::NotWritable { addr }) if for_reading(&mut accesses, blocks, addr) => {}
            Err(_) => {
                COUNTS.launches_refused.add(1);
                return None;
            }
        }
    }
}

/// Asks no more to write where `addr` lies; if that is in none of the `blocks` that come first, in nothing that comes after
/// them: each try holds all that it can. False if nobody did.
fn for_reading(accesses: &mut [Access], blocks: usize, addr: u64) -> bool {
    let writes = |a: &Access| a.access == GpuAccess::Write;
    let there = |a: &Access| writes(a) && Span::sized(a.addr, a.len).contains(addr);
    let foreign = accesses[blocks..].iter().any(there);
    let mut found = false;
    for (n, access) in accesses.iter_mut().enumerate() {
        if there(access) || foreign && n >= blocks && writes(access) {
            access.access = GpuAccess::Read;
            found = true;
        }
    }
    found
}

/// The runtime, if memory is to move for this queue's device.
fn stand_in(driver: &Dispatch, queue: Handle) -> Option<&'static Runtime> {
    let runtime = settings::runtime()?;
    let device = info::<usize>(driver.clGetCommandQueueInfo, queue, QUEUE_DEVICE).ok()?;
    Device::query(driver, device as Handle).shares_host().then_some(runtime)
}

/// Brings the working set to the stand-in.
fn bring(runtime: &Runtime, set: &WorkingSet) {
    let pages = set.foreign.iter().map(|p| page_of(*p));
    let fences = send(runtime, set.blocks.iter().map(pages_of).chain(pages).collect());
    let refused = fences.iter().filter(|fence| fence.wait(None).is_err()).count();
    if refused == 0 { COUNTS.launches_migrated.add(1) } else { COUNTS.launches_refused.add(1) }
}

fn pages_of(block: &Block) -> Span {
    Span::sized(block.base as u64, block.size as u64).page_aligned()
}

fn page_of(pointer: usize) -> Span {
    Span::sized(pointer as u64, 1).page_aligned()
}

/// Sends pages to the stand-in, those that touch at once.
fn send(runtime: &Runtime, spans: Vec<Span>) -> Vec<Fence> {
    let whole = joined(spans.into_iter());
    whole.iter().map(|s| runtime.prefetch(s.start, s.len(), Location::Device(STAND_IN))).collect()
}

/// The same pages in as few spans as can be, by address: small blocks share theirs.
fn joined(spans: impl Iterator<Item = Span>) -> Vec<Span> {
    let mut spans: Vec<Span> = spans.collect();
    spans.sort_unstable();
    let mut whole: Vec<Span> = Vec::new();
    for span in spans {
        match whole.last_mut() {
            Some(last) if span.start <= last.end => last.end = last.end.max(span.end),
            _ => whole.push(span),
        }
    }
    whole
}

unsafe extern "C" fn completed(_event: Handle, _status: Int, used: *mut c_void) {
    // SAFETY: the box that `queued` gave away; the driver calls once.
    unsafe { Box::from_raw(used.cast::<Used>()) }.complete();
}

/// The blocks a kernel reaches indirectly and their changes, if there were any since the driver was last told.
fn untold(kernel: &Kernel) -> Option<(u64, Vec<usize>)> {
    let changes = BLOCKS.changes();
    kernel.told.filter(|told| *told < changes)?;
    Some((changes, all_indirect(kernel)))
}

/// What a kernel reaches without its arguments: both lists, and whole kinds.
pub fn all_indirect(kernel: &Kernel) -> Vec<usize> {
    let of_kinds = BLOCKS.of_context(kernel.context, |kind| kernel.indirect.has(kind));
    let known = kernel.usm_pointers.iter().copied().filter(|p| BLOCKS.find(*p).is_some());
    let mut all: Vec<usize> = kernel
        .svm_pointers
        .iter()
        .copied()
        .chain(known)
        .chain(of_kinds.iter().map(|b: &Block| b.base))
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Gives the driver a kernel's list of pointers. A driver that does not want an empty one keeps what it has.
pub fn tell(driver: &Dispatch, kernel: Handle, pointers: &[usize]) -> Int {
    let Some(set) = driver.clSetKernelExecInfo else { return INVALID_OPERATION };
    if pointers.is_empty() {
        return SUCCESS;
    }
    // SAFETY: the driver copies the list.
    unsafe { set(kernel, KERNEL_EXEC_INFO_SVM_PTRS, size_of_val(pointers), pointers.as_ptr().cast()) }
}

/// A hint that `[addr, addr + len)` is wanted at `to`.
pub fn hint(addr: usize, len: usize, to: Where) {
    COUNTS.hints.add(1);
    if let Some(runtime) = settings::runtime().filter(|_| len > 0) {
        let to = match to {
            Where::Host => Location::Host,
            Where::Device => Location::Device(STAND_IN),
        };
        drop(runtime.prefetch(addr as u64, len as u64, to));
    }
}

/// Advice about `[addr, addr + len)`. The extension defines no value but "none in particular" so far: what an earlier
/// hint said is taken back.
pub fn no_advice(addr: usize, len: usize) {
    COUNTS.hints.add(1);
    if let Some(runtime) = settings::runtime().filter(|_| len > 0) {
        let _ = runtime.advise(addr as u64, len as u64, Hint::ReadMostly(false));
        let _ = runtime.advise(addr as u64, len as u64, Hint::PreferredLocation(None));
    }
}

/// Where memory is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    /// In the host's memory.
    Host,
    /// At the device that computes.
    Device,
}
