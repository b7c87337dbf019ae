//! The live page: what `usvm top` and `usvm stats PID` look at while a program runs.
//!
//! # Overview
//! A running usvm holds a small memory file named [`NAME`], made by [`Page::create`]. It has no path: a viewer finds it
//! among the process's descriptors under /proc, so the kernel's own rule for looking into another process (the ptrace
//! access check) decides who may, and nothing stays behind when the process ends, however it ends.
//!
//! The page is a header of eight 64-bit words and a text:
//!
//! | word | what |
//! |---|---|
//! | 0 | [`MAGIC`] |
//! | 1 | version of this layout, 1 |
//! | 2 | bytes of the whole page |
//! | 3 | the process's id, as it sees itself |
//! | 4 | sequence number: odd while the text changes |
//! | 5 | written by viewers: each change of it asks for news |
//! | 6 | bytes of the text |
//! | 7 | zero |
//!
//! The text is one [`Live`] as JSON, so a viewer of another version reads what it knows and passes over the rest.
//!
//! Nobody looks most of the time, and then nothing is published: the housekeeping thread only reads word 5
//! ([`Page::is_watched`]). A viewer writes there ([`Viewer::ask`]) and gets news for [`PATIENCE`] after.
//!
//! # Locking
//! A sequence lock: one thread publishes, viewers read again when the number was odd or changed.
//!
//! # Limits
//! A program that closes all descriptors that it does not know takes the page from its viewers (not from usvm, which
//! has it mapped), unless the preload library keeps usvm's descriptors from it; [`Viewer::open`] tells this apart from a process without usvm. A forked child does not have the page.
//!
//! # Safety
//! The mapping belongs to [`Page`] and is reached only through atomic words, because viewers write word 5 at any time. The
//! file cannot shrink (it is sealed), so the mapping stays whole. Viewers do not map it at all: they read and write
//! through their own descriptor, whatever the process behind it does.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::mm::{self, Advice, MapFlags, ProtFlags};
use serde::{Deserialize, Serialize};

use crate::ground::error::{Errno, Error, Result};
use crate::ground::fds::{self, Kept};
use crate::ground::inject::{self, Call};
use crate::observe::stats::StatsSnapshot;

/// The memory file's name.
pub const NAME: &str = "usvm-live";

/// What /proc shows as the target of its descriptor.
const LINK: &str = "/memfd:usvm-live (deleted)";

/// The first word: "USVMLIVE".
pub const MAGIC: u64 = u64::from_le_bytes(*b"USVMLIVE");

/// The version of the layout.
pub const VERSION: u64 = 1;

/// Bytes of the page. Memory is used only as far as the text reaches.
pub const SIZE: usize = 64 << 10;

/// Devices that a viewer takes from a page: more than a configuration may name.
pub const MOST_DEVICES: usize = 64;

/// Ranges that a viewer takes from a page: many times what usvm lists.
pub const MOST_RANGES: usize = 256;

/// How long news are published after a viewer last asked.
pub const PATIENCE: Duration = Duration::from_secs(3);

const HEADER: usize = 64;
const SEQUENCE: usize = 4;
const ASKED: usize = 5;
const LENGTH: usize = 6;

/// What is published.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Live {
    /// Version of usvm in the process.
    pub usvm: String,
    /// The process, as it sees itself.
    pub pid: u32,
    /// Microseconds since usvm started there: the clock of all rates.
    pub uptime_us: u64,
    /// The policy in force at the start.
    pub policy: String,
    /// Forced migrations per second; 0 without chaos.
    pub chaos_per_second: u64,
    /// The devices, by index.
    pub devices: Vec<LiveDevice>,
    /// The statistics.
    pub stats: StatsSnapshot,
    /// Ranges that there are.
    pub ranges: u64,
    /// The ranges that moved most, the most first.
    pub hottest: Vec<HotRange>,
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LiveDevice {
    /// Its name.
    pub name: String,
    /// Bytes of device memory.
    pub vram_bytes: u64,
    /// Bytes of it that are in use.
    pub allocated_bytes: u64,
    /// Bytes of application memory whose only current copy it holds.
    pub resident_bytes: u64,
    /// Bytes that host and device both hold.
    pub shared_bytes: u64,
    /// Bytes of host memory kept for what is on it.
    pub retained_bytes: u64,
}

/// One range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HotRange {
    /// First address.
    pub start: u64,
    /// Its length.
    pub bytes: u64,
    /// The device that it used last, by index.
    pub device: u32,
    /// Bytes of it that are on the device only.
    pub resident_bytes: u64,
    /// Whether host and device both hold it.
    pub shared: bool,
    /// Times it, or a part of it, went to a device.
    pub to_device: u32,
    /// Times it, or a part of it, came back.
    pub to_host: u32,
}

