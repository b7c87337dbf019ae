//! Changes of protection, which the kernel does not report.
//!
//! # Overview
//! userfaultfd has an event for munmap, mremap and madvise, none for mprotect. Who interposes mprotect calls
//! [`protection_changed`] after it, and a Rust program says it by [`Runtime::protection_changed`]: the device's mappings
//! of the memory are gone when it returns, and the next access asks the kernel what is allowed now.
//!
//! [`mappings`] is here because it looks at the running runtime in the same way.
//!
//! # Limits
//! A change that nobody tells (a direct system call, a Rust program's own mprotect) is seen when the device's mapping is
//! made anew for another reason: an access of a kind that it does not allow, or a migration.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Inner, Runtime, current, here, is_anywhere};
use crate::ground::addr::Span;
use crate::ground::alloc;
use crate::ground::error::Result;

/// Threads that look at the process's runtime just now. Its end waits for them.
static LOOKING: AtomicUsize = AtomicUsize::new(0);

/// Returns when nobody looks at the runtime that [`current`] does not give any more.
pub(super) fn wait_for_lookers() {
    while LOOKING.load(Ordering::SeqCst) > 0 {
        std::thread::yield_now();
    }
}

/// In a forked child: whoever looked is in the parent.
pub(super) fn forget_lookers() {
    LOOKING.store(0, Ordering::SeqCst);
}

struct Look;

impl Look {
    fn begin() -> Self {
        LOOKING.fetch_add(1, Ordering::SeqCst);
        Self
    }
}

impl Drop for Look {
    fn drop(&mut self) {
        LOOKING.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The protection of `[addr, addr + len)` was changed. Where a runtime runs and a device may have mappings of it, they are
/// gone when this returns. Any thread; takes no lock. Costs a load where there is no runtime.
pub fn protection_changed(addr: u64, len: u64) {
    // A child made without handlers has its parent's memory and none of its threads.
    if !is_anywhere() || !here::is_here() {
        return;
    }
    let _look = Look::begin();
    if let Some(inner) = current() {
        // A runtime that ends meanwhile takes all mappings away.
        let _ = inner.protection_changed(Span::sized(addr, len).page_aligned());
    }
}

/// The mappings of this process as lines of /proc/self/maps without names, by what a running runtime has open: for those who
/// cannot open that. `None` where no runtime runs or Linux is older than 6.11. Any thread; takes no lock.
pub fn mappings() -> Option<String> {
    if !is_anywhere() || !here::is_here() {
        return None;
    }
    let _look = Look::begin();
    alloc::internal(|| current()?.host.mappings_text())
}

impl Runtime {
    /// To be called after mprotect took rights away from `[addr, addr + len)`: devices' mappings of it are gone when this
    /// returns. Programs under the preload library, or linked with libusvm, need not: their mprotect does it.
    pub fn protection_changed(&self, addr: u64, len: u64) -> Result<()> {
        self.inner().check()?;
        self.inner().protection_changed(Span::sized(addr, len).page_aligned())
    }
}

impl Inner {
    fn protection_changed(&self, span: Span) -> Result<()> {
        if !self.is_running() || !self.svm.was_served(span) {
            return Ok(());
        }
        let svm = self.svm.clone();
        // Waits for nobody, and must not stand in line behind what does.
        alloc::internal(|| {
            self.control.end(move || {
                svm.protected(span);
                Ok(())
            })
        })
    }
}
