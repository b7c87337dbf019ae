//! The residency machine against a flat model: whatever the program, the devices and the kernel do, in whatever order
//! and wherever a page refuses to move, every page reads as it was last written.

mod program;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};

use proptest::prelude::*;

use self::program::{Cell, Layout, Op, ops, small};
use super::mover::{Mover, Range};
use super::ports::{Advice, Backing, Device, GpuAccess, HostMemory};
use super::residency::bytes;
use super::residency_fake::{AnyPolicy, Dice, Engine, FakeDevice, FakeHost, Touch};
use super::svm::{Served, Svm, Wait, Want};
use super::{Space, SpaceConfig};
use crate::ground::addr::{SZ_2M, SZ_4K, SZ_64K, Span};
use crate::ground::error::Error;
use crate::observe::observer::Observer;
use crate::observe::stats::{Cause, Gauge};

const BASE: u64 = 16 << 30;
const ALL: Span = Span::new(0, u64::MAX);
/// CPU faults of one access before it counts as hanging.
const PATIENCE: u32 = 3000;

fn at(page: usize) -> u64 {
    BASE + page as u64 * SZ_4K
}

fn part(first: usize, count: usize) -> Span {
    Span::new(at(first), at(first + count))
}

fn each(span: Span) -> impl Iterator<Item = u64> {
    (span.start..span.end).step_by(SZ_4K as usize)
}

/// A change of the mappings that the kernel has made.
#[derive(Debug, Clone, Copy)]
enum Change {
    Unmapped(Span),
    Moved { from: u64, to: u64, len: u64 },
}

impl Change {
    fn concerns(&self, addr: u64) -> bool {
        match *self {
            Change::Unmapped(span) => span.contains(addr),
            Change::Moved { from, to, len } => {
                Span::sized(from, len).contains(addr) || Span::sized(to, len).contains(addr)
            }
        }
    }
}

/// Events that are not handled yet.
#[derive(Default)]
struct Mail {
    changes: Mutex<Vec<Change>>,
    svm: Mutex<Weak<Svm>>,
}

impl Mail {
    fn pending(&self) -> Vec<Change> {
        self.changes.lock().unwrap().clone()
    }

    /// As the service: until the last one is handled, no page moves and nothing is let go of.
    fn deliver(&self, host: &FakeHost) {
        let Some(svm) = self.svm.lock().unwrap().upgrade() else { return };
        loop {
            let next = {
                let mut changes = self.changes.lock().unwrap();
                (!changes.is_empty()).then(|| changes.remove(0))
            };
            match next {
                Some(Change::Unmapped(span)) => svm.unmapped(span),
                Some(Change::Moved { from, to, len }) => svm.moved(from, to, len, &|| ()),
                None => break,
            }
        }
        host.set_changing(false);
    }
}

/// Work that holds memory.
struct Held {
    device: u32,
    ranges: Vec<Arc<Range>>,
    span: Span,
    /// Nothing happened that may take the mappings away.
    intact: bool,
    /// What its device, which cannot fault, has lost, because the program changed it.
    lost: BTreeSet<u64>,
}

struct World {
    layout: Layout,
    host: Arc<FakeHost>,
    devices: Vec<Arc<FakeDevice>>,
    policy: Arc<AnyPolicy>,
    svm: Arc<Svm>,
    mail: Arc<Mail>,
    model: BTreeMap<u64, Cell>,
    held: Vec<Held>,
    /// Where mremap took pages that have not all landed.
    adrift: BTreeSet<u64>,
    next: u64,
    stops: u64,
    /// Device memory is refused now and then.
    starved: bool,
    lost: bool,
    look: Dice,
}

