//! The threads' heaps of small blocks.
//!
//! # Overview
//! A thread owns one [`Heap`], which owns slabs. Of each class one slab is *current* and gives out blocks; slabs with free
//! blocks are listed, full ones are in no list, empty ones are kept as spare for any class, or given back. Taking and freeing
//! a block of one's own is a few plain loads and stores.
//!
//! A thread that frees blocks of another heap chains up to 32 of one slab and then sends them there ([`crate::post`]). The
//! owner reads its mail when it would need new memory.
//!
//! When a thread ends, its heap stays, with what is still live, for a thread that begins later. Mail for a heap without a
//! thread is read by the thread that sent it, so that memory of ended threads is returned as well.
//!
//! The C library frees some blocks of its own on a thread whose destructors have all run (what belonged to cached stacks). A
//! heap that was claimed then would never be let go of, and jemalloc would keep such a thread in a list for ever, in memory
//! that is gone. So a thread that has no heap gives the first blocks that it frees away one by one ([`FEW`]), and jemalloc
//! hears of a thread no later than its heap does, so that it knows that the thread has ended.
//!
//! Destructors of thread-specific data run in a few rounds, and what allocates there after the heap is gone claims one again,
//! which is let go of in the next round, if there is one. So from a thread's third ending on ([`ENDINGS`]) it gets blocks
//! without a heap.
//!
//! # Locking
//! None: a heap is used only by whoever claimed it. So fork needs no care: in the child the heaps of the
//! threads that are gone are never used, and freeing their blocks goes to their mail.
//!
//! # Limits
//! Heaps are never unmapped: there are as many as there ever were threads at one time.
//!
//! # Safety
//! Heaps live forever. Between the claim and the letting go, everything in the heap and its slabs except `post` belongs to
//! the one who claimed it; acquire and release order one owner's use before the next one's.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, Ordering};

use crate::class::{self, CLASSES, LARGEST};
use crate::deferred;
use crate::large::{self, Arena};
use crate::post::{OWNED, Post};
use crate::slab::{self, Chain, Place, Slab};

/// Empty slabs that a heap keeps.
const SPARES: usize = 16;

/// Blocks of another heap's slab that are handed over together at most.
const CHAIN: u16 = 32;

/// How many blocks a thread frees before that alone gives it a heap: more than the C library frees on an ending thread.
const FEW: u16 = 256;

/// The ending after which a thread gets no heap: one round less than there are (PTHREAD_DESTRUCTOR_ITERATIONS).
const ENDINGS: u8 = 3;

/// One thread's slabs.
pub(crate) struct Heap {
    current: [*mut Slab; CLASSES],
    listed: [*mut Slab; CLASSES],
    spares: [*mut Slab; SPARES],
    spare_count: usize,
    /// What the thread freed of another heap and has not handed over yet.
    leaving: Chain,
    post: Post<Slab>,
    /// Where its memory comes from; `None` if there can be none.
    arena: Option<Arena>,
    /// The next of all heaps.
    next: *mut Heap,
}

struct Nobody(Heap);

// SAFETY: never written, as it has no slabs and is in no list.
unsafe impl Sync for Nobody {}

/// The heap of threads that have none yet: it has nothing to give.
static NOBODY: Nobody = Nobody(Heap::new());

static HEAPS: AtomicPtr<Heap> = AtomicPtr::new(ptr::null_mut());
/// The key whose destructor tells that a thread ends, plus one; 0 before there is one.
static KEY: AtomicU32 = AtomicU32::new(0);

thread_local! {
    static HEAP: Cell<*mut Heap> = const { Cell::new((&raw const NOBODY.0).cast_mut()) };
    /// Blocks that it freed while it had no heap.
    static FREED: Cell<u16> = const { Cell::new(0) };
    /// How often it let go of a heap.
    static ENDED: Cell<u8> = const { Cell::new(0) };
}

impl Heap {
    const fn new() -> Self {
        Self {
            current: [slab::nothing(); CLASSES],
            listed: [ptr::null_mut(); CLASSES],
            spares: [ptr::null_mut(); SPARES],
            spare_count: 0,
            leaving: Chain::NONE,
            post: Post { mail: AtomicPtr::new(ptr::null_mut()), state: AtomicU8::new(OWNED) },
            arena: None,
            next: ptr::null_mut(),
        }
    }
}

