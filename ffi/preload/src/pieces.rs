//! mremap of a mapping that is several to the kernel.
//!
//! # Overview
//! [`move_all`] moves what one call was to move in as many calls as there are pieces, in place or to a place that is
//! reserved before. To the program it happens as a whole or not at all: if a piece cannot be moved (no memory, the limit of
//! mappings), those that were are moved back, and if that fails, too, the process ends.
//!
//! # Locking
//! None.
//!
//! # Limits
//! Meanwhile another thread can see a part at each place, as it could in the middle of the program's own two calls.
//!
//! # Safety
//! Exactly what the one call was to move is moved, into address space that was reserved here or that the program named.

use std::ffi::{c_int, c_void};

/// The C library's mremap, with its optional argument.
pub(crate) type Mremap = unsafe extern "C" fn(*mut c_void, usize, usize, c_int, *mut c_void) -> *mut c_void;

pub(crate) const PAGE: usize = 4096;

/// One line of /proc/thread-self/maps, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) start: usize,
    pub(crate) end: usize,
    /// Permissions, offset, device, inode: equal for pieces of one anonymous mapping.
    pub(crate) kind: String,
}

/// The process's mappings, ascending; none if the kernel does not tell.
pub(crate) fn mappings() -> Vec<Mapping> {
    let text = std::fs::read_to_string("/proc/thread-self/maps").ok();
    // There may be no descriptor left, or no /proc any more.
    let text = text.or_else(usvm::runtime::mappings).unwrap_or_default();
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

pub(crate) fn last_errno() -> c_int {
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
        if flags & libc::MREMAP_DONTUNMAP != 0 {
            // The old place tells nothing: how far is the new one not just reserved?
            let at = target.addr();
            let there = mappings().into_iter().find(|m| m.start <= at && m.end > at);
            match there.filter(|m| !m.kind.starts_with("---p")) {
                Some(there) => return Ok((end.min(from + (there.end - at)), target)),
                None => continue,
            }
        }
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

/// mremap by `next`, piece by piece. An error is the errno; EFAULT, with nothing changed, also for calls that the kernel
/// would refuse: it is to say so itself.
///
/// # Safety
/// As mremap.
pub(crate) unsafe fn move_all(
    next: Mremap,
    old: *mut c_void,
    old_len: usize,
    new_len: usize,
    flags: c_int,
    new: *mut c_void,
) -> Result<*mut c_void, c_int> {
    let fixed = flags & libc::MREMAP_FIXED != 0;
    let aligned = |len: usize| len.checked_next_multiple_of(PAGE).filter(|len| *len > 0).ok_or(libc::EFAULT);
    let asked = new_len;
    let (whole, new_len) = (aligned(old_len)?, aligned(new_len)?);
    let apart = old.addr().abs_diff(new.addr()) >= if new.addr() < old.addr() { new_len } else { whole };
    let may_move = flags & libc::MREMAP_MAYMOVE != 0;
    let stays = flags & libc::MREMAP_DONTUNMAP;
    let sensible = flags & !(libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP) == 0
        && old.addr().is_multiple_of(PAGE)
        && (!fixed || may_move && new.addr().is_multiple_of(PAGE) && apart)
        && (stays == 0 || may_move && old_len == asked);
    let old_len = whole.min(new_len);
    let (start, end) = (old.expose_provenance(), old.addr().wrapping_add(old_len));
    if !sensible || !is_alike(start, end) {
        return Err(libc::EFAULT);
    }
    let give_up = || {
        // SAFETY: what the program gives up.
        let kept = whole > old_len && unsafe { libc::munmap(old.with_addr(end), whole - old_len) } != 0;
        if kept { Err(last_errno()) } else { Ok(()) }
    };
    let in_place = !fixed && stays == 0;
    if in_place && whole >= new_len {
        return give_up().map(|()| old);
    }
    let added = new_len - old_len;
    if in_place {
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
            Err(errno) if !may_move => return Err(errno),
            _ => {}
        }
    }
    let target = match fixed {
        true if stays == 0 => new,
        true => reserve_at(new, new_len)?,
        false => reserve(new_len)?,
    };
    let pieces = Pieces { next, start, end, target: target.expose_provenance(), added, stays };
    // The last piece first: it is the one that grows, and may be refused what the others need not ask for.
    let last = last_piece(end).map_or(start, |last| last.max(start));
    let mut moved = Vec::new();
    // SAFETY: what the program moves, to where it moves it.
    let result =
        unsafe { pieces.go(last, end, &mut moved).and_then(|()| pieces.go(start, last, &mut moved)) };
    // What was given up goes last: then nothing can fail any more.
    if let Err(errno) = result.and_then(|()| give_up()) {
        // SAFETY: what has just been moved; the reservation is nobody's.
        unsafe {
            pieces.come_back(&moved);
            if !fixed {
                libc::munmap(target, new_len);
            }
        }
        return Err(errno);
    }
    Ok(target)
}

/// A mapping that moves piece by piece: `[start, end)` to `target`, where it has `added` bytes more. With the
/// flag `stays` mappings without contents stay where it was.
struct Pieces {
    next: Mremap,
    start: usize,
    end: usize,
    target: usize,
    added: usize,
    stays: c_int,
}

impl Pieces {
    /// Moves `[from, to)` of it, and notes in `moved` what has moved.
    ///
    /// # Safety
    /// As mremap.
    unsafe fn go(&self, mut from: usize, to: usize, moved: &mut Vec<(usize, usize)>) -> Result<(), c_int> {
        while from < to {
            let of = |until: usize| {
                let added = if until == self.end { self.added } else { 0 };
                (
                    until - from + added,
                    libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | self.stays,
                    self.target + (from - self.start),
                )
            };
            // SAFETY: the caller's, for a piece of it.
            let until = unsafe { one_piece(self.next, from, to, of) }?.0;
            moved.push((from, until));
            from = until;
        }
        Ok(())
    }

    /// Moves back what has moved, since not all could: to the program nothing has happened. Whoever can do neither ends
    /// the process, for the program would look for its data where it is not.
    ///
    /// # Safety
    /// As mremap; `moved` is what [`Pieces::go`] noted.
    unsafe fn come_back(&self, moved: &[(usize, usize)]) {
        for &(start, end) in moved {
            let there = self.target + (start - self.start);
            let taken = self.stays == 0 && mappings().iter().any(|m| m.start < end && m.end > start);
            let (mut from, to) = (there, there + (end - start));
            if end == self.end && self.added > 0 {
                // SAFETY: what came to it, of which the program does not know.
                unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(to), self.added) };
            }
            while !taken && from < to {
                let of =
                    |until| (until - from, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, start + (from - there));
                // SAFETY: the caller's, for a piece of it, to where it was and where nothing is.
                match unsafe { one_piece(self.next, from, to, of) } {
                    Ok((until, _)) => from = until,
                    Err(_) => break,
                }
            }
            if from < to {
                eprintln!(
                    "usvm: mremap moved a part of a mapping that usvm divided, and can neither go on nor undo it"
                );
                std::process::abort();
            }
        }
    }
}

/// Address space of the kernel's choice.
pub(crate) fn reserve(len: usize) -> Result<*mut c_void, c_int> {
    let (none, private) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: a new mapping touches no other.
    let place = unsafe { libc::mmap(std::ptr::null_mut(), len, none, private, -1, 0) };
    if place == libc::MAP_FAILED { Err(last_errno()) } else { Ok(place) }
}

/// Address space that the program named, in the place of what is there.
fn reserve_at(at: *mut c_void, len: usize) -> Result<*mut c_void, c_int> {
    let (none, private) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: where the program moves something to.
    let place = unsafe { libc::mmap(at, len, none, private | libc::MAP_FIXED, -1, 0) };
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
