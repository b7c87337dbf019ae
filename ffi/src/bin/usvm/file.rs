//! Files that others name: they may be pipes that nobody writes to, or have no end.

use std::io::{self, Read};

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
