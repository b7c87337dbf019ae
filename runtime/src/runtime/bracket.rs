//! Brackets: memory that a device uses for a while, for work that usvm does not launch.
//!
//! # Overview
//! [`Runtime::begin_access`] makes memory resident or mapped and holds it; [`Runtime::end_access`] lets go of it. The
//! beginning may wait for device memory that others hold, so it can also be waited for by a fence
//! ([`Runtime::begin_access_later`]), and be ended before it has begun. Where the device that computes shares the host's
//! memory, [`Runtime::begin_access_at_home`] holds what it uses there.
//!
//! # Locking
//! A bracket's lock is for control threads only: the ranges are handed over under it, and nothing waits with it held.
//!
//! Only ranges that lie wholly inside an access move, except for atomics. What shares a range with other data is mapped
//! over the link, or the CPU would wait for the end of the bracket wherever it touches that other data: perhaps the very
//! thread that has to end it.
//!
//! # Limits
//! A bracket that is dropped without its end holds its memory until the runtime ends.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::ground::addr::Span;
use crate::ground::alloc;
use crate::ground::error::{Error, Result};
use crate::ground::sync::{Event, Fence};
use crate::space::mover::Range;
use crate::space::ports::{Device, DeviceInfo};
use crate::space::svm::{PIN_PATIENCE, ROOM, Svm, Want};

use super::{Access, Inner, Runtime};

/// A begun use of memory by a device.
#[derive(Debug)]
#[must_use = "memory stays held until end_access"]
pub struct Bracket(Arc<Mutex<State>>);

#[derive(Debug)]
enum State {
    Beginning,
    /// By this device.
    Held(u32, Vec<Arc<Range>>),
    Ended,
}

impl Runtime {
    /// Begins a use of `accesses` by `device` (for work usvm does not launch itself): they are on the device or mapped,
    /// and stay so until [`Runtime::end_access`] with what this gives.
    ///
    /// A CPU access to memory that is held on the device waits for the end of the hold. So `accesses` must not contain what
    /// the thread that will end it touches before: its stack, for one.
    pub fn begin_access(&self, device: u32, accesses: &[Access]) -> Result<Bracket> {
        let (bracket, fence) = self.begin_access_later(device, accesses)?;
        fence.wait(None)?;
        Ok(bracket)
    }

    /// As [`Runtime::begin_access`], without waiting: the fence tells when it is so, or why not. The bracket may be ended
    /// before.
    pub fn begin_access_later(&self, device: u32, accesses: &[Access]) -> Result<(Bracket, Fence)> {
        let dev = self.device(device)?;
        alloc::internal(|| check_working_set(dev.info(), accesses))?;
        self.begin(device, accesses, |a| Want::bracket(a.access, Span::sized(a.addr, a.len)))
    }

    /// As [`Runtime::begin_access`], but `accesses` are in the host's memory, mapped for `device` over the link, and stay
    /// there until the end: the CPU never waits for it. For drivers whose device is the CPU or shares its memory. What others
    /// hold on a device is waited for, so who begins must not be the one who ends that; atomics need a device that can do them
    /// over the link.
    pub fn begin_access_at_home(&self, device: u32, accesses: &[Access]) -> Result<Bracket> {
        self.device(device)?;
        check_accesses(accesses)?;
        let (bracket, fence) = self.begin(device, accesses, |a| Want::at_home(a.access, a.addr))?;
        fence.wait(None)?;
        Ok(bracket)
    }

    fn begin(&self, device: u32, accesses: &[Access], want: fn(&Access) -> Want) -> Result<(Bracket, Fence)> {
        let inner = self.inner();
        inner.check()?;
        alloc::internal(|| {
            let begun = SignalOnDrop(Event::new());
            let fence = begun.0.fence();
            let state = Arc::new(Mutex::new(State::Beginning));
            let beginning = Beginning {
                device,
                accesses: accesses.to_vec(),
                want,
                state: state.clone(),
                begun,
                deadline: Instant::now() + PIN_PATIENCE,
            };
            let owner = inner.clone();
            let _ = inner.control.submit(move || beginning.go_on(&owner));
            Ok((Bracket(state), fence))
        })
    }

    /// Ends what [`Runtime::begin_access`] began.
    pub fn end_access(&self, bracket: Bracket) -> Result<()> {
        let inner = self.inner();
        inner.check_ours()?;
        let svm = inner.svm.clone();
        inner.control.end(move || {
            let mut state = bracket.0.lock().unwrap_or_else(PoisonError::into_inner);
            if let State::Held(device, held) = std::mem::replace(&mut *state, State::Ended) {
                svm.release(device, &held);
            }
            Ok(())
        })
    }
}

