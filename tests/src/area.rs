//! Memory by address, an independent copy of its contents, and the device's view of it.
//!
//! # Overview
//! An [`Area`] is a private anonymous mapping with unmapped-access guards on both sides, so that its ranges are its own. A
//! [`Piece`] is memory somewhere together with what must be in it; [`Piece::check`] compares both views, and goes on
//! using the memory from both sides.
//!
//! # Safety
//! Everything works on raw addresses of memory that no Rust object lives in, by volatile copies in functions that are
//! safe to call only because tests know what they mapped: a wrong address is a crash of the test.
//!
//! # Limits
//! For tests only; panics on every unexpected error.

use std::io;
use std::sync::{Arc, Mutex};

use usvm::ground::alloc;
use usvm::{Config, Result, Runtime};

/// Bytes of a page, of a middle chunk, of a large one.
pub const K4: u64 = 4 << 10;
/// A middle chunk.
pub const K64: u64 = 64 << 10;
/// A large chunk.
pub const M2: u64 = 2 << 20;

/// A runtime with `vram` bytes of device memory.
pub fn runtime(vram: u64) -> Runtime {
    Runtime::start(config(vram)).expect("a runtime starts")
}

/// The default configuration with `vram` bytes of device memory.
pub fn config(vram: u64) -> Config {
    let mut config = Config::default();
    config.vram = Some(vram);
    config
}

/// A small generator (xorshift64*).
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// Any seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn word(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.word() >> 8) % n
    }

    /// `len` bytes, every word different.
    pub fn bytes(&mut self, len: u64) -> Vec<u8> {
        let mut out = Vec::with_capacity(len as usize + 8);
        while out.len() < len as usize {
            out.extend_from_slice(&self.word().to_le_bytes());
        }
        out.truncate(len as usize);
        out
    }
}

/// The CPU's view of `[at, at + len)`.
pub fn cpu_read(at: u64, len: u64) -> Vec<u8> {
    let mut out = vec![0u8; len as usize];
    // SAFETY: the test mapped it (module docs); both are `len` bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(std::hint::black_box(at) as *const u8, out.as_mut_ptr(), len as usize)
    };
    out
}

/// Stores `bytes` at `at` by the CPU.
pub fn cpu_write(at: u64, bytes: &[u8]) {
    // SAFETY: as in `cpu_read`, and no Rust object lives there.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), std::hint::black_box(at) as *mut u8, bytes.len())
    };
}

/// One byte by the CPU.
pub fn cpu_peek(at: u64) -> u8 {
    // SAFETY: as in `cpu_read`.
    unsafe { (at as *const u8).read_volatile() }
}

/// The device's view of `[at, at + len)`.
pub fn device_read(rt: &Runtime, at: u64, len: u64) -> Result<Vec<u8>> {
    let out = alloc::internal(|| Arc::new(Mutex::new(Vec::new())));
    let filled = out.clone();
    rt.launch(0, move |gpu| {
        let mut bytes = vec![0u8; len as usize];
        gpu.read(at, &mut bytes)?;
        *filled.lock().unwrap() = bytes;
        Ok(())
    })
    .wait(None)?;
    let bytes = out.lock().unwrap();
    Ok(bytes.to_vec())
}

/// Has the device change every byte of `[at, at + len)` by exclusive or.
pub fn device_xor(rt: &Runtime, at: u64, len: u64, key: u8) -> Result<()> {
    device_xor_later(rt, at, len, key).wait(None).map(drop)
}

/// As [`device_xor`], without waiting.
pub fn device_xor_later(rt: &Runtime, at: u64, len: u64, key: u8) -> usvm::Fence {
    rt.launch(0, move |gpu| gpu.update(at, len, |tile, _| tile.iter_mut().for_each(|b| *b ^= key)))
}

/// Changes a copy as [`device_xor`] changes memory.
pub fn xor(bytes: &mut [u8], key: u8) {
    bytes.iter_mut().for_each(|b| *b ^= key);
}

/// Asserts that `got` is `want`, naming the first page that differs and how many do.
#[track_caller]
pub fn same(got: &[u8], want: &[u8], what: impl std::fmt::Display) {
    assert_eq!(got.len(), want.len(), "{what}");
    if got == want {
        return;
    }
    let pages = got.chunks(K4 as usize).zip(want.chunks(K4 as usize));
    let wrong: Vec<usize> = pages.enumerate().filter(|(_, (g, w))| g != w).map(|(i, _)| i).collect();
    let at = got.iter().zip(want).position(|(g, w)| g != w).unwrap_or(0);
    let zeroes = got[at..].iter().take(64).all(|b| *b == 0);
    panic!(
        "{what}: {} of {} pages differ, first at page {} byte {at:#x}: {:#x} instead of {:#x}{}",
        wrong.len(),
        got.len() / K4 as usize,
        wrong[0],
        got[at],
        want[at],
        if zeroes { " (zeroes)" } else { "" }
    );
}

