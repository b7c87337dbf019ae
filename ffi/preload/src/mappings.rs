//! Mappings that usvm divided are one to the program.
//!
//! # Overview
//! What is registered with userfaultfd becomes a mapping of its own in the kernel. Two functions show that:
//!
//! - `mremap` refuses (EFAULT) what reaches over more than one mapping. Where it does so while a runtime runs, the same
//!   is done piece by piece: in place, or to a place that is reserved before. Notifiers are told once, before all of it.
//! - `pthread_getattr_np` takes the main thread's stack for as large as the mapping that holds its beginning; engines
//!   that read it (JavaScript, Scheme, garbage collectors) would run out of stack at once.
//!
//! # Locking
//! None.
//!
//! # Limits
//! While a mapping is moved piece by piece, another thread can see a part at each place, as it could in the middle of the
//! program's own two calls. /proc/thread-self/maps shows the pieces.
//!
//! # Safety
//! The arguments are the program's; a piecewise mremap moves exactly what one call was to move, into address space
//! that it reserved itself or that the program named.

use std::ffi::{c_int, c_void};

use usvm::ground::alloc;
use usvm_capi::interpose;

use crate::next::Next;
use crate::{start, watched};

type Mremap = unsafe extern "C" fn(*mut c_void, usize, usize, c_int, *mut c_void) -> *mut c_void;
type GetAttr = unsafe extern "C" fn(libc::pthread_t, *mut libc::pthread_attr_t) -> c_int;

// SAFETY: the C library's signature, with its optional argument.
static MREMAP: Next<Mremap> = unsafe { Next::new(c"mremap") };
// SAFETY: the C library's signature.
static GETATTR: Next<GetAttr> = unsafe { Next::new(c"pthread_getattr_np") };

const PAGE: usize = 4096;

pub(crate) fn look_up() {
    MREMAP.look_up();
    GETATTR.look_up();
}

/// One line of /proc/thread-self/maps, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mapping {
    start: usize,
    end: usize,
    /// Permissions, offset, device, inode: equal for pieces of one anonymous mapping.
    kind: String,
}

fn mappings() -> Vec<Mapping> {
    let text = std::fs::read_to_string("/proc/thread-self/maps").unwrap_or_default();
    text.lines().filter_map(parse).collect()
}

fn parse(line: &str) -> Option<Mapping> {
    let (range, rest) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let hex = |text| usize::from_str_radix(text, 16).ok();
    let kind = rest.split_ascii_whitespace().take(4).collect::<Vec<_>>().join(" ");
    Some(Mapping { start: hex(start)?, end: hex(end)?, kind })
}

/// The mapping that holds `at`, if it is anonymous.
fn holding(at: usize) -> Option<Mapping> {
    let found = mappings().into_iter().find(|m| m.start <= at && m.end > at)?;
    found.kind.ends_with(" 00000000 00:00 0").then_some(found)
}

/// mremap(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mremap(
    old: *mut c_void,
    old_len: usize,
    new_len: usize,
    flags: c_int,
    new: *mut c_void,
) -> *mut c_void {
    let next = watched::behind(&MREMAP);
    // SAFETY: the caller's.
    interpose::mremap(old, old_len, new_len, flags, new, || unsafe {
        match next {
            Some(next) => whole_or_pieces(next, old, old_len, new_len, flags, new),
            None => by_the_kernel(old, old_len, new_len, flags, new),
        }
    })
}

/// The system call itself.
///
/// # Safety
/// As mremap.
unsafe extern "C" fn by_the_kernel(
    old: *mut c_void,
    old_len: usize,
    new_len: usize,
    flags: c_int,
    new: *mut c_void,
) -> *mut c_void {
    // SAFETY: the caller's.
    interpose::address(unsafe { libc::syscall(libc::SYS_mremap, old, old_len, new_len, flags, new) })
}

