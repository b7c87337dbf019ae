//! Ranges: the unit of residency.
//!
//! # Overview
//! A [`Range`] is an aligned block of the process's addresses that the device uses as one (struct drm_gpusvm_range).
//! It is shared as `Arc<Range<R>>`; `R` is what the upper floors keep with it. A range never changes its place: when
//! its mapping goes away it is flagged, collected as garbage and replaced by new ones.
//!
//! # Locking
//! Flags and stamp are one atomic word. They change under the notifier's lock (for write by invalidations, for read by
//! commits) and may be looked at without it, as a hint. `data` is protected by whatever is inside it.

use super::notifier::{Commit, Notifier, NotifierGuard, RangeFlags, RangeState, Stale, Ticket};
use crate::ground::addr::Span;
use std::fmt;
use std::sync::Arc;

/// Bits of [`Range::place`] that hold log2 of the length.
const ORDER_MASK: u64 = 0x3f;

/// One range of a space. Send and Sync when `R` is.
pub struct Range<R> {
    /// Start address, with log2 of the length in the low bits that page alignment leaves free.
    place: u64,
    notifier: Arc<Notifier>,
    pub(super) state: RangeState,
    /// What the upper floors keep with the range.
    pub data: R,
}

impl<R> Range<R> {
    /// A range that fills `span`, a power of two of at least 4 KiB, aligned to its own length.
    pub(super) fn new(span: Span, notifier: Arc<Notifier>, flags: RangeFlags, data: R) -> Self {
        let place = span.start | u64::from(span.len().trailing_zeros());
        Self { place, notifier, state: RangeState::new(flags), data }
    }

    /// First address.
    #[inline]
    pub fn start(&self) -> u64 {
        self.place & !ORDER_MASK
    }

    /// Bytes: one of the space's chunk sizes.
    #[inline]
    pub fn size(&self) -> u64 {
        1 << (self.place & ORDER_MASK)
    }

    /// The addresses.
    #[inline]
    pub fn span(&self) -> Span {
        Span::sized(self.start(), self.size())
    }

    /// The notifier it lies in.
    pub fn notifier(&self) -> &Notifier {
        &self.notifier
    }

    /// What is known of it. A hint unless the notifier's lock is held.
    #[inline]
    pub fn flags(&self) -> RangeFlags {
        self.state.load().0
    }

    /// The ticket with which its pages were last got, or the number of the last invalidation that hit it, whichever
    /// is newer (usvm's form of drm_gpusvm_range.notifier_seq). Zero before either.
    pub fn stamp(&self) -> u64 {
        self.state.load().1
    }

    /// Whether some of it was unmapped, or it is no longer in the space: nothing can be committed to it any more.
    pub fn is_gone(&self) -> bool {
        self.flags().intersects(RangeFlags::UNMAPPED | RangeFlags::REMOVED)
    }

    /// A ticket to take before looking at its mapping. Waits while an invalidation of the notifier runs.
    pub fn begin(&self) -> Ticket {
        self.notifier.read_begin()
    }

    /// Keeps invalidations out and checks that none hit this range since `ticket`: whatever was prepared may be
    /// published until the result is dropped.
    ///
    /// # Errors
    /// [`Stale`]: nothing is held and what was prepared must not be used.
    pub fn commit(&self, ticket: Ticket) -> Result<Commit<'_>, Stale> {
        self.state.commit(&self.notifier, ticket)
    }

    /// drm_gpusvm_range_pages_valid: whether its pages were got and no invalidation hit it since. `_guard` is what
    /// makes the answer last; it must be of this range's notifier.
    pub fn pages_valid(&self, _guard: &NotifierGuard<'_>) -> bool {
        self.pages_valid_hint()
    }

    /// As [`Range::pages_valid`], true only at the moment of asking.
    pub fn pages_valid_hint(&self) -> bool {
        self.flags().intersects(RangeFlags::HAS_DEVMEM_PAGES | RangeFlags::HAS_DMA_MAPPING)
    }

    /// In a notifier callback: the invalidation left the devices what they had, or a part, with the rights `before` tells of.
    pub(super) fn keep_pages(&self, before: RangeFlags) {
        self.state.keep_pages(before);
    }

    /// drm_gpusvm_range_unmap_pages outside a notifier callback: forgets that its pages were got. Gives the flags of
    /// before. (Inside one, [`super::Space::invalidate`] has done it already.)
    pub fn unmap_pages(&self) -> RangeFlags {
        let _guard = self.notifier.lock();
        self.state.drop_pages()
    }
}

impl<R: fmt::Debug> fmt::Debug for Range<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (flags, stamp) = self.state.load();
        f.debug_struct("Range")
            .field("span", &self.span())
            .field("flags", &flags)
            .field("stamp", &stamp)
            .field("data", &self.data)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ground::addr::{SZ_2M, SZ_4K, SZ_64K};

    fn range(span: Span) -> Range<()> {
        Range::new(
            span,
            Arc::new(Notifier::new(Span::sized(0, 512 << 20), 2)),
            RangeFlags::MIGRATE_DEVMEM,
            (),
        )
    }

    #[test]
    fn place_is_kept_whole() {
        for size in [SZ_4K, SZ_64K, SZ_2M, 1 << 30, 1 << 56] {
            let span = Span::sized(size, size);
            assert_eq!(range(span).span(), span);
        }
    }

    #[test]
    fn a_range_is_small() {
        // Two reference counts, place, notifier, state: 40 bytes, which malloc serves with 48.
        assert_eq!(size_of::<Range<()>>() + 2 * size_of::<usize>(), 40);
    }

    #[test]
    fn commit_needs_a_fresh_ticket() {
        let clock = super::super::notifier::Clock::new();
        let range = range(Span::sized(SZ_2M, SZ_2M));
        let old = range.begin();
        range.commit(old).unwrap().set_pages(RangeFlags::WRITABLE);
        assert!(range.pages_valid_hint());
        assert_eq!(
            range.flags(),
            RangeFlags::MIGRATE_DEVMEM | RangeFlags::HAS_DMA_MAPPING | RangeFlags::WRITABLE
        );

        // An invalidation elsewhere in the window is seen by the coarse question only.
        drop(range.notifier().invalidate(&clock));
        assert!(range.notifier().read_retry(old));
        assert!(range.commit(old).is_ok());

        range.state.hit(&range.notifier().invalidate(&clock), RangeFlags::empty());
        assert_eq!(range.flags(), RangeFlags::MIGRATE_DEVMEM);
        assert_eq!(range.commit(old).unwrap_err(), Stale::Changed);
        let new = range.begin();
        assert!(!range.notifier().read_retry(new));
        range.commit(new).unwrap().set_pages(RangeFlags::HAS_DEVMEM_PAGES);
        assert!(range.unmap_pages().contains(RangeFlags::HAS_DEVMEM_PAGES));
        assert_eq!(range.flags(), RangeFlags::MIGRATE_DEVMEM);

        range.state.hit(&range.notifier().invalidate(&clock), RangeFlags::UNMAPPED);
        assert_eq!(range.commit(range.begin()).unwrap_err(), Stale::Gone);
        assert!(range.is_gone());
    }
}
