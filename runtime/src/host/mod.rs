//! The host floor: the memory of this process.
//!
//! # Overview
//! [`Host`] implements the space's ports [`AddressSpace`] and [`HostMemory`] over userfaultfd:
//!
//! | room | what it does |
//! |---|---|
//! | [`features`] | opens userfaultfd, finds out what the kernel can do |
//! | [`message`] | reads faults and events |
//! | `vma`, `registered` | mappings as drm_gpusvm would see them |
//! | [`exempt`](mod@exempt) | memory that never migrates |
//! | `pagemap` | which pages are present, huge, written |
//! | `shadow`, `pool` | where pages wait; huge pages made ready |
//! | `flip`, `remap` | moves pages between application and shadow |
//! | [`service`] | answers faults and events |
//! | [`fork`] | what happens around a fork; `child`: what a child gets that was forked without it |
//! | [`budget`] | how much host memory may be retained |
//! | `sys` | the system calls of all of these |
//!
//! # Locking
//! Locks here are leaves: none is held while another room is called, and none is for application threads whose stack
//! may be tracked. The order inside: the message gate, the books of what is registered, then the shadow's books. The
//! gate (see [`message`]) is held by readers of messages, by flips, and while memory is let go of, for one system call or
//! a few.
//!
//! # Limits
//! One process: a child of fork must not use its parent's [`Host`].

pub mod budget;
mod child;
pub mod exempt;
pub mod features;
mod flip;
pub mod fork;
pub mod message;
mod pagemap;
mod pool;
mod registered;
mod remap;
pub mod service;
mod shadow;
mod spanset;
mod sys;
#[cfg(test)]
mod tests;
mod vma;

use self::budget::Budget;
pub use self::features::Options;
use self::features::{Features, Report};
use self::message::{Channel, Message, MessagesHeld, Ready};
use self::pagemap::Pagemap;
use self::pool::{Ground, Pool};
use self::registered::Registered;
use self::shadow::{Filled, ShadowArea};
use self::sys::RegisterMode;
use self::vma::Maps;
use crate::ground::addr::{PageMask, SZ_2M, SZ_4K, Span};
use crate::ground::error::{Errno, Error, Result};
use crate::ground::fds::Kept;
use crate::space::ports::{AddressSpace, FlipError, FlipStop, HostMemory, Shadow, Vma};
use rustix::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

/// How often an ioctl that cannot be given up is tried while events are unread, with a pause in between.
const PATIENCE: usize = 2000;
const PAUSE: Duration = Duration::from_micros(100);

/// What the host floor did since it was opened. Relaxed counters.
#[derive(Debug, Default)]
pub struct HostStats {
    /// Flips that moved at least one page, in either direction.
    pub flips: AtomicU64,
    /// Pages moved by flips outward.
    pub pages_out: AtomicU64,
    /// Pages moved by flips inward.
    pub pages_in: AtomicU64,
    /// Transfers that went another way than UFFDIO_MOVE: mremap, or copies.
    pub flip_fallbacks: AtomicU64,
    /// Flips stopped by a pinned or shared page.
    pub busy: AtomicU64,
    /// Flips stopped by an unread event.
    pub again: AtomicU64,
    /// Pages given to this process alone by breaking copy-on-write.
    pub unshared: AtomicU64,
    /// Prepared huge pages used.
    pub adopted: AtomicU64,
    /// Pages made to answer SIGBUS.
    pub poisoned: AtomicU64,
}

/// This process's memory, under userfaultfd.
///
/// Opened once by the wiring and shared; all methods may be called from any of usvm's threads. Dropping it closes the
/// userfaultfd: holes become the kernel's to fill with zeroes, so bring everything back before.
#[derive(Debug)]
pub struct Host {
    // Closed first: afterwards unmapping the arenas sends no events.
    channel: Channel,
    report: Report,
    maps: Maps,
    pagemap: Pagemap,
    registered: RwLock<Registered>,
    pool: Pool,
    shadow: ShadowArea,
    own_remaps: Mutex<Vec<(u64, u64)>>,
    /// /proc/thread-self/mem.
    memory: Option<Kept>,
    budget: Budget,
    stats: HostStats,
}

