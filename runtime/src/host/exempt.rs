#![allow(unsafe_code)]
//! Memory that never migrates and is never registered.
//!
//! # Overview
//! usvm's threads serve the faults; whatever they touch themselves must never be missing. [`exempt`] adds such spans
//! to one set for the whole process: the shadow arenas, usvm's own allocator arenas, stacks and thread-local storage of
//! its threads ([`exempt_current_thread`]), and the data of usvm's own object, of libc and of the dynamic linker
//! ([`exempt_own_objects`]). `find_vma` shows these as mappings that are not migratable.
//!
//! # Safety
//! Reads the thread control block (%fs:0 and %fs:8, the dynamic thread vector) as glibc lays it out; only addresses
//! are taken from there, never contents.
//!
//! # Locking
//! One reader-writer lock, held for a tree look-up only. For usvm's threads and for application threads whose stack is
//! not tracked.
//!
//! # Limits
//! A thread that opens libraries later may get a new dynamic thread vector; usvm's own threads open none.

use super::spanset::SpanSet;
use crate::ground::addr::Span;
use crate::ground::renew::Renewable;
use std::ffi::{CStr, c_int, c_void};
use std::sync::{PoisonError, RwLock};

static EXEMPT: Renewable<RwLock<SpanSet>> = Renewable::new(RwLock::new(SpanSet::new()));

/// Makes the pages of `span` exempt.
pub fn exempt(span: Span) {
    EXEMPT.get().write().unwrap_or_else(PoisonError::into_inner).insert(span.page_aligned());
}

/// Makes the pages of `span` ordinary again: their mapping is gone.
pub fn unexempt(span: Span) {
    EXEMPT.get().write().unwrap_or_else(PoisonError::into_inner).remove(span.page_aligned());
}

/// Makes everything ordinary: a forked child has none of usvm's threads, and one may have held the lock.
///
/// # Safety
/// For the only thread of a child right after fork.
pub(crate) unsafe fn renew_after_fork() {
    // SAFETY: the caller's.
    unsafe { EXEMPT.renew(RwLock::new(SpanSet::new())) };
}

/// Whether any page of `span` is exempt.
pub fn is_exempt(span: Span) -> bool {
    let set = EXEMPT.get().read().unwrap_or_else(PoisonError::into_inner);
    !set.within(span.page_aligned()).is_empty()
}

/// The widest span around `addr` that is all exempt (`true`) or all not.
pub(super) fn extent(addr: u64) -> (Span, bool) {
    let set = EXEMPT.get().read().unwrap_or_else(PoisonError::into_inner);
    match set.around(addr) {
        Some(span) => (span, true),
        None => (set.gap_around(addr), false),
    }
}

/// Makes the calling thread's stack, signal stack, thread-local storage and thread vector exempt, and says which spans
/// these are, so that they can be made ordinary after the thread was joined.
pub fn exempt_current_thread() -> Vec<Span> {
    let mut spans = Vec::new();
    spans.extend(stack());
    spans.extend(signal_stack());
    spans.extend(thread_control());
    for object in objects() {
        spans.extend(object.tls);
    }
    for span in &mut spans {
        *span = span.page_aligned();
        exempt(*span);
    }
    spans
}

/// Makes the stacks of the calling thread, which is about to end, ordinary again: their addresses will be somebody
/// else's. It holds no lock any more, so it may wait for its own stack like any thread. What may share its pages with
/// other threads, thread vectors and loaded objects' storage, stays exempt.
pub fn release_current_thread() {
    for span in stack().into_iter().chain(signal_stack()) {
        unexempt(span.page_aligned());
    }
}

/// Makes the writable data of usvm's own object, of libc and of the dynamic linker exempt.
pub fn exempt_own_objects() -> Vec<Span> {
    let mine = exempt_own_objects as *const () as u64;
    let ours = |object: &Object| {
        object.code.iter().any(|s| s.contains(mine))
            || [
                "libusvm",
                "libc.so",
                "libc-",
                "ld-linux",
                "ld-2",
                "ld.so",
                "libpthread",
                "libgcc_s",
                "libm.so",
            ]
            .iter()
            .any(|n| object.file.starts_with(n))
    };
    let mut spans = Vec::new();
    for object in objects().iter().filter(|o| ours(o)) {
        spans.extend(object.data.iter().map(|s| s.page_aligned()));
    }
    spans.iter().for_each(|s| exempt(*s));
    spans
}

