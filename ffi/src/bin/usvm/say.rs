//! How the program speaks: results to stdout, everything about itself to stderr with its name.

use std::fmt::Display;
use std::io::{self, Write};

use crate::Outcome;

/// Says `words` to the user, apart from any output.
pub fn warn(words: impl Display) {
    // Nobody is left to tell when stderr is gone.
    let _ = writeln!(io::stderr(), "usvm: {words}");
}

/// Writes `text` to stdout. A reader that has seen enough is no failure.
pub fn out(text: impl AsRef<[u8]>) -> Result<(), String> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_ref()).and_then(|()| stdout.flush()) {
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
