//! usvm-bench: measures usvm beside the bare primitives it stands on.
//!
//! # Overview
//! A [`case::Case`] is one thing to measure together with its baseline. The [`harness`] takes their samples alternately
//! in one run, so that whatever else the machine does falls on both; what counts is the ratio. [`baselines`] holds the
//! bare primitives, [`cases`] one file for each subject, [`report`] what is printed and written. [`run`] is apart from that:
//! whole workloads, to compare migration policies with.
#![deny(unsafe_code)]

mod alloc;
mod baselines;
mod case;
mod cases;
mod compare;
mod harness;
mod memory;
mod report;
mod run;

use case::Outcome;
use clap::{Args, Parser, Subcommand};
use report::Report;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use usvm::vram::copy::{Copier, CopyKind};

/// usvm's own memory must not be migratable.
#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

/// Nothing could be measured here.
const SKIPPED: u8 = 77;

/// Measures usvm beside the bare primitives it stands on.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Names what `micro` can measure.
    List(Output),
    /// Measures single operations, each beside its baseline in the same run.
    Micro(Micro),
    /// Runs whole workloads under each migration policy, with device memory for all and for a part of them.
    Run(RunArgs),
    /// Shows a result of `run`: policies side by side.
    Report(ReportArgs),
    /// Compares usvm's allocator with mimalloc, jemalloc and glibc's.
    Alloc(AllocArgs),
    /// One process of `alloc`.
    #[command(hide = true)]
    AllocOne(alloc::One),
    /// Shows how the ratios of two result files differ.
    Compare(Compare),
}

