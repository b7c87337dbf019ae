//! The caller's memory, by pointers that are not trusted.
//!
//! # Overview
//! Arguments are copied in and out as a kernel does it: by `process_vm_readv` and `process_vm_writev` on this very
//! process, which answer EFAULT where a load would end the program. A failure names the argument.
//!
//! Where the kernel denies these calls (some containers), and where usvm may not serve faults inside system calls while it
//! has taken memory away, the pointer is followed as in any C library.
//!
//! # Safety
//! Only types that any bits are good for are read ([`Plain`]). A pointer is followed directly only where the caller's
//! contract, the header's, is all there is.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_void};
use std::mem::MaybeUninit;

use usvm::GpuAccess;

use super::result::{Done, Failure, invalid};
use super::types::{usvm_access_t, usvm_config_t, usvm_space_config_t};
use crate::process;

/// Types that may hold any bits.
///
/// # Safety
/// Every bit pattern is a value, and it has no destructor.
pub(crate) unsafe trait Plain: Copy {}
// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: numbers.
unsafe impl Plain for u64 {}
// SAFETY: numbers.
unsafe impl Plain for usize {}
// SAFETY: numbers and raw pointers, no padding that is looked at.
unsafe impl Plain for usvm_config_t {}
// SAFETY: as above.
unsafe impl Plain for usvm_space_config_t {}
// SAFETY: as above.
unsafe impl Plain for usvm_access_t {}

/// Longest string that is taken, its end mark included.
const LONGEST: usize = 4096;
const PAGE: usize = 4096;

/// Whether the kernel moved all bytes.
enum Moved {
    All,
    /// It cannot.
    Fault,
    /// It may not, or does not know how.
    Refused,
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    In,
    Out,
}

fn by_kernel(own: *mut c_void, theirs: *mut c_void, len: usize, way: Way) -> Moved {
    let local = libc::iovec { iov_base: own, iov_len: len };
    let remote = libc::iovec { iov_base: theirs, iov_len: len };
    // SAFETY: `own` is a live buffer of `len` bytes; the other side is checked by the kernel.
    let moved = unsafe {
        let pid = libc::getpid();
        match way {
            Way::In => libc::process_vm_readv(pid, &local, 1, &remote, 1, 0),
            Way::Out => libc::process_vm_writev(pid, &local, 1, &remote, 1, 0),
        }
    };
    match usize::try_from(moved) {
        Ok(all) if all == len => Moved::All,
        Ok(_) => Moved::Fault,
        Err(_) => match std::io::Error::last_os_error().raw_os_error() {
            Some(libc::EFAULT) => Moved::Fault,
            _ => Moved::Refused,
        },
    }
}

/// Whether the memory is there although the kernel cannot reach it: on a device, where usvm may not serve system calls.
fn waits_for_usvm(theirs: *mut c_void, len: usize, way: Way) -> bool {
    let access = if way == Way::Out { GpuAccess::Write } else { GpuAccess::Read };
    process::current()
        .is_some_and(|runtime| runtime.check_mapped(theirs.addr() as u64, len as u64, Some(access)).is_ok())
}

fn transfer(name: &str, own: *mut c_void, theirs: *mut c_void, len: usize, way: Way) -> Done {
    if len == 0 {
        return Ok(());
    }
    if theirs.is_null() {
        return Err(invalid(name, "is NULL"));
    }
    let fault = || {
        let what = if way == Way::In { "read" } else { "written" };
        invalid(name, format_args!("{len} bytes at {theirs:p} cannot be {what}"))
    };
    if theirs.addr().checked_add(len).is_none() {
        return Err(fault());
    }
    match by_kernel(own, theirs, len, way) {
        Moved::All => return Ok(()),
        Moved::Fault if !waits_for_usvm(theirs, len, way) => return Err(fault()),
        Moved::Fault | Moved::Refused => {}
    }
    let (from, to) = if way == Way::In { (theirs, own) } else { (own, theirs) };
    // SAFETY: the header's contract is that the pointer is good; nothing more can be found out here.
    unsafe { std::ptr::copy(from.cast::<u8>(), to.cast::<u8>(), len) };
    Ok(())
}

/// The value at `at`.
pub(crate) fn read<T: Plain>(name: &str, at: *const T) -> Done<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    transfer(name, value.as_mut_ptr().cast(), at.cast_mut().cast(), size_of::<T>(), Way::In)?;
    // SAFETY: zeroed, then filled; any bits are good.
    Ok(unsafe { value.assume_init() })
}

/// `n` values at `at`.
pub(crate) fn read_slice<T: Plain>(name: &str, at: *const T, n: usize) -> Done<Vec<T>> {
    let mut values: Vec<T> = Vec::new();
    values.try_reserve_exact(n).map_err(|_| no_memory(name))?;
    let bytes = n.checked_mul(size_of::<T>()).ok_or_else(|| no_memory(name))?;
    transfer(name, values.as_mut_ptr().cast(), at.cast_mut().cast(), bytes, Way::In)?;
    // SAFETY: that many were filled; any bits are good.
    unsafe { values.set_len(n) };
    Ok(values)
}

fn no_memory(name: &str) -> Failure {
    Failure::new(
        super::result::USVM_ERROR_OUT_OF_HOST_MEMORY,
        format_args!("{name}: no memory for a copy of it"),
    )
}

/// Puts `value` at `at`.
pub(crate) fn write<T: Copy>(name: &str, at: *mut T, mut value: T) -> Done {
    transfer(name, (&raw mut value).cast(), at.cast(), size_of::<T>(), Way::Out)
}

