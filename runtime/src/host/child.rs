#![allow(unsafe_code)]
//! What a forked child gets that no handler prepared the fork of.
//!
//! # Overview
//! The child of a raw clone has holes where its parent's memory was away. The kernel gives the parent a userfaultfd of the
//! child; [`Child`] puts copies in there, and SIGBUS where there is nothing to copy. As the kernel's own fork does, it
//! leaves memory with MADV_WIPEONFORK empty, and what MADV_DONTFORK kept out of the child is not there to be filled.
//!
//! The child runs meanwhile. What it unmaps, drops or moves waits until its event is read here, and is followed.
//!
//! # Safety
//! Copies go to another process by its userfaultfd; their source is a live shadow.
//!
//! # Locking
//! None. The caller holds the lock of the range whose shadow it gives.
//!
//! # Limits
//! A child of the child that is forked before this is done gets nothing. Only /proc/thread-self/smaps tells which mappings a fork
//! wipes; it is read once for each child, and only if there is anything to fill.

use rustix::fd::AsFd;
use rustix::fs::OFlags;

use super::features::Features;
use super::message::{self, Message};
use super::sys::{self, Partial};
use super::{Host, PATIENCE, PAUSE};
use crate::ground::addr::{PAGE_SHIFT, PageMask, SZ_4K, Span};
use crate::ground::error::Errno;
use crate::ground::fds::Kept;
use crate::space::ports::Shadow;

/// What makes a page of the parent go elsewhere in the child, or nowhere.
#[derive(Debug, Clone, Copy)]
enum Change {
    Gone(Span),
    Moved { from: Span, to: Span },
}

/// See the module's documentation. The child's other waiters go on when it is dropped.
pub struct Child<'a> {
    host: &'a Host,
    uffd: Kept,
    /// In the order in which they happened; `None` before anything was to be filled.
    changes: Option<Vec<Change>>,
    ended: bool,
}

impl Host {
    /// The child whose userfaultfd this is.
    pub fn child(&self, uffd: Kept) -> Child<'_> {
        Child { host: self, uffd, changes: None, ended: false }
    }
}

impl Child<'_> {
    /// Fills the child's holes at `pages` of `app` with those of `shadow`. Without one, or where that cannot be done, the
    /// child gets SIGBUS there, never zeroes.
    pub fn give(&mut self, app: Span, pages: &PageMask, shadow: Option<&Shadow>) {
        let mut lost = PageMask::EMPTY;
        for (first, count) in pages.runs() {
            let (mut at, end) = (first, first + count);
            // Mappings end where nobody knows: halved until a run fits, doubled again afterwards.
            let mut limit = count;
            let mut tries = 0;
            while at < end && !self.ended {
                let Some(to) = self.run(app, at, end.min(at + limit)) else {
                    at += 1;
                    continue;
                };
                let there = to.pages();
                let filled = match shadow {
                    Some(shadow) => self.copy(to, shadow.span.page_run(at, there)),
                    None => self.poison(to),
                };
                let Err(Partial { done, errno }) = filled else {
                    (at, limit, tries) = (at + there, limit.saturating_mul(2), 0);
                    continue;
                };
                at += (done >> PAGE_SHIFT) as usize;
                if done > 0 {
                    continue;
                }
                match errno.0 {
                    libc::EAGAIN if tries < PATIENCE => {
                        tries += 1;
                        if !self.follow() {
                            std::thread::sleep(PAUSE);
                        }
                    }
                    // It has this page already.
                    libc::EEXIST => at += 1,
                    libc::ENOENT if there > 1 => limit = there / 2,
                    // No such mapping in the child.
                    libc::ENOENT => (at, limit) = (at + 1, 2),
                    libc::ESRCH => self.ended = true,
                    _ => {
                        if shadow.is_none() {
                            tracing::error!(%errno, span = %to, "a forked child reads zeroes instead of this memory");
                        }
                        lost.set_run(at, there);
                        (at, tries) = (at + there, 0);
                    }
                }
            }
        }
        if !lost.is_empty() && shadow.is_some() {
            tracing::error!(span = %app, pages = lost.count(), "a forked child does not have this memory");
            self.give(app, &lost, None);
        }
    }

    fn copy(&self, to: Span, from: Span) -> Result<(), Partial> {
        // SAFETY: fills holes of another process; the source is a live shadow.
        unsafe { sys::uffd_copy(self.uffd.as_fd(), to.start, from.start, to.len()) }
    }

    fn poison(&self, to: Span) -> Result<(), Partial> {
        if !self.host.has(Features::POISON) {
            return Err(Partial { done: 0, errno: Errno(libc::EOPNOTSUPP) });
        }
        sys::uffd_poison(self.uffd.as_fd(), to)
    }

    /// Where pages from `at` on of `app` are in the child, as many in a row as there are before `end`. `None`: the first
    /// is nowhere.
    fn run(&mut self, app: Span, at: usize, end: usize) -> Option<Span> {
        let changes = self.changes.get_or_insert_with(wiped);
        let place = |page: usize| {
            let start = app.page_run(page, 1).start;
            changes.iter().try_fold(start, |addr, change| match change {
                Change::Gone(span) if span.contains(addr) => None,
                Change::Moved { from, to } if from.contains(addr) => Some(addr - from.start + to.start),
                Change::Moved { to, .. } if to.contains(addr) => None,
                _ => Some(addr),
            })
        };
        let start = place(at)?;
        let mut len = SZ_4K;
        for page in at + 1..end {
            if place(page) != Some(start + len) {
                break;
            }
            len += SZ_4K;
        }
        Some(Span::sized(start, len))
    }

    /// Reads what the child did to its mappings. `false`: nothing that is known of.
    fn follow(&mut self) -> bool {
        let mut news = Vec::new();
        if message::read_from(self.uffd.as_fd(), &mut news).is_err() {
            return false;
        }
        let changes = self.changes.get_or_insert_with(wiped);
        let before = changes.len();
        for message in news {
            match message {
                Message::Unmap(span) | Message::Remove(span) => changes.push(Change::Gone(span)),
                Message::Remap { from, to, len } => {
                    changes.push(Change::Moved { from: Span::sized(from, len), to: Span::sized(to, len) });
                }
                Message::Fork(_) => tracing::error!("a child of a forked child does not have all its memory"),
                // Filled in its turn, or served by the kernel at the end.
                Message::Fault { .. } => {}
            }
        }
        changes.len() > before
    }
}

