#![allow(unsafe_code)]
//! System calls on this process's memory.
//!
//! # Overview
//! The one place with raw calls for userfaultfd, pagemap, procmap and memory mappings: each is a short, typed function
//! that asks [`inject::check`] first. Structures and numbers come from linux-raw-sys; ioctl numbers are asserted
//! against each other. Calls go to the kernel directly (rustix), never through libc symbols that a preload library
//! replaces.
//!
//! # Safety
//! The ioctls of userfaultfd change the page tables of this process behind the compiler's back. What makes each sound
//! is that the pages concerned are either the application's, which usvm never holds references into, or the shadow
//! area's, which belongs to the caller. That is a promise of this floor, kept by [`super::flip`] and
//! [`super::shadow`]; the functions here are `pub(super)` for that reason, and those that could pull memory from
//! under a live Rust reference are `unsafe`.
//!
//! # Limits
//! x86-64 and other 64-bit Linux; structures as of the uapi of Linux 6.18.

use crate::ground::addr::Span;
use crate::ground::error::Errno;
use crate::ground::inject::{self, Call};
use linux_raw_sys::general as uapi;
use linux_raw_sys::ioctl as numbers;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};
use rustix::mm::{Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags, UserfaultfdFlags};
use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::time::Duration;

pub(super) type Result<T> = std::result::Result<T, Errno>;

const UFFD: u8 = uapi::USERFAULTFD_IOC as u8;
const API: Opcode = opcode::read_write::<uapi::uffdio_api>(UFFD, uapi::_UFFDIO_API as u8);
const REGISTER: Opcode = opcode::read_write::<uapi::uffdio_register>(UFFD, uapi::_UFFDIO_REGISTER as u8);
const UNREGISTER: Opcode = opcode::read::<uapi::uffdio_range>(UFFD, uapi::_UFFDIO_UNREGISTER as u8);
const WAKE: Opcode = opcode::read::<uapi::uffdio_range>(UFFD, uapi::_UFFDIO_WAKE as u8);
const COPY: Opcode = opcode::read_write::<uapi::uffdio_copy>(UFFD, uapi::_UFFDIO_COPY as u8);
const ZEROPAGE: Opcode = opcode::read_write::<uapi::uffdio_zeropage>(UFFD, uapi::_UFFDIO_ZEROPAGE as u8);
const MOVE: Opcode = opcode::read_write::<uapi::uffdio_move>(UFFD, uapi::_UFFDIO_MOVE as u8);
const WRITEPROTECT: Opcode =
    opcode::read_write::<uapi::uffdio_writeprotect>(UFFD, uapi::_UFFDIO_WRITEPROTECT as u8);
const POISON: Opcode = opcode::read_write::<uapi::uffdio_poison>(UFFD, uapi::_UFFDIO_POISON as u8);
/// USERFAULTFD_IOC_NEW.
const NEW: Opcode = opcode::none(UFFD, 0);
/// PAGEMAP_SCAN.
const SCAN: Opcode = opcode::read_write::<uapi::pm_scan_arg>(b'f', 16);
/// PROCMAP_QUERY.
const QUERY: Opcode = opcode::read_write::<uapi::procmap_query>(b'f', 17);

// The numbers that linux-raw-sys spells out must be the ones built here, and the structures must have the kernel's
// sizes.
const _: () = {
    assert!(API == numbers::UFFDIO_API as Opcode);
    assert!(REGISTER == numbers::UFFDIO_REGISTER as Opcode);
    assert!(UNREGISTER == numbers::UFFDIO_UNREGISTER as Opcode);
    assert!(WAKE == numbers::UFFDIO_WAKE as Opcode);
    assert!(COPY == numbers::UFFDIO_COPY as Opcode);
    assert!(ZEROPAGE == numbers::UFFDIO_ZEROPAGE as Opcode);
    assert!(WRITEPROTECT == numbers::UFFDIO_WRITEPROTECT as Opcode);
    assert!(MOVE == 0xc028_aa05);
    assert!(POISON == 0xc020_aa08);
    assert!(NEW == 0xaa00);
    assert!(SCAN == 0xc060_6610);
    assert!(QUERY == 0xc068_6611);
    assert!(size_of::<uapi::uffd_msg>() == 32);
    assert!(size_of::<uapi::page_region>() == 24);
};

