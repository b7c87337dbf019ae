//! Children: of fork, of vfork, of a raw system call, with and without a runtime of their own.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use usvm::space::svm::PIN_PATIENCE;
use usvm_tests::area::*;
use usvm_tests::isolated::{Child, fork_child, isolated, kernel_faults, skipped};
use usvm_tests::support::writes;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

const LEN: u64 = 4 * M2;

/// Whether memory is as the copy says, without allocating much more than a page.
fn holds(piece: &Piece) -> bool {
    (0..piece.len()).step_by(K4 as usize).all(|off| {
        let page = cpu_read(piece.at + off, K4.min(piece.len() - off));
        page == piece.bytes[off as usize..off as usize + page.len()]
    })
}

/// Writes a byte of every third page in memory and copy.
fn scribble(piece: &mut Piece, value: u8) {
    for off in (0..piece.len()).step_by(3 * K4 as usize) {
        piece.bytes[off as usize + 9] = value;
        cpu_write(piece.at + off + 9, &[value]);
    }
}

fn both_sides(name: &'static str, raw: bool) {
    isolated(name, || {
        let rt = runtime(64 << 20);
        for huge in [false, true] {
            let (area, mut piece) = Area::filled(LEN, huge, &mut Rng::new(1));
            let (other, mut locked) = Area::filled(K64, false, &mut Rng::new(2));
            locked.change(&rt, "before");
            for round in 0..3u8 {
                piece.change(&rt, "before");
                let there = rt.residence(area.at, LEN).unwrap().device;
                assert_eq!(there, LEN, "round {round} huge {huge} {:?}", rt.host().stats());
                let child = fork_child(raw, || {
                    let mut mine = piece.clone();
                    let before = holds(&mine) && holds(&locked);
                    scribble(&mut mine, 0x11 + round);
                    before && holds(&mine)
                });
                // Announced, all comes home before; not announced, the child gets copies and nothing moves.
                let there = rt.residence(area.at, LEN).unwrap().device;
                assert_eq!(there, if raw { LEN } else { 0 }, "round {round} huge {huge}");
                scribble(&mut piece, 0x77 + round);
                child.good("its parent's memory, and its own writes");
                assert!(holds(&piece), "the parent does not see the child's writes");
                piece.check(&rt, "afterwards");
            }
            locked.check(&rt, "small, afterwards");
            drop((area, other));
        }
        rt.shutdown();
    });
}

#[test]
fn a_child_has_what_was_on_the_device() {
    both_sides("a_child_has_what_was_on_the_device", false);
}

#[test]
fn a_child_by_raw_clone_has_it_too() {
    if !kernel_faults() {
        return;
    }
    both_sides("a_child_by_raw_clone_has_it_too", true);
}

#[test]
fn fork_while_threads_use_the_device() {
    if !kernel_faults() {
        return;
    }
    isolated("fork_while_threads_use_the_device", || {
        let rt = runtime(16 << 20);
        let stop = Arc::new(AtomicBool::new(false));
        let rounds = Arc::new(AtomicU64::new(0));
        let workers: Vec<_> = (0..2u64)
            .map(|i| {
                let (rt, stop, rounds) = (rt.clone(), stop.clone(), rounds.clone());
                std::thread::spawn(move || {
                    let (area, mut piece) = Area::filled(3 * M2, i == 1, &mut Rng::new(10 + i));
                    while !stop.load(Ordering::Relaxed) {
                        piece.check(&rt, "a worker during forks");
                        rounds.fetch_add(1, Ordering::Relaxed);
                    }
                    drop(area);
                })
            })
            .collect();
        let (area, mut piece) = Area::filled(LEN, false, &mut Rng::new(3));
        for round in 0..30 {
            let raw = round % 3 == 2;
            piece.change(&rt, "before");
            let seen = rounds.load(Ordering::Relaxed);
            fork_child(raw, || {
                let mut mine = piece.clone();
                let before = holds(&mine);
                scribble(&mut mine, 9);
                before && holds(&mine)
            })
            .good(&format!("round {round}: a child forked from a busy process"));
            assert!(holds(&piece), "round {round}");
            if round % 5 == 0 {
                let waiting = Instant::now();
                while rounds.load(Ordering::Relaxed) == seen && !workers.iter().any(|w| w.is_finished()) {
                    assert!(waiting.elapsed() < Duration::from_secs(20), "workers stopped");
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        workers.into_iter().for_each(|w| w.join().unwrap());
        piece.check(&rt, "at the end");
        drop(area);
    });
}

/// Each fork ends the stillness that it began, also where several threads fork at one time.
#[test]
fn threads_that_fork_together_leave_devices_at_work() {
    isolated("threads_that_fork_together_leave_devices_at_work", || {
        let rt = runtime(64 << 20);
        let (area, mut piece) = Area::filled(LEN, false, &mut Rng::new(41));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..40).for_each(|_| fork_child(false, || true).good("one of many")));
            }
        });
        let begun = Instant::now();
        piece.change(&rt, "afterwards");
        assert!(begun.elapsed() < PIN_PATIENCE, "devices are held still");
        piece.check(&rt, "afterwards");
        drop(area);
        rt.shutdown();
    });
}

