//! Does a trace's operations on a running usvm, on real memory, and compares after each.
//!
//! # Overview
//! ```text
//! trace ──> usvm's arena (real system calls, real accesses, kernels on the simulated device)
//!       └─> its twin     (the same without usvm)
//! after each operation:  answers    usvm's arena = twin = trace
//!                        mappings   usvm's arena = twin = trace
//!                        contents   usvm's arena = twin, every byte of the pages concerned; all pages now and then
//!                        residency  usvm = trace, or a rule of [`super::rules`] says why not
//! ```
//! The sums that the kernel's driver recorded are answers, so contents are compared with the kernel's as well.
//!
//! # Limits
//! Which chunk becomes a range is taken from the trace (the replay judges it): usvm is given the kernel's ranges. Where the
//! trace has chunk sizes that usvm cannot move (8M, 512K, 16K), residency is not compared.

use std::cell::OnceCell;

use usvm::GpuAccess;
use usvm::ground::addr::{SZ_4K, Span};
use usvm::space::ports::{Vma, VmaKind};

use super::child::{Child, Order, fork_and_exit};
use super::freed::Freed;
use super::kernel::Kernel;
use super::report::Report;
use super::rules::{Case, Rule, refusal};
use super::served::{Look, Place, Sabotage, Served, Setup};
use super::side::{Errno, Page, Side, WORDS, advice, pattern};
use crate::replay::trace::{Op, RangeView, Trace};

/// The twin's arena lies so far above usvm's.
const TWIN: u64 = 1 << 40;
/// Operations between two comparisons of all contents.
const ALL_EVERY: usize = 64;
/// Word of a page that `race` counts in.
const COUNTER: usize = 8;

/// What an operation's answer is on each side.
struct Answers {
    live: String,
    twin: String,
}

impl Answers {
    fn both(text: String) -> Self {
        Self { twin: text.clone(), live: text }
    }

    fn of(live: Result<(), Errno>, twin: Result<(), Errno>) -> Self {
        let text = |answer: Result<(), Errno>| answer.map_or_else(errno, |()| "0".into());
        Self { live: text(live), twin: text(twin) }
    }
}

/// What there was before an operation.
struct Before<'a> {
    look: &'a Look,
    gone: &'a [RangeView],
    let_go: bool,
}

/// See the module.
pub struct Player<'a> {
    trace: &'a Trace,
    setup: &'a Setup,
    live: Side,
    twin: Side,
    served: Option<Served>,
    child: Option<Child>,
    kernel: Kernel,
    now: Look,
    excused: Vec<Option<Rule>>,
    freed: Freed,
    last_sums: [u64; 2],
    /// Residency is comparable in this space.
    comparable: bool,
    report: Report,
}

/// Plays a trace.
pub fn play(trace: &Trace, setup: &Setup) -> Result<Report, String> {
    let mut player = Player::new(trace, setup)?;
    for op in &trace.ops {
        if let Some(why) = player.cannot(op) {
            player.report.cut = Some(format!("op {}: {why}", op.number));
            break;
        }
        if std::env::var_os("USVM_LIVE_VERBOSE").is_some() {
            eprintln!("{} {}", trace.name, op.text());
        }
        player.step(op);
        if let Some((number, sabotage)) = setup.sabotage.filter(|(number, _)| *number == op.number) {
            player.sabotage(number, sabotage)?;
        }
        player.report.operations += 1;
    }
    Ok(player.finish())
}

impl<'a> Player<'a> {
    fn new(trace: &'a Trace, setup: &'a Setup) -> Result<Self, String> {
        let twin = Span::sized(trace.arena.start + TWIN, trace.arena.len());
        let pages = trace.arena.pages();
        Ok(Self {
            trace,
            setup,
            live: Side::new(trace.arena)?,
            twin: Side::new(twin)?,
            served: None,
            child: None,
            kernel: Kernel::new(trace.arena),
            now: nowhere(pages),
            excused: vec![None; pages],
            freed: Freed::new(trace.arena),
            last_sums: [0; 2],
            comparable: false,
            report: Report { name: trace.name.clone(), ..Report::default() },
        })
    }

