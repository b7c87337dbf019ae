//! Device memory: a memfd, mapped for the device in full and for its callers as far as the BAR reaches.
//!
//! # Overview
//! The file has a sealed size and is mapped shared. With a small BAR there are two mappings: the callers' one
//! really ends at the visible size, so code that copies past it crashes in a test instead of working by luck,
//! and the device's own one has everything. Neither is inherited by a fork, neither goes into a core dump;
//! both ask for huge pages.
//!
//! # Locking
//! None. Several engines and callers may copy to and from the same bytes at once, as on hardware: what they
//! then see is torn, bytes old or new. Who must not see that waits for fences or unbinds first.
//!
//! # Limits
//! Memory that was touched once stays allocated until the device is gone, free or not. Whether the machine
//! has as much memory as the device is not asked: too large a device dies by the kernel's hand when it is
//! filled, or fails to start when it is prefaulted.
//!
//! # Safety
//! All raw access to device memory is in this file. A [`Window`] is a bounds-checked part of a live mapping;
//! no reference to plain bytes of it is ever made, only raw copies into and out of slices and atomics on
//! aligned words. Host memory is reached only through a [`HostPiece`], whose two promises are written at its
//! constructor.
#![allow(unsafe_code)]

use crate::ground::addr::SZ_2M;
use crate::ground::error::{Errno, Error, Result};
use crate::ground::inject::{self, Call};
use crate::space::ports::Shadow;
use crate::vram::copy::{Copier, CopyHint, CopyPool};
use rustix::mm::{self, Advice, MapFlags, ProtFlags};
use std::marker::PhantomData;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

/// How host and device exchange bytes: one way for the whole process, chosen before the first copy.
struct Copying {
    copier: Copier,
    /// `None` where no thread could be had, or none was wanted.
    helpers: Option<CopyPool>,
}

static COPYING: OnceLock<Copying> = OnceLock::new();

/// Chooses how bytes are copied and by how many helpers; `None` is what suits the machine. The first choice stays.
pub(super) fn choose_copies(copier: Copier, helpers: Option<usize>) {
    COPYING.get_or_init(|| {
        let wanted = helpers.unwrap_or_else(CopyPool::default_helpers);
        let helpers = (wanted > 0).then(|| CopyPool::new(wanted, CopyPool::SPIN).ok()).flatten();
        Copying { copier, helpers }
    });
}

fn copying() -> &'static Copying {
    choose_copies(Copier::detect(), None);
    // Chosen one line above, if not before.
    COPYING.get().unwrap_or_else(|| unreachable!())
}

fn copier() -> Copier {
    copying().copier
}

fn helpers() -> Option<&'static CopyPool> {
    copying().helpers.as_ref()
}

/// Wakes the helpers, if there are any, for a large copy that comes soon.
pub(super) fn expect_copies() {
    if let Some(pool) = helpers() {
        pool.rouse();
    }
}

/// Copies between device memory and anything else.
///
/// # Safety
/// `from` must be readable and `to` writable for `len` bytes, and they must not overlap.
unsafe fn copy(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: passed on to the caller.
    unsafe { ptr::copy_nonoverlapping(from, to, len) }
}

/// As [`copy`], for moves between host and device.
///
/// # Safety
/// As for [`copy`].
unsafe fn transfer(to: *mut u8, from: *const u8, len: usize, hint: CopyHint) {
    // SAFETY: passed on to the caller.
    unsafe {
        match helpers().filter(|_| len >= Copier::THREADED_MIN) {
            Some(pool) => copier().copy_threaded(pool, to, from, len, hint),
            None => copier().copy(to, from, len, hint),
        }
    }
}

/// A shared mapping of the first bytes of the file.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    len: usize,
    owner: rustix::process::Pid,
}

// SAFETY: the mapping is plain memory that lives as long as this value, and is only touched as the module
// says.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// At `offset` from a multiple of 2 MiB, or with 0 wherever the kernel likes.
    fn new(file: &memfd::Memfd, len: usize, offset: usize) -> Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let (at, fixed) = match offset {
            0 => (ptr::null_mut(), MapFlags::empty()),
            _ => (reserve(len, offset)?, MapFlags::FIXED),
        };
        injected(Call::Mmap, "mmap")?;
        // SAFETY: a new mapping at an address of the kernel's choice, or in place of a reservation of our own.
        let base = unsafe { mm::mmap(at, len, prot, MapFlags::SHARED | fixed, file.as_file().as_fd(), 0) };
        let base = base.map_err(|e| Error::os("mmap", e))?;
        let base = NonNull::new(base.cast()).ok_or(Error::Os { call: "mmap", errno: Errno(libc::EFAULT) })?;
        let mapping = Self { base, len, owner: rustix::process::getpid() };
        mapping.advise(Advice::LinuxDontFork)?;
        mapping.advise(Advice::LinuxDontDump)?;
        // Without huge pages it only gets slower.
        let _ = mapping.advise(Advice::LinuxHugepage);
        Ok(mapping)
    }

    fn advise(&self, advice: Advice) -> Result<()> {
        injected(Call::Madvise, "madvise")?;
        // SAFETY: exactly this mapping; none of the advice used here drops pages.
        unsafe { mm::madvise(self.base.as_ptr().cast(), self.len, advice) }
            .map_err(|e| Error::os("madvise", e))
    }
}