/// A bracket that has not begun yet. It never waits with memory in its hands, or two that have half of what they want
/// would wait for each other; nor does it keep a control thread from others' requests: it lines up again.
struct Beginning {
    device: u32,
    accesses: Vec<Access>,
    want: fn(&Access) -> Want,
    state: Arc<Mutex<State>>,
    begun: SignalOnDrop,
    deadline: Instant,
}

/// Whatever becomes of it, whoever waits is answered.
#[derive(Debug)]
pub(super) struct SignalOnDrop(pub(super) Event);

impl Drop for SignalOnDrop {
    fn drop(&mut self) {
        self.0.signal(Err(Error::NotRunning("it was shut down")));
    }
}

impl Beginning {
    /// One try, on a control thread.
    fn go_on(self, owner: &Arc<Inner>) -> Result<()> {
        let svm = &owner.svm;
        let outcome = match hold(svm, self.device, &self.accesses, self.want) {
            Ok(held) => {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                match *state {
                    State::Ended => svm.release(self.device, &held),
                    _ => *state = State::Held(self.device, held),
                }
                Ok(())
            }
            Err(Error::Again { .. }) if Instant::now() < self.deadline && !self.is_ended() => {
                svm.wait_for_memory();
                let again = owner.clone();
                let _ = owner.control.submit(move || self.go_on(&again));
                return Ok(());
            }
            Err(e) => Err(too_much(e, svm, self.device, &self.accesses)),
        };
        self.begun.0.signal(outcome);
        Ok(())
    }

    fn is_ended(&self) -> bool {
        matches!(*self.state.lock().unwrap_or_else(PoisonError::into_inner), State::Ended)
    }
}

/// Who gave up waiting for device memory is told how much there is.
pub(super) fn too_much(error: Error, svm: &Svm, device: u32, accesses: &[Access]) -> Error {
    let Error::Again { what: ROOM, .. } = error else { return error };
    let device = svm.mover.device(device);
    let capacity = device.info().vram_bytes;
    Error::OutOfDeviceMemory {
        needed: working_set(accesses),
        capacity,
        busy: capacity - device.vram_free_bytes(),
    }
}

/// Refuses at once what can never be held at one time, with both sizes.
pub(super) fn check_working_set(info: &DeviceInfo, accesses: &[Access]) -> Result<()> {
    check_accesses(accesses)?;
    let needed = working_set(accesses);
    if needed > info.vram_bytes && !info.recoverable_faults {
        return Err(Error::OutOfDeviceMemory { needed, capacity: info.vram_bytes, busy: 0 });
    }
    Ok(())
}

/// Refuses what is no memory.
fn check_accesses(accesses: &[Access]) -> Result<()> {
    if let Some(bad) = accesses.iter().find(|a| a.len == 0 || a.addr.checked_add(a.len).is_none()) {
        return Err(Error::Invalid {
            argument: "accesses",
            reason: format!("{:#x} + {:#x} is empty or wraps around", bad.addr, bad.len),
        });
    }
    Ok(())
}

/// Bytes of all pages of `accesses`.
fn working_set(accesses: &[Access]) -> u64 {
    let mut spans: Vec<Span> = accesses.iter().map(|a| Span::sized(a.addr, a.len).page_aligned()).collect();
    spans.sort_unstable();
    let mut end = 0;
    spans
        .iter()
        .map(|s| {
            let fresh = s.end.saturating_sub(s.start.max(end));
            end = end.max(s.end);
            fresh
        })
        .sum()
}

/// Holds all of `accesses` on the device, each as `want` says, or none of them. In the order of their addresses: two that
/// want the same do not each begin with what the other ends with.
fn hold(
    svm: &Svm,
    device: u32,
    accesses: &[Access],
    want: impl Fn(&Access) -> Want,
) -> Result<Vec<Arc<Range>>> {
    let mut ascending: Vec<&Access> = accesses.iter().collect();
    ascending.sort_by_key(|a| a.addr);
    let mut held = Vec::new();
    for a in ascending {
        match svm.gpu_access_holding(device, a.addr, a.len, want(a), &held) {
            Ok(more) => held.extend(more),
            Err(e) => {
                svm.release(device, &held);
                return Err(e);
            }
        }
    }
    Ok(held)
}

/// Holds all of `accesses` for a launch on `device`. As a bracket, it waits for what others hold with nothing in its
/// own hands: two launches could wait for each other, or the thread that is to end a bracket for what the launch holds.
pub(super) fn hold_for_launch(svm: &Svm, device: u32, accesses: &[Access]) -> Result<Vec<Arc<Range>>> {
    let deadline = Instant::now() + PIN_PATIENCE;
    loop {
        match hold(svm, device, accesses, |a| Want { wait: false, ..Want::launch(a.access) }) {
            Err(Error::Again { .. }) if Instant::now() < deadline => svm.wait_for_memory(),
            other => return other.map_err(|e| too_much(e, svm, device, accesses)),
        }
    }
}
