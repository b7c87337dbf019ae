//! Loading foreign libraries, in a process of its own: they may crash, hang, print, or be missing a part.
//!
//! # Safety
//! Loading a library runs its constructors. That happens only in the child process that [`of`] starts for it, which does
//! nothing else.
#![allow(unsafe_code)]

use std::fs;
use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use libloading::os::unix::Library;

use crate::{Outcome, say};

/// How long a library may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes that are listened to.
const MOST_SAID: u64 = 1 << 20;

/// Starts the child's lines, so that what a library prints is told apart.
const MARK: &str = "usvm-load: ";

/// Loads `library` in a child process and gives the file that it came from. The words are the library's as much as the
/// loader's.
///
/// # Errors
/// The loader's words, or how the child ended.
pub fn of(library: &str) -> Result<PathBuf, String> {
    let mut child = Command::new("/proc/self/exe")
        .args(["load", library])
        .env_remove("LD_PRELOAD")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("it cannot be tried: {e}"))?;
    let mut said = Said::of(child.stdout.take());
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        said.listen();
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("loading it takes longer than {} s", PATIENCE.as_secs()));
            }
        }
    };
    // What the child has said is there. The pipe's end need not come: what it started may hold it open.
    said.listen();
    let said = said.text;
    let said = String::from_utf8_lossy(&said);
    let line = said.lines().find_map(|line| line.strip_prefix(MARK));
    match (line.and_then(|line| line.split_once(' ')), status.signal()) {
        (Some(("ok", path)), None) => Ok(path.into()),
        (Some(("error", words)), _) => Err(words.to_owned()),
        (_, Some(signal)) => Err(format!("loading it ends in signal {signal}")),
        _ => Err(format!("loading it ends the process: {status}")),
    }
}

/// What the child says, read as it comes and never waited for.
struct Said {
    pipe: Option<ChildStdout>,
    text: Vec<u8>,
}

impl Said {
    fn of(pipe: Option<ChildStdout>) -> Self {
        let never_waits = |pipe: &ChildStdout| rustix::io::ioctl_fionbio(pipe, true).is_ok();
        Self { pipe: pipe.filter(never_waits), text: Vec::new() }
    }

    /// Takes what is there, but for what is too much: then the child finds its pipe closed.
    fn listen(&mut self) {
        let Some(pipe) = &mut self.pipe else { return };
        let mut more = pipe.take(MOST_SAID - self.text.len() as u64);
        let waits =
            matches!(more.read_to_end(&mut self.text), Err(e) if e.kind() == io::ErrorKind::WouldBlock);
        if !waits {
            self.pipe = None;
        }
    }
}

/// `usvm load`: the child.
pub fn load(libraries: &[PathBuf]) -> Outcome {
    for library in libraries {
        let before = mapped();
        // SAFETY: this process exists only to run the constructors of these libraries and ends right after.
        let loaded = unsafe { Library::open(Some(library), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        let line = match loaded {
            Ok(loaded) => {
                // Its destructors are no part of the question.
                std::mem::forget(loaded);
                format!("ok {}", file_of(library, &before).display())
            }
            Err(e) => format!("error {}", words(&e)),
        };
        say::out(format!("{MARK}{line}\n"))?;
    }
    Ok(0)
}

/// The loader's own words, which the wrapping error puts behind its own.
fn words(error: &libloading::Error) -> String {
    let text = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    text.trim_matches('"').to_owned()
}

/// Files that are mapped now.
fn mapped() -> Vec<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    maps.lines().filter_map(|line| Some(PathBuf::from(&line[line.find('/')?..]))).collect()
}

/// The file that `library` was found as: mapped now, not before, and of its name.
fn file_of(library: &std::path::Path, before: &[PathBuf]) -> PathBuf {
    if library.is_absolute() {
        return library.to_path_buf();
    }
    // libX.so.1 may be a link to libX.so.1.0.0.
    let name = library.to_string_lossy();
    let named =
        |path: &PathBuf| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(&*name));
    let now = mapped();
    now.into_iter()
        .find(|path| named(path) && !before.contains(path))
        .unwrap_or_else(|| library.to_path_buf())
}
