//! Trace: single events with begin and duration, for a timeline in Perfetto or `chrome://tracing`.
//!
//! # Overview
//! Threads put fixed-size [`Event`]s into a bounded ring; a writer thread takes them out and streams them to a file in
//! the Chrome trace_event format. Off (the default), an event costs one relaxed load. On, it costs a clock reading and
//! one compare-exchange. When the ring is full the event is dropped and counted (`dropped_events`), never waited for.
//!
//! The file is a JSON array with one event on each line, so that a trace cut short by a crash still loads: readers
//! accept a missing `]`. Host threads are tracks of the process; what a device does is under a process of its own, named
//! for the device, with one track for each thread that serves it, so that events of one track nest and never overlap.
//!
//! # Locking
//! Producers take no lock. The ring is Vyukov's: each slot has a sequence number that says whose turn it is. The one
//! consumer holds a mutex that only the writer and [`Trace::stop`] take. A producer may be stopped for long in the
//! middle of a push (the page that it runs on may be on its way); the consumer then stops at that slot and looks again
//! later. That is why this is not crossbeam's `ArrayQueue`, whose consumer spins in that case.
//!
//! # Limits
//! Begin times are nanoseconds since the trace was made. A trace is started once; after [`Trace::stop`] it stays off.
//! After `fork` the child has no writer: its events fill the ring and then count as dropped, and stopping its copy of the
//! trace only turns it off.

use super::stats::{Cause, Counter, Direction, Stats};
use crate::ground::error::{Errno, Error, Result};
use crate::ground::inject::{self, Call};
use crate::ground::thread;
use crossbeam_utils::CachePadded;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often the writer looks into the ring.
const PERIOD: Duration = Duration::from_millis(5);
/// Words of an event in the ring.
const WORDS: usize = 5;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EventKind {
    /// A CPU access waited for usvm. `bytes` came back.
    CpuFault,
    /// A device access found no mapping. `bytes` became accessible.
    GpuFault,
    /// A range went to the device; `bytes` were copied.
    ToDevice,
    /// A range came back to the host; `bytes` were copied.
    ToHost,
    /// A range of `bytes` left device memory to make room.
    Evict,
    /// The host mapping of `bytes` changed.
    Invalidate,
    /// The device ran work.
    Launch,
}

impl EventKind {
    /// All of them, in order.
    pub const ALL: [Self; 7] = [
        Self::CpuFault,
        Self::GpuFault,
        Self::ToDevice,
        Self::ToHost,
        Self::Evict,
        Self::Invalidate,
        Self::Launch,
    ];

    /// The name in the trace.
    pub fn name(self) -> &'static str {
        match self {
            Self::CpuFault => "cpu fault",
            Self::GpuFault => "gpu fault",
            Self::ToDevice => "to device",
            Self::ToHost => "to host",
            Self::Evict => "evict",
            Self::Invalidate => "invalidate",
            Self::Launch => "launch",
        }
    }

    /// Whether it is shown with the device rather than with the host's threads.
    fn on_device(self) -> bool {
        matches!(self, Self::GpuFault | Self::Launch)
    }
}

impl From<Direction> for EventKind {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::ToDevice => Self::ToDevice,
            Direction::ToHost => Self::ToHost,
        }
    }
}

/// One event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// What.
    pub kind: EventKind,
    /// Why, where there is a reason.
    pub cause: Option<Cause>,
    /// Which device, by index.
    pub device: u16,
    /// The kernel's id of the thread that did it.
    pub thread: u32,
    /// When it began, in nanoseconds since the trace was made.
    pub begin_ns: u64,
    /// How long it took.
    pub duration_ns: u64,
    /// Where.
    pub address: u64,
    /// How much.
    pub bytes: u64,
}

impl Event {
    fn pack(self) -> [u64; WORDS] {
        let cause = self.cause.map_or(0xff, |c| c as u64);
        let head =
            u64::from(self.thread) << 32 | u64::from(self.device) << 16 | cause << 8 | self.kind as u64;
        [head, self.begin_ns, self.duration_ns, self.address, self.bytes]
    }