/// A block of `size` bytes, at most [`LARGEST`]; null when there is no memory.
#[inline(always)]
pub(crate) fn alloc(size: usize) -> *mut u8 {
    let class = class::of(size);
    let heap = HEAP.get();
    // SAFETY: the heap is this thread's, or nobody's, whose slabs have nothing to give.
    unsafe {
        let block = Slab::pop((*heap).current[class]);
        if block.is_null() { alloc_slowly(class) } else { block }
    }
}

/// Frees a block if it is a small one. False if it is not.
///
/// # Safety
/// `block` is a live block of this allocator, or an address that is none of its.
#[inline(always)]
pub(crate) unsafe fn free(block: *mut u8) -> bool {
    let Some((slab, granules)) = slab::record_of(block) else { return false };
    // SAFETY: a live block's slab is there; where none is, the record says so.
    unsafe {
        let owner = Slab::owner(slab);
        if owner == HEAP.get() {
            if Slab::push(slab, granules) {
                settle(owner, slab);
            }
            return true;
        }
        if owner.is_null() {
            return false;
        }
        free_elsewhere(slab, granules);
        true
    }
}

/// Frees a block of another heap: adds it to this heap's chain, which is handed over when it is long or another slab's turn.
#[inline(never)]
unsafe fn free_elsewhere(slab: *mut Slab, granules: u16) {
    let heap = match has_none() {
        false => HEAP.get(),
        true if FREED.get() < FEW => ptr::null_mut(),
        true => large::keeping_errno(own),
    };
    // SAFETY: the heap is this thread's; the block is the caller's.
    unsafe {
        if heap.is_null() {
            FREED.set(FREED.get().saturating_add(1));
            hand_over(Slab::chain(slab, granules, Chain::NONE));
            return;
        }
        let before = (*heap).leaving;
        if before.slab == slab && before.len < CHAIN {
            (*heap).leaving = Slab::chain(slab, granules, before);
            return;
        }
        (*heap).leaving = Slab::chain(slab, granules, Chain::NONE);
        if before.len > 0 {
            hand_over(before);
        }
    }
}

/// Gives a chain, with a block at least, to its slab's owner.
unsafe fn hand_over(chain: Chain) {
    // SAFETY: the owner stays the same until it has the chain's blocks, and heaps live forever.
    unsafe {
        let owner = Slab::owner(chain.slab);
        if Slab::hand_over(chain) {
            send(owner, chain.slab);
        }
    }
}

/// Hands over what this heap's thread freed of others.
unsafe fn flush(heap: *mut Heap) {
    // SAFETY: the caller owns the heap.
    unsafe {
        let chain = (*heap).leaving;
        (*heap).leaving = Chain::NONE;
        if chain.len > 0 {
            hand_over(chain);
        }
    }
}

/// The bytes of a small block; `None` if it is none.
///
/// # Safety
/// As [`free`].
#[inline]
pub(crate) unsafe fn block_size(block: *const u8) -> Option<usize> {
    let (slab, _) = slab::record_of(block)?;
    // SAFETY: as in `free`.
    unsafe { (!Slab::owner(slab).is_null()).then(|| Slab::block_size(slab)) }
}

#[cold]
#[inline(never)]
fn alloc_slowly(class: usize) -> *mut u8 {
    deferred::free_all();
    let heap = own();
    if heap.is_null() {
        return without_slab(large::any_arena(), class);
    }
    // SAFETY: the heap is this thread's.
    unsafe {
        let slab = with_blocks(heap, class);
        if slab.is_null() { without_slab((*heap).arena, class) } else { Slab::pop(slab) }
    }
}

/// A block where there can be no slab, as aligned as the class is.
fn without_slab(arena: Option<Arena>, class: usize) -> *mut u8 {
    let size = class::size(class);
    large::alloc(arena, size, 1 << size.trailing_zeros(), false)
}

