//! usvm's own memory: never registered with userfaultfd, never migrated.
//!
//! # Overview
//! The threads that serve faults must not themselves fault on memory that waits for them. So everything usvm allocates
//! comes from two mapped areas of its own, and [`Routed`] is the program's `#[global_allocator]` that sends each
//! allocation to the right place:
//!
//! ```
//! #[global_allocator]
//! static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);
//! # fn main() { assert!(usvm::ground::alloc::installed()); }
//! ```
//!
//! | who allocates | where it goes |
//! |---|---|
//! | a thread of usvm | the *service* area |
//! | an application thread inside a call into usvm (see [`internal`]) | the *mailbox* area |
//! | anybody else | the allocator inside [`Routed`] |
//!
//! # Locking
//! Each area has one mutex, taken only by the threads of its own row above. The other side frees through a lock-free
//! list that the owners drain. This matters because an application thread's own stack may be migrated while it holds
//! the mailbox mutex: whoever serves that stack must never wait for it.
//!
//! # Limits
//! An area is one reservation of address space (64 GiB down to 4 MiB, whatever RLIMIT_AS lets be mapped), opened step by
//! step: neither untouched parts nor mlockall cost memory. When an area is full, usvm's allocations fail as any allocation does.
//!
//! # Safety
//! [`GlobalAlloc`]: a block goes back to the area whose addresses hold it, whichever thread frees it, so no block is
//! ever given to an allocator that did not make it. Area bounds are published once, before the first block is given
//! out. A block on the free list is owned by the list: its first bytes hold the link and the layout, which is why no
//! block is smaller than `FreeBlock`.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, UnsafeCell};
use std::ptr::{self, NonNull};
use std::sync::Mutex;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use talc::DefaultBinning;
use talc::base::Talc;
use talc::source::Manual;

use crate::ground::addr::Span;
use crate::ground::inject::{self, Call};

/// Who the current thread allocates as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Application,
    Mailbox,
    Service,
}

thread_local! {
    static ROLE: Cell<Role> = const { Cell::new(Role::Application) };
}

static SERVICE: Area = Area::new();
static MAILBOX: Area = Area::new();

/// Makes the current thread one of usvm's own for the rest of its life.
pub(crate) fn become_service_thread() {
    ROLE.set(Role::Service);
}

/// Whether the current thread is one of usvm's own.
pub fn is_service_thread() -> bool {
    ROLE.get() == Role::Service
}

/// Whether the current thread is one of usvm's own, or inside a call into usvm.
pub fn is_internal() -> bool {
    ROLE.get() != Role::Application
}

/// Runs `f` with its allocations going to usvm's own memory. Every entry of an application thread into usvm does.
pub fn internal<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(Role);
    impl Drop for Restore {
        fn drop(&mut self) {
            ROLE.set(self.0);
        }
    }
    let before = ROLE.get();
    let _restore = Restore(before);
    if before == Role::Application {
        ROLE.set(Role::Mailbox);
    }
    f()
}

/// Runs `f`, the application's code, with its allocations going where the application's go, even on a thread of usvm.
pub fn external<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(Role);
    impl Drop for Restore {
        fn drop(&mut self) {
            ROLE.set(self.0);
        }
    }
    let _restore = Restore(ROLE.replace(Role::Application));
    f()
}

/// Whether [`Routed`] (or an allocator that behaves as it does) is this program's global allocator.
pub fn installed() -> bool {
    internal(|| {
        let probe = std::hint::black_box(Box::new([0u8; 64]));
        let at = ptr::from_ref(&*probe) as usize;
        SERVICE.holds(at) || MAILBOX.holds(at)
    })
}

/// The addresses of usvm's own memory, for the exempt set.
pub fn spans() -> [Span; 2] {
    [SERVICE.span(), MAILBOX.span()]
}

/// Maps usvm's own memory now, so that [`spans`] is complete before anything migrates. `false` when there is no room.
pub fn reserve() -> bool {
    [&SERVICE, &MAILBOX].into_iter().all(|area| {
        let mut heap = area.lock();
        area.base.load(Ordering::Relaxed) != 0 || area.reserve(&mut heap)
    })
}

