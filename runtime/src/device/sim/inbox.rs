//! A lock-free inbox: any thread puts, one thread takes all.
//!
//! # Overview
//! An application thread submits work to an engine here. It must not hold a lock meanwhile, because its own
//! stack may be migrated at any instruction and a service thread that waited for that lock could never bring
//! it back. So the inbox is a linked stack that is pushed with one compare-and-swap and emptied with one
//! swap, then reversed. Nothing is ever popped singly, so there is no ABA problem.
//!
//! # Safety
//! Nodes are boxes turned into raw pointers. A node is owned by the stack from the successful
//! compare-and-swap in [`Inbox::put`] on, and by the taker from the swap in [`Inbox::take_all`] on; nobody
//! else ever reads through it, as pushers store the old head but never follow it.
#![allow(unsafe_code)]

use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

struct Node<T> {
    item: T,
    next: *mut Node<T>,
}

/// See the module's documentation.
pub(super) struct Inbox<T> {
    head: AtomicPtr<Node<T>>,
}

// SAFETY: the inbox hands each item from the thread that put it to the one that takes it, and gives no
// references out.
unsafe impl<T: Send> Sync for Inbox<T> {}
// SAFETY: as above; it owns its items.
unsafe impl<T: Send> Send for Inbox<T> {}

impl<T> Inbox<T> {
    pub(super) fn new() -> Self {
        Self { head: AtomicPtr::new(ptr::null_mut()) }
    }

    /// Puts `item` last. Never waits.
    pub(super) fn put(&self, item: T) {
        let node = Box::into_raw(Box::new(Node { item, next: ptr::null_mut() }));
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            // SAFETY: until the exchange succeeds the node is this thread's alone.
            unsafe { (*node).next = head };
            match self.head.compare_exchange_weak(head, node, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Takes everything, oldest first.
    pub(super) fn take_all(&self) -> Vec<T> {
        let mut node = self.head.swap(ptr::null_mut(), Ordering::Acquire);
        let mut items = Vec::new();
        while !node.is_null() {
            // SAFETY: the swap gave the whole list to this thread, and each node came out of `Box::into_raw`.
            let Node { item, next } = *unsafe { Box::from_raw(node) };
            items.push(item);
            node = next;
        }
        items.reverse();
        items
    }
}

impl<T> Drop for Inbox<T> {
    fn drop(&mut self) {
        drop(self.take_all());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    #[test]
    fn each_putter_keeps_its_order_and_nothing_is_lost() {
        const PUTTERS: usize = 3;
        const EACH: usize = 20_000;
        let inbox = Inbox::new();
        let mut next = [0usize; PUTTERS];
        thread::scope(|s| {
            for who in 0..PUTTERS {
                let inbox = &inbox;
                s.spawn(move || (0..EACH).for_each(|n| inbox.put((who, n))));
            }
            while next.iter().sum::<usize>() < PUTTERS * EACH {
                for (who, n) in inbox.take_all() {
                    assert_eq!(next[who], n);
                    next[who] += 1;
                }
            }
        });
        assert!(inbox.take_all().is_empty());
    }

    #[test]
    fn what_nobody_took_is_dropped() {
        let item = Arc::new(());
        let inbox = Inbox::new();
        (0..3).for_each(|_| inbox.put(Arc::clone(&item)));
        assert_eq!(Arc::strong_count(&item), 4);
        drop(inbox);
        assert_eq!(Arc::strong_count(&item), 1);
    }
}
