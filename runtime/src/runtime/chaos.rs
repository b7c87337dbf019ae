//! Chaos: migrations that nobody asked for, to test a program and usvm.
//!
//! # Overview
//! `USVM_CHAOS=RATE[,SEED]` starts a thread that, RATE times a second, takes a range that the device has used and sends
//! it to a device, brings it or a part of it home, drops its retained pages or its sharing. None of this may change a
//! program's results: any difference is a bug of usvm.
//!
//! # Limits
//! Only ranges that exist are disturbed: memory that no device ever used stays where it is.

use std::sync::Weak;
use std::time::{Duration, Instant};

use super::Inner;
use crate::ground::addr::{PageMask, SZ_4K};
use crate::ground::config::Chaos;
use crate::observe::stats::Cause;
use crate::space::svm::{Svm, Want};

/// Steps that are done without a pause between them; more often the clock cannot wake a thread usefully.
const SHORTEST_PAUSE: Duration = Duration::from_micros(200);

/// The thread's body; ends with the runtime.
pub(super) fn run(runtime: &Weak<Inner>, chaos: Chaos) {
    let mut dice = Dice(chaos.seed | 1);
    let period = Duration::from_secs(1).checked_div(chaos.rate.clamp(1, u64::from(u32::MAX)) as u32);
    let period = period.unwrap_or_default();
    let mut due = Instant::now();
    loop {
        let Some(runtime) = runtime.upgrade() else { return };
        if !runtime.is_running() {
            return;
        }
        while due <= Instant::now() {
            step(&runtime.svm, runtime.devices.len() as u64, &mut dice);
            due += period;
        }
        drop(runtime);
        std::thread::sleep(due.saturating_duration_since(Instant::now()).max(SHORTEST_PAUSE));
    }
}

/// One disturbance. What cannot be done now, because others use the range, is simply not done.
fn step(svm: &Svm, devices: u64, dice: &mut Dice) {
    let Some(range) = svm.space.nth(dice.below(svm.space.range_count() as u64) as usize) else { return };
    let span = range.span();
    match dice.below(8) {
        0..4 => drop(svm.gpu_access(dice.below(devices) as u32, span.start, span.len(), Want::prefetch())),
        4 => drop(svm.bring_home(span, Cause::User)),
        5 => {
            let Some(mut state) = range.data.try_lock() else { return };
            svm.mover.release_retained(&range, &mut state);
        }
        what => {
            let Some(mut state) = range.data.try_lock() else { return };
            if range.data.is_pinned() {
                return;
            }
            let pages = match what {
                6 => PageMask::first(span.pages()),
                _ => PageMask::of(span, span.page_run(dice.below(span.len() / SZ_4K) as usize, 1)),
            };
            svm.mover.unshare_copy(&range, &mut state);
            // An error leaves the rest where it is, recorded so.
            let _ = svm.mover.to_host(&range, &mut state, &pages, Cause::User);
        }
    }
}

/// xorshift64: the same seed disturbs the same way, as far as the program does the same.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound.max(1)
    }
}
