//! Every system call that usvm makes fails on purpose: an error or a fallback, never a hang, never lost data.
//!
//! Whoever finds another word than the scenario's model allows panics there; [`alone`] ends a hang.

use std::time::{Duration, Instant};

use usvm::ground::inject::{self, Call};
use usvm::host::Options;
use usvm::host::features::Features;
use usvm::{Config, Error};
use usvm_tests::isolated::skipped;
use usvm_tests::scenario::{Scenario, VRAM};
use usvm_tests::support::*;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

/// How calls fail: how many first go well, one in how many fails, how many fail in all (0: for ever).
const PLANS: [[u16; 3]; 3] = [[0, 1, 1], [3, 5, 40], [2, 1, 30]];

/// Plays the scenario on a runtime that has started, while `call` fails.
fn while_running(call: Call, errno: i32, [skip, every, count]: [u16; 3], options: Options) -> u64 {
    let what = format!("{call:?} fails with errno {errno}, plan {skip}/{every}/{count}");
    let _alone = alone(&what, 30);
    let runtime = runtime_with(Config::default(), options, &[VRAM]).unwrap();
    let mut scenario = Scenario::new(3);
    // A fork copies the failures into the child, where nothing may fail: that it checks what it sees is another test's.
    scenario.fork = false;
    inject::plan(call, errno, skip, every, count);
    scenario.play(&runtime);
    let hits = inject::hits(call);
    inject::clear();
    let errors = std::mem::take(&mut scenario.errors);
    // It goes on as if nothing had been.
    scenario.fork = true;
    scenario.play(&runtime);
    assert!(scenario.errors.is_empty(), "{what}: afterwards: {:?}; before: {errors:?}", scenario.errors);
    runtime.shutdown();
    scenario.check_all();
    for e in errors {
        assert!(!matches!(e, Error::NotRunning(_)), "{what}: usvm gave up: {e}");
    }
    hits
}

fn errnos(call: Call) -> &'static [i32] {
    match call {
        Call::Move | Call::Copy => &[libc::EAGAIN, libc::ENOMEM, libc::EBUSY, libc::EINVAL],
        Call::Register => &[libc::ENOMEM, libc::EBUSY, libc::EINVAL],
        Call::Wake | Call::Poll | Call::Read | Call::Futex => &[libc::EINTR, libc::EAGAIN],
        Call::ProcessVm => &[libc::EFAULT, libc::ENOMEM, libc::EPERM],
        Call::MemoryRead => &[libc::EIO, libc::ENOMEM, libc::EPERM],
        Call::ProcmapQuery | Call::PagemapScan => &[libc::ENOTTY, libc::ENOMEM, libc::EFAULT],
        _ => &[libc::ENOMEM, libc::EAGAIN],
    }
}

/// Made only while a runtime starts or ends: [`starting`] makes them fail.
const AT_THE_START: [Call; 1] = [Call::Open];

/// All plans for some of the calls.
fn all(calls: &[Call], options: Options) {
    for &call in calls {
        let mut hits = 0;
        for &errno in errnos(call) {
            hits += PLANS.iter().map(|plan| while_running(call, errno, *plan, options)).sum::<u64>();
        }
        println!("{call:?}: {hits} failures");
        assert!(hits > 0 || AT_THE_START.contains(&call), "{call:?} is not made here: nothing failed");
    }
}

fn without(forbid: Features) -> Options {
    Options { forbid, ..usual() }
}

fn usual() -> Options {
    Options { prepared: 1, ..Options::default() }
}

#[test]
fn pages_do_not_move() {
    all(&[Call::Move, Call::Zeropage], usual());
}

#[test]
fn pages_do_not_move_the_old_way() {
    all(&[Call::Mremap, Call::Copy], without(Features::MOVE));
}

#[test]
fn memory_is_not_registered() {
    all(&[Call::Register, Call::Unregister, Call::Wake], usual());
    all(&[Call::WriteProtect], without(Features::PAGEMAP_SCAN));
}

