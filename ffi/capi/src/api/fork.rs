//! What fork does to the interface's own state.
//!
//! # Overview
//! The thread that forks takes the interface's locks before and gives them back after, so that a child never inherits one
//! that some other thread holds. A fork inside a handler of a fork finds them taken by its own thread. The child forgets the
//! parent's handles and its runtime.
//!
//! # Locking
//! The process's runtime first, then the tables. So does the end of the process; nobody else holds both.
//!
//! # Safety
//! `pthread_atfork` gets functions that live as long as this code, which is never unloaded (`-z nodelete`). The place for
//! the guards is only touched by the one thread that holds the locks.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::sync::MutexGuard;

use usvm::ground::atfork::{self, Nesting};
use usvm::ground::once::Once;

use super::handles::{self, Tables};
use crate::process;

struct Held(UnsafeCell<Option<(process::Hold, MutexGuard<'static, Tables>)>>);

// SAFETY: touched by whoever holds the locks that the guards inside stand for, and by nobody else.
unsafe impl Sync for Held {}

static HELD: Held = Held(UnsafeCell::new(None));
static INSTALLED: Once = Once::new();

thread_local! {
    static FORKS: Nesting = const { Nesting::new() };
}

extern "C" fn prepare() {
    if !FORKS.with(Nesting::enter) {
        return;
    }
    let guards = (process::hold(), handles::lock());
    // SAFETY: this thread holds both locks now.
    unsafe { *HELD.0.get() = Some(guards) };
}

extern "C" fn parent() {
    if !FORKS.with(Nesting::leave) {
        return;
    }
    // SAFETY: this thread took both locks in `prepare`.
    drop(unsafe { (*HELD.0.get()).take() });
}

extern "C" fn child() {
    // Also where another thread was about to note it.
    INSTALLED.done();
    FORKS.with(Nesting::clear);
    // SAFETY: the only thread of the child is the one that took both locks in `prepare`.
    if let Some((mut process, mut tables)) = unsafe { (*HELD.0.get()).take() } {
        process.forget();
        tables.forget();
    }
    super::notify::forget();
}

/// Installs the handlers, once. Before the runtime installs its own, which then run inside of these.
pub(crate) fn install() {
    INSTALLED.run(|| {
        // SAFETY: see the module. Without memory for the handlers a child of fork may find a lock held: no worse than
        // any other program with threads.
        unsafe { atfork::register(Some(prepare), Some(parent), Some(child)) };
    });
}
