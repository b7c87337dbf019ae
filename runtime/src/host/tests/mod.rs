#![allow(unsafe_code)]
//! The host floor on the real userfaultfd of this process. The tests play the service loop.
//!
//! # Safety
//! Tests reach their own mappings by address, with volatile accesses, and make no references into them.

mod fallbacks;
mod flips;
#[cfg(feature = "fault-injection")]
mod injection;
mod mappings;
mod stress;
mod tracking;

use super::features::{Features, Options};
use super::message::Message;
use super::{Host, sys};
use crate::ground::addr::{PageMask, SZ_2M, SZ_4K, Span, align_up};
use crate::space::ports::{FlipError, FlipStop, HostMemory, Shadow};
use rustix::mm::Advice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Tests that fork exclude the others: a child holds on to everybody's pages.
static FORKS: RwLock<()> = RwLock::new(());

/// Says why a test does not run here: past the test harness, which hides what a test that passes prints with println.
fn skipped(reason: impl std::fmt::Display) {
    use std::io::Write as _;
    writeln!(std::io::stderr(), "skipped: {reason}").expect("stderr can be written to");
}

fn together() -> RwLockReadGuard<'static, ()> {
    FORKS.read().unwrap_or_else(PoisonError::into_inner)
}

fn alone() -> RwLockWriteGuard<'static, ()> {
    FORKS.write().unwrap_or_else(PoisonError::into_inner)
}

/// Options of most tests: no fork events, which would make a forking test wait for every other test's reader.
fn options() -> Options {
    Options { forbid: Features::EVENT_FORK, arena_max: 64 << 20, prepared: 0, ..Options::default() }
}

fn host() -> Host {
    Host::open(&options()).unwrap()
}

fn without(features: Features) -> Host {
    Host::open(&Options { forbid: features | Features::EVENT_FORK, ..options() }).unwrap()
}

/// Memory of a test, on a 2 MiB boundary. Declare it before the host: then the userfaultfd is closed when it goes.
struct Area {
    span: Span,
    whole: Span,
}

impl Area {
    fn new(len: u64, huge: bool) -> Self {
        // Without access on both sides, so that no neighbour joins it.
        let whole = sys::reserve(align_up(len, SZ_2M) + 2 * SZ_2M).unwrap();
        let span = Span::sized(align_up(whole.start + 1, SZ_2M), len);
        // SAFETY: fresh memory.
        unsafe {
            sys::protect(span, true).unwrap();
            sys::advise(span, if huge { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage }).unwrap();
        }
        Self { span, whole }
    }

    /// Small pages, all written with [`pattern`].
    fn small(len: u64) -> Self {
        let area = Self::new(len, false);
        fill(area.span);
        area
    }

    /// One huge page, written with [`pattern`].
    fn huge() -> Self {
        let area = Self::new(SZ_2M, true);
        fill(area.span);
        area
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the test is over.
        unsafe { sys::unmap(self.whole) }.unwrap();
    }
}

fn get(addr: u64) -> u64 {
    // SAFETY: the address is in a readable mapping of this test.
    unsafe { std::ptr::with_exposed_provenance::<u64>(addr as usize).read_volatile() }
}

fn put(addr: u64, value: u64) {
    // SAFETY: the address is in a writable mapping of this test.
    unsafe { std::ptr::with_exposed_provenance_mut::<u64>(addr as usize).write_volatile(value) }
}

