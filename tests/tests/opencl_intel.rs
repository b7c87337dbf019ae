//! Intel's OpenCL runtime for processors, the Khronos loader that its wheel brings, and SYCL programs on both. They are
//! in a virtual environment that `tests/opencl/intel.sh` makes; without it these tests are skipped.

mod opencl;

use std::path::PathBuf;
use std::process::Command;

use opencl::{WAYS, Way, command, compile, root, run};
use usvm_tests::isolated::skipped;

const CHAOS: (&str, &str) = ("USVM_CHAOS", "200,7");

/// The environment's folder, if it is there.
fn venv() -> Option<PathBuf> {
    let folder = std::env::var_os("DPNP_VENV").map_or_else(|| root().join("target/venv-dpnp"), PathBuf::from);
    if folder.join("lib/libintelocl.so").exists() && folder.join("lib/libOpenCL.so.1").exists() {
        return Some(folder);
    }
    let why = std::fs::read_to_string(root().join("target/venv-dpnp.why"));
    let why = why.unwrap_or_else(|_| "`make test` and `make test-opencl-intel` put it there".to_owned());
    skipped(format!("no Intel runtime and dpnp in {}: {}", folder.display(), why.trim()));
    None
}

/// `program` on the Khronos loader and Intel's driver.
fn on_intel(venv: &std::path::Path, program: impl AsRef<std::ffi::OsStr>, way: Way) -> Command {
    let mut command = command(program, way);
    command
        .env("LD_LIBRARY_PATH", venv.join("lib"))
        .env("OCL_ICD_FILENAMES", venv.join("lib/libintelocl.so"))
        .env("OCL_ICD_VENDORS", "/nonexistent")
        .env("ONEAPI_DEVICE_SELECTOR", "opencl:cpu");
    command
}

#[test]
fn pocl_under_the_khronos_loader() {
    let Some(venv) = venv() else { return };
    let program = compile("tests/opencl/usm.c");
    let khronos = |way| {
        let mut command = command(&program, way);
        command.env("LD_LIBRARY_PATH", venv.join("lib"));
        command
    };
    assert_eq!(run(&mut khronos(Way::Off)).status, 3, "PoCL has USM by itself");
    let expected = run(&mut command(&program, Way::Layer)).well().out;
    for way in WAYS {
        let ran = run(&mut khronos(way)).well();
        assert_eq!(ran.out, expected, "{way:?}");
        let seen = (ran.count("opencl_layers"), ran.count("opencl_preloads"));
        assert_eq!(seen, if way == Way::Preload { (0, 1) } else { (1, 0) }, "{way:?}: {}", ran.err);
    }
    // The older way for layers to end, which older Khronos loaders know only.
    let ran = run(khronos(Way::Layer).env("OCL_ICD_FORCE_LEGACY_TERMINATION", "1")).well();
    assert_eq!((ran.out, ran.err.contains("opencl_layers")), (expected, true));
}

#[test]
fn the_drivers_own_usm_and_svm_are_watched() {
    let Some(venv) = venv() else { return };
    for (source, argument) in [("tests/opencl/usm.c", "not exact"), ("tests/opencl/svm.c", "system")] {
        let program = compile(source);
        let off = run(on_intel(&venv, &program, Way::Off).arg(argument)).well();
        for way in WAYS {
            let ran = run(on_intel(&venv, &program, way).arg(argument)).well();
            assert_eq!(ran.out, off.out, "{source} {way:?}");
            assert!(ran.err.contains("USM by the driver"), "{source} {way:?}: {}", ran.err);
            assert!(ran.count("opencl_launches") >= 9, "{source} {way:?}: {}", ran.err);
            assert!(ran.count("opencl_working_set_bytes") > 1 << 20, "{source} {way:?}: {}", ran.err);
            assert_eq!(ran.count("opencl_usm_provided"), 0, "{source} {way:?}: {}", ran.err);
        }
        let ran = run(on_intel(&venv, &program, Way::Both).arg(argument).envs([CHAOS])).well();
        assert_eq!(ran.out, off.out, "{source} chaos");
        assert!(ran.count("opencl_launches_migrated") > 0, "{source}: {}", ran.err);
    }
}

#[test]
fn the_systems_loader_with_intels_driver() {
    let Some(venv) = venv() else { return };
    let program = compile("tests/opencl/svm.c");
    let ran = run(command(&program, Way::Layer)
        .arg("system")
        .env("OCL_ICD_VENDORS", venv.join("lib/libintelocl.so"))
        .env("LD_LIBRARY_PATH", "/usr/lib/x86_64-linux-gnu"))
    .well();
    assert!(ran.err.contains("of Intel(R) OpenCL"), "{}", ran.err);
    assert!(ran.out.contains("system: verified"), "{}", ran.out);
}

#[test]
fn sycl_through_dpnp_computes_the_same() {
    let Some(venv) = venv() else { return };
    let python = venv.join("bin/python");
    let dpnp = |way| {
        let mut command = on_intel(&venv, &python, way);
        command.arg(root().join("examples/sycl/dpnp_script.py"));
        command
    };
    let off = run(&mut dpnp(Way::Off)).well();
    assert!(off.out.contains("sha256: "), "{}", off.out);
    for way in [Way::Layer, Way::Both] {
        let ran = run(&mut dpnp(way)).well();
        assert_eq!(ran.out, off.out, "{way:?}");
        assert!(
            ran.count("opencl_launches") > 10 && ran.count("opencl_usm_native") > 10,
            "{way:?}: {}",
            ran.err
        );
    }
    let ran = run(dpnp(Way::Both).envs([CHAOS])).well();
    assert_eq!(ran.out, off.out, "chaos");
    assert!(ran.count("cpu_faults") > 0 && ran.count("opencl_launches_migrated") > 0, "{}", ran.err);
}