/// The arena for this thread's large blocks.
pub(crate) fn arena() -> Option<Arena> {
    deferred::free_all();
    let heap = own();
    // SAFETY: heaps live forever, and this field is written before the heap is published.
    if heap.is_null() { large::any_arena() } else { unsafe { (*heap).arena } }
}

/// The current slab of the class, with something on its stack; null when there is no memory.
unsafe fn with_blocks(heap: *mut Heap, class: usize) -> *mut Slab {
    // SAFETY: the caller owns the heap.
    unsafe {
        let current = (*heap).current[class];
        if current != slab::nothing() {
            if Slab::has_free(current) || Slab::carve(current) {
                return current;
            }
            Slab::put(current, Place::Full);
            (*heap).current[class] = slab::nothing();
        }
        // As late as can be, so that others have freed much before it is collected, and are not at it meanwhile.
        if (*heap).listed[class].is_null() && (*heap).post.has_mail() {
            read_mail(heap);
        }
        let listed = (*heap).listed[class];
        let next = if !listed.is_null() {
            unlist(heap, listed);
            Slab::put(listed, Place::Current);
            listed
        } else {
            fresh(heap, class)
        };
        if !next.is_null() {
            (*heap).current[class] = next;
        }
        next
    }
}

/// An empty slab made ready for the class.
unsafe fn fresh(heap: *mut Heap, class: usize) -> *mut Slab {
    // SAFETY: the caller owns the heap and so its spares.
    unsafe {
        let slab = match (*heap).spare_count {
            0 => match (*heap).arena {
                Some(arena) => slab::make(heap, arena, class),
                None => ptr::null_mut(),
            },
            count => {
                let spare = (*heap).spares[count - 1];
                if !Slab::reuse(spare, class) {
                    return ptr::null_mut();
                }
                (*heap).spare_count = count - 1;
                spare
            }
        };
        if !slab.is_null() {
            Slab::carve(slab);
        }
        slab
    }
}

/// Puts a slab where it belongs after blocks of it were freed.
#[cold]
#[inline(never)]
unsafe fn settle(heap: *mut Heap, slab: *mut Slab) {
    // SAFETY: the caller owns the heap and the slab.
    unsafe {
        match Slab::place(slab) {
            Place::Current | Place::Nowhere => return,
            Place::Full => list(heap, slab),
            Place::Listed => {}
        }
        if Slab::is_empty(slab) {
            unlist(heap, slab);
            retire(heap, slab);
        }
    }
}

unsafe fn list(heap: *mut Heap, slab: *mut Slab) {
    // SAFETY: the caller owns the heap and the slab, which is in no list.
    unsafe {
        let head = &mut (*heap).listed[Slab::class(slab)];
        let (previous, next) = Slab::neighbours(slab);
        *previous = ptr::null_mut();
        *next = *head;
        if !head.is_null() {
            *Slab::neighbours(*head).0 = slab;
        }
        *head = slab;
        Slab::put(slab, Place::Listed);
    }
}

unsafe fn unlist(heap: *mut Heap, slab: *mut Slab) {
    // SAFETY: the caller owns the heap and the slab, which is in its class's list.
    unsafe {
        let (previous, next) = Slab::neighbours(slab);
        let (previous, next) = (*previous, *next);
        if previous.is_null() {
            (*heap).listed[Slab::class(slab)] = next;
        } else {
            *Slab::neighbours(previous).1 = next;
        }
        if !next.is_null() {
            *Slab::neighbours(next).0 = previous;
        }
    }
}

/// Keeps an empty slab for another class, or gives it back.
unsafe fn retire(heap: *mut Heap, slab: *mut Slab) {
    // SAFETY: the caller owns the heap and the slab, which is in no list.
    unsafe {
        let count = (*heap).spare_count;
        if count < SPARES {
            Slab::put(slab, Place::Nowhere);
            (*heap).spares[count] = slab;
            (*heap).spare_count = count + 1;
        } else {
            Slab::release(slab);
        }
    }
}

/// Puts a slab into the mail of its owner, and reads the mail if the owner has no thread.
#[cold]
unsafe fn send(heap: *mut Heap, slab: *mut Slab) {
    // SAFETY: heaps live forever; the slab stays until its mail is read, which cannot be before it is sent.
    unsafe {
        if (*heap).post.send(slab, &(*slab).mail_next) {
            leave(heap);
        }
    }
}

