//! What a device can do with the program's memory, and what usvm adds to that.
//!
//! # Overview
//! USM is provided where the driver has SVM: device allocations need coarse-grained SVM; host and shared ones, which the
//! host reads and writes without mapping, need fine-grained buffers. A processor that runs kernels in this process (its
//! type is CPU, it shares the host's memory and has fine-grained SVM buffers) reaches any memory of the process; a driver
//! that does not say so (PoCL 3.1) is corrected: fine-grained system SVM and shared system USM are reported.
//!
//! # Limits
//! A device that computes elsewhere and calls itself a CPU with unified memory would be believed.

use std::ffi::c_void;
use std::mem::MaybeUninit;

use super::dispatch::Dispatch;
use super::types::*;

/// The name of what is provided.
pub const EXTENSION: &[u8] = b"cl_intel_unified_shared_memory";

/// Its version: 1.2 in OpenCL's packing.
const EXTENSION_VERSION: Uint = 1 << 22 | 2 << 12;

/// The size of the largest data type of any device, `long16`.
pub const LARGEST_TYPE: usize = 128;

/// One value that an object has.
pub fn info<T: Copy>(get: Option<GetInfo>, object: Handle, name: Uint) -> Result<T, Int> {
    let get = get.ok_or(INVALID_OPERATION)?;
    let mut value = MaybeUninit::<T>::uninit();
    let mut size = 0;
    // SAFETY: the driver fills `value` up to its size; it is read only if it was filled to the end.
    unsafe {
        match get(object, name, size_of::<T>(), value.as_mut_ptr().cast(), &raw mut size) {
            SUCCESS if size == size_of::<T>() => Ok(value.assume_init()),
            SUCCESS => Err(INVALID_VALUE),
            error => Err(error),
        }
    }
}

/// A list of values that an object has.
pub fn list<T: Copy + Default>(get: Option<GetInfo>, object: Handle, name: Uint) -> Result<Vec<T>, Int> {
    let get = get.ok_or(INVALID_OPERATION)?;
    let mut size = 0;
    // SAFETY: first the size is asked for, then that many bytes are filled.
    unsafe {
        match get(object, name, 0, std::ptr::null_mut(), &raw mut size) {
            SUCCESS => {}
            error => return Err(error),
        }
        let mut values = vec![T::default(); size / size_of::<T>()];
        match get(object, name, size_of_val(&values[..]), values.as_mut_ptr().cast(), std::ptr::null_mut()) {
            SUCCESS => Ok(values),
            error => Err(error),
        }
    }
}

/// Gives `bytes` to a program that asked, by OpenCL's rules.
///
/// # Safety
/// `value` has room for `size` bytes or is null; `size_ret` is writable or null.
pub unsafe fn answer(bytes: &[u8], size: usize, value: *mut c_void, size_ret: *mut usize) -> Int {
    // SAFETY: as the caller says; the size is checked before the copy.
    unsafe {
        if !value.is_null() {
            if size < bytes.len() {
                return INVALID_VALUE;
            }
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), value.cast(), bytes.len());
        }
        if !size_ret.is_null() {
            *size_ret = bytes.len();
        }
    }
    SUCCESS
}

/// What the driver says of a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    svm: Bitfield,
    kind: Bitfield,
    unified: bool,
}

impl Device {
    /// Asks the driver. What it does not know is not there.
    pub fn query(driver: &Dispatch, device: Handle) -> Self {
        let get = driver.clGetDeviceInfo;
        Self {
            svm: info(get, device, DEVICE_SVM_CAPABILITIES).unwrap_or(0),
            kind: info(get, device, DEVICE_TYPE).unwrap_or(0),
            unified: info::<Uint>(get, device, DEVICE_HOST_UNIFIED_MEMORY).unwrap_or(0) != 0,
        }
    }

    /// Whether its memory is the host's: nothing can be gained by moving data.
    pub fn shares_host(self) -> bool {
        self.unified || self.kind & DEVICE_TYPE_CPU != 0
    }

    /// Whether it reaches all memory of the process.
    pub fn reaches_all(self) -> bool {
        let in_process =
            self.unified && self.kind & DEVICE_TYPE_CPU != 0 && self.svm & SVM_FINE_GRAIN_BUFFER != 0;
        in_process || self.svm & SVM_FINE_GRAIN_SYSTEM != 0
    }

