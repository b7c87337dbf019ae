//! A process and devices made of values, for the residency tests: mappings, pages, userfaultfd registration, write
//! tracking, shadows, device memory and page tables. Each page holds one number. Broken contracts panic; stops are
//! injected by a seeded plan.

use std::collections::{BTreeMap, BTreeSet};
use std::result::Result as StdResult;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::ports::{
    AddressSpace, Backing, Bo, Device, DeviceInfo, Facts, FlipError, FlipStop, GpuAccess, HostMemory,
    Placement, Policy, Return, Shadow, Vma, VmaKind,
};
use crate::ground::addr::{PageMask, SZ_4K, Span};
use crate::ground::error::{Error, Result};

/// Where shadows begin, far from what the tests map.
const SHADOWS: u64 = 1 << 40;

/// Where a device's memory is lent.
const LENT: u64 = 1 << 41;

/// How many pages of it are remembered.
const LENDS: usize = 1 << 12;

/// A reproducible source of decisions.
#[derive(Debug)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }
}

/// Any policy there could be: by mode, or anything allowed.
#[derive(Debug)]
pub struct AnyPolicy {
    /// Migrate, reach over the link, share, or any of these.
    pub mode: AtomicU32,
    dice: Mutex<Dice>,
}

impl AnyPolicy {
    pub fn new(seed: u64, mode: u32) -> Arc<Self> {
        Arc::new(Self { mode: AtomicU32::new(mode), dice: Mutex::new(Dice::new(seed)) })
    }

    fn roll(&self, sides: u64) -> u64 {
        self.dice.lock().unwrap().roll(sides)
    }
}

impl Policy for AnyPolicy {
    fn name(&self) -> &'static str {
        "any"
    }

    fn gpu_access(&self, facts: &Facts<'_>) -> Placement {
        let share = facts.bracketed && facts.access == GpuAccess::Read;
        if facts.access == GpuAccess::Atomic {
            return Placement::Migrate;
        }
        match (self.mode.load(Ordering::Relaxed), self.roll(4)) {
            (0, _) | (3, 0) => Placement::Migrate,
            (1, _) | (3, 1) => Placement::Remote,
            (2, _) | (3, _) if share => Placement::Share,
            _ => Placement::Migrate,
        }
    }

    fn cpu_fault(&self, _facts: &Facts<'_>) -> Return {
        match self.roll(4) {
            0 => Return::Block(SZ_4K),
            1 => Return::Block(4 * SZ_4K),
            _ => Return::Range,
        }
    }
}

/// What the mapping of one page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Area {
    read: bool,
    write: bool,
    registered: bool,
    tracked: bool,
    poisoned: bool,
}

#[derive(Debug, Clone, Copy)]
struct Page {
    value: u64,
    written: bool,
}

#[derive(Debug, Default)]
struct Slot {
    len: u64,
    pages: BTreeMap<u64, u64>,
    app: Option<Span>,
}

/// What the kernel knows.
#[derive(Debug)]
struct Kernel {
    areas: BTreeMap<u64, Area>,
    pages: BTreeMap<u64, Page>,
    /// Registered by usvm's books, which unregistering goes by.
    book: BTreeSet<u64>,
    slots: BTreeMap<u64, Slot>,
    next_slot: u64,
    /// Device memory that was lent last.
    lent: BTreeMap<u64, u64>,
    /// Events that nobody read or handled yet: no page moves.
    changing: u32,
    dice: Dice,
    /// One in so many calls is stopped; 0 is never.
    stop_every: u64,
    /// Nothing arrives, for a reason that nobody knows.
    refuses: bool,
}

/// How a CPU access ends that does not wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touch {
    /// The page is there, and was read or written.
    Value(u64),
    /// A registered hole: usvm must serve it.
    Waits,
    /// No mapping, or not allowed.
    Segv,
    /// Poisoned.
    Sigbus,
}

/// How an access of the device's engine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// Done; what was there before.
    Value(u64),
    /// No translation that allows it.
    Faults,
    /// The page is the process's own and cannot be reached so.
    Link(Touch),
}