/// What the program asks for, by `next` or piece by piece.
///
/// # Safety
/// As mremap.
unsafe fn whole_or_pieces(
    next: Mremap,
    old: *mut c_void,
    old_len: usize,
    new_len: usize,
    flags: c_int,
    new: *mut c_void,
) -> *mut c_void {
    let ours = start::is_owner();
    // Linux 6.17 moves several mappings to a fixed place, but only up to the first that userfaultfd watches: never as a
    // whole.
    if ours && flags & libc::MREMAP_FIXED != 0 && old.addr().abs_diff(new.addr()) >= old_len.max(new_len) {
        // SAFETY: the caller's.
        if let Ok(moved) = alloc::internal(|| unsafe { by_pieces(next, old, old_len, new_len, flags, new) }) {
            return moved;
        }
    }
    // SAFETY: the caller's.
    let moved = unsafe { next(old, old_len, new_len, flags, new) };
    if moved != libc::MAP_FAILED || last_errno() != libc::EFAULT || !ours {
        return moved;
    }
    // SAFETY: the caller's; the kernel refused it as a whole.
    let result = alloc::internal(|| unsafe { by_pieces(next, old, old_len, new_len, flags, new) });
    result.unwrap_or_else(|errno| {
        // SAFETY: the calling thread's own errno.
        unsafe { *libc::__errno_location() = errno };
        libc::MAP_FAILED
    })
}

fn last_errno() -> c_int {
    // SAFETY: the calling thread's own errno.
    unsafe { *libc::__errno_location() }
}

/// How often a piece is looked up anew because it was divided or joined meanwhile.
const TRIES: u32 = 1000;

/// Calls mremap (`next`) on `[from, to)`, of which only a first piece may be one mapping; `of` says how large that piece shall be
/// and where it goes, given its end. Gives the piece's end and its new place.
///
/// # Safety
/// As mremap for what `of` says.
unsafe fn one_piece(
    next: Mremap,
    from: usize,
    to: usize,
    of: impl Fn(usize) -> (usize, c_int, usize),
) -> Result<(usize, *mut c_void), c_int> {
    for _ in 0..TRIES {
        let end = holding(from).ok_or(libc::EFAULT)?.end.min(to);
        let (len, flags, target) = of(end);
        let (piece, target) =
            (std::ptr::with_exposed_provenance_mut(from), std::ptr::with_exposed_provenance_mut(target));
        // SAFETY: the caller's.
        let moved = unsafe { next(piece, end - from, len, flags, target) };
        if moved != libc::MAP_FAILED {
            return Ok((end, moved));
        }
        if last_errno() != libc::EFAULT {
            return Err(last_errno());
        }
        // It was divided just now, and what came before the division may have moved.
        let rest = mappings()
            .into_iter()
            .filter(|m| m.end > from)
            .map(|m| m.start.max(from))
            .find(|at| (from..end).contains(at));
        if rest != Some(from) && flags & libc::MREMAP_FIXED != 0 && len == end - from {
            return Ok((rest.unwrap_or(end), target));
        }
    }
    Err(libc::EFAULT)
}

