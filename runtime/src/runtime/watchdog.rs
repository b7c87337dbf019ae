//! The watchdog and the housekeeping.
//!
//! # Overview
//! One thread wakes every [`PERIOD`]: it looks whether messages of the kernel are left lying, collects garbage, keeps
//! retained pages within the host-memory budget, refills the pool of prepared pages, publishes the live page if somebody
//! looks at it, and looks whether all of usvm's threads still live. If one does not, a program could wait for ever for
//! the memory it served. Then usvm withdraws: everything comes home, userfaultfd lets go of all memory, and later calls
//! get [`crate::ground::error::Error::NotRunning`]. What cannot come home answers SIGBUS, never zeroes.

use std::sync::Weak;
use std::time::Duration;

use super::Inner;
use super::publish::Publisher;
use crate::ground::thread;

/// Time between two rounds.
pub const PERIOD: Duration = Duration::from_millis(50);

/// The thread's body; ends with the runtime.
pub(super) fn run(runtime: &Weak<Inner>) {
    let mut publisher = Publisher::new();
    loop {
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
    }
}
