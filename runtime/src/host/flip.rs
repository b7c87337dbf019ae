#![allow(unsafe_code)]
//! Flips: page-table entries move between the application's address and its shadow.
//!
//! # Overview
//! A flip copies nothing and is atomic for each page against every CPU thread: a page is at one address or at the other,
//! and who touches the old one waits in userfaultfd. [`flip_out`](Flip::out) asks first what is there and whether the
//! mapping is still the registered one, then moves exactly the runs of present pages: a whole huge page in one
//! call. Where a page vanishes in between, the kernel stops there and the rest is looked at anew, so the accounting is
//! exact.
//!
//! The kernel reports EAGAIN for every partial move, whatever the reason; the rest is asked for again, and the second
//! answer tells why. How far a move came is looked at as well: 6.18 can answer EEXIST, and no progress, for pages it
//! has moved, when one of them was pinned a moment before (an O_DIRECT read that just ended).
//!
//! | errno without progress | meaning here |
//! |---|---|
//! | EAGAIN | an event is unread: [`FlipError::Again`] |
//! | EBUSY | pinned, or shared copy-on-write: [`FlipError::Busy`] |
//! | ENOENT | outward: a page vanished, look anew; inward: the shadow has a hole, an error |
//! | EEXIST | the destination has a page; or only a write-protect marker, which is removed once |
//! | EFAULT | the source has no page but a marker; removed once, else a poisoned page |
//! | EINVAL | a mapping ends inside the run (split there), is gone ([`FlipError::NoMapping`]), or differs in protection or locking ([`FlipError::Mismatch`]) |
//! | ENOMEM | no page table: [`FlipError::NoMemory`] |
//!
//! # Safety
//! Application pages are reached by address only; shadow pages belong to the range whose [`Shadow`] is given.
//!
//! # Locking
//! Outward flips hold messages back (see [`super::message`]) from the look at the mapping to the end of the move, so that
//! the pages of a new mapping at the same address are never taken.
//!
//! # Limits
//! See [`super::remap`] for kernels without UFFDIO_MOVE.

use super::Host;
use super::features::Features;
use super::sys::{self, Partial};
use crate::ground::addr::{PAGE_SHIFT, PageMask, SZ_4K, Span};
use crate::ground::error::Errno;
use crate::space::ports::{FlipError, FlipStop, Shadow, VmaKind};
use rustix::fd::BorrowedFd;
use rustix::mm::Advice;

/// How often pages that vanish during an outward flip make it look anew.
const LOOKS: usize = 32;

/// What moves pages to the application's address or away from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// UFFDIO_MOVE to the shadow.
    Out,
    /// UFFDIO_MOVE to the application.
    In,
    /// UFFDIO_COPY to the application.
    CopyIn,
}

/// What to do after a stop without progress.
enum Next {
    /// Try the same again: an obstacle was removed.
    Retry,
    /// Try again up to this page only.
    UpTo(usize),
    /// Give up.
    Stop(FlipError),
    /// The source has nothing there.
    Hole,
}

/// One transfer between a span of the application and its shadow.
struct Flip<'a> {
    host: &'a Host,
    app: Span,
    shadow: Span,
    way: Way,
    moved: PageMask,
    /// The page at which an obstacle was last removed: each is tried once.
    cleared: Option<usize>,
}

impl<'a> Flip<'a> {
    fn new(host: &'a Host, app: Span, shadow: &Shadow, way: Way) -> Self {
        assert_eq!(app.len(), shadow.span.len(), "a shadow is as long as its range");
        Self { host, app, shadow: shadow.span, way, moved: PageMask::EMPTY, cleared: None }
    }

    /// Copies to the application from any other place, which the kernel reads as it reads a system call's buffer.
    fn copy_from(host: &'a Host, app: Span, from: u64) -> Self {
        let shadow = Span::sized(from, app.len());
        Self { host, app, shadow, way: Way::CopyIn, moved: PageMask::EMPTY, cleared: None }
    }

    fn stop(&self, why: FlipError) -> FlipStop {
        FlipStop { moved: self.moved, why }
    }

