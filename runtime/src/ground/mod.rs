//! The ground floor: addresses, errors, configuration, usvm's own memory, waiting, and fault injection.
//!
//! Everything above stands on these rooms and they stand on none of the others.

pub mod addr;
pub mod alloc;
pub mod atfork;
pub mod config;
pub mod error;
pub mod fds;
pub mod inject;
pub mod once;
pub(crate) mod renew;
pub mod sync;
pub mod thread;
pub mod words;