    fn finish(mut self) -> Report {
        self.compare_contents(None, (0..self.trace.arena.pages()).collect());
        if let Some(child) = self.child.take() {
            child.exit();
        }
        if let Some(served) = self.served.take() {
            served.end();
        }
        // Everything is home now, and as it must be.
        self.now.places.fill(Place::Host);
        self.compare_contents(None, (0..self.trace.arena.pages()).collect());
        self.report
    }

    /// Breaks something, for a test that looks whether it is noticed.
    fn sabotage(&mut self, number: usize, sabotage: Sabotage) -> Result<(), String> {
        let served = self.served.as_ref().ok_or("there is nothing to break yet")?;
        let away = (0..self.now.places.len()).filter(|&i| self.now.places[i] == Place::Device);
        let page = away.map(|i| self.trace.arena.page_run(i, 1)).next();
        let done = match (sabotage, page) {
            (Sabotage::Byte, _) => served.flip_a_byte(),
            (Sabotage::Place, Some(page)) => served.evict(page).map(|()| true),
            (Sabotage::Place, None) => Ok(false),
        };
        match done {
            Ok(true) => Ok(()),
            Ok(false) => Err(format!("nothing is on the device after operation {number}")),
            Err(e) => Err(e.to_string()),
        }
    }

    fn wrong(&mut self, op: Option<&Op>, what: impl std::fmt::Display) {
        let at = op.map_or_else(|| "at the end".into(), Op::text);
        self.report.differences.push(format!("{}: {at}: {what}", self.trace.name));
    }

    fn excuse(&mut self, rule: Rule, times: usize) {
        *self.report.meant.entry(rule).or_default() += times;
    }

    /// Why this machine cannot do the operation.
    fn cannot(&self, op: &Op) -> Option<String> {
        if op.number >= self.setup.operations {
            return Some("as many as were asked for".into());
        }
        if op.name != "mmap" || op.result != "0" {
            return None;
        }
        let missing = match op.args[3].as_str() {
            "io" => !std::path::Path::new("/dev/usvm_ref").exists(),
            "hugetlb" => !has_huge_pages(),
            _ => false,
        };
        missing.then(|| format!("no {} here", op.args[3]))
    }

    fn step(&mut self, op: &Op) {
        let let_go = op.name == "mremap" && self.make_one(op);
        let answers = self.host_operation(op).or_else(|| self.device_operation(op));
        let before: Vec<bool> = (0..self.now.places.len()).map(|i| self.kernel.on_device(i)).collect();
        let gone = self.kernel.apply(op);
        self.freed.follow(op);
        if let Some(answers) = answers {
            // What collapsing a span answers depends on its page tables; what it does shows in the contents.
            let by_tables = op.args.last().is_some_and(|w| w == "collapse");
            if answers.live != answers.twin && !by_tables {
                self.wrong(Some(op), format_args!("with usvm {}, without {}", answers.live, answers.twin));
            }
            // This machine's kernel is another than the recorded one: which errno a refused mremap has differs.
            let refused = |answer: &str| op.name == "mremap" && !answer.starts_with('0');
            let both_refuse = refused(&answers.twin) && refused(&op.result);
            if answers.twin != op.result && !by_tables && !both_refuse {
                self.wrong(Some(op), format_args!("here {}, recorded {}", answers.twin, op.result));
            }
        }
        self.follow_ranges(op, &gone, let_go);
        let now = self.look(op);
        let was = std::mem::replace(&mut self.now, now);
        let moved: Vec<usize> = (0..before.len())
            .filter(|&i| self.now.places[i] != was.places[i] || before[i] != self.kernel.on_device(i))
            .collect();
        if self.comparable {
            let was = Before { look: &was, gone: &gone, let_go };
            self.compare_residency(op, &moved, &was);
        }
        if matches!(op.name.as_str(), "mmap" | "munmap" | "mremap" | "mprotect" | "mlock" | "munlock") {
            self.compare_mappings(op);
        }
        if op.name == "madvise" && op.args.last().is_some_and(|w| w == "free") {
            let dropped = moved.iter().copied().filter(|&i| was.places[i] == Place::Device);
            self.give_back(op, dropped.collect());
        }
        let pages = match op.number % ALL_EVERY {
            0 => (0..self.now.places.len()).collect(),
            _ => self.concerned(op, moved),
        };
        self.compare_contents(Some(op), pages);
    }

