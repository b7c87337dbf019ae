//! Copying between host pages and device memory, faster than memcpy.
//!
//! # Overview
//! A migration copies memory that neither side has in its caches and that the copying processor will not read again.
//! `memcpy` does badly there: it reads every destination line only to overwrite it, fills the caches with both sides, and
//! waits for one page walk after the other. A [`Copier`] uses non-temporal stores, runs several streams through the
//! range at once, and is chosen once at start by what the processor can do. [`CopyPool`] adds helper threads for large
//! moves.
//!
//! # Measurements
//! 2 MiB between anonymous huge pages and a memfd mapping of 4 KiB pages, both warm and out of the caches; 2-core VM on
//! Zen 4, 32 MiB L3, while other work ran on both cores; `usvm-bench micro -n 640`, in turns with memcpy (glibc's)
//! between the same two buffers:
//!
//! | copy | median µs | p90 µs | memcpy median µs | ratio |
//! |---|---|---|---|---|
//! | to the memfd, AVX-512 / AVX2 / SSE2 | 95.5 / 94.8 / 96.6 | 129 / 127 / 119 | 204–208 | 0.47 / 0.46 / 0.47 |
//! | from the memfd, AVX-512 / AVX2 / SSE2 | 99.3 / 95.3 / 99.3 | 115 / 134 / 130 | 189–203 | 0.50 / 0.50 / 0.49 |
//! | from the memfd, streaming loads | 139 | 177 | 207 | 0.67 |
//! | to the memfd, one helper | 105 | 171 | 213 | 0.49 |
//! | from the memfd, one helper | 120 | 186 | 209 | 0.58 |
//!
//! memcpy with huge pages on both sides (`memcpy_2m`) took 156: against that the copier's ratio is 0.65. Half of what it
//! gains over memcpy here is page walks. On the same machine less busy, prototypes of these loops, n = 384 in turns of
//! 32, three runs with memcpy at 138 to 153:
//!
//! | loop (to the memfd) | median µs | ratio to memcpy |
//! |---|---|---|
//! | one stream, no prefetch | 99 | 0.72 |
//! | one stream, source prefetched 1, 2, 4 KiB ahead | 92, 90, 93 | 0.67, 0.66, 0.67 |
//! | the same with PREFETCHNTA, 2 KiB | 91 | 0.66 |
//! | 4 streams of 16, 64, 256, 512 KiB | 93, 84, 82, 83 | 0.61, 0.55, 0.54, 0.54 |
//! | 2, 8, 16 streams of 64 KiB | 91, 81, 97 | 0.60, 0.53, 0.66 |
//! | non-temporal stores alone, nothing read (n = 200) | 74 | |
//!
//! So one core is within a tenth of its path to memory. A second core on an idle machine took one-stream copies from 87 to
//! 68 µs (72 from the memfd; n = 200, memcpy 140); on a busy one a helper that is descheduled makes p90 worse and the
//! median no better. Smaller copies of cold memory gain too: 0.92 at 4 KiB, 0.79 at 16 KiB, 0.61 at 64 KiB, 0.54 at 256 KiB.
//! Memory in the caches is another matter (n = 144): with the source just written the ratios are 1.2 at 4 to 64 KiB, 1.1 at
//! 256 KiB, 0.6 from 1 MiB on; with both sides just written 3 to 4 up to 256 KiB, and 1.9 at 2 MiB.
//!
//! Zeroes are special on this processor: storing them non-temporally costs a third of other values.
//!
//! # Limits
//! What is in the caches on both sides is copied faster by memcpy: the caller who knows says [`CopyHint::Small`].
//! Streaming loads ([`CopyHint::FromWriteCombined`]) pay only on memory that is really write-combined, which no machine
//! here has: on write-back memory, as above, they are the slower way.
//!
//! # Safety
//! Copying is between raw addresses (shadow pages, mapped device memory), so the caller vouches for them: see each
//! function. The vector loops are in the private module `x86`.
#![allow(unsafe_code)]

mod pool;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use pool::CopyPool;