/// An ioctl whose argument the caller keeps, so that what the kernel wrote is seen when it fails, too.
struct InOut<'a, T, const OP: Opcode> {
    arg: &'a mut T,
}

// SAFETY: `OP` encodes the size of `T` (built by `opcode::*::<T>` above), `arg` points at a live `T` for the whole
// call, and every `T` used here is plain integers, valid whatever the kernel writes.
unsafe impl<T, const OP: Opcode> Ioctl for InOut<'_, T, OP> {
    type Output = i32;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        OP
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.arg).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

/// USERFAULTFD_IOC_NEW: flags by value in, a new descriptor out.
struct NewFd {
    flags: u32,
}

// SAFETY: the kernel takes the argument as a value and reads or writes no memory.
unsafe impl Ioctl for NewFd {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        NEW
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.flags as usize)
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

fn ioctl<T, const OP: Opcode>(call: Call, fd: BorrowedFd<'_>, arg: &mut T) -> Result<i32> {
    inject::check(call)?;
    // SAFETY: the private callers below pair each `OP` with its structure; what the call does to memory is their
    // callers' promise (module docs).
    Ok(unsafe { rustix::ioctl::ioctl(fd, InOut::<T, OP> { arg }) }?)
}

fn range(span: Span) -> uapi::uffdio_range {
    uapi::uffdio_range { start: span.start, len: span.len() }
}

/// A call that stopped before its end: how many bytes are done, and why it stopped. After progress the kernel says
/// EAGAIN whatever the reason; asking again for the rest tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Partial {
    pub(super) done: u64,
    pub(super) errno: Errno,
}

impl Partial {
    /// `done` as the kernel leaves it: bytes, or a negative errno.
    fn new(errno: Errno, done: i64) -> Self {
        Self { done: u64::try_from(done).unwrap_or(0), errno }
    }
}

/// Opens a file of /proc, /sys or /dev.
pub(super) fn open(path: &str, flags: OFlags) -> Result<OwnedFd> {
    inject::check(Call::Open)?;
    Ok(rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())?)
}

/// A userfaultfd from /dev/userfaultfd.
pub(super) fn uffd_from_device() -> Result<OwnedFd> {
    inject::check(Call::UffdDevice)?;
    let device = rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let flags = (OFlags::CLOEXEC | OFlags::NONBLOCK).bits();
    // SAFETY: see `NewFd`; a fresh userfaultfd watches nothing.
    let raw = unsafe { rustix::ioctl::ioctl(&device, NewFd { flags }) }?;
    // SAFETY: the kernel just gave us this descriptor; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// A userfaultfd from the system call.
pub(super) fn uffd_from_syscall(user_mode_only: bool) -> Result<OwnedFd> {
    inject::check(Call::UffdOpen)?;
    let mut flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    if user_mode_only {
        flags |= UserfaultfdFlags::from_bits_retain(uapi::UFFD_USER_MODE_ONLY);
    }
    // SAFETY: a fresh userfaultfd watches nothing.
    Ok(unsafe { rustix::mm::userfaultfd(flags) }?)
}

/// UFFDIO_API: switches `features` on and gives those the kernel has.
pub(super) fn uffd_api(fd: BorrowedFd<'_>, features: u64) -> Result<u64> {
    let mut arg = uapi::uffdio_api { api: uapi::UFFD_API.into(), features, ioctls: 0 };
    ioctl::<_, API>(Call::UffdApi, fd, &mut arg)?;
    Ok(arg.features)
}

/// What registration catches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RegisterMode {
    pub(super) missing: bool,
    pub(super) write_protect: bool,
}