/// A process.
#[derive(Debug)]
pub struct FakeHost(Mutex<Kernel>);

fn pages_of(span: Span) -> impl Iterator<Item = u64> {
    (span.start..span.end).step_by(SZ_4K as usize)
}

fn addresses(span: Span, pages: &PageMask) -> Vec<(usize, u64)> {
    let all = (0..span.pages()).filter(|p| pages.get(*p));
    all.map(|p| (p, span.page_run(p, 1).start)).collect()
}

impl Kernel {
    fn stops(&mut self) -> bool {
        self.stop_every > 0 && self.dice.roll(self.stop_every) == 0
    }

    fn one_of(&mut self, errors: &[FlipError]) -> FlipError {
        errors[self.dice.roll(errors.len() as u64) as usize]
    }

    /// After how many of `pages` a transfer is stopped, and why.
    fn plan(&mut self, pages: usize, errors: &[FlipError]) -> Option<(usize, FlipError)> {
        if self.changing > 0 {
            return Some((0, FlipError::Again));
        }
        self.stops().then(|| (self.dice.roll(pages as u64 + 1) as usize, self.one_of(errors)))
    }

    fn registered(&self, addr: u64) -> bool {
        self.areas.get(&addr).is_some_and(|a| a.registered)
    }

    fn slot(&mut self, shadow: &Shadow) -> &mut Slot {
        let slot =
            self.slots.get_mut(&shadow.span.start).expect("a shadow that was not given out, or given back");
        assert_eq!(slot.len, shadow.span.len());
        slot
    }

    fn unmap(&mut self, span: Span) {
        for addr in pages_of(span) {
            self.areas.remove(&addr);
            self.pages.remove(&addr);
        }
    }

    /// Why a page cannot arrive at `addr`.
    fn refuses(&self, addr: u64, flip: bool) -> Option<FlipError> {
        match self.areas.get(&addr) {
            Some(a) if !a.registered => Some(FlipError::NoMapping),
            None => Some(FlipError::NoMapping),
            Some(a) if a.poisoned || self.pages.contains_key(&addr) => Some(FlipError::Exists),
            Some(a) if flip && !(a.write && a.read) => Some(FlipError::Mismatch),
            Some(_) => None,
        }
    }
}