/// Forks once more, the first time.
extern "C" fn forks_too() {
    static DONE: AtomicBool = AtomicBool::new(false);
    if !DONE.swap(true, Ordering::Relaxed) {
        fork_child(false, || true).good("a child forked by a handler of fork");
    }
}

/// A handler of fork may fork, and then the stillness lasts until the outer one is over, and no longer.
#[test]
fn a_handler_of_fork_forks() {
    // SAFETY: gives a string that stays.
    let version = unsafe { std::ffi::CStr::from_ptr(libc::gnu_get_libc_version()) };
    let minor = version.to_str().ok().and_then(|v| v.strip_prefix("2.")).and_then(|v| v.parse().ok());
    if minor.is_none_or(|minor: u32| minor < 36) {
        return skipped("before glibc 2.36 a handler of fork that forks waits for itself");
    }
    isolated("a_handler_of_fork_forks", || {
        // Before usvm's own, so it runs after that.
        // SAFETY: a function of this program.
        assert_eq!(unsafe { libc::pthread_atfork(Some(forks_too), None, None) }, 0);
        let rt = runtime(64 << 20);
        let (area, mut piece) = Area::filled(LEN, false, &mut Rng::new(53));
        piece.change(&rt, "before");
        fork_child(false, || holds(&piece)).good("the outer child");
        piece.change(&rt, "afterwards");
        piece.check(&rt, "afterwards");
        let there = rt.residence(area.at, LEN).unwrap().device;
        assert_eq!(there, LEN, "devices are held still");
        drop(area);
        rt.shutdown();
    });
}

/// The child of a raw clone has the descriptor of its parent's userfaultfd: that this one closes it lets go of nothing.
#[test]
fn the_end_lets_go_of_what_the_kernel_registered_by_itself() {
    if !kernel_faults() {
        return;
    }
    isolated("the_end_lets_go_of_what_the_kernel_registered_by_itself", || {
        let rt = runtime(16 * M2);
        let (area, mut piece) = Area::filled(M2, false, &mut Rng::new(3));
        piece.change(&rt, "before");
        let child = fork_child(true, || {
            std::thread::sleep(Duration::from_secs(4));
            true
        });
        let room = map(None, 8 * M2, libc::PROT_NONE).unwrap();
        let grown = remap(area.at, M2, 4 * M2, 0, Some(room)).unwrap();
        rt.shutdown();
        let begun = Instant::now();
        (0..4 * M2).step_by(K4 as usize).for_each(|at| drop(cpu_read(grown + at, 1)));
        assert!(begun.elapsed() < Duration::from_secs(2), "it waited for the child's end");
        assert!(cpu_read(grown, M2) == piece.bytes);
        child.good("the child");
    });
}

/// What waits for device memory that somebody holds is not waited for.
#[test]
fn a_fork_does_not_stand_in_line_behind_prefetches() {
    isolated("a_fork_does_not_stand_in_line_behind_prefetches", || {
        let rt = runtime(2 * M2);
        let (held, _) = Area::filled(2 * M2, true, &mut Rng::new(3));
        let (other, _) = Area::filled(2 * M2, true, &mut Rng::new(4));
        let access = usvm::Access { addr: held.at, len: 2 * M2, access: usvm::GpuAccess::Write };
        let bracket = rt.begin_access(0, &[access]).unwrap();
        let fences: Vec<_> = (0..6).map(|_| rt.prefetch(other.at, M2, usvm::Location::Device(0))).collect();
        std::thread::sleep(Duration::from_millis(50));
        let begun = Instant::now();
        fork_child(false, || true).good("a child");
        assert!(begun.elapsed() < PIN_PATIENCE / 4, "it took {:?}", begun.elapsed());
        rt.end_access(bracket).unwrap();
        fences.iter().for_each(|fence| drop(fence.wait(None)));
        rt.shutdown();
    });
}

