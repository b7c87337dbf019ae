//! Blocks above 32 KiB, and the memory of slabs: jemalloc, with user memory confined to [`crate::spans`].
//!
//! # Overview
//! jemalloc keeps everything it knows about blocks (extent records, caches) apart from the blocks, so freeing a block
//! writes nothing into it. usvm makes its own jemalloc arenas whose extent hooks take memory from [`crate::spans`], with
//! their metadata *not* taken through these hooks; each thread's heap uses one of them, by number. One more arena, with jemalloc's own hooks, holds the bookkeeping of small blocks. User memory and bookkeeping
//! never share a page. Freed memory is returned to the system by jemalloc's decay, by default within ten seconds of
//! further use.
//!
//! Blocks of 2 MiB and more begin at multiples of 2 MiB: they consist of whole ranges. Growing such a block moves its
//! pages (mremap) where it cannot grow in place: nothing is copied, and what is on the device is not fetched to be copied.
//!
//! # Locking
//! jemalloc's locks, which are set right around fork by handlers that it registers itself. There are none of ours.
//!
//! # Limits
//! Where there can be no arena of ours, blocks come from jemalloc's own: they are not in a span, and are still known.
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

/// Arenas at most; there are as many as processors.
const MOST_ARENAS: usize = 64;

/// jemalloc's numbers of our arenas; 0 is none (its own first arena).
static ARENAS: [AtomicU32; MOST_ARENAS] = [const { AtomicU32::new(0) }; MOST_ARENAS];
static HEAPS: AtomicU32 = AtomicU32::new(0);
/// The arena for bookkeeping.
static BOOKKEEPING: AtomicU32 = AtomicU32::new(0);

