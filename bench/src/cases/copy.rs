//! Copies of 2 MiB between huge pages and memory like the simulated device's, against memcpy.
//!
//! # Safety
//! Copies between slots of two buffers that the case owns.
#![allow(unsafe_code)]

use crate::baselines::{Memcpy2m, time};
use crate::case::{Case, Result, Setup};
use crate::memory::{Pages, SLOT, Slots};
use std::thread::available_parallelism;
use usvm::vram::copy::{Copier, CopyHint, CopyPool};

/// One way to copy.
struct Copy2m {
    name: &'static str,
    about: &'static str,
    from: Pages,
    to: Pages,
    hint: CopyHint,
    threaded: bool,
    copier: Copier,
    made: Option<Made>,
}

struct Made {
    from: Slots,
    to: Slots,
    pool: Option<CopyPool>,
    baseline: Memcpy2m,
}

/// The copies.
pub fn all(copier: Copier) -> Vec<Box<dyn Case>> {
    use CopyHint::{FromDevice, FromWriteCombined, Small, ToDevice};
    use Pages::{Huge, Memfd};
    let case = |name, about, (from, to), hint, threaded| -> Box<dyn Case> {
        Box::new(Copy2m { name, about, from, to, hint, threaded, copier, made: None })
    };
    vec![
        case("copy_nt_2m", "Copier, huge pages to memfd, one thread", (Huge, Memfd), ToDevice, false),
        case("copy_nt_back_2m", "Copier, memfd to huge pages, one thread", (Memfd, Huge), FromDevice, false),
        case(
            "copy_wc_2m",
            "Copier with streaming loads, memfd to huge pages",
            (Memfd, Huge),
            FromWriteCombined,
            false,
        ),
        case("copy_plain_2m", "memcpy, huge pages to memfd", (Huge, Memfd), Small, false),
        case("copy_threaded_2m", "Copier and helpers, huge pages to memfd", (Huge, Memfd), ToDevice, true),
        case(
            "copy_threaded_back_2m",
            "Copier and helpers, memfd to huge pages",
            (Memfd, Huge),
            FromDevice,
            true,
        ),
    ]
}

impl Case for Copy2m {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn baseline(&self) -> Option<&'static str> {
        Some(Memcpy2m::NAME)
    }

    fn setup(&mut self) -> Result<Setup> {
        if self.threaded && available_parallelism().map_or(1, usize::from) < 2 {
            return Ok(Setup::Skip("one processor has no helper".into()));
        }
        let pool =
            self.threaded.then(|| CopyPool::new(CopyPool::default_helpers(), CopyPool::SPIN)).transpose()?;
        let (from, to) = (Slots::new(self.from)?, Slots::new(self.to)?);
        self.made = Some(Made { from, to, pool, baseline: Memcpy2m::new()? });
        Ok(Setup::Ready)
    }

    fn sample(&mut self) -> Result<f64> {
        let made = self.made.as_mut().ok_or("sampled before setup")?;
        let (to, from) = (made.to.next(), made.from.next());
        let (copier, hint) = (self.copier, self.hint);
        // SAFETY: both are slots of SLOT bytes of two different buffers, used by this thread only.
        Ok(time(|| unsafe {
            match &made.pool {
                Some(pool) => copier.copy_threaded(pool, to, from, SLOT, hint),
                None => copier.copy(to, from, SLOT, hint),
            }
        }))
    }

    fn baseline_sample(&mut self) -> Result<f64> {
        Ok(self.made.as_mut().ok_or("sampled before setup")?.baseline.sample())
    }
}