impl FakeHost {
    pub fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Kernel {
            areas: BTreeMap::new(),
            pages: BTreeMap::new(),
            book: BTreeSet::new(),
            slots: BTreeMap::new(),
            next_slot: SHADOWS,
            lent: BTreeMap::new(),
            changing: 0,
            dice: Dice::new(seed),
            stop_every: 0,
            refuses: false,
        })))
    }

    fn kernel(&self) -> MutexGuard<'_, Kernel> {
        self.0.lock().unwrap_or_else(|p| p.into_inner())
    }

    pub fn set_stops(&self, one_in: u64) {
        self.kernel().stop_every = one_in;
    }

    pub fn set_refusing(&self, refuses: bool) {
        self.kernel().refuses = refuses;
    }

    pub fn set_changing(&self, changing: bool) {
        self.kernel().changing = changing.into();
    }

    /// mmap with MAP_FIXED of fresh anonymous memory.
    pub fn map(&self, span: Span) {
        let mut k = self.kernel();
        k.unmap(span);
        let area = Area { read: true, write: true, registered: false, tracked: false, poisoned: false };
        k.areas.extend(pages_of(span).map(|addr| (addr, area)));
    }

    pub fn unmap(&self, span: Span) {
        self.kernel().unmap(span);
    }

    /// mremap with MREMAP_FIXED. Everything of `from` must be mapped.
    pub fn remap(&self, from: Span, to: u64) {
        let mut k = self.kernel();
        k.unmap(Span::sized(to, from.len()));
        for addr in pages_of(from) {
            let there = addr - from.start + to;
            let area = k.areas.remove(&addr).expect("mapped");
            k.areas.insert(there, area);
            if let Some(page) = k.pages.remove(&addr) {
                k.pages.insert(there, page);
            }
        }
    }

    pub fn protect(&self, span: Span, read: bool, write: bool) {
        let mut k = self.kernel();
        for (_, area) in k.areas.range_mut(span.start..span.end) {
            (area.read, area.write) = (read, write);
        }
    }

    /// What MADV_DONTNEED does after the event was read.
    pub fn zap(&self, span: Span) {
        let mut k = self.kernel();
        k.pages.retain(|addr, _| !span.contains(*addr));
    }

    pub fn mapped(&self, addr: u64) -> bool {
        self.kernel().areas.contains_key(&addr)
    }

    /// Readable and writable.
    pub fn rights(&self, addr: u64) -> (bool, bool) {
        self.kernel().areas.get(&addr).map_or((false, false), |a| (a.read, a.write))
    }

    /// One CPU access to the page at `addr`: reads, or writes `new`.
    pub fn touch(&self, addr: u64, new: Option<u64>) -> Touch {
        let mut k = self.kernel();
        let Some(area) = k.areas.get(&addr).copied() else { return Touch::Segv };
        if new.is_some() && !area.write || new.is_none() && !area.read {
            return Touch::Segv;
        }
        if area.poisoned {
            return Touch::Sigbus;
        }
        if area.registered && !k.pages.contains_key(&addr) {
            return Touch::Waits;
        }
        let page = k.pages.entry(addr).or_insert(Page { value: 0, written: true });
        if let Some(new) = new {
            *page = Page { value: new, written: true };
        }
        Touch::Value(page.value)
    }

    /// As [`FakeHost::touch`], to change the page in one step. Gives what was there before.
    pub fn change(&self, addr: u64, change: impl Fn(u64) -> Option<u64>) -> Touch {
        match self.touch(addr, None) {
            Touch::Value(_) => {}
            other => return other,
        }
        let mut k = self.kernel();
        if !k.areas.get(&addr).is_some_and(|a| a.write) {
            return Touch::Segv;
        }
        let Some(page) = k.pages.get_mut(&addr) else { return Touch::Waits };
        let old = page.value;
        if let Some(value) = change(old) {
            *page = Page { value, written: true };
        }
        Touch::Value(old)
    }

    /// The page's content, if one is there; whether it is poisoned.
    pub fn peek(&self, addr: u64) -> (Option<u64>, bool) {
        let k = self.kernel();
        (k.pages.get(&addr).map(|p| p.value), k.areas.get(&addr).is_some_and(|a| a.poisoned))
    }

    pub fn peek_shadow(&self, shadow: &Shadow, page: usize) -> Option<u64> {
        self.kernel().slot(shadow).pages.get(&(page as u64)).copied()
    }

    /// The pages in a shadow.
    pub fn shadow_pages(&self, shadow: &Shadow) -> PageMask {
        let mut mask = PageMask::EMPTY;
        self.kernel().slot(shadow).pages.keys().for_each(|p| mask.set(*p as usize));
        mask
    }

    /// Shadow places given out, and pages under userfaultfd by the books and by the kernel.
    pub fn held(&self) -> (usize, usize, usize) {
        let k = self.kernel();
        (k.slots.len(), k.book.len(), k.areas.values().filter(|a| a.registered).count())
    }

    /// Closes the userfaultfd.
    pub fn unregister_all(&self) {
        let mut k = self.kernel();
        k.book.clear();
        k.areas.values_mut().for_each(|a| (a.registered, a.tracked) = (false, false));
    }

    /// Pages that the books have and the kernel has not. It may be the other way round: a place is registered for a new
    /// mapping before it is told that mremap took the old one away.
    pub fn misbooked(&self) -> Vec<u64> {
        let k = self.kernel();
        let real: BTreeSet<u64> =
            k.areas.iter().filter(|(_, a)| a.registered).map(|(addr, _)| *addr).collect();
        k.book.difference(&real).copied().collect()
    }
}

