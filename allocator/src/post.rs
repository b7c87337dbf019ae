//! How blocks that a thread frees of another's heap get back there.
//!
//! # Overview
//! Two lists that anybody adds to and only one takes, all at once:
//!
//! ```text
//!   Freed, one for each slab: its freed blocks. Whoever adds the first puts the slab into
//!   Post,  one for each heap: slabs with freed blocks. Its owner reads it now and then; where there is no owner, the sender does.
//! ```
//!
//! # Locking
//! None. Entries are only added and everything is taken at once, so a head that looks the same is the same list. A slab
//! is in the mail at most once: between the add that found `Freed` empty and the take that empties it nobody else sends it.
//!
//! Mail is never left lying. The sender puts it and then looks whether the heap has an owner; the owner says that it goes
//! and then looks whether there is mail. Between the two steps of each is a fence, so one of them sees the other.
//!
//! The tests run this under every interleaving (loom).

use super::primitive::{AtomicPtr, AtomicU8, AtomicU16, Ordering, fence};
use std::ptr;

/// Nobody uses the heap.
const IDLE: u8 = 0;
/// A thread owns it, or reads its mail.
pub(crate) const OWNED: u8 = 1;

/// Blocks of a slab that others freed: the newest one's number plus one, 0 for none. Links lead on, numbered likewise.
pub(crate) struct Freed {
    pub(crate) head: AtomicU16,
}

impl Freed {
    /// Adds a chain that begins with block `first` and ends with the one whose link is `last`. Whether it was empty before.
    #[inline]
    pub(crate) fn add(&self, first: u16, last: &AtomicU16) -> bool {
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            last.store(head, Ordering::Relaxed);
            match self.head.compare_exchange_weak(head, first + 1, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return head == 0,
                Err(now) => head = now,
            }
        }
    }

    /// Takes all: calls `block` with the number of each, newest first. `link`: the link of a block.
    #[inline]
    pub(crate) fn take<'a>(&self, link: impl Fn(u16) -> &'a AtomicU16, mut block: impl FnMut(u16)) {
        let mut head = self.head.swap(0, Ordering::Acquire);
        while head != 0 {
            let number = head - 1;
            // Before the block is anybody's: its link may be used again then.
            head = link(number).load(Ordering::Relaxed);
            block(number);
        }
    }
}

/// A heap's mail and whether somebody owns the heap.
pub(crate) struct Post<T> {
    pub(crate) mail: AtomicPtr<T>,
    pub(crate) state: AtomicU8,
}

impl<T> Post<T> {
    /// Puts `item`, whose link is `next`. True: nobody owned the heap and now the caller does, who must read the mail.
    #[inline]
    pub(crate) fn send(&self, item: *mut T, next: &AtomicPtr<T>) -> bool {
        let mut head = self.mail.load(Ordering::Relaxed);
        loop {
            next.store(head, Ordering::Relaxed);
            match self.mail.compare_exchange_weak(head, item, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => break,
                Err(now) => head = now,
            }
        }
        fence(Ordering::SeqCst);
        self.claim()
    }

    /// Whether there is mail, or was a moment ago.
    #[inline]
    pub(crate) fn has_mail(&self) -> bool {
        !self.mail.load(Ordering::Relaxed).is_null()
    }

    /// Takes all mail; for the owner. The links lead on, and each is to be read before its item is looked after.
    #[inline]
    pub(crate) fn take(&self) -> *mut T {
        self.mail.swap(ptr::null_mut(), Ordering::Acquire)
    }

    /// Makes the caller the owner, if there is none.
    #[inline]
    pub(crate) fn claim(&self) -> bool {
        self.state.load(Ordering::Relaxed) == IDLE
            && self.state.compare_exchange(IDLE, OWNED, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// The owner goes. True: mail came after it was read, and the caller is the owner again and must read it.
    #[inline]
    pub(crate) fn let_go(&self) -> bool {
        self.state.store(IDLE, Ordering::Release);
        fence(Ordering::SeqCst);
        self.has_mail() && self.claim()
    }
}
