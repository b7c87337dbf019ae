//! The control blocks of the program's threads stay on the host, and the process ends with the last of them.
//!
//! # Overview
//! When a thread has ended, the kernel writes zero where CLONE_CHILD_CLEARTID says and reads the list of robust locks,
//! both in the thread's control block. It serves no userfaultfd fault then: were that page away, pthread_join would wait
//! for ever. So every thread tells where its block is when it begins, and the runtime, or the next one that starts, keeps
//! these pages home ([`usvm::Runtime::keep_home`]). A robust lock that the thread still holds when it ends lies anywhere: the
//! kernel writes there who died, or whoever waits for the lock would wait for ever. So the end looks through the list, too.
//!
//! A process whose main thread left by pthread_exit ends when its last thread does. usvm's threads would keep it alive:
//! so the program's are counted, and the last one, when its own destructors have run, calls `exit(0)` as the C library
//! does. Threads may live that were not counted: those that were there before this library, and all later ones where it was
//! loaded late, as a layer of an OpenCL loader is. So the kernel's list is asked first, and while it has others than
//! usvm's a thread looks now and then whether they have ended. A thread that ends by the system call itself is not seen;
//! about once a second the runtime's housekeeping looks whether all are gone that way.
//!
//! # Locking
//! None: [`TABLE`] is atomics. A new thread of a program with a running runtime waits for one request to it, unless its
//! block is where an earlier thread's was.
//!
//! # Limits
//! [`BLOCKS`] different places of blocks are remembered; threads beyond them are not protected. Those that begin unseen while
//! a runtime runs are not either: the C library's own (asynchronous I/O, timers), which nobody joins, and in a program that
//! loaded this library late all of them. What a thread other than the first gives to the system call by which it ends as the
//! last one is not seen, and neither is who was the last within one second.
//!
//! # Safety
//! The thread pointer is the block's address on x86-64 (psABI). What a thread starts with lives in a static slot or in a
//! block of malloc, which the new thread takes over.

use std::ffi::{c_int, c_void};
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::time::Duration;

use usvm::Runtime;
use usvm::ground::{alloc, thread};

use crate::next::Next;
use crate::start;

type Begin = unsafe extern "C-unwind" fn(*mut c_void) -> *mut c_void;
type ThrdBegin = unsafe extern "C-unwind" fn(*mut c_void) -> c_int;
type Create =
    unsafe extern "C" fn(*mut libc::pthread_t, *const libc::pthread_attr_t, Begin, *mut c_void) -> c_int;
type ThrdCreate = unsafe extern "C" fn(*mut libc::pthread_t, ThrdBegin, *mut c_void) -> c_int;

// SAFETY: the C library's signatures.
static CREATE: Next<Create> = unsafe { Next::new(c"pthread_create") };
// SAFETY: as above.
static THRD_CREATE: Next<ThrdCreate> = unsafe { Next::new(c"thrd_create") };

/// Bytes of a control block that the kernel may write (struct pthread of glibc).
const BLOCK: u64 = 2304;
/// Places of control blocks that are remembered; a power of two.
const BLOCKS: usize = 4096;

/// Where a control block is, and the runtime that keeps it home.
struct Place {
    block: AtomicU64,
    kept_by: AtomicU32,
}

static TABLE: [Place; BLOCKS] =
    [const { Place { block: AtomicU64::new(0), kept_by: AtomicU32::new(0) } }; BLOCKS];

/// Number of the running runtime, 0 for none; each has its own.
static RUNNING: AtomicU32 = AtomicU32::new(0);
static STARTED: AtomicU32 = AtomicU32::new(0);

/// Threads of the program that live.
static LIVING: AtomicUsize = AtomicUsize::new(0);
/// The key whose destructor tells that a thread ends, plus one; 0 for none.
static KEY: AtomicU32 = AtomicU32::new(0);

/// Rounds of destructors that the C library makes (PTHREAD_DESTRUCTOR_ITERATIONS).
const ROUNDS: usize = 4;