impl AddressSpace for FakeHost {
    fn find_vma(&self, addr: u64) -> Result<Option<Vma>> {
        let k = self.kernel();
        let page = addr & !(SZ_4K - 1);
        let Some(area) = k.areas.get(&page) else { return Ok(None) };
        let same =
            |addr: u64| k.areas.get(&addr).is_some_and(|a| (a.read, a.write) == (area.read, area.write));
        let mut span = Span::sized(page, SZ_4K);
        while same(span.end) {
            span.end += SZ_4K;
        }
        while same(span.start - SZ_4K) {
            span.start -= SZ_4K;
        }
        let kind = VmaKind::Anonymous;
        Ok(Some(Vma { span, read: area.read, write: area.write, exec: false, kind }))
    }

    fn populated(&self, span: Span) -> bool {
        let k = self.kernel();
        pages_of(span).all(|addr| k.pages.contains_key(&addr) || k.registered(addr))
    }
}

impl HostMemory for FakeHost {
    fn register(&self, span: Span) -> Result<()> {
        let mut k = self.kernel();
        if k.stops() {
            return Err(Error::OutOfHostMemory { what: "registering", detail: "injected".into() });
        }
        if !pages_of(span).all(|addr| k.areas.contains_key(&addr)) {
            return Err(Error::Gone { addr: span.start });
        }
        for addr in pages_of(span) {
            k.areas.get_mut(&addr).expect("looked").registered = true;
            k.book.insert(addr);
        }
        Ok(())
    }

    fn unregister(&self, span: Span) {
        let mut k = self.kernel();
        if k.changing > 0 {
            return;
        }
        for addr in pages_of(span) {
            if k.book.remove(&addr)
                && let Some(area) = k.areas.get_mut(&addr)
            {
                (area.registered, area.tracked) = (false, false);
            }
        }
    }

    fn let_go(&self, span: Span) {
        self.unregister(span);
        let mut k = self.kernel();
        if k.changing == 0 {
            k.areas
                .range_mut(span.start..span.end)
                .for_each(|(_, a)| (a.registered, a.tracked) = (false, false));
        }
    }

    fn forget(&self, span: Span) {
        let mut k = self.kernel();
        k.book.retain(|addr| !span.contains(*addr));
    }

    fn moved(&self, from: u64, to: u64, len: u64) {
        let mut k = self.kernel();
        let there: Vec<u64> = k.book.range(from..from + len).copied().collect();
        let old = Span::sized(from, len);
        k.book.retain(|addr| !old.contains(*addr));
        k.book.extend(there.iter().map(|addr| addr - from + to));
    }

    fn is_registered(&self, span: Span) -> bool {
        let k = self.kernel();
        pages_of(span).all(|addr| k.registered(addr))
    }

    fn registered(&self, span: Span) -> PageMask {
        let k = self.kernel();
        let mut mask = PageMask::EMPTY;
        pages_of(span).filter(|addr| k.registered(*addr)).for_each(|addr| mask.set(span.page_index(addr)));
        mask
    }

    fn mappings_change(&self) -> bool {
        self.kernel().changing > 0
    }

    fn refuses_while_changing(&self) -> bool {
        true
    }

    fn present(&self, span: Span) -> PageMask {
        let k = self.kernel();
        let mut mask = PageMask::EMPTY;
        if let Some(slot) = k.slots.get(&span.start) {
            slot.pages.keys().for_each(|page| mask.set(*page as usize));
            return mask;
        }
        k.pages.range(span.start..span.end).for_each(|(addr, _)| mask.set(span.page_index(*addr)));
        mask
    }

    fn is_huge(&self, _span: Span) -> bool {
        false
    }

    fn shadow_alloc(&self, len: u64) -> Result<Shadow> {
        let mut k = self.kernel();
        if k.stops() {
            return Err(Error::OutOfHostMemory { what: "a shadow", detail: "injected".into() });
        }
        let start = k.next_slot;
        k.next_slot += len;
        k.slots.insert(start, Slot { len, ..Slot::default() });
        Ok(Shadow { span: Span::sized(start, len) })
    }

    fn shadow_free(&self, shadow: Shadow) {
        let mut k = self.kernel();
        k.slot(&shadow);
        k.slots.remove(&shadow.span.start);
    }

