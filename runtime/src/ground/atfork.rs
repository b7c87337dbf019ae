//! Handlers of fork that stay to the end.
//!
//! # Overview
//! The C library takes the handlers of pthread_atfork away when the destructors of the library that registered them run, at
//! the end of the process. A thread that is in one of them just then ends the process (glibc 2.36 and later: "array index
//! not less than array length"), and ours wait while a runtime ends. [`register`] says that they belong to no library.
//!
//! A handler of one fork may do another, with what the first one took still in hand. Who takes locks around forks counts the
//! forks that its thread is in the middle of, in a [`Nesting`] of its own: handlers that were registered between two others'
//! are run for one half of a fork only.
//!
//! # Safety
//! The C library's own function, with the arguments that its pthread_atfork gives it.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::c_int;

/// What runs around a fork.
pub type Handler = Option<unsafe extern "C" fn()>;

/// The forks that a thread is in the middle of, as one set of handlers sees it.
#[derive(Debug, Default)]
pub struct Nesting(Cell<u32>);

impl Nesting {
    /// None.
    pub const fn new() -> Self {
        Self(Cell::new(0))
    }

    /// A fork begins. Whether it is the outermost.
    pub fn enter(&self) -> bool {
        self.0.replace(self.0.get() + 1) == 0
    }

    /// A fork has ended. Whether it was the outermost; false where none was seen to begin.
    pub fn leave(&self) -> bool {
        let depth = self.0.get();
        self.0.set(depth.saturating_sub(1));
        depth == 1
    }

    /// In a child there is none.
    pub fn clear(&self) {
        self.0.set(0);
    }
}

/// pthread_atfork(3), for good. Gives an errno, or 0.
///
/// # Safety
/// The handlers' code is never unloaded.
pub unsafe fn register(prepare: Handler, parent: Handler, child: Handler) -> c_int {
    #[cfg(target_env = "gnu")]
    {
        unsafe extern "C" {
            fn __register_atfork(
                prepare: Handler,
                parent: Handler,
                child: Handler,
                library: *mut std::ffi::c_void,
            ) -> c_int;
        }
        // SAFETY: the caller's.
        unsafe { __register_atfork(prepare, parent, child, std::ptr::null_mut()) }
    }
    #[cfg(not(target_env = "gnu"))]
    // SAFETY: the caller's.
    unsafe {
        libc::pthread_atfork(prepare, parent, child)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outermost_fork_begins_first_and_ends_last() {
        let forks = Nesting::new();
        assert!(!forks.leave(), "its first half was not seen");
        assert!(forks.enter() && !forks.enter());
        assert!(!forks.leave() && !forks.enter());
        assert!(!forks.leave() && forks.leave() && forks.enter());
        forks.clear();
        assert!(!forks.leave() && forks.enter());
    }
}
