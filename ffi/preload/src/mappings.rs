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
//! Neither is a cancellation point, as they are not in the C library.
//!
//! # Locking
//! None.
//!
//! # Limits
//! As [`pieces`]. /proc/thread-self/maps shows the pieces.
//!
//! # Safety
//! The arguments are the program's.

use std::ffi::{c_int, c_void};

use usvm::ground::alloc;
use usvm_capi::cancel::shielded;
use usvm_capi::interpose;

use crate::next::Next;
use crate::pieces::{self, Mapping, Mremap, PAGE, mappings};
use crate::{start, watched};

type GetAttr = unsafe extern "C" fn(libc::pthread_t, *mut libc::pthread_attr_t) -> c_int;

// SAFETY: the C library's signature, with its optional argument.
static MREMAP: Next<Mremap> = unsafe { Next::new(c"mremap") };
// SAFETY: the C library's signature.
static GETATTR: Next<GetAttr> = unsafe { Next::new(c"pthread_getattr_np") };

pub(crate) fn look_up() {
    MREMAP.look_up();
    GETATTR.look_up();
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
    let by_pieces = || {
        // SAFETY: the caller's.
        shielded(|| alloc::internal(|| unsafe { pieces::move_all(next, old, old_len, new_len, flags, new) }))
    };
    let refused = |errno| {
        // SAFETY: the calling thread's own errno.
        unsafe { *libc::__errno_location() = errno };
        libc::MAP_FAILED
    };
    if ours && flags & libc::MREMAP_FIXED != 0 {
        match by_pieces() {
            Ok(moved) => return moved,
            // Not pieces of one mapping, or no sensible call: the kernel's to judge.
            Err(libc::EFAULT) => {}
            Err(errno) => return refused(errno),
        }
    }
    // SAFETY: the caller's.
    let moved = unsafe { next(old, old_len, new_len, flags, new) };
    if moved != libc::MAP_FAILED || pieces::last_errno() != libc::EFAULT || !ours {
        return moved;
    }
    // The kernel refused it as a whole.
    by_pieces().unwrap_or_else(refused)
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
        shielded(|| alloc::internal(|| unsafe { widen(attr) }));
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
