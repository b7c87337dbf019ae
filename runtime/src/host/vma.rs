//! The mappings of this process.
//!
//! # Overview
//! [`Maps`] tells which mapping holds an address: by PROCMAP_QUERY on a kept descriptor, or by reading
//! /proc/thread-self/maps. [`view`] turns that into what drm_gpusvm would see: boundaries that exist only because usvm
//! registered part of a mapping are hidden, and what is exempt is cut off and not migratable.
//!
//! # Locking
//! PROCMAP_QUERY takes none. Reading the file shares one buffer under a lock.
//!
//! # Limits
//! Neighbours are joined as far as the aligned 2 MiB around the address reach, which is where its range can be; a mapping
//! registered piecewise is shown in parts beyond. /dev/zero mapped privately counts as a file.

use super::sys;
use crate::ground::addr::{SZ_2M, SZ_4K, Span};
use crate::ground::error::{Errno, Error, Result};
use crate::ground::fds::Kept;
use crate::space::ports::{Vma, VmaKind};
use linux_raw_sys::general::{procmap_query, procmap_query_flags as flag};
use rustix::fd::{AsFd, OwnedFd};
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};

/// One mapping as the kernel has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RawVma {
    pub(super) span: Span,
    pub(super) read: bool,
    pub(super) write: bool,
    pub(super) exec: bool,
    pub(super) kind: VmaKind,
}

impl RawVma {
    /// Whether `other` beside it would be one mapping with it, as far as one can see.
    fn joins(&self, other: &RawVma) -> bool {
        self.kind == VmaKind::Anonymous
            && Self { span: other.span, ..*self } == *other
            && (self.span.end == other.span.start || other.span.end == self.span.start)
    }
}

/// The reader of mappings.
#[derive(Debug)]
pub(super) struct Maps {
    maps: Kept,
    by_query: bool,
    /// For reading the file: its own descriptor (position and buffer go together) and a reused buffer.
    file: Mutex<(Kept, Vec<u8>)>,
    devices: Devices,
}

const PATH: &str = "/proc/thread-self/maps";

fn open() -> sys::Result<Kept> {
    sys::open(PATH, rustix::fs::OFlags::RDONLY).map(Kept::new)
}

impl Maps {
    pub(super) fn new(maps: OwnedFd, by_query: bool) -> Result<Self> {
        let file = open().map_err(|e| Error::os(PATH, e))?;
        Ok(Self {
            maps: Kept::new(maps),
            by_query,
            file: Mutex::new((file, Vec::new())),
            devices: Devices::learn(),
        })
    }

    /// The mapping that holds `addr`.
    pub(super) fn find(&self, addr: u64) -> Result<Option<RawVma>> {
        if self.by_query {
            match self.query(addr) {
                Ok(found) => return Ok(found.filter(|v| v.span.contains(addr))),
                Err(errno) => tracing::debug!(%errno, "PROCMAP_QUERY failed; reading /proc/thread-self/maps"),
            }
        }
        self.read(addr)
    }

