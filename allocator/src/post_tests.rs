//! The post under the model checker loom: every interleaving of senders and of an owner that reads and goes.
//! `post.rs` is compiled here a second time, with loom's atomics.

/// What `post.rs` takes from its parent.
mod primitive {
    pub(super) use loom::sync::atomic::{AtomicPtr, AtomicU8, AtomicU16, Ordering, fence};
}

#[path = "post.rs"]
#[allow(dead_code, clippy::duplicate_mod)]
mod post;

use loom::cell::Cell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicPtr, AtomicU8, AtomicU16, Ordering};
use loom::thread;
use post::{Freed, OWNED, Post};
use std::ptr;

/// A slab of which every block is given out. The owner's part is a `Cell`, at which loom fails when two threads use it and
/// nothing orders them.
struct Slab {
    freed: Freed,
    links: Vec<AtomicU16>,
    next: AtomicPtr<Slab>,
    back: Cell<usize>,
    released: Cell<bool>,
}

/// A heap that a thread owns, and its slabs.
struct Heap {
    post: Post<Slab>,
    slabs: Vec<Slab>,
}

impl Heap {
    /// One slab for each number, with so many blocks.
    fn new(blocks: &[usize]) -> Arc<Self> {
        let slab = |blocks: &usize| Slab {
            freed: Freed { head: AtomicU16::new(0) },
            links: (0..*blocks).map(|_| AtomicU16::new(0)).collect(),
            next: AtomicPtr::new(ptr::null_mut()),
            back: Cell::new(0),
            released: Cell::new(false),
        };
        let post = Post { mail: AtomicPtr::new(ptr::null_mut()), state: AtomicU8::new(OWNED) };
        Arc::new(Self { post, slabs: blocks.iter().map(slab).collect() })
    }

    fn find(&self, at: *mut Slab) -> &Slab {
        self.slabs.iter().find(|slab| ptr::eq(*slab, at)).expect("a slab of this heap")
    }

    /// What a thread does that frees blocks of this heap: `first..=last` of one slab.
    fn free(&self, slab: usize, first: u16, last: u16) {
        let slab = &self.slabs[slab];
        assert!(!slab.released.get(), "it has live blocks");
        for number in first..last {
            slab.links[usize::from(number)].store(number + 2, Ordering::Relaxed);
        }
        if slab.freed.add(first, &slab.links[usize::from(last)])
            && self.post.send(ptr::from_ref(slab).cast_mut(), &slab.next)
        {
            self.leave();
        }
    }

    fn read(&self) {
        let mut at = self.post.take();
        while !at.is_null() {
            let slab = self.find(at);
            at = slab.next.load(Ordering::Relaxed);
            let mut blocks = Vec::new();
            let link = |number: u16| &slab.links[usize::from(number)];
            slab.freed.take(link, |number| {
                blocks.push(number);
                // It may be given out, and freed again, at once.
                link(number).store(0, Ordering::Relaxed);
            });
            assert!(!blocks.is_empty(), "mail tells of blocks");
            slab.back.set(slab.back.get() + blocks.len());
            if slab.back.get() == slab.links.len() {
                assert!(!slab.released.replace(true), "given back once");
            }
        }
    }

    /// What the owner does when its thread ends.
    fn leave(&self) {
        loop {
            self.read();
            if !self.post.let_go() {
                return;
            }
        }
    }

    /// All that was freed is back, with nobody left to look after it.
    fn check(&self) {
        for slab in &self.slabs {
            assert_eq!(slab.back.get(), slab.links.len(), "no block is lost");
            assert!(slab.released.get());
        }
        assert!(self.post.claim(), "nobody owns it");
        assert!(self.post.take().is_null(), "no mail is left");
    }
}

fn model(f: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(f);
}

fn free(heap: &Arc<Heap>, slab: usize, first: u16, last: u16) -> thread::JoinHandle<()> {
    let heap = heap.clone();
    thread::spawn(move || heap.free(slab, first, last))
}

#[test]
fn no_block_is_lost_when_the_owner_goes() {
    model(|| {
        let heap = Heap::new(&[3]);
        let senders = [free(&heap, 0, 0, 0), free(&heap, 0, 1, 2)];
        heap.leave();
        senders.into_iter().for_each(|sender| sender.join().unwrap());
        heap.check();
    });
}

#[test]
fn mail_of_several_slabs_is_read_by_whoever_owns_the_heap() {
    model(|| {
        let heap = Heap::new(&[1, 1]);
        let senders = [free(&heap, 0, 0, 0), free(&heap, 1, 0, 0)];
        heap.read();
        heap.leave();
        senders.into_iter().for_each(|sender| sender.join().unwrap());
        heap.check();
    });
}

#[test]
fn a_thread_that_adopts_the_heap_meets_no_other_owner() {
    model(|| {
        let heap = Heap::new(&[2]);
        let sender = free(&heap, 0, 0, 0);
        let adopter = {
            let heap = heap.clone();
            thread::spawn(move || {
                if heap.post.claim() {
                    heap.leave();
                }
                heap.free(0, 1, 1);
            })
        };
        heap.leave();
        sender.join().unwrap();
        adopter.join().unwrap();
        heap.check();
    });
}