/// Descriptors of this process that are a userfaultfd.
fn userfaultfds() -> usize {
    let open = std::fs::read_dir("/proc/thread-self/fd").unwrap().flatten();
    open.filter(|fd| {
        std::fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().contains("userfaultfd"))
    })
    .count()
}

/// A child with the userfaultfd of its sibling would let that one wait for memory without end.
#[test]
fn no_child_has_the_descriptor_of_another() {
    isolated("no_child_has_the_descriptor_of_another", || {
        let rt = runtime(64 << 20);
        let (area, mut piece) = Area::filled(LEN, false, &mut Rng::new(43));
        piece.change(&rt, "before");
        for threads in [1, 3] {
            let strangers = AtomicU64::new(0);
            std::thread::scope(|scope| {
                for _ in 0..threads {
                    scope.spawn(|| {
                        for _ in 0..600 / threads {
                            let child = fork_child(false, || userfaultfds() == 0);
                            strangers.fetch_add(
                                u64::from(child.wait(Duration::from_secs(20)) != 0),
                                Ordering::Relaxed,
                            );
                        }
                    });
                }
                // The threads that read messages are not alone on their processors.
                let until = Instant::now() + Duration::from_millis(1500);
                for _ in 0..3 {
                    scope.spawn(move || while Instant::now() < until {});
                }
            });
            assert_eq!(strangers.into_inner(), 0, "of 600 children by {threads} threads");
        }
        drop(area);
        rt.shutdown();
    });
}

/// The kernel tells of a child by a descriptor, for which usvm keeps a number.
#[test]
fn a_fork_when_no_descriptor_is_free() {
    if !kernel_faults() {
        return;
    }
    isolated("a_fork_when_no_descriptor_is_free", || {
        let limit = libc::rlimit { rlim_cur: 256, rlim_max: 256 };
        // SAFETY: limits this process, which is the test's own.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
        let rt = runtime(64 << 20);
        let (area, mut piece) = Area::filled(LEN, false, &mut Rng::new(31));
        let mut taken = Vec::with_capacity(256);
        // SAFETY: takes descriptors and gives them back below.
        while let fd @ 0.. = unsafe { libc::dup(0) } {
            taken.push(fd);
        }
        for round in 0..6 {
            piece.change(&rt, "before");
            fork_child(round % 2 == 1, || holds(&piece)).good("a child without a free descriptor");
        }
        piece.check(&rt, "afterwards");
        // SAFETY: this test's own descriptors.
        taken.into_iter().for_each(|fd| assert_eq!(unsafe { libc::close(fd) }, 0));
        drop(area);
        rt.shutdown();
    });
}

/// A child of `_Fork` or of a clone by system call, where no handler of fork runs.
#[test]
fn a_child_that_no_handler_prepared_runs_its_own() {
    if !kernel_faults() {
        return;
    }
    isolated("a_child_that_no_handler_prepared_runs_its_own", || {
        let rt = runtime(64 << 20);
        let (area, mut piece) = Area::filled(LEN, false, &mut Rng::new(51));
        piece.change(&rt, "before");
        for _ in 0..3 {
            // Threads of the parent use what the child begins anew.
            let fences: Vec<_> =
                (0..8).map(|_| rt.prefetch(area.at, LEN, usvm::Location::Device(0))).collect();
            let child = fork_child(true, || {
                own_runtime(&mut piece.clone(), |piece| {
                    let grandchild = fork_child(true, || own_runtime(&mut piece.clone(), |_| true));
                    grandchild.wait(Duration::from_secs(20)) == 0
                })
            });
            piece.check(&rt, "the parent meanwhile");
            child.good("a child with a runtime and a child");
            fences.iter().for_each(|fence| drop(fence.wait(None)));
        }
        piece.check(&rt, "the parent afterwards");
        // With other threads there somebody could be using what it would forget.
        let child = fork_child(true, || {
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                });
                let refused = usvm::Runtime::start(usvm::Config::default()).map(drop);
                stop.store(true, Ordering::Relaxed);
                matches!(refused, Err(usvm::Error::NotSupported(why)) if why.contains("first other thread"))
            })
        });
        child.good("a child with threads, which is told what to do");
        drop(area);
        rt.shutdown();
    });
}

