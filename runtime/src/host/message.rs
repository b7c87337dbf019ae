#![allow(unsafe_code)]
//! What a userfaultfd has to say.
//!
//! # Overview
//! The kernel queues faults and events on the userfaultfd; [`Channel::read_batch`] takes all of them without blocking
//! and decodes them. [`Channel::poll`] waits for messages or for [`Channel::wake_reader`].
//!
//! # Safety
//! Messages are unions that the `event` field tells apart; a FORK message carries a descriptor that is ours alone.
//!
//! # Locking
//! Reading an event lets the thread that caused it (munmap, mremap…) go on, and it may then map something new at the
//! same address. So messages are read under the write side of a gate whose read side a flip holds from "is this still
//! our mapping?" to the end of its ioctl: as long as the event is unread, the kernel refuses the ioctl. The gate is
//! held for the read alone. Nor is anything let go of between: what an mremap has brought must stay registered until its
//! contents have landed, and while its event is unread nobody but the kernel knows of it.
//!
//! What the kernel does while an event is unread goes on here until it is handled: every flip says EAGAIN. Otherwise
//! contents that madvise dropped could come home after the call returned, and what is away from a forked child could
//! come home before it was filled in there.
//!
//! # Limits
//! Events can arrive out of causal order; sorting them is the service loop's work.

use super::sys;
use crate::ground::addr::Span;
use crate::ground::error::{Errno, Error, Result};
use crate::ground::fds::{Arrival, Kept};
use linux_raw_sys::general as uapi;
use rustix::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};
use std::time::{Duration, Instant};

/// Messages taken from the kernel at once.
const BATCH: usize = 32;
const MESSAGE: usize = size_of::<uapi::uffd_msg>();

/// Longer than a flip takes.
const FLIP: Duration = Duration::from_micros(50);

/// One message of the kernel.
#[derive(Debug)]
pub enum Message {
    /// A thread waits for a page.
    Fault {
        /// The exact address where the kernel tells it, else its page.
        addr: u64,
        /// It wants to write.
        write: bool,
        /// The page is there, write-protected.
        wp: bool,
        /// The page is in the page cache, not mapped.
        minor: bool,
        /// The waiting thread; 0 where the kernel does not tell.
        tid: u32,
    },
    /// The span was unmapped.
    Unmap(Span),
    /// The span's pages are being dropped (MADV_DONTNEED, MADV_FREE…); the mapping stays.
    Remove(Span),
    /// The mapping moved.
    Remap {
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Bytes.
        len: u64,
    },
    /// The process forked; this is the userfaultfd of the child. Another child, which inherits it, closes it: the first
    /// would wait for somebody to read it.
    Fork(Kept),
}

/// What [`Channel::poll`] saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ready {
    /// Messages can be read.
    pub messages: bool,
    /// [`Channel::wake_reader`] was called; the call is used up.
    pub woken: bool,
}

/// See [`Channel::hold_messages`].
pub(super) type MessagesHeld<'a> = RwLockReadGuard<'a, ()>;

/// The reading end of a userfaultfd.
#[derive(Debug)]
pub struct Channel {
    uffd: Kept,
    wake: Kept,
    /// Kept for the child's userfaultfd, which a fork brings: without a free number the kernel could not tell of it, and the
    /// fork would wait.
    spare: Mutex<Option<Kept>>,
    gate: RwLock<()>,
    /// Events that were read and are not handled yet.
    unhandled: AtomicU32,
}

impl Channel {
    /// For `uffd`, which must not block.
    pub(super) fn new(uffd: OwnedFd) -> Result<Self> {
        let wake = sys::eventfd().map_err(|e| Error::os("eventfd", e))?;
        Ok(Self {
            uffd: Kept::new(uffd),
            wake: Kept::new(wake),
            spare: Mutex::new(sys::eventfd().ok().map(Kept::new)),
            gate: RwLock::new(()),
            unhandled: AtomicU32::new(0),
        })
    }

    /// The userfaultfd.
    pub(super) fn uffd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    /// Closes the userfaultfd behind its descriptor.
    pub(super) fn retire(&self) -> sys::Result<()> {
        sys::retire(self.uffd.as_fd(), self.wake.as_fd())
    }

