//! What fork does to a running usvm, and a child to what it has of its parent's.
//!
//! # Overview
//! The thread that forks has the control threads freeze the space and bring home what no event of the kernel's would give to
//! the child; the parent goes on afterwards, and the child forgets. A handler of one fork may do another: only the outermost
//! freezes and thaws.
//!
//! # Locking
//! None is held over the fork. What the child's only thread could find locked by threads that it does not have is renewed, not
//! locked.
//!
//! # Safety
//! [`forget_the_parents`] is for the only thread of a child, before anything else of usvm runs there: nobody holds, or waits
//! for, what it replaces.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{CURRENT, IN_A_CHILD, Inner, here, is_anywhere, protect, with_current};
use crate::ground::atfork::Nesting;
use crate::ground::error::{Error, Result};
use crate::ground::{alloc, fds, thread, words};
use crate::host::exempt;
use crate::host::features::Features;
use crate::host::fork::{self, Handlers};
use crate::observe::live;
use crate::space::svm::PIN_PATIENCE;

/// Installs what runs around fork(2), once; every start does. For who holds a lock over the start that a fork handler of his
/// own takes: some C libraries (glibc up to 2.35) do not take new handlers while old ones run.
///
/// # Errors
/// What pthread_atfork says.
pub fn install_fork_handlers() -> Result<()> {
    fork::install(Handlers { prepare: before_fork, parent: after_fork, child: in_child })
}

/// A child of `_Fork` or of a clone by system call, where no handler of fork ran, has its parent's runtime on record. It
/// forgets that as any other child does, as long as nobody else is there who could be using what is forgotten. Every start
/// does; for who allocates in usvm's own memory before, where a thread of the parent may have held the lock.
///
/// # Errors
/// [`Error::NotSupported`] in such a child that has other threads by now.
pub fn leave_the_parents() -> Result<()> {
    if !is_anywhere() || here::is_here() {
        return Ok(());
    }
    if here::is_child() && thread::is_alone() {
        forget_the_parents();
        return Ok(());
    }
    Err(Error::NotSupported(
        "usvm runs in the parent process, and this child was made without the handlers of fork: start usvm before the \
         child's first other thread, or make the child with fork()"
            .into(),
    ))
}

thread_local! {
    /// The runtime that this thread, which forks, has frozen. Several may: since glibc 2.36 handlers of two forks can overlap.
    static FROZEN: Cell<*const Inner> = const { Cell::new(ptr::null()) };
    static FORKS: Nesting = const { Nesting::new() };
}

/// How long a frozen runtime waits for running work.
const LAST_PATIENCE: Duration = Duration::from_millis(100);

fn before_fork() {
    let nested = !FORKS.with(Nesting::enter);
    with_current(|inner| {
        if nested && ptr::eq(FROZEN.get(), inner) {
            return;
        }
        if inner.is_running() && inner.is_ours() && !alloc::is_service_thread() {
            FROZEN.set(inner);
            let svm = inner.svm.clone();
            // What running work holds is given to the child where the kernel tells of it; otherwise the fork waits.
            let given = inner.host.report().has.contains(Features::EVENT_FORK);
            let home = inner.control.now(move || {
                if !given {
                    // Not frozen yet: the work may need more to end.
                    let _ = svm.bring_home_for_fork(PIN_PATIENCE);
                }
                svm.freeze();
                svm.bring_home_for_fork(if given { Duration::ZERO } else { LAST_PATIENCE })
            });
            if let Err(e) = home
                && !(given && matches!(e, Error::Busy { .. }))
            {
                tracing::error!("a forked child may miss memory: {e}");
            }
        }
    });
    fds::before_fork();
}

fn after_fork() {
    fds::after_fork();
    if !FORKS.with(Nesting::leave) {
        return;
    }
    with_current(|inner| {
        // One that another thread has started since was not frozen.
        let frozen = FROZEN.replace(ptr::null());
        if ptr::eq(frozen, inner) && inner.is_running() {
            let svm = inner.svm.clone();
            // Not in line behind requests that wait for just this.
            let _ = inner.control.end(move || {
                svm.thaw();
                Ok(())
            });
        }
    });
}

fn in_child() {
    FORKS.with(Nesting::clear);
    if forget_the_parents() {
        alloc::become_application_thread();
    }
}

/// In a child, whose only thread this is: the parent's runtime, if it had one, is not this process's. Whether it had one.
#[allow(unsafe_code)]
fn forget_the_parents() -> bool {
    let mut had_one = false;
    // SAFETY: the only thread of a child.
    unsafe { fds::forget_forks() };
    with_current(|inner| {
        inner.state.store(IN_A_CHILD, Ordering::Release);
        inner.host.leave();
        inner.live.iter().for_each(live::Page::close);
        had_one = true;
    });
    if !had_one {
        // One may have been about to start.
        alloc::renew_held_after_fork();
        return false;
    }
    // The parent's record is left as it is: its locks may be held by threads that do not exist here.
    CURRENT.store(ptr::null_mut(), Ordering::Release);
    FROZEN.set(ptr::null());
    protect::forget_lookers();
    alloc::renew_after_fork();
    // SAFETY: as above, and this thread holds none of these locks.
    unsafe {
        exempt::renew_after_fork();
        thread::forget_all();
        fds::close_all_in_child();
    }
    words::forget_in_child();
    true
}