impl World {
    fn new(layout: Layout) -> Self {
        let seed = layout.seed;
        let host = FakeHost::new(seed);
        host.map(part(0, layout.pages));
        let devices: Vec<_> = layout
            .vram
            .iter()
            .zip(1..)
            .map(|(pages, n)| {
                let faults = layout.firm >> (n - 1) & 1 == 0;
                FakeDevice::with_faults(host.clone(), *pages, layout.atomics, seed + n, faults)
            })
            .collect();
        let policy = AnyPolicy::new(seed + 10, (seed % 4) as u32);
        let space =
            Space::new(SpaceConfig { chunk_sizes: layout.chunks.clone(), ..SpaceConfig::default() }).unwrap();
        let ports = devices.iter().map(|d| d.clone() as Arc<dyn Device>).collect();
        let mover = Mover::new(host.clone(), ports, policy.clone(), Arc::new(Observer::new()));
        let svm = Arc::new(Svm::new(space, mover, layout.threshold));
        let mail = Arc::new(Mail::default());
        *mail.svm.lock().unwrap() = Arc::downgrade(&svm);
        let (reader, from, dice) = (mail.clone(), host.clone(), Mutex::new(Dice::new(seed + 11)));
        svm.set_barrier(Arc::new(move || {
            // An event may be queued after this looked: the kernel does that after the change is visible.
            if dice.lock().unwrap().roll(3) == 0 {
                reader.deliver(&from);
            }
        }));
        let model = each(part(0, layout.pages)).map(|addr| (addr, Cell::default())).collect();
        Self {
            host,
            devices,
            policy,
            svm,
            mail,
            model,
            held: Vec::new(),
            adrift: BTreeSet::new(),
            next: 1,
            stops: 0,
            starved: false,
            lost: false,
            look: Dice::new(seed + 12),
            layout,
        }
    }

    fn fresh(&mut self) -> u64 {
        self.next += 1;
        // Zero now and then: pages that are all zero are not copied.
        if self.next.is_multiple_of(7) { 0 } else { self.next }
    }

    fn deliver(&mut self) {
        self.mail.deliver(&self.host);
    }

    fn release_all(&mut self) {
        for held in std::mem::take(&mut self.held) {
            self.svm.release(held.device, &held.ranges);
        }
    }

    fn release_at(&mut self, span: Span) {
        let (ours, rest) = std::mem::take(&mut self.held).into_iter().partition(|h| h.span.overlaps(span));
        self.held = rest;
        let ours: Vec<Held> = ours;
        ours.iter().for_each(|h| self.svm.release(h.device, &h.ranges));
    }

    /// Who uses what mremap made waits until it returned. By then its event was read, and every barrier waits until it is
    /// handled.
    fn deliver_arrivals(&mut self, span: Span) {
        let arrives =
            |c: &Change| matches!(*c, Change::Moved { to, len, .. } if Span::sized(to, len).overlaps(span));
        if self.mail.pending().iter().any(arrives) {
            self.deliver();
        }
    }

    /// One CPU access, served as often as it must be.
    fn cpu(&mut self, addr: u64, new: Option<u64>) -> Touch {
        for attempt in 0..PATIENCE {
            match self.host.touch(addr, new) {
                Touch::Waits => {}
                done => return done,
            }
            match self.svm.cpu_fault(addr + 8, attempt % 2 == 0) {
                Served::Done | Served::Retry(Wait::Lock | Wait::Slice(_)) => {}
                Served::Retry(Wait::Pins) => self.release_all(),
                Served::Retry(Wait::Events) if attempt > 2 => self.deliver(),
                Served::Retry(Wait::Events) => {}
            }
        }
        panic!("{addr:#x} was never served");
    }

    fn cpu_read(&mut self, addr: u64) {
        let (readable, _) = self.host.rights(addr);
        match self.cpu(addr, None) {
            Touch::Value(seen) => self.saw(addr, seen, "the CPU"),
            Touch::Segv => assert!(!readable, "{addr:#x} should be readable"),
            Touch::Sigbus => assert!(self.lost, "{addr:#x} is poisoned"),
            Touch::Waits => unreachable!(),
        }
    }

    fn cpu_write(&mut self, addr: u64) {
        let (_, writable) = self.host.rights(addr);
        self.release_at(Span::sized(addr, SZ_4K));
        let value = self.fresh();
        match self.cpu(addr, Some(value)) {
            Touch::Value(_) => self.model.get_mut(&addr).expect("mapped").write(value),
            Touch::Segv => assert!(!writable, "{addr:#x} should be writable"),
            Touch::Sigbus => assert!(self.lost, "{addr:#x} is poisoned"),
            Touch::Waits => unreachable!(),
        }
    }

    fn saw(&mut self, addr: u64, seen: u64, who: &str) {
        let cell =
            self.model.get_mut(&addr).unwrap_or_else(|| panic!("{who} reads {addr:#x}, which is not mapped"));
        assert!(cell.allows(seen), "{who} reads {seen:#x} at {addr:#x}, not {cell:?}");
        (cell.value, cell.loose) = (seen, false);
    }

