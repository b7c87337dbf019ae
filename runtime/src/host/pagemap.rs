//! Which pages are there, huge, registered, or written.
//!
//! # Overview
//! One PAGEMAP_SCAN answers each question for a span of at most 2 MiB; where the kernel lacks it, /proc/thread-self/pagemap
//! and /proc/thread-self/smaps answer slower.
//!
//! What counts as present: pages in memory or in swap, zero pages included ([`super::flip`] moves these too). A guard
//! region (MADV_GUARD_INSTALL) is a hole. A mere write-protect marker cannot be told from a swapped page until
//! somebody tries to move it.
//!
//! # Locking
//! None: the descriptor is only read.
//!
//! # Limits
//! A poisoned page looks like a swapped one: it is present and does not flip. Without PAGEMAP_SCAN and without the
//! right to see frame numbers (CAP_SYS_ADMIN) no page is known to be huge.

use super::features::Features;
use super::sys::{self, ScanFor};
use crate::ground::addr::{PAGE_SHIFT, PageMask, SZ_2M, SZ_4K, Span};
use crate::ground::error::Errno;
use crate::ground::fds::Kept;
use linux_raw_sys::general as uapi;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};

const PRESENT: u64 = uapi::PAGE_IS_PRESENT as u64;
const SWAPPED: u64 = uapi::PAGE_IS_SWAPPED as u64;
const WRITTEN: u64 = uapi::PAGE_IS_WRITTEN as u64;
const WPALLOWED: u64 = uapi::PAGE_IS_WPALLOWED as u64;
const HUGE: u64 = uapi::PAGE_IS_HUGE as u64;
const PFNZERO: u64 = uapi::PAGE_IS_PFNZERO as u64;
const GUARD: u64 = uapi::PAGE_IS_GUARD as u64;

const EMPTY_REGION: uapi::page_region = uapi::page_region { start: 0, end: 0, categories: 0 };

/// Bits of a word of /proc/thread-self/pagemap.
mod word {
    pub(super) const PRESENT: u64 = 1 << 63;
    pub(super) const SWAPPED: u64 = 1 << 62;
    pub(super) const GUARD: u64 = 1 << 58;
    pub(super) const WRITE_PROTECTED: u64 = 1 << 57;
    pub(super) const FRAME: u64 = (1 << 55) - 1;
}

/// What a scan of a span says, each as pages from its start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Pages {
    /// In memory or in swap.
    pub(super) present: PageMask,
    /// In memory as part of a huge page.
    pub(super) huge: PageMask,
    /// The zero page.
    pub(super) zero: PageMask,
    /// Not in memory and write-protected: swapped out, or a mere marker in a hole. These are in `present`, too.
    pub(super) doubtful: PageMask,
    /// Present, in a mapping registered with userfaultfd for asynchronous write protection; `None` where the kernel
    /// cannot tell.
    pub(super) registered: Option<PageMask>,
}

/// The reader of page state.
#[derive(Debug)]
pub(super) struct Pagemap {
    file: Kept,
    scan: bool,
    /// Registered mappings show as WPALLOWED.
    marks_registered: bool,
    /// Write protection resolves itself.
    tracks: bool,
}

impl Pagemap {
    pub(super) fn new(file: OwnedFd, features: Features) -> Self {
        let asynchronous = Features::WP_ASYNC | Features::WP_UNPOPULATED;
        let scan = features.contains(Features::PAGEMAP_SCAN);
        Self {
            file: Kept::new(file),
            scan,
            marks_registered: scan && features.contains(asynchronous),
            tracks: features.contains(Features::WP_ASYNC),
        }
    }

