//! usvm's times of what `tests/kernel-ref/guest/bench.c` measures of the kernel: the same names, the same memory, the same
//! baseline.
//!
//! # Overview
//! The baseline is the kernel's own memcpy of 2 MiB, by the reference module: both programs ask the same function in the
//! same machine, in every round. Where there is no module it is this program's memcpy. What serves a device is timed on the
//! thread that does it, as the kernel's is timed in the ioctl; what the CPU waits for is timed where it waits.
//!
//! How bytes are copied is said by the caller (run.sh: by general registers, the fastest under emulation), or measured at
//! start, and then the fastest is taken: an emulated CPU has its own opinion of vector instructions. One helper thread
//! copies along.
//!
//! # Safety
//! Touches an arena of its own, by volatile accesses.
//!
//! # Limits
//! The figures of an emulated CPU mean something only as ratios.

use std::fmt::Write;
use std::os::fd::AsRawFd;
use std::time::Instant;

use usvm::device::sim::{Profile, SimConfig};
use usvm::ground::addr::{SZ_2M, SZ_4K, Span};
use usvm::host::Options;
use usvm::observe::stats::Cause;
use usvm::space::ports::{Device, Placement};
use usvm::space::svm::{Svm, Want};
use usvm::space::{Ctx, RangeFlags};
use usvm::vram::copy::{Copier, CopyHint, CopyKind};
use usvm::{Builder, Config, GpuAccess, Runtime};

/// Rounds of one range.
const ROUNDS: usize = 33;
/// Rounds of many ranges.
const LOOP_ROUNDS: usize = 17;
/// Rounds before those that count.
const WARM: usize = 2;
/// Ranges in a round of many.
const MANY: usize = 64;
/// Helper threads for copies: the other processor has nothing to do while a range moves.
const HELPERS: usize = 1;
/// Where it measures: the arena of the kernel's driver.
const ARENA: u64 = 0x10_0000_0000;

type Outcome<T> = Result<T, String>;

/// Samples of one name, in microseconds for 2 MiB.
#[derive(Debug)]
struct Row {
    name: String,
    sorted: Vec<f64>,
    /// The median of what each round took by its own baseline.
    ratio: f64,
}

impl Row {
    /// `baselines`: of the same rounds.
    fn new(name: String, mut samples: Vec<f64>, baselines: &[f64]) -> Self {
        let ratio = median(samples.iter().zip(baselines).map(|(took, base)| took / base).collect());
        samples.sort_by(f64::total_cmp);
        Self { name, sorted: samples, ratio }
    }

    fn at(&self, tenths: usize) -> f64 {
        self.sorted[(self.sorted.len() * tenths / 10).min(self.sorted.len() - 1)]
    }
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

/// The rows of one size of pages.
const ONE: [&str; 8] = [
    "find_new",
    "find_existing",
    "get_pages_untouched",
    "get_pages_touched",
    "get_pages_valid",
    "to_device_2m",
    "cpu_fault_return_2m",
    "clean_return_2m",
];
const LOOPS: [&str; 3] = ["ping_pong_64", "evict_64", "devevict_64"];

struct Bench {
    runtime: Runtime,
    baseline: Baseline,
    rows: Vec<Row>,
}

/// Measures everything and gives the JSON. `copy`: the option of that name, `auto` to measure. `spin_us`: likewise, `None`
/// is usvm's default.
///
/// # Errors
/// What could not be measured.
pub fn run(copy: &str, spin_us: Option<u64>) -> Outcome<String> {
    let mut baseline = Baseline::open();
    if baseline.module.is_some() {
        // The module's device memory lies in huge pages; so may the simulated device's. The machine is for this alone.
    }
    let (chosen, mut rows) = copies(&mut baseline)?;
    let copy = if copy == "auto" { chosen } else { copy.to_owned() };
    let mut config = Config::default();
    config.policy = "gpusvm".into();
    config.copy.clone_from(&copy);
    config.copy_threads = Some(HELPERS);
    config.spin_us = spin_us.unwrap_or(config.spin_us);
    let chosen = format!("copy={copy};copy_threads={HELPERS};spin_us={}", config.spin_us);
    let device = SimConfig {
        prefault: true,
        recoverable_faults: true,
        cpu_offset: 17 * SZ_4K,
        ..SimConfig::of(Profile::GENERIC, (MANY as u64 + 8) * SZ_2M)
    };
    let options = Options::default();
    let runtime = Builder::new(config).host(options).device(device).start().map_err(|e| e.to_string())?;
    let mut bench = Bench { runtime, baseline, rows: Vec::new() };
    for huge in [false, true] {
        bench.one(huge)?;
        bench.many(huge)?;
    }
    bench.fresh(0, false)?;
    rows.append(&mut bench.rows);
    let json = json(&rows, &bench.baseline, &chosen);
    bench.runtime.shutdown();
    Ok(json)
}

impl Bench {
    /// `count` fresh mappings of 2 MiB at the arena, nothing behind them.
    fn fresh(&self, count: u64, huge: bool) -> Outcome<()> {
        let all = Span::sized(ARENA, MANY as u64 * SZ_2M);
        // SAFETY: the arena is this program's own.
        unsafe { libc::munmap(all.start as *mut _, all.len() as usize) };
        self.on(|svm| {
            svm.barrier();
            svm.collect_garbage()
        })?;
        if count == 0 {
            return Ok(());
        }
        let len = (count * SZ_2M) as usize;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        // SAFETY: as above, and the memory is new.
        unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let at = libc::mmap(ARENA as *mut _, len, protection, flags, -1, 0);
            if at == libc::MAP_FAILED {
                return Err(format!("mmap: {}", std::io::Error::last_os_error()));
            }
            libc::madvise(at, len, advice);
        }
        Ok(())
    }