/// Counts the process's first thread.
pub(crate) fn count_first() {
    let mut key = 0;
    // SAFETY: a destructor that is never unloaded.
    if unsafe { libc::pthread_key_create(&mut key, Some(ending)) } == 0 {
        KEY.store(key + 1, Ordering::Relaxed);
        LIVING.store(1, Ordering::Relaxed);
        tell_my_end(1);
    }
}

/// Whether no thread of the program lives any more.
pub(crate) fn all_ended() -> bool {
    KEY.load(Ordering::Relaxed) != 0 && LIVING.load(Ordering::SeqCst) == 0
}

fn tell_my_end(round: usize) {
    if let Some(key) = KEY.load(Ordering::Relaxed).checked_sub(1) {
        // SAFETY: our own key; the value is a number.
        unsafe { libc::pthread_setspecific(key, std::ptr::without_provenance(round)) };
    }
}

/// A thread ends. In the last round, after the program's destructors, it counts.
unsafe extern "C" fn ending(round: *mut c_void) {
    if round.addr() < ROUNDS {
        return tell_my_end(round.addr() + 1);
    }
    keep_robust_locks();
    if LIVING.fetch_sub(1, Ordering::SeqCst) == 1 {
        // A runtime that starts just now is not seen here, and then sees that all have ended.
        fence(Ordering::SeqCst);
        if start::is_owner() {
            end_with_the_others();
        }
    }
}

/// A thread of usvm's own has started a runtime: ends the process if the program's threads have ended meanwhile.
pub(crate) fn started_for_nobody() {
    fence(Ordering::SeqCst);
    if all_ended() {
        end_with_the_others();
    }
}

/// Whether somebody ends the process already, or waits until he may.
static WAITING: AtomicBool = AtomicBool::new(false);

/// No counted thread lives any more: ends the process when no other of the program lives.
fn end_with_the_others() {
    const SOONEST: Duration = Duration::from_millis(5);
    const LATEST: Duration = Duration::from_millis(500);
    extern "C" fn wait(_: *mut c_void) -> *mut c_void {
        alloc::internal(|| {
            let mut pause = SOONEST;
            while !(all_ended() && others().is_empty()) {
                std::thread::sleep(pause);
                pause = (pause * 2).min(LATEST);
            }
        });
        // SAFETY: as below.
        unsafe { libc::exit(0) }
    }
    if WAITING.swap(true, Ordering::Relaxed) {
        return;
    }
    if alloc::internal(|| others().is_empty()) {
        // SAFETY: what the C library does when the last thread has ended.
        unsafe { libc::exit(0) };
    }
    if !start::detached(wait, std::ptr::null_mut()) {
        // This one has nothing else to do any more.
        wait(std::ptr::null_mut());
    }
}

/// Called about once a second while a runtime runs. A thread that ended by the system call itself was not seen to end, and is
/// counted for ever: where none but usvm's are left the process ends as the kernel would end it, without exit handlers.
pub(crate) fn look_for_the_end() {
    /// Whether the first thread has ended while others lived.
    static OUTLIVED: AtomicBool = AtomicBool::new(false);
    extern "C" fn leave(_: *mut c_void) -> *mut c_void {
        // The last thread's, which ends with 0; where the first was the last one, its own.
        let outlived = OUTLIVED.load(Ordering::Relaxed);
        start::leave(if outlived { 0 } else { alloc::internal(status_of_first).unwrap_or(0) })
    }
    if all_ended() || !fields(first()).is_some_and(|fields| is_end(&fields)) {
        return;
    }
    if !others().is_empty() {
        return OUTLIVED.store(true, Ordering::Relaxed);
    }
    if !WAITING.swap(true, Ordering::Relaxed) && !start::detached(leave, std::ptr::null_mut()) {
        // Another time.
        WAITING.store(false, Ordering::Relaxed);
    }
}

/// What the first thread has ended with.
fn status_of_first() -> Option<c_int> {
    let fields = String::from_utf8(fields(first())?).ok()?;
    // Field 52, of which the state is the third, as wait tells it.
    let status: c_int = fields.split_ascii_whitespace().nth(49)?.parse().ok()?;
    Some(status >> 8 & 0xff)
}

