//! Everything works, byte for byte the same, where the kernel offers less.

use std::sync::OnceLock;

use usvm::Config;
use usvm::host::Options;
use usvm::host::features::Features;
use usvm_tests::scenario::{Scenario, VRAM};
use usvm_tests::support::*;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

fn without(forbid: Features) -> Options {
    Options { forbid, prepared: 1, ..Options::default() }
}

/// Plays the scenario under all policies and gives the contents' sums.
fn play(name: &str, options: Options) -> Vec<u64> {
    ["adaptive", "gpusvm"]
        .map(|policy_name| {
            let runtime = runtime_with(policy(policy_name), options, &[VRAM]).unwrap();
            let has = runtime.host().report().has;
            assert!(!has.intersects(options.forbid), "{name}: {has:?} is used although forbidden");
            let mut scenario = Scenario::new(5);
            scenario.play(&runtime);
            assert!(scenario.errors.is_empty(), "{name}, {policy_name}: {:?}", scenario.errors);
            let stats = runtime.stats();
            assert!(stats.migrations_2m > 0 && stats.evictions > 0, "{name}: nothing moved\n{stats}");
            if options.forbid.contains(Features::MOVE) {
                assert!(stats.flip_fallbacks > 0, "{name}: no fallback was taken\n{stats}");
            }
            runtime.shutdown();
            scenario.check_all();
            scenario.sum()
        })
        .into()
}

fn same_as_with_everything(name: &str, options: Options) {
    static EVERYTHING: OnceLock<Vec<u64>> = OnceLock::new();
    let _alone = alone(name, 60);
    let want =
        EVERYTHING.get_or_init(|| play("with everything", Options { prepared: 1, ..Options::default() }));
    assert_eq!(&play(name, options), want, "{name}");
}

macro_rules! fallbacks {
    ($($name:ident: $forbid:expr;)*) => {$(
        #[test]
        fn $name() {
            same_as_with_everything(stringify!($name), without($forbid));
        }
    )*};
}

fallbacks! {
    everything: Features::empty();
    no_move: Features::MOVE;
    no_moving_of_zero_pages: Features::MOVE_ZERO_PAGES;
    no_asynchronous_write_protection: Features::WP_ASYNC;
    no_write_protection: Features::WP | Features::WP_ASYNC | Features::WP_UNPOPULATED;
    no_pagemap_scan: Features::PAGEMAP_SCAN;
    no_procmap_query: Features::PROCMAP_QUERY;
    no_poison: Features::POISON;
    no_fork_event: Features::EVENT_FORK;
    no_scan_no_query: Features::PAGEMAP_SCAN | Features::PROCMAP_QUERY;
    no_move_no_scan: Features::MOVE | Features::PAGEMAP_SCAN;
    linux_6_6: Features::MOVE | Features::MOVE_ZERO_PAGES | Features::WP_ASYNC | Features::PAGEMAP_SCAN | Features::PROCMAP_QUERY;
    linux_6_1: Features::MOVE | Features::MOVE_ZERO_PAGES | Features::WP_ASYNC | Features::WP_UNPOPULATED
        | Features::PAGEMAP_SCAN | Features::PROCMAP_QUERY | Features::POISON;
}

#[test]
fn only_one_small_arena_at_a_time() {
    same_as_with_everything(
        "small arenas",
        Options { arena_max: 2 << 20, prepared: 0, ..Options::default() },
    );
}

#[test]
fn user_mode_faults_only() {
    let options = Options { user_mode_only: true, prepared: 1, ..Options::default() };
    same_as_with_everything("user mode only", options);
}

#[test]
fn user_mode_faults_only_and_little_else() {
    let options = Options { user_mode_only: true, ..without(Features::MOVE | Features::PAGEMAP_SCAN) };
    same_as_with_everything("user mode only, no move", options);
}

#[test]
fn user_mode_only_system_calls_say_efault_and_lose_nothing() {
    let _alone = alone("user mode only, system calls", 60);
    let options = Options { user_mode_only: true, prepared: 1, ..Options::default() };
    let runtime = runtime_with(Config::default(), options, &[VRAM]).unwrap();
    let mem = Mem::filled(M2, 1);
    to_device(&runtime, &mem, 2);
    let (_reader, writer) = std::io::pipe().unwrap();
    let write = || {
        // SAFETY: reads inside the mapping.
        let n = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&writer), mem.ptr(K4), 4096) };
        (n, std::io::Error::last_os_error().raw_os_error())
    };
    assert_eq!(write(), (-1, Some(libc::EFAULT)), "a system call finds nothing there, and says so");
    mem.check_words(K4, 8, |i| value(2, i));
    assert_eq!(write().0, 4096, "after a touch from user mode it works");
    mem.check(2);
}
