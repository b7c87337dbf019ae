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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::trace;

    /// Pages that are freed after `ops`, each with its answer, in an arena of 16 pages.
    fn freed(ops: &[(&str, &str)]) -> Vec<usize> {
        let mut text = "usvm-kernel-trace 1\nkernel x\nname t\narena 1000000000 10000\n".to_owned();
        for (i, (op, answer)) in ops.iter().enumerate() {
            text += &format!("op {i} {op}\n= {answer}\n");
        }
        text += &format!("end {}\n", ops.len());
        let trace = trace::parse(&text).unwrap();
        let mut freed = Freed::new(Span::sized(0x10_0000_0000, 0x1_0000));
        trace.ops.iter().for_each(|op| freed.follow(op));
        (0..16).filter(|page| freed.has(*page)).collect()
    }

    const FREE: (&str, &str) = ("madvise 1000001000 4000 free", "0");

    #[test]
    fn a_page_is_freed_until_it_is_written() {
        assert_eq!(freed(&[FREE]), [1, 2, 3, 4]);
        assert_eq!(freed(&[FREE, ("touch 1000002000 1000 w", "0 ok=1 segv=0 bus=0")]), [1, 3, 4]);
        assert_eq!(
            freed(&[FREE, ("touch 1000002000 1000 r", "0 ok=1 segv=0 bus=0")]),
            [1, 2, 3, 4],
            "read only"
        );
        assert_eq!(
            freed(&[FREE, ("touch 1000002000 1000 w", "0 ok=0 segv=1 bus=0")]),
            [1, 2, 3, 4],
            "refused"
        );
        assert_eq!(freed(&[FREE, ("munmap 1000002000 2000", "0")]), [1, 4]);
        assert_eq!(freed(&[("madvise 1000001000 4000 cold", "0")]), [0; 0]);
    }

    #[test]
    fn mremap_takes_it_along() {
        let moved = ("mremap 1000002000 2000 2000 move 1000008000", "0");
        assert_eq!(freed(&[FREE, moved]), [1, 4, 8, 9]);
        let over = ("madvise 1000008000 3000 free", "0");
        assert_eq!(
            freed(&[over, FREE, ("mremap 1000004000 2000 2000 move 1000008000", "0")]),
            [1, 2, 3, 8, 10]
        );
        assert_eq!(freed(&[FREE, ("mremap 1000002000 3000 1000 inplace 0", "0")]), [1, 2], "cut");
        let refused = ("mremap 1000002000 2000 2000 move 1000008000", "14");
        assert_eq!(freed(&[FREE, refused]), [1, 2, 3, 4]);
    }
}