/// For a forked child, where only one thread lives: whoever held an area's lock at the fork is gone, so both areas
/// are left as they are and new ones begun. Blocks of the old areas stay readable and are never reused.
pub(crate) fn renew_after_fork() {
    SERVICE.renew();
    MAILBOX.renew();
}

/// For a forked child: its thread is the program's, wherever it forked.
pub(crate) fn become_application_thread() {
    ROLE.set(Role::Application);
}

/// For a forked child without a runtime to leave behind: begins the areas anew whose lock another thread held.
pub(crate) fn renew_held_after_fork() {
    [&SERVICE, &MAILBOX].into_iter().filter(|area| area.is_held()).for_each(|area| area.renew());
}

/// The global allocator of a program that has the runtime inside: routes usvm's own allocations to usvm's own memory
/// and everything else to `A`.
#[derive(Debug, Default, Clone, Copy)]
pub struct Routed<A = System>(pub A);

// SAFETY: each block is freed to, and resized by, the allocator that made it: areas are told apart by address.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Routed<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match ROLE.get() {
            // SAFETY: the caller's contract.
            Role::Application => unsafe { self.0.alloc(layout) },
            Role::Mailbox => MAILBOX.alloc(layout),
            Role::Service => SERVICE.alloc(layout),
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if ROLE.get() == Role::Application {
            // SAFETY: the caller's contract.
            return unsafe { self.0.alloc_zeroed(layout) };
        }
        // SAFETY: the caller's contract; a block that was given out has `layout.size()` bytes to write.
        unsafe {
            let block = self.alloc(layout);
            if !block.is_null() {
                ptr::write_bytes(block, 0, layout.size());
            }
            block
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        for (area, owner) in [(&SERVICE, Role::Service), (&MAILBOX, Role::Mailbox)] {
            if area.holds(block as usize) {
                // SAFETY: `block` came from this area with this layout (the caller's contract and the address).
                unsafe { area.dealloc(block, layout, ROLE.get() == owner) };
                return;
            }
            if area.is_retired(block as usize) {
                return;
            }
        }
        // SAFETY: not from an area, so from the inner allocator.
        unsafe { self.0.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        let own = |area: &Area| area.holds(block as usize) || area.is_retired(block as usize);
        let foreign = !own(&SERVICE) && !own(&MAILBOX);
        if foreign && ROLE.get() == Role::Application {
            // SAFETY: the caller's contract; the block is the inner allocator's.
            return unsafe { self.0.realloc(block, layout, new_size) };
        }
        // SAFETY: `new_size` and the alignment make a valid layout by the caller's contract; both blocks have at
        // least the smaller size.
        unsafe {
            let new = self.alloc(Layout::from_size_align_unchecked(new_size, layout.align()));
            if !new.is_null() {
                ptr::copy_nonoverlapping(block, new, layout.size().min(new_size));
                self.dealloc(block, layout);
            }
            new
        }
    }
}

type Heap = Talc<Manual, DefaultBinning>;

/// A block that waits to be freed by its area's owners.
struct FreeBlock {
    next: *mut FreeBlock,
    layout: Layout,
}

struct Area {
    base: AtomicUsize,
    end: AtomicUsize,
    /// Where what the heap may use ends.
    opened: AtomicUsize,
    /// Where the heap itself says that it ends; 0 before it has anything.
    heap_end: AtomicUsize,
    heap: UnsafeCell<Mutex<Heap>>,
    returned: AtomicPtr<FreeBlock>,
    /// Begins and ends of the areas of the processes this one was forked from.
    retired: [(AtomicUsize, AtomicUsize); GENERATIONS],
}

/// Forks of forks of forks that may each run usvm anew.
const GENERATIONS: usize = 8;

// SAFETY: the heap is behind its mutex and only ever points into the area's own mapping; the list is atomic.
unsafe impl Sync for Area {}