/// What [`fill`] writes at `offset` of a span.
fn pattern(offset: u64) -> u64 {
    (offset + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn fill(span: Span) {
    fill_pages(span, &PageMask::first(span.pages()));
}

/// Two words of each page.
fn words(page: usize) -> [u64; 2] {
    let start = page as u64 * SZ_4K;
    [start, start + SZ_4K - 8]
}

fn fill_pages(span: Span, pages: &PageMask) {
    for page in (0..span.pages()).filter(|p| pages.get(*p)) {
        words(page).into_iter().for_each(|at| put(span.start + at, pattern(at)));
    }
}

/// Panics unless `pages` of `span` hold the pattern.
fn verify_pages(span: Span, pages: &PageMask) {
    for page in (0..span.pages()).filter(|p| pages.get(*p)) {
        for at in words(page) {
            assert_eq!(get(span.start + at), pattern(at), "page {page} of {span}");
        }
    }
}

fn verify(span: Span) {
    verify_pages(span, &PageMask::first(span.pages()));
}

fn mask(runs: &[(usize, usize)]) -> PageMask {
    let mut mask = PageMask::EMPTY;
    runs.iter().for_each(|(first, count)| mask.set_run(*first, *count));
    mask
}

fn all(span: Span) -> PageMask {
    PageMask::first(span.pages())
}

/// Drops the pages of `span`, not registered.
fn drop_pages(span: Span) {
    // SAFETY: a test's own memory.
    unsafe { sys::advise(span, Advice::LinuxDontNeed) }.unwrap();
}

/// A reader of messages on a thread of its own, until it is dropped.
struct Reader {
    host: Arc<Host>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    fn start(host: &Arc<Host>, mut serve: impl FnMut(&Host, Message) + Send + 'static) -> Self {
        let (host, stop) = (Arc::clone(host), Arc::new(AtomicBool::new(false)));
        let (mine, stopped) = (Arc::clone(&host), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut messages = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                mine.poll(Some(Duration::from_millis(200))).unwrap();
                mine.read_batch(&mut messages).unwrap();
                handled(&mine, &messages);
                messages.drain(..).for_each(|m| serve(&mine, m));
            }
        });
        Self { host, stop, thread: Some(thread) }
    }

    /// Reads events and does with them what a runtime does; a fault fills its page with zeroes.
    fn ordinary(host: &Arc<Host>) -> Self {
        Self::start(host, |host, message| match message {
            Message::Fault { addr, .. } => {
                let _ = host.zero_fill(addr);
            }
            Message::Unmap(span) => host.forget(span),
            Message::Remap { from, to, len } => {
                if !host.is_own_remap(from, to) {
                    host.moved(from, to, len);
                }
            }
            Message::Remove(_) | Message::Fork(_) => {}
        })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.host.channel().wake_reader();
        let joined = self.thread.take().expect("dropped once").join();
        if !std::thread::panicking() {
            joined.expect("the reader ends well");
        }
    }
}

/// A forked child that does nothing until it is dropped: it shares all pages copy-on-write.
struct Child {
    pid: libc::pid_t,
}

impl Child {
    fn fork() -> Self {
        // SAFETY: the child calls only async-signal-safe functions.
        let pid = unsafe {
            let pid = libc::fork();
            if pid == 0 {
                loop {
                    libc::pause();
                }
            }
            pid
        };
        assert!(pid > 0);
        Self { pid }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: our own child, reaped once.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}

/// Flips `pages` in.
fn flip_in(host: &Host, app: Span, shadow: &Shadow, pages: &PageMask) {
    all_in(pages, |left| host.flip_in(app, shadow, left));
}

/// Brings `pages` in by `transfer`. An event of usvm's own mremap may not be handled yet when the call that caused it has
/// returned: the service would come back later, too.
fn all_in(pages: &PageMask, transfer: impl Fn(&PageMask) -> Result<(), FlipStop>) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut left = *pages;
    while let Err(stop) = transfer(&left) {
        assert!(stop.why == FlipError::Again && Instant::now() < deadline, "{stop:?}");
        left = left.minus(&stop.moved);
        std::thread::yield_now();
    }
}

/// Waits until the reader has handled what it read: a call that causes an event returns before that.
fn all_handled(host: &Host) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while host.channel().has_messages() || host.channel().is_changing() {
        assert!(Instant::now() < deadline, "the reader is stuck");
        std::thread::yield_now();
    }
}

/// Says that the events among `messages` are handled, which the service does after each.
fn handled(host: &Host, messages: &[Message]) {
    for _ in messages.iter().filter(|m| !matches!(m, Message::Fault { .. })) {
        drop(host.channel().handling());
    }
}