impl Host {
    /// Opens userfaultfd by the best way there is and probes what works.
    ///
    /// # Errors
    /// [`Error::Os`] where no way works, naming the last errno.
    pub fn open(options: &Options) -> Result<Self> {
        let pagemap = features::proc_file("/proc/thread-self/pagemap")?;
        let maps = features::proc_file("/proc/thread-self/maps")?;
        let (uffd, report) = features::open(options, pagemap.as_fd(), maps.as_fd())?;
        let by_move = report.has.contains(Features::MOVE);
        let filled = if by_move { Filled::ByMove } else { Filled::ByRemap };
        Ok(Self {
            channel: Channel::new(uffd)?,
            maps: Maps::new(maps, report.has.contains(Features::PROCMAP_QUERY))?,
            pagemap: Pagemap::new(pagemap, report.has),
            registered: RwLock::default(),
            pool: Pool::new(options.prepared, by_move),
            shadow: ShadowArea::new(filled, options.arena_max),
            own_remaps: Mutex::default(),
            // Without it, memory that is mostly read moves to the device where it could have been copied.
            memory: features::proc_file("/proc/thread-self/mem").ok().map(Kept::new),
            budget: Budget::new(),
            stats: HostStats::default(),
            report,
        })
    }

    /// What was found when it was opened.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// What happened since.
    pub fn stats(&self) -> &HostStats {
        &self.stats
    }

    /// The reading end: faults and events.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// [`Channel::poll`].
    pub fn poll(&self, timeout: Option<Duration>) -> Result<Ready> {
        self.channel.poll(timeout)
    }

    /// [`Channel::read_batch`].
    pub fn read_batch(&self, out: &mut Vec<Message>) -> Result<usize> {
        self.channel.read_batch(out)
    }

    /// What is registered now, by usvm's books; for withdrawing.
    pub fn registered_spans(&self) -> Vec<Span> {
        self.books().iter().collect()
    }

    /// Prepares one huge page if the pool wants one; whether it did. For a background thread; takes milliseconds.
    pub fn refill(&self) -> Result<bool> {
        self.pool.refill(self.ground())
    }

    /// Prepared huge pages still wanted.
    pub fn refill_wanted(&self) -> usize {
        self.pool.wanted()
    }

    /// Sets how many huge pages to hold prepared.
    pub fn set_prepared(&self, pages: usize) {
        self.pool.set_target(pages);
    }

    /// Bytes of prepared huge pages held.
    pub fn prepared_bytes(&self) -> u64 {
        self.pool.held_bytes()
    }

    /// What could migrate now: writable, private anonymous memory that is not exempt.
    pub fn movable(&self) -> Vec<Span> {
        let mut movable = Vec::new();
        for mapping in self.maps.movable().unwrap_or_default() {
            let mut at = mapping.start;
            while at < mapping.end {
                let (part, is_exempt) = exempt::extent(at);
                let end = part.end.min(mapping.end);
                if !is_exempt {
                    movable.push(Span::new(at, end));
                }
                at = end.max(at + SZ_4K);
            }
        }
        movable
    }

    /// The first page of `span` that is there.
    pub fn first_present(&self, span: Span) -> Option<u64> {
        self.pagemap.next_present(span.start, span.end)
    }

    /// Gives all prepared pages back to the kernel, and says how many bytes; for memory pressure.
    pub fn drain(&self) -> u64 {
        self.pool.drain(self.ground())
    }

    /// Bytes of retained pages that may be kept, when `retained` are kept now.
    pub fn allowed_retained(&self, retained: u64) -> u64 {
        self.budget.allowed_retained(retained)
    }