    fn is_firm(&self, device: u32) -> bool {
        self.layout.firm >> device & 1 == 1
    }

    /// What a device's work waits with, not for. Others that it waits for never end here: that is an error.
    fn own(&self) -> Vec<Arc<Range>> {
        self.held.iter().filter(|h| !self.is_firm(h.device)).flat_map(|h| h.ranges.clone()).collect()
    }

    fn gpu(&mut self, device: u32, span: Span, access: GpuAccess, bracketed: bool, hold: bool) {
        self.deliver_arrivals(span);
        let device = device % self.devices.len() as u32;
        let want = Want { bracketed, wait: self.layout.firm == 0, ..Want::fault(access) };
        let own = self.own();
        let alone = self.held.is_empty();
        let pending = self.mail.pending();
        let calm = pending.is_empty();
        match self.svm.gpu_access_holding(device, span.start, span.len(), want, &own) {
            Ok(ranges) => {
                let lost = each(span).filter(|addr| pending.iter().any(|c| c.concerns(*addr))).collect();
                let mut held = Held { device, ranges, span, intact: calm, lost };
                for addr in each(span) {
                    self.engine(&mut held, addr, access);
                }
                self.held.push(held);
                if !hold || self.held.len() > 2 {
                    self.release_all();
                }
            }
            Err(e) => self.judge(span, access, alone, &e),
        }
    }

    /// Whether a device access may fail so.
    fn judge(&self, span: Span, access: GpuAccess, alone: bool, error: &Error) {
        let right = |addr| {
            let (read, write) = self.host.rights(addr);
            read && (write || !access.writes())
        };
        let allowed = each(span).all(right);
        let excused = match error {
            Error::OutOfHostMemory { .. } => self.stops > 0,
            // A neighbour that is read-only keeps the range where atomics may not work.
            Error::Busy { .. } => {
                self.stops > 0 || access == GpuAccess::Atomic && !self.layout.atomics && self.any_protected()
            }
            // More than one range may be more than there is, in one piece or at all.
            // Where nobody waits it may be what others have.
            Error::Again { .. } if self.layout.firm == 0 => false,
            Error::OutOfDeviceMemory { .. } | Error::Again { .. } => {
                let largest = self.layout.chunks[0];
                !alone
                    || self.starved
                    || Span::around(span.start, largest) != Span::around(span.end - 1, largest)
            }
            Error::NotSupported(_) => access == GpuAccess::Atomic && !self.layout.atomics,
            Error::DeviceLost { .. } => self.lost,
            _ => false,
        };
        assert!(!allowed || excused, "{access:?} of {span} by the device failed: {error}");
    }

    fn fault_in(
        &self,
        device: u32,
        addr: u64,
        access: GpuAccess,
        own: &[Arc<Range>],
    ) -> Result<Vec<Arc<Range>>, Error> {
        let want = Want { wait: self.layout.firm == 0, ..Want::fault(access) };
        self.svm.gpu_access_holding(device, addr, 1, want, own)
    }

    /// One access of device work to one page, served as often as it must be.
    fn engine(&mut self, held: &mut Held, addr: u64, access: GpuAccess) {
        let writes = access.writes() && self.host.rights(addr).1;
        let new = if writes { Some(self.fresh()) } else { None };
        let mut own = self.own();
        own.extend(held.ranges.iter().cloned());
        for attempt in 0..PATIENCE {
            match self.devices[held.device as usize].engine(addr, |_| new) {
                Engine::Value(old) => {
                    self.saw(addr, old, "the device");
                    if let Some(new) = new {
                        self.model.get_mut(&addr).expect("seen").write(new);
                    }
                    return;
                }
                Engine::Link(Touch::Waits) => {
                    let served = self.svm.cpu_fault(addr, true);
                    if attempt > 2 && served == Served::Retry(Wait::Events) {
                        self.deliver();
                    }
                }
                Engine::Link(_) => return,
                Engine::Faults if self.is_firm(held.device) => {
                    let denied = access.writes() && new.is_none();
                    assert!(denied || held.lost.contains(&addr), "the device has not got {addr:#x}");
                    return;
                }
                // An unmap event came between: the device faults again.
                Engine::Faults => match self.fault_in(held.device, addr, access, &own) {
                    Ok(more) => {
                        own.extend(more.iter().cloned());
                        held.ranges.extend(more);
                    }
                    Err(e) => return self.judge(Span::sized(addr, SZ_4K), access, false, &e),
                },
            }
        }
        panic!("the device was never served at {addr:#x}");
    }

