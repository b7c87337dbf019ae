//! Results, the thread's last error, and the frame around every call.
//!
//! # Overview
//! `call` is the frame: inside it this thread's allocations come from usvm's own memory and changes of mappings are
//! usvm's own and not told to notifiers (`usvm::ground::alloc`), the thread is not cancelled, a failure is written down for
//! `usvm_last_error`, and a panic is a result.
//!
//! # Safety
//! `usvm_last_error` gives out a pointer into this thread's storage, which lives as long as the thread and is changed only
//! by the thread's own next failure. errno is written through its own address.
#![allow(unsafe_code)]

use std::cell::{Cell, UnsafeCell};
use std::ffi::{CStr, c_char, c_int};
use std::fmt::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use usvm::Error;
use usvm::ground::alloc;

use super::user;
use crate::cancel::shielded;

/// What a function of the header returns.
#[allow(non_camel_case_types, reason = "the header's name")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct usvm_result_t(pub u32);

macro_rules! results {
    ($($name:ident = $value:literal, $errno:expr;)*) => {
        $(
            #[doc = concat!("`", stringify!($name), "` of the header.")]
            pub const $name: usvm_result_t = usvm_result_t($value);
        )*

        /// Every result with its name, for the comparison with the header.
        #[cfg(test)]
        pub(crate) const RESULTS: &[(&str, u64)] = &[$((stringify!($name), $value),)*];

        fn name_of(result: usvm_result_t) -> &'static CStr {
            const UNKNOWN: &CStr = c"USVM_ERROR_UNKNOWN";
            match result.0 {
                $($value => const {
                    match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                        Ok(name) => name,
                        Err(_) => UNKNOWN,
                    }
                },)*
                _ => UNKNOWN,
            }
        }

        fn errno_of(result: usvm_result_t) -> c_int {
            match result.0 {
                $($value => $errno,)*
                _ => libc::EINVAL,
            }
        }
    };
}

results! {
    USVM_SUCCESS = 0, 0;
    USVM_ERROR_INVALID_ARGUMENT = 1, libc::EINVAL;
    USVM_ERROR_INVALID_HANDLE = 2, libc::EBADF;
    USVM_ERROR_NOT_RUNNING = 3, libc::ESHUTDOWN;
    USVM_ERROR_NOT_SUPPORTED = 4, libc::EOPNOTSUPP;
    USVM_ERROR_NOT_MAPPED = 5, libc::ENOENT;
    USVM_ERROR_NOT_WRITABLE = 6, libc::EPERM;
    USVM_ERROR_OUTSIDE_SPACE = 7, libc::EINVAL;
    USVM_ERROR_GONE = 8, libc::EFAULT;
    USVM_ERROR_DEVICE_FAULT = 9, libc::EFAULT;
    USVM_ERROR_MIXED_RESIDENCY = 10, libc::EOPNOTSUPP;
    USVM_ERROR_BUSY = 11, libc::EBUSY;
    USVM_ERROR_AGAIN = 12, libc::EAGAIN;
    USVM_ERROR_OUT_OF_DEVICE_MEMORY = 13, libc::ENOMEM;
    USVM_ERROR_OUT_OF_HOST_MEMORY = 14, libc::ENOMEM;
    USVM_ERROR_DEVICE_LOST = 15, libc::EIO;
    USVM_ERROR_TIMEOUT = 16, libc::ETIMEDOUT;
    USVM_ERROR_BUFFER_TOO_SMALL = 17, libc::ERANGE;
    USVM_ERROR_SYSTEM = 18, libc::EIO;
    USVM_ERROR_INTERNAL = 19, libc::EIO;
}

/// Why a call fails.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: usvm_result_t,
    native: c_int,
    message: String,
}

/// What the body of a call gives.
pub(crate) type Done<T = ()> = Result<T, Failure>;

impl Failure {
    pub(crate) fn new(code: usvm_result_t, message: impl fmt::Display) -> Self {
        Self { code, native: errno_of(code), message: message.to_string() }
    }

    /// The same, said of `argument`.
    pub(crate) fn of(mut self, argument: impl fmt::Display) -> Self {
        self.message = format!("{argument}: {}", self.message);
        self
    }
}

/// `argument` makes no sense, for this reason.
pub(crate) fn invalid(argument: impl fmt::Display, reason: impl fmt::Display) -> Failure {
    Failure::new(USVM_ERROR_INVALID_ARGUMENT, format_args!("{argument}: {reason}"))
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::NoVma { .. } => USVM_ERROR_NOT_MAPPED,
            Error::NotWritable { .. } => USVM_ERROR_NOT_WRITABLE,
            Error::OutsideSpace { .. } => USVM_ERROR_OUTSIDE_SPACE,
            Error::Gone { .. } => USVM_ERROR_GONE,
            Error::Mixed { .. } => USVM_ERROR_MIXED_RESIDENCY,
            Error::Busy { .. } => USVM_ERROR_BUSY,
            Error::Again { .. } => USVM_ERROR_AGAIN,
            Error::OutOfDeviceMemory { .. } => USVM_ERROR_OUT_OF_DEVICE_MEMORY,
            Error::OutOfHostMemory { .. } => USVM_ERROR_OUT_OF_HOST_MEMORY,
            Error::DeviceLost { .. } => USVM_ERROR_DEVICE_LOST,
            Error::DeviceFault { .. } => USVM_ERROR_DEVICE_FAULT,
            Error::NotSupported(_) => USVM_ERROR_NOT_SUPPORTED,
            Error::Invalid { .. } => USVM_ERROR_INVALID_ARGUMENT,
            Error::NotRunning(_) => USVM_ERROR_NOT_RUNNING,
            Error::Os { .. } => USVM_ERROR_SYSTEM,
            _ => USVM_ERROR_INTERNAL,
        };
        // Words that begin with the argument, as all messages here do.
        let message = match &error {
            Error::Invalid { argument, reason } => format!("{argument}: {reason}"),
            other => other.to_string(),
        };
        Self { code, native: error.errno(), message }
    }
}

