//! The address space that user memory comes from: a few large reservations, handed out in spans of whole 2 MiB.
//!
//! # Overview
//! A reservation is address space without access (no memory, no commit charge). [`take`] opens the next 2 MiB-aligned
//! piece of it for reading and writing and asks for huge pages. Spans are never given back: whoever took one keeps it
//! and returns its pages with [`drop_pages`] instead, so addresses are always in one of a few known places, and
//! [`owns`] is a comparison.
//!
//! What is done to memory that is, or was, the program's is a direct system call: a library that watches `madvise` and its
//! like (libusvm, the preload library) would call the program back from inside its own `malloc`.
//!
//! # Locking
//! None. The next free address is an atomic; reservations are published in a table of atomics.
//!
//! # Limits
//! There are at most `MOST` reservations of at most 1 TiB. Under RLIMIT_AS each is a quarter of the limit at most, unless what
//! is needed at once is more.
//!
//! # Safety
//! Every address given out lies in a reservation made here, and is given out once: the cursor moves back only over a piece
//! that could not be opened, and so was given to nobody.
#![allow(unsafe_code)]

use crate::changed;
use linux_raw_sys::general::{procmap_query, procmap_query_flags};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use usvm::ground::inject::{self, Call};

/// The size of a huge page, and of the steps in which memory is taken.
pub(crate) const SPAN: usize = 2 << 20;

/// Reservations at most.
const MOST: usize = 64;
/// The first reservation that is tried; later ones may be smaller.
const LARGEST: usize = 1 << 40;
const _: () = assert!(LARGEST / SPAN < SPAN);
/// So much of the heap begins with small pages, so that a small program stays small.
const SMALL_PAGES: usize = 32 << 20;

struct Reservation {
    /// Where it begins, a multiple of [`SPAN`], and in the low bits its length in spans; 0 before there is one.
    place: AtomicUsize,
    /// Bytes given out.
    used: AtomicUsize,
}

/// Bytes that were opened in the first reservation, but for blocks of whole spans, and how far small pages reach into it.
static SMALL: AtomicUsize = AtomicUsize::new(0);
static SMALL_END: AtomicUsize = AtomicUsize::new(0);

static RESERVATIONS: [Reservation; MOST] =
    [const { Reservation { place: AtomicUsize::new(0), used: AtomicUsize::new(0) } }; MOST];

impl Reservation {
    /// Begin and length.
    #[inline]
    fn get(&self) -> Option<(usize, usize)> {
        match self.place.load(Ordering::Acquire) {
            0 => None,
            place => Some((place & !(SPAN - 1), (place & (SPAN - 1)) * SPAN)),
        }
    }

    /// The next `size` bytes at a multiple of `align`.
    fn cut(&self, size: usize, align: usize) -> Option<Cut> {
        let (base, len) = self.get()?;
        let mut used = self.used.load(Ordering::Relaxed);
        loop {
            let at = (base + used).checked_next_multiple_of(align)?;
            let after = at.checked_add(size).filter(|after| *after <= base + len)? - base;
            match self.used.compare_exchange_weak(used, after, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(Cut { at, before: used, after }),
                Err(now) => used = now,
            }
        }
    }

