//! The fault and event service: the threads that answer the kernel.
//!
//! # Overview
//! All service threads run the same loop:
//!
//! ```text
//!   wait for messages -> in turn: read them all, handle the events in order, queue the faults -> serve faults from the queue
//!          ^                                                                                               |
//!          +------------------------------------ none left ------------------------------------------------+
//! ```
//!
//! One thread reads at a time. While one thread of the program faults, one of these is enough, and the others rest: a
//! message wakes every thread that waits for messages, and who finds nothing left to do was woken in vain. That several
//! threads fault is learnt from the last faults.
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
//!    read comes first. No thread waits for a lock while it reads, except for a range's own, in an event. Its
//!    holder may wait for the reader with it: in an mremap of usvm's own, where pages cannot be moved otherwise. So the
//!    reader reads on while it waits. For a page of the program the holder never waits: what usvm does with pages at home
//!    fails where one is missing ([`crate::space::ports::HostMemory::read_home`]). Nobody could serve such a fault: whether
//!    the page is a hole, or mremap has contents on their way there, only the events tell that wait for the range.
//! 4. [`Service::barrier`] returns when every event queued before the call was handled. A device access begins with it.
//!
//! # Waiting for messages
//! Waking a thread that sleeps in poll costs more than a flip. After a fault the service therefore looks again for a
//! while before it sleeps; the time grows when the next fault came soon after it had gone to sleep and shrinks when
//! none came, as the kernel's halt polling does. Between looks it yields, and where a yield takes long it sleeps: somebody
//! else wants the processor.
//!
//! Where there is a service thread for each processor, each has a processor of its own and none rests. The one that shares
//! its processor with the thread that faults is next in line when that one goes to sleep: the processor never becomes
//! idle, and nobody has to wake it. In a virtual machine that takes as long as all the rest (measured with 2 processors:
//! a clean 2 MiB range is back in 30 us instead of 80).
//!
//! # Limits
//! Faults are counted from when they are read: the time a message waited in the kernel is not in the latency figures.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::ground::addr::{SZ_4K, Span, align_down};
use crate::ground::error::Result;
use crate::ground::fds::Kept;
use crate::ground::inject::{self, Call};
use crate::host::Host;
use crate::host::message::Message;
use crate::space::svm::{Served, Svm, Wait};

/// A yield that takes longer says that others want the processor.
const CROWDED: Duration = Duration::from_micros(200);

/// A fault that has waited so long for its turn was left lying.
const LATE: Duration = Duration::from_millis(100);

/// Faults whose threads are counted.
const RECENT: usize = 16;

/// How long a move is put off for others' events, which their threads have still to tell.
const LATEST: Duration = Duration::from_millis(500);
/// Between two looks for these.
const MOMENT: Duration = Duration::from_micros(50);

/// Whether `event` tells the end of the old place of the move `before`.
fn ends(before: &Message, event: &Message) -> bool {
    match (before, event) {
        (Message::Remap { from, len, .. }, Message::Unmap(span)) => Span::sized(*from, *len) == *span,
        _ => false,
    }
}

/// One fault that waits.
#[derive(Debug, Clone, Copy)]
struct Fault {
    addr: u64,
    arrived: Instant,
    not_before: Instant,
    attempts: u32,
}

/// The threads of the last faults.
#[derive(Default)]
struct Company {
    recent: [u32; RECENT],
    next: usize,
}

impl Company {
    /// A fault of thread `tid` came. Whether it has company: several threads fault.
    fn came(&mut self, tid: u32) -> bool {
        self.recent[self.next % RECENT] = tid;
        self.next = self.next.wrapping_add(1);
        self.recent.iter().any(|other| *other != 0 && *other != tid)
    }
}

/// How long to look for the next message before sleeping. Times are nanoseconds since `base`.
struct Spin {
    base: Instant,
    max: u64,
    now: AtomicU64,
    last: AtomicU64,
    /// The `last` after which somebody looked for nothing.
    vain: AtomicU64,
}

impl Spin {
    fn new(max: Duration) -> Self {
        let zero = || AtomicU64::new(0);
        Self { base: Instant::now(), max: nanos(max), now: zero(), last: zero(), vain: zero() }
    }

