//! Zeroing 2 MiB and finding that 2 MiB are zero, against memcpy of as much.
//!
//! # Safety
//! Writes and reads slots of a buffer that the case owns.
#![allow(unsafe_code)]

use crate::baselines::{Memcpy2m, time};
use crate::case::{Case, Result, Setup};
use crate::memory::{Pages, SLOT, Slots};
use usvm::vram::copy::Copier;

/// Zeroing, or looking for zeroes.
struct Zero2m {
    look: bool,
    copier: Copier,
    made: Option<(Slots, Memcpy2m)>,
}

/// Both.
pub fn all(copier: Copier) -> Vec<Box<dyn Case>> {
    [false, true].map(|look| -> Box<dyn Case> { Box::new(Zero2m { look, copier, made: None }) }).into()
}

impl Case for Zero2m {
    fn name(&self) -> &'static str {
        if self.look { "is_zero_2m" } else { "fill_zero_2m" }
    }

    fn about(&self) -> &'static str {
        if self.look { "finding that 2 MiB of memfd are zero" } else { "zeroing 2 MiB of memfd" }
    }

    fn baseline(&self) -> Option<&'static str> {
        Some(Memcpy2m::NAME)
    }

    fn setup(&mut self) -> Result<Setup> {
        self.made = Some((Slots::new(Pages::Memfd)?, Memcpy2m::new()?));
        Ok(Setup::Ready)
    }

    fn sample(&mut self) -> Result<f64> {
        let (slots, _) = self.made.as_mut().ok_or("sampled before setup")?;
        let (slot, copier, look) = (slots.next(), self.copier, self.look);
        let mut zero = true;
        // SAFETY: a slot of SLOT bytes that only this thread uses.
        let took = unsafe {
            if look {
                copier.fill_zero(slot, SLOT);
                time(|| zero = copier.is_zero(slot, SLOT))
            } else {
                time(|| copier.fill_zero(slot, SLOT))
            }
        };
        if zero { Ok(took) } else { Err("zeroes were written and not found".into()) }
    }

    fn baseline_sample(&mut self) -> Result<f64> {
        Ok(self.made.as_mut().ok_or("sampled before setup")?.1.sample())
    }
}
