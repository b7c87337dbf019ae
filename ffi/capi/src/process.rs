//! The process's one runtime, for all faces of usvm in it: C callers, the OpenCL layer, chaos under `usvm run`.
//!
//! # Overview
//! A process can have one [`Runtime`]. Whoever needs it acquires it and releases it when done: the first acquisition
//! starts it, the last release shuts it down. Nobody starts one otherwise.
//!
//! # Locking
//! One mutex around the count; it is held while the runtime starts and stops, so two callers never start two, and a fork
//! runs beside neither. The lock is never taken by usvm's service threads.
//!
//! # Limits
//! A forked child begins without a runtime: what the parent had acquired is forgotten there, and acquiring starts a new
//! one.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use usvm::ground::alloc;
use usvm::{Config, Error, Result, Runtime};

use crate::api::{fork, init};
use crate::log;

struct Shared {
    runtime: Runtime,
    users: usize,
    owner: u32,
}

static SHARED: Mutex<Option<Shared>> = Mutex::new(None);

fn shared() -> MutexGuard<'static, Option<Shared>> {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    forget_the_parents(&mut shared);
    shared
}

/// The process's runtime; started with `config` (the environment's when `None`) if there is none yet. Each call wants
/// its [`release`].
pub fn acquire(config: Option<Config>) -> Result<Runtime> {
    usvm::runtime::leave_the_parents()?;
    install_handlers();
    let mut shared = shared();
    if let Some(shared) = shared.as_mut() {
        shared.users += 1;
        return Ok(shared.runtime.clone());
    }
    let config = match config {
        Some(config) => config,
        None => Config::from_env()?,
    };
    log::listen();
    let runtime = Runtime::start(config)?;
    *shared = Some(Shared { runtime: runtime.clone(), users: 1, owner: std::process::id() });
    Ok(runtime)
}

static MORE_HANDLERS: OnceLock<fn()> = OnceLock::new();

/// Registers what installs a caller's own fork handlers; it is called before each start, after usvm's handlers were
/// installed and while no lock is held. The first registration counts.
pub fn on_handlers(install: fn()) {
    let _ = MORE_HANDLERS.set(install);
}

/// Installs the handlers of fork, once. As early as may be: a fork that is under way on another thread does not run what is
/// installed meanwhile, and could leave its child what the installing thread takes next. All of them before the lock: up to
/// glibc 2.35 a thread that forks keeps others from installing handlers while it runs those that there are, and one of these
/// waits for the lock.
pub fn install_handlers() {
    fork::install();
    // The start does it again, and tells.
    let _ = usvm::runtime::install_fork_handlers();
    if let Some(install) = MORE_HANDLERS.get() {
        install();
    }
}

/// The process's runtime, if there is one and nobody is starting or stopping it. Never waits.
pub fn peek() -> Option<Runtime> {
    let shared = SHARED.try_lock().ok()?;
    shared.as_ref().filter(|s| s.owner == std::process::id()).map(|s| s.runtime.clone())
}

/// The process's runtime, if there is one.
pub fn current() -> Option<Runtime> {
    shared().as_ref().map(|s| s.runtime.clone())
}

/// Ends one [`acquire`]; the last one shuts the runtime down. An error if nothing was acquired.
pub fn release() -> Result<()> {
    let mut shared = shared();
    let Some(users) = shared.as_mut().map(|s| {
        s.users -= 1;
        s.users
    }) else {
        return Err(Error::NotRunning("nothing in this process has started it"));
    };
    if users == 0
        && let Some(ended) = shared.take()
    {
        ended.runtime.shutdown();
    }
    Ok(())
}

/// How long the end of the process waits for those who start, stop or fork.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// The end of the process: accesses that the C interface began are over, and the runtime is shut down, whoever has
/// acquired it. No fork of another thread comes in between. Does nothing where somebody does not let go of the lock: it may
/// be the very thread that ends the process, in a signal handler.
pub fn end() {
    let since = Instant::now();
    let shared = loop {
        match SHARED.try_lock() {
            Ok(shared) => break shared,
            Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
            Err(TryLockError::WouldBlock) if since.elapsed() > LONGEST_WAIT => return,
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_micros(50)),
        }
    };
    if let Some(shared) = shared.as_ref().filter(|s| s.owner == std::process::id()) {
        alloc::internal(|| init::end_accesses(&shared.runtime));
        shared.runtime.shutdown();
    }
}

/// Keeps the runtime as it is while it lives: for the time of a fork.
pub(crate) struct Hold(MutexGuard<'static, Option<Shared>>);

/// See [`Hold`].
pub(crate) fn hold() -> Hold {
    Hold(SHARED.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Hold {
    /// In a forked child: the runtime is the parent's.
    pub(crate) fn forget(&mut self) {
        std::mem::forget(self.0.take());
    }
}

/// In a forked child the parent's runtime is not ours: its threads do not exist here. For children of calls that run no
/// handlers.
fn forget_the_parents(shared: &mut Option<Shared>) {
    if shared.as_ref().is_some_and(|s| s.owner != std::process::id()) {
        std::mem::forget(shared.take());
    }
}
