//! Placement, and what the device does to memory.
//!
//! # Limits
//! A device without recoverable faults holds what it works on, so copies and fills go in pieces of an eighth of its
//! memory there.
//!
//! # Safety
//! Pointers go through `super::user`; ranges are addresses here and never followed.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, OnceLock};

use usvm::ground::addr::{SZ_2M, SZ_64K, Span};
use usvm::{Access, Error, Fence, GpuAccess, Hint, Location, Need, Runtime};

use super::handles::{self, Id, Work};
use super::notify::{self, Reason};
use super::result::{Done, Failure, USVM_ERROR_OUTSIDE_SPACE, call, invalid, usvm_result_t};
use super::types::*;
use super::user;

/// A range of the caller's: address and length, inside what devices reach.
pub(super) fn range(
    runtime: &Runtime,
    (ptr_name, len_name): (&str, &str),
    ptr: *const c_void,
    len: usize,
) -> Done<(u64, u64)> {
    let (addr, len) = (ptr.addr() as u64, len as u64);
    if ptr.is_null() {
        return Err(invalid(ptr_name, "is NULL"));
    }
    if len == 0 {
        return Err(invalid(len_name, "is 0"));
    }
    let limits = runtime.limits();
    if !limits.contains(addr) {
        let message = format_args!("{ptr_name}: {addr:#x} is no address that devices reach").to_string();
        return Err(Failure::new(USVM_ERROR_OUTSIDE_SPACE, message));
    }
    if addr.checked_add(len).is_none_or(|end| end > limits.end) {
        return Err(invalid(
            len_name,
            format_args!("{len}: the range goes past the addresses that devices reach"),
        ));
    }
    Ok((addr, len))
}

/// As [`range`], all of it mapped.
fn mapped(runtime: &Runtime, ptr: *const c_void, len: usize) -> Done<(u64, u64)> {
    let (addr, len) = range(runtime, ("ptr", "len"), ptr, len)?;
    runtime.check_mapped(addr, len, None).map_err(|e| Failure::from(e).of("ptr"))?;
    Ok((addr, len))
}

/// A place; `None` for USVM_LOCATION_NONE.
fn place(runtime: &Runtime, location: usvm_location_t) -> Done<Option<Location>> {
    let there = runtime.devices().len();
    match location.r#type {
        USVM_LOCATION_NONE => Ok(None),
        USVM_LOCATION_HOST if location.id == 0 => Ok(Some(Location::Host)),
        USVM_LOCATION_HOST => Err(invalid("location.id", format_args!("{}: the host is 0", location.id))),
        USVM_LOCATION_DEVICE if (location.id as usize) < there => Ok(Some(Location::Device(location.id))),
        USVM_LOCATION_DEVICE => {
            Err(invalid("location.id", format_args!("{}: there are {there} devices", location.id)))
        }
        usvm_location_type_t(other) => {
            Err(invalid("location.type", format_args!("{other} is not NONE, HOST or DEVICE")))
        }
    }
}

