//! Devices.
//!
//! # Safety
//! Pointers go through `super::user`.
#![allow(unsafe_code)]

use std::ffi::c_char;

use usvm::space::ports::Device;

use super::result::{call, invalid, usvm_result_t};
use super::types::{
    USVM_DEVICE_CAP_FAULTS, USVM_DEVICE_CAP_SIMULATED, USVM_DEVICE_CAP_SYSTEM_ATOMICS, usvm_device_info_t,
    usvm_device_t,
};
use super::{handles, user};

/// See the header.
///
/// # Safety
/// None beyond the header's: pointers are checked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_device_count(count: *mut u32) -> usvm_result_t {
    call(|| {
        let runtime = handles::runtime()?;
        user::write("count", count, runtime.devices().len() as u32)
    })
}

/// See the header.
///
/// # Safety
/// None beyond the header's: pointers are checked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_device_get(index: u32, device: *mut usvm_device_t) -> usvm_result_t {
    call(|| {
        let there = handles::runtime()?.devices().len();
        if index as usize >= there {
            return Err(invalid("index", format_args!("{index}: there are {there} devices")));
        }
        user::write("device", device, handles::device_handle(index))
    })
}

/// See the header.
///
/// # Safety
/// None beyond the header's: pointers are checked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_device_get_info(
    device: usvm_device_t,
    info: *mut usvm_device_info_t,
) -> usvm_result_t {
    call(|| {
        let (index, runtime) = handles::device(device)?;
        let size = user::struct_size("info", info.cast(), size_of::<usvm_device_info_t>())?;
        let device = runtime.device(index)?;
        let about = device.info();
        let mut name = [0; 64];
        for (to, from) in name.iter_mut().take(63).zip(about.name.bytes()) {
            *to = from as c_char;
        }
        let mut capabilities = USVM_DEVICE_CAP_SIMULATED;
        if about.recoverable_faults {
            capabilities |= USVM_DEVICE_CAP_FAULTS;
        }
        if about.system_atomics {
            capabilities |= USVM_DEVICE_CAP_SYSTEM_ATOMICS;
        }
        let filled = usvm_device_info_t {
            struct_size: size.min(size_of::<usvm_device_info_t>()),
            name,
            vram_bytes: about.vram_bytes,
            vram_free_bytes: device.vram_free_bytes(),
            cpu_visible_bytes: about.cpu_visible_bytes,
            min_page_bytes: about.min_page,
            capabilities,
        };
        user::write_struct("info", info, size, &filled)
    })
}
