//! Getting pages: what a range's pages are, and when that knowledge holds.
//!
//! # Overview
//! drm_gpusvm_range_get_pages makes every page of a range present (hmm_range_fault), refuses what it cannot map as one,
//! and records under the notifier lock that the range has a mapping. [`Space::get_pages`] is that bookkeeping; where the
//! pages come from is a [`PageSource`], so that recorded kernel traces and models can drive it.
//!
//! | the pages are | answer |
//! |---|---|
//! | all system | mapped; with `devmem_only` EFAULT |
//! | all of one device allocation | mapped, HAS_DEVMEM_PAGES |
//! | of two allocations of one device | EOPNOTSUPP; with `allow_mixed` mapped |
//! | device and system, in any order | EOPNOTSUPP; with `allow_mixed` mapped |
//! | of two devices | EOPNOTSUPP |
//! | some system, with `devmem_only` | EFAULT, if no rule above was broken at a page before |
//! | missing after the source was asked to bring them | EFAULT |
//!
//! # Differences from the kernel
//! While a range's pages are valid the kernel answers "still valid" to every caller, even one who asks for more: a
//! write after a read returns success with no page made writable. Here the short cut is taken only if what is held
//! answers what is asked: got for writing if writing is asked, device memory only or not mixed if that is asked.
//! Otherwise the pages are got again; if that fails, what was held stays valid. [`super::SpaceConfig::kernel_exact`]
//! brings the kernel's behaviour back for traces. Retries are bounded by number, not by time.
//!
//! # Locking
//! The source is asked with no lock held. The result is recorded under the notifier lock, for read.

use super::notifier::{RangeFlags, Stale, Ticket};
use super::range::Range;
use super::{Ctx, Space};
use crate::ground::addr::{SZ_4K, Span};
use crate::ground::error::{Error, Result};

/// How often [`Space::get_pages`] starts over before it gives up.
const MAX_TRIES: u32 = 64;

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PageKind {
    /// Nowhere yet.
    Missing,
    /// System memory.
    System,
    /// Device memory.
    Device {
        /// Which device (a page's pagemap).
        device: u32,
        /// Which allocation of it (a page's zone_device_data).
        allocation: u64,
    },
}

/// Pages that lie together: `1 << order` of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Folio {
    /// Where they are.
    pub kind: PageKind,
    /// log2 of their number.
    pub order: u8,
}

/// Where pages come from: hmm_range_fault.
pub trait PageSource {
    /// Makes every page of `span` present, writable too if `write`, bringing home pages of devices that are not the
    /// caller's, and tells what they are, in order and without gaps. A folio may reach over the end of `span`.
    ///
    /// # Errors
    /// [`Error::Gone`] where nothing is mapped or nothing can be accessed; [`Error::NotWritable`];
    /// [`Error::Busy`] and [`Error::Again`] to be asked again.
    fn fault(&self, span: Span, write: bool) -> Result<Vec<Folio>>;
}

/// What [`Space::get_pages`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GotPages {
    /// The ticket under which the pages are valid, for a later [`Range::commit`].
    pub ticket: Ticket,
    /// The pages, or `None` if those of before are still valid.
    pub fresh: Option<Vec<Folio>>,
}

impl<R> Space<R> {
    /// Gets the pages of `range` for the device and records it: HAS_DMA_MAPPING, HAS_DEVMEM_PAGES and the stamp.
    /// Mirrors drm_gpusvm_range_get_pages; the differences are in the module's chapter of that name. Safe from any
    /// thread.
    ///
    /// # Errors
    /// As in the module's table; [`Error::Gone`] for an unmapped range (collect garbage and find it again);
    /// [`Error::Mixed`] (bring it home and try again); [`Error::Again`] or [`Error::Busy`] after a bounded number of
    /// tries; whatever else the source gives.
    pub fn get_pages(&self, range: &Range<R>, source: &impl PageSource, ctx: &Ctx) -> Result<GotPages> {
        let mut last = Error::Again { what: "getting pages", tries: MAX_TRIES };
        for _ in 0..MAX_TRIES {
            let ticket = range.begin();
            if let Ok(commit) = range.commit(ticket)
                && self.still_good(range, ctx)
            {
                commit.touch();
                return Ok(GotPages { ticket, fresh: None });
            }
            let folios = match source.fault(range.span(), !ctx.read_only) {
                Ok(folios) => folios,
                Err(e @ (Error::Busy { .. } | Error::Again { .. })) => {
                    last = e;
                    continue;
                }
                Err(e) => return Err(e),
            };
            match range.commit(ticket) {
                Ok(commit) => {
                    commit.set_pages(classify(range.span(), &folios, ctx)?);
                    return Ok(GotPages { ticket, fresh: Some(folios) });
                }
                Err(Stale::Changed) => {}
                Err(Stale::Gone) => return Err(Error::Gone { addr: range.start() }),
            }
        }
        Err(last)
    }

