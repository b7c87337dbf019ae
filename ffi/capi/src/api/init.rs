//! Version, start and end.
//!
//! # Limits
//! Options are checked even where a running usvm does not take them any more.
//!
//! # Safety
//! Pointers go through `super::user`.
#![allow(unsafe_code)]

use usvm::Config;

use super::handles::{self, Space, Work};
use super::result::{Done, Failure, USVM_ERROR_NOT_RUNNING, call, invalid, usvm_result_t};
use super::types::{USVM_CONFIG_IGNORE_ENVIRONMENT, usvm_config_t};
use super::{notify, user};
use crate::process;

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_version() -> u32 {
    const fn number(text: &str) -> u32 {
        let (bytes, mut value, mut at) = (text.as_bytes(), 0, 0);
        while at < bytes.len() {
            value = value * 10 + (bytes[at] - b'0') as u32;
            at += 1;
        }
        value
    }
    const MAJOR: u32 = number(env!("CARGO_PKG_VERSION_MAJOR"));
    const MINOR: u32 = number(env!("CARGO_PKG_VERSION_MINOR"));
    const PATCH: u32 = number(env!("CARGO_PKG_VERSION_PATCH"));
    MAJOR << 16 | MINOR << 8 | PATCH
}

/// See the header.
///
/// # Safety
/// None beyond the header's: pointers are checked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usvm_init(config: *const usvm_config_t) -> usvm_result_t {
    call(|| {
        // In a child that no handler of fork told.
        usvm::runtime::leave_the_parents()?;
        // Before all else: a fork of another thread must not leave its child what this one holds.
        process::install_handlers();
        let config = if config.is_null() { Config::from_env()? } else { read_config(config)? };
        usvm::runtime::check(&config)?;
        process::acquire(Some(config))?;
        let mut tables = handles::lock();
        tables.forget_the_parents();
        if tables.users == 0 {
            tables.epoch = tables.epoch.wrapping_add(1);
        }
        tables.users += 1;
        Ok(())
    })
}

fn read_config(at: *const usvm_config_t) -> Done<Config> {
    let given = user::read_struct("config", at, size_of::<usvm_config_t>())?;
    let unknown = given.flags & !USVM_CONFIG_IGNORE_ENVIRONMENT;
    if unknown != 0 {
        return Err(invalid("config.flags", format_args!("{unknown:#x} is not known")));
    }
    if given.reserved != 0 {
        return Err(invalid("config.reserved", "is not 0"));
    }
    let mut config = match given.flags & USVM_CONFIG_IGNORE_ENVIRONMENT {
        0 => Config::from_env()?,
        _ => Config::default(),
    };
    if !given.options.is_null() {
        let options = user::read_string("config.options", given.options)?;
        for part in options.split(';').map(str::trim).filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').ok_or_else(|| {
                invalid("config.options", format_args!("`{part}` has no `=`; write key=value;key=value"))
            })?;
            config.set(key.trim(), value.trim()).map_err(|e| Failure::from(e).of("config.options"))?;
        }
    }
    Ok(config)
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn usvm_shutdown() -> usvm_result_t {
    call(|| {
        let mut tables = handles::lock();
        tables.forget_the_parents();
        if tables.users == 0 {
            return Err(Failure::new(USVM_ERROR_NOT_RUNNING, "there is no usvm_init that this could end"));
        }
        tables.users -= 1;
        if tables.users > 0 {
            drop(tables);
            return Ok(process::release()?);
        }
        let (spaces, works) = (tables.spaces.clear(), tables.works.clear());
        let notifiers = tables.notifiers.clear();
        drop(tables);
        notify::end_all(notifiers);
        let ended = process::current().map_or(Ok(()), |r| end_all(&r, open_brackets(&spaces, &works)));
        process::release()?;
        Ok(ended?)
    })
}

/// Ends `brackets`, all of them; the first error is told.
pub(super) fn end_all(runtime: &usvm::Runtime, brackets: Vec<usvm::Bracket>) -> usvm::Result<()> {
    brackets.into_iter().map(|bracket| runtime.end_access(bracket)).fold(Ok(()), Result::and)
}

/// The process ends: what is begun and not ended will not be ended by the program any more.
pub(crate) fn end_accesses(runtime: &usvm::Runtime) {
    let open = {
        // Whoever has the lock holds it for some instructions, or for a fork, which there is not now; or is interrupted by
        // this very thread.
        let Some(tables) = handles::try_lock() else { return };
        let spaces: Vec<_> = tables.spaces.iter().map(|(_, space)| space.clone()).collect();
        let works: Vec<_> = tables.works.iter().map(|(_, work)| work.clone()).collect();
        drop(tables);
        open_brackets(&spaces, &works)
    };
    let _ = end_all(runtime, open);
}

/// Takes what is begun and not ended out of `spaces` and `works`.
pub(super) fn open_brackets(
    spaces: &[std::sync::Arc<Space>],
    works: &[std::sync::Arc<Work>],
) -> Vec<usvm::Bracket> {
    let mut open = Vec::new();
    for space in spaces {
        let mut begun = space.begun.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        open.extend(begun.drain(..).map(|(_, bracket)| bracket));
    }
    for work in works {
        open.extend(work.bracket.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take());
    }
    open
}