/// UFFDIO_REGISTER.
pub(super) fn uffd_register(fd: BorrowedFd<'_>, span: Span, mode: RegisterMode) -> Result<()> {
    let bit = |on: bool, bit: u32| if on { u64::from(bit) } else { 0 };
    let mode = bit(mode.missing, uapi::UFFDIO_REGISTER_MODE_MISSING)
        | bit(mode.write_protect, uapi::UFFDIO_REGISTER_MODE_WP);
    let mut arg = uapi::uffdio_register { range: range(span), mode, ioctls: 0 };
    ioctl::<_, REGISTER>(Call::Register, fd, &mut arg).map(drop)
}

/// UFFDIO_UNREGISTER: wakes who waits there.
pub(super) fn uffd_unregister(fd: BorrowedFd<'_>, span: Span) -> Result<()> {
    ioctl::<_, UNREGISTER>(Call::Unregister, fd, &mut range(span)).map(drop)
}

/// UFFDIO_WAKE.
pub(super) fn uffd_wake(fd: BorrowedFd<'_>, span: Span) -> Result<()> {
    ioctl::<_, WAKE>(Call::Wake, fd, &mut range(span)).map(drop)
}

/// UFFDIO_MOVE of `len` bytes. With `wake`, waiters in what arrived at `dst` are woken.
///
/// # Safety
/// No Rust reference may point into either side.
pub(super) unsafe fn uffd_move(
    fd: BorrowedFd<'_>,
    dst: u64,
    src: u64,
    len: u64,
    wake: bool,
) -> std::result::Result<(), Partial> {
    /// UFFDIO_MOVE_MODE_DONTWAKE.
    const DONTWAKE: u64 = 1;
    let mut arg = uapi::uffdio_move { dst, src, len, mode: if wake { 0 } else { DONTWAKE }, move_: 0 };
    match ioctl::<_, MOVE>(Call::Move, fd, &mut arg) {
        Ok(_) => Ok(()),
        Err(errno) => Err(Partial::new(errno, arg.move_)),
    }
}

/// UFFDIO_COPY of `len` bytes into holes at `dst`; wakes their waiters.
///
/// # Safety
/// `src` must be readable memory that no Rust code writes meanwhile.
pub(super) unsafe fn uffd_copy(
    fd: BorrowedFd<'_>,
    dst: u64,
    src: u64,
    len: u64,
) -> std::result::Result<(), Partial> {
    let mut arg = uapi::uffdio_copy { dst, src, len, mode: 0, copy: 0 };
    match ioctl::<_, COPY>(Call::Copy, fd, &mut arg) {
        Ok(_) => Ok(()),
        Err(errno) => Err(Partial::new(errno, arg.copy)),
    }
}

/// UFFDIO_ZEROPAGE: fills holes with zeroes; wakes their waiters.
pub(super) fn uffd_zeropage(fd: BorrowedFd<'_>, span: Span) -> std::result::Result<(), Partial> {
    let mut arg = uapi::uffdio_zeropage { range: range(span), mode: 0, zeropage: 0 };
    match ioctl::<_, ZEROPAGE>(Call::Zeropage, fd, &mut arg) {
        Ok(_) => Ok(()),
        Err(errno) => Err(Partial::new(errno, arg.zeropage)),
    }
}

/// Whether an event about mappings is unread, or about to be queued: mmap_changing of the kernel, which is asked by an
/// UFFDIO_ZEROPAGE of nothing. It refuses that with EINVAL, and in that time with EAGAIN.
pub(super) fn uffd_is_changing(fd: BorrowedFd<'_>) -> bool {
    let nothing = Span::new(0, 0);
    uffd_zeropage(fd, nothing).is_err_and(|partial| partial.errno != Errno(libc::EINVAL))
}

