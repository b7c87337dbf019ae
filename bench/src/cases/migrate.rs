//! What migrations and faults cost, against the bare copy or fault.
//!
//! Each case has a running usvm with a simulated device and warm memory: every slot went to the device and back before.
//!
//! # Safety
//! Touches memory that the case owns, by volatile accesses, so that the compiler cannot leave them out.
#![allow(unsafe_code)]

use crate::baselines::{Memcpy2m, Uffd4k, time};
use crate::case::{Case, Result, Setup};
use crate::memory::{COUNT, Pages, SLOT, Slots};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::time::Instant;
use usvm::device::sim::{Profile, SimConfig};
use usvm::ground::addr::SZ_4K;
use usvm::space::svm::Want;
use usvm::{Builder, Config, GpuAccess, Runtime};

/// A usvm to measure: everything warm, whole ranges come back.
pub fn runtime(policy: &str, vram: u64) -> Result<Runtime> {
    runtime_with(policy, vram, "2M,64K,4K")
}

/// As [`runtime`], with these range sizes.
fn runtime_with(policy: &str, vram: u64, chunks: &str) -> Result<Runtime> {
    let mut config = Config::from_env()?;
    config.set("policy", policy)?;
    config.set("chunk_sizes", chunks)?;
    let device = SimConfig { prefault: true, ..SimConfig::of(Profile::GENERIC, vram) };
    Ok(Builder::new(config).device(device).start()?)
}

/// Has the device use the range at `addr`; the time that takes on the thread that serves it, in microseconds.
pub fn to_device(runtime: &Runtime, addr: u64, access: GpuAccess) -> Result<f64> {
    Ok(runtime.on_service_thread(move |svm| {
        let begin = Instant::now();
        let held = svm.gpu_access(0, addr, 1, Want::fault(access))?;
        let took = begin.elapsed();
        svm.release(0, &held);
        Ok(took.as_nanos() as f64 / 1000.0)
    })?)
}

/// Reads one byte; microseconds.
pub fn touch(at: *const u8) -> f64 {
    // SAFETY: the callers give addresses of memory they own.
    time(|| unsafe {
        at.read_volatile();
    })
}

/// What one of the 2 MiB cases does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    ToDevice,
    Return,
    CleanReturn,
    Delta,
}

struct Migrate2m {
    name: &'static str,
    about: &'static str,
    what: What,
    made: Option<Made>,
}

struct Made {
    slots: Slots,
    baseline: Memcpy2m,
    runtime: Runtime,
}

impl Case for Migrate2m {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn baseline(&self) -> Option<&'static str> {
        Some(Memcpy2m::NAME)
    }

    fn setup(&mut self) -> Result<Setup> {
        let policy = if self.what == What::Delta { "adaptive" } else { "gpusvm" };
        let runtime = runtime(policy, (2 * COUNT * SLOT) as u64)?;
        let mut slots = Slots::new(Pages::Huge)?;
        for _ in 0..4 * COUNT {
            let slot = slots.next();
            to_device(&runtime, slot as u64, GpuAccess::Write)?;
            touch(slot);
        }
        self.made = Some(Made { slots, baseline: Memcpy2m::new()?, runtime });
        Ok(Setup::Ready)
    }

    fn sample(&mut self) -> Result<f64> {
        let Made { slots, runtime, .. } = self.made.as_mut().ok_or("sampled before setup")?;
        let slot = slots.next();
        match self.what {
            What::ToDevice => {
                let took = to_device(runtime, slot as u64, GpuAccess::Write)?;
                touch(slot);
                Ok(took)
            }
            What::Return => {
                to_device(runtime, slot as u64, GpuAccess::Write)?;
                Ok(touch(slot))
            }
            What::CleanReturn => {
                to_device(runtime, slot as u64, GpuAccess::Read)?;
                Ok(touch(slot))
            }
            What::Delta => {
                for page in (0..512).step_by(64) {
                    // SAFETY: inside the slot.
                    unsafe { slot.add(page * SZ_4K as usize).write_volatile(page as u8) };
                }
                to_device(runtime, slot as u64, GpuAccess::Write)
            }
        }
    }

    fn baseline_sample(&mut self) -> Result<f64> {
        Ok(self.made.as_mut().ok_or("sampled before setup")?.baseline.sample())
    }
}

/// A 4 KiB range that comes back.
#[derive(Default)]
struct Fault4k {
    made: Option<(Runtime, Islands, Uffd4k)>,
}

/// Pages that can only be ranges of 4 KiB: each lies alone in its mapping.
struct Islands {
    slots: Slots,
    next: usize,
}

impl Islands {
    const STEP: usize = 2 * SZ_4K as usize;

    fn new() -> Result<Self> {
        let mut slots = Slots::new(Pages::Small)?;
        let first = slots.next();
        for page in (0..SLOT).step_by(Self::STEP) {
            // SAFETY: a page of the slot, which nobody uses any more.
            let made = unsafe {
                libc::mprotect(first.add(page + SZ_4K as usize).cast(), SZ_4K as usize, libc::PROT_NONE)
            };
            if made != 0 {
                return Err(std::io::Error::last_os_error().into());
            }
        }
        Ok(Self { slots, next: 0 })
    }

    fn next(&mut self) -> *mut u8 {
        self.next = (self.next + Self::STEP) % SLOT;
        self.slots.current().wrapping_add(self.next)
    }
}

