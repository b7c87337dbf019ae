//! What the environment asks of the OpenCL layer, and what is done once.
//!
//! # Overview
//! Nothing happens when the library is loaded. The first loader that is met makes the layer read its configuration,
//! stay in memory for good, and, if statistics are wanted, tell them at exit.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Once, OnceLock};

use usvm::ground::config::Origin;
use usvm::ground::thread;
use usvm::{Config, Runtime};

use super::loaders;
use super::stats::Report;

/// What the layer does.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Whether it does anything.
    pub enable: bool,
    /// Whether memory migrates also for devices that share the host's.
    pub migrate: bool,
    /// Whether memory is to stay where it is and be held there: what the policy `remote` means for a launch.
    pub hold: bool,
    /// Whether to tell the counts at exit.
    pub show: bool,
}

const OFF: Settings = Settings { enable: false, migrate: false, hold: false, show: false };

/// What the environment asks for. A configuration that cannot be read switches the layer off, and so does a program that
/// has more rights than its caller.
pub fn get() -> Settings {
    static SETTINGS: OnceLock<Settings> = OnceLock::new();
    *SETTINGS.get_or_init(|| match Config::from_env() {
        // SAFETY: asks the auxiliary vector.
        _ if unsafe { libc::getauxval(libc::AT_SECURE) } != 0 => OFF,
        Ok(config) => Settings {
            enable: config.enable,
            migrate: config.chaos.is_some() || has_policy(&config),
            hold: has_policy(&config) && config.policy == "remote",
            show: config.show_stats,
        },
        Err(e) => {
            eprintln!("usvm: the OpenCL layer is off: {e}");
            OFF
        }
    })
}

fn has_policy(config: &Config) -> bool {
    config.effective().any(|(row, _, origin)| row.key == "policy" && origin != Origin::Default)
}

/// The process's runtime, started at the first need; only if migrations are asked for.
pub fn runtime() -> Option<&'static Runtime> {
    static RUNTIME: OnceLock<Option<Runtime>> = OnceLock::new();
    if !get().migrate {
        return None;
    }
    RUNTIME
        .get_or_init(|| match usvm_capi::process::acquire(None) {
            Ok(runtime) => {
                at_exit(release);
                // The start waits for its threads, but not for ever: with one that has not begun nothing may move.
                thread::all_started().then_some(runtime)
            }
            Err(e) => {
                eprintln!("usvm: OpenCL launches are only observed: {e}");
                None
            }
        })
        .as_ref()
}

/// The process whose counts these are.
static OWNER: AtomicU32 = AtomicU32::new(0);

/// Called when a loader is met.
pub fn at_first_use() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        OWNER.store(std::process::id(), Ordering::Release);
        stay();
        if get().show {
            at_exit(show_at_exit);
        }
    });
}

/// A loader may unload its layers at exit, while driver threads still run code of this library.
fn stay() {
    if let Some((_, file)) = loaders::object_at(stay as *const () as usize) {
        // SAFETY: the file is loaded already; this only forbids that it goes.
        unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD | libc::RTLD_NODELETE) };
    }
}

fn at_exit(f: extern "C" fn()) {
    // SAFETY: a function of this library, which stays.
    unsafe { libc::atexit(f) };
}

/// Tells what was counted, if that is wanted, there is anything, and it was not told yet. A forked child has its parent's
/// counts, which are not its own to tell.
pub fn report(out: &mut impl Write) -> io::Result<()> {
    static TOLD: AtomicBool = AtomicBool::new(false);
    let text = Report.to_string();
    let foreign = OWNER.load(Ordering::Acquire) != std::process::id();
    if foreign || !get().show || text.is_empty() || TOLD.swap(true, Ordering::AcqRel) {
        return Ok(());
    }
    out.write_all(text.as_bytes())
}

extern "C" fn show_at_exit() {
    // The program may have closed its standard error.
    let _ = report(&mut io::stderr());
}

extern "C" fn release() {
    let _ = usvm_capi::process::release();
}