impl Area {
    const fn new() -> Self {
        Self {
            base: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            opened: AtomicUsize::new(0),
            heap_end: AtomicUsize::new(0),
            heap: UnsafeCell::new(Mutex::new(Talc::new(Manual))),
            returned: AtomicPtr::new(ptr::null_mut()),
            retired: [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; GENERATIONS],
        }
    }

    /// See [`renew_after_fork`].
    fn renew(&self) {
        let base = self.base.load(Ordering::Relaxed);
        // One that is only about to be reserved has no blocks yet, but its lock may be held.
        if base != 0 {
            let unused = |(base, _): &&(AtomicUsize, AtomicUsize)| base.load(Ordering::Relaxed) == 0;
            let Some(slot) = self.retired.iter().find(unused) else { return };
            slot.1.store(self.end.load(Ordering::Relaxed), Ordering::Relaxed);
            slot.0.store(base, Ordering::Relaxed);
        }
        self.returned.store(ptr::null_mut(), Ordering::Relaxed);
        self.base.store(0, Ordering::Relaxed);
        self.heap_end.store(0, Ordering::Relaxed);
        let fresh: Mutex<Heap> = Mutex::new(Talc::new(Manual));
        // SAFETY: the child has one thread, which runs this: nobody holds or waits for the lock. The old heap points
        // into the retired area only, which stays mapped.
        unsafe { ptr::write(self.heap.get(), fresh) };
    }

    fn is_retired(&self, at: usize) -> bool {
        self.retired.iter().any(|(base, end)| {
            let base = base.load(Ordering::Relaxed);
            base != 0 && at >= base && at < end.load(Ordering::Relaxed)
        })
    }

    fn span(&self) -> Span {
        let base = self.base.load(Ordering::Acquire);
        Span::new(base as u64, self.end.load(Ordering::Acquire) as u64)
    }

    #[inline]
    fn holds(&self, at: usize) -> bool {
        let base = self.base.load(Ordering::Acquire);
        base != 0 && at >= base && at < self.end.load(Ordering::Acquire)
    }