    /// The pages that the operation names, and those that moved.
    fn concerned(&self, op: &Op, mut pages: Vec<usize>) -> Vec<usize> {
        let arena = self.trace.arena;
        let spans: &[usize] = match op.name.as_str() {
            "mmap" | "munmap" | "mprotect" | "madvise" | "touch" | "gpuw" | "race" => &[0],
            "mremap" => &[0, 4],
            _ => &[],
        };
        for &i in spans {
            let len = op.hex(if i == 4 { 2 } else { 1 });
            if let Some(span) = Span::sized(op.hex(i), len).intersect(arena) {
                pages.extend((0..span.pages()).map(|p| arena.page_index(span.start) + p));
            }
        }
        pages.sort_unstable();
        pages.dedup();
        pages
    }

    // ---- the host side ----

    fn twin_of(&self, at: u64) -> u64 {
        at + TWIN
    }

    fn host_operation(&mut self, op: &Op) -> Option<Answers> {
        let (live, twin) = (&self.live, &self.twin);
        let a = |i: usize| op.hex(i);
        let t = |i: usize| op.hex(i) + TWIN;
        let word = |i: usize| op.args[i].as_str();
        Some(match op.name.as_str() {
            "mmap" => {
                Answers::of(live.mmap(a(0), a(1), word(2), word(3)), twin.mmap(t(0), a(1), word(2), word(3)))
            }
            "munmap" => Answers::of(live.munmap(a(0), a(1)), twin.munmap(t(0), a(1))),
            "mremap" => {
                let without = twin.mremap(t(0), a(1), a(2), word(3), t(4));
                Answers::of(live.mremap(a(0), a(1), a(2), word(3), a(4)), without)
            }
            "mprotect" => Answers::of(live.mprotect(a(0), a(1), word(2)), twin.mprotect(t(0), a(1), word(2))),
            "madvise" => {
                let advice = advice(word(2))?;
                Answers::of(live.madvise(a(0), a(1), advice), twin.madvise(t(0), a(1), advice))
            }
            "mlock" | "munlock" => {
                let lock = op.name == "mlock";
                Answers::of(live.mlock(a(0), a(1), lock), twin.mlock(t(0), a(1), lock))
            }
            "clear_refs" => {
                let _ = std::fs::write("/proc/self/clear_refs", word(0));
                return None;
            }
            "thp" => {
                if self.setup.own_machine {
                    let _ = std::fs::write("/sys/kernel/mm/transparent_hugepage/enabled", word(0));
                }
                return None;
            }
            "touch" | "sum" | "sumsame" => self.access(op),
            "fork" | "child" | "procend" => self.children(op),
            "race" => self.race(op),
            _ => return None,
        })
    }

    /// The kernel does not move memory under userfaultfd together with its neighbours, not even with a gap: what usvm has
    /// divided it must let go of first.
    fn make_one(&mut self, op: &Op) -> bool {
        let span = op.span();
        let Some(served) = &self.served else { return false };
        if self.live.pieces(span) == [span] || !served.has_registered(span) {
            return false;
        }
        let let_go = served.remove(span).and_then(|()| served.let_go(span));
        self.excuse(Rule::Divided, 1);
        if let Err(e) = let_go {
            self.wrong(Some(op), format_args!("usvm does not let go: {e}"));
        }
        true
    }

