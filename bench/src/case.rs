//! What can be measured.

use serde::{Deserialize, Serialize};

/// What a case may fail with: told to the user and the run ends.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Whether a case can be measured here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Setup {
    /// It can.
    Ready,
    /// It cannot, for this reason; not an error.
    Skip(String),
}

/// One thing to measure, with the bare primitive it is measured against. Making a case costs nothing; memory and
/// threads come with `setup` and go when the case is dropped.
pub trait Case {
    /// Its name, unique and stable.
    fn name(&self) -> &'static str;

    /// What it measures, in one line.
    fn about(&self) -> &'static str;

    /// The unit of its samples. Less is better.
    fn unit(&self) -> &'static str {
        "us"
    }

    /// Name of the baseline, `None` for a case that is a baseline itself.
    fn baseline(&self) -> Option<&'static str>;

    /// The most samples that make sense: few for a case whose single sample is long.
    fn at_most(&self) -> u32 {
        u32::MAX
    }

    /// Gets everything ready and warm.
    fn setup(&mut self) -> Result<Setup>;

    /// Does it once and gives the time.
    fn sample(&mut self) -> Result<f64>;

    /// Does the baseline once and gives the time. Called only when there is a baseline.
    fn baseline_sample(&mut self) -> Result<f64>;
}

/// What came of a case.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Numbers.
    Measured(Measurement),
    /// It cannot be measured here, for this reason.
    Skipped(String),
}

/// The numbers of one case, as they stand in the JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// Of the case.
    pub name: String,
    /// Of median, p90 and baseline_median.
    pub unit: String,
    /// Half of the samples are at most this.
    pub median: f64,
    /// Nine tenths of the samples are at most this.
    pub p90: f64,
    /// Samples.
    pub n: u32,
    /// Name of the baseline.
    pub baseline: Option<String>,
    /// Median of the baseline's samples in the same run.
    pub baseline_median: Option<f64>,
    /// median / baseline_median.
    pub ratio: Option<f64>,
}
