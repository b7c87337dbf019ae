//! A mapping that moves piece by piece moves as a whole or not at all.
//!
//! The module is taken in by its file: the library interposes what the test uses.
//!
//! # Safety
//! Mappings are this test's own, used where they are and unmapped once.
#![allow(unsafe_code)]

#[path = "../src/pieces.rs"]
mod pieces;

use pieces::{PAGE, mappings, move_all, reserve};
use std::ffi::{c_int, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// One at a time: what fails is the process's.
static ALONE: Mutex<()> = Mutex::new(());
/// Calls that go well before one is refused.
static UNTIL: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The system call, of which one is refused for want of memory.
unsafe extern "C" fn sometimes(
    old: *mut c_void,
    old_len: usize,
    new_len: usize,
    flags: c_int,
    new: *mut c_void,
) -> *mut c_void {
    if UNTIL.fetch_sub(1, Ordering::Relaxed) == 0 {
        // SAFETY: the calling thread's own errno.
        unsafe { *libc::__errno_location() = libc::ENOMEM };
        return libc::MAP_FAILED;
    }
    // SAFETY: the caller's.
    unsafe { libc::syscall(libc::SYS_mremap, old, old_len, new_len, flags, new) as *mut c_void }
}

const LEN: usize = 16 * PAGE;

/// A mapping of [`LEN`] in five pieces that are alike, in which every page says which it is; what follows is taken, so
/// that it cannot grow in place.
fn divided() -> *mut u8 {
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, and advice and contents for parts of it.
    unsafe {
        let at =
            libc::mmap(std::ptr::null_mut(), 2 * LEN, libc::PROT_READ | libc::PROT_WRITE, private, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        let at = at.cast::<u8>();
        for piece in [2, 9] {
            assert_eq!(libc::madvise(at.add(piece * PAGE).cast(), 3 * PAGE, libc::MADV_DONTFORK), 0);
        }
        assert_eq!(libc::mprotect(at.add(LEN).cast(), LEN, libc::PROT_NONE), 0);
        (0..16).for_each(|page| at.add(page * PAGE).write(page as u8 + 1));
        at
    }
}

fn is_whole(at: *mut u8) -> bool {
    // SAFETY: the mapping is there; where it is not, the test fails by a signal.
    (0..16).all(|page| unsafe { at.add(page * PAGE).read() } == page as u8 + 1)
}

fn unmap(at: *mut u8, len: usize) {
    // SAFETY: the test's own mappings.
    assert_eq!(unsafe { libc::munmap(at.cast(), len) }, 0);
}

#[test]
fn what_cannot_go_as_a_whole_stays_as_a_whole() {
    let _alone = ALONE.lock().unwrap();
    let mut done = false;
    for until in 0..20 {
        // Another test's thread that begins meanwhile has mappings, too, but not each time.
        let mut left_behind = true;
        for _ in 0..5 {
            let at = divided();
            let before = mappings().len();
            UNTIL.store(until, Ordering::Relaxed);
            // SAFETY: moves the test's own mapping, which grows.
            let result = unsafe {
                move_all(
                    sometimes,
                    at.cast(),
                    LEN,
                    LEN + 4 * PAGE,
                    libc::MREMAP_MAYMOVE,
                    std::ptr::null_mut(),
                )
            };
            UNTIL.store(usize::MAX, Ordering::Relaxed);
            match result {
                Ok(there) => {
                    assert!(is_whole(there.cast()), "after {until} calls");
                    // SAFETY: the bytes that came to it.
                    assert_eq!(unsafe { there.cast::<u8>().add(LEN + PAGE).read() }, 0);
                    unmap(there.cast(), LEN + 4 * PAGE);
                    done |= until > 6;
                    left_behind = false;
                }
                Err(errno) => {
                    assert_eq!(errno, libc::ENOMEM);
                    assert!(is_whole(at), "after {until} calls");
                    left_behind = mappings().len() != before;
                    unmap(at, LEN);
                }
            }
            // What follows the mapping.
            unmap(at.wrapping_add(LEN), LEN);
            if !left_behind {
                break;
            }
        }
        assert!(!left_behind, "after {until} calls");
    }
    assert!(done, "with enough calls it moves");
}

#[test]
fn a_place_that_the_program_names_takes_all_or_nothing() {
    let _alone = ALONE.lock().unwrap();
    for until in 0..8 {
        let at = divided();
        let there = reserve(LEN).unwrap();
        UNTIL.store(until, Ordering::Relaxed);
        let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: moves the test's own mapping over its own reservation.
        let result = unsafe { move_all(sometimes, at.cast(), LEN, LEN, how, there) };
        UNTIL.store(usize::MAX, Ordering::Relaxed);
        assert_eq!(result.is_ok(), until >= 5, "{until}: {result:?}");
        assert!(is_whole(if result.is_ok() { there.cast() } else { at }), "after {until} calls");
        unmap(there.cast(), LEN);
        unmap(at, 2 * LEN);
    }
}

/// What the kernel would refuse is refused before anything is given up.
#[test]
fn a_call_that_makes_no_sense_changes_nothing() {
    let _alone = ALONE.lock().unwrap();
    let at = divided();
    let there = reserve(LEN).unwrap();
    let (may, fixed) = (libc::MREMAP_MAYMOVE, libc::MREMAP_FIXED);
    for (shift, len, new_len, flags, to) in [
        (0, LEN, PAGE, may | fixed, there.wrapping_byte_add(1)),
        (0, LEN, PAGE, fixed, there),
        (1, LEN, PAGE, may | fixed, there),
        (0, LEN, 0, may | fixed, there),
        (0, LEN, usize::MAX, may | fixed, there),
        (0, LEN, PAGE, may | fixed, at.wrapping_add(2 * PAGE).cast()),
        (0, LEN, PAGE, may | fixed | 64, there),
    ] {
        // SAFETY: a call that is refused.
        let result = unsafe { move_all(sometimes, at.wrapping_add(shift).cast(), len, new_len, flags, to) };
        assert_eq!(result, Err(libc::EFAULT), "{shift} {len} {new_len} {flags} {to:?}");
        assert!(is_whole(at));
    }
    unmap(there.cast(), LEN);
    unmap(at, 2 * LEN);
}

/// A mapping that shrinks loses its end only when the rest has moved.
#[test]
fn a_smaller_mapping_that_cannot_move_keeps_its_end() {
    let _alone = ALONE.lock().unwrap();
    for until in 0..5 {
        let at = divided();
        let there = reserve(LEN).unwrap();
        UNTIL.store(until, Ordering::Relaxed);
        let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: moves a part of the test's own mapping over its own reservation.
        let result = unsafe { move_all(sometimes, at.cast(), LEN, 10 * PAGE, how, there) };
        UNTIL.store(usize::MAX, Ordering::Relaxed);
        assert_eq!(result.is_ok(), until >= 4, "{until}: {result:?}");
        if result.is_err() {
            assert!(is_whole(at), "after {until} calls");
        } else {
            let end = at as usize + LEN;
            assert!(!mappings().iter().any(|m| m.start < end && m.end > at as usize), "all of it is gone");
        }
        unmap(there.cast(), LEN);
        unmap(at, 2 * LEN);
    }
}

/// MREMAP_DONTUNMAP: the contents go, the mappings stay.
#[test]
fn what_goes_without_its_place_goes_as_a_whole() {
    let _alone = ALONE.lock().unwrap();
    for (until, fixed) in (0..8).flat_map(|until| [(until, false), (until, true)]) {
        let at = divided();
        let named = reserve(LEN).unwrap();
        UNTIL.store(until, Ordering::Relaxed);
        let how = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP | if fixed { libc::MREMAP_FIXED } else { 0 };
        // SAFETY: moves the test's own mapping, over its own reservation.
        let result = unsafe { move_all(sometimes, at.cast(), LEN, LEN, how, named) };
        UNTIL.store(usize::MAX, Ordering::Relaxed);
        assert_eq!(result.is_ok(), until >= 5, "{until}: {result:?}");
        match result {
            Ok(there) => {
                assert!(is_whole(there.cast()));
                // SAFETY: the mapping stayed.
                assert!((0..16).all(|page| unsafe { at.add(page * PAGE).read() } == 0));
                assert_eq!(there == named, fixed);
                if !fixed {
                    unmap(there.cast(), LEN);
                }
            }
            Err(_) => assert!(is_whole(at), "after {until} calls"),
        }
        unmap(named.cast(), LEN);
        unmap(at, 2 * LEN);
    }
}