/// Makes the pages with the program's arguments, environment and auxiliary vector exempt: other processes read them
/// (`ps`), and no fault of theirs is served.
pub fn exempt_arguments() -> Option<Span> {
    crate::ground::inject::check(crate::ground::inject::Call::Open).ok()?;
    let stat = std::fs::read_to_string("/proc/thread-self/stat").ok()?;
    // Fields 28 and 51, counted from the state, the first after the name in parentheses.
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let (stack, end) = (field(28)?, field(51)?);
    let span = (stack < end).then(|| Span::new(stack, end))?.page_aligned();
    exempt(span);
    Some(span)
}

/// Makes the pages of the calling thread's control block exempt. The kernel writes there when the thread has ended
/// (clear_child_tid, the robust list), and then no fault is served: pthread_join would wait for ever.
pub fn exempt_thread_control() {
    thread_control().into_iter().take(1).for_each(exempt);
}

/// A loaded object, as the dynamic linker tells it.
#[derive(Debug, Default)]
struct Object {
    /// File name without its folders; empty for the program.
    file: String,
    /// Segments that are not writable.
    code: Vec<Span>,
    /// Writable segments, .bss included.
    data: Vec<Span>,
    /// The calling thread's storage in it.
    tls: Option<Span>,
}

fn objects() -> Vec<Object> {
    unsafe extern "C" fn each(info: *mut libc::dl_phdr_info, _: usize, list: *mut c_void) -> c_int {
        // SAFETY: `list` is the vector that `objects` passed; the walk is on this thread.
        let list = unsafe { &mut *list.cast::<Vec<Object>>() };
        // SAFETY: the dynamic linker passes a valid structure for the length of the call.
        let info = unsafe { &*info };
        list.push(read_object(info));
        0
    }
    let mut list: Vec<Object> = Vec::new();
    // SAFETY: `each` matches the signature and `list` outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(each), std::ptr::from_mut(&mut list).cast()) };
    list
}

fn read_object(info: &libc::dl_phdr_info) -> Object {
    let mut object = Object::default();
    if !info.dlpi_name.is_null() {
        // SAFETY: the dynamic linker's string.
        let path = unsafe { CStr::from_ptr(info.dlpi_name) }.to_string_lossy();
        object.file = path.rsplit('/').next().unwrap_or_default().to_owned();
    }
    if info.dlpi_phdr.is_null() {
        return object;
    }
    // SAFETY: the headers of a loaded object, `dlpi_phnum` of them.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    for h in headers {
        let span = Span::sized(info.dlpi_addr.wrapping_add(h.p_vaddr), h.p_memsz);
        match h.p_type {
            libc::PT_LOAD if h.p_flags & libc::PF_W != 0 => object.data.push(span),
            libc::PT_LOAD => object.code.push(span),
            libc::PT_TLS if !info.dlpi_tls_data.is_null() => {
                object.tls = Some(Span::sized(info.dlpi_tls_data.addr() as u64, h.p_memsz));
            }
            _ => {}
        }
    }
    object
}

/// The calling thread's stack.
fn stack() -> Option<Span> {
    let mut attr = std::mem::MaybeUninit::<libc::pthread_attr_t>::uninit();
    // SAFETY: asks about the calling thread; the structure is initialised on success.
    if unsafe { libc::pthread_getattr_np(libc::pthread_self(), attr.as_mut_ptr()) } != 0 {
        return None;
    }
    let (mut base, mut len) = (std::ptr::null_mut(), 0);
    // SAFETY: initialised above; destroyed once.
    let got = unsafe {
        let got = libc::pthread_attr_getstack(attr.as_ptr(), &mut base, &mut len);
        libc::pthread_attr_destroy(attr.as_mut_ptr());
        got
    };
    (got == 0).then(|| Span::sized(base.addr() as u64, len as u64))
}