thread_local! {
    /// Whether this thread is asking jemalloc for a block of whole spans.
    static BLOCK: Cell<bool> = const { Cell::new(false) };
}

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
    match spans::take(size, align, BLOCK.get()) {
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
    // SAFETY: the names are C strings and the values have the types that jemalloc documents for them; the hooks live as long as the process.
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
    // SAFETY: as in `create`.
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

/// What makes jemalloc take memory from this arena; `None` if there can be no arena.
pub(crate) type Arena = c_int;

/// The next arena, in turn: each heap has one.
pub(crate) fn next_arena() -> Option<Arena> {
    let turn = HEAPS.fetch_add(1, Ordering::Relaxed) as usize;
    nth_arena(turn % processors())
}

/// An arena for who has no heap.
pub(crate) fn any_arena() -> Option<Arena> {
    nth_arena(0)
}

fn nth_arena(n: usize) -> Option<Arena> {
    let number = arena(ARENAS.get(n)?, create)?;
    Some(je::MALLOCX_ARENA(number as usize) | je::MALLOCX_TCACHE_NONE)
}

/// Memory for a slab, null when there is none.
pub(crate) fn slab(arena: Arena) -> *mut u8 {
    // SAFETY: a size that is not zero and a power of two.
    unsafe { je::mallocx(SLAB, je::MALLOCX_ALIGN(SLAB) | arena).cast() }
}

/// Takes a slab's memory back.
pub(crate) fn free_slab(memory: *mut u8) {
    if !memory.is_null() {
        // SAFETY: made by `slab`; nobody uses it.
        keeping_errno(|| unsafe { je::sdallocx(memory.cast(), SLAB, je::MALLOCX_ALIGN(SLAB) | PLAIN) });
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
        keeping_errno(|| unsafe { je::dallocx(memory.cast(), PLAIN) });
    }
}

/// Does `what`, on free's account: giving memory back may fail (it is locked), which is nobody's business.
pub(crate) fn keeping_errno<T>(what: impl FnOnce() -> T) -> T {
    // SAFETY: the thread's own errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    let done = what();
    // SAFETY: as above.
    unsafe { *errno = before };
    done
}

/// Without its own caches: what is small enough for them comes from slabs.
const PLAIN: c_int = je::MALLOCX_TCACHE_NONE;

/// What makes blocks of whole ranges begin at one, and `align`.
#[inline]
fn aligned(size: usize, align: usize) -> c_int {
    let align = if size >= SPAN { align.max(SPAN) } else { align };
    if align <= 16 { 0 } else { je::MALLOCX_ALIGN(align) }
}

/// A block of `size` bytes, not 0, at a multiple of `align`, a power of two. Zeroed if asked for: fresh memory is zero and is not
/// written; whole ranges that were in use are exchanged for fresh memory, so that what is on the device is not fetched to be
/// overwritten.
pub(crate) fn alloc(arena: Option<Arena>, size: usize, align: usize, zero: bool) -> *mut u8 {
    let flags = aligned(size, align) | arena.unwrap_or(PLAIN);
    // SAFETY: the size is not zero; a block that is not null has it.
    unsafe {
        if size < SPAN {
            return je::mallocx(size, if zero { flags | je::MALLOCX_ZERO } else { flags }).cast();
        }
        let block: *mut u8 = as_block(|| je::mallocx(size, flags)).cast();
        if !block.is_null() {
            spans::prefer_huge_pages(block, size);
            if zero && !spans::drop_pages(block, size) {
                block.write_bytes(0, size);
            }
        }
        block
    }
}

/// Asks jemalloc for a block of whole spans.
fn as_block<T>(ask: impl FnOnce() -> T) -> T {
    BLOCK.set(true);
    let block = ask();
    BLOCK.set(false);
    block
}

/// Frees a block of jemalloc's; nothing happens for null.
///
/// # Safety
/// C's.
pub(crate) unsafe fn free(block: *mut u8) {
    if !block.is_null() {
        // SAFETY: the caller's contract.
        keeping_errno(|| unsafe { je::dallocx(block.cast(), PLAIN) });
    }
}

/// As [`free`], for a block of [`alloc`] with this size and alignment.
///
/// # Safety
/// As [`free`].
pub(crate) unsafe fn free_sized(block: *mut u8, size: usize, align: usize) {
    // SAFETY: the caller's contract.
    keeping_errno(|| unsafe { je::sdallocx(block.cast(), size, aligned(size, align) | PLAIN) });
}

/// Makes a block of jemalloc's `size` bytes large, not 0. Null, with the old block still there, when there is no memory.
///
/// # Safety
/// C's.
pub(crate) unsafe fn resize(arena: Option<Arena>, block: *mut u8, size: usize, align: usize) -> *mut u8 {
    let flags = aligned(size, align) | arena.unwrap_or(PLAIN);
    // SAFETY: the caller's contract: the block is jemalloc's and the caller's; its usable bytes are its own.
    unsafe {
        let old = je::malloc_usable_size(block.cast());
        if old < SPAN || size <= old {
            let new: *mut u8 = match size < SPAN {
                true => je::rallocx(block.cast(), size, flags),
                false => as_block(|| je::rallocx(block.cast(), size, flags)),
            }
            .cast();
            if !new.is_null() && old < SPAN && size >= SPAN {
                spans::prefer_huge_pages(new, size);
            }
            return new;
        }
        if as_block(|| je::xallocx(block.cast(), size, 0, flags)) >= size {
            return block;
        }
        let new = alloc(arena, size, align, false);
        if !new.is_null() {
            let Some(moved) = spans::move_pages(block, new, old) else {
                // Nobody can use the new block: it is never freed.
                return ptr::null_mut();
            };
            ptr::copy_nonoverlapping(block.add(moved), new.add(moved), old - moved);
            free(block);
        }
        new
    }
}

/// Returns all free memory to the system now.
pub(crate) fn purge() {
    let mut path = [0usize; 3];
    let mut len = path.len();
    // SAFETY: "arena.<i>.purge" has three parts, of which the second is the arena's number; it takes and gives nothing.
    unsafe {
        if je::mallctlnametomib(c"arena.0.purge".as_ptr(), path.as_mut_ptr(), &raw mut len) != 0 {
            return;
        }
        for arena in
            ARENAS.iter().chain([&BOOKKEEPING]).map(|a| a.load(Ordering::Acquire)).filter(|a| *a != 0)
        {
            path[1] = arena as usize;
            je::mallctlbymib(path.as_ptr(), len, ptr::null_mut(), ptr::null_mut(), ptr::null_mut(), 0);
        }
    }
}

/// Lets jemalloc know of this thread, and of its end.
pub(crate) fn greet() {
    // SAFETY: null is no block, and has no bytes.
    unsafe { je::malloc_usable_size(ptr::null()) };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_keeps_errno_where_memory_cannot_be_given_back() {
        let number = create().expect("an arena");
        let (name, mut at_once) = (format!("arena.{number}.dirty_decay_ms\0"), 0isize);
        let arena = je::MALLOCX_ARENA(number as usize) | je::MALLOCX_TCACHE_NONE;
        // SAFETY: a name and a value as jemalloc documents them; a block that is freed once.
        unsafe {
            let set = je::mallctl(
                name.as_ptr().cast(),
                ptr::null_mut(),
                ptr::null_mut(),
                (&raw mut at_once).cast(),
                size_of::<isize>(),
            );
            assert_eq!(set, 0);
            let block = alloc(Some(arena), 1 << 20, 1, false);
            assert_eq!(libc::mlock(block.cast(), 4096), 0);
            *libc::__errno_location() = 7;
            free(block);
            assert_eq!(*libc::__errno_location(), 7);
            libc::munlock(block.cast(), 4096);
        }
    }
}
