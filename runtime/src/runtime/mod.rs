//! A running usvm: builds the parts, starts the threads, and is what programs call.
//!
//! # Overview
//! ```no_run
//! #[global_allocator]
//! static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);
//!
//! # fn main() -> usvm::Result<()> {
//! let runtime = usvm::Runtime::start(usvm::Config::from_env()?)?;
//! let mut numbers = vec![1u64; 1 << 20];
//! let (at, len) = (numbers.as_ptr() as u64, numbers.len() as u64 * 8);
//! runtime
//!     .launch(0, move |gpu| {
//!         gpu.update(at, len, |tile, _| {
//!             for word in tile.chunks_exact_mut(8) {
//!                 let n = u64::from_le_bytes(word.try_into().unwrap());
//!                 word.copy_from_slice(&(n * 2).to_le_bytes());
//!             }
//!         })
//!     })
//!     .wait(None)?;
//! assert!(numbers.iter().all(|n| *n == 2));
//! # Ok(()) }
//! ```
//!
//! # Threads
//! Fault service threads, control threads, two engines for each simulated device, one watchdog. All of them are
//! usvm's own (see [`crate::ground::thread`]); application threads only put requests into queues and wait on fences.
//!
//! # Limits
//! One runtime at a time in a process: a mapping can be registered with one userfaultfd only.

mod bracket;
mod chaos;
mod control;
mod forks;
mod here;
mod memory;
mod protect;
mod publish;
mod watchdog;

use std::cell::RefCell;
use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::device::sim::{self, Gpu, Profile, SimConfig, SimDevice};
use crate::ground::addr::{SZ_64K, Span};
use crate::ground::config::Config;
use crate::ground::error::{Errno, Error, Result};
use crate::ground::inject::{self, Call};
use crate::ground::sync::Fence;
use crate::ground::{alloc, thread, words};
use crate::host::features::{self, Features};
use crate::host::service::Service;
use crate::host::{Host, Options, exempt};
use crate::observe::live;
use crate::observe::observer::Observer;
use crate::observe::stats::StatsSnapshot;
use crate::observe::watch::Change;
use crate::policy;
use crate::space::mover::{self, Mover, Range};
use crate::space::ports::{Device, DeviceInfo, FaultSink, GpuAccess, HostMemory};
use crate::space::span_map::SpanMap;
use crate::space::svm::{PIN_PATIENCE, Svm, Want};
use crate::space::timeslice::Rule;
use crate::space::{Space, SpaceConfig};
use crate::vram::copy::Copier;
use bracket::{check_working_set, hold_for_launch};
use control::Control;
use memory::Asked;

pub use bracket::Bracket;
pub use forks::{install_fork_handlers, leave_the_parents};
pub use memory::{Attributes, Hint, Need};

/// Whether pages up to this chunk size must be populated before a range is made of them (xe's choice).
const CHECK_PAGES_THRESHOLD: u64 = SZ_64K;

/// How many times its configured time a range that ping-pongs stays on the device at most.
const LONGEST_STAY: u32 = 64;

/// How long the start waits for threads that do not begin.
const LONGEST_START: Duration = Duration::from_secs(2);

/// What memory that is to be kept at home waits for.
const HELD_FIRMLY: &str = "waiting for work on a device that cannot fault";

/// How long the end waits for events that nobody takes.
const LONGEST_END: Duration = Duration::from_secs(5);

/// A place memory can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Location {
    /// The host's memory.
    Host,
    /// A device, by index.
    Device(u32),
}

/// What a launch on a device will use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// First address.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// Loads, stores or atomics.
    pub access: GpuAccess,
}

/// How the runtime is built, beyond what [`Config`] says.
#[derive(Debug, Clone, Default)]
pub struct Builder {
    config: Config,
    host: Options,
    devices: Vec<SimConfig>,
}

impl Builder {
    /// With this configuration.
    pub fn new(config: Config) -> Self {
        Self { config, ..Self::default() }
    }

    /// What of the kernel's features to use; for tests of the fallbacks.
    #[must_use]
    pub fn host(mut self, options: Options) -> Self {
        self.host = options;
        self
    }

    /// Adds a device; without any, the configuration names them.
    #[must_use]
    pub fn device(mut self, device: SimConfig) -> Self {
        self.devices.push(device);
        self
    }