    fn unpack([head, begin_ns, duration_ns, address, bytes]: [u64; WORDS]) -> Self {
        Self {
            kind: EventKind::ALL[head as usize & 0xff],
            cause: Cause::ALL.get((head >> 8) as usize & 0xff).copied(),
            device: (head >> 16) as u16,
            thread: (head >> 32) as u32,
            begin_ns,
            duration_ns,
            address,
            bytes,
        }
    }
}

/// A place in the ring. `turn` is its index when a producer of this lap may fill it, one more when it is full.
#[derive(Debug)]
struct Slot {
    turn: AtomicUsize,
    words: [AtomicU64; WORDS],
}

/// The bounded ring: many producers, one consumer.
#[derive(Debug)]
struct Ring {
    slots: Box<[CachePadded<Slot>]>,
    tail: CachePadded<AtomicUsize>,
    /// The consumer's place.
    head: Mutex<usize>,
}

impl Ring {
    fn new(capacity: usize) -> Self {
        let slot =
            |index| CachePadded::new(Slot { turn: AtomicUsize::new(index), words: Default::default() });
        let slots = (0..capacity.max(2).next_power_of_two()).map(slot).collect();
        Self { slots, tail: Default::default(), head: Mutex::new(0) }
    }

    fn slot(&self, place: usize) -> &Slot {
        &self.slots[place & (self.slots.len() - 1)]
    }

    /// Puts an event in; `false` when the ring is full.
    fn push(&self, event: Event) -> bool {
        let mut place = self.tail.load(Relaxed);
        let slot = loop {
            let slot = self.slot(place);
            match slot.turn.load(Acquire).wrapping_sub(place).cast_signed() {
                0 => match self.tail.compare_exchange_weak(place, place.wrapping_add(1), Relaxed, Relaxed) {
                    Ok(_) => break slot,
                    Err(now) => place = now,
                },
                ..0 => return false,
                _ => place = self.tail.load(Relaxed),
            }
        };
        for (word, value) in slot.words.iter().zip(event.pack()) {
            word.store(value, Relaxed);
        }
        slot.turn.store(place.wrapping_add(1), Release);
        true
    }

    /// Takes out everything that is complete, in order, up to the first slot whose producer has not finished.
    fn drain(&self, mut take: impl FnMut(Event)) {
        let mut head = self.head.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        loop {
            let slot = self.slot(*head);
            if slot.turn.load(Acquire) != head.wrapping_add(1) {
                return;
            }
            let event = Event::unpack(std::array::from_fn(|i| slot.words[i].load(Relaxed)));
            slot.turn.store(head.wrapping_add(self.slots.len()), Release);
            *head = head.wrapping_add(1);
            take(event);
        }
    }
}

/// What the writer thread and its owner share.
#[derive(Debug)]
struct Writing {
    ring: Ring,
    /// Of this trace; the statistic of the same name may be reset meanwhile.
    dropped: AtomicU64,
    stop: AtomicBool,
    result: Mutex<Option<io::Error>>,
}

impl Writing {
    fn new(capacity: usize) -> Self {
        Self {
            ring: Ring::new(capacity),
            dropped: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            result: Mutex::default(),
        }
    }
}

/// The trace of one runtime: off until [`Trace::start`].
#[derive(Debug)]
pub struct Trace {
    on: AtomicBool,
    origin: Instant,
    stats: Arc<Stats>,
    writing: OnceLock<Arc<Writing>>,
    writer: Mutex<Option<Writer>>,
}

/// The writer thread, and the process that has it.
#[derive(Debug)]
struct Writer {
    handle: JoinHandle<()>,
    process: u32,
}

/// The begin of an event that is being measured; nothing when the trace is off.
#[derive(Debug, Clone, Copy)]
#[must_use = "an event is recorded when its end is"]
pub struct Begin(Option<Instant>);

/// What [`Trace::end`] is told besides times and thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct What {
    /// What happened.
    pub kind: EventKind,
    /// Why.
    pub cause: Option<Cause>,
    /// Which device.
    pub device: u16,
    /// Where.
    pub address: u64,
    /// How much.
    pub bytes: u64,
}

