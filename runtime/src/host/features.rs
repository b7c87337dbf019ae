#![allow(unsafe_code)]
//! What this kernel lets this process do, found by trying.
//!
//! # Overview
//! Opening climbs down a ladder: /dev/userfaultfd, the system call, the system call for user-mode faults only.
//! Features are probed with a throw-away descriptor and with real calls, never by kernel version. [`Report`] keeps
//! what was found and what was refused, with the errno and the command that fixes it: `usvm doctor` prints it.
//!
//! # Safety
//! The probe of UFFDIO_MOVE moves pages between mappings that it made itself and never refers into.
//!
//! # Locking
//! None.
//!
//! # Limits
//! A feature that the probe finds may still be refused later (seccomp filters can change); callers handle errors.

use super::sys::{self, RegisterMode, ScanFor};
use crate::ground::addr::{SZ_4K, Span};
use crate::ground::error::{Errno, Error, Result};
use linux_raw_sys::general as uapi;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::OFlags;
use std::fmt;

bitflags::bitflags! {
    /// What the host floor can use.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Features: u32 {
        /// Faults taken inside system calls are caught, too (not UFFD_USER_MODE_ONLY).
        const KERNEL_FAULTS = 1 << 0;
        /// Write protection (Linux 5.7).
        const WP = 1 << 1;
        /// Write protection that resolves itself and only marks the page (Linux 6.7).
        const WP_ASYNC = 1 << 2;
        /// Write protection of what is not there yet (Linux 6.4); PAGEMAP_SCAN asks for it.
        const WP_UNPOPULATED = 1 << 3;
        /// UFFDIO_MOVE (Linux 6.8).
        const MOVE = 1 << 4;
        /// UFFDIO_MOVE moves zero pages as such (Linux 6.9); otherwise they are made real first.
        const MOVE_ZERO_PAGES = 1 << 5;
        /// UFFDIO_POISON (Linux 6.6).
        const POISON = 1 << 6;
        /// The PAGEMAP_SCAN ioctl (Linux 6.7).
        const PAGEMAP_SCAN = 1 << 7;
        /// The PROCMAP_QUERY ioctl (Linux 6.11).
        const PROCMAP_QUERY = 1 << 8;
        /// fork(2) is told (needs CAP_SYS_PTRACE).
        const EVENT_FORK = 1 << 9;
        /// mremap(2) is told.
        const EVENT_REMAP = 1 << 10;
        /// madvise(2) that drops pages is told.
        const EVENT_REMOVE = 1 << 11;
        /// munmap(2) is told.
        const EVENT_UNMAP = 1 << 12;
        /// Faults name their thread.
        const THREAD_ID = 1 << 13;
        /// Faults give the exact address.
        const EXACT_ADDRESS = 1 << 14;
    }
}

/// Each feature with its bit in UFFDIO_API, where it has one, and since when the kernel has it.
const TABLE: &[(Features, u32, &str)] = &[
    (Features::WP, uapi::UFFD_FEATURE_PAGEFAULT_FLAG_WP, "5.7"),
    (Features::WP_ASYNC, uapi::UFFD_FEATURE_WP_ASYNC, "6.7"),
    (Features::WP_UNPOPULATED, uapi::UFFD_FEATURE_WP_UNPOPULATED, "6.4"),
    (Features::MOVE, uapi::UFFD_FEATURE_MOVE, "6.8"),
    (Features::POISON, uapi::UFFD_FEATURE_POISON, "6.6"),
    (Features::EVENT_FORK, uapi::UFFD_FEATURE_EVENT_FORK, "4.11"),
    (Features::EVENT_REMAP, uapi::UFFD_FEATURE_EVENT_REMAP, "4.11"),
    (Features::EVENT_REMOVE, uapi::UFFD_FEATURE_EVENT_REMOVE, "4.11"),
    (Features::EVENT_UNMAP, uapi::UFFD_FEATURE_EVENT_UNMAP, "4.11"),
    (Features::THREAD_ID, uapi::UFFD_FEATURE_THREAD_ID, "4.14"),
    (Features::EXACT_ADDRESS, uapi::UFFD_FEATURE_EXACT_ADDRESS, "5.18"),
    (Features::KERNEL_FAULTS, 0, "4.3"),
    (Features::MOVE_ZERO_PAGES, 0, "6.9"),
    (Features::PAGEMAP_SCAN, 0, "6.7"),
    (Features::PROCMAP_QUERY, 0, "6.11"),
];

