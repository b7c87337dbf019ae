//! One of the two arenas that a live run has: the one that usvm serves, and a twin that it never sees.
//!
//! # Overview
//! A [`Side`] does a trace's host operations as real system calls and real loads and stores, at its own place. Both sides
//! get the same operations, so the kernel itself says, by the twin, what must be in usvm's memory.
//!
//! # Safety
//! Works on raw addresses of an arena that nothing else in this process uses (checked when it is reserved).
//!
//! # Limits
//! x86-64. Where there are no huge pages to reserve or no device to map, `mmap` of those kinds fails here.

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use usvm::ground::addr::{SZ_2M, SZ_4K, Span, align_up};
use usvm::space::ports::{Vma, VmaKind};

use super::probe;

/// Words of a page.
pub const WORDS: usize = (SZ_4K / 8) as usize;
/// A page's contents.
pub type Page = [u64; WORDS];

/// What the write number `value` makes of a page: the value first, as the kernel's driver has it, then words that
/// depend on it and on their place.
pub fn pattern(value: u64) -> Page {
    std::array::from_fn(|i| match i {
        0 => value,
        _ => value.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(i as u32) ^ i as u64,
    })
}

/// Accesses to the pages of a span: how many were allowed, and what became of the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Touched {
    /// Allowed.
    pub ok: u64,
    /// Refused with SIGSEGV.
    pub segv: u64,
    /// Refused with SIGBUS.
    pub bus: u64,
    /// The driver's sum of what was read.
    pub sum: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Side {
    /// Where it is.
    pub span: Span,
    file: OwnedFd,
    io: Option<OwnedFd>,
}

/// An errno's number.
pub type Errno = i32;

