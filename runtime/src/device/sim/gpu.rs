//! What a kernel sees: memory, by GPU virtual address and no other way.
//!
//! # Overview
//! A [`Gpu`] is lent to a job while it runs. Every access is cut into pieces that one translation covers;
//! each piece is translated by the engine's TLB or a walk and done while the TLB's lock is held, so that an
//! unbind which returned leaves no access behind. A piece without a (sufficient) translation is a fault: the
//! device's [`FaultSink`] is asked to make one, with no lock held, and the piece is tried again. Where faults
//! cannot be recovered from, the access is an error, which the job should return.
//!
//! Bulk data passes through the engine's local tile of 64 KiB, the shared local memory of real hardware. So
//! no reference to device memory exists, and no lock is held while a caller's buffer is touched, which may
//! itself be memory that has to be brought back first.
//!
//! # Locking
//! The engine's TLB for one piece; nothing while the sink, a closure of the caller's, or the kernel works.
//!
//! # Limits
//! Pages with [`Backing::System`](crate::space::ports::Backing::System) are reached by system call with no
//! lock held, because such an access may have to wait for a CPU fault. An unbind does not wait for it; it is
//! exactly as late, and as coherent, as an access of a CPU thread to the same address: it meets the
//! application's memory or faults. Aligned single loads and stores of device memory are atomic; bulk
//! accesses, and single ones to system pages, are not.

use super::page_table::{Translation, VA_END};
use super::shared::{Shared, Unit};
use super::system;
use super::vram::Window;
use crate::ground::addr::Span;
use crate::ground::error::{Errno, Error, Result};
use crate::space::ports::{FaultSink, GpuAccess};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Bytes of the engine's local memory.
pub(super) const TILE: usize = 64 << 10;
/// Faults that one piece may take.
const MAX_FAULTS: u32 = 64;
/// Times that system memory may turn out to be gone behind a translation.
const MAX_GONE: u32 = 3;

/// Where a piece of an access goes.
enum Place<'a> {
    /// Device memory; the TLB is held.
    Vram(Window<'a>),
    /// The process's own memory at the same address; nothing is held.
    System(u64),
}

/// What one try came to.
enum Try<R> {
    Done(R),
    /// No translation, or none that allows this.
    Fault,
    /// The translation leads to system memory that is not there.
    Gone,
}

/// A fault that was served: the page is held for this engine until it was used.
struct Served(Arc<dyn FaultSink>);

impl Drop for Served {
    fn drop(&mut self) {
        self.0.fault_done();
    }
}

/// The engine's way to memory.
#[derive(Clone, Copy)]
struct Bus<'a> {
    shared: &'a Shared,
    unit: &'a Unit,
}

