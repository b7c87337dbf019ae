//! The kernel's part: its version, the right to userfaultfd, its features, huge pages.

use std::fs;
use std::path::Path;

use nix::unistd::{Uid, User};
use rustix::fs::Access;
use usvm::host::features::{Features, Options, Refusal, Report, Way, Why};
use usvm::host::{Host, budget};

use super::{Check, Status};
use crate::say;

const KERNEL: &str = "kernel";
const RIGHT: &str = "userfaultfd: the right";
const FEATURES: &str = "userfaultfd: features";
const MEMORY: &str = "memory";

/// The device that gives the right to kernel-mode faults to whoever may open it.
const DEVICE: &str = "/dev/userfaultfd";

/// Each feature that usvm can do without, with what is lost.
const LOSSES: &[(Features, &str, &str)] = &[
    (Features::WP, "WP", "no UFFDIO_MOVE and no sharing without it"),
    (
        Features::MOVE,
        "MOVE",
        "pages move by mremap and come back by a copy; pages pinned for DMA move under it",
    ),
    (
        Features::MOVE_ZERO_PAGES,
        "MOVE_ZERO_PAGES",
        "pages that were only read must be made real before they move",
    ),
    (
        Features::WP_ASYNC,
        "WP_ASYNC",
        "read-mostly memory is not shared with the device but goes back and forth",
    ),
    (Features::WP_UNPOPULATED, "WP_UNPOPULATED", "read-mostly memory is not shared with the device"),
    (
        Features::PAGEMAP_SCAN,
        "PAGEMAP_SCAN",
        "written pages are not found: no sharing; page state is read slowly",
    ),
    (
        Features::PROCMAP_QUERY,
        "PROCMAP_QUERY",
        "mappings are found by reading /proc/self/maps: slow if there are many",
    ),
    (Features::POISON, "POISON", "data lost with a device answers SIGSEGV instead of SIGBUS"),
    (Features::EVENT_FORK, "EVENT_FORK", "a child forked past the C library (a bare clone) can miss memory"),
    (Features::EVENT_REMAP, "EVENT_REMAP", "mremap of memory on the device is not seen"),
    (Features::EVENT_REMOVE, "EVENT_REMOVE", "madvise of memory on the device is not seen"),
    (Features::EVENT_UNMAP, "EVENT_UNMAP", "munmap of memory on the device is not seen"),
];

/// What usvm cannot be right without.
const NEEDED: Features = Features::EVENT_REMAP.union(Features::EVENT_REMOVE).union(Features::EVENT_UNMAP);

pub(super) fn checks() -> Vec<Check> {
    let mut checks = vec![kernel(&rustix::system::uname().release().to_string_lossy())];
    let opened = Host::open(&Options::default()).map(|host| host.report().clone());
    checks.extend(right(opened.as_ref().map_err(ToString::to_string)));
    if let Ok(report) = &opened {
        checks.extend(LOSSES.iter().map(|(feature, name, loss)| self::feature(report, *feature, name, loss)));
    }
    let thp = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok();
    checks.push(huge_pages(thp.as_deref()));
    checks.push(host_memory(&budget::Budget::new()));
    checks
}

fn kernel(release: &str) -> Check {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let found = format!("Linux {release}");
    match version {
        (0, _) => Check::warn(KERNEL, "version", found)
            .means("not a version that is known")
            .fix("usvm doctor --json"),
        v if v < (5, 7) => Check::fail(KERNEL, "version", found)
            .means("usvm needs Linux 5.7 (userfaultfd with write protection)")
            .fix("install Linux 6.8 or newer"),
        v if v < (6, 8) => Check::warn(KERNEL, "version", found)
            .means("Linux 6.8 or newer is faster: it moves pages without a copy (UFFDIO_MOVE)")
            .fix("install Linux 6.8 or newer"),
        _ => Check::ok(KERNEL, "version", found),
    }
}