    /// Takes a piece back that was not opened, if nobody took more meanwhile.
    fn uncut(&self, cut: &Cut) {
        let _ = self.used.compare_exchange(cut.after, cut.before, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// A piece of a reservation, and what was used of it before and after.
struct Cut {
    at: usize,
    before: usize,
    after: usize,
}

/// Whether `at` lies in memory that was, or may yet be, given out here.
#[inline]
pub(crate) fn owns(at: usize) -> bool {
    RESERVATIONS.iter().map_while(Reservation::get).any(|(base, len)| at.wrapping_sub(base) < len)
}

/// Opens `size` bytes at a multiple of `align` (both powers or multiples of [`SPAN`]); `None` when there is no room. `block`: for
/// a block of whole spans, which does not count as heap: a program that asks for much and uses little of it is still small.
pub(crate) fn take(size: usize, align: usize, block: bool) -> Option<*mut u8> {
    let (size, align) = (size.checked_next_multiple_of(SPAN)?, align.max(SPAN));
    let least = size.checked_add(align - SPAN)?;
    for (index, reservation) in RESERVATIONS.iter().enumerate() {
        if reservation.get().is_none() && !reserve(reservation, least) {
            return None;
        }
        if let Some(cut) = reservation.cut(size, align) {
            let heap = if index == 0 && !block { size } else { 0 };
            let left = SMALL_PAGES.saturating_sub(SMALL.fetch_add(heap, Ordering::Relaxed));
            let small = left.min(heap);
            if small > 0 {
                SMALL_END.fetch_max(cut.after - size + small, Ordering::Relaxed);
            }
            let opened = open(cut.at, size, small);
            if opened.is_none() {
                reservation.uncut(&cut);
                SMALL.fetch_sub(heap, Ordering::Relaxed);
            }
            return opened;
        }
    }
    None
}

/// The first reservation's begin and length.
pub(crate) fn first() -> Option<(usize, usize)> {
    RESERVATIONS.first()?.get()
}

/// Whether `at`, in the first reservation or any other, can be where small pages are.
fn has_small_pages(at: usize) -> bool {
    first().is_some_and(|(base, _)| at.wrapping_sub(base) < SMALL_END.load(Ordering::Relaxed))
}

/// Asks for huge pages for the whole ranges of a large block, wherever it is.
///
/// # Safety
/// The bytes belong to a span that the caller took.
pub(crate) unsafe fn prefer_huge_pages(at: *mut u8, size: usize) {
    if has_small_pages(at.addr()) {
        // SAFETY: the caller's contract; the advice changes no contents.
        unsafe { advise(at, size - size % SPAN, libc::MADV_HUGEPAGE) };
    }
}

/// The page in front of [`Apart`], so that no mapping of others becomes one with it.
const FENCE: usize = 4096;

/// Address space of its own, apart from all user memory, that is opened bit by bit and is zero then.
pub(crate) struct Apart {
    pub(crate) at: *mut u8,
    size: usize,
}

impl Apart {
    pub(crate) fn new(size: usize) -> Option<Self> {
        let at = map(size.checked_add(FENCE)?, true)?;
        Some(Self { at: at.wrapping_add(FENCE), size })
    }

    /// Gives it back, unused.
    pub(crate) fn discard(self) {
        // SAFETY: mapped in `new`; nobody has used it.
        unsafe { libc::munmap(self.at.wrapping_sub(FENCE).cast(), self.size + FENCE) };
    }
}

/// Makes whole pages of an [`Apart`] readable and writable. False if the system refused.
///
/// # Safety
/// They lie in one that is kept for ever.
pub(crate) unsafe fn open_apart(at: *mut u8, size: usize) -> bool {
    // SAFETY: the caller's contract; access is only added.
    unsafe { protect(at, size, libc::PROT_READ | libc::PROT_WRITE) }
}

/// Makes spans usable, the first `small` bytes without huge pages.
fn open(at: usize, size: usize, small: usize) -> Option<*mut u8> {
    let at = ptr::with_exposed_provenance_mut::<u8>(at);
    // SAFETY: the bytes belong to a reservation of ours and were given out just now, to us.
    unsafe {
        if !protect(at, size, libc::PROT_READ | libc::PROT_WRITE) {
            return None;
        }
        if small < size {
            // Without huge pages it only gets slower.
            advise(at.add(small), size - small, libc::MADV_HUGEPAGE);
        }
    }
    Some(at)
}

/// Fills the table's entry with address space for at least `least` bytes, whole spans. True if the entry is filled, by
/// whomever.
fn reserve(entry: &Reservation, least: usize) -> bool {
    if least > LARGEST {
        return false;
    }
    let mut size = LARGEST;
    while size >= least {
        if reserve_as_large(entry, size, true) {
            return true;
        }
        size /= 4;
    }
    reserve_as_large(entry, least, false) || entry.get().is_some()
}

/// [`reserve`] with `size` bytes.
fn reserve_as_large(entry: &Reservation, size: usize, modest: bool) -> bool {
    let Some(at) = map(size + SPAN, modest) else { return false };
    let at = at.expose_provenance();
    // Something without access stays in front, so that no mapping of others becomes one with ours: usvm registers whole
    // mappings.
    let base = (at + 1).next_multiple_of(SPAN);
    let place = base | (size / SPAN);
    if entry.place.compare_exchange(0, place, Ordering::AcqRel, Ordering::Acquire).is_err() {
        // Another thread was faster.
        // SAFETY: mapped above; nobody has seen it.
        unsafe { libc::munmap(ptr::with_exposed_provenance_mut(at), size + SPAN) };
    }
    true
}

/// Address space without access. If `modest`, it leaves the program at least three quarters of what RLIMIT_AS allows.
fn map(size: usize, modest: bool) -> Option<*mut u8> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel fills the structure.
    let limited = modest
        && unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut limit) } == 0
        && limit.rlim_cur != libc::RLIM_INFINITY;
    if limited && size as u64 > limit.rlim_cur / 4 || inject::check(Call::Mmap).is_err() {
        return None;
    }
    // SAFETY: a new private anonymous mapping at an address of the kernel's choice touches nothing else.
    let at = unsafe {
        libc::mmap(
            ptr::null_mut(),
            size,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    (at != libc::MAP_FAILED).then_some(at.cast())
}

/// Gives the pages of `[at, at + size)` back to the system; they read as zero afterwards. False if the system refused.
///
/// # Safety
/// The bytes belong to a span that the caller took, and nobody uses what they contain.
pub(crate) unsafe fn drop_pages(at: *mut u8, size: usize) -> bool {
    // SAFETY: the caller's contract.
    let dropped = unsafe { advise(at, size, libc::MADV_DONTNEED) };
    if dropped {
        changed::note(changed::Kind::Dropped, at, size);
    }
    dropped
}

/// madvise(2). False if the system refused.
///
/// # Safety
/// As madvise.
unsafe fn advise(at: *mut u8, size: usize, advice: libc::c_int) -> bool {
    // SAFETY: the caller's contract.
    inject::check(Call::Madvise).is_ok() && unsafe { libc::syscall(libc::SYS_madvise, at, size, advice) == 0 }
}

/// Moves the pages of `[from, from + size)` to `to`, where they replace what was there, and says how many bytes, counted from
/// `from`, were moved; these read as zero there afterwards. The others are as they were, and what is at their new place is
/// not worth keeping any more. `None` if `to` can be used for nothing from now on: then all is as it was at `from`.
///
/// What a device used is registered with userfaultfd, so a block can be several mappings. Up to Linux 6.16 mremap refuses
/// these; since then it moves one after the other up to one that it cannot move (EFAULT for the first registered one, ENOMEM
/// where there are too many mappings). How far it came is seen at the destination, which cannot be read before something is
/// moved there.
///
/// # Safety
/// Both are whole pages of spans that the caller took; they do not overlap, and nobody uses them meanwhile.
pub(crate) unsafe fn move_pages(from: *mut u8, to: *mut u8, size: usize) -> Option<usize> {
    const ALL: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the caller's contract.
    if !unsafe { protect(to, size, libc::PROT_NONE) } {
        // What it refuses it may have done for the first mappings.
        // SAFETY: the caller's contract.
        return unsafe { protect(to, size, ALL) }.then_some(0);
    }
    let mut maps = None;
    let (mut moved, mut end, mut tries) = (0, size, 0);
    while tries < MOVE_TRIES {
        // SAFETY: the caller's contract, for a part of each.
        let refused = unsafe { remap(from.add(moved), to.add(moved), end - moved) };
        if refused.is_none() {
            (moved, tries) = (end, 0);
        }
        if moved == size {
            break;
        }
        let maps = maps.get_or_insert_with(Maps::open).as_ref();
        if let Some(errno) = refused {
            // SAFETY: the caller's contract.
            moved = unsafe {
                let moved = arrived(maps, to, moved, size);
                fill(to.add(moved), end.saturating_sub(moved));
                moved
            };
            if moved == size || errno != libc::EFAULT {
                break;
            }
        }
        // From here on one mapping at a time.
        let Some((_, until)) = maps.and_then(|maps| maps.mapping(from.addr() + moved)) else { break };
        end = (until - from.addr()).min(size);
        tries += 1;
    }
    if moved > 0 {
        changed::note(changed::Kind::Moved, from, moved);
    }
    // SAFETY: the caller's contract; where nothing came everything is as before, but for the contents. What came can be read,
    // and its old place is still there.
    unsafe {
        if moved < size && !protect(to.add(moved), size - moved, ALL) {
            ptr::copy_nonoverlapping(to, from, moved);
            drop_pages(to, moved);
            return None;
        }
    }
    Some(moved)
}

/// How many bytes at the beginning of `[to, to + size)`, of which the first `from` are there, can be read: the rest was made
/// unreadable before anything was moved.
///
/// # Safety
/// The bytes belong to a span that the caller took.
unsafe fn arrived(maps: Option<&Maps>, to: *mut u8, mut from: usize, size: usize) -> usize {
    while from < size {
        match maps.and_then(|maps| maps.mapping(to.addr() + from)) {
            Some((true, until)) => from = (until - to.addr()).min(size),
            Some((false, _)) => break,
            // SAFETY: the caller's contract.
            None => return unsafe { arrived_by_halves(to, from, size) },
        }
    }
    from
}

/// As [`arrived`], for when the kernel does not tell (no descriptor is free, or it is older than that question). A page that
/// is read on the way is fetched.
///
/// # Safety
/// As [`arrived`].
unsafe fn arrived_by_halves(to: *mut u8, from: usize, size: usize) -> usize {
    const PAGE: usize = 4096;
    let (mut there, mut not) = (from / PAGE, size / PAGE);
    while there < not {
        let middle = there + (not - there) / 2;
        // SAFETY: inside the bytes.
        if unsafe { readable(to.add(middle * PAGE), PAGE) } { there = middle + 1 } else { not = middle }
    }
    there * PAGE
}

/// Whether there is a mapping that may be read, even if there is no memory for it now.
///
/// # Safety
/// The page belongs to a span that the caller took.
unsafe fn readable(page: *mut u8, size: usize) -> bool {
    let mut resident = 0u8;
    // SAFETY: reads a page at most, and changes nothing; there is a byte for the one page.
    unsafe {
        if libc::syscall(libc::SYS_madvise, page, size, libc::MADV_POPULATE_READ) == 0 {
            return true;
        }
        match last_error() {
            libc::EINVAL => false,
            // No memory, or no mapping.
            libc::ENOMEM => libc::syscall(libc::SYS_mincore, page, size, &raw mut resident) == 0,
            _ => true,
        }
    }
}

/// mremap(2) of `size` bytes to `to`. The errno if the system refused.
///
/// # Safety
/// As mremap.
unsafe fn remap(from: *mut u8, to: *mut u8, size: usize) -> Option<libc::c_int> {
    // Without DONTUNMAP there would be a hole that somebody else's mapping could take.
    const HOW: libc::c_int = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    if let Err(planned) = inject::check(Call::Mremap) {
        return Some(planned.0);
    }
    // SAFETY: the caller's contract.
    let moved = unsafe { libc::syscall(libc::SYS_mremap, from, size, size, HOW, to) };
    (moved == -1).then(last_error)
}

/// Puts address space without access where there is none at all: before Linux 6.17 mremap takes the destination away first
/// and refuses afterwards.
///
/// # Safety
/// The bytes belong to a span that the caller took.
unsafe fn fill(at: *mut u8, size: usize) {
    const HOW: libc::c_int =
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: nothing is replaced; where something is, it is refused.
    unsafe { libc::syscall(libc::SYS_mmap, at, size, libc::PROT_NONE, HOW, -1, 0) };
}

/// Tries to move one piece while others divide it.
const MOVE_TRIES: u32 = 64;

/// mprotect(2). False if the system refused.
///
/// # Safety
/// As mprotect.
unsafe fn protect(at: *mut u8, size: usize, protection: libc::c_int) -> bool {
    // SAFETY: the caller's contract.
    inject::check(Call::Mprotect).is_ok()
        && unsafe { libc::syscall(libc::SYS_mprotect, at, size, protection) == 0 }
}

fn last_error() -> libc::c_int {
    // SAFETY: the thread's own errno.
    unsafe { *libc::__errno_location() }
}

/// What the kernel tells of mappings (Linux 6.11). Older kernels are not asked: there mremap moves all or nothing.
struct Maps(libc::c_int);

impl Drop for Maps {
    fn drop(&mut self) {
        // libc's close would end a cancelled thread here.
        // SAFETY: this value's own descriptor.
        unsafe { libc::syscall(libc::SYS_close, self.0) };
    }
}

impl Maps {
    fn open() -> Option<Self> {
        inject::check(Call::Open).ok()?;
        // SAFETY: opens a file of the kernel's; the descriptor is this value's own.
        let maps = unsafe {
            libc::syscall(
                libc::SYS_openat,
                libc::AT_FDCWD,
                c"/proc/thread-self/maps".as_ptr(),
                libc::O_CLOEXEC,
            )
        };
        if maps < 0 { None } else { Some(Self(maps as libc::c_int)) }
    }

    /// Whether the mapping that holds `at` can be read, and where it ends; `None` if there is none, or no answer.
    fn mapping(&self, at: usize) -> Option<(bool, usize)> {
        inject::check(Call::ProcmapQuery).ok()?;
        // SAFETY: a structure of integers.
        let mut query: procmap_query = unsafe { std::mem::zeroed() };
        query.size = size_of::<procmap_query>() as u64;
        query.query_addr = at as u64;
        const QUERY: libc::c_ulong =
            3 << 30 | (size_of::<procmap_query>() as libc::c_ulong) << 16 | (b'f' as libc::c_ulong) << 8 | 17;
        // SAFETY: PROCMAP_QUERY with its structure, which the kernel fills in; no name is asked for.
        let asked = unsafe { libc::syscall(libc::SYS_ioctl, self.0, QUERY, &raw mut query) };
        let readable = procmap_query_flags::PROCMAP_QUERY_VMA_READABLE as u64;
        (asked == 0).then_some((query.vma_flags & readable != 0, query.vma_end as usize))
    }
}