impl HotRange {
    /// Moves in both directions.
    pub fn moves(&self) -> u64 {
        u64::from(self.to_device) + u64::from(self.to_host)
    }
}

/// The process's own end.
#[derive(Debug)]
pub struct Page {
    words: *const AtomicU64,
    fd: AtomicI32,
    file_id: (u64, u64),
    owner: u32,
    watch: Mutex<Watch>,
}

#[derive(Debug, Default)]
struct Watch {
    asked: u64,
    last: Option<Instant>,
}

// SAFETY: the words are atomics in a mapping that lives as long as the value; everything else is Send and Sync itself.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    /// Makes the page of this process. It is empty until the first [`Page::publish`].
    ///
    /// # Errors
    /// [`Error::Os`] that names the call: a process without descriptors to spare runs without a page.
    pub fn create() -> Result<Self> {
        let file = sealed_file()?;
        let file_id = identity(file.as_fd())?;
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        inject::check(Call::Mmap).map_err(|e| Error::os("mmap", e))?;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nobody.
        let base = unsafe { mm::mmap(ptr::null_mut(), SIZE, flags, MapFlags::SHARED, &file, 0) }
            .map_err(|e| Error::os("mmap", e))?;
        let page = Self {
            words: base.cast_const().cast(),
            fd: AtomicI32::new(Kept::new(file).into_number()),
            file_id,
            owner: std::process::id(),
            watch: Mutex::default(),
        };
        for advice in [Advice::LinuxDontFork, Advice::LinuxDontDump] {
            inject::check(Call::Madvise).map_err(|e| Error::os("madvise", e))?;
            // SAFETY: exactly this mapping, and neither advice drops pages.
            unsafe { mm::madvise(base, SIZE, advice) }.map_err(|e| Error::os("madvise", e))?;
        }
        let header = [MAGIC, VERSION, SIZE as u64, u64::from(page.owner)];
        for (index, word) in header.into_iter().enumerate() {
            page.word(index).store(word, Ordering::Relaxed);
        }
        Ok(page)
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < SIZE / 8);
        // SAFETY: in bounds (just checked) of a mapping that lives as long as `self`, aligned as pages are, and only ever
        // accessed as atomics here; viewers' writes come from the kernel, a word at a time.
        unsafe { &*self.words.add(index) }
    }

    /// Whether a viewer asked for news within the last [`PATIENCE`]. Costs a load and a lock that nobody else wants.
    pub fn is_watched(&self) -> bool {
        let asked = self.word(ASKED).load(Ordering::Relaxed);
        let mut watch = self.watch.lock().unwrap_or_else(|p| p.into_inner());
        if watch.asked != asked {
            *watch = Watch { asked, last: Some(Instant::now()) };
        }
        watch.last.is_some_and(|last| last.elapsed() < PATIENCE)
    }

    /// Shows `live` to whoever looks. Called by one thread. When it is too long for the page, the coldest of its ranges
    /// are left out.
    pub fn publish(&self, live: &Live) {
        let mut text = encode(live);
        for keep in (0..live.hottest.len()).rev().step_by(8) {
            if text.len() <= SIZE - HEADER {
                break;
            }
            text = encode(&Live { hottest: live.hottest[..keep].to_vec(), ..live.clone() });
        }
        if text.len() > SIZE - HEADER {
            return;
        }
        let sequence = self.word(SEQUENCE);
        let before = sequence.load(Ordering::Relaxed);
        sequence.store(before.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.word(LENGTH).store(text.len() as u64, Ordering::Relaxed);
        for (index, piece) in text.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..piece.len()].copy_from_slice(piece);
            self.word(HEADER / 8 + index).store(u64::from_ne_bytes(word), Ordering::Relaxed);
        }
        sequence.store(before.wrapping_add(2), Ordering::Release);
    }

    /// Closes the descriptor, if the number still means the page: the program may have closed it and used it anew.
    pub fn close(&self) {
        let fd = self.fd.swap(-1, Ordering::AcqRel);
        if fd < 0 {
            return;
        }
        fds::forget(fd);
        // SAFETY: borrowed only to ask what it is; a number that is not open is an error of fstat.
        let still_ours = identity(unsafe { BorrowedFd::borrow_raw(fd) }).is_ok_and(|id| id == self.file_id);
        if still_ours {
            // SAFETY: the descriptor was made by `create`, and the swap above hands it out once.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.close();
        // A forked child did not inherit the mapping; something else may be at its address there.
        if std::process::id() == self.owner {
            // SAFETY: the mapping was made by `create`, and nothing borrows from a page that is dropped.
            let _ = unsafe { mm::munmap(self.words.cast_mut().cast(), SIZE) };
        }
    }
}