fn last() -> Errno {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

fn checked(answer: libc::c_int) -> Result<(), Errno> {
    if answer == 0 { Ok(()) } else { Err(last()) }
}

fn protection(perms: &str) -> libc::c_int {
    let bit = |letter, bit| if perms.contains(letter) { bit } else { 0 };
    bit('r', libc::PROT_READ) | bit('w', libc::PROT_WRITE) | bit('x', libc::PROT_EXEC)
}

/// madvise's number for a word of the trace.
pub fn advice(name: &str) -> Option<libc::c_int> {
    Some(match name {
        "dontneed" => libc::MADV_DONTNEED,
        "free" => libc::MADV_FREE,
        "cold" => libc::MADV_COLD,
        "pageout" => libc::MADV_PAGEOUT,
        "hugepage" => libc::MADV_HUGEPAGE,
        "nohugepage" => libc::MADV_NOHUGEPAGE,
        "collapse" => 25,
        "populate_read" => libc::MADV_POPULATE_READ,
        "populate_write" => libc::MADV_POPULATE_WRITE,
        "remove" => libc::MADV_REMOVE,
        "dontfork" => libc::MADV_DONTFORK,
        "dofork" => libc::MADV_DOFORK,
        "wipeonfork" => libc::MADV_WIPEONFORK,
        _ => return None,
    })
}

impl Side {
    /// An arena at `span`, where nothing may be yet.
    pub fn new(span: Span) -> Result<Self, String> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: a new mapping that replaces nothing, and away again.
        unsafe {
            let got = libc::mmap(span.start as *mut _, span.len() as usize, libc::PROT_NONE, flags, -1, 0);
            if got as u64 != span.start {
                return Err(format!("the arena {span} is not free: {}", std::io::Error::last_os_error()));
            }
            libc::munmap(got, span.len() as usize);
        }
        // SAFETY: makes a descriptor, which is owned below.
        let file = unsafe { libc::memfd_create(c"arena".as_ptr(), libc::MFD_CLOEXEC) };
        if file < 0 {
            return Err(format!("memfd_create: {}", std::io::Error::last_os_error()));
        }
        // SAFETY: just made, and nobody else's.
        let file = unsafe { OwnedFd::from_raw_fd(file) };
        // SAFETY: our own file.
        checked(unsafe { libc::ftruncate(file.as_raw_fd(), span.len() as i64) })
            .map_err(|e| format!("ftruncate: {e}"))?;
        let io = OpenOptions::new().read(true).write(true).open("/dev/usvm_ref").ok().map(OwnedFd::from);
        Ok(Self { span, file, io })
    }

    /// The page of this side where the arena of the trace has `addr`.
    fn page(addr: u64) -> *mut u64 {
        std::hint::black_box(addr) as *mut u64
    }

    /// mmap with MAP_FIXED.
    pub fn mmap(&self, at: u64, len: u64, perms: &str, kind: &str) -> Result<(), Errno> {
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let file = self.file.as_raw_fd();
        let (flags, fd) = match kind {
            "anon" => (anonymous, -1),
            "hugetlb" => (anonymous | libc::MAP_HUGETLB, -1),
            "file" => (libc::MAP_PRIVATE, file),
            "shmem" => (libc::MAP_SHARED, file),
            _ => (libc::MAP_SHARED, self.io.as_ref().ok_or(libc::ENODEV)?.as_raw_fd()),
        };
        let offset = if fd < 0 { 0 } else { at - self.span.start };
        // SAFETY: replaces only memory of the arena (module docs).
        let got = unsafe {
            libc::mmap(
                at as *mut _,
                len as usize,
                protection(perms),
                flags | libc::MAP_FIXED,
                fd,
                offset as i64,
            )
        };
        if got == libc::MAP_FAILED { Err(last()) } else { Ok(()) }
    }

    /// munmap.
    pub fn munmap(&self, at: u64, len: u64) -> Result<(), Errno> {
        // SAFETY: only memory of the arena (module docs).
        checked(unsafe { libc::munmap(at as *mut _, len as usize) })
    }

    /// mremap; how: move, dontunmap or inplace.
    pub fn mremap(&self, at: u64, len: u64, new_len: u64, how: &str, to: u64) -> Result<(), Errno> {
        let moving = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let flags = match how {
            "move" => moving,
            "dontunmap" => moving | libc::MREMAP_DONTUNMAP,
            _ => 0,
        };
        // SAFETY: only memory of the arena, at both places (module docs).
        let got = unsafe {
            libc::mremap(at as *mut _, len as usize, new_len as usize, flags, to as *mut libc::c_void)
        };
        if got == libc::MAP_FAILED { Err(last()) } else { Ok(()) }
    }

    /// mprotect.
    pub fn mprotect(&self, at: u64, len: u64, perms: &str) -> Result<(), Errno> {
        // SAFETY: only memory of the arena (module docs).
        checked(unsafe { libc::mprotect(at as *mut _, len as usize, protection(perms)) })
    }

    /// madvise.
    pub fn madvise(&self, at: u64, len: u64, advice: libc::c_int) -> Result<(), Errno> {
        // SAFETY: only memory of the arena, whose contents may go (module docs).
        checked(unsafe { libc::madvise(at as *mut _, len as usize, advice) })
    }

    /// mlock and munlock.
    pub fn mlock(&self, at: u64, len: u64, lock: bool) -> Result<(), Errno> {
        // SAFETY: changes no contents.
        checked(unsafe {
            if lock {
                libc::mlock(at as *const _, len as usize)
            } else {
                libc::munlock(at as *const _, len as usize)
            }
        })
    }

    /// One access to each page; page `i` gets `pattern(value + i)`.
    pub fn store(at: u64, len: u64, value: u64) -> Touched {
        let mut done = Touched::default();
        for i in 0..len / SZ_4K {
            let page = pattern(value + i);
            // SAFETY: arena memory, a page of it.
            done.count(unsafe { probe::copy(Self::page(at + i * SZ_4K), page.as_ptr(), WORDS) });
        }
        done
    }

    /// The first word of each page, summed as the driver does, from `sum` on.
    pub fn load(at: u64, len: u64, sum: u64) -> Touched {
        let mut done = Touched { sum, ..Touched::default() };
        for i in 0..len / SZ_4K {
            let mut word = 0;
            // SAFETY: the destination is a local word.
            if done.count(unsafe { probe::copy(&mut word, Self::page(at + i * SZ_4K), 1) }) {
                done.sum = (done.sum ^ word).wrapping_mul(0x100_0000_01b3);
            }
        }
        done
    }

    /// A whole page, if it can be read.
    pub fn read_page(at: u64) -> Option<Page> {
        let mut page = [0; WORDS];
        // SAFETY: the destination is a local page.
        unsafe { probe::copy(page.as_mut_ptr(), Self::page(at), WORDS) }.ok().map(|()| page)
    }

    /// Puts a whole page there, even if the mapping does not allow it: as a debugger does.
    pub fn force_page(at: u64, page: &Page) -> std::io::Result<()> {
        use std::os::unix::fs::FileExt;
        let bytes: Vec<u8> = page.iter().flat_map(|word| word.to_le_bytes()).collect();
        OpenOptions::new().write(true).open("/proc/self/mem")?.write_all_at(&bytes, at)
    }

    /// The mappings inside the arena now. Neighbours that differ in nothing shown are one.
    pub fn vmas(&self) -> Vec<Vma> {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc is mounted");
        merged(maps.lines().filter_map(|line| vma_of(line, self.span)))
    }

    /// The parts of `span` that are in one mapping of the kernel's each.
    pub fn pieces(&self, span: Span) -> Vec<Span> {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc is mounted");
        maps.lines().filter_map(bounds).filter_map(|at| at.intersect(span)).collect()
    }

    /// The mappings of the arena that mlock holds.
    pub fn locked(&self) -> Vec<Span> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").expect("/proc is mounted");
        let mut found = Vec::new();
        let mut at = None;
        for line in smaps.lines() {
            if let Some(span) = bounds(line) {
                at = span.intersect(self.span);
            } else if line.starts_with("VmFlags:") && line.split(' ').any(|flag| flag == "lo") {
                found.extend(at);
            }
        }
        found
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // Whole huge pages, because less of one cannot be unmapped; nothing else is near.
        let all = Span::new(self.span.start, align_up(self.span.end, SZ_2M));
        // SAFETY: the arena is this side's own.
        unsafe { libc::munmap(all.start as *mut _, all.len() as usize) };
    }
}

