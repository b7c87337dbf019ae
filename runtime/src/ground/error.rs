//! What can go wrong, with the kernel's own error numbers.
//!
//! drm_gpusvm answers in negative errnos; [`Error::errno`] gives the same numbers, so that a caller who knows the
//! kernel's contract knows this one. Every message names what to do about it where something can be done.

use crate::ground::addr::Span;
use std::fmt;

/// The result of everything that can fail here.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation did not happen. Nothing is lost when one of these is returned, unless it says so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// ENOENT: nothing is mapped at the address.
    #[error("no memory is mapped at {addr:#x}: map it before the device uses it")]
    NoVma {
        /// The address asked for.
        addr: u64,
    },
    /// EPERM: a write was asked of memory that is not writable.
    #[error("memory at {addr:#x} is not writable: ask for read access, or make it writable with mprotect")]
    NotWritable {
        /// The address asked for.
        addr: u64,
    },
    /// EINVAL: the address is outside the mirrored space, or no chunk fits its limits.
    #[error("{addr:#x} is outside the mirrored space or no chunk fits there")]
    OutsideSpace {
        /// The address asked for.
        addr: u64,
    },
    /// EFAULT: the mapping went away, or cannot be reached at all (PROT_NONE).
    #[error("memory at {addr:#x} went away or cannot be accessed")]
    Gone {
        /// The address asked for.
        addr: u64,
    },
    /// EOPNOTSUPP: some pages of the range are in device memory and some are not; evict it and try again.
    #[error("{span} holds device pages and system pages at once")]
    Mixed {
        /// The range.
        span: Span,
    },
    /// EBUSY: pages are pinned (O_DIRECT, io_uring, RDMA), locked (mlock), executable or shared, and did not become
    /// free in time.
    #[error("pages of {span} are pinned, locked, executable or shared and cannot move now")]
    Busy {
        /// The range.
        span: Span,
    },
    /// EAGAIN: the CPU mappings kept changing; a bounded number of tries was made.
    #[error("{what} gave up after {tries} tries because the CPU mappings kept changing")]
    Again {
        /// What was tried.
        what: &'static str,
        /// How often.
        tries: u32,
    },
    /// ENOMEM: device memory cannot hold what one launch needs at once.
    #[error(
        "device memory cannot hold this: {needed} bytes are needed at once, the device has {capacity}, \
         {busy} of them in use by running work; give the device more (USVM_VRAM) or touch less per launch"
    )]
    OutOfDeviceMemory {
        /// Bytes that were asked for at once.
        needed: u64,
        /// Bytes the device has.
        capacity: u64,
        /// Bytes that running work holds.
        busy: u64,
    },
    /// ENOMEM: host memory or address space ran out.
    #[error("host memory ran out while {what}: {detail}")]
    OutOfHostMemory {
        /// What was being done.
        what: &'static str,
        /// The limit that was met, and what raises it.
        detail: String,
    },
    /// EIO: the device is gone; data that lived only there is lost and reported as such.
    #[error("the device is lost: {reason}")]
    DeviceLost {
        /// What the device said.
        reason: String,
    },
    /// EFAULT: work touched an address that the device has no mapping for and nobody could make one. That work ended
    /// there, as a hang ends a context; the device goes on.
    #[error(
        "the device has no mapping for a {access} at {addr:#x} and cannot wait for one: make it resident before the \
         launch (usvm_begin_access), or use a device with recoverable faults"
    )]
    DeviceFault {
        /// The address the work touched.
        addr: u64,
        /// How: load, store or atomic.
        access: &'static str,
    },
    /// EOPNOTSUPP: the device or the kernel cannot do this.
    #[error("not supported: {0}")]
    NotSupported(String),
    /// EINVAL: an argument makes no sense.
    #[error("invalid {argument}: {reason}")]
    Invalid {
        /// Which argument.
        argument: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// ESHUTDOWN: the runtime was shut down, failed and withdrew, or belongs to the parent of this process.
    #[error("usvm is not running here: {0}")]
    NotRunning(&'static str),
    /// A system call failed in a way that has no meaning of its own here.
    #[error("{call} failed: {errno}")]
    Os {
        /// The call.
        call: &'static str,
        /// Its errno.
        errno: Errno,
    },
}

impl Error {
    /// The errno the kernel's drm_gpusvm would give.
    pub fn errno(&self) -> i32 {
        match self {
            Error::NoVma { .. } => libc::ENOENT,
            Error::NotWritable { .. } => libc::EPERM,
            Error::OutsideSpace { .. } | Error::Invalid { .. } => libc::EINVAL,
            Error::Gone { .. } | Error::DeviceFault { .. } => libc::EFAULT,
            Error::Mixed { .. } | Error::NotSupported(_) => libc::EOPNOTSUPP,
            Error::Busy { .. } => libc::EBUSY,
            Error::Again { .. } => libc::EAGAIN,
            Error::OutOfDeviceMemory { .. } | Error::OutOfHostMemory { .. } => libc::ENOMEM,
            Error::DeviceLost { .. } => libc::EIO,
            Error::NotRunning(_) => libc::ESHUTDOWN,
            Error::Os { errno, .. } => errno.0,
        }
    }

    /// An [`Error::Os`] out of what a wrapped system call gave.
    pub fn os(call: &'static str, errno: impl Into<Errno>) -> Self {
        Error::Os { call, errno: errno.into() }
    }
}

/// An errno that prints as its own words.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl From<rustix::io::Errno> for Errno {
    fn from(e: rustix::io::Errno) -> Self {
        Errno(e.raw_os_error())
    }
}
