//! Mappings that usvm divided are one to the program.
//!
//! # Overview
//! What is registered with userfaultfd becomes a mapping of its own in the kernel. Two functions show that:
//!
//! - `mremap` refuses (EFAULT) what reaches over more than one mapping. Where it does so while a runtime runs, the same
//!   is done piece by piece: in place, or to a place that is reserved before.
//! - `pthread_getattr_np` takes the main thread's stack for as large as the mapping that holds its beginning; engines
//!   that read it (JavaScript, Scheme, garbage collectors) would run out of stack at once.
//!
//! # Locking
//! None.
//!
//! # Limits
//! While a mapping is moved piece by piece, another thread can see a part at each place, as it could in the middle of the
//! program's own two calls. /proc/self/maps shows the pieces.
//!
//! # Safety
//! The arguments are the program's; a piecewise mremap moves exactly what one call was to move, into address space
//! that it reserved itself or that the program named.

use std::ffi::{c_int, c_void};

use usvm::ground::alloc;

use crate::next::Next;
use crate::start;

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

/// One line of /proc/self/maps, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mapping {
    start: usize,
    end: usize,
    /// Permissions, offset, device, inode: equal for pieces of one anonymous mapping.
    kind: String,
}

fn mappings() -> Vec<Mapping> {
    let text = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    text.lines().filter_map(parse).collect()
}

fn parse(line: &str) -> Option<Mapping> {
    let (range, rest) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let hex = |text| usize::from_str_radix(text, 16).ok();
    let kind = rest.split_ascii_whitespace().take(4).collect::<Vec<_>>().join(" ");
    Some(Mapping { start: hex(start)?, end: hex(end)?, kind })
}

/// The pieces of `[start, end)`, if they have no gap and are alike, as pieces of one anonymous mapping are.
fn pieces(start: usize, end: usize) -> Option<Vec<(usize, usize)>> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    let mut kind = None;
    for mapping in mappings().into_iter().filter(|m| m.start < end && m.end > start) {
        let (from, to) = (mapping.start.max(start), mapping.end.min(end));
        let expected = found.last().map_or(start, |(_, to)| *to);
        if from != expected
            || !mapping.kind.ends_with(" 00000000 00:00 0")
            || *kind.get_or_insert(mapping.kind.clone()) != mapping.kind
        {
            return None;
        }
        found.push((from, to));
    }
    (found.len() > 1 && found.last().is_some_and(|(_, to)| *to == end)).then_some(found)
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
    // SAFETY: the caller's.
    let moved = unsafe { MREMAP.get()(old, old_len, new_len, flags, new) };
    // SAFETY: the calling thread's own errno.
    let errno = unsafe { *libc::__errno_location() };
    if moved != libc::MAP_FAILED || errno != libc::EFAULT || !start::is_owner() {
        return moved;
    }
    // SAFETY: the caller's; the kernel refused it as a whole.
    let result = alloc::internal(|| unsafe { by_pieces(old, old_len, new_len, flags, new) });
    result.unwrap_or_else(|errno| {
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = errno };
        libc::MAP_FAILED
    })
}

fn last_errno() -> c_int {
    // SAFETY: the calling thread's own errno.
    unsafe { *libc::__errno_location() }
}

/// # Safety
/// As mremap.
unsafe fn by_pieces(
    old: *mut c_void,
    old_len: usize,
    new_len: usize,
    flags: c_int,
    new: *mut c_void,
) -> Result<*mut c_void, c_int> {
    let real = MREMAP.get();
    let old_len = old_len.next_multiple_of(PAGE);
    let new_len = new_len.next_multiple_of(PAGE);
    let start = old.addr();
    let plain = flags & !(libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) == 0;
    let pieces = pieces(start, start + old_len).filter(|_| plain && old_len > 0).ok_or(libc::EFAULT)?;
    let (last_start, last_end) = pieces[pieces.len() - 1];
    if new_len >= old_len && flags & libc::MREMAP_FIXED == 0 {
        let last_len = last_end - last_start;
        // SAFETY: the last piece grows where it is, or nothing happens.
        let grown = unsafe {
            real(old.with_addr(last_start), last_len, last_len + new_len - old_len, 0, std::ptr::null_mut())
        };
        if grown != libc::MAP_FAILED {
            return Ok(old);
        }
        if flags & libc::MREMAP_MAYMOVE == 0 {
            return Err(last_errno());
        }
    }
    let target = if flags & libc::MREMAP_FIXED != 0 {
        new
    } else {
        let (none, private) =
            (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a place of the kernel's choice.
        let place = unsafe { libc::mmap(std::ptr::null_mut(), new_len, none, private, -1, 0) };
        if place == libc::MAP_FAILED {
            return Err(last_errno());
        }
        place
    };
    for (from, to) in pieces {
        let offset = from - start;
        if offset >= new_len {
            // SAFETY: what the program gives up by shrinking.
            unsafe { libc::munmap(old.with_addr(from), to - from) };
            continue;
        }
        // The last piece that stays takes what is added or cut off.
        let whole = to - from;
        let len = if to == start + old_len { new_len - offset } else { whole.min(new_len - offset) };
        let (how, at) = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, target.with_addr(target.addr() + offset));
        // SAFETY: a piece of what the program moves, to its part of the target.
        if unsafe { real(old.with_addr(from), whole, len, how, at) } == libc::MAP_FAILED {
            return Err(last_errno());
        }
    }
    Ok(target)
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
