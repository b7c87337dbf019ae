//! This process's limits and the system's settings that programs under usvm meet.

use std::fs;

use rustix::process::{Resource, getrlimit};

use super::Check;
use crate::say;

const LIMITS: &str = "limits";

/// Address space that usvm takes before a program's memory counts: its own areas and the first shadow area.
const ADDRESS_SPACE: u64 = 4 << 30;

/// Descriptors that usvm wants for itself, with as many again for the program.
const FILES: u64 = 64;

/// The kernel's own default.
const MAPPINGS: u64 = 65530;

pub(super) fn checks() -> Vec<Check> {
    let limit = |resource| getrlimit(resource).current;
    vec![
        address_space(limit(Resource::As)),
        files(limit(Resource::Nofile)),
        Check::ok(LIMITS, "locked memory", format!("{} (usvm locks none)", amount(limit(Resource::Memlock)))),
        mappings(number("/proc/sys/vm/max_map_count")),
        overcommit(number("/proc/sys/vm/overcommit_memory")),
    ]
}

fn amount(limit: Option<u64>) -> String {
    limit.map_or_else(|| "unlimited".into(), say::bytes)
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn address_space(limit: Option<u64>) -> Check {
    match limit {
        Some(bytes) if bytes < ADDRESS_SPACE => Check::warn(LIMITS, "address space", amount(limit))
            .means("every range on the device has its address twice: little can be there at once")
            .fix("ulimit -v unlimited"),
        _ => Check::ok(LIMITS, "address space", amount(limit)),
    }
}

fn files(limit: Option<u64>) -> Check {
    let found = limit.map_or_else(|| "unlimited".into(), |n| n.to_string());
    match limit {
        Some(n) if n < FILES => Check::warn(LIMITS, "open files", found)
            .means("usvm opens some descriptors of its own; the program may run out")
            .fix("ulimit -n 1024"),
        _ => Check::ok(LIMITS, "open files", found),
    }
}

fn mappings(count: Option<u64>) -> Check {
    let name = "mappings";
    match count {
        None => Check::ok(LIMITS, name, "vm.max_map_count cannot be read"),
        Some(count) if count < MAPPINGS => Check::warn(LIMITS, name, format!("vm.max_map_count is {count}"))
            .means("a range on the device can split its mapping in three: programs with scattered memory reach this")
            .fix("sudo sysctl vm.max_map_count=1048576"),
        Some(count) => Check::ok(LIMITS, name, format!("vm.max_map_count is {count}")),
    }
}

fn overcommit(mode: Option<u64>) -> Check {
    let name = "overcommit";
    match mode {
        Some(2) => Check::warn(LIMITS, name, "vm.overcommit_memory is 2: never")
            .means("the shadow area counts as memory although it is empty: starting or moving may fail")
            .fix("sudo sysctl vm.overcommit_memory=0"),
        Some(mode) => Check::ok(LIMITS, name, format!("vm.overcommit_memory is {mode}")),
        None => Check::ok(LIMITS, name, "vm.overcommit_memory cannot be read"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn only_tight_limits_warn() {
        assert_eq!(address_space(None).status, Status::Ok);
        assert_eq!(address_space(Some(1 << 30)).status, Status::Warn);
        assert_eq!(files(Some(20)).status, Status::Warn);
        assert_eq!(files(Some(1024)).status, Status::Ok);
        assert_eq!(mappings(Some(65530)).status, Status::Ok);
        assert_eq!(mappings(Some(1000)).status, Status::Warn);
        assert_eq!(overcommit(Some(2)).status, Status::Warn);
        assert_eq!(overcommit(Some(1)).status, Status::Ok);
        assert_eq!(overcommit(None).status, Status::Ok);
    }
}
