//! What a program asks of its memory, and about it.
//!
//! # Overview
//! Prefetch, evict and discard move it; advice is remembered for the policies; [`Runtime::attributes`] answers.
//!
//! # Limits
//! Addresses are rounded outward to pages, for a discard inward. What was said about memory outlives its mapping.

use std::sync::Arc;
use std::time::Instant;

use crate::ground::addr::{PageMask, SZ_2M, SZ_4K, Span, align_down, align_up};
use crate::ground::alloc;
use crate::ground::error::{Error, Result};
use crate::ground::sync::{Event, Fence};
use crate::observe::stats::Cause;
use crate::observe::watch::Change;
use crate::space::ports::{Advice, GpuAccess, Vma};
use crate::space::residency::{Residence, bytes};
use crate::space::svm::{PIN_PATIENCE, Svm, Want};

use super::bracket::{SignalOnDrop, too_much};
use super::{Access, Inner, Location, Runtime};

/// A hint for a span of memory (CUDA's and Level Zero's words).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hint {
    /// Mostly read, by host and device.
    ReadMostly(bool),
    /// Where it should live; `None` takes an earlier hint back.
    PreferredLocation(Option<Location>),
    /// A device that will use it wherever it lives; `None` takes an earlier hint back.
    AccessedBy(Option<u32>),
    /// Whether and where it will be used soon: goes there, or to the host, in the background.
    Need(Need),
}

/// Whether memory will be used soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// It will be, at that place.
    Will(Location),
    /// It will not be.
    Dont,
}

/// What was last asked of a page by prefetch and [`Hint::Need`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Asked {
    last: Option<Location>,
    need: Option<bool>,
}

/// What is known about the pages of a span.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Bytes of its pages.
    pub bytes: u64,
    /// Where its bytes are.
    pub residence: Residence,
    /// Bytes of the smallest range in it; 0 if no device used it yet.
    pub page_size: u64,
    /// Device memory by device: index, and bytes whose truth is there.
    pub devices: Vec<(u32, u64)>,
    /// The advice of its parts, ascending.
    pub advice: Vec<Advice>,
    /// Where its parts were last asked to go.
    pub last_prefetch: Vec<Option<Location>>,
    /// Whether its parts were said to be needed (`Some(true)`) or not needed soon.
    pub need: Vec<Option<bool>>,
}

impl Runtime {
    /// Brings `[addr, addr + len)` to `to`. The fence tells when it is there.
    pub fn prefetch(&self, addr: u64, len: u64, to: Location) -> Fence {
        let inner = self.inner();
        if let Err(e) = inner.check().and_then(|()| self.check_location(to)) {
            return Fence::signaled(Err(e));
        }
        let span = Span::sized(addr, len).page_aligned();
        let owner = inner.clone();
        self.go(span, to, Cause::Prefetch, move || owner.asked.update(span, |asked| asked.last = Some(to)))
    }

    /// Moves `span` in the background, after `first`.
    fn go(&self, span: Span, to: Location, cause: Cause, first: impl FnOnce() + Send + 'static) -> Fence {
        let inner = self.inner();
        alloc::internal(|| {
            let arrived = SignalOnDrop(Event::new());
            let fence = arrived.0.fence();
            let deadline = Instant::now() + PIN_PATIENCE;
            let going = Going { span, to, cause, at: span.start, arrived, deadline };
            let owner = inner.clone();
            let _ = inner.control.submit(move || {
                first();
                going.go_on(&owner)
            });
            fence
        })
    }

    fn check_location(&self, location: Location) -> Result<()> {
        match location {
            Location::Host => Ok(()),
            Location::Device(device) => self.device(device).map(|_| ()),
        }
    }

    /// Brings `[addr, addr + len)` to the host and gives up its device memory.
    pub fn evict(&self, addr: u64, len: u64) -> Result<()> {
        let span = Span::sized(addr, len).page_aligned();
        if alloc::is_service_thread() {
            return self.call(move |svm| svm.bring_home(span, Cause::User));
        }
        self.inner().check()?;
        self.go(span, Location::Host, Cause::User, || ()).wait(None).map(|_| ())
    }

    /// The contents of the whole pages inside `[addr, addr + len)` may be dropped.
    pub fn discard(&self, addr: u64, len: u64) -> Result<()> {
        let inside = Span::new(align_up(addr, SZ_4K), align_down(addr.saturating_add(len), SZ_4K));
        self.call(move |svm| {
            svm.mover.observer.watch.tell(Change::Dropped, inside);
            svm.discard(inside);
            Ok(())
        })
    }

    /// Tells what is known about `[addr, addr + len)`. Hints never change results.
    pub fn advise(&self, addr: u64, len: u64, hint: Hint) -> Result<()> {
        match hint {
            Hint::PreferredLocation(Some(at)) | Hint::Need(Need::Will(at)) => self.check_location(at)?,
            Hint::AccessedBy(Some(device)) => self.check_location(Location::Device(device))?,
            _ => {}
        }
        let span = Span::sized(addr, len).page_aligned();
        if let Hint::Need(need) = hint {
            return self.advise_need(span, need);
        }
        self.call(move |svm| {
            svm.advices.update(span, |advice| match hint {
                Hint::ReadMostly(on) => advice.read_mostly = on,
                Hint::PreferredLocation(location) => {
                    advice.preferred = location.map(|l| match l {
                        Location::Host => None,
                        Location::Device(device) => Some(device),
                    });
                }
                Hint::AccessedBy(device) => advice.accessed_by = device,
                Hint::Need(_) => {}
            });
            svm.reconsider(span);
            Ok(())
        })
    }

