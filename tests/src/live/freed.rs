//! Pages of which the program has said MADV_FREE and which nobody has written since.
//!
//! # Overview
//! The kernel may take their contents at any time, and it takes them where they are: from the program's memory under pressure
//! or at MADV_PAGEOUT, never from a device. So one side can have lost what the other still has, and both are right.

use usvm::ground::addr::Span;

use crate::replay::trace::Op;

/// See the module.
#[derive(Debug)]
pub struct Freed {
    arena: Span,
    pages: Vec<bool>,
}

impl Freed {
    /// None yet.
    pub fn new(arena: Span) -> Self {
        Self { arena, pages: vec![false; arena.pages()] }
    }

    /// Whether page `index` of the arena is one.
    pub fn has(&self, index: usize) -> bool {
        self.pages[index]
    }

    /// `op` was done.
    pub fn follow(&mut self, op: &Op) {
        match op.name.as_str() {
            "madvise" if op.args[2] == "free" => self.set(op.span(), true),
            "touch" if op.args[2] == "w" && op.result.ends_with("segv=0 bus=0") => self.set(op.span(), false),
            "gpuw" | "mmap" | "munmap" | "race" if op.result.starts_with('0') => self.set(op.span(), false),
            "mremap" if op.result.starts_with('0') => self.moved(op),
            _ => {}
        }
    }

    fn within(&self, span: Span) -> std::ops::Range<usize> {
        span.intersect(self.arena).map_or(0..0, |part| {
            let first = self.arena.page_index(part.start);
            first..first + part.pages()
        })
    }

    fn set(&mut self, span: Span, freed: bool) {
        let within = self.within(span);
        self.pages[within].fill(freed);
    }

    fn moved(&mut self, op: &Op) {
        let from = op.span();
        let was = self.pages[self.within(from)].to_vec();
        let to = if op.args[3] == "inplace" { from.start } else { op.hex(4) };
        self.set(from, false);
        self.set(Span::sized(to, op.hex(2)), false);
        for (page, _) in self.within(Span::sized(to, op.hex(2))).zip(was).filter(|(_, freed)| *freed) {
            self.pages[page] = true;
        }
    }
}
