//! Whoever wants to hear of changes of memory: the notifiers of the C interface.
//!
//! # Overview
//! [`Watch`] calls one function for each change that usvm hears of or makes itself. The wiring's users set it
//! ([`crate::Runtime::watch`]).
//!
//! # Locking
//! None of its own. The function is called on usvm's service threads, with locks of ranges held: it may put a note into a
//! lock-free queue and no more.
//!
//! # Limits
//! The kernel reports changes only of memory that usvm has registered, and lets the call that caused one return when the
//! report was read: a watcher hears of it soon after. Migrations are told when they are done.

use std::fmt;
use std::sync::OnceLock;

use crate::ground::addr::Span;

/// What happened to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It was unmapped, or replaced.
    Unmapped,
    /// mremap took it elsewhere.
    Moved,
    /// Its contents were dropped.
    Dropped,
    /// It went to a device or came back from one, all or a part.
    Migrated,
}

type Watcher = Box<dyn Fn(Change, Span) + Send + Sync>;

/// At most one watcher, for the life of a runtime.
#[derive(Default)]
pub struct Watch(OnceLock<Watcher>);

impl Watch {
    /// Sets the watcher; `false` if there is one already.
    pub fn set(&self, watcher: impl Fn(Change, Span) + Send + Sync + 'static) -> bool {
        self.0.set(Box::new(watcher)).is_ok()
    }

    /// Tells the watcher, if there is one.
    #[inline]
    pub fn tell(&self, change: Change, span: Span) {
        if let Some(watcher) = self.0.get() {
            watcher(change, span);
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watch").field(&self.0.get().is_some()).finish()
    }
}
