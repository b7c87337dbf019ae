//! Notifiers: callbacks for changes of memory.
//!
//! # Overview
//! Two ways lead to a callback.
//!
//! ```text
//! munmap … called by the program --> interpose --> tell, then the system call       on the calling thread
//! the kernel's events, migrations --> Watch --> Hub's queue --> tell                on the hub's thread
//! ```
//!
//! The first is what makes a callback run before the unmapping call returns: the kernel's event cannot, because reading it
//! is what lets the call return. The second is for what the first does not see, and for migrations. A change that goes
//! both ways is told once: it stands in the list of told changes from before the system call until its events went
//! through the hub.
//!
//! A notifier hears of events that were queued after it was registered (`Notifier::born`): an event that is late is of
//! a mapping that was there before.
//!
//! # Locking
//! The tables' lock for choosing whom to tell, and none while a callback runs. The hub's queue is lock-free: usvm's
//! service threads, which fill it, wait for nobody. The hub's thread is an ordinary thread: it may wait for memory that
//! is on a device, and callbacks may do anything.
//!
//! # Limits
//! A callback that waits for a lock whose holder waits in a call that waits for callbacks (see the header) waits for ever.
//!
//! # Safety
//! A callback is a function that the caller promised to be callable, with the pointer that it gave along. It is not
//! called after it was unregistered: whoever is about to call counts itself in first, under the lock that unregistering
//! takes.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use crossbeam_queue::SegQueue;
use usvm::ground::addr::Span;
use usvm::ground::alloc;
use usvm::ground::sync::Event;
use usvm::{Change, Runtime};

use super::handles::{self, Id, Tables};
use super::memory::range;
use super::result::{self, Done, Failure, USVM_ERROR_SYSTEM, call, invalid, usvm_result_t};
use super::types::*;
use super::user;
use super::watched::Watched;

/// Why a callback is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    Unmap,
    Remap,
    Discard,
    Protect,
    Migrate,
}

impl Reason {
    fn number(self) -> usvm_notify_reason_t {
        match self {
            Reason::Unmap => USVM_NOTIFY_UNMAP,
            Reason::Remap => USVM_NOTIFY_REMAP,
            Reason::Discard => USVM_NOTIFY_DISCARD,
            Reason::Protect => USVM_NOTIFY_PROTECT,
            Reason::Migrate => USVM_NOTIFY_MIGRATE,
        }
    }
}

impl From<Change> for Reason {
    fn from(change: Change) -> Self {
        match change {
            Change::Unmapped => Reason::Unmap,
            Change::Moved => Reason::Remap,
            Change::Dropped => Reason::Discard,
            Change::Migrated => Reason::Migrate,
        }
    }
}

/// One registered callback.
pub(crate) struct Notifier {
    pub(crate) space: Id,
    span: Span,
    callback: unsafe extern "C" fn(*mut c_void, *mut c_void, usize, usvm_notify_reason_t),
    user: *mut c_void,
    /// Number of the first event that it hears of.
    born: u64,
    /// Calls that are under way or about to be.
    running: AtomicU32,
    ended: AtomicBool,
}

// SAFETY: `user` is only handed to the callback, which the caller promised to be callable from any thread.
unsafe impl Send for Notifier {}
// SAFETY: as above.
unsafe impl Sync for Notifier {}

/// Notifiers that are registered.
static ACTIVE: AtomicUsize = AtomicUsize::new(0);
/// Their ranges.
static WATCHED: Watched = Watched::new();
/// The process that registered them.
static OWNER: AtomicU32 = AtomicU32::new(0);

/// A callback that is running on this thread, and the one around it.
struct Frame {
    notifier: *const Notifier,
    outer: *const Frame,
}

thread_local! {
    static RUNNING: Cell<*const Frame> = const { Cell::new(std::ptr::null()) };
}

fn in_callback() -> bool {
    !RUNNING.get().is_null()
}

fn runs_here(notifier: &Arc<Notifier>) -> bool {
    let mut frame = RUNNING.get();
    while !frame.is_null() {
        // SAFETY: frames lie on this thread's own stack, further up, until their callbacks return.
        let here = unsafe { &*frame };
        if here.notifier == Arc::as_ptr(notifier) {
            return true;
        }
        frame = here.outer;
    }
    false
}

