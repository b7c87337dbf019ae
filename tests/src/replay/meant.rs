//! The differences from the kernel that are meant, each with its reason and an exact predicate.
//!
//! # Overview
//! usvm's default mode is compared with a *careful caller* of the kernel: the kernel-exact space, which gives what the
//! recorded kernel gave, asked so that the quirks below do not arise. Each rule says exactly when the caller asks
//! otherwise and what. All else must be equal: answers, ranges, notifiers, what invalidations met. So a rule excuses
//! its own difference, what follows from it, and no more.

use super::drive::Same;
use usvm::Result;
use usvm::ground::addr::Span;
use usvm::space::pages::{Folio, GotPages, PageSource};
use usvm::space::{Ctx, Range, RangeFlags, Space};

/// A difference that is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// The address one past the space's end.
    EndOfSpace,
    /// Chunks that reach over the space's ends.
    ChunksInside,
    /// Valid pages that do not answer what is asked.
    StillValid,
}

/// What is written about a rule.
#[derive(Debug, Clone, Copy)]
pub struct Meant {
    /// Which.
    pub rule: Rule,
    /// What the kernel does.
    pub kernel: &'static str,
    /// What usvm does.
    pub usvm: &'static str,
    /// Why.
    pub reason: &'static str,
    /// When the comparer expects it, and what it then expects.
    pub predicate: &'static str,
}

/// All of them.
pub const MEANT: [Meant; 3] = [
    Meant {
        rule: Rule::EndOfSpace,
        kernel: "find_or_insert accepts mm_start + mm_range, one past the end",
        usvm: "EINVAL",
        reason: "an off-by-one: a range outside the space has no place in the device's page table",
        predicate: "find, addr = end of the space: EINVAL before anything else, nothing changes",
    },
    Meant {
        rule: Rule::ChunksInside,
        kernel: "a chunk may begin before mm_start or end after mm_start + mm_range",
        usvm: "chunks lie inside the space",
        reason: "the caller gave the limits because the device cannot map beyond them",
        predicate: "find: as the kernel with the GPU VA limits cut to the space",
    },
    Meant {
        rule: Rule::StillValid,
        kernel: "get_pages of a range that is valid answers 0 to every caller and changes nothing",
        usvm: "pages that do not answer what is asked are got again; if that fails, those of before stay",
        reason: "a write get after a read get would report success with a mapping that refuses the write, and a \
                 devmem_only caller would get system pages",
        predicate: "pages, of a valid range, and (not ro and held read-only, or only and no device page held, or held \
                    mixed and (not mixed, or only)): as the kernel after unmap_pages; on an error the range is as before",
    },
];

/// The careful caller.
#[derive(Debug, Clone, Copy)]
pub struct Workarounds;

impl Workarounds {
    /// The GPU VA limits it asks with, `None` where it answers EINVAL without asking.
    pub fn find(limits: Span, addr: u64, gpuva: Span) -> Option<Span> {
        if addr == limits.end {
            return None;
        }
        Some(gpuva.intersect(limits).unwrap_or(Span::new(addr, addr)))
    }

    /// Gets the pages of a range that holds the folios `held`.
    pub fn get_pages(
        space: &Space<()>,
        range: &Range<()>,
        held: Option<&[Folio]>,
        source: &impl PageSource,
        ctx: &Ctx,
    ) -> (Result<GotPages>, Option<Rule>) {
        let flags = range.flags();
        let has = |flag| flags.contains(flag);
        let valid = has(RangeFlags::HAS_DMA_MAPPING);
        let refuses_writes = !ctx.read_only && !has(RangeFlags::WRITABLE);
        let no_device_page = ctx.devmem_only && !has(RangeFlags::HAS_DEVMEM_PAGES);
        let too_mixed = has(RangeFlags::MIXED) && (!ctx.allow_mixed || ctx.devmem_only);
        if !(valid && (refuses_writes || no_device_page || too_mixed)) {
            return (space.get_pages(range, source, ctx), None);
        }
        range.unmap_pages();
        let got = space.get_pages(range, source, ctx);
        if got.is_err() {
            let before = Ctx { read_only: !has(RangeFlags::WRITABLE), allow_mixed: true, ..Ctx::default() };
            let back = space.get_pages(range, &Same(held.unwrap_or_default()), &before);
            debug_assert!(back.is_ok(), "what was held can be held again");
        }
        (got, Some(Rule::StillValid))
    }
}
