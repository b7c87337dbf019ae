//! Where usvm's libraries are: beside the program, as in a build directory, or where `make install` puts them.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use elf::ElfStream;
use elf::abi::{EM_X86_64, ET_DYN};
use elf::endian::AnyEndian;
use elf::file::Class;

use crate::file;

/// The library that `usvm run` preloads.
pub const PRELOAD: &str = "libusvm_preload.so";

/// The library that puts usvm's allocator under a program's malloc.
pub const HEAP: &str = "libusvm_heap.so";

/// The variable that names the first one.
pub const VARIABLE: &str = "USVM_PRELOAD_LIBRARY";

/// Finds the library to preload.
///
/// # Errors
/// Words that name what is missing and where it was looked for.
pub fn find() -> Result<PathBuf, String> {
    let named = std::env::var_os(VARIABLE).filter(|value| !value.is_empty());
    if let Some(named) = named {
        let usable = |path: PathBuf| is_library(&path).map(|()| path);
        let path = fs::canonicalize(&named).and_then(usable).map_err(|e| {
            format!("{VARIABLE} names {}, which cannot be used: {e}", PathBuf::from(named).display())
        })?;
        return fit_for_preloading(path);
    }
    let program =
        std::env::current_exe().and_then(fs::canonicalize).map_err(|e| format!("/proc/self/exe: {e}"))?;
    let places = places(&program);
    let found = places.iter().map(|place| place.join(PRELOAD)).find(|path| path.is_file());
    match found {
        Some(path) => fit_for_preloading(path),
        None => Err(format!(
            "{PRELOAD} is missing; it was looked for in {}. Install usvm whole (make install), build it (cargo build \
             --release -p usvm-preload), or name it with {VARIABLE}",
            places.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
        )),
    }
}

/// The library of usvm called `name` that lies beside `preload`.
///
/// # Errors
/// Words that name what is missing.
pub fn beside(preload: &Path, name: &str) -> Result<PathBuf, String> {
    let path = preload.with_file_name(name);
    if path.is_file() {
        Ok(path)
    } else {
        Err(format!("{} is missing; install usvm whole (make install)", path.display()))
    }
}

/// The directories to look in, for a program at `program`.
fn places(program: &Path) -> Vec<PathBuf> {
    let Some(bin) = program.parent() else { return Vec::new() };
    let mut places = vec![bin.to_path_buf()];
    if let Some(prefix) = bin.parent() {
        let multiarch = format!("lib/{}-linux-gnu", std::env::consts::ARCH);
        places.extend(["lib", "lib/usvm", "lib64", "lib64/usvm", &multiarch].map(|part| prefix.join(part)));
    }
    places
}

/// Whether the loader can load the file at `path`: where it cannot, the program would run without usvm.
fn is_library(path: &Path) -> io::Result<()> {
    let elf = ElfStream::<AnyEndian, _>::open_stream(file::open(path)?);
    let fits = elf.is_ok_and(|elf| {
        elf.ehdr.class == Class::ELF64 && elf.ehdr.e_machine == EM_X86_64 && elf.ehdr.e_type == ET_DYN
    });
    if fits { Ok(()) } else { Err(io::Error::other("it is no shared library for x86-64")) }
}

/// The loader separates the names of LD_PRELOAD by blanks and colons and cannot be told otherwise.
fn fit_for_preloading(path: PathBuf) -> Result<PathBuf, String> {
    if path.as_os_str().as_bytes().iter().any(|byte| b" :\t\n".contains(byte)) {
        let path = path.display();
        return Err(format!(
            "{path} cannot be preloaded: its path holds a blank or a colon; move it, or link to it"
        ));
    }
    Ok(path)
}

/// `list` with `entry` put before what is there, or after it; unchanged when it is in.
pub fn joined(list: Option<&OsString>, entry: &Path, first: bool) -> OsString {
    let entry = entry.as_os_str();
    let Some(list) = list.filter(|list| !list.is_empty()) else { return entry.to_owned() };
    if list.as_bytes().split(|byte| b" :".contains(byte)).any(|part| part == entry.as_bytes()) {
        return list.clone();
    }
    let (mut joined, last) = if first { (entry.to_owned(), list.as_os_str()) } else { (list.clone(), entry) };
    joined.push(":");
    joined.push(last);
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_keep_what_is_there() {
        let ours = Path::new("/l/ours.so");
        let list = OsString::from("/a.so:/b.so");
        assert_eq!(joined(None, ours, true), "/l/ours.so");
        assert_eq!(joined(Some(&OsString::new()), ours, true), "/l/ours.so");
        assert_eq!(joined(Some(&list), ours, true), "/l/ours.so:/a.so:/b.so");
        assert_eq!(joined(Some(&list), ours, false), "/a.so:/b.so:/l/ours.so");
        let again = joined(Some(&list), ours, true);
        assert_eq!(joined(Some(&again), ours, true), again);
    }

    #[test]
    fn it_is_looked_for_beside_the_program_and_in_its_prefix() {
        let places = places(Path::new("/opt/usvm/bin/usvm"));
        assert_eq!(places[0], Path::new("/opt/usvm/bin"));
        assert!(places.contains(&"/opt/usvm/lib".into()) && places.contains(&"/opt/usvm/lib/usvm".into()));
    }

    #[test]
    fn paths_that_the_loader_would_cut_are_refused() {
        assert!(fit_for_preloading("/a b/x.so".into()).is_err());
        assert!(fit_for_preloading("/a:b/x.so".into()).is_err());
        assert!(fit_for_preloading("/ab/x.so".into()).is_ok());
    }
}
