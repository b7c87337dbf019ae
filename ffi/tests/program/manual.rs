//! Help, man pages, completions.

use std::process::{Command, Stdio};

use crate::stand::{FOLDER, USVM, said, skipped, usvm};

const COMMANDS: [&str; 7] = ["run", "doctor", "devices", "top", "stats", "completions", "man"];

#[test]
fn help_names_every_command_and_goes_to_stdout() {
    let help = said(&mut usvm(["--help"]));
    assert_eq!((help.code, help.err.as_str()), (Some(0), ""));
    assert!(COMMANDS.iter().all(|name| help.out.contains(name)));
    for name in COMMANDS {
        let help = said(&mut usvm([name, "--help"]));
        assert_eq!((help.code, help.err.as_str()), (Some(0), ""));
        assert!(help.out.contains("Usage: usvm"));
    }
    assert_eq!(said(&mut usvm(["--version"])).out, format!("usvm {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn completions_are_scripts_of_their_shells() {
    for shell in ["bash", "zsh", "fish"] {
        let script = said(&mut usvm(["completions", shell])).out;
        assert!(COMMANDS.iter().all(|name| script.contains(name)), "{shell}");
        let file = FOLDER.path().join(format!("completions.{shell}"));
        std::fs::write(&file, script).unwrap();
        match Command::new(shell).arg("-n").arg(&file).status() {
            Ok(status) => assert!(status.success(), "{shell}"),
            Err(_) => skipped(format!("{shell} is not here to read its completions")),
        }
    }
    assert_eq!(said(&mut usvm(["completions", "tcl"])).code, Some(2));
}

#[test]
fn man_pages_are_written() {
    let folder = FOLDER.path().join("man");
    assert_eq!(said(usvm(["man"]).arg(&folder)).code, Some(0));
    let mut names: Vec<_> =
        std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let mut want: Vec<_> = COMMANDS.iter().map(|name| format!("usvm-{name}.1")).collect();
    want.push("usvm.1".into());
    want.sort();
    assert_eq!(names, want);
    for name in &names {
        let page = std::fs::read_to_string(folder.join(name)).unwrap();
        assert!(page.contains(".TH") && page.contains(".SH SYNOPSIS"), "{name}");
    }
    assert_eq!(said(&mut usvm(["man"])).out, std::fs::read_to_string(folder.join("usvm.1")).unwrap());
    let failed = said(&mut usvm(["man", "/proc/no/such"]));
    assert_eq!(failed.code, Some(1));
    assert!(failed.err.starts_with("usvm: /proc/no/such: "), "{}", failed.err);
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let line = format!("{USVM} completions bash | head -n 1; {USVM} devices >/dev/full");
    let ended = said(Command::new("sh").args(["-c", &line]).stdin(Stdio::null()));
    assert!(ended.err.starts_with("usvm: cannot write to stdout"), "{}", ended.err);
    assert_eq!((ended.err.lines().count(), ended.code), (1, Some(1)));
}

#[test]
fn output_that_is_lost_is_a_failure() {
    for words in ["--help", "--version", "run --help", "devices", "man", "run --dry-run -- true"] {
        for to in ["/dev/full", "&-"] {
            let line = format!("{USVM} {words} >{to}");
            let mut shell = Command::new("sh");
            crate::stand::clean(shell.args(["-c", &line]).stdin(Stdio::null()));
            let ended = said(&mut shell);
            assert!(ended.err.starts_with("usvm: cannot write to stdout"), "{line}: {}", ended.err);
            assert_eq!((ended.err.lines().count(), ended.code), (1, Some(1)), "{line}");
        }
    }
}
