//! What the tests stand on: the program, a stand-in for the preload library, small C programs.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

/// The program under test.
pub const USVM: &str = env!("CARGO_BIN_EXE_usvm");

/// A folder for this test process.
pub static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());

/// A library that can be preloaded and says so where STANDIN_SPEAKS is set.
pub static STANDIN: LazyLock<PathBuf> = LazyLock::new(|| {
    let source = r#"
        #include <stdlib.h>
        #include <unistd.h>
        __attribute__((constructor)) static void here(void) {
            if (getenv("STANDIN_SPEAKS") && write(2, "standin\n", 8) != 8) _exit(99);
        }"#;
    compile("standin.so", source, &["-shared", "-fPIC"])
});

/// Compiles a C program or library.
pub fn compile(name: &str, source: &str, options: &[&str]) -> PathBuf {
    let (code, built) = (FOLDER.path().join(format!("{name}.c")), FOLDER.path().join(name));
    std::fs::write(&code, source).unwrap();
    let status = Command::new("cc").args(options).arg("-o").arg(&built).arg(&code).status().unwrap();
    assert!(status.success(), "cc {options:?} {name}");
    built
}

/// The program with `words`, the stand-in, and none of the caller's USVM_* variables.
pub fn usvm<S: AsRef<std::ffi::OsStr>>(words: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(USVM);
    command.args(words).stdin(Stdio::null());
    clean(&mut command);
    command
}

/// Gives `command` the stand-in and takes the caller's own settings away.
pub fn clean(command: &mut Command) {
    let own =
        std::env::vars_os().map(|(name, _)| name).filter(|name| name.to_string_lossy().starts_with("USVM_"));
    own.for_each(|name| {
        command.env_remove(name);
    });
    for name in ["LD_PRELOAD", "OPENCL_LAYERS", "NEOReadDebugKeys", "EnableDirectSubmission"] {
        command.env_remove(name);
    }
    command.env("USVM_PRELOAD_LIBRARY", &*STANDIN);
}

/// What a run said and how it ended.
pub struct Said {
    /// Exit status.
    pub code: Option<i32>,
    /// What it printed.
    pub out: String,
    /// What it said about itself.
    pub err: String,
}

/// Runs `command` to its end.
pub fn said(command: &mut Command) -> Said {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Said { code: status.code(), out: text(stdout), err: text(stderr) }
}

/// `program` run by usvm.
pub fn run<S: AsRef<std::ffi::OsStr>>(program: impl IntoIterator<Item = S>) -> Said {
    said(usvm(["run", "--"]).args(program))
}

/// Says why a test does not run here: past the test harness, which hides what a test that passes prints with println.
pub fn skipped(reason: impl std::fmt::Display) {
    use std::io::Write as _;
    writeln!(std::io::stderr(), "skipped: {reason}").expect("stderr can be written to");
}

/// Whether this test runs as root; says so if not.
pub fn is_root() -> bool {
    let root = nix::unistd::Uid::effective().is_root();
    if !root {
        skipped("this needs root");
    }
    root
}

/// A copy of the program at `place`, for everybody to execute.
pub fn copy_to(place: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(place.parent().unwrap()).unwrap();
    std::fs::copy(USVM, place).unwrap();
    std::fs::set_permissions(place, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// A pipe with a name, for everybody to execute.
pub fn make_pipe(place: &Path) {
    use rustix::fs::{CWD, FileType, Mode};
    rustix::fs::mknodat(CWD, place, FileType::Fifo, Mode::from_raw_mode(0o755), 0).unwrap();
}
