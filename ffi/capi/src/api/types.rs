//! The types of `include/usvm.h`, under their C names.
//!
//! # Overview
//! What C passes as an enum is a number here: a caller may pass any. Handles are numbers in the shape of pointers and are
//! never followed.
//!
//! # Limits
//! Layouts and values are compared with the header's by a test (`header_tests.rs`).
#![allow(non_camel_case_types, missing_docs, reason = "the header documents them, under these names")]

use std::ffi::{c_char, c_void};

macro_rules! handles {
    ($($name:ident),*) => {$(
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(transparent)]
        pub struct $name(pub *mut c_void);
    )*};
}

handles!(usvm_device_t, usvm_space_t, usvm_fence_t, usvm_notifier_t);

macro_rules! enums {
    ($($name:ident { $($constant:ident = $value:literal,)* })*) => {$(
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(transparent)]
        pub struct $name(pub u32);

        $(pub const $constant: $name = $name($value);)*
    )*

        /// Every constant with its name, for the comparison with the header.
        #[cfg(test)]
        pub(crate) const CONSTANTS: &[(&str, u64)] = &[$($((stringify!($constant), $value),)*)*];
    };
}

enums! {
    usvm_location_type_t {
        USVM_LOCATION_NONE = 0,
        USVM_LOCATION_HOST = 1,
        USVM_LOCATION_DEVICE = 2,
        USVM_LOCATION_MIXED = 3,
    }
    usvm_advice_t {
        USVM_ADVICE_SET_READ_MOSTLY = 1,
        USVM_ADVICE_UNSET_READ_MOSTLY = 2,
        USVM_ADVICE_SET_PREFERRED_LOCATION = 3,
        USVM_ADVICE_UNSET_PREFERRED_LOCATION = 4,
        USVM_ADVICE_SET_ACCESSED_BY = 5,
        USVM_ADVICE_UNSET_ACCESSED_BY = 6,
        USVM_ADVICE_WILL_NEED = 7,
        USVM_ADVICE_DONT_NEED = 8,
    }
    usvm_access_mode_t {
        USVM_ACCESS_READ = 1,
        USVM_ACCESS_WRITE = 2,
        USVM_ACCESS_ATOMIC = 3,
    }
    usvm_attr_t {
        USVM_ATTR_RESIDENT_HOST_BYTES = 1,
        USVM_ATTR_RESIDENT_DEVICE_BYTES = 2,
        USVM_ATTR_RESIDENT_SHARED_BYTES = 3,
        USVM_ATTR_RETAINED_HOST_BYTES = 4,
        USVM_ATTR_DIRTY_BYTES = 5,
        USVM_ATTR_PAGE_SIZE = 6,
        USVM_ATTR_LAST_LOCATION = 7,
        USVM_ATTR_LAST_PREFETCH_LOCATION = 8,
        USVM_ATTR_READ_MOSTLY = 9,
        USVM_ATTR_PREFERRED_LOCATION = 10,
        USVM_ATTR_ACCESSED_BY = 11,
        USVM_ATTR_NEED = 12,
    }
    usvm_notify_reason_t {
        USVM_NOTIFY_UNMAP = 1,
        USVM_NOTIFY_REMAP = 2,
        USVM_NOTIFY_DISCARD = 3,
        USVM_NOTIFY_PROTECT = 4,
        USVM_NOTIFY_MIGRATE = 5,
    }
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct usvm_config_t {
    pub struct_size: usize,
    pub options: *const c_char,
    pub flags: u32,
    pub reserved: u32,
}

pub const USVM_CONFIG_IGNORE_ENVIRONMENT: u32 = 1;

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct usvm_device_info_t {
    pub struct_size: usize,
    pub name: [c_char; 64],
    pub vram_bytes: u64,
    pub vram_free_bytes: u64,
    pub cpu_visible_bytes: u64,
    pub min_page_bytes: u64,
    pub capabilities: u64,
}

pub const USVM_DEVICE_CAP_FAULTS: u64 = 1;
pub const USVM_DEVICE_CAP_SYSTEM_ATOMICS: u64 = 2;
pub const USVM_DEVICE_CAP_SIMULATED: u64 = 4;

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct usvm_space_config_t {
    pub struct_size: usize,
    pub policy: *const c_char,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct usvm_location_t {
    pub r#type: usvm_location_type_t,
    pub id: u32,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct usvm_access_t {
    pub ptr: *const c_void,
    pub len: usize,
    pub mode: usvm_access_mode_t,
    pub reserved: u32,
}

/// Most elements of one `usvm_begin_access`.
pub const USVM_MAX_ACCESSES: usize = 65536;

pub type usvm_notifier_callback_t = Option<
    unsafe extern "C" fn(user: *mut c_void, addr: *mut c_void, len: usize, reason: usvm_notify_reason_t),
>;

/// Has the header's layout: a test compares the fields.
pub type usvm_stats_t = usvm::observe::stats::StatsSnapshot;