/// A child has no thread that would answer, and is told so instead of waiting.
#[test]
fn a_child_with_its_parents_handle_waits_for_nobody() {
    if !kernel_faults() {
        return;
    }
    isolated("a_child_with_its_parents_handle_waits_for_nobody", || {
        let rt = runtime(64 << 20);
        let (area, mut piece) = Area::filled(LEN, false, &mut Rng::new(52));
        piece.change(&rt, "before");
        let refused = |result: usvm::Result<()>| matches!(result, Err(usvm::Error::NotRunning(_)));
        for raw in [false, true] {
            let mut bracket = Some(rt.begin_access(0, &[writes(area.at, LEN)]).unwrap());
            fork_child(raw, || {
                refused(rt.evict(area.at, LEN))
                    && refused(rt.keep_home(area.at, K4))
                    && refused(rt.defer(|_| Ok(())).wait(None).map(drop))
                    && refused(rt.begin_access(0, &[writes(area.at, LEN)]).map(drop))
                    && bracket.take().is_some_and(|bracket| refused(rt.end_access(bracket)))
            })
            .good("calls to the parent's runtime");
            // Its handlers ask the parent's runtime for nothing either.
            fork_child(raw, || fork_child(false, || true).wait(Duration::from_secs(20)) == 0)
                .good("a fork in a child");
            fork_child(raw, || {
                rt.shutdown();
                true
            })
            .good("an end in a child");
            rt.end_access(bracket.unwrap()).unwrap();
        }
        piece.check(&rt, "the parent afterwards");
        drop(area);
    });
}

/// Running work holds its memory where it is: the fork does not wait for it, the child has the memory all the same, and what
/// the device writes afterwards is not lost.
#[test]
fn a_child_has_what_running_work_holds() {
    if !kernel_faults() {
        return;
    }
    isolated("a_child_has_what_running_work_holds", || {
        let rt = runtime(64 << 20);
        for (raw, huge) in [(false, false), (false, true), (true, false), (true, true)] {
            let (area, mut piece) = Area::filled(LEN, huge, &mut Rng::new(21));
            let (other, mut free) = Area::filled(LEN, huge, &mut Rng::new(22));
            piece.change(&rt, "before");
            free.change(&rt, "before");
            let bracket = rt.begin_access(0, &[writes(area.at, LEN)]).unwrap();
            let begun = Instant::now();
            fork_child(raw, || holds(&piece) && holds(&free)).good("memory that running work holds");
            assert!(begun.elapsed() < PIN_PATIENCE, "the fork waited for the work to end");
            device_xor(&rt, area.at, LEN, 0x5a).unwrap();
            xor(&mut piece.bytes, 0x5a);
            rt.end_access(bracket).unwrap();
            assert!(holds(&piece), "raw {raw} huge {huge}: what the device wrote after the fork");
            free.check(&rt, "afterwards");
            drop((area, other));
        }
        rt.shutdown();
    });
}

/// In a child: a runtime of its own, and `then`.
fn own_runtime(piece: &mut Piece, then: impl FnOnce(&mut Piece) -> bool) -> bool {
    let rt = runtime(32 << 20);
    piece.check(&rt, "in a child with its own runtime");
    let on_device = rt.residence(piece.at, piece.len()).unwrap().device > 0;
    let went_on = then(piece);
    piece.check(&rt, "in a child, after its own children");
    rt.shutdown();
    on_device && went_on && holds(piece)
}

#[test]
fn children_run_their_own_and_have_children() {
    isolated("children_run_their_own_and_have_children", || {
        let rt = runtime(64 << 20);
        let (area, mut piece) = Area::filled(LEN, false, &mut Rng::new(4));
        piece.change(&rt, "before");
        let child = fork_child(false, || {
            own_runtime(&mut piece.clone(), |piece| {
                let grandchild: Child = fork_child(false, || own_runtime(&mut piece.clone(), |_| true));
                grandchild.wait(Duration::from_secs(20)) == 0
            })
        });
        piece.check(&rt, "the parent meanwhile");
        child.good("a child with a runtime and a child");
        piece.check(&rt, "the parent afterwards");
        // Its own handle is of no use to a child, and says so.
        fork_child(false, || {
            let err = rt.launch(0, |_| Ok(())).wait(None);
            err.is_err() && rt.evict(piece.at, K4).is_err() && holds(&piece)
        })
        .good("a child with its parent's handle");
        drop(area);
    });
}

