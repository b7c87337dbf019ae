//! The beginning and the end.
//!
//! # Overview
//! The library's constructor reads the environment and decides what there is to do:
//!
//! | state | when | what |
//! |---|---|---|
//! | inert | set-uid, `USVM_ENABLE=0`, an unreadable configuration | every interposed call is passed on |
//! | ready | otherwise | threads are noted; a runtime starts when somebody acquires it |
//! | chaos | `USVM_CHAOS` | the runtime starts at once |
//!
//! A forked child begins without a runtime. Under chaos it gets its own when it has lived for [`LATER`]: most children exec
//! at once, and must not be disturbed by threads until then. An exec begins anew anyway.
//!
//! The library's destructor, which runs after those of the program, shuts the runtime down: everything comes home while
//! the other threads go on, then the statistics and the trace are written.
//!
//! # Locking
//! None of its own. The end holds the lock of [`process`] while everything comes home: a thread that forks or begins then
//! waits, and the end waits for those that do so already. `_exit` waits for nobody.
//!
//! # Limits
//! A library opened by dlopen in a process that runs already starts chaos in the background only.
//!
//! # Safety
//! Constructor and destructor are called once by the dynamic linker. The probe's child only makes system calls.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use usvm::ground::atfork;
use usvm::{Config, Runtime};
use usvm_capi::process;

use crate::{exits, fds, mappings, threads, watched};

/// How long a forked child lives before it gets a runtime for chaos.
const LATER: Duration = Duration::from_millis(5);

const UNDECIDED: u8 = 0;
const INERT: u8 = 1;
const READY: u8 = 2;

static STATE: AtomicU8 = AtomicU8::new(UNDECIDED);
static CHAOS: AtomicBool = AtomicBool::new(false);
static ENDING: AtomicBool = AtomicBool::new(false);
/// The thread that ran the constructor, which has the process's first stack.
static MAIN: AtomicU64 = AtomicU64::new(0);
/// The process that the running runtime belongs to.
static OWNER: AtomicU32 = AtomicU32::new(0);

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: unsafe extern "C" fn(c_int, *const *const c_char, *const *const c_char) = construct;

#[used]
#[unsafe(link_section = ".fini_array")]
static DESTRUCTOR: extern "C" fn() = destruct;

/// Whether threads are noted.
#[inline]
pub(crate) fn is_active() -> bool {
    STATE.load(Ordering::Relaxed) == READY
}

/// Whether the running runtime is this process's: a child of vfork sees its parent's.
pub(crate) fn is_owner() -> bool {
    let owner = OWNER.load(Ordering::Relaxed);
    // Without a runtime not even this is asked: a program's seccomp filter may allow only what the program needs.
    owner != 0 && owner == std::process::id()
}

/// Whether `thread` has the process's first stack.
pub(crate) fn is_main_thread(thread: libc::pthread_t) -> bool {
    MAIN.load(Ordering::Relaxed) == thread
}

