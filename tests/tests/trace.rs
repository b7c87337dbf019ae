//! A program under USVM_TRACE leaves a timeline of what happened to it.

use usvm::{Config, Location, Runtime};
use usvm_tests::area::*;
use usvm_tests::isolated::isolated;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

#[test]
fn faults_migrations_evictions_and_invalidations_are_traced() {
    isolated("faults_migrations_evictions_and_invalidations_are_traced", || {
        let path = std::env::temp_dir().join(format!("usvm-trace-{}-%p.json", std::process::id()));
        // SAFETY: before this process has threads that read the environment.
        unsafe {
            std::env::set_var("USVM_TRACE", &path);
            std::env::set_var("USVM_VRAM", "4M");
        }
        let rt = Runtime::start(Config::from_env().unwrap()).unwrap();
        let (area, mut piece) = Area::filled(4 * M2, false, &mut Rng::new(1));
        piece.check(&rt, "more than the device holds");
        rt.prefetch(area.at, M2, Location::Device(0)).wait(None).unwrap();
        unmap(area.at, M2);
        // An access that comes after the unmap was handled.
        device_xor(&rt, area.at + M2, K4, 1).unwrap();
        let stats = rt.stats();
        rt.shutdown();
        drop(rt);
        let path = path.to_str().unwrap().replace("%p", &std::process::id().to_string());
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let trace: serde_json::Value = serde_json::from_str(&text).unwrap();
        let events = trace.as_array().or_else(|| trace["traceEvents"].as_array()).expect("a list of events");
        let named =
            |name: &str| events.iter().filter(|e| e["name"] == name && e["ph"] == "X").collect::<Vec<_>>();
        let inside = |e: &serde_json::Value| {
            let addr = e["args"]["address"]
                .as_str()
                .and_then(|a| u64::from_str_radix(a.strip_prefix("0x")?, 16).ok());
            addr.is_some_and(|addr| (area.at..area.at + area.len).contains(&addr))
        };
        for (name, counted) in [
            ("cpu fault", stats.cpu_faults),
            ("gpu fault", stats.gpu_faults),
            ("to device", stats.migrations_4k + stats.migrations_64k + stats.migrations_2m),
            ("to host", 1),
            ("evict", stats.evictions),
            ("invalidate", stats.invalidations),
        ] {
            let found = named(name);
            assert!(
                counted > 0 && found.iter().any(|e| inside(e)),
                "{name}: {} found, {counted} counted",
                found.len()
            );
            assert!(found.iter().all(|e| e["ts"].is_number() && e["dur"].is_number()), "{name} has no time");
        }
        // One event for each that was counted.
        assert_eq!(named("evict").len() as u64, stats.evictions);
        assert_eq!(named("cpu fault").len() as u64, stats.cpu_faults);
        let sum: u64 = named("to device").iter().filter_map(|e| e["args"]["bytes"].as_u64()).sum();
        assert!(sum > 0, "bytes moved are told");
        unmap(area.at + M2, area.len - M2);
        std::mem::forget(area);
    });
}