    /// Gives the kernel the pages of shadow places that were discarded ([`HostMemory::shadow_discard`]). Housekeeping.
    pub fn empty_discarded(&self) {
        self.shadow.empty_discarded(self.channel.uffd());
    }

    /// Keeps the pool of prepared pages as full as host memory allows. For a background thread.
    pub fn keep_pool(&self) {
        if self.budget.pressure() != budget::Pressure::None {
            self.drain();
            return;
        }
        while self.refill_wanted() > 0 {
            match self.refill() {
                Ok(true) => {}
                Ok(false) => return,
                Err(e) => {
                    tracing::debug!("no prepared page: {e}");
                    return;
                }
            }
        }
    }

    /// Lets go of everything that is registered. What is missing then reads as zeroes: bring everything home before.
    pub fn unregister_all(&self) {
        // Also while mappings change: with everything home, nothing is to land anywhere.
        let mut books = self.books_mut();
        for span in books.iter().collect::<Vec<_>>() {
            self.unregister_around(span);
            match sys::uffd_unregister(self.channel.uffd(), span) {
                Ok(()) => books.take(span),
                Err(errno) => tracing::warn!(%errno, %span, "stays under userfaultfd"),
            }
        }
    }

    /// Lets go of all of the mappings of which `span` is a part: what mremap made larger is registered and not in the books.
    /// Closing lets go of it, too, unless a child that no handler saw has the descriptor.
    fn unregister_around(&self, span: Span) {
        let mut at = span.start;
        while at < span.end
            && let Ok(Some(vma)) = self.maps.find(at)
        {
            if vma.span.start < span.start || vma.span.end > span.end {
                // An error shows with the span itself.
                let _ = sys::uffd_unregister(self.channel.uffd(), vma.span);
            }
            at = vma.span.end;
        }
    }

    /// See [`Maps::text`].
    pub(crate) fn mappings_text(&self) -> Option<String> {
        self.maps.text()
    }

    /// Closes the userfaultfd, for ever: the kernel lets go of all memory, also what it had registered by itself, and of
    /// everybody who waits. What is missing then reads as zeroes: bring everything home before.
    pub fn close(&self) {
        if let Err(errno) = self.channel.retire() {
            tracing::warn!(%errno, "the userfaultfd stays open; letting go of what is known to be registered");
            self.unregister_all();
        }
    }

    /// In a forked child: closes the child's descriptor, or leaves it to whoever closes all that usvm kept open. Nothing is
    /// let go of: what is registered is the parent's memory, and a call on this descriptor would be about that.
    pub fn leave(&self) {
        let _ = self.channel.retire();
    }

    /// Flips, and the times something else had to do.
    pub fn flip_counts(&self) -> (u64, u64) {
        (self.stats.flips.load(Relaxed), self.stats.flip_fallbacks.load(Relaxed))
    }

    /// Counts [`Host::flip_counts`] from zero again.
    pub fn reset_flip_counts(&self) {
        self.stats.flips.store(0, Relaxed);
        self.stats.flip_fallbacks.store(0, Relaxed);
    }

    /// Bytes of address space of the shadow area.
    pub fn shadow_mapped_bytes(&self) -> u64 {
        self.shadow.mapped_bytes()
    }

    /// Bytes of shadow slots that could not be emptied and are out of use for now.
    pub fn shadow_stuck_bytes(&self) -> u64 {
        self.shadow.stuck_bytes()
    }

    fn has(&self, features: Features) -> bool {
        self.report.has.contains(features)
    }