fn encode(live: &Live) -> Vec<u8> {
    serde_json::to_vec(live).expect("numbers and names are always JSON")
}

/// A memory file of the page's size that nobody can resize.
fn sealed_file() -> Result<OwnedFd> {
    let failed = |e: memfd::Error| {
        let (memfd::Error::Create(e) | memfd::Error::AddSeals(e) | memfd::Error::GetSeals(e)) = e;
        Error::os("memfd_create", Errno(e.raw_os_error().unwrap_or(libc::EIO)))
    };
    inject::check(Call::MemfdCreate).map_err(|e| Error::os("memfd_create", e))?;
    let options = memfd::MemfdOptions::default().close_on_exec(true).allow_sealing(true);
    let file = options.create(NAME).map_err(failed)?;
    inject::check(Call::Ftruncate).map_err(|e| Error::os("ftruncate", e))?;
    file.as_file()
        .set_len(SIZE as u64)
        .map_err(|e| Error::os("ftruncate", Errno(e.raw_os_error().unwrap_or(libc::EIO))))?;
    let seals = [memfd::FileSeal::SealShrink, memfd::FileSeal::SealGrow, memfd::FileSeal::SealSeal];
    inject::check(Call::Seal).map_err(|e| Error::os("fcntl(F_ADD_SEALS)", e))?;
    file.add_seals(&seals).map_err(failed)?;
    Ok(file.into_file().into())
}

fn identity(fd: BorrowedFd<'_>) -> Result<(u64, u64)> {
    inject::check(Call::Stat).map_err(|e| Error::os("fstat", e))?;
    let stat = rustix::fs::fstat(fd).map_err(|e| Error::os("fstat", e))?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Why there is nothing to look at.
#[derive(Debug, thiserror::Error)]
pub enum NoPage {
    /// There is no such process.
    #[error("there is no process {0}")]
    NoProcess(u32),
    /// The kernel does not let this user look into it.
    #[error("process {0} cannot be looked into by this user: it belongs to another one, or has more rights")]
    NotAllowed(u32),
    /// It runs without usvm.
    #[error("usvm does not run in process {0}")]
    NotRunning(u32),
    /// It has usvm loaded, but has not used a device.
    #[error("usvm is loaded in process {0} and not running: it starts when the program first uses a device")]
    NotStarted(u32),
    /// usvm runs there, but the program closed the page's descriptor.
    #[error(
        "process {0} runs usvm, but has closed the descriptor of its live page (daemons close all they do not know); \
         root can still look"
    )]
    Closed(u32),
    /// It is there and cannot be read.
    #[error("the live page of process {0} cannot be read: {1}")]
    Unreadable(u32, String),
}

/// A viewer's end.
#[derive(Debug)]
pub struct Viewer {
    file: File,
    pid: u32,
    seen: u64,
}

impl Viewer {
    /// Finds the page of process `pid`.
    ///
    /// # Errors
    /// [`NoPage`] says why there is none.
    pub fn open(pid: u32) -> std::result::Result<Self, NoPage> {
        let path = find(pid)?;
        let unreadable = |e: io::Error| NoPage::Unreadable(pid, e.to_string());
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(unreadable)?;
        let viewer = Self { file, pid, seen: 0 };
        let header = viewer.header().map_err(unreadable)?;
        if header[0] != MAGIC || header[1] != VERSION {
            let what = format!("its layout {:#x} version {} is not known here", header[0], header[1]);
            return Err(NoPage::Unreadable(pid, what));
        }
        // A child that was forked past the C library has its parent's descriptors.
        if own_pid(pid).is_some_and(|own| u64::from(own) != header[3]) {
            return Err(NoPage::NotRunning(pid));
        }
        Ok(viewer)
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Asks for news: they come for [`PATIENCE`] from now.
    pub fn ask(&self) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let word = (now.as_nanos() as u64) ^ u64::from(std::process::id()) << 48;
        self.file.write_all_at(&word.to_ne_bytes(), ASKED as u64 * 8)
    }

