//! What those wait for who found everything pinned.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

/// Tells waiters that pins or device memory were given up.
#[derive(Default)]
pub(crate) struct Released {
    generation: Mutex<u64>,
    changed: Condvar,
    waiters: AtomicU32,
}

impl Released {
    pub(crate) fn announce(&self) {
        *self.generation.lock().unwrap_or_else(|p| p.into_inner()) += 1;
        // Who waits says so with the lock held, so nobody is missed. Most times nobody does, and a wake-up is a call.
        if self.waiters.load(Ordering::Acquire) > 0 {
            self.changed.notify_all();
        }
    }

    pub(crate) fn generation(&self) -> u64 {
        *self.generation.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Waits until something was released after `seen`, or `timeout`.
    pub(crate) fn wait(&self, seen: u64, timeout: Duration) {
        let guard = self.generation.lock().unwrap_or_else(|p| p.into_inner());
        self.waiters.fetch_add(1, Ordering::AcqRel);
        let _ = self.changed.wait_timeout_while(guard, timeout, |now| *now == seen);
        self.waiters.fetch_sub(1, Ordering::AcqRel);
    }
}
