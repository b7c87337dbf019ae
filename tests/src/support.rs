//! What the tests share: raw memory, known contents, a limit on time, tests in a process of their own.
//!
//! # Overview
//! Tests here run against the real runtime. There is one runtime in a process, so each test holds [`alone`] for its
//! length. Nothing here is for programs.
//!
//! # Safety
//! [`Mem`] is memory that several threads and the device change at once. It is only ever read and written as atomics or
//! through raw pointers, byte by byte, so no reference promises that it stays the same.
//!
//! # Limits
//! x86-64 for the 16-byte accesses.

use std::io::{self, Write as _};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use usvm::device::sim::{Profile, SimConfig};
use usvm::host::Options;
use usvm::{Access, Builder, Config, GpuAccess, Runtime};

use crate::isolated::skipped;

/// 4 KiB.
pub const K4: u64 = 4 << 10;
/// 64 KiB.
pub const K64: u64 = 64 << 10;
/// 2 MiB.
pub const M2: u64 = 2 << 20;

/// Lets one test at a time run in this process, and ends the process when it takes longer than `seconds`.
pub fn alone(name: &str, seconds: u64) -> Alone {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let done = Arc::new(AtomicBool::new(false));
    let (seen, name) = (done.clone(), name.to_owned());
    std::thread::spawn(move || {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        while !seen.load(Ordering::Acquire) {
            if Instant::now() > deadline {
                give_up(&name, seconds);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    Alone { _turn: turn, done }
}

fn give_up(name: &str, seconds: u64) -> ! {
    // Past the test harness, which hides what a process that aborts has printed.
    let _ = writeln!(io::stderr(), "{name}: no end after {seconds} s");
    end_with_threads()
}

/// Says where each thread of this process waits and ends it, as a test that hangs does.
pub fn end_with_threads() -> ! {
    // What hangs may be what reading and printing need: not waited for long.
    let told = std::thread::spawn(|| {
        let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        for task in tasks.map(|task| task.path()) {
            let read = |file| std::fs::read_to_string(task.join(file)).unwrap_or_default();
            let (comm, wchan, call) = (read("comm"), read("wchan"), read("syscall"));
            let _ = writeln!(io::stderr(), "  thread {}: {wchan}, {}", comm.trim(), call.trim());
        }
    });
    let deadline = Instant::now() + Duration::from_secs(5);
    while !told.is_finished() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::process::abort()
}

/// See [`alone`].
pub struct Alone {
    _turn: MutexGuard<'static, ()>,
    done: Arc<AtomicBool>,
}

impl Drop for Alone {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Release);
    }
}

/// Sets a flag when dropped: what others do until then ends also where a check fails.
#[derive(Debug)]
pub struct Stops<'a>(pub &'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A runtime with simulated devices of `vram` bytes each.
pub fn runtime(config: Config, vram: &[u64]) -> Runtime {
    runtime_with(config, Options { prepared: 1, ..Options::default() }, vram).unwrap()
}

/// As [`runtime`], with what to use of the kernel.
pub fn runtime_with(config: Config, options: Options, vram: &[u64]) -> usvm::Result<Runtime> {
    let builder = Builder::new(config).host(options);
    vram.iter().fold(builder, |b, &bytes| b.device(device(bytes, true))).start()
}

/// A device of `vram` bytes.
pub fn device(vram: u64, recoverable_faults: bool) -> SimConfig {
    SimConfig { recoverable_faults, ..SimConfig::of(Profile::GENERIC, vram) }
}

/// The default configuration with another policy.
pub fn policy(name: &str) -> Config {
    let mut config = Config::default();
    config.policy = name.into();
    config
}

/// Announces `[at, at + len)` for reading and writing.
pub fn writes(at: u64, len: u64) -> Access {
    Access { addr: at, len, access: GpuAccess::Write }
}

/// Announces `[at, at + len)` for reading.
pub fn reads(at: u64, len: u64) -> Access {
    Access { addr: at, len, access: GpuAccess::Read }
}

/// Anonymous private memory, aligned to 2 MiB, unmapped when dropped.
#[derive(Debug)]
pub struct Mem {
    raw: (u64, u64),
    /// First address.
    pub at: u64,
    /// Bytes.
    pub len: u64,
}

/// A word of memory that is accessed in one piece.
pub trait Word: Sized {
    /// The atomic of this width.
    type Atomic: 'static;
}

impl Word for u8 {
    type Atomic = AtomicU8;
}

impl Word for u16 {
    type Atomic = AtomicU16;
}

impl Word for u32 {
    type Atomic = AtomicU32;
}

impl Word for u64 {
    type Atomic = AtomicU64;
}

impl Mem {
    /// `len` bytes, rounded up to pages, with the kernel's default for huge pages.
    pub fn new(len: u64) -> Self {
        Self::mapped(len, libc::MAP_PRIVATE, None)
    }

    /// As [`Mem::new`], in huge pages where there are any.
    pub fn huge(len: u64) -> Self {
        Self::mapped(len, libc::MAP_PRIVATE, Some(libc::MADV_HUGEPAGE))
    }

    /// As [`Mem::new`], in small pages.
    pub fn small(len: u64) -> Self {
        Self::mapped(len, libc::MAP_PRIVATE, Some(libc::MADV_NOHUGEPAGE))
    }

    /// Memory shared with children, which devices reach over the link: it never migrates.
    pub fn shared(len: u64) -> Self {
        Self::mapped(len, libc::MAP_SHARED, None)
    }

    fn mapped(len: u64, sharing: i32, advice: Option<i32>) -> Self {
        let len = len.next_multiple_of(K4);
        let all = len + M2;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = sharing | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let raw = unsafe { libc::mmap(std::ptr::null_mut(), all as usize, protection, flags, -1, 0) };
        assert_ne!(raw, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        let at = (raw as u64).next_multiple_of(M2);
        if let Some(advice) = advice {
            // SAFETY: only changes how the new mapping is backed.
            unsafe { libc::madvise(at as *mut libc::c_void, len as usize, advice) };
        }
        Self { raw: (raw as u64, all), at, len }
    }

    /// Memory filled with [`value`]s of `seed`.
    pub fn filled(len: u64, seed: u64) -> Self {
        let mem = Self::huge(len);
        mem.fill(seed);
        mem
    }

    /// The words of one width.
    pub fn words<W: Word>(&self) -> &[W::Atomic] {
        let words = self.len as usize / size_of::<W>();
        // SAFETY: the mapping is there, aligned and as long; the words are atomics, which any bits are good for.
        unsafe { std::slice::from_raw_parts(self.at as *const W::Atomic, words) }
    }

    /// Stores [`value`]s of `seed` everywhere.
    pub fn fill(&self, seed: u64) {
        for (i, word) in self.words::<u64>().iter().enumerate() {
            word.store(value(seed, i as u64), Ordering::Relaxed);
        }
    }

    /// Panics with the first word that is not [`value`] of `seed`.
    pub fn check(&self, seed: u64) {
        self.check_words(0, self.len, |i| value(seed, i));
    }

    /// Panics with the first word in `[from, from + len)` (bytes) that is not what `want` says of its index.
    pub fn check_words(&self, from: u64, len: u64, want: impl Fn(u64) -> u64) {
        for i in from / 8..(from + len) / 8 {
            let got = self.words::<u64>()[i as usize].load(Ordering::Relaxed);
            assert_eq!(got, want(i), "word {i:#x} of {self:x?}: {got:#x}, not {:#x}", want(i));
        }
    }

    /// A copy of all bytes.
    pub fn bytes(&self) -> Vec<u8> {
        self.words::<u8>().iter().map(|b| b.load(Ordering::Relaxed)).collect()
    }

    /// Pointer to the byte at `offset`.
    pub fn ptr(&self, offset: u64) -> *mut libc::c_void {
        assert!(offset <= self.len);
        (self.at + offset) as *mut libc::c_void
    }
}

impl Drop for Mem {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing borrows it any more.
        unsafe { libc::munmap(self.raw.0 as *mut libc::c_void, self.raw.1 as usize) };
    }
}

/// The known value of word `index` under `seed` (splitmix64); never zero.
pub fn value(seed: u64, index: u64) -> u64 {
    let mut z =
        seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index.wrapping_mul(0xbf58_476d_1ce4_e5b9));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) | 1
}

