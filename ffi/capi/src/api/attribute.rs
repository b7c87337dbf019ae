//! What is known about a range.
//!
//! # Safety
//! Pointers go through `super::user`; ranges are addresses here and never followed.
#![allow(unsafe_code)]

use std::ffi::c_void;

use usvm::{Attributes, Location};

use super::memory::range;
use super::result::{Done, Failure, call, invalid, usvm_result_t};
use super::types::*;
use super::{handles, user};

/// An answer, of one of the types that answers have.
enum Answer {
    Bytes(u64),
    Flag(u32),
    Place(usvm_location_t),
}

const fn location(r#type: usvm_location_type_t, id: u32) -> usvm_location_t {
    usvm_location_t { r#type, id }
}

fn place(at: Location) -> usvm_location_t {
    match at {
        Location::Host => location(USVM_LOCATION_HOST, 0),
        Location::Device(device) => location(USVM_LOCATION_DEVICE, device),
    }
}

/// The one value that all parts have, if they have.
fn same<T: PartialEq + Copy>(mut parts: impl Iterator<Item = T>) -> Option<T> {
    let first = parts.next()?;
    parts.all(|part| part == first).then_some(first)
}

fn common(parts: impl Iterator<Item = Option<Location>>) -> Answer {
    Answer::Place(match same(parts) {
        Some(Some(at)) => place(at),
        Some(None) => location(USVM_LOCATION_NONE, 0),
        None => location(USVM_LOCATION_MIXED, 0),
    })
}

fn now(about: &Attributes) -> usvm_location_t {
    match about.devices[..] {
        [] => place(Location::Host),
        [(device, bytes)] if bytes == about.bytes => place(Location::Device(device)),
        _ => location(USVM_LOCATION_MIXED, 0),
    }
}

fn answer(about: &Attributes, attr: usvm_attr_t) -> Option<Answer> {
    let advice = || about.advice.iter();
    Some(match attr {
        USVM_ATTR_RESIDENT_HOST_BYTES => {
            Answer::Bytes(about.bytes.saturating_sub(about.residence.device + about.residence.strayed))
        }
        USVM_ATTR_RESIDENT_DEVICE_BYTES => Answer::Bytes(about.residence.device),
        USVM_ATTR_RESIDENT_SHARED_BYTES => Answer::Bytes(about.residence.shared),
        USVM_ATTR_RETAINED_HOST_BYTES => Answer::Bytes(about.residence.retained),
        USVM_ATTR_DIRTY_BYTES => Answer::Bytes(about.residence.dirty),
        USVM_ATTR_PAGE_SIZE => Answer::Bytes(about.page_size),
        USVM_ATTR_LAST_LOCATION => Answer::Place(now(about)),
        USVM_ATTR_LAST_PREFETCH_LOCATION => common(about.last_prefetch.iter().copied()),
        USVM_ATTR_READ_MOSTLY => Answer::Flag(advice().all(|a| a.read_mostly).into()),
        USVM_ATTR_PREFERRED_LOCATION => {
            common(advice().map(|a| a.preferred.map(|at| at.map_or(Location::Host, Location::Device))))
        }
        USVM_ATTR_ACCESSED_BY => common(advice().map(|a| a.accessed_by.map(Location::Device))),
        USVM_ATTR_NEED => Answer::Flag(match same(about.need.iter().copied()) {
            Some(Some(true)) => USVM_ADVICE_WILL_NEED.0,
            Some(Some(false)) => USVM_ADVICE_DONT_NEED.0,
            _ => 0,
        }),
        _ => return None,
    })
}

fn put<T: Copy>(at: *mut c_void, size: usize, value: T) -> Done {
    if size != size_of::<T>() {
        return Err(invalid("size", format_args!("is {size}, the answer has {}", size_of::<T>())));
    }
    user::write("value", at.cast(), value)
}

/// See the header.
///
/// # Safety
/// None beyond the header's: pointers are checked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_range_get_attribute(
    space: usvm_space_t,
    ptr: *const c_void,
    len: usize,
    attr: usvm_attr_t,
    value: *mut c_void,
    size: usize,
) -> usvm_result_t {
    call(|| {
        let (_, runtime) = handles::space(space)?;
        let (addr, len) = range(&runtime, ("ptr", "len"), ptr, len)?;
        if answer(&Attributes::default(), attr).is_none() {
            return Err(invalid("attr", format_args!("{} is not known", attr.0)));
        }
        let about = runtime.attributes(addr, len).map_err(|e| Failure::from(e).of("ptr"))?;
        match answer(&about, attr) {
            Some(Answer::Bytes(bytes)) => put(value, size, bytes),
            Some(Answer::Flag(flag)) => put(value, size, flag),
            Some(Answer::Place(at)) => put(value, size, at),
            None => Err(invalid("attr", "is not known")),
        }
    })
}
