//! What happens around fork.
//!
//! # Overview
//! Before a fork everything is brought home, so that the child, which has none of usvm's threads, finds its memory
//! complete; after it the parent goes on and the child forgets that usvm ran. `vfork` and `posix_spawn` share the
//! address space until they exec and need nothing. A fork by raw system call passes these handlers by; there the
//! kernel's own FORK event lets the parent fill the child's pages (see [`crate::runtime`]). Such a child forgets its parent's
//! runtime when it starts its own ([`crate::runtime::leave_the_parents`]).
//!
//! # Locking
//! The handlers run on the application's thread, which must not wait for a lock of usvm: they hand the work to a
//! service thread and wait for its fence.
//!
//! # Safety
//! `pthread_atfork` gets functions that live as long as the program. They only read a table of function pointers that
//! is set once.
#![allow(unsafe_code)]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::ground::atfork;
use crate::ground::error::{Errno, Error, Result};
use crate::ground::once::Once;

/// What runs around a fork, on the thread that forks.
#[derive(Debug, Clone, Copy)]
pub struct Handlers {
    /// Before, in the parent.
    pub prepare: fn(),
    /// After, in the parent.
    pub parent: fn(),
    /// After, in the child.
    pub child: fn(),
}

static HANDLERS: OnceLock<Handlers> = OnceLock::new();
static INSTALLED: Once = Once::new();

extern "C" fn prepare() {
    if let Some(handlers) = HANDLERS.get() {
        (handlers.prepare)();
    }
}

extern "C" fn parent() {
    if let Some(handlers) = HANDLERS.get() {
        (handlers.parent)();
    }
}

extern "C" fn child() {
    // Also where another thread was about to note it.
    INSTALLED.done();
    if let Some(handlers) = HANDLERS.get() {
        (handlers.child)();
    }
}

/// Installs the handlers, once for the life of the process; later calls do nothing.
pub fn install(handlers: Handlers) -> Result<()> {
    static RESULT: AtomicI32 = AtomicI32::new(0);
    let _ = HANDLERS.set(handlers);
    INSTALLED.run(|| {
        // SAFETY: the three functions are of this program and never go away while usvm's code is loaded.
        let result = unsafe { atfork::register(Some(prepare), Some(parent), Some(child)) };
        RESULT.store(result, Ordering::Release);
    });
    let result = RESULT.load(Ordering::Acquire);
    if result == 0 { Ok(()) } else { Err(Error::os("pthread_atfork", Errno(result))) }
}