/// Whether there is anybody to tell.
#[inline]
pub(crate) fn anybody() -> bool {
    ACTIVE.load(Ordering::Acquire) > 0
}

/// Whether the notifiers are this process's: a child that runs no fork handlers finds its parent's.
pub(crate) fn is_owner() -> bool {
    OWNER.load(Ordering::Relaxed) == std::process::id()
}

/// In a forked child: nobody.
pub(super) fn forget() {
    ACTIVE.store(0, Ordering::Release);
    WATCHED.set(std::iter::empty());
}

/// After notifiers came or went.
fn count(tables: &Tables) {
    WATCHED.set(tables.notifiers.iter().map(|(_, notifier)| notifier.span));
    OWNER.store(std::process::id(), Ordering::Relaxed);
    ACTIVE.store(tables.notifiers.iter().count(), Ordering::Release);
}

impl Notifier {
    /// Calls back, unless it has ended. Whoever calls this has counted itself in.
    fn run(&self, reason: Reason, span: Span) {
        if let Some(part) = self.span.intersect(span)
            && !self.ended.load(Ordering::SeqCst)
        {
            let frame = Frame { notifier: self, outer: RUNNING.get() };
            RUNNING.set(&frame);
            let (at, len) = (std::ptr::without_provenance_mut(part.start as usize), part.len() as usize);
            // SAFETY: registered and not ended; see the module.
            result::outside(|| unsafe { (self.callback)(self.user, at, len, reason.number()) });
            RUNNING.set(frame.outer);
        }
        if self.running.fetch_sub(1, Ordering::SeqCst) == 1 && self.ended.load(Ordering::SeqCst) {
            futex_wake(&self.running);
        }
    }

    /// Makes it not be called any more, and waits for calls that run elsewhere, unless this is inside a callback.
    fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        while !in_callback() {
            let running = self.running.load(Ordering::SeqCst);
            if running == 0 {
                return;
            }
            futex_wait(&self.running, running);
        }
    }
}

fn futex_wait(word: &AtomicU32, while_it_is: u32) {
    let flags = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: a live word; coming back early is no harm, the caller looks again.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), flags, while_it_is, std::ptr::null::<libc::timespec>())
    };
}

fn futex_wake(word: &AtomicU32) {
    let flags = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: a live word.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), flags, i32::MAX) };
}

/// Calls all callbacks that `span` concerns and that were there when the change got its number.
fn tell(reason: Reason, span: Span, number: u64) {
    let concerned: Vec<Arc<Notifier>> = {
        let tables = handles::lock();
        let all = tables.notifiers.iter().map(|(_, notifier)| notifier);
        all.filter(|n| n.span.overlaps(span) && n.born <= number && !runs_here(n))
            .inspect(|n| {
                n.running.fetch_add(1, Ordering::SeqCst);
            })
            .cloned()
            .collect()
    };
    for notifier in concerned {
        notifier.run(reason, span);
    }
}

/// A change that was told before it was made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Told {
    number: u64,
    span: Span,
}

/// Tells of `changes`, makes them by `real`, and returns when usvm has taken note of them. Where no notifier is concerned
/// it takes no lock and waits for nothing.
pub(crate) fn telling<T>(changes: &[(Reason, Span)], real: impl FnOnce() -> T) -> T {
    if !anybody() || !changes.iter().any(|(_, span)| WATCHED.concerns(span.page_aligned())) {
        return real();
    }
    let errno = result::errno();
    for (reason, span) in changes {
        tell(*reason, span.page_aligned(), u64::MAX);
    }
    static NUMBERS: AtomicU64 = AtomicU64::new(0);
    let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
    let told = changes.iter().map(|(_, span)| Told { number, span: span.page_aligned() });
    handles::lock().told.extend(told);
    // What callbacks left in errno is not the call's.
    result::set_errno(errno);
    let result = real();
    let errno = result::errno();
    if let Ok(runtime) = handles::runtime() {
        // Its events are in the hub's queue then. A runtime that ends meanwhile tells nothing any more.
        let _ = runtime.barrier();
    }
    let hub = handles::lock().hub.clone();
    match hub {
        Some(hub) => hub.put(Item::Forget(number)),
        None => forget_told(number),
    }
    catch_up();
    result::set_errno(errno);
    result
}

