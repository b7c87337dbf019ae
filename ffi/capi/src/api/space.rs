//! Spaces.
//!
//! # Safety
//! Pointers go through `super::user`.
#![allow(unsafe_code)]

use std::ffi::c_char;
use std::sync::{Arc, Mutex};

use super::handles::{self, Id, Space};
use super::init::{end_all, open_brackets};
use super::result::{Failure, call, usvm_result_t};
use super::types::{usvm_device_t, usvm_space_config_t, usvm_space_t};
use super::{notify, user};
use crate::process;

/// See the header.
///
/// # Safety
/// None beyond the header's: pointers are checked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_space_create(
    device: usvm_device_t,
    config: *const usvm_space_config_t,
    space: *mut usvm_space_t,
) -> usvm_result_t {
    call(|| {
        let (device, runtime) = handles::device(device)?;
        user::check_writable("space", space)?;
        if !config.is_null() {
            let config = user::read_struct("config", config, size_of::<usvm_space_config_t>())?;
            if !config.policy.is_null() {
                let policy = user::read_string("config.policy", config.policy)?;
                runtime.set_policy(&policy).map_err(|e| Failure::from(e).of("config"))?;
            }
        }
        let id = handles::lock().spaces.add(Arc::new(Space { device, begun: Mutex::default() }));
        user::write("space", space, usvm_space_t(handles::shape(id)))
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_space_destroy(space: usvm_space_t) -> usvm_result_t {
    call(|| {
        let id = space.0.addr() as Id;
        let mut tables = handles::lock();
        let found = tables.space(space)?;
        tables.spaces.remove(id);
        let works: Vec<_> =
            tables.works.iter().filter(|(_, w)| w.space == id).map(|(_, w)| w.clone()).collect();
        let notifiers: Vec<_> =
            tables.notifiers.iter().filter(|(_, n)| n.space == id).map(|(id, _)| id).collect();
        let notifiers = notifiers.into_iter().filter_map(|id| tables.notifiers.remove(id)).collect();
        drop(tables);
        notify::end_all(notifiers);
        let open = open_brackets(&[found], &works);
        Ok(process::current().map_or(Ok(()), |runtime| end_all(&runtime, open))?)
    })
}

/// See the header.
///
/// # Safety
/// None beyond the header's: pointers are checked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_set_policy(space: usvm_space_t, policy: *const c_char) -> usvm_result_t {
    call(|| {
        let (_, runtime) = handles::space(space)?;
        let policy = user::read_string("policy", policy)?;
        Ok(runtime.set_policy(&policy)?)
    })
}