/// The ladder to a userfaultfd, rung by rung, and how far up this process gets.
fn right(opened: Result<&Report, String>) -> Vec<Check> {
    let reached = match &opened {
        Ok(report) if report.way == Way::UserModeOnly => Check::warn(RIGHT, "faults", report.way.to_string())
            .means(
                "a system call on memory that is on the device fails with EFAULT; ordinary accesses work. \
                 Any one of the three above is enough",
            )
            .fix(fix_of_right()),
        Ok(report) => Check::ok(RIGHT, "faults", format!("{}: also inside system calls", report.way)),
        Err(e) => Check::fail(RIGHT, "faults", e.clone())
            .means("this process gets no userfaultfd at all: a seccomp filter, or a kernel without CONFIG_USERFAULTFD")
            .fix(fix_of_refusal()),
    };
    // A rung that is missing matters only while the top is not reached.
    let enough = reached.status == Status::Ok;
    let rung = |name: &str, found: String, there: bool, fix: String| match there || enough {
        true => Check::ok(RIGHT, name, found),
        false => Check::warn(RIGHT, name, found).fix(fix),
    };
    let (device, may) = device();
    let (sysctl, allowed) = match read("/proc/sys/vm/unprivileged_userfaultfd").as_deref() {
        Some("1") => ("1: allowed to everybody".to_owned(), true),
        Some(other) => (format!("{other}: only with a right of the others here"), false),
        None => ("not in this kernel".to_owned(), false),
    };
    let capable = has_sys_ptrace(&read("/proc/self/status").unwrap_or_default());
    let capability = if capable { "yes" } else { "no" };
    vec![
        rung(DEVICE, device, may, fix_of_right()),
        rung("unprivileged", sysctl, allowed, "sudo sysctl vm.unprivileged_userfaultfd=1".into()),
        rung("CAP_SYS_PTRACE", capability.into(), capable, "run it as root".into()),
        reached,
    ]
}

/// What /dev/userfaultfd is to this user.
fn device() -> (String, bool) {
    if !Path::new(DEVICE).exists() {
        return ("not there (Linux 6.1 has it; in a container it must be passed in)".into(), false);
    }
    match rustix::fs::access(DEVICE, Access::READ_OK | Access::WRITE_OK) {
        Ok(()) => ("may be opened".into(), true),
        Err(_) => ("may not be opened by this user".into(), false),
    }
}

fn fix_of_right() -> String {
    if Path::new(DEVICE).exists() {
        return format!("sudo setfacl -m u:{}:rw {DEVICE}   (until reboot)", user());
    }
    if in_container() {
        return "start the container with --device /dev/userfaultfd (docker, podman)".into();
    }
    "sudo sysctl vm.unprivileged_userfaultfd=1   (until reboot)".into()
}

fn fix_of_refusal() -> String {
    if in_container() {
        return "start the container with --device /dev/userfaultfd --security-opt seccomp=unconfined".into();
    }
    "zgrep CONFIG_USERFAULTFD /proc/config.gz /boot/config-$(uname -r)   (must be =y)".into()
}

fn in_container() -> bool {
    let marks = ["/.dockerenv", "/run/.containerenv"];
    marks.iter().any(|mark| Path::new(mark).exists()) || std::env::var_os("container").is_some()
}

/// Who this is, for a command line.
fn user() -> String {
    let id = Uid::current();
    User::from_uid(id).ok().flatten().map_or_else(|| id.to_string(), |user| user.name)
}

/// Whether /proc/self/status says that CAP_SYS_PTRACE (number 19) is effective.
fn has_sys_ptrace(status: &str) -> bool {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|bits| bits & 1 << 19 != 0)
}

fn feature(report: &Report, feature: Features, name: &str, loss: &str) -> Check {
    if report.has.contains(feature) {
        return Check::ok(FEATURES, name, "yes");
    }
    let refusal = report.refused.iter().find(|refusal| refusal.feature == feature);
    let found = refusal.map_or_else(|| "no".to_owned(), refused);
    let status = if NEEDED.contains(feature) { Status::Fail } else { Status::Warn };
    let fix = match (feature, refusal) {
        (Features::EVENT_FORK, _) => "run it as root, if it forks by a bare clone".to_owned(),
        (_, Some(refusal)) => refusal.fix.clone(),
        (_, None) => "install a newer Linux".to_owned(),
    };
    Check::new(FEATURES, name, status, found).means(loss).fix(fix)
}

fn refused(refusal: &Refusal) -> String {
    match refusal.why {
        Why::Absent => "not in this kernel".into(),
        Why::Forbidden => "switched off".into(),
        Why::Refused(errno) => format!("refused: {errno}"),
    }
}

