//! One space, driven by the operations of a trace.

use super::host::Host;
use super::meant::{Rule, Workarounds};
use super::trace::{Call, Op, RangeView, Trace};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use usvm::Result;
use usvm::ground::addr::Span;
use usvm::ground::error::Error;
use usvm::space::pages::{Folio, GotPages, PageKind, PageSource};
use usvm::space::ports::{AddressSpace, Vma, VmaKind};
use usvm::space::{Ctx, Event, EventKind, Range, RangeFlags, Space, SpaceConfig};

/// Pages that a range got, which usvm leaves to its caller to keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Got {
    folios: Vec<Folio>,
    /// System pages, device pages.
    pages: (usize, usize),
    /// How many entries the kernel has for them.
    segments: usize,
}

impl Got {
    fn new(span: Span, folios: Vec<Folio>) -> Self {
        let (mut sys, mut dev, mut page) = (0, 0, 0);
        for folio in &folios {
            let n = (1 << folio.order).min(span.pages() - page);
            match folio.kind {
                PageKind::Device { .. } => dev += n,
                _ => sys += n,
            }
            page += n;
        }
        Self { segments: folios.len(), folios, pages: (sys, dev) }
    }
}

/// What one operation came to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The answer, as the trace would have it.
    pub result: String,
    /// What each call of the invalidate callback met.
    pub calls: Vec<Call>,
    /// What should not have happened.
    pub faults: Vec<String>,
    /// The rule of meant differences that was followed.
    pub rule: Option<Rule>,
}

/// A space and the process it mirrors.
pub struct Driver {
    host: Host,
    space: Option<Space<()>>,
    kernel_exact: bool,
    workarounds: Option<Workarounds>,
    got: BTreeMap<u64, Got>,
    /// Ranges that were removed while they waited for the collector: usvm leaves them on its list until it comes.
    stale: usize,
}

impl Driver {
    /// At the start of `trace`. With `workarounds`, the caller avoids what the kernel does and usvm means not to do.
    pub fn new(trace: &Trace, kernel_exact: bool, workarounds: Option<Workarounds>) -> Self {
        Self {
            host: Host::new(trace),
            space: None,
            kernel_exact,
            workarounds,
            got: BTreeMap::new(),
            stale: 0,
        }
    }

    /// Does `op` and takes over what it made of the process.
    pub fn step(&mut self, op: &Op) -> Outcome {
        let mut out = Outcome::default();
        out.result = match op.name.as_str() {
            "create" => self.create(op),
            "destroy" => self.destroy(),
            "find" => self.find(op, &mut out),
            "pages" => return self.pages(op, out),
            "gc" => {
                self.stale = 0;
                self.collect(op, &mut out)
            }
            "unmap" | "remove" | "gpuw" | "gpur" => self.on_range(op),
            "migrate" | "evict" | "scan" => self.host_answers(op),
            _ => op.result.clone(),
        };
        // Of a race the order of events is not known; procend's are those of another process.
        if !matches!(op.name.as_str(), "gc" | "race" | "procend") {
            self.feed(&op.calls, &mut out);
        }
        self.host.apply(op);
        if op.name == "migrate" {
            self.migrated(op, &mut out);
        }
        out
    }

    fn create(&mut self, op: &Op) -> String {
        if self.space.is_some() {
            return "EBUSY".into();
        }
        let sizes = op.args[3].split(',').map(|s| u64::from_str_radix(s, 16).unwrap_or(0)).collect();
        let config = SpaceConfig {
            limits: op.span(),
            notifier_size: op.hex(2),
            chunk_sizes: sizes,
            kernel_exact: self.kernel_exact,
        };
        self.create_as(config)
    }

    fn create_as(&mut self, config: SpaceConfig) -> String {
        self.got.clear();
        self.stale = 0;
        match Space::new(config) {
            Ok(space) => {
                self.space = Some(space);
                "0".into()
            }
            Err(e) => errno(&e),
        }
    }

    fn destroy(&mut self) -> String {
        match self.space.take() {
            Some(space) => {
                self.stale = 0;
                space.clear();
                "0".into()
            }
            None => "EBADFD".into(),
        }
    }

