//! usvm's own threads.

use std::io;
use std::thread::JoinHandle;

/// Starts one of usvm's own threads: it takes no signals, its stack never migrates, and what it allocates comes from
/// usvm's own memory.
pub fn spawn(name: &str, f: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(format!("usvm-{name}")).spawn(f)
}