    fn shadow_discard(&self, shadow: Shadow) {
        self.shadow_free(shadow);
    }

    fn shadow_release(&self, shadow: &Shadow, pages: &PageMask) {
        self.kernel().slot(shadow).pages.retain(|page, _| !pages.get(*page as usize));
    }

    fn shadow_adopt_prepared(&self, shadow: &Shadow) -> bool {
        let mut k = self.kernel();
        let ready = k.dice.roll(2) == 0;
        let slot = k.slot(shadow);
        assert!(slot.pages.is_empty(), "only an empty shadow takes prepared memory");
        if ready {
            slot.pages.extend((0..slot.len / SZ_4K).map(|page| (page, 0)));
        }
        ready
    }

    fn flip_out(&self, app: Span, shadow: &Shadow, pages: &PageMask) -> StdResult<PageMask, FlipStop> {
        let mut k = self.kernel();
        assert_eq!(app.len(), shadow.span.len());
        let first = *k.slot(shadow).app.get_or_insert(app);
        assert_eq!(first, app, "a shadow serves one range");
        let there: Vec<_> =
            addresses(app, pages).into_iter().filter(|(_, a)| k.pages.contains_key(a)).collect();
        let errors = [FlipError::Again, FlipError::Busy, FlipError::Mismatch, FlipError::NoMemory];
        let plan = k.plan(there.len(), &errors);
        let mut moved = PageMask::EMPTY;
        for (n, (page, addr)) in there.iter().enumerate() {
            if let Some((after, why)) = plan
                && n == after
            {
                return Err(FlipStop { moved, why });
            }
            let area = k.areas[addr];
            if !area.registered {
                return Err(FlipStop { moved, why: FlipError::NoMapping });
            }
            if !(area.write && area.read) {
                return Err(FlipStop { moved, why: FlipError::Mismatch });
            }
            let value = k.pages.remove(addr).expect("present").value;
            let before = k.slot(shadow).pages.insert(*page as u64, value);
            assert_eq!(before, None, "page {page} of the shadow of {app} is occupied");
            moved.set(*page);
        }
        match plan {
            Some((_, why)) => Err(FlipStop { moved, why }),
            None => Ok(moved),
        }
    }

    fn flip_in(&self, app: Span, shadow: &Shadow, pages: &PageMask) -> StdResult<(), FlipStop> {
        assert_eq!(app.len(), shadow.span.len());
        self.arrive(app, pages, true, |k, page| k.slot(shadow).pages.remove(&page))
    }

    fn copy_in(&self, app: Span, shadow: &Shadow, pages: &PageMask) -> StdResult<(), FlipStop> {
        assert_eq!(app.len(), shadow.span.len());
        self.arrive(app, pages, false, |k, page| k.slot(shadow).pages.get(&page).copied())
    }

    fn fill_from(&self, app: Span, from: u64, pages: &PageMask) -> StdResult<(), FlipStop> {
        self.arrive(app, pages, false, |k, page| k.lent.get(&(from + page * SZ_4K)).copied())
    }

    fn unshare(&self, _app: Span, _pages: &PageMask) {}

    fn track(&self, app: Span) -> StdResult<(), FlipError> {
        let mut k = self.kernel();
        if k.stops() {
            return Err(FlipError::Again);
        }
        for addr in pages_of(app) {
            let Some(area) = k.areas.get_mut(&addr).filter(|a| a.registered) else {
                return Err(FlipError::NoMapping);
            };
            area.tracked = true;
            if let Some(page) = k.pages.get_mut(&addr) {
                page.written = false;
            }
        }
        Ok(())
    }

    fn take_written(&self, app: Span) -> Option<PageMask> {
        let mut k = self.kernel();
        if !pages_of(app).all(|addr| k.areas.get(&addr).is_some_and(|a| a.registered && a.tracked)) {
            return None;
        }
        let mut mask = PageMask::EMPTY;
        for (addr, page) in k.pages.range_mut(app.start..app.end) {
            if std::mem::take(&mut page.written) {
                mask.set(app.page_index(*addr));
            }
        }
        Some(mask)
    }

