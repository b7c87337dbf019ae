//! The watched mprotect takes rights from the device, too, before it returns.
//!
//! # Safety
//! The test changes the protection of its own mapping, and reaches it by address only.
#![allow(unsafe_code)]

use usvm::{Config, Runtime};
use usvm_capi::interpose;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

const LEN: usize = 2 << 20;
const PAGE: usize = 4096;

fn map() -> *mut u8 {
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping.
    let at =
        unsafe { libc::mmap(std::ptr::null_mut(), LEN, libc::PROT_READ | libc::PROT_WRITE, private, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at.cast()
}

fn protect(at: *mut u8, prot: i32) {
    // SAFETY: the test's own memory.
    let real = || unsafe { libc::mprotect(at.cast(), PAGE, prot) };
    // SAFETY: the calling thread's own errno.
    unsafe { *libc::__errno_location() = libc::ERANGE };
    assert_eq!(interpose::mprotect(at.cast(), PAGE, prot, real), 0);
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ERANGE), "errno is the program's");
}

/// The device adds one to a byte, unannounced.
fn add_one(runtime: &Runtime, at: *mut u8) -> usvm::Result<()> {
    let at = at.expose_provenance() as u64;
    runtime.launch(0, move |gpu| gpu.update(at, 1, |tile, _| tile[0] += 1)).wait(None).map(drop)
}

fn peek(runtime: &Runtime, at: *mut u8) -> usvm::Result<()> {
    let at = at.expose_provenance() as u64;
    runtime.launch(0, move |gpu| gpu.read(at, &mut [0])).wait(None).map(drop)
}

#[test]
fn rights_are_gone_when_it_returns() {
    // Before a runtime and after one it is only mprotect.
    let at = map();
    protect(at, libc::PROT_READ);
    protect(at, libc::PROT_READ | libc::PROT_WRITE);
    let runtime = Runtime::start(Config::default()).unwrap();
    for policy in ["gpusvm", "remote"] {
        runtime.set_policy(policy).unwrap();
        let at = map();
        add_one(&runtime, at).unwrap();
        protect(at, libc::PROT_READ);
        assert!(add_one(&runtime, at).is_err(), "{policy}: written");
        peek(&runtime, at).unwrap();
        protect(at, libc::PROT_NONE);
        assert!(peek(&runtime, at).is_err(), "{policy}: read");
        protect(at, libc::PROT_READ | libc::PROT_WRITE);
        add_one(&runtime, at).unwrap();
        // SAFETY: a live byte of the test's.
        assert_eq!(unsafe { at.read_volatile() }, 2, "{policy}");
    }
    runtime.shutdown();
    protect(at, libc::PROT_READ);
}