/// Settles the slabs in whose blocks others freed some.
unsafe fn read_mail(heap: *mut Heap) {
    // SAFETY: the caller owns the heap. A slab in the mail is nobody else's to send; as soon as its list is taken it may
    // be sent again, so its link is read before.
    unsafe {
        let mut slab = (*heap).post.take();
        while !slab.is_null() {
            let next = (*slab).mail_next.load(Ordering::Relaxed);
            Slab::collect(slab);
            settle(heap, slab);
            slab = next;
        }
    }
}

/// Gives back what is empty and lets go of the heap.
unsafe fn leave(heap: *mut Heap) {
    // SAFETY: the caller owns the heap until it lets go.
    unsafe {
        loop {
            read_mail(heap);
            give_back(heap);
            if !(*heap).post.let_go() {
                return;
            }
        }
    }
}

unsafe fn give_back(heap: *mut Heap) {
    // SAFETY: the caller owns the heap.
    unsafe {
        for class in 0..CLASSES {
            let current = (*heap).current[class];
            if current == slab::nothing() {
                continue;
            }
            if Slab::is_empty(current) {
                (*heap).current[class] = slab::nothing();
                Slab::release(current);
            }
        }
        while (*heap).spare_count > 0 {
            (*heap).spare_count -= 1;
            Slab::release((*heap).spares[(*heap).spare_count]);
        }
    }
}

/// Gives back what is empty in this thread's heap and in those without a thread.
pub(crate) fn trim() {
    let own = HEAP.get();
    let mut heap = HEAPS.load(Ordering::Acquire);
    // SAFETY: heaps live forever; each is used only if it is this thread's or claimed.
    unsafe {
        while !heap.is_null() {
            if heap == own {
                flush(heap);
                read_mail(heap);
                give_back(heap);
            } else if (*heap).post.claim() {
                leave(heap);
            }
            heap = (*heap).next;
        }
    }
}

fn has_none() -> bool {
    HEAP.get() == (&raw const NOBODY.0).cast_mut()
}

/// This thread's heap; null when it can have none.
fn own() -> *mut Heap {
    if !has_none() {
        return HEAP.get();
    }
    if ENDED.get() >= ENDINGS {
        return ptr::null_mut();
    }
    large::greet();
    let heap = adopt();
    if !heap.is_null() {
        // First, so that whatever allocates in here finds a heap.
        HEAP.set(heap);
        tell_at_the_end(heap);
    }
    heap
}

/// A heap that has no thread, or a new one.
fn adopt() -> *mut Heap {
    let mut heap = HEAPS.load(Ordering::Acquire);
    // SAFETY: heaps live forever, and `next` was written before the heap was published.
    unsafe {
        while !heap.is_null() {
            if (*heap).post.claim() {
                return heap;
            }
            heap = (*heap).next;
        }
        let new = large::bookkeeping(size_of::<Heap>()).cast::<Heap>();
        if new.is_null() {
            return new;
        }
        new.write(Heap { arena: large::next_arena(), ..Heap::new() });
        let mut head = HEAPS.load(Ordering::Relaxed);
        loop {
            (*new).next = head;
            match HEAPS.compare_exchange_weak(head, new, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return new,
                Err(now) => head = now,
            }
        }
    }
}

/// Lets [`thread_ends`] be called when this thread ends. Without a key the heap is not used again; nothing else is lost.
fn tell_at_the_end(heap: *mut Heap) {
    let mut key = KEY.load(Ordering::Acquire);
    // SAFETY: the functions get what they are documented to get; a key that lost the race is deleted unused.
    unsafe {
        if key == 0 {
            let mut made: libc::pthread_key_t = 0;
            if libc::pthread_key_create(&raw mut made, Some(thread_ends)) != 0 {
                return;
            }
            match KEY.compare_exchange(0, made + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => key = made + 1,
                Err(theirs) => {
                    libc::pthread_key_delete(made);
                    key = theirs;
                }
            }
        }
        libc::pthread_setspecific(key - 1, heap.cast::<c_void>());
    }
}

