//! Where a running usvm means to have a page elsewhere than the kernel has it, each with its reason and exact predicate.
//!
//! # Overview
//! After each operation every page of the arena is where the kernel had it, or one of these rules explains that it is
//! not. A rule is asked at the operation that made the difference (or changed one side of it); from then on the page is
//! excused until one of the two sides moves it again. Contents have no rules: they are always equal.

use std::cell::OnceCell;

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
    /// MADV_FREE.
    Freed,
}

/// The rule by which usvm refuses what the kernel's range `span` was asked, and with exactly which errno; `true`: it must.
pub fn refusal(op: &Op, span: Span, kernel: &Kernel) -> Option<(Rule, i32, bool)> {
    let vma = kernel.vma_at(span.start)?;
    let writes = writes(op);
    let protected = kernel.vmas.iter().any(|v| v.span.overlaps(span) && !v.write);
    match op.name.as_str() {
        "migrate" if !vma.read => Some((Rule::NoAccess, libc::EFAULT, false)),
        _ if writes && protected => Some((Rule::ReadOnly, libc::EPERM, !vma.write)),
        _ => None,
    }
}

/// Whether the device asks to write.
fn writes(op: &Op) -> bool {
    let read_only = op.args.get(1).is_some_and(|ctx| ctx.split(',').any(|w| w == "ro"));
    op.name == "gpuw" || op.name == "pages" && !read_only
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
    /// When the comparer expects it.
    pub predicate: &'static str,
}

macro_rules! meant {
    ($($rule:ident: $kernel:literal, $usvm:literal, $reason:literal, $predicate:literal;)*) => {
        /// All of them.
        pub const MEANT: &[Meant] = &[$(
            Meant { rule: Rule::$rule, kernel: $kernel, usvm: $usvm, reason: $reason, predicate: $predicate },
        )*];
    };
}

meant! {
    Fork: "device pages stay where they are when the process forks",
        "everything comes home before the fork",
        "the child has no usvm that could bring its copy back",
        "fork: a page that was on the device";
    Collected: "a range that lost a part of its mapping keeps device pages until the driver collects it",
        "it is collected at once and its other pages come home",
        "usvm is driver and collector in one; the rest gets ranges that fit the mappings at its next use",
        "a page of a range with UNMAPPED, at the operation that set it";
    Rangeless: "device pages stay when their range is removed, or the whole space",
        "they come home with the range",
        "usvm finds pages by their range",
        "a page of a range that went at this operation, or destroy";
    Immovable: "read-only, executable, write-only, inaccessible and locked anonymous memory migrates",
        "it is reached over the link",
        "UFFDIO_MOVE takes pages only out of plain writable mappings",
        "migrate of the page's range; the mapping is not rw-, or locked";
    Whole: "EBUSY and nothing moves where some pages of the range are on the device already",
        "the rest goes there, too",
        "a range has one device allocation, whatever came back of it",
        "migrate of the page's range that the kernel answers with EBUSY";
    Mixed: "one range may be mapped half from the device, half from system memory",
        "it is mapped where it is if all of it is on the device; otherwise it comes home",
        "a range is bound with one entry",
        "pages, gpuw or gpur of a range of which usvm had a part on the device, or that the kernel then maps mixed";
    Moved: "device pages stay on the device when mremap moves their mapping",
        "they land in the new place as host pages",
        "the new place has no range, and need not have room for one of the same size",
        "mremap: a page inside the destination";
    Full: "ENOSPC: making room is the driver's business",
        "the coldest ranges are evicted and the range goes",
        "usvm is the driver",
        "migrate that the kernel answers with ENOSPC; or a page of another range, if the largest free piece of device memory \
         is smaller than the range";
    Unit: "a CPU access or an eviction brings back one allocation of device memory",
        "it brings back the range",
        "a range has one allocation; the kernel's may have several, of ranges that it had before",
        "a CPU access or eviction that meets the page's range in usvm: it is home; that does not: it stays";
    Child: "a child's access to device pages that it shares brings back its parent's, too",
        "the parent's pages stay on the device",
        "the child has had its own copy since the fork",
        "an access of the child; the page stays where it was";
    Race: "what is where after two threads raced for a range is up to chance",
        "the same",
        "both are right",
        "race: a page of its span; usvm has it at home";
    ReadOnly: "a device mapping that is valid, or of device pages, can be written although the program's mapping cannot",
        "EPERM",
        "the program asked for protection",
        "pages without ro, or gpuw, where a mapping of the range is not writable: EPERM; it must be if that is the first one";
    NoAccess: "memory without read permission migrates",
        "EFAULT",
        "neither UFFDIO_MOVE nor an access over the link can reach it",
        "migrate where the mapping is not readable: EFAULT or as Immovable";
    Divided: "mremap moves what is one mapping to the program",
        "EFAULT if usvm has registered a part of it, until the program has usvm let go",
        "the kernel moves no mapping under userfaultfd together with a neighbour",
        "mremap of a span of several mappings, or of a mapping and a gap, one registered: usvm lets go first, then it must succeed";
    Recut: "a range stays as it is when mprotect divides its mapping",
        "it comes home at the next device access and gets ranges that fit the mappings",
        "protection and the right to flip are a mapping's",
        "migrate by a fault; usvm's range at the address is smaller than the kernel's and does not hold the page; or pages, gpuw \
         or gpur of a range of which a mapping does not allow the access";
    Collapse: "MADV_COLLAPSE fetches device pages and makes them huge",
        "they stay on the device; the advice answers EINVAL",
        "the kernel collapses nothing that waits for userfaultfd",
        "madvise collapse; the page stays where it was";
    Freed: "MADV_FREE leaves device pages as they are",
        "they are dropped at once and read as zeroes; what went to the device afterwards is kept",
        "the advice allows it, and userfaultfd reports it as it does MADV_DONTNEED; reclaim does not reach a device",
        "madvise free of a page that was on the device: at home, or all zero; and a page that nobody wrote since the advice: one side has \
         the contents, the other zeroes (the one difference in contents)";
}