impl Trace {
    /// A trace that is off. What it drops is counted in `stats`.
    pub fn new(stats: Arc<Stats>) -> Self {
        Self {
            on: AtomicBool::new(false),
            origin: Instant::now(),
            stats,
            writing: OnceLock::new(),
            writer: Mutex::new(None),
        }
    }

    /// Begins to record into a ring of `capacity` events (rounded up to a power of two) and to write them to `path`.
    /// `devices` are the names of the devices by index. Errors: the file cannot be made, the trace was started before.
    pub fn start(&self, path: &Path, capacity: usize, devices: &[String]) -> Result<()> {
        let opened = inject::check(Call::Open).map_err(|e| io::Error::from_raw_os_error(e.0));
        let file = opened.and_then(|()| File::create(path)).map_err(|e| Error::Invalid {
            argument: "USVM_TRACE",
            reason: format!("cannot create {}: {e}", path.display()),
        })?;
        let mut started = false;
        let writing = self.writing.get_or_init(|| {
            started = true;
            Arc::new(Writing::new(capacity))
        });
        if !started {
            return Err(Error::NotSupported("a trace is started once".into()));
        }
        let (writing, names) = (Arc::clone(writing), devices.to_vec());
        let handle = thread::spawn("trace", move || write_until_stopped(&writing, file, &names))
            .map_err(|e| Error::os("clone", Errno(e.raw_os_error().unwrap_or(libc::EAGAIN))))?;
        *self.writer.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) =
            Some(Writer { handle, process: std::process::id() });
        self.on.store(true, Release);
        Ok(())
    }

    /// Whether events are recorded.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.on.load(Relaxed)
    }

    /// The begin of an event.
    #[inline]
    pub fn begin(&self) -> Begin {
        Begin(self.is_on().then(Instant::now))
    }

    /// The end of an event that this thread began.
    #[inline]
    pub fn end(&self, begin: Begin, what: What) {
        if let Begin(Some(at)) = begin {
            self.measured(at, what);
        }
    }

    /// An event that began at `at`.
    #[inline]
    pub fn since(&self, at: Instant, what: What) {
        if self.is_on() {
            self.measured(at, what);
        }
    }

    #[cold]
    fn measured(&self, at: Instant, what: What) {
        self.record(Event {
            kind: what.kind,
            cause: what.cause,
            device: what.device,
            thread: rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned(),
            begin_ns: nanos(at.saturating_duration_since(self.origin)),
            duration_ns: nanos(at.elapsed()),
            address: what.address,
            bytes: what.bytes,
        });
    }

    /// Records a finished event; counts it as dropped when the ring is full. Does nothing when the trace is off.
    pub fn record(&self, event: Event) {
        if !self.is_on() {
            return;
        }
        // Relaxed is enough for `on`: `writing` synchronises by itself.
        let Some(writing) = self.writing.get() else { return };
        if !writing.ring.push(event) {
            writing.dropped.fetch_add(1, Relaxed);
            self.stats.add(Counter::DroppedEvents, 1);
        }
    }

    /// Stops recording, writes what is in the ring, completes the file and tells whether all of it could be written.
    /// Events that other threads record at the same time may miss the file; those before it do not. Idempotent.
    pub fn stop(&self) -> Result<()> {
        self.on.store(false, Release);
        let writer = self.writer.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        let (Some(Writer { handle, process }), Some(writing)) = (writer, self.writing.get()) else {
            return Ok(());
        };
        if process != std::process::id() {
            // A forked child: the thread is not here, and joining it would wait for ever.
            std::mem::forget(handle);
            return Ok(());
        }
        writing.stop.store(true, Release);
        handle.thread().unpark();
        handle.join().map_err(|_| Error::NotRunning("the trace writer died"))?;
        match writing.result.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take() {
            Some(e) => Err(Error::os("write", Errno(e.raw_os_error().unwrap_or(libc::EIO)))),
            None => Ok(()),
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        if let Err(e) = self.stop() {
            tracing::warn!("the trace is incomplete: {e}");
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The file, as failures are injected.
struct Asked(File);

impl Write for Asked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        inject::check(Call::Write).map_err(|e| io::Error::from_raw_os_error(e.0))?;
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// The writer thread.
fn write_until_stopped(writing: &Writing, file: File, devices: &[String]) {
    let mut out = ChromeWriter::new(BufWriter::with_capacity(1 << 16, Asked(file)), devices);
    loop {
        // Read before draining: what was pushed before the stop is then still drained.
        let last = writing.stop.load(Acquire);
        writing.ring.drain(|event| out.event(&event));
        out.flush();
        if last {
            break;
        }
        std::thread::park_timeout(PERIOD);
    }
    let result = out.finish(writing.dropped.load(Relaxed)).err();
    *writing.result.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = result;
}

/// Streams events as Chrome trace_event JSON. After the first failed write it writes no more and keeps the error.
struct ChromeWriter<W: Write> {
    out: W,
    pid: u32,
    first: bool,
    failed: Option<io::Error>,
    devices: Vec<String>,
    named: BTreeSet<(u32, u32)>,
}

impl<W: Write> ChromeWriter<W> {
    fn new(out: W, devices: &[String]) -> Self {
        Self {
            out,
            pid: std::process::id(),
            first: true,
            failed: None,
            devices: devices.to_vec(),
            named: BTreeSet::new(),
        }
    }

    /// The process that stands for a device: past every real process id.
    fn device_pid(device: u16) -> u32 {
        (1 << 30) + u32::from(device)
    }

    fn event(&mut self, event: &Event) {
        let pid = if event.kind.on_device() { Self::device_pid(event.device) } else { self.pid };
        self.name_track(pid, event.device, event.thread);
        let mut args = json!({
            "address": format!("{:#x}", event.address),
            "bytes": event.bytes,
            "device": event.device,
        });
        if let Some(cause) = event.cause {
            args["cause"] = cause.name().into();
        }
        self.line(&json!({
            "ph": "X",
            "cat": "usvm",
            "name": event.kind.name(),
            "pid": pid,
            "tid": event.thread,
            "ts": micros(event.begin_ns),
            "dur": micros(event.duration_ns),
            "args": args,
        }));
    }

    /// Gives process and thread their names when they are first seen.
    fn name_track(&mut self, pid: u32, device: u16, thread: u32) {
        if !self.named.insert((pid, thread)) {
            return;
        }
        if self.named.range((pid, 0)..=(pid, u32::MAX)).count() == 1 {
            let name = if pid == self.pid { "host".into() } else { self.device_name(device) };
            self.metadata("process_name", pid, 0, &name);
        }
        let name = std::fs::read_to_string(format!("/proc/self/task/{thread}/comm"));
        let name = name.map_or_else(|_| format!("thread {thread}"), |n| n.trim_end().to_owned());
        self.metadata("thread_name", pid, thread, &name);
    }

    fn device_name(&self, device: u16) -> String {
        let name = self.devices.get(usize::from(device)).map_or("", String::as_str);
        format!("device {device} {name}").trim_end().to_owned()
    }

    fn metadata(&mut self, what: &str, pid: u32, tid: u32, name: &str) {
        self.line(&json!({ "ph": "M", "name": what, "pid": pid, "tid": tid, "args": { "name": name } }));
    }

    fn line(&mut self, value: &Value) {
        let separator = if std::mem::replace(&mut self.first, false) { "[\n" } else { ",\n" };
        self.attempt(|out| {
            out.write_all(separator.as_bytes())?;
            Ok(serde_json::to_writer(out, value)?)
        });
    }

    fn flush(&mut self) {
        self.attempt(|out| out.flush());
    }

    fn attempt(&mut self, write: impl FnOnce(&mut W) -> io::Result<()>) {
        if self.failed.is_none() {
            self.failed = write(&mut self.out).err();
        }
    }

    /// Completes the array, the number of dropped events last.
    fn finish(mut self, dropped: u64) -> io::Result<()> {
        let pid = self.pid;
        self.line(&json!({ "ph": "M", "name": "dropped_events", "pid": pid, "tid": 0, "args": { "count": dropped } }));
        self.attempt(|out| {
            out.write_all(b"\n]\n")?;
            out.flush()
        });
        self.failed.map_or(Ok(()), Err)
    }
}

/// Microseconds, the format's unit, with the nanoseconds behind the point.
fn micros(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    fn event(thread: u32, at: u64) -> Event {
        Event {
            kind: EventKind::ALL[at as usize % EventKind::ALL.len()],
            cause: Cause::ALL.get(at as usize % 7).copied(),
            device: at as u16 % 3,
            thread,
            begin_ns: at,
            duration_ns: 1500,
            address: at << 12,
            bytes: at * 3,
        }
    }

    fn temporary(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("usvm-trace-{}-{name}.json", std::process::id()))
    }

    fn read(path: &Path) -> Vec<Value> {
        let text = std::fs::read_to_string(path).unwrap();
        std::fs::remove_file(path).unwrap();
        serde_json::from_str::<Vec<Value>>(&text).unwrap()
    }

    #[test]
    fn events_survive_packing() {
        for at in 0..50 {
            let e = event(0xffff_fffe, at);
            assert_eq!(Event::unpack(e.pack()), e);
        }
    }

    #[test]
    fn overflow_drops_exactly_the_rest() {
        let ring = Ring::new(8);
        let kept = (0..29).filter(|&at| ring.push(event(1, at))).count();
        assert_eq!(kept, 8);
        let mut got = Vec::new();
        ring.drain(|e| got.push(e.begin_ns));
        assert_eq!(got, (0..8).collect::<Vec<_>>(), "the oldest are kept, in order");
        assert!(ring.push(event(1, 99)), "there is room again");
        ring.drain(|e| assert_eq!(e.begin_ns, 99));
    }

    #[test]
    fn dropped_events_are_counted_exactly() {
        let stats = Arc::new(Stats::default());
        let trace = Trace::new(Arc::clone(&stats));
        // No writer: only the ring, so that nothing drains it.
        trace.writing.set(Arc::new(Writing::new(64))).unwrap();
        trace.record(event(1, 1));
        assert_eq!(stats.get(Counter::DroppedEvents), 0, "off: neither kept nor dropped");
        trace.on.store(true, Release);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let trace = &trace;
                scope.spawn(move || (0..1000).for_each(|at| trace.record(event(thread, at))));
            }
        });
        assert_eq!(stats.get(Counter::DroppedEvents), 4000 - 64);
        let mut kept = 0;
        trace.writing.get().unwrap().ring.drain(|_| kept += 1);
        assert_eq!(kept, 64);
    }

    #[test]
    fn many_producers_one_consumer() {
        const EACH: u64 = 20_000;
        let ring = Ring::new(256);
        let done = AtomicUsize::new(0);
        let mut seen: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let (ring, done) = (&ring, &done);
                scope.spawn(move || {
                    for at in 0..EACH {
                        while !ring.push(event(thread, at)) {
                            std::thread::yield_now();
                        }
                    }
                    done.fetch_add(1, Release);
                });
            }
            loop {
                let last = done.load(Acquire) == 3;
                ring.drain(|e| {
                    assert_eq!(e, event(e.thread, e.begin_ns), "torn");
                    seen.entry(e.thread).or_default().push(e.begin_ns);
                });
                if last {
                    break;
                }
            }
        });
        assert_eq!(seen.len(), 3);
        for order in seen.values() {
            assert!(order.iter().copied().eq(0..EACH), "each producer's events, once and in order");
        }
    }

    #[test]
    fn the_file_is_json_and_complete() {
        let path = temporary("complete");
        let stats = Arc::new(Stats::default());
        let trace = Trace::new(Arc::clone(&stats));
        trace.start(&path, 1 << 12, &["sim:arc-a770".into()]).unwrap();
        for at in 0..1000 {
            trace.record(event(7, at));
        }
        let begin = trace.begin();
        std::thread::sleep(Duration::from_millis(2));
        let what = What { kind: EventKind::Launch, cause: None, device: 0, address: 0x1000, bytes: 1 };
        trace.end(begin, what);
        trace.stop().unwrap();
        trace.stop().unwrap();
        trace.record(event(7, 1));

        let events = read(&path);
        let spans: Vec<_> = events.iter().filter(|e| e["ph"] == "X").collect();
        assert_eq!(spans.len(), 1001);
        for (at, span) in spans[..1000].iter().enumerate() {
            let e = event(7, at as u64);
            assert_eq!(span["name"], e.kind.name());
            assert_eq!(span["ts"], at as f64 / 1000.0);
            assert_eq!(span["dur"], 1.5);
            assert_eq!(span["args"]["bytes"], e.bytes);
            assert_eq!(span["args"]["address"], format!("{:#x}", e.address));
            assert_eq!(span["args"].get("cause").and_then(Value::as_str), e.cause.map(Cause::name));
        }
        assert!(spans[1000]["dur"].as_f64().unwrap() >= 2000.0);
        let names = |what: &str| -> Vec<_> {
            let named = events.iter().filter(|e| e["ph"] == "M" && e["name"] == what);
            named.map(|e| e["args"]["name"].as_str().unwrap().to_owned()).collect()
        };
        let mut processes = names("process_name");
        processes.sort();
        assert_eq!(processes, ["device 0 sim:arc-a770", "device 1", "device 2", "host"]);
        let tracks: BTreeSet<_> = spans.iter().map(|s| (s["pid"].as_u64(), s["tid"].as_u64())).collect();
        assert_eq!(names("thread_name").len(), tracks.len(), "every track has one name");
        let last = events.last().unwrap();
        assert_eq!((&last["name"], &last["args"]["count"]), (&json!("dropped_events"), &json!(0)));
    }

    #[test]
    fn overflow_reaches_the_file() {
        let path = temporary("overflow");
        let stats = Arc::new(Stats::default());
        let trace = Trace::new(Arc::clone(&stats));
        trace.start(&path, 4, &[]).unwrap();
        (0..50_000).for_each(|at| trace.record(event(1, at)));
        trace.stop().unwrap();
        let events = read(&path);
        let kept = events.iter().filter(|e| e["ph"] == "X").count() as u64;
        let dropped = events.last().unwrap()["args"]["count"].as_u64().unwrap();
        assert_eq!(kept + dropped, 50_000);
        assert_eq!(dropped, stats.get(Counter::DroppedEvents));
        assert!(dropped > 0, "four slots cannot hold fifty thousand");
    }

    #[test]
    #[allow(unsafe_code)]
    fn a_forked_child_stops_at_once() {
        let trace = Trace::new(Arc::default());
        trace.start(Path::new("/dev/null"), 16, &[]).unwrap();
        // SAFETY: the child only stops its copy of the trace and leaves by _exit; the alarm ends it if it hangs.
        let child = unsafe {
            let pid = libc::fork();
            if pid == 0 {
                libc::alarm(10);
                let stopped = trace.stop().is_ok() && !trace.is_on();
                libc::_exit(if stopped { 0 } else { 1 });
            }
            pid
        };
        let mut status = -1;
        // SAFETY: waits for the child just made; the status is a live integer.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0, "the child hung or crashed");
        assert!(trace.is_on(), "the parent's goes on");
        trace.stop().unwrap();
    }

    #[test]
    fn what_cannot_be_written_is_reported() {
        let trace = Trace::new(Arc::default());
        let nowhere = trace.start(Path::new("/nonexistent/trace.json"), 16, &[]).unwrap_err();
        assert!(nowhere.to_string().contains("USVM_TRACE"), "{nowhere}");
        trace.start(Path::new("/dev/full"), 16, &[]).unwrap();
        trace.record(event(1, 1));
        assert_eq!(trace.stop().unwrap_err().errno(), libc::ENOSPC);
        assert!(trace.start(Path::new("/dev/null"), 16, &[]).is_err(), "once only");
    }
}
