//! Links the unwinder into the library instead of making it need `libgcc_s.so.1`.
//!
//! A preloaded library and what it needs are searched for every symbol that any library of the program looks up, so one
//! library less is felt where many are loaded (an OpenCL driver with a compiler in it looks up 20,000). Not only that: it is
//! one less to find, map and relocate. Frames that a foreign exception passes are unwound by whose it is, as ever.
//!
//! The standard library asks the linker for `-lgcc_s`; a linker script of that name, found first, names the static one.
//! Where the compiler has none, everything is as without this.

use std::path::{Path, PathBuf};
use std::process::Command;

pub fn link_in() {
    println!("cargo:rerun-if-env-changed=RUSTC_LINKER");
    if std::env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env != "gnu") {
        return;
    }
    let driver = std::env::var("RUSTC_LINKER").unwrap_or_else(|_| "cc".into());
    let Some(archive) = archive(&driver) else { return };
    let out = std::env::var("OUT_DIR").expect("cargo sets it");
    let script = format!("INPUT({})\n", archive.display());
    if std::fs::write(Path::new(&out).join("libgcc_s.so"), script).is_ok() {
        println!("cargo:rustc-link-search=native={out}");
    }
}

/// The static unwinder of the compiler that links.
fn archive(driver: &str) -> Option<PathBuf> {
    let told = Command::new(driver).arg("-print-file-name=libgcc_eh.a").output().ok()?;
    let path = PathBuf::from(String::from_utf8(told.stdout).ok()?.trim());
    // A compiler that has none gives the bare name back.
    (path.is_absolute() && path.is_file()).then_some(path)
}