/// Bytes of the longest message that is kept, its end mark included.
const LONGEST: usize = 512;

struct LastError {
    text: UnsafeCell<[u8; LONGEST]>,
    native: Cell<c_int>,
}

thread_local! {
    static LAST: LastError =
        const { LastError { text: UnsafeCell::new([0; LONGEST]), native: Cell::new(0) } };
}

/// Writes into a fixed buffer, as much as fits with one byte to spare, whole characters only.
pub(crate) struct Fixed<'a> {
    buffer: &'a mut [u8],
    used: usize,
}

impl<'a> Fixed<'a> {
    /// From the beginning of `buffer`.
    pub(crate) fn new(buffer: &'a mut [u8]) -> Self {
        Self { buffer, used: 0 }
    }

    /// Bytes that were written.
    pub(crate) fn used(&self) -> usize {
        self.used
    }
}

impl Write for Fixed<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.buffer.len() - 1 - self.used;
        let fits = text.floor_char_boundary(room.min(text.len()));
        self.buffer[self.used..self.used + fits].copy_from_slice(&text.as_bytes()[..fits]);
        self.used += fits;
        Ok(())
    }
}

/// Writes the failure down for `usvm_last_error`.
pub(crate) fn note(failure: &Failure) {
    LAST.with(|last| {
        // SAFETY: only this thread has the cell, and the reference ends here.
        let buffer = unsafe { &mut *last.text.get() };
        let mut to = Fixed::new(buffer);
        // Zero bytes would end it early: there are none in messages, except out of a caller's own text.
        let _ = to.write_str(&failure.message.replace('\0', "\u{fffd}"));
        let used = to.used;
        to.buffer[used] = 0;
        last.native.set(failure.native);
    });
}

/// Runs `f` as being outside: the program's own code, with the program's own allocations.
pub(crate) fn outside<T>(f: impl FnOnce() -> T) -> T {
    alloc::external(f)
}

/// The frame around a call.
pub(crate) fn call(f: impl FnOnce() -> Done) -> usvm_result_t {
    let framed = || {
        let result = catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
            let what = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            Err(Failure::new(USVM_ERROR_INTERNAL, format_args!("a defect of usvm: {what}")))
        });
        match result {
            Ok(()) => USVM_SUCCESS,
            Err(failure) => {
                note(&failure);
                failure.code
            }
        }
    };
    shielded(|| alloc::internal(framed))
}

/// errno.
pub(crate) fn errno() -> c_int {
    // SAFETY: the C library's address of this thread's errno.
    unsafe { *libc::__errno_location() }
}

/// Sets errno.
pub(crate) fn set_errno(errno: c_int) {
    // SAFETY: the C library's address of this thread's errno.
    unsafe { *libc::__errno_location() = errno };
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_result_name(result: usvm_result_t) -> *const c_char {
    name_of(result).as_ptr()
}

/// See the header.
///
/// # Safety
/// None beyond the header's: pointers are checked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_last_error(message: *mut *const c_char, native: *mut c_int) -> usvm_result_t {
    let (text, errno) = LAST.with(|last| (last.text.get().cast::<c_char>().cast_const(), last.native.get()));
    // Does not go through `call`: a failure here leaves the last error as it is.
    alloc::internal(|| {
        let written = || -> Done {
            if !message.is_null() {
                user::check_writable("message", message)?;
            }
            if !native.is_null() {
                user::write("native", native, errno)?;
            }
            if !message.is_null() {
                user::write("message", message, text)?;
            }
            Ok(())
        };
        written().map_or_else(|failure| failure.code, |()| USVM_SUCCESS)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_constants() {
        let name = |n| name_of(usvm_result_t(n)).to_str().unwrap();
        assert_eq!((name(0), name(11), name(19)), ("USVM_SUCCESS", "USVM_ERROR_BUSY", "USVM_ERROR_INTERNAL"));
        assert_eq!((name(20), name(u32::MAX)), ("USVM_ERROR_UNKNOWN", "USVM_ERROR_UNKNOWN"));
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let result = call(|| Err(invalid("x", "é".repeat(LONGEST))));
        assert_eq!(result, USVM_ERROR_INVALID_ARGUMENT);
        let (mut message, mut native) = (std::ptr::null(), 0);
        // SAFETY: two live places.
        assert_eq!(unsafe { usvm_last_error(&mut message, &mut native) }, USVM_SUCCESS);
        // SAFETY: a string that this thread's storage holds.
        let text = unsafe { CStr::from_ptr(message) }.to_str().unwrap();
        assert!(text.starts_with("x: éé") && text.len() > LONGEST - 4, "{text}");
        assert_eq!(native, libc::EINVAL);
    }

    #[test]
    fn a_panic_is_a_result() {
        let result = call(|| panic!("on purpose"));
        assert_eq!(result, USVM_ERROR_INTERNAL);
        assert!(!alloc::is_internal());
    }
}