    /// Whether to look once more.
    fn goes_on(&self) -> bool {
        nanos(self.base.elapsed()) < self.last.load(Ordering::Relaxed) + self.now.load(Ordering::Relaxed)
    }

    /// Messages came, for a thread that had gone to sleep or not.
    fn found(&self, slept: bool) {
        let at = nanos(self.base.elapsed());
        let since = at.saturating_sub(self.last.swap(at, Ordering::Relaxed));
        if slept && since < self.max * 2 {
            let longer = (self.now.load(Ordering::Relaxed) * 2).clamp(self.max / 8, self.max);
            self.now.store(longer, Ordering::Relaxed);
        }
    }

    /// Looked for nothing. Counts once, however many threads did.
    fn in_vain(&self) {
        let last = self.last.load(Ordering::Relaxed);
        if self.vain.swap(last, Ordering::Relaxed) != last {
            let half = self.now.load(Ordering::Relaxed) / 2;
            self.now.store(if half < self.max / 64 { 0 } else { half }, Ordering::Relaxed);
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    duration.as_nanos() as u64
}

/// Gets a forked child's userfaultfd, and what to do again and again while it waits for a range.
type OnFork = dyn Fn(Kept, &dyn Fn()) + Send + Sync;

/// The service of one runtime.
pub struct Service {
    host: Arc<Host>,
    svm: Arc<Svm>,
    /// Held by the thread that reads.
    reader: Mutex<Company>,
    /// Messages that were read and not handled yet, in order.
    unhandled: Mutex<VecDeque<Message>>,
    /// Old places of moves that were handled, whose end is still to be told.
    owed: Mutex<Vec<Span>>,
    queue: Mutex<VecDeque<Fault>>,
    spin: Spin,
    /// Whether several threads fault.
    company: AtomicBool,
    /// What ends the rest of threads that are not needed.
    bell: (Mutex<()>, Condvar),
    /// Where there is a service thread for each processor, and they look: theirs.
    processors: Vec<usize>,
    begun: AtomicU64,
    finished: AtomicU64,
    /// `begun` when the watchdog looked.
    looked_at: AtomicU64,
    stop: AtomicBool,
    on_fork: Box<OnFork>,
}

impl Service {
    /// A service of `workers` threads that look for messages for at most `spin` before they sleep. `on_fork` gets a
    /// child's userfaultfd.
    pub fn new(
        host: Arc<Host>,
        svm: Arc<Svm>,
        workers: usize,
        spin: Duration,
        on_fork: impl Fn(Kept, &dyn Fn()) + Send + Sync + 'static,
    ) -> Self {
        let processors = allowed_processors();
        Self {
            host,
            svm,
            reader: Mutex::default(),
            unhandled: Mutex::new(VecDeque::with_capacity(256)),
            owed: Mutex::default(),
            queue: Mutex::new(VecDeque::with_capacity(256)),
            spin: Spin::new(spin),
            company: AtomicBool::new(false),
            bell: Default::default(),
            processors: if processors.len() <= workers && !spin.is_zero() { processors } else { Vec::new() },
            begun: AtomicU64::new(0),
            finished: AtomicU64::new(0),
            looked_at: AtomicU64::new(u64::MAX),
            stop: AtomicBool::new(false),
            on_fork: Box::new(on_fork),
        }
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Fault>> {
        self.queue.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Service thread `index`. Returns after [`Service::stop`].
    pub fn run(&self, index: usize) {
        if let Some(processor) = self.processors.get(index) {
            stay_on(*processor);
        }
        while !self.stop.load(Ordering::Acquire) {
            // Whoever puts a fault back sees to it that it is served later.
            if !self.is_needed(index) && self.queue().is_empty() {
                self.rest();
                continue;
            }
            if let Err(e) = self.wait().and_then(|()| self.read_in_turn()) {
                tracing::error!("the fault service cannot read: {e}");
                std::thread::sleep(Duration::from_millis(10));
            }
            while let Some(fault) = self.next_fault() {
                // Alone it reads before it waits for a lock: the holder may wait for an event.
                let patient = fault.attempts > 0 || self.is_needed(1);
                self.serve(fault, patient);
            }
        }
        // The call that woke this one may have been used up before another slept.
        self.host.channel().wake_reader();
    }

    /// Makes all service threads return.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.host.channel().wake_reader();
        self.ring();
    }

    /// Whether thread `index` has something to do: the first always.
    fn is_needed(&self, index: usize) -> bool {
        index == 0 || !self.processors.is_empty() || self.company.load(Ordering::Relaxed)
    }

    /// Returns when this thread may be needed.
    fn rest(&self) {
        let mut bell = self.bell.0.lock().unwrap_or_else(|p| p.into_inner());
        while !self.company.load(Ordering::Relaxed) && !self.stop.load(Ordering::Acquire) {
            bell = self.bell.1.wait(bell).unwrap_or_else(|p| p.into_inner());
        }
    }

    /// Ends all rest, after what it waits for was changed.
    fn ring(&self) {
        // Whoever is about to rest has looked before and sleeps by now, or looks after this.
        drop(self.bell.0.lock().unwrap_or_else(|p| p.into_inner()));
        self.bell.1.notify_all();
    }

    /// Reads, unless another thread does: that one takes what is there, and queues the faults for everybody.
    fn read_in_turn(&self) -> Result<()> {
        let mut company = match self.reader.try_lock() {
            Ok(company) => company,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                std::thread::yield_now();
                return Ok(());
            }
        };
        // Another thread may have read them. To look is cheaper than to read nothing, which stops flips.
        if self.host.channel().has_messages() { self.read(&mut company) } else { Ok(()) }
    }

    fn unhandled(&self) -> MutexGuard<'_, VecDeque<Message>> {
        self.unhandled.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// What is done while an event cannot be handled, because another thread has its range: whoever caused an event can go
    /// on.
    fn read_on_meanwhile(&self) {
        // Nothing can be done about an error here; the next read tells it.
        let _ = self.read_on();
    }

    /// Reads all messages and handles none.
    fn read_on(&self) -> Result<usize> {
        let mut batch = Vec::new();
        let read = self.host.channel().read_batch(&mut batch);
        self.unhandled().extend(batch);
        read
    }

    /// Reads all messages, handles the events, queues the faults.
    fn read(&self, company: &mut Company) -> Result<()> {
        self.begun.fetch_add(1, Ordering::AcqRel);
        let read = self.read_on();
        let arrived = Instant::now();
        self.handle_events();
        self.finished.fetch_add(1, Ordering::AcqRel);
        let mut faults = Vec::new();
        self.unhandled().retain(|message| match message {
            Message::Fault { addr, tid, .. } => {
                faults.push((align_down(*addr, SZ_4K), *tid));
                false
            }
            _ => true,
        });
        // Sorted, so that the faults of one range are served together: after the first the others find their page.
        faults.sort_unstable();
        faults.dedup();
        for (_, tid) in &faults {
            let now = company.came(*tid);
            if self.company.swap(now, Ordering::Relaxed) != now && now {
                self.ring();
            }
        }
        let mut queue = self.queue();
        queue.extend(faults.into_iter().map(|(addr, _)| Fault {
            addr,
            arrived,
            not_before: arrived,
            attempts: 0,
        }));
        drop(queue);
        read.map(|_| ())
    }

    /// Handles all events that were read.
    ///
    /// A call's events come one after the other, each when the one before was read, and those of others in between. mremap
    /// tells of its destination, then of the move, then of the old place, which another thread's mremap may have taken and
    /// told of by then. So a move to where contents still are, of which their own event has not told, is put off until it
    /// has; and the old place's end that belongs to a move is not taken for another's.
    fn handle_events(&self) {
        let mut put_off: Vec<Message> = Vec::new();
        let mut since = Instant::now();
        loop {
            while !put_off.is_empty() {
                let late = since.elapsed() > LATEST || !self.more_comes();
                let Some(next) = self.first_ready(&put_off).or(late.then_some(0)) else { break };
                let event = put_off.remove(next);
                self.handle(event);
            }
            match self.next_event() {
                None if put_off.is_empty() => {
                    // Nobody is in the middle of a call: what is still expected does not come.
                    let mut owed = self.owed();
                    if !owed.is_empty() && !self.host.has_more_to_tell() {
                        owed.clear();
                    }
                    return;
                }
                None => {
                    self.read_on_meanwhile();
                    std::thread::sleep(MOMENT);
                }
                Some(event) => {
                    let waits = put_off.iter().any(|before| ends(before, &event))
                        || self.is_early(&event) && self.more_comes();
                    if !waits {
                        self.handle(event);
                        continue;
                    }
                    if put_off.is_empty() {
                        since = Instant::now();
                    }
                    put_off.push(event);
                }
            }
        }
    }

    /// The first of the events that were put off for which that is over. The end of an old place follows its move.
    fn first_ready(&self, put_off: &[Message]) -> Option<usize> {
        let is_ready = |(at, event): (usize, &Message)| {
            !put_off[..at].iter().any(|before| ends(before, event)) && !self.is_early(event)
        };
        put_off.iter().enumerate().position(is_ready)
    }

    /// Whether `event` moves something to where other contents still are.
    fn is_early(&self, event: &Message) -> bool {
        matches!(event, Message::Remap { from, to, len }
            if !self.host.is_to_own_place(*from, *to) && self.svm.holds(Span::sized(*to, *len)))
    }

    /// Whether there are events that were not handled, beside the one in hand.
    fn more_comes(&self) -> bool {
        let waits = self.unhandled().iter().any(|message| !matches!(message, Message::Fault { .. }));
        waits || self.host.has_more_to_tell()
    }

    fn handle(&self, event: Message) {
        let read_on = || self.read_on_meanwhile();
        let _handling = self.host.channel().handling();
        match event {
            Message::Unmap(span) if self.is_owed(span) => {}
            Message::Unmap(span) => self.svm.unmapped_meanwhile(span, &read_on),
            Message::Remove(span) => self.svm.discarded(span, &read_on),
            Message::Remap { from, to, len } => {
                if !self.host.is_own_remap(from, to) {
                    // The old place's end is told next, but for MREMAP_DONTUNMAP.
                    if self.more_comes() {
                        self.owed().push(Span::sized(from, len));
                    }
                    self.svm.moved(from, to, len, &read_on);
                }
            }
            Message::Fork(child) => {
                (self.on_fork)(child, &read_on);
                self.host.channel().renew_spare();
            }
            Message::Fault { .. } => unreachable!("it is no event"),
        }
    }

    /// Whether an unmapping is the end of a move that was handled.
    fn is_owed(&self, span: Span) -> bool {
        let mut owed = self.owed();
        let at = owed.iter().position(|expected| *expected == span);
        at.map(|at| owed.swap_remove(at)).is_some()
    }

    fn owed(&self) -> MutexGuard<'_, Vec<Span>> {
        self.owed.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Takes the first event that was read. Faults stay where [`Service::read_on_meanwhile`] sees them.
    fn next_event(&self) -> Option<Message> {
        let mut unhandled = self.unhandled();
        let at = unhandled.iter().position(|message| !matches!(message, Message::Fault { .. }))?;
        unhandled.remove(at)
    }

    /// Waits for messages, or until a fault that was put back is due.
    fn wait(&self) -> Result<()> {
        let mut looked = false;
        let due = loop {
            let due = self.queue().iter().map(|f| f.not_before).min();
            if self.stop.load(Ordering::Acquire) || due.is_some_and(|at| at <= Instant::now()) {
                return Ok(());
            }
            // To look takes no gate: flips of other threads go on.
            if self.host.channel().has_messages() {
                self.spin.found(false);
                return Ok(());
            }
            if !self.spin.goes_on() {
                break due;
            }
            looked = true;
            let asked = Instant::now();
            std::thread::yield_now();
            if asked.elapsed() > CROWDED {
                // Somebody else wants the processor, perhaps the very thread that will fault next.
                break due;
            }
        };
        if looked {
            self.spin.in_vain();
        }
        let timeout = due.map(|at| at.saturating_duration_since(Instant::now()));
        if self.host.channel().poll(timeout)?.messages {
            self.spin.found(true);
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

    /// For the watchdog, now and then: where messages or faults have been left lying since it last looked, because every
    /// service thread waits for something, it calls all of them and reads itself. What they wait for may be an event.
    pub fn look_after(&self) {
        let begun = self.begun.load(Ordering::Acquire);
        let idle = self.looked_at.swap(begun, Ordering::AcqRel) == begun;
        let unread = idle && self.host.channel().has_messages();
        let late = |fault: &Fault| fault.not_before.elapsed() > LATE;
        if !unread && !self.queue().iter().any(late) {
            return;
        }
        tracing::debug!(unread, "the fault service was late");
        self.company.store(true, Ordering::Relaxed);
        self.ring();
        self.host.channel().wake_reader();
        if let Err(e) = self.read_in_turn() {
            tracing::error!("the watchdog cannot read: {e}");
        }
    }

    /// Reads and handles what is there in the place of the service threads, for the watchdog after one of them died.
    pub fn rescue(&self) {
        match self.reader.try_lock() {
            Ok(mut company) => drop(self.read(&mut company)),
            Err(TryLockError::Poisoned(poisoned)) => drop(self.read(&mut poisoned.into_inner())),
            Err(TryLockError::WouldBlock) => drop(self.read(&mut Company::default())),
        }
        while let Some(fault) = self.next_fault() {
            if !self.serve(fault, false) {
                // Whoever still sleeps does not know of it.
                self.host.channel().wake_reader();
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

/// The processors that this thread may run on; none where the kernel does not tell.
fn allowed_processors() -> Vec<usize> {
    let asked = inject::check(Call::Affinity).map_err(|e| rustix::io::Errno::from_raw_os_error(e.0));
    let Ok(allowed) = asked.and_then(|()| sched_getaffinity(None)) else { return Vec::new() };
    (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect()
}

/// Keeps this thread on one processor. Where that is not allowed it runs where it may.
fn stay_on(processor: usize) {
    let mut only = CpuSet::new();
    only.set(processor);
    let asked = inject::check(Call::Affinity).map_err(|e| rustix::io::Errno::from_raw_os_error(e.0));
    if let Err(errno) = asked.and_then(|()| sched_setaffinity(None, &only)) {
        tracing::debug!(%errno, processor, "cannot stay there");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_threads_are_company_until_one_was_alone_for_long() {
        let mut company = Company::default();
        assert!(!company.came(7) && !company.came(7), "alone");
        assert!(company.came(8) && company.came(7), "both are among the last");
        let alone_again = (0..2 * RECENT).position(|_| !company.came(7));
        assert_eq!(alone_again, Some(RECENT - 2), "the other is forgotten when it is not among the last");
        assert!(!Company::default().came(0), "a kernel that does not tell threads: nobody is seen");
    }

    #[test]
    fn looking_grows_with_faults_that_come_soon_and_shrinks_with_none() {
        let spin = Spin::new(Duration::from_secs(64));
        let looks = |spin: &Spin| spin.now.load(Ordering::Relaxed) / 1_000_000_000;
        assert!(!spin.goes_on(), "nobody looks before the first fault");
        spin.found(true);
        assert_eq!(looks(&spin), 8);
        assert!(spin.goes_on());
        spin.found(false);
        assert_eq!(looks(&spin), 8, "who was awake was awake for long enough");
        for longer in [16, 32, 64, 64] {
            spin.found(true);
            assert_eq!(looks(&spin), longer);
        }
        spin.in_vain();
        spin.in_vain();
        assert_eq!(looks(&spin), 32, "threads that look together look in vain once");
        for shorter in [16, 8, 4, 2, 1, 0] {
            spin.found(false);
            spin.in_vain();
            assert_eq!(looks(&spin), shorter);
        }
        assert!(!spin.goes_on());
    }

    #[test]
    fn no_looking_where_it_is_switched_off() {
        let spin = Spin::new(Duration::ZERO);
        spin.found(true);
        spin.found(true);
        assert!(!spin.goes_on());
    }
}
