//! Taking samples.
//!
//! A case and its baseline are sampled alternately, and which goes first changes every time: neither always finds the
//! caches and the memory bus as the other left them.

use crate::case::{Case, Measurement, Outcome, Result, Setup};

/// How many samples.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Taken first and thrown away.
    pub warm_up: u32,
    /// Kept.
    pub samples: u32,
}

/// Samples of a case and of its baseline.
#[derive(Debug, Default)]
struct Samples {
    case: Vec<f64>,
    baseline: Vec<f64>,
}

/// Measures one case.
pub fn measure(case: &mut dyn Case, plan: Plan) -> Result<Outcome> {
    let failed = |name: &str, e| format!("{name}: {e}");
    let name = case.name();
    if let Setup::Skip(why) = case.setup().map_err(|e| failed(name, e))? {
        return Ok(Outcome::Skipped(why));
    }
    take(case, plan.warm_up).map_err(|e| failed(name, e))?;
    let Samples { case: mut own, mut baseline } = take(case, plan.samples).map_err(|e| failed(name, e))?;
    own.sort_by(f64::total_cmp);
    baseline.sort_by(f64::total_cmp);
    let median = median(&own);
    let baseline_median = case.baseline().map(|_| self::median(&baseline));
    Ok(Outcome::Measured(Measurement {
        name: name.into(),
        unit: case.unit().into(),
        median,
        p90: percentile(&own, 90),
        n: plan.samples,
        baseline: case.baseline().map(Into::into),
        baseline_median,
        ratio: baseline_median.map(|b| median / b),
    }))
}

fn take(case: &mut dyn Case, count: u32) -> Result<Samples> {
    let mut samples = Samples::default();
    let with_baseline = case.baseline().is_some();
    for round in 0..count {
        let first = round % 2 == 0;
        if first {
            samples.case.push(case.sample()?);
        }
        if with_baseline {
            samples.baseline.push(case.baseline_sample()?);
        }
        if !first {
            samples.case.push(case.sample()?);
        }
    }
    Ok(samples)
}

/// The middle of sorted samples, or the mean of the two middle ones.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// The nearest-rank percentile of sorted samples.
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    sorted[(sorted.len() * percent).div_ceil(100).max(1) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers 1, 2, 3, …; its baseline twice that; writes down who was asked.
    #[derive(Default)]
    struct Counting {
        asked: String,
        own: f64,
        base: f64,
        skip: bool,
        alone: bool,
    }

    impl Case for Counting {
        fn name(&self) -> &'static str {
            "counting"
        }

        fn about(&self) -> &'static str {
            "counts"
        }

        fn baseline(&self) -> Option<&'static str> {
            (!self.alone).then_some("double")
        }

        fn setup(&mut self) -> Result<Setup> {
            Ok(if self.skip { Setup::Skip("not here".into()) } else { Setup::Ready })
        }

        fn sample(&mut self) -> Result<f64> {
            self.asked.push('c');
            self.own += 1.0;
            Ok(self.own)
        }

        fn baseline_sample(&mut self) -> Result<f64> {
            self.asked.push('b');
            self.base += 2.0;
            Ok(self.base)
        }
    }

    fn measured(case: &mut Counting, warm_up: u32, samples: u32) -> Measurement {
        match measure(case, Plan { warm_up, samples }).unwrap() {
            Outcome::Measured(m) => m,
            Outcome::Skipped(why) => panic!("{why}"),
        }
    }

    #[test]
    fn samples_alternate_and_the_order_changes() {
        let mut case = Counting::default();
        let m = measured(&mut case, 1, 10);
        assert_eq!(case.asked, "cb".to_owned() + &"cbbc".repeat(5));
        assert_eq!((m.n, m.median, m.p90), (10, 6.5, 10.0), "the warm-up is not counted");
        assert_eq!(
            (m.baseline.as_deref(), m.baseline_median, m.ratio),
            (Some("double"), Some(13.0), Some(0.5))
        );
    }

    #[test]
    fn a_baseline_stands_alone() {
        let mut case = Counting { alone: true, ..Default::default() };
        let m = measured(&mut case, 0, 3);
        assert_eq!(case.asked, "ccc");
        assert_eq!((m.median, m.p90, m.baseline, m.ratio), (2.0, 3.0, None, None));
    }

    #[test]
    fn a_skip_takes_no_samples() {
        let mut case = Counting { skip: true, ..Default::default() };
        let outcome = measure(&mut case, Plan { warm_up: 1, samples: 1 }).unwrap();
        assert_eq!(outcome, Outcome::Skipped("not here".into()));
        assert!(case.asked.is_empty());
    }

    #[test]
    fn percentiles() {
        let sorted: Vec<f64> = (1..=20).map(f64::from).collect();
        assert_eq!(
            (percentile(&sorted, 90), percentile(&sorted, 100), percentile(&sorted, 1)),
            (18.0, 20.0, 1.0)
        );
        assert_eq!(median(&[1.0, 5.0, 9.0]), 5.0);
    }
}
