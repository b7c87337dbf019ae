//! All of the memory, or a span of it, at once: home for a fork, for the end, or because the program asked.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::events::lock_meanwhile;
use super::{PIN_PATIENCE, Svm, TRIES, back_off};
use crate::ground::addr::{PageMask, Span};
use crate::ground::error::{Error, Result};
use crate::observe::stats::Cause;
use crate::space::mover::Range;
use crate::space::mover::pressed::try_anew;
use crate::space::residency::{Residence, bytes};

impl Svm {
    /// Brings everything in `span` home, whoever has it, waiting for running work. What cannot come, or is lost with its
    /// device, keeps nothing else from coming home; the error is the first one's.
    pub fn bring_home(&self, span: Span, cause: Cause) -> Result<()> {
        self.bring_home_within(span, cause, PIN_PATIENCE, true)
    }

    /// As [`Svm::bring_home`], without waiting for running work: [`Error::Busy`] tells that some of it stayed.
    pub fn try_to_bring_home(&self, span: Span, cause: Cause) -> Result<()> {
        self.bring_home_within(span, cause, Duration::ZERO, true)
    }

    /// Brings everything home; waits no longer than `patience` for what running work holds: [`Error::Busy`]. Copies that it
    /// holds are left.
    pub fn bring_home_for_fork(&self, patience: Duration) -> Result<()> {
        self.bring_home_within(Span::new(0, u64::MAX), Cause::User, patience, false)
    }

    fn bring_home_within(&self, span: Span, cause: Cause, patience: Duration, copies: bool) -> Result<()> {
        let begin = Instant::now();
        let deadline = begin + PIN_PATIENCE;
        let mut looks = 0;
        while !self.settle_landings() && Instant::now() < deadline {
            back_off(looks);
            looks += 1;
        }
        let mut outcome = Ok(());
        let mut held = Vec::new();
        for range in self.space.ranges_in(span) {
            match self.take_home(&range, cause, copies, begin, deadline) {
                Ok(()) => {}
                Err(Error::Busy { .. }) => held.push(range),
                Err(e) => outcome = outcome.and(Err(e)),
            }
        }
        for range in held {
            outcome = outcome.and(self.take_home(&range, cause, copies, begin + patience, deadline));
        }
        outcome
    }

    /// Brings the whole range home; waits until `patience` for who holds it, also for who holds a copy if `copies` are to
    /// go, and until `deadline` for mappings that change. The contents that are lost with a device are an error once the rest
    /// is home.
    fn take_home(
        &self,
        range: &Arc<Range>,
        cause: Cause,
        copies: bool,
        patience: Instant,
        deadline: Instant,
    ) -> Result<()> {
        let all = PageMask::first(range.span().pages());
        let mut lost = Ok(());
        let mut attempt = 0;
        loop {
            let seen = self.mover.released().generation();
            let result = {
                let mut state = range.data.lock();
                let held = range.data.is_pinned();
                let has_copy = state.moved.as_ref().is_some_and(|m| m.shared);
                if state.is_home() && !(held && has_copy && copies) {
                    if !held {
                        self.mover.unshare_copy(range, &mut state);
                    }
                    return lost;
                }
                if held {
                    Err(Error::Busy { span: range.span() })
                } else {
                    match self.mover.to_host(range, &mut state, &all, cause) {
                        Err(error @ Error::DeviceLost { .. }) => {
                            lost = Err(error.clone());
                            self.write_off(range, &mut state, error);
                            self.mover.to_host(range, &mut state, &all, cause)
                        }
                        other => other,
                    }
                }
            };
            match result {
                Ok(()) => return lost,
                Err(Error::Again { .. }) if Instant::now() < deadline => {
                    self.barrier();
                    back_off(attempt);
                }
                Err(Error::Busy { .. }) if Instant::now() < patience => {
                    self.mover.released().wait(seen, Duration::from_millis(2));
                }
                Err(e) => return Err(e),
            }
            attempt += 1;
        }
    }

    /// Has devices ask again for `span`, because other advice holds for it now: what reaches it over the link would not.
    pub fn reconsider(&self, span: Span) {
        for range in self.space.ranges_in(span) {
            let mut state = range.data.lock();
            if state.is_home() && !range.data.is_pinned() {
                self.mover.unbind(&range, &mut state.bound);
            }
        }
    }

    /// Has devices ask again for some of what stays at home because it kept being evicted.
    pub fn try_pressed_anew(&self) {
        let now = Instant::now();
        for range in self.mover.due(now) {
            // Who calls this must not wait.
            let Some(mut state) = range.data.try_lock() else {
                self.mover.wait_more(&range, now);
                continue;
            };
            if let Some(m) = &mut state.moved {
                try_anew(m, now);
            }
            if state.is_home() && !range.data.is_pinned() {
                self.mover.unbind(&range, &mut state.bound);
            }
        }
    }

    /// Drops the contents of `span` (usvm_discard): what is on the device is not copied back and reads as zero or as it
    /// was at some earlier time.
    pub fn discard(&self, span: Span) {
        for range in self.space.ranges_in(span) {
            let mut state = range.data.lock();
            if !range.data.is_pinned() {
                self.mover.drop_pages(&range, &mut state, &PageMask::of(range.span(), span), false);
            }
        }
    }