/// A small generator of numbers, for choices.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 += 1;
        (value(0x5eed, self.0) >> 1) % limit
    }
}

/// Stores [`value`]s of `seed` in all words of `[at, at + len)`, which begins with word `first`, by the device.
pub fn gpu_fill(
    gpu: &mut usvm::device::sim::Gpu<'_>,
    at: u64,
    len: u64,
    first: u64,
    seed: u64,
) -> usvm::Result<()> {
    let mut page = [0u8; K4 as usize];
    for offset in (0..len).step_by(K4 as usize) {
        for (i, word) in page.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&value(seed, first + offset / 8 + i as u64).to_le_bytes());
        }
        gpu.write(at + offset, &page[..(len - offset).min(K4) as usize])?;
    }
    Ok(())
}

/// As [`gpu_fill`], but checks; the error names the first wrong word.
pub fn gpu_check(
    gpu: &mut usvm::device::sim::Gpu<'_>,
    at: u64,
    len: u64,
    first: u64,
    seed: u64,
) -> usvm::Result<()> {
    let mut wrong = None;
    gpu.for_each_tile(at, len, |tile, offset| {
        for (i, word) in tile.chunks_exact(8).enumerate() {
            let index = first + offset / 8 + i as u64;
            let got = u64::from_le_bytes(word.try_into().unwrap());
            if got != value(seed, index) && wrong.is_none() {
                wrong = Some((index, got));
            }
        }
    })?;
    match wrong {
        None => Ok(()),
        Some((index, got)) => Err(usvm::Error::Invalid {
            argument: "data",
            reason: format!("the device reads {got:#x} in word {index:#x}, not {:#x}", value(seed, index)),
        }),
    }
}