    fn on<T: Send + Sync + 'static>(
        &self,
        f: impl FnOnce(&Svm) -> usvm::Result<T> + Send + 'static,
    ) -> Outcome<T> {
        self.runtime.on_service_thread(f).map_err(|e| e.to_string())
    }

    /// How long `f` takes on a service thread.
    fn timed(&self, f: impl FnOnce(&Svm) -> usvm::Result<()> + Send + 'static) -> Outcome<f64> {
        self.on(move |svm| {
            let begin = Instant::now();
            f(svm)?;
            Ok(micros(begin))
        })
    }

    fn find(&self, at: u64) -> Outcome<f64> {
        let runtime = self.runtime.clone();
        self.timed(move |svm| {
            let ctx = Ctx { devmem_possible: true, ..Ctx::default() };
            let found = svm.space.find_or_insert(runtime.host(), at, Span::new(0, u64::MAX), &ctx)?;
            assert_eq!(found.span(), Span::sized(at, SZ_2M), "a range of 2 MiB");
            Ok(())
        })
    }

    /// A device access, placed as told.
    fn access(&self, at: u64, placement: Placement, access: GpuAccess) -> Outcome<f64> {
        let want = Want { force: Some(placement), pin: false, ..Want::fault(access) };
        self.timed(move |svm| svm.gpu_access(0, at, SZ_2M, want).map(drop))
    }

    fn to_device(&self, at: u64, access: GpuAccess) -> Outcome<f64> {
        let took = self.access(at, Placement::Migrate, access)?;
        self.on(move |svm| {
            let residence = svm.residence(Span::sized(at, SZ_2M));
            assert_eq!(residence.device, SZ_2M, "all of it is on the device");
            Ok(())
        })?;
        Ok(took)
    }

    fn unmap(&self, at: u64) -> Outcome<()> {
        let device = self.runtime.device(0).map_err(|e| e.to_string())?.clone();
        self.on(move |svm| {
            if let Some(range) = svm.space.find(at) {
                device.unbind(range.span());
                range.unmap_pages();
            }
            Ok(())
        })
    }

    /// One whole round of the operations on a range by itself.
    fn round(&mut self, huge: bool) -> Outcome<[f64; ONE.len()]> {
        let remote = |bench: &Self| bench.access(ARENA, Placement::Remote, GpuAccess::Write);
        self.fresh(1, huge)?;
        self.baseline.sample();
        let new = self.find(ARENA)?;
        let old = self.find(ARENA)?;
        let untouched = remote(self)?;
        dirty(ARENA);
        self.unmap(ARENA)?;
        let touched = remote(self)?;
        let valid = self.valid(ARENA)?;
        let to_device = self.to_device(ARENA, GpuAccess::Write)?;
        let back = touch(ARENA, true);
        self.to_device(ARENA, GpuAccess::Read)?;
        let clean = touch(ARENA, false);
        Ok([new, old, untouched, touched, valid, to_device, back, clean])
    }

    /// What a device access costs whose mapping is still there: a look at the flags, as the kernel's get_pages does.
    fn valid(&self, at: u64) -> Outcome<f64> {
        self.timed(move |svm| {
            let range = svm.space.find(at).expect("it was found before");
            assert!(range.pages_valid_hint() && range.flags().contains(RangeFlags::WRITABLE));
            Ok(())
        })
    }

    fn one(&mut self, huge: bool) -> Outcome<()> {
        let mut samples = ONE.map(|_| Vec::new());
        self.baseline.rounds.clear();
        for _ in 0..ROUNDS {
            for (row, took) in samples.iter_mut().zip(self.round(huge)?) {
                row.push(took);
            }
        }
        self.keep(huge, &ONE, samples, 1);
        Ok(())
    }

    fn many(&mut self, huge: bool) -> Outcome<()> {
        let at = |i: usize| ARENA + i as u64 * SZ_2M;
        self.fresh(MANY as u64, huge)?;
        for i in 0..MANY {
            self.find(at(i))?;
            dirty(at(i));
        }
        let mut samples = LOOPS.map(|_| Vec::new());
        self.baseline.rounds.clear();
        for _ in 0..LOOP_ROUNDS {
            self.baseline.sample();
            let mut took = 0.0;
            for i in 0..MANY {
                took += self.to_device(at(i), GpuAccess::Write)?;
                took += touch(at(i), true);
            }
            samples[0].push(took);
            self.all_to_device()?;
            samples[1].push(self.timed(move |svm| {
                (0..MANY).try_for_each(|i| svm.bring_home(Span::sized(at(i), SZ_2M), Cause::User))
            })?);
            self.all_to_device()?;
            samples[2].push(self.timed(|svm| {
                for range in svm.mover.by_use(0) {
                    svm.mover.evict(&range, &mut range.data.lock())?;
                }
                Ok(())
            })?);
        }
        self.keep(huge, &LOOPS, samples, MANY);
        Ok(())
    }

    fn all_to_device(&self) -> Outcome<()> {
        (0..MANY as u64).try_for_each(|i| self.to_device(ARENA + i * SZ_2M, GpuAccess::Write).map(drop))
    }

    fn keep<const N: usize>(&mut self, huge: bool, names: &[&str; N], samples: [Vec<f64>; N], per: usize) {
        let pages = if huge { "huge" } else { "4k" };
        for (name, samples) in names.iter().zip(samples) {
            let each = samples[WARM..].iter().map(|took| took / per as f64).collect();
            self.rows.push(Row::new(format!("{name}_{pages}"), each, &self.baseline.rounds[WARM..]));
        }
    }
}

