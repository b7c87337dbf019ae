//! Little host memory: retained pages are given back, data stays right.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use usvm::{Config, Runtime};
use usvm_tests::isolated::skipped;
use usvm_tests::scenario::{Scenario, VRAM};
use usvm_tests::support::*;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

fn retaining(bytes: u64) -> Config {
    let mut config = Config::default();
    config.retained = Some(bytes);
    config
}

fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * K4
}

/// Waits until at most `bytes` are retained, by the statistics.
fn retained_falls_to(runtime: &Runtime, bytes: u64) {
    let began = Instant::now();
    while runtime.stats().retained_host_bytes > bytes {
        assert!(began.elapsed() < Duration::from_secs(5), "{}", runtime.stats());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn retained_pages_are_released_down_to_the_budget() {
    let _alone = alone("budget", 60);
    let len = 8 * M2;
    let free = runtime(retaining(u64::MAX), &[len]);
    let mem = Mem::filled(len, 1);
    to_device(&free, &mem, 2);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(free.stats().retained_host_bytes, len, "without a budget all is kept\n{}", free.stats());
    free.shutdown();
    drop(free);

    let runtime = runtime(retaining(2 * M2), &[len]);
    to_device(&runtime, &mem, 3);
    retained_falls_to(&runtime, 2 * M2);
    assert!(runtime.stats().retained_host_bytes > 0, "more was given back than had to be");
    mem.check(3);
    // Again, and now no page may be kept at all.
    drop(runtime);
    let runtime = usvm_tests::support::runtime(retaining(0), &[len]);
    to_device(&runtime, &mem, 4);
    let before = resident_bytes();
    retained_falls_to(&runtime, 0);
    println!("{} MiB resident before, {} after", before >> 20, resident_bytes() >> 20);
    assert_eq!(runtime.residence(mem.at, len).unwrap().retained, 0);
    let at = mem.at;
    on_gpu(&runtime, move |gpu| gpu_check(gpu, at, len, 0, 4)).unwrap();
    mem.check(4);
}

#[test]
fn the_kernel_gets_the_memory_back() {
    let _alone = alone("memory back", 60);
    let len = 12 * M2;
    let runtime = runtime(retaining(0), &[len]);
    let mem = Mem::filled(len, 1);
    let (at, full) = (mem.at, resident_bytes());
    to_device(&runtime, &mem, 2);
    retained_falls_to(&runtime, 0);
    // Device memory is a memfd of this process, seen through a mapping: its pages are resident now instead.
    let device = len;
    let now = resident_bytes();
    assert!(now < full + device - len / 2, "{} MiB before, {} now", full >> 20, now >> 20);
    on_gpu(&runtime, move |gpu| gpu_check(gpu, at, len, 0, 2)).unwrap();
}

#[test]
fn the_scenario_with_nothing_retained() {
    let _alone = alone("nothing retained", 60);
    let runtime = runtime(retaining(0), &[VRAM]);
    let mut scenario = Scenario::new(8);
    for _ in 0..3 {
        scenario.play(&runtime);
    }
    assert!(scenario.errors.is_empty(), "{:?}", scenario.errors);
}

/// A memory cgroup with `limit` bytes for the calling process, gone when dropped.
struct Group(PathBuf);

impl Group {
    fn enter(limit: u64) -> Result<Self, String> {
        let v1 = PathBuf::from("/sys/fs/cgroup/memory");
        let (root, file) = if v1.join("cgroup.procs").exists() {
            (v1, "memory.limit_in_bytes")
        } else {
            (PathBuf::from("/sys/fs/cgroup"), "memory.max")
        };
        let folder = root.join(format!("usvm-test-{}", std::process::id()));
        std::fs::create_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let group = Self(folder);
        let put = |name: &str, text: String| {
            let path = group.0.join(name);
            std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))
        };
        put(file, limit.to_string())?;
        put("cgroup.procs", std::process::id().to_string())?;
        Ok(group)
    }

    /// Bytes charged to it.
    fn used(&self) -> u64 {
        let names = ["memory.usage_in_bytes", "memory.current"];
        let text = names.iter().find_map(|name| std::fs::read_to_string(self.0.join(name)).ok()).unwrap();
        text.trim().parse().unwrap()
    }

    /// Sets another limit.
    fn limit(&self, bytes: u64) {
        let file =
            ["memory.limit_in_bytes", "memory.max"].into_iter().find(|name| self.0.join(name).exists());
        std::fs::write(self.0.join(file.unwrap()), bytes.to_string()).unwrap();
    }

    /// Times the kernel killed somebody of it.
    fn killed(&self) -> u64 {
        let text = ["memory.oom_control", "memory.events"]
            .iter()
            .find_map(|name| std::fs::read_to_string(self.0.join(name)).ok())
            .unwrap_or_default();
        text.lines().find_map(|l| l.strip_prefix("oom_kill ")?.parse().ok()).unwrap_or(0)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Back to where it came from, so that the folder can go.
        if let Some(parent) = self.0.parent() {
            let _ = std::fs::write(parent.join("cgroup.procs"), std::process::id().to_string());
        }
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// The calling process in a group in which everything on the device has its pages kept, and then little is left.
fn squeezed(knows: bool) -> Option<(u64, u64)> {
    let enter =
        || Group::enter(1 << 30).map_err(|e| skipped(format_args!("no memory cgroup can be made: {e}"))).ok();
    let device = 96 << 20;
    // What a runtime does not know of it cannot heed: it looks at the groups around it when it starts.
    let (group, runtime) = if knows {
        let group = enter()?;
        (group, runtime(Config::default(), &[device]))
    } else {
        let runtime = runtime(Config::default(), &[device]);
        (enter()?, runtime)
    };
    let pieces: Vec<Mem> = (0..4).map(|_| Mem::filled(24 << 20, 1)).collect();
    pieces.iter().for_each(|mem| to_device(&runtime, mem, 2));
    std::thread::sleep(Duration::from_millis(300));
    let before = runtime.stats().retained_host_bytes;
    assert_eq!(before, device, "with room enough all is kept\n{}", runtime.stats());
    // Room for what is there and 24 MiB: less than twice a sixteenth of it.
    let limit = group.used() + (24 << 20);
    assert!(limit / 8 > 24 << 20, "{limit}");
    group.limit(limit);
    let began = Instant::now();
    let mut after = before;
    while began.elapsed() < Duration::from_millis(1500) {
        after = after.min(runtime.stats().retained_host_bytes);
        std::thread::sleep(Duration::from_millis(20));
    }
    for (n, mem) in pieces.iter().enumerate() {
        let (at, len) = (mem.at, mem.len);
        on_gpu(&runtime, move |gpu| gpu_check(gpu, at, len, 0, 2)).unwrap();
        if n == 0 {
            mem.check(2);
        }
    }
    assert_eq!(group.killed(), 0);
    runtime.shutdown();
    pieces.iter().for_each(|mem| mem.check(2));
    Some((before, after))
}

#[test]
fn a_memory_cgroup_with_little_room() {
    if !is_child("a_memory_cgroup_with_little_room") {
        return;
    }
    let _alone = alone("cgroup", 100);
    let Some((before, after)) = squeezed(true) else { return };
    println!("{} MiB retained, {} MiB under pressure", before >> 20, after >> 20);
    assert!(after <= before - (4 << 20), "{before} bytes retained, {after} under pressure");
    assert!(after >= before / 4, "more was given back than had to be: {after} of {before}");
}

/// The control: a runtime that does not know the limit keeps everything, so it is the budget that gives back.
#[test]
fn a_limit_that_nobody_knows_changes_nothing() {
    if !is_child("a_limit_that_nobody_knows_changes_nothing") {
        return;
    }
    let _alone = alone("cgroup, unknown", 100);
    let Some((before, after)) = squeezed(false) else { return };
    assert_eq!(after, before);
}

/// 64 MiB of data, 32 MiB of device memory (which is charged, too, as it is a memfd), 144 MiB in all.
#[test]
fn a_working_set_in_a_small_memory_cgroup() {
    if !is_child("a_working_set_in_a_small_memory_cgroup") {
        return;
    }
    let _alone = alone("small cgroup", 100);
    let group = match Group::enter(144 << 20) {
        Ok(group) => group,
        Err(e) => return skipped(format!("no memory cgroup can be made: {e}")),
    };
    let runtime = runtime(Config::default(), &[32 << 20]);
    let pieces: Vec<Mem> = (0..4).map(|_| Mem::filled(16 << 20, 1)).collect();
    for round in 1..4u64 {
        for mem in &pieces {
            let (at, len) = (mem.at, mem.len);
            let pass = move |gpu: &mut usvm::device::sim::Gpu<'_>| {
                gpu_check(gpu, at, len, 0, round)?;
                gpu_fill(gpu, at, len, 0, round + 1)
            };
            on_gpu(&runtime, pass).unwrap();
        }
    }
    pieces.iter().for_each(|mem| mem.check(4));
    assert_eq!(group.killed(), 0);
    println!("{}", runtime.stats());
}