/// What allocates after this (other destructors of the thread) gets a heap again, and this is called again.
unsafe extern "C" fn thread_ends(heap: *mut c_void) {
    HEAP.set((&raw const NOBODY.0).cast_mut());
    FREED.set(0);
    ENDED.set(ENDED.get().saturating_add(1));
    // SAFETY: the heap was this thread's until now.
    unsafe {
        flush(heap.cast());
        leave(heap.cast());
    }
}

const _: () = assert!(LARGEST <= slab::SLAB / 2);

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Heaps of ended threads go to whoever comes: one test at a time.
    static TURN: Mutex<()> = Mutex::new(());

    #[test]
    fn small_blocks_are_in_slabs_and_go_back_there() {
        let _turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let blocks: Vec<*mut u8> = (0..20_000).map(|i| alloc(1 + i % LARGEST)).collect();
        for (i, block) in blocks.iter().enumerate() {
            // SAFETY: live blocks, freed once.
            unsafe {
                let size = block_size(*block).expect("a small block is in a slab");
                assert!(size > i % LARGEST && size <= class::size(class::of(1 + i % LARGEST)));
                assert!(free(*block));
            }
        }
        // The newest free block of a class is the next to be given out.
        let again = alloc(1 + (blocks.len() - 1) % LARGEST);
        assert!(blocks.contains(&again));
        // SAFETY: live, freed once.
        unsafe { assert!(free(again)) };
    }

    #[test]
    fn a_heap_of_an_ended_thread_takes_frees() {
        let _turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // So that this thread does not take the ended one's heap over.
        assert!(!own().is_null());
        let blocks: Vec<usize> =
            std::thread::spawn(|| (0..3000).map(|_| alloc(1000).expose_provenance()).collect())
                .join()
                .unwrap();
        let slabs = || {
            let at = |b: &usize| ptr::with_exposed_provenance_mut::<u8>(*b);
            // SAFETY: records are never unmapped.
            blocks
                .iter()
                .filter(|b| slab::record_of(at(b)).is_some_and(|(s, _)| unsafe { !Slab::owner(s).is_null() }))
                .count()
        };
        assert_eq!(slabs(), blocks.len());
        for block in &blocks {
            // SAFETY: live, freed once, by a thread that did not make them.
            unsafe { assert!(free(ptr::with_exposed_provenance_mut(*block))) };
        }
        // The last chain is handed over when the thread does something else.
        // SAFETY: this thread's heap.
        unsafe { flush(own()) };
        assert_eq!(slabs(), 0, "empty slabs of a heap without a thread are given back at once");
    }

    /// A destructor of thread-specific data that allocates in every round, after the thread's heap is gone.
    unsafe extern "C" fn in_every_round(key: *mut c_void) {
        let block = alloc(100);
        // SAFETY: live, freed once; the value is the key plus one.
        unsafe {
            if !free(block) {
                large::free(block);
            }
            libc::pthread_setspecific(key.addr() as libc::pthread_key_t - 1, key);
        }
    }

    #[test]
    fn no_heap_is_claimed_when_nobody_would_let_go_of_it() {
        let _turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let heaps = || {
            let mut count = 0;
            let mut heap = HEAPS.load(Ordering::Acquire);
            while !heap.is_null() {
                count += 1;
                // SAFETY: heaps live forever.
                heap = unsafe { (*heap).next };
            }
            count
        };
        // So that the heap's own key comes first.
        assert!(!own().is_null());
        let mut key: libc::pthread_key_t = 0;
        // SAFETY: the key lives as long as the threads.
        assert_eq!(unsafe { libc::pthread_key_create(&raw mut key, Some(in_every_round)) }, 0);
        let before = heaps();
        for _ in 0..20 {
            let thread = std::thread::spawn(move || {
                let value = ptr::without_provenance::<c_void>(key as usize + 1);
                // SAFETY: a key's value.
                assert_eq!(unsafe { libc::pthread_setspecific(key, value) }, 0);
                assert!(!own().is_null());
            });
            thread.join().unwrap();
        }
        assert!(heaps() < before + 10, "{} heaps more", heaps() - before);
    }
}