/// Has notifiers told of a change that was made past [`telling`], on the hub's thread, and returns when they were. Where no
/// notifier is concerned it takes no lock and waits for nothing.
pub(crate) fn changed(change: Change, span: Span) {
    let span = span.page_aligned();
    if !anybody() || alloc::is_internal() || !is_owner() || !WATCHED.concerns(span) {
        return;
    }
    let errno = result::errno();
    alloc::internal(|| {
        if let Ok(runtime) = handles::runtime() {
            // What the kernel reported of it is told, too, and not later than this.
            let _ = runtime.barrier();
        }
        let hub = handles::lock().hub.clone();
        if let Some(hub) = hub {
            hub.hear(change, span);
        }
        catch_up();
    });
    result::set_errno(errno);
}

fn forget_told(number: u64) {
    handles::lock().told.retain(|told| told.number != number);
}

enum Item {
    Change(u64, Change, Span),
    /// The events of what was told under that number are all before.
    Forget(u64),
    /// Whoever waits until all before it was told.
    Flush(Event),
}

/// The queue from usvm's service threads to callbacks, and the thread that empties it. It lives as long as the runtime
/// whose changes it hears of.
pub(crate) struct Hub {
    runtime: usize,
    queue: SegQueue<Item>,
    arrivals: AtomicU32,
    numbers: AtomicU64,
    stopped: AtomicBool,
}

/// Held by the runtime; the hub ends with it.
struct Ear(Arc<Hub>);

impl Drop for Ear {
    fn drop(&mut self) {
        self.0.stopped.store(true, Ordering::SeqCst);
        self.0.arrive();
    }
}

impl Hub {
    /// The hub of `runtime`, which is made if it is the first.
    fn of(runtime: &Runtime) -> Done<Arc<Hub>> {
        let identity = Arc::as_ptr(runtime.svm()).addr();
        let known = |tables: &Tables| {
            tables.hub.clone().filter(|h| h.runtime == identity && !h.stopped.load(Ordering::SeqCst))
        };
        if let Some(hub) = known(&handles::lock()) {
            return Ok(hub);
        }
        let hub = Arc::new(Hub {
            runtime: identity,
            queue: SegQueue::new(),
            arrivals: AtomicU32::new(0),
            numbers: AtomicU64::new(1),
            stopped: AtomicBool::new(false),
        });
        let ear = Ear(hub.clone());
        if !runtime.watch(move |change, span| ear.0.hear(change, span)) {
            // Another thread makes it, and is about to publish it.
            while handles::lock().hub.as_ref().is_none_or(|h| h.runtime != identity) {
                std::thread::yield_now();
            }
            let hub = known(&handles::lock());
            return hub.ok_or_else(|| Failure::new(USVM_ERROR_SYSTEM, "there is no thread for callbacks"));
        }
        let started = start_thread(Arc::downgrade(&hub));
        hub.stopped.fetch_or(started.is_err(), Ordering::SeqCst);
        handles::lock().hub = Some(hub.clone());
        started.map(|()| hub)
    }

    fn arrive(&self) {
        self.arrivals.fetch_add(1, Ordering::SeqCst);
        futex_wake(&self.arrivals);
    }

    fn put(&self, item: Item) {
        self.queue.push(item);
        self.arrive();
        if self.stopped.load(Ordering::SeqCst) {
            self.drop_the_rest();
        }
    }

    /// On a service thread: only takes note.
    fn hear(&self, change: Change, span: Span) {
        if !anybody() || !WATCHED.hull(span) {
            return;
        }
        let number = self.numbers.fetch_add(1, Ordering::SeqCst);
        self.queue.push(Item::Change(number, change, span));
        self.arrive();
    }

