//! Files that others name: they may be pipes that nobody writes to, or have no end.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens the regular file at `path` for reading, without waiting for anybody.
///
/// # Errors
/// Also what is no regular file.
pub fn open(path: &Path) -> io::Result<File> {
    // Asked before as well: opening a device can do something.
    let regular = |meta: fs::Metadata| {
        if meta.is_file() { Ok(()) } else { Err(io::Error::other("it is no regular file")) }
    };
    regular(fs::metadata(path)?)?;
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    regular(file.metadata()?)?;
    Ok(file)
}

/// What the regular file at `path` holds.
///
/// # Errors
/// Also when it holds more than `most` bytes.
pub fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    up_to(open(path)?, most)
}

/// What `file` gives to its end.
///
/// # Errors
/// Also when that is more than `most` bytes.
pub fn up_to(file: impl Read, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if file.take(most + 1).read_to_end(&mut bytes)? as u64 > most {
        let words = format!("it holds more than {}", crate::say::bytes(most));
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, words));
    }
    Ok(bytes)
}