    /// Starts to move it and does not wait; that it cannot move is no error of a hint.
    fn advise_need(&self, span: Span, need: Need) -> Result<()> {
        let inner = self.inner();
        inner.check()?;
        let owner = inner.clone();
        let (last, to) = match need {
            Need::Will(to) => (Some(to), to),
            Need::Dont => (None, Location::Host),
        };
        inner.control.end(move || {
            owner.asked.update(span, |asked| {
                asked.need = Some(last.is_some());
                asked.last = last.or(asked.last);
            });
            Ok(())
        })?;
        drop(self.go(span, to, Cause::Prefetch, || ()));
        Ok(())
    }

    /// The hints that hold at `addr`.
    pub fn advice(&self, addr: u64) -> Result<Advice> {
        self.call(move |svm| Ok(svm.advices.at(addr)))
    }

    /// Where the memory of `[addr, addr + len)` is now.
    pub fn residence(&self, addr: u64, len: u64) -> Result<Residence> {
        self.call(move |svm| Ok(svm.residence(Span::sized(addr, len).page_aligned())))
    }

    /// All that is known about `[addr, addr + len)`, all of which must be mapped.
    pub fn attributes(&self, addr: u64, len: u64) -> Result<Attributes> {
        let owner = self.inner().clone();
        self.call(move |svm| {
            let span = Span::sized(addr, len).page_aligned();
            check_all(svm, span, |_, _| Ok(()))?;
            let asked = owner.asked.values(span);
            Ok(Attributes {
                bytes: span.len(),
                residence: svm.residence(span),
                page_size: svm.space.ranges_in(span).iter().map(|r| r.span().len()).min().unwrap_or(0),
                devices: by_device(svm, span),
                advice: svm.advices.values(span),
                last_prefetch: asked.iter().map(|a| a.last).collect(),
                need: asked.iter().map(|a| a.need).collect(),
            })
        })
    }

    /// Whether all of `[addr, addr + len)` is mapped, and allows `access` if one is named. The error has the first
    /// address where it is not so.
    pub fn check_mapped(&self, addr: u64, len: u64, access: Option<GpuAccess>) -> Result<()> {
        let span = Span::sized(addr, len).page_aligned();
        self.call(move |svm| {
            check_all(svm, span, |vma, at| match access {
                Some(_) if !vma.read && !vma.write => Err(Error::Gone { addr: at }),
                Some(access) if access.writes() && !vma.write => Err(Error::NotWritable { addr: at }),
                _ => Ok(()),
            })
        })
    }

    /// The addresses that devices can reach.
    pub fn limits(&self) -> Span {
        self.inner().svm.space.config().limits
    }
}

/// Memory on its way to where the program wants it. As a bracket that begins, it keeps no control thread from others'
/// requests while it waits for what work holds: it lines up again.
struct Going {
    span: Span,
    to: Location,
    cause: Cause,
    /// What is before has arrived.
    at: u64,
    arrived: SignalOnDrop,
    deadline: Instant,
}

impl Going {
    /// One try, on a control thread.
    fn go_on(mut self, owner: &Arc<Inner>) -> Result<()> {
        let svm = &owner.svm;
        let outcome = match self.advance(svm) {
            Err(Error::Again { .. } | Error::Busy { .. }) if Instant::now() < self.deadline => {
                svm.wait_for_memory();
                let again = owner.clone();
                let _ = owner.control.submit(move || self.go_on(&again));
                return Ok(());
            }
            other => other,
        };
        self.arrived.0.signal(outcome);
        Ok(())
    }

    fn advance(&mut self, svm: &Svm) -> Result<()> {
        let Location::Device(device) = self.to else { return svm.try_to_bring_home(self.span, self.cause) };
        while self.at < self.span.end {
            let piece = Span::new(self.at, self.span.end.min(align_down(self.at, SZ_2M) + SZ_2M));
            let want = Want { wait: false, ..Want::prefetch() };
            let moved = svm.gpu_access(device, piece.start, piece.len(), want);
            let all = Access { addr: self.span.start, len: self.span.len(), access: GpuAccess::Read };
            match moved {
                Err(e) if Instant::now() >= self.deadline => return Err(too_much(e, svm, device, &[all])),
                other => drop(other?),
            }
            self.at = piece.end;
        }
        Ok(())
    }
}

/// Bytes of `span` whose truth is in device memory, for each device.
fn by_device(svm: &Svm, span: Span) -> Vec<(u32, u64)> {
    let mut devices: Vec<(u32, u64)> = Vec::new();
    for range in svm.space.ranges_in(span) {
        let state = range.data.lock();
        let Some(m) = &state.moved else { continue };
        let there = bytes(&m.vram.and(&PageMask::of(range.span(), span)));
        match devices.iter_mut().find(|(device, _)| *device == m.device) {
            _ if there == 0 => {}
            Some((_, sum)) => *sum += there,
            None => devices.push((m.device, there)),
        }
    }
    devices
}

/// Whether all of `span` is mapped and each mapping is as `check` wants it.
fn check_all(svm: &Svm, span: Span, check: impl Fn(&Vma, u64) -> Result<()>) -> Result<()> {
    let mut at = span.start;
    while at < span.end {
        let vma = svm.vma(at)?.ok_or(Error::NoVma { addr: at })?;
        check(&vma, at)?;
        at = vma.span.end;
    }
    Ok(())
}