unsafe extern "C" fn construct(_: c_int, _: *const *const c_char, environment: *const *const c_char) {
    // Also where there is nothing to do: what another library interposes is passed on to.
    watched::look_up();
    mappings::look_up();
    // SAFETY: asks the auxiliary vector.
    let secure = unsafe { libc::getauxval(libc::AT_SECURE) } != 0;
    // SAFETY: the environment that the dynamic linker hands to constructors.
    let words = if secure { Words::default() } else { unsafe { Words::of(environment) } };
    if secure || words.off {
        STATE.store(INERT, Ordering::Relaxed);
        return;
    }
    fds::look_up();
    threads::look_up();
    exits::look_up();
    threads::count_first();
    threads::note_current();
    // SAFETY: both ask who is running.
    if unsafe { libc::gettid() == libc::getpid() } {
        // SAFETY: as above.
        MAIN.store(unsafe { libc::pthread_self() }, Ordering::Relaxed);
    }
    // Here, not only where a runtime starts: threads are counted from now on, and a child has one.
    // SAFETY: a function that is never unloaded (the library is linked with -z nodelete).
    unsafe { atfork::register(None, None, Some(in_child)) };
    usvm::runtime::on_start(started);
    usvm::runtime::each_second(threads::look_for_the_end);
    process::on_handlers(watch_forks);
    process::install_handlers();
    STATE.store(READY, Ordering::Relaxed);
    if words.heap && !heap_is_there() {
        say(
            "USVM_HEAP=1 needs libusvm_heap.so in LD_PRELOAD, before libusvm_preload.so; `usvm run` sets both. Going on with the program's own malloc.",
        );
    }
    if words.unknown {
        usvm::ground::config::tell_unknown();
    }
    if !words.chaos {
        return;
    }
    match Config::from_env() {
        Ok(config) if config.enable && config.chaos.is_some() => {
            CHAOS.store(true, Ordering::Relaxed);
            if words.preloaded { start_chaos() } else { start_later(Duration::ZERO) }
        }
        Ok(_) => {}
        Err(e) => {
            say(&format!("{e}; doing nothing"));
            STATE.store(INERT, Ordering::Relaxed);
        }
    }
}

/// What the environment says of interest here, without a look at the rest.
#[derive(Default)]
struct Words {
    off: bool,
    chaos: bool,
    heap: bool,
    preloaded: bool,
    unknown: bool,
}

impl Words {
    /// # Safety
    /// A list of strings that ends with a null pointer.
    unsafe fn of(mut environment: *const *const c_char) -> Self {
        let mut words = Self::default();
        // SAFETY: see above; every pointer before the null is a string.
        while let Some(entry) = unsafe { environment.as_ref() }.filter(|e| !e.is_null()) {
            // SAFETY: as above.
            let entry = unsafe { CStr::from_ptr(*entry) }.to_bytes();
            if let Some(value) = entry.strip_prefix(b"LD_PRELOAD=") {
                words.preloaded = value.windows(12).any(|part| part == b"usvm_preload");
            } else if let Some(option) = entry.strip_prefix(b"USVM_") {
                words.read(option);
                let name = entry.split(|byte| *byte == b'=').next().unwrap_or(entry);
                words.unknown |= !usvm::ground::config::is_variable(name);
            }
            // SAFETY: the list goes on until the null.
            environment = unsafe { environment.add(1) };
        }
        words
    }

    fn read(&mut self, option: &[u8]) {
        let value = |name: &[u8]| option.strip_prefix(name).map(<[u8]>::to_ascii_lowercase);
        if let Some(value) = value(b"ENABLE=") {
            self.off = [&b"0"[..], b"off", b"false", b"no"].contains(&&value[..]);
        } else if let Some(value) = value(b"HEAP=") {
            self.heap = [&b"1"[..], b"on", b"true", b"yes"].contains(&&value[..]);
        } else if option.starts_with(b"CHAOS=") || option.starts_with(b"CONF=") {
            self.chaos = true;
        }
    }
}

/// Whether the library with usvm's malloc is loaded.
fn heap_is_there() -> bool {
    // SAFETY: a name that ends with a zero.
    !unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"usvm_heap_owns".as_ptr()) }.is_null()
}

fn say(words: &str) {
    let _ = writeln!(std::io::stderr(), "usvm: {words}");
}

/// A runtime runs in this process and has moved nothing yet.
fn started(runtime: &Runtime) {
    OWNER.store(std::process::id(), Ordering::Relaxed);
    exits::tell_at_quick_exit();
    threads::runtime_started(runtime);
}

/// After the runtime's own handlers: in the child those run first.
fn watch_forks() {
    static WATCHES_FORK: AtomicBool = AtomicBool::new(false);
    if !WATCHES_FORK.swap(true, Ordering::Relaxed) {
        // SAFETY: as in `construct`.
        unsafe { atfork::register(None, None, Some(chaos_in_child)) };
    }
}

