//! Brackets: memory that a device uses for a while, for work that usvm does not launch.
//!
//! # Overview
//! [`Runtime::begin_access`] makes memory resident or mapped and holds it; [`Runtime::end_access`] lets go of it. The
//! beginning may wait for device memory that others hold, so it can also be waited for by a fence
//! ([`Runtime::begin_access_later`]), and be ended before it has begun.
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

use crate::ground::addr::Span;
use crate::ground::alloc;
use crate::ground::error::{Error, Result};
use crate::ground::sync::Fence;
use crate::space::mover::Range;
use crate::space::ports::{Device, DeviceInfo};
use crate::space::svm::{Svm, Want};

use super::{Access, Runtime};

/// A begun use of memory by a device.
#[derive(Debug)]
#[must_use = "memory stays held until end_access"]
pub struct Bracket(Arc<Mutex<State>>);

#[derive(Debug)]
enum State {
    Beginning,
    Held(Vec<Arc<Range>>),
    Ended,
}

impl Runtime {
    /// Begins a use of `accesses` by `device` (for work usvm does not launch itself): they are on the device or mapped,
    /// and stay so until [`Runtime::end_access`] with what this gives.
    pub fn begin_access(&self, device: u32, accesses: &[Access]) -> Result<Bracket> {
        let (bracket, fence) = self.begin_access_later(device, accesses)?;
        fence.wait(None)?;
        Ok(bracket)
    }

    /// As [`Runtime::begin_access`], without waiting: the fence tells when it is so, or why not. The bracket may be ended
    /// before.
    pub fn begin_access_later(&self, device: u32, accesses: &[Access]) -> Result<(Bracket, Fence)> {
        let dev = self.device(device)?;
        let inner = self.inner();
        inner.check()?;
        alloc::internal(|| {
            check_working_set(dev.info(), accesses)?;
            let accesses = accesses.to_vec();
            let svm = inner.svm.clone();
            let state = Arc::new(Mutex::new(State::Beginning));
            let begun = state.clone();
            let fence = inner.control.submit(move || {
                let held =
                    hold(&svm, device, &accesses, |a| Want::bracket(a.access, Span::sized(a.addr, a.len)))?;
                let mut state = begun.lock().unwrap_or_else(PoisonError::into_inner);
                match *state {
                    State::Ended => svm.release(&held),
                    _ => *state = State::Held(held),
                }
                Ok(())
            });
            Ok((Bracket(state), fence))
        })
    }

    /// Ends what [`Runtime::begin_access`] began.
    pub fn end_access(&self, bracket: Bracket) -> Result<()> {
        let inner = self.inner();
        let svm = inner.svm.clone();
        inner.control.end(move || {
            let mut state = bracket.0.lock().unwrap_or_else(PoisonError::into_inner);
            if let State::Held(held) = std::mem::replace(&mut *state, State::Ended) {
                svm.release(&held);
            }
            Ok(())
        })
    }
}

/// Refuses at once what can never be held at one time, with both sizes.
pub(super) fn check_working_set(info: &DeviceInfo, accesses: &[Access]) -> Result<()> {
    if let Some(bad) = accesses.iter().find(|a| a.len == 0 || a.addr.checked_add(a.len).is_none()) {
        return Err(Error::Invalid {
            argument: "accesses",
            reason: format!("{:#x} + {:#x} is empty or wraps around", bad.addr, bad.len),
        });
    }
    let mut spans: Vec<Span> = accesses.iter().map(|a| Span::sized(a.addr, a.len).page_aligned()).collect();
    spans.sort_unstable();
    let mut end = 0;
    let needed: u64 = spans
        .iter()
        .map(|s| {
            let fresh = s.end.saturating_sub(s.start.max(end));
            end = end.max(s.end);
            fresh
        })
        .sum();
    if needed > info.vram_bytes && !info.recoverable_faults {
        return Err(Error::OutOfDeviceMemory { needed, capacity: info.vram_bytes, busy: 0 });
    }
    Ok(())
}

/// Holds all of `accesses` on the device, each as `want` says, or none of them.
pub(super) fn hold(
    svm: &Svm,
    device: u32,
    accesses: &[Access],
    want: impl Fn(&Access) -> Want,
) -> Result<Vec<Arc<Range>>> {
    let mut held = Vec::new();
    for a in accesses {
        match svm.gpu_access_holding(device, a.addr, a.len, want(a), &held) {
            Ok(more) => held.extend(more),
            Err(e) => {
                svm.release(&held);
                return Err(e);
            }
        }
    }
    Ok(held)
}
