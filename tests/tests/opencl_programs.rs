//! OpenCL programs on PoCL, without usvm and with it in every way it can come in: the same results, and unified shared
//! memory where there was none.

mod opencl;

use opencl::{Ran, WAYS, Way, command, compile, compile_with, library, root, run};
use usvm_tests::isolated::skipped;

/// The environment of programs whose memory is to move around their launches.
const MOVING: [&[(&str, &str)]; 3] = [
    &[("USVM_POLICY", "adaptive")],
    &[("USVM_POLICY", "gpusvm"), ("USVM_VRAM", "2M")],
    &[("USVM_CHAOS", "500,7")],
];

/// Whether there are a driver, a loader and headers to test with; says what is missing otherwise.
fn available() -> bool {
    let driver = std::fs::read_dir("/etc/OpenCL/vendors").is_ok_and(|folder| {
        folder.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("pocl"))
    });
    let headers = std::path::Path::new("/usr/include/CL/cl_layer.h").exists();
    if !driver || !headers {
        skipped("OpenCL tests need Debian's pocl-opencl-icd, ocl-icd-opencl-dev and opencl-headers");
    }
    driver && headers
}

/// Whether `name` is in the path.
fn installed(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

#[test]
fn a_program_that_needs_usm_gets_it_from_usvm_and_only_from_there() {
    if !available() {
        return;
    }
    let program = compile("tests/opencl/usm.c");
    let without = run(&mut command(&program, Way::Off));
    assert_eq!((without.status, without.out.as_str()), (3, "no cl_intel_unified_shared_memory\n"));

    let mut said = Vec::new();
    for way in WAYS {
        let ran = run(&mut command(&program, way)).well();
        assert!(ran.out.ends_with("errors: as specified\nusm: verified\n"), "{way:?}: {}", ran.out);
        // The list's nodes and everything else, one by one.
        assert_eq!(ran.count("opencl_usm_provided"), 2012, "{way:?}: {}", ran.err);
        assert_eq!(ran.count("opencl_launches"), 25, "{way:?}: {}", ran.err);
        // Seen once, not twice, where both ways are open.
        let seen = (ran.count("opencl_layers"), ran.count("opencl_preloads"));
        assert_eq!(seen, if way == Way::Preload { (0, 1) } else { (1, 0) }, "{way:?}: {}", ran.err);
        said.push(ran.out);
    }
    assert!(said.iter().all(|out| *out == said[0]), "{said:?}");

    for asked in MOVING {
        let ran = run(command(&program, Way::Both).envs(asked.iter().copied())).well();
        assert_eq!(ran.out, said[0], "{asked:?}");
        assert!(ran.count("cpu_faults") > 0, "nothing moved with {asked:?}: {}", ran.err);
        assert!(ran.count("opencl_launches_migrated") > 0, "{asked:?}: {}", ran.err);
    }
}

#[test]
fn svm_programs_compute_the_same() {
    if !available() {
        return;
    }
    let program = compile("tests/opencl/svm.c");
    let off = run(&mut command(&program, Way::Off)).well();
    for way in WAYS {
        let ran = run(&mut command(&program, way)).well();
        assert_eq!(ran.out, off.out, "{way:?}");
        // 3 launches with one block of 2 MiB, 4 with a table, 16 rows of 12000 bytes and 16 sums.
        let bytes = 3 * (4 << 19) + 4 * (128 + 16 * 12000 + 64);
        assert_eq!(ran.count("opencl_working_set_bytes"), bytes, "{way:?}: {}", ran.err);
        assert_eq!(ran.count("opencl_hints"), 6, "{way:?}: {}", ran.err);
        // Observed, not moved: the device shares the host's memory.
        assert!(!ran.err.contains("bytes_to_device"), "{way:?}: {}", ran.err);
    }
    for asked in MOVING {
        for way in [Way::Layer, Way::Both] {
            let ran = run(command(&program, way).envs(asked.iter().copied())).well();
            assert_eq!(ran.out, off.out, "{way:?} {asked:?}");
            assert!(ran.err.contains("bytes_to_device"), "{way:?} {asked:?}: {}", ran.err);
        }
    }
}

/// A number of bytes of usvm's report, as exact as it tells it; zero if it is not in it.
fn bytes(ran: &Ran, name: &str) -> u64 {
    let line = ran.err.lines().find(|l| l.split_whitespace().next() == Some(name)).unwrap_or_default();
    let mut words = line.split_whitespace().skip(1);
    let number: f64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
    let power = ["KiB", "MiB", "GiB"].iter().position(|unit| words.clone().next() == Some(unit));
    (number * 1024f64.powi(power.map_or(0, |p| p as i32 + 1))) as u64
}

/// Each way in which a kernel gets at memory is known, by itself.
#[test]
fn a_launch_takes_along_what_it_reaches_in_any_way() {
    if !available() {
        return;
    }
    let program = compile("tests/opencl/reach.c");
    let block = 8 << 20;
    for (way, reaches) in [("a", true), ("m", true), ("s", true), ("u", true), ("k", true), ("-", false)] {
        let ran = run(command(&program, Way::Both).arg(way).envs(MOVING[1].iter().copied())).well();
        assert_eq!(ran.out, "reach: verified\n", "{way}");
        let known = ran.count("opencl_working_set_bytes");
        assert_eq!(known / block, u64::from(reaches), "{way}: {known} bytes are known: {}", ran.err);
        let moved = bytes(&ran, "bytes_to_device");
        assert_eq!(moved >= block, reaches, "{way}: {moved} bytes moved: {}", ran.err);
    }
}

/// Where the memory is after the hints shows in who has to fetch it.
#[test]
fn hints_go_where_they_say() {
    if !available() {
        return;
    }
    let program = compile("tests/opencl/hints.c");
    let faults = |hints: &str| {
        let ran = run(command(&program, Way::Both)
            .arg(hints)
            .envs(MOVING[1].iter().copied())
            .env("USVM_VRAM", "32M"));
        let ran = ran.well();
        assert_eq!(ran.out, "hints: verified\n");
        ran.count("cpu_faults")
    };
    let pairs = [("u", "um"), ("d", "dh"), ("D", "DH"), ("um", "umu"), ("dh", "dhd"), ("DH", "DHD")];
    for (there, back) in pairs {
        let (first, second) = (faults(there), faults(back));
        let (away, home) = if there.len() == 1 { (first, second) } else { (second, first) };
        // 8 MiB are four ranges; the program has other memory that may be in one of them.
        assert!(away >= 4 && home + 3 <= away, "{there}: {first} faults, {back}: {second}");
    }
}

/// With the policy `remote` a launch is a bracket in the host's memory: what it uses stays there until it is complete, and the
/// processor waits for nothing.
#[test]
fn a_launch_of_the_remote_policy_holds_what_it_uses_at_home() {
    if !available() {
        return;
    }
    let program = compile("tests/opencl/hold.c");
    let held = |what: &str| {
        let ran = run(command(&program, Way::Both).arg(what).env("USVM_POLICY", "remote")).well();
        assert_eq!(ran.out, if what == "x" { "hold: left\n" } else { "hold: verified\n" }, "{what}");
        assert_eq!(ran.count("opencl_launches_held"), 2, "{what}: {}", ran.err);
        assert_eq!(ran.count("opencl_launches_migrated"), 0, "{what}: {}", ran.err);
        ran.count("cpu_faults")
    };
    // 8 MiB are four ranges; the program has other memory that may be in one of them.
    let (without, during, after) = (held("-"), held("h"), held("e"));
    assert!(during < without + 4 && after >= without + 4, "{without} faults, {during}, {after}");
    held("x");
    let ran = run(command(&program, Way::Both)
        .arg("x")
        .env("USVM_POLICY", "remote")
        .env("USVM_DEVICE", "sim:arc-a770"));
    assert_eq!(ran.well().out, "hold: left\n", "on a device that cannot fault");
    for asked in [&[("USVM_POLICY", "remote"), ("USVM_CHAOS", "2000,5")], MOVING[1]] {
        let ran = run(command(&program, Way::Both).arg("he").envs(asked.iter().copied())).well();
        assert_eq!(ran.out, "hold: verified\n", "{asked:?}");
        assert!(ran.count("cpu_faults") > 0, "{asked:?}: {}", ran.err);
    }
}

/// What a launch can reach is held by pages, each once, whatever it consists of.
#[test]
fn a_launch_that_reaches_much_is_held_in_one_go() {
    if !available() {
        return;
    }
    let program = compile("tests/opencl/crowd.c");
    // Of 1000 blocks of 64 bytes many share a page; of 1000 pages for reading only none touch.
    for (what, most) in [("b", 1000), ("r", 2 * 1000 + 100)] {
        let ran = run(command(&program, Way::Both).arg(what).env("USVM_POLICY", "remote")).well();
        assert_eq!(ran.out, "crowd: verified\n", "{what}");
        assert_eq!(ran.count("opencl_launches_held"), 2, "{what}: {}", ran.err);
        let mapped = ran.count("gpu_faults");
        assert!((1..=most).contains(&mapped), "{what}: {mapped} ranges: {}", ran.err);
    }
}

#[test]
fn system_memory_is_offered_where_the_device_runs_in_this_process() {
    if !available() {
        return;
    }
    let program = compile("tests/opencl/svm.c");
    let off = run(command(&program, Way::Off).arg("system")).well();
    assert!(off.out.contains("system: not offered\n"), "{}", off.out);
    for asked in [&[][..], MOVING[0], MOVING[2]] {
        let ran = run(command(&program, Way::Both).arg("system").envs(asked.iter().copied())).well();
        assert!(ran.out.contains("system: verified\n"), "{asked:?}: {}", ran.out);
        assert_eq!(ran.count("opencl_system_pointer_launches"), 2, "{asked:?}: {}", ran.err);
    }
}

#[test]
fn threads_do_not_disturb_each_other() {
    if !available() {
        return;
    }
    let program = compile("tests/opencl/threads.c");
    let off = run(command(&program, Way::Off).arg("-")).well();
    for way in WAYS {
        let ran = run(&mut command(&program, way)).well();
        assert_eq!(ran.out, off.out, "{way:?}");
        assert_eq!(ran.count("opencl_launches"), 240, "{way:?}: {}", ran.err);
        assert_eq!(ran.err.matches("opencl_launches").count(), 1, "told twice: {}", ran.err);
    }
    for asked in MOVING {
        let ran = run(command(&program, Way::Both).envs(asked.iter().copied())).well();
        assert_eq!(ran.out, off.out, "{asked:?}");
    }
}

#[test]
fn the_table_of_entry_points_is_that_of_the_headers() {
    if !available() {
        return;
    }
    let program = compile("tests/opencl/loader.c");
    let ran = run(command(&program, Way::Off).arg(library())).well();
    assert_eq!(ran.out, "loader: verified\n");
}

/// Constants of the layer that are not called as in C, without `CL_` and `_INTEL`.
const RENAMED: &[(&str, &str)] = &[
    ("ALLOC_PLACED_ON_", "MEM_ALLOC_INITIAL_PLACEMENT_"),
    ("ALLOC_WRITE", "MEM_ALLOC_WRITE"),
    ("DEVICE_SINGLE_SHARED", "DEVICE_SINGLE_DEVICE_SHARED"),
    ("DEVICE_CROSS_SHARED", "DEVICE_CROSS_DEVICE_SHARED"),
    ("MIGRATE_TO_HOST", "MIGRATE_MEM_OBJECT_HOST"),
    ("MIGRATE_CONTENT", "MIGRATE_MEM_OBJECT_CONTENT"),
    ("SVM_", "DEVICE_SVM_"),
    ("USM_", "UNIFIED_SHARED_MEMORY_"),
];

#[test]
fn constants_are_those_of_the_headers() {
    if !available() {
        return;
    }
    let source = std::fs::read_to_string(root().join("ffi/preload/src/opencl/types.rs")).expect("the types");
    let mut code = String::from("#include \"common.h\"\n#include <CL/cl_layer.h>\nint main(void) {\n");
    let mut count = 0;
    for line in source.lines().filter_map(|l| l.strip_prefix("pub const ")) {
        let (name, rest) = line.split_once(": ").expect("a type");
        let value = rest.split_once(" = ").expect("a value").1.trim_end_matches(';').replace('_', "");
        let renamed = RENAMED.iter().find_map(|(from, to)| Some(format!("{to}{}", name.strip_prefix(from)?)));
        let name = renamed.as_deref().unwrap_or(name);
        let names = [format!("CL_{name}"), format!("CL_{name}_INTEL"), format!("CL_{name}_ACCESS_INTEL")];
        for (how, name) in ["#if", "#elif", "#elif"].iter().zip(&names) {
            code += &format!(
                "{how} defined({name})\n_Static_assert((long long)({name}) == ({value}), \"{name}\");\n"
            );
        }
        code += &format!("#else\n#error {name} is in no header\n#endif\n");
        count += 1;
    }
    code += "return 0; }\n";
    assert!(count > 70, "only {count} constants were found");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("constants.c");
    std::fs::write(&file, code).expect("a file");
    compile_with(
        file.to_str().expect("a path"),
        &["-I", root().join("tests/opencl").to_str().expect("a path")],
    );
}

#[test]
fn what_a_device_gets_follows_from_what_its_driver_says() {
    if !available() {
        return;
    }
    let driver = compile_with("tests/opencl/driver.c", &["-shared", "-fPIC", "-fvisibility=hidden"]);
    let program = compile("tests/opencl/device.c");
    let on = |way, settings: &[(&str, &str)]| {
        let mut command = command(&program, way);
        command.env("OCL_ICD_VENDORS", &driver).envs(settings.iter().copied());
        run(&mut command).well()
    };
    let nothing = |svm| format!("extension: no\nsvm {svm}, usm 99 99 99 99 99\nno functions\n");
    assert_eq!(on(Way::Off, &[("FAKE_SVM", "1")]).out, nothing(1));
    for way in WAYS {
        // No SVM: nothing can be provided.
        assert_eq!(on(way, &[("FAKE_SVM", "0")]).out, nothing(0), "{way:?}");

        // Coarse-grained buffers: device allocations only. The driver hears of what is reached indirectly when it changes.
        let coarse = on(way, &[("FAKE_SVM", "1")]);
        let expected = "extension: yes\nsvm 1, usm 0 1 0 0 0\nhost: -59\nshared: -59\n\
            driver: 7000 bytes with flags 0x1\ndevice: 0\ndriver: launch\nindirectly, from here on\n\
            driver: 1 pointers reached indirectly\ndriver: launch\ndriver: 100 bytes with flags 0x1\n\
            driver: 2 pointers reached indirectly\ndriver: launch\ndriver: launch\ndriver: launch\n\
            driver: finish a queue with 2 references\ndriver: finish a queue with 2 references\n\
            driver: 300 bytes with flags 0x1\nof the context before: 0 bytes\n\
            events that nobody released: 0\n";
        assert_eq!(coarse.out, expected, "{way:?}");
        // 7000 alone twice, with the other 100 three times; the launch that was refused does not count.
        assert_eq!((coarse.count("opencl_launches"), coarse.count("opencl_working_set_bytes")), (5, 35300));

        // Fine-grained buffers, with and without atomics; memory of its own never migrates, the host's if it is asked for.
        for (svm, capabilities, flags) in [("3", "5 5 5 5 0", "0x401"), ("11", "15 15 15 15 0", "0xc01")] {
            for (unified, migrated) in [("0", 0), ("1", 5)] {
                let asked = [("FAKE_SVM", svm), ("FAKE_UNIFIED", unified), MOVING[0][0]];
                let fine = on(way, &asked);
                assert!(
                    fine.out.contains(&format!("\nsvm {svm}, usm {capabilities}\n")),
                    "{way:?}: {}",
                    fine.out
                );
                assert!(
                    fine.out.contains(&format!("6000 bytes with flags {flags}\nshared: 0\n")),
                    "{}",
                    fine.out
                );
                assert!(fine.out.ends_with("events that nobody released: 0\n"), "{way:?}: {}", fine.out);
                // The launch that the driver then refused had moved its data, too.
                let moved = fine.count("opencl_launches_migrated");
                assert_eq!(moved, migrated + u64::from(migrated > 0), "{way:?} {asked:?}: {}", fine.err);
            }
        }
    }
}

#[test]
fn the_example_needs_usvm_on_pocl() {
    if !available() {
        return;
    }
    let program = compile("examples/opencl/usm_list.c");
    let off = run(&mut command(&program, Way::Off));
    assert_eq!(off.status, 1);
    assert!(off.out.contains("no unified shared memory"), "{}", off.out);
    for way in WAYS {
        let ran = run(&mut command(&program, way)).well();
        assert!(ran.out.ends_with(" in shared memory: verified\n"), "{way:?}: {}", ran.out);
        assert_eq!(ran.count("opencl_launches"), 2, "{way:?}: {}", ran.err);
    }
}

/// What PoCL asks the machine for each time: a virtual machine can be given memory while it runs.
fn is_of_the_moment(line: &str) -> bool {
    ["Max clock frequency", "Global memory size", "Max memory allocation"]
        .iter()
        .any(|what| line.contains(what))
}

#[test]
fn clinfo_tells_of_usm_and_nothing_else_changes() {
    if !available() {
        return;
    }
    if !installed("clinfo") {
        skipped("clinfo is not installed");
        return;
    }
    let off = run(&mut command("clinfo", Way::Off)).well();
    assert!(!off.out.contains("cl_intel_unified_shared_memory"), "this PoCL has USM itself: {}", off.out);
    let differ = |out: &str| -> Vec<String> {
        let lines = |text: &str| -> Vec<String> {
            text.lines().filter(|l| !is_of_the_moment(l)).map(str::to_owned).collect()
        };
        let (ours, theirs) = (lines(out), lines(&off.out));
        assert_eq!(ours.len(), theirs.len(), "{out}");
        ours.iter().zip(&theirs).filter(|(a, b)| a != b).map(|(a, b)| format!("{a} | {b}")).collect()
    };
    let switched_off = run(command("clinfo", Way::Both).env("USVM_ENABLE", "0")).well();
    assert_eq!(differ(&switched_off.out), [""; 0]);
    for way in WAYS {
        let ran = run(&mut command("clinfo", way)).well();
        let changed = |line: &&str| {
            line.contains("USM")
                || is_of_the_moment(line)
                || line.contains("cl_intel_unified_shared_memory")
                || line.contains("Fine-grained system")
        };
        let added: Vec<&str> = ran.out.lines().filter(changed).collect();
        assert!(added.iter().any(|l| l.starts_with("  Device Extensions ")), "{way:?}: {added:?}");
        assert!(added.iter().any(|l| l.starts_with("  Host USM capabilities")), "{way:?}: {added:?}");
        let rest = |text: &str| -> Vec<String> {
            let shortened = text.replace(" cl_intel_unified_shared_memory\n", "\n");
            shortened.lines().filter(|l| !changed(l)).map(str::to_owned).collect()
        };
        assert_eq!(rest(&ran.out), rest(&off.out), "{way:?}");
    }
}

#[test]
fn clpeak_runs() {
    if !available() {
        return;
    }
    if !installed("clpeak") {
        skipped("clpeak is not installed");
        return;
    }
    // What it measures differs from run to run; everything else is the same.
    let words = |text: &str| text.chars().filter(|c| !c.is_ascii_digit() && *c != '.').collect::<String>();
    let off = run(command("clpeak", Way::Off).arg("--kernel-latency")).well();
    for (way, asked) in [(Way::Layer, &[][..]), (Way::Preload, &[][..]), (Way::Both, MOVING[2])] {
        let ran = run(command("clpeak", way).arg("--kernel-latency").envs(asked.iter().copied())).well();
        assert_eq!(words(&ran.out), words(&off.out), "{way:?}");
        assert!(ran.count("opencl_launches") > 100, "{way:?}: {}", ran.err);
    }
}

#[test]
fn pyopencl_and_its_own_loader() {
    if !available() {
        return;
    }
    let python = root().join("target/opencl-venv/bin/python");
    if !python.exists() {
        skipped("tests/opencl/venv.sh could not make an environment with pyopencl");
        return;
    }
    let script = root().join("tests/opencl/pyopencl_svm.py");
    let off = run(command(&python, Way::Off).arg(&script)).well();
    for way in WAYS {
        let ran = run(command(&python, way).arg(&script)).well();
        assert_eq!(ran.out, off.out, "{way:?}");
        assert!(ran.err.contains("pyopencl: USM offered"), "{way:?}: {}", ran.err);
        assert_eq!(ran.count("opencl_launches"), 5, "{way:?}: {}", ran.err);
    }
    let ran = run(command(&python, Way::Both).arg(&script).envs(MOVING[2].iter().copied())).well();
    assert_eq!(ran.out, off.out, "chaos");
    // A second loader in the same process, the system's.
    let ran = run(command(&python, Way::Both).arg(&script).arg("two")).well();
    assert!(ran.out.ends_with("system's loader: USM offered\n"), "{}", ran.out);
    assert_eq!(ran.count("opencl_layers"), 2, "{}", ran.err);
}