#[test]
fn spawned_programs_leave_the_device_alone() {
    if !kernel_faults() {
        return;
    }
    isolated("spawned_programs_leave_the_device_alone", || {
        let rt = runtime(64 << 20);
        let (area, mut piece) = Area::filled(LEN, false, &mut Rng::new(5));
        piece.change(&rt, "before");
        for _ in 0..5 {
            assert!(Command::new("/bin/true").status().unwrap().success());
        }
        let device = rt.residence(area.at, LEN).unwrap().device;
        assert_eq!(device, LEN, "posix_spawn needs nothing brought home");
        // Arguments that are on the device: the kernel reads them on behalf of the child.
        let words = Area::new(K64);
        let text = b"/bin/sh\0-c\0test \"$0\" = argument\0argument\0";
        cpu_write(words.at, text);
        let starts: Vec<u64> = [0usize, 8, 11, 32].iter().map(|o| words.at + *o as u64).chain([0]).collect();
        for (i, start) in starts.iter().enumerate() {
            cpu_write(words.at + K4 + i as u64 * 8, &start.to_le_bytes());
        }
        device_xor(&rt, words.at, K64, 0).unwrap();
        assert_eq!(rt.residence(words.at, K64).unwrap().device, K64);
        let mut pid = 0;
        // SAFETY: path, arguments and environment are terminated as they must be.
        let failed = unsafe {
            libc::posix_spawn(
                &mut pid,
                c"/bin/sh".as_ptr(),
                std::ptr::null(),
                std::ptr::null(),
                (words.at + K4) as *const *mut libc::c_char,
                [std::ptr::null_mut()].as_ptr(),
            )
        };
        assert_eq!(failed, 0);
        let mut status = 0;
        // SAFETY: our own child.
        assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
        assert_eq!(status, 0, "the program got its arguments");
        piece.check(&rt, "afterwards");
        drop((area, words));
    });
}

#[test]
fn a_vforked_child_sees_the_device() {
    isolated("a_vforked_child_sees_the_device", || {
        extern "C" fn body(piece: *mut libc::c_void) -> libc::c_int {
            // SAFETY: the parent's piece; the parent sleeps until this ends.
            let piece = unsafe { &mut *piece.cast::<Piece>() };
            let (mut at, mut off) = (piece.at, 0);
            while off < piece.bytes.len() {
                if cpu_peek(at) != piece.bytes[off] {
                    return 1;
                }
                cpu_write(at, &[0xee]);
                piece.bytes[off] = 0xee;
                at += 5 * K4;
                off += 5 * K4 as usize;
            }
            0
        }
        let rt = runtime(64 << 20);
        let (area, mut piece) = Area::filled(LEN, false, &mut Rng::new(6));
        for round in 0..3 {
            piece.change(&rt, "before");
            let mut stack = vec![0u8; 64 << 10];
            let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
            // SAFETY: as vfork, on a stack of its own; `piece` outlives the call.
            let pid = unsafe {
                let top = stack.as_mut_ptr().add(stack.len() & !15);
                libc::clone(body, top.cast(), flags, (&raw mut piece).cast())
            };
            assert!(pid > 0);
            let mut status = 0;
            // SAFETY: our own child.
            assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
            assert_eq!(status, 0, "round {round}");
            piece.check(&rt, "what the vforked child wrote");
        }
        drop(area);
    });
}

#[test]
fn pages_shared_with_a_living_child_are_its_own() {
    isolated("pages_shared_with_a_living_child_are_its_own", || {
        let rt = runtime(64 << 20);
        for raw in [false, true] {
            let (area, mut piece) = Area::filled(LEN, !raw, &mut Rng::new(7));
            let mut pipe = [0; 2];
            // SAFETY: two descriptors for two integers.
            assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
            let child = fork_child(raw, || {
                let mut go = [0u8];
                // SAFETY: reads one byte into a live array.
                let got = unsafe { libc::read(pipe[0], go.as_mut_ptr().cast(), 1) };
                got == 1 && holds(&piece)
            });
            let mut mine = piece.clone();
            for _ in 0..3 {
                mine.check(&rt, "shared with a child");
            }
            let moved = rt.residence(area.at, LEN).unwrap().device;
            assert_eq!(moved, LEN, "copy-on-write was broken and the memory migrated");
            // SAFETY: writes one byte of a live string.
            assert_eq!(unsafe { libc::write(pipe[1], c"g".as_ptr().cast(), 1) }, 1);
            child.good("a child whose parent used the device meanwhile");
            mine.check(&rt, "afterwards");
            piece.bytes.clear();
            drop(area);
        }
    });
}