/// Address space for `len` bytes at `offset` from a multiple of 2 MiB, reserved.
fn reserve(len: usize, offset: usize) -> Result<*mut std::ffi::c_void> {
    const HUGE: usize = SZ_2M as usize;
    let all = len + 2 * HUGE;
    injected(Call::Mmap, "mmap")?;
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nobody.
    let base = unsafe { mm::mmap_anonymous(ptr::null_mut(), all, ProtFlags::empty(), MapFlags::PRIVATE) }
        .map_err(|e| Error::os("mmap", e))?;
    let head = base.addr().next_multiple_of(HUGE) + offset - base.addr();
    // SAFETY: what lies before and behind the wanted part of the reservation, which nobody knows.
    unsafe {
        let _ = mm::munmap(base, head);
        let _ = mm::munmap(base.byte_add(head + len), all - head - len);
    }
    Ok(base.wrapping_byte_add(head))
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // A forked child did not inherit the mapping; something else may be at its address there.
        if rustix::process::getpid() == self.owner {
            // SAFETY: the mapping was made by `new`, and windows borrow what owns it. Unmapping cannot
            // usefully fail.
            let _ = unsafe { mm::munmap(self.base.as_ptr().cast(), self.len) };
        }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Vram {
    /// All of it: the engines'.
    full: Mapping,
    /// The callers', when they cannot reach all of it; `None` in it when they reach nothing.
    small_bar: Option<Option<Mapping>>,
    len: u64,
    visible: u64,
}

impl Vram {
    /// `len` bytes of which callers reach the first `visible`; both are multiples of 4 KiB and `visible` is
    /// at most `len`. `prefault` populates all of it before this returns. `offset`: `SimConfig::cpu_offset`.
    pub(super) fn new(len: u64, visible: u64, prefault: bool, offset: u64) -> Result<Self> {
        let file = backing_file(len)?;
        let bytes = usize::try_from(len).map_err(|_| too_large(len))?;
        let offset = offset as usize;
        let full = Mapping::new(&file, bytes, offset)?;
        if prefault {
            full.advise(Advice::LinuxPopulateWrite).map_err(|_| too_large(len))?;
        }
        let small_bar = match visible {
            v if v == len => None,
            0 => Some(None),
            v => Some(Some(Mapping::new(&file, v as usize, offset)?)),
        };
        Ok(Self { full, small_bar, len, visible })
    }

    /// Bytes of it.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Bytes of it that [`Vram::visible`] reaches.
    pub(super) fn visible_len(&self) -> u64 {
        self.visible
    }

    /// `len` bytes at `offset`, for the device itself. `None` when they are not all inside.
    pub(super) fn device(&self, offset: u64, len: usize) -> Option<Window<'_>> {
        Window::of(&self.full, offset, len)
    }

    /// `len` bytes at `offset`, for a caller. `None` when they are not all visible.
    pub(super) fn visible(&self, offset: u64, len: usize) -> Option<Window<'_>> {
        match &self.small_bar {
            None => Window::of(&self.full, offset, len),
            Some(bar) => Window::of(bar.as_ref()?, offset, len),
        }
    }
}

fn backing_file(len: u64) -> Result<memfd::Memfd> {
    let fail = |call, e: memfd::Error| match e {
        memfd::Error::Create(e) | memfd::Error::AddSeals(e) | memfd::Error::GetSeals(e) => {
            Error::os(call, Errno(e.raw_os_error().unwrap_or(libc::EIO)))
        }
    };
    let options = memfd::MemfdOptions::default().close_on_exec(true).allow_sealing(true);
    injected(Call::MemfdCreate, "memfd_create")?;
    let file = options.create("usvm-vram").map_err(|e| fail("memfd_create", e))?;
    injected(Call::Ftruncate, "ftruncate").map_err(|_| too_large(len))?;
    file.as_file().set_len(len).map_err(|_| too_large(len))?;
    let seals = [memfd::FileSeal::SealShrink, memfd::FileSeal::SealGrow, memfd::FileSeal::SealSeal];
    injected(Call::Seal, "fcntl(F_ADD_SEALS)")?;
    file.add_seals(&seals).map_err(|e| fail("fcntl(F_ADD_SEALS)", e))?;
    Ok(file)
}

