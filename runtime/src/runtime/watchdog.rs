//! The watchdog and the housekeeping.
//!
//! # Overview
//! One thread wakes every [`PERIOD`]: it looks whether messages of the kernel are left lying, collects garbage, keeps
//! retained pages within the host-memory budget, refills the pool of prepared pages, publishes the live page if somebody
//! looks at it, and looks whether all of usvm's threads still live. If one does not, a program could wait for ever for
//! the memory it served. Then usvm withdraws: everything comes home, userfaultfd lets go of all memory, and later calls
//! get [`crate::ground::error::Error::NotRunning`]. What cannot come home answers SIGBUS, never zeroes.

use std::sync::{OnceLock, Weak};
use std::time::Duration;

use super::Inner;
use super::publish::Publisher;
use crate::ground::thread;

/// Time between two rounds.
pub const PERIOD: Duration = Duration::from_millis(50);

/// Rounds between two calls of what [`each_second`] registered.
const SECOND: u32 = 20;

static EACH_SECOND: OnceLock<fn()> = OnceLock::new();

/// Registers what the watchdog of every runtime calls about once a second. The first registration counts.
pub fn each_second(f: fn()) {
    let _ = EACH_SECOND.set(f);
}

/// The thread's body; ends with the runtime.
pub(super) fn run(runtime: &Weak<Inner>) {
    let mut publisher = Publisher::new();
    for round in 1u32.. {
        std::thread::sleep(PERIOD);
        let Some(runtime) = runtime.upgrade() else { return };
        if !runtime.is_running() {
            return;
        }
        let dead = thread::dead();
        if !dead.is_empty() {
            tracing::error!(
                "service threads died: {}; bringing all memory home and withdrawing",
                dead.join(", ")
            );
            runtime.withdraw();
            return;
        }
        runtime.service.look_after();
        runtime.keep_house();
        publisher.round(&runtime);
        if let Some(f) = EACH_SECOND.get().filter(|_| round.is_multiple_of(SECOND)) {
            f();
        }
    }
}