    /// Whether USM can be provided at all.
    pub fn can_usm(self) -> bool {
        self.svm & (SVM_COARSE_GRAIN_BUFFER | SVM_FINE_GRAIN_BUFFER) != 0
    }

    /// The SVM capabilities that hold.
    pub fn svm(self) -> Bitfield {
        if self.reaches_all() { self.svm | SVM_FINE_GRAIN_SYSTEM } else { self.svm }
    }

    /// The flags with which `clSVMAlloc` makes a block that can do the most.
    pub fn svm_flags(self) -> Bitfield {
        let mut flags = MEM_READ_WRITE;
        if self.svm & SVM_FINE_GRAIN_BUFFER != 0 {
            flags |= MEM_SVM_FINE_GRAIN_BUFFER;
            if self.svm & SVM_ATOMICS != 0 {
                flags |= MEM_SVM_ATOMICS;
            }
        }
        flags
    }

    /// The answer to one of the five capability queries of the extension; `None` if `name` is not one.
    pub fn usm(self, name: Uint) -> Option<Bitfield> {
        let fine = self.fine_grained();
        match name {
            DEVICE_DEVICE_MEM_CAPABILITIES if fine == 0 && self.can_usm() => Some(USM_ACCESS),
            DEVICE_HOST_MEM_CAPABILITIES
            | DEVICE_DEVICE_MEM_CAPABILITIES
            | DEVICE_SINGLE_SHARED_MEM_CAPABILITIES
            | DEVICE_CROSS_SHARED_MEM_CAPABILITIES => Some(fine),
            DEVICE_SHARED_SYSTEM_MEM_CAPABILITIES => Some(if self.reaches_all() { fine } else { 0 }),
            _ => None,
        }
    }

    /// What a device can do with fine-grained memory.
    fn fine_grained(self) -> Bitfield {
        if self.svm & (SVM_FINE_GRAIN_BUFFER | SVM_FINE_GRAIN_SYSTEM) == 0 {
            return 0;
        }
        let atomics = if self.svm & SVM_ATOMICS != 0 { USM_ATOMIC | USM_CONCURRENT_ATOMIC } else { 0 };
        USM_ACCESS | USM_CONCURRENT | atomics
    }
}

/// One line for people.
pub fn describe(driver: &Dispatch, device: Handle, native: bool) -> String {
    let name: Vec<u8> = list(driver.clGetDeviceInfo, device, DEVICE_NAME).unwrap_or_default();
    let platform = info::<usize>(driver.clGetDeviceInfo, device, DEVICE_PLATFORM).unwrap_or(0) as Handle;
    let of: Vec<u8> = list(driver.clGetPlatformInfo, platform, PLATFORM_NAME).unwrap_or_default();
    let facts = Device::query(driver, device);
    format!(
        "{} of {}: {}, {}",
        text(&name),
        text(&of),
        if facts.shares_host() { "shares the host's memory" } else { "has memory of its own" },
        match (native, facts.can_usm()) {
            (true, _) => "USM by the driver",
            (false, true) => "USM provided by usvm",
            (false, false) => "no USM",
        }
    )
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes)).trim().to_owned()
}

/// A list of extension names, with the one that is provided.
pub fn with_name(mut names: Vec<u8>) -> Vec<u8> {
    while names.last().is_some_and(|b| *b == 0 || *b == b' ') {
        names.pop();
    }
    if !names.split(|b| *b == b' ').any(|name| name == EXTENSION) {
        if !names.is_empty() {
            names.push(b' ');
        }
        names.extend_from_slice(EXTENSION);
    }
    names.push(0);
    names
}

/// The same with versions, as bytes.
pub fn with_version(mut list: Vec<u8>) -> Vec<u8> {
    let mut name = [0; 64];
    name[..EXTENSION.len()].copy_from_slice(EXTENSION);
    if !list.chunks_exact(size_of::<NameVersion>()).any(|entry| entry[4..] == name) {
        list.extend_from_slice(&EXTENSION_VERSION.to_ne_bytes());
        list.extend_from_slice(&name);
    }
    list
}