    /// Room for a `FreeBlock` in every block.
    fn padded(layout: Layout) -> Layout {
        let least = Layout::new::<FreeBlock>();
        let size = layout.size().max(least.size());
        Layout::from_size_align(size, layout.align().max(least.align())).unwrap_or(layout)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Heap> {
        // SAFETY: the cell is only written by a forked child that has no second thread (see `renew`).
        let heap = unsafe { &*self.heap.get() };
        // A panic inside the heap would be a bug of the heap; its state is as good as it gets.
        heap.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Whether somebody has the lock.
    fn is_held(&self) -> bool {
        // SAFETY: as in `lock`.
        let heap = unsafe { &*self.heap.get() };
        matches!(heap.try_lock(), Err(std::sync::TryLockError::WouldBlock))
    }

    fn alloc(&self, layout: Layout) -> *mut u8 {
        let mut heap = self.lock();
        if self.base.load(Ordering::Relaxed) == 0 && !self.reserve(&mut heap) {
            return ptr::null_mut();
        }
        self.drain(&mut heap);
        let layout = Self::padded(layout);
        loop {
            // SAFETY: `padded` never has size zero.
            if let Some(block) = unsafe { heap.allocate(layout) } {
                return block.as_ptr();
            }
            // Room for the block, its alignment and the heap's own tags.
            if !self.grow(&mut heap, layout.size().saturating_add(layout.align()).saturating_add(4096)) {
                return ptr::null_mut();
            }
        }
    }

    /// # Safety
    /// `block` was given out by this area for `layout` and is not used any more.
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout, owner: bool) {
        let layout = Self::padded(layout);
        if owner {
            let mut heap = self.lock();
            self.drain(&mut heap);
            // SAFETY: the caller's contract.
            unsafe { heap.deallocate(block, layout) };
            return;
        }
        let node = block.cast::<FreeBlock>();
        let mut head = self.returned.load(Ordering::Relaxed);
        loop {
            // SAFETY: the block is ours now, large enough and aligned for a `FreeBlock` (see `padded`).
            unsafe { node.write(FreeBlock { next: head, layout }) };
            match self.returned.compare_exchange_weak(head, node, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Frees what the other side returned.
    fn drain(&self, heap: &mut Heap) {
        if self.returned.load(Ordering::Relaxed).is_null() {
            return;
        }
        let mut at = self.returned.swap(ptr::null_mut(), Ordering::Acquire);
        while !at.is_null() {
            // SAFETY: the list owns its blocks; swapping the head out made this thread the owner of all of it.
            let FreeBlock { next, layout } = unsafe { at.read() };
            // SAFETY: the block came from this heap with this layout.
            unsafe { heap.deallocate(at.cast(), layout) };
            at = next;
        }
    }

    /// Reserves the area: as much address space as can be had, from 64 GiB down, of which nothing can be used yet.
    fn reserve(&self, heap: &mut Heap) -> bool {
        let mut size = 64usize << 30;
        while size >= STEP {
            let asked = inject::check(Call::HeapMemory);
            // SAFETY: a new private anonymous mapping at an address of the kernel's choice touches nothing else.
            let map = || unsafe {
                libc::mmap(
                    ptr::null_mut(),
                    size,
                    libc::PROT_NONE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                    -1,
                    0,
                )
            };
            let at = if asked.is_ok() { map() } else { libc::MAP_FAILED };
            if at != libc::MAP_FAILED && !eats_the_limit(size) {
                self.opened.store(at as usize, Ordering::Relaxed);
                self.end.store(at as usize + size, Ordering::Release);
                self.base.store(at as usize, Ordering::Release);
                return self.grow(heap, STEP);
            }
            if at != libc::MAP_FAILED {
                // SAFETY: the mapping was made above and nothing points into it.
                unsafe { libc::munmap(at, size) };
            }
            size /= 4;
        }
        false
    }

    /// Opens at least `bytes` more of the area for the heap. `false` when the area is full or memory is short.
    fn grow(&self, heap: &mut Heap, bytes: usize) -> bool {
        let base = self.base.load(Ordering::Relaxed);
        let opened = self.opened.load(Ordering::Relaxed);
        // As much again as there is, so that growing costs little in all; if that is too much, what is needed.
        let room = self.end.load(Ordering::Relaxed) - opened;
        let at = ptr::with_exposed_provenance_mut::<u8>(opened);
        let sizes = [bytes.max(opened - base), bytes].map(|size| size.next_multiple_of(STEP).min(room));
        let fits = |more: &usize| *more >= bytes && open(at, *more);
        let Some(more) = sizes.into_iter().find(fits) else { return false };
        // Huge pages make look-ups in large tables a third cheaper; without them it only gets slower.
        // SAFETY: the area's own, opened above; the advice changes no contents.
        unsafe { libc::madvise(at.cast(), more, libc::MADV_HUGEPAGE) };
        let old_end = NonNull::new(ptr::with_exposed_provenance_mut(self.heap_end.load(Ordering::Relaxed)));
        // SAFETY: the bytes are accessible now, follow what the heap has, and nothing else uses them.
        let new_end = unsafe {
            match old_end {
                Some(old_end) => Some(heap.extend(old_end, at.add(more))),
                None => heap.claim(at, more),
            }
        };
        let Some(new_end) = new_end else { return false };
        self.heap_end.store(new_end.as_ptr().expose_provenance(), Ordering::Relaxed);
        self.opened.store(opened + more, Ordering::Relaxed);
        true
    }
}

/// Makes `len` bytes at `at`, of an area's reservation and beyond what its heap has, readable and writable.
fn open(at: *mut u8, len: usize) -> bool {
    if inject::check(Call::HeapMemory).is_err() {
        return false;
    }
    // SAFETY: the area's own reservation, which nobody uses yet (both callers' promise).
    unsafe { libc::mprotect(at.cast(), len, libc::PROT_READ | libc::PROT_WRITE) == 0 }
}

/// Least growth of an area, and the least that is of use.
const STEP: usize = 4 << 20;

/// Whether `size` is more of RLIMIT_AS than usvm should take from the program.
fn eats_the_limit(size: usize) -> bool {
    match rustix::process::getrlimit(rustix::process::Resource::As).current {
        Some(limit) => size as u64 > limit / 8,
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_go_back_to_their_area_from_any_side() {
        let routed = Routed(System);
        let layout = Layout::from_size_align(100, 8).unwrap();
        let address = |p: *mut u8| p as usize;
        // SAFETY: every block is freed once, with its layout.
        unsafe {
            let own = routed.alloc(layout);
            assert!(!SERVICE.holds(address(own)) && !MAILBOX.holds(address(own)));
            let mail = internal(|| routed.alloc(layout));
            assert!(MAILBOX.holds(address(mail)));
            let served = std::thread::spawn(move || {
                become_service_thread();
                address(routed.alloc(layout))
            })
            .join()
            .unwrap();
            assert!(SERVICE.holds(served));
            routed.dealloc(own, layout);
            routed.dealloc(mail, layout);
            routed.dealloc(served as *mut u8, layout);
            assert!(!SERVICE.returned.load(Ordering::Relaxed).is_null(), "freed by the other side: listed");
            // The owners take it back with their next allocation.
            std::thread::spawn(move || {
                become_service_thread();
                let p = routed.alloc(layout);
                assert!(SERVICE.returned.load(Ordering::Relaxed).is_null());
                routed.dealloc(p, layout);
            })
            .join()
            .unwrap();
        }
    }

    #[test]
    fn realloc_keeps_contents_across_areas() {
        let routed = Routed(System);
        let layout = Layout::from_size_align(64, 16).unwrap();
        // SAFETY: sizes as allocated; freed once.
        unsafe {
            let p = routed.alloc(layout);
            ptr::write_bytes(p, 7, 64);
            let q = internal(|| routed.realloc(p, layout, 4096));
            assert!(MAILBOX.holds(q as usize));
            assert!((0..64).all(|i| *q.add(i) == 7));
            let z = internal(|| routed.alloc_zeroed(Layout::from_size_align(512, 64).unwrap()));
            assert!((0..512).all(|i| *z.add(i) == 0) && (z as usize).is_multiple_of(64));
            routed.dealloc(q, Layout::from_size_align(4096, 16).unwrap());
            routed.dealloc(z, Layout::from_size_align(512, 64).unwrap());
        }
    }

    #[test]
    fn a_child_has_an_area_whose_lock_was_held_when_it_was_reserved() {
        static AREA: Area = Area::new();
        let layout = Layout::from_size_align(100, 8).unwrap();
        // As in a child of a fork while another thread made the first allocation.
        std::mem::forget(AREA.lock());
        assert!(AREA.is_held());
        AREA.renew();
        let first = AREA.alloc(layout);
        assert!(AREA.holds(first as usize) && !AREA.is_held());
        std::mem::forget(AREA.lock());
        AREA.renew();
        let second = AREA.alloc(layout);
        assert!(AREA.is_retired(first as usize) && AREA.holds(second as usize));
    }

    #[test]
    fn both_sides_free_each_others_blocks_at_once() {
        let routed = Routed(System);
        let layout = Layout::from_size_align(48, 8).unwrap();
        let (tx, rx) = std::sync::mpsc::sync_channel::<usize>(64);
        let maker = std::thread::spawn(move || {
            become_service_thread();
            for i in 0..20_000usize {
                // SAFETY: the block has 48 bytes and is given away to one receiver.
                unsafe {
                    let p = routed.alloc(layout);
                    p.cast::<usize>().write(i);
                    p.cast::<usize>().add(5).write(!i);
                    tx.send(p as usize).unwrap();
                }
            }
        });
        for (i, at) in rx.iter().enumerate() {
            // SAFETY: sent by the maker, freed here once.
            unsafe {
                let p = at as *mut usize;
                assert_eq!((p.read(), p.add(5).read()), (i, !i), "no block is given out twice");
                routed.dealloc(p.cast(), layout);
            }
        }
        maker.join().unwrap();
    }
}
