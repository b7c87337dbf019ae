//! Copies of 2 MiB between huge pages and memory like the simulated device's. The copier's are measured against memcpy
//! between the same two buffers; that one against `memcpy_2m`, which has huge pages on both sides.
//!
//! # Safety
//! Copies between slots of two buffers that the case owns.
#![allow(unsafe_code)]

use crate::baselines::{Memcpy2m, time};
use crate::case::{Case, Result, Setup};
use crate::memory::{Pages, SLOT, Slots};
use std::thread::available_parallelism;
use usvm::vram::copy::{Copier, CopyHint, CopyPool};

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Huge pages to memfd.
    Out,
    /// Memfd to huge pages.
    Back,
}

impl Way {
    /// memcpy this way.
    fn plain(self) -> &'static str {
        match self {
            Way::Out => "copy_plain_2m",
            Way::Back => "copy_plain_back_2m",
        }
    }
}

/// One way to copy.
struct Copy2m {
    name: &'static str,
    about: &'static str,
    way: Way,
    hint: CopyHint,
    threaded: bool,
    copier: Copier,
    made: Option<Made>,
}

struct Made {
    from: Slots,
    to: Slots,
    pool: Option<CopyPool>,
    /// For memcpy itself.
    memcpy: Option<Memcpy2m>,
}

/// The copies.
pub fn all(copier: Copier) -> Vec<Box<dyn Case>> {
    use CopyHint::{FromDevice, FromWriteCombined, Small, ToDevice};
    use Way::{Back, Out};
    let case = |name, about, way, hint, threaded| -> Box<dyn Case> {
        Box::new(Copy2m { name, about, way, hint, threaded, copier, made: None })
    };
    vec![
        case(Out.plain(), "memcpy, huge pages to memfd", Out, Small, false),
        case(Back.plain(), "memcpy, memfd to huge pages", Back, Small, false),
        case("copy_nt_2m", "Copier, huge pages to memfd, one thread", Out, ToDevice, false),
        case("copy_nt_back_2m", "Copier, memfd to huge pages, one thread", Back, FromDevice, false),
        case("copy_wc_2m", "Copier's streaming loads, memfd to huge pages", Back, FromWriteCombined, false),
        case("copy_threaded_2m", "Copier and helpers, huge pages to memfd", Out, ToDevice, true),
        case("copy_threaded_back_2m", "Copier and helpers, memfd to huge pages", Back, FromDevice, true),
    ]
}

impl Copy2m {
    fn is_plain(&self) -> bool {
        self.hint == CopyHint::Small
    }
}

impl Made {
    /// Copies the next slot and gives the microseconds.
    fn copy(&mut self, copier: Copier, hint: CopyHint, threaded: bool) -> f64 {
        let (to, from) = (self.to.next(), self.from.next());
        let pool = self.pool.as_ref().filter(|_| threaded);
        // SAFETY: both are slots of SLOT bytes of two different buffers, used by this thread only.
        time(|| unsafe {
            match pool {
                Some(pool) => copier.copy_threaded(pool, to, from, SLOT, hint),
                None => copier.copy(to, from, SLOT, hint),
            }
        })
    }
}

impl Case for Copy2m {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn baseline(&self) -> Option<&'static str> {
        Some(if self.is_plain() { Memcpy2m::NAME } else { self.way.plain() })
    }

    fn setup(&mut self) -> Result<Setup> {
        if self.threaded && available_parallelism().map_or(1, usize::from) < 2 {
            return Ok(Setup::Skip("one processor has no helper".into()));
        }
        let new_pool = || CopyPool::new(CopyPool::default_helpers().max(1), CopyPool::SPIN);
        let pool = self.threaded.then(new_pool).transpose()?;
        let (huge, memfd) = (Slots::new(Pages::Huge)?, Slots::new(Pages::Memfd)?);
        let (from, to) = if self.way == Way::Out { (huge, memfd) } else { (memfd, huge) };
        let memcpy = self.is_plain().then(Memcpy2m::new).transpose()?;
        self.made = Some(Made { from, to, pool, memcpy });
        Ok(Setup::Ready)
    }

    fn sample(&mut self) -> Result<f64> {
        let made = self.made.as_mut().ok_or("sampled before setup")?;
        Ok(made.copy(self.copier, self.hint, self.threaded))
    }

    fn baseline_sample(&mut self) -> Result<f64> {
        let made = self.made.as_mut().ok_or("sampled before setup")?;
        Ok(match &mut made.memcpy {
            Some(memcpy) => memcpy.sample(),
            None => made.copy(self.copier, CopyHint::Small, false),
        })
    }
}
