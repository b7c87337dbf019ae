//! The functions behind the interposed ones.
//!
//! # Overview
//! [`Next`] is a function of the library that comes after this one, looked up once.
//!
//! # Safety
//! Whoever calls [`Next::get`] names the function's type; the names are literals beside the types.

use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A function `F` that the next library exports under `name`.
pub(crate) struct Next<F> {
    name: &'static CStr,
    at: AtomicPtr<c_void>,
    kind: PhantomData<F>,
}

impl<F: Copy> Next<F> {
    /// # Safety
    /// The C library's function of this name must have the type `F`, a function pointer.
    pub(crate) const unsafe fn new(name: &'static CStr) -> Self {
        Self { name, at: AtomicPtr::new(std::ptr::null_mut()), kind: PhantomData }
    }

    /// The function; ends the process where there is none, for its caller has no other way to go on.
    #[inline]
    pub(crate) fn get(&self) -> F {
        match self.known() {
            Some(found) => found,
            None => {
                self.look_up();
                self.get()
            }
        }
    }

    /// The function, if it was looked up.
    #[inline]
    pub(crate) fn known(&self) -> Option<F> {
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        let at = self.at.load(Ordering::Relaxed);
        // SAFETY: `F` is a function pointer (see `new`) and the address is that function's.
        (!at.is_null()).then(|| unsafe { std::mem::transmute_copy(&at) })
    }

    /// Looks it up now: later may be a moment when the dynamic linker must not be called.
    #[cold]
    pub(crate) fn look_up(&self) {
        // SAFETY: a name that ends with a zero.
        let at = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        if at.is_null() {
            // SAFETY: ends the process.
            unsafe { libc::abort() };
        }
        self.at.store(at, Ordering::Relaxed);
    }
}
