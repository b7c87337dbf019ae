//! What the recorded kernel had after each operation.

use std::collections::BTreeMap;

use usvm::ground::addr::{SZ_4K, Span};
use usvm::space::ports::{Vma, VmaKind};

use super::side::merged;
use crate::replay::trace::{Op, RangeView};

/// Mappings, pages and ranges as the trace has them.
#[derive(Debug)]
pub struct Kernel {
    arena: Span,
    /// One letter for each page of the arena (TRACE.md).
    pub pages: Vec<u8>,
    /// The mappings, clipped to the arena.
    pub vmas: Vec<Vma>,
    /// The kind of the mapping of each page that the program can read.
    pub readable: Vec<Option<VmaKind>>,
    /// The ranges by their start.
    pub ranges: BTreeMap<u64, RangeView>,
}

impl Kernel {
    /// Nothing yet.
    pub fn new(arena: Span) -> Self {
        let pages = arena.pages();
        Self {
            arena,
            pages: vec![b'.'; pages],
            vmas: Vec::new(),
            readable: vec![None; pages],
            ranges: BTreeMap::new(),
        }
    }

    /// Takes over what `op` changed. Gives the ranges that went.
    pub fn apply(&mut self, op: &Op) -> Vec<RangeView> {
        if let Some(vmas) = &op.vmas {
            let clipped = vmas.iter().filter_map(|v| Some(Vma { span: v.span.intersect(self.arena)?, ..*v }));
            self.vmas = merged(clipped);
            self.readable.fill(None);
            // A mapping that can only be written can be read as well, as far as the processor goes.
            for vma in self.vmas.iter().filter(|v| v.read || v.write || v.exec) {
                let first = self.arena.page_index(vma.span.start);
                self.readable[first..first + vma.span.pages()].fill(Some(vma.kind));
            }
        }
        for (span, letter) in &op.pages {
            for at in (span.start..span.end).step_by(SZ_4K as usize) {
                self.pages[self.arena.page_index(at)] = *letter;
            }
        }
        let gone = op.gone.iter().filter_map(|start| self.ranges.remove(start)).collect();
        self.ranges.extend(op.ranges.iter().map(|r| (r.span.start, r.clone())));
        gone
    }

    /// Whether page `index` is on the device.
    pub fn on_device(&self, index: usize) -> bool {
        matches!(self.pages[index], b'd' | b'D')
    }

    /// The range that holds `addr`.
    pub fn range_at(&self, addr: u64) -> Option<&RangeView> {
        self.ranges.range(..=addr).next_back().map(|(_, r)| r).filter(|r| r.span.contains(addr))
    }

    /// The mapping that holds `addr`.
    pub fn vma_at(&self, addr: u64) -> Option<&Vma> {
        self.vmas.iter().find(|v| v.span.contains(addr))
    }
}
