//! The control threads: they do what application threads ask for.
//!
//! # Overview
//! An application thread never runs usvm's core: its own stack may be on its way to the device, and a thread that holds
//! a lock and then waits for its stack would stop those who bring stacks back. So it puts a closure into a queue and
//! waits on a fence; both are lock-free and in usvm's own memory.
//!
//! # Lanes
//! A request may wait long: for device memory that another access holds, for work that ends. What ends an access must
//! never stand in line behind such a request, or nobody could give up what all wait for; nor must what ends the stillness
//! around a fork, in which nothing goes to a device. So [`Control::end`] has a queue and a thread of its own, and what goes
//! there waits for nobody. What the program does not know to be a request (fork, the beginning of a thread, the end) stands
//! in no line behind requests that wait either: [`Control::now`].
//!
//! What may wait for work that holds memory (the beginning of a bracket, moves that the program asks for) does not wait here:
//! it lines up again after each try.
//!
//! # Limits
//! Two requests of the general lane are served at once; more wait in line.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crossbeam_queue::SegQueue;
use rustix::thread::futex;

use crate::ground::alloc;
use crate::ground::error::{Errno, Error, Result};
use crate::ground::sync::{Event, Fence, wait_on};
use crate::ground::thread;

type Request = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Shared {
    queue: SegQueue<Request>,
    arrivals: AtomicU32,
    stop: AtomicBool,
}

impl Shared {
    fn start(names: &[&str]) -> Result<Arc<Self>> {
        let shared = Arc::new(Self::default());
        for name in names {
            let served = shared.clone();
            if let Err(e) = thread::spawn(name, move || served.run()) {
                shared.stop();
                return Err(Error::os("clone", Errno(e.raw_os_error().unwrap_or(libc::EAGAIN))));
            }
        }
        Ok(shared)
    }
}

/// The queues and their threads.
pub(super) struct Control {
    general: Arc<Shared>,
    ending: Arc<Shared>,
    urgent: Arc<Shared>,
}

impl Control {
    /// Starts the threads.
    pub(super) fn start() -> Result<Self> {
        let lane = |names: &[&str], before: &[&Arc<Shared>]| {
            Shared::start(names).inspect_err(|_| before.iter().for_each(|lane| lane.stop()))
        };
        let general = lane(&["ctl0", "ctl1"], &[])?;
        let ending = lane(&["ctl-end"], &[&general])?;
        let urgent = lane(&["ctl-now"], &[&general, &ending])?;
        Ok(Self { general, ending, urgent })
    }

    /// Runs `f` on a control thread and gives its fence, which carries its error.
    pub(super) fn submit(&self, f: impl FnOnce() -> Result<()> + Send + 'static) -> Fence {
        self.general.submit(f)
    }

    /// Runs `f` on a control thread and waits for what it gives. On a thread of usvm it runs right here.
    pub(super) fn call<T: Send + Sync + 'static>(
        &self,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.general.call(f)
    }

    /// As [`Control::call`], for what gives something up and waits for nobody.
    pub(super) fn end<T: Send + Sync + 'static>(
        &self,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.ending.call(f)
    }

    /// As [`Control::call`], for what the program waits for without having asked.
    pub(super) fn now<T: Send + Sync + 'static>(
        &self,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.urgent.call(f)
    }

    /// Makes the threads end once the queues are empty.
    pub(super) fn stop(&self) {
        self.general.stop();
        self.ending.stop();
        self.urgent.stop();
    }
}

/// The threads of a runtime that never came to run end, too.
impl Drop for Control {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn submit(&self, f: impl FnOnce() -> Result<()> + Send + 'static) -> Fence {
        if self.stop.load(Ordering::SeqCst) {
            return Fence::signaled(Err(Error::NotRunning("it was shut down")));
        }
        alloc::internal(|| {
            let event = Event::new();
            let fence = event.fence();
            let guard = SignalOnDrop(event);
            self.queue.push(Box::new(move || {
                let result = f();
                guard.0.signal(result);
            }));
            self.arrivals.fetch_add(1, Ordering::SeqCst);
            let _ = futex::wake(&self.arrivals, futex::Flags::PRIVATE, 1);
            // The threads may have ended between the look and the push.
            if self.stop.load(Ordering::SeqCst) {
                self.refuse_the_rest();
            }
            fence
        })
    }

    fn call<T: Send + Sync + 'static>(&self, f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
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

    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.arrivals.fetch_add(1, Ordering::SeqCst);
        let _ = futex::wake(&self.arrivals, futex::Flags::PRIVATE, i32::MAX as u32);
    }

    fn run(&self) {
        loop {
            let seen = self.arrivals.load(Ordering::Acquire);
            match self.queue.pop() {
                Some(request) => request(),
                None if self.stop.load(Ordering::SeqCst) => return self.refuse_the_rest(),
                None => {
                    // Woken early or not at all because the word changed: look again either way.
                    let _ = wait_on(&self.arrivals, seen, None);
                }
            }
        }
    }

    /// What came too late is answered, not carried out.
    fn refuse_the_rest(&self) {
        while let Some(request) = self.queue.pop() {
            drop(request);
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
