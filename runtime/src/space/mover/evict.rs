//! Room in device memory: allocation, the order of use, eviction.
//!
//! # Overview
//! Who needs device memory evicts the longest unused ranges until there is some. Shared copies go first, for the
//! application has their truth; then ranges in the order of their use, with a second chance for those the device
//! referenced since they grew old.
//!
//! # Limits
//! Eviction gives up only when everything that remains is pinned by running work or held by another mover; the caller
//! waits for one of these to end and tries again.

use std::sync::Arc;
use std::time::Instant;

use super::{Mover, Range};
use crate::ground::addr::{PageMask, Span};
use crate::ground::error::{Error, Result};
use crate::observe::stats::Cause;
use crate::space::order::{AGED, Class};
use crate::space::ports::Bo;
use crate::space::residency::{State, bytes};

/// Shared copies that an eviction looks at before it takes others.
const FEW: usize = 16;
/// Ranges in use that an eviction passes over.
const SECOND_CHANCES: usize = 32;

impl Mover {
    /// Device memory for `span`, evicting the longest unused if there is no room.
    pub(super) fn allocate(&self, device: u32, span: Span) -> Result<Bo> {
        let dev = self.device(device);
        loop {
            if let Some(bo) = dev.vram_alloc(span.len()) {
                return Ok(bo);
            }
            if !self.evict_one(device)? {
                // Somebody else's free may have made room between the two.
                if let Some(bo) = dev.vram_alloc(span.len()) {
                    return Ok(bo);
                }
                return Err(Error::OutOfDeviceMemory {
                    needed: span.len(),
                    capacity: dev.info().vram_bytes,
                    busy: dev.info().vram_bytes - dev.vram_free_bytes(),
                });
            }
        }
    }

    /// The range is the warmest of `device`; some that were warm before grow old.
    pub(super) fn arrived(&self, range: &Arc<Range>, device: u32, class: Class) {
        self.lru(device).put(range, class);
        for _ in 0..AGED {
            let Some(old) = self.lru(device).age() else { break };
            self.device(device).test_and_clear_referenced(old.span());
        }
    }

    /// Evicts the coldest range that can go. Shared copies are cheapest and go first; a range the device referenced
    /// since it grew old gets a second chance. `false` when nothing can go now; a lost device is an error.
    fn evict_one(&self, device: u32) -> Result<bool> {
        let (copies, owned) = {
            let lru = self.lru(device);
            (lru.len(Class::Copies), lru.len(Class::Owned))
        };
        // Copies in use are passed over, a few with each eviction, and all of them only when nothing else can go.
        Ok(self.evict_of(device, Class::Copies, copies.min(FEW))?
            || self.evict_of(device, Class::Owned, owned + SECOND_CHANCES)?
            || copies > FEW && self.evict_of(device, Class::Copies, copies)?)
    }

    /// Evicts the coldest range of `class` that can go, looking at so many.
    fn evict_of(&self, device: u32, class: Class, looks: usize) -> Result<bool> {
        let mut chances = SECOND_CHANCES;
        for _ in 0..looks {
            let Some((range, counts)) = self.lru(device).next(class) else { return Ok(false) };
            if range.data.is_pinned() {
                continue;
            }
            let Some(mut state) = range.data.try_lock() else { continue };
            if range.data.is_pinned() {
                continue;
            }
            let holds =
                |state: &State| state.moved.as_ref().is_some_and(|m| m.bo.is_some() && m.device == device);
            if !holds(&state) {
                continue;
            }
            if counts && chances > 0 && self.device(device).test_and_clear_referenced(range.span()) {
                chances -= 1;
                continue;
            }
            match self.evict(&range, &mut state) {
                Err(e @ Error::DeviceLost { .. }) => return Err(e),
                // What could not land is in the shadow, and its device memory is free.
                _ if !holds(&state) => {
                    if let Some(m) = &mut state.moved {
                        self.note_eviction(m, Instant::now());
                    }
                    return Ok(true);
                }
                _ => {}
            }
        }
        Ok(false)
    }

    /// Moves the range out of device memory.
    pub fn evict(&self, range: &Arc<Range>, state: &mut State) -> Result<()> {
        let started = Instant::now();
        let mut result = Ok(());
        if state.moved.as_ref().is_some_and(|m| m.shared) {
            self.unshare_copy(range, state);
        } else {
            result = self.to_host(range, state, &PageMask::first(range.span().pages()), Cause::Evict);
        }
        if state.moved.as_ref().is_none_or(|m| m.bo.is_none()) {
            self.observer.evicted(range.span(), started);
        }
        result
    }

    /// Returns retained pages whose truth is elsewhere to the kernel.
    pub fn release_retained(&self, range: &Range, state: &mut State) -> u64 {
        let Some(moved) = &mut state.moved else { return 0 };
        let idle = moved.retained.minus(&moved.strayed).minus(&moved.leaving);
        self.accounted(range, moved, |m| {
            if let Some(shadow) = &m.shadow {
                self.host.shadow_release(shadow, &idle);
            }
            m.retained = m.retained.minus(&idle);
            m.fresh = m.fresh.minus(&idle);
        });
        bytes(&idle)
    }

    /// The ranges with memory on `device`, coldest first.
    pub fn by_use(&self, device: u32) -> Vec<Arc<Range>> {
        self.lru(device).coldest_first()
    }

    /// Ranges that evictions have looked at so far.
    #[cfg(test)]
    pub(crate) fn looks(&self, device: u32) -> u64 {
        self.lru(device).looks()
    }
}