use crate::ground::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// Bytes in a cache line, and in a write-combining buffer.
const LINE: usize = 64;

/// How bytes are moved. Ordered from the simplest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CopyKind {
    /// The C library's memcpy and memset.
    Portable,
    /// Words of 8 bytes, one by one: what an emulated processor does best.
    Words,
    /// 16-byte vectors.
    Sse2,
    /// 32-byte vectors.
    Avx2,
    /// 64-byte vectors: a whole cache line at once.
    Avx512,
}

impl CopyKind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Portable, Self::Words, Self::Sse2, Self::Avx2, Self::Avx512];

    /// Whether this processor can.
    pub fn is_supported(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return match self {
            Self::Portable | Self::Words | Self::Sse2 => true,
            Self::Avx2 => std::arch::is_x86_feature_detected!("avx2"),
            Self::Avx512 => std::arch::is_x86_feature_detected!("avx512f"),
        };
        #[cfg(not(target_arch = "x86_64"))]
        return matches!(self, Self::Portable | Self::Words);
    }

    /// As written in `USVM_CONF="copy=…"`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Words => "words",
            Self::Sse2 => "sse2",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    fn ops(self) -> &'static Ops {
        if self == Self::Words {
            return &WORDS;
        }
        #[cfg(target_arch = "x86_64")]
        match self {
            Self::Portable | Self::Words => {}
            Self::Sse2 => return &x86::SSE2,
            Self::Avx2 => return &x86::AVX2,
            Self::Avx512 => return &x86::AVX512,
        }
        &PORTABLE
    }
}

impl fmt::Display for CopyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for CopyKind {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        let known = Self::ALL.into_iter().find(|k| k.name() == s);
        known.ok_or_else(|| format!("`{s}` is not one of portable, words, sse2, avx2, avx512"))
    }
}

/// What a copy is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CopyHint {
    /// Host pages to device memory (mapped write-back or write-combined). The stores are ordered before whatever the
    /// caller does next, so that a doorbell may follow.
    ToDevice,
    /// Device memory that is mapped write-back, to host pages.
    FromDevice,
    /// Device memory that is mapped write-combined or uncached, to host pages: plain loads would go out one by one.
    FromWriteCombined,
    /// A few pages that will be used at once: through the caches.
    Small,
}

impl CopyHint {
    const ALL: [Self; 4] = [Self::ToDevice, Self::FromDevice, Self::FromWriteCombined, Self::Small];

    fn from_index(index: u8) -> Self {
        Self::ALL[usize::from(index)]
    }
}

/// The loops of one kind. `stream` and `from_wc` copy, `zero` fills; all end with a store fence.
struct Ops {
    stream: unsafe fn(*mut u8, *const u8, usize),
    from_wc: unsafe fn(*mut u8, *const u8, usize),
    zero: unsafe fn(*mut u8, usize),
    is_zero: unsafe fn(*const u8, usize) -> bool,
}

static PORTABLE: Ops =
    Ops { stream: fenced_copy, from_wc: fenced_copy, zero: plain_zero, is_zero: plain_is_zero };
static WORDS: Ops = Ops { stream: word_copy, from_wc: word_copy, zero: plain_zero, is_zero: plain_is_zero };

/// The chosen way to copy. Cheap to copy itself; use it from any thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copier {
    kind: CopyKind,
}

impl Copier {
    /// Below this many bytes a copy goes through the caches whatever the hint: cold memory would gain a
    /// little from a page on, but pages that the CPU just wrote would lose as much.
    pub const STREAM_MIN: usize = 16 << 10;
    /// From this many bytes on [`Copier::copy_threaded`] asks the helpers: four chunks, below which one core is done
    /// before a helper has come.
    pub const THREADED_MIN: usize = 1 << 20;

    /// The fastest kind that this processor supports.
    pub fn detect() -> Self {
        let order = [CopyKind::Avx512, CopyKind::Avx2, CopyKind::Sse2];
        Self { kind: order.into_iter().find(|k| k.is_supported()).unwrap_or(CopyKind::Portable) }
    }

