//! Engines: a queue of jobs and the thread that runs them in order.
//!
//! # Overview
//! A job has work, fences to wait for, and a fence of its own. The queue is strictly in order: a job whose
//! fences are not over holds up what is behind it, as a ring does. A job that fails, or panics, ends with an
//! error on its own fence and the engine goes on with the next. A job whose dependency failed does not run
//! and ends with that error.
//!
//! # Locking
//! Submitting is lock-free: an inbox and a futex wake-up. No lock is held while a job runs, but the one of
//! [`super::shared`] while it uses a translation.
//!
//! # Limits
//! A job that waits for one behind it in the same queue waits until the device is lost or dropped. A running
//! job cannot be stopped, only its next access to memory fails; a device that is dropped under one that never
//! accesses memory again leaves the thread behind after some seconds (it keeps what it uses alive).

use super::gpu::{Gpu, TILE};
use super::inbox::Inbox;
use super::shared::{Shared, Unit};
use crate::ground::error::{Errno, Error, Result};
use crate::ground::sync::{Event, Fence};
use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// What a job does.
pub(super) type Work = Box<dyn FnOnce(&mut Gpu<'_>) -> Result<()> + Send>;

/// How often a job that waits for others looks whether the device still lives.
const LOOK: Duration = Duration::from_millis(10);
/// How long a device that is dropped waits for a running job.
const LAST_CALL: Duration = Duration::from_secs(5);

struct Job {
    work: Option<Work>,
    after: Vec<Fence>,
    done: Event,
}

impl Drop for Job {
    /// Whatever becomes of a job, nobody waits for it for ever.
    fn drop(&mut self) {
        self.done.signal(Err(Error::NotRunning("the device was shut down before this job ran")));
    }
}

impl Job {
    fn execute(mut self, shared: &Shared, unit: &Unit, tile: &mut [u8]) {
        let work = self.work.take();
        let ready = self.await_others(shared).and_then(|()| shared.status());
        // The closure is dropped inside as well: what it captured may panic too.
        let ran = catch_unwind(AssertUnwindSafe(|| match (ready, work) {
            (Ok(()), Some(work)) => work(&mut Gpu::new(shared, unit, tile)),
            (ready, _) => ready,
        }));
        let outcome = ran.unwrap_or_else(|payload| Err(panicked(payload)));
        self.done.signal(outcome.and_then(|()| shared.not_lost()));
    }

    fn await_others(&self, shared: &Shared) -> Result<()> {
        for fence in &self.after {
            while !fence.wait(Some(LOOK))? {
                shared.status()?;
            }
        }
        Ok(())
    }
}

fn panicked(payload: Box<dyn Any + Send>) -> Error {
    let words = payload.downcast_ref::<&str>().map(ToString::to_string);
    let words = words.or_else(|| payload.downcast_ref::<String>().cloned());
    let reason = format!("it panicked: {}", words.as_deref().unwrap_or("with no message"));
    let _ = catch_unwind(AssertUnwindSafe(|| drop(payload)));
    Error::Invalid { argument: "device job", reason }
}

/// Which of the device's engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Compute,
    Copy,
    /// Reserved for the driver's own copies, which must never stand behind a job that waits for a fault: the
    /// fault may need this copy. It uses no translations.
    Paging,
}

impl Kind {
    fn thread_name(self) -> &'static str {
        match self {
            Kind::Compute => "sim-exec",
            Kind::Copy => "sim-copy",
            Kind::Paging => "sim-page",
        }
    }

    fn unit(self, shared: &Shared) -> &Unit {
        match self {
            Kind::Compute => &shared.compute,
            Kind::Copy | Kind::Paging => &shared.copy,
        }
    }
}

/// See the module's documentation.
pub(super) struct Engine {
    inbox: Arc<Inbox<Job>>,
    ended: Event,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    pub(super) fn start(kind: Kind, shared: &Arc<Shared>) -> Result<Self> {
        let inbox = Arc::new(Inbox::new());
        let ended = Event::new();
        let run = {
            let (shared, inbox, ended) = (Arc::clone(shared), Arc::clone(&inbox), Ended(ended.clone()));
            move || {
                run(&shared, kind.unit(&shared), &inbox);
                drop(ended);
            }
        };
        let thread = crate::ground::thread::spawn(kind.thread_name(), run).map_err(|e| Error::Os {
            call: "clone",
            errno: Errno(e.raw_os_error().unwrap_or(libc::EAGAIN)),
        })?;
        Ok(Self { inbox, ended, thread: Some(thread) })
    }

    /// Queues `work` to run when everything before it and all of `after` is over.
    pub(super) fn submit(&self, after: &[Fence], work: Work) -> Fence {
        let done = Event::new();
        let fence = done.fence();
        self.inbox.put(Job { work: Some(work), after: after.to_vec(), done });
        self.wake();
        fence
    }

    /// Makes the thread look at its inbox and at the device's state.
    pub(super) fn wake(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    /// Waits for the thread of a device that is stopping. A thread that does not end in time is left behind.
    pub(super) fn join(&mut self) {
        self.wake();
        let Some(thread) = self.thread.take() else { return };
        if thread.thread().id() == std::thread::current().id() {
            // The last handle was dropped by a job: this thread ends after it.
            return;
        }
        if self.ended.wait(Some(LAST_CALL)) == Ok(true) {
            let _ = thread.join();
        } else {
            tracing::error!("a device job did not end in time; its thread is left behind");
        }
    }

    /// Forgets the thread, which a forked child does not have.
    pub(super) fn abandon(&mut self) {
        std::mem::forget(self.thread.take());
    }
}

/// Signals when it is dropped, however the thread ends.
struct Ended(Event);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.signal(Ok(()));
    }
}

fn run(shared: &Shared, unit: &Unit, inbox: &Inbox<Job>) {
    let mut tile = vec![0; TILE];
    let mut queue = VecDeque::new();
    loop {
        queue.extend(inbox.take_all());
        match queue.pop_front() {
            Some(job) => job.execute(shared, unit, &mut tile),
            None if shared.is_stopping() => return,
            None => std::thread::park(),
        }
    }
}