/// The stack that the calling thread's signal handlers run on.
fn signal_stack() -> Option<Span> {
    let mut old = std::mem::MaybeUninit::<libc::stack_t>::zeroed();
    // SAFETY: only asks; the kernel writes a whole structure.
    let old = unsafe {
        if libc::sigaltstack(std::ptr::null(), old.as_mut_ptr()) != 0 {
            return None;
        }
        old.assume_init()
    };
    (old.ss_flags & libc::SS_DISABLE == 0).then(|| Span::sized(old.ss_sp.addr() as u64, old.ss_size as u64))
}

/// The thread control block and, on x86-64, the dynamic thread vector it points at.
#[cfg(target_arch = "x86_64")]
fn thread_control() -> Vec<Span> {
    let (block, vector): (u64, *const u64);
    // SAFETY: the psABI puts the block's own address at %fs:0; glibc and musl keep the vector at %fs:8.
    unsafe {
        std::arch::asm!("mov {}, fs:0", out(reg) block, options(nostack, readonly, preserves_flags));
        std::arch::asm!("mov {}, fs:8", out(reg) vector, options(nostack, readonly, preserves_flags));
    }
    // Not more than that: the block is the end of the stack's mapping, and the next page somebody else's.
    const STRUCT_PTHREAD: u64 = 2304;
    let mut spans = vec![Span::sized(block, STRUCT_PTHREAD)];
    if !vector.is_null() && cfg!(target_env = "gnu") {
        // Entries are two words; the one before the first holds how many there are.
        // SAFETY: glibc allocates the vector with that entry.
        let entries = unsafe { vector.sub(2).read() }.min(1 << 16);
        spans.push(Span::sized(vector.addr() as u64 - 16, (entries + 2) * 16));
    }
    spans
}

#[cfg(not(target_arch = "x86_64"))]
fn thread_control() -> Vec<Span> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ground::addr::SZ_4K;
    use std::cell::Cell;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn a_thread_is_exempt_from_stack_to_vector() {
        thread_local!(static LOCAL: Cell<u64> = const { Cell::new(7) });
        let spans = std::thread::spawn(|| {
            let on_stack = 1u64;
            LOCAL.with(|l| l.set(8));
            let spans = exempt_current_thread();
            let stack = Span::sized(std::ptr::from_ref(&on_stack).addr() as u64, 8);
            let local = LOCAL.with(|l| Span::sized(std::ptr::from_ref(l).addr() as u64, 8));
            assert!(is_exempt(stack), "{spans:?}");
            assert!(is_exempt(local), "{spans:?}");
            let vector: u64;
            // SAFETY: as in `thread_control`.
            unsafe { std::arch::asm!("mov {}, fs:8", out(reg) vector, options(nostack, readonly)) };
            assert!(is_exempt(Span::sized(vector, 16)), "{spans:?}");
            spans
        })
        .join()
        .unwrap();
        assert!(spans.iter().all(|s| s.start % SZ_4K == 0 && s.end % SZ_4K == 0));
        // The thread is gone; its addresses may become somebody's.
        spans.into_iter().for_each(unexempt);
    }

    #[test]
    fn own_data_is_exempt() {
        static DATA: AtomicU64 = AtomicU64::new(3);
        DATA.fetch_add(1, Ordering::Relaxed);
        exempt_own_objects();
        assert!(is_exempt(Span::sized(DATA.as_ptr().addr() as u64, 8)));
    }

    #[test]
    fn exempt_and_back() {
        let base = 0x6_0000_0000;
        let span = Span::new(base + 0x1234, base + 0x2001);
        exempt(span);
        assert!(is_exempt(Span::sized(base + 0x1000, 1)) && is_exempt(Span::sized(base + 0x2fff, 1)));
        assert!(!is_exempt(Span::sized(base + 0x3000, 1)));
        assert_eq!(extent(base + 0x1800), (Span::new(base + 0x1000, base + 0x3000), true));
        assert!(!extent(base + 0x3000).1);
        unexempt(span);
        assert!(!is_exempt(Span::sized(base, 0x4000)));
    }
}
