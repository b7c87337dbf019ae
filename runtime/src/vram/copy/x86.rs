//! Copy loops for x86-64: one generic loop for each job, instantiated for three vector widths.
//!
//! # Overview
//! A [`Lane`] is one vector register of a given width. The loops are written once over `Lane` and compiled three times,
//! inside functions that switch the instruction set on; everything between is `inline(always)`, so that the vectors
//! never cross a call. A step is one [`STEP`] of whole cache lines: all its loads, then all its non-temporal stores, so
//! that each write-combining buffer fills and leaves at once.
//!
//! # Safety
//! Everything here reads and writes raw memory. The functions in the three [`Ops`] tables may be called only on a
//! processor that has the instruction set of that table ([`super::CopyKind::is_supported`]), with pointers that satisfy
//! the contract of [`super::Copier`]'s function of the same job.
#![allow(unsafe_code)]

use super::{LINE, Ops, plain_copy, plain_is_zero, plain_zero};
use std::arch::asm;
use std::arch::x86_64::*;

/// Bytes in one step of a loop: four cache lines.
const STEP: usize = 4 * LINE;
/// How far ahead of the loads the source is prefetched where there is one stream. Measured flat from 1 to 3 KiB.
const AHEAD: usize = 2048;
/// Streams that a large copy runs at once. Each has its own hardware prefetcher and its own page walk under way.
/// Measured: 4 and 8 alike, 2 and 16 slower.
const STREAMS: usize = 4;
/// Longest stretch of one stream. Measured: 64 KiB is 3 % slower than 256 KiB and 512 KiB.
const STRETCH: usize = 512 << 10;
/// Stretches are whole pages.
const PAGE: usize = 4096;
/// Vectors in a step at the smallest width.
const MOST: usize = STEP / 16;

/// One vector register.
trait Lane: Copy {
    /// Its bytes; divides [`STEP`].
    const BYTES: usize;
    unsafe fn zero() -> Self;
    unsafe fn load(from: *const u8) -> Self;
    /// Streaming load (MOVNTDQA); `from` is aligned to a cache line.
    unsafe fn load_stream(from: *const u8) -> Self;
    unsafe fn store(self, to: *mut u8);
    /// Non-temporal store; `to` is aligned to the vector.
    unsafe fn store_stream(self, to: *mut u8);
    unsafe fn or(self, other: Self) -> Self;
    unsafe fn is_zero(self) -> bool;
}

macro_rules! lane {
    ($vector:ty, $bytes:literal, $zero:ident, $load:ident, $store:ident, $store_stream:ident, $or:ident,
     load_stream: |$from:ident| $load_stream:expr, is_zero: |$v:ident| $is_zero:expr) => {
        impl Lane for $vector {
            const BYTES: usize = $bytes;
            #[inline(always)]
            unsafe fn zero() -> Self {
                // SAFETY: the caller runs on a processor with this instruction set.
                unsafe { $zero() }
            }
            #[inline(always)]
            unsafe fn load(from: *const u8) -> Self {
                // SAFETY: the caller may read these bytes; the load takes any alignment.
                unsafe { $load(from.cast()) }
            }
            #[inline(always)]
            unsafe fn load_stream($from: *const u8) -> Self {
                // SAFETY: the caller may read these bytes and aligned the pointer.
                unsafe { $load_stream }
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut u8) {
                // SAFETY: the caller may write these bytes; the store takes any alignment.
                unsafe { $store(to.cast(), self) }
            }
            #[inline(always)]
            unsafe fn store_stream(self, to: *mut u8) {
                // SAFETY: the caller may write these bytes and aligned the pointer.
                unsafe { $store_stream(to.cast(), self) }
            }
            #[inline(always)]
            unsafe fn or(self, other: Self) -> Self {
                // SAFETY: the caller runs on a processor with this instruction set.
                unsafe { $or(self, other) }
            }
            #[inline(always)]
            unsafe fn is_zero(self) -> bool {
                let $v = self;
                // SAFETY: the caller runs on a processor with this instruction set.
                unsafe { $is_zero }
            }
        }
    };
}

lane!(__m512i, 64, _mm512_setzero_si512, _mm512_loadu_si512, _mm512_storeu_si512, _mm512_stream_si512,
    _mm512_or_si512, load_stream: |from| _mm512_stream_load_si512(from.cast()),
    is_zero: |v| _mm512_test_epi64_mask(v, v) == 0);
