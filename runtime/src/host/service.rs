//! The fault and event service: the threads that answer the kernel.
//!
//! # Overview
//! All service threads run the same loop; one at a time is the *reader*.
//!
//! ```text
//!   reader:  read all messages -> handle the events, in order -> queue the faults -> take one fault
//!                 ^                                                                   |
//!                 |                        alone and quick: serve it and stay reader -+
//!   next reader <-+-- otherwise: give the reading up, serve it --> back to the start
//! ```
//!
//! One thread that faults again and again is served by one awake thread, with no hand-over; threads that fault at the
//! same time are served by as many. Which of the two it is, is learnt: a message that waits when a fault has just been
//! served says that there is company. While there is, a thread that waits for its turn to read stays awake, because waking
//! it costs more than most faults. But where as many threads fault as there are processors, nobody stays awake: whoever
//! waits for a page leaves a processor that is awake, and spinning would only take it from the others.
//!
//! # Order of events
//! Reading an event lets the call that caused it return. The messages of one read are handled like this:
//!
//! 1. Events come before faults: a fault after munmap and mmap must not find the old range.
//! 2. Events are handled in the order they were read. They can be out of causal order: two calls that overlap in time
//!    queue theirs as they come. What keeps this harmless is written where it is used: an unmap only takes what was
//!    registered before it ([`crate::space::svm::Svm::unmapped`]), and what mremap moved follows later events while it
//!    has not landed.
//! 3. While any event is unread, every flip answers EAGAIN. Whoever gets that puts the fault back, so that the next
//!    read comes first. No thread waits for a lock while it is the reader, except for a range's own, in an event. Its
//!    holder may wait for the reader with it: in an mremap of usvm's own, where pages cannot be moved otherwise. So the
//!    reader reads on while it waits, and handles what it read when its turn comes.
//! 4. [`Service::barrier`] returns when every event queued before the call was handled. A device access begins with it.
//!
//! # Waiting for messages
//! Waking a thread that sleeps in poll costs more than a flip. After a fault the reader therefore looks again for a
//! while before it sleeps; the time grows when the next fault came soon after it had gone to sleep and shrinks when
//! none came, as the kernel's halt polling does. Between looks it yields.
//!
//! # Limits
//! Faults are counted from when they are read: the time a message waited in the kernel is not in the latency figures.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use crate::ground::addr::{SZ_4K, align_down};
use crate::ground::error::Result;
use crate::host::Host;
use crate::host::message::Message;
use crate::space::svm::{Served, Svm, Wait};

/// Faults for which company is expected after some was seen.
const COMPANY: u32 = 32;

/// A yield that takes longer says that others want the processor.
const CROWDED: Duration = Duration::from_micros(200);

/// Faults whose threads are counted.
const RECENT: usize = 16;

/// One fault that waits.
#[derive(Debug, Clone, Copy)]
struct Fault {
    addr: u64,
    /// The thread that waits, 0 where the kernel does not tell.
    tid: u32,
    arrived: Instant,
    not_before: Instant,
    attempts: u32,
}

/// What only the reader touches.
struct Reader {
    batch: Vec<Message>,
    spin: Spin,
    crowd: Crowd,
}

/// The threads of the last faults.
struct Crowd {
    recent: [u32; RECENT],
    next: usize,
    processors: usize,
}

impl Crowd {
    fn new(processors: usize) -> Self {
        Self { recent: [0; RECENT], next: 0, processors }
    }

    /// A fault of thread `tid` came. Whether as many threads fault as there are processors.
    fn came(&mut self, tid: u32) -> bool {
        self.recent[self.next % RECENT] = tid;
        self.next = self.next.wrapping_add(1);
        let first = |(i, tid): &(usize, &u32)| **tid != 0 && !self.recent[..*i].contains(tid);
        self.recent.iter().enumerate().filter(first).count() >= self.processors.max(2)
    }
}

/// How long to look for the next message before sleeping.
struct Spin {
    max: Duration,
    now: Duration,
    last: Instant,
}

impl Spin {
    /// A fault was served or came.
    fn active(&mut self, at: Instant, slept: bool) {
        if slept && at.duration_since(self.last) < self.max * 2 {
            self.now = (self.now * 2).clamp(self.max / 8, self.max);
        }
        self.last = at;
    }

    /// Looked for nothing.
    fn in_vain(&mut self) {
        self.now /= 2;
        if self.now < self.max / 64 {
            self.now = Duration::ZERO;
        }
    }
}

/// The service of one runtime.
pub struct Service {
    host: Arc<Host>,
    svm: Arc<Svm>,
    reader: Mutex<Reader>,
    /// Messages that were read and not handled yet, in order.
    unhandled: Mutex<VecDeque<Message>>,
    queue: Mutex<VecDeque<Fault>>,
    company: AtomicU32,
    /// Whether every processor has a thread that faults.
    crowded: AtomicBool,
    /// How long a thread that is not the reader stays awake for its turn.
    patience: Duration,
    begun: AtomicU64,
    finished: AtomicU64,
    stop: AtomicBool,
    on_fork: Box<dyn Fn(rustix::fd::OwnedFd) + Send + Sync>,
}

