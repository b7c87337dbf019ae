//! How much host memory retained pages may take.
//!
//! # Overview
//! Retained shadow pages make the way back from the device free of page allocation, but they are memory that the
//! process would not use without usvm. [`Budget::allowed_retained`] keeps a reserve free: of the machine, by
//! MemAvailable, and of the memory cgroups around this process (v1 and v2), by limit and usage. A cgroup's inactive
//! page cache counts as free, as the kernel reclaims it first.
//!
//! # Locking
//! None; every call reads the files anew (tens of microseconds), so ask seldom. They stay open: a file opened for a
//! moment would take the number that the program is about to get for one of its own.
//!
//! # Limits
//! A limit that cannot be read is taken as absent. Swap is not counted on. The innermost 8 groups count.

use crate::ground::fds::Kept;
use crate::ground::inject::{self, Call};
use rustix::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Share of the total that stays free: one part in this many.
const RESERVE_PART: u64 = 16;
/// The reserve is at most this.
const RESERVE_MAX: u64 = 1 << 30;

/// Groups whose files are kept open.
const MOST_GROUPS: usize = 8;

/// How scarce host memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// More than twice the reserve is free.
    None,
    /// The reserve is near: retain nothing more.
    Some,
    /// The reserve is touched: give retained and prepared pages back.
    High,
}

/// One limit: how much it allows in all, and how much of that is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes in all.
    pub total: u64,
    /// Bytes that are free, or freed first.
    pub free: u64,
}

impl Room {
    fn reserve(self) -> u64 {
        (self.total / RESERVE_PART).min(RESERVE_MAX)
    }

    fn pressure(self) -> Pressure {
        match self.free {
            free if free < self.reserve() => Pressure::High,
            free if free < 2 * self.reserve() => Pressure::Some,
            _ => Pressure::None,
        }
    }
}

/// The reader of limits.
#[derive(Debug)]
pub struct Budget {
    /// /proc/meminfo.
    machine: Option<File>,
    /// The memory cgroups around this process, innermost first.
    groups: Vec<Group>,
}

/// A small file of the kernel's, open.
#[derive(Debug)]
struct File(Kept);

impl File {
    fn open(path: &Path) -> Option<Self> {
        inject::check(Call::Open).ok()?;
        let file = std::fs::File::open(path).ok()?;
        Some(Self(Kept::new(OwnedFd::from(file))))
    }

    /// What it says now; of a long file the beginning.
    fn read(&self) -> Option<String> {
        let mut text = vec![0; 8192];
        let mut len = 0;
        while len < text.len() {
            inject::check(Call::Read).ok()?;
            match rustix::io::pread(&self.0, &mut text[len..], len as u64) {
                Ok(0) => break,
                Ok(read) => len += read,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return None,
            }
        }
        text.truncate(len);
        String::from_utf8(text).ok()
    }
}

/// One cgroup's files.
#[derive(Debug)]
struct Group {
    limit: Option<File>,
    usage: Option<File>,
    stat: Option<File>,
    /// Line of memory.stat that counts what is reclaimed first.
    inactive: &'static str,
}

/// Names of a cgroup's files.
#[derive(Debug, PartialEq, Eq)]
struct Files {
    limit: &'static str,
    usage: &'static str,
    /// Line of memory.stat that counts what is reclaimed first.
    inactive: &'static str,
}

static V1: Files =
    Files { limit: "memory.limit_in_bytes", usage: "memory.usage_in_bytes", inactive: "total_inactive_file" };
static V2: Files = Files { limit: "memory.max", usage: "memory.current", inactive: "inactive_file" };

impl Default for Budget {
    fn default() -> Self {
        Self::new()
    }
}

impl Budget {
    /// For this process, as it is now in the cgroup tree.
    pub fn new() -> Self {
        Self::with_root(Path::new("/"))
    }

    fn with_root(root: &Path) -> Self {
        let groups = groups(root).unwrap_or_default();
        Self {
            machine: File::open(&root.join("proc/meminfo")),
            groups: groups
                .iter()
                .take(MOST_GROUPS)
                .map(|(folder, files)| Group::open(folder, files))
                .collect(),
        }
    }

    /// Bytes of retained pages that may be kept in all, when `retained` bytes are kept now.
    pub fn allowed_retained(&self, retained: u64) -> u64 {
        let allowed = |room: Room| retained.saturating_add(room.free).saturating_sub(2 * room.reserve());
        self.rooms().into_iter().map(allowed).min().unwrap_or(0)
    }

    /// How scarce memory is, by the tightest limit.
    pub fn pressure(&self) -> Pressure {
        self.rooms().into_iter().map(Room::pressure).max().unwrap_or(Pressure::None)
    }

    /// Every limit that can be read: the machine's, then those of the cgroups around this process, innermost first.
    pub fn rooms(&self) -> Vec<Room> {
        let machine = self.machine.as_ref().and_then(machine);
        machine.into_iter().chain(self.groups.iter().filter_map(Group::room)).collect()
    }
}

fn read(path: &Path) -> Option<String> {
    inject::check(Call::Open).ok()?;
    std::fs::read_to_string(path).ok()
}

fn machine(meminfo: &File) -> Option<Room> {
    let text = meminfo.read()?;
    let kib = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.split_ascii_whitespace().next()?.parse::<u64>().ok()? << 10)
    };
    Some(Room { total: kib("MemTotal")?, free: kib("MemAvailable")? })
}

impl Group {
    fn open(folder: &Path, files: &Files) -> Self {
        let open = |name: &str| File::open(&folder.join(name));
        Self {
            limit: open(files.limit),
            usage: open(files.usage),
            stat: open("memory.stat"),
            inactive: files.inactive,
        }
    }

