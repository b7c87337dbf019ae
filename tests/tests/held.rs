//! Memory that work holds, and who else wants it meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use usvm::device::sim::Gpu;
use usvm::{Access, Builder, Config, Error, Fence, Hint, Location, Runtime};
use usvm_tests::support::*;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

/// Devices that cannot fault, to which all moves.
fn without_faults(vram: &[u64]) -> Runtime {
    without_faults_by(policy("gpusvm"), vram)
}

fn without_faults_by(config: Config, vram: &[u64]) -> Runtime {
    let builder = Builder::new(config);
    vram.iter().fold(builder, |b, &bytes| b.device(device(bytes, false))).start().unwrap()
}

/// A launch that holds what it announced until it is told to go on.
struct Work {
    go: Arc<AtomicBool>,
    fence: Fence,
}

impl Work {
    /// Returns when its kernel runs, which then waits.
    fn begin(
        runtime: &Runtime,
        device: u32,
        accesses: &[Access],
        then: impl FnOnce(&mut Gpu<'_>) -> usvm::Result<()> + Send + 'static,
    ) -> Self {
        let (begun, go) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (begins, goes) = (begun.clone(), go.clone());
        let fence = runtime.launch_with(device, accesses, move |gpu| {
            begins.store(true, Relaxed);
            while !goes.load(Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            then(gpu)
        });
        while !begun.load(Relaxed) {
            assert!(!fence.is_signaled(), "{:?}", fence.status());
            std::thread::sleep(Duration::from_millis(1));
        }
        Self { go, fence }
    }

    fn end(self) -> usvm::Result<()> {
        self.go.store(true, Relaxed);
        self.fence.wait(None).map(|_| ())
    }
}

/// Adds one to the first word of each.
fn count(gpu: &mut Gpu<'_>, words: [u64; 2]) -> usvm::Result<()> {
    words.into_iter().try_for_each(|at| {
        let value = gpu.load_u64(at)?;
        gpu.store_u64(at, value + 1)
    })
}

#[test]
fn launches_on_two_devices_that_want_the_same_take_turns() {
    let _alone = alone("want the same", 60);
    let runtime = without_faults(&[8 * M2, 8 * M2]);
    let mem = Mem::huge(2 * M2);
    let (a, b) = (mem.at, mem.at + M2);
    let orders = [[writes(a, M2), writes(b, M2)], [writes(b, M2), writes(a, M2)]];
    let mut fences = Vec::new();
    for _ in 0..20 {
        for device in [0, 1] {
            let pass = move |gpu: &mut Gpu<'_>| count(gpu, [a, b]);
            fences.push(runtime.launch_with(device, &orders[device as usize], pass));
        }
    }
    fences.iter().for_each(|fence| assert!(fence.wait(None).unwrap()));
    mem.check_words(0, 8, |_| 40);
    mem.check_words(M2, 8, |_| 40);
}

/// The thread that is to end a bracket may look at what a launch, which waits for that end, is going to use.
#[test]
fn a_launch_that_waits_holds_nothing() {
    let _alone = alone("holds nothing", 60);
    let runtime = without_faults(&[4 * M2, 4 * M2]);
    let (a, b) = (Mem::filled(M2, 1), Mem::filled(M2, 1));
    let mut spans = [(a.at, a.len), (b.at, b.len)];
    // What comes first is taken first.
    spans.sort_unstable();
    let (first, last) = if a.at < b.at { (&a, &b) } else { (&b, &a) };
    let bracket = runtime.begin_access(1, &[writes(last.at, last.len)]).unwrap();
    let accesses = spans.map(|(at, len)| writes(at, len));
    let fence = runtime.launch_with(0, &accesses, move |gpu| {
        spans.into_iter().try_for_each(|(at, len)| gpu_fill(gpu, at, len, 0, 3))
    });
    std::thread::sleep(Duration::from_millis(200));
    first.check(1);
    first.fill(2);
    assert!(!fence.is_signaled(), "{:?}", fence.status());
    runtime.end_access(bracket).unwrap();
    fence.wait(None).unwrap();
    a.check(3);
    b.check(3);
}

/// Device memory is full of what cannot go: the rest is used over the link.
#[test]
fn a_fault_that_finds_no_room_goes_over_the_link() {
    let _alone = alone("no room", 60);
    let runtime = runtime(policy("gpusvm"), &[2 * M2]);
    let (held, other) = (Mem::filled(2 * M2, 1), Mem::filled(2 * M2, 1));
    let (at, len) = (other.at, other.len);
    for seed in 2..4 {
        // Of the launch's own.
        let pass = move |gpu: &mut Gpu<'_>| gpu_fill(gpu, at, len, 0, seed);
        runtime.launch_with(0, &[writes(held.at, held.len)], pass).wait(None).unwrap();
        other.check(seed);
    }
    // Of somebody else's, who does not end before this does.
    let bracket = runtime.begin_access(0, &[writes(held.at, held.len)]).unwrap();
    on_gpu(&runtime, move |gpu| gpu_fill(gpu, at, len, 0, 4)).unwrap();
    runtime.end_access(bracket).unwrap();
    other.check(4);
    held.check(1);
    to_device(&runtime, &other, 5);
    other.check(5);
}

/// A copy for reading takes nothing from others who read.
#[test]
fn two_devices_that_cannot_fault_read_the_same() {
    let _alone = alone("read the same", 60);
    let runtime = without_faults_by(Config::default(), &[4 * M2, 4 * M2]);
    let mem = Mem::filled(M2, 1);
    let (at, len) = (mem.at, mem.len);
    runtime.advise(at, len, Hint::ReadMostly(true)).unwrap();
    for seed in 1..5 {
        mem.fill(seed);
        let begin = |device| runtime.begin_access(device, &[reads(at, len)]).unwrap();
        let order = if seed % 2 == 0 { [0, 1] } else { [1, 0] };
        let brackets = order.map(begin);
        assert_eq!(runtime.residence(at, len).unwrap().shared, len);
        for device in order {
            runtime.launch(device, move |gpu| gpu_check(gpu, at, len, 0, seed)).wait(None).unwrap();
        }
        let [first, second] = brackets;
        runtime.end_access(first).unwrap();
        let last = order[1];
        runtime.launch(last, move |gpu| gpu_check(gpu, at, len, 0, seed)).wait(None).unwrap();
        runtime.end_access(second).unwrap();
    }
    // Who writes waits for the readers.
    let work = Work::begin(&runtime, 0, &[reads(at, len)], move |gpu| gpu_check(gpu, at, len, 0, 4));
    let writer = runtime.launch_with(1, &[writes(at, len)], move |gpu| gpu_fill(gpu, at, len, 0, 5));
    std::thread::sleep(Duration::from_millis(50));
    assert!(!writer.is_signaled(), "{:?}", writer.status());
    work.end().unwrap();
    writer.wait(None).unwrap();
    mem.check(5);
}

/// Moves that wait for work keep nobody from asking, and come to pass when it has ended.
#[test]
fn questions_are_answered_while_moves_wait() {
    let _alone = alone("questions", 60);
    let runtime = runtime(policy("gpusvm"), &[2 * M2]);
    let (held, other) = (Mem::filled(2 * M2, 1), Mem::filled(4 * M2, 1));
    let bracket = runtime.begin_access(0, &[writes(held.at, held.len)]).unwrap();
    let there = || runtime.residence(held.at, held.len).unwrap().device;
    let before = there();
    let fences = [0, 1, 2, 3].map(|n| runtime.prefetch(other.at + n * M2, M2, Location::Device(0)));
    let home = [0, 1].map(|n| runtime.prefetch(held.at + n * M2, M2, Location::Host));
    std::thread::scope(|scope| {
        let evicts = [0, 1].map(|n| {
            let (runtime, at) = (&runtime, held.at + n * M2);
            scope.spawn(move || runtime.evict(at, M2))
        });
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(there(), before);
        runtime.barrier().unwrap();
        assert!(fences.iter().chain(&home).any(|fence| !fence.is_signaled()));
        runtime.end_access(bracket).unwrap();
        evicts.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
    });
    fences.iter().chain(&home).for_each(|fence| assert!(fence.wait(None).unwrap()));
    assert_eq!(there(), 0);
    held.check(1);
    other.check(1);
}

fn protect(runtime: &Runtime, at: u64, len: u64, rights: i32) {
    // SAFETY: the test's own memory; an access that it forbids is the device's, which is told.
    assert_eq!(unsafe { libc::mprotect(at as *mut libc::c_void, len as usize, rights) }, 0);
    runtime.protection_changed(at, len).unwrap();
}

#[test]
fn rights_that_are_enough_are_not_taken_from_work() {
    let _alone = alone("rights", 60);
    const BOTH: i32 = libc::PROT_READ | libc::PROT_WRITE;
    let runtime = without_faults(&[4 * M2]);
    let mem = Mem::filled(M2, 1);
    let (at, len) = (mem.at, mem.len);
    let work = Work::begin(&runtime, 0, &[writes(at, len)], move |gpu| gpu_fill(gpu, at, len, 0, 2));
    protect(&runtime, at, len, BOTH);
    protect(&runtime, at + K64, K64, BOTH);
    work.end().unwrap();
    mem.check(2);
    let work = Work::begin(&runtime, 0, &[reads(at, len)], move |gpu| gpu_check(gpu, at, len, 0, 2));
    protect(&runtime, at, len, libc::PROT_READ);
    work.end().unwrap();
    protect(&runtime, at, len, BOTH);
    let work = Work::begin(&runtime, 0, &[writes(at, len)], move |gpu| gpu.store_u64(at, 0));
    protect(&runtime, at, len, libc::PROT_READ);
    assert!(matches!(work.end(), Err(Error::DeviceFault { .. })), "it wrote to what it may only read");
    protect(&runtime, at, len, BOTH);
    mem.check(2);
    // What is mapped anew in a part that was unmapped is nothing to the work.
    let work = Work::begin(&runtime, 0, &[writes(at, len)], move |gpu| use_the_rest(gpu, at, len, 2, 3));
    Change::Unmap.make(&mem, &mem);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: where nothing is mapped any more.
    let new = unsafe { libc::mmap(mem.ptr(CHANGED), K4 as usize, BOTH, flags, -1, 0) };
    assert_eq!(new, mem.ptr(CHANGED));
    // Until the unmapping is told the new mapping counts as what the work holds.
    runtime.barrier().unwrap();
    protect(&runtime, at + CHANGED, K4, libc::PROT_NONE);
    protect(&runtime, at + CHANGED, K4, libc::PROT_READ);
    work.end().unwrap();
    Change::Drop.check(&mem, None, 2, 3);
    let work = Work::begin(&runtime, 0, &[writes(at, CHANGED)], move |gpu| gpu.store_u64(at, 0));
    protect(&runtime, at, CHANGED, libc::PROT_READ);
    assert!(matches!(work.end(), Err(Error::DeviceFault { .. })), "as before");
}

#[test]
fn memory_that_is_to_stay_home_is_waited_for() {
    // What stays home does so for the life of the process, whatever is mapped there later.
    if !is_child("memory_that_is_to_stay_home_is_waited_for") {
        return;
    }
    let runtime = without_faults(&[4 * M2]);
    let mem = Mem::filled(M2, 1);
    let (at, len) = (mem.at, mem.len);
    let work = Work::begin(&runtime, 0, &[writes(at, len)], move |gpu| gpu_fill(gpu, at, len, 0, 2));
    std::thread::scope(|scope| {
        let kept = scope.spawn(|| runtime.keep_home(at + len - K4, K4));
        std::thread::sleep(Duration::from_millis(100));
        work.end().unwrap();
        kept.join().unwrap().unwrap();
    });
    assert_eq!(runtime.residence(at, len).unwrap().device, 0);
    mem.check(2);
}

/// A range that mprotect divided is cut anew when the work that holds it has ended.
#[test]
fn a_range_that_is_held_is_not_cut_anew() {
    let _alone = alone("not cut anew", 60);
    let runtime = without_faults(&[4 * M2, 4 * M2]);
    let mem = Mem::filled(M2, 1);
    let (at, len) = (mem.at, mem.len);
    protect(&runtime, at, len, libc::PROT_READ);
    let work = Work::begin(&runtime, 0, &[reads(at, len)], move |gpu| gpu_check(gpu, at, len, 0, 1));
    // Rights that are given need not be told.
    // SAFETY: the test's own memory, half of it as it was.
    let given = unsafe { libc::mprotect(mem.ptr(0), len as usize / 2, libc::PROT_READ | libc::PROT_WRITE) };
    assert_eq!(given, 0);
    let writer = runtime.launch_with(1, &[writes(at, K4)], move |gpu| gpu_fill(gpu, at, K4, 0, 2));
    std::thread::sleep(Duration::from_millis(50));
    work.end().unwrap();
    writer.wait(None).unwrap();
    mem.check_words(0, K4, |i| value(2, i));
    mem.check_words(K4, len - K4, |i| value(1, i));
}

/// Readers on two devices take no right from who writes.
#[test]
fn a_reader_elsewhere_takes_nothing_from_who_writes() {
    let _alone = alone("reader elsewhere", 60);
    let runtime = without_faults(&[M2, M2]);
    let mem = Mem::shared(M2);
    mem.fill(1);
    let (at, len) = (mem.at, mem.len);
    let begin = |device, access| runtime.begin_access(device, &[access]).unwrap();
    let brackets = [begin(0, writes(at, len)), begin(1, reads(at, len)), begin(0, reads(at, len))];
    runtime.launch(0, move |gpu| gpu_fill(gpu, at, len, 0, 2)).wait(None).unwrap();
    runtime.launch(1, move |gpu| gpu_check(gpu, at, len, 0, 2)).wait(None).unwrap();
    brackets.into_iter().for_each(|bracket| runtime.end_access(bracket).unwrap());
    mem.check(2);
}

/// For a driver whose device is the processor: what it uses is at home, and neither the processor nor a device waits for it.
#[test]
fn a_bracket_at_home_keeps_memory_there_and_nobody_waits() {
    let _alone = alone("a bracket at home", 60);
    let runtime = runtime(policy("gpusvm"), &[16 * M2]);
    let mem = Mem::filled(4 * M2, 1);
    let (at, len) = (mem.at, mem.len);
    let home = || runtime.attributes(at, len).unwrap().devices.iter().all(|(_, bytes)| *bytes == 0);
    to_device(&runtime, &mem, 2);
    assert!(!home());
    let [first, second] = [0, 1].map(|_| runtime.begin_access_at_home(0, &[writes(at, len)]).unwrap());
    assert!(home());
    mem.check(2);
    for seed in 3..6 {
        mem.fill(seed);
        on_gpu(&runtime, move |gpu| gpu_check(gpu, at, len, 0, seed)).unwrap();
        let pass = move |gpu: &mut Gpu<'_>| gpu_fill(gpu, at, len, 0, seed + 10);
        runtime.launch_with(0, &[writes(at, len)], pass).wait(None).unwrap();
        let _ = runtime.prefetch(at, len, Location::Device(0)).wait(None);
        assert!(home(), "round {seed}");
        mem.check(seed + 10);
    }
    runtime.end_access(first).unwrap();
    let _ = runtime.prefetch(at, len, Location::Device(0)).wait(None);
    assert!(home(), "one of two has ended");
    runtime.end_access(second).unwrap();
    to_device(&runtime, &mem, 7);
    assert!(!home(), "it goes where the policy says");
    mem.check(7);
    let empty = Access { len: 0, ..writes(at, 1) };
    assert!(matches!(runtime.begin_access_at_home(0, &[empty]), Err(Error::Invalid { .. })));
}

/// The processor never waits for a bracket at home, so that begins when those on the device have ended.
#[test]
fn a_bracket_at_home_waits_for_one_on_the_device() {
    let _alone = alone("a bracket at home, and one not", 60);
    for faults in [true, false] {
        let runtime = match faults {
            true => runtime(policy("gpusvm"), &[16 * M2]),
            false => without_faults(&[16 * M2]),
        };
        let mem = Mem::filled(2 * M2, 1);
        let (at, len) = (mem.at, mem.len);
        let there = runtime.begin_access(0, &[writes(at, len)]).unwrap();
        let at_home = std::thread::scope(|s| {
            let begins = s.spawn(|| runtime.begin_access_at_home(0, &[writes(at, len)]).unwrap());
            std::thread::sleep(Duration::from_millis(100));
            assert!(!begins.is_finished());
            on_gpu(&runtime, move |gpu| gpu_fill(gpu, at, len, 0, 2)).unwrap();
            runtime.end_access(there).unwrap();
            begins.join().unwrap()
        });
        mem.check(2);
        mem.fill(3);
        runtime.end_access(at_home).unwrap();
        mem.check(3);
    }
}

/// What the program changes of memory that work holds elsewhere in it.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Change {
    Drop,
    Unmap,
    Move,
}

const CHANGES: [Change; 3] = [Change::Drop, Change::Unmap, Change::Move];

/// The page that is changed, and how far from the start of its memory.
const CHANGED: u64 = 5 * K4;

impl Change {
    /// Changes one page of `mem`, and gives where its contents are now.
    fn make(self, mem: &Mem, elsewhere: &Mem) -> Option<u64> {
        let (page, len) = (mem.ptr(CHANGED), K4 as usize);
        match self {
            Change::Drop => {
                // SAFETY: the test's own memory, which nothing borrows.
                assert_eq!(unsafe { libc::madvise(page, len, libc::MADV_DONTNEED) }, 0);
                None
            }
            Change::Unmap => {
                // SAFETY: as above; nobody uses the page any more.
                assert_eq!(unsafe { libc::munmap(page, len) }, 0);
                None
            }
            Change::Move => {
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                let to = elsewhere.ptr(K64);
                // SAFETY: as above; what is replaced is the test's own, too.
                assert_eq!(unsafe { libc::mremap(page, len, len, flags, to) }, to);
                Some(to as u64)
            }
        }
    }

