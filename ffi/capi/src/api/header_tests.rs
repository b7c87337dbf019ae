//! Whether `include/usvm.h` says what this library does.
//!
//! The header is written by hand, for its readers. Here cbindgen makes prototypes of the Rust functions, and a C compiler
//! is given both: it refuses two declarations of one function that differ. Layouts and constants are told to it as
//! assertions.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::result::RESULTS;
use super::result::usvm_result_t;
use super::types::*;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Prototypes of all exported functions, as cbindgen sees them.
fn generated() -> String {
    let mut config = cbindgen::Config {
        language: cbindgen::Language::C,
        style: cbindgen::Style::Type,
        usize_is_size_t: true,
        no_includes: true,
        cpp_compat: true,
        ..cbindgen::Config::default()
    };
    config.export.item_types = vec![cbindgen::ItemType::Functions];
    let mut builder = cbindgen::Builder::new().with_config(config);
    let sources = std::fs::read_dir(root().join("ffi/capi/src/api")).unwrap();
    let sources = sources.map(|entry| entry.unwrap().path()).chain([root().join("ffi/src/heap.rs")]);
    for source in sources {
        let text = std::fs::read_to_string(&source).unwrap();
        if text.contains("#[unsafe(no_mangle)]") && !source.ends_with("header_tests.rs") {
            builder = builder.with_src(source);
        }
    }
    let mut text = Vec::new();
    builder.generate().unwrap().write(&mut text);
    String::from_utf8(text).unwrap()
}

/// The names of functions that are declared in `text`.
fn declared(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '('));
    let names = words.filter_map(|word| word.split_once('(').map(|(name, _)| name.to_owned()));
    names.filter(|name| name.starts_with("usvm_")).collect()
}

/// The header without comments.
fn header() -> String {
    let text = std::fs::read_to_string(root().join("include/usvm.h")).unwrap();
    let parts = text.split("/*").map(|part| part.split_once("*/").map_or(part, |(_, after)| after));
    parts.collect()
}

fn compile(compiler: &str, standard: &str, name: &str, text: &str) {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join(name);
    std::fs::write(&source, text).unwrap();
    let output = Command::new(compiler)
        .args([standard, "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-I"])
        .arg(root().join("include"))
        .arg(&source)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{compiler} {standard}:\n{}\n{text}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// As C of 1999 and as C++ of 2017.
fn compile_as_both(text: &str) {
    compile("cc", "-std=c99", "check.c", text);
    compile("c++", "-std=c++17", "check.cpp", text);
}

#[test]
fn prototypes_are_the_functions() {
    let generated = generated();
    assert_eq!(declared(&header()), declared(&generated));
    assert_eq!(declared(&generated).len(), 33, "{generated}");
    compile_as_both(&format!("#include <usvm.h>\n{generated}"));
}

#[test]
fn a_difference_would_be_seen() {
    let wrong =
        "#include <usvm.h>\nusvm_result_t usvm_evict(usvm_space_t space, const void *ptr, int len);\n";
    let seen = std::panic::catch_unwind(|| compile("cc", "-std=c99", "check.c", wrong));
    assert!(seen.is_err());
}

#[test]
fn constants_and_layouts_are_the_same() {
    let mut text = String::from(
        "#include <usvm.h>\n#define SAME(name, condition) typedef char name[(condition) ? 1 : -1]\n",
    );
    let mut same = 0;
    let mut assert_that = |condition: String| {
        same += 1;
        writeln!(text, "SAME(same_{same}, {condition});").unwrap();
    };
    let more = [
        ("USVM_CONFIG_IGNORE_ENVIRONMENT", u64::from(USVM_CONFIG_IGNORE_ENVIRONMENT)),
        ("USVM_DEVICE_CAP_FAULTS", USVM_DEVICE_CAP_FAULTS),
        ("USVM_DEVICE_CAP_SYSTEM_ATOMICS", USVM_DEVICE_CAP_SYSTEM_ATOMICS),
        ("USVM_DEVICE_CAP_SIMULATED", USVM_DEVICE_CAP_SIMULATED),
        ("USVM_MAX_ACCESSES", USVM_MAX_ACCESSES as u64),
        ("USVM_STATS_VERSION", usvm_stats_t::VERSION),
        ("USVM_VERSION", u64::from(super::init::usvm_version())),
    ];
    for (name, value) in RESULTS.iter().chain(CONSTANTS).chain(&more) {
        assert_that(format!("{name} == {value}"));
    }
    macro_rules! layout {
        ($($ty:ident { $($field:ident as $c:literal),* })*) => {$(
            assert_that(format!("sizeof({}) == {}", stringify!($ty), size_of::<$ty>()));
            $(assert_that(format!(
                "offsetof({}, {}) == {}", stringify!($ty), $c, offset_of!($ty, $field)
            ));)*
        )*};
    }
    layout! {
        usvm_config_t { struct_size as "struct_size", options as "options", flags as "flags", reserved as "reserved" }
        usvm_device_info_t {
            struct_size as "struct_size", name as "name", vram_bytes as "vram_bytes",
            vram_free_bytes as "vram_free_bytes", cpu_visible_bytes as "cpu_visible_bytes",
            min_page_bytes as "min_page_bytes", capabilities as "capabilities"
        }
        usvm_space_config_t { struct_size as "struct_size", policy as "policy" }
        usvm_location_t { r#type as "type", id as "id" }
        usvm_access_t { ptr as "ptr", len as "len", mode as "mode", reserved as "reserved" }
        usvm_device_t {}
        usvm_result_t {}
        usvm_advice_t {}
        usvm_notify_reason_t {}
        usvm_notifier_callback_t {}
    }
    // The statistics' names are those of the rows, in the structure's order.
    let rows = usvm_stats_t::default().rows();
    for (i, row) in rows.iter().enumerate() {
        assert_that(format!("offsetof(usvm_stats_t, {}) == {}", row.name, 16 + 8 * i));
    }
    assert_that(format!("sizeof(usvm_stats_t) == {}", size_of::<usvm_stats_t>()));
    assert_eq!(rows.len() * 8 + 16, size_of::<usvm_stats_t>());
    compile_as_both(&text);
}

#[test]
fn every_enumerator_of_the_header_is_known() {
    let known: BTreeSet<&str> = RESULTS.iter().chain(CONSTANTS).map(|(name, _)| *name).collect();
    let header = header();
    let enums = header.split("typedef enum").skip(1).map(|e| e.split_once('}').unwrap().0);
    let names = enums.flat_map(|e| e.split_once('{').unwrap().1.split(','));
    let names: BTreeSet<&str> = names
        .filter_map(|n| n.split('=').next())
        .map(str::trim)
        .filter(|n| !n.is_empty() && !n.ends_with("_FORCE_32"))
        .collect();
    assert_eq!(names, known);
}
