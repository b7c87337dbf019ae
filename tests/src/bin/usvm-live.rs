//! Plays recorded traces of the kernel's drm_gpusvm live, on a running usvm.
//!
//! `usvm-live [OPTION]... TRACE[.xz]...` ends in `live: N operations, M traces, K unexplained differences`; exit status 1
//! if K is not 0.
//!
//! `usvm-live bench OUT.json [COPY [SPIN_US]]` measures instead, with these options of usvm's; `auto` is the fastest copy.
//!
//! | option | |
//! |---|---|
//! | `--policy NAME` | another policy than `gpusvm`: contents are compared, residency is not |
//! | `--own-machine` | settings of the system may be changed: it is a virtual machine for this |
//! | `--ops N` | the first N operations of each trace |
//! | `--break-byte N`, `--break-place N` | breaks usvm after operation N, to see it noticed |

use std::path::Path;
use std::process::ExitCode;

use usvm_tests::live::bench;
use usvm_tests::live::play::play;
use usvm_tests::live::report::Totals;
use usvm_tests::live::served::{Sabotage, Setup};
use usvm_tests::replay::trace;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

/// Differences shown for each trace.
const SHOWN: usize = 10;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    if args.next().is_some_and(|arg| arg == "bench") {
        return measure(&args.collect::<Vec<_>>());
    }
    let (setup, traces) = match arguments(std::env::args().skip(1)) {
        Ok(read) => read,
        Err(e) => {
            eprintln!("usvm-live: {e}");
            return ExitCode::from(2);
        }
    };
    if setup.own_machine {
        // Each of the two sides maps up to 16 of them.
        let _ = std::fs::write("/proc/sys/vm/nr_hugepages", "48");
    }
    let begin = std::time::Instant::now();
    let mut totals = Totals::default();
    for path in &traces {
        let played = trace::read(Path::new(path)).and_then(|trace| play(&trace, &setup));
        match played {
            Ok(report) => {
                report.differences.iter().take(SHOWN).for_each(|d| println!("{d}"));
                println!("{report}");
                totals.add(&report);
            }
            Err(e) => {
                eprintln!("usvm-live: {path}: {e}");
                return ExitCode::FAILURE;
            }
        }
    }
    println!("live: {:.0} operations a second", totals.operations as f64 / begin.elapsed().as_secs_f64());
    print!("{totals}");
    if totals.differences == 0 && totals.operations > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn measure(args: &[String]) -> ExitCode {
    let word = |i: usize| args.get(i).map(String::as_str);
    let spin_us = word(2).and_then(|text| text.parse().ok());
    let written = word(0).ok_or_else(|| "bench needs a file".to_owned()).and_then(|out| {
        let json = bench::run(word(1).unwrap_or("auto"), spin_us)?;
        std::fs::write(out, json).map_err(|e| format!("{out}: {e}"))
    });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("usvm-live: {e}");
            ExitCode::FAILURE
        }
    }
}

fn arguments(mut args: impl Iterator<Item = String>) -> Result<(Setup, Vec<String>), String> {
    let mut setup = Setup::default();
    let mut traces = Vec::new();
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        let number = |text: String| text.parse().map_err(|_| format!("{text} is no number"));
        match arg.as_str() {
            "--policy" => setup.policy = value()?,
            "--own-machine" => setup.own_machine = true,
            "--ops" => setup.operations = number(value()?)?,
            "--break-byte" => setup.sabotage = Some((number(value()?)?, Sabotage::Byte)),
            "--break-place" => setup.sabotage = Some((number(value()?)?, Sabotage::Place)),
            _ => traces.push(arg),
        }
    }
    Ok((setup, traces))
}
