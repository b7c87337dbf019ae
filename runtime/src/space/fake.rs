//! A process made of values, for tests: mappings, pages, and the events the kernel would send.

use super::pages::{Folio, PageKind, PageSource};
use super::ports::{AddressSpace, Vma, VmaKind};
use super::{Event, EventKind};
use crate::ground::addr::{SZ_2M, SZ_4K, Span};
use crate::ground::error::{Error, Result};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

/// One page's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page {
    /// A page of its own, part of a folio of `1 << order` pages.
    System(u8),
    /// The shared zero page.
    Zero,
    /// Device memory of one allocation of device 1.
    Device(u64),
}

#[derive(Debug, Default)]
struct Mm {
    /// Ascending and disjoint.
    vmas: Vec<Vma>,
    pages: BTreeMap<u64, Page>,
    /// Device pages belong to somebody else.
    foreign: bool,
}

/// A process.
#[derive(Debug, Default)]
pub struct FakeMm(Mutex<Mm>);

/// An anonymous mapping with these rights.
pub fn anon(span: Span, read: bool, write: bool) -> Vma {
    Vma { span, read, write, exec: false, kind: VmaKind::Anonymous }
}

impl FakeMm {
    /// A process with one readable and writable anonymous mapping.
    pub fn with(span: Span) -> Self {
        let mm = Self::default();
        mm.map(anon(span, true, true));
        mm
    }

    fn mm(&self) -> MutexGuard<'_, Mm> {
        self.0.lock().unwrap()
    }

    /// mmap with MAP_FIXED. Neighbours of the same kind merge.
    pub fn map(&self, vma: Vma) -> Vec<Event> {
        let events = self.unmap(vma.span);
        let mut mm = self.mm();
        mm.vmas.push(vma);
        mm.merge();
        events
    }

    /// munmap.
    pub fn unmap(&self, span: Span) -> Vec<Event> {
        let mut mm = self.mm();
        let mut events = mm.split(span);
        let mapped = mm.vmas.iter().any(|v| v.span.overlaps(span));
        mm.vmas.retain(|v| !span.covers(v.span));
        mm.zap(span);
        if mapped {
            events.push(Event::new(EventKind::Unmap, span));
        }
        events
    }

    /// mprotect.
    pub fn protect(&self, span: Span, read: bool, write: bool) -> Vec<Event> {
        let mut mm = self.mm();
        let mut events = mm.split(span);
        for vma in mm.vmas.iter_mut().filter(|v| span.covers(v.span)) {
            (vma.read, vma.write) = (read, write);
            events.push(Event::new(EventKind::ProtVma, vma.span));
        }
        mm.merge();
        events
    }

    /// madvise(MADV_DONTNEED).
    pub fn discard(&self, span: Span) -> Vec<Event> {
        self.mm().zap(span);
        vec![Event::new(EventKind::Clear, span)]
    }

    /// Puts pages into the mapped part of `span`.
    pub fn fill(&self, span: Span, page: Page) {
        let mut mm = self.mm();
        let at = span.page_aligned();
        for addr in (at.start..at.end).step_by(SZ_4K as usize) {
            if mm.vma(addr).is_some() {
                mm.pages.insert(addr, page);
            }
        }
    }

    /// Puts `page` only where nothing is yet.
    pub fn touch(&self, span: Span) {
        let mut mm = self.mm();
        let at = span.page_aligned();
        for addr in (at.start..at.end).step_by(SZ_4K as usize) {
            if mm.vma(addr).is_some() {
                mm.pages.entry(addr).or_insert(Page::System(0));
            }
        }
    }

    /// Whether device pages belong to somebody else.
    pub fn set_foreign(&self, foreign: bool) {
        self.mm().foreign = foreign;
    }
}

impl Mm {
    fn vma(&self, addr: u64) -> Option<Vma> {
        self.vmas.iter().copied().find(|v| v.span.contains(addr))
    }

    fn zap(&mut self, span: Span) {
        self.pages.retain(|addr, _| !span.contains(*addr));
    }

    /// Splits mappings at both ends of `span`. A split inside a 2 MiB block that the mapping holds whole clears it.
    fn split(&mut self, span: Span) -> Vec<Event> {
        let mut events = Vec::new();
        for at in [span.start, span.end] {
            let Some(i) = self.vmas.iter().position(|v| v.span.start < at && at < v.span.end) else {
                continue;
            };
            let block = Span::around(at, SZ_2M);
            if block.start != at && self.vmas[i].span.covers(block) {
                events.push(Event::new(EventKind::Clear, block));
            }
            let mut tail = self.vmas[i];
            tail.span.start = at;
            self.vmas[i].span.end = at;
            self.vmas.insert(i + 1, tail);
        }
        events
    }

    fn merge(&mut self) {
        self.vmas.sort_by_key(|v| v.span.start);
        let mut merged: Vec<Vma> = Vec::new();
        for vma in self.vmas.drain(..) {
            match merged.last_mut() {
                Some(last) if last.span.end == vma.span.start && Vma { span: vma.span, ..*last } == vma => {
                    last.span.end = vma.span.end;
                }
                _ => merged.push(vma),
            }
        }
        self.vmas = merged;
    }
}

impl AddressSpace for FakeMm {
    fn find_vma(&self, addr: u64) -> Result<Option<Vma>> {
        Ok(self.mm().vma(addr))
    }

    fn populated(&self, span: Span) -> bool {
        let mm = self.mm();
        let mut addr = span.start;
        while addr < span.end {
            if !mm.vma(addr).is_some_and(|v| v.read) {
                return false;
            }
            addr += match mm.pages.get(&addr) {
                Some(Page::System(order)) => SZ_4K << order,
                Some(Page::Zero) => SZ_4K,
                Some(Page::Device(_)) if !mm.foreign => SZ_4K,
                _ => return false,
            };
        }
        true
    }
}

impl PageSource for FakeMm {
    fn fault(&self, span: Span, write: bool) -> Result<Vec<Folio>> {
        let mut mm = self.mm();
        let mut folios = Vec::new();
        let mut addr = span.start;
        while addr < span.end {
            let vma = mm.vma(addr).ok_or(Error::Gone { addr })?;
            if !vma.read {
                return Err(Error::Gone { addr });
            }
            if write && !vma.write {
                return Err(Error::NotWritable { addr });
            }
            let page = match mm.pages.get(&addr) {
                Some(Page::Device(a)) if !mm.foreign => Page::Device(*a),
                Some(Page::System(order)) => Page::System(*order),
                Some(Page::Zero) if !write => Page::Zero,
                _ => Page::System(0),
            };
            mm.pages.insert(addr, page);
            let (kind, order) = match page {
                Page::System(order) => (PageKind::System, order),
                Page::Zero => (PageKind::System, 0),
                Page::Device(allocation) => (PageKind::Device { device: 1, allocation }, 0),
            };
            folios.push(Folio { kind, order });
            addr += SZ_4K << order;
        }
        Ok(folios)
    }
}
