//! The allocators under test, behind one table of C functions, and blocks whose contents are checked.
//!
//! # Overview
//! Every allocator is called through the same kind of pointers, as a program calls `malloc` in a library. A [`Block`] is
//! marked at both ends when it is made, and the marks are checked when it is given back: a block that was handed out
//! twice, or written by the allocator, ends the run.
//!
//! # Safety
//! A [`Block`] is made only by [`Heap::block`] and is used up by [`Heap::free`], so each is freed once, by its own heap,
//! and only its own bytes are written.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ptr::NonNull;

/// C's functions of one allocator.
struct Table {
    name: &'static str,
    malloc: unsafe extern "C" fn(usize) -> *mut c_void,
    free: unsafe extern "C" fn(*mut c_void),
    /// Free with the size known, as C++14's sized `delete`.
    free_sized: unsafe extern "C" fn(*mut c_void, usize),
}

static TABLES: [Table; 4] = [
    Table { name: "usvm", malloc: usvm_malloc, free: usvm_free, free_sized: usvm_free_sized },
    Table {
        name: "mimalloc",
        malloc: libmimalloc_sys::mi_malloc,
        free: libmimalloc_sys::mi_free,
        free_sized: libmimalloc_sys::mi_free_size,
    },
    Table {
        name: "jemalloc",
        malloc: tikv_jemalloc_sys::malloc,
        free: tikv_jemalloc_sys::free,
        free_sized: jemalloc_free_sized,
    },
    Table { name: "glibc", malloc: libc::malloc, free: libc::free, free_sized: glibc_free_sized },
];

unsafe extern "C" fn usvm_malloc(size: usize) -> *mut c_void {
    // SAFETY: the caller's contract, which is C's.
    unsafe { usvm_alloc::malloc(size) }
}

unsafe extern "C" fn usvm_free(block: *mut c_void) {
    // SAFETY: as above.
    unsafe { usvm_alloc::free(block) }
}

unsafe extern "C" fn usvm_free_sized(block: *mut c_void, size: usize) {
    // SAFETY: as above.
    unsafe { usvm_alloc::free_sized(block, size) }
}

unsafe extern "C" fn jemalloc_free_sized(block: *mut c_void, size: usize) {
    // SAFETY: as above.
    unsafe { tikv_jemalloc_sys::sdallocx(block, size, 0) }
}

unsafe extern "C" fn glibc_free_sized(block: *mut c_void, _: usize) {
    // SAFETY: as above.
    unsafe { libc::free(block) }
}

/// One of the allocators under test.
#[derive(Clone, Copy)]
pub struct Heap(&'static Table);

/// A live block, marked at both ends.
pub struct Block {
    at: NonNull<u8>,
    size: usize,
}

// SAFETY: a block is owned memory; any thread may use and free it.
unsafe impl Send for Block {}

impl Heap {
    /// The allocators, the one that is judged first.
    pub fn names() -> impl Iterator<Item = &'static str> {
        TABLES.iter().map(|t| t.name)
    }

    /// The allocator of this name.
    pub fn named(name: &str) -> Option<Self> {
        TABLES.iter().find(|t| t.name == name).map(Self)
    }

    /// A new block of `size` bytes, at least one.
    #[inline]
    pub fn block(self, size: usize) -> Block {
        // SAFETY: any size is allowed.
        let at = unsafe { (self.0.malloc)(size) };
        Block::mark(at, size)
    }

    /// Checks the marks and frees.
    #[inline]
    pub fn free(self, block: Block) {
        block.check();
        // SAFETY: made by `block`, used up here.
        unsafe { (self.0.free)(block.at.as_ptr().cast()) }
    }

    /// As [`Heap::free`], telling the allocator the size.
    #[inline]
    pub fn free_sized(self, block: Block) {
        block.check();
        // SAFETY: as above; the size is the one it was made with.
        unsafe { (self.0.free_sized)(block.at.as_ptr().cast(), block.size) }
    }
}

impl Block {
    #[inline]
    fn mark(at: *mut c_void, size: usize) -> Self {
        let at = NonNull::new(at.cast::<u8>()).expect("the allocator has memory");
        let block = Self { at, size: size.max(1) };
        let mark = block.wanted();
        // SAFETY: first and last byte of a block of our own.
        unsafe {
            at.write(mark);
            at.add(block.size - 1).write(mark);
        }
        block
    }

    #[inline]
    fn wanted(&self) -> u8 {
        ((self.at.addr().get() >> 4) ^ self.size) as u8
    }

    #[inline]
    fn check(&self) {
        // SAFETY: first and last byte of a live block.
        let marks = unsafe { (self.at.read(), self.at.add(self.size - 1).read()) };
        let wanted = self.wanted();
        assert!(marks == (wanted, wanted), "a block's contents changed");
    }

    /// Its bytes.
    #[inline]
    pub fn size(&self) -> usize {
        self.size
    }

    /// Writes all of it, keeping the marks.
    #[inline]
    pub fn fill(&mut self) {
        let mark = self.wanted();
        // SAFETY: the block's own bytes.
        unsafe { self.at.write_bytes(mark, self.size) };
    }

    /// What its words are; the pattern has written them.
    #[inline]
    pub fn read(&self) -> &[u64] {
        // SAFETY: as in `words`.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr().cast(), self.size / 8) }
    }

    /// Its words, of which the first and last byte hold the marks.
    #[inline]
    pub fn words(&mut self) -> &mut [u64] {
        // SAFETY: the block's own bytes, which an allocator aligns for any type that fits. All bit patterns are
        // values; what was not written is read only as padding would be: patterns write before they read.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr().cast(), self.size / 8) }
    }
}
