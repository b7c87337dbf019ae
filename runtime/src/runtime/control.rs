//! The control threads: they do what application threads ask for.
//!
//! # Overview
//! An application thread never runs usvm's core: its own stack may be on its way to the device, and a thread that holds
//! a lock and then waits for its stack would stop those who bring stacks back. So it puts a closure into a queue and
//! waits on a fence; both are lock-free and in usvm's own memory.
//!
//! # Limits
//! [`THREADS`] requests are served at once; more wait in line.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crossbeam_queue::SegQueue;
use rustix::thread::futex;

use crate::ground::alloc;
use crate::ground::error::{Errno, Error, Result};
use crate::ground::sync::{Event, Fence};
use crate::ground::thread;

/// Control threads.
pub const THREADS: usize = 2;

type Request = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Shared {
    queue: SegQueue<Request>,
    arrivals: AtomicU32,
    stop: AtomicBool,
}

/// The queue and its threads.
pub(super) struct Control {
    shared: Arc<Shared>,
}

impl Control {
    /// Starts the threads.
    pub(super) fn start() -> Result<Self> {
        let control = Self { shared: Arc::default() };
        for index in 0..THREADS {
            let shared = control.shared.clone();
            thread::spawn(&format!("ctl{index}"), move || shared.run())
                .map_err(|e| Error::os("clone", Errno(e.raw_os_error().unwrap_or(libc::EAGAIN))))?;
        }
        Ok(control)
    }

    /// Runs `f` on a control thread and gives its fence, which carries its error.
    pub(super) fn submit(&self, f: impl FnOnce() -> Result<()> + Send + 'static) -> Fence {
        if self.shared.stop.load(Ordering::Acquire) {
            return Fence::signaled(Err(Error::NotRunning("it was shut down")));
        }
        alloc::internal(|| {
            let event = Event::new();
            let fence = event.fence();
            let guard = SignalOnDrop(event);
            self.shared.queue.push(Box::new(move || {
                let result = f();
                guard.0.signal(result);
            }));
            self.shared.arrivals.fetch_add(1, Ordering::AcqRel);
            let _ = futex::wake(&self.shared.arrivals, futex::Flags::PRIVATE, 1);
            fence
        })
    }

    /// Runs `f` on a control thread and waits for what it gives. On a thread of usvm it runs right here.
    pub(super) fn call<T: Send + Sync + 'static>(
        &self,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        if alloc::is_service_thread() {
            return f();
        }
        alloc::internal(|| {
            let slot = Arc::new(OnceLock::new());
            let filled = slot.clone();
            self.submit(move || {
                let _ = filled.set(f()?);
                Ok(())
            })
            .wait(None)?;
            Arc::into_inner(slot)
                .and_then(OnceLock::into_inner)
                .ok_or(Error::NotRunning("a control thread died during the call"))
        })
    }

    /// Makes the threads end once the queue is empty.
    pub(super) fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.arrivals.fetch_add(1, Ordering::AcqRel);
        let _ = futex::wake(&self.shared.arrivals, futex::Flags::PRIVATE, i32::MAX as u32);
    }
}

/// The threads of a runtime that never came to run end, too.
impl Drop for Control {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn run(&self) {
        loop {
            let seen = self.arrivals.load(Ordering::Acquire);
            match self.queue.pop() {
                Some(request) => request(),
                None if self.stop.load(Ordering::Acquire) => return,
                None => {
                    // Woken early or not at all because the word changed: look again either way.
                    let _ = futex::wait(&self.arrivals, futex::Flags::PRIVATE, seen, None);
                }
            }
        }
    }
}

/// A request that never runs, or panics, still answers.
struct SignalOnDrop(Event);

impl Drop for SignalOnDrop {
    fn drop(&mut self) {
        self.0.signal(Err(Error::NotRunning("the request was not carried out")));
    }
}
