//! usvm's own threads.
//!
//! # Overview
//! A service thread takes no signals (a handler of the program on our stack could touch anything), allocates from
//! usvm's own memory, and announces itself to the floor that keeps stacks and TLS from migrating ([`on_start`]).
//! Each is listed with its kernel id, so that the watchdog can tell a dead one from a busy one.
//!
//! # Safety
//! The list is renewed in a forked child (see `ground::renew`).
#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread::JoinHandle;

use crossbeam_utils::sync::ShardedLock;
use nix::sys::signal::SigSet;
use rustix::thread::{Pid, gettid};

use crate::ground::alloc;
use crate::ground::inject::{self, Call};
use crate::ground::renew::Renewable;

static ON_START: OnceLock<fn()> = OnceLock::new();
static ON_END: OnceLock<fn()> = OnceLock::new();
/// Threads that were started and have not come to their own work yet.
static STARTING: AtomicUsize = AtomicUsize::new(0);
static LIVING: Renewable<Mutex<Vec<(Pid, String)>>> = Renewable::new(Mutex::new(Vec::new()));

/// Registers what every new service thread runs first. The first registration counts.
pub fn on_start(f: fn()) {
    let _ = ON_START.set(f);
}

/// Registers what every service thread runs last. The first registration counts.
pub fn on_end(f: fn()) {
    let _ = ON_END.set(f);
}

/// Starts one of usvm's own threads. Its panics end it, not the process; `f` says what that means by what it leaves.
pub fn spawn(name: &str, f: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    inject::check(Call::ThreadSpawn).map_err(|e| io::Error::from_raw_os_error(e.0))?;
    alloc::internal(|| {
        let name = format!("usvm-{name}");
        let before = SigSet::all().thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_SETMASK)?;
        STARTING.fetch_add(1, Ordering::AcqRel);
        let spawned = std::thread::Builder::new().name(name.clone()).spawn(move || {
            alloc::become_service_thread();
            if let Some(start) = ON_START.get() {
                start();
            }
            warm_up();
            let listed = Listed::new(name);
            STARTING.fetch_sub(1, Ordering::AcqRel);
            f();
            listed.done();
            if let Some(end) = ON_END.get() {
                end();
            }
        });
        before.thread_set_mask()?;
        if spawned.is_err() {
            STARTING.fetch_sub(1, Ordering::AcqRel);
        }
        spawned
    })
}

/// Whether every thread that was started does its own work by now. Until then it reads the dynamic linker's tables and
/// allocates from the C library, as any thread that begins.
pub fn all_started() -> bool {
    STARTING.load(Ordering::Acquire) == 0
}

/// Makes what the standard library and crates keep for each thread now. For that they call the C library's allocator,
/// whose locks the program's threads hold while they wait for us.
fn warm_up() {
    drop(ShardedLock::new(()).read());
    let _ = std::thread::current().id();
}

/// Kernel ids and names of the service threads that have started and not ended.
pub fn living() -> Vec<(Pid, String)> {
    list().clone()
}

/// Whether the calling thread is the only one of its process. `false` where the kernel does not tell.
pub(crate) fn is_alone() -> bool {
    let asked = inject::check(Call::Open).map_err(|e| io::Error::from_raw_os_error(e.0));
    let told = asked.and_then(|()| std::fs::read_to_string("/proc/thread-self/status"));
    told.is_ok_and(|status| status.lines().any(|line| line == "Threads:\t1"))
}

/// Forgets all threads: in a forked child none exists, and one of them may have held the list's lock.
///
/// # Safety
/// For the only thread of a child right after fork.
pub(crate) unsafe fn forget_all() {
    // SAFETY: the caller's.
    unsafe { LIVING.renew(Mutex::new(Vec::new())) };
    STARTING.store(0, Ordering::Release);
}

fn list() -> std::sync::MutexGuard<'static, Vec<(Pid, String)>> {
    LIVING.get().lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// On the list until it is done. A thread that panics or vanishes stays on it: that is how it is noticed.
struct Listed(Pid);

impl Listed {
    fn new(name: String) -> Self {
        let tid = gettid();
        list().push((tid, name));
        Self(tid)
    }

    fn done(self) {
        list().retain(|(tid, _)| *tid != self.0);
    }
}

/// The listed threads that do not live any more.
pub fn dead() -> Vec<String> {
    // Whatever else the kernel answers, it does not say that the thread is gone. No file is asked: /proc may be another
    // namespace's, or not there any more.
    let gone = |tid: Pid| {
        // SAFETY: signal 0 is none; the kernel only looks for the thread.
        let asks =
            || unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid.as_raw_nonzero().get(), 0) };
        let missing = || io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH);
        inject::check(Call::Tgkill).is_ok() && asks() != 0 && missing()
    };
    living().into_iter().filter(|(tid, _)| gone(*tid)).map(|(_, name)| name).collect()
}
