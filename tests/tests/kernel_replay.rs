//! The recorded traces of the kernel's drm_gpusvm, replayed through usvm's space: the kernel-exact mode must give the
//! same at every operation, the default mode the same but for the written differences.

use std::io::Write;
use usvm_tests::replay::{Totals, differences_file, kept_traces, replay, tables, trace};

#[test]
fn recorded_traces_give_the_same() {
    let mut totals = Totals::default();
    let mut shown = Vec::new();
    for path in kept_traces().unwrap() {
        let report = replay(&trace::read(&path).unwrap());
        totals.add(&report);
        shown.extend(report.differences.into_iter().take(5));
    }
    // Not println!: the figure is wanted from a test that passes, too.
    writeln!(std::io::stdout(), "kernel_replay: {}", totals.line()).unwrap();
    assert!(shown.is_empty(), "{}\n{}", shown.join("\n"), totals.line());
    assert!(totals.traces >= 20 && totals.operations >= 40_000, "traces are missing: {}", totals.line());
    let rules = usvm_tests::replay::meant::MEANT.iter();
    let unseen: Vec<_> = rules
        .filter(|m| totals.meant.get(&m.rule).is_none_or(|seen| seen.answers == 0))
        .map(|m| m.rule)
        .collect();
    assert!(unseen.is_empty(), "no trace shows these meant differences: {unseen:?}");
    let written = std::fs::read_to_string(differences_file()).unwrap();
    assert!(
        written == totals.differences_md(),
        "DIFFERENCES.md is stale: cargo run -p usvm-tests --bin usvm-replay -- --write-differences"
    );
}

#[test]
fn the_tables_of_meant_differences_are_those_that_the_comparers_use() {
    let written = std::fs::read_to_string(tables::file()).unwrap();
    assert!(
        written == tables::renewed(&written).unwrap(),
        "ARCHITECTURE.md is stale: cargo run -p usvm-tests --bin usvm-replay -- --write-differences"
    );
}