    /// Keeps messages unread while it is held.
    pub(super) fn hold_messages(&self) -> MessagesHeld<'_> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`Channel::hold_messages`] if nobody reads any; for who holds the books already.
    pub(super) fn hold_messages_now(&self) -> Option<MessagesHeld<'_>> {
        match self.gate.try_read() {
            Ok(held) => Some(held),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The gate's other side. A flip takes some microseconds, going to sleep and being woken takes more.
    fn stop_flips(&self) -> RwLockWriteGuard<'_, ()> {
        let began = Instant::now();
        loop {
            match self.gate.try_write() {
                Ok(gate) => return gate,
                Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
                Err(TryLockError::WouldBlock) if began.elapsed() < FLIP => std::thread::yield_now(),
                Err(TryLockError::WouldBlock) => {
                    return self.gate.write().unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Whether an event was read that is not handled yet. Asked with messages held.
    pub(super) fn is_changing(&self) -> bool {
        self.unhandled.load(Ordering::Acquire) > 0
    }

    /// Held while one event is handled; says that it was when dropped.
    pub(super) fn handling(&self) -> Handling<'_> {
        Handling(self)
    }

    /// Waits for messages, for [`Channel::wake_reader`] or until `timeout` (`None`: for ever). A signal ends it early
    /// with nothing ready.
    pub fn poll(&self, timeout: Option<Duration>) -> Result<Ready> {
        let [messages, woken] = match sys::poll2([self.uffd.as_fd(), self.wake.as_fd()], timeout) {
            Ok(ready) => ready,
            Err(Errno(libc::EINTR)) => return Ok(Ready::default()),
            Err(errno) => return Err(Error::os("poll", errno)),
        };
        if woken {
            // A failed read leaves it set: the next poll tells again, nothing is lost.
            let _ = sys::read(&self.wake, &mut [0; 8]);
        }
        Ok(Ready { messages, woken })
    }

    /// Whether messages wait to be read.
    pub fn has_messages(&self) -> bool {
        sys::poll2([self.uffd.as_fd(), self.wake.as_fd()], Some(Duration::ZERO))
            .is_ok_and(|[messages, _]| messages)
    }

    /// Makes [`Channel::poll`] return, now or the next time. Any thread; takes no lock.
    pub fn wake_reader(&self) {
        // EAGAIN: it is set already.
        let _ = sys::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Appends all queued messages to `out` and says how many. Never blocks on the kernel.
    pub fn read_batch(&self, out: &mut Vec<Message>) -> Result<usize> {
        let before = out.len();
        let mut buf = [0u8; BATCH * MESSAGE];
        loop {
            let (read, _arrival) = {
                let _gate = self.stop_flips();
                // A fork brings the child's descriptor.
                let arrival = Arrival::new();
                let read = sys::read(&self.uffd, &mut buf);
                let events = read.as_ref().map_or(0, |len| events_in(&buf[..*len]));
                self.unhandled.fetch_add(events, Ordering::AcqRel);
                (read, arrival)
            };
            let len = match read {
                Ok(len) => len,
                Err(Errno(libc::EAGAIN)) => break,
                Err(Errno(libc::EINTR)) => continue,
                Err(Errno(libc::EMFILE | libc::ENFILE)) if self.give_spare() => continue,
                Err(errno) => return Err(Error::os("reading the userfaultfd", errno)),
            };
            out.extend(buf[..len].chunks_exact(MESSAGE).filter_map(decode));
            if len < buf.len() {
                break;
            }
        }
        Ok(out.len() - before)
    }

    fn spare(&self) -> MutexGuard<'_, Option<Kept>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a free number now that was usvm's.
    fn give_spare(&self) -> bool {
        self.spare().take().map(Kept::close_now).is_some()
    }

    /// Takes a number again, when the child's is closed.
    pub(super) fn renew_spare(&self) {
        let mut spare = self.spare();
        if spare.is_none() {
            *spare = sys::eventfd().ok().map(Kept::new);
        }
    }
}

/// Appends all messages queued on `uffd`, another process's, to `out`.
pub(super) fn read_from(uffd: BorrowedFd<'_>, out: &mut Vec<Message>) -> sys::Result<()> {
    let mut buf = [0u8; BATCH * MESSAGE];
    let _arrival = Arrival::new();
    loop {
        match sys::read(uffd, &mut buf) {
            Ok(len) => out.extend(buf[..len].chunks_exact(MESSAGE).filter_map(decode)),
            Err(Errno(libc::EAGAIN)) => return Ok(()),
            Err(Errno(libc::EINTR)) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// See [`Channel::handling`].
pub(super) struct Handling<'a>(&'a Channel);

impl Drop for Handling<'_> {
    fn drop(&mut self) {
        self.0.unhandled.fetch_sub(1, Ordering::AcqRel);
    }
}

/// How many of the messages are events: those that [`decode`] knows, without faults.
fn events_in(bytes: &[u8]) -> u32 {
    let is_event = |m: &&[u8]| {
        matches!(
            u32::from(m[0]),
            uapi::UFFD_EVENT_UNMAP | uapi::UFFD_EVENT_REMOVE | uapi::UFFD_EVENT_REMAP | uapi::UFFD_EVENT_FORK
        )
    };
    bytes.chunks_exact(MESSAGE).filter(is_event).count() as u32
}

/// One message out of its bytes; `None` for kinds that were not asked for.
fn decode(bytes: &[u8]) -> Option<Message> {
    assert_eq!(bytes.len(), MESSAGE);
    // SAFETY: the length was checked, the structure is plain integers without alignment needs.
    let msg = unsafe { bytes.as_ptr().cast::<uapi::uffd_msg>().read_unaligned() };
    let arg = msg.arg;
    // SAFETY: every variant of the union is plain integers; `event` says which one the kernel filled.
    unsafe {
        match u32::from(msg.event) {
            uapi::UFFD_EVENT_PAGEFAULT => {
                let fault = arg.pagefault;
                let flag = |bit: u32| fault.flags & u64::from(bit) != 0;
                Some(Message::Fault {
                    addr: fault.address,
                    write: flag(uapi::UFFD_PAGEFAULT_FLAG_WRITE),
                    wp: flag(uapi::UFFD_PAGEFAULT_FLAG_WP),
                    minor: flag(uapi::UFFD_PAGEFAULT_FLAG_MINOR),
                    tid: fault.feat.ptid,
                })
            }
            uapi::UFFD_EVENT_UNMAP => Some(Message::Unmap(Span::new(arg.remove.start, arg.remove.end))),
            uapi::UFFD_EVENT_REMOVE => Some(Message::Remove(Span::new(arg.remove.start, arg.remove.end))),
            uapi::UFFD_EVENT_REMAP => {
                let remap = arg.remap;
                Some(Message::Remap { from: remap.from, to: remap.to, len: remap.len })
            }
            uapi::UFFD_EVENT_FORK => {
                Some(Message::Fork(Kept::new(OwnedFd::from_raw_fd(arg.fork.ufd as i32))))
            }
            _ => None,
        }
    }
}
