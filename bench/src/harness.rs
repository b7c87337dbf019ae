//! Taking samples.
//!
//! A case and its baseline take turns, a burst of samples each, and which goes first changes every time. Within one
//! turn both meet the same neighbours on the machine, so what counts is their ratio.
//!
//! A burst, and not a single sample, because copies leave debts: memcpy leaves its destination dirty in the caches, and
//! whoever comes next pays for writing it back. Sample by sample, the case would pay every time (measured: memcpy against
//! itself then differs by a tenth, and a non-temporal copy looks a third slower than it is on its own). So the first
//! samples of every turn, as many as the caches need to turn over, are thrown away; they are the warm-up too.

use crate::case::{Case, Measurement, Outcome, Result, Setup};

/// How many samples.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Kept.
    pub samples: u32,
    /// Kept of one turn; at least 1.
    pub burst: u32,
    /// Taken at the begin of each turn and thrown away.
    pub settle: u32,
}

/// Samples of a case and of its baseline.
#[derive(Debug, Default)]
struct Samples {
    case: Vec<f64>,
    baseline: Vec<f64>,
}

/// Measures one case.
pub fn measure(case: &mut dyn Case, plan: Plan) -> Result<Outcome> {
    // A case that takes few samples makes long ones, which settle by themselves.
    let few = Plan { samples: plan.samples.min(case.at_most()), burst: 1, settle: 0 };
    let plan = if case.at_most() == u32::MAX { plan } else { few };
    let failed = |name: &str, e| format!("{name}: {e}");
    let name = case.name();
    if let Setup::Skip(why) = case.setup().map_err(|e| failed(name, e))? {
        return Ok(Outcome::Skipped(why));
    }
    let Samples { case: mut own, mut baseline } = take(case, plan).map_err(|e| failed(name, e))?;
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

fn take(case: &mut dyn Case, plan: Plan) -> Result<Samples> {
    let mut samples = Samples::default();
    let mut left = plan.samples;
    let mut case_first = true;
    while left > 0 {
        let keep = plan.burst.min(left);
        for of_case in [case_first, !case_first] {
            if of_case {
                turn(&mut samples.case, keep, plan.settle, || case.sample())?;
            } else if case.baseline().is_some() {
                turn(&mut samples.baseline, keep, plan.settle, || case.baseline_sample())?;
            }
        }
        case_first = !case_first;
        left -= keep;
    }
    Ok(samples)
}

/// One side's turn.
fn turn(kept: &mut Vec<f64>, keep: u32, settle: u32, mut sample: impl FnMut() -> Result<f64>) -> Result<()> {
    for _ in 0..settle {
        sample()?;
    }
    for _ in 0..keep {
        kept.push(sample()?);
    }
    Ok(())
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

    fn measured(case: &mut Counting, samples: u32, burst: u32, settle: u32) -> Measurement {
        match measure(case, Plan { samples, burst, settle }).unwrap() {
            Outcome::Measured(m) => m,
            Outcome::Skipped(why) => panic!("{why}"),
        }
    }

    #[test]
    fn sides_take_turns_and_the_order_changes() {
        let mut case = Counting::default();
        let m = measured(&mut case, 10, 1, 0);
        assert_eq!(case.asked, "cbbc".repeat(5));
        assert_eq!((m.n, m.median, m.p90), (10, 5.5, 9.0));
        assert_eq!(
            (m.baseline.as_deref(), m.baseline_median, m.ratio),
            (Some("double"), Some(11.0), Some(0.5))
        );
    }

    #[test]
    fn turns_settle_first_and_the_last_may_be_short() {
        let mut case = Counting::default();
        let m = measured(&mut case, 5, 2, 1);
        assert_eq!(case.asked, "cccbbb".to_owned() + "bbbccc" + "ccbb");
        assert_eq!((m.n, m.median), (5, 5.0), "of 2 3, 5 6, 8");
    }

    #[test]
    fn a_baseline_stands_alone() {
        let mut case = Counting { alone: true, ..Default::default() };
        let m = measured(&mut case, 3, 1, 0);
        assert_eq!(case.asked, "ccc");
        assert_eq!((m.median, m.p90, m.baseline, m.ratio), (2.0, 3.0, None, None));
    }

    #[test]
    fn a_skip_takes_no_samples() {
        let mut case = Counting { skip: true, ..Default::default() };
        let outcome = measure(&mut case, Plan { samples: 1, burst: 1, settle: 0 }).unwrap();
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