    fn find(&mut self, op: &Op, out: &mut Outcome) -> String {
        let Some(space) = &self.space else { return "EBADFD".into() };
        let addr = op.hex(0);
        let mut ctx = self.ctx(op, 1);
        ctx.check_pages_threshold = field(op, 2, "thr=");
        let (low, high) =
            op.args[3].strip_prefix("lim=").and_then(|l| l.split_once(':')).unwrap_or(("0", "0"));
        let number = |text| u64::from_str_radix(text, 16).unwrap_or(0);
        let mut gpuva = Span::new(number(low), number(high));
        if self.workarounds.is_some() {
            match Workarounds::find(space.config().limits, addr, gpuva) {
                Some(inside) => {
                    out.rule = (inside != gpuva).then_some(Rule::ChunksInside);
                    gpuva = inside;
                }
                None => {
                    out.rule = Some(Rule::EndOfSpace);
                    return "EINVAL".into();
                }
            }
        }
        let before = space.range_count();
        match space.find_or_insert(&self.host, addr, gpuva, &ctx) {
            Ok(range) => {
                let how = if space.range_count() > before { "new" } else { "old" };
                format!("0 {:x} {:x} {how}", range.start(), range.span().end)
            }
            Err(e) => errno(&e),
        }
    }

    fn pages(&mut self, op: &Op, mut out: Outcome) -> Outcome {
        let ctx = self.ctx(op, 1);
        let held = match self.range(op) {
            Err(missing) => {
                out.result = missing.into();
                self.feed(&op.calls, &mut out);
                self.host.apply(op);
                return out;
            }
            Ok((space, range)) => {
                let source = Faulting {
                    host: &self.host,
                    space,
                    op,
                    fed: Cell::new(false),
                    before: self.host.letters(range.span()),
                    out: RefCell::new(&mut out),
                };
                let (got, rule) = match &self.workarounds {
                    Some(_) => {
                        let held = self.got.get(&range.start()).map(|g| g.folios.as_slice());
                        Workarounds::get_pages(space, &range, held, &source, &ctx)
                    }
                    None => (space.get_pages(&range, &source, &ctx), None),
                };
                source.settle();
                out.rule = rule;
                out.result = got.as_ref().map_or_else(errno, |_| "0".into());
                let fresh = got.ok().and_then(|GotPages { fresh, .. }| fresh);
                fresh.map(|folios| (range.start(), Got::new(range.span(), folios)))
            }
        };
        self.got.extend(held);
        out
    }

    /// The collector evicts what is left of a range that was partly unmapped, then removes it.
    fn collect(&self, op: &Op, out: &mut Outcome) -> String {
        let Some(space) = &self.space else { return "EBADFD 0".into() };
        let mut rest = op.calls.as_slice();
        let removed = space.collect_garbage(|range| {
            // mremap may have taken a part of the range's memory to where no range is.
            let meets = |call: &Call| call.hits == 0 || call.event.span.overlaps(range.span());
            let n = rest.iter().take_while(|call| meets(call)).count();
            if range.flags().contains(RangeFlags::PARTIAL_UNMAP) {
                feed(space, &rest[..n], out);
                rest = &rest[n..];
            }
            Ok(())
        });
        if !rest.is_empty() {
            out.faults
                .push(format!("{} events came for ranges that were not collected in this order", rest.len()));
            feed(space, rest, out);
        }
        removed.map_or_else(|e| errno(&e), |n| format!("0 {n}"))
    }

    fn on_range(&mut self, op: &Op) -> String {
        let (space, range) = match self.range(op) {
            Ok(found) => found,
            Err(missing) => return missing.into(),
        };
        match op.name.as_str() {
            "unmap" => {
                range.unmap_pages();
            }
            "remove" => {
                let queued = range.flags().contains(RangeFlags::QUEUED);
                if !space.remove(&range) {
                    return "not removed".into();
                }
                self.stale += usize::from(queued);
            }
            "gpuw" | "gpur" => {
                let writes = op.name == "gpuw";
                if op.span().end > range.span().end {
                    return "EINVAL".into();
                }
                if !range.pages_valid_hint() {
                    return "EAGAIN".into();
                }
                if writes && !range.flags().contains(RangeFlags::WRITABLE) {
                    return "EPERM".into();
                }
                // What is read is the host's.
                if let Some(contents) = op.result.strip_prefix("0 ") {
                    return format!("0 {contents}");
                }
            }
            _ => {}
        }
        "0".into()
    }

    /// What the host answers is taken as it is, if there is a range to ask about.
    fn host_answers(&self, op: &Op) -> String {
        match (self.range(op), op.result.as_str()) {
            (Err(missing), _) => missing.into(),
            (Ok(_), "ESRCH" | "EBADFD") => "a range".into(),
            (Ok(_), other) => other.into(),
        }
    }

    /// What the mapping alone says of a migration. Whether pages can move is the host's to say.
    fn migrated(&self, op: &Op, out: &mut Outcome) {
        let Ok((_, range)) = self.range(op) else { return };
        let error = match self.host.find_vma(range.start()) {
            Err(e) => Some(errno(&e)),
            Ok(None) => Some(errno(&Error::NoVma { addr: range.start() })),
            Ok(Some(vma)) if !vma.span.covers(range.span()) => Some("EINVAL".into()),
            Ok(Some(vma)) if !vma.migratable() => Some(errno(&Error::Busy { span: range.span() })),
            Ok(Some(_)) => None,
        };
        if let Some(error) = error.filter(|_| op.result != "ENOSPC") {
            out.result = error;
        }
    }