impl<'a> Bus<'a> {
    /// Does `op` on the first piece of `len` bytes at `addr`, faulting as often as it takes. `op` gets the
    /// piece and how long it is.
    fn access<R>(
        self,
        addr: u64,
        len: usize,
        access: GpuAccess,
        mut op: impl FnMut(Place<'_>, usize) -> std::result::Result<R, Errno>,
    ) -> Result<R> {
        let mut served = None;
        let mut gone = 0;
        for faults in 0..=MAX_FAULTS {
            self.shared.status()?;
            let tried = self.attempt(addr, len, access, &mut op);
            let was_served = served.take().is_some();
            match tried? {
                Try::Done(done) => return Ok(done),
                Try::Gone if gone == MAX_GONE => return Err(Error::Gone { addr }),
                Try::Gone => gone += 1,
                Try::Fault if was_served => self.still_no_atomics(addr, access)?,
                Try::Fault => {}
            }
            if faults < MAX_FAULTS {
                served = self.fault(addr, len, access)?;
            }
        }
        Err(Error::Again { what: "serving a device fault", tries: MAX_FAULTS })
    }

    fn attempt<R>(
        self,
        addr: u64,
        len: usize,
        access: GpuAccess,
        op: &mut impl FnMut(Place<'_>, usize) -> std::result::Result<R, Errno>,
    ) -> Result<Try<R>> {
        let mut tlb = self.unit.hold();
        let counters = &self.unit.counters;
        let cached = tlb.lookup(addr).filter(|t| t.entry.allows(access));
        let translation = match cached {
            Some(t) => {
                counters.tlb_hits.add(1);
                t
            }
            None => {
                counters.tlb_misses.add(1);
                counters.walks.add(1);
                let Some(t) = self.shared.walk(addr, access) else { return Ok(Try::Fault) };
                tlb.fill(t);
                t
            }
        };
        let len = piece_len(&translation, addr, len);
        if !translation.entry.is_system() {
            let window = self.shared.vram.device(translation.target(addr), len);
            let window = window.expect("bind refuses what is not device memory");
            return op(Place::Vram(window), len).map(Try::Done).map_err(|e| Error::os("device copy", e));
        }
        drop(tlb);
        match self.unit.reaching(Span::sized(addr, len as u64), || op(Place::System(addr), len)) {
            Ok(done) => Ok(Try::Done(done)),
            Err(Errno(libc::EFAULT)) => Ok(Try::Gone),
            Err(e) => Err(Error::os("process_vm_readv/writev", e)),
        }
    }

    /// Has the fault at `addr` served, for as much of `len` as is in its page.
    fn fault(self, addr: u64, len: usize, access: GpuAccess) -> Result<Option<Served>> {
        self.unit.counters.faults.add(1);
        let cannot_wait = Error::DeviceFault { addr, access: access_name(access) };
        if !self.shared.info.recoverable_faults {
            return Err(cannot_wait);
        }
        let sink = self.shared.sink().ok_or(cannot_wait)?;
        let in_page = crate::ground::addr::SZ_4K - addr % crate::ground::addr::SZ_4K;
        match sink.gpu_fault(addr, in_page.min(len as u64), access) {
            Ok(()) => Ok(Some(Served(sink))),
            Err(Error::Again { .. }) => {
                std::thread::yield_now();
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// An atomic whose fault was served and that still finds system memory will find it the next time too.
    fn still_no_atomics(self, addr: u64, access: GpuAccess) -> Result<()> {
        let there = self.shared.walk(addr, GpuAccess::Read).is_some_and(|t| t.entry.is_system());
        if access == GpuAccess::Atomic && there {
            let what =
                format!("a device atomic at {addr:#x}, which is system memory: the link has no atomics");
            return Err(Error::NotSupported(what));
        }
        Ok(())
    }
}

fn piece_len(translation: &Translation, addr: u64, len: usize) -> usize {
    usize::try_from(translation.end() - addr).map_or(len, |left| left.min(len))
}

fn access_name(access: GpuAccess) -> &'static str {
    match access {
        GpuAccess::Read => "load",
        GpuAccess::Write => "store",
        GpuAccess::Atomic => "atomic",
    }
}

/// A running job's view of the device. Every address is a GPU virtual address, which is the CPU's for the
/// same data.
///
/// Every method errors with what made the access impossible: [`Error::DeviceFault`] where faults are not
/// recoverable, the fault sink's own error where they are, [`Error::DeviceLost`], [`Error::OutsideSpace`].
/// Part of the access may have been done by then. Return the error from the job; a job that swallows it is
/// believed.
pub struct Gpu<'a> {
    bus: Bus<'a>,
    tile: &'a mut [u8],
}

macro_rules! scalars {
    ($($ty:ident: $load:ident, $store:ident);* $(;)?) => {$(
        #[doc = concat!("Loads the `", stringify!($ty), "` at `addr`, which must be naturally aligned.")]
        pub fn $load(&mut self, addr: u64) -> Result<$ty> {
            const LEN: usize = size_of::<$ty>();
            check_aligned(addr, LEN)?;
            let value = self.bus.access(addr, LEN, GpuAccess::Read, |place, _| match place {
                Place::Vram(window) => Ok((window.$ty().load(Ordering::Acquire), false)),
                Place::System(addr) => {
                    let mut bytes = [0; LEN];
                    whole(system::read(addr, &mut bytes)?, LEN)?;
                    Ok(($ty::from_ne_bytes(bytes), true))
                }
            });
            self.counted(value, LEN, 0)
        }

        #[doc = concat!("Stores `value` at `addr`, which must be naturally aligned.")]
        pub fn $store(&mut self, addr: u64, value: $ty) -> Result<()> {
            const LEN: usize = size_of::<$ty>();
            check_aligned(addr, LEN)?;
            let stored = self.bus.access(addr, LEN, GpuAccess::Write, |place, _| match place {
                Place::Vram(window) => Ok((window.$ty().store(value, Ordering::Release), false)),
                Place::System(addr) => {
                    Ok((whole(system::write(addr, &value.to_ne_bytes())?, LEN)?, true))
                }
            });
            self.counted(stored, 0, LEN)
        }
    )*};
}

macro_rules! atomics {
    ($($ty:ident: $add:ident, $or:ident, $swap:ident, $cas:ident);* $(;)?) => {$(
        #[doc = concat!("Adds `value` to the `", stringify!($ty), "` at `addr`, wrapping; gives what was there.")]
        pub fn $add(&mut self, addr: u64, value: $ty) -> Result<$ty> {
            self.atomic(addr, size_of::<$ty>(), |w| w.$ty().fetch_add(value, Ordering::AcqRel))
        }

        #[doc = concat!("Ors `value` into the `", stringify!($ty), "` at `addr`; gives what was there.")]
        pub fn $or(&mut self, addr: u64, value: $ty) -> Result<$ty> {
            self.atomic(addr, size_of::<$ty>(), |w| w.$ty().fetch_or(value, Ordering::AcqRel))
        }

        #[doc = concat!("Replaces the `", stringify!($ty), "` at `addr`; gives what was there.")]
        pub fn $swap(&mut self, addr: u64, value: $ty) -> Result<$ty> {
            self.atomic(addr, size_of::<$ty>(), |w| w.$ty().swap(value, Ordering::AcqRel))
        }

        #[doc = concat!("Replaces the `", stringify!($ty), "` at `addr` with `new` if it is `current`. Gives what was there: `Ok` if it \
                         was replaced, `Err` if not.")]
        pub fn $cas(&mut self, addr: u64, current: $ty, new: $ty) -> Result<std::result::Result<$ty, $ty>> {
            self.atomic(addr, size_of::<$ty>(), |w| {
                w.$ty().compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
            })
        }
    )*};
}

impl<'a> Gpu<'a> {
    pub(super) fn new(shared: &'a Shared, unit: &'a Unit, tile: &'a mut [u8]) -> Self {
        Self { bus: Bus { shared, unit }, tile }
    }

    /// Fills `to` with what is at `addr`.
    pub fn read(&mut self, addr: u64, to: &mut [u8]) -> Result<()> {
        check_range(addr, to.len() as u64)?;
        for (n, chunk) in to.chunks_mut(TILE).enumerate() {
            self.load(addr + (n * TILE) as u64, 0..chunk.len(), GpuAccess::Read)?;
            chunk.copy_from_slice(&self.tile[..chunk.len()]);
        }
        Ok(())
    }

    /// Puts `from` at `addr`.
    pub fn write(&mut self, addr: u64, from: &[u8]) -> Result<()> {
        check_range(addr, from.len() as u64)?;
        for (n, chunk) in from.chunks(TILE).enumerate() {
            self.tile[..chunk.len()].copy_from_slice(chunk);
            self.store(addr + (n * TILE) as u64, 0..chunk.len())?;
        }
        Ok(())
    }

    /// Reads, changes and writes back `len` bytes at `addr`, in tiles of 64 KiB and a last shorter one. `f`
    /// gets each tile and how far from `addr` it begins. Not atomic: what others store to a tile meanwhile is
    /// overwritten.
    pub fn update(&mut self, addr: u64, len: u64, mut f: impl FnMut(&mut [u8], u64)) -> Result<()> {
        check_range(addr, len)?;
        for (offset, n) in tiles(len) {
            self.load(addr + offset, 0..n, GpuAccess::Write)?;
            f(&mut self.tile[..n], offset);
            self.store(addr + offset, 0..n)?;
        }
        Ok(())
    }

    /// Shows `f` the `len` bytes at `addr`, in tiles of 64 KiB and a last shorter one, each with how far from
    /// `addr` it begins.
    pub fn for_each_tile(&mut self, addr: u64, len: u64, mut f: impl FnMut(&[u8], u64)) -> Result<()> {
        check_range(addr, len)?;
        for (offset, n) in tiles(len) {
            self.load(addr + offset, 0..n, GpuAccess::Read)?;
            f(&self.tile[..n], offset);
        }
        Ok(())
    }

    /// Sets `len` bytes at `addr` to `byte`.
    pub fn fill(&mut self, addr: u64, len: u64, byte: u8) -> Result<()> {
        check_range(addr, len)?;
        self.tile.fill(byte);
        tiles(len).try_for_each(|(offset, n)| self.store(addr + offset, 0..n))
    }

    /// Copies `len` bytes from `src` to `dst`, which may overlap (memmove).
    pub fn copy(&mut self, dst: u64, src: u64, len: u64) -> Result<()> {
        check_range(dst, len)?;
        check_range(src, len)?;
        let mut one = |(offset, n): (u64, usize)| {
            self.load(src + offset, 0..n, GpuAccess::Read)?;
            self.store(dst + offset, 0..n)
        };
        if dst > src && dst - src < len {
            tiles(len).rev().try_for_each(&mut one)
        } else {
            tiles(len).try_for_each(&mut one)
        }
    }

    scalars! {
        u8: load_u8, store_u8;
        u16: load_u16, store_u16;
        u32: load_u32, store_u32;
        u64: load_u64, store_u64;
    }

    atomics! {
        u32: fetch_add_u32, fetch_or_u32, exchange_u32, compare_exchange_u32;
        u64: fetch_add_u64, fetch_or_u64, exchange_u64, compare_exchange_u64;
    }

    fn atomic<R>(&mut self, addr: u64, len: usize, op: impl Fn(Window<'_>) -> R) -> Result<R> {
        check_aligned(addr, len)?;
        let done = self.bus.access(addr, len, GpuAccess::Atomic, |place, _| match place {
            Place::Vram(window) => Ok((op(window), false)),
            Place::System(_) => Err(Errno(libc::EOPNOTSUPP)),
        });
        self.counted(done, len, len)
    }

    /// Fills `part` of the tile with what is at `addr`.
    fn load(&mut self, addr: u64, part: Range<usize>, access: GpuAccess) -> Result<()> {
        let mut at = part.start;
        while at < part.end {
            let to = &mut self.tile[at..part.end];
            let moved = self.bus.access(
                addr + (at - part.start) as u64,
                to.len(),
                access,
                |place, len| match place {
                    Place::Vram(window) => {
                        window.read(&mut to[..len]);
                        Ok(((len), false))
                    }
                    Place::System(addr) => Ok((system::read(addr, &mut to[..len])?, true)),
                },
            )?;
            at += self.counted(Ok(moved), moved.0, 0)?;
        }
        Ok(())
    }

    /// Puts `part` of the tile at `addr`.
    fn store(&mut self, addr: u64, part: Range<usize>) -> Result<()> {
        let mut at = part.start;
        while at < part.end {
            let from = &self.tile[at..part.end];
            let here = addr + (at - part.start) as u64;
            let moved = self.bus.access(here, from.len(), GpuAccess::Write, |place, len| match place {
                Place::Vram(window) => {
                    window.write(&from[..len]);
                    Ok((len, false))
                }
                Place::System(addr) => Ok((system::write(addr, &from[..len])?, true)),
            })?;
            at += self.counted(Ok(moved), 0, moved.0)?;
        }
        Ok(())
    }

    /// Counts an access that worked, over the link or not, and gives its result.
    fn counted<R>(&self, done: Result<(R, bool)>, read: usize, written: usize) -> Result<R> {
        let (result, remote) = done?;
        let c = &self.bus.unit.counters;
        let (reads, writes) =
            if remote { (&c.remote_read, &c.remote_written) } else { (&c.local_read, &c.local_written) };
        reads.add(read as u64);
        writes.add(written as u64);
        let lines = (read.div_ceil(LINE) + written.div_ceil(LINE)) * LINE;
        if remote { &c.remote_lines } else { &c.local_lines }.add(lines as u64);
        Ok(result)
    }
}

/// Memory is read and written in lines of so many bytes, however few are wanted: what modelled time counts.
const LINE: usize = 64;

/// The tiles of `len` bytes: how far in each begins, and how long it is.
fn tiles(len: u64) -> impl DoubleEndedIterator<Item = (u64, usize)> {
    let tile = TILE as u64;
    (0..len.div_ceil(tile)).map(move |n| (n * tile, (len - n * tile).min(tile) as usize))
}

fn whole(moved: usize, want: usize) -> std::result::Result<(), Errno> {
    if moved == want { Ok(()) } else { Err(Errno(libc::EFAULT)) }
}

fn check_range(addr: u64, len: u64) -> Result<()> {
    match addr.checked_add(len) {
        Some(end) if end <= VA_END => Ok(()),
        _ => Err(Error::OutsideSpace { addr }),
    }
}

fn check_aligned(addr: u64, len: usize) -> Result<()> {
    check_range(addr, len as u64)?;
    if addr.is_multiple_of(len as u64) {
        return Ok(());
    }
    let reason = format!("{addr:#x} is not aligned to the {len} bytes of one access");
    Err(Error::Invalid { argument: "address", reason })
}