#[test]
fn the_kernel_says_nothing_about_pages() {
    all(&[Call::PagemapScan, Call::ProcmapQuery, Call::Open], usual());
    all(&[Call::PagemapRead, Call::Seek], without(Features::PAGEMAP_SCAN | Features::PROCMAP_QUERY));
}

#[test]
fn there_is_no_address_space() {
    all(&[Call::Mmap, Call::Munmap, Call::Mprotect, Call::Madvise], usual());
}

#[test]
fn messages_are_not_read() {
    all(&[Call::Read, Call::Poll, Call::Futex], usual());
}

#[test]
fn memory_is_not_reached_over_the_link() {
    all(&[Call::ProcessVm], usual());
}

#[test]
fn memory_at_home_is_not_read() {
    all(&[Call::MemoryRead], usual());
}

#[test]
fn everything_else() {
    let covered = [
        Call::Move,
        Call::Copy,
        Call::Zeropage,
        Call::Mremap,
        Call::Register,
        Call::Unregister,
        Call::WriteProtect,
        Call::Wake,
        Call::PagemapScan,
        Call::PagemapRead,
        Call::ProcmapQuery,
        Call::Open,
        Call::Mmap,
        Call::Munmap,
        Call::Mprotect,
        Call::Madvise,
        Call::Read,
        Call::Write,
        Call::Poll,
        Call::Futex,
        Call::ProcessVm,
        Call::MemoryRead,
    ];
    let rest: Vec<Call> = Call::ALL.iter().copied().filter(|c| !covered.contains(c)).collect();
    for call in rest.into_iter().filter(|call| *call != Call::HeapMemory) {
        while_running(call, libc::ENOMEM, [0, 1, 0], usual());
    }
}

/// Holds more and more blocks of usvm's own heap, until it has had to grow.
fn make_the_heap_grow() {
    let block = |n: u32| {
        let mut block = Vec::with_capacity(1 << 20);
        block.push(n as u8);
        block
    };
    let before = inject::calls(Call::HeapMemory);
    let mut blocks: Vec<Vec<u8>> = Vec::new();
    while inject::calls(Call::HeapMemory) == before {
        let len = blocks.len() as u32;
        usvm::ground::alloc::internal(|| blocks.extend((len..len + 64).map(block)));
    }
    assert!(blocks.iter().zip(0u32..).all(|(block, n)| block[0] == n as u8));
    usvm::ground::alloc::internal(|| drop(blocks));
}

/// usvm's own heap is Rust's to the end: without memory it aborts. But it asks for less before.
#[test]
fn the_heap_grows_in_smaller_steps() {
    for [skip, every, count] in [[0, 1, 1], [0, 2, 0]] {
        let _alone = alone(&format!("the heap does not grow, plan {skip}/{every}/{count}"), 30);
        let runtime = runtime_with(Config::default(), usual(), &[VRAM]).unwrap();
        inject::plan(Call::HeapMemory, libc::ENOMEM, skip, every, count);
        // A growth of as much again is refused, and what is needed is granted.
        make_the_heap_grow();
        let hits = inject::hits(Call::HeapMemory);
        inject::clear();
        assert!(hits > 0, "plan {skip}/{every}/{count}");
        let mut scenario = Scenario::new(4);
        scenario.play(&runtime);
        assert!(scenario.errors.is_empty(), "{:?}", scenario.errors);
    }
}

/// What no start and no scenario of this file calls, and where it is made to fail instead.
const ELSEWHERE: [(Call, &str); 1] = [(
    Call::Poison,
    "only for data that is lost: host/tests/injection.rs, poison_and_zero_outlast_unread_events",
)];