    /// Builds and starts it.
    pub fn start(self) -> Result<Runtime> {
        leave_the_parents()?;
        alloc::internal(|| start(self))
    }
}

const RUNNING: u8 = 0;
const CLOSING: u8 = 1;
const CLOSED: u8 = 2;
const WITHDRAWN: u8 = 3;
const IN_A_CHILD: u8 = 4;

pub(crate) struct Inner {
    config: Config,
    host: Arc<Host>,
    svm: Arc<Svm>,
    service: Arc<Service>,
    devices: Vec<Arc<SimDevice>>,
    observer: Arc<Observer>,
    control: Control,
    asked: SpanMap<Asked>,
    live: Option<live::Page>,
    /// Until the statistics are told.
    stderr: Mutex<Option<words::Kept>>,
    disturbed: chaos::Done,
    state: AtomicU8,
}

/// A running usvm. Clones are the same one; it ends with [`Runtime::shutdown`] or with the last clone.
#[derive(Clone)]
pub struct Runtime {
    handle: Arc<Handle>,
}

pub use protect::{mappings, protection_changed};
pub use watchdog::each_second;

/// What the program holds; the threads hold only what is inside.
struct Handle(Arc<Inner>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.shutdown();
    }
}

/// The process's runtime, for the handlers around fork: a leaked reference to its [`Inner`], or null.
static CURRENT: AtomicPtr<Inner> = AtomicPtr::new(ptr::null_mut());

fn start(builder: Builder) -> Result<Runtime> {
    let Builder { config, host: options, devices } = builder;
    if !alloc::reserve() {
        return Err(alloc::external(|| Error::OutOfHostMemory {
            what: "mapping usvm's own memory",
            detail:
                "it needs 16 MiB of address space twice, each no more than a sixteenth of RLIMIT_AS; raise \
                     it with ulimit -v"
                    .into(),
        }));
    }
    if !alloc::installed() {
        return Err(Error::NotSupported(
            "usvm's own memory must not be migratable; add to the program: #[global_allocator] static ALLOC: \
             usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);"
                .into(),
        ));
    }
    thread::on_start(|| {
        exempt::exempt_current_thread();
    });
    thread::on_end(exempt::release_current_thread);
    alloc::spans().into_iter().filter(|s| !s.is_empty()).for_each(exempt::exempt);
    exempt::exempt_own_objects();
    exempt::exempt_arguments();
    exempt::exempt_thread_control();

    if !config.enable {
        return Err(Error::NotRunning("USVM_ENABLE is off"));
    }
    if config.verbose {
        eprintln!("usvm {}\n{config}", env!("CARGO_PKG_VERSION"));
    }
    sim::choose_copies(Copier::named(&config.copy)?, config.copy_threads);
    let devices = if devices.is_empty() { devices_of(&config)? } else { devices };
    let host = Arc::new(Host::open(&options)?);
    rights_suffice(&config, &host)?;
    let devices = devices.into_iter().map(SimDevice::new).collect::<Result<Vec<_>>>()?;
    let observer = Arc::new(Observer::new());
    let space = Space::new(SpaceConfig {
        notifier_size: config.notifier_size,
        chunk_sizes: config.chunk_sizes.clone(),
        ..SpaceConfig::default()
    })?;
    let ports: Vec<Arc<dyn Device>> = devices.iter().map(|d| d.clone() as Arc<dyn Device>).collect();
    let stay = Duration::from_millis(config.timeslice_ms);
    let choices = mover::Options {
        share: config.share,
        stay: Rule { min: stay, cap: stay * LONGEST_STAY, ..Rule::default() },
    };
    let mover =
        Mover::new(host.clone(), ports, policy::by_name(&config.policy)?, observer.clone()).with(choices);
    let svm = Arc::new(Svm::new(space, mover, CHECK_PAGES_THRESHOLD));
    let service = {
        let (filled, host_of_child) = (svm.clone(), host.clone());
        Arc::new(Service::new(
            host.clone(),
            svm.clone(),
            workers(&config),
            Duration::from_micros(config.spin_us),
            move |child, read_on| {
                let mut child = host_of_child.child(child);
                filled.for_child(read_on, |span, pages, shadow| child.give(span, pages, shadow));
            },
        ))
    };
    let barrier = Arc::downgrade(&service);
    svm.set_barrier(Arc::new(move || {
        if let Some(service) = barrier.upgrade() {
            service.barrier();
        }
    }));

    let inner = Arc::new(Inner {
        control: Control::start()?,
        asked: SpanMap::default(),
        live: live::Page::create().inspect_err(|e| tracing::debug!("nobody can look: {e}")).ok(),
        stderr: Mutex::new(config.show_stats.then(words::keep).flatten()),
        disturbed: chaos::Done::default(),
        state: AtomicU8::new(RUNNING),
        config,
        host,
        svm,
        service,
        devices,
        observer,
    });
    install_fork_handlers()?;
    publish(&inner)?;
    let runtime = Runtime { handle: Arc::new(Handle(inner)) };
    runtime.inner().start_threads()?;
    wait_for_threads();
    if let Some(started) = ON_START.get() {
        alloc::external(|| started(&runtime));
    }
    runtime.inner().start_chaos()?;
    Ok(runtime)
}