impl Service {
    /// A service that looks for messages for at most `spin` before it sleeps. `on_fork` gets a child's userfaultfd.
    pub fn new(
        host: Arc<Host>,
        svm: Arc<Svm>,
        spin: Duration,
        on_fork: impl Fn(rustix::fd::OwnedFd) + Send + Sync + 'static,
    ) -> Self {
        let now = Instant::now();
        Self {
            host,
            svm,
            reader: Mutex::new(Reader {
                batch: Vec::with_capacity(256),
                spin: Spin { max: spin, now: Duration::ZERO, last: now },
                crowd: Crowd::new(std::thread::available_parallelism().map_or(1, usize::from)),
            }),
            unhandled: Mutex::new(VecDeque::with_capacity(256)),
            queue: Mutex::new(VecDeque::with_capacity(256)),
            company: AtomicU32::new(0),
            crowded: AtomicBool::new(false),
            patience: spin,
            begun: AtomicU64::new(0),
            finished: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            on_fork: Box::new(on_fork),
        }
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Fault>> {
        self.queue.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// One service thread. Returns after [`Service::stop`].
    pub fn run(&self) {
        while !self.stop.load(Ordering::Acquire) {
            let mut reader = self.become_reader();
            if let Err(e) = self.read_and_serve(&mut reader) {
                tracing::error!("the fault service cannot read: {e}");
                std::thread::sleep(Duration::from_millis(10));
            }
            let shared = reader;
            let Some(fault) = self.next_fault() else { continue };
            drop(shared);
            self.serve(fault, true);
        }
    }

    /// Waits for its turn to read. Where there is company it stays awake for a while: to wake it costs more than a fault.
    fn become_reader(&self) -> MutexGuard<'_, Reader> {
        let began = Instant::now();
        while self.company.load(Ordering::Relaxed) > 0
            && !self.crowded.load(Ordering::Relaxed)
            && began.elapsed() < self.patience
        {
            match self.reader.try_lock() {
                Ok(reader) => return reader,
                Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => std::thread::yield_now(),
            }
        }
        self.reader.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Makes all service threads return.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.host.channel().wake_reader();
    }

    /// As the reader: reads and serves until there is a fault that others should not wait behind.
    fn read_and_serve(&self, reader: &mut Reader) -> Result<()> {
        while !self.stop.load(Ordering::Acquire) {
            // With nothing to serve it waits before it reads: reading stops the flips of others.
            if self.queue().is_empty() {
                self.wait(reader, None)?;
            }
            self.read(reader)?;
            let mut queue = self.queue();
            let now = Instant::now();
            let mut ready = queue.iter().filter(|f| f.not_before <= now);
            let Some(first) = ready.next() else {
                let wake_at = queue.iter().map(|f| f.not_before).min();
                drop(queue);
                if wake_at.is_some() {
                    self.wait(reader, wake_at)?;
                }
                continue;
            };
            if ready.any(|f| f.tid != first.tid) {
                self.company.store(COMPANY, Ordering::Relaxed);
                return Ok(());
            }
            if self.company.load(Ordering::Relaxed) > 0 {
                self.company.fetch_sub(1, Ordering::Relaxed);
                return Ok(());
            }
            let Some(fault) = take_ready(&mut queue) else { continue };
            drop(queue);
            let put_back = !self.serve(fault, false);
            reader.spin.active(Instant::now(), false);
            if put_back {
                return Ok(());
            }
            self.read(reader)?;
            if self.queue().iter().any(|waiting| waiting.tid != fault.tid) {
                self.company.store(COMPANY, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn unhandled(&self) -> MutexGuard<'_, VecDeque<Message>> {
        self.unhandled.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Reads all messages and handles none: whoever caused an event can go on.
    fn read_on(&self, batch: &mut Vec<Message>) -> Result<usize> {
        let read = self.host.channel().read_batch(batch);
        self.unhandled().extend(batch.drain(..));
        read
    }

    /// Reads all messages, handles the events, queues the faults. Whether there was any message.
    fn read(&self, reader: &mut Reader) -> Result<bool> {
        self.begun.fetch_add(1, Ordering::AcqRel);
        let read = self.read_on(&mut reader.batch);
        let arrived = Instant::now();
        let mut any = false;
        let mut faults = Vec::new();
        loop {
            let next = self.unhandled().pop_front();
            let Some(message) = next else { break };
            let _handling =
                (!matches!(message, Message::Fault { .. })).then(|| self.host.channel().handling());
            any = true;
            let read_on = || drop(self.read_on(&mut Vec::new()));
            match message {
                Message::Fault { addr, tid, .. } => faults.push((align_down(addr, SZ_4K), tid)),
                Message::Unmap(span) => self.svm.unmapped_meanwhile(span, &read_on),
                Message::Remove(span) => self.svm.discarded(span, &read_on),
                Message::Remap { from, to, len } => {
                    if !self.host.is_own_remap(from, to) {
                        self.svm.moved(from, to, len, &read_on);
                    }
                }
                Message::Fork(child) => (self.on_fork)(child),
            }
        }
        self.finished.fetch_add(1, Ordering::AcqRel);
        // Sorted, so that the faults of one range are served together: after the first the others find their page.
        faults.sort_unstable();
        faults.dedup();
        for (_, tid) in &faults {
            self.crowded.store(reader.crowd.came(*tid), Ordering::Relaxed);
        }
        let mut queue = self.queue();
        queue.extend(faults.into_iter().map(|(addr, tid)| Fault {
            addr,
            tid,
            arrived,
            not_before: arrived,
            attempts: 0,
        }));
        drop(queue);
        read.map(|_| any)
    }

    /// Waits for messages, or until `wake_at`. Reads none.
    fn wait(&self, reader: &mut Reader, wake_at: Option<Instant>) -> Result<()> {
        let began = Instant::now();
        let crowded = self.crowded.load(Ordering::Relaxed);
        let look_until = reader.spin.last + if crowded { Duration::ZERO } else { reader.spin.now };
        while Instant::now() < look_until {
            // To look takes no gate: flips of other threads go on.
            if self.host.channel().has_messages() {
                reader.spin.active(Instant::now(), false);
                return Ok(());
            }
            if self.stop.load(Ordering::Acquire) || wake_at.is_some_and(|at| Instant::now() >= at) {
                return Ok(());
            }
            let asked = Instant::now();
            std::thread::yield_now();
            if asked.elapsed() > CROWDED {
                // Somebody else wants the processor, perhaps the very thread that will fault next.
                reader.spin.in_vain();
                break;
            }
        }
        if reader.spin.now > Duration::ZERO && began < look_until {
            reader.spin.in_vain();
        }
        let timeout = wake_at.map(|at| at.saturating_duration_since(Instant::now()));
        let ready = self.host.channel().poll(timeout)?;
        if ready.messages {
            reader.spin.active(Instant::now(), true);
        }
        Ok(())
    }

    fn next_fault(&self) -> Option<Fault> {
        take_ready(&mut self.queue())
    }

    /// Serves one fault; `false` if it went back to the queue.
    fn serve(&self, fault: Fault, patient: bool) -> bool {
        match self.svm.cpu_fault(fault.addr, patient) {
            Served::Done => {
                self.svm.note_cpu_fault(fault.addr, fault.arrived);
                true
            }
            Served::Retry(wait) => {
                let delay = match wait {
                    Wait::Lock => Duration::from_micros(u64::from(fault.attempts.min(50)) * 10),
                    Wait::Slice(left) => left.min(Duration::from_millis(10)),
                    Wait::Events => Duration::from_micros(u64::from(fault.attempts.min(50)) * 20),
                    Wait::Pins => Duration::from_micros(20 + u64::from(fault.attempts.min(50)) * 20),
                };
                let not_before = Instant::now() + delay;
                self.queue().push_back(Fault { not_before, attempts: fault.attempts + 1, ..fault });
                if patient {
                    self.host.channel().wake_reader();
                }
                false
            }
        }
    }

    /// Returns when every event that the kernel had queued before the call was handled. Not for service threads of this
    /// loop.
    pub fn barrier(&self) {
        // In this order: what is not unread any more was taken by a read that had begun by then.
        let unread = self.host.channel().has_messages();
        let begun = self.begun.load(Ordering::Acquire);
        let mut target = if unread { begun + 1 } else { begun };
        let mut looks = 0u32;
        while self.finished.load(Ordering::Acquire) < target && !self.stop.load(Ordering::Acquire) {
            looks += 1;
            if looks < 64 {
                std::thread::yield_now();
                continue;
            }
            // The read that was under way may have taken what was unread: then there need be no next one.
            if !self.host.channel().has_messages() {
                target = target.min(self.begun.load(Ordering::Acquire));
            }
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// Reads and handles what is there in the place of the service threads, for the watchdog after one of them died.
    pub fn rescue(&self) {
        match self.reader.try_lock() {
            Ok(mut reader) => drop(self.read(&mut reader)),
            Err(TryLockError::Poisoned(poisoned)) => drop(self.read(&mut poisoned.into_inner())),
            Err(TryLockError::WouldBlock) => {
                let spin = Spin { max: Duration::ZERO, now: Duration::ZERO, last: Instant::now() };
                let crowd = Crowd::new(usize::MAX);
                drop(self.read(&mut Reader { batch: Vec::new(), spin, crowd }));
            }
        }
        while let Some(fault) = self.next_fault() {
            if !self.serve(fault, false) {
                break;
            }
        }
    }
}

/// Takes the first fault whose time has come.
fn take_ready(queue: &mut VecDeque<Fault>) -> Option<Fault> {
    let now = Instant::now();
    let at = queue.iter().position(|f| f.not_before <= now)?;
    queue.remove(at)
}