    fn ground(&self) -> Ground<'_> {
        Ground { uffd: self.channel.uffd(), area: &self.shadow, pagemap: &self.pagemap }
    }

    fn books(&self) -> RwLockReadGuard<'_, Registered> {
        self.registered.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn books_mut(&self) -> RwLockWriteGuard<'_, Registered> {
        self.registered.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `span` is registered, asking the kernel where it can tell.
    fn registered_now(&self, span: Span) -> bool {
        self.kernel_registered(span).unwrap_or_else(|| self.books().covers(span))
    }

    /// Whether the kernel says that `span` is registered.
    fn kernel_registered(&self, span: Span) -> Option<bool> {
        self.pagemap.registered(span).or_else(|| pagemap::all_registered_by_smaps(span))
    }

    /// Present pages, or `otherwise` where nobody can tell.
    fn present_or(&self, span: Span, otherwise: PageMask) -> PageMask {
        self.pagemap.pages(span).map_or_else(
            |errno| {
                tracing::warn!(%errno, %span, "page state cannot be read");
                otherwise
            },
            |p| p.present,
        )
    }

    /// Does `f` again while it says EAGAIN because an event is unread, for a bounded time.
    fn patiently(
        &self,
        mut f: impl FnMut() -> std::result::Result<(), Errno>,
    ) -> std::result::Result<(), Errno> {
        let mut last = Errno(libc::EAGAIN);
        for _ in 0..PATIENCE {
            match f() {
                Err(errno @ Errno(libc::EAGAIN)) => last = errno,
                other => return other,
            }
            std::thread::sleep(PAUSE);
        }
        Err(last)
    }

    fn count_stop(&self, stop: FlipStop) -> FlipStop {
        match stop.why {
            FlipError::Busy => self.stats.busy.fetch_add(1, Relaxed),
            FlipError::Again => self.stats.again.fetch_add(1, Relaxed),
            _ => 0,
        };
        stop
    }

    fn count_pages(&self, pages: &PageMask, direction: &AtomicU64) {
        if !pages.is_empty() {
            self.stats.flips.fetch_add(1, Relaxed);
            direction.fetch_add(pages.count() as u64, Relaxed);
        }
    }

    fn count_in(
        &self,
        pages: &PageMask,
        result: std::result::Result<(), FlipStop>,
    ) -> std::result::Result<(), FlipStop> {
        let arrived = result.map_or_else(|stop| stop.moved, |()| *pages);
        self.count_pages(&arrived, &self.stats.pages_in);
        result.map_err(|stop| self.count_stop(stop))
    }
}

impl AddressSpace for Host {
    fn find_vma(&self, addr: u64) -> Result<Option<Vma>> {
        vma::view(&self.maps, addr, |at| self.books().is_cut(at), exempt::extent)
    }

    fn populated(&self, span: Span) -> bool {
        self.present_or(span, PageMask::EMPTY) == PageMask::first(span.pages())
    }
}

impl HostMemory for Host {
    fn register(&self, span: Span) -> Result<()> {
        if exempt::is_exempt(span) {
            let reason = format!("{span} holds memory that usvm itself stands on");
            return Err(Error::Invalid { argument: "span", reason });
        }
        // The books are held over the ioctl, so that an UNMAP event is booked before or after, never in between.
        let mut books = self.books_mut();
        let gaps = match books.covers(span).then(|| self.pagemap.registered(span)) {
            Some(Some(true)) => Vec::new(),
            // The books may speak of a mapping that is gone already, or know less than the kernel.
            _ if self.pagemap.tells_registered() => vec![span],
            _ => books.missing(span),
        };
        books.needed(span);
        for gap in gaps {
            self.register_part(gap)?;
            books.add(gap);
        }
        Ok(())
    }

    fn unregister(&self, span: Span) {
        let unread = self.channel.hold_messages();
        let mut books = self.books_mut();
        // Only what is in the books: what mremap just brought here is not, and its contents may still be on their way.
        books.not_needed(span);
        for part in books.unneeded() {
            match self.release(part, &unread) {
                Ok(()) => books.take(part),
                // For all of them: the next call tries again.
                Err(Errno(libc::EAGAIN)) => break,
                // Nothing is mapped there any more; the event is on its way.
                Err(Errno(libc::EINVAL)) if self.kernel_registered(part) == Some(false) => books.forget(part),
                Err(errno) => {
                    books.needed(part);
                    tracing::warn!(%errno, %part, "stays under userfaultfd");
                }
            }
        }
    }