    fn uffd(&self) -> BorrowedFd<'a> {
        self.host.channel.uffd()
    }

    fn transfer(&self, first: usize, count: usize) -> Result<(), Partial> {
        let app = self.app.page_run(first, count);
        let shadow = self.shadow.page_run(first, count);
        // SAFETY: the shadow belongs to the caller of the flip, application pages are nobody's in Rust.
        unsafe {
            match self.way {
                Way::Out => sys::uffd_move(self.uffd(), shadow.start, app.start, app.len(), false),
                Way::In => sys::uffd_move(self.uffd(), app.start, shadow.start, app.len(), true),
                Way::CopyIn => sys::uffd_copy(self.uffd(), app.start, shadow.start, app.len()),
            }
        }
    }

    /// Transfers pages `first..first + count`. `Ok(true)`: all arrived; `Ok(false)`: the source has a hole.
    fn run(&mut self, first: usize, count: usize) -> Result<bool, FlipError> {
        let end = first + count;
        let (mut at, mut until) = (first, end);
        while at < end {
            let Err(partial) = self.transfer(at, until - at) else {
                self.moved.set_run(at, until - at);
                (at, until) = (until, end);
                continue;
            };
            let moved = self.moved_of(at, until, &partial);
            self.moved = self.moved.or(&moved);
            let stopped = (at..until).find(|page| !moved.get(*page)).unwrap_or(until);
            if stopped > at {
                at = stopped;
                until = if at == until { end } else { until };
                continue;
            }
            match self.obstacle(at, until, partial.errno) {
                Next::Retry => {}
                Next::UpTo(page) => until = page,
                Next::Hole => return Ok(false),
                Next::Stop(why) => return Err(why),
            }
        }
        Ok(true)
    }

    /// Which of pages `at..until` a call that stopped early has moved: those that the kernel says, and those that are
    /// seen at the other side and no longer at this one. A kernel that moves small pages in batches (6.18) may move
    /// them all, try its batch again on its own, and answer EEXIST with no progress.
    fn moved_of(&self, at: usize, until: usize, partial: &Partial) -> PageMask {
        let said = PageMask::run(at, ((partial.done >> PAGE_SHIFT) as usize).min(until - at));
        if self.way == Way::CopyIn {
            return said;
        }
        let present = |span| self.host.pagemap.pages(span).map(|pages| pages.present);
        let (Ok(app), Ok(shadow)) = (present(self.app), present(self.shadow)) else { return said };
        let seen = if self.way == Way::Out { shadow.minus(&app) } else { app.minus(&shadow) };
        said.or(&seen.and(&PageMask::run(at, until - at)))
    }

    /// Why pages `at..until` did not move, and what to do about it.
    fn obstacle(&mut self, at: usize, until: usize, errno: Errno) -> Next {
        match errno.0 {
            libc::EAGAIN => Next::Stop(FlipError::Again),
            libc::EBUSY => Next::Stop(FlipError::Busy),
            libc::ENOMEM => Next::Stop(FlipError::NoMemory),
            libc::EEXIST => self.clear_markers(at, until, FlipError::Exists),
            libc::EFAULT => self.clear_markers(at, until, FlipError::Os(libc::EFAULT)),
            libc::ENOENT if self.way == Way::Out => Next::Hole,
            libc::ENOENT if self.way == Way::In => self.missing(at, until),
            libc::EINVAL | libc::ENOENT => self.mapping(at, until),
            other => Next::Stop(FlipError::Os(other)),
        }
    }

    /// Write-protect markers may stand in the way where no pages are: take them away, once for each page that stops us.
    /// Pages that are there count as written from then on, which is safe.
    fn clear_markers(&mut self, at: usize, until: usize, otherwise: FlipError) -> Next {
        if self.cleared.replace(at) == Some(at) {
            return Next::Stop(otherwise);
        }
        let rest = self.app.page_run(at, until - at);
        match sys::uffd_write_protect(self.uffd(), rest, false) {
            Ok(()) => Next::Retry,
            Err(Errno(libc::EAGAIN)) => Next::Stop(FlipError::Again),
            Err(_) => Next::Stop(otherwise),
        }
    }

    /// Inward: no mapping at the application's address, or no page in the shadow.
    fn missing(&mut self, at: usize, until: usize) -> Next {
        let run = self.app.page_run(at, until - at);
        match self.host.maps.find(run.start) {
            Ok(Some(_)) => Next::Stop(FlipError::Os(libc::ENOENT)),
            _ => Next::Stop(FlipError::NoMapping),
        }
    }

    /// The kernel does not like the mappings: a boundary in the run, a mapping that is gone, or one that differs.
    fn mapping(&mut self, at: usize, until: usize) -> Next {
        let run = self.app.page_run(at, until - at);
        let vma = match self.host.maps.find(run.start) {
            Ok(Some(vma)) if vma.kind == VmaKind::Anonymous => vma,
            Ok(_) => return Next::Stop(FlipError::NoMapping),
            Err(error) => return Next::Stop(FlipError::Os(error.errno())),
        };
        if vma.span.end < run.end {
            return Next::UpTo(at + Span::new(run.start, vma.span.end).pages());
        }
        if !self.host.registered_now(run) {
            return Next::Stop(FlipError::NoMapping);
        }
        let repaired = self.way == Way::Out && self.cleared.replace(at) != Some(at);
        if repaired && self.host.shadow.repair(self.uffd(), self.shadow).is_ok() {
            return Next::Retry;
        }
        Next::Stop(FlipError::Mismatch)
    }
}

