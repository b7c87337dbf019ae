//! The heap: jemalloc, with its user memory confined to [`crate::spans`].
//!
//! # Overview
//! jemalloc keeps everything it knows about blocks (extent records, slab bitmaps, thread caches) apart from the blocks,
//! so freeing a block writes nothing into it. usvm makes its own jemalloc arenas whose extent hooks take memory from
//! [`crate::spans`], with their metadata *not* taken through these hooks, and binds each thread to one of them at the
//! thread's first allocation. jemalloc's automatic arenas are left with its internal allocations (thread cache tables),
//! so user memory and bookkeeping never share a page.
//!
//! # Locking
//! jemalloc's, which are set right around fork by handlers that it registers itself. Binding takes none of ours.
//!
//! # Limits
//! Blocks that libc allocates while jemalloc starts (it is called by what it calls) come from jemalloc's own first
//! arena: they are not in a span, and are still known to [`owns`].
//!
//! # Safety
//! The functions have C's contracts. Blocks go back to the allocator that made them, as jemalloc finds it by address.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{c_int, c_uint, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use tikv_jemalloc_sys as je;

use crate::spans;

thread_local! {
    /// Whether this thread was bound to one of our arenas (or is being bound).
    static BOUND: Cell<bool> = const { Cell::new(false) };
}

/// Arenas at most; there are as many as processors.
const MOST_ARENAS: usize = 64;

/// jemalloc's numbers of our arenas; 0 is none (its own first arena).
static ARENAS: [AtomicU32; MOST_ARENAS] = [const { AtomicU32::new(0) }; MOST_ARENAS];
static THREADS: AtomicU32 = AtomicU32::new(0);

static mut HOOKS: je::extent_hooks_t = je::extent_hooks_t {
    alloc: Some(hook_alloc),
    dalloc: None,
    destroy: None,
    commit: None,
    decommit: None,
    purge_lazy: None,
    purge_forced: Some(hook_purge),
    split: Some(hook_split),
    merge: Some(hook_merge),
};

unsafe extern "C" fn hook_alloc(
    _: *mut je::extent_hooks_t,
    wanted: *mut c_void,
    size: usize,
    align: usize,
    zero: *mut bool,
    commit: *mut bool,
    _: c_uint,
) -> *mut c_void {
    if !wanted.is_null() {
        return ptr::null_mut();
    }
    match spans::take(size, align) {
        Some(at) => {
            // SAFETY: jemalloc passes two flags of its own. Fresh spans are zero and readable and writable.
            unsafe {
                *zero = true;
                *commit = true;
            }
            at.cast()
        }
        None => ptr::null_mut(),
    }
}

unsafe extern "C" fn hook_purge(
    _: *mut je::extent_hooks_t,
    at: *mut c_void,
    _size: usize,
    offset: usize,
    length: usize,
    _: c_uint,
) -> bool {
    // SAFETY: an unused part of an extent that came from `hook_alloc`.
    unsafe { !spans::drop_pages(at.cast::<u8>().add(offset), length) }
}

/// Any extent can be split: there is nothing to be kept about its parts.
unsafe extern "C" fn hook_split(
    _: *mut je::extent_hooks_t,
    _: *mut c_void,
    _: usize,
    _: usize,
    _: usize,
    _: bool,
    _: c_uint,
) -> bool {
    false
}

/// Neighbours can be merged wherever they came from: pages are dropped, never unmapped.
unsafe extern "C" fn hook_merge(
    _: *mut je::extent_hooks_t,
    _: *mut c_void,
    _: usize,
    _: *mut c_void,
    _: usize,
    _: bool,
    _: c_uint,
) -> bool {
    false
}

/// jemalloc's `arena_config_t`.
#[repr(C)]
struct ArenaConfig {
    hooks: *mut je::extent_hooks_t,
    metadata_use_hooks: bool,
}

#[cold]
#[inline(never)]
fn bind() {
    // First, so that what jemalloc and libc allocate meanwhile does not come here again.
    BOUND.set(true);
    let turn = THREADS.fetch_add(1, Ordering::Relaxed) as usize;
    let Some(slot) = ARENAS.get(turn % processors()) else { return };
    let mut arena: c_uint = slot.load(Ordering::Acquire);
    if arena == 0 {
        let Some(new) = create() else { return };
        // Who comes second leaves its arena unused: that costs a page and needs no lock that fork could break.
        arena = match slot.compare_exchange(0, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => new,
            Err(theirs) => theirs,
        };
    }
    // SAFETY: the name is a C string and the value has the type that jemalloc documents for it.
    unsafe {
        je::mallctl(
            c"thread.arena".as_ptr(),
            ptr::null_mut(),
            ptr::null_mut(),
            (&raw mut arena).cast(),
            size_of::<c_uint>(),
        )
    };
}

