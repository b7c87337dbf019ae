//! The bare primitives that cases are measured against. Each has `new`, which gets it ready and warm, and `sample`,
//! which does it once and gives microseconds.

mod memcpy;
mod triad;
mod uffd;

pub use memcpy::Memcpy2m;
pub use triad::Triad2m;
pub use uffd::Uffd4k;

use std::time::Instant;

/// Microseconds that `work` takes.
pub fn time(work: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    work();
    begin.elapsed().as_nanos() as f64 / 1000.0
}