    fn unmap(&mut self, span: Span, again: bool, late: bool) {
        self.host.unmap(span);
        if again {
            self.host.map(span);
        }
        for addr in each(span) {
            self.adrift.remove(&addr);
            self.model.remove(&addr);
            if again {
                self.model.insert(addr, Cell::default());
            }
        }
        self.post(Change::Unmapped(span), late);
    }

    fn post(&mut self, change: Change, late: bool) {
        self.mail.changes.lock().unwrap().push(change);
        self.host.set_changing(true);
        if !late {
            self.deliver();
        }
    }

    fn map(&mut self, span: Span) {
        let holes: Vec<u64> = each(span).filter(|addr| !self.model.contains_key(addr)).collect();
        for addr in holes {
            self.host.map(Span::sized(addr, SZ_4K));
            self.model.insert(addr, Cell::default());
        }
    }

    fn dont_need(&mut self, span: Span) {
        self.deliver();
        self.svm.discarded(span, &|| ());
        self.host.zap(span);
        for addr in each(span) {
            self.adrift.remove(&addr);
            if let Some(cell) = self.model.get_mut(&addr) {
                cell.write(0);
            }
        }
    }

    /// Piece by piece where registration divides it, as the preload library does: the kernel takes no more at once.
    fn remap(&mut self, from: Span, to: u64, late: bool) {
        let target = Span::sized(to, from.len());
        if from.overlaps(target) || !each(from).all(|addr| self.host.mapped(addr)) {
            return;
        }
        let mut rest: Vec<u64> = each(from).collect();
        while let Some(first) = rest.first().copied() {
            let watched = self.host.is_registered(Span::sized(first, SZ_4K));
            let alike = |addr: &&u64| self.host.is_registered(Span::sized(**addr, SZ_4K)) == watched;
            let pages = rest.iter().take_while(alike).count();
            rest.drain(..pages);
            let piece = Span::sized(first, pages as u64 * SZ_4K);
            self.remap_piece(piece, first - from.start + to, watched, late || !rest.is_empty());
        }
    }

    fn remap_piece(&mut self, from: Span, to: u64, watched: bool, late: bool) {
        let target = Span::sized(to, from.len());
        let replaced = each(target).any(|addr| self.host.is_registered(Span::sized(addr, SZ_4K)));
        self.host.remap(from, to);
        for addr in each(from) {
            let there = addr - from.start + to;
            let cell = self.model.remove(&addr).expect("mapped");
            self.model.insert(there, cell);
            self.adrift.remove(&addr);
        }
        self.adrift.extend(each(target));
        // In the kernel's order; of what is not registered nobody hears.
        if replaced {
            self.post(Change::Unmapped(target), late || watched);
        }
        if watched {
            self.post(Change::Moved { from: from.start, to, len: from.len() }, true);
            self.post(Change::Unmapped(from), late);
        }
    }

    /// What a child of fork would see.
    fn child(&mut self) {
        if !self.svm.settle_landings() {
            return;
        }
        self.deliver();
        let mut given = BTreeMap::new();
        let mut lost = BTreeSet::new();
        self.svm.for_child(&|| (), |span, pages, shadow| {
            for page in (0..span.pages()).filter(|p| pages.get(*p)) {
                let addr = span.page_run(page, 1).start;
                if let Some(shadow) = shadow {
                    let value = self.host.peek_shadow(shadow, page).expect("what is given is there");
                    given.insert(addr, value);
                } else {
                    lost.insert(addr);
                }
            }
        });
        assert!(self.lost || lost.is_empty(), "a child does not get {lost:x?}");
        for (addr, cell) in &self.model {
            if lost.contains(addr) || self.host.peek(*addr).1 {
                continue;
            }
            let seen = given.get(addr).copied().or(self.host.peek(*addr).0).unwrap_or(0);
            assert!(cell.allows(seen), "a child reads {seen:#x} at {addr:#x}, not {cell:?}");
        }
    }

    fn set_stops(&mut self, one_in: u64) {
        self.stops = one_in;
        self.host.set_stops(one_in);
    }