fn micros(begin: Instant) -> f64 {
    begin.elapsed().as_nanos() as f64 / 1e3
}

fn dirty(at: u64) {
    for page in (at..at + SZ_2M).step_by(SZ_4K as usize) {
        // SAFETY: writable memory of the arena.
        unsafe { (page as *mut u64).write_volatile(page) };
    }
}

/// A CPU access; microseconds.
fn touch(at: u64, write: bool) -> f64 {
    let begin = Instant::now();
    // SAFETY: writable memory of the arena.
    unsafe {
        let word = (at as *mut u64).read_volatile();
        if write {
            (at as *mut u64).write_volatile(word + 1);
        }
    }
    micros(begin)
}

/// The kernel's memcpy of 2 MiB, or our own.
struct Baseline {
    module: Option<std::fs::File>,
    pair: [Vec<u64>; 2],
    samples: Vec<f64>,
    /// One for each round since it was cleared: the median of three.
    rounds: Vec<f64>,
}

impl Baseline {
    fn open() -> Self {
        let module = std::fs::OpenOptions::new().read(true).write(true).open("/dev/usvm_ref").ok();
        let words = (SZ_2M / 8) as usize;
        Self { module, pair: [vec![1; words], vec![2; words]], samples: Vec::new(), rounds: Vec::new() }
    }

