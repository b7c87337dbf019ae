//! How two results differ.

use crate::report::{Report, Table, number};
use serde::Serialize;

/// Two results side by side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Revision of the first.
    pub before: String,
    /// Revision of the second.
    pub after: String,
    /// One for each case that is in either.
    pub changes: Vec<Change>,
}

/// One case in two results. What is missing in one is `None` there.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    /// The case.
    pub name: String,
    /// Medians.
    pub median_before: Option<f64>,
    /// Medians.
    pub median_after: Option<f64>,
    /// Ratios to the baseline of the same run.
    pub ratio_before: Option<f64>,
    /// Ratios to the baseline of the same run.
    pub ratio_after: Option<f64>,
    /// What the ratio became, relative to what it was: −0.1 is a tenth better. Where the case has no baseline it speaks
    /// of the medians, which also tell machines and moods apart.
    pub change: Option<f64>,
}

impl Comparison {
    /// `after` against `before`, in the order of `after`, what vanished last.
    pub fn of(before: &Report, after: &Report) -> Self {
        let vanished = before.results.iter().filter(|b| after.results.iter().all(|a| a.name != b.name));
        let names = after.results.iter().chain(vanished).map(|r| r.name.as_str());
        Self {
            before: before.git.clone(),
            after: after.git.clone(),
            changes: names.map(|name| Change::of(name, before, after)).collect(),
        }
    }

    /// For people.
    pub fn table(&self) -> Table {
        let mut table = Table::new(&["name", "median_a", "median_b", "ratio_a", "ratio_b", "change"]);
        let cell = |value: Option<f64>| value.map_or_else(|| "-".into(), number);
        let ratio = |value: Option<f64>| value.map_or_else(|| "-".into(), |r| format!("{r:.3}"));
        for c in &self.changes {
            table.row([
                c.name.clone(),
                cell(c.median_before),
                cell(c.median_after),
                ratio(c.ratio_before),
                ratio(c.ratio_after),
                c.change.map_or_else(|| "-".into(), |change| format!("{:+.1}%", change * 100.0)),
            ]);
        }
        table
    }
}

impl Change {
    fn of(name: &str, before: &Report, after: &Report) -> Self {
        let find = |report: &Report| report.results.iter().find(|r| r.name == name).cloned();
        let (old, new) = (find(before), find(after));
        let median_before = old.as_ref().map(|r| r.median);
        let median_after = new.as_ref().map(|r| r.median);
        let ratio_before = old.and_then(|r| r.ratio);
        let ratio_after = new.and_then(|r| r.ratio);
        let change = relative(ratio_before, ratio_after).or_else(|| relative(median_before, median_after));
        Self { name: name.into(), median_before, median_after, ratio_before, ratio_after, change }
    }
}

fn relative(before: Option<f64>, after: Option<f64>) -> Option<f64> {
    before.filter(|b| *b > 0.0).zip(after).map(|(b, a)| a / b - 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::Measurement;

    fn result(name: &str, median: f64, ratio: Option<f64>) -> Measurement {
        Measurement {
            name: name.into(),
            unit: "us".into(),
            median,
            p90: median,
            n: 1,
            baseline: ratio.map(|_| "base".into()),
            baseline_median: ratio.map(|r| median / r),
            ratio,
        }
    }

    #[test]
    fn ratios_count_where_there_are_any() {
        let before = Report {
            git: "a".into(),
            results: vec![
                result("x", 10.0, Some(0.5)),
                result("gone", 1.0, None),
                result("bare", 10.0, None),
            ],
        };
        let after = Report {
            git: "b".into(),
            results: vec![result("new", 1.0, None), result("x", 90.0, Some(0.4)), result("bare", 11.0, None)],
        };
        let got = Comparison::of(&before, &after);
        let changes: Vec<_> =
            got.changes.iter().map(|c| (c.name.as_str(), c.change.map(|v| (v * 100.0).round()))).collect();
        assert_eq!(changes, [("new", None), ("x", Some(-20.0)), ("bare", Some(10.0)), ("gone", None)]);
        let text = got.table().aligned();
        assert!(text.lines().any(|l| l.starts_with("x ") && l.ends_with("-20.0%")), "{text}");
    }
}