/// UFFDIO_POISON: makes holes answer SIGBUS; wakes their waiters.
pub(super) fn uffd_poison(fd: BorrowedFd<'_>, span: Span) -> std::result::Result<(), Partial> {
    let mut arg = uapi::uffdio_poison { range: range(span), mode: 0, updated: 0 };
    match ioctl::<_, POISON>(Call::Poison, fd, &mut arg) {
        Ok(_) => Ok(()),
        Err(errno) => Err(Partial::new(errno, arg.updated)),
    }
}

/// UFFDIO_WRITEPROTECT: arms or disarms. Disarming does not wake.
pub(super) fn uffd_write_protect(fd: BorrowedFd<'_>, span: Span, arm: bool) -> Result<()> {
    /// UFFDIO_WRITEPROTECT_MODE_WP.
    const WP: u64 = 1;
    /// UFFDIO_WRITEPROTECT_MODE_DONTWAKE.
    const DONTWAKE: u64 = 2;
    let mut arg = uapi::uffdio_writeprotect { range: range(span), mode: if arm { WP } else { DONTWAKE } };
    ioctl::<_, WRITEPROTECT>(Call::WriteProtect, fd, &mut arg).map(drop)
}

/// What PAGEMAP_SCAN looks for, as PAGE_IS_* bits.
#[derive(Debug, Clone, Copy)]
pub(super) struct ScanFor {
    /// All of these.
    pub(super) all: u64,
    /// And at least one of these, if there are any.
    pub(super) any: u64,
    /// Which bits to give back.
    pub(super) report: u64,
    /// Write-protect what was found; fails where that is not asynchronous.
    pub(super) arm: bool,
}

/// PAGEMAP_SCAN of `span` into `regions`; how many were written. Fewer than all where `regions` is full.
pub(super) fn pagemap_scan(
    pagemap: BorrowedFd<'_>,
    span: Span,
    what: ScanFor,
    regions: &mut [uapi::page_region],
) -> Result<usize> {
    let arm = u64::from(uapi::PM_SCAN_WP_MATCHING | uapi::PM_SCAN_CHECK_WPASYNC);
    let mut arg = uapi::pm_scan_arg {
        size: size_of::<uapi::pm_scan_arg>() as u64,
        flags: if what.arm { arm } else { 0 },
        start: span.start,
        end: span.end,
        walk_end: 0,
        vec: regions.as_mut_ptr().addr() as u64,
        vec_len: regions.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: what.all,
        category_anyof_mask: what.any,
        return_mask: what.report,
    };
    // The pointer travels as an integer inside the structure.
    regions.as_mut_ptr().expose_provenance();
    let found = ioctl::<_, SCAN>(Call::PagemapScan, pagemap, &mut arg)?;
    Ok(found as usize)
}

/// The words of /proc/thread-self/pagemap for the pages from `addr` on.
pub(super) fn pagemap_read(pagemap: BorrowedFd<'_>, addr: u64, words: &mut [u64]) -> Result<usize> {
    inject::check(Call::PagemapRead)?;
    let len = size_of_val(words);
    // SAFETY: a slice of integers is also a slice of bytes, and any bytes are valid integers.
    let bytes = unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), len) };
    let offset = (addr >> crate::ground::addr::PAGE_SHIFT) * size_of::<u64>() as u64;
    Ok(rustix::io::pread(pagemap, bytes, offset)? / size_of::<u64>())
}

/// pread(2) of /proc/thread-self/mem: reads this process's memory at `addr`. Where a page is missing under userfaultfd it fails
/// with EIO and queues no fault: that file's accesses do not wait (FAULT_FLAG_ALLOW_RETRY is not set).
pub(super) fn memory_read(memory: BorrowedFd<'_>, addr: u64, to: &mut [u8]) -> Result<usize> {
    inject::check(Call::MemoryRead)?;
    Ok(rustix::io::pread(memory, to, addr)?)
}

