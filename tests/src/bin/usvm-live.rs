//! Plays recorded traces of the kernel's drm_gpusvm live, on a running usvm.
//!
//! `usvm-live [--policy NAME] [--own-machine] TRACE[.xz]...` ends in
//! `live: N operations, M traces, K unexplained differences`; exit status 1 if K is not 0.

use std::path::Path;
use std::process::ExitCode;

use usvm_tests::live::play::play;
use usvm_tests::live::served::Setup;
use usvm_tests::replay::trace;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

/// Differences shown for each trace.
const SHOWN: usize = 10;

fn main() -> ExitCode {
    let mut setup = Setup { policy: "gpusvm".into(), own_machine: false };
    let mut traces = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--policy" => setup.policy = args.next().unwrap_or_default(),
            "--own-machine" => setup.own_machine = true,
            _ => traces.push(arg),
        }
    }
    let (mut operations, mut differences) = (0, 0);
    for path in &traces {
        let played = trace::read(Path::new(path)).and_then(|trace| play(&trace, &setup));
        let report = match played {
            Ok(report) => report,
            Err(e) => {
                eprintln!("usvm-live: {e}");
                return ExitCode::FAILURE;
            }
        };
        report.differences.iter().take(SHOWN).for_each(|d| println!("{d}"));
        println!("{}: {} ops, {} contents, {} dev, {} res, {:?}, cut {:?}, {} differences", report.name, report.operations, report.contents, report.device_contents, report.residency, report.meant, report.cut, report.differences.len());
        operations += report.operations;
        differences += report.differences.len();
    }
    println!("live: {operations} operations, {} traces, {differences} unexplained differences", traces.len());
    if differences == 0 && operations > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
