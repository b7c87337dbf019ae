//! Ranges that keep being evicted: device memory is too small for all that the device uses.
//!
//! # Overview
//! Taking turns on the device costs two moves for each turn, and where accesses have no order there is a turn for nearly every
//! one of them. So evictions that come soon after each other are counted ([`History::evictions`]), for policies to leave
//! such a range where it is. What a policy leaves at home for that is remembered here and asked for anew after a while, for
//! the program may go on to other data; each time in vain, the while doubles. Where device memory is free again, at once.
//!
//! # Locking
//! The list's lock is innermost. The caller holds the state lock of the range it names.
//!
//! # Limits
//! Some ranges at a time are asked for anew, so that this never becomes the load that it should avoid.

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use super::{Mover, Range};
use crate::space::ports::History;
use crate::space::residency::Moved;

/// Evictions further apart than this are not pressure: moving every so often costs nothing.
const APART: Duration = Duration::from_secs(10);
/// How long a range is first left at home.
const FIRST: Duration = Duration::from_millis(300);
/// How often that doubles.
const DOUBLINGS: u32 = 5;
/// Ranges that are asked for anew at a time.
const AT_ONCE: usize = 32;
/// Device memory counts as free again when one part of so many is.
const FREE_PART: u64 = 8;

/// The ranges that wait, and until when.
#[derive(Default)]
pub(super) struct Pressed(Mutex<Vec<(Instant, Weak<Range>)>>);

impl Mover {
    /// The range just left for others.
    pub(super) fn note_eviction(&self, m: &mut Moved, now: Instant) {
        let History { evictions, passed_over, .. } = &mut m.history;
        if m.evicted.is_some_and(|before| now.duration_since(before) < APART) {
            *evictions += 1;
        } else {
            (*evictions, *passed_over) = (1, 0);
        }
        m.evicted = Some(now);
    }

    /// A policy left the range at home, as one that has been evicted often.
    pub fn passed_over(&self, range: &Arc<Range>, m: &mut Moved) {
        if m.history.evictions == 0 || m.waits {
            return;
        }
        m.waits = true;
        let pause = FIRST * (1 << m.history.passed_over.min(DOUBLINGS));
        m.history.passed_over += 1;
        self.pressed_list().push((Instant::now() + pause, Arc::downgrade(range)));
    }

    /// Ranges that shall be asked for anew, some of them.
    pub fn due(&self, now: Instant) -> Vec<Arc<Range>> {
        let mut list = self.pressed_list();
        if list.is_empty() {
            return Vec::new();
        }
        let free = |place: &super::Place| {
            place.device.vram_free_bytes() > place.device.info().vram_bytes / FREE_PART
        };
        let is_free = self.places.iter().all(free);
        let mut due = Vec::new();
        list.retain(|(until, range)| {
            let Some(range) = range.upgrade() else { return false };
            let waits = due.len() >= AT_ONCE || (*until > now && !is_free);
            if !waits {
                due.push(range);
            }
            waits
        });
        due
    }

    /// The range, which was due, could not be asked now.
    pub fn wait_more(&self, range: &Arc<Range>, now: Instant) {
        self.pressed_list().push((now + FIRST, Arc::downgrade(range)));
    }

    fn pressed_list(&self) -> std::sync::MutexGuard<'_, Vec<(Instant, Weak<Range>)>> {
        self.pressed.0.lock().unwrap_or_else(|p| p.into_inner())
    }
}

/// The range is tried anew: one more eviction soon after, and it counts as pressed again.
pub fn try_anew(m: &mut Moved, now: Instant) {
    m.waits = false;
    m.history.evictions = m.history.evictions.min(1);
    m.evicted = Some(now);
}