/// # Safety
/// As mremap.
unsafe fn by_pieces(
    next: Mremap,
    old: *mut c_void,
    old_len: usize,
    new_len: usize,
    flags: c_int,
    new: *mut c_void,
) -> Result<*mut c_void, c_int> {
    let new_len = new_len.next_multiple_of(PAGE);
    let whole = old_len.next_multiple_of(PAGE);
    let old_len = whole.min(new_len);
    let (start, end) = (old.expose_provenance(), old.addr() + old_len);
    let fixed = flags & libc::MREMAP_FIXED != 0;
    if flags & !(libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) != 0 || !is_alike(start, end) {
        return Err(libc::EFAULT);
    }
    if whole > old_len {
        // SAFETY: what the program gives up.
        unsafe { libc::munmap(old.with_addr(end), whole - old_len) };
    }
    let added = new_len - old_len;
    if !fixed {
        // The last piece grows where it is, or nothing happens.
        let grown = last_piece(end).ok_or(libc::EFAULT).and_then(|last| {
            // SAFETY: a piece of the program's.
            unsafe {
                one_piece(next, last.max(start), end, |to| {
                    (to - last.max(start) + if to == end { added } else { 0 }, 0, 0)
                })
            }
        });
        match grown {
            Ok((to, _)) if to == end => return Ok(old),
            Err(errno) if flags & libc::MREMAP_MAYMOVE == 0 => return Err(errno),
            _ => {}
        }
    }
    let target = if fixed { new } else { reserve(new_len)? };
    let to_target = target.expose_provenance();
    let mut at = start;
    while at < end {
        let (from, how) = (at, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
        let of = |to: usize| (to - from + if to == end { added } else { 0 }, how, to_target + (from - start));
        // SAFETY: a piece of what the program moves, to its part of the target.
        at = unsafe { one_piece(next, from, end, of) }?.0;
    }
    Ok(target)
}

/// Address space of the kernel's choice.
fn reserve(len: usize) -> Result<*mut c_void, c_int> {
    let (none, private) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: a new mapping touches no other.
    let place = unsafe { libc::mmap(std::ptr::null_mut(), len, none, private, -1, 0) };
    if place == libc::MAP_FAILED { Err(last_errno()) } else { Ok(place) }
}

/// Where the mapping that holds the byte before `end` begins.
fn last_piece(end: usize) -> Option<usize> {
    Some(holding(end - 1)?.start)
}

/// Whether `[start, end)` has no gap and its mappings are alike, as pieces of one anonymous mapping are.
fn is_alike(start: usize, end: usize) -> bool {
    let (mut at, mut kind) = (start, None);
    for mapping in mappings().into_iter().filter(|m| m.start < end && m.end > start) {
        let alike = *kind.get_or_insert_with(|| mapping.kind.clone()) == mapping.kind;
        if mapping.start > at || !alike || !mapping.kind.ends_with(" 00000000 00:00 0") {
            return false;
        }
        at = mapping.end;
    }
    at >= end && end > start
}

/// pthread_getattr_np(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_getattr_np(
    thread: libc::pthread_t,
    attr: *mut libc::pthread_attr_t,
) -> c_int {
    // SAFETY: the caller's.
    let failed = unsafe { GETATTR.get()(thread, attr) };
    if failed == 0 && start::is_owner() && start::is_main_thread(thread) {
        // SAFETY: the attributes that were just filled in.
        alloc::internal(|| unsafe { widen(attr) });
    }
    failed
}

/// Gives the main thread's attributes the stack that they would have, were its mapping not divided: down to where
/// RLIMIT_STACK or the next mapping ends it.
///
/// # Safety
/// `attr` is initialised and tells of the main thread.
unsafe fn widen(attr: *mut libc::pthread_attr_t) {
    let (mut base, mut len) = (std::ptr::null_mut(), 0);
    // SAFETY: the caller's; the limit is a live structure.
    let limit = unsafe {
        let mut limit = std::mem::zeroed::<libc::rlimit>();
        if libc::pthread_attr_getstack(attr, &mut base, &mut len) != 0
            || libc::getrlimit(libc::RLIMIT_STACK, &mut limit) != 0
        {
            return;
        }
        limit.rlim_cur as usize
    };
    let end = base.addr() + len;
    let Some(below) = below_stack(&mappings(), end) else { return };
    // As glibc: what the limit allows, in whole pages, and not into the mapping below.
    let allowed = limit & !(PAGE - 1);
    let size = allowed.min(end - below).max(len);
    // SAFETY: as above.
    unsafe { libc::pthread_attr_setstack(attr, base.with_addr(end - size), size) };
}

/// Where the mapping below the pieces of the stack that ends at `end` ends.
fn below_stack(mappings: &[Mapping], end: usize) -> Option<usize> {
    let mut at = mappings.iter().position(|m| m.start < end && m.end >= end)?;
    while at > 0 && mappings[at - 1].end == mappings[at].start && mappings[at - 1].kind == mappings[at].kind {
        at -= 1;
    }
    Some(at.checked_sub(1).map_or(0, |below| mappings[below].end))
}
