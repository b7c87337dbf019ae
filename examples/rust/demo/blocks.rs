//! The file on the heap, in blocks of uneven size, and the CPU's own account of what must be in them.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use usvm::{Fence, Runtime};

use crate::Result;

/// Sizes of blocks: small ones share pages with their neighbours, large ones have a mapping of their own.
const SIZES: [usize; 5] = [3 << 20, 100_000, (2 << 20) + 4096, 700_001, 64 << 10];

/// Where a kernel puts its histogram: usvm's device reaches it by its address, as it does everything.
type Histogram = Box<[AtomicU64; 256]>;

/// Blocks, and an independent copy that only the CPU uses.
pub struct Blocks {
    blocks: Vec<Vec<u8>>,
    reference: Vec<Vec<u8>>,
}

impl Blocks {
    /// Reads the file at `path`, from its beginning again when it ends, until there are `bytes`.
    pub fn read(path: &Path, bytes: u64) -> Result<Self> {
        let mut file = File::open(path).map_err(|e| format!("cannot open {}: {e}", path.display()))?;
        if file.metadata()?.len() == 0 {
            return Err(format!("{} is empty: give a file with something in it", path.display()).into());
        }
        let mut blocks = Vec::new();
        let mut left = bytes as usize;
        for size in SIZES.iter().cycle() {
            let mut block = vec![0u8; (*size).min(left)];
            fill(&mut file, &mut block)?;
            left -= block.len();
            blocks.push(block);
            if left == 0 {
                break;
            }
        }
        let reference = blocks.clone();
        Ok(Self { blocks, reference })
    }

    /// Bytes of block `index`.
    pub fn bytes(&self, index: usize) -> &[u8] {
        &self.blocks[index]
    }

    /// Bytes in all blocks.
    pub fn len(&self) -> u64 {
        self.blocks.iter().map(|b| b.len() as u64).sum()
    }

    /// How many blocks there are.
    pub fn count(&self) -> usize {
        self.blocks.len()
    }

    /// Counts every byte value on the device and compares with the CPU.
    pub fn check_histogram(&self, runtime: &Runtime) -> Result<()> {
        let counts: Histogram = Box::new(std::array::from_fn(|_| AtomicU64::new(0)));
        let at = counts.as_ptr() as u64;
        let fences: Vec<Fence> = self
            .blocks
            .iter()
            .map(|block| {
                let (from, len) = (block.as_ptr() as u64, block.len() as u64);
                runtime.launch(0, move |gpu| {
                    let mut local = [0u64; 256];
                    gpu.for_each_tile(from, len, |tile, _| {
                        tile.iter().for_each(|byte| local[usize::from(*byte)] += 1);
                    })?;
                    for (value, count) in local.iter().enumerate().filter(|(_, count)| **count > 0) {
                        gpu.fetch_add_u64(at + value as u64 * 8, *count)?;
                    }
                    Ok(())
                })
            })
            .collect();
        for fence in fences {
            fence.wait(None)?;
        }
        let mut want = [0u64; 256];
        self.reference.iter().flatten().for_each(|byte| want[usize::from(*byte)] += 1);
        for (value, want) in want.into_iter().enumerate() {
            let got = counts[value].load(Ordering::Relaxed);
            if got != want {
                return Err(format!("byte {value:#04x}: the device counted {got}, the CPU {want}").into());
            }
        }
        Ok(())
    }

    /// Changes every byte in place on the device, differently in each round and at each position.
    pub fn transform(&mut self, runtime: &Runtime, round: u64) -> Result<()> {
        let fences: Vec<Fence> = self
            .blocks
            .iter()
            .map(|block| {
                let (at, len) = (block.as_ptr() as u64, block.len() as u64);
                runtime
                    .launch(0, move |gpu| gpu.update(at, len, |tile, offset| scramble(tile, offset, round)))
            })
            .collect();
        // The CPU computes its own account meanwhile, on its own memory.
        self.reference.iter_mut().for_each(|block| scramble(block, 0, round));
        for fence in fences {
            fence.wait(None)?;
        }
        Ok(())
    }

    /// What programs do between launches: edits a few pages, grows, shrinks and frees blocks, and gets new ones.
    pub fn edit(&mut self, round: u64) -> Result<()> {
        for (index, (block, reference)) in self.blocks.iter_mut().zip(&mut self.reference).enumerate() {
            for page in (index % 3..block.len() / 4096).step_by(97) {
                block[page * 4096 + 17] = round as u8;
                reference[page * 4096 + 17] = round as u8;
            }
            if index % 4 == 1 {
                let grown = vec![index as u8; 300_000];
                block.extend_from_slice(&grown);
                reference.extend_from_slice(&grown);
            } else if index % 4 == 2 && block.len() > 8192 {
                let keep = block.len() * 3 / 4;
                block.truncate(keep);
                block.shrink_to_fit();
                reference.truncate(keep);
            }
        }
        if self.blocks.len() > 4 {
            let victim = (round as usize * 5 + 3) % self.blocks.len();
            let freed = self.blocks.swap_remove(victim).len();
            self.reference.swap_remove(victim);
            let fresh = vec![round as u8 ^ 0x5a; freed];
            self.blocks.push(fresh.clone());
            self.reference.push(fresh);
        }
        Ok(())
    }

    /// The device changes the last byte of the last block, which nobody asked it to.
    pub fn spoil(&self, runtime: &Runtime) -> Result<()> {
        let last = self.blocks.last().ok_or("there is no block")?;
        let at = last.as_ptr() as u64 + last.len() as u64 - 1;
        let flip = |tile: &mut [u8], _| tile.iter_mut().for_each(|byte| *byte ^= 1);
        runtime.launch(0, move |gpu| gpu.update(at, 1, flip)).wait(None)?;
        Ok(())
    }

    /// Compares every byte with the CPU's account.
    pub fn compare(&self) -> Result<()> {
        for (index, (block, want)) in self.blocks.iter().zip(&self.reference).enumerate() {
            if let Some(at) = block.iter().zip(want).position(|(a, b)| a != b) {
                return Err(format!(
                    "block {index}, byte {at}: {:#04x} instead of {:#04x}",
                    block[at], want[at]
                )
                .into());
            }
            if block.len() != want.len() {
                return Err(
                    format!("block {index} has {} bytes instead of {}", block.len(), want.len()).into()
                );
            }
        }
        Ok(())
    }
}

/// Fills `block` from `file`, from its beginning again when it ends.
fn fill(file: &mut File, block: &mut [u8]) -> Result<()> {
    let mut at = 0;
    while at < block.len() {
        match file.read(&mut block[at..])? {
            0 => file.rewind()?,
            n => at += n,
        }
    }
    Ok(())
}

/// The transform: reversible, and different at every position.
fn scramble(bytes: &mut [u8], offset: u64, round: u64) {
    for (index, byte) in bytes.iter_mut().enumerate() {
        let position = offset + index as u64;
        *byte = byte.rotate_left(3) ^ (position as u8).wrapping_mul(31).wrapping_add(round as u8);
    }
}
