//! The cases: one file for each subject. A new one implements [`Case`] and gets a line in [`all`].

mod bare;
mod copy;
mod migrate;
mod space;
mod untouched;
mod zero;

use crate::case::Case;
use usvm::vram::copy::Copier;

/// Every case, baselines first. `copier` is how bytes are copied.
pub fn all(copier: Copier) -> Vec<Box<dyn Case>> {
    let mut cases = bare::all();
    cases.extend(copy::all(copier));
    cases.extend(zero::all(copier));
    cases.extend(migrate::all());
    cases.extend(space::all());
    cases.extend(untouched::all());
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::Outcome;
    use crate::harness::{Plan, measure};

    #[test]
    fn names_are_unique_and_baselines_exist() {
        let cases = all(Copier::detect());
        let names: std::collections::BTreeSet<_> = cases.iter().map(|c| c.name()).collect();
        assert_eq!(names.len(), cases.len());
        for baseline in cases.iter().filter_map(|c| c.baseline()) {
            assert!(names.contains(baseline), "{baseline}");
        }
    }

    #[test]
    fn every_case_can_be_measured() {
        for mut case in all(Copier::detect()) {
            match measure(case.as_mut(), Plan { samples: 2, burst: 2, settle: 1 }).unwrap() {
                Outcome::Measured(m) => assert!(m.median > 0.0 && m.p90 >= m.median, "{m:?}"),
                Outcome::Skipped(why) => eprintln!("skipped {}: {why}", case.name()),
            }
        }
    }
}