impl Host {
    /// [`crate::space::ports::HostMemory::flip_out`] by UFFDIO_MOVE.
    pub(super) fn move_out(
        &self,
        app: Span,
        shadow: &Shadow,
        pages: &PageMask,
    ) -> Result<PageMask, FlipStop> {
        let mut flip = Flip::new(self, app, shadow, Way::Out);
        'look: for _ in 0..LOOKS {
            let unread = self.channel.hold_messages();
            if self.channel.is_changing() {
                return Err(flip.stop(FlipError::Again));
            }
            let there = self.pagemap.pages(app).map_err(|e| flip.stop(FlipError::Os(e.0)))?;
            let wanted = pages.and(&there.present).minus(&flip.moved);
            self.still_registered(app, &wanted, there.registered).map_err(|why| flip.stop(why))?;
            let zero = wanted.and(&there.zero);
            if !self.has(Features::MOVE_ZERO_PAGES) && !zero.is_empty() {
                drop(unread);
                self.make_own(app, &zero);
                continue;
            }
            for (first, count) in wanted.runs() {
                match flip.run(first, count) {
                    Ok(true) => {}
                    Ok(false) => continue 'look,
                    Err(why) => return Err(flip.stop(why)),
                }
            }
            return Ok(flip.moved);
        }
        Err(flip.stop(FlipError::Again))
    }

    /// Whether the `wanted` pages of `app` lie in mappings that are still registered: pages of a new mapping at the old
    /// address must not be taken away, nobody would bring them back.
    fn still_registered(
        &self,
        app: Span,
        wanted: &PageMask,
        marked: Option<PageMask>,
    ) -> Result<(), FlipError> {
        if let Some(registered) = marked {
            let all = wanted.minus(&registered).is_empty();
            return if all { Ok(()) } else { Err(FlipError::NoMapping) };
        }
        for (first, count) in wanted.runs() {
            // Disarming write protection changes nothing for pages that leave, and fails elsewhere.
            match sys::uffd_write_protect(self.channel.uffd(), app.page_run(first, count), false) {
                Ok(()) => {}
                Err(Errno(libc::ENOENT | libc::EINVAL)) => return Err(FlipError::NoMapping),
                Err(Errno(libc::EAGAIN)) => return Err(FlipError::Again),
                Err(errno) => return Err(FlipError::Os(errno.0)),
            }
        }
        Ok(())
    }

    /// [`crate::space::ports::HostMemory::flip_in`] by UFFDIO_MOVE.
    pub(super) fn move_in(&self, app: Span, shadow: &Shadow, pages: &PageMask) -> Result<(), FlipStop> {
        self.transfer_in(Flip::new(self, app, shadow, Way::In), pages)
    }

    /// [`crate::space::ports::HostMemory::copy_in`].
    pub(super) fn copy_pages_in(&self, app: Span, shadow: &Shadow, pages: &PageMask) -> Result<(), FlipStop> {
        self.transfer_in(Flip::new(self, app, shadow, Way::CopyIn), pages)
    }

    /// [`crate::space::ports::HostMemory::fill_from`].
    pub(super) fn fill_pages(&self, app: Span, from: u64, pages: &PageMask) -> Result<(), FlipStop> {
        self.transfer_in(Flip::copy_from(self, app, from), pages)
    }

    fn transfer_in(&self, mut flip: Flip<'_>, pages: &PageMask) -> Result<(), FlipStop> {
        let _unread = self.channel.hold_messages();
        if self.channel.is_changing() {
            return Err(flip.stop(FlipError::Again));
        }
        for (first, count) in pages.runs() {
            match flip.run(first, count) {
                Ok(true) => {}
                Ok(false) => return Err(flip.stop(FlipError::Os(libc::ENOENT))),
                Err(why) => return Err(flip.stop(why)),
            }
        }
        Ok(())
    }

    /// Breaks copy-on-write of those `pages` of `app` that are there: each gets a page of its own. Pages stay where they
    /// are; what cannot be done (no memory, or the application dropped the page in this moment) stays as it is. Gives how
    /// many there are now. One system call for each page, most of which copies it.
    pub(super) fn make_own(&self, app: Span, pages: &PageMask) -> u64 {
        let there = self.present_or(app, PageMask::EMPTY);
        let mut made = 0;
        for (first, count) in pages.and(&there).runs() {
            let run = app.page_run(first, count);
            for page in (run.start..run.end).step_by(SZ_4K as usize) {
                match sys::make_own(page) {
                    Ok(()) => made += 1,
                    Err(errno) => tracing::debug!(%errno, page = format_args!("{page:#x}"), "stays shared"),
                }
            }
            // Of a huge page in pieces the kernel asks whether its first page is exclusive, whichever is to move, and
            // that one may be gone. Ageing the pieces splits it into pages of their own.
            // SAFETY: changes no contents.
            let _ = unsafe { sys::advise(run, Advice::LinuxCold) };
        }
        made
    }
}