    fn access(&mut self, op: &Op) -> Answers {
        const FNV: u64 = 0xcbf2_9ce4_8422_2325;
        let (at, len) = (op.hex(0), op.hex(1));
        let places = [at, self.twin_of(at)];
        let touch = op.name == "touch";
        let done = places.map(|at| match (touch, op.args.last().is_some_and(|w| w == "w")) {
            (true, true) => Side::store(at, len, (op.number as u64) << 20),
            (true, false) => Side::load(at, len, 0),
            _ => Side::load(at, len, FNV),
        });
        let text = |i: usize| {
            let d = done[i];
            let counts = format!("ok={} segv={} bus={}", d.ok, d.segv, d.bus);
            if touch {
                return format!("0 {counts}");
            }
            let same = op.name == "sum" || d.sum == self.last_sums[i];
            format!("{} {counts} sum={:x}", if same { "0" } else { "EBADMSG" }, d.sum)
        };
        let answers = Answers { live: text(0), twin: text(1) };
        if !touch {
            self.last_sums = done.map(|d| d.sum);
        }
        answers
    }

    fn children(&mut self, op: &Op) -> Answers {
        let arg = |i: usize| op.args.get(i).map_or("", String::as_str);
        match (op.name.as_str(), arg(0)) {
            ("fork", "hold") => self.child = Some(Child::fork()),
            ("fork" | "procend", _) => fork_and_exit(),
            (_, "exit") => match self.child.take() {
                Some(child) => child.exit(),
                None => return Answers::both(errno(libc::ESRCH)),
            },
            (_, what) => {
                let Some(child) = &self.child else { return Answers::both(errno(libc::ESRCH)) };
                let what = if what == "munmap" { b'u' } else { what.as_bytes()[0] };
                let at = op.hex(1);
                let answer = child.order(Order { what, at: [at, at + TWIN], len: op.hex(2) });
                return Answers::both(if answer == 0 { "0".into() } else { errno(answer) });
            }
        }
        Answers::both("0".into())
    }

    fn race(&mut self, op: &Op) -> Answers {
        let span = op.span();
        let rounds = op.args[2].parse().unwrap_or(1);
        let counters = |side: u64| -> Vec<&std::sync::atomic::AtomicU64> {
            // SAFETY: the trace races only on readable and writable memory of the arena, which stays for this call.
            (0..span.pages() as u64)
                .map(|p| unsafe { &*((side + p * SZ_4K + 8 * COUNTER as u64) as *const _) })
                .collect()
        };
        let live = counters(span.start);
        use std::sync::atomic::Ordering::Relaxed;
        let total = || live.iter().fold(0u64, |sum, c| sum.wrapping_add(c.load(Relaxed)));
        let before = total();
        let mut added = 0u64;
        if let Some(served) = &self.served {
            let device = served.hammer(span, rounds);
            while !device.is_finished() {
                // A plain add, as a program does it: nothing else adds.
                live.iter().for_each(|c| c.store(c.load(Relaxed).wrapping_add(1), Relaxed));
                added += live.len() as u64;
            }
            let raced = device.join().expect("the thread returns");
            if let Err(e) = raced.and_then(|()| served.remove(span)) {
                self.wrong(Some(op), format_args!("usvm: {e}"));
            }
        }
        let lost = added.wrapping_sub(total().wrapping_sub(before)) as i64;
        for (from, to) in live.iter().zip(counters(self.twin_of(span.start))) {
            to.store(from.load(Relaxed), Relaxed);
        }
        Answers::both(format!("{} lost={lost}", if lost == 0 { "0" } else { "EBADMSG" }))
    }

    // ---- the device side ----

    fn device_operation(&mut self, op: &Op) -> Option<Answers> {
        match op.name.as_str() {
            "create" if op.result == "0" => self.create(op),
            "destroy" if op.result == "0" => {
                if let Some(served) = self.served.take() {
                    served.end();
                }
            }
            "gpuw" | "gpur" if op.result.starts_with('0') => return self.by_kernel(op),
            _ => self.on_range(op),
        }
        None
    }

