//! Replays recorded traces of the kernel's drm_gpusvm through usvm's space and says where they differ.
//!
//! `usvm-replay TRACE[.xz]...` ends in `N operations, M traces, K unexplained differences`; exit status 1 if K is not 0.
//! `usvm-replay --write-differences` writes `tests/kernel-ref/DIFFERENCES.md` from the kept traces and the
//! tables of ARCHITECTURE.md.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use usvm_tests::replay::{Totals, differences_file, kept_traces, replay, tables, trace};

/// Differences shown for each trace.
const SHOWN: usize = 10;

fn main() -> ExitCode {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let write = args.first().is_some_and(|a| a == Path::new("--write-differences"));
    let paths = if write { kept_traces() } else { Ok(args) };
    let totals = match paths.and_then(|paths| run(&paths)) {
        Ok(totals) => totals,
        Err(e) => {
            eprintln!("usvm-replay: {e}");
            return ExitCode::FAILURE;
        }
    };
    if write && let Err(e) = write_differences(&totals) {
        eprintln!("usvm-replay: {e}");
        return ExitCode::FAILURE;
    }
    println!("{} invalidations", totals.invalidations);
    println!("{}", totals.line());
    if totals.differences == 0 && totals.operations > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(paths: &[PathBuf]) -> Result<Totals, String> {
    let mut totals = Totals::default();
    for path in paths {
        let report = replay(&trace::read(path)?);
        for difference in report.differences.iter().take(SHOWN) {
            println!("{difference}");
        }
        if report.differences.len() > SHOWN {
            println!("{}: {} more", report.name, report.differences.len() - SHOWN);
        }
        totals.add(&report);
    }
    Ok(totals)
}

fn write_differences(totals: &Totals) -> Result<(), String> {
    let put = |path: &Path, text: String| {
        std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
    };
    put(&differences_file(), totals.differences_md())?;
    let document = std::fs::read_to_string(tables::file()).map_err(|e| format!("ARCHITECTURE.md: {e}"))?;
    put(&tables::file(), tables::renewed(&document)?)
}