fn injected(call: Call, name: &'static str) -> Result<()> {
    inject::check(call).map_err(|e| Error::os(name, e))
}

fn too_large(len: u64) -> Error {
    Error::OutOfHostMemory {
        what: "making the simulated device's memory",
        detail: format!("the machine has no {len} bytes for it; ask for less (USVM_VRAM)"),
    }
}

/// A part of device memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window<'a> {
    base: *mut u8,
    len: usize,
    vram: PhantomData<&'a Vram>,
}

macro_rules! atomic_views {
    ($($name:ident: $atomic:ty),*) => {$(
        /// The word at the window's start. Panics when the window is shorter, or not aligned to the word.
        pub(super) fn $name(&self) -> &'a $atomic {
            assert!(self.len >= size_of::<$atomic>() && (self.base as usize).is_multiple_of(size_of::<$atomic>()));
            // SAFETY: in bounds and aligned (just checked), mapped for 'a. Racing raw copies are the device's
            // nature: the memory is shared with the file's other mapping and never read through a plain
            // reference.
            unsafe { <$atomic>::from_ptr(self.base.cast()) }
        }
    )*};
}

impl<'a> Window<'a> {
    fn of(mapping: &'a Mapping, offset: u64, len: usize) -> Option<Self> {
        let offset = usize::try_from(offset).ok()?;
        if offset.checked_add(len)? > mapping.len {
            return None;
        }
        // SAFETY: `offset` is inside the mapping or at its end.
        let base = unsafe { mapping.base.as_ptr().add(offset) };
        Some(Self { base, len, vram: PhantomData })
    }

    /// Copies the window's first bytes to all of `to`. Panics when the window is shorter.
    pub(super) fn read(&self, to: &mut [u8]) {
        assert!(to.len() <= self.len);
        // SAFETY: in bounds; a slice never lies in device memory, as none is ever made of it.
        unsafe { copy(to.as_mut_ptr(), self.base, to.len()) }
    }

    /// Copies all of `from` to the window's first bytes. Panics when the window is shorter.
    pub(super) fn write(&self, from: &[u8]) {
        assert!(from.len() <= self.len);
        // SAFETY: as in `read`.
        unsafe { copy(self.base, from.as_ptr(), from.len()) }
    }

    /// Sets every byte of the window.
    pub(super) fn fill(&self, byte: u8) {
        // SAFETY: exactly the window.
        unsafe {
            match byte {
                0 => copier().fill_zero(self.base, self.len),
                _ => ptr::write_bytes(self.base, byte, self.len),
            }
        }
    }

    /// Where it is in this process.
    pub(super) fn address(&self) -> u64 {
        self.base.addr() as u64
    }

    /// Whether every byte of the window is zero.
    pub(super) fn is_zero(&self) -> bool {
        // SAFETY: exactly the window. Engines do not write what is unbound, and a racing store is seen or not.
        unsafe { copier().is_zero(self.base, self.len) }
    }

    /// Copies `host` to the window. Panics when their lengths differ.
    pub(super) fn upload(&self, host: HostPiece) {
        assert_eq!(host.len, self.len);
        // SAFETY: the window is in bounds, `host` keeps its constructor's promises, and shadows are not device memory.
        unsafe { transfer(self.base, host.addr as *const u8, self.len, CopyHint::ToDevice) }
    }

    /// Copies the window to `host`. Panics when their lengths differ.
    pub(super) fn download(&self, host: HostPiece) {
        assert_eq!(host.len, self.len);
        // SAFETY: as in `upload`.
        unsafe { transfer(host.addr as *mut u8, self.base, self.len, CopyHint::FromDevice) }
    }

    atomic_views!(u8: AtomicU8, u16: AtomicU16, u32: AtomicU32, u64: AtomicU64);
}

/// Host memory to copy from or to: a part of a shadow.
///
/// It carries two promises that the type cannot: a [`Shadow`] is made by the host floor only and is mapped,
/// readable and writable; and whoever makes a piece keeps the shadow borrowed until the last copy that uses
/// it is over.
#[derive(Debug, Clone, Copy)]
pub(super) struct HostPiece {
    addr: usize,
    len: usize,
}

