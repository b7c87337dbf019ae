//! The baselines as cases of their own, so that their numbers are in the report.

use crate::baselines::{Memcpy2m, Triad2m, Uffd4k};
use crate::case::{Case, Result, Setup};

/// A baseline, made at setup.
struct Bare<B> {
    name: &'static str,
    about: &'static str,
    make: fn() -> Result<B>,
    sample: fn(&mut B) -> Result<f64>,
    made: Option<B>,
}

/// The baselines.
pub fn all() -> Vec<Box<dyn Case>> {
    vec![
        Box::new(Bare {
            name: Memcpy2m::NAME,
            about: "the C library's memcpy of 2 MiB, warm huge pages on both sides",
            make: Memcpy2m::new,
            sample: |b| Ok(b.sample()),
            made: None,
        }),
        Box::new(Bare {
            name: Uffd4k::NAME,
            about: "a 4 KiB fault served by one thread asleep in poll with UFFDIO_COPY",
            make: Uffd4k::new,
            sample: Uffd4k::sample,
            made: None,
        }),
        Box::new(Bare {
            name: Triad2m::NAME,
            about: "STREAM's triad over 2 MiB of each of three arrays",
            make: || Ok(Triad2m::new()),
            sample: |b| Ok(b.sample()),
            made: None,
        }),
    ]
}

impl<B> Case for Bare<B> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn baseline(&self) -> Option<&'static str> {
        None
    }

    fn setup(&mut self) -> Result<Setup> {
        match (self.make)() {
            Ok(made) => self.made = Some(made),
            Err(why) => return Ok(Setup::Skip(why.to_string())),
        }
        Ok(Setup::Ready)
    }

    fn sample(&mut self) -> Result<f64> {
        (self.sample)(self.made.as_mut().ok_or("sampled before setup")?)
    }

    fn baseline_sample(&mut self) -> Result<f64> {
        Err("a baseline has no baseline".into())
    }
}