/// Memory and what must be in it.
#[derive(Debug, Clone)]
pub struct Piece {
    /// Where.
    pub at: u64,
    /// Its contents.
    pub bytes: Vec<u8>,
}

impl Piece {
    /// Its length.
    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Compares both views with the copy, changes the memory from both sides, and compares again.
    #[track_caller]
    pub fn check(&mut self, rt: &Runtime, what: &str) {
        if self.is_empty() {
            return;
        }
        let (at, len) = (self.at, self.len());
        let seen = device_read(rt, at, len).unwrap_or_else(|e| panic!("{what}: the device reads: {e}"));
        same(&seen, &self.bytes, format_args!("{what}: device"));
        same(&cpu_read(at, len), &self.bytes, format_args!("{what}: CPU"));
        self.change(rt, what);
        same(&cpu_read(at, len), &self.bytes, format_args!("{what}: CPU after the device wrote"));
        let seen = device_read(rt, at, len).unwrap_or_else(|e| panic!("{what}: the device reads again: {e}"));
        same(&seen, &self.bytes, format_args!("{what}: device at the end"));
    }

    /// The CPU changes one byte in the middle, then the device all of them.
    #[track_caller]
    pub fn change(&mut self, rt: &Runtime, what: &str) {
        let (at, len) = (self.at, self.len());
        let middle = self.bytes.len() / 2;
        self.bytes[middle] ^= 0x3c;
        cpu_write(at + middle as u64, &self.bytes[middle..=middle]);
        device_xor(rt, at, len, 0x5a).unwrap_or_else(|e| panic!("{what}: the device writes: {e}"));
        xor(&mut self.bytes, 0x5a);
    }
}

/// A private anonymous mapping of its own; unmapped with its surroundings when dropped.
#[derive(Debug)]
pub struct Area {
    /// First address.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    reserved: (u64, u64),
}

fn ok(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// mmap of private anonymous memory at `at` (replacing what is there), or anywhere.
pub fn map(at: Option<u64>, len: u64, prot: i32) -> io::Result<u64> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let flags = flags | if at.is_some() { libc::MAP_FIXED } else { 0 };
    // SAFETY: replaces only what the test mapped (module docs).
    let got = unsafe { libc::mmap(at.unwrap_or(0) as *mut _, len as usize, prot, flags, -1, 0) };
    if got == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(got as u64) }
}

/// Readable and writable.
pub const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// munmap.
pub fn unmap(at: u64, len: u64) {
    // SAFETY: the test's own mapping (module docs).
    ok(unsafe { libc::munmap(at as *mut _, len as usize) }).expect("munmap");
}

/// madvise.
pub fn advise(at: u64, len: u64, advice: i32) -> io::Result<()> {
    // SAFETY: the test's own mapping; dropping its contents is what tests mean (module docs).
    ok(unsafe { libc::madvise(at as *mut _, len as usize, advice) })
}

/// mprotect.
pub fn protect(at: u64, len: u64, prot: i32) {
    // SAFETY: the test's own mapping (module docs).
    ok(unsafe { libc::mprotect(at as *mut _, len as usize, prot) }).expect("mprotect");
}

/// mremap; `to` with MREMAP_FIXED.
pub fn remap(at: u64, len: u64, new_len: u64, flags: i32, to: Option<u64>) -> io::Result<u64> {
    let flags = flags | if to.is_some() { libc::MREMAP_FIXED | libc::MREMAP_MAYMOVE } else { 0 };
    // SAFETY: the test's own mappings, at both places (module docs).
    let got = unsafe {
        libc::mremap(
            at as *mut _,
            len as usize,
            new_len as usize,
            flags,
            to.unwrap_or(0) as *mut libc::c_void,
        )
    };
    if got == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(got as u64) }
}

impl Area {
    /// `len` bytes of fresh memory, on a 2 MiB boundary, with nothing accessible for as long around it.
    pub fn new(len: u64) -> Self {
        let guard = len.next_multiple_of(M2);
        let whole = 3 * guard + M2;
        let base = map(None, whole, libc::PROT_NONE).expect("address space");
        let at = base.next_multiple_of(M2) + guard;
        map(Some(at), len, RW).expect("memory");
        Self { at, len, reserved: (base, whole) }
    }

    /// As [`Area::new`], filled by the CPU, with the copy of what it was filled with.
    pub fn filled(len: u64, huge: bool, rng: &mut Rng) -> (Self, Piece) {
        let area = Self::new(len);
        if huge {
            let _ = advise(area.at, len, libc::MADV_HUGEPAGE);
        }
        let piece = Piece { at: area.at, bytes: rng.bytes(len) };
        cpu_write(area.at, &piece.bytes);
        (area, piece)
    }

    /// Free room of this area's length right behind it: unmaps what reserved it.
    pub fn make_room_behind(&self) -> (u64, u64) {
        let room = (self.at + self.len, self.len.next_multiple_of(M2));
        unmap(room.0, room.1);
        room
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        unmap(self.reserved.0, self.reserved.1);
    }
}
