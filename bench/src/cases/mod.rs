//! The cases: one file for each subject. A new one implements [`Case`] and gets a line in [`all`].

mod bare;
mod copy;
mod limit;
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
    cases.extend(limit::all(copier));
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

    /// Whoever reads the JSON finds these.
    #[test]
    fn the_promised_names_exist() {
        let cases = all(Copier::detect());
        for (name, baseline) in [
            ("to_device_2m", Some("memcpy_2m")),
            ("cpu_fault_return_2m", Some("memcpy_2m")),
            ("clean_return_2m", Some("memcpy_2m")),
            ("delta_to_device_2m_8dirty", Some("memcpy_2m")),
            ("fault_4k", Some("uffd_4k")),
            ("fault_storm", Some("fault_storm_one_thread")),
            ("find_or_insert_1m_ranges", None),
        ] {
            let case = cases.iter().find(|c| c.name() == name);
            assert_eq!(case.map(|c| c.baseline()), Some(baseline), "{name}");
        }
        assert!(cases.iter().any(|c| c.name() == "untouched"));
    }

    #[test]
    fn every_case_can_be_measured() {
        let _alone = crate::tests::alone();
        for mut case in all(Copier::detect()) {
            match measure(case.as_mut(), Plan { samples: 2, burst: 2, settle: 1 }).unwrap() {
                Outcome::Measured(m) => assert!(m.median > 0.0 && m.p90 >= m.median, "{m:?}"),
                Outcome::Skipped(why) => eprintln!("skipped {}: {why}", case.name()),
            }
        }
    }
}
