//! What is printed and written.

use crate::case::{Case, Measurement, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::Command;

/// The results of `micro`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The revision that was measured.
    pub git: String,
    /// One for each case.
    pub results: Vec<Measurement>,
}

impl Report {
    /// Without results yet.
    pub fn new(git: String) -> Self {
        Self { git, results: Vec::new() }
    }

    /// Reads what `micro --json` wrote.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        let report = serde_json::from_str(&text)
            .map_err(|e| format!("{} is not a result of `usvm-bench micro`: {e}", path.display()))?;
        Ok(report)
    }

    /// For people.
    pub fn table(&self) -> Table {
        let head = ["name", "unit", "median", "p90", "n", "baseline", "baseline_median", "ratio"];
        let mut table = Table::new(&head);
        for r in &self.results {
            table.row([
                r.name.clone(),
                r.unit.clone(),
                number(r.median),
                number(r.p90),
                r.n.to_string(),
                r.baseline.clone().unwrap_or_else(|| "-".into()),
                r.baseline_median.map_or_else(|| "-".into(), number),
                r.ratio.map_or_else(|| "-".into(), |ratio| format!("{ratio:.3}")),
            ]);
        }
        table
    }
}

/// One line of `list`.
#[derive(Debug, Clone, Serialize)]
pub struct Listed {
    name: &'static str,
    unit: &'static str,
    baseline: Option<&'static str>,
    about: &'static str,
}

impl Listed {
    /// What the list says of a case.
    pub fn of(case: &dyn Case) -> Self {
        Self { name: case.name(), unit: case.unit(), baseline: case.baseline(), about: case.about() }
    }
}

/// The list for people.
pub fn table_of_names(rows: &[Listed]) -> Table {
    let mut table = Table::new(&["name", "unit", "baseline", "about"]);
    for row in rows {
        table.row([row.name, row.unit, row.baseline.unwrap_or("-"), row.about].map(str::to_owned));
    }
    table
}

/// The revision of the working directory, `unknown` where there is none.
pub fn git_revision() -> String {
    let answer = Command::new("git").args(["rev-parse", "HEAD"]).output();
    let revision =
        answer.ok().filter(|out| out.status.success()).and_then(|out| String::from_utf8(out.stdout).ok());
    revision.map_or_else(|| "unknown".into(), |text| text.trim().to_owned())
}

/// Three or four significant figures.
pub fn number(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Rows of cells under a head.
#[derive(Debug, Clone, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With this head.
    pub fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|&cell| cell.to_owned()).collect()] }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// For people: columns as wide as their widest cell, numbers to the right.
    pub fn aligned(&self) -> String {
        let columns = self.rows[0].len();
        let width = |column: usize| self.rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let numeric = |column: usize| self.rows[1..].iter().all(|row| is_number(&row[column]));
        let right: Vec<bool> = (0..columns).map(numeric).collect();
        let cell = |(column, text): (usize, &String)| {
            let width = widths[column];
            if right[column] { format!("{text:>width$}") } else { format!("{text:<width$}") }
        };
        let line = |row: &Vec<String>| row.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ");
        self.rows.iter().map(|row| line(row).trim_end().to_owned() + "\n").collect()
    }

    /// For programs: cells separated by tabs.
    pub fn separated(&self) -> String {
        self.rows.iter().map(|row| row.join("\t") + "\n").collect()
    }
}

fn is_number(text: &str) -> bool {
    text == "-" || text.trim_end_matches('%').parse::<f64>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let result = Measurement {
            name: "copy".into(),
            unit: "us".into(),
            median: 80.0,
            p90: 91.5,
            n: 300,
            baseline: Some("memcpy_2m".into()),
            baseline_median: Some(120.0),
            ratio: Some(2.0 / 3.0),
        };
        let alone = Measurement {
            name: "alone".into(),
            baseline: None,
            baseline_median: None,
            ratio: None,
            ..result.clone()
        };
        Report { git: "abc".into(), results: vec![result, alone] }
    }

    #[test]
    fn the_json_has_exactly_the_promised_names() {
        let json = serde_json::to_value(report()).unwrap();
        let keys = |value: &serde_json::Value| {
            let mut keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
            keys.sort();
            keys
        };
        assert_eq!(keys(&json), ["git", "results"]);
        let mut promised = ["name", "unit", "median", "p90", "n", "baseline", "baseline_median", "ratio"];
        promised.sort_unstable();
        for result in json["results"].as_array().unwrap() {
            assert_eq!(keys(result), promised);
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        crate::write_json(file.path(), &report()).unwrap();
        assert_eq!(Report::read(file.path()).unwrap(), report());
        std::fs::write(file.path(), "{}").unwrap();
        assert!(Report::read(file.path()).unwrap_err().to_string().contains("usvm-bench micro"));
    }

    #[test]
    fn tables_for_people_and_for_programs() {
        let table = report().table();
        let lines: Vec<_> = table.aligned().lines().map(str::to_owned).collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].starts_with("copy ") && lines[1].ends_with("0.667"), "{}", lines[1]);
        assert!(lines.iter().all(|l| l.len() == lines[0].len()), "columns line up");
        assert_eq!(table.separated().lines().nth(1).unwrap().split('\t').count(), 8);
    }
}