impl Features {
    /// The bits of UFFDIO_API for these.
    fn to_kernel(self) -> u64 {
        TABLE.iter().filter(|(f, ..)| self.contains(*f)).map(|(_, bit, _)| u64::from(*bit)).sum()
    }

    /// The features for bits of UFFDIO_API.
    fn from_kernel(bits: u64) -> Self {
        TABLE
            .iter()
            .filter(|(_, bit, _)| *bit != 0 && bits & u64::from(*bit) != 0)
            .map(|(f, ..)| *f)
            .collect()
    }
}

/// How the userfaultfd was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Way {
    /// /dev/userfaultfd.
    Device,
    /// userfaultfd(2).
    Syscall,
    /// userfaultfd(2) with UFFD_USER_MODE_ONLY: system calls that touch a missing page fail with EFAULT.
    UserModeOnly,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::Device => "/dev/userfaultfd",
            Way::Syscall => "userfaultfd(2)",
            Way::UserModeOnly => "userfaultfd(2), user-mode faults only",
        })
    }
}

/// Why a feature is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// The options said so.
    Forbidden,
    /// The kernel does not offer it.
    Absent,
    /// The kernel refused it to this process.
    Refused(Errno),
}

/// A feature that was wanted and is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Which.
    pub feature: Features,
    /// Why.
    pub why: Why,
    /// What the user can do about it.
    pub fix: String,
}

/// What was found. `usvm doctor` prints it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// What works and is switched on.
    pub has: Features,
    /// How the userfaultfd was opened.
    pub way: Way,
    /// Ways that were tried before and why they failed.
    pub failed_ways: Vec<(Way, Errno)>,
    /// What is missing.
    pub refused: Vec<Refusal>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "userfaultfd by {}", self.way)?;
        for (way, errno) in &self.failed_ways {
            writeln!(f, "  {way}: {errno}")?;
        }
        for (feature, ..) in TABLE.iter().filter(|(feature, ..)| self.has.contains(*feature)) {
            writeln!(f, "  {}: yes", name(*feature))?;
        }
        for r in &self.refused {
            let why = match r.why {
                Why::Forbidden => "switched off".to_owned(),
                Why::Absent => "not in this kernel".to_owned(),
                Why::Refused(errno) => errno.to_string(),
            };
            writeln!(f, "  {}: no ({why}); {}", name(r.feature), r.fix)?;
        }
        Ok(())
    }
}

/// The name of one feature, for people.
fn name(feature: Features) -> String {
    feature.iter_names().map(|(n, _)| n.to_lowercase()).collect::<Vec<_>>().join("+")
}

/// What to use and what to leave alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Ask for user-mode faults only, even where more is allowed.
    pub user_mode_only: bool,
    /// Features to do without, as if the kernel lacked them.
    pub forbid: Features,
    /// The largest piece of shadow area mapped at once, in bytes.
    pub arena_max: u64,
    /// Prepared huge pages to hold ready in the background.
    pub prepared: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { user_mode_only: false, forbid: Features::empty(), arena_max: 1 << 30, prepared: 8 }
    }
}

/// Opens a userfaultfd with all it can have, and says what that is. `pagemap` and `maps` are this process's files.
pub(super) fn open(
    options: &Options,
    pagemap: BorrowedFd<'_>,
    maps: BorrowedFd<'_>,
) -> Result<(OwnedFd, Report)> {
    let mut probe = Probe { refused: Vec::new(), options, has: Features::empty() };
    let mut failed_ways = Vec::new();
    let (throw_away, way) = climb(options, &mut failed_ways)?;
    let offered = sys::uffd_api(throw_away.as_fd(), 0).map_err(|e| Error::os("UFFDIO_API", e))?;
    drop(throw_away);
    probe.userfaultfd(Features::from_kernel(offered), way);
    let uffd = probe.switch_on(way)?;
    probe.files(pagemap, maps);
    probe.zero_pages(way);
    probe.implied();
    let Probe { refused, has, .. } = probe;
    Ok((uffd, Report { has, way, failed_ways, refused }))
}

fn open_way(way: Way) -> std::result::Result<OwnedFd, Errno> {
    match way {
        Way::Device => sys::uffd_from_device(),
        Way::Syscall => sys::uffd_from_syscall(false),
        Way::UserModeOnly => sys::uffd_from_syscall(true),
    }
}