impl Touched {
    fn count(&mut self, outcome: Result<(), libc::c_int>) -> bool {
        match outcome {
            Ok(()) => self.ok += 1,
            Err(libc::SIGBUS) => self.bus += 1,
            Err(_) => self.segv += 1,
        }
        outcome.is_ok()
    }
}

fn bounds(line: &str) -> Option<Span> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    Some(Span::new(hex(start)?, hex(end)?))
}

/// What a line of /proc/self/maps says of `arena`.
fn vma_of(line: &str, arena: Span) -> Option<Vma> {
    let span = bounds(line)?.intersect(arena)?;
    let perms = line.split(' ').nth(1)?.as_bytes();
    let kind = match line {
        _ if line.contains("usvm_ref") => VmaKind::Special,
        _ if line.contains("anon_hugepage") => VmaKind::Hugetlb,
        _ if perms[3] == b's' => VmaKind::Shared,
        _ if line.contains("memfd:") => VmaKind::File,
        _ => VmaKind::Anonymous,
    };
    Some(Vma { span, read: perms[0] == b'r', write: perms[1] == b'w', exec: perms[2] == b'x', kind })
}

/// Neighbours that are alike become one.
pub fn merged(vmas: impl Iterator<Item = Vma>) -> Vec<Vma> {
    let mut all: Vec<Vma> = Vec::new();
    for vma in vmas {
        match all.last_mut() {
            Some(last) if Vma { span: vma.span, ..*last } == vma && last.span.end == vma.span.start => {
                last.span.end = vma.span.end;
            }
            _ => all.push(vma),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_read() {
        let arena = Span::sized(0x10_0000_0000, 0x10_0000);
        let line = |s: &str| vma_of(s, arena);
        let whole = line("0ffff00000-1000200000 rw-p 00000000 00:00 0 ").unwrap();
        assert_eq!((whole.span, whole.kind, whole.write), (arena, VmaKind::Anonymous, true));
        let kind = |s: &str| line(&format!("1000000000-1000001000 {s}")).unwrap().kind;
        assert_eq!(kind("r--s 00000000 00:01 12 /memfd:arena (deleted)"), VmaKind::Shared);
        assert_eq!(kind("r--p 00000000 00:01 12 /memfd:arena (deleted)"), VmaKind::File);
        assert_eq!(kind("rw-p 00000000 00:0f 12 /anon_hugepage (deleted)"), VmaKind::Hugetlb);
        assert_eq!(kind("rw-s 00000000 00:06 12 /dev/usvm_ref"), VmaKind::Special);
        assert!(line("7f0000000000-7f0000001000 rw-p 00000000 00:00 0 ").is_none());
        let half = |s, e| Vma { span: Span::new(s, e), ..whole };
        assert_eq!(
            merged([half(0x1000, 0x2000), half(0x2000, 0x3000), half(0x4000, 0x5000)].into_iter()),
            [half(0x1000, 0x3000), half(0x4000, 0x5000)]
        );
    }
}