    fn let_go(&self, span: Span) {
        self.unregister(span);
        // What mremap brought there is in the books only when its event was handled.
        let unread = self.channel.hold_messages();
        let Ok(Some(mapping)) = self.maps.find(span.start) else { return };
        let mut books = self.books_mut();
        let strange = books.missing(mapping.span).into_iter().find(|part| part.contains(span.start));
        let Some(part) = strange else { return };
        match self.release(part, &unread) {
            Ok(()) => books.take(part),
            Err(Errno(libc::EAGAIN)) => {}
            Err(errno) => tracing::debug!(%errno, %part, "is not under userfaultfd after all"),
        }
    }

    fn forget(&self, span: Span) {
        self.books_mut().forget(span);
    }

    fn moved(&self, from: u64, to: u64, len: u64) {
        self.books_mut().moved(Span::sized(from, len), to);
    }

    fn is_registered(&self, span: Span) -> bool {
        self.registered_now(span)
    }

    fn registered(&self, span: Span) -> PageMask {
        let told = self.pagemap.registered_pages(span).or_else(|| pagemap::registered_by_smaps(span));
        told.unwrap_or_else(|| {
            let mut mask = PageMask::EMPTY;
            let books = self.books();
            let pages = (0..span.pages()).filter(|page| books.covers(span.page_run(*page, 1)));
            pages.for_each(|page| mask.set(page));
            mask
        })
    }

    fn mappings_change(&self) -> bool {
        // An event that is being read is in the one count or in the other.
        let _unread = self.channel.hold_messages();
        self.channel.is_changing() || sys::uffd_is_changing(self.channel.uffd())
    }

    fn refuses_while_changing(&self) -> bool {
        self.has(Features::MOVE)
    }

    fn present(&self, span: Span) -> PageMask {
        // When nobody can tell, every page may be there: a flip then fails, and nothing is taken for a hole.
        self.present_or(span, PageMask::first(span.pages()))
    }

    fn is_huge(&self, span: Span) -> bool {
        span.len() == SZ_2M && self.pagemap.pages(span).is_ok_and(|p| p.huge == PageMask::first(span.pages()))
    }

    fn shadow_alloc(&self, len: u64) -> Result<Shadow> {
        self.shadow.alloc(self.channel.uffd(), len)
    }

    fn shadow_free(&self, shadow: Shadow) {
        self.shadow.free(self.channel.uffd(), shadow);
    }

    fn shadow_discard(&self, shadow: Shadow) {
        self.shadow.discard(self.channel.uffd(), shadow);
    }

    fn shadow_release(&self, shadow: &Shadow, pages: &PageMask) {
        for (first, count) in pages.runs() {
            let part = shadow.span.page_run(first, count);
            if let Err(errno) = self.shadow.release(self.channel.uffd(), part) {
                tracing::warn!(%errno, %part, "shadow pages are not released");
            }
        }
    }

    fn shadow_adopt_prepared(&self, shadow: &Shadow) -> bool {
        let adopted = self.pool.adopt(self.ground(), shadow);
        self.stats.adopted.fetch_add(adopted.into(), Relaxed);
        adopted
    }

    fn flip_out(
        &self,
        app: Span,
        shadow: &Shadow,
        pages: &PageMask,
    ) -> std::result::Result<PageMask, FlipStop> {
        let result = if self.has(Features::MOVE) {
            self.move_out(app, shadow, pages)
        } else {
            self.stats.flip_fallbacks.fetch_add(1, Relaxed);
            self.remap_out(app, shadow, pages)
        };
        let moved = result.unwrap_or_else(|stop| stop.moved);
        self.count_pages(&moved, &self.stats.pages_out);
        result.map_err(|stop| self.count_stop(stop))
    }