    fn query(&self, addr: u64) -> sys::Result<Option<RawVma>> {
        // Names of anonymous and special mappings are short; a longer one is a file's.
        let mut name = [0u8; 128];
        let asked = match sys::procmap_query(self.maps.as_fd(), addr, &mut name) {
            Err(Errno(libc::ENAMETOOLONG)) => sys::procmap_query(self.maps.as_fd(), addr, &mut []),
            other => other,
        };
        match asked {
            Ok(q) => {
                let len = (q.vma_name_size as usize).saturating_sub(1).min(name.len());
                Ok(Some(self.decode(&q, &name[..len])))
            }
            Err(Errno(libc::ENOENT)) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// All mappings, as lines of /proc/thread-self/maps without names; none where the kernel has no PROCMAP_QUERY. Any thread.
    pub(super) fn text(&self) -> Option<String> {
        if !self.by_query {
            return None;
        }
        let (mut text, mut from) = (String::new(), 0);
        loop {
            let q = match sys::procmap_query(self.maps.as_fd(), from, &mut []) {
                Ok(q) => q,
                Err(Errno(libc::ENOENT)) => return Some(text),
                Err(_) => return None,
            };
            let may = |f: flag, yes, no| if q.vma_flags & f as u64 != 0 { yes } else { no };
            let _ = writeln!(
                text,
                "{:x}-{:x} {}{}{}{} {:08x} {:02x}:{:02x} {}",
                q.vma_start,
                q.vma_end,
                may(flag::PROCMAP_QUERY_VMA_READABLE, 'r', '-'),
                may(flag::PROCMAP_QUERY_VMA_WRITABLE, 'w', '-'),
                may(flag::PROCMAP_QUERY_VMA_EXECUTABLE, 'x', '-'),
                may(flag::PROCMAP_QUERY_VMA_SHARED, 's', 'p'),
                q.vma_offset,
                q.dev_major,
                q.dev_minor,
                q.inode
            );
            from = q.vma_end;
        }
    }

    fn decode(&self, q: &procmap_query, name: &[u8]) -> RawVma {
        let has = |f: flag| q.vma_flags & f as u64 != 0;
        let identity = Identity {
            shared: has(flag::PROCMAP_QUERY_VMA_SHARED),
            device: (q.dev_major, q.dev_minor),
            inode: q.inode,
            name,
        };
        let kind = if q.vma_page_size > SZ_4K { VmaKind::Hugetlb } else { self.devices.kind(&identity) };
        RawVma {
            span: Span::new(q.vma_start, q.vma_end),
            read: has(flag::PROCMAP_QUERY_VMA_READABLE),
            write: has(flag::PROCMAP_QUERY_VMA_WRITABLE),
            exec: has(flag::PROCMAP_QUERY_VMA_EXECUTABLE),
            kind,
        }
    }

    /// Reads the file up to the line that holds `addr`. A line is always of one moment; when others change meanwhile
    /// the walk may skip one, so a miss is tried once more.
    fn read(&self, addr: u64) -> Result<Option<RawVma>> {
        for _ in 0..2 {
            let found = self.read_once(addr).map_err(|e| Error::os("reading /proc/thread-self/maps", e))?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    fn read_once(&self, addr: u64) -> sys::Result<Option<RawVma>> {
        let mut found = None;
        self.walk(|vma| {
            if vma.span.contains(addr) {
                found = Some(vma);
            }
            vma.span.end <= addr
        })?;
        Ok(found)
    }

    /// Writable, readable, private anonymous memory that is no code.
    pub(super) fn movable(&self) -> sys::Result<Vec<Span>> {
        let mut spans = Vec::new();
        self.walk(|vma| {
            if vma.kind == VmaKind::Anonymous && vma.read && vma.write && !vma.exec {
                spans.push(vma.span);
            }
            true
        })?;
        Ok(spans)
    }

    /// Gives `each` the mappings in ascending order until it says `false`.
    fn walk(&self, mut each: impl FnMut(RawVma) -> bool) -> sys::Result<()> {
        let mut guard = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, buf) = &mut *guard;
        sys::rewind(&*file)?;
        buf.clear();
        let mut begun = false;
        loop {
            let kept = buf.len();
            buf.resize(kept + 4096, 0);
            let got = match sys::read(&*file, &mut buf[kept..]) {
                Err(Errno(libc::EINTR)) => 0,
                // The thread that opened it has ended.
                Err(Errno(libc::ESRCH)) if !begun => {
                    *file = open()?;
                    0
                }
                Ok(0) => return Ok(()),
                other => other?,
            };
            begun |= got > 0;
            buf.truncate(kept + got);
            let lines = buf.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
            for line in buf[..lines].split(|&b| b == b'\n') {
                if self.parse(line).is_some_and(|vma| !each(vma)) {
                    return Ok(());
                }
            }
            buf.drain(..lines);
        }
    }

    /// One line, e.g. `7f00-7f10 rw-p 00000000 00:00 0    [heap]`.
    fn parse(&self, line: &[u8]) -> Option<RawVma> {
        let text = std::str::from_utf8(line.get(..line.len().min(100))?).ok();
        // A long path may be cut inside a character; what is read here comes before it.
        let text = match text {
            Some(text) => text,
            None => std::str::from_utf8(line.get(..line.iter().position(|b| !b.is_ascii())?)?).ok()?,
        };
        let mut fields = text.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let hex = |s: &str| u64::from_str_radix(s, 16).ok();
        let span = Span::new(hex(start)?, hex(end)?);
        let perms = fields.next()?.as_bytes();
        let (major, minor) = fields.nth(1)?.split_once(':')?;
        let inode = fields.next()?.parse().ok()?;
        let name = fields.next().unwrap_or_default().as_bytes();
        let device = (hex(major)? as u32, hex(minor)? as u32);
        let identity = Identity { shared: perms.get(3) == Some(&b's'), device, inode, name };
        let kind = self.devices.kind(&identity);
        let has = |at: usize, c: u8| perms.get(at) == Some(&c);
        Some(RawVma { span, read: has(0, b'r'), write: has(1, b'w'), exec: has(2, b'x'), kind })
    }
}

/// What tells the kind of a mapping.
struct Identity<'a> {
    shared: bool,
    device: (u32, u32),
    inode: u64,
    name: &'a [u8],
}

/// Devices of file systems that have no name in /proc.
#[derive(Debug, Default)]
struct Devices {
    /// The kernel's own tmpfs: memfd, shared anonymous memory, System V.
    shmem: Option<(u32, u32)>,
    /// The kernel's own hugetlbfs.
    hugetlb: Option<(u32, u32)>,
}

impl Devices {
    fn learn() -> Self {
        use rustix::fs::MemfdFlags;
        Self { shmem: device_of(MemfdFlags::empty()), hugetlb: device_of(MemfdFlags::HUGETLB) }
    }

    fn kind(&self, id: &Identity<'_>) -> VmaKind {
        let anonymous = id.inode == 0 && id.device == (0, 0);
        let special = id.name.starts_with(b"[v") || id.name.starts_with(b"[uprobes]");
        if anonymous && special {
            VmaKind::Special
        } else if anonymous && !id.shared && (id.name.is_empty() || id.name.starts_with(b"[")) {
            VmaKind::Anonymous
        } else if !anonymous && self.hugetlb == Some(id.device) {
            VmaKind::Hugetlb
        } else if id.shared && (self.shmem == Some(id.device) || id.name.starts_with(b"/dev/shm/")) {
            VmaKind::Shared
        } else if anonymous {
            VmaKind::Special
        } else {
            VmaKind::File
        }
    }
}

fn device_of(flags: rustix::fs::MemfdFlags) -> Option<(u32, u32)> {
    crate::ground::inject::check(crate::ground::inject::Call::MemfdCreate).ok()?;
    let fd = rustix::fs::memfd_create("usvm-probe", flags | rustix::fs::MemfdFlags::CLOEXEC).ok()?;
    crate::ground::inject::check(crate::ground::inject::Call::Stat).ok()?;
    let device = rustix::fs::fstat(&fd).ok()?.st_dev;
    Some((rustix::fs::major(device), rustix::fs::minor(device)))
}

/// The mapping around `addr` as drm_gpusvm would see it. `is_cut` tells the boundaries that usvm made itself;
/// `extent` the widest span around an address that is all exempt or all not.
pub(super) fn view(
    maps: &Maps,
    addr: u64,
    is_cut: impl Fn(u64) -> bool,
    extent: impl Fn(u64) -> (Span, bool),
) -> Result<Option<Vma>> {
    let Some(raw) = maps.find(addr)? else { return Ok(None) };
    let mut whole = raw;
    // Each piece costs a system call, and there may be one for each page.
    let block = Span::around(addr, SZ_2M);
    if raw.kind == VmaKind::Anonymous {
        while whole.span.end < block.end && is_cut(whole.span.end) {
            let Some(next) = maps.find(whole.span.end)?.filter(|n| whole.joins(n)) else { break };
            whole.span.end = next.span.end;
        }
        while whole.span.start > block.start && is_cut(whole.span.start) {
            let Some(next) = maps.find(whole.span.start - 1)?.filter(|n| whole.joins(n)) else { break };
            whole.span.start = next.span.start;
        }
    }
    let (mut span, mut kind) = (whole.span, whole.kind);
    if kind == VmaKind::Anonymous {
        let (part, is_exempt) = extent(addr);
        span = span.intersect(part).unwrap_or(span);
        if is_exempt {
            // Like a file's: the device may use it in place.
            kind = VmaKind::File;
        }
    }
    Ok(Some(Vma { span, read: raw.read, write: raw.write, exec: raw.exec, kind }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both() -> [Maps; 2] {
        [true, false].map(|by_query| {
            let fd = sys::open("/proc/thread-self/maps", rustix::fs::OFlags::RDONLY).unwrap();
            Maps::new(fd, by_query).unwrap()
        })
    }

    #[test]
    fn the_thread_that_opened_it_may_end() {
        let at = 0u64;
        let [_, maps] = std::thread::spawn(both).join().unwrap();
        assert!(!maps.movable().unwrap().is_empty());
        assert!(maps.find((&raw const at).addr() as u64).unwrap().is_some());
    }

    #[test]
    fn lines_parse() {
        let [maps, _] = both();
        let parse = |line: &str| maps.parse(line.as_bytes());
        let heap = parse("55d0c000-55d2d000 rw-p 00000000 00:00 0                          [heap]").unwrap();
        assert_eq!(heap.span, Span::new(0x55d0_c000, 0x55d2_d000));
        assert!(heap.read && heap.write && !heap.exec && heap.kind == VmaKind::Anonymous);
        let vdso = parse("7ffd1000-7ffd3000 r-xp 00000000 00:00 0                          [vdso]").unwrap();
        assert_eq!((vdso.kind, vdso.exec), (VmaKind::Special, true));
        let file = parse(&format!("1000-2000 r--p 00001000 fe:01 77 /{}é", "x".repeat(80))).unwrap();
        assert_eq!(file.kind, VmaKind::File);
        assert_eq!(
            parse("1000-2000 rw-p 00000000 00:00 0 [anon:glibc: malloc]").unwrap().kind,
            VmaKind::Anonymous
        );
        assert!(parse("").is_none() && parse("nonsense").is_none() && parse("1-2 r").is_none());
    }

    #[test]
    fn query_and_file_agree_on_everything_that_stays() {
        let [query, file] = both();
        let text = std::fs::read_to_string("/proc/thread-self/maps").unwrap();
        let mut compared = 0;
        for line in text.lines() {
            let start = u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
            // Other tests map and unmap meanwhile: only files and special mappings stay for sure.
            let (a, b) = (query.find(start).unwrap(), file.find(start).unwrap());
            let stays =
                |v: &Option<RawVma>| v.is_some_and(|v| matches!(v.kind, VmaKind::File | VmaKind::Special));
            if stays(&a) && line.contains(".so") || line.contains("[vdso]") {
                assert_eq!(a, b, "{line}");
                compared += 1;
            }
        }
        assert!(compared > 2, "{text}");
        assert_eq!(query.find(0x1000).unwrap(), None);
        assert_eq!(file.find(0x1000).unwrap(), None);
    }

    #[test]
    fn kinds_of_shared_memory() {
        let memfd = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let shared = memfd::Memfd::try_from_fd(memfd).unwrap();
        shared.as_file().set_len(SZ_4K).unwrap();
        let [query, file] = both();
        let id = |m: &Maps, shared: bool| {
            let device = m.devices.shmem.unwrap();
            m.devices.kind(&Identity { shared, device, inode: 3, name: b"/memfd:x (deleted)" })
        };
        assert_eq!((id(&query, true), id(&file, false)), (VmaKind::Shared, VmaKind::File));
        let huge = query.devices.hugetlb;
        if let Some(device) = huge {
            let id = Identity { shared: false, device, inode: 3, name: b"/anon_hugepage (deleted)" };
            assert_eq!(query.devices.kind(&id), VmaKind::Hugetlb);
        }
    }
}