    fn read_home(&self, from: u64, to: &mut [u8]) -> Result<usize> {
        for (page, bytes) in to.chunks_mut(SZ_4K as usize).enumerate() {
            let addr = from + page as u64 * SZ_4K;
            let (value, _) = self.peek(addr);
            match value.filter(|_| self.rights(addr).0) {
                Some(value) => bytes[..8].copy_from_slice(&value.to_ne_bytes()),
                None if page == 0 => return Err(Error::Gone { addr }),
                None => return Ok(page * SZ_4K as usize),
            }
        }
        Ok(to.len())
    }

    fn zero_fill(&self, page: u64) -> StdResult<(), FlipError> {
        let mut k = self.kernel();
        if k.changing > 0 || k.stops() {
            return Err(FlipError::Again);
        }
        match k.refuses(page, false) {
            None => {
                k.pages.insert(page, Page { value: 0, written: true });
                Ok(())
            }
            Some(FlipError::Exists) => Ok(()),
            Some(why) => Err(why),
        }
    }

    fn wake(&self, _span: Span) {}

    fn poison(&self, page: u64) {
        let mut k = self.kernel();
        if k.refuses(page, false).is_none() {
            k.areas.get_mut(&page).expect("looked").poisoned = true;
        }
    }
}

impl FakeHost {
    /// Pages arrive at `app`, each as `source` gives it.
    fn arrive(
        &self,
        app: Span,
        pages: &PageMask,
        flip: bool,
        source: impl Fn(&mut Kernel, u64) -> Option<u64>,
    ) -> StdResult<(), FlipStop> {
        let mut k = self.kernel();
        let list = addresses(app, pages);
        if k.refuses {
            return Err(FlipStop { moved: PageMask::EMPTY, why: FlipError::Os(5) });
        }
        let plan =
            k.plan(list.len(), &[FlipError::Again, FlipError::Again, FlipError::Busy, FlipError::NoMemory]);
        let mut moved = PageMask::EMPTY;
        for (n, (page, addr)) in list.iter().enumerate() {
            if let Some((after, why)) = plan
                && n == after
            {
                return Err(FlipStop { moved, why });
            }
            if let Some(why) = k.refuses(*addr, flip) {
                return Err(FlipStop { moved, why });
            }
            let value = source(&mut k, *page as u64).expect("a page that arrives has a source");
            k.pages.insert(*addr, Page { value, written: true });
            moved.set(*page);
        }
        match plan {
            Some((_, why)) if !list.is_empty() && moved != *pages => Err(FlipStop { moved, why }),
            _ => Ok(()),
        }
    }
}

/// What the device knows.
#[derive(Debug)]
struct Card {
    /// Allocated blocks: offset to length.
    blocks: BTreeMap<u64, u64>,
    memory: BTreeMap<u64, u64>,
    table: BTreeMap<u64, (Backing, GpuAccess)>,
    referenced: BTreeSet<u64>,
    dice: Dice,
    garbage: u64,
    fail_every: u64,
    lost: bool,
}

/// A device.
#[derive(Debug)]
pub struct FakeDevice {
    host: Arc<FakeHost>,
    info: DeviceInfo,
    card: Mutex<Card>,
    /// Where an access over the link waits; zero for nowhere.
    pub reached: AtomicU64,
    /// Pages that can still be downloaded: with the next one the device is lost.
    pub lasts: AtomicU64,
}

impl FakeDevice {
    pub fn new(host: Arc<FakeHost>, vram_pages: u64, system_atomics: bool, seed: u64) -> Arc<Self> {
        Self::with_faults(host, vram_pages, system_atomics, seed, true)
    }

