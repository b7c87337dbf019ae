//! Blocks above 32 KiB, and the memory of slabs: jemalloc, with user memory confined to [`crate::spans`].
//!
//! # Overview
//! jemalloc keeps everything it knows about blocks (extent records, caches) apart from the blocks, so freeing a block
//! writes nothing into it. usvm makes its own jemalloc arenas whose extent hooks take memory from [`crate::spans`], with
//! their metadata *not* taken through these hooks, and binds each thread to one of them at the thread's first allocation.
//! One more arena, with jemalloc's own hooks, holds the bookkeeping of small blocks. User memory and bookkeeping
//! never share a page. Freed memory is returned to the system by jemalloc's decay, by default within ten seconds of
//! further use.
//!
//! Blocks of 2 MiB and more begin at multiples of 2 MiB: they consist of whole ranges. Growing such a block moves its
//! pages (mremap) where it cannot grow in place: nothing is copied, and what is on the device is not fetched to be copied.
//!
//! # Locking
//! jemalloc's locks, which are set right around fork by handlers that it registers itself. Binding takes none of ours.
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

use crate::slab::SLAB;
use crate::spans::{self, SPAN};

thread_local! {
    /// Whether this thread was bound to one of our arenas (or is being bound).
    static BOUND: Cell<bool> = const { Cell::new(false) };
}

/// Arenas at most; there are as many as processors.
const MOST_ARENAS: usize = 64;

/// jemalloc's numbers of our arenas; 0 is none (its own first arena).
static ARENAS: [AtomicU32; MOST_ARENAS] = [const { AtomicU32::new(0) }; MOST_ARENAS];
static THREADS: AtomicU32 = AtomicU32::new(0);
/// The arena for bookkeeping.
static BOOKKEEPING: AtomicU32 = AtomicU32::new(0);

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
            // SAFETY: jemalloc passes two flags of its own. Fresh spans are zero, readable and writable.
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
    let Some(mut arena) = arena(slot, create) else { return };
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

/// The arena whose number `slot` keeps, made if there is none yet.
#[inline]
fn arena(slot: &AtomicU32, create: fn() -> Option<c_uint>) -> Option<c_uint> {
    match slot.load(Ordering::Acquire) {
        0 => {}
        made => return Some(made),
    }
    let new = create()?;
    // Who comes second leaves its arena unused: that costs a page and needs no lock that fork could break.
    match slot.compare_exchange(0, new, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => Some(new),
        Err(theirs) => Some(theirs),
    }
}

/// An arena for user memory.
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

/// An arena for bookkeeping.
fn create_plain() -> Option<c_uint> {
    let (mut arena, mut len) = (0 as c_uint, size_of::<c_uint>());
    // SAFETY: as in `bind`.
    let failed = unsafe {
        je::mallctl(c"arenas.create".as_ptr(), (&raw mut arena).cast(), &raw mut len, ptr::null_mut(), 0)
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

/// Memory for a slab, null when there is none.
pub(crate) fn slab() -> *mut u8 {
    ready();
    // SAFETY: a size that is not zero and a power of two.
    unsafe { je::mallocx(SLAB, je::MALLOCX_ALIGN(SLAB) | je::MALLOCX_TCACHE_NONE).cast() }
}

/// Takes a slab's memory back.
pub(crate) fn free_slab(memory: *mut u8) {
    if !memory.is_null() {
        // SAFETY: made by `slab`; nobody uses it.
        unsafe { je::sdallocx(memory.cast(), SLAB, je::MALLOCX_ALIGN(SLAB) | je::MALLOCX_TCACHE_NONE) }
    }
}

/// Memory that is not for users, in cache lines of its own; null when there is none.
pub(crate) fn bookkeeping(size: usize) -> *mut u8 {
    let Some(arena) = arena(&BOOKKEEPING, create_plain) else { return ptr::null_mut() };
    let flags = je::MALLOCX_ARENA(arena as usize) | je::MALLOCX_TCACHE_NONE | je::MALLOCX_ALIGN(64);
    // SAFETY: a size that is not zero.
    unsafe { je::mallocx(size, flags).cast() }
}

/// Takes bookkeeping memory back.
pub(crate) fn free_bookkeeping(memory: *mut u8) {
    if !memory.is_null() {
        // SAFETY: made by `bookkeeping`; nobody uses it.
        unsafe { je::dallocx(memory.cast(), je::MALLOCX_TCACHE_NONE) }
    }
}

/// A block for a thread or at a time that has no slabs.
pub(crate) fn fallback(size: usize) -> *mut u8 {
    ready();
    // SAFETY: jemalloc's small blocks of a power of two and of our other sizes are aligned as the size allows.
    unsafe { je::mallocx(size, je::MALLOCX_ALIGN(1 << size.trailing_zeros())).cast() }
}

/// What makes blocks of whole ranges begin at one, and `align`.
#[inline]
fn flags(size: usize, align: usize) -> c_int {
    let align = if size >= SPAN { align.max(SPAN) } else { align };
    if align <= 4096 { 0 } else { je::MALLOCX_ALIGN(align) }
}

/// A block of `size` bytes, more than a page, at a multiple of `align`, a power of two. Zeroed if asked for; fresh memory is
/// zero and is not written.
#[inline]
pub(crate) fn alloc(size: usize, align: usize, zero: bool) -> *mut u8 {
    ready();
    let zero = if zero { je::MALLOCX_ZERO } else { 0 };
    // SAFETY: the size is not zero.
    unsafe { je::mallocx(size, flags(size, align) | zero).cast() }
}

/// Frees a block of jemalloc's; nothing happens for null.
///
/// # Safety
/// C's.
#[inline]
pub(crate) unsafe fn free(block: *mut u8) {
    // SAFETY: the caller's contract.
    unsafe { je::free(block.cast()) }
}

/// As [`free`], for a block of [`alloc`] with this size and alignment.
///
/// # Safety
/// As [`free`].
#[inline]
pub(crate) unsafe fn free_sized(block: *mut u8, size: usize, align: usize) {
    // SAFETY: the caller's contract.
    unsafe { je::sdallocx(block.cast(), size, flags(size, align)) }
}

/// Makes a block of jemalloc's `size` bytes large, more than a page. Null, with the old block still there, when there is no
/// memory.
///
/// # Safety
/// C's.
pub(crate) unsafe fn resize(block: *mut u8, size: usize, align: usize) -> *mut u8 {
    ready();
    // SAFETY: the caller's contract: the block is jemalloc's and the caller's; its usable bytes are its own.
    unsafe {
        let old = je::malloc_usable_size(block.cast());
        if old < SPAN || size <= old {
            return je::rallocx(block.cast(), size, flags(size, align)).cast();
        }
        if je::xallocx(block.cast(), size, 0, flags(size, align)) >= size {
            return block;
        }
        let new = alloc(size, align, false);
        if !new.is_null() {
            if !spans::move_pages(block, new, old) {
                ptr::copy_nonoverlapping(block, new, old);
            }
            je::dallocx(block.cast(), 0);
        }
        new
    }
}

/// The bytes that a block of jemalloc's has; 0 for null.
///
/// # Safety
/// C's.
#[inline]
pub(crate) unsafe fn usable_size(block: *const u8) -> usize {
    // SAFETY: the caller's contract.
    unsafe { je::malloc_usable_size(block.cast()) }
}

/// Whether jemalloc knows `block`, wherever it is.
pub(crate) fn knows(block: *const u8) -> bool {
    let (mut arena, mut len) = (0 as c_uint, size_of::<c_uint>());
    let mut block = block.cast::<c_void>();
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