    fn create(&mut self, op: &Op) {
        let chunks: Vec<u64> =
            op.args[3].split(',').filter_map(|c| u64::from_str_radix(c, 16).ok()).collect();
        let vram = u64::from_str_radix(&op.args[4], 16).unwrap_or(0) * SZ_4K;
        let served = Served::start(self.setup, self.trace.arena, op.hex(2), &chunks, vram);
        self.comparable =
            self.setup.policy == "gpusvm" && chunks.iter().all(|c| [2 << 20, 64 << 10, 4 << 10].contains(c));
        match served {
            Ok(served) => self.served = Some(served),
            Err(e) => self.wrong(Some(op), format_args!("usvm does not start: {e}")),
        }
    }

    /// An operation on the range at an address, as the recorded kernel did it. usvm must manage it, too, or refuse it by a
    /// rule.
    fn on_range(&mut self, op: &Op) {
        let at = op.args.first().and_then(|a| u64::from_str_radix(a, 16).ok());
        let range = at.and_then(|at| self.kernel.range_at(at)).cloned();
        let done = match (range, at) {
            _ if op.name == "devevict" => self.evict_as_recorded(op).map(|()| false),
            (Some(range), Some(at)) => self.ask(op, at, &range),
            _ => return,
        };
        let allowed =
            range_of(self.kernel.range_at(at.unwrap_or(0))).and_then(|s| refusal(op, s, &self.kernel));
        match (done, allowed) {
            (Err(e), Some((rule, errno, _))) if e.errno() == errno => self.excuse(rule, 1),
            (Ok(true), Some((rule, _, true))) => {
                self.wrong(Some(op), format_args!("usvm does it, which {rule:?} says it refuses"));
            }
            (Err(e), _) => self.wrong(Some(op), format_args!("usvm: {e}")),
            _ => {}
        }
    }

