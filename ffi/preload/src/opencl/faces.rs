//! The USM functions of each platform: the driver's, or those that usvm provides.
//!
//! # Overview
//! Programs get these functions from `clGetExtensionFunctionAddressForPlatform`. For each loader and platform that is
//! asked for there is a face, with its own instance of every function (`usm::name::<FACE>`), which knows whether the
//! driver has USM: then the call goes on to the driver and only what was allocated and set is noted.
//!
//! # Limits
//! [`FACES`] pairs of loader and platform; further ones get the driver's own functions.

use std::ffi::{CStr, c_char, c_void};
use std::sync::{Mutex, OnceLock};

use super::capability::{Device, info};
use super::dispatch::Dispatch;
use super::types::*;
use super::{loaders, usm};

/// How many faces there can be.
pub const FACES: usize = 16;

/// The functions of the extension, in the order of [`Functions`].
pub const NAMES: [&CStr; 12] = [
    c"clHostMemAllocINTEL",
    c"clDeviceMemAllocINTEL",
    c"clSharedMemAllocINTEL",
    c"clMemFreeINTEL",
    c"clMemBlockingFreeINTEL",
    c"clGetMemAllocInfoINTEL",
    c"clSetKernelArgMemPointerINTEL",
    c"clEnqueueMemFillINTEL",
    c"clEnqueueMemsetINTEL",
    c"clEnqueueMemcpyINTEL",
    c"clEnqueueMigrateMemINTEL",
    c"clEnqueueMemAdviseINTEL",
];

/// The driver's functions, as far as it has them.
#[derive(Clone, Copy, Default)]
pub struct Functions {
    /// Their addresses, in the order of [`NAMES`].
    pub addresses: [usize; NAMES.len()],
}

/// One platform as one loader's programs see it.
pub struct Face {
    slot: usize,
    platform: usize,
    /// The driver's functions, if it has USM.
    pub native: Option<Functions>,
}

static KNOWN: [OnceLock<Face>; FACES] = [const { OnceLock::new() }; FACES];
static FILLING: Mutex<()> = Mutex::new(());

/// The face of this number.
pub fn get(face: usize) -> Option<&'static Face> {
    KNOWN.get(face).and_then(OnceLock::get)
}

impl Face {
    /// The loader's entry points.
    pub fn driver(&self) -> &'static Dispatch {
        loaders::target(self.slot)
    }
}

/// The face of `platform` in the loader of `slot`, made if it is asked for the first time. A null platform stands for
/// whatever the loader finds by name alone.
pub fn of(slot: usize, platform: Handle) -> Option<(usize, &'static Face)> {
    let find = || {
        let same = |f: &&Face| f.slot == slot && f.platform == platform as usize;
        KNOWN.iter().enumerate().find_map(|(n, face)| face.get().filter(same).map(|f| (n, f)))
    };
    find().or_else(|| {
        let native = native(slot, platform);
        let _filling = FILLING.lock().unwrap_or_else(|p| p.into_inner());
        find().or_else(|| {
            let number = KNOWN.iter().position(|f| f.get().is_none())?;
            let face = KNOWN[number].get_or_init(|| Face { slot, platform: platform as usize, native });
            Some((number, face))
        })
    })
}

/// Whether the driver of this device has USM itself.
pub fn is_native(slot: usize, device: Handle) -> bool {
    let platform = info::<usize>(loaders::target(slot).clGetDeviceInfo, device, DEVICE_PLATFORM).unwrap_or(0);
    of(slot, platform as Handle).is_none_or(|(_, face)| face.native.is_some())
}

/// Whether usvm provides USM on this device.
pub fn is_provided(slot: usize, device: Handle) -> bool {
    Device::query(loaders::target(slot), device).can_usm() && !is_native(slot, device)
}

fn native(slot: usize, platform: Handle) -> Option<Functions> {
    let mut functions = Functions::default();
    for (address, name) in functions.addresses.iter_mut().zip(NAMES) {
        *address = drivers_own(slot, platform, name.as_ptr()) as usize;
    }
    functions.addresses[..3].iter().any(|address| *address != 0).then_some(functions)
}

/// What the driver (or another layer) has under this name.
pub fn drivers_own(slot: usize, platform: Handle, name: *const c_char) -> *const c_void {
    let driver = loaders::target(slot);
    // SAFETY: the name is a C string; the platform is the program's or null, for which there is a function of its own.
    unsafe {
        if platform.is_null() {
            driver.clGetExtensionFunctionAddress.map_or(std::ptr::null(), |get| get(name))
        } else {
            driver
                .clGetExtensionFunctionAddressForPlatform
                .map_or(std::ptr::null(), |get| get(platform, name))
        }
    }
}

/// The function that a program gets for `name`; `None` if it is none of the extension's, or the driver's own is best.
pub fn function(slot: usize, platform: Handle, name: &CStr) -> Option<*const c_void> {
    let index = NAMES.iter().position(|n| *n == name)?;
    let (number, face) = of(slot, platform)?;
    match &face.native {
        Some(native) if native.addresses[index] == 0 || loaders::is_ours(native.addresses[index]) => None,
        Some(_) => usm::watched(number, index),
        None if can_provide(slot, platform) => usm::provided(number, index),
        None => None,
    }
}

/// Whether a device of the platform (of any, for a null one) can have USM.
fn can_provide(slot: usize, platform: Handle) -> bool {
    let driver = loaders::target(slot);
    let platforms = if platform.is_null() { platforms(driver) } else { vec![platform as usize] };
    platforms
        .iter()
        .flat_map(|p| devices(driver, *p as Handle))
        .any(|d| Device::query(driver, d as Handle).can_usm())
}

fn platforms(driver: &Dispatch) -> Vec<usize> {
    let Some(get) = driver.clGetPlatformIDs else { return Vec::new() };
    let mut count = 0;
    // SAFETY: first the number is asked for, then that many are filled.
    unsafe {
        if get(0, std::ptr::null_mut(), &raw mut count) != SUCCESS {
            return Vec::new();
        }
        let mut found = vec![0usize; count as usize];
        get(count, found.as_mut_ptr().cast(), std::ptr::null_mut());
        found
    }
}

/// The devices of a platform.
pub fn devices(driver: &Dispatch, platform: Handle) -> Vec<usize> {
    let Some(get) = driver.clGetDeviceIDs else { return Vec::new() };
    let mut count = 0;
    // SAFETY: as above.
    unsafe {
        if get(platform, DEVICE_TYPE_ALL, 0, std::ptr::null_mut(), &raw mut count) != SUCCESS {
            return Vec::new();
        }
        let mut found = vec![0usize; count as usize];
        if get(platform, DEVICE_TYPE_ALL, count, found.as_mut_ptr().cast(), std::ptr::null_mut()) != SUCCESS {
            return Vec::new();
        }
        found
    }
}
