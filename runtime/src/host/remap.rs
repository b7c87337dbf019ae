#![allow(unsafe_code)]
//! Flips on kernels without UFFDIO_MOVE (before 6.8).
//!
//! # Overview
//! Outward, mremap with MREMAP_DONTUNMAP moves runs of pages, and holes between them, onto the shadow slot; the application's mapping stays, empty
//! and registered, so who touches it waits in userfaultfd. Inward, UFFDIO_COPY fills the holes and the shadow's pages go
//! back to the kernel.
//!
//! # Safety
//! As in [`super::flip`]. The mapping that mremap puts onto the slot replaces the slot's own; it is taken out of
//! userfaultfd and kept out of children at once, and replaced by a fresh one when the slot is released.
//!
//! # Locking
//! The kernel reports our own mremap as an event and lets the call return only when it was read: the reader of messages
//! must run on another thread, which asks [`Host::is_own_remap`] and ignores those.
//!
//! # Limits
//! mremap moves pinned pages, too: what a device writes by DMA after the flip goes to the shadow and is lost when
//! the data on the device is newer. Programs that use O_DIRECT or io_uring buffers on tracked memory need Linux 6.8.

use super::Host;
use super::features::Features;
use super::{shadow, sys};
use crate::ground::addr::{PageMask, Span};
use crate::ground::error::Errno;
use crate::space::ports::{FlipError, FlipStop, Shadow, VmaKind};
use std::sync::PoisonError;

impl Host {
    /// Whether the kernel has changed mappings and not told of it yet.
    pub fn has_more_to_tell(&self) -> bool {
        sys::uffd_is_changing(self.channel.uffd())
    }

    /// Whether a REMAP event comes from usvm's own flip. Each is told once.
    pub fn is_own_remap(&self, from: u64, to: u64) -> bool {
        let mut own = self.own_remaps.lock().unwrap_or_else(PoisonError::into_inner);
        match own.iter().position(|r| *r == (from, to)) {
            Some(at) => {
                own.swap_remove(at);
                true
            }
            None => false,
        }
    }

    /// As [`Host::is_own_remap`], and it is not told yet.
    pub fn is_to_own_place(&self, from: u64, to: u64) -> bool {
        self.own_remaps.lock().unwrap_or_else(PoisonError::into_inner).contains(&(from, to))
    }

    /// [`crate::space::ports::HostMemory::flip_out`] by mremap.
    pub(super) fn remap_out(
        &self,
        app: Span,
        shadow: &Shadow,
        pages: &PageMask,
    ) -> Result<PageMask, FlipStop> {
        let mut moved = PageMask::EMPTY;
        let stop = |moved, why| FlipStop { moved, why };
        if !self.registered_now(app) {
            return Err(stop(moved, FlipError::NoMapping));
        }
        let there = self.pagemap.pages(app).map_err(|e| stop(moved, FlipError::Os(e.0)))?;
        let waiting = self.pagemap.pages(shadow.span).map_err(|e| stop(moved, FlipError::Os(e.0)))?.present;
        let wanted = pages.and(&there.present);
        if let Some((first, _)) = wanted.and(&waiting).runs().next() {
            tracing::debug!(first, slot = %shadow.span, "a page is there already");
            return Err(stop(moved, FlipError::Exists));
        }
        // Holes between go along, so that a call moves as much as it can: never over a page that waits in the slot.
        for (first, count) in pages.minus(&waiting).runs() {
            let end = first + count;
            let mut at = first;
            while at < end {
                if mask_of(at, end - at).and(&wanted).is_empty() {
                    break;
                }
                let run = app.page_run(at, end - at);
                let part = self.movable_part(run).map_err(|why| stop(moved, why))?;
                let to = shadow.span.page_run(at, part.pages());
                self.remap_run(part, to).map_err(|e| stop(moved, remap_error(e)))?;
                // What came with it is told by the slot: a page may have been filled since the look.
                let part_mask = mask_of(at, part.pages());
                let arrived = self.pagemap.pages(shadow.span).map_or(wanted, |p| p.present);
                moved = moved.or(&arrived.and(&part_mask));
                at += part.pages();
            }
        }
        Ok(moved)
    }

    /// The start of `run` that lies in one anonymous mapping.
    fn movable_part(&self, run: Span) -> Result<Span, FlipError> {
        match self.maps.find(run.start) {
            Ok(Some(vma)) if vma.kind == VmaKind::Anonymous => {
                if !vma.write || vma.exec {
                    return Err(FlipError::Mismatch);
                }
                run.intersect(vma.span).ok_or(FlipError::NoMapping)
            }
            Ok(_) => Err(FlipError::NoMapping),
            Err(error) => Err(FlipError::Os(error.errno())),
        }
    }

    fn remap_run(&self, from: Span, to: Span) -> Result<(), Errno> {
        let told = self.has(Features::EVENT_REMAP);
        if told {
            let mut own = self.own_remaps.lock().unwrap_or_else(PoisonError::into_inner);
            own.push((from.start, to.start));
        }
        // SAFETY: the slot belongs to the caller; whoever touches `from` waits in userfaultfd.
        if let Err(errno) = unsafe { sys::remap_away(from, to.start) } {
            if told {
                self.is_own_remap(from.start, to.start);
            }
            return Err(errno);
        }
        // The new mapping came with the old one's registration and advice. Should this fail, only usvm itself
        // touches the slot, and its pages are all there.
        if let Err(errno) = sys::uffd_unregister(self.channel.uffd(), to) {
            tracing::debug!(%errno, %to, "slot stays registered until it is released");
        }
        shadow::prepare(to);
        Ok(())
    }

    /// [`crate::space::ports::HostMemory::flip_in`] by UFFDIO_COPY; what arrived leaves the shadow.
    pub(super) fn copy_back(&self, app: Span, shadow: &Shadow, pages: &PageMask) -> Result<(), FlipStop> {
        let copied = self.copy_pages_in(app, shadow, pages);
        let arrived = copied.map_or_else(|stop| stop.moved, |()| *pages);
        for (first, count) in arrived.runs() {
            let run = shadow.span.page_run(first, count);
            if let Err(errno) = self.shadow.release(self.channel.uffd(), run) {
                tracing::debug!(%errno, %run, "shadow pages stay until the slot is freed");
            }
        }
        copied
    }
}

fn mask_of(first: usize, count: usize) -> PageMask {
    let mut mask = PageMask::EMPTY;
    mask.set_run(first, count);
    mask
}

fn remap_error(errno: Errno) -> FlipError {
    match errno.0 {
        libc::ENOMEM => FlipError::NoMemory,
        libc::EAGAIN => FlipError::Again,
        libc::EFAULT => FlipError::NoMapping,
        libc::EINVAL => FlipError::Mismatch,
        other => FlipError::Os(other),
    }
}
