#![allow(unsafe_code)]
//! Huge pages made ready in the background.
//!
//! # Overview
//! A fresh huge page costs milliseconds where the host's memory is cold; a prepared one moves into a shadow slot in a
//! microsecond. A background thread calls [`Pool::refill`] until the target is reached. Only pages that usvm made
//! itself, zeroed by the kernel and never at an application's address, are ever in the pool.
//!
//! # Safety
//! The pool owns its slots; pages move between slots without references into either.
//!
//! # Locking
//! One lock over two short lists, not held over populating. Not for application threads.
//!
//! # Limits
//! Needs UFFDIO_MOVE and transparent huge pages; without them the pool stays empty and callers make fresh pages.

use super::pagemap::Pagemap;
use super::shadow::ShadowArea;
use super::sys;
use crate::ground::addr::{PageMask, SZ_2M};
use crate::ground::error::Result;
use crate::space::ports::Shadow;
use rustix::fd::BorrowedFd;
use rustix::mm::Advice;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Prepared huge pages.
#[derive(Debug)]
pub(super) struct Pool {
    slots: Mutex<Slots>,
    target: AtomicUsize,
    /// The kernel gives no huge pages: do not try again.
    barren: AtomicBool,
}

#[derive(Debug, Default)]
struct Slots {
    ready: Vec<Shadow>,
    empty: Vec<Shadow>,
}

/// What a pool works with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ground<'a> {
    pub(super) uffd: BorrowedFd<'a>,
    pub(super) area: &'a ShadowArea,
    pub(super) pagemap: &'a Pagemap,
}

impl Pool {
    pub(super) fn new(target: usize, usable: bool) -> Self {
        Self { slots: Mutex::default(), target: AtomicUsize::new(target), barren: AtomicBool::new(!usable) }
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets how many huge pages to hold ready.
    pub(super) fn set_target(&self, pages: usize) {
        self.target.store(pages, Ordering::Relaxed);
    }

    /// Bytes of memory held ready.
    pub(super) fn held_bytes(&self) -> u64 {
        self.slots().ready.len() as u64 * SZ_2M
    }

    /// How many huge pages are missing from the target.
    pub(super) fn wanted(&self) -> usize {
        if self.barren.load(Ordering::Relaxed) {
            return 0;
        }
        self.target.load(Ordering::Relaxed).saturating_sub(self.slots().ready.len())
    }

    /// Prepares one huge page if one is wanted; whether it did.
    pub(super) fn refill(&self, on: Ground<'_>) -> Result<bool> {
        if self.wanted() == 0 {
            return Ok(false);
        }
        let emptied = self.slots().empty.pop();
        let slot = match emptied {
            Some(slot) => slot,
            None => on.area.alloc(on.uffd, SZ_2M)?,
        };
        // SAFETY: the slot is the pool's; populating only adds pages.
        let populated = unsafe { sys::advise(slot.span, Advice::LinuxPopulateWrite) };
        let huge = populated.is_ok()
            && on.pagemap.pages(slot.span).is_ok_and(|p| p.huge == PageMask::first(slot.span.pages()));
        if huge {
            self.slots().ready.push(slot);
        } else {
            tracing::debug!(?populated, "no huge page to prepare");
            // Out of memory passes; small pages where huge ones were asked for do not.
            self.barren.store(populated.is_ok(), Ordering::Relaxed);
            on.area.free(on.uffd, slot);
        }
        Ok(huge)
    }

    /// Moves a prepared huge page into the empty slot `to`; `false` when there is none or it does not fit.
    pub(super) fn adopt(&self, on: Ground<'_>, to: &Shadow) -> bool {
        if to.span.len() != SZ_2M {
            return false;
        }
        let Some(from) = self.slots().ready.pop() else { return false };
        // SAFETY: both slots are owned, one by the pool, one by the caller, and nobody refers into them.
        let moved = unsafe { sys::uffd_move(on.uffd, to.span.start, from.span.start, SZ_2M, false) };
        match moved {
            Ok(()) => {
                self.slots().empty.push(from);
                true
            }
            Err(stop) if stop.done == 0 => {
                self.slots().ready.push(from);
                false
            }
            Err(_) => {
                // Split on the way. What arrived are zeroes, as good as a hole; the rest is dropped.
                on.area.free(on.uffd, from);
                false
            }
        }
    }

    /// Gives all prepared pages back to the kernel; the target stays.
    pub(super) fn drain(&self, on: Ground<'_>) -> u64 {
        let slots = std::mem::take(&mut *self.slots());
        let bytes = slots.ready.len() as u64 * SZ_2M;
        for slot in slots.ready.into_iter().chain(slots.empty) {
            on.area.free(on.uffd, slot);
        }
        bytes
    }
}