#[derive(Args)]
struct Output {
    /// Also write the result to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Args)]
struct Micro {
    /// Cases to measure; all when none is named.
    names: Vec<String>,
    /// Samples of each case and of its baseline.
    #[arg(long, short = 'n', default_value_t = 320, value_parser = clap::value_parser!(u32).range(1..))]
    samples: u32,
    /// Samples of a case, then of its baseline, in one turn.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    burst: u32,
    /// Samples at the begin of each turn that are thrown away.
    #[arg(long, default_value_t = 16)]
    settle: u32,
    /// How to copy: avx512, avx2, sse2 or portable; the fastest the processor has when not given.
    #[arg(long, value_name = "KIND")]
    copy: Option<CopyKind>,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
struct AllocArgs {
    #[command(flatten)]
    what: alloc::Alloc,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
struct RunArgs {
    #[command(flatten)]
    what: run::Run,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
struct ReportArgs {
    /// What `run --json` wrote.
    results: PathBuf,
    /// By which time: what the profile's device would have taken, or what it took here.
    #[arg(long, value_enum, default_value = "modelled")]
    by: run::report::By,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
struct Compare {
    /// The results to compare with.
    before: PathBuf,
    /// The results to judge.
    after: PathBuf,
    #[command(flatten)]
    output: Output,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::List(output) => list(&output),
        Command::Micro(micro) => run_micro(&micro),
        Command::Run(args) => run_workloads(&args),
        Command::Report(args) => run_report(&args),
        Command::Alloc(args) => run_alloc(&args),
        Command::AllocOne(one) => one.run().map(|()| ExitCode::SUCCESS),
        Command::Compare(compare) => run_compare(&compare),
    };
    result.unwrap_or_else(|error| {
        eprintln!("usvm-bench: {error}");
        ExitCode::FAILURE
    })
}

fn list(output: &Output) -> case::Result<ExitCode> {
    let rows: Vec<_> = cases::all(Copier::detect()).iter().map(|c| report::Listed::of(c.as_ref())).collect();
    show(&report::table_of_names(&rows), output, &rows)?;
    Ok(ExitCode::SUCCESS)
}

fn run_micro(micro: &Micro) -> case::Result<ExitCode> {
    let copier = match micro.copy {
        None => Copier::detect(),
        Some(kind) => Copier::with(kind).ok_or_else(|| format!("this processor has no {kind}"))?,
    };
    let plan = harness::Plan { samples: micro.samples, burst: micro.burst, settle: micro.settle };
    let mut report = Report::new(report::git_revision());
    for mut case in chosen(cases::all(copier), &micro.names)? {
        progress(case.name());
        match harness::measure(case.as_mut(), plan)? {
            Outcome::Measured(result) => report.results.push(result),
            Outcome::Skipped(why) => eprintln!("usvm-bench: {} is skipped: {why}", case.name()),
        }
    }
    progress("");
    show(&report.table(), &micro.output, &report)?;
    Ok(if report.results.is_empty() { ExitCode::from(SKIPPED) } else { ExitCode::SUCCESS })
}

fn run_workloads(args: &RunArgs) -> case::Result<ExitCode> {
    if let Some(table) = args.what.list() {
        show(&table, &Output { json: None }, &())?;
        return Ok(ExitCode::SUCCESS);
    }
    let results = args.what.run(progress, |what| eprintln!("usvm-bench: skipped: {what}"))?;
    show(&results.table(), &args.output, &results)?;
    Ok(if results.results.is_empty() {
        ExitCode::from(SKIPPED)
    } else if results.is_right() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run_report(args: &ReportArgs) -> case::Result<ExitCode> {
    let results = run::report::read(&args.results)?;
    let table = run::report::table(&results, args.by);
    show(&table, &args.output, &results)?;
    Ok(ExitCode::SUCCESS)
}

fn run_alloc(args: &AllocArgs) -> case::Result<ExitCode> {
    let comparison = args.what.run(progress)?;
    show(&comparison.table(), &args.output, &comparison)?;
    Ok(ExitCode::SUCCESS)
}

fn run_compare(compare: &Compare) -> case::Result<ExitCode> {
    let comparison = compare::Comparison::of(&Report::read(&compare.before)?, &Report::read(&compare.after)?);
    show(&comparison.table(), &compare.output, &comparison)?;
    Ok(ExitCode::SUCCESS)
}

/// The cases with these names, in the order of the list; all when none is named.
fn chosen(all: Vec<Box<dyn case::Case>>, names: &[String]) -> case::Result<Vec<Box<dyn case::Case>>> {
    if let Some(unknown) = names.iter().find(|name| all.iter().all(|c| c.name() != name.as_str())) {
        return Err(format!("there is no case `{unknown}`; `usvm-bench list` names them").into());
    }
    Ok(all.into_iter().filter(|c| names.is_empty() || names.iter().any(|name| name == c.name())).collect())
}

/// Tells on a terminal what is being measured; an empty name clears the line.
fn progress(name: &str) {
    let mut err = std::io::stderr();
    if err.is_terminal() {
        // Progress is a courtesy: a terminal that went away is no reason to stop measuring.
        let _ = write!(err, "\r\x1b[K{name}").and_then(|()| err.flush());
    }
}

/// Prints for people on a terminal and for programs elsewhere, and writes the file that was asked for.
fn show(table: &report::Table, output: &Output, value: &impl serde::Serialize) -> case::Result<()> {
    let mut out = std::io::stdout().lock();
    let text = if out.is_terminal() { table.aligned() } else { table.separated() };
    out.write_all(text.as_bytes())?;
    output.json.as_deref().map_or(Ok(()), |path| write_json(path, value))
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> case::Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    std::fs::write(path, text).map_err(|e| format!("cannot write {}: {e}", path.display()).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    /// Held by tests that start runtimes: a process has one at a time.
    pub fn alone() -> MutexGuard<'static, ()> {
        static TURN: Mutex<()> = Mutex::new(());
        TURN.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn names_choose_cases() {
        let all = || cases::all(Copier::detect());
        assert_eq!(chosen(all(), &[]).unwrap().len(), all().len());
        let some = chosen(all(), &["uffd_4k".into(), "memcpy_2m".into()]).unwrap();
        assert_eq!(some.iter().map(|c| c.name()).collect::<Vec<_>>(), ["memcpy_2m", "uffd_4k"]);
        assert!(chosen(all(), &["nonsense".into()]).is_err());
    }
}
