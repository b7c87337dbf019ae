//! Where a running usvm means to have a page elsewhere than the kernel has it, each with its reason and exact predicate.
//!
//! # Overview
//! After each operation every page of the arena is where the kernel had it, or one of these rules explains that it is
//! not. A rule is asked at the operation that made the difference (or changed one side of it); from then on the page is
//! excused until one of the two sides moves it again. Contents have no rules: they are always equal.

use usvm::ground::addr::Span;
use usvm::space::ports::Vma;

use super::kernel::Kernel;
use super::served::{Held, Place};
use super::side::Side;
use crate::replay::trace::{Op, RangeView};

/// A difference in residency that is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// A fork brings everything home.
    Fork,
    /// Ranges whose mappings went are collected at once.
    Collected,
    /// Device pages that no range holds.
    Rangeless,
    /// A mapping that pages cannot be flipped out of.
    Immovable,
    /// usvm moves what the kernel left behind.
    Whole,
    /// No range is half here and half there.
    Mixed,
    /// mremap.
    Moved,
    /// A full device.
    Full,
    /// What a CPU access brings back.
    Unit,
    /// A child's access to what its parent has on the device.
    Child,
    /// Two threads at once.
    Race,
    /// A mapping for writing where the program may not write.
    ReadOnly,
    /// Memory that the program cannot access.
    NoAccess,
    /// mremap of a mapping that usvm has divided.
    Divided,
    /// Ranges are cut anew where a mapping was divided inside of them.
    Recut,
    /// MADV_COLLAPSE.
    Collapse,
}

/// The rule by which usvm refuses what the kernel's range at `at` was asked: exactly then, and with exactly this error.
pub fn refusal(op: &Op, span: Span, kernel: &Kernel) -> Option<(Rule, i32)> {
    let vma = kernel.vma_at(span.start)?;
    let read_only = op.args.get(1).is_some_and(|ctx| ctx.split(',').any(|w| w == "ro"));
    match op.name.as_str() {
        "migrate" if !vma.read => Some((Rule::NoAccess, libc::EFAULT)),
        "pages" if !read_only && !vma.write => Some((Rule::ReadOnly, libc::EPERM)),
        "gpuw" if !vma.write => Some((Rule::ReadOnly, libc::EPERM)),
        _ => None,
    }
}

/// One page at one operation.
#[derive(Debug)]
pub struct Case<'a> {
    /// The operation.
    pub op: &'a Op,
    /// The page.
    pub page: Span,
    /// Where usvm has it now.
    pub place: Place,
    /// Where usvm had it.
    pub before: Place,
    /// The kernel after the operation.
    pub kernel: &'a Kernel,
    /// The kernel's range that holds it, or that held it and went.
    pub range: Option<&'a RangeView>,
    /// Whether that range went.
    pub gone: bool,
    /// usvm's range that held it before the operation.
    pub held: Option<Held>,
    /// usvm's range at the operation's address before it.
    pub asked: Option<Held>,
    /// The largest free piece of usvm's device before the operation.
    pub free: u64,
    /// usvm was made to let go of what the operation is about.
    pub let_go: bool,
}

impl Case<'_> {
    /// The rule that explains it.
    pub fn rule(&self) -> Option<Rule> {
        match self.place {
            Place::Host => self.home_here(),
            Place::Device => self.away_here(),
            Place::Astray => None,
        }
    }

    fn is(&self, names: &[&str]) -> bool {
        names.contains(&self.op.name.as_str())
    }

    /// The range that the operation is about.
    fn target(&self) -> Option<Span> {
        let at = u64::from_str_radix(self.op.args.first()?, 16).ok()?;
        self.kernel.range_at(at).map(|r| r.span)
    }

    fn is_targeted(&self) -> bool {
        self.target().is_some_and(|t| t.covers(self.page))
    }

    /// The kernel has it on the device, usvm with the application.
    fn home_here(&self) -> Option<Rule> {
        let came = self.before == Place::Device;
        let stale = self.gone || self.range.is_some_and(|r| r.flags.contains('U'));
        let needed = self.target().map_or(0, |t| t.len());
        if self.is(&["fork", "procend"]) && came {
            return Some(Rule::Fork);
        }
        if self.is(&["race"]) {
            return Some(Rule::Race);
        }
        if self.is(&["destroy", "remove"]) || self.gone || (self.range.is_none() && came) {
            return Some(Rule::Rangeless);
        }
        if stale && came {
            return Some(Rule::Collected);
        }
        if self.is(&["gpuw"]) && came && refusal(self.op, self.page, self.kernel).is_some() {
            return Some(Rule::ReadOnly);
        }
        if self.let_go && came && self.held.is_some_and(|h| h.span.overlaps(self.op.span())) {
            return Some(Rule::Divided);
        }
        if self.is(&["mremap"]) && self.lands_here() {
            return Some(Rule::Moved);
        }
        if self.is(&["migrate"]) && self.is_targeted() && !self.can_be_flipped() {
            return Some(Rule::Immovable);
        }
        if self.is(&["migrate"]) && !self.is_targeted() && came && self.free < needed {
            return Some(Rule::Full);
        }
        if self.is(&["migrate"]) && self.is_targeted() && self.asked.is_some_and(|h| !h.span.covers(self.page)) {
            return Some(Rule::Recut);
        }
        let partly = self.held.is_some_and(|h| h.device > 0 && h.device < h.span.pages());
        if self.is(&["pages", "gpuw", "gpur"]) && self.is_targeted() && came && partly {
            return Some(Rule::Mixed);
        }
        if came && self.held.is_some_and(|h| self.accesses(h.span)) {
            return Some(Rule::Unit);
        }
        None
    }

    /// usvm has it on the device, the kernel does not.
    fn away_here(&self) -> Option<Rule> {
        if self.is(&["migrate"]) && self.is_targeted() {
            return match self.op.result.as_str() {
                "ENOSPC" => Some(Rule::Full),
                _ => Some(Rule::Whole),
            };
        }
        let stayed = self.before == Place::Device;
        if self.is(&["child"]) && stayed {
            return Some(Rule::Child);
        }
        if self.op.args.last().is_some_and(|w| w == "collapse") && stayed {
            return Some(Rule::Collapse);
        }
        if stayed && self.held.is_some_and(|h| !self.accesses(h.span)) {
            return Some(Rule::Unit);
        }
        None
    }

    fn lands_here(&self) -> bool {
        Span::sized(self.op.hex(4), self.op.hex(2)).covers(self.page)
    }

    /// Whether UFFDIO_MOVE may take pages out of the mapping here.
    fn can_be_flipped(&self) -> bool {
        let plain = |v: &Vma| v.read && v.write && !v.exec;
        self.kernel.vma_at(self.page.start).is_some_and(plain) && !Side::is_locked(self.page)
    }

    /// Whether the operation is a CPU access to some of `span`.
    fn accesses(&self, span: Span) -> bool {
        self.is(&["touch", "sum", "sumsame", "madvise", "mlock"])
            && Span::sized(self.op.hex(0), self.op.hex(1)).overlaps(span)
    }
}