    fn flip_in(&self, app: Span, shadow: &Shadow, pages: &PageMask) -> std::result::Result<(), FlipStop> {
        let result = if self.has(Features::MOVE) {
            self.move_in(app, shadow, pages)
        } else {
            self.stats.flip_fallbacks.fetch_add(1, Relaxed);
            self.copy_back(app, shadow, pages)
        };
        self.count_in(pages, result)
    }

    fn copy_in(&self, app: Span, shadow: &Shadow, pages: &PageMask) -> std::result::Result<(), FlipStop> {
        self.stats.flip_fallbacks.fetch_add(1, Relaxed);
        let result = self.copy_pages_in(app, shadow, pages);
        self.count_in(pages, result)
    }

    fn fill_from(&self, app: Span, from: u64, pages: &PageMask) -> std::result::Result<(), FlipStop> {
        self.fill_pages(app, from, pages).map_err(|stop| self.count_stop(stop))
    }

    fn unshare(&self, app: Span, pages: &PageMask) {
        let made = self.make_own(app, pages);
        self.stats.unshared.fetch_add(made, Relaxed);
    }

    fn track(&self, app: Span) -> std::result::Result<(), FlipError> {
        self.pagemap.arm(self.channel.uffd(), app).map_err(|errno| match errno.0 {
            libc::EAGAIN => FlipError::Again,
            libc::EPERM | libc::ENOENT => FlipError::NoMapping,
            libc::ENOMEM => FlipError::NoMemory,
            other => FlipError::Os(other),
        })
    }

    fn take_written(&self, app: Span) -> Option<PageMask> {
        if !self.has(Features::WP_ASYNC) || !self.registered_now(app) {
            return None;
        }
        self.pagemap.take_written(app).ok()
    }

    fn zero_fill(&self, page: u64) -> std::result::Result<(), FlipError> {
        // An event that was read and is not handled may be an mremap that brought contents here.
        let _unread = self.channel.hold_messages();
        if self.channel.is_changing() { Err(FlipError::Again) } else { self.fill_zeroes(page) }
    }

    fn read_home(&self, from: u64, to: &mut [u8]) -> Result<usize> {
        let Some(memory) = &self.memory else {
            return Err(Error::NotSupported("reading /proc/thread-self/mem".into()));
        };
        match sys::memory_read(memory.as_fd(), from, to) {
            Ok(0) | Err(Errno(libc::EIO | libc::EFAULT)) => Err(Error::Gone { addr: from }),
            Ok(read) => Ok(read),
            Err(errno) => Err(Error::os("reading /proc/thread-self/mem", errno)),
        }
    }

    fn wake(&self, span: Span) {
        if let Err(errno) = sys::uffd_wake(self.channel.uffd(), span) {
            tracing::warn!(%errno, %span, "waiters were not woken");
        }
    }

    fn poison(&self, page: u64) {
        let span = Span::around(page, SZ_4K);
        let poisoned = if self.has(Features::POISON) {
            self.patiently(|| self.fill(span, || sys::uffd_poison(self.channel.uffd(), span)))
        } else {
            Err(Errno(libc::EOPNOTSUPP))
        };
        match poisoned {
            Ok(()) => {}
            // A page is there, or no mapping: nothing was lost there, or nobody can ask for it.
            Err(Errno(libc::EEXIST | libc::ENOENT)) => {
                self.wake(span);
                return;
            }
            Err(errno) => {
                tracing::warn!(%errno, %span, "cannot be poisoned; taking its access rights instead");
                self.deny(span);
            }
        }
        self.stats.poisoned.fetch_add(1, Relaxed);
    }
}