/// One page at one operation.
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
    /// The program's memory.
    pub live: &'a Side,
    /// What mlock holds of it, asked for only if it matters.
    pub locked: &'a OnceCell<Vec<Span>>,
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
        if came && (self.is(&["destroy"]) || self.gone) {
            return Some(Rule::Rangeless);
        }
        if stale && came {
            return Some(Rule::Collected);
        }
        if self.op.args.last().is_some_and(|w| w == "free") && came {
            return Some(Rule::Freed);
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
        if self.is(&["migrate"])
            && self.is_targeted()
            && self.asked.is_some_and(|h| !h.span.covers(self.page))
        {
            return Some(Rule::Recut);
        }
        if self.is(&["pages", "gpuw", "gpur"]) && self.is_targeted() && came && self.is_denied_in_part() {
            return Some(Rule::Recut);
        }
        let partly = self.held.is_some_and(|h| h.device > 0 && h.device < h.span.pages());
        let mixed = self.range.is_some_and(|r| r.sys > 0 && r.dev > 0);
        if self.is(&["pages", "gpuw", "gpur"]) && self.is_targeted() && came && (partly || mixed) {
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
                "EBUSY" => Some(Rule::Whole),
                _ => None,
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

    /// Whether a mapping of the range in question does not allow what the device asks for.
    fn is_denied_in_part(&self) -> bool {
        let denies = |v: &Vma| if writes(self.op) { !v.write } else { !v.read && !v.write };
        self.target().is_some_and(|t| self.kernel.vmas.iter().any(|v| v.span.overlaps(t) && denies(v)))
    }

    fn lands_here(&self) -> bool {
        Span::sized(self.op.hex(4), self.op.hex(2)).covers(self.page)
    }

    /// Whether UFFDIO_MOVE may take pages out of the mapping here.
    fn can_be_flipped(&self) -> bool {
        let plain = |v: &Vma| v.read && v.write && !v.exec;
        self.kernel.vma_at(self.page.start).is_some_and(plain)
            && !self.locked.get_or_init(|| self.live.locked()).iter().any(|at| at.overlaps(self.page))
    }

    /// Whether the operation is a CPU access to some of `span`, or evicts some of it.
    fn accesses(&self, span: Span) -> bool {
        if self.is(&["devevict"]) {
            let came = |(at, letter): &(Span, u8)| at.overlaps(span) && !matches!(letter, b'd' | b'D');
            return self.op.pages.iter().any(came);
        }
        self.is(&["touch", "sum", "sumsame", "madvise", "mlock"])
            && Span::sized(self.op.hex(0), self.op.hex(1)).overlaps(span)
    }
}