    /// What was published since the last call that gave something; `None` when nothing was, or it is changing right now.
    /// More devices and ranges than usvm publishes are left out: what shows them need not bear any number.
    pub fn read(&mut self) -> io::Result<Option<Live>> {
        let before = self.header()?;
        if before[SEQUENCE] == self.seen || !before[SEQUENCE].is_multiple_of(2) {
            return Ok(None);
        }
        let mut text = vec![0; (before[LENGTH] as usize).min(SIZE - HEADER)];
        self.file.read_exact_at(&mut text, HEADER as u64)?;
        if self.header()?[SEQUENCE] != before[SEQUENCE] {
            return Ok(None);
        }
        self.seen = before[SEQUENCE];
        let mut live: Live = serde_json::from_slice(&text)?;
        live.usvm = printable(&live.usvm);
        live.policy = printable(&live.policy);
        live.devices.truncate(MOST_DEVICES);
        live.hottest.truncate(MOST_RANGES);
        live.devices.iter_mut().for_each(|device| device.name = printable(&device.name));
        Ok(Some(live))
    }

    /// Asks, and waits up to `limit` for what is published then. `None` when nothing comes: the process is stopped or
    /// has no processor.
    pub fn news(&mut self, limit: Duration) -> io::Result<Option<Live>> {
        self.ask()?;
        let deadline = Instant::now() + limit;
        loop {
            if let Some(live) = self.read()? {
                return Ok(Some(live));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn header(&self) -> io::Result<[u64; 8]> {
        let mut bytes = [0; HEADER];
        self.file.read_exact_at(&mut bytes, 0)?;
        let mut words = [0; 8];
        for (word, piece) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_ne_bytes(piece.try_into().unwrap_or_default());
        }
        Ok(words)
    }
}

/// `text` without what a terminal would obey: another process's words are not to be trusted.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// The processes with a live page that this user may look into, in ascending order.
pub fn processes() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let mut pids: Vec<u32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| Viewer::open(*pid).is_ok())
        .collect();
    pids.sort_unstable();
    pids
}

/// The path under /proc that opens the page of `pid`.
fn find(pid: u32) -> std::result::Result<PathBuf, NoPage> {
    let refused = |e: io::Error| match e.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => NoPage::NoProcess(pid),
        Some(libc::EACCES | libc::EPERM) => NoPage::NotAllowed(pid),
        _ => NoPage::Unreadable(pid, e.to_string()),
    };
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).map_err(refused)?;
    let page = |path: &PathBuf| fs::read_link(path).is_ok_and(|to| to.as_os_str() == LINK);
    if let Some(path) = entries.flatten().map(|e| e.path()).find(page) {
        return Ok(path);
    }
    // Names of files need not be UTF-8.
    let maps = fs::read(format!("/proc/{pid}/maps")).map_err(refused)?;
    let maps = String::from_utf8_lossy(&maps);
    let Some(mapped) = maps.lines().find(|line| line.ends_with(LINK)) else {
        let loaded = maps.lines().any(|line| line.contains("/libusvm"));
        return Err(if loaded { NoPage::NotStarted(pid) } else { NoPage::NotRunning(pid) });
    };
    // The kernel opens a mapping's file for administrators only.
    let place =
        PathBuf::from(format!("/proc/{pid}/map_files/{}", mapped.split(' ').next().unwrap_or_default()));
    File::open(&place).map(|_| place).map_err(|_| NoPage::Closed(pid))
}