    /// This kind, if the processor supports it.
    pub fn with(kind: CopyKind) -> Option<Self> {
        kind.is_supported().then_some(Self { kind })
    }

    /// What the option `copy` asks for: `auto`, or the name of a kind. Errors: no such name, or not on this processor.
    pub fn named(name: &str) -> Result<Self> {
        if name == "auto" {
            return Ok(Self::detect());
        }
        let kind = name.parse().map_err(|reason| Error::Invalid { argument: "copy", reason })?;
        Self::with(kind)
            .ok_or_else(|| Error::NotSupported(format!("this processor has no {kind}; use copy=auto")))
    }

    /// What was chosen.
    pub fn kind(self) -> CopyKind {
        self.kind
    }

    fn from_index(index: u8) -> Self {
        Self { kind: CopyKind::ALL[usize::from(index)] }
    }

    /// Copies `len` bytes from `src` to `dst`, of any alignment.
    ///
    /// # Safety
    /// `src` is readable and `dst` writable for `len` bytes, the two do not overlap, and no other thread of this
    /// program writes `src` or uses `dst` meanwhile.
    #[inline]
    pub unsafe fn copy(self, dst: *mut u8, src: *const u8, len: usize, hint: CopyHint) {
        let ops = self.kind.ops();
        // SAFETY: the caller's promise is what the loops ask for, and a Copier exists only for a supported kind.
        unsafe {
            match hint {
                CopyHint::Small => plain_copy(dst, src, len),
                CopyHint::FromWriteCombined => (ops.from_wc)(dst, src, len),
                CopyHint::ToDevice if len < Self::STREAM_MIN => fenced_copy(dst, src, len),
                CopyHint::FromDevice if len < Self::STREAM_MIN => plain_copy(dst, src, len),
                CopyHint::ToDevice | CopyHint::FromDevice => (ops.stream)(dst, src, len),
            }
        }
    }

    /// As [`Copier::copy`], shared with the helpers of `pool` from [`Copier::THREADED_MIN`] bytes on. Returns when all
    /// bytes are there.
    ///
    /// # Safety
    /// As [`Copier::copy`].
    pub unsafe fn copy_threaded(
        self,
        pool: &CopyPool,
        dst: *mut u8,
        src: *const u8,
        len: usize,
        hint: CopyHint,
    ) {
        // SAFETY: the caller's promise, passed on.
        unsafe {
            if len < Self::THREADED_MIN || hint == CopyHint::Small {
                self.copy(dst, src, len, hint);
            } else {
                pool.run(self, dst, src, len, hint);
            }
        }
    }

    /// Whether `len` bytes at `ptr` are all zero. Stops early at the first that is not.
    ///
    /// # Safety
    /// `ptr` is readable for `len` bytes and no other thread of this program writes them meanwhile.
    pub unsafe fn is_zero(self, ptr: *const u8, len: usize) -> bool {
        // SAFETY: the caller's promise is what the loop asks for.
        unsafe { (self.kind.ops().is_zero)(ptr, len) }
    }

    /// Zeroes `len` bytes at `ptr`, past the caches from [`Copier::STREAM_MIN`] bytes on.
    ///
    /// # Safety
    /// `ptr` is writable for `len` bytes and no other thread of this program uses them meanwhile.
    pub unsafe fn fill_zero(self, ptr: *mut u8, len: usize) {
        // SAFETY: the caller's promise is what the loops ask for.
        unsafe {
            if len < Self::STREAM_MIN { plain_zero(ptr, len) } else { (self.kind.ops().zero)(ptr, len) }
        }
    }
}

impl Default for Copier {
    fn default() -> Self {
        Self::detect()
    }
}

#[inline]
unsafe fn plain_copy(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: the caller gives readable, writable, distinct bytes.
    unsafe { dst.copy_from_nonoverlapping(src, len) }
}

unsafe fn fenced_copy(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: the caller gives readable, writable, distinct bytes.
    unsafe { plain_copy(dst, src, len) };
    store_fence();
}