    fn range(&self, op: &Op) -> std::result::Result<(&Space<()>, std::sync::Arc<Range<()>>), &'static str> {
        let space = self.space.as_ref().ok_or("EBADFD")?;
        Ok((space, space.find(op.hex(0)).ok_or("ESRCH")?))
    }

    fn ctx(&self, op: &Op, i: usize) -> Ctx {
        let has = |word| op.args[i].split(',').any(|w| w == word);
        self.host.set_own(has("own"));
        Ctx {
            read_only: has("ro"),
            devmem_possible: has("dm"),
            devmem_only: has("only"),
            allow_mixed: has("mixed"),
            ..Ctx::default()
        }
    }

    fn feed(&self, calls: &[Call], out: &mut Outcome) {
        if let Some(space) = &self.space {
            feed(space, calls, out);
        } else if !calls.is_empty() {
            out.faults.push("events without a space".into());
        }
    }

    /// The ranges, by start.
    pub fn ranges(&self) -> BTreeMap<u64, RangeView> {
        let Some(space) = &self.space else { return BTreeMap::new() };
        let all = space.ranges_in(Span::new(0, u64::MAX));
        all.iter().map(|range| (range.start(), self.view(range))).collect()
    }

    fn view(&self, range: &Range<()>) -> RangeView {
        let flags = range.flags();
        let letters = [
            (RangeFlags::MIGRATE_DEVMEM, 'M'),
            (RangeFlags::UNMAPPED, 'U'),
            (RangeFlags::PARTIAL_UNMAP, 'P'),
            (RangeFlags::HAS_DEVMEM_PAGES, 'D'),
            (RangeFlags::HAS_DMA_MAPPING, 'A'),
        ];
        let mapped = flags.contains(RangeFlags::HAS_DMA_MAPPING);
        let got = self.got.get(&range.start()).filter(|_| mapped);
        let (sys, dev) = got.map_or((0, 0), |g| g.pages);
        RangeView {
            span: range.span(),
            flags: letters.map(|(flag, c)| if flags.contains(flag) { c } else { '-' }).iter().collect(),
            sys,
            dev,
            segments: got.map_or(0, |g| g.segments),
            mode: match (mapped, flags.contains(RangeFlags::WRITABLE)) {
                (false, _) => "-",
                (true, true) => "rw",
                (true, false) => "ro",
            },
            queued: flags.contains(RangeFlags::QUEUED),
        }
    }

    /// The notifiers' windows.
    pub fn notifiers(&self) -> Vec<Span> {
        self.space.as_ref().map_or_else(Vec::new, |s| s.notifiers().iter().map(|n| n.span()).collect())
    }

    /// Ranges that wait for the collector.
    pub fn queue(&self) -> usize {
        self.space.as_ref().map_or(0, |space| space.garbage_len().saturating_sub(self.stale))
    }

    /// Whether everything that must always hold does.
    ///
    /// # Errors
    /// What does not.
    pub fn validate(&self) -> std::result::Result<(), String> {
        self.space.as_ref().map_or(Ok(()), Space::validate)
    }

    /// Makes the space have exactly these `ranges`: after a race, or to go on after a difference.
    ///
    /// # Errors
    /// What cannot be made so.
    pub fn resync(&mut self, ranges: &BTreeMap<u64, RangeView>) -> std::result::Result<(), String> {
        let Some(config) = self.space.as_ref().map(|s| s.config().clone()) else { return Ok(()) };
        self.create_as(config);
        for want in ranges.values() {
            self.restore(want)?;
        }
        match self.ranges() == *ranges {
            true => Ok(()),
            false => Err("the recorded state cannot be made".into()),
        }
    }

    fn restore(&mut self, want: &RangeView) -> std::result::Result<(), String> {
        let Some(space) = &self.space else { return Ok(()) };
        let span = want.span;
        let has = |c| want.flags.contains(c);
        let mut ctx = Ctx { devmem_possible: has('M'), read_only: want.mode != "rw", ..Ctx::default() };
        let addr = span.start.max(space.config().limits.start);
        let made = space.find_or_insert(&Whole(span), addr, span, &ctx).map_err(|e| e.to_string())?;
        if has('A') {
            ctx.allow_mixed = true;
            let folios = folios_of(want);
            space.get_pages(&made, &Same(&folios), &ctx).map_err(|e| e.to_string())?;
            self.got.insert(span.start, Got { segments: want.segments, ..Got::new(span, folios) });
        }
        if want.queued || has('U') {
            let hole = if has('P') { Span::new(span.start, span.end - 1) } else { span };
            space.invalidate(Event::new(EventKind::Unmap, hole), |_, _| {});
        }
        Ok(())
    }
}

