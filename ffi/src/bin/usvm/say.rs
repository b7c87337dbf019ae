//! How the program speaks: results to stdout, everything about itself to stderr with its name.
//!
//! # Overview
//! What cannot be written is an error of whoever prints it, except that a reader may have seen enough. Rust's stdout takes
//! a closed descriptor for a place to write to, so that is asked first ([`by`]).

use std::fmt::Display;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::Outcome;

/// Puts /dev/null on those of descriptors 0 to 2 that are closed, the wrong way round: using them stays an error.
pub fn keep_standard_descriptors() -> io::Result<()> {
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let all: [(BorrowedFd<'_>, OFlags); 3] =
        [(stdin.as_fd(), OFlags::WRONLY), (stdout.as_fd(), OFlags::RDONLY), (stderr.as_fd(), OFlags::RDONLY)];
    for (descriptor, flags) in all {
        if rustix::fs::fcntl_getfl(descriptor) == Err(Errno::BADF) {
            // The lowest free number is this one's: those before it are open.
            let _ = rustix::fs::open("/dev/null", flags, Mode::empty())?.into_raw_fd();
        }
    }
    Ok(())
}

/// Says `words` to the user, apart from any output.
pub fn warn(words: impl Display) {
    // Nobody is left to tell when stderr is gone.
    let _ = writeln!(io::stderr(), "usvm: {words}");
}

/// Writes `text` to stdout. A reader that has seen enough is no failure.
pub fn out(text: impl AsRef<[u8]>) -> Result<(), String> {
    by(|| io::stdout().write_all(text.as_ref()))
}

/// Writes to stdout by `write`, to the end.
pub fn by(write: impl FnOnce() -> io::Result<()>) -> Result<(), String> {
    let closed = || match rustix::fs::fcntl_getfl(io::stdout()) {
        Ok(flags) => (flags & OFlags::RWMODE) == OFlags::RDONLY,
        Err(_) => true,
    };
    if closed() {
        return Err("cannot write to stdout: it is closed".into());
    }
    match write().and_then(|()| io::stdout().flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(format!("cannot write to stdout: {e}")),
        _ => Ok(()),
    }
}

/// Writes `text` to stdout and ends well.
pub fn done(text: impl AsRef<[u8]>) -> Outcome {
    out(text).map(|()| 0)
}

/// `value` as indented JSON and a line end.
pub fn json(value: &impl serde::Serialize) -> Result<String, String> {
    serde_json::to_string_pretty(value).map(|text| text + "\n").map_err(|e| e.to_string())
}

/// `bytes` in the unit that people read.
pub fn bytes(bytes: u64) -> String {
    usvm::observe::stats::Unit::Bytes.show(bytes)
}
