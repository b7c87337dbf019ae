//! What memory pays that the device never uses: nothing.

use super::migrate::{runtime, to_device, touch};
use crate::baselines::Triad2m;
use crate::case::{Case, Result, Setup};
use crate::memory::{Pages, SLOT, Slots};
use usvm::GpuAccess;

/// Loops in a sample: long enough that a scheduler tick is little of it.
const LOOPS: usize = 64;
/// Between what is done before a sample and the sample.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(150);

#[derive(Default)]
struct Untouched {
    made: Option<(Triad2m, Slots)>,
}

impl Untouched {
    fn run(&mut self) -> Result<f64> {
        let (triad, _) = self.made.as_mut().ok_or("sampled before setup")?;
        Ok((0..LOOPS).map(|_| triad.sample()).sum())
    }
}

impl Case for Untouched {
    fn name(&self) -> &'static str {
        "untouched"
    }

    fn about(&self) -> &'static str {
        "STREAM-like triad on memory the device never uses, usvm on with other memory on the device, against off"
    }

    fn baseline(&self) -> Option<&'static str> {
        Some(Triad2m::NAME)
    }

    fn at_most(&self) -> u32 {
        120
    }

    fn setup(&mut self) -> Result<Setup> {
        self.made = Some((Triad2m::new(), Slots::new(Pages::Huge)?));
        Ok(Setup::Ready)
    }

    fn sample(&mut self) -> Result<f64> {
        let usvm = runtime("adaptive", 8 * SLOT as u64)?;
        let (_, slots) = self.made.as_mut().ok_or("sampled before setup")?;
        for _ in 0..4 {
            to_device(&usvm, slots.next() as u64, GpuAccess::Write)?;
        }
        touch(slots.current());
        // What usvm prepares in the background after its start is not what is measured.
        std::thread::sleep(PAUSE);
        self.run()
    }

    fn baseline_sample(&mut self) -> Result<f64> {
        let (_, slots) = self.made.as_mut().ok_or("sampled before setup")?;
        for _ in 0..4 {
            touch(slots.next());
        }
        // Caches and processors forget in a pause, so there is one before either.
        std::thread::sleep(PAUSE);
        self.run()
    }
}

/// The cases.
pub fn all() -> Vec<Box<dyn Case>> {
    vec![Box::new(Untouched::default())]
}
