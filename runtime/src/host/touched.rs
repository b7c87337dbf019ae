//! Memory of the program that a thread of usvm touches while it holds a range's lock.
//!
//! # Overview
//! Copying pages that stay at home, and making pages the process's own, reads or writes them where they are. A page that
//! the program drops (madvise) in that moment is missing, and the access waits under userfaultfd as any other. Nobody
//! could serve it: that takes the range's lock, whose holder is the one who waits. But nothing moves while the lock is
//! held, so such a page is a hole and nothing else. Whoever touches says so, and whoever serves a fault there fills it with
//! zeroes without asking for the range.
//!
//! # Locking
//! One lock over a short list, held while a hole is filled: so that who touched can only go on, and take the page away,
//! before or after that. Taken last.

use crate::ground::addr::Span;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Touched {
    spans: Mutex<Vec<Span>>,
}

impl Touched {
    fn spans(&self) -> MutexGuard<'_, Vec<Span>> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `f`, which touches `span`, all of it at home.
    pub(super) fn during<T>(&self, span: Span, f: impl FnOnce() -> T) -> T {
        struct Until<'a>(&'a Touched, Span);
        impl Drop for Until<'_> {
            fn drop(&mut self) {
                let mut spans = self.0.spans();
                let at = spans.iter().position(|span| *span == self.1).expect("it was put there");
                spans.swap_remove(at);
            }
        }
        self.spans().push(span);
        let _until = Until(self, span);
        f()
    }

    /// Does `fill` if somebody touches the page at `addr`.
    pub(super) fn fill<T>(&self, addr: u64, fill: impl FnOnce() -> T) -> Option<T> {
        let spans = self.spans();
        spans.iter().any(|span| span.contains(addr)).then(fill)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_filled_where_and_while_somebody_touches() {
        let touched = Touched::default();
        let (one, other) = (Span::new(0x1000, 0x3000), Span::new(0x2000, 0x5000));
        let filled = |addr| touched.fill(addr, || ()).is_some();
        touched.during(one, || {
            touched.during(other, || assert!(filled(0x1000) && filled(0x2fff) && filled(0x4000)));
            assert!(filled(0x2000) && !filled(0x3000) && !filled(0xfff));
            touched.during(one, || ());
            assert!(filled(0x1000), "it is touched twice");
        });
        assert!(!filled(0x1000) && touched.spans().is_empty());
    }

    #[test]
    fn who_touches_goes_on_when_the_hole_is_filled() {
        let (touched, span) = (Touched::default(), Span::new(0x1000, 0x2000));
        let (begun, go) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                touched.during(span, || {
                    begun.wait();
                    go.wait();
                });
                done.store(true, std::sync::atomic::Ordering::SeqCst);
            });
            begun.wait();
            let filled = touched.fill(0x1000, || {
                go.wait();
                std::thread::sleep(std::time::Duration::from_millis(20));
                done.load(std::sync::atomic::Ordering::SeqCst)
            });
            assert_eq!(filled, Some(false));
        });
    }
}