/// Gives this process a page of its own at `page`, which may be shared copy-on-write, and changes nothing in it: a
/// FUTEX_WAKE_OP that ORs zero to its first word. EFAULT where a page is missing under userfaultfd (as above, it does not
/// wait) or may not be written. Somebody who waits for that very word may be woken for nothing, which futexes allow.
pub(super) fn make_own(page: u64) -> Result<()> {
    /// FUTEX_OP_OR, and the comparison that is rarely true: below -2048.
    const OR_NOTHING: libc::c_int = 2 << 28 | 2 << 24 | 0x800;
    inject::check(Call::MakeOwn)?;
    let nobody = 0u32;
    let op = libc::FUTEX_WAKE_OP | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the first word is a local one that nobody waits for. The kernel checks the other; it is changed to itself,
    // atomically.
    let done = unsafe {
        let none = std::ptr::null::<libc::timespec>();
        libc::syscall(libc::SYS_futex, &raw const nobody, op, 0, none, page, OR_NOTHING)
    };
    if done < 0 {
        Err(Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EFAULT)))
    } else {
        Ok(())
    }
}

/// PROCMAP_QUERY: the mapping that covers `addr` or the next one; `name` takes its name.
pub(super) fn procmap_query(maps: BorrowedFd<'_>, addr: u64, name: &mut [u8]) -> Result<uapi::procmap_query> {
    let mut arg = uapi::procmap_query {
        size: size_of::<uapi::procmap_query>() as u64,
        query_flags: uapi::procmap_query_flags::PROCMAP_QUERY_COVERING_OR_NEXT_VMA as u64,
        query_addr: addr,
        vma_start: 0,
        vma_end: 0,
        vma_flags: 0,
        vma_page_size: 0,
        vma_offset: 0,
        inode: 0,
        dev_major: 0,
        dev_minor: 0,
        vma_name_size: name.len() as u32,
        build_id_size: 0,
        vma_name_addr: if name.is_empty() { 0 } else { name.as_mut_ptr().expose_provenance() as u64 },
        build_id_addr: 0,
    };
    ioctl::<_, QUERY>(Call::ProcmapQuery, maps, &mut arg)?;
    Ok(arg)
}

/// read(2).
pub(super) fn read(fd: impl AsFd, buf: &mut [u8]) -> Result<usize> {
    inject::check(Call::Read)?;
    Ok(rustix::io::read(fd, buf)?)
}

/// Sets the position of `fd` to its start.
pub(super) fn rewind(fd: impl AsFd) -> Result<()> {
    inject::check(Call::Seek)?;
    Ok(rustix::fs::seek(fd, rustix::fs::SeekFrom::Start(0)).map(drop)?)
}

/// write(2).
pub(super) fn write(fd: impl AsFd, buf: &[u8]) -> Result<usize> {
    inject::check(Call::Write)?;
    Ok(rustix::io::write(fd, buf)?)
}