    pub fn with_faults(
        host: Arc<FakeHost>,
        vram_pages: u64,
        system_atomics: bool,
        seed: u64,
        recoverable_faults: bool,
    ) -> Arc<Self> {
        let vram_bytes = vram_pages * SZ_4K;
        let info = DeviceInfo {
            name: "values".into(),
            vram_bytes,
            cpu_visible_bytes: vram_bytes,
            recoverable_faults,
            min_page: SZ_4K,
            system_atomics,
        };
        let card = Card {
            blocks: BTreeMap::new(),
            memory: BTreeMap::new(),
            table: BTreeMap::new(),
            referenced: BTreeSet::new(),
            dice: Dice::new(seed),
            garbage: 0xdead_0000_0000_0000,
            fail_every: 0,
            lost: false,
        };
        Arc::new(Self {
            host,
            info,
            card: Mutex::new(card),
            reached: AtomicU64::new(0),
            lasts: AtomicU64::new(u64::MAX),
        })
    }

    fn card(&self) -> MutexGuard<'_, Card> {
        self.card.lock().unwrap_or_else(|p| p.into_inner())
    }

    pub fn set_failures(&self, one_in: u64) {
        self.card().fail_every = one_in;
    }

    pub fn lose(&self) {
        self.card().lost = true;
    }

    pub fn peek(&self, offset: u64) -> u64 {
        self.card().memory[&offset]
    }

    pub fn table(&self) -> Vec<(u64, Backing, GpuAccess)> {
        self.card().table.iter().map(|(addr, (backing, access))| (*addr, *backing, *access)).collect()
    }

    /// One access by the device's engine: `change` gets the page's number and gives the new one, if it writes. Whatever
    /// takes the translation away waits until the access is done.
    pub fn engine(&self, addr: u64, change: impl Fn(u64) -> Option<u64>) -> Engine {
        let mut card = self.card();
        let Some((backing, access)) = card.table.get(&addr).copied() else { return Engine::Faults };
        let old = match backing {
            Backing::Vram(offset) => card.memory[&offset],
            Backing::System => match self.host.touch(addr, None) {
                Touch::Value(value) => value,
                other => return Engine::Link(other),
            },
        };
        let new = change(old);
        if new.is_some() && !access.writes() {
            return Engine::Faults;
        }
        card.referenced.insert(addr);
        match (new, backing) {
            (Some(new), Backing::Vram(offset)) => {
                card.memory.insert(offset, new);
            }
            (Some(_), Backing::System) => match self.host.change(addr, &change) {
                Touch::Value(_) => {}
                other => return Engine::Link(other),
            },
            (None, _) => {}
        }
        Engine::Value(old)
    }

    fn alive(&self, bo: &Bo, at: u64, len: u64) -> Result<MutexGuard<'_, Card>> {
        let card = self.card();
        assert_eq!(card.blocks.get(&bo.offset), Some(&bo.len), "a block of this device");
        assert!(at + len <= bo.len);
        if card.lost {
            return Err(Error::DeviceLost { reason: "injected".into() });
        }
        Ok(card)
    }
}