    fn run(&mut self, op: Op) {
        self.note_held(&op);
        match op {
            Op::CpuRead(page) => {
                if self.model.contains_key(&at(page)) {
                    self.cpu_read(at(page));
                }
            }
            Op::CpuWrite(first, count) => {
                for addr in each(part(first, count)) {
                    if self.model.contains_key(&addr) {
                        self.cpu_write(addr);
                    }
                }
            }
            Op::Gpu { device, first, count, access, bracketed, hold } => {
                self.gpu(device, part(first, count), access, bracketed, hold);
            }
            Op::Prefetch(device, first, count) => {
                self.release_all();
                let device = device % self.devices.len() as u32;
                let span = part(first, count);
                self.deliver_arrivals(span);
                if let Err(e) = self.svm.gpu_access(device, span.start, span.len(), Want::prefetch()) {
                    self.judge(span, GpuAccess::Read, true, &e);
                }
            }
            Op::Release => self.release_all(),
            Op::BringHome(first, count) => {
                self.release_all();
                self.deliver();
                let span = part(first, count);
                match self.svm.bring_home(span, Cause::User) {
                    Ok(()) => {
                        let left = self.svm.residence(span);
                        assert_eq!((left.device, left.shared, left.strayed), (0, 0, 0));
                    }
                    Err(e) => assert!(self.stops > 0 || self.lost, "{e}"),
                }
            }
            Op::Discard(first, count) => {
                let span = part(first, count);
                self.deliver();
                self.svm.discard(span);
                for addr in each(span) {
                    if let Some(cell) = self.model.get_mut(&addr) {
                        cell.loose = true;
                    }
                }
            }
            Op::Shrink(allowed) => {
                let waits = !self.svm.settle_landings() || !self.mail.pending().is_empty();
                self.svm.shrink(allowed);
                let retained = self.svm.mover.retained_bytes();
                assert!(retained <= allowed || self.any_strayed() || waits);
            }
            Op::ReadMostly(first, count, on) => {
                let change = |advice: &mut Advice| advice.read_mostly = on;
                self.svm.advices.update(part(first, count), change);
            }
            Op::Policy(mode) => self.policy.mode.store(mode, Ordering::Relaxed),
            Op::Unmap { first, count, again, late } => self.unmap(part(first, count), again, late),
            Op::Map(first, count) => self.map(part(first, count)),
            Op::DontNeed(first, count) => self.dont_need(part(first, count)),
            Op::Remap { from, to, count, late } => self.remap(part(from, count), at(to), late),
            Op::Protect(first, count, rights) => {
                self.host.protect(part(first, count), rights != 1, rights == 0);
            }
            Op::Deliver => self.deliver(),
            Op::Collect => {
                let _ = self.svm.collect_garbage();
            }
            Op::Freeze => {
                self.svm.freeze();
                self.release_all();
                self.deliver();
                if self.svm.bring_home(ALL, Cause::User).is_ok() && self.svm.settle_landings() {
                    for (addr, cell) in &self.model {
                        let seen = self.host.peek(*addr).0.unwrap_or(0);
                        assert!(cell.allows(seen), "at home {addr:#x} holds {seen:#x}, not {cell:?}");
                    }
                }
                self.svm.thaw();
            }
            Op::Child => self.child(),
            Op::Stops(one_in) => self.set_stops(one_in),
            Op::Vram(one_in) => {
                self.starved = one_in > 0;
                self.devices.iter().for_each(|d| d.set_failures(one_in));
            }
        }
    }

    /// Whether work that holds memory still has it, where nothing may take it.
    fn check_held(&mut self) {
        for held in std::mem::take(&mut self.held) {
            let firm = self.is_firm(held.device);
            for addr in each(held.span).filter(|addr| held.intact || firm && !held.lost.contains(addr)) {
                match self.devices[held.device as usize].engine(addr, |_| None) {
                    Engine::Value(seen) => self.saw(addr, seen, "work that holds it"),
                    Engine::Link(_) => {}
                    Engine::Faults => {
                        panic!("held {addr:#x} is not mapped for device {} any more", held.device)
                    }
                }
            }
            self.held.push(held);
        }
    }