lane!(__m256i, 32, _mm256_setzero_si256, _mm256_loadu_si256, _mm256_storeu_si256, _mm256_stream_si256,
    _mm256_or_si256, load_stream: |from| _mm256_stream_load_si256(from.cast()),
    is_zero: |v| _mm256_testz_si256(v, v) == 1);
// SSE2 has no streaming load (that is SSE4.1): a plain load stands in, correct on every memory type.
lane!(__m128i, 16, _mm_setzero_si128, _mm_loadu_si128, _mm_storeu_si128, _mm_stream_si128,
    _mm_or_si128, load_stream: |from| _mm_load_si128(from.cast()),
    is_zero: |v| _mm_movemask_epi8(_mm_cmpeq_epi8(v, _mm_setzero_si128())) == 0xffff);

/// Bytes from `at` to the next cache line, at most `len`.
#[inline(always)]
fn to_line(at: *const u8, len: usize) -> usize {
    ((at as usize).wrapping_neg() % LINE).min(len)
}

/// Loads a step from `from`.
#[inline(always)]
unsafe fn load_step<L: Lane>(from: *const u8) -> [L; MOST] {
    // SAFETY: the caller may read STEP bytes; MOST is at least STEP / BYTES, and the rest stays zero.
    unsafe {
        let mut vectors = [L::zero(); MOST];
        for (i, v) in vectors.iter_mut().take(STEP / L::BYTES).enumerate() {
            *v = L::load(from.add(i * L::BYTES));
        }
        vectors
    }
}

/// Copies one step with non-temporal stores; `to` is aligned to a line.
#[inline(always)]
unsafe fn stream_step<L: Lane>(to: *mut u8, from: *const u8) {
    // SAFETY: the caller may write and read STEP bytes, and aligned the destination.
    unsafe {
        let vectors = load_step::<L>(from);
        for (i, v) in vectors.into_iter().take(STEP / L::BYTES).enumerate() {
            v.store_stream(to.add(i * L::BYTES));
        }
    }
}

/// Copies with non-temporal stores: head up to a line of the destination, rounds of parallel streams, steps, tail.
#[inline(always)]
unsafe fn stream<L: Lane>(dst: *mut u8, src: *const u8, len: usize) {
    let mut at = to_line(dst, len);
    // SAFETY: the caller gives `len` readable and writable bytes that do not overlap; head, rounds, steps and tail
    // partition them. After the head the destination is aligned to a line, and rounds and steps are whole lines. A
    // prefetch past the end touches nothing.
    unsafe {
        plain_copy(dst, src, at);
        loop {
            let stretch = ((len - at) / STREAMS).min(STRETCH) & !(PAGE - 1);
            if stretch == 0 {
                break;
            }
            for step in (at..at + stretch).step_by(STEP) {
                // A count that the compiler knows: a division here would keep the processor from loading ahead.
                for n in 0..STREAMS {
                    let begin = step + n * stretch;
                    stream_step::<L>(dst.add(begin), src.add(begin));
                }
            }
            at += STREAMS * stretch;
        }
        while len - at >= STEP {
            for line in 0..STEP / LINE {
                _mm_prefetch::<_MM_HINT_T0>(src.wrapping_add(at + AHEAD + line * LINE).cast());
            }
            stream_step::<L>(dst.add(at), src.add(at));
            at += STEP;
        }
        plain_copy(dst.add(at), src.add(at), len - at);
        _mm_sfence();
    }
}

/// Copies out of write-combined memory with streaming loads: head up to a line of the source, lines, tail.
#[inline(always)]
unsafe fn from_wc<L: Lane>(dst: *mut u8, src: *const u8, len: usize) {
    let head = to_line(src, len);
    let steps = (len - head) / STEP;
    // SAFETY: as in `stream`, with the source aligned to a line after the head, and the destination only where the
    // two agree modulo a line. The fence empties streaming-load buffers that may hold what was there before.
    unsafe {
        _mm_mfence();
        plain_copy(dst, src, head);
        let (mut to, mut from) = (dst.add(head), src.add(head));
        let aligned = (to as usize).is_multiple_of(LINE);
        for _ in 0..steps {
            let mut vectors = [L::zero(); MOST];
            for (i, v) in vectors.iter_mut().take(STEP / L::BYTES).enumerate() {
                *v = L::load_stream(from.add(i * L::BYTES));
            }
            for (i, v) in vectors.into_iter().take(STEP / L::BYTES).enumerate() {
                if aligned {
                    v.store_stream(to.add(i * L::BYTES));
                } else {
                    v.store(to.add(i * L::BYTES));
                }
            }
            to = to.add(STEP);
            from = from.add(STEP);
        }
        plain_copy(to, from, len - head - steps * STEP);
        _mm_sfence();
    }
}

