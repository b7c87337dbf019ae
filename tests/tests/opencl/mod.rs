//! Runs OpenCL programs with and without usvm: what their tests share.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{LazyLock, OnceLock};
use std::time::{Duration, Instant};

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository")
}

/// The preload library, which is the layer: the one named by `USVM_PRELOAD`, or the one built like this test.
pub fn library() -> &'static Path {
    static LIBRARY: LazyLock<PathBuf> = LazyLock::new(|| {
        if let Some(named) = std::env::var_os("USVM_PRELOAD") {
            return named.into();
        }
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["build", "--quiet", "-p", "usvm-preload"]).current_dir(root());
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        assert!(cargo.status().expect("cargo runs").success(), "the preload library did not build");
        let test = std::env::current_exe().expect("a test has a path");
        let folder = test.parent().and_then(Path::parent).expect("tests lie in target/PROFILE/deps");
        folder.join("libusvm_preload.so")
    });
    &LIBRARY
}

/// Where programs of these tests are put.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    FOLDER.get_or_init(|| tempfile::tempdir().expect("a folder")).path()
}

/// Compiles `source` (a path in the repository) for the system's loader.
pub fn compile(source: &str) -> PathBuf {
    compile_with(source, &["-lOpenCL", "-ldl", "-lpthread"])
}

/// Compiles `source` with further arguments for the compiler.
pub fn compile_with(source: &str, arguments: &[&str]) -> PathBuf {
    let source = root().join(source);
    let name = source.file_stem().expect("a file").to_string_lossy().into_owned();
    let mine = std::thread::current().id();
    let program = folder().join(format!("{name}-{mine:?}").replace(['(', ')'], ""));
    let compiled = Command::new("cc")
        .args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-o"])
        .arg(&program)
        .arg(&source)
        .args(arguments)
        .status()
        .expect("a C compiler");
    assert!(compiled.success(), "{} does not compile", source.display());
    program
}

/// How usvm comes into a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Not at all.
    Off,
    /// By the loader.
    Layer,
    /// By the dynamic linker.
    Preload,
    /// By both, as `usvm run` does.
    Both,
}

/// All ways with usvm.
pub const WAYS: [Way; 3] = [Way::Layer, Way::Preload, Way::Both];

/// `program` with usvm brought in by `way`, and statistics.
pub fn command(program: impl AsRef<std::ffi::OsStr>, way: Way) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("USVM_")) {
        command.env_remove(name);
    }
    command.env_remove("OPENCL_LAYERS").env_remove("LD_PRELOAD");
    if matches!(way, Way::Layer | Way::Both) {
        command.env("OPENCL_LAYERS", library());
    }
    if matches!(way, Way::Preload | Way::Both) {
        command.env("LD_PRELOAD", library());
    }
    command.env("USVM_SHOW_STATS", "1");
    command
}

/// What a program said and how it ended.
#[derive(Debug)]
pub struct Ran {
    /// Its exit status; a signal is minus its number.
    pub status: i32,
    /// What it wrote.
    pub out: String,
    /// What it and usvm wrote beside that.
    pub err: String,
}

impl Ran {
    /// A count of usvm's report; zero if it is not in it.
    pub fn count(&self, name: &str) -> u64 {
        let line = self.err.lines().find(|l| l.split_whitespace().next() == Some(name));
        line.and_then(|l| l.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
    }

    /// Itself, if it ended well.
    #[track_caller]
    pub fn well(self) -> Self {
        assert_eq!(self.status, 0, "\nstdout:\n{}\nstderr:\n{}", self.out, self.err);
        self
    }
}

/// Runs it to its end; a program that hangs is killed, with a panic.
#[track_caller]
pub fn run(command: &mut Command) -> Ran {
    use std::os::unix::process::ExitStatusExt;
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let pid = child.id();
    let (done, waiter) = {
        let (send, receive) = std::sync::mpsc::channel::<Output>();
        let waiter = std::thread::spawn(move || {
            let _ = send.send(child.wait_with_output().expect("a child can be waited for"));
        });
        (receive, waiter)
    };
    let until = Instant::now() + Duration::from_secs(180);
    let output = done.recv_timeout(until.saturating_duration_since(Instant::now())).ok();
    if output.is_none() {
        Command::new("kill").args(["-KILL", &pid.to_string()]).status().expect("kill");
    }
    waiter.join().expect("the waiter");
    let output = output.unwrap_or_else(|| panic!("{command:?} hangs"));
    Ran {
        status: output.status.code().unwrap_or_else(|| -output.status.signal().unwrap_or(0)),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
