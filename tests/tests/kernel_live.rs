//! The recorded traces of the kernel's drm_gpusvm, done again on a running usvm: real memory, real system calls, kernels on
//! the simulated device. Contents must be equal, residency but for the written differences.

use std::path::PathBuf;
use std::process::{Command, Output};

use usvm_tests::isolated::kernel_faults;
use usvm_tests::live::rules::{MEANT, Rule};
use usvm_tests::replay::kept_traces;

fn live(options: &[&str], traces: &[PathBuf]) -> Output {
    let mut command = Command::new("timeout");
    command.arg("300").arg(env!("CARGO_BIN_EXE_usvm-live")).args(options).args(traces);
    command.output().expect("usvm-live starts")
}

fn text(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{out}{err}")
}

fn kept(name: &str) -> PathBuf {
    let named = |path: &PathBuf| path.file_name().is_some_and(|n| n == format!("{name}.trace.xz").as_str());
    kept_traces().unwrap().into_iter().find(named).expect("a kept trace")
}

#[test]
fn recorded_traces_give_the_same_on_a_running_usvm() {
    if !kernel_faults() {
        return;
    }
    let output = live(&[], &kept_traces().unwrap());
    let text = text(&output);
    let summary: Vec<&str> = text.lines().filter(|line| line.starts_with("live: ")).collect();
    // Not println!: the figures are wanted from a test that passes, too.
    use std::io::Write;
    writeln!(std::io::stdout(), "{}", summary.join("\n")).unwrap();
    assert!(output.status.success(), "{}: {text}", output.status);
    assert!(text.trim_end().ends_with(" 0 unexplained differences"), "{text}");
    let seen = summary.iter().find(|line| line.contains("meant differences")).expect("a line of them");
    // Chance decides about races.
    let unseen: Vec<Rule> = MEANT
        .iter()
        .map(|m| m.rule)
        .filter(|rule| *rule != Rule::Race && !seen.contains(&format!(" {rule:?} ")))
        .collect();
    assert!(unseen.is_empty(), "no kept trace shows these meant differences: {unseen:?}");
}

#[test]
fn contents_are_the_same_under_the_default_policy() {
    if !kernel_faults() {
        return;
    }
    let names = ["gpu-data", "holes", "fork", "inval-remap", "random-full-1", "random-migrate-2"];
    let output = live(&["--policy", "adaptive"], &names.map(kept));
    assert!(output.status.success(), "{}: {}", output.status, text(&output));
}

#[test]
fn a_flipped_byte_is_noticed() {
    let output = live(&["--break-byte", "31"], &[kept("migrate-4k")]);
    let text = text(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("contents of 1 pages from 0x1000000000"), "{text}");
}

#[test]
fn a_range_in_the_wrong_place_is_noticed() {
    let output = live(&["--break-place", "30"], &[kept("migrate-4k")]);
    let text = text(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("op 31 ") && text.contains("usvm has the first on Host (before: Device)"),
        "{text}"
    );
}

/// The other way round: usvm is right, and the trace lies.
#[test]
fn a_trace_that_lies_is_found_out() {
    use std::io::Read;
    let mut good = String::new();
    let packed = std::fs::File::open(kept("migrate-4k")).unwrap();
    lzma_rust2::XzReader::new(packed, true).read_to_string(&mut good).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (from, to) in [
        // A page that the kernel has on the device; a sum; an answer; a mapping.
        ("\np 1000000000 1000200000 d\n", "\np 1000000000 1000200000 p\n"),
        ("ok=1024 segv=0 bus=0 sum=", "ok=1024 segv=0 bus=0 sum=1"),
        ("ok=1024 segv=0 bus=0", "ok=1023 segv=1 bus=0"),
        ("v 1000000000 1000400000 rw-p anon", "v 1000000000 1000400000 r--p anon"),
    ] {
        let lie = good.replacen(from, to, 1);
        assert_ne!(lie, good, "{from}");
        let path = dir.path().join("lie.trace");
        std::fs::write(&path, lie).unwrap();
        let output = live(&[], &[path]);
        assert_eq!(output.status.code(), Some(1), "{from} -> {to}: {}", text(&output));
    }
}
