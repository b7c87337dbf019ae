//! The program to run: where it is, and whether a preloaded library works in it.
//!
//! # Overview
//! [`locate`] finds it as execvp(3) does. [`inspect`] reads its first bytes: a script is followed to its interpreter,
//! an ELF file tells by its class, machine and interpreter whether the dynamic loader will read LD_PRELOAD. What is no
//! regular file the kernel does not execute; it is refused unopened, for a pipe would wait for its writer.
//!
//! # Limits
//! Only what the kernel itself would start is judged. What a wrapper script or a launcher starts later inherits the
//! environment and is judged by its own loader.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use elf::ElfStream;
use elf::abi::{EM_X86_64, ET_DYN, ET_EXEC, PT_INTERP};
use elf::endian::AnyEndian;
use elf::file::Class;
use rustix::fs::Access;

use crate::file;

/// Interpreters of interpreters that the kernel follows.
const MOST_SCRIPTS: usize = 5;

/// What PATH is when it is not set: the C library's choice.
const DEFAULT_PATH: &str = "/bin:/usr/bin";

const NO_FILE: &str = "it is no regular file";

/// Why a program cannot be executed, with the exit status that shells, env and nohup give for it.
#[derive(Debug, PartialEq, Eq)]
pub struct Unusable {
    /// 127 not found, 126 found and not executable.
    pub status: u8,
    /// In words.
    pub why: String,
}

/// What usvm can do in a program.
#[derive(Debug, PartialEq, Eq)]
pub enum Fitness {
    /// All of it.
    Fits,
    /// Nothing, but the environment does no harm and serves the programs that it starts.
    Inert(String),
    /// Nothing, and its loader would stumble over LD_PRELOAD.
    Foreign(String),
}

/// Finds `name` as execvp does.
pub fn locate(name: &OsStr, path: Option<&OsString>) -> Result<PathBuf, Unusable> {
    let shown = name.display();
    let not_found = |why: &str| Unusable { status: 127, why: format!("{shown}: {why}") };
    if name.is_empty() {
        return Err(not_found("an empty name is no command"));
    }
    if name.as_bytes().contains(&b'/') {
        let path = PathBuf::from(name);
        return match executable(&path) {
            Ok(()) => Ok(path),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Err(not_found("no such file"))
            }
            Err(e) => Err(Unusable { status: 126, why: format!("{shown}: {e}") }),
        };
    }
    let path = path.map_or(OsStr::new(DEFAULT_PATH), OsString::as_os_str);
    let mut refused = None;
    for directory in std::env::split_paths(path) {
        let directory = if directory.as_os_str().is_empty() { PathBuf::from(".") } else { directory };
        let candidate = directory.join(name);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                refused = refused.or(Some((candidate, e)))
            }
            Err(_) => {}
        }
    }
    Err(match refused {
        Some((file, e)) => Unusable { status: 126, why: format!("{}: {e}", file.display()) },
        None => not_found("command not found"),
    })
}

fn executable(path: &Path) -> io::Result<()> {
    let kind = fs::metadata(path)?.file_type();
    if !kind.is_file() {
        let what = if kind.is_dir() { "it is a directory" } else { NO_FILE };
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
    }
    Ok(rustix::fs::access(path, Access::EXEC_OK)?)
}

/// Judges the program at `path`; it cannot be used if an interpreter on its way is no regular file.
pub fn inspect(path: &Path) -> Result<Fitness, Unusable> {
    if let Some(why) = privileged(path) {
        return Ok(Fitness::Inert(why));
    }
    let program = path;
    let mut path = path.to_path_buf();
    for _ in 0..MOST_SCRIPTS {
        if fs::metadata(&path).is_ok_and(|meta| !meta.is_file()) {
            let by =
                if path == program { String::new() } else { format!("its interpreter {}: ", path.display()) };
            return Err(Unusable { status: 126, why: format!("{}: {by}{NO_FILE}", program.display()) });
        }
        let mut start = Vec::new();
        // What may be executed and not read is judged by the kernel and its loader.
        let Ok(file) = file::open(&path) else { return Ok(Fitness::Fits) };
        if file.take(256).read_to_end(&mut start).is_err() {
            return Ok(Fitness::Fits);
        }
        match interpreter(&start) {
            Some(next) => path = next,
            None if start.starts_with(b"\x7fELF") => return Ok(elf_fitness(&path)),
            // Neither: execvp gives it to the shell.
            None => return Ok(Fitness::Fits),
        }
    }
    Ok(Fitness::Fits)
}

/// The interpreter of a script that begins with `start`.
fn interpreter(start: &[u8]) -> Option<PathBuf> {
    let line = start.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
    let word = line.trim_ascii().split(|byte| b" \t".contains(byte)).next()?;
    (!word.is_empty()).then(|| PathBuf::from(OsString::from_vec(word.to_vec())))
}

/// Whether the program gets more rights than its caller; its loader then ignores the environment.
fn privileged(path: &Path) -> Option<String> {
    let shown = path.display();
    let meta = fs::metadata(path).ok()?;
    let mode = meta.permissions().mode();
    let (user, group) = (rustix::process::getuid(), rustix::process::getgid());
    let changes_user = mode & 0o4000 != 0 && meta.uid() != user.as_raw();
    let changes_group = mode & 0o2010 == 0o2010 && meta.gid() != group.as_raw();
    let reason = if changes_user || changes_group {
        "runs with another user's rights (set-user-ID or set-group-ID)"
    } else if !user.is_root() && has_capabilities(path) {
        "has capabilities of its own"
    } else {
        return None;
    };
    Some(format!("{shown} {reason}: usvm is inert in it, for safety, as every preloaded library is"))
}

