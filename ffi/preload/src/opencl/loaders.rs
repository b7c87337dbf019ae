//! Which loaders the program uses, and the functions behind each.
//!
//! # Overview
//! A process can hold several OpenCL loaders (a Python module with its own, DPC++ with another). Each that the layer
//! meets gets a slot: its own entry points, and an instance of every function of the layer (`wrap::name::<SLOT>`) that
//! calls exactly these. So no call is ever carried from one loader into another.
//!
//! A loader is met in one of two ways: it takes the layer ([`super::layer`]), or a call to it comes through the preloaded
//! library ([`super::interpose`]). The first wins: once a loader has the layer, preloaded entry points step aside.
//!
//! # Locking
//! A mutex while a slot is filled; slots never change afterwards, except for one flag.
//!
//! # Limits
//! [`SLOTS`] loaders; calls to further ones pass through untouched.

use std::ffi::{CStr, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

use super::dispatch::{Dispatch, ENTRIES, Raw};
use super::stats::COUNTS;
use super::{settings, wrap};

/// How many loaders can be told apart.
pub const SLOTS: usize = 8;

/// One loader.
pub struct Loader {
    /// Where its object is mapped; zero if that could not be found out.
    base: usize,
    /// Its own entry points.
    target: Dispatch,
    /// Those with the layer's in front.
    wrapped: Dispatch,
    /// It calls the layer by itself.
    layered: AtomicBool,
}

static LOADERS: [OnceLock<Loader>; SLOTS] = [const { OnceLock::new() }; SLOTS];
static FILLING: Mutex<()> = Mutex::new(());
static NOBODY: Dispatch = Dispatch::from_raw([0; ENTRIES]);

/// The entry points behind the slot.
pub fn target(slot: usize) -> &'static Dispatch {
    LOADERS.get(slot).and_then(OnceLock::get).map_or(&NOBODY, |l| &l.target)
}

/// The entry points of the slot with the layer's in front.
pub fn wrapped(slot: usize) -> &'static Dispatch {
    LOADERS.get(slot).and_then(OnceLock::get).map_or(&NOBODY, |l| &l.wrapped)
}

/// What is known of the loader whose object is at `base`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// It calls the layer.
    Layered,
    /// The preloaded library answers for it, from this slot.
    Preloaded(usize),
}

/// Whether the loader at `base` was met.
pub fn known(base: usize) -> Option<Known> {
    let mut found = None;
    for (slot, loader) in LOADERS.iter().enumerate() {
        let Some(loader) = loader.get().filter(|l| l.base == base) else { continue };
        if loader.layered.load(Ordering::Acquire) {
            return Some(Known::Layered);
        }
        found = Some(Known::Preloaded(slot));
    }
    found
}

/// Takes a loader that calls the layer; gives its slot.
pub fn add_layered(base: usize, raw: Raw) -> Option<usize> {
    let filling = FILLING.lock().unwrap_or_else(|p| p.into_inner());
    let slot = add(base, raw, true, filling)?;
    for loader in LOADERS.iter().filter_map(OnceLock::get).filter(|l| base != 0 && l.base == base) {
        loader.layered.store(true, Ordering::Release);
    }
    COUNTS.layers.add(1);
    Some(slot)
}

/// Takes a loader that is reached through preloaded entry points, unless it is known by now.
pub fn add_preloaded(base: usize, raw: impl FnOnce() -> Raw) -> Option<Known> {
    if let Some(known) = known(base) {
        return Some(known);
    }
    let raw = raw();
    let filling = FILLING.lock().unwrap_or_else(|p| p.into_inner());
    // Another thread may have met it meanwhile.
    if let Some(known) = known(base) {
        return Some(known);
    }
    let slot = add(base, raw, false, filling)?;
    COUNTS.preloads.add(1);
    Some(Known::Preloaded(slot))
}

/// Fills a slot; settings are asked for without the lock.
fn add(base: usize, raw: Raw, layered: bool, filling: MutexGuard<'_, ()>) -> Option<usize> {
    let slot = LOADERS.iter().position(|l| l.get().is_none())?;
    let target = Dispatch::from_raw(raw);
    let wrapped = instance(slot, &target);
    let loader = Loader { base, target, wrapped, layered: AtomicBool::new(layered) };
    let _ = LOADERS[slot].set(loader);
    drop(filling);
    settings::at_first_use();
    Some(slot)
}

fn instance(slot: usize, target: &Dispatch) -> Dispatch {
    match slot {
        0 => wrap::table::<0>(target),
        1 => wrap::table::<1>(target),
        2 => wrap::table::<2>(target),
        3 => wrap::table::<3>(target),
        4 => wrap::table::<4>(target),
        5 => wrap::table::<5>(target),
        6 => wrap::table::<6>(target),
        _ => wrap::table::<7>(target),
    }
}

/// Where the object that contains `addr` is mapped, and its file; `None` if no object does.
///
/// dladdr would look for the nearest symbol as well, among all that a library has.
pub fn object_at(addr: usize) -> Option<(usize, &'static CStr)> {
    let mut search = Search { addr, found: None };
    // SAFETY: `look_at` is called with the search, before this returns.
    unsafe { libc::dl_iterate_phdr(Some(look_at), (&raw mut search).cast()) };
    search.found
}

struct Search {
    addr: usize,
    found: Option<(usize, &'static CStr)>,
}

/// One object of [`object_at`]'s search; 1 ends it.
unsafe extern "C" fn look_at(object: *mut libc::dl_phdr_info, _: usize, search: *mut c_void) -> c_int {
    // SAFETY: the loader gives an object of which the headers are there, and `object_at` its search. The name lives as long
    // as the object stays loaded.
    unsafe {
        let (object, search) = (&*object, &mut *search.cast::<Search>());
        if object.dlpi_phdr.is_null() || object.dlpi_name.is_null() {
            return 0;
        }
        let headers = std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into());
        let base = object.dlpi_addr as usize;
        let mut parts = headers.iter().filter(|h| h.p_type == libc::PT_LOAD);
        let Some(first) = parts.clone().next() else { return 0 };
        let begin = |part: &libc::Elf64_Phdr| base.wrapping_add(part.p_vaddr as usize);
        if !parts.any(|part| search.addr.wrapping_sub(begin(part)) < part.p_memsz as usize) {
            return 0;
        }
        search.found = Some((begin(first) & !0xfff, CStr::from_ptr(object.dlpi_name)));
        1
    }
}

/// Where the program's own file is mapped.
pub fn program_base() -> usize {
    static BASE: OnceLock<usize> = OnceLock::new();
    // SAFETY: a look into what the kernel told the process at its start.
    let headers = || unsafe { libc::getauxval(libc::AT_PHDR) } as usize;
    *BASE.get_or_init(|| object_at(headers()).map_or(0, |(base, _)| base))
}

/// Where this library is mapped.
pub fn own_base() -> usize {
    static BASE: OnceLock<usize> = OnceLock::new();
    *BASE.get_or_init(|| object_at(own_base as *const () as usize).map_or(0, |(base, _)| base))
}

/// Whether `addr` lies in this library.
pub fn is_ours(addr: usize) -> bool {
    object_at(addr).is_some_and(|(base, _)| base == own_base())
}
