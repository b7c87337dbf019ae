//! Where a replay differs from the trace, and what is written about it.

use super::drive::{Driver, Outcome};
use super::meant::{MEANT, Rule, Workarounds};
use super::trace::{Call, Op, RangeView, Trace};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use usvm::ground::addr::Span;

/// How many operations apart the invariants of the spaces are checked.
const VALIDATE_EVERY: usize = 64;

/// How often a meant difference came up.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Operations in which its predicate held.
    pub applied: usize,
    /// Of those, with another answer than the kernel's.
    pub answers: usize,
}

/// What replaying one trace showed.
#[derive(Debug, Default)]
pub struct Report {
    /// The trace.
    pub name: String,
    /// Operations done.
    pub operations: usize,
    /// Calls of the invalidate callback in it.
    pub invalidations: usize,
    /// Differences that nothing explains, in order.
    pub differences: Vec<String>,
    /// Meant differences.
    pub meant: BTreeMap<Rule, Seen>,
}

/// Sums over traces.
#[derive(Debug, Default)]
pub struct Totals {
    /// Traces.
    pub traces: usize,
    /// Operations.
    pub operations: usize,
    /// Calls of the invalidate callback.
    pub invalidations: usize,
    /// Unexplained differences.
    pub differences: usize,
    /// Meant differences.
    pub meant: BTreeMap<Rule, Seen>,
}

impl Totals {
    /// Adds one trace.
    pub fn add(&mut self, report: &Report) {
        self.traces += 1;
        self.operations += report.operations;
        self.invalidations += report.invalidations;
        self.differences += report.differences.len();
        for (rule, seen) in &report.meant {
            let sum = self.meant.entry(*rule).or_default();
            sum.applied += seen.applied;
            sum.answers += seen.answers;
        }
    }

    /// The line that everything ends in.
    pub fn line(&self) -> String {
        let Self { operations, traces, differences, .. } = self;
        format!("{operations} operations, {traces} traces, {differences} unexplained differences")
    }

    /// The table of meant differences, with how often each came up.
    pub fn differences_md(&self) -> String {
        let mut text = String::from(
            "# Where usvm means to differ from drm_gpusvm\n\n\
             Written by `cargo run -p usvm-tests --bin usvm-replay -- --write-differences` from the table in\n\
             `tests/src/replay/meant.rs`; the test `kernel_replay` fails when this file is stale. The same table and the one of a\n\
             running usvm's residency (`tests/src/live/rules.rs`) stand in `ARCHITECTURE.md`, with the same check.\n\n\
             With `SpaceConfig::kernel_exact` there is no difference. By default there are these, and the comparer accepts\n\
             exactly these: the predicate says when, and what it expects instead.\n\n\
             | drm_gpusvm | usvm | reason | predicate | in the kept traces: operations it holds for, with another answer |\n\
             |---|---|---|---|---|\n",
        );
        for m in &MEANT {
            let seen = self.meant.get(&m.rule).copied().unwrap_or_default();
            let row = [m.kernel, m.usvm, m.reason, m.predicate].join(" | ");
            let _ = writeln!(text, "| {row} | {}, {} |", seen.applied, seen.answers);
        }
        text.push_str(
            "\nNot judged here, because the host floor and the device decide it and the replay takes it from the trace: what\n\
             migrate answers where the mapping allows it (0, EBUSY, ENOSPC), evict, devevict, scan, and contents. The live run\n\
             judges contents and residency.\n",
        );
        text
    }
}

/// The space as the trace has it.
#[derive(Debug, Default)]
struct Recorded {
    ranges: BTreeMap<u64, RangeView>,
    notifiers: BTreeSet<Span>,
    queue: usize,
}

impl Recorded {
    fn apply(&mut self, op: &Op) {
        for start in &op.gone {
            self.ranges.remove(start);
        }
        self.ranges.extend(op.ranges.iter().map(|r| (r.span.start, r.clone())));
        self.notifiers.retain(|n| !op.notifiers_gone.contains(&n.start));
        self.notifiers.extend(&op.notifiers);
        self.queue = op.queue.unwrap_or(self.queue);
    }
}