    /// `op` may take mappings away from what is held.
    fn note_held(&mut self, op: &Op) {
        let calm = self.mail.pending().is_empty() && self.svm.space.garbage_len() == 0;
        for held in &mut self.held {
            match *op {
                Op::Unmap { first, count, .. } | Op::DontNeed(first, count) => {
                    held.lost.extend(each(part(first, count)));
                }
                Op::Remap { from, to, count, .. } => {
                    held.lost.extend(each(part(from, count)).chain(each(part(to, count))));
                }
                _ => {}
            }
            let beside = |span: Span| held.ranges.iter().all(|r| !r.span().overlaps(span));
            held.intact &= calm
                && match *op {
                    Op::CpuRead(_)
                    | Op::CpuWrite(..)
                    | Op::Shrink(_)
                    | Op::ReadMostly(..)
                    | Op::Policy(_) => true,
                    Op::Gpu { first, count, .. } => beside(part(first, count)),
                    Op::Stops(_) | Op::Vram(_) => true,
                    _ => false,
                };
        }
    }

    fn any_protected(&self) -> bool {
        self.model.keys().any(|addr| self.host.rights(*addr) != (true, true))
    }

    fn any_strayed(&self) -> bool {
        self.svm.residence(ALL).strayed > 0
    }

    fn is_pending(&self, addr: u64) -> bool {
        self.mail.pending().iter().any(|c| c.concerns(addr))
    }

    /// Everything that must hold between any two operations.
    fn check(&mut self) {
        self.svm.space.validate().unwrap();
        self.check_held();
        let moving = self.mail.pending().iter().any(|c| matches!(c, Change::Moved { .. }));
        let looks = self.look.roll(3) == 0;
        let landed = !moving && (self.adrift.is_empty() || looks && self.svm.settle_landings());
        if landed {
            self.adrift.clear();
        }
        let mut sums = (0, 0, 0);
        let mut used = vec![0; self.devices.len()];
        let mut shadows = 0;
        let mut truth = BTreeMap::new();
        let mut table: BTreeMap<(usize, u64), Option<(Backing, bool)>> = BTreeMap::new();
        for range in self.svm.space.ranges_in(ALL) {
            let span = range.span();
            let state = range.data.lock();
            let Some(m) = &state.moved else { continue };
            m.check(span);
            let kept = m.shadow.as_ref().map(|s| self.host.shadow_pages(s)).unwrap_or_default();
            assert_eq!(kept, m.retained, "what is in the shadow of {span} is recorded");
            assert!(
                m.retained.minus(&m.vram).minus(&m.strayed).minus(&m.leaving).is_empty(),
                "{span} keeps pages for nothing"
            );
            sums.0 += bytes(&m.vram);
            sums.1 += if m.shared { span.len() } else { 0 };
            sums.2 += bytes(&m.retained);
            used[m.device as usize] += m.bo.as_ref().map_or(0, |bo| bo.len);
            assert!(
                m.bo.is_none() || m.shared || !m.vram.is_empty(),
                "{span} holds device memory for nothing"
            );
            shadows += usize::from(m.shadow.is_some());
            for page in 0..span.pages() {
                let addr = span.page_run(page, 1).start;
                let bo = m.bo.as_ref().map(|bo| bo.offset + page as u64 * SZ_4K);
                let registered = self.host.is_registered(Span::sized(addr, SZ_4K));
                let (vram, strayed) = (m.vram.get(page), m.strayed.get(page));
                assert!(
                    registered || !vram && !strayed || self.is_pending(addr) || !landed,
                    "{addr:#x} cannot wait"
                );
                if (vram || strayed) && registered && !self.is_pending(addr) {
                    assert_eq!(self.host.peek(addr).0, None, "{addr:#x} is in two places");
                }
                if vram && registered {
                    let value = self.devices[m.device as usize].peek(bo.unwrap());
                    truth.insert(addr, value);
                    if m.fresh.get(page) {
                        let shadow = self.host.peek_shadow(m.shadow.as_ref().unwrap(), page);
                        assert!(self.lost || shadow == Some(value), "{addr:#x} is recorded as fresh");
                    }
                } else if strayed && registered {
                    truth.insert(addr, self.host.peek_shadow(m.shadow.as_ref().unwrap(), page).unwrap());
                }
                let mapped = match (vram, strayed, m.shared) {
                    (true, _, _) => Some((Backing::Vram(bo.unwrap()), true)),
                    (_, true, _) => None,
                    (_, _, true) => Some((Backing::Vram(bo.unwrap()), false)),
                    _ => Some((Backing::System, true)),
                };
                table.insert((m.device as usize, addr), mapped);
            }
        }
        let stats = &self.svm.mover.observer.stats;
        assert_eq!(stats.gauge(Gauge::ResidentDeviceBytes), sums.0);
        assert_eq!(stats.gauge(Gauge::ResidentSharedBytes), sums.1);
        assert_eq!(stats.gauge(Gauge::RetainedHostBytes), sums.2);
        assert_eq!(self.svm.mover.retained_bytes(), sums.2);
        assert_eq!(self.host.held().0, shadows);
        for (n, device) in self.devices.iter().enumerate() {
            assert_eq!(device.info().vram_bytes - device.vram_free_bytes(), used[n], "of device {n}");
            for (addr, backing, access) in device.table() {
                self.check_translation(n, addr, backing, access, &table);
            }
        }
        if landed {
            self.check_contents(&truth);
        }
    }

