//! What is done once in a process, whatever fork does meanwhile.
//!
//! # Overview
//! A `std::sync::Once` that another thread was running during a fork is never done in the child, and whoever needs it there
//! waits for ever. [`Once`] knows whose thread is at it: a child whose parent was in the middle does it anew.
//!
//! # Locking
//! Waits for a thread of this process that is at it.
//!
//! # Limits
//! What may have been half done before the fork must bear being done again in the child.

use std::sync::atomic::{AtomicU32, Ordering};

/// No process has this id.
const DONE: u32 = u32::MAX;

/// See the module.
#[derive(Debug, Default)]
pub struct Once(AtomicU32);

impl Once {
    /// Not done yet.
    pub const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Runs `f`, unless that was done; returns when it is done.
    pub fn run(&self, f: impl FnOnce()) {
        let mut seen = self.0.load(Ordering::Acquire);
        if seen == DONE {
            return;
        }
        let me = std::process::id();
        loop {
            if seen == me {
                std::thread::yield_now();
                seen = self.0.load(Ordering::Acquire);
            } else {
                match self.0.compare_exchange(seen, me, Ordering::Acquire, Ordering::Acquire) {
                    Ok(_) => break,
                    Err(now) => seen = now,
                }
            }
            if seen == DONE {
                return;
            }
        }
        f();
        self.done();
    }

    /// It is known to be done.
    pub fn done(&self) {
        self.0.store(DONE, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_runs_once_and_again_where_another_process_was_at_it() {
        let count = AtomicU32::new(0);
        let counts = || {
            count.fetch_add(1, Ordering::Relaxed);
        };
        let once = Once::new();
        std::thread::scope(|s| (0..8).for_each(|_| drop(s.spawn(|| once.run(counts)))));
        assert_eq!(count.load(Ordering::Relaxed), 1);
        // As a child finds it whose parent was in the middle.
        let inherited = Once(AtomicU32::new(std::process::id() + 1));
        inherited.run(counts);
        inherited.run(counts);
        assert_eq!(count.load(Ordering::Relaxed), 2);
    }
}