/// Puts `bytes` at `at`.
pub(crate) fn write_bytes(name: &str, at: *mut c_void, bytes: &[u8]) -> Done {
    transfer(name, bytes.as_ptr().cast_mut().cast(), at, bytes.len(), Way::Out)
}

/// Makes sure that something can be put at `at`, before there is anything to lose: writes back what is there.
pub(crate) fn check_writable<T>(name: &str, at: *mut T) -> Done {
    let mut bytes = [0u8; 64];
    let some = bytes.len().min(size_of::<T>());
    transfer(name, bytes.as_mut_ptr().cast(), at.cast(), some, Way::In)
        .and_then(|()| transfer(name, bytes.as_mut_ptr().cast(), at.cast(), some, Way::Out))
        .map_err(|_| match at.is_null() {
            true => invalid(name, "is NULL"),
            false => invalid(name, format_args!("{} bytes at {at:p} cannot be written", size_of::<T>())),
        })
}

/// The string at `at`, which must be UTF-8 and shorter than 4 KiB.
pub(crate) fn read_string(name: &str, at: *const c_char) -> Done<String> {
    let mut text = Vec::new();
    loop {
        let from = at.wrapping_add(text.len());
        let in_page = (PAGE - from.addr() % PAGE).min(LONGEST - text.len());
        if in_page == 0 {
            return Err(invalid(name, format_args!("is longer than {} bytes", LONGEST - 1)));
        }
        let part = read_slice(name, from.cast::<u8>(), in_page)?;
        if let Some(end) = part.iter().position(|byte| *byte == 0) {
            text.extend_from_slice(&part[..end]);
            return String::from_utf8(text).map_err(|_| invalid(name, "is not UTF-8"));
        }
        text.extend_from_slice(&part);
    }
}

/// A structure that begins with its size: at least `least` bytes of it, and nothing set in what this library does not know.
pub(crate) fn read_struct<T: Plain>(name: &str, at: *const T, least: usize) -> Done<T> {
    let size = struct_size(name, at.cast(), least)?;
    let known = size.min(size_of::<T>());
    let mut value = MaybeUninit::<T>::zeroed();
    transfer(name, value.as_mut_ptr().cast(), at.cast_mut().cast(), known, Way::In)?;
    let more = read_slice(name, at.cast::<u8>().wrapping_add(known), size - known)?;
    if more.iter().any(|byte| *byte != 0) {
        return Err(invalid(name, "fields are set that this version of usvm does not know"));
    }
    // SAFETY: zeroed, then filled; any bits are good.
    Ok(unsafe { value.assume_init() })
}

/// The size that a structure says it has, if that makes sense.
pub(crate) fn struct_size(name: &str, at: *const usize, least: usize) -> Done<usize> {
    if at.is_null() {
        return Err(invalid(name, "is NULL"));
    }
    let size = read(name, at)?;
    if size < least || size > LONGEST {
        let reason = format_args!("is {size}; this version takes {least} to {LONGEST} bytes").to_string();
        return Err(invalid(format_args!("{name}.struct_size"), reason));
    }
    Ok(size)
}

/// Puts as much of `value` at `at` as the caller's structure of `size` bytes has room for.
pub(crate) fn write_struct<T: Copy>(name: &str, at: *mut T, size: usize, value: &T) -> Done {
    let known = size.min(size_of::<T>());
    transfer(name, std::ptr::from_ref(value).cast_mut().cast(), at.cast(), known, Way::Out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_pointers_are_errors() {
        let mut value = 7u64;
        assert_eq!(read("v", &raw const value).unwrap(), 7);
        write("v", &raw mut value, 9).unwrap();
        assert_eq!(value, 9);
        let bad = std::ptr::without_provenance_mut::<u64>(16);
        for wrong in [std::ptr::null_mut(), bad, std::ptr::without_provenance_mut(usize::MAX - 2)] {
            assert!(read("v", wrong.cast_const()).is_err());
            assert!(write("v", wrong, 1).is_err() && check_writable("v", wrong).is_err());
        }
        static CONSTANT: u64 = 3;
        assert!(write("v", (&raw const CONSTANT).cast_mut(), 1).is_err());
        assert!(check_writable("v", (&raw const CONSTANT).cast_mut()).is_err());
    }

    #[test]
    fn strings_end() {
        let text = format!("{}\0", "a".repeat(LONGEST - 1));
        assert_eq!(read_string("s", text.as_ptr().cast()).unwrap().len(), LONGEST - 1);
        let text = format!("{}\0", "a".repeat(LONGEST));
        assert!(read_string("s", text.as_ptr().cast()).is_err());
        assert!(read_string("s", c"\xff".as_ptr()).is_err());
        assert!(read_string("s", std::ptr::null()).is_err());
    }

    #[test]
    fn structures_may_be_newer_or_older_than_the_library() {
        #[repr(C)]
        struct Newer {
            config: usvm_config_t,
            more: u64,
        }
        let config = usvm_config_t {
            struct_size: size_of::<Newer>(),
            options: std::ptr::null(),
            flags: 1,
            reserved: 0,
        };
        let mut newer = Newer { config, more: 0 };
        let least = size_of::<usvm_config_t>();
        let at = (&raw const newer).cast::<usvm_config_t>();
        assert_eq!(read_struct("c", at, least).unwrap().flags, 1);
        newer.more = 1;
        assert!(read_struct("c", (&raw const newer).cast::<usvm_config_t>(), least).is_err());
        newer.config.struct_size = least - 1;
        assert!(read_struct("c", (&raw const newer).cast::<usvm_config_t>(), least).is_err());
    }
}