/// The mappings of `[at, at + len)` that a child does not have are not there, the others are as `piece` says, or zero.
fn child_has(piece: &Piece, advice: i32, advised: std::ops::Range<u64>) -> bool {
    (0..piece.len()).step_by(K4 as usize).all(|off| {
        let mut there = 0u8;
        // SAFETY: asks about one page; the answer is one byte.
        let known = unsafe { libc::mincore((piece.at + off) as *mut _, K4 as usize, &mut there) } == 0;
        match advised.contains(&off) {
            true if advice == libc::MADV_DONTFORK => !known,
            true => known && cpu_read(piece.at + off, K4).iter().all(|b| *b == 0),
            false => known && cpu_read(piece.at + off, K4) == piece.bytes[off as usize..(off + K4) as usize],
        }
    })
}

fn advised_memory(name: &'static str, raw: bool) {
    isolated(name, || {
        let rt = runtime(64 << 20);
        for advice in [libc::MADV_WIPEONFORK, libc::MADV_DONTFORK] {
            for part in [0..2 * M2, 5 * K4..17 * K4, M2 - K4..M2 + 3 * K4] {
                for away in [true, false] {
                    let (area, mut piece) = Area::filled(2 * M2, false, &mut Rng::new(8));
                    piece.change(&rt, "before");
                    if !away {
                        rt.evict(area.at, area.len).unwrap();
                    }
                    advise(area.at + part.start, part.end - part.start, advice).unwrap();
                    let there = rt.residence(area.at, area.len).unwrap().device;
                    assert_eq!(there, if away { area.len } else { 0 });
                    let what = format!("advice {advice} for {part:?}, on the device: {away}");
                    fork_child(raw, || child_has(&piece, advice, part.clone())).good(&what);
                    assert!(holds(&piece), "{what}: the parent has it all");
                    piece.check(&rt, &what);
                    drop(area);
                }
            }
        }
    });
}

#[test]
fn what_a_fork_wipes_or_leaves_out_is_so() {
    advised_memory("what_a_fork_wipes_or_leaves_out_is_so", false);
}

#[test]
fn what_a_raw_clone_wipes_or_leaves_out_is_so() {
    if !kernel_faults() {
        return;
    }
    advised_memory("what_a_raw_clone_wipes_or_leaves_out_is_so", true);
}

/// A child that changes its mappings at once is followed by whoever fills them.
#[test]
fn a_raw_child_that_unmaps_drops_and_moves_gets_the_rest() {
    if !kernel_faults() {
        return;
    }
    isolated("a_raw_child_that_unmaps_drops_and_moves_gets_the_rest", || {
        let rt = runtime(64 << 20);
        // Many ranges before and after, so that the child is there while they are filled.
        let (area, mut piece) = Area::filled(32 * M2, false, &mut Rng::new(9));
        let elsewhere = Area::new(M2);
        for round in 0..6 {
            piece.change(&rt, "before");
            fork_child(true, || {
                let at = |m: u64| piece.at + m * M2;
                let wanted = |m: u64| &piece.bytes[(m * M2) as usize..((m + 1) * M2) as usize];
                unmap(at(29), M2);
                advise(at(30), M2, libc::MADV_DONTNEED).unwrap();
                remap(at(31), M2, M2, 0, Some(elsewhere.at)).unwrap();
                cpu_read(elsewhere.at, M2) == wanted(31)
                    && cpu_read(at(30), M2).iter().all(|b| *b == 0)
                    && (0..29).all(|m| cpu_read(at(m), M2) == wanted(m))
            })
            .good(&format!("round {round}"));
        }
        piece.check(&rt, "afterwards");
        drop((area, elsewhere));
    });
}

#[test]
fn what_a_raw_child_cannot_have_is_sigbus_not_zeroes() {
    use usvm::ground::inject::{self, Call};
    if !kernel_faults() {
        return;
    }
    isolated("what_a_raw_child_cannot_have_is_sigbus_not_zeroes", || {
        let rt = runtime(64 << 20);
        let (area, mut piece) = Area::filled(M2, false, &mut Rng::new(10));
        for touched in [0, M2 - K4] {
            piece.change(&rt, "before");
            assert_eq!(rt.residence(area.at, area.len).unwrap().device, M2);
            inject::plan(Call::Copy, libc::ENOMEM, 0, 1, 0);
            let code = fork_child(true, || cpu_peek(area.at + touched) == 1).wait(Duration::from_secs(20));
            let failed = inject::hits(Call::Copy);
            inject::clear();
            assert!(failed > 0);
            assert_eq!(code, -libc::SIGBUS, "touched {touched:#x}");
            piece.check(&rt, "the parent's");
        }
        drop(area);
    });
}
