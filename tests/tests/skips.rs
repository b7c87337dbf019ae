//! What a test cannot do here must be seen: the harness hides what a test that passes prints, and `tests/run.sh` counts
//! the lines that begin with "skipped:".

use std::path::Path;
use std::process::Command;

use usvm_tests::isolated::skipped;

#[test]
#[ignore = "a part of the next test"]
fn passes_and_skips() {
    skipped("as it must be seen");
}

#[test]
fn a_skip_in_a_test_that_passes_is_seen() {
    let mut command = Command::new(std::env::current_exe().expect("a test has a path"));
    let output = command.args(["passes_and_skips", "--exact", "--ignored"]).output().expect("it runs");
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stderr), "skipped: as it must be seen\n");
}

#[test]
fn no_test_skips_where_nobody_sees_it() {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("..")];
    let (mut files, mut hidden) = (0, Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder of the repository").flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                files += 1;
                let text: String =
                    std::fs::read_to_string(&path).expect("a source").split_whitespace().collect();
                let told = ["println!(", "eprintln!("].map(|call| format!("{call}\"skip{}", "ped:"));
                hidden.extend(told.iter().any(|told| text.contains(told)).then_some(path));
            }
        }
    }
    assert!(files > 100, "only {files} sources were found");
    assert!(hidden.is_empty(), "use `skipped` there: {hidden:?}");
}
