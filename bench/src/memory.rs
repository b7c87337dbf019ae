//! Memory to measure with: warm, and of a known page size.
//!
//! # Safety
//! Maps memory and hands out raw pointers into it that live as long as the owner. A [`Slots`] is used by one case on one
//! thread; slots never overlap.
#![allow(unsafe_code)]

use crate::case::Result;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::ptr::null_mut;

/// Bytes in a slot: the largest range.
pub const SLOT: usize = 2 << 20;
/// Slots in a buffer. Two buffers are larger together than the last-level cache's share of a usual machine, so that a copy
/// finds its memory in DRAM, as a migration would.
pub const COUNT: usize = 16;

/// What is behind a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Anonymous memory in huge pages, if the kernel grants them.
    Huge,
    /// Anonymous memory in 4 KiB pages.
    Small,
    /// A shared mapping of a memfd in 4 KiB pages: what the simulated device's memory is.
    Memfd,
}

/// A buffer of [`COUNT`] slots of 2 MiB, all written once.
#[derive(Debug)]
pub struct Slots {
    mapping: *mut c_void,
    mapped: usize,
    first: *mut u8,
    count: usize,
    next: usize,
}

impl Slots {
    /// Maps and warms a buffer.
    pub fn new(pages: Pages) -> Result<Self> {
        Self::many(pages, COUNT)
    }

    /// Maps and warms a buffer of `count` slots.
    pub fn many(pages: Pages, count: usize) -> Result<Self> {
        let len = count * SLOT;
        let mapped = len + SLOT;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: new mappings at addresses of the kernel's choice disturb nobody.
        let mapping = unsafe {
            match pages {
                Pages::Huge | Pages::Small => {
                    mmap_anonymous(null_mut(), mapped, protection, MapFlags::PRIVATE)?
                }
                Pages::Memfd => {
                    let file = memfd_create("usvm-bench", MemfdFlags::CLOEXEC)?;
                    ftruncate(&file, mapped as u64)?;
                    mmap(null_mut(), mapped, protection, MapFlags::SHARED, &file, 0)?
                }
            }
        };
        let first = mapping.cast::<u8>().wrapping_add(mapping.cast::<u8>().align_offset(SLOT));
        let slots = Self { mapping, mapped, first, count, next: 0 };
        // SAFETY: the `len` bytes from `first` lie in the mapping just made.
        unsafe {
            if pages == Pages::Huge {
                madvise(first.cast(), len, Advice::LinuxHugepage)?;
            }
            if pages == Pages::Small {
                madvise(first.cast(), len, Advice::LinuxNoHugepage)?;
            }
            for at in 0..len {
                first.add(at).write(((at * 31) >> 8) as u8 | 1);
            }
        }
        Ok(slots)
    }

    /// The next slot, round and round.
    pub fn next(&mut self) -> *mut u8 {
        self.next = (self.next + 1) % self.count;
        self.current()
    }

    /// The slot that [`Slots::next`] gave last.
    pub fn current(&self) -> *mut u8 {
        self.first.wrapping_add(self.next * SLOT)
    }

    /// The first slot; the others follow it.
    pub fn base(&self) -> *mut u8 {
        self.first
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        // SAFETY: the mapping is this buffer's own, and nobody has a pointer into it any more. Failing would only leak.
        let _ = unsafe { munmap(self.mapping, self.mapped) };
    }
}