    fn room(&self) -> Option<Room> {
        let number = |file: &Option<File>| file.as_ref()?.read()?.trim().parse::<u64>().ok();
        // "max" is no number, and v1 says "no limit" with one near 2^63.
        let total = number(&self.limit).filter(|l| *l < 1 << 60)?;
        let usage = number(&self.usage)?;
        let inactive = self.stat.as_ref().and_then(|stat| {
            let text = stat.read()?;
            let line = text.lines().find_map(|l| l.strip_prefix(self.inactive)?.strip_prefix(' '))?;
            line.trim().parse().ok()
        });
        Some(Room { total, free: total.saturating_sub(usage.saturating_sub(inactive.unwrap_or(0))) })
    }
}

/// The memory cgroups around this process, innermost first.
fn groups(root: &Path) -> Option<Vec<(PathBuf, &'static Files)>> {
    let membership = read(&root.join("proc/thread-self/cgroup"))?;
    let mounts = read(&root.join("proc/thread-self/mountinfo"))?;
    let mut found = Vec::new();
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let (files, kind, option) = match controllers {
            "" => (&V2, "cgroup2", ""),
            list if list.split(',').any(|c| c == "memory") => (&V1, "cgroup", "memory"),
            _ => continue,
        };
        let Some((mount, mounted)) = mount_of(&mounts, kind, option) else { continue };
        // Inside a container the mount shows only a part of the tree, from `mounted` down.
        let below = path.strip_prefix(&mounted).unwrap_or(path).trim_start_matches('/');
        let top = root.join(mount.trim_start_matches('/'));
        let mut folder = top.join(below);
        while folder.starts_with(&top) {
            found.push((folder.clone(), files));
            if !folder.pop() {
                break;
            }
        }
    }
    Some(found)
}

/// Mount point and mounted root of the first file system of `kind` with `option` among its super options.
fn mount_of(mountinfo: &str, kind: &str, option: &str) -> Option<(String, String)> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut right = right.split_ascii_whitespace();
        let fits =
            right.next()? == kind && (option.is_empty() || right.nth(1)?.split(',').any(|o| o == option));
        let mut left = left.split_ascii_whitespace().skip(3);
        let (mounted, mount) = (left.next()?, left.next()?);
        let mounted = if mounted == "/" { "" } else { mounted };
        fits.then(|| (mount.to_owned(), mounted.to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fd::{AsFd, AsRawFd};
    use std::fs;

    const MIB: u64 = 1 << 20;

    /// A root folder with the given files, gone when dropped.
    struct Root(PathBuf);

    impl Root {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let root = std::env::temp_dir().join(format!("usvm-budget-{}-{name}", std::process::id()));
            for (path, text) in files {
                let path = root.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            Root(root)
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const MEMINFO: (&str, &str) =
        ("proc/meminfo", "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n");

    #[test]
    fn the_machine_alone() {
        let root = Root::new("machine", &[MEMINFO]);
        let budget = Budget::with_root(&root.0);
        // 16 GiB: the reserve is 1 GiB, kept twice.
        assert_eq!(budget.allowed_retained(100 * MIB), (8192 + 100 - 2048) * MIB);
        assert_eq!(budget.pressure(), Pressure::None);
    }

    #[test]
    fn a_group_of_version_2_and_its_parent() {
        let root = Root::new(
            "v2",
            &[
                MEMINFO,
                ("proc/thread-self/cgroup", "0::/a/b\n"),
                (
                    "proc/thread-self/mountinfo",
                    "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n",
                ),
                ("sys/fs/cgroup/a/memory.max", "1610612736\n"),
                ("sys/fs/cgroup/a/memory.current", "1468006400\n"),
                ("sys/fs/cgroup/a/memory.stat", "anon 7\ninactive_file 10485760\n"),
                ("sys/fs/cgroup/a/b/memory.max", "max\n"),
                ("sys/fs/cgroup/a/b/memory.current", "5\n"),
            ],
        );
        let budget = Budget::with_root(&root.0);
        assert_eq!(budget.groups.len(), 3);
        // 1536 MiB limit, 1400 used, 10 of that inactive: 146 free, reserve 96.
        assert_eq!(budget.pressure(), Pressure::Some);
        assert_eq!(budget.allowed_retained(100 * MIB), (146 + 100 - 192) * MIB);
        assert_eq!(budget.allowed_retained(0), 0);
        fs::write(root.0.join("sys/fs/cgroup/a/memory.current"), "1610612000").unwrap();
        assert_eq!(budget.pressure(), Pressure::High);
    }

    #[test]
    fn a_group_of_version_1_seen_from_a_container() {
        let root = Root::new(
            "v1",
            &[
                MEMINFO,
                ("proc/thread-self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/77\n0::/\n"),
                (
                    "proc/thread-self/mountinfo",
                    "35 30 0:30 /docker/77 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
                ),
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1073741824\n"),
                ("sys/fs/cgroup/memory/memory.usage_in_bytes", "536870912\n"),
            ],
        );
        let budget = Budget::with_root(&root.0);
        assert_eq!(budget.allowed_retained(0), (512 - 128) * MIB);
    }

    #[test]
    fn this_machine_has_something_to_say() {
        let budget = Budget::new();
        let now = budget.allowed_retained(0);
        assert!(budget.allowed_retained(MIB) >= now);
        assert!(budget.rooms()[0].total > 0 && budget.rooms()[0].free <= budget.rooms()[0].total);
        let mine = |file: &File| crate::ground::fds::is_kept(file.0.as_fd().as_raw_fd());
        assert!(budget.machine.as_ref().is_some_and(mine), "it is out of the program's way");
    }
}
