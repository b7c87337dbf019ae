//! The process's own pages, as the device reaches them over the link.
//!
//! # Overview
//! A [`Backing::System`](crate::space::ports::Backing::System) mapping is used with process_vm_readv and
//! process_vm_writev on this very process: the kernel does the access at the application's address, so a page
//! that went away is an EFAULT for the device and never a crash of the program. A page that waits under
//! userfaultfd is served like any CPU access, as long as the userfaultfd handles kernel-mode faults.
//!
//! # Limits
//! A store of one word may be torn, and there are no atomics: the kernel copies bytes. A seccomp filter that
//! forbids these calls makes every such access fail with EPERM or ENOSYS.
//!
//! # Safety
//! Addresses of the device's are given to the kernel only, which checks them; the local side is always a
//! slice.
#![allow(unsafe_code)]

use crate::ground::error::Errno;
use crate::ground::inject::{self, Call};

/// Reads up to `to.len()` bytes at `addr`; says how many. Never zero for a `to` that is not empty.
pub(super) fn read(addr: u64, to: &mut [u8]) -> Result<usize, Errno> {
    let local = libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() };
    let remote = libc::iovec { iov_base: addr as *mut libc::c_void, iov_len: to.len() };
    inject::check(Call::ProcessVm)?;
    // SAFETY: one local buffer, exclusively borrowed and of the given length; the kernel checks the remote
    // one.
    progress(unsafe { libc::process_vm_readv(own_pid(), &local, 1, &remote, 1, 0) })
}

/// Writes up to `from.len()` bytes to `addr`; says how many. Never zero for a `from` that is not empty.
pub(super) fn write(addr: u64, from: &[u8]) -> Result<usize, Errno> {
    let local = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let remote = libc::iovec { iov_base: addr as *mut libc::c_void, iov_len: from.len() };
    inject::check(Call::ProcessVm)?;
    // SAFETY: the kernel only reads the local buffer, a live slice of the given length, and checks the remote
    // one. What it overwrites there is what the application gave the device to write.
    progress(unsafe { libc::process_vm_writev(own_pid(), &local, 1, &remote, 1, 0) })
}

fn own_pid() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}

fn progress(moved: isize) -> Result<usize, Errno> {
    match usize::try_from(moved) {
        Ok(0) => Err(Errno(libc::EFAULT)),
        Ok(n) => Ok(n),
        Err(_) => Err(Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes_this_process() {
        let mut there = vec![7u8; 10_000];
        let at = there.as_mut_ptr() as u64;
        let mut here = vec![0u8; 10_000];
        assert_eq!(read(at, &mut here).unwrap(), 10_000);
        assert_eq!(here, vec![7; 10_000]);
        assert_eq!(write(at + 1, &[1, 2, 3]).unwrap(), 3);
        assert_eq!(read(at, &mut here[..5]).unwrap(), 5);
        assert_eq!(here[..5], [7, 1, 2, 3, 7]);
        drop(there);
    }

    #[test]
    fn an_address_without_memory_is_an_error_not_a_crash() {
        assert_eq!(read(4096, &mut [0; 8]), Err(Errno(libc::EFAULT)));
        assert_eq!(write(4096, &[0; 8]), Err(Errno(libc::EFAULT)));
        // Constants are read-only pages.
        static CONSTANT: [u8; 16] = [9; 16];
        assert_eq!(write(CONSTANT.as_ptr() as u64, &[0; 8]), Err(Errno(libc::EFAULT)));
        assert_eq!(CONSTANT, [9; 16]);
    }
}
