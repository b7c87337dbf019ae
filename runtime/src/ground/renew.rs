//! Statics that a forked child begins anew.
//!
//! # Overview
//! A child of fork has one thread. A lock that another thread held at the fork is never released there, and what it
//! guards may be half changed. [`Renewable`] is a static that the child overwrites with a fresh value.
//!
//! # Locking
//! None of its own.
//!
//! # Limits
//! What the old value owned is never freed in the child.
//!
//! # Safety
//! [`Renewable::renew`] writes through a shared static; it is only sound while nobody else can look, which its caller
//! promises.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;

/// See the module.
#[derive(Debug)]
pub(crate) struct Renewable<T>(UnsafeCell<T>);

// SAFETY: shared access is that of `T`, except in `renew`, whose caller is alone.
unsafe impl<T: Sync> Sync for Renewable<T> {}

impl<T> Renewable<T> {
    /// With this value.
    pub(crate) const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// The value.
    pub(crate) fn get(&self) -> &T {
        // SAFETY: only `renew` writes, and then nobody holds this reference.
        unsafe { &*self.0.get() }
    }

    /// Replaces the value without looking at the old one.
    ///
    /// # Safety
    /// The process has one thread, and that holds no reference into the value: a child right after fork.
    pub(crate) unsafe fn renew(&self, value: T) {
        // SAFETY: the caller is alone.
        unsafe { std::ptr::write(self.0.get(), value) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn a_lock_held_by_nobody_is_free_again() {
        let lock = Renewable::new(Mutex::new(1));
        std::mem::forget(lock.get().lock());
        assert!(lock.get().try_lock().is_err());
        // SAFETY: this test's own value, and no guard is used any more.
        unsafe { lock.renew(Mutex::new(2)) };
        assert_eq!(*lock.get().lock().unwrap(), 2);
    }
}