impl Device for FakeDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn vram_alloc(&self, len: u64) -> Option<Bo> {
        let mut card = self.card();
        if card.fail_every > 0 && {
            let n = card.fail_every;
            card.dice.roll(n) == 0
        } {
            return None;
        }
        let mut offset = 0;
        for (start, size) in &card.blocks {
            if offset + len <= *start {
                break;
            }
            offset = start + size;
        }
        if offset + len > self.info.vram_bytes {
            return None;
        }
        card.blocks.insert(offset, len);
        for page in pages_of(Span::sized(offset, len)) {
            card.garbage += 1;
            let garbage = card.garbage;
            card.memory.insert(page, garbage);
        }
        Some(Bo { offset, len })
    }

    fn vram_free(&self, bo: Bo) {
        let mut card = self.card();
        assert_eq!(card.blocks.remove(&bo.offset), Some(bo.len), "freed once");
        let inside = Span::sized(bo.offset, bo.len);
        for (addr, (backing, _)) in &card.table {
            assert!(
                !matches!(backing, Backing::Vram(o) if inside.contains(*o)),
                "{addr:#x} still maps freed memory"
            );
        }
        card.memory.retain(|page, _| !inside.contains(*page));
    }

    fn vram_free_bytes(&self) -> u64 {
        self.info.vram_bytes - self.card().blocks.values().sum::<u64>()
    }

    fn upload(&self, bo: &Bo, shadow: &Shadow, at: u64, len: u64) -> Result<()> {
        let mut card = self.alive(bo, at, len)?;
        for offset in pages_of(Span::sized(at, len)) {
            let value = self.host.kernel().slot(shadow).pages.get(&(offset / SZ_4K)).copied();
            card.memory.insert(bo.offset + offset, value.expect("uploads read what is in the shadow"));
        }
        Ok(())
    }

    fn upload_bytes(&self, bo: &Bo, at: u64, bytes: &[u8]) -> Result<()> {
        let mut card = self.alive(bo, at, bytes.len() as u64)?;
        for (page, bytes) in bytes.chunks(SZ_4K as usize).enumerate() {
            let value = u64::from_ne_bytes(bytes[..8].try_into().expect("eight"));
            card.memory.insert(bo.offset + at + page as u64 * SZ_4K, value);
        }
        Ok(())
    }

    fn download(&self, bo: &Bo, shadow: &Shadow, at: u64, len: u64) -> Result<()> {
        let mut card = self.alive(bo, at, len)?;
        for offset in pages_of(Span::sized(at, len)) {
            if self.lasts.load(Ordering::Relaxed) == 0 {
                card.lost = true;
                return Err(Error::DeviceLost { reason: "injected".into() });
            }
            self.lasts.fetch_sub(1, Ordering::Relaxed);
            let value = card.memory[&(bo.offset + offset)];
            self.host.kernel().slot(shadow).pages.insert(offset / SZ_4K, value);
        }
        Ok(())
    }

    fn clear(&self, bo: &Bo, at: u64, len: u64) -> Result<()> {
        let mut card = self.alive(bo, at, len)?;
        for offset in pages_of(Span::sized(at, len)) {
            card.memory.insert(bo.offset + offset, 0);
        }
        Ok(())
    }

    fn lend(&self, bo: &Bo, _len: u64) -> Option<u64> {
        let card = self.alive(bo, 0, bo.len).ok()?;
        let mut host = self.host.kernel();
        if host.dice.roll(4) == 0 {
            return None;
        }
        let from = host.lent.keys().next_back().map_or(LENT, |last| last + SZ_4K);
        for offset in pages_of(Span::sized(0, bo.len)) {
            let value = card.memory.get(&(bo.offset + offset)).copied();
            host.lent.insert(from + offset, value.unwrap_or(card.garbage));
        }
        while host.lent.len() > LENDS {
            host.lent.pop_first();
        }
        Some(from)
    }

    fn is_zero(&self, bo: &Bo, at: u64, len: u64) -> bool {
        let card = self.card();
        !card.lost && pages_of(Span::sized(at, len)).all(|offset| card.memory[&(bo.offset + offset)] == 0)
    }

    fn bind(&self, va: Span, backing: Backing, access: GpuAccess) -> Result<()> {
        let mut card = self.card();
        assert!(
            va.len().is_power_of_two() && va.start.is_multiple_of(va.len()),
            "{va} is not aligned to its size"
        );
        for addr in pages_of(va) {
            let backing = match backing {
                Backing::Vram(offset) => Backing::Vram(offset + addr - va.start),
                Backing::System => Backing::System,
            };
            if let Backing::Vram(offset) = backing {
                assert!(card.memory.contains_key(&offset), "maps memory that is not allocated");
            }
            card.table.insert(addr, (backing, access));
        }
        Ok(())
    }

    fn unbind(&self, va: Span) -> bool {
        let mut card = self.card();
        card.table.retain(|addr, _| !va.contains(*addr));
        let before = card.referenced.len();
        card.referenced.retain(|addr| !va.contains(*addr));
        card.referenced.len() < before
    }

    fn reaches(&self, va: Span) -> bool {
        va.contains(self.reached.load(Ordering::Relaxed))
    }

    fn test_and_clear_referenced(&self, va: Span) -> bool {
        let mut card = self.card();
        let before = card.referenced.len();
        card.referenced.retain(|addr| !va.contains(*addr));
        card.referenced.len() < before
    }
}