    /// Checks the changed page: its words were `before`, those of the rest are `after`, of which the program wrote nothing.
    fn check(self, mem: &Mem, moved: Option<u64>, before: u64, after: u64) {
        mem.check_words(0, CHANGED, |i| value(after, i));
        mem.check_words(CHANGED + K4, mem.len - CHANGED - K4, |i| value(after, i));
        if self == Change::Drop {
            mem.check_words(CHANGED, K4, |_| 0);
        }
        if let Some(to) = moved {
            for i in 0..K4 / 8 {
                // SAFETY: where the page was moved to.
                let got = unsafe { std::ptr::read_volatile((to + i * 8) as *const u64) };
                assert_eq!(got, value(before, CHANGED / 8 + i), "word {i} of the page that was moved");
            }
        }
    }
}

/// All of `[at, at + len)` but the changed page.
fn rest(at: u64, len: u64) -> [(u64, u64); 2] {
    [(at, CHANGED), (at + CHANGED + K4, len - CHANGED - K4)]
}

/// Writes all but the changed page, twice, so that what it wrote first is read by itself.
fn use_the_rest(gpu: &mut Gpu<'_>, at: u64, len: u64, before: u64, after: u64) -> usvm::Result<()> {
    rest(at, len).into_iter().try_for_each(|(from, len)| {
        gpu_check(gpu, from, len, (from - at) / 8, before)?;
        gpu_fill(gpu, from, len, (from - at) / 8, after)?;
        gpu_check(gpu, from, len, (from - at) / 8, after)
    })
}

/// The program changes a part that work does not use. What else of the same range it holds stays.
#[test]
fn work_keeps_what_it_holds_when_another_part_is_changed() {
    let _alone = alone("another part", 120);
    let runtime = without_faults(&[16 * M2]);
    for change in CHANGES {
        let (mem, elsewhere) = (Mem::filled(2 * M2, 1), Mem::small(M2));
        let (at, len) = (mem.at, mem.len);
        let work = Work::begin(&runtime, 0, &[writes(at, len)], move |gpu| use_the_rest(gpu, at, len, 1, 2));
        assert_eq!(runtime.residence(at, len).unwrap().device, len);
        let moved = change.make(&mem, &elsewhere);
        runtime.barrier().unwrap();
        assert!(runtime.residence(at, len).unwrap().device >= len - M2, "{change:?}");
        if change == Change::Drop {
            mem.check_words(CHANGED, K4, |_| 0);
        }
        work.end().unwrap_or_else(|e| panic!("{change:?}: {e}"));
        change.check(&mem, moved, 1, 2);
        // Afterwards all is as it was: it goes to the device again.
        for (from, len) in rest(at, len) {
            let pass = move |gpu: &mut Gpu<'_>| gpu_fill(gpu, from, len, (from - at) / 8, 3);
            runtime.launch_with(0, &[writes(from, len)], pass).wait(None).unwrap();
        }
        change.check(&mem, moved, 1, 3);
    }
}

/// As above, of what work reaches over the link.
#[test]
fn work_keeps_what_it_reaches_over_the_link_when_another_part_is_changed() {
    let _alone = alone("another part over the link", 120);
    let runtime = without_faults(&[16 * M2]);
    for change in CHANGES {
        let (mem, elsewhere) = (Mem::huge(2 * M2), Mem::small(M2));
        // What was on a device is watched.
        to_device(&runtime, &mem, 1);
        mem.check(1);
        let (at, len) = (mem.at, mem.len);
        let bracket = runtime.begin_access_at_home(0, &[writes(at, len)]).unwrap();
        let work = Work::begin(&runtime, 0, &[], move |gpu| use_the_rest(gpu, at, len, 1, 2));
        let moved = change.make(&mem, &elsewhere);
        runtime.barrier().unwrap();
        work.end().unwrap_or_else(|e| panic!("{change:?}: {e}"));
        runtime.end_access(bracket).unwrap();
        change.check(&mem, moved, 1, 2);
    }
}

/// As above, of a copy for reading.
#[test]
fn work_keeps_the_copy_it_reads_when_another_part_is_changed() {
    let _alone = alone("another part of a copy", 120);
    let runtime = without_faults_by(Config::default(), &[16 * M2]);
    for change in CHANGES {
        let (mem, elsewhere) = (Mem::filled(2 * M2, 1), Mem::small(M2));
        let (at, len) = (mem.at, mem.len);
        runtime.advise(at, len, Hint::ReadMostly(true)).unwrap();
        let read_rest = move |gpu: &mut Gpu<'_>, seed| {
            rest(at, len)
                .into_iter()
                .try_for_each(|(from, len)| gpu_check(gpu, from, len, (from - at) / 8, seed))
        };
        let work = Work::begin(&runtime, 0, &[reads(at, len)], move |gpu| read_rest(gpu, 1));
        assert_eq!(runtime.residence(at, len).unwrap().shared, len);
        let moved = change.make(&mem, &elsewhere);
        runtime.barrier().unwrap();
        work.end().unwrap_or_else(|e| panic!("{change:?}: {e}"));
        change.check(&mem, moved, 1, 1);
        // The next copy knows what changed.
        for (from, len) in rest(at, len) {
            let pass = move |gpu: &mut Gpu<'_>| gpu_check(gpu, from, len, (from - at) / 8, 1);
            runtime.launch_with(0, &[reads(from, len)], pass).wait(None).unwrap();
        }
        if change == Change::Drop {
            let word = at + CHANGED;
            let zero = move |gpu: &mut Gpu<'_>| {
                (gpu.load_u64(word)? == 0).then_some(()).ok_or(Error::Gone { addr: word })
            };
            runtime.launch_with(0, &[reads(at, len)], zero).wait(None).unwrap();
        }
    }
}

