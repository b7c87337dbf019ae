//! Programs for the model: random steps, what a page may hold, and the layouts they run in.

use proptest::prelude::*;

use crate::ground::addr::{SZ_4K, SZ_64K};
use crate::space::ports::GpuAccess;

/// What one page holds.
#[derive(Debug, Clone, Default)]
pub(super) struct Cell {
    pub(super) value: u64,
    /// Everything it held since it was mapped.
    pub(super) past: Vec<u64>,
    /// Its contents may be dropped: zero or anything past.
    pub(super) loose: bool,
}

impl Cell {
    pub(super) fn write(&mut self, value: u64) {
        self.past.push(self.value);
        *self = Cell { value, past: std::mem::take(&mut self.past), loose: false };
    }

    pub(super) fn allows(&self, seen: u64) -> bool {
        seen == self.value || self.loose && (seen == 0 || self.past.contains(&seen))
    }
}

/// One step of a program.
#[derive(Debug, Clone, Copy)]
pub(super) enum Op {
    CpuRead(usize),
    CpuWrite(usize, usize),
    Gpu {
        device: u32,
        first: usize,
        count: usize,
        access: GpuAccess,
        bracketed: bool,
        hold: bool,
    },
    Prefetch(u32, usize, usize),
    Release,
    BringHome(usize, usize),
    Discard(usize, usize),
    Shrink(u64),
    ReadMostly(usize, usize, bool),
    Policy(u32),
    /// Late: its event is handled by and by.
    Unmap {
        first: usize,
        count: usize,
        again: bool,
        late: bool,
    },
    Map(usize, usize),
    DontNeed(usize, usize),
    Remap {
        from: usize,
        to: usize,
        count: usize,
        late: bool,
    },
    Protect(usize, usize, u8),
    Deliver,
    Collect,
    Freeze,
    Child,
    Stops(u64),
    Vram(u64),
}

pub(super) fn decode(pages: usize, (kind, a, b, c): (u8, u16, u16, u8)) -> Op {
    let first = a as usize % pages;
    let count = 1 + b as usize % [1, 3, 16, 20, 40][c as usize % 5].min(pages - first);
    let device = u32::from(c >> 7);
    let access = [GpuAccess::Read, GpuAccess::Read, GpuAccess::Write, GpuAccess::Write, GpuAccess::Atomic];
    let access = access[b as usize / 64 % 5];
    match kind {
        0..28 => Op::CpuRead(first),
        28..60 => Op::CpuWrite(first, count.min(24)),
        60..120 => Op::Gpu { device, first, count, access, bracketed: c & 32 != 0, hold: c & 80 == 80 },
        120..128 => Op::Prefetch(device, first, count),
        128..138 => Op::Release,
        138..146 => Op::BringHome(first, count),
        146..150 => Op::Discard(first, count),
        150..155 => Op::Shrink(u64::from(b % 8) * SZ_4K * 4),
        155..160 => Op::ReadMostly(first, count, c & 1 == 0),
        160..166 => Op::Policy(u32::from(b % 4)),
        166..182 => Op::Unmap { first, count, again: c & 64 != 0, late: c / 5 % 2 == 1 },
        182..192 => Op::Map(first, count),
        192..202 => Op::DontNeed(first, count),
        202..212 => {
            let to = b as usize / 7 % pages;
            Op::Remap { from: first, to, count: count.min(pages - to), late: c / 5 % 2 == 1 }
        }
        212..220 => Op::Protect(first, count, c % 3),
        220..228 => Op::Deliver,
        228..232 => Op::Collect,
        232..236 => Op::Freeze,
        236..242 => Op::Child,
        242..249 => Op::Stops([0, 0, 3, 6, 12][b as usize % 5]),
        249.. => Op::Vram([0, 0, 2, 5][b as usize % 4]),
    }
}

pub(super) fn ops(pages: usize, steps: usize) -> impl Strategy<Value = Vec<Op>> {
    let op = (any::<u8>(), any::<u16>(), any::<u16>(), any::<u8>()).prop_map(move |raw| decode(pages, raw));
    proptest::collection::vec(op, 1..steps)
}

/// How a world is laid out.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    pub(super) pages: usize,
    pub(super) chunks: Vec<u64>,
    pub(super) vram: Vec<u64>,
    pub(super) atomics: bool,
    pub(super) threshold: u64,
    pub(super) seed: u64,
    /// Devices that cannot fault, one bit each.
    pub(super) firm: u8,
}

/// Small ranges and less device memory than three of them.
pub(super) fn small(seed: u64, devices: usize, atomics: bool, threshold: bool) -> Layout {
    Layout {
        pages: 64,
        chunks: vec![SZ_64K, 4 * SZ_4K, SZ_4K],
        vram: vec![40, 20][..devices].to_vec(),
        atomics,
        threshold: if threshold { SZ_64K } else { 0 },
        seed,
        firm: 0,
    }
}
