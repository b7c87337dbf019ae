//! The least that a migration of 2 MiB costs on this machine: the kernel's flip and the copy, one thread, nothing else. The
//! way back is gone as well, though not timed: it decides what is in the caches.
//! What `to_device_2m` and `cpu_fault_return_2m` take beyond these is usvm's own; what these take beyond memcpy is the
//! kernel's and the processor's. A hypervisor that keeps page tables of its own makes a place that was just flipped
//! to slow to reach, for instance.
//!
//! # Safety
//! Registers buffers of its own with a userfaultfd of its own, and touches only pages that are there: nobody would serve
//! a fault.
#![allow(unsafe_code)]

use crate::baselines::{Memcpy2m, time};
use crate::case::{Case, Result, Setup};
use crate::memory::{COUNT, Pages, SLOT, Slots};
use linux_raw_sys::general as sys;
use rustix::fd::OwnedFd;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::{Advice, UserfaultfdFlags, madvise, userfaultfd};
use usvm::vram::copy::{Copier, CopyHint};

/// The argument of UFFDIO_MOVE.
#[repr(C)]
struct Move {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    moved: i64,
}

const GROUP: u8 = sys::UFFDIO as u8;
const API: Opcode = opcode::read_write::<sys::uffdio_api>(GROUP, sys::_UFFDIO_API as u8);
const REGISTER: Opcode = opcode::read_write::<sys::uffdio_register>(GROUP, sys::_UFFDIO_REGISTER as u8);
const MOVE: Opcode = opcode::read_write::<Move>(GROUP, 5);
const FEATURE_MOVE: u64 = 1 << 16;

/// One way.
struct Limit {
    name: &'static str,
    about: &'static str,
    outward: bool,
    copier: Copier,
    made: Option<Made>,
}

struct Made {
    uffd: OwnedFd,
    /// Huge pages, at home or in the shadow.
    app: Slots,
    shadow: Slots,
    vram: Slots,
    baseline: Memcpy2m,
}

/// The cases.
pub fn all(copier: Copier) -> Vec<Box<dyn Case>> {
    let case = |name, about, outward| -> Box<dyn Case> {
        Box::new(Limit { name, about, outward, copier, made: None })
    };
    vec![
        case("limit_to_device_2m", "bare UFFDIO_MOVE of a huge page, and its copy to memfd", true),
        case("limit_return_2m", "bare copy from memfd to a huge page, and UFFDIO_MOVE of it", false),
    ]
}

impl Made {
    fn new() -> Result<Self> {
        let flags = UserfaultfdFlags::from_bits_retain(sys::UFFD_USER_MODE_ONLY);
        // SAFETY: this userfaultfd is only ever told of the buffers below.
        let uffd = unsafe { userfaultfd(flags | UserfaultfdFlags::CLOEXEC)? };
        let mut api = sys::uffdio_api { api: sys::UFFD_API.into(), features: FEATURE_MOVE, ioctls: 0 };
        // SAFETY: the opcode belongs to the structure.
        unsafe { ioctl(&uffd, Updater::<API, _>::new(&mut api)) }
            .map_err(|errno| format!("no UFFDIO_MOVE here (Linux 6.8 has it): {errno}"))?;
        let (app, shadow) = (Slots::new(Pages::Huge)?, Slots::new(Pages::Huge)?);
        for buffer in [&app, &shadow] {
            let range = sys::uffdio_range { start: buffer.base() as u64, len: (COUNT * SLOT) as u64 };
            let mode = sys::UFFDIO_REGISTER_MODE_MISSING.into();
            let mut register = sys::uffdio_register { range, mode, ioctls: 0 };
            // SAFETY: the opcode belongs to the structure, the range is this case's own.
            unsafe { ioctl(&uffd, Updater::<REGISTER, _>::new(&mut register))? };
        }
        // SAFETY: the buffer is this case's own and holds nothing worth keeping.
        unsafe { madvise(shadow.base().cast(), COUNT * SLOT, Advice::LinuxDontNeed)? };
        Ok(Self { uffd, app, shadow, vram: Slots::new(Pages::Memfd)?, baseline: Memcpy2m::new()? })
    }

    fn flip(&self, dst: *mut u8, src: *mut u8) -> Result<()> {
        let mut flip = Move { dst: dst as u64, src: src as u64, len: SLOT as u64, mode: 0, moved: 0 };
        // SAFETY: the opcode belongs to the structure; both are slots of this case's registered buffers, which no
        // reference points into.
        unsafe { ioctl(&self.uffd, Updater::<MOVE, _>::new(&mut flip))? };
        Ok(())
    }

    fn sample(&mut self, copier: Copier, outward: bool) -> Result<f64> {
        let (app, shadow, vram) = (self.app.next(), self.shadow.next(), self.vram.next());
        // SAFETY: called with the slot's pages in the shadow; slots of SLOT bytes of two buffers, used by this thread only.
        let copy = |to, from, hint| unsafe { copier.copy(to, from, SLOT, hint) };
        let mut flipped = Ok(());
        if outward {
            let took = time(|| {
                flipped = self.flip(shadow, app);
                if flipped.is_ok() {
                    copy(vram, shadow, CopyHint::ToDevice);
                }
            });
            flipped?;
            copy(shadow, vram, CopyHint::FromDevice);
            self.flip(app, shadow)?;
            return Ok(took);
        }
        self.flip(shadow, app)?;
        copy(vram, shadow, CopyHint::ToDevice);
        let took = time(|| {
            copy(shadow, vram, CopyHint::FromDevice);
            flipped = self.flip(app, shadow);
        });
        flipped?;
        Ok(took)
    }
}

impl Case for Limit {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn baseline(&self) -> Option<&'static str> {
        Some(Memcpy2m::NAME)
    }

    fn setup(&mut self) -> Result<Setup> {
        match Made::new() {
            Ok(made) => self.made = Some(made),
            Err(why) => return Ok(Setup::Skip(why.to_string())),
        }
        Ok(Setup::Ready)
    }

    fn sample(&mut self) -> Result<f64> {
        self.made.as_mut().ok_or("sampled before setup")?.sample(self.copier, self.outward)
    }

    fn baseline_sample(&mut self) -> Result<f64> {
        Ok(self.made.as_mut().ok_or("sampled before setup")?.baseline.sample())
    }
}