fn needed(place: Option<Location>) -> Done<Location> {
    place.ok_or_else(|| invalid("location.type", "is NONE, and a place is needed"))
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_advise(
    space: usvm_space_t,
    ptr: *const c_void,
    len: usize,
    advice: usvm_advice_t,
    location: usvm_location_t,
) -> usvm_result_t {
    call(|| {
        let (_, runtime) = handles::space(space)?;
        let place = place(&runtime, location)?;
        let hint = match advice {
            USVM_ADVICE_SET_READ_MOSTLY => Hint::ReadMostly(true),
            USVM_ADVICE_UNSET_READ_MOSTLY => Hint::ReadMostly(false),
            USVM_ADVICE_SET_PREFERRED_LOCATION => Hint::PreferredLocation(Some(needed(place)?)),
            USVM_ADVICE_UNSET_PREFERRED_LOCATION => Hint::PreferredLocation(None),
            USVM_ADVICE_SET_ACCESSED_BY => match needed(place)? {
                Location::Device(device) => Hint::AccessedBy(Some(device)),
                Location::Host => return Err(invalid("location.type", "is HOST, which accesses everything")),
            },
            USVM_ADVICE_UNSET_ACCESSED_BY => Hint::AccessedBy(None),
            USVM_ADVICE_WILL_NEED => Hint::Need(Need::Will(needed(place)?)),
            USVM_ADVICE_DONT_NEED => Hint::Need(Need::Dont),
            usvm_advice_t(other) => return Err(invalid("advice", format_args!("{other} is not known"))),
        };
        let (addr, len) = mapped(&runtime, ptr, len)?;
        Ok(runtime.advise(addr, len, hint)?)
    })
}

/// Submits work by `submit` and puts a handle of it at `at`. The handle goes out first: what the work does to memory may
/// concern the very place where it goes. On failure that place has what it had before.
pub(super) fn hand_out(
    space: usvm_space_t,
    at: *mut usvm_fence_t,
    access: bool,
    submit: impl FnOnce(&Work) -> Done<Fence>,
) -> Done {
    user::check_writable("fence", at)?;
    let before = user::read("fence", at.cast::<usize>())?;
    let work = Arc::new(Work {
        fence: OnceLock::new(),
        space: space.0.addr() as Id,
        access,
        bracket: Mutex::default(),
    });
    let mut tables = handles::lock();
    tables.space(space)?;
    let id = tables.works.add(work.clone());
    drop(tables);
    let submitted = user::write("fence", at, usvm_fence_t(handles::shape(id))).and_then(|()| submit(&work));
    match submitted {
        Ok(fence) => {
            let _ = work.fence.set(fence);
            Ok(())
        }
        Err(failure) => {
            // Nobody can know the handle, except who looked at the place meanwhile.
            let _ = work.fence.set(Fence::signaled(Err(Error::NotRunning("this was never begun"))));
            handles::lock().works.remove(id);
            let _ = user::write("fence", at.cast::<usize>(), before);
            Err(failure)
        }
    }
}

/// See the header.
///
/// # Safety
/// None beyond the header's: pointers are checked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_prefetch(
    space: usvm_space_t,
    ptr: *const c_void,
    len: usize,
    location: usvm_location_t,
    fence: *mut usvm_fence_t,
) -> usvm_result_t {
    call(|| {
        let (_, runtime) = handles::space(space)?;
        let to = needed(place(&runtime, location)?)?;
        let (addr, len) = mapped(&runtime, ptr, len)?;
        if !fence.is_null() {
            return hand_out(space, fence, false, |_| Ok(runtime.prefetch(addr, len, to)));
        }
        runtime.prefetch(addr, len, to).wait(None).map_err(|e| Failure::from(e).of("ptr"))?;
        notify::catch_up();
        Ok(())
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_evict(space: usvm_space_t, ptr: *const c_void, len: usize) -> usvm_result_t {
    call(|| {
        let (_, runtime) = handles::space(space)?;
        let (addr, len) = mapped(&runtime, ptr, len)?;
        runtime.evict(addr, len).map_err(|e| Failure::from(e).of("ptr"))?;
        notify::catch_up();
        Ok(())
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_discard(space: usvm_space_t, ptr: *mut c_void, len: usize) -> usvm_result_t {
    call(|| {
        let (_, runtime) = handles::space(space)?;
        let (addr, len) = mapped(&runtime, ptr, len)?;
        notify::telling(&[(Reason::Discard, Span::sized(addr, len))], || {
            runtime.discard(addr, len).map_err(|e| Failure::from(e).of("ptr"))
        })
    })
}

/// How much of `len` a device works on at once, where it has to hold it.
fn piece(info: &usvm::space::ports::DeviceInfo, len: u64) -> u64 {
    let eighth = info.vram_bytes / 8;
    if info.recoverable_faults { len } else { (eighth & !(SZ_2M - 1)).max(SZ_64K) }
}

fn announced(runtime: &Runtime, device: u32, accesses: &[(u64, u64, GpuAccess)]) -> Vec<Access> {
    match runtime.device(device).map(|d| usvm::space::ports::Device::info(&**d).recoverable_faults) {
        Ok(true) => Vec::new(),
        _ => accesses.iter().map(|&(addr, len, access)| Access { addr, len, access }).collect(),
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_copy(
    space: usvm_space_t,
    dst: *mut c_void,
    src: *const c_void,
    len: usize,
) -> usvm_result_t {
    call(|| {
        let (space, runtime) = handles::space(space)?;
        if len == 0 {
            return Ok(());
        }
        let (to, _) = range(&runtime, ("dst", "len"), dst, len)?;
        let (from, len) = range(&runtime, ("src", "len"), src, len)?;
        let check = |addr, access, name| {
            runtime.check_mapped(addr, len, Some(access)).map_err(|e| Failure::from(e).of(name))
        };
        check(to, GpuAccess::Write, "dst")?;
        check(from, GpuAccess::Read, "src")?;
        let device = space.device;
        let step = piece(&runtime.devices()[device as usize], len);
        let mut parts: Vec<(u64, u64)> =
            (0..len.div_ceil(step)).map(|n| (n * step, step.min(len - n * step))).collect();
        if to > from {
            // As memmove: the end first, before it is overwritten.
            parts.reverse();
        }
        for (offset, n) in parts {
            let (to, from) = (to + offset, from + offset);
            let uses = announced(&runtime, device, &[(to, n, GpuAccess::Write), (from, n, GpuAccess::Read)]);
            runtime.launch_with(device, &uses, move |gpu| gpu.copy(to, from, n)).wait(None)?;
        }
        Ok(())
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_fill(space: usvm_space_t, dst: *mut c_void, byte: c_int, len: usize) -> usvm_result_t {
    call(|| {
        let (space, runtime) = handles::space(space)?;
        if len == 0 {
            return Ok(());
        }
        let (to, len) = range(&runtime, ("dst", "len"), dst, len)?;
        runtime.check_mapped(to, len, Some(GpuAccess::Write)).map_err(|e| Failure::from(e).of("dst"))?;
        let device = space.device;
        let step = piece(&runtime.devices()[device as usize], len);
        for offset in (0..len).step_by(step as usize) {
            let (to, n) = (to + offset, step.min(len - offset));
            let uses = announced(&runtime, device, &[(to, n, GpuAccess::Write)]);
            runtime.launch_with(device, &uses, move |gpu| gpu.fill(to, n, byte as u8)).wait(None)?;
        }
        Ok(())
    })
}