    fn check_translation(
        &self,
        device: usize,
        addr: u64,
        backing: Backing,
        access: GpuAccess,
        table: &BTreeMap<(usize, u64), Option<(Backing, bool)>>,
    ) {
        if self.is_pending(addr) {
            return;
        }
        let elsewhere = (0..self.devices.len())
            .filter(|n| *n != device)
            .any(|n| matches!(table.get(&(n, addr)), Some(None | Some((Backing::Vram(_), true)))));
        assert!(!elsewhere, "device {device} maps {addr:#x}, which another has");
        match table.get(&(device, addr)) {
            Some(Some((Backing::Vram(_), false))) if backing == Backing::System => {
                assert!(!access.writes(), "device {device} writes shared memory at {addr:#x}");
            }
            Some(Some((want, writable))) => {
                assert_eq!(backing, *want, "of {addr:#x} on device {device}");
                assert!(*writable || !access.writes(), "device {device} writes shared memory at {addr:#x}");
            }
            Some(None) => panic!("device {device} maps {addr:#x}, which is on its way"),
            None => assert_eq!(backing, Backing::System, "of {addr:#x} on device {device}"),
        }
    }

    fn check_contents(&mut self, truth: &BTreeMap<u64, u64>) {
        for (addr, cell) in &self.model {
            let (page, poisoned) = self.host.peek(*addr);
            let seen = truth.get(addr).copied().or(page).unwrap_or(0);
            let known = cell.allows(seen) || self.lost && (poisoned || truth.contains_key(addr));
            assert!(known, "{addr:#x} holds {seen:#x}, not {cell:?}");
        }
    }

    /// Quiet again: nothing is stopped, held or unread.
    fn calm(&mut self) {
        self.set_stops(0);
        self.devices.iter().for_each(|d| d.set_failures(0));
        self.release_all();
        self.deliver();
        assert!(self.svm.settle_landings());
        self.adrift.clear();
        self.host.protect(part(0, self.layout.pages), true, true);
    }

    fn finish(mut self, by_closing: bool) {
        self.calm();
        self.check();
        let misbooked = self.host.misbooked();
        assert!(misbooked.is_empty(), "booked and not registered: {misbooked:x?}");
        if by_closing {
            let closed = self.svm.close();
            assert!(closed.is_ok() || self.lost, "{closed:?}");
            // As the runtime does: what mremap moved is registered where no range is.
            self.host.unregister_all();
        }
        let pages: Vec<u64> = self.model.keys().copied().collect();
        pages.iter().for_each(|addr| self.cpu_read(*addr));
        if !by_closing {
            let all = part(0, self.layout.pages);
            self.host.unmap(all);
            self.svm.unmapped(all);
            self.svm.collect_garbage().unwrap();
            assert_eq!(self.svm.space.range_count(), 0);
        }
        assert_eq!(self.host.held(), (0, 0, 0), "shadows, pages booked and registered");
        for device in &self.devices {
            assert_eq!(device.vram_free_bytes(), device.info().vram_bytes);
            assert!(device.table().is_empty());
        }
        let stats = &self.svm.mover.observer.stats;
        assert_eq!(stats.gauge(Gauge::ResidentDeviceBytes), 0);
        assert_eq!(stats.gauge(Gauge::ResidentSharedBytes), 0);
        assert_eq!(stats.gauge(Gauge::RetainedHostBytes), 0);
    }
}

