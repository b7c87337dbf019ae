//! The functions in C's words, and the allocator as this very program's.
#![allow(missing_docs, unsafe_code)]

use std::ffi::c_void;
use std::ptr;

#[global_allocator]
static ALLOC: usvm_alloc::Usvm = usvm_alloc::Usvm::new();

const SIZES: [usize; 16] =
    [0, 1, 7, 8, 9, 16, 31, 100, 1000, 4096, 10_000, 16_384, 70_000, 1 << 20, (2 << 20) + 1, 20 << 20];

#[test]
fn the_runtime_finds_its_own_memory_routed() {
    assert!(usvm::ground::alloc::installed());
    let own = usvm::ground::alloc::internal(|| Box::new(1u64));
    assert!(!usvm_alloc::owns(ptr::from_ref(&*own).cast()), "usvm's own memory is not the heap's");
    let ours = Box::new(1u64);
    assert!(usvm_alloc::owns(ptr::from_ref(&*ours).cast()));
}

#[test]
fn blocks_hold_what_was_asked_for() {
    for size in SIZES {
        // SAFETY: every block is freed once and written inside its usable size.
        unsafe {
            let block = usvm_alloc::malloc(size);
            assert!(!block.is_null() && usvm_alloc::owns(block));
            let usable = usvm_alloc::usable_size(block);
            assert!(usable >= size, "{usable} for {size}");
            ptr::write_bytes(block.cast::<u8>(), 0xA5, usable.min(1 << 20));
            let larger = usvm_alloc::realloc(block, size * 2 + 1).cast::<u8>();
            assert!((0..size.min(1 << 20)).all(|i| *larger.add(i) == 0xA5));
            let smaller = usvm_alloc::realloc(larger.cast(), size / 2 + 1).cast::<u8>();
            assert!((0..(size / 2).min(1 << 20)).all(|i| *smaller.add(i) == 0xA5));
            usvm_alloc::free(smaller.cast());
            let zero = usvm_alloc::calloc(size, 3).cast::<u8>();
            assert!((0..size * 3).step_by(61).all(|i| *zero.add(i) == 0));
            usvm_alloc::free(zero.cast());
        }
    }
}

#[test]
fn alignments_are_kept() {
    for shift in 0..24 {
        for size in [0, 1, 40, 5000, 3 << 20] {
            // SAFETY: freed once.
            unsafe {
                let block = usvm_alloc::aligned_alloc(1 << shift, size);
                assert!(!block.is_null() && block.addr().is_multiple_of(1 << shift));
                ptr::write_bytes(block.cast::<u8>(), 1, size.min(8192));
                usvm_alloc::free(block);
            }
        }
    }
}

#[test]
fn what_cannot_be_is_null() {
    // SAFETY: nothing is allocated.
    unsafe {
        assert!(usvm_alloc::malloc(usize::MAX / 2).is_null());
        assert!(usvm_alloc::calloc(usize::MAX / 2, 3).is_null());
        assert!(usvm_alloc::aligned_alloc(24, 100).is_null());
        assert!(usvm_alloc::aligned_alloc(0, 100).is_null());
        assert!(usvm_alloc::aligned_alloc(1 << 62, 1 << 62).is_null());
        usvm_alloc::free(ptr::null_mut());
        assert_eq!(usvm_alloc::usable_size(ptr::null()), 0);
        let block = usvm_alloc::malloc(100).cast::<u8>();
        block.write_bytes(3, 100);
        assert!(usvm_alloc::realloc(block.cast(), usize::MAX / 2).is_null());
        assert!((0..100).all(|i| *block.add(i) == 3), "a failed realloc leaves the block");
        usvm_alloc::free(block.cast());
    }
}

#[test]
fn foreign_memory_is_not_owned() {
    let stack = 0u8;
    // SAFETY: malloc's block is freed by its own allocator.
    unsafe {
        let theirs = libc::malloc(1000);
        for foreign in [ptr::null(), ptr::from_ref(&stack).cast::<c_void>(), theirs, 16 as *const c_void] {
            assert!(!usvm_alloc::owns(foreign), "{foreign:?}");
        }
        libc::free(theirs);
    }
}