/// The id of process `pid` as it sees itself: another one inside a container.
fn own_pid(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace().last()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::sync::atomic::AtomicBool;

    /// One page at a time in this process: viewers find it by name.
    static ALONE: Mutex<()> = Mutex::new(());

    fn alone() -> std::sync::MutexGuard<'static, ()> {
        ALONE.lock().unwrap_or_else(|p| p.into_inner())
    }

    fn sample(ranges: u64) -> Live {
        let hottest =
            (0..ranges).map(|i| HotRange { start: i << 21, to_host: i as u32, ..HotRange::default() });
        Live {
            pid: std::process::id(),
            policy: "adaptive".into(),
            ranges,
            hottest: hottest.collect(),
            ..Live::default()
        }
    }

    #[test]
    fn a_viewer_reads_what_is_published_and_only_news() {
        let _alone = alone();
        let page = Page::create().unwrap();
        let mut viewer = Viewer::open(std::process::id()).unwrap();
        assert_eq!(viewer.read().unwrap(), None, "nothing is published yet");
        page.publish(&sample(3));
        assert_eq!(viewer.read().unwrap(), Some(sample(3)));
        assert_eq!(viewer.read().unwrap(), None, "no news");
        page.publish(&sample(0));
        assert_eq!(viewer.read().unwrap(), Some(sample(0)));
    }

    #[test]
    fn a_hostile_process_does_not_reach_the_viewers_terminal() {
        let _alone = alone();
        let page = Page::create().unwrap();
        let mut viewer = Viewer::open(std::process::id()).unwrap();
        page.publish(&Live { policy: "\x1b[2Jx\u{9b}".into(), ..sample(0) });
        assert_eq!(viewer.read().unwrap().unwrap().policy, "?[2Jx?");
        page.word(LENGTH).store(u64::MAX, Ordering::Relaxed);
        page.word(SEQUENCE).store(100, Ordering::Relaxed);
        assert!(viewer.read().is_err(), "a length beyond the page, and no JSON");
    }

    #[test]
    fn a_page_is_read_up_to_what_usvm_has() {
        let _alone = alone();
        let page = Page::create().unwrap();
        let mut viewer = Viewer::open(std::process::id()).unwrap();
        page.publish(&Live { devices: vec![LiveDevice::default(); 300], ..sample(300) });
        let got = viewer.read().unwrap().unwrap();
        assert_eq!((got.devices.len(), got.hottest.len()), (MOST_DEVICES, MOST_RANGES));
    }

    #[test]
    fn news_are_asked_for() {
        let _alone = alone();
        let page = Page::create().unwrap();
        let mut viewer = Viewer::open(std::process::id()).unwrap();
        assert!(!page.is_watched());
        assert_eq!(viewer.news(Duration::from_millis(1)).unwrap(), None);
        assert!(page.is_watched());
        let other = Viewer::open(std::process::id()).unwrap();
        let before = page.word(ASKED).load(Ordering::Relaxed);
        other.ask().unwrap();
        assert_ne!(page.word(ASKED).load(Ordering::Relaxed), before);
    }

    #[test]
    fn too_many_ranges_lose_the_coldest() {
        let _alone = alone();
        let page = Page::create().unwrap();
        let mut viewer = Viewer::open(std::process::id()).unwrap();
        page.publish(&sample(2000));
        let got = viewer.read().unwrap().unwrap();
        assert_eq!(got.ranges, 2000);
        assert!(got.hottest.len() > 100 && got.hottest.len() < 2000, "{}", got.hottest.len());
        assert_eq!(got.hottest[0], sample(1).hottest[0]);
    }

    #[test]
    fn a_closed_descriptor_is_not_closed_again() {
        let _alone = alone();
        let page = Page::create().unwrap();
        let number = page.fd.load(Ordering::Relaxed);
        // SAFETY: what a program does that closes all it does not know, and then opens something of its own.
        let taken = unsafe {
            let other = OwnedFd::from_raw_fd(libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY));
            assert_eq!(libc::dup2(other.as_raw_fd(), number), number);
            OwnedFd::from_raw_fd(number)
        };
        match Viewer::open(std::process::id()) {
            // An administrator may open a mapping's file.
            Ok(mut viewer) => {
                page.publish(&sample(1));
                assert_eq!(viewer.read().unwrap(), Some(sample(1)));
            }
            Err(e) => assert!(matches!(e, NoPage::Closed(_)), "{e}"),
        }
        drop(page);
        assert!(identity(taken.as_fd()).is_ok(), "the program's own descriptor stays open");
    }

    #[test]
    fn without_a_page_it_says_why() {
        let _alone = alone();
        assert!(matches!(Viewer::open(std::process::id()), Err(NoPage::NotRunning(_))));
        assert!(matches!(Viewer::open(u32::MAX / 2), Err(NoPage::NoProcess(_))));
        let page = Page::create().unwrap();
        assert!(processes().contains(&std::process::id()));
        drop(page);
        assert!(!processes().contains(&std::process::id()));
    }

    #[test]
    fn viewers_never_see_half_a_text() {
        let _alone = alone();
        let page = Page::create().unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..3000 {
                    page.publish(&sample(round % 60));
                }
                done.store(true, Ordering::Release);
            });
            let mut viewer = Viewer::open(std::process::id()).unwrap();
            let mut seen = 0;
            while !done.load(Ordering::Acquire) || seen == 0 {
                if let Some(live) = viewer.read().unwrap() {
                    assert_eq!(live, sample(live.ranges));
                    seen += 1;
                }
            }
        });
    }

    #[test]
    fn another_versions_text_is_read_as_far_as_known() {
        let text = r#"{"usvm":"9.9","tomorrow":[1],"devices":[{"name":"sim","more":2}],"stats":{"flips":5}}"#;
        let live: Live = serde_json::from_str(text).unwrap();
        assert_eq!((live.usvm.as_str(), live.devices[0].name.as_str(), live.stats.flips), ("9.9", "sim", 5));
    }
}