/// The process's first thread.
fn first() -> libc::pid_t {
    // SAFETY: asks who this is.
    unsafe { libc::getpid() }
}

/// The process's threads that are neither this one nor usvm's own, by their kernel ids. None where the kernel does not tell.
fn others() -> Vec<libc::pid_t> {
    // SAFETY: asks who this is.
    let own = unsafe { libc::gettid() };
    // By their ids: any thread may have any name.
    let service: Vec<_> = thread::living().into_iter().map(|(id, _)| id.as_raw_nonzero().get()).collect();
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return Vec::new() };
    let ids = tasks.flatten().filter_map(|task| task.file_name().to_str()?.parse().ok());
    let is_foreign = |id: &libc::pid_t| {
        // The first thread stays as a zombie when it has ended before the others; another has no file then.
        let ended = || fields(*id).is_none_or(|fields| is_end(&fields));
        *id != own && !service.contains(id) && !ended()
    };
    ids.filter(is_foreign).collect()
}

/// What the kernel tells of a thread, from its state on ("id (name) state …").
fn fields(id: libc::pid_t) -> Option<Vec<u8>> {
    let mut stat = fs::read(format!("/proc/self/task/{id}/stat")).ok()?;
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    Some(stat.split_off(stat.len().min(end + 2)))
}

fn is_end(fields: &[u8]) -> bool {
    matches!(fields.first(), Some(b'Z' | b'X') | None)
}

/// Remembers the control blocks of threads that began before this library could see them: each lies as far from the head
/// of its list of robust locks, which the kernel tells, as the calling thread's own.
fn note_others() {
    let head_of = |id: libc::pid_t| {
        let (mut at, mut len) = (0u64, 0usize);
        // SAFETY: asks for the list of a thread of this process; both results are written here.
        let asked = unsafe { libc::syscall(libc::SYS_get_robust_list, id, &raw mut at, &raw mut len) };
        (asked == 0 && at != 0).then_some(at)
    };
    let block = own_block();
    let Some(distance) = head_of(0).and_then(|head| head.checked_sub(block)).filter(|d| *d < BLOCK) else {
        return;
    };
    for id in others() {
        if let Some(block) = head_of(id).and_then(|head| head.checked_sub(distance)) {
            let _ = place_of(block);
        }
    }
}

pub(crate) fn look_up() {
    CREATE.look_up();
    THRD_CREATE.look_up();
}

#[cfg(target_arch = "x86_64")]
fn own_block() -> u64 {
    let block: u64;
    // SAFETY: the psABI puts the block's own address at %fs:0.
    unsafe { std::arch::asm!("mov {}, fs:0", out(reg) block, options(nostack, readonly, preserves_flags)) };
    block
}

#[cfg(not(target_arch = "x86_64"))]
fn own_block() -> u64 {
    0
}

/// The place for `block`: its own from an earlier thread, or a free one.
fn place_of(block: u64) -> Option<&'static Place> {
    let first = (block >> 6).wrapping_mul(0x9e37_79b9_7f4a_7c15) as usize >> 20;
    (0..BLOCKS).map(|step| &TABLE[(first + step) % BLOCKS]).find(|place| {
        let seen = place.block.compare_exchange(0, block, Ordering::SeqCst, Ordering::SeqCst);
        seen.is_ok() || seen == Err(block)
    })
}

/// Remembers the calling thread's block.
pub(crate) fn note_current() {
    let block = own_block();
    let Some(place) = (block != 0).then(|| place_of(block)).flatten() else { return };
    let running = RUNNING.load(Ordering::SeqCst);
    if running != 0 && place.kept_by.load(Ordering::Relaxed) != running && start::is_owner() {
        // While the runtime still starts this waits; its start keeps what it finds in the table, but may have passed here.
        if let Some(runtime) = usvm_capi::process::current() {
            keep(&runtime, place, running);
        }
    }
}

fn keep(runtime: &Runtime, place: &Place, running: u32) {
    let block = place.block.load(Ordering::SeqCst);
    // An error: the runtime has ended.
    if block != 0 && runtime.keep_home(block, BLOCK).is_ok() {
        place.kept_by.store(running, Ordering::Relaxed);
    }
}