fn play(layout: Layout, ops: &[Op], by_closing: bool) {
    let mut world = World::new(layout);
    for op in ops {
        world.run(*op);
        world.check();
    }
    world.finish(by_closing);
}

/// So many cases, unless the environment says otherwise.
fn config(cases: u32) -> ProptestConfig {
    let usual = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { usual.cases } else { cases };
    ProptestConfig { cases, max_shrink_iters: 4000, failure_persistence: None, ..usual }
}

proptest! {
    #![proptest_config(config(2000))]

    #[test]
    fn every_page_reads_as_last_written(
        ops in ops(64, 60), seed in any::<u32>(), two in any::<bool>(), atomics in any::<bool>(),
        threshold in any::<bool>(), by_closing in any::<bool>(),
    ) {
        play(small(seed.into(), 1 + usize::from(two), atomics, threshold), &ops, by_closing);
    }
}

proptest! {
    #![proptest_config(config(100))]

    #[test]
    fn huge_ranges_too(ops in ops(1024 + 16, 40), seed in any::<u32>(), by_closing in any::<bool>()) {
        let layout = Layout {
            pages: 1024 + 16,
            chunks: vec![SZ_2M, SZ_64K, SZ_4K],
            vram: vec![600],
            ..small(seed.into(), 1, true, false)
        };
        play(layout, &ops, by_closing);
    }
}

proptest! {
    #![proptest_config(config(1000))]

    /// Work on a device that cannot fault keeps what it holds but for the very pages that the program changes.
    #[test]
    fn what_cannot_fault_keeps_what_it_holds(
        ops in ops(64, 60), seed in any::<u32>(), firm in 1..4u8, by_closing in any::<bool>(),
    ) {
        play(Layout { firm, ..small(seed.into(), 2, true, false) }, &ops, by_closing);
    }
}

proptest! {
    #![proptest_config(config(500))]

    /// Data that lived only on a lost device is never silently zero: it reads as it was, or not at all.
    #[test]
    fn a_lost_device_loses_nothing_silently(
        before in ops(64, 30), after in ops(64, 12), seed in any::<u32>(), by_closing in any::<bool>(),
    ) {
        let mut world = World::new(small(seed.into(), 1, true, false));
        let harmless = |op: &&Op| !matches!(op, Op::Stops(_) | Op::Vram(_) | Op::Discard(..));
        before.iter().filter(harmless).for_each(|op| world.run(*op));
        world.calm();
        world.check();
        world.lost = true;
        world.devices[0].lose();
        let quiet = |op: &&Op| matches!(op, Op::CpuRead(_) | Op::CpuWrite(..) | Op::Prefetch(..) | Op::Child | Op::Gpu { .. });
        for op in after.iter().filter(quiet) {
            world.run(*op);
            world.check();
        }
        world.finish(by_closing);
    }
}

/// A copy that work reads stays although it cannot be brought up to date for a second reader.
#[test]
fn a_copy_that_is_held_is_not_made_anew() {
    let read =
        |first, hold| Op::Gpu { device: 1, first, count: 1, access: GpuAccess::Read, bracketed: true, hold };
    for seed in 907_808_938..907_809_138 {
        let ops =
            [read(48, true), Op::Unmap { first: 49, count: 1, again: false, late: true }, read(50, false)];
        play(Layout { firm: 2, ..small(seed, 2, true, false) }, &ops, false);
    }
}

/// Free device memory that lies in pieces is enough for a range of several pages, in smaller ranges.
#[test]
fn free_memory_in_pieces_is_used() {
    use GpuAccess::{Atomic, Read, Write};
    let gpu = |device, first, count, access| Op::Gpu {
        device,
        first,
        count,
        access,
        bracketed: false,
        hold: false,
    };
    let ops = [
        gpu(0, 0, 1, Read),
        gpu(0, 0, 1, Read),
        gpu(0, 50, 1, Read),
        Op::Unmap { first: 2, count: 31, again: true, late: true },
        Op::CpuWrite(21, 11),
        gpu(1, 26, 1, Read),
        gpu(1, 54, 7, Atomic),
        gpu(1, 43, 1, Read),
        Op::Prefetch(1, 63, 1),
        Op::CpuRead(0),
        gpu(0, 56, 6, Write),
        gpu(1, 44, 2, Atomic),
        gpu(1, 16, 13, Write),
    ];
    play(small(2_868_799_320, 2, false, true), &ops, false);
}
