//! What live runs showed, and the line that everything ends in.

use std::collections::BTreeMap;
use std::fmt;

use super::rules::Rule;

/// What playing one trace showed.
#[derive(Debug, Default)]
pub struct Report {
    /// The trace.
    pub name: String,
    /// Operations done.
    pub operations: usize,
    /// Differences that nothing explains.
    pub differences: Vec<String>,
    /// How often each rule explained one: pages for residency, operations for answers.
    pub meant: BTreeMap<Rule, usize>,
    /// Pages whose contents were compared.
    pub contents: usize,
    /// Of those, while they were on the device.
    pub device_contents: usize,
    /// Pages whose residency was compared: at each operation at which either side moved one.
    pub residency: usize,
    /// Why the trace was not played to its end.
    pub cut: Option<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, operations, contents, device_contents, residency, .. } = self;
        write!(
            f,
            "{name}: {operations} operations, {residency} moves and {contents} pages compared \
             ({device_contents} on the device)"
        )?;
        match &self.cut {
            Some(why) => write!(f, ", cut at {why}"),
            None => Ok(()),
        }
    }
}

/// Sums over traces. Displays as lines, the last of which everything ends in.
#[derive(Debug, Default)]
pub struct Totals {
    /// Traces.
    pub traces: usize,
    /// Of those, played to the end.
    pub whole: usize,
    /// Operations.
    pub operations: usize,
    /// Unexplained differences.
    pub differences: usize,
    /// How often each rule explained one.
    pub meant: BTreeMap<Rule, usize>,
    /// Pages whose contents were compared, and of those on the device.
    pub contents: [usize; 2],
    /// Pages whose residency was compared.
    pub residency: usize,
}

impl Totals {
    /// Adds one trace.
    pub fn add(&mut self, report: &Report) {
        self.traces += 1;
        self.whole += usize::from(report.cut.is_none());
        self.operations += report.operations;
        self.differences += report.differences.len();
        self.residency += report.residency;
        self.contents[0] += report.contents;
        self.contents[1] += report.device_contents;
        for (rule, times) in &report.meant {
            *self.meant.entry(*rule).or_default() += times;
        }
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { traces, whole, operations, differences, residency, contents: [pages, device], .. } = self;
        writeln!(
            f,
            "live: {residency} moves of pages, contents of {pages} pages compared ({device} on the device)"
        )?;
        let meant: Vec<String> = self.meant.iter().map(|(rule, times)| format!("{rule:?} {times}")).collect();
        writeln!(f, "live: meant differences: {}", meant.join(", "))?;
        writeln!(f, "live: {whole} traces to their end")?;
        writeln!(f, "live: {operations} operations, {traces} traces, {differences} unexplained differences")
    }
}