fn huge_pages(enabled: Option<&str>) -> Check {
    let name = "huge pages";
    let chosen = enabled.and_then(|text| text.split_once('[')?.1.split_once(']')).map(|(word, _)| word);
    let always = "echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled";
    match chosen {
        Some("always") => Check::ok(MEMORY, name, "always"),
        Some("madvise") => Check::warn(MEMORY, name, "madvise: where a program asks for them")
            .means("moving 2 MiB of small pages costs 30 us more than one huge page")
            .fix(format!("GLIBC_TUNABLES=glibc.malloc.hugetlb=1 usvm run ...   (or: {always})")),
        Some(other) => Check::warn(MEMORY, name, other)
            .means("moving 2 MiB of small pages costs 30 us more than one huge page")
            .fix(always),
        None => Check::warn(MEMORY, name, "not in this kernel, or /sys is not there")
            .means("moving 2 MiB of small pages costs 30 us more than one huge page")
            .fix("boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y"),
    }
}

fn host_memory(budget: &budget::Budget) -> Check {
    let rooms = budget.rooms();
    let words = |room: &budget::Room| format!("{} of {} free", say::bytes(room.free), say::bytes(room.total));
    let found = match rooms.as_slice() {
        [] => "unknown: /proc is not there".to_owned(),
        [machine] => words(machine),
        [machine, groups @ ..] => {
            let tightest = groups.iter().min_by_key(|room| room.free);
            format!("{}; this cgroup {}", words(machine), tightest.map(words).unwrap_or_default())
        }
    };
    match budget.pressure() {
        budget::Pressure::None => Check::ok(MEMORY, "host memory", found),
        _ => Check::warn(MEMORY, "host memory", found)
            .means("little is left: usvm keeps no pages ready, and memory comes back slower")
            .fix("give the machine or the cgroup more memory, e.g. systemd-run --user -p MemoryMax=8G usvm run ..."),
    }
}

fn read(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_apart() {
        assert_eq!(kernel("6.18.44-fc").status, Status::Ok);
        assert_eq!(kernel("6.1.0-13-amd64").status, Status::Warn);
        assert_eq!(kernel("5.4.0").status, Status::Fail);
        assert_eq!(kernel("nonsense").status, Status::Warn);
    }

    #[test]
    fn huge_page_settings_are_read() {
        assert_eq!(huge_pages(Some("[always] madvise never\n")).status, Status::Ok);
        assert!(huge_pages(Some("always [madvise] never")).fix.unwrap().contains("GLIBC_TUNABLES"));
        assert_eq!(huge_pages(Some("always madvise [never]")).found, "never");
        assert_eq!(huge_pages(None).status, Status::Warn);
    }

    #[test]
    fn the_capability_is_number_19() {
        assert!(has_sys_ptrace("Name:\tx\nCapEff:\t0000000000080000\n"));
        assert!(!has_sys_ptrace("CapEff:\t000001fffff7ffff\n"));
        assert!(!has_sys_ptrace(""));
    }

    fn report(has: Features, way: Way) -> Report {
        Report { has, way, failed_ways: Vec::new(), refused: Vec::new() }
    }

    #[test]
    fn user_mode_only_is_a_warning_with_its_fix_and_nothing_at_all_a_failure() {
        let limited = right(Ok(&report(Features::all(), Way::UserModeOnly)));
        assert_eq!(limited.last().unwrap().status, Status::Warn);
        assert!(limited.last().unwrap().fix.is_some());
        let full = right(Ok(&report(Features::all(), Way::Syscall)));
        assert!(full.iter().all(|check| check.status == Status::Ok), "{full:?}");
        assert_eq!(right(Err("EPERM".into())).last().unwrap().status, Status::Fail);
    }

    #[test]
    fn a_missing_feature_says_what_is_lost() {
        let report = report(Features::all() - Features::MOVE - Features::EVENT_UNMAP, Way::Syscall);
        let of = |feature| {
            let (_, name, loss) = LOSSES.iter().find(|(f, ..)| *f == feature).unwrap();
            super::feature(&report, feature, name, loss)
        };
        assert_eq!(of(Features::POISON).status, Status::Ok);
        assert_eq!(of(Features::MOVE).status, Status::Warn);
        assert!(of(Features::MOVE).means.unwrap().contains("mremap"));
        assert_eq!(of(Features::EVENT_UNMAP).status, Status::Fail);
    }
}
