//! `ffi/install.sh`: who can read what it installs, and what usvm.pc says of the place.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::stand::{FOLDER, Said, compile, said, skipped};

/// Installs a library of one function instead of usvm's into `prefix`.
fn install(prefix: &Path) -> Said {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/install.sh");
    let line = r#"umask 077; ar crs "$2.a" "$2" && exec sh "$1" "$2.a" "$3""#;
    said(Command::new("sh").args(["-c", line, "sh", script]).arg(object(prefix)).arg(prefix))
}

fn object(prefix: &Path) -> PathBuf {
    let name = format!("{}.o", prefix.file_name().unwrap().len());
    compile(&name, "int usvm_one(void) { return 1; }", &["-c", "-fPIC"])
}

#[test]
fn everybody_can_read_what_is_installed() {
    let prefix = FOLDER.path().join("a prefix & more");
    let ended = install(&prefix);
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let mut folders = vec![prefix.clone()];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::metadata(&path).unwrap();
            let runs = meta.is_dir() || path.to_string_lossy().contains(".so");
            let want = if runs { 0o755 } else { 0o644 };
            assert_eq!(meta.permissions().mode() & 0o777, want, "{}", path.display());
            files += usize::from(meta.is_file());
            if meta.is_dir() {
                folders.push(path);
            }
        }
    }
    assert!(files > 8, "{files}");
    let described = fs::read_to_string(prefix.join("lib/pkgconfig/usvm.pc")).unwrap();
    assert!(described.starts_with(&format!("prefix={}\n", prefix.display())), "{described}");
    let mut asks = Command::new("pkg-config");
    asks.args(["--cflags", "--libs", "usvm"]).env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig"));
    match asks.output() {
        Ok(told) => {
            let told = shlex::split(str::from_utf8(&told.stdout).unwrap()).unwrap();
            let [include, lib] = ["include", "lib"].map(|part| prefix.join(part).display().to_string());
            assert_eq!(told, [format!("-I{include}"), format!("-L{lib}"), "-lusvm".into()]);
        }
        Err(_) => skipped("pkg-config is not here"),
    }
}

#[test]
fn a_prefix_that_cannot_be_named_is_refused() {
    for name in ["a\"", "a\\bb", "a$bbb", "a`bbbb", "a#bbbbb", "a\nbbbbbb"] {
        let prefix = FOLDER.path().join(name);
        let ended = install(&prefix);
        assert_eq!(ended.code, Some(1), "{name:?}");
        assert!(ended.err.contains("which usvm.pc cannot name"), "{}", ended.err);
        assert!(!prefix.exists(), "nothing is installed");
    }
}
