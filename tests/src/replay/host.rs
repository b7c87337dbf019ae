//! The recorded process: mappings and pages are what the trace says, never computed.

use super::trace::{Op, Trace};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use usvm::Result;
use usvm::ground::addr::{PAGE_SHIFT, SZ_2M, SZ_4K, Span};
use usvm::ground::error::Error;
use usvm::space::pages::{Folio, PageKind};
use usvm::space::ports::{AddressSpace, Vma, VmaKind};

/// The process of a trace.
#[derive(Debug)]
pub struct Host {
    arena: Span,
    /// Whether the caller of now owns the device's pages (`own` of a context).
    own: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    vmas: Vec<Vma>,
    /// One letter for each page of the arena.
    pages: Vec<u8>,
    /// The allocation behind each device page, zero without.
    allocation: Vec<u64>,
    /// The allocation that device pages now come from.
    newest: u64,
}

fn on_device(letter: u8) -> bool {
    matches!(letter, b'd' | b'D')
}

impl Host {
    /// The process at its start: nothing mapped.
    pub fn new(trace: &Trace) -> Self {
        let n = trace.arena.pages();
        let state = State { vmas: Vec::new(), pages: vec![b'.'; n], allocation: vec![0; n], newest: 1 };
        Self { arena: trace.arena, own: AtomicBool::new(false), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who asks from now on.
    pub fn set_own(&self, own: bool) {
        self.own.store(own, Ordering::Relaxed);
    }

    fn own(&self) -> bool {
        self.own.load(Ordering::Relaxed)
    }

    /// Takes over what `op` made of mappings and pages.
    pub fn apply(&self, op: &Op) {
        let mut state = self.state();
        let state = &mut *state;
        if op.name == "migrate" {
            state.newest += 1;
        }
        if let Some(vmas) = &op.vmas {
            state.vmas.clone_from(vmas);
        }
        let before = state.allocation.clone();
        for &(span, letter) in &op.pages {
            let pages = self.index(span.start)..self.index(span.end);
            state.pages[pages.clone()].fill(letter);
            for allocation in &mut state.allocation[pages] {
                match on_device(letter) {
                    true if *allocation == 0 => *allocation = state.newest,
                    true => {}
                    false => *allocation = 0,
                }
            }
        }
        if op.name == "mremap" && op.result == "0" && op.args[3] != "inplace" {
            self.move_allocations(state, op, &before);
        }
    }

    /// Device pages that mremap moved keep their allocation.
    fn move_allocations(&self, state: &mut State, op: &Op, before: &[u64]) {
        let (from, to) = (self.index(op.hex(0)), self.index(op.hex(4)));
        for i in 0..(op.hex(1) >> PAGE_SHIFT) as usize {
            if on_device(state.pages[to + i]) && before[from + i] != 0 {
                state.allocation[to + i] = before[from + i];
            }
        }
    }

    fn index(&self, addr: u64) -> usize {
        self.arena.page_index(addr)
    }

    /// The pages of `span`, one letter each. Outside the arena there is nothing.
    pub fn letters(&self, span: Span) -> Vec<u8> {
        let state = self.state();
        let at = (span.start..span.end).step_by(SZ_4K as usize);
        at.map(|a| if self.arena.contains(a) { state.pages[self.index(a)] } else { b'.' }).collect()
    }

    /// What hmm_range_fault makes of the mappings of `span`. Whether pages of the device may still be written where
    /// the mapping may not is not in the trace's state: `says_no` tells what the kernel found.
    ///
    /// # Errors
    /// EFAULT or EPERM, by address.
    pub fn fault(&self, span: Span, write: bool, before: &[u8], says_no: bool) -> Result<()> {
        let mut at = span.start;
        while at < span.end {
            let vma = self.find_vma(at)?.filter(|v| v.read && v.kind != VmaKind::Special);
            let vma = vma.ok_or(Error::Gone { addr: at })?;
            let part = span.intersect(vma.span).expect("the mapping holds an address of the span");
            if write && !vma.write {
                let letters = &before[span.page_index(part.start)..][..part.pages()];
                let still_writable = self.own() && letters.iter().all(|c| on_device(*c));
                if !still_writable || says_no {
                    return Err(Error::NotWritable { addr: at });
                }
            }
            at = part.end;
        }
        Ok(())
    }

    /// The pages of `span` as hmm_range_fault leaves them: a huge mapping is one folio from wherever it is entered.
    pub fn folios(&self, span: Span) -> Vec<Folio> {
        let letters = self.letters(span);
        let state = self.state();
        let mut folios = Vec::new();
        let mut page = 0;
        while page < letters.len() {
            let addr = span.start + ((page as u64) << PAGE_SHIFT);
            let kind = match letters[page] {
                b'.' => PageKind::Missing,
                b'd' | b'D' => PageKind::Device { device: 1, allocation: state.allocation[self.index(addr)] },
                _ => PageKind::System,
            };
            let huge = matches!(letters[page], b'H' | b'Z' | b'D');
            let rest = Span::around(addr, SZ_2M).end.min(span.end) - addr;
            let order = if huge { (rest >> PAGE_SHIFT).ilog2() as u8 } else { 0 };
            folios.push(Folio { kind, order });
            page += 1 << order;
        }
        folios
    }
}

impl AddressSpace for Host {
    fn find_vma(&self, addr: u64) -> Result<Option<Vma>> {
        Ok(self.state().vmas.iter().find(|v| v.span.contains(addr)).copied())
    }

    fn populated(&self, span: Span) -> bool {
        let usable = |v: &Vma| v.read && v.kind != VmaKind::Special;
        let present = |c: &u8| matches!(c, b'p' | b'H' | b'z' | b'Z') || self.own() && on_device(*c);
        let vma = self.state().vmas.iter().find(|v| v.span.covers(span)).copied();
        vma.is_some_and(|v| usable(&v)) && self.letters(span).iter().all(present)
    }
}