/// The first way that works.
fn climb(options: &Options, failed: &mut Vec<(Way, Errno)>) -> Result<(OwnedFd, Way)> {
    let ladder: &[Way] = if options.user_mode_only || options.forbid.contains(Features::KERNEL_FAULTS) {
        &[Way::UserModeOnly]
    } else {
        &[Way::Device, Way::Syscall, Way::UserModeOnly]
    };
    for &way in ladder {
        match open_way(way) {
            Ok(fd) => return Ok((fd, way)),
            Err(errno) => failed.push((way, errno)),
        }
    }
    let last = failed.last().map_or(Errno(libc::ENOSYS), |(_, e)| *e);
    Err(Error::os("userfaultfd (is it compiled in, and allowed by the seccomp filter?)", last))
}

struct Probe<'a> {
    refused: Vec<Refusal>,
    options: &'a Options,
    has: Features,
}

impl Probe<'_> {
    fn refuse(&mut self, feature: Features, why: Why) {
        self.has.remove(feature);
        if self.refused.iter().any(|r| r.feature == feature) {
            return;
        }
        let fix = match why {
            Why::Forbidden => "switched off by an option".to_owned(),
            _ => fix(feature),
        };
        self.refused.push(Refusal { feature, why, fix });
    }

    /// Takes `feature` if `tried` says that it works and no option forbids it.
    fn judge(&mut self, feature: Features, tried: std::result::Result<(), Why>) {
        if self.options.forbid.contains(feature) {
            self.refuse(feature, Why::Forbidden);
        } else if let Err(why) = tried {
            self.refuse(feature, why);
        } else {
            self.has.insert(feature);
        }
    }

    fn userfaultfd(&mut self, offered: Features, way: Way) {
        for &(feature, bit, _) in TABLE {
            if bit != 0 {
                self.judge(feature, if offered.contains(feature) { Ok(()) } else { Err(Why::Absent) });
            }
        }
        let kernel = match way {
            Way::UserModeOnly if self.options.user_mode_only => Err(Why::Forbidden),
            Way::UserModeOnly => Err(Why::Refused(Errno(libc::EPERM))),
            _ => Ok(()),
        };
        self.judge(Features::KERNEL_FAULTS, kernel);
    }

    /// A descriptor with what is left switched on; EVENT_FORK is given up first when the kernel says no.
    fn switch_on(&mut self, way: Way) -> Result<OwnedFd> {
        let mut last = Errno(libc::EPERM);
        for give_up in [Features::empty(), Features::EVENT_FORK, Features::all()] {
            let uffd = open_way(way).map_err(|e| Error::os("userfaultfd", e))?;
            match sys::uffd_api(uffd.as_fd(), self.has.difference(give_up).to_kernel()) {
                Ok(_) => {
                    let lost = self.has.intersection(give_up).iter().filter(|f| f.to_kernel() != 0);
                    for feature in lost.collect::<Vec<_>>() {
                        self.refuse(feature, Why::Refused(last));
                    }
                    return Ok(uffd);
                }
                Err(errno) => last = errno,
            }
        }
        Err(Error::os("UFFDIO_API", last))
    }

    fn files(&mut self, pagemap: BorrowedFd<'_>, maps: BorrowedFd<'_>) {
        let here = Span::sized(1 << 20, SZ_4K);
        let present = u64::from(uapi::PAGE_IS_PRESENT);
        let scan = ScanFor { all: present, any: 0, report: present, arm: false };
        let mut regions = [uapi::page_region { start: 0, end: 0, categories: 0 }; 1];
        let scanned = sys::pagemap_scan(pagemap, here, scan, &mut regions);
        self.judge(Features::PAGEMAP_SCAN, scanned.map(drop).map_err(Why::Refused));
        let queried = sys::procmap_query(maps, 0, &mut []);
        self.judge(Features::PROCMAP_QUERY, queried.map(drop).map_err(Why::Refused));
    }

    /// Tries UFFDIO_MOVE on a zero page, with a descriptor and memory of its own.
    fn zero_pages(&mut self, way: Way) {
        if !self.has.contains(Features::MOVE) {
            self.refuse(Features::MOVE_ZERO_PAGES, Why::Absent);
            return;
        }
        let tried = open_way(way).and_then(|uffd| {
            sys::uffd_api(uffd.as_fd(), self.has.difference(Features::EVENT_FORK).to_kernel())?;
            let span = sys::reserve(4 * SZ_4K)?;
            let moved = move_zero_page(uffd.as_fd(), span);
            drop(uffd);
            // SAFETY: reserved above, and nothing refers into it.
            unsafe { sys::unmap(span) }?;
            moved
        });
        self.judge(Features::MOVE_ZERO_PAGES, tried.map_err(Why::Refused));
    }

    /// Takes away what cannot work without something else that is missing.
    fn implied(&mut self) {
        // The shadow area is registered for write protection only, so that its missing pages are the kernel's.
        if !self.has.contains(Features::WP) {
            self.refuse(Features::MOVE, Why::Absent);
            self.refuse(Features::WP_ASYNC, Why::Absent);
        }
        if !self.has.contains(Features::MOVE) {
            self.refuse(Features::MOVE_ZERO_PAGES, Why::Absent);
        }
    }
}