/// Folios that give these counts, device pages first.
fn folios_of(view: &RangeView) -> Vec<Folio> {
    let device = Folio { kind: PageKind::Device { device: 1, allocation: 1 }, order: 0 };
    let system = Folio { kind: PageKind::System, order: 0 };
    [vec![device; view.dev], vec![system; view.sys]].concat()
}

/// Gives `calls` to the space. Calls of one event that went to several notifiers become one again.
fn feed(space: &Space<()>, calls: &[Call], out: &mut Outcome) {
    let same = |a: &Call, b: &Call| a.event == b.event && a.window < b.window;
    for group in calls.chunk_by(same) {
        let event = group[0].event;
        let notifiers = space.notifiers();
        let tickets: Vec<_> = notifiers.iter().map(|n| (n, n.read_begin())).collect();
        let mut met: BTreeMap<u64, (usize, Span)> = BTreeMap::new();
        space.invalidate(event, |range, _| {
            let (hits, span) = met
                .entry(range.notifier().span().start)
                .or_insert((0, Span::new(range.start(), range.start())));
            *hits += 1;
            span.end = range.span().end;
        });
        for (notifier, _) in tickets.iter().filter(|(n, ticket)| n.read_retry(*ticket)) {
            let window = notifier.span().start;
            let (hits, met) = met.remove(&window).unwrap_or((0, Span::new(0, 0)));
            out.calls.push(Call { event, window, hits, met });
        }
        if !met.is_empty() {
            out.faults.push("ranges were met in a notifier that was not told".into());
        }
    }
}

/// The kernel's page faults during get_pages: they change pages and send events of their own.
pub struct Faulting<'a, 'o> {
    host: &'a Host,
    space: &'a Space<()>,
    op: &'a Op,
    fed: Cell<bool>,
    before: Vec<u8>,
    out: RefCell<&'o mut Outcome>,
}

impl Faulting<'_, '_> {
    fn feed_once(&self) {
        if !self.fed.replace(true) {
            feed(self.space, &self.op.calls, &mut self.out.borrow_mut());
            self.host.apply(self.op);
        }
    }

    /// After get_pages: whoever did not fault saw the pages unchanged.
    fn settle(&self) {
        let quiet = self.op.calls.is_empty() && self.op.pages.is_empty();
        if !self.fed.get() && !quiet {
            self.out.borrow_mut().faults.push("no fault, where the kernel's pages changed".into());
        }
        self.feed_once();
    }
}

impl PageSource for Faulting<'_, '_> {
    /// The pages as they are after the operation. Only, where the kernel's faults met the range with an event, the first
    /// answer is the pages of before, as a walk sees them that an invalidation overtakes: it must not be used.
    fn fault(&self, span: Span, write: bool) -> Result<Vec<Folio>> {
        let first = !self.fed.get();
        let old = self.host.folios(span);
        self.feed_once();
        self.host.fault(span, write, &self.before, self.op.result == "EPERM")?;
        let overtaken = self.op.calls.iter().any(|call| call.event.span.overlaps(span));
        Ok(if first && overtaken { old } else { self.host.folios(span) })
    }
}

/// A process in which exactly one span is mapped, for [`Driver::resync`].
struct Whole(Span);

/// Pages that were got before.
pub struct Same<'a>(pub &'a [Folio]);

impl PageSource for Same<'_> {
    fn fault(&self, _span: Span, _write: bool) -> Result<Vec<Folio>> {
        Ok(self.0.to_vec())
    }
}

impl AddressSpace for Whole {
    fn find_vma(&self, _addr: u64) -> Result<Option<Vma>> {
        Ok(Some(Vma { span: self.0, read: true, write: true, exec: false, kind: VmaKind::Anonymous }))
    }

    fn populated(&self, _span: Span) -> bool {
        true
    }
}

fn field(op: &Op, i: usize, prefix: &str) -> u64 {
    op.args[i].strip_prefix(prefix).and_then(|v| u64::from_str_radix(v, 16).ok()).unwrap_or(0)
}

/// The name of an error's number.
fn errno(e: &Error) -> String {
    let name = match e.errno() {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::EIO => "EIO",
        libc::EAGAIN => "EAGAIN",
        libc::EFAULT => "EFAULT",
        libc::EBUSY => "EBUSY",
        libc::EINVAL => "EINVAL",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        other => return format!("errno {other}"),
    };
    name.into()
}
