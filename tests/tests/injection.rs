//! Every system call that usvm makes fails on purpose: an error or a fallback, never a hang, never lost data.
//!
//! Whoever finds another word than the scenario's model allows panics there; [`alone`] ends a hang.

use std::time::{Duration, Instant};

use usvm::ground::inject::{self, Call};
use usvm::host::Options;
use usvm::{Config, Error};
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
        Call::ProcmapQuery | Call::PagemapScan => &[libc::ENOTTY, libc::ENOMEM, libc::EFAULT],
        _ => &[libc::ENOMEM, libc::EAGAIN],
    }
}

/// All plans for some of the calls.
fn all(calls: &[Call], options: Options) {
    for &call in calls {
        let mut hits = 0;
        for &errno in errnos(call) {
            hits += PLANS.iter().map(|plan| while_running(call, errno, *plan, options)).sum::<u64>();
        }
        println!("{call:?}: {hits} failures");
    }
}

fn usual() -> Options {
    Options { prepared: 1, ..Options::default() }
}

#[test]
fn pages_do_not_move() {
    all(&[Call::Move, Call::Copy, Call::Zeropage], usual());
}

#[test]
fn pages_do_not_move_the_old_way() {
    let options = Options { forbid: usvm::host::features::Features::MOVE, ..usual() };
    all(&[Call::Mremap, Call::Copy], options);
}

#[test]
fn memory_is_not_registered() {
    all(&[Call::Register, Call::Unregister, Call::WriteProtect, Call::Wake], usual());
}

#[test]
fn the_kernel_says_nothing_about_pages() {
    all(&[Call::PagemapScan, Call::PagemapRead, Call::ProcmapQuery, Call::Open], usual());
}

#[test]
fn there_is_no_address_space() {
    all(&[Call::Mmap, Call::Munmap, Call::Mprotect, Call::Madvise], usual());
}

#[test]
fn messages_are_not_read() {
    all(&[Call::Read, Call::Write, Call::Poll, Call::Futex], usual());
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
    ];
    let rest: Vec<Call> = Call::ALL.iter().copied().filter(|c| !covered.contains(c)).collect();
    for call in rest {
        while_running(call, libc::ENOMEM, [0, 1, 0], usual());
    }
}

/// At the start each call fails once, and for ever: a runtime or an error, in bounded time.
#[test]
fn starting() {
    for &call in Call::ALL {
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
