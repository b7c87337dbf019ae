//! `usvm-bench report`: policies side by side.

use std::path::Path;

use super::{Measured, Results};
use crate::case::Result;
use crate::report::{Table, number};

/// The policy that others are compared with: the kernel's.
const REFERENCE: &str = "gpusvm";

/// Which of the two times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum By {
    /// What the profile's device would have taken: modelled, not measured.
    Modelled,
    /// What it took here: measured.
    Wall,
}

impl By {
    fn of(self, measured: &Measured) -> f64 {
        match self {
            By::Modelled => measured.modelled_ms,
            By::Wall => measured.wall_ms,
        }
    }

    fn unit(self) -> &'static str {
        match self {
            By::Modelled => "modelled_ms",
            By::Wall => "wall_ms",
        }
    }
}

/// Reads what `run --json` wrote.
pub fn read(path: &Path) -> Result<Results> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    serde_json::from_str(&text)
        .map_err(|e| format!("{} is not a result of `usvm-bench run`: {e}", path.display()).into())
}

/// A line for each workload and oversubscription, a column for each policy, which of them is best, and in the last line the
/// geometric means relative to the kernel's policy, if that is there.
pub fn table(results: &Results, by: By) -> Table {
    let mut policies: Vec<&str> = Vec::new();
    let mut lines: Vec<(&str, u32)> = Vec::new();
    for r in &results.results {
        if !policies.contains(&r.policy.as_str()) {
            policies.push(&r.policy);
        }
        if !lines.contains(&(&r.workload, r.oversubscription)) {
            lines.push((&r.workload, r.oversubscription));
        }
    }
    let find = |line: &(&str, u32), policy: &str| {
        let is = |r: &&Measured| (r.workload.as_str(), r.oversubscription) == *line && r.policy == policy;
        results.results.iter().find(is)
    };
    let head: Vec<String> = ["workload", "oversubscription"]
        .into_iter()
        .map(str::to_owned)
        .chain(policies.iter().map(|policy| format!("{policy} {}", by.unit())))
        .chain(["best".to_owned()])
        .collect();
    let mut table = Table::new(&head.iter().map(String::as_str).collect::<Vec<_>>());
    for line in &lines {
        let found: Vec<_> = policies.iter().map(|policy| find(line, policy)).collect();
        // What is wrong wins nothing.
        let right = found.iter().flatten().filter(|r| r.verified);
        let best = right.min_by(|a, b| by.of(a).total_cmp(&by.of(b)));
        let cell = |r: &Option<&Measured>| match r {
            Some(r) if r.verified => number(by.of(r)),
            Some(_) => "WRONG".into(),
            None => "-".into(),
        };
        let names = [line.0.to_owned(), format!("{}%", line.1)];
        let best = best.map_or_else(|| "-".into(), |best| best.policy.clone());
        table.row(names.into_iter().chain(found.iter().map(cell)).chain([best]));
    }
    let mean = |policy: &&str| {
        let pairs = lines.iter().filter_map(|line| Some((find(line, policy)?, find(line, REFERENCE)?)));
        let logs: Vec<f64> = pairs.map(|(r, reference)| (by.of(r) / by.of(reference)).ln()).collect();
        match logs.len() {
            0 => "-".into(),
            n => format!("{:.3}", (logs.iter().sum::<f64>() / n as f64).exp()),
        }
    };
    let names = ["geometric mean".to_owned(), format!("/ {REFERENCE}")];
    table.row(names.into_iter().chain(policies.iter().map(mean)).chain(["-".to_owned()]));
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(workload: &str, policy: &str, modelled_ms: f64, verified: bool) -> Measured {
        Measured {
            workload: workload.into(),
            policy: policy.into(),
            oversubscription: 125,
            modelled_ms,
            wall_ms: 10.0 - modelled_ms,
            bytes_to_device: 1,
            bytes_to_host: 1,
            cpu_faults: 1,
            gpu_faults: 1,
            evictions: 0,
            verified,
            footprint_bytes: 1,
            vram_bytes: 1,
            n: 1,
        }
    }

    #[test]
    fn policies_stand_side_by_side() {
        let results = vec![
            measured("a", "gpusvm", 4.0, true),
            measured("a", "remote", 2.0, true),
            measured("b", "gpusvm", 4.0, true),
            measured("b", "remote", 1.0, false),
            measured("c", "remote", 1.0, true),
        ];
        let results = Results { git: "x".into(), profile: "arc-b580".into(), results };
        let text = table(&results, By::Modelled).separated();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "workload\toversubscription\tgpusvm modelled_ms\tremote modelled_ms\tbest");
        assert_eq!(lines[1], "a\t125%\t4.00\t2.00\tremote");
        assert_eq!(lines[2], "b\t125%\t4.00\tWRONG\tgpusvm");
        assert_eq!(lines[3], "c\t125%\t-\t1.00\tremote");
        assert_eq!(lines[4], "geometric mean\t/ gpusvm\t1.000\t0.354\t-");
        assert!(table(&results, By::Wall).separated().contains("a\t125%\t6.00\t8.00\tgpusvm"));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "{}").unwrap();
        assert!(read(file.path()).unwrap_err().to_string().contains("usvm-bench run"));
    }
}
