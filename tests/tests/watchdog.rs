//! usvm dies, or the device does: data comes home, or its loss is told by SIGBUS; nobody waits for ever.
//!
//! Each test runs in a process of its own.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use usvm::{Config, Error, Runtime};
use usvm_tests::isolated::kernel_faults;
use usvm_tests::support::*;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

/// Ends the calling thread as if the kernel had taken it: nothing is unwound, every lock it holds stays held.
fn vanish() -> ! {
    // SAFETY: ends this thread only; its stack is never used again.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!("the thread is gone")
}

/// What `page` holds, or `None` if reading it gives SIGBUS.
fn peek(at: u64) -> Option<u64> {
    // The kernel answers EFAULT in a system call where a load gets SIGBUS.
    let mut word = [0u8; 8];
    let here = libc::iovec { iov_base: word.as_mut_ptr().cast(), iov_len: 8 };
    let there = libc::iovec { iov_base: at as *mut libc::c_void, iov_len: 8 };
    // SAFETY: eight local bytes; the kernel checks the other address.
    let n = unsafe { libc::process_vm_readv(libc::getpid(), &here, 1, &there, 1, 0) };
    (n == 8).then(|| u64::from_le_bytes(word))
}

/// Reads `at` with a load, in a thread; whether that got SIGBUS. The handler ends the thread.
fn load_gets_sigbus(at: u64) -> bool {
    static ADDRESS: AtomicU64 = AtomicU64::new(0);
    static READ: AtomicBool = AtomicBool::new(false);
    extern "C" fn on_sigbus(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel passes a valid structure; the thread ends here and nobody joins it.
        unsafe {
            ADDRESS.store((*info).si_addr() as u64, SeqCst);
            libc::syscall(libc::SYS_exit, 0);
        }
    }
    ADDRESS.store(0, SeqCst);
    READ.store(false, SeqCst);
    // SAFETY: the handler is async-signal-safe; the load is of a mapped page.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()), 0);
    }
    std::thread::spawn(move || {
        // SAFETY: a mapped page; a poisoned one ends this thread in the handler.
        let _ = unsafe { (at as *const u64).read_volatile() };
        READ.store(true, SeqCst);
    });
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(5) {
        if ADDRESS.load(SeqCst) != 0 {
            assert_eq!(ADDRESS.load(SeqCst) & !4095, at & !4095);
            return true;
        }
        if READ.load(SeqCst) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("a load waits for ever");
}