/// Copies by general registers.
unsafe fn word_copy(dst: *mut u8, src: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller gives `len` readable and writable, distinct bytes.
    let done = unsafe { x86::copy_words(dst, src, len) };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    // SAFETY: as above; this is the tail.
    unsafe { plain_copy(dst.add(done), src.add(done), len - done) };
    store_fence();
}

unsafe fn plain_zero(dst: *mut u8, len: usize) {
    // SAFETY: the caller gives writable bytes.
    unsafe { dst.write_bytes(0, len) }
}

unsafe fn plain_is_zero(src: *const u8, len: usize) -> bool {
    // SAFETY: the caller gives readable bytes that nobody writes meanwhile.
    let bytes = unsafe { std::slice::from_raw_parts(src, len) };
    let mut blocks = bytes.chunks_exact(LINE);
    blocks.by_ref().all(|b| b.iter().fold(0, |any, &byte| any | byte) == 0)
        && blocks.remainder().iter().all(|&byte| byte == 0)
}

/// Orders write-combined stores before what follows.
#[inline]
fn store_fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64, and a fence touches no memory.
    unsafe {
        std::arch::x86_64::_mm_sfence()
    };
    #[cfg(not(target_arch = "x86_64"))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GUARD: u8 = 0xc3;
    /// Room for the way to a line, a line, and the largest offset.
    const PAD: usize = 4 * LINE;

    fn kinds() -> impl Iterator<Item = CopyKind> {
        CopyKind::ALL.into_iter().filter(|k| k.is_supported())
    }

    /// A buffer of guard bytes with `len` bytes to use at `offset` from a line.
    struct Guarded {
        bytes: Vec<u8>,
        at: usize,
        len: usize,
    }

    impl Guarded {
        fn new(offset: usize, len: usize) -> Self {
            let bytes = vec![GUARD; len + 2 * PAD];
            let to_line = (bytes.as_ptr() as usize).wrapping_neg() % LINE;
            Self { bytes, at: to_line + LINE + offset, len }
        }

        fn filled(offset: usize, len: usize, seed: u64) -> Self {
            let mut made = Self::new(offset, len);
            let mut state = seed | 1;
            for byte in made.inside_mut() {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                *byte = (state >> 33) as u8;
            }
            made
        }

        fn inside(&self) -> &[u8] {
            &self.bytes[self.at..self.at + self.len]
        }

        fn inside_mut(&mut self) -> &mut [u8] {
            &mut self.bytes[self.at..self.at + self.len]
        }

        fn guards_hold(&self) -> bool {
            self.bytes[..self.at].iter().chain(&self.bytes[self.at + self.len..]).all(|&b| b == GUARD)
        }
    }

    type Loop = unsafe fn(*mut u8, *const u8, usize);

    fn check_copy(what: &str, copy: Loop, (to, from, len): (usize, usize, usize), seed: u64) {
        let src = Guarded::filled(from, len, seed);
        let mut dst = Guarded::new(to, len);
        // SAFETY: two live buffers of `len` bytes.
        unsafe { copy(dst.inside_mut().as_mut_ptr(), src.inside().as_ptr(), len) };
        assert!(dst.inside() == src.inside(), "{what}: {len} bytes from +{from} to +{to} differ");
        assert!(dst.guards_hold(), "{what}: {len} bytes from +{from} to +{to} wrote outside");
        assert!(src.guards_hold());
    }

    proptest! {
        #[test]
        fn loops_copy_exactly(to in 0..LINE, from in 0..LINE, len in 0usize..100_000, seed: u64) {
            for kind in kinds() {
                let ops = kind.ops();
                check_copy(kind.name(), ops.stream, (to, from, len), seed);
                check_copy(kind.name(), ops.from_wc, (to, from, len), seed);
            }
        }

        #[test]
        fn hints_only_hint(to in 0..LINE, len in 0usize..3 * Copier::STREAM_MIN, seed: u64) {
            for kind in kinds() {
                let copier = Copier::with(kind).unwrap();
                for hint in CopyHint::ALL {
                    let src = Guarded::filled(0, len, seed);
                    let mut dst = Guarded::new(to, len);
                    // SAFETY: two live buffers of `len` bytes.
                    unsafe { copier.copy(dst.inside_mut().as_mut_ptr(), src.inside().as_ptr(), len, hint) };
                    prop_assert!(dst.inside() == src.inside() && dst.guards_hold(), "{kind} {hint:?}");
                }
            }
        }

        #[test]
        fn zero_fills_exactly(at in 0..LINE, len in 0usize..40_000) {
            for kind in kinds() {
                let mut dst = Guarded::filled(at, len, 7);
                // SAFETY: a live buffer of `len` bytes.
                unsafe { (kind.ops().zero)(dst.inside_mut().as_mut_ptr(), len) };
                prop_assert!(dst.inside().iter().all(|&b| b == 0) && dst.guards_hold(), "{kind}");
            }
        }

        #[test]
        fn zero_is_seen_exactly(at in 0..LINE, len in 0usize..9000, bit in 0u32..8, pick: prop::sample::Index) {
            for kind in kinds() {
                let copier = Copier::with(kind).unwrap();
                let mut buffer = Guarded::new(at, len);
                buffer.inside_mut().fill(0);
                // SAFETY: a live buffer of `len` bytes; the guards around it are not zero and must not matter.
                let seen = |b: &Guarded| unsafe { copier.is_zero(b.inside().as_ptr(), len) };
                prop_assert!(seen(&buffer), "{kind}: all zero");
                if len > 0 {
                    let one = pick.index(len);
                    buffer.inside_mut()[one] = 1 << bit;
                    prop_assert!(!seen(&buffer), "{kind}: byte {one} of {len} is not zero");
                }
            }
        }
    }

    #[test]
    fn short_lengths_at_every_alignment() {
        for kind in kinds() {
            for offset in 0..LINE {
                for len in [0, 1, 15, 16, 63, 64, 65, 255, 256, 257, 320, 4096] {
                    check_copy(kind.name(), kind.ops().stream, (offset, LINE - 1 - offset, len), 5);
                    check_copy(kind.name(), kind.ops().from_wc, (LINE - 1 - offset, offset, len), 5);
                }
            }
        }
    }

    #[test]
    fn a_whole_range_with_threads() {
        let pool = CopyPool::new(1, CopyPool::SPIN).unwrap();
        let len = 2 << 20;
        for kind in kinds() {
            let copier = Copier::with(kind).unwrap();
            let src = Guarded::filled(8, len, 11);
            let mut dst = Guarded::new(24, len);
            // SAFETY: two live buffers of `len` bytes.
            unsafe {
                copier.copy_threaded(
                    &pool,
                    dst.inside_mut().as_mut_ptr(),
                    src.inside().as_ptr(),
                    len,
                    CopyHint::ToDevice,
                )
            };
            assert!(dst.inside() == src.inside() && dst.guards_hold(), "{kind}");
        }
    }

    #[test]
    fn kinds_have_names_and_indices() {
        for (index, kind) in CopyKind::ALL.into_iter().enumerate() {
            assert_eq!(kind.name().parse(), Ok(kind));
            assert_eq!(kind as usize, index);
            assert_eq!(Copier::from_index(index as u8).kind(), kind);
        }
        for (index, hint) in CopyHint::ALL.into_iter().enumerate() {
            assert_eq!(CopyHint::from_index(index as u8), hint);
        }
        assert!("avx".parse::<CopyKind>().is_err());
        assert_eq!(Copier::named("auto").unwrap(), Copier::detect());
        assert_eq!(Copier::named("portable").unwrap().kind(), CopyKind::Portable);
        assert_eq!(Copier::named("avx").unwrap_err().errno(), libc::EINVAL);
        for kind in CopyKind::ALL {
            assert_eq!(Copier::named(kind.name()).is_ok(), kind.is_supported());
        }
        assert!(Copier::detect().kind().is_supported());
    }
}
