//! The interface to loaders with layers: `OPENCL_LAYERS=/path/libusvm_preload.so`.
//!
//! # Overview
//! A loader asks `clGetLayerInfo` which interface the library has, then hands its entry points to `clInitLayer` (since
//! cl_khr_icd 2 to `clInitLayerWithProperties`) and gets those that the layer wants in front. Entries that are null in what the layer gives are the loader's own, and a function
//! that the loader does not have is not invented.
//!
//! # Safety
//! The functions are called by loaders with the arguments of the Khronos header `cl_layer.h`. Those that take the entry
//! points are two instructions that put the caller's address in the place of the fifth argument, because that is how the
//! loader is told from others.

use std::arch::naked_asm;
use std::ffi::c_void;

use super::dispatch::{Dispatch, ENTRIES, NAMES, Raw};
use super::types::*;
use super::{capability, interpose, loaders, settings};

const NAME: &[u8] = b"usvm\0";

/// `clGetLayerInfo`: the interface's version and the layer's name.
///
/// # Safety
/// As `cl_layer.h` says: `value` has room for `size` bytes or is null, `size_ret` is writable or null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clGetLayerInfo(
    name: Uint,
    size: usize,
    value: *mut c_void,
    size_ret: *mut usize,
) -> Int {
    let version = LAYER_API_VERSION_100.to_ne_bytes();
    let bytes = match name {
        LAYER_API_VERSION => &version[..],
        LAYER_NAME => NAME,
        _ => return INVALID_VALUE,
    };
    // SAFETY: passed on from the caller.
    unsafe { capability::answer(bytes, size, value, size_ret) }
}

/// `clInitLayer`: takes the loader's entry points, gives the layer's.
///
/// # Safety
/// As `cl_layer.h` says.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn clInitLayer(
    entries: Uint,
    target: *const c_void,
    entries_ret: *mut Uint,
    layer: *mut *const c_void,
) -> Int {
    naked_asm!("mov r8, [rsp]", "jmp {init}", init = sym init)
}

/// `clInitLayerWithProperties`: the same for loaders of cl_khr_icd 2 and newer, which end their layers themselves. No
/// property is defined yet; the layer needs no end.
///
/// # Safety
/// As `cl_layer.h` says.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn clInitLayerWithProperties(
    entries: Uint,
    target: *const c_void,
    entries_ret: *mut Uint,
    layer: *mut *const c_void,
    properties: *const Bitfield,
) -> Int {
    naked_asm!("mov r8, [rsp]", "jmp {init}", init = sym init)
}

unsafe extern "C" fn init(
    entries: Uint,
    target: *const usize,
    entries_ret: *mut Uint,
    layer: *mut *const Dispatch,
    caller: usize,
) -> Int {
    if target.is_null() || entries_ret.is_null() || layer.is_null() {
        return INVALID_VALUE;
    }
    static NOTHING: Dispatch = Dispatch::from_raw([0; ENTRIES]);
    let count = ENTRIES.min(entries as usize);
    let mut ours = &NOTHING;
    if settings::get().enable {
        // SAFETY: the loader's table has `entries` words.
        let theirs = unsafe { std::slice::from_raw_parts(target, count) };
        let base = loaders::object_at(caller).map_or(0, |(base, _)| base);
        if let Some(slot) = loaders::add_layered(base, without_us(theirs, caller)) {
            ours = loaders::wrapped(slot);
            interpose::forget();
        }
    }
    // SAFETY: both were checked; the table is static.
    unsafe {
        *entries_ret = count as Uint;
        *layer = ours;
    }
    SUCCESS
}

/// The loader's table; where the preloaded entry points stand in for the loader's own (its table was filled by symbol
/// name), the loader's own.
fn without_us(theirs: &[usize], caller: usize) -> Raw {
    let mut raw = [0; ENTRIES];
    for (index, (own, address)) in raw.iter_mut().zip(theirs).enumerate() {
        *own = if *address != 0 && loaders::is_ours(*address) {
            interpose::own_of(caller, NAMES[index])
        } else {
            *address
        };
    }
    raw
}