/// A launch inside a bracket, of whose memory a part was unmapped, uses the rest and waits for nobody.
#[test]
fn a_launch_inside_a_bracket_does_not_wait_for_its_end() {
    let _alone = alone("inside a bracket", 60);
    let runtime = without_faults(&[16 * M2]);
    for change in CHANGES {
        let (mem, elsewhere) = (Mem::filled(2 * M2, 1), Mem::small(M2));
        let (at, len) = (mem.at, mem.len);
        let bracket = runtime.begin_access(0, &[writes(at, len)]).unwrap();
        let moved = change.make(&mem, &elsewhere);
        let accesses = rest(at, len).map(|(at, len)| writes(at, len));
        let fence = runtime.launch_with(0, &accesses, move |gpu| use_the_rest(gpu, at, len, 1, 2));
        assert!(fence.wait(Some(Duration::from_secs(5))).unwrap(), "{change:?}");
        runtime.end_access(bracket).unwrap();
        change.check(&mem, moved, 1, 2);
    }
}

/// Launches begin and end while another thread changes a page beside what they use.
#[test]
fn no_launch_loses_anything_to_changes_beside_it() {
    let _alone = alone("changes beside it", 120);
    let runtime = without_faults(&[4 * M2]);
    const LAUNCHES: u64 = 4;
    for round in 0..90 {
        let change = CHANGES[round as usize % CHANGES.len()];
        let (mem, elsewhere) = (Mem::filled(M2, 1), Mem::small(M2));
        let (at, len, begun) = (mem.at, mem.len, AtomicBool::new(false));
        let moved = std::thread::scope(|scope| {
            let changing = scope.spawn(|| {
                while !begun.load(Relaxed) {
                    std::hint::spin_loop();
                }
                std::thread::sleep(Duration::from_micros(round * 100));
                change.make(&mem, &elsewhere)
            });
            for seed in 1..=LAUNCHES {
                let pass = move |gpu: &mut Gpu<'_>| use_the_rest(gpu, at, len, seed, seed + 1);
                let fence = runtime.launch_with(0, &rest(at, len).map(|(at, len)| writes(at, len)), pass);
                begun.store(true, Relaxed);
                fence.wait(None).unwrap_or_else(|e| panic!("{change:?}, launch {seed}: {e}"));
            }
            changing.join().unwrap()
        });
        change.check(&mem, moved, 1, LAUNCHES + 1);
    }
}