fn has_capabilities(path: &Path) -> bool {
    rustix::fs::getxattr(path, "security.capability", &mut [0u8; 64]).is_ok_and(|bytes| bytes > 0)
}

fn elf_fitness(path: &Path) -> Fitness {
    let shown = path.display();
    let Ok(file) = file::open(path) else { return Fitness::Fits };
    let Ok(mut elf) = ElfStream::<AnyEndian, _>::open_stream(file) else {
        return Fitness::Foreign(format!("{shown} is a damaged ELF file: usvm leaves it alone"));
    };
    if elf.ehdr.class == Class::ELF32 {
        let why = format!("{shown} is a 32-bit program: usvm serves 64-bit ones, it runs without");
        return Fitness::Foreign(why);
    }
    if elf.ehdr.e_machine != EM_X86_64 || !matches!(elf.ehdr.e_type, ET_EXEC | ET_DYN) {
        return Fitness::Foreign(format!("{shown} is for another machine than x86-64: it runs without usvm"));
    }
    let Some(segment) = elf.segments().iter().find(|segment| segment.p_type == PT_INTERP).copied() else {
        if is_loader(path) {
            return Fitness::Fits;
        }
        let why = "is statically linked: usvm cannot work in it, only in dynamically linked programs that it starts";
        return Fitness::Inert(format!("{shown} {why}"));
    };
    let loader = elf.segment_data(&segment).unwrap_or_default();
    let loader = OsStr::from_bytes(loader.split(|byte| *byte == 0).next().unwrap_or_default());
    if loader.as_bytes().windows(7).any(|part| part == b"ld-musl") {
        let why = "is linked with musl: usvm's library is for the GNU C library, it runs without";
        return Fitness::Foreign(format!("{shown} {why}"));
    }
    Fitness::Fits
}

/// Whether the program is the dynamic loader itself, run with a program as its argument.
fn is_loader(path: &Path) -> bool {
    let name = fs::canonicalize(path).ok().and_then(|p| Some(p.file_name()?.to_owned()));
    name.is_some_and(|name| name.as_bytes().starts_with(b"ld-linux") || name.as_bytes().starts_with(b"ld-2."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(directory: &Path, name: &str, contents: &[u8], mode: u32) -> PathBuf {
        let path = directory.join(name);
        fs::write(&path, contents).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn commands_are_found_as_by_execvp() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        file(one.path(), "thing", b"", 0o644);
        let right = file(two.path(), "thing", b"", 0o755);
        let path = std::env::join_paths([one.path(), two.path()]).unwrap();
        assert_eq!(
            locate(OsStr::new("thing"), Some(&path)),
            Ok(right),
            "the executable one, though it comes later"
        );
        let only = one.path().as_os_str().to_owned();
        assert_eq!(locate(OsStr::new("thing"), Some(&only)).unwrap_err().status, 126);
        assert_eq!(locate(OsStr::new("nothing"), Some(&only)).unwrap_err().status, 127);
        assert_eq!(locate(one.path().as_os_str(), None).unwrap_err().status, 126, "a directory");
        assert_eq!(locate(OsStr::new("/no/such"), None).unwrap_err().status, 127);
        assert_eq!(locate(OsStr::new(""), None).unwrap_err().status, 127);
        assert!(locate(OsStr::new("sh"), None).is_ok(), "a PATH that is not set has a default");
    }

    #[test]
    fn scripts_are_followed() {
        assert_eq!(interpreter(b"#! /bin/sh -e\necho"), Some("/bin/sh".into()));
        assert_eq!(interpreter(b"#!/usr/bin/env python3"), Some("/usr/bin/env".into()));
        assert_eq!(interpreter(b"#!\n"), None);
        assert_eq!(interpreter(b"echo"), None);
        let place = tempfile::tempdir().unwrap();
        let script = file(place.path(), "s", b"#!/bin/sh\n", 0o755);
        assert_eq!(inspect(&script), Ok(Fitness::Fits));
        let itself = place.path().join("loop");
        file(place.path(), "loop", format!("#!{}\n", itself.display()).as_bytes(), 0o755);
        assert_eq!(inspect(&itself), Ok(Fitness::Fits), "ends");
    }

    #[test]
    fn this_test_fits_and_foreign_files_do_not() {
        let own = std::env::current_exe().unwrap();
        assert_eq!(inspect(&own), Ok(Fitness::Fits));
        let place = tempfile::tempdir().unwrap();
        let mut start = fs::read(&own).unwrap();
        start.truncate(4096);
        let told = |name: &str, contents: &[u8]| match inspect(&file(place.path(), name, contents, 0o755)) {
            Ok(Fitness::Foreign(why)) => why,
            other => panic!("{name}: {other:?}"),
        };
        let mut arm = start.clone();
        arm[18] = 183;
        // Its section headers are cut off; the kernel does not need them, and neither may the judgement.
        let (shoff, shnum) = (0x28..0x30, 0x3c..0x40);
        for image in [&mut start, &mut arm] {
            image[shoff.clone()].fill(0);
            image[shnum.clone()].fill(0);
        }
        assert!(told("arm", &arm).contains("another machine"));
        let (glibc, musl) = (b"/lib64/ld-linux-x86-64.so.2", b"/lib/ld-musl-x86_64.so.1\0\0\0");
        let at = start.windows(glibc.len()).position(|part| part == glibc).unwrap();
        let mut other = start.clone();
        other[at..at + musl.len()].copy_from_slice(musl);
        assert!(told("musl", &other).contains("musl"));
        assert!(told("cut", &start[..40]).contains("damaged"));
        let mut small = vec![0u8; 52];
        small[..7].copy_from_slice(b"\x7fELF\x01\x01\x01");
        small[16] = 2;
        small[18] = 3;
        small[20] = 1;
        assert!(told("i386", &small).contains("32-bit"));
    }
}
