//! The locks and atomics of the commit protocol, in one place.
//!
//! [`super::notifier`] takes them from its parent's `primitive`, so that its source can be compiled a second time
//! against a model checker's types (see `commit_tests`).

pub(super) use std::sync::atomic::{AtomicU64, Ordering};
pub(super) use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