fn start_chaos() {
    if ENDING.load(Ordering::Relaxed) || threads::all_ended() {
        return;
    }
    let failed = match is_forbidden() {
        true => Some("the seccomp filter of this process kills it for userfaultfd".to_owned()),
        false => process::acquire(None).err().map(|e| e.to_string()),
    };
    match failed {
        Some(why) => say(&format!("no chaos in process {}: {why}", std::process::id())),
        // In a child it starts beside the program, which may have come to its end.
        None => threads::started_for_nobody(),
    }
}

/// Starts chaos after `delay`, on a thread that the C library makes. The program gets no signal of it.
fn start_later(delay: Duration) {
    extern "C" fn later(micros: *mut c_void) -> *mut c_void {
        std::thread::sleep(Duration::from_micros(micros.addr() as u64));
        start_chaos();
        std::ptr::null_mut()
    }
    detached(later, std::ptr::without_provenance_mut(delay.as_micros() as usize));
}

/// Starts a thread of ours that nobody joins, if one can be had; whether it could. It takes no signals.
pub(crate) fn detached(body: extern "C" fn(*mut c_void) -> *mut c_void, with: *mut c_void) -> bool {
    let mut begun = false;
    // SAFETY: attributes are initialised before and destroyed after use; the masks are whole; the thread is detached.
    unsafe {
        let (mut all, mut before, mut attr) = std::mem::zeroed::<(libc::sigset_t, libc::sigset_t, _)>();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        if libc::pthread_attr_init(&mut attr) == 0 {
            let mut thread = std::mem::zeroed();
            libc::pthread_attr_setdetachstate(&mut attr, libc::PTHREAD_CREATE_DETACHED);
            begun =
                usvm::ground::alloc::internal(|| libc::pthread_create(&mut thread, &attr, body, with)) == 0;
            libc::pthread_attr_destroy(&mut attr);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
    }
    begun
}

/// In a forked child, before the runtime's own handlers.
extern "C" fn in_child() {
    OWNER.store(0, Ordering::Relaxed);
    threads::forget_in_child();
}

/// In a forked child, after them.
extern "C" fn chaos_in_child() {
    if CHAOS.load(Ordering::Relaxed) && !ENDING.load(Ordering::Relaxed) {
        start_later(LATER);
    }
}

/// Tells the statistics, if they are asked for.
pub(crate) fn report() {
    // In this order: as in `destruct`.
    if let Some(runtime) = is_owner().then(process::peek).flatten() {
        let config = runtime.config();
        if config.show_stats || config.stats_file.is_some() {
            runtime.report();
        }
    }
}

extern "C" fn destruct() {
    ENDING.store(true, Ordering::Relaxed);
    // First of all: a child of vfork must not even look at what is its parent's.
    if is_owner() {
        process::end();
    }
}

/// Ends the process where no thread of the program is left that would run what it registered for its end.
pub(crate) fn leave(status: c_int) -> ! {
    destruct();
    loop {
        // SAFETY: ends the process.
        unsafe { libc::syscall(libc::SYS_exit_group, status) };
    }
}

/// Whether a seccomp filter ends the process for what a runtime needs. A filter that answers with an error does not.
fn is_forbidden() -> bool {
    let filtered = std::fs::read_to_string("/proc/thread-self/status")
        .is_ok_and(|status| status.lines().any(|line| line == "Seccomp:\t2"));
    filtered && !child_survives()
}

/// Tries the system calls in a child of this process. It sends no signal when it ends.
fn child_survives() -> bool {
    // SAFETY: a fork without any handler; the child makes system calls only and ends. Nobody else waits for it, because
    // it has no exit signal (__WCLONE).
    unsafe {
        let child = libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) as libc::pid_t;
        if child == 0 {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
            if fd >= 0 {
                libc::syscall(libc::SYS_close, fd);
            }
            libc::syscall(libc::SYS_exit_group, 0);
        }
        let mut status = 0;
        let waited = child > 0 && libc::waitpid(child, &mut status, libc::__WCLONE) == child;
        waited && libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
    }
}