/// Zeroes with non-temporal stores.
#[inline(always)]
unsafe fn zero<L: Lane>(dst: *mut u8, len: usize) {
    let head = to_line(dst, len);
    let lines = (len - head) / LINE;
    // SAFETY: the caller gives `len` writable bytes; head, lines and tail partition them.
    unsafe {
        plain_zero(dst, head);
        let mut to = dst.add(head);
        let nothing = L::zero();
        for _ in 0..lines {
            for i in 0..LINE / L::BYTES {
                nothing.store_stream(to.add(i * L::BYTES));
            }
            to = to.add(LINE);
        }
        plain_zero(to, len - head - lines * LINE);
        _mm_sfence();
    }
}

/// Whether all bytes are zero; stops at the first step that has another.
#[inline(always)]
unsafe fn is_zero<L: Lane>(src: *const u8, len: usize) -> bool {
    let steps = len / STEP;
    // SAFETY: the caller gives `len` readable bytes; steps and tail partition them.
    unsafe {
        let mut from = src;
        for _ in 0..steps {
            let any = load_step::<L>(from).into_iter().fold(L::zero(), |any, v| any.or(v));
            if !any.is_zero() {
                return false;
            }
            from = from.add(STEP);
        }
        plain_is_zero(from, len - steps * STEP)
    }
}

/// Copies the whole blocks of four words by general registers, and says how many bytes these are. In assembly, so that
/// no compiler makes vectors or a call of it; the order is the one that an emulator translates best: all loads, all stores,
/// addresses that are one register.
pub(super) unsafe fn copy_words(dst: *mut u8, src: *const u8, len: usize) -> usize {
    const BLOCK: usize = 32;
    let whole = len - len % BLOCK;
    if whole > 0 {
        // SAFETY: the caller gives `len` readable and writable, distinct bytes, of which these are the first.
        unsafe {
            asm!(
                "2:",
                "mov {a}, [{src}]",
                "mov {b}, [{src} + 8]",
                "mov {c}, [{src} + 16]",
                "mov {d}, [{src} + 24]",
                "add {src}, 32",
                "mov [{dst}], {a}",
                "mov [{dst} + 8], {b}",
                "mov [{dst} + 16], {c}",
                "mov [{dst} + 24], {d}",
                "add {dst}, 32",
                "sub {left}, 32",
                "jnz 2b",
                a = out(reg) _,
                b = out(reg) _,
                c = out(reg) _,
                d = out(reg) _,
                src = inout(reg) src => _,
                dst = inout(reg) dst => _,
                left = inout(reg) whole => _,
                options(nostack),
            );
        }
    }
    whole
}

macro_rules! table {
    ($name:ident, $module:ident, $lane:ty, $features:literal) => {
        mod $module {
            use super::*;
            #[target_feature(enable = $features)]
            pub(super) unsafe fn stream_copy(dst: *mut u8, src: *const u8, len: usize) {
                // SAFETY: the caller keeps the contract of the table.
                unsafe { stream::<$lane>(dst, src, len) }
            }
            #[target_feature(enable = $features)]
            pub(super) unsafe fn wc_copy(dst: *mut u8, src: *const u8, len: usize) {
                // SAFETY: the caller keeps the contract of the table.
                unsafe { from_wc::<$lane>(dst, src, len) }
            }
            #[target_feature(enable = $features)]
            pub(super) unsafe fn fill(dst: *mut u8, len: usize) {
                // SAFETY: the caller keeps the contract of the table.
                unsafe { zero::<$lane>(dst, len) }
            }
            #[target_feature(enable = $features)]
            pub(super) unsafe fn all_zero(src: *const u8, len: usize) -> bool {
                // SAFETY: the caller keeps the contract of the table.
                unsafe { is_zero::<$lane>(src, len) }
            }
        }
        /// The loops of this width.
        pub(super) static $name: Ops = Ops {
            stream: $module::stream_copy,
            from_wc: $module::wc_copy,
            zero: $module::fill,
            is_zero: $module::all_zero,
        };
    };
}

table!(AVX512, avx512, __m512i, "avx512f");
table!(AVX2, avx2, __m256i, "avx2");
table!(SSE2, sse2, __m128i, "sse2");