    /// Asks usvm; `false` where the kernel's answer leaves nothing to ask.
    fn ask(&self, op: &Op, at: u64, range: &RangeView) -> usvm::Result<bool> {
        let Some(served) = &self.served else { return Ok(false) };
        let span = range.span;
        let stale = range.flags.contains('U');
        match (op.name.as_str(), op.result.as_str()) {
            ("migrate", "ENOSPC") if stale => return Ok(false),
            ("migrate", "0" | "EBUSY" | "ENOSPC") if self.anonymous(span) => {
                if stale {
                    served.insert(span)?;
                }
                served.migrate(span, at, op.number % 2 == 1)?;
            }
            ("evict", "0") => {
                served.evict(span)?;
                return Ok(false);
            }
            ("pages", "0") if !stale => {
                if self.comes_back(op, span) {
                    served.evict(span)?;
                }
                let read_only = op.args[1].split(',').any(|w| w == "ro");
                served.map(span, if read_only { GpuAccess::Read } else { GpuAccess::Write })?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The kernel's own choice of what to evict: the pages that went. What is recorded of a span may have been so before.
    fn evict_as_recorded(&self, op: &Op) -> usvm::Result<()> {
        let Some(served) = &self.served else { return Ok(()) };
        let arena = self.trace.arena;
        for (span, _) in op.pages.iter().filter(|(_, letter)| !matches!(letter, b'd' | b'D')) {
            let first = arena.page_index(span.start);
            for page in (first..first + span.pages()).filter(|&i| self.kernel.on_device(i)) {
                served.evict(arena.page_run(page, 1))?;
            }
        }
        Ok(())
    }

    /// Whether the operation itself had pages of `span` come back.
    fn comes_back(&self, op: &Op, span: Span) -> bool {
        op.pages.iter().any(|(at, letter)| at.overlaps(span) && !matches!(letter, b'd' | b'D'))
            && (0..span.pages()).any(|p| self.kernel.on_device(self.trace.arena.page_index(span.start) + p))
    }

    fn anonymous(&self, span: Span) -> bool {
        self.kernel.vma_at(span.start).is_some_and(|v| v.kind == VmaKind::Anonymous)
    }

    fn by_kernel(&mut self, op: &Op) -> Option<Answers> {
        let served = self.served.as_ref()?;
        let span = op.span();
        let twin = self.twin_of(span.start);
        if op.name == "gpuw" {
            let value = (op.number as u64) << 20;
            let done = served.store(span, value);
            match (&done, refusal(op, span, &self.kernel)) {
                (Err(e), Some((rule, errno, _))) if e.errno() == errno => {
                    self.excuse(rule, 1);
                    self.store_by_force(op, span, value);
                    return None;
                }
                _ => Side::store(twin, span.len(), value),
            };
            return Some(Answers {
                live: done.map_or_else(|e| e.to_string(), |()| "0".into()),
                twin: "0".into(),
            });
        }
        let sum = (0..span.pages() as u64)
            .filter_map(|p| Side::read_page(twin + p * SZ_4K))
            .fold(0u64, |sum, page| sum.wrapping_add(page[0]));
        let seen = served.load(span);
        Some(Answers {
            live: seen.map_or_else(|e| e.to_string(), |sum| format!("0 sum={sum:x}")),
            twin: format!("0 sum={sum:x}"),
        })
    }

    /// The kernel's device stored where the program may not: so that both go on with the same contents. What is away
    /// cannot be written by force, and shared mappings not at all: then neither is.
    fn store_by_force(&mut self, op: &Op, span: Span, value: u64) {
        let home = self.served.as_ref().map(|served| served.evict(span).and_then(|()| served.let_go(span)));
        if let Some(Err(e)) = home {
            self.wrong(Some(op), format_args!("usvm does not let go: {e}"));
        }
        for i in 0..span.pages() as u64 {
            let at = span.start + i * SZ_4K;
            let done = [at, self.twin_of(at)].map(|at| Side::force_page(at, &pattern(value + i)));
            match done {
                [Err(_), Err(_)] if !self.anonymous(Span::sized(at, SZ_4K)) => {}
                [Err(e), _] | [_, Err(e)] => {
                    self.wrong(Some(op), format_args!("{at:#x} cannot be written: {e}"))
                }
                [Ok(()), Ok(())] => {}
            }
        }
    }

    /// MADV_FREE dropped these pages, which were on the device: both go on with what the kernel kept.
    fn give_back(&mut self, op: &Op, dropped: Vec<usize>) {
        let holes = self.holes(&dropped);
        for i in dropped {
            let page = self.trace.arena.page_run(i, 1);
            let zero = holes[i][0] || Side::read_page(page.start) == Some([0; WORDS]);
            let Some(kept) = Side::read_page(self.twin_of(page.start)).filter(|_| zero) else { continue };
            self.put(op, page, &kept);
        }
    }

    /// Writes what the twin has into the program's `page`.
    fn put(&mut self, op: &Op, page: Span, kept: &Page) {
        let Some(served) = &self.served else { return };
        let given = served.let_go(page).map_err(|e| e.to_string());
        let given = given.and_then(|()| Side::force_page(page.start, kept).map_err(|e| e.to_string()));
        self.excuse(Rule::Freed, 1);
        if let Err(e) = given {
            self.wrong(Some(op), format_args!("{page} cannot be given back: {e}"));
        }
    }

    /// One of the two lost the contents of a page of which MADV_FREE was said: both go on with what the other has. Whether
    /// that is so.
    fn lost(&mut self, op: Option<&Op>, i: usize, live: Option<Page>, twin: Option<Page>) -> bool {
        const LOST: Option<Page> = Some([0; WORDS]);
        let page = self.trace.arena.page_run(i, 1);
        let (Some(op), true) = (op, self.freed.has(i)) else { return false };
        match (live, twin) {
            (LOST, Some(kept)) => self.put(op, page, &kept),
            (Some(kept), LOST) => {
                self.excuse(Rule::Freed, 1);
                if let Err(e) = Side::force_page(self.twin_of(page.start), &kept) {
                    self.wrong(Some(op), format_args!("{page} cannot be given to the twin: {e}"));
                }
            }
            _ => return false,
        }
        true
    }

    /// Gives usvm the ranges that the kernel has.
    fn follow_ranges(&mut self, op: &Op, gone: &[RangeView], let_go: bool) {
        let Some(served) = &self.served else { return };
        let mut failed = Vec::new();
        if let Err(e) = served.settle() {
            failed.push(format!("usvm does not settle: {e}"));
        }
        for range in gone {
            failed.extend(served.remove(range.span).err().map(|e| format!("removing {}: {e}", range.span)));
        }
        let again = self.kernel.ranges.values().filter(|r| let_go && r.span.overlaps(op.span()));
        for range in op.ranges.iter().chain(again).filter(|r| !r.flags.contains('U')) {
            if let Err(e) = served.insert(range.span) {
                failed.push(format!("a range at {}: {e}", range.span));
            }
        }
        failed.into_iter().for_each(|e| self.wrong(Some(op), e));
    }

    fn look(&mut self, op: &Op) -> Look {
        let nothing = nowhere(self.now.places.len());
        match self.served.as_ref().map(Served::look) {
            None => nothing,
            Some(Ok(look)) => look,
            Some(Err(e)) => {
                self.wrong(Some(op), format_args!("usvm tells no places: {e}"));
                nothing
            }
        }
    }

    // ---- comparing ----

    fn compare_residency(&mut self, op: &Op, moved: &[usize], was: &Before<'_>) {
        let mut wrong: Vec<usize> = Vec::new();
        let locked = OnceCell::new();
        let asked = op.args.first().and_then(|a| u64::from_str_radix(a, 16).ok());
        for &i in moved {
            self.report.residency += 1;
            let place = self.now.places[i];
            let same = match place {
                Place::Host => !self.kernel.on_device(i),
                Place::Device => self.kernel.on_device(i),
                Place::Astray => false,
            };
            if same {
                self.excused[i] = None;
                continue;
            }
            let page = self.trace.arena.page_run(i, 1);
            let now = self.kernel.range_at(page.start);
            let left = was.gone.iter().find(|r| r.span.contains(page.start));
            let case = Case {
                op,
                page,
                place,
                before: was.look.places[i],
                kernel: &self.kernel,
                range: now.or(left),
                gone: now.is_none() && left.is_some(),
                held: was.look.held.iter().find(|h| h.span.contains(page.start)).copied(),
                asked: was.look.held.iter().find(|h| asked.is_some_and(|at| h.span.contains(at))).copied(),
                free: was.look.free,
                let_go: was.let_go,
                live: &self.live,
                locked: &locked,
            };
            self.excused[i] = case.rule();
            match self.excused[i] {
                Some(rule) => *self.report.meant.entry(rule).or_default() += 1,
                None => wrong.push(i),
            }
        }
        if let Some(&first) = wrong.first() {
            let page = self.trace.arena.page_run(first, 1);
            let text = format!(
                "{} pages from {:#x} on: usvm has the first on {:?} (before: {:?}), the kernel `{}`; range {}",
                wrong.len(),
                page.start,
                self.now.places[first],
                was.look.places[first],
                char::from(self.kernel.pages[first]),
                self.kernel.range_at(page.start).map_or("none".into(), RangeView::to_string),
            );
            self.wrong(Some(op), text);
        }
    }

    fn compare_mappings(&mut self, op: &Op) {
        let live = self.live.vmas();
        let shifted = |v: Vma| Vma { span: Span::new(v.span.start - TWIN, v.span.end - TWIN), ..v };
        let twin: Vec<Vma> = self.twin.vmas().into_iter().map(shifted).collect();
        if live != twin {
            self.wrong(Some(op), format_args!("mappings with usvm {live:x?}, without {twin:x?}"));
        }
        if twin != self.kernel.vmas {
            let recorded = self.kernel.vmas.clone();
            self.wrong(Some(op), format_args!("mappings here {twin:x?}, recorded {recorded:x?}"));
        }
    }

    /// Of each page, whether it is anonymous and has no memory, in each arena: then it is all zero, and looking would change
    /// that.
    fn holes(&self, wanted: &[usize]) -> Vec<[bool; 2]> {
        let mut holes = vec![[false; 2]; self.now.places.len()];
        let Some(served) = self.served.as_ref().filter(|_| !wanted.is_empty()) else { return holes };
        let present = [self.live.span, self.twin.span].map(|span| served.present(span));
        for &i in wanted {
            if self.kernel.readable[i] == Some(VmaKind::Anonymous) {
                holes[i] = [!present[0][i], !present[1][i]];
            }
        }
        holes
    }

    fn compare_contents(&mut self, op: Option<&Op>, pages: Vec<usize>) {
        let arena = self.trace.arena;
        let at = |i: usize| arena.page_run(i, 1).start;
        let (away, home): (Vec<usize>, Vec<usize>) =
            pages.into_iter().partition(|&i| self.now.places[i] == Place::Device);
        let mut differ = Vec::new();
        if let Some(served) = self.served.as_ref().filter(|_| !away.is_empty()) {
            match served.device_pages(away.iter().map(|&i| at(i)).collect()) {
                Ok(found) => {
                    self.report.device_contents += found.len();
                    let differs = |(i, page): (&usize, Page)| {
                        let twin = Side::read_page(at(*i) + TWIN)?;
                        (twin != page).then_some((*i, Some(page), Some(twin)))
                    };
                    differ.extend(away.iter().zip(found.iter().copied()).filter_map(differs));
                }
                Err(e) => self.wrong(op, format_args!("device memory cannot be read: {e}")),
            }
        }
        self.report.contents += away.len() + home.len();
        let holes = self.holes(&home);
        for i in home {
            let page = |at, hole| if hole { Some([0; WORDS]) } else { Side::read_page(at) };
            let (Some(_), [live, twin]) = (self.kernel.readable[i], holes[i]) else { continue };
            let (live, twin) = (page(at(i), live), page(at(i) + TWIN, twin));
            if live != twin {
                differ.push((i, live, twin));
            }
        }
        let mut wrong = Vec::new();
        for (i, live, twin) in differ {
            if !self.lost(op, i, live, twin) {
                wrong.push(i);
            }
        }
        if let Some(&first) = wrong.first() {
            let place = self.now.places[first];
            self.wrong(
                op,
                format_args!("contents of {} pages from {:#x} ({place:?}) differ", wrong.len(), at(first)),
            );
        }
    }
}

/// Everything at home.
fn nowhere(pages: usize) -> Look {
    Look { places: vec![Place::Host; pages], ..Look::default() }
}

fn range_of(range: Option<&RangeView>) -> Option<Span> {
    range.map(|r| r.span)
}

fn has_huge_pages() -> bool {
    std::fs::read_to_string("/proc/sys/vm/nr_hugepages")
        .is_ok_and(|n| n.trim().parse::<u64>().is_ok_and(|n| n >= 32))
}

/// The name of an errno, as the kernel's driver writes it.
fn errno(number: Errno) -> String {
    let name = match number {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::ESRCH => "ESRCH",
        libc::EIO => "EIO",
        libc::EAGAIN => "EAGAIN",
        libc::ENOMEM => "ENOMEM",
        libc::EACCES => "EACCES",
        libc::EFAULT => "EFAULT",
        libc::EBUSY => "EBUSY",
        libc::ENODEV => "ENODEV",
        libc::EINVAL => "EINVAL",
        other => return format!("E{other}"),
    };
    name.into()
}