fn create() -> Option<c_uint> {
    let mut config = ArenaConfig { hooks: &raw mut HOOKS, metadata_use_hooks: false };
    let (mut arena, mut len) = (0 as c_uint, size_of::<c_uint>());
    // SAFETY: as in `bind`; the hooks live as long as the process.
    let failed = unsafe {
        je::mallctl(
            c"experimental.arenas_create_ext".as_ptr(),
            (&raw mut arena).cast(),
            &raw mut len,
            (&raw mut config).cast(),
            size_of::<ArenaConfig>(),
        )
    };
    (failed == 0).then_some(arena)
}

fn processors() -> usize {
    // SAFETY: sysconf only reads.
    let n = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    usize::try_from(n).unwrap_or(1).clamp(1, MOST_ARENAS)
}

#[inline(always)]
fn ready() {
    if !BOUND.get() {
        bind();
    }
}

/// C's `malloc`: NULL when there is no memory.
///
/// # Safety
/// The block must be freed by this allocator.
#[inline]
pub unsafe fn malloc(size: usize) -> *mut c_void {
    ready();
    // SAFETY: any size is allowed.
    unsafe { je::malloc(size) }
}

/// C's `calloc`: NULL when there is no memory or the product overflows. Fresh memory is not written.
///
/// # Safety
/// The block must be freed by this allocator.
#[inline]
pub unsafe fn calloc(count: usize, size: usize) -> *mut c_void {
    ready();
    // SAFETY: any sizes are allowed.
    unsafe { je::calloc(count, size) }
}

/// C's `realloc`: NULL when there is no memory, and the old block is still there.
///
/// # Safety
/// `block` is NULL or a block of this allocator that is not used under its old address afterwards.
#[inline]
pub unsafe fn realloc(block: *mut c_void, size: usize) -> *mut c_void {
    ready();
    // SAFETY: the caller's contract.
    unsafe { je::realloc(block, size) }
}

/// C's `aligned_alloc`: NULL when there is no memory or `align` is no power of two. Any `size` will do.
///
/// # Safety
/// The block must be freed by this allocator.
#[inline]
pub unsafe fn aligned_alloc(align: usize, size: usize) -> *mut c_void {
    if !align.is_power_of_two() || size.checked_add(align).is_none_or(|sum| sum > isize::MAX as usize) {
        return ptr::null_mut();
    }
    ready();
    // SAFETY: the size is not zero and the alignment a power of two.
    unsafe { je::mallocx(size.max(1), je::MALLOCX_ALIGN(align)) }
}

/// C's `free`. Writes nothing into the block and reads nothing from it.
///
/// # Safety
/// `block` is NULL or a block of this allocator, not used afterwards.
#[inline]
pub unsafe fn free(block: *mut c_void) {
    // SAFETY: the caller's contract.
    unsafe { je::free(block) }
}

/// The bytes that `block` really has; 0 for NULL.
///
/// # Safety
/// `block` is NULL or a block of this allocator.
#[inline]
pub unsafe fn usable_size(block: *const c_void) -> usize {
    // SAFETY: the caller's contract.
    unsafe { je::malloc_usable_size(block) }
}

/// Whether `block` is this allocator's. Never reads what is there. For blocks of this allocator it is a few comparisons; for
/// others it asks jemalloc's records too.
pub fn owns(block: *const c_void) -> bool {
    if spans::owns(block.addr()) {
        return true;
    }
    let (mut arena, mut len) = (0 as c_uint, size_of::<c_uint>());
    let mut block = block;
    // SAFETY: "arenas.lookup" takes an address, which it looks up, and gives an arena's number.
    unsafe {
        je::mallctl(
            c"arenas.lookup".as_ptr(),
            (&raw mut arena).cast(),
            &raw mut len,
            (&raw mut block).cast(),
            size_of::<*const c_void>(),
        ) == 0
    }
}

/// What [`Layout`](std::alloc::Layout) means to jemalloc.
#[inline(always)]
fn flags(size: usize, align: usize) -> c_int {
    if align <= 16 && align <= size { 0 } else { je::MALLOCX_ALIGN(align) }
}

#[inline(always)]
pub(crate) unsafe fn alloc(size: usize, align: usize, zero: bool) -> *mut u8 {
    ready();
    let flags = flags(size, align);
    // SAFETY: GlobalAlloc's contract: the size is not zero and the alignment a power of two.
    unsafe {
        match (flags, zero) {
            (0, false) => je::malloc(size).cast(),
            (0, true) => je::calloc(1, size).cast(),
            (_, false) => je::mallocx(size, flags).cast(),
            (_, true) => je::mallocx(size, flags | je::MALLOCX_ZERO).cast(),
        }
    }
}

#[inline(always)]
pub(crate) unsafe fn dealloc(block: *mut u8, size: usize, align: usize) {
    // SAFETY: GlobalAlloc's contract: allocated with this size and alignment.
    unsafe { je::sdallocx(block.cast(), size, flags(size, align)) }
}

#[inline(always)]
pub(crate) unsafe fn resize(block: *mut u8, align: usize, size: usize) -> *mut u8 {
    ready();
    // SAFETY: GlobalAlloc's contract.
    unsafe {
        match flags(size, align) {
            0 => je::realloc(block.cast(), size).cast(),
            flags => je::rallocx(block.cast(), size, flags).cast(),
        }
    }
}