/// The mappings that a fork leaves empty in the child (MADV_WIPEONFORK).
fn wiped() -> Vec<Change> {
    match read_wiped() {
        Ok(changes) => changes,
        Err(errno) => {
            tracing::warn!(%errno, "/proc/thread-self/smaps: a forked child may get what MADV_WIPEONFORK should keep from it");
            Vec::new()
        }
    }
}

fn read_wiped() -> sys::Result<Vec<Change>> {
    let file = sys::open("/proc/thread-self/smaps", OFlags::RDONLY)?;
    let (mut buf, mut found, mut mapping) = (Vec::new(), Vec::new(), None);
    loop {
        let kept = buf.len();
        buf.resize(kept + 4096, 0);
        let got = match sys::read(&file, &mut buf[kept..]) {
            Err(Errno(libc::EINTR)) => 0,
            Ok(0) => return Ok(found),
            other => other?,
        };
        buf.truncate(kept + got);
        let lines = buf.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
        for line in buf[..lines].split(|&b| b == b'\n') {
            if let Some(flags) = line.strip_prefix(b"VmFlags:") {
                let wiped = flags.split(u8::is_ascii_whitespace).any(|flag| flag == b"wf");
                found.extend(mapping.take().filter(|_| wiped).map(Change::Gone));
            } else if let Some(span) = head(line) {
                mapping = Some(span);
            }
        }
        buf.drain(..lines);
    }
}

/// The span at the start of a mapping's first line, e.g. `7f00-7f10 rw-p …`.
fn head(line: &[u8]) -> Option<Span> {
    let first = line.split(u8::is_ascii_whitespace).next()?;
    let (start, end) = std::str::from_utf8(first).ok()?.split_once('-')?;
    let hex = |s: &str| u64::from_str_radix(s, 16).ok();
    let (start, end) = (hex(start)?, hex(end)?);
    (start < end).then(|| Span::new(start, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_first_lines_have_a_span() {
        assert_eq!(
            head(b"7f001000-7f003000 rw-p 00000000 00:00 0 [heap]"),
            Some(Span::new(0x7f00_1000, 0x7f00_3000))
        );
        for other in
            ["", "Size:                  4 kB", "VmFlags: rd wr mr mw me ac sd", "THPeligible:    1", "3-2 x"]
        {
            assert_eq!(head(other.as_bytes()), None, "{other}");
        }
    }
}