    /// What is in `span`.
    pub(super) fn pages(&self, span: Span) -> Result<Pages, Errno> {
        if !self.scan {
            return self.pages_by_read(span);
        }
        let what = ScanFor {
            all: 0,
            any: PRESENT | SWAPPED,
            report: PRESENT | SWAPPED | HUGE | PFNZERO | WPALLOWED | GUARD | WRITTEN,
            arm: false,
        };
        let mut registered = PageMask::EMPTY;
        let mut pages = Pages::default();
        let scanned = self.scan(span, what, |run, categories| {
            let marker = categories & PRESENT == 0 && categories & GUARD != 0;
            if marker {
                return;
            }
            if categories & (PRESENT | WRITTEN) == 0 {
                pages.doubtful.set_run(run.0, run.1);
            }
            for (bit, mask) in [
                (PRESENT | SWAPPED, &mut pages.present),
                (HUGE, &mut pages.huge),
                (PFNZERO, &mut pages.zero),
                (WPALLOWED, &mut registered),
            ] {
                if categories & bit != 0 {
                    mask.set_run(run.0, run.1);
                }
            }
        });
        match scanned {
            Ok(()) => {}
            Err(_) => return self.pages_by_read(span),
        }
        pages.registered = self.marks_registered.then_some(registered);
        Ok(pages)
    }

    /// The first page from `from` to `end` that is there; `from` where the kernel has no quick way to tell.
    pub(super) fn next_present(&self, from: u64, end: u64) -> Option<u64> {
        if !self.scan || from >= end {
            return (from < end).then_some(from);
        }
        let what = ScanFor { all: PRESENT, any: 0, report: PRESENT, arm: false };
        let mut region = [EMPTY_REGION; 1];
        let found = sys::pagemap_scan(self.file.as_fd(), Span::new(from, end), what, &mut region).ok()?;
        (found > 0).then_some(region[0].start)
    }

    fn pages_by_read(&self, span: Span) -> Result<Pages, Errno> {
        let mut pages = Pages::default();
        let mut frames = [0; PageMask::CAPACITY];
        self.words(span, |page, word| {
            if word & (word::PRESENT | word::SWAPPED) != 0 && word & word::GUARD == 0 {
                pages.present.set(page);
            }
            if word & word::SWAPPED != 0 && word & word::WRITE_PROTECTED != 0 {
                pages.doubtful.set(page);
            }
            frames[page] = if word & word::PRESENT != 0 { word & word::FRAME } else { 0 };
        })?;
        // One aligned block of consecutive frames behind one aligned span.
        let block = frames[0] != 0 && frames[0] % (SZ_2M / SZ_4K) == 0;
        if span.len() == SZ_2M && block && frames.windows(2).all(|f| f[1] == f[0] + 1) {
            pages.huge = PageMask::first(span.pages());
        }
        Ok(pages)
    }

