//! `uffd_4k`: the least that a fault served from user space costs. A bare loop: one thread asleep in poll, reads one
//! message, answers with one 4 KiB UFFDIO_COPY. No ranges, no locks, no statistics.
//!
//! # Safety
//! Registers a mapping of its own with a userfaultfd of its own and fills its missing pages. The mapping outlives the
//! handler thread: `Drop` joins it first.
#![allow(unsafe_code)]

use super::time;
use crate::case::Result;
use linux_raw_sys::general as sys;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::{Errno, read, write};
use rustix::ioctl::{Updater, ioctl, opcode};
use rustix::mm::{
    Advice, MapFlags, ProtFlags, UserfaultfdFlags, madvise, mmap_anonymous, munmap, userfaultfd,
};
use std::ptr::null_mut;
use std::sync::Arc;
use std::thread::JoinHandle;

const PAGE: usize = 4096;
/// Pages that fault one after the other before the mapping is emptied again.
const PAGES: usize = 256;

const GROUP: u8 = sys::UFFDIO as u8;
const API: rustix::ioctl::Opcode = opcode::read_write::<sys::uffdio_api>(GROUP, sys::_UFFDIO_API as u8);
const REGISTER: rustix::ioctl::Opcode =
    opcode::read_write::<sys::uffdio_register>(GROUP, sys::_UFFDIO_REGISTER as u8);
const COPY: rustix::ioctl::Opcode = opcode::read_write::<sys::uffdio_copy>(GROUP, sys::_UFFDIO_COPY as u8);

/// What both threads use.
#[derive(Debug)]
struct Shared {
    uffd: OwnedFd,
    stop: OwnedFd,
    contents: Box<[u8; PAGE]>,
}

/// The baseline.
#[derive(Debug)]
pub struct Uffd4k {
    shared: Arc<Shared>,
    handler: Option<JoinHandle<()>>,
    pages: *mut u8,
    next: usize,
}

impl Uffd4k {
    /// Its name.
    pub const NAME: &'static str = "uffd_4k";

    /// Maps, registers, and starts the handler. Errors: userfaultfd is not available to this user.
    pub fn new() -> Result<Self> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // Faults here come from user mode only, for which no privilege is needed.
        let flags = flags | UserfaultfdFlags::from_bits_retain(sys::UFFD_USER_MODE_ONLY);
        // SAFETY: this userfaultfd is only ever told of the mapping below.
        let uffd = unsafe { userfaultfd(flags)? };
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nobody.
        let pages = unsafe {
            mmap_anonymous(null_mut(), PAGES * PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)?
        };
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        let shared = Arc::new(Shared { uffd, stop, contents: Box::new([7; PAGE]) });
        let mut made = Self { shared: Arc::clone(&shared), handler: None, pages: pages.cast(), next: 0 };
        made.register()?;
        made.handler = Some(std::thread::Builder::new().name("uffd".into()).spawn(move || shared.serve())?);
        Ok(made)
    }

    fn register(&self) -> Result<()> {
        let mut api = sys::uffdio_api { api: sys::UFFD_API.into(), features: 0, ioctls: 0 };
        let range = sys::uffdio_range { start: self.pages as u64, len: (PAGES * PAGE) as u64 };
        let mode = sys::UFFDIO_REGISTER_MODE_MISSING.into();
        let mut register = sys::uffdio_register { range, mode, ioctls: 0 };
        // SAFETY: the opcodes belong to these structures, and the range is this baseline's own mapping. Small pages, so
        // that each sample is one 4 KiB fault.
        unsafe {
            madvise(self.pages.cast(), PAGES * PAGE, Advice::LinuxNoHugepage)?;
            ioctl(&self.shared.uffd, Updater::<API, _>::new(&mut api))?;
            ioctl(&self.shared.uffd, Updater::<REGISTER, _>::new(&mut register))?;
        }
        Ok(())
    }

    /// One fault, from the access to its answer; microseconds.
    pub fn sample(&mut self) -> Result<f64> {
        if self.next == PAGES {
            // SAFETY: the mapping is this baseline's own and holds nothing worth keeping.
            unsafe { madvise(self.pages.cast(), PAGES * PAGE, Advice::LinuxDontNeed)? };
            self.next = 0;
        }
        let page = self.pages.wrapping_add(self.next * PAGE);
        self.next += 1;
        let mut seen = 0;
        // SAFETY: the page is in the mapping; the read waits until the handler has filled it.
        let took = time(|| seen = unsafe { page.read_volatile() });
        if seen == 7 { Ok(took) } else { Err(format!("the fault gave {seen}, not what was copied").into()) }
    }
}

impl Shared {
    fn serve(&self) {
        loop {
            let mut fds = [PollFd::new(&self.uffd, PollFlags::IN), PollFd::new(&self.stop, PollFlags::IN)];
            if poll(&mut fds, None).is_err() {
                continue;
            }
            if !fds[1].revents().is_empty() {
                return;
            }
            if let Some(address) = next_fault(self.uffd.as_fd()) {
                self.fill(address & !(PAGE as u64 - 1));
            }
        }
    }

    fn fill(&self, page: u64) {
        let src = self.contents.as_ptr() as u64;
        let mut copy = sys::uffdio_copy { dst: page, src, len: PAGE as u64, mode: 0, copy: 0 };
        // SAFETY: the opcode belongs to the structure; the destination is a missing page of the registered mapping, the
        // source one page that this owns.
        let answered = unsafe { ioctl(&self.uffd, Updater::<COPY, _>::new(&mut copy)) };
        // A page that is there already has no waiter left.
        assert!(matches!(answered, Ok(()) | Err(Errno::EXIST)), "UFFDIO_COPY: {answered:?}");
    }
}

/// The address of the next fault, `None` when none is waiting.
fn next_fault(uffd: BorrowedFd<'_>) -> Option<u64> {
    let mut message = [0u64; size_of::<sys::uffd_msg>() / 8];
    let mut bytes = [0u8; size_of::<sys::uffd_msg>()];
    if read(uffd, &mut bytes) != Ok(bytes.len()) {
        return None;
    }
    for (word, chunk) in message.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_ne_bytes(chunk.try_into().ok()?);
    }
    // The first byte is the event; a page fault's flags and address are the second and third words.
    (u32::from(bytes[0]) == sys::UFFD_EVENT_PAGEFAULT).then_some(message[2])
}

impl Drop for Uffd4k {
    fn drop(&mut self) {
        // An eventfd takes one more always; a handler that died is reported by the join.
        let _ = write(&self.shared.stop, &1u64.to_ne_bytes());
        let died = self.handler.take().is_some_and(|handler| handler.join().is_err());
        // SAFETY: the handler is gone, and the mapping is this baseline's own. Failing would only leak.
        let _ = unsafe { munmap(self.pages.cast(), PAGES * PAGE) };
        if died && !std::thread::panicking() {
            eprintln!("usvm-bench: the fault handler died");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn every_sample_is_a_fault_that_was_served() {
        let Ok(mut uffd) = Uffd4k::new() else {
            // Past the test harness, which hides what a test that passes prints.
            writeln!(std::io::stderr(), "skipped: no userfaultfd here").expect("stderr can be written to");
            return;
        };
        for _ in 0..2 * PAGES + 3 {
            assert!(uffd.sample().unwrap() > 0.0);
        }
    }
}