/// Every call of the list is really made: a failure of it is not planned in vain.
#[test]
fn every_call_is_made() {
    let _alone = alone("every call is made", 60);
    let mut made = vec![0; Call::ALL.len()];
    let ways = [Features::empty(), Features::MOVE, Features::PAGEMAP_SCAN | Features::PROCMAP_QUERY];
    for (n, forbid) in ways.into_iter().enumerate() {
        Call::ALL.iter().for_each(|call| inject::count(*call));
        let trace = std::env::temp_dir().join(format!("usvm-injection-{}-{n}.json", std::process::id()));
        let mut config = Config::default();
        config.trace = Some(trace.to_str().unwrap().into());
        let runtime = runtime_with(config, Options { forbid, ..usual() }, &[VRAM]).unwrap();
        let mut scenario = Scenario::new(5);
        scenario.play(&runtime);
        // What the start has opened of the heap can be enough for a scenario.
        make_the_heap_grow();
        // The first way of opening that is refused leads to the next.
        inject::plan(Call::UffdDevice, libc::EACCES, 0, 1, 0);
        let _ = usvm::host::Host::open(&usual());
        runtime.shutdown();
        drop(runtime);
        std::fs::remove_file(trace).unwrap();
        made.iter_mut().zip(Call::ALL).for_each(|(made, call)| *made += inject::calls(*call));
        inject::clear();
    }
    for (call, made) in Call::ALL.iter().zip(made) {
        let elsewhere = ELSEWHERE.iter().find(|(c, _)| c == call);
        assert!(made > 0 || elsewhere.is_some(), "{call:?} was never made");
        if let Some((_, why)) = elsewhere {
            println!("{call:?} was made {made} times: {why}");
        }
    }
}

#[test]
fn locked_arenas() {
    let _alone = alone("locked arenas", 60);
    // SAFETY: locks what is mapped from now on; of this process only, which is done after this.
    if unsafe { libc::mlockall(libc::MCL_FUTURE) } != 0 {
        skipped(format_args!("memory may not be locked: {}", std::io::Error::last_os_error()));
        return;
    }
    inject::plan(Call::Munlock, libc::EPERM, 0, 1, 0);
    let runtime = runtime_with(Config::default(), usual(), &[VRAM]).unwrap();
    let mut scenario = Scenario::new(6);
    scenario.play(&runtime);
    let hits = inject::hits(Call::Munlock);
    inject::clear();
    // SAFETY: as it was.
    unsafe { libc::munlockall() };
    scenario.play(&runtime);
    assert!(hits > 0);
}

/// At the start each call fails once, and for ever: a runtime or an error, in bounded time.
#[test]
fn starting() {
    for &call in Call::ALL.iter().filter(|call| **call != Call::HeapMemory) {
        for [skip, every, count] in [[0, 1, 1], [1, 1, 1], [0, 1, 0]] {
            for errno in [libc::EPERM, libc::ENOMEM] {
                let what =
                    format!("at the start {call:?} fails with errno {errno}, plan {skip}/{every}/{count}");
                let _alone = alone(&what, 20);
                let began = Instant::now();
                inject::plan(call, errno, skip, every, count);
                let started = runtime_with(Config::default(), usual(), &[VRAM]);
                inject::clear();
                assert!(began.elapsed() < Duration::from_secs(10), "{what}");
                match started {
                    Err(e) => assert!(!e.to_string().is_empty()),
                    Ok(runtime) => {
                        let mem = Mem::filled(M2, 1);
                        let (at, len) = (mem.at, mem.len);
                        on_gpu(&runtime, move |gpu| gpu_fill(gpu, at, len, 0, 2))
                            .unwrap_or_else(|e| panic!("{what}: {e}"));
                        mem.check(2);
                    }
                }
            }
        }
    }
}

/// From some moment on no page moves any more: what is away comes home by copies, what is home is used over the link.
#[test]
fn pages_never_move_again() {
    for errno in [libc::EBUSY, libc::EINVAL] {
        assert!(while_running(Call::Move, errno, [60, 1, 0], usual()) > 0);
    }
}
