//! Statistics.
//!
//! # Safety
//! Pointers go through `super::user`.
#![allow(unsafe_code)]

use std::ffi::c_char;

use super::result::{Failure, USVM_ERROR_BUFFER_TOO_SMALL, call, invalid, usvm_result_t};
use super::types::{usvm_space_t, usvm_stats_t};
use super::{handles, user};

/// See the header.
///
/// # Safety
/// None beyond the header's: pointers are checked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_stats_get(space: usvm_space_t, stats: *mut usvm_stats_t) -> usvm_result_t {
    call(|| {
        let (_, runtime) = handles::space(space)?;
        if stats.is_null() {
            return Err(invalid("stats", "is NULL"));
        }
        let size = user::read("stats", stats.cast::<u64>())?;
        let least = size_of::<usvm_stats_t>() as u64;
        if !(least..=4096).contains(&size) {
            return Err(invalid(
                "stats.size",
                format_args!("is {size}; this version takes {least} to 4096 bytes"),
            ));
        }
        let filled = usvm_stats_t { size: least, ..runtime.stats() };
        user::write_struct("stats", stats, size as usize, &filled)
    })
}

/// See the header.
///
/// # Safety
/// None beyond the header's: pointers are checked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_stats_get_json(
    space: usvm_space_t,
    json: *mut c_char,
    size: *mut usize,
) -> usvm_result_t {
    call(|| {
        let (_, runtime) = handles::space(space)?;
        let room = user::read("size", size)?;
        let mut text = runtime.stats().to_json().into_bytes();
        text.push(0);
        if !json.is_null() && room >= text.len() {
            user::check_writable("size", size)?;
            user::write_bytes("json", json.cast(), &text)?;
        }
        user::write("size", size, text.len())?;
        if json.is_null() || room >= text.len() {
            return Ok(());
        }
        let needed = text.len();
        Err(Failure::new(
            USVM_ERROR_BUFFER_TOO_SMALL,
            format_args!("size: {room}, but {needed} bytes are needed"),
        ))
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_stats_reset(space: usvm_space_t) -> usvm_result_t {
    call(|| {
        handles::space(space)?.1.reset_stats();
        Ok(())
    })
}