/// A lock in the kernel's list of a thread's robust locks, and the list's head (struct robust_list_head).
#[repr(C)]
#[derive(Clone, Copy)]
struct RobustHead {
    next: u64,
    /// From a lock's place in the list to its word.
    offset: i64,
    pending: u64,
}

/// Locks that the kernel looks at (ROBUST_LIST_LIMIT).
const ROBUST_MOST: usize = 2048;

/// Keeps the robust locks home that the calling thread, which ends, still holds.
fn keep_robust_locks() {
    if RUNNING.load(Ordering::SeqCst) == 0 || !start::is_owner() {
        return;
    }
    let (mut at, mut len) = (0u64, 0usize);
    // SAFETY: asks for the calling thread's own list; both results are written here.
    if unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut at, &raw mut len) } != 0 || at == 0 {
        return;
    }
    // SAFETY: the head is in the thread's own control block.
    let head = unsafe { std::ptr::with_exposed_provenance::<RobustHead>(at as usize).read_volatile() };
    if head.next == at && head.pending == 0 {
        return;
    }
    let Some(runtime) = usvm_capi::process::current() else { return };
    // The lowest bit tells a lock with priority inheritance.
    let keep_lock = |entry: u64| {
        let entry = entry & !1;
        let word = entry.wrapping_add_signed(head.offset);
        // An error: the runtime has ended.
        let _ = runtime.keep_home(entry.min(word), entry.abs_diff(word) + size_of::<u64>() as u64);
    };
    if head.pending != 0 {
        keep_lock(head.pending);
    }
    let mut entry = head.next;
    for _ in 0..ROBUST_MOST {
        if entry & !1 == at {
            return;
        }
        keep_lock(entry);
        let Some(next) = read_word(entry & !1) else { return };
        entry = next;
    }
}

/// The word at `addr`, read as the kernel would: the list may lead nowhere, and then it ends there.
fn read_word(addr: u64) -> Option<u64> {
    let mut word = 0u64;
    let to = libc::iovec { iov_base: (&raw mut word).cast(), iov_len: size_of::<u64>() };
    let from =
        libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(addr as usize), iov_len: to.iov_len };
    // SAFETY: reads this process's memory into the word; a bad address is an error.
    let got = unsafe { libc::process_vm_readv(libc::getpid(), &to, 1, &from, 1, 0) };
    (got == size_of::<u64>() as isize).then_some(word)
}

/// A runtime runs: keeps the blocks of all threads there are.
pub(crate) fn runtime_started(runtime: &Runtime) {
    note_others();
    let number = STARTED.fetch_add(1, Ordering::Relaxed) + 1;
    RUNNING.store(number, Ordering::SeqCst);
    for place in TABLE.iter().filter(|place| place.block.load(Ordering::SeqCst) != 0) {
        keep(runtime, place, number);
    }
}

/// No runtime runs in a forked child, and one thread.
pub(crate) fn forget_in_child() {
    RUNNING.store(0, Ordering::SeqCst);
    for place in &TABLE {
        place.block.store(0, Ordering::Relaxed);
        place.kept_by.store(0, Ordering::Relaxed);
    }
    LIVING.store(1, Ordering::Relaxed);
    WAITING.store(false, Ordering::Relaxed);
    tell_my_end(1);
    note_current();
}

/// What a new thread begins with.
struct Start {
    begin: AtomicPtr<c_void>,
    arg: AtomicPtr<c_void>,
}

/// Threads between their creation and their beginning; more of them use malloc.
const STARTS: usize = 64;
static STARTING: [Start; STARTS] = [const {
    Start { begin: AtomicPtr::new(std::ptr::null_mut()), arg: AtomicPtr::new(std::ptr::null_mut()) }
}; STARTS];