/// Replays a trace through three spaces. A panic is a difference of its operation and ends the trace.
pub fn replay(trace: &Trace) -> Report {
    let at = Cell::new(0);
    catch_unwind(AssertUnwindSafe(|| replay_from(trace, &at))).unwrap_or_else(|_| {
        let differences = vec![format!("{}: {}: panics", trace.name, trace.ops[at.get()].text())];
        Report { name: trace.name.clone(), operations: at.get(), differences, ..Report::default() }
    })
}

fn replay_from(trace: &Trace, at: &Cell<usize>) -> Report {
    let mut report = Report { name: trace.name.clone(), operations: trace.ops.len(), ..Report::default() };
    let mut exact = Driver::new(trace, true, None);
    let mut careful = Driver::new(trace, true, Some(Workarounds));
    let mut default = Driver::new(trace, false, None);
    let mut recorded = Recorded::default();
    for op in &trace.ops {
        at.set(op.number);
        let (a, b, c) = (exact.step(op), careful.step(op), default.step(op));
        recorded.apply(op);
        report.invalidations += op.calls.len();
        let mut wrong = Vec::new();
        if op.name == "race" || op.resync {
            for driver in [&mut exact, &mut careful, &mut default] {
                wrong.extend(driver.resync(&recorded.ranges).err());
            }
        }
        against_trace(op, &a, &exact, &recorded, &mut wrong);
        if !wrong.is_empty() {
            wrong.extend(exact.resync(&recorded.ranges).err());
        }
        let mut unlike = Vec::new();
        against_careful(op, (&b, &careful), (&c, &default), &mut unlike);
        if !unlike.is_empty() {
            unlike.extend(default.resync(&careful.ranges()).err());
        }
        count(&b, &a, &mut report);
        if op.number % VALIDATE_EVERY == 0 || op.number + 1 == trace.ops.len() {
            wrong.extend(exact.validate().err());
            unlike.extend(default.validate().err());
        }
        let text = |mode: &str, what: &String| format!("{}: {}: {mode}{what}", trace.name, op.text());
        report.differences.extend(wrong.iter().map(|w| text("", w)));
        report.differences.extend(unlike.iter().map(|w| text("default mode: ", w)));
    }
    report
}

fn count(careful: &Outcome, exact: &Outcome, report: &mut Report) {
    let Some(rule) = careful.rule else { return };
    let other = usize::from(careful.result != exact.result);
    let seen = report.meant.entry(rule).or_default();
    // Limits that cut nothing are no difference.
    seen.applied += if rule == Rule::ChunksInside { other } else { 1 };
    seen.answers += other;
}

fn against_trace(op: &Op, out: &Outcome, driver: &Driver, recorded: &Recorded, wrong: &mut Vec<String>) {
    wrong.extend(out.faults.iter().cloned());
    if out.result != op.result {
        wrong.push(format!("usvm answers {}, the kernel {}", out.result, op.result));
    }
    if !matches!(op.name.as_str(), "race" | "procend") && !op.resync {
        calls(&out.calls, &op.calls, "the kernel", wrong);
    }
    ranges(&driver.ranges(), &recorded.ranges, "the kernel", wrong);
    if driver.queue() != recorded.queue {
        wrong.push(format!(
            "{} ranges wait for the collector, in the kernel {}",
            driver.queue(),
            recorded.queue
        ));
    }
    let notifiers = driver.notifiers();
    if !notifiers.iter().eq(&recorded.notifiers) {
        wrong.push(format!("notifiers {notifiers:?}, the kernel has {:?}", recorded.notifiers));
    }
}