    /// Pages of `span` that are there and were written since they were armed; they are armed again in the same step, so
    /// that no store falls between. ENOTSUP where the kernel has no such step.
    pub(super) fn take_written(&self, span: Span) -> Result<PageMask, Errno> {
        if !self.scan {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        let mut mask = PageMask::EMPTY;
        // Asking for more than WRITTEN alone keeps the kernel off its short cut, which counts holes as written.
        let what = ScanFor { all: WRITTEN, any: PRESENT | SWAPPED, report: WRITTEN | PRESENT, arm: true };
        self.scan(span, what, |(first, count), _| mask.set_run(first, count))?;
        Ok(mask)
    }

    /// Arms the pages of `span` that are there, so that [`Pagemap::take_written`] tells which are written from now on.
    ///
    /// PAGEMAP_SCAN, which keeps a huge page huge, skips holes (a marker left in a hole would stop a flip), and is four
    /// times cheaper on small pages than UFFDIO_WRITEPROTECT, the fallback.
    pub(super) fn arm(&self, uffd: BorrowedFd<'_>, span: Span) -> Result<(), Errno> {
        if !self.tracks {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        if self.marks_registered {
            let what = ScanFor { all: 0, any: PRESENT | SWAPPED, report: PRESENT, arm: true };
            match self.scan(span, what, |_, _| {}) {
                // The mapping is not registered (any more).
                Err(errno @ Errno(libc::EPERM)) => return Err(errno),
                Err(errno) => tracing::debug!(%errno, "PAGEMAP_SCAN failed; using UFFDIO_WRITEPROTECT"),
                Ok(()) => return Ok(()),
            }
        }
        let present = self.pages(span)?.present;
        for (first, count) in present.runs() {
            sys::uffd_write_protect(uffd, span.page_run(first, count), true)?;
        }
        Ok(())
    }

    /// Whether [`Pagemap::registered`] has answers.
    pub(super) fn tells_registered(&self) -> bool {
        self.marks_registered
    }

    /// Whether all of `span`, of any length, is in mappings registered with userfaultfd; `None` where the kernel cannot tell.
    pub(super) fn registered(&self, span: Span) -> Option<bool> {
        if !self.marks_registered {
            return None;
        }
        let what = ScanFor { all: WPALLOWED, any: 0, report: WPALLOWED, arm: false };
        let mut end = span.start;
        let mut regions = [EMPTY_REGION; 64];
        while end < span.end {
            let rest = Span::new(end, span.end);
            let found = sys::pagemap_scan(self.file.as_fd(), rest, what, &mut regions).ok()?;
            for region in &regions[..found] {
                if region.start != end {
                    return Some(false);
                }
                end = region.end;
            }
            if found == 0 {
                return Some(false);
            }
        }
        Some(true)
    }

    /// The pages of `span`, of 2 MiB at most, that are in such mappings; `None` where the kernel cannot tell.
    pub(super) fn registered_pages(&self, span: Span) -> Option<PageMask> {
        if !self.marks_registered {
            return None;
        }
        let what = ScanFor { all: WPALLOWED, any: 0, report: WPALLOWED, arm: false };
        let mut mask = PageMask::EMPTY;
        self.scan(span, what, |(first, count), _| mask.set_run(first, count)).ok()?;
        Some(mask)
    }

    fn scan(
        &self,
        span: Span,
        what: ScanFor,
        mut each: impl FnMut((usize, usize), u64),
    ) -> Result<(), Errno> {
        debug_assert!(span.len() <= SZ_2M);
        // As many as there can be, so that one call tells all.
        let mut regions = [EMPTY_REGION; PageMask::CAPACITY];
        let found = sys::pagemap_scan(self.file.as_fd(), span, what, &mut regions)?;
        for region in regions.iter().take(found) {
            let run = Span::new(region.start, region.end);
            each((span.page_index(run.start), run.pages()), region.categories);
        }
        Ok(())
    }

    fn words(&self, span: Span, mut each: impl FnMut(usize, u64)) -> Result<(), Errno> {
        let mut words = [0u64; PageMask::CAPACITY];
        let pages = span.pages();
        let mut at = 0;
        while at < pages {
            let addr = span.start + ((at as u64) << PAGE_SHIFT);
            match sys::pagemap_read(self.file.as_fd(), addr, &mut words[at..pages])? {
                0 => break,
                got => at += got,
            }
        }
        words[..at].iter().enumerate().for_each(|(page, &word)| each(page, word));
        Ok(())
    }
}

/// The parts of `span` whose mappings have the flag of a userfaultfd registration, ascending, by /proc/thread-self/smaps: slow
/// (the kernel walks all page tables), for kernels without PAGEMAP_SCAN.
fn by_smaps(span: Span) -> Option<Vec<Span>> {
    crate::ground::inject::check(crate::ground::inject::Call::Open).ok()?;
    let text = std::fs::read("/proc/thread-self/smaps").ok()?;
    let text = String::from_utf8_lossy(&text);
    let mut found = Vec::new();
    let mut current = None;
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if flags.split_ascii_whitespace().any(|f| f == "um") {
                found.extend(current);
            }
        } else if let Some(vma) = smaps_header(line) {
            if vma.start >= span.end {
                break;
            }
            current = vma.intersect(span);
        }
    }
    Some(found)
}

/// Whether all of `span` is registered; slow.
pub(super) fn all_registered_by_smaps(span: Span) -> Option<bool> {
    let parts = by_smaps(span)?;
    let end = parts.iter().fold(span.start, |end, part| if part.start == end { part.end } else { end });
    Some(end == span.end)
}

/// The registered pages of `span`, of 2 MiB at most; slow.
pub(super) fn registered_by_smaps(span: Span) -> Option<PageMask> {
    let parts = by_smaps(span)?;
    Some(parts.into_iter().fold(PageMask::EMPTY, |mask, part| mask.or(&PageMask::of(span, part))))
}

/// The span of a line that starts a mapping.
fn smaps_header(line: &str) -> Option<Span> {
    let (start, end) = line.split_ascii_whitespace().next()?.split_once('-')?;
    let hex = |s: &str| u64::from_str_radix(s, 16).ok();
    Some(Span::new(hex(start)?, hex(end)?))
}