/// Service threads: two at least, so that one can read what the other waits for.
fn workers(config: &Config) -> usize {
    config.workers.max(2)
}

static ON_START: OnceLock<fn(&Runtime)> = OnceLock::new();

/// Registers what every runtime calls when it runs and has moved nothing yet, on the thread that starts it. The first
/// registration counts.
pub fn on_start(f: fn(&Runtime)) {
    let _ = ON_START.set(f);
}

fn failed(e: std::io::Error) -> Error {
    Error::os("clone", Errno(e.raw_os_error().unwrap_or(libc::EAGAIN)))
}

/// Waits until every thread does its own work. One that begins still reads what the standard library allocated for it in
/// the program's heap: were that page away by then, nobody would bring it back. Bounded, because a caller that is inside
/// the dynamic linker may hold a lock that a thread needs to begin.
fn wait_for_threads() {
    let until = Instant::now() + LONGEST_START;
    while !thread::all_started() && Instant::now() < until {
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Makes it the process's runtime; there can be one.
fn publish(inner: &Arc<Inner>) -> Result<()> {
    let raw = Arc::into_raw(inner.clone()).cast_mut();
    if CURRENT.compare_exchange(ptr::null_mut(), raw, Ordering::AcqRel, Ordering::Acquire).is_err() {
        reclaim(raw);
        return Err(Error::NotSupported("a runtime is running in this process already: use that one".into()));
    }
    here::claim();
    Ok(())
}

/// Checks what only a start would find out: whether the names in `config` mean something.
///
/// # Errors
/// [`Error::Invalid`] that names the option and what is allowed.
pub fn check(config: &Config) -> Result<()> {
    devices_of(config)?;
    policy::by_name(&config.policy)?;
    Copier::named(&config.copy)?;
    Ok(())
}

/// Checks what else only a start would find out: whether this process has the rights that `config` needs. Opens a
/// userfaultfd and closes it.
///
/// # Errors
/// [`Error::NotSupported`] that names what is missing and the way to it; [`Error::Os`] where there is no userfaultfd.
pub fn check_rights(config: &Config) -> Result<()> {
    rights_suffice(config, &Host::open(&Options::default())?)
}

/// Chaos takes memory that the program knows nothing of, and may hand to the kernel at any moment.
fn rights_suffice(config: &Config, host: &Host) -> Result<()> {
    if config.chaos.is_none() || host.report().has.contains(Features::KERNEL_FAULTS) {
        return Ok(());
    }
    let fix = features::fix(Features::KERNEL_FAULTS);
    Err(Error::NotSupported(format!(
        "USVM_CHAOS without kernel-mode faults: system calls of the program would fail with EFAULT; {fix}"
    )))
}

/// The devices that the configuration names; memory and abilities are the same for each.
fn devices_of(config: &Config) -> Result<Vec<SimConfig>> {
    let names: Vec<&str> = config.device.split(',').collect();
    if names.len() > MOST_DEVICES {
        return Err(Error::Invalid {
            argument: "USVM_DEVICE",
            reason: format!("it names {} devices; there may be {MOST_DEVICES}", names.len()),
        });
    }
    let one = |name: &str| {
        let named = match name.split_once(':') {
            None if name == "sim" || name == "auto" => Some(Profile::GENERIC),
            Some(("sim", name)) => Profile::named(name),
            _ => None,
        };
        let profile = named.ok_or_else(|| Error::Invalid {
            argument: "USVM_DEVICE",
            reason: format!(
                "{name:?} is not auto, sim or sim:PROFILE with one of {}; DRM devices are not supported yet",
                Profile::ALL.map(|p| p.name).join(", ")
            ),
        })?;
        let device = SimConfig {
            profile,
            vram_bytes: config.vram.unwrap_or(SimConfig::default().vram_bytes),
            cpu_visible_bytes: config.visible,
            recoverable_faults: config.faults,
            ..SimConfig::default()
        };
        // In the words of whoever configures, not of the device.
        device.validate().map_err(|e| match e {
            Error::Invalid { argument: "vram_bytes", reason } => {
                Error::Invalid { argument: "USVM_VRAM", reason }
            }
            Error::Invalid { argument: "cpu_visible_bytes", reason } => {
                Error::Invalid { argument: "USVM_CONF", reason: format!("visible: {reason}") }
            }
            other => other,
        })?;
        Ok(device)
    };
    names.into_iter().map(one).collect()
}

/// Devices that a configuration may name: each has threads of its own.
const MOST_DEVICES: usize = 16;

thread_local! {
    /// The range that the current engine thread's last fault pinned.
    static FAULT_PINS: RefCell<Vec<Arc<Range>>> = const { RefCell::new(Vec::new()) };
    /// What the launch that runs on the current engine thread holds until its end.
    static LAUNCH_PINS: RefCell<Vec<Arc<Range>>> = const { RefCell::new(Vec::new()) };
}

/// Serves one device's faults. Holds the SVM weakly: the SVM holds the device.
struct Sink {
    svm: Weak<Svm>,
    device: u32,
}

impl FaultSink for Sink {
    fn gpu_fault(&self, addr: u64, _len: u64, access: GpuAccess) -> Result<()> {
        // A thread that waits for memory must hold none: two engines could wait for each other.
        self.fault_done();
        let svm = self.svm.upgrade().ok_or(Error::NotRunning("it was shut down"))?;
        // What its launch holds it does wait with, but not for.
        let want = Want::fault(access);
        let pinned =
            LAUNCH_PINS.with_borrow(|held| svm.gpu_access_holding(self.device, addr, 1, want, held))?;
        FAULT_PINS.set(pinned);
        Ok(())
    }

    fn fault_done(&self) {
        let pinned = FAULT_PINS.take();
        if let Some(svm) = self.svm.upgrade() {
            svm.release(self.device, &pinned);
        }
    }
}

impl Inner {
    pub(crate) fn is_running(&self) -> bool {
        self.state.load(Ordering::Acquire) == RUNNING
    }

    /// Whether its threads are in this process: a child that no handler told has a copy of a record that says it runs.
    fn is_ours(&self) -> bool {
        here::is_here() && self.state.load(Ordering::Acquire) != IN_A_CHILD
    }

    /// Whether there is anybody who would answer a request.
    fn check_ours(&self) -> Result<()> {
        let parents = "it belongs to the parent process; start one here";
        if self.is_ours() { Ok(()) } else { Err(Error::NotRunning(parents)) }
    }

    fn check(&self) -> Result<()> {
        match self.state.load(Ordering::Acquire) {
            RUNNING | IN_A_CHILD => self.check_ours(),
            WITHDRAWN => Err(Error::NotRunning("a service thread died and it withdrew; the log says which")),
            _ => Err(Error::NotRunning("it was shut down")),
        }
    }

    fn start_threads(self: &Arc<Self>) -> Result<()> {
        for (index, device) in self.devices.iter().enumerate() {
            device.set_fault_sink(Arc::new(Sink { svm: Arc::downgrade(&self.svm), device: index as u32 }));
        }
        for index in 0..workers(&self.config) {
            let service = self.service.clone();
            thread::spawn(&format!("fault{index}"), move || service.run(index)).map_err(failed)?;
        }
        if let Some(path) = self.config.trace_path(std::process::id()) {
            let names: Vec<String> = self.devices.iter().map(|d| d.info().name.clone()).collect();
            self.observer.trace.start(&path, self.config.trace_events, &names)?;
        }
        let weak = Arc::downgrade(self);
        thread::spawn("watch", move || watchdog::run(&weak)).map_err(failed)?;
        Ok(())
    }

    fn start_chaos(self: &Arc<Self>) -> Result<()> {
        let Some(chaos) = self.config.chaos else { return Ok(()) };
        let weak = Arc::downgrade(self);
        thread::spawn("chaos", move || chaos::run(&weak, chaos)).map_err(failed)?;
        Ok(())
    }

    /// One round of housekeeping.
    fn keep_house(&self) {
        if let Err(e) = self.svm.collect_garbage() {
            tracing::debug!("garbage stays for now: {e}");
        }
        let retained = self.svm.mover.retained_bytes();
        if retained > 0 {
            let allowed = self.config.retained.unwrap_or(u64::MAX).min(self.host.allowed_retained(retained));
            if self.svm.mover.retained_bytes() > allowed {
                self.svm.shrink(allowed);
            }
        }
        self.svm.try_pressed_anew();
        self.host.empty_discarded();
        self.host.keep_pool();
    }

    /// Everything comes home, nothing new is served.
    fn shutdown(&self) {
        if !self.is_ours() {
            return;
        }
        if self.state.compare_exchange(RUNNING, CLOSING, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return;
        }
        let svm = self.svm.clone();
        let closed = self.control.now(move || svm.close());
        if let Err(e) = closed {
            tracing::error!("not everything came home: {e}");
        }
        self.finish(CLOSED);
    }

    /// `patient`: who has it on a device that cannot fault is waited for.
    fn keep_home(&self, span: Span, patient: bool) -> Result<()> {
        if exempt::is_exempt(span) {
            return Ok(());
        }
        if patient && self.svm.is_held_firmly(span) {
            return Err(Error::Again { what: HELD_FIRMLY, tries: 1 });
        }
        // No access is under way between the two, and a later one sees that the memory is exempt.
        self.svm.freeze();
        exempt::exempt(span);
        self.svm.recut_at_once(span);
        self.svm.thaw();
        let until = Instant::now() + PIN_PATIENCE;
        loop {
            match self.svm.collect_garbage() {
                Err(Error::Again { .. } | Error::OutOfHostMemory { .. }) if Instant::now() < until => {
                    self.svm.barrier();
                    std::thread::sleep(Duration::from_micros(50));
                }
                other => return other,
            }
        }
    }

    /// Stops the threads and lets go of all memory.
    fn finish(&self, state: u8) {
        self.host.unregister_all();
        self.read_to_the_end(state == WITHDRAWN);
        self.service.stop();
        self.host.close();
        self.control.stop();
        if let Err(e) = self.observer.trace.stop() {
            tracing::error!("the trace is incomplete: {e}");
        }
        self.report();
        drop(self.stderr.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.live.iter().for_each(live::Page::close);
        self.state.store(state, Ordering::Release);
        let raw = CURRENT.swap(ptr::null_mut(), Ordering::SeqCst);
        protect::wait_for_lookers();
        reclaim(raw);
    }

    /// Reads on until no event is waited for any more: a fork that began before the kernel let go of everything waits for
    /// its own, and its child has the userfaultfd open, so that no close would end that. By hand where no service thread
    /// can be relied on.
    fn read_to_the_end(&self, by_hand: bool) {
        let until = Instant::now() + LONGEST_END;
        while self.host.mappings_change() && Instant::now() < until {
            if by_hand {
                self.service.rescue();
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// The statistics now.
    fn snapshot(&self) -> StatsSnapshot {
        let mut snapshot = self.observer.stats.snapshot();
        (snapshot.flips, snapshot.flip_fallbacks) = self.host.flip_counts();
        snapshot
    }

    fn report(&self) {
        let snapshot = self.snapshot();
        if self.config.show_stats {
            words::write(snapshot.to_string().as_bytes());
        }
        if let Some(path) = self.config.stats_path(std::process::id())
            && let Err(e) = inject::check(Call::Open)
                .map_err(|e| std::io::Error::from_raw_os_error(e.0))
                .and_then(|()| std::fs::write(&path, snapshot.to_json()))
        {
            tracing::error!("cannot write the statistics to {}: {e}", path.display());
        }
    }

    /// A service thread died: brings everything home by this thread's own hands, reports as lost what stays behind.
    fn withdraw(&self) {
        if self.state.compare_exchange(RUNNING, WITHDRAWN, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return;
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.svm.rescue() && Instant::now() < deadline {
            self.service.rescue();
        }
        self.svm.poison_the_rest();
        self.service.rescue();
        self.finish(WITHDRAWN);
    }
}

/// The engine thread's launch holds memory while this lives.
struct Holding<'a>(&'a Svm, u32);

impl<'a> Holding<'a> {
    fn new(svm: &'a Svm, device: u32, held: Vec<Arc<Range>>) -> Self {
        LAUNCH_PINS.set(held);
        Self(svm, device)
    }
}

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        self.0.release(self.1, &LAUNCH_PINS.take());
    }
}

/// Gives back a reference that [`publish`] leaked.
#[allow(unsafe_code)]
fn reclaim(raw: *mut Inner) {
    if !raw.is_null() {
        // SAFETY: `raw` came from `Arc::into_raw` in `publish` and was taken out of `CURRENT`, so it is given back once.
        drop(unsafe { Arc::from_raw(raw) });
    }
}

/// The process's runtime, if there is one.
#[allow(unsafe_code)]
fn current<'a>() -> Option<&'a Inner> {
    let raw = CURRENT.load(Ordering::SeqCst);
    // SAFETY: the leaked reference keeps it alive while `CURRENT` has it. A shutdown in another thread during a fork
    // is the program's own race; `finish` waits for lookers (`protect`) before it gives the reference back.
    (!raw.is_null()).then(|| unsafe { &*raw })
}

/// Whether there is one.
fn is_anywhere() -> bool {
    !CURRENT.load(Ordering::Relaxed).is_null()
}

/// Runs `f` on the process's runtime, if there is one.
fn with_current(f: impl FnOnce(&Inner)) {
    if let Some(inner) = current() {
        f(inner);
    }
}

impl Runtime {
    /// Starts usvm with `config` and the kernel features there are.
    pub fn start(config: Config) -> Result<Self> {
        Builder::new(config).start()
    }

    fn inner(&self) -> &Arc<Inner> {
        &self.handle.0
    }

    /// The devices, by index.
    pub fn devices(&self) -> Vec<DeviceInfo> {
        self.inner().devices.iter().map(|d| d.info().clone()).collect()
    }

    /// A device, for what only it can do.
    pub fn device(&self, device: u32) -> Result<&Arc<SimDevice>> {
        self.inner().devices.get(device as usize).ok_or_else(|| Error::Invalid {
            argument: "device",
            reason: format!("there is no device {device}; there are {}", self.inner().devices.len()),
        })
    }

    /// The configuration in force.
    pub fn config(&self) -> &Config {
        &self.inner().config
    }

    /// What the kernel offers and what of it is used.
    pub fn host(&self) -> &Host {
        &self.inner().host
    }

    /// Queues `kernel` on the device's compute engine. It reaches memory only through its `Gpu`, by the process's own
    /// addresses; what it captured by value travels with it, and what it allocates comes from usvm's own memory: it must
    /// not touch memory of the program that it holds on the device itself. The fence carries its error.
    ///
    /// On a device without recoverable faults nothing is mapped for it: use [`Runtime::launch_with`].
    pub fn launch(
        &self,
        device: u32,
        kernel: impl FnOnce(&mut Gpu<'_>) -> Result<()> + Send + 'static,
    ) -> Fence {
        self.launch_with(device, &[], kernel)
    }

    /// As [`Runtime::launch`], with what it uses announced: all of `accesses` is on the device or mapped before it begins
    /// and stays so until it ends.
    pub fn launch_with(
        &self,
        device: u32,
        accesses: &[Access],
        kernel: impl FnOnce(&mut Gpu<'_>) -> Result<()> + Send + 'static,
    ) -> Fence {
        alloc::internal(|| {
            let inner = self.inner();
            let ready = inner.check().and_then(|()| self.device(device)).and_then(|dev| {
                check_working_set(dev.info(), accesses)?;
                Ok(dev)
            });
            let dev = match ready {
                Ok(dev) => dev,
                Err(e) => return Fence::signaled(Err(e)),
            };
            let svm = inner.svm.clone();
            let accesses = accesses.to_vec();
            let observer = inner.observer.clone();
            dev.launch(move |gpu| {
                let started = Instant::now();
                // What munmap and its like took away before this launch must be gone from the device's tables.
                svm.barrier();
                let held = hold_for_launch(&svm, device, &accesses)?;
                // Also when the kernel panics.
                let held = Holding::new(&svm, device, held);
                let result = kernel(gpu);
                drop(held);
                observer.launched(device, started);
                result
            })
        })
    }

    /// Keeps the pages of `[addr, addr + len)` on the host from now on: no device gets more than remote access. For memory
    /// that the kernel writes when no fault can be served any more, as a thread's control block.
    pub fn keep_home(&self, addr: u64, len: u64) -> Result<()> {
        let (inner, span) = (self.inner().clone(), Span::sized(addr, len).page_aligned());
        inner.check()?;
        let until = Instant::now() + PIN_PATIENCE;
        loop {
            let owner = inner.clone();
            let patient = Instant::now() < until;
            match inner.control.now(move || owner.keep_home(span, patient)) {
                // Waited for here: others have urgent requests, too.
                Err(Error::Again { what: HELD_FIRMLY, .. }) => std::thread::sleep(Duration::from_millis(1)),
                other => return other,
            }
        }
    }

    /// Prints and writes the statistics now, as the end of the runtime does, if the configuration asks for them.
    pub fn report(&self) {
        let inner = self.inner().clone();
        if inner.check().is_ok() {
            let owner = inner.clone();
            let _ = inner.control.call(move || {
                owner.report();
                Ok(())
            });
        }
    }

    /// Takes the policy called `name` from now on.
    pub fn set_policy(&self, name: &str) -> Result<()> {
        let name = alloc::internal(|| name.to_owned());
        self.call(move |svm| svm.mover.set_policy(policy::by_name(&name)?))
    }

    fn call<T: Send + Sync + 'static>(
        &self,
        f: impl FnOnce(&Svm) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = self.inner();
        inner.check()?;
        let svm = inner.svm.clone();
        inner.control.call(move || f(&svm))
    }

    /// The statistics now.
    pub fn stats(&self) -> StatsSnapshot {
        // What it needs on the way must not come from memory that a device may have.
        alloc::internal(|| self.inner().snapshot())
    }

    /// What chaos did until now: the kinds of disturbances and how often each was done.
    pub fn disturbances(&self) -> Vec<(&'static str, u64)> {
        alloc::internal(|| self.inner().disturbed.counts())
    }

    /// Sets the counters to zero; the gauges stay.
    pub fn reset_stats(&self) {
        self.inner().observer.stats.reset();
        self.inner().host.reset_flip_counts();
    }

    /// The parts, for benchmarks and tests that look inside.
    pub fn svm(&self) -> &Arc<Svm> {
        &self.inner().svm
    }

    /// Runs `f` on a service thread, for benchmarks and tests that look inside.
    pub fn on_service_thread<T: Send + Sync + 'static>(
        &self,
        f: impl FnOnce(&Svm) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.call(f)
    }

    /// A fence that is signalled when `f` has run on a control thread.
    pub fn defer(&self, f: impl FnOnce(&Svm) -> Result<()> + Send + 'static) -> Fence {
        if let Err(e) = self.inner().check_ours() {
            return Fence::signaled(Err(e));
        }
        let svm = self.inner().svm.clone();
        self.inner().control.submit(move || f(&svm))
    }

    /// Returns when every change of the mappings that the kernel had reported before the call was handled.
    pub fn barrier(&self) -> Result<()> {
        self.call(|svm| {
            svm.barrier();
            Ok(())
        })
    }

    /// Has `watcher` called for every change of memory; `false` if there is a watcher already. See
    /// [`crate::observe::watch`] for what it may do: it runs on threads of usvm.
    pub fn watch(&self, watcher: impl Fn(Change, Span) + Send + Sync + 'static) -> bool {
        alloc::internal(|| self.inner().observer.watch.set(watcher))
    }

    /// Brings everything home and ends. Later calls get [`Error::NotRunning`].
    pub fn shutdown(&self) {
        self.inner().shutdown();
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime").field("devices", &self.devices()).finish_non_exhaustive()
    }
}
