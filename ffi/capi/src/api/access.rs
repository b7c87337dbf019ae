//! Accesses and fences.
//!
//! # Overview
//! An access that was begun without a fence is kept with its space, under the number of the thread that began it; one
//! with a fence is kept with the fence.
//!
//! # Limits
//! A thread that ends with accesses open leaves them to `usvm_space_destroy`.
//!
//! # Safety
//! Pointers go through `super::user`; ranges are addresses here and never followed.
#![allow(unsafe_code)]

use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use usvm::{Access, Bracket, Error, GpuAccess, Runtime};

use super::handles::{self, Id, Space, Work};
use super::memory::{hand_out, range};
use super::notify;
use super::result::{Done, Failure, USVM_ERROR_TIMEOUT, call, invalid, usvm_result_t};
use super::types::*;
use super::user;

fn read_accesses(runtime: &Runtime, at: *const usvm_access_t, n: usize) -> Done<Vec<Access>> {
    if n == 0 || n > USVM_MAX_ACCESSES {
        return Err(invalid("n", format_args!("{n} is not 1 to {USVM_MAX_ACCESSES}")));
    }
    let given = user::read_slice("accesses", at, n)?;
    let mut accesses = Vec::with_capacity(n);
    for (i, access) in given.iter().enumerate() {
        let named = |failure: Failure| failure.of(format_args!("accesses[{i}]"));
        let mode = match access.mode {
            USVM_ACCESS_READ => GpuAccess::Read,
            USVM_ACCESS_WRITE => GpuAccess::Write,
            USVM_ACCESS_ATOMIC => GpuAccess::Atomic,
            usvm_access_mode_t(other) => {
                return Err(named(invalid("mode", format_args!("{other} is not READ, WRITE or ATOMIC"))));
            }
        };
        if access.reserved != 0 {
            return Err(named(invalid("reserved", "is not 0")));
        }
        let (addr, len) = range(runtime, ("ptr", "len"), access.ptr, access.len).map_err(named)?;
        accesses.push(Access { addr, len, access: mode });
    }
    Ok(accesses)
}

/// Says which of the accesses an error is about, where it tells an address.
fn which(accesses: &[Access], error: Error) -> Failure {
    let addr = match &error {
        Error::NoVma { addr } | Error::NotWritable { addr } | Error::Gone { addr } => Some(*addr),
        Error::OutsideSpace { addr } => Some(*addr),
        Error::Busy { span } | Error::Mixed { span } => Some(span.start),
        _ => None,
    };
    let page = |at: u64| at & !0xfff;
    let meant = addr
        .and_then(|addr| accesses.iter().position(|a| page(a.addr) <= page(addr) && addr < a.addr + a.len));
    let failure = Failure::from(error);
    match meant {
        Some(i) => failure.of(format_args!("accesses[{i}].ptr")),
        None => failure.of("accesses"),
    }
}

/// See the header.
///
/// # Safety
/// None beyond the header's: pointers are checked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_begin_access(
    space: usvm_space_t,
    accesses: *const usvm_access_t,
    n: usize,
    fence: *mut usvm_fence_t,
) -> usvm_result_t {
    call(|| {
        let (on, runtime) = handles::space(space)?;
        let accesses = read_accesses(&runtime, accesses, n)?;
        if !fence.is_null() {
            return begin_later(space, &on, &runtime, &accesses, fence);
        }
        let bracket = runtime.begin_access(on.device, &accesses).map_err(|e| which(&accesses, e))?;
        let me = handles::this_thread();
        begun(&on).push((me, bracket));
        if let Err(failure) = handles::lock().space(space).map(drop) {
            // It was destroyed meanwhile, and whoever did that may have looked before the push.
            if let Some(bracket) = take_begun(&on, me) {
                runtime.end_access(bracket)?;
            }
            return Err(failure);
        }
        notify::catch_up();
        Ok(())
    })
}

fn begin_later(
    space: usvm_space_t,
    on: &Space,
    runtime: &Runtime,
    accesses: &[Access],
    at: *mut usvm_fence_t,
) -> Done {
    hand_out(space, at, true, |work| {
        let (bracket, fence) =
            runtime.begin_access_later(on.device, accesses).map_err(|e| which(accesses, e))?;
        *bracket_of(work) = Some(bracket);
        Ok(fence)
    })?;
    // A space that was destroyed meanwhile may have been looked through before the bracket was there.
    let still = handles::lock().space(space).map(drop);
    if still.is_err() {
        end_all_of(space, runtime)?;
    }
    still
}

fn end_all_of(space: usvm_space_t, runtime: &Runtime) -> Done {
    let id = space.0.addr() as Id;
    let works: Vec<_> =
        handles::lock().works.iter().filter(|(_, w)| w.space == id).map(|(_, w)| w.clone()).collect();
    works.iter().try_for_each(|work| end(runtime, work).map(drop))
}

fn bracket_of(work: &Work) -> MutexGuard<'_, Option<Bracket>> {
    work.bracket.lock().unwrap_or_else(PoisonError::into_inner)
}

fn begun(space: &Space) -> MutexGuard<'_, Vec<(u64, Bracket)>> {
    space.begun.lock().unwrap_or_else(PoisonError::into_inner)
}

fn take_begun(space: &Space, thread: u64) -> Option<Bracket> {
    let mut begun = begun(space);
    let last = begun.iter().rposition(|(who, _)| *who == thread)?;
    Some(begun.remove(last).1)
}

/// Ends the access of `work`; `false` if it has none (any more).
fn end(runtime: &Runtime, work: &Work) -> Done<bool> {
    let bracket = bracket_of(work).take();
    let Some(bracket) = bracket else { return Ok(false) };
    runtime.end_access(bracket)?;
    Ok(true)
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_end_access(space: usvm_space_t, fence: usvm_fence_t) -> usvm_result_t {
    call(|| {
        let (on, runtime) = handles::space(space)?;
        if fence.0.is_null() {
            let bracket = take_begun(&on, handles::this_thread()).ok_or_else(|| {
                invalid("fence", "is NULL, and this thread has begun no access here without a fence")
            })?;
            return Ok(runtime.end_access(bracket)?);
        }
        let work = handles::lock().work(fence)?;
        if !work.access || work.space != space.0.addr() as Id {
            return Err(invalid("fence", "is not of an access that was begun on this space"));
        }
        match end(&runtime, &work)? {
            true => Ok(()),
            false => Err(invalid("fence", "its access was ended before")),
        }
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_fence_wait(fence: usvm_fence_t, timeout_ns: i64) -> usvm_result_t {
    call(|| {
        let work = handles::lock().work(fence)?;
        let timeout = match timeout_ns {
            -1 => None,
            0.. => Some(Duration::from_nanos(timeout_ns.unsigned_abs())),
            _ => return Err(invalid("timeout_ns", format_args!("{timeout_ns} is neither -1 nor a time"))),
        };
        if !work.fence.wait().wait(timeout)? {
            return Err(Failure::new(
                USVM_ERROR_TIMEOUT,
                format_args!("fence: not signalled within {timeout_ns} ns"),
            ));
        }
        notify::catch_up();
        Ok(())
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_fence_destroy(fence: usvm_fence_t) -> usvm_result_t {
    call(|| {
        let mut tables = handles::lock();
        let work = tables.work(fence)?;
        tables.works.remove(fence.0.addr() as Id);
        drop(tables);
        if let Ok(runtime) = handles::runtime() {
            end(&runtime, &work)?;
        }
        Ok(())
    })
}