    /// Whether the pages that `range` holds answer what `ctx` asks.
    fn still_good(&self, range: &Range<R>, ctx: &Ctx) -> bool {
        let held = range.flags();
        range.pages_valid_hint()
            && (self.kernel_exact()
                || (ctx.read_only || held.contains(RangeFlags::WRITABLE))
                    && (!ctx.devmem_only || held.contains(RangeFlags::HAS_DEVMEM_PAGES))
                    && (!held.contains(RangeFlags::MIXED) || ctx.allow_mixed && !ctx.devmem_only))
    }
}

/// Whether pages can be mapped as one, and what the range then has.
fn classify(span: Span, folios: &[Folio], ctx: &Ctx) -> Result<RangeFlags> {
    let mixed = Err(Error::Mixed { span });
    let gone = |page: usize| Err(Error::Gone { addr: span.start + (page as u64) * SZ_4K });
    let mut flags = RangeFlags::empty();
    flags.set(RangeFlags::WRITABLE, !ctx.read_only);
    let (mut allocation_of, mut device_of, mut system) = (None, None, false);
    let mut page = 0;
    for folio in folios {
        if page >= span.pages() {
            break;
        }
        match folio.kind {
            PageKind::Missing => return gone(page),
            PageKind::Device { device, allocation } => {
                let other_allocation = page > 0 && allocation_of != Some(allocation);
                let other_device = device_of.is_some_and(|before| before != device);
                if other_allocation && !ctx.allow_mixed || other_device {
                    return mixed;
                }
                (allocation_of, device_of) = (Some(allocation), Some(device));
                flags |= RangeFlags::HAS_DEVMEM_PAGES;
            }
            PageKind::System => {
                if device_of.is_some() && !ctx.allow_mixed {
                    return mixed;
                }
                if ctx.devmem_only {
                    return gone(page);
                }
                system = true;
            }
        }
        page += 1 << folio.order;
    }
    flags.set(RangeFlags::MIXED, system && device_of.is_some());
    if page < span.pages() { gone(page) } else { Ok(flags) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ground::addr::SZ_64K;

    const SPAN: Span = Span::sized(SZ_64K, SZ_64K);

    fn of(kinds: &[(PageKind, u8)], ctx: Ctx) -> std::result::Result<RangeFlags, i32> {
        let folios: Vec<Folio> = kinds.iter().map(|&(kind, order)| Folio { kind, order }).collect();
        classify(SPAN, &folios, &ctx).map_err(|e| e.errno())
    }

    fn dev(device: u32, allocation: u64) -> PageKind {
        PageKind::Device { device, allocation }
    }

    #[test]
    fn pages_are_judged_as_the_kernel_does() {
        use PageKind::{Missing, System};
        let read = Ctx { read_only: true, ..Ctx::default() };
        let mix = Ctx { allow_mixed: true, ..read };
        let only = Ctx { devmem_only: true, ..read };
        let both = Ctx { devmem_only: true, ..mix };
        let (none, devmem) = (RangeFlags::empty(), RangeFlags::HAS_DEVMEM_PAGES);
        assert_eq!(of(&[(System, 4)], read), Ok(none));
        assert_eq!(of(&[(System, 9)], read), Ok(none), "a folio may reach over the end");
        assert_eq!(of(&[(System, 4)], Ctx::default()), Ok(RangeFlags::WRITABLE));
        assert_eq!(of(&[(System, 4)], only), Err(libc::EFAULT));
        assert_eq!(of(&[(System, 3)], read), Err(libc::EFAULT), "too few pages");
        assert_eq!(of(&[(dev(1, 7), 4)], read), Ok(devmem));
        assert_eq!(of(&[(dev(1, 7), 4)], only), Ok(devmem));
        assert_eq!(of(&[(dev(1, 7), 3), (dev(1, 7), 3)], read), Ok(devmem));
        for (pages, mixed) in [
            ([(dev(1, 7), 3), (dev(1, 8), 3)], Ok(devmem)),
            ([(dev(1, 7), 3), (System, 3)], Ok(devmem | RangeFlags::MIXED)),
            ([(System, 3), (dev(1, 7), 3)], Ok(devmem | RangeFlags::MIXED)),
            ([(dev(1, 7), 3), (dev(2, 7), 3)], Err(libc::EOPNOTSUPP)),
            ([(dev(1, 7), 3), (dev(2, 8), 3)], Err(libc::EOPNOTSUPP)),
        ] {
            assert_eq!(of(&pages, read), Err(libc::EOPNOTSUPP), "{pages:?}");
            assert_eq!(of(&pages, mix), mixed, "{pages:?}");
        }
        assert_eq!(of(&[(dev(1, 7), 3), (System, 3)], both), Err(libc::EFAULT));
        assert_eq!(of(&[(dev(1, 7), 3), (Missing, 3)], mix), Err(libc::EFAULT));
    }
}