impl Host {
    /// Zeroes into the hole at `page`, which the caller knows to be one.
    fn fill_zeroes(&self, page: u64) -> std::result::Result<(), FlipError> {
        let span = Span::around(page, SZ_4K);
        match self.fill(span, || sys::uffd_zeropage(self.channel.uffd(), span)) {
            Ok(()) => Ok(()),
            Err(Errno(libc::EEXIST)) => {
                self.wake(span);
                Ok(())
            }
            Err(Errno(libc::EAGAIN)) => Err(FlipError::Again),
            Err(Errno(libc::ENOENT | libc::EINVAL)) => Err(FlipError::NoMapping),
            Err(Errno(libc::ENOMEM)) => Err(FlipError::NoMemory),
            Err(other) => Err(FlipError::Os(other.0)),
        }
    }

    /// Registers `gap`, all of it or nothing.
    fn register_part(&self, gap: Span) -> Result<()> {
        sys::uffd_register(self.channel.uffd(), gap, self.mode()).map_err(|e| register_error(gap, e))?;
        if self.pagemap.registered(gap) == Some(false) {
            // The kernel passes over parts that are not mapped. What stays registered while mappings change is found
            // when somebody waits there: see `let_go`.
            if let Some(unread) = self.channel.hold_messages_now() {
                let _ = self.release(gap, &unread);
            }
            return Err(Error::Gone { addr: gap.start });
        }
        Ok(())
    }

    /// Takes `part` from under userfaultfd; EAGAIN while mappings change, and then it is registered as before. An mremap
    /// may just have brought contents there that are still to land, and they need the registration. Its caller waits
    /// until its event is read, and messages are held: so what is there is as before when EAGAIN was said.
    fn release(&self, part: Span, _unread: &MessagesHeld<'_>) -> std::result::Result<(), Errno> {
        let uffd = self.channel.uffd();
        if self.channel.is_changing() || sys::uffd_is_changing(uffd) {
            return Err(Errno(libc::EAGAIN));
        }
        sys::uffd_unregister(uffd, part)?;
        // It may have begun after the question and before the answer.
        if !sys::uffd_is_changing(uffd) {
            return Ok(());
        }
        if let Err(errno) = sys::uffd_register(uffd, part, self.mode()) {
            tracing::error!(%errno, %part, "is not under userfaultfd again; what mremap just moved there may be lost");
        }
        Err(Errno(libc::EAGAIN))
    }

    fn mode(&self) -> RegisterMode {
        RegisterMode { missing: true, write_protect: self.has(Features::WP) }
    }

    /// Fills the hole at `page` by `f`; where a mere write-protect marker is in the way, it is taken away first.
    fn fill(
        &self,
        page: Span,
        f: impl Fn() -> std::result::Result<(), sys::Partial>,
    ) -> std::result::Result<(), Errno> {
        let filled = f().map_err(|p| p.errno);
        let doubtful = || self.pagemap.pages(page).is_ok_and(|p| !p.doubtful.is_empty());
        if filled != Err(Errno(libc::EEXIST)) || !doubtful() {
            return filled;
        }
        sys::uffd_write_protect(self.channel.uffd(), page, false)?;
        f().map_err(|p| p.errno)
    }

    /// Takes all access from `span`, whose data is lost, where it cannot be poisoned: SIGSEGV instead of SIGBUS, never
    /// silent zeroes.
    fn deny(&self, span: Span) {
        if let Err(errno) = sys::deny(span) {
            tracing::error!(%errno, %span, "lost data cannot be marked");
        }
        self.wake(span);
    }
}

fn register_error(span: Span, errno: Errno) -> Error {
    match errno.0 {
        libc::ENOMEM => Error::OutOfHostMemory {
            what: "registering memory with userfaultfd",
            detail: "the process has about as many mappings as vm.max_map_count allows; raise it, e.g. \
                     sudo sysctl vm.max_map_count=1048576"
                .to_owned(),
        },
        libc::EBUSY => Error::Busy { span },
        libc::EPERM => Error::NotWritable { addr: span.start },
        libc::EINVAL | libc::ENOENT => Error::Gone { addr: span.start },
        _ => Error::os("UFFDIO_REGISTER", errno),
    }
}