fn against_careful(op: &Op, want: (&Outcome, &Driver), got: (&Outcome, &Driver), wrong: &mut Vec<String>) {
    if op.resync {
        return;
    }
    let who = "the rules";
    if got.0.faults != want.0.faults {
        wrong.push(format!("{:?}, by the rules {:?}", got.0.faults, want.0.faults));
    }
    if got.0.result != want.0.result {
        wrong.push(format!("usvm answers {}, by the rules {}", got.0.result, want.0.result));
    }
    calls(&got.0.calls, &want.0.calls, who, wrong);
    ranges(&got.1.ranges(), &want.1.ranges(), who, wrong);
    if got.1.queue() != want.1.queue() {
        wrong.push(format!(
            "{} ranges wait for the collector, by the rules {}",
            got.1.queue(),
            want.1.queue()
        ));
    }
    if got.1.notifiers() != want.1.notifiers() {
        wrong.push(format!("notifiers {:?}, by the rules {:?}", got.1.notifiers(), want.1.notifiers()));
    }
}

fn calls(got: &[Call], want: &[Call], who: &str, wrong: &mut Vec<String>) {
    if got.len() != want.len() {
        wrong.push(format!("{} calls of the invalidate callback, {who}: {}", got.len(), want.len()));
    }
    if let Some((g, w)) = got.iter().zip(want).find(|(g, w)| g != w) {
        wrong.push(format!("an event met {g:?}, {who}: {w:?}"));
    }
}

fn ranges(
    got: &BTreeMap<u64, RangeView>,
    want: &BTreeMap<u64, RangeView>,
    who: &str,
    wrong: &mut Vec<String>,
) {
    if got == want {
        return;
    }
    let starts: BTreeSet<&u64> = got.keys().chain(want.keys()).collect();
    let show = |r: Option<&RangeView>| r.map_or("none".into(), RangeView::to_string);
    for start in starts {
        let (g, w) = (got.get(start), want.get(start));
        if g != w {
            wrong.push(format!("range {}, {who}: {}", show(g), show(w)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::trace::parse;

    /// A mapping, a range of it, an unmap of its second half.
    const GOOD: &str = "usvm-kernel-trace 1\nname t\narena 1000000000 1000000\n\
        op 0 create 1000000000 1000000 20000000 200000,10000,1000 0\n= 0\n\
        op 1 mmap 1000000000 400000 rw anon\n= 0\nvma 1\nv 1000000000 1000400000 rw-p anon\n\
        op 2 find 1000000000 dm,own thr=0 lim=0:ffffffffffffffff\n= 0 1000000000 1000200000 new\n\
        n 1000000000 1020000000\nr 1000000000 1000200000 M---- 0 0 0 -\n\
        op 3 munmap 1000100000 100000\n= 0\n\
        e UNMAP 1000100000 1000200000 1000000000 1 1000000000 1000200000\n\
        vma 1\nv 1000000000 1000100000 rw-p anon\nr 1000000000 1000200000 MUP-- 0 0 0 - gc\ng 1 0\n\
        op 4 gc\n= 0 1\nx 1000000000\nnx 1000000000\ng 0 0\nend 5\n";

    fn differences(text: &str) -> usize {
        replay(&parse(text).unwrap()).differences.len()
    }

    #[test]
    fn a_trace_that_lies_is_found_out() {
        assert_eq!(differences(GOOD), 0);
        for (from, to) in [
            ("1000200000 new", "1000200000 old"),
            ("1000200000 M----", "1000200000 -----"),
            ("MUP--", "MU---"),
            ("0 0 0 - gc", "0 0 0 -"),
            ("1000000000 1 1000000000 1000200000", "1000000000 0"),
            ("= 0 1\n", "= 0 0\n"),
            ("g 1 0", "g 2 0"),
            ("\nnx 1000000000", ""),
            ("\nx 1000000000", ""),
            ("n 1000000000 1020000000", "n 1000000000 1010000000"),
            ("rw-p anon\nop 2", "r--p anon\nop 2"),
            ("rw-p anon\nop 2", "rw-p shmem\nop 2"),
        ] {
            let lie = GOOD.replacen(from, to, 1);
            assert_ne!(lie, GOOD, "{from}");
            assert!(differences(&lie) > 0, "{from} -> {to}");
        }
    }
}