/// Runs `f` and waits for it, on device 0, without announcing anything.
pub fn on_gpu(
    runtime: &Runtime,
    f: impl FnOnce(&mut usvm::device::sim::Gpu<'_>) -> usvm::Result<()> + Send + 'static,
) -> usvm::Result<()> {
    runtime.launch(0, f).wait(None).map(|_| ())
}

/// Brings all of `mem` to device 0 and makes the device's copy the only one: every word becomes [`value`] of `seed`.
pub fn to_device(runtime: &Runtime, mem: &Mem, seed: u64) {
    let (at, len) = (mem.at, mem.len);
    // A page that was busy for a moment makes a range stay where it is; asked again, it goes.
    for _ in 0..20 {
        let fill = move |gpu: &mut usvm::device::sim::Gpu<'_>| gpu_fill(gpu, at, len, 0, seed);
        runtime.launch_with(0, &[writes(at, len)], fill).wait(None).unwrap();
        if runtime.residence(at, len).unwrap().device == len {
            return;
        }
    }
    let residence = runtime.residence(at, len).unwrap();
    let missing: Vec<u64> =
        (0..len / K4).filter(|p| runtime.residence(at + p * K4, K4).unwrap().device == 0).collect();
    panic!("{residence:?}; pages {missing:?} are not on the device: {}", runtime.stats());
}

/// In the parent: runs the test called `name` of this program again, alone, in a process of its own, and gives its status and
/// output. In that process: `None`, and the test does its work.
pub fn in_child(name: &str) -> Option<std::process::Output> {
    const MARK: &str = "USVM_TEST_CHILD";
    if std::env::var(MARK).is_ok_and(|v| v == name) {
        return None;
    }
    let program = std::env::current_exe().unwrap();
    let mut command = std::process::Command::new(program);
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(MARK, name);
    Some(command.output().unwrap())
}

/// [`in_child`] for tests that end well: panics in the parent if the child did not. `true`: this is the child.
pub fn is_child(name: &str) -> bool {
    match in_child(name) {
        None => true,
        Some(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{name}: {}\n{text}\n{errors}", output.status);
            errors.lines().filter_map(|l| l.strip_prefix("skipped: ")).for_each(skipped);
            false
        }
    }
}
