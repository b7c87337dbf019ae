//! Memory that work holds, and who else wants it meanwhile.

use std::time::Duration;

use usvm::device::sim::Gpu;
use usvm::{Builder, Config, Runtime};
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