/// Waits until usvm has noticed.
fn withdrawn(runtime: &Runtime) -> Error {
    let began = Instant::now();
    loop {
        let fence = runtime.launch(0, |_| Ok(()));
        match fence.wait(Some(Duration::from_secs(1))) {
            Err(e @ Error::NotRunning(_)) => return e,
            _ if began.elapsed() > Duration::from_secs(15) => panic!("usvm did not withdraw"),
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn after_it_died(runtime: &Runtime, mem: &Mem, seed: u64) {
    let error = withdrawn(runtime);
    assert!(error.to_string().contains("died"), "{error}");
    mem.check(seed);
    assert!(matches!(runtime.evict(mem.at, mem.len), Err(Error::NotRunning(_))));
    assert!(matches!(runtime.residence(mem.at, mem.len), Err(Error::NotRunning(_))));
    mem.fill(seed + 1);
    mem.check(seed + 1);
    runtime.shutdown();
}

#[test]
fn a_control_thread_dies() {
    if !is_child("a_control_thread_dies") {
        return;
    }
    let _alone = alone("control thread", 40);
    let runtime = runtime(Config::default(), &[16 << 20]);
    let mem = Mem::filled(3 * M2, 1);
    to_device(&runtime, &mem, 2);
    let _never = runtime.defer(|_| vanish());
    after_it_died(&runtime, &mem, 2);
}

#[test]
fn both_control_threads_die() {
    if !is_child("both_control_threads_die") {
        return;
    }
    let _alone = alone("control threads", 40);
    let runtime = runtime(Config::default(), &[16 << 20]);
    let mem = Mem::filled(3 * M2, 1);
    to_device(&runtime, &mem, 2);
    let _never = [runtime.defer(|_| vanish()), runtime.defer(|_| vanish())];
    after_it_died(&runtime, &mem, 2);
}

/// Makes one fault thread die in the middle of serving a fault: a policy that vanishes.
#[derive(Debug)]
struct Deadly(AtomicBool, bool);

impl usvm::policy::Policy for Deadly {
    fn name(&self) -> &'static str {
        "deadly"
    }

    fn gpu_access(&self, _: &usvm::space::ports::Facts<'_>) -> usvm::space::ports::Placement {
        usvm::space::ports::Placement::Migrate
    }

    fn cpu_fault(&self, _: &usvm::space::ports::Facts<'_>) -> usvm::space::ports::Return {
        if self.0.swap(false, SeqCst) {
            if self.1 {
                panic!("on purpose");
            }
            vanish();
        }
        usvm::space::ports::Return::Range
    }
}

fn kill_a_fault_thread(name: &str, by_panic: bool) {
    let _alone = alone(name, 40);
    let runtime = runtime(Config::default(), &[16 << 20]);
    let mem = Mem::filled(3 * M2, 1);
    to_device(&runtime, &mem, 2);
    let deadly = std::sync::Arc::new(Deadly(AtomicBool::new(true), by_panic));
    let policy = deadly.clone();
    runtime.on_service_thread(move |svm| svm.mover.set_policy(policy)).unwrap();
    let held = std::thread::scope(|scope| {
        let (mem, at) = (&mem, mem.at);
        // This load is the one the thread dies over; the others come while nobody may be left to serve.
        let first = scope.spawn(move || peek(at));
        while deadly.0.load(SeqCst) {
            std::thread::yield_now();
        }
        let others: Vec<_> =
            (1..3).map(|n| scope.spawn(move || mem.check_words(n * M2, M2, |i| value(2, i)))).collect();
        others.into_iter().for_each(|t| t.join().unwrap());
        first.join().unwrap()
    });
    if by_panic {
        // Unwinding let its lock go: nothing is lost.
        assert_eq!(held, Some(value(2, 0)));
        after_it_died(&runtime, &mem, 2);
        return;
    }
    // The range is locked for ever by a thread that is gone: its data cannot come home, and that is told.
    withdrawn(&runtime);
    assert_eq!(held, None, "a page that is lost was read as something");
    assert!((0..M2).step_by(K64 as usize).all(|offset| peek(mem.at + offset).is_none()));
    assert!(load_gets_sigbus(mem.at + 5 * K4));
    mem.check_words(M2, 2 * M2, |i| value(2, i));
    // Its exit must not wait either.
    runtime.shutdown();
}

#[test]
fn a_fault_thread_panics() {
    if !kernel_faults() {
        return;
    }
    if is_child("a_fault_thread_panics") {
        kill_a_fault_thread("fault thread panics", true);
    }
}

#[test]
fn a_fault_thread_vanishes_with_a_range_in_its_hands() {
    if !kernel_faults() {
        return;
    }
    if is_child("a_fault_thread_vanishes_with_a_range_in_its_hands") {
        kill_a_fault_thread("fault thread vanishes", false);
    }
}

#[test]
fn a_lost_device_takes_only_what_lived_there_alone() {
    if !is_child("a_lost_device_takes_only_what_lived_there_alone") {
        return;
    }
    let _alone = alone("lost device", 40);
    let runtime = runtime(Config::default(), &[16 << 20, 16 << 20]);
    let (written, only_read, home, elsewhere) =
        (Mem::filled(M2, 1), Mem::filled(M2, 3), Mem::filled(M2, 4), Mem::filled(M2, 1));
    to_device(&runtime, &written, 2);
    let (at, len) = (only_read.at, only_read.len);
    on_gpu(&runtime, move |gpu| gpu_check(gpu, at, len, 0, 3)).unwrap();
    let (at, len) = (elsewhere.at, elsewhere.len);
    runtime.launch(1, move |gpu| gpu_fill(gpu, at, len, 0, 5)).wait(None).unwrap();
    runtime.device(0).unwrap().lose("pulled out");

    // What the device wrote is lost, and said to be.
    assert!(load_gets_sigbus(written.at));
    assert!(load_gets_sigbus(written.at + M2 - 8));
    assert_eq!(peek(written.at + K64), None);
    // What it only read is in the shadow still; what was home, or on another device, is where it was.
    only_read.check(3);
    home.check(4);
    elsewhere.check(5);
    // Work on it ends with an error, on the other one it goes on.
    let (at, len) = (home.at, home.len);
    assert!(matches!(on_gpu(&runtime, move |gpu| gpu.fill(at, len, 0)), Err(Error::DeviceLost { .. })));
    runtime.launch(1, move |gpu| gpu_check(gpu, at, len, 0, 4)).wait(None).unwrap();
    home.check(4);
    runtime.shutdown();
    only_read.check(3);
    elsewhere.check(5);
    assert!(load_gets_sigbus(written.at + K4), "after the end it reads as something");
    // A new mapping there is as good as any.
    // SAFETY: nothing refers to it.
    let again = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        libc::mmap(written.ptr(0), M2 as usize, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    assert_eq!(again, written.ptr(0));
    written.check_words(0, M2, |_| 0);
}

#[test]
fn a_lost_device_and_a_shutdown_before_anyone_looks() {
    if !is_child("a_lost_device_and_a_shutdown_before_anyone_looks") {
        return;
    }
    let _alone = alone("lost device, shutdown", 40);
    let runtime = runtime(Config::default(), &[16 << 20]);
    let (written, only_read) = (Mem::filled(M2, 1), Mem::filled(M2, 3));
    to_device(&runtime, &written, 2);
    let (at, len) = (only_read.at, only_read.len);
    on_gpu(&runtime, move |gpu| gpu_check(gpu, at, len, 0, 3)).unwrap();
    runtime.device(0).unwrap().lose("pulled out");
    runtime.shutdown();
    assert_eq!(peek(written.at + K4), None, "lost data reads as something");
    assert!(load_gets_sigbus(written.at));
    only_read.check(3);
}

/// What comes home with it in one request does so, and the loss is told by that request.
#[test]
fn a_lost_device_keeps_nothing_else_from_coming_home() {
    if !is_child("a_lost_device_keeps_nothing_else_from_coming_home") {
        return;
    }
    let _alone = alone("lost device, eviction", 40);
    let runtime = runtime(Config::default(), &[16 << 20, 16 << 20]);
    let mem = Mem::filled(2 * M2, 1);
    let at = mem.at;
    for (device, seed) in [(0u32, 2), (1, 3)] {
        let (from, first) = (at + u64::from(device) * M2, u64::from(device) * M2 / 8);
        runtime.launch(device, move |gpu| gpu_fill(gpu, from, M2, first, seed)).wait(None).unwrap();
        assert_eq!(runtime.residence(from, M2).unwrap().device, M2);
    }
    runtime.device(0).unwrap().lose("pulled out");
    assert!(matches!(runtime.evict(at, mem.len), Err(Error::DeviceLost { .. })));
    assert_eq!(
        runtime.residence(at + M2, M2).unwrap().device,
        0,
        "it waits on the device behind what is lost"
    );
    mem.check_words(M2, M2, |i| value(3, i));
    assert!(load_gets_sigbus(at));
    runtime.shutdown();
    mem.check_words(M2, M2, |i| value(3, i));
    assert!(load_gets_sigbus(at + M2 - 8));
}

/// Makes every fault wait until it is told.
#[derive(Debug)]
struct Slow {
    served: std::sync::atomic::AtomicUsize,
    go_on: AtomicBool,
}

impl usvm::policy::Policy for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn gpu_access(&self, _: &usvm::space::ports::Facts<'_>) -> usvm::space::ports::Placement {
        usvm::space::ports::Placement::Migrate
    }

    fn cpu_fault(&self, _: &usvm::space::ports::Facts<'_>) -> usvm::space::ports::Return {
        self.served.fetch_add(1, SeqCst);
        while !self.go_on.load(SeqCst) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        usvm::space::ports::Return::Range
    }
}

/// What they wait for may be the very event that nobody reads.
#[test]
fn events_are_read_while_all_fault_threads_wait() {
    let _alone = alone("all wait", 40);
    let runtime = runtime(Config::default(), &[16 << 20]);
    let mem = Mem::filled(4 * M2, 1);
    to_device(&runtime, &mem, 2);
    let slow = std::sync::Arc::new(Slow { served: Default::default(), go_on: AtomicBool::new(false) });
    let policy = slow.clone();
    runtime.on_service_thread(move |svm| svm.mover.set_policy(policy)).unwrap();
    std::thread::scope(|scope| {
        let mem = &mem;
        let readers: Vec<_> =
            (0..2).map(|n| scope.spawn(move || mem.check_words(n * M2, M2, |i| value(2, i)))).collect();
        while slow.served.load(SeqCst) < 2 {
            std::thread::yield_now();
        }
        // Returns when its event was read.
        // SAFETY: nothing refers to these pages.
        assert_eq!(unsafe { libc::madvise(mem.ptr(3 * M2), M2 as usize, libc::MADV_DONTNEED) }, 0);
        slow.go_on.store(true, SeqCst);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        mem.check_words(3 * M2, M2, |_| 0);
    });
}
