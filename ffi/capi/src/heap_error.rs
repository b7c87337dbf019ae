//! What the heap's functions say to the rest: why they gave NULL, and what they did to memory.
//!
//! # Overview
//! A program that uses libusvm.so under the preload library has `usvm_malloc` of libusvm.so, and `usvm_last_error` of the
//! preload library, each with a copy of this code. So libusvm's heap reports by a function with a C name, which the dynamic
//! linker binds as it binds the program's `usvm_last_error`; and tells notifiers, which that library has, in the same way.
//!
//! # Safety
//! The function takes numbers only.
#![allow(unsafe_code)]

use std::ffi::c_int;

use crate::api::notify;
use crate::api::result::{
    Failure, USVM_ERROR_INVALID_ARGUMENT, USVM_ERROR_OUT_OF_HOST_MEMORY, note, set_errno,
};

/// No memory for so many bytes.
pub const NO_MEMORY: u32 = 0;
/// So many times so many bytes are more than there can be.
pub const TOO_MANY: u32 = 1;
/// An alignment that is no power of two.
pub const ALIGNMENT: u32 = 2;
/// A pointer that is no block of the heap's.
pub const FOREIGN: u32 = 3;

/// The heap gave pages back to the system.
pub const DROPPED: u32 = 0;
/// The heap moved pages elsewhere.
pub const MOVED: u32 = 1;

fn failure(what: u32, first: usize, second: usize) -> (Failure, c_int) {
    let short = |message| (Failure::new(USVM_ERROR_OUT_OF_HOST_MEMORY, message), libc::ENOMEM);
    match what {
        ALIGNMENT => {
            let message = format_args!("alignment: {first} is not a power of two");
            (Failure::new(USVM_ERROR_INVALID_ARGUMENT, message), libc::EINVAL)
        }
        FOREIGN => {
            let message = format_args!("ptr: {first:#x} is not memory of usvm_malloc and its like");
            (Failure::new(USVM_ERROR_INVALID_ARGUMENT, message), libc::EINVAL)
        }
        TOO_MANY => short(format_args!("count: {first} times {second} bytes is more than there can be")),
        _ => short(format_args!("size: no memory for {first} bytes")),
    }
}

/// Sets errno and leaves a message for `usvm_last_error`; not in the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_heap_error(what: u32, first: usize, second: usize) {
    let errno = usvm::ground::alloc::internal(|| {
        let (failure, errno) = failure(what, first, second);
        note(&failure);
        errno
    });
    set_errno(errno);
}

/// Tells notifiers of what the heap did to `[at, at + size)`, and returns when they were told; not in the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_heap_changed(reason: u32, at: usize, size: usize) {
    let change = if reason == MOVED { usvm::Change::Moved } else { usvm::Change::Dropped };
    notify::changed(change, usvm::ground::addr::Span::sized(at as u64, size as u64));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_names_its_argument() {
        for (what, words, errno) in [
            (NO_MEMORY, "size: no memory for 3 bytes", libc::ENOMEM),
            (TOO_MANY, "count: 3 times 5 bytes is more than there can be", libc::ENOMEM),
            (ALIGNMENT, "alignment: 3 is not a power of two", libc::EINVAL),
        ] {
            usvm_heap_error(what, 3, 5);
            assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(errno));
            let (mut message, mut native) = (std::ptr::null(), 0);
            // SAFETY: two live places, then a string that this thread's storage holds.
            let text = unsafe {
                crate::api::result::usvm_last_error(&mut message, &mut native);
                std::ffi::CStr::from_ptr(message)
            };
            assert_eq!((text.to_str(), native), (Ok(words), errno));
        }
    }
}