    /// Returns when all that was heard before was told.
    fn flush(&self) {
        let event = Event::new();
        let told = event.fence();
        self.put(Item::Flush(event));
        // The only outcome is success.
        let _ = told.wait(None);
    }

    fn drop_the_rest(&self) {
        while let Some(item) = self.queue.pop() {
            match item {
                Item::Change(..) => {}
                other => self.serve(other),
            }
        }
    }

    fn serve(&self, item: Item) {
        match item {
            Item::Flush(event) => {
                event.signal(Ok(()));
            }
            Item::Forget(number) => forget_told(number),
            Item::Change(number, change, span) => {
                let told = change != Change::Migrated
                    && handles::lock().told.iter().any(|told| told.span.covers(span));
                if !told {
                    tell(change.into(), span, number);
                }
            }
        }
    }
}

/// The hub's thread. It is no service thread of usvm's: callbacks are the program's.
fn start_thread(hub: Weak<Hub>) -> Done {
    let body = move || {
        while let Some(hub) = hub.upgrade() {
            let seen = hub.arrivals.load(Ordering::SeqCst);
            match hub.queue.pop() {
                Some(item) => alloc::internal(|| hub.serve(item)),
                None if hub.stopped.load(Ordering::SeqCst) => return hub.drop_the_rest(),
                None => futex_wait(&hub.arrivals, seen),
            }
        }
    };
    // The program's signal handlers run on its own threads.
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: two live sets; the first is filled before it is read, the second by the call.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    let spawned = std::thread::Builder::new().name("usvm-notify".into()).spawn(body);
    // SAFETY: filled by the call above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    match spawned {
        Ok(_) => Ok(()),
        Err(e) => Err(Failure::new(USVM_ERROR_SYSTEM, format_args!("no thread for callbacks: {e}"))),
    }
}

/// Returns when everything that happened before was told. Inside a callback it does not wait.
pub(crate) fn catch_up() {
    if !anybody() || in_callback() {
        return;
    }
    let hub = handles::lock().hub.clone();
    if let Some(hub) = hub {
        hub.flush();
    }
}

/// Ends notifiers that were taken out of the tables.
pub(super) fn end_all(notifiers: Vec<Arc<Notifier>>) {
    if !notifiers.is_empty() {
        count(&handles::lock());
    }
    for notifier in notifiers {
        notifier.end();
    }
}

/// See the header.
///
/// # Safety
/// `callback` may be called with `user` from any thread until it is unregistered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_notifier_register(
    space: usvm_space_t,
    ptr: *const c_void,
    len: usize,
    callback: usvm_notifier_callback_t,
    user: *mut c_void,
    notifier: *mut usvm_notifier_t,
) -> usvm_result_t {
    call(|| {
        let (_, runtime) = handles::space(space)?;
        let (addr, len) = range(&runtime, ("ptr", "len"), ptr, len)?;
        let callback = callback.ok_or_else(|| invalid("callback", "is NULL"))?;
        user::check_writable("notifier", notifier)?;
        runtime.check_mapped(addr, len, None).map_err(|e| Failure::from(e).of("ptr"))?;
        let hub = Hub::of(&runtime)?;
        // What the kernel reported before is of mappings that were there before.
        runtime.barrier()?;
        let entry = Arc::new(Notifier {
            space: space.0.addr() as Id,
            span: Span::sized(addr, len).page_aligned(),
            callback,
            user,
            born: hub.numbers.load(Ordering::SeqCst),
            running: AtomicU32::new(0),
            ended: AtomicBool::new(false),
        });
        let mut tables = handles::lock();
        tables.space(space)?;
        let id = tables.notifiers.add(entry);
        count(&tables);
        drop(tables);
        user::write("notifier", notifier, usvm_notifier_t(handles::shape(id)))
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_notifier_unregister(notifier: usvm_notifier_t) -> usvm_result_t {
    call(|| {
        let mut tables = handles::lock();
        let found = tables.notifier(notifier)?;
        tables.notifiers.remove(notifier.0.addr() as Id);
        drop(tables);
        end_all(vec![found]);
        Ok(())
    })
}