/// Moves the zero page at the start of `span` to its middle.
fn move_zero_page(uffd: BorrowedFd<'_>, span: Span) -> std::result::Result<(), Errno> {
    let (src, dst) = (span.page_run(0, 1), span.page_run(2, 1));
    // SAFETY: the caller made `span`; nothing refers into it.
    unsafe { sys::protect(span, true) }?;
    sys::uffd_register(uffd, dst, RegisterMode { missing: false, write_protect: true })?;
    // SAFETY: populating adds pages and takes none away.
    unsafe { sys::advise(src, rustix::mm::Advice::LinuxPopulateRead) }?;
    // SAFETY: as above.
    unsafe { sys::uffd_move(uffd, dst.start, src.start, SZ_4K, false) }.map_err(|p| p.errno)
}

/// What the user can do to have `feature`.
pub(crate) fn fix(feature: Features) -> String {
    let since = TABLE.iter().find(|(f, ..)| *f == feature).map_or("", |(_, _, since)| *since);
    match feature {
        Features::KERNEL_FAULTS => "allow it: sudo setfacl -m u:$USER:rw /dev/userfaultfd \
             (or: sudo sysctl vm.unprivileged_userfaultfd=1)"
            .to_owned(),
        Features::EVENT_FORK => {
            "fork is seen by pthread_atfork only; for the event too run it with CAP_SYS_PTRACE: \
             sudo capsh --caps=\"cap_sys_ptrace+eip cap_setpcap,cap_setuid,cap_setgid+ep\" --keep=1 --user=$USER \
             --addamb=cap_sys_ptrace -- -c '<command>'"
                .to_owned()
        }
        _ => format!("needs Linux {since} or newer; usvm falls back, slower"),
    }
}

/// A file about this process, which nothing here works without.
pub(super) fn proc_file(path: &'static str) -> Result<OwnedFd> {
    sys::open(path, OFlags::RDONLY).map_err(|e| Error::os(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(options: Options) -> Report {
        let (pagemap, maps) =
            ["/proc/thread-self/pagemap", "/proc/thread-self/maps"].map(|p| proc_file(p).unwrap()).into();
        open(&options, pagemap.as_fd(), maps.as_fd()).unwrap().1
    }

    #[test]
    fn kernel_bits_and_features_translate_both_ways() {
        for (feature, bit, _) in TABLE {
            assert_eq!(feature.to_kernel(), u64::from(*bit));
            if *bit != 0 {
                assert_eq!(Features::from_kernel((*bit).into()), *feature);
            }
        }
        let mut seen = Features::empty();
        TABLE.iter().for_each(|(f, ..)| seen.insert(*f));
        assert_eq!(seen, Features::all(), "every feature is in the table");
    }

    #[test]
    fn forbidden_features_stay_off_and_are_reported() {
        let forbid = Features::MOVE | Features::PAGEMAP_SCAN | Features::PROCMAP_QUERY;
        let report = probe(Options { forbid, ..Options::default() });
        assert!(report.has.intersection(forbid | Features::MOVE_ZERO_PAGES).is_empty(), "{report}");
        for feature in forbid.iter() {
            assert!(report.refused.iter().any(|r| r.feature == feature && r.why == Why::Forbidden));
        }
        assert!(report.to_string().contains("pagemap_scan: no (switched off)"), "{report}");
    }

    #[test]
    fn user_mode_only_opens_and_names_the_fix() {
        let report = probe(Options { user_mode_only: true, ..Options::default() });
        assert_eq!(report.way, Way::UserModeOnly);
        assert!(!report.has.contains(Features::KERNEL_FAULTS));
        let open = probe(Options::default());
        if open.way == Way::UserModeOnly {
            assert!(open.to_string().contains("setfacl"), "{open}");
        } else {
            assert!(open.has.contains(Features::KERNEL_FAULTS), "{open}");
        }
    }
}