    /// Nothing goes to a device from now on, and nothing that is going is still on its way when this returns.
    pub fn freeze(&self) {
        *self.frozen.write().unwrap_or_else(|p| p.into_inner()) += 1;
    }

    /// Ends one [`Svm::freeze`].
    pub fn thaw(&self) {
        *self.frozen.write().unwrap_or_else(|p| p.into_inner()) -= 1;
    }

    /// A child was forked by a call that no handler announced: calls `f` with the contents of everything that is away,
    /// range by range, and without a place with what is lost.
    pub fn for_child(
        &self,
        read_on: &dyn Fn(),
        mut f: impl FnMut(Span, &PageMask, Option<&crate::space::ports::Shadow>),
    ) {
        for range in self.space.ranges_in(Span::new(0, u64::MAX)) {
            let mut state = lock_meanwhile(&range, read_on);
            let given = self.mover.snapshot(&range, &mut state, |held, lost, shadow| {
                f(range.span(), held, Some(shadow));
                f(range.span(), lost, None);
            });
            if let Err(e) = given {
                tracing::error!(span = %range.span(), "a forked child does not see this memory: {e}");
            }
        }
        // What mremap took elsewhere and has not landed belongs where it was to land.
        for landing in self.landings().iter() {
            let state = lock_meanwhile(&landing.range, read_on);
            let Some(m) = &state.moved else { continue };
            let pages = m.leaving.and(&landing.pages);
            if let Some(shadow) = m.shadow.as_ref().filter(|_| !pages.is_empty()) {
                f(landing.to, &pages, Some(shadow));
            }
        }
    }

    /// Ends it all: everything comes home and no access is served any more. What cannot come home is reported.
    pub fn close(&self) -> Result<()> {
        self.closed.store(true, Ordering::Release);
        // Device accesses that did not see it are over then.
        drop(self.frozen.write().unwrap_or_else(|p| p.into_inner()));
        let everything = Span::new(0, u64::MAX);
        let result = self.bring_home(everything, Cause::User);
        for range in self.space.clear() {
            let mut state = range.data.lock();
            let mut tries = 0;
            while let Err(error) = self.salvage(&range, &mut state, Cause::User) {
                tries += 1;
                if !matches!(error, Error::Again { .. } | Error::OutOfHostMemory { .. }) || tries == TRIES {
                    self.poison(
                        range.span(),
                        &state.moved.as_ref().map(|m| m.vram.or(&m.strayed)).unwrap_or_default(),
                    );
                    break;
                }
                back_off(tries);
            }
            if state.is_home() {
                self.mover.dissolve(&range, &mut state);
            }
        }
        result
    }

    /// One try to bring everything home by a thread that must not wait for any lock, because its holder may be dead.
    /// `true` when all is home.
    pub fn rescue(&self) -> bool {
        self.closed.store(true, Ordering::Release);
        let mut all_home = true;
        for range in self.space.ranges_in(Span::new(0, u64::MAX)) {
            let Some(mut state) = range.data.try_lock() else {
                all_home = false;
                continue;
            };
            let everything = PageMask::first(range.span().pages());
            all_home &= self.mover.to_host(&range, &mut state, &everything, Cause::User).is_ok();
        }
        all_home
    }

    /// What no thread can bring home any more answers SIGBUS instead of waiting for ever or reading as zeroes.
    pub fn poison_the_rest(&self) {
        for range in self.space.ranges_in(Span::new(0, u64::MAX)) {
            let lost = match range.data.try_lock() {
                Some(state) => state.moved.as_ref().map(|m| m.vram.or(&m.strayed)).unwrap_or_default(),
                // Its holder is gone: which pages are home is only known by what is present, which stays as it is.
                None => PageMask::first(range.span().pages()).minus(&self.mover.host.present(range.span())),
            };
            self.poison(range.span(), &lost);
        }
    }

    /// Bytes of `span` in each place.
    pub fn residence(&self, span: Span) -> Residence {
        let mut sum = Residence::default();
        for range in self.space.ranges_in(span) {
            let state = range.data.lock();
            let Some(m) = &state.moved else { continue };
            let part = PageMask::of(range.span(), span);
            sum.device += bytes(&m.vram.and(&part));
            sum.strayed += bytes(&m.strayed.and(&part));
            sum.retained += bytes(&m.retained.and(&part));
            sum.dirty += bytes(&m.vram.minus(&m.fresh).and(&part));
            if m.shared {
                sum.shared += bytes(&part);
            }
        }
        sum
    }

    /// Returns retained pages to the kernel until at most `allowed` bytes are kept, the longest unused first.
    pub fn shrink(&self, allowed: u64) {
        if self.mover.retained_bytes() <= allowed {
            return;
        }
        for device in 0..self.mover.places.len() as u32 {
            for range in self.mover.by_use(device) {
                if self.mover.retained_bytes() <= allowed {
                    return;
                }
                if let Some(mut state) = range.data.try_lock() {
                    self.mover.release_retained(&range, &mut state);
                }
            }
        }
    }
}