    fn name(&self) -> &'static str {
        if self.module.is_some() { "memcpy_2m" } else { "memcpy_user_2m" }
    }

    fn sample(&mut self) {
        let three = (0..3).map(|_| self.once()).collect::<Vec<_>>();
        self.samples.extend(&three);
        self.rounds.push(median(three));
    }

    fn once(&mut self) -> f64 {
        match &self.module {
            Some(module) => kernel_memcpy(module),
            None => self.own(),
        }
    }

    fn own(&mut self) -> f64 {
        let [to, from] = &mut self.pair;
        let begin = Instant::now();
        to.copy_from_slice(from);
        std::hint::black_box(to);
        micros(begin)
    }
}

/// `USVM_REF_MEMCPY` of tests/kernel-ref/module/usvm_ref.h: 72 bytes, of which the last 8 are the answer in nanoseconds.
fn kernel_memcpy(module: &std::fs::File) -> f64 {
    const MEMCPY: libc::c_ulong = 0xc048_550f;
    let mut argument = [0u64; 9];
    // SAFETY: the module reads and writes 72 bytes.
    let answer = unsafe { libc::ioctl(module.as_raw_fd(), MEMCPY, argument.as_mut_ptr()) };
    assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
    argument[8] as f64 / 1e3
}

/// Measures every way to copy, and says which is the fastest.
fn copies(baseline: &mut Baseline) -> Outcome<(String, Vec<Row>)> {
    // As many as no cache holds.
    const SLOTS: usize = 12;
    let words = (SZ_2M / 8) as usize;
    let (mut to, from) = (vec![1u64; SLOTS * words], vec![2u64; SLOTS * words]);
    let mut rows = Vec::new();
    for kind in CopyKind::ALL {
        let Some(copier) = Copier::with(kind) else { continue };
        let mut samples = Vec::new();
        baseline.rounds.clear();
        for round in 0..LOOP_ROUNDS {
            baseline.sample();
            let slot = round % SLOTS * words;
            let (to, from) = (&mut to[slot..slot + words], &from[slot..slot + words]);
            let begin = Instant::now();
            // SAFETY: two buffers of 2 MiB of this thread's own.
            unsafe {
                copier.copy(to.as_mut_ptr().cast(), from.as_ptr().cast(), SZ_2M as usize, CopyHint::ToDevice)
            };
            samples.push(micros(begin));
        }
        rows.push(Row::new(format!("copy_{kind}"), samples.split_off(WARM), &baseline.rounds[WARM..]));
    }
    baseline.rounds.clear();
    let own = (0..LOOP_ROUNDS)
        .map(|_| {
            baseline.sample();
            baseline.own()
        })
        .collect();
    let fastest = rows.iter().min_by(|a, b| a.at(0).total_cmp(&b.at(0))).ok_or("there is no way to copy")?;
    let chosen = fastest.name.trim_start_matches("copy_").to_owned();
    rows.push(Row::new("memcpy_user_2m".into(), own, &baseline.rounds));
    Ok((chosen, rows))
}

fn json(rows: &[Row], baseline: &Baseline, options: &str) -> String {
    let base = Row::new(baseline.name().into(), baseline.samples.clone(), &baseline.samples);
    let mut out =
        format!("{{\"usvm\":\"{}\",\"options\":\"{options}\",\"results\":[\n", env!("CARGO_PKG_VERSION"));
    for (i, row) in rows.iter().chain([&base]).enumerate() {
        let [best, median, p90] = [0, 5, 9].map(|tenths| row.at(tenths));
        let comma = if i == rows.len() { "" } else { "," };
        let _ = writeln!(
            out,
            "{{\"name\":\"{}\",\"unit\":\"us\",\"best\":{best:.3},\"median\":{median:.3},\"p90\":{p90:.3},\"n\":{},\
             \"baseline\":\"{}\",\"baseline_best\":{:.3},\"baseline_median\":{:.3},\"ratio_best\":{:.4},\
             \"ratio\":{:.4}}}{comma}",
            row.name,
            row.sorted.len(),
            base.name,
            base.at(0),
            base.at(5),
            best / base.at(0),
            row.ratio,
        );
    }
    out.push_str("]}\n");
    out
}