impl Case for Fault4k {
    fn name(&self) -> &'static str {
        "fault_4k"
    }

    fn about(&self) -> &'static str {
        "CPU touch of a 4 KiB range on the device, until it is back"
    }

    fn baseline(&self) -> Option<&'static str> {
        Some(Uffd4k::NAME)
    }

    fn setup(&mut self) -> Result<Setup> {
        let runtime = runtime("gpusvm", 16 << 20)?;
        let islands = Islands::new()?;
        self.made = Some((runtime, islands, Uffd4k::new()?));
        Ok(Setup::Ready)
    }

    fn sample(&mut self) -> Result<f64> {
        let (runtime, islands, _) = self.made.as_mut().ok_or("sampled before setup")?;
        let page = islands.next();
        to_device(runtime, page as u64, GpuAccess::Write)?;
        Ok(touch(page))
    }

    fn baseline_sample(&mut self) -> Result<f64> {
        let (_, _, baseline) = self.made.as_mut().ok_or("sampled before setup")?;
        baseline.sample()
    }
}

/// Threads touch ranges on the device at the same time.
struct Storm {
    kind: &'static StormKind,
    made: Option<(Runtime, Slots)>,
}

/// One storm.
struct StormKind {
    name: &'static str,
    about: &'static str,
    baseline: Option<&'static str>,
    threads: usize,
    /// Bytes of a range.
    size: usize,
    chunks: &'static str,
}

/// Ranges in a storm.
const STORM: usize = 512;
const SZ_64K: usize = 64 << 10;

static STORMS: [StormKind; 4] = [
    StormKind {
        name: "fault_storm_one_thread",
        about: "time per fault when a thread touches a page of each of 512 ranges of 64 KiB on the device",
        baseline: None,
        threads: 1,
        size: SZ_64K,
        chunks: "64K,4K",
    },
    StormKind {
        name: "fault_storm",
        about: "the same when 2 threads share the ranges",
        baseline: Some("fault_storm_one_thread"),
        threads: 2,
        size: SZ_64K,
        chunks: "64K,4K",
    },
    StormKind {
        name: "fault_storm_2m_one_thread",
        about: "the same with 512 ranges of 2 MiB, which come from main memory",
        baseline: None,
        threads: 1,
        size: SLOT,
        chunks: "2M,64K,4K",
    },
    StormKind {
        name: "fault_storm_2m",
        about: "the same when 2 threads share the ranges of 2 MiB",
        baseline: Some("fault_storm_2m_one_thread"),
        threads: 2,
        size: SLOT,
        chunks: "2M,64K,4K",
    },
];

/// Keeps the calling thread on one processor, so that threads which share work share nothing else. Where that is not
/// allowed it runs where it may.
fn on_processor(index: usize) {
    let Ok(allowed) = sched_getaffinity(None) else { return };
    let mut mine = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
    if let Some(cpu) = mine.nth(index) {
        let mut only = CpuSet::new();
        only.set(cpu);
        let _ = sched_setaffinity(None, &only);
    }
}

impl Storm {
    fn run(&mut self, threads: usize) -> Result<f64> {
        let (runtime, slots) = self.made.as_mut().ok_or("sampled before setup")?;
        let (base, size) = (slots.base() as usize, self.kind.size);
        for range in 0..STORM {
            to_device(runtime, (base + range * size) as u64, GpuAccess::Write)?;
        }
        let took = time(|| {
            std::thread::scope(|scope| {
                for thread in 0..threads {
                    scope.spawn(move || {
                        on_processor(thread);
                        for range in (thread..STORM).step_by(threads) {
                            touch((base + range * size) as *const u8);
                        }
                    });
                }
            });
        });
        Ok(took / STORM as f64)
    }
}

impl Case for Storm {
    fn name(&self) -> &'static str {
        self.kind.name
    }

    fn about(&self) -> &'static str {
        self.kind.about
    }

    fn baseline(&self) -> Option<&'static str> {
        self.kind.baseline
    }

    fn at_most(&self) -> u32 {
        24
    }

    fn setup(&mut self) -> Result<Setup> {
        let bytes = STORM * self.kind.size;
        let runtime = runtime_with("gpusvm", bytes as u64 + (64 << 20), self.kind.chunks)?;
        let slots = Slots::many(Pages::Huge, bytes / SLOT)?;
        self.made = Some((runtime, slots));
        self.run(1)?;
        Ok(Setup::Ready)
    }

    fn sample(&mut self) -> Result<f64> {
        self.run(self.kind.threads)
    }

    fn baseline_sample(&mut self) -> Result<f64> {
        self.run(1)
    }
}

/// The cases.
pub fn all() -> Vec<Box<dyn Case>> {
    let case = |name, about, what| -> Box<dyn Case> { Box::new(Migrate2m { name, about, what, made: None }) };
    let mut cases = vec![
        case("to_device_2m", "a device access to 2 MiB on the host, until it is mapped", What::ToDevice),
        case("cpu_fault_return_2m", "a CPU touch of 2 MiB the device wrote, until it is back", What::Return),
        case("clean_return_2m", "a CPU touch of 2 MiB the device only read", What::CleanReturn),
        case("delta_to_device_2m_8dirty", "a device access after the CPU wrote 8 pages", What::Delta),
        Box::new(Fault4k::default()),
    ];
    cases.extend(STORMS.iter().map(|kind| -> Box<dyn Case> { Box::new(Storm { kind, made: None }) }));
    cases
}