impl HostPiece {
    /// `len` bytes at `at` of `shadow`. Errors when they are not all inside.
    pub(super) fn of(shadow: &Shadow, at: u64, len: u64) -> Result<Self> {
        if at.checked_add(len).is_none_or(|end| end > shadow.span.len()) {
            let reason = format!("{len} bytes at {at:#x} reach past the end of the shadow {}", shadow.span);
            return Err(Error::Invalid { argument: "shadow", reason });
        }
        Ok(Self { addr: (shadow.span.start + at) as usize, len: len as usize })
    }

    /// All of `bytes`, which the caller keeps until the last copy from it is over.
    pub(super) fn own(bytes: &[u8]) -> Self {
        Self { addr: bytes.as_ptr() as usize, len: bytes.len() }
    }

    /// The first `len` bytes, and the rest. Panics when it has fewer.
    pub(super) fn split(self, len: usize) -> (Self, Self) {
        assert!(len <= self.len);
        (Self { len, ..self }, Self { addr: self.addr + len, len: self.len - len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ground::addr::SZ_4K;

    #[test]
    fn both_mappings_are_the_same_memory_and_the_callers_ends_early() {
        let vram = Vram::new(8 * SZ_4K, 2 * SZ_4K, true, 0).unwrap();
        vram.device(SZ_4K, 4).unwrap().write(&[1, 2, 3, 4]);
        let mut seen = [0; 4];
        vram.visible(SZ_4K, 4).unwrap().read(&mut seen);
        assert_eq!(seen, [1, 2, 3, 4]);
        assert!(vram.visible(2 * SZ_4K - 4, 5).is_none());
        assert!(vram.visible(u64::MAX, 1).is_none());
        assert!(vram.device(8 * SZ_4K - 4, 4).is_some() && vram.device(8 * SZ_4K - 4, 5).is_none());
        assert!(Vram::new(SZ_4K, 0, false, 0).unwrap().visible(0, 1).is_none());
    }

    #[test]
    fn the_callers_mapping_begins_where_it_is_asked_to() {
        for (pages, offset) in [(8, 17 * SZ_4K), (1024, SZ_2M - SZ_4K)] {
            let vram = Vram::new(pages * SZ_4K, pages * SZ_4K, true, offset).unwrap();
            assert_eq!(vram.full.base.as_ptr().addr() as u64 % SZ_2M, offset);
            assert_eq!(mapped(&vram), [(pages * SZ_4K) as usize]);
            vram.visible((pages - 1) * SZ_4K, 1).unwrap().write(&[9]);
        }
    }

    /// What the callers have of it in /proc/self/maps: the length of each mapping.
    fn mapped(vram: &Vram) -> Vec<usize> {
        let bases: Vec<usize> = [Some(&vram.full), vram.small_bar.as_ref().and_then(Option::as_ref)]
            .into_iter()
            .flatten()
            .map(|m| m.base.as_ptr() as usize)
            .collect();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let lengths = maps.lines().filter(|l| l.contains("usvm-vram")).filter_map(|l| {
            let (from, to) = l.split(' ').next()?.split_once('-')?;
            let (from, to) = (usize::from_str_radix(from, 16).ok()?, usize::from_str_radix(to, 16).ok()?);
            bases.contains(&from).then_some(to - from)
        });
        let mut lengths: Vec<usize> = lengths.collect();
        lengths.sort_unstable();
        lengths
    }

    #[test]
    fn the_kernel_knows_the_same_ends() {
        let page = SZ_4K as usize;
        assert_eq!(mapped(&Vram::new(8 * SZ_4K, 3 * SZ_4K, false, 0).unwrap()), [3 * page, 8 * page]);
        assert_eq!(mapped(&Vram::new(8 * SZ_4K, 8 * SZ_4K, false, 0).unwrap()), [8 * page]);
    }

    #[test]
    fn zeroes_are_found_out() {
        let vram = Vram::new(4 * SZ_4K, 4 * SZ_4K, false, 0).unwrap();
        let all = vram.visible(0, 4 * SZ_4K as usize).unwrap();
        assert!(all.is_zero());
        vram.device(3 * SZ_4K + 4095, 1).unwrap().fill(1);
        assert!(!all.is_zero());
        all.fill(0);
        assert!(all.is_zero());
    }

    #[test]
    #[should_panic(expected = "is_multiple_of")]
    fn an_unaligned_word_is_refused() {
        let vram = Vram::new(SZ_4K, SZ_4K, false, 0).unwrap();
        vram.device(2, 8).unwrap().u64();
    }
}