/// A non-blocking eventfd.
pub(super) fn eventfd() -> Result<OwnedFd> {
    inject::check(Call::Eventfd)?;
    Ok(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Waits until one of two descriptors is readable; which are. `None` waits for ever.
pub(super) fn poll2(fds: [BorrowedFd<'_>; 2], timeout: Option<Duration>) -> Result<[bool; 2]> {
    inject::check(Call::Poll)?;
    let mut polled = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    let timeout = timeout.map(|t| Timespec {
        tv_sec: t.as_secs().min(i64::MAX as u64) as i64,
        tv_nsec: t.subsec_nanos().into(),
    });
    rustix::event::poll(&mut polled, timeout.as_ref())?;
    Ok([0, 1].map(|i| !polled[i].revents().is_empty()))
}

/// Anonymous private memory without access rights, wherever the kernel likes; `len` bytes.
pub(super) fn reserve(len: u64) -> Result<Span> {
    inject::check(Call::Mmap)?;
    // SAFETY: without a fixed address no mapping of anybody is touched.
    let at = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            len as usize,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }?;
    Ok(Span::sized(at.expose_provenance() as u64, len))
}

/// Replaces whatever is mapped at `span` by fresh, readable and writable anonymous memory.
///
/// # Safety
/// `span` must belong to the caller, and no reference may point into it.
pub(super) unsafe fn map_fresh_at(span: Span) -> Result<()> {
    inject::check(Call::Mmap)?;
    // SAFETY: the caller's promise.
    unsafe {
        rustix::mm::mmap_anonymous(
            pointer(span.start),
            span.len() as usize,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
        )
    }?;
    Ok(())
}

/// munmap(2).
///
/// # Safety
/// `span` must belong to the caller, and no reference may point into it.
pub(super) unsafe fn unmap(span: Span) -> Result<()> {
    inject::check(Call::Munmap)?;
    // SAFETY: the caller's promise.
    Ok(unsafe { rustix::mm::munmap(pointer(span.start), span.len() as usize) }?)
}

/// mprotect(2) to read and write, or to nothing.
///
/// # Safety
/// No reference may point into `span` when access is taken away.
pub(super) unsafe fn protect(span: Span, access: bool) -> Result<()> {
    inject::check(Call::Mprotect)?;
    let flags = if access { MprotectFlags::READ | MprotectFlags::WRITE } else { MprotectFlags::empty() };
    // SAFETY: the caller's promise.
    Ok(unsafe { rustix::mm::mprotect(pointer(span.start), span.len() as usize, flags) }?)
}

/// munlock(2): for arenas of a process that said mlockall(MCL_FUTURE).
pub(super) fn unlock(span: Span) -> Result<()> {
    inject::check(Call::Munlock)?;
    // SAFETY: locking changes no contents.
    Ok(unsafe { rustix::mm::munlock(pointer(span.start), span.len() as usize) }?)
}

/// madvise(2).
///
/// # Safety
/// Advice that drops pages needs a `span` that belongs to the caller without references into it.
pub(super) unsafe fn advise(span: Span, advice: Advice) -> Result<()> {
    inject::check(Call::Madvise)?;
    // SAFETY: the caller's promise.
    Ok(unsafe { rustix::mm::madvise(pointer(span.start), span.len() as usize, advice) }?)
}

/// Moves the pages of `from` to `to` with mremap(2) MREMAP_DONTUNMAP: the old mapping stays, empty; what was mapped
/// at `to` is replaced.
///
/// # Safety
/// `to` must belong to the caller, no reference may point into either side, and losing the pages of `from` must be
/// what the caller wants (a userfaultfd catches who touches them).
pub(super) unsafe fn remap_away(from: Span, to: u64) -> Result<()> {
    inject::check(Call::Mremap)?;
    let len = from.len() as usize;
    // SAFETY: the caller's promise.
    let at = unsafe {
        rustix::mm::mremap_fixed(
            pointer(from.start),
            len,
            len,
            MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP,
            pointer(to),
        )
    }?;
    debug_assert_eq!(at.addr() as u64, to);
    Ok(())
}

/// An address as the pointer a mapping call wants.
fn pointer(addr: u64) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(addr as usize)
}

/// Takes all access from `span`, so that who touches it gets SIGSEGV. For lost data that cannot be poisoned.
pub(super) fn deny(span: Span) -> Result<()> {
    // SAFETY: the data is lost and the program must not go on with it; no Rust reference of usvm points there.
    unsafe { protect(span, false) }
}

/// Closes what is behind `fd` at once, whoever else still uses the descriptor: from then on it is an eventfd, an empty one
/// or, when there is no descriptor for that, `instead`; userfaultfd calls on it fail.
pub(super) fn retire(fd: BorrowedFd<'_>, instead: BorrowedFd<'_>) -> Result<()> {
    let nothing = eventfd();
    let nothing = nothing.as_ref().map_or(instead, AsFd::as_fd);
    inject::check(Call::Dup)?;
    // SAFETY: an open descriptor of ours; its owner goes on owning it, for this one is never dropped.
    let mut number = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(fd.as_raw_fd()) });
    // By system call, not by libc's function, which the preload library keeps off usvm's own descriptors.
    Ok(rustix::io::dup3(nothing, &mut number, rustix::io::DupFlags::CLOEXEC)?)
}