impl Start {
    /// A slot, or a block of malloc, that holds both.
    fn new(begin: *mut c_void, arg: *mut c_void) -> Option<*const Self> {
        let null = std::ptr::null_mut();
        let free = STARTING.iter().find(|slot| {
            slot.begin.compare_exchange(null, begin, Ordering::Acquire, Ordering::Relaxed).is_ok()
        });
        if let Some(slot) = free {
            slot.arg.store(arg, Ordering::Release);
            return Some(slot);
        }
        // SAFETY: a fresh block of the right size; malloc's alignment suffices for two pointers.
        unsafe {
            let block = libc::malloc(size_of::<Self>()).cast::<Self>();
            if block.is_null() {
                return None;
            }
            block.write(Self { begin: AtomicPtr::new(begin), arg: AtomicPtr::new(arg) });
            Some(block)
        }
    }

    /// Takes both and frees what held them.
    ///
    /// # Safety
    /// `start` came from [`Start::new`] and is taken once.
    unsafe fn take(start: *const Self) -> (*mut c_void, *mut c_void) {
        // SAFETY: live until it is freed below.
        let this = unsafe { &*start };
        let arg = this.arg.load(Ordering::Acquire);
        let begin = this.begin.load(Ordering::Acquire);
        if STARTING.as_ptr_range().contains(&start) {
            this.begin.store(std::ptr::null_mut(), Ordering::Release);
        } else {
            // SAFETY: from malloc, and nobody else knows it.
            unsafe { libc::free(start.cast_mut().cast()) };
        }
        (begin, arg)
    }
}

/// The beginning of a thread. Unwinds as the C library does on pthread_exit.
unsafe extern "C-unwind" fn begin(start: *mut c_void) -> *mut c_void {
    // SAFETY: made by `pthread_create` below for this thread; the first word is its function of this type.
    let (begin, arg) = unsafe { Start::take(start.cast()) };
    tell_my_end(1);
    note_current();
    // SAFETY: the function that the program gave, with its argument.
    unsafe { std::mem::transmute::<*mut c_void, Begin>(begin)(arg) }
}

/// [`begin`] for C11's threads.
unsafe extern "C-unwind" fn thrd_begin(start: *mut c_void) -> c_int {
    // SAFETY: as in `begin`.
    let (begin, arg) = unsafe { Start::take(start.cast()) };
    tell_my_end(1);
    note_current();
    // SAFETY: as in `begin`.
    unsafe { std::mem::transmute::<*mut c_void, ThrdBegin>(begin)(arg) }
}

/// pthread_create(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_create(
    thread: *mut libc::pthread_t,
    attr: *const libc::pthread_attr_t,
    function: Begin,
    arg: *mut c_void,
) -> c_int {
    let real = CREATE.get();
    let own = !start::is_active() || alloc::is_internal();
    let Some(start) = (!own).then(|| Start::new(function as *mut c_void, arg)).flatten() else {
        // SAFETY: the caller's.
        return unsafe { real(thread, attr, function, arg) };
    };
    // Before it begins: the creating thread may end first.
    LIVING.fetch_add(1, Ordering::Relaxed);
    // SAFETY: as the caller asked, with another beginning that goes on to his.
    let failed = unsafe { real(thread, attr, begin, start.cast_mut().cast()) };
    if failed != 0 {
        // SAFETY: no thread came to take it.
        unsafe { Start::take(start) };
        LIVING.fetch_sub(1, Ordering::Relaxed);
    }
    failed
}

/// thrd_create(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn thrd_create(
    thread: *mut libc::pthread_t,
    function: ThrdBegin,
    arg: *mut c_void,
) -> c_int {
    let real = THRD_CREATE.get();
    let Some(start) = start::is_active().then(|| Start::new(function as *mut c_void, arg)).flatten() else {
        // SAFETY: the caller's.
        return unsafe { real(thread, function, arg) };
    };
    LIVING.fetch_add(1, Ordering::Relaxed);
    // SAFETY: as in `pthread_create`.
    let result = unsafe { real(thread, thrd_begin, start.cast_mut().cast()) };
    if result != 0 {
        // SAFETY: no thread came to take it.
        unsafe { Start::take(start) };
        LIVING.fetch_sub(1, Ordering::Relaxed);
    }
    result
}
