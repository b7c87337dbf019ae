//! A hash map and a list out of boxed nodes, built by the CPU, walked by the device through the same pointers.

use std::sync::atomic::{AtomicU64, Ordering};

use usvm::Runtime;
use usvm::device::sim::Gpu;

use crate::Result;

/// One word of the file, in a box of its own.
#[repr(C)]
struct Node {
    hash: u64,
    /// The bytes of the word, where they stand in the file's block: copied here, so that the block may change.
    word: *const u8,
    len: u64,
    count: u64,
    /// The next node of the same bucket.
    chain: *const Node,
    /// The next node in the order of first occurrence.
    next: *const Node,
}

/// Words and how often they occur.
#[expect(clippy::vec_box, reason = "nodes point at each other: each needs an address that stays")]
pub struct Index {
    buckets: Box<[*const Node]>,
    nodes: Vec<Box<Node>>,
    /// Owns the bytes the nodes point at.
    _words: Vec<Box<[u8]>>,
}

/// Nodes at most: a walk of the device is one load after the other.
const MOST: usize = 20_000;

impl Index {
    /// Counts the words (runs of letters and digits) of `bytes`.
    pub fn build(bytes: &[u8]) -> Self {
        let words = bytes.split(|b| !b.is_ascii_alphanumeric()).filter(|w| w.len() >= 2);
        let mut index =
            Self { buckets: vec![std::ptr::null(); 4096].into(), nodes: Vec::new(), _words: Vec::new() };
        let mut known = std::collections::HashMap::new();
        for word in words {
            if let Some(at) = known.get(word).copied() {
                let node: &mut Box<Node> = &mut index.nodes[at];
                node.count += 1;
            } else if index.nodes.len() < MOST {
                known.insert(word, index.nodes.len());
                index.add(word);
            }
        }
        // Addresses of boxes do not change: link them now that all exist.
        for at in 1..index.nodes.len() {
            let next: *const Node = &*index.nodes[at];
            index.nodes[at - 1].next = next;
        }
        index
    }

    fn add(&mut self, word: &[u8]) {
        let hash = hash(word);
        let bucket = (hash % self.buckets.len() as u64) as usize;
        let owned: Box<[u8]> = word.into();
        let node = Box::new(Node {
            hash,
            word: owned.as_ptr(),
            len: owned.len() as u64,
            count: 1,
            chain: self.buckets[bucket],
            next: std::ptr::null(),
        });
        self.buckets[bucket] = &*node;
        self._words.push(owned);
        self.nodes.push(node);
    }

    /// Looks every seventh word up on the device and compares the counts.
    pub fn check_lookups(&self, runtime: &Runtime) -> Result<()> {
        let wanted: Vec<&Box<Node>> = self.nodes.iter().step_by(7).take(2000).collect();
        let keys: Vec<u64> = wanted.iter().flat_map(|n| [n.word as u64, n.len, n.hash]).collect();
        let found: Vec<AtomicU64> = wanted.iter().map(|_| AtomicU64::new(0)).collect();
        let (keys_at, found_at, count) = (keys.as_ptr() as u64, found.as_ptr() as u64, wanted.len() as u64);
        let (buckets_at, buckets) = (self.buckets.as_ptr() as u64, self.buckets.len() as u64);
        let lookups = move |gpu: &mut Gpu<'_>| {
            for key in 0..count {
                let at = keys_at + key * 24;
                let (word, len, hash) = (gpu.load_u64(at)?, gpu.load_u64(at + 8)?, gpu.load_u64(at + 16)?);
                let mut node = gpu.load_u64(buckets_at + hash % buckets * 8)?;
                while node != 0 && !same_word(gpu, node, word, len, hash)? {
                    node = gpu.load_u64(node + 32)?;
                }
                let count = if node == 0 { 0 } else { gpu.load_u64(node + 24)? };
                gpu.store_u64(found_at + key * 8, count)?;
            }
            Ok(())
        };
        runtime.launch(0, lookups).wait(None)?;
        for (node, found) in wanted.iter().zip(&found) {
            if node.count != found.load(Ordering::Relaxed) {
                return Err(format!("a word occurs {} times, the device found {found:?}", node.count).into());
            }
        }
        Ok(())
    }

    /// Follows the list on the device, adding up what the nodes hold.
    pub fn check_list(&self, runtime: &Runtime) -> Result<()> {
        let Some(first) = self.nodes.first() else { return Ok(()) };
        let first = std::ptr::from_ref::<Node>(first) as u64;
        let sums = Box::new([const { AtomicU64::new(0) }; 2]);
        let at = sums.as_ptr() as u64;
        let walk = move |gpu: &mut Gpu<'_>| {
            let (mut node, mut nodes, mut total) = (first, 0u64, 0u64);
            while node != 0 {
                let (hash, count) = (gpu.load_u64(node)?, gpu.load_u64(node + 24)?);
                total = total.wrapping_add(hash.wrapping_mul(count));
                nodes += 1;
                node = gpu.load_u64(node + 40)?;
            }
            gpu.store_u64(at, nodes)?;
            gpu.store_u64(at + 8, total)
        };
        runtime.launch(0, walk).wait(None)?;
        let total = self.nodes.iter().fold(0u64, |sum, n| sum.wrapping_add(n.hash.wrapping_mul(n.count)));
        let got = sums.each_ref().map(|s| s.load(Ordering::Relaxed));
        if got != [self.nodes.len() as u64, total] {
            return Err(format!("the list has {} nodes, the device saw {got:?}", self.nodes.len()).into());
        }
        Ok(())
    }
}

/// On the device: whether the node at `node` holds the word at `word`.
fn same_word(gpu: &mut Gpu<'_>, node: u64, word: u64, len: u64, hash: u64) -> usvm::Result<bool> {
    if gpu.load_u64(node)? != hash || gpu.load_u64(node + 16)? != len {
        return Ok(false);
    }
    let theirs = gpu.load_u64(node + 8)?;
    let (mut a, mut b) = (vec![0u8; len as usize], vec![0u8; len as usize]);
    gpu.read(word, &mut a)?;
    gpu.read(theirs, &mut b)?;
    Ok(a == b)
}

/// FNV-1a.
fn hash(word: &[u8]) -> u64 {
    word.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}
