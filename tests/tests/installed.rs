//! What `make install` puts into a prefix, used from there: the program finds its own libraries, programs run under it, and
//! what it writes can be read.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;
use usvm_tests::isolated::skipped;

/// How long one program may take.
const LIMIT: Duration = Duration::from_secs(100);

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository")
}

/// The target folder that this test was built into.
fn target() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    test.ancestors().nth(3).expect("tests lie in target/PROFILE/deps").to_owned()
}

/// A folder under target/ for what this test makes.
fn scratch() -> PathBuf {
    let folder = target().join("installed");
    std::fs::create_dir_all(&folder).expect("a folder under target/");
    folder
}

/// The folder that `make install DESTDIR=… PREFIX=/usr` filled.
fn stage() -> &'static Path {
    static STAGE: OnceLock<PathBuf> = OnceLock::new();
    STAGE.get_or_init(|| {
        let stage = scratch().join("stage");
        let _ = std::fs::remove_dir_all(&stage);
        let mut destination = std::ffi::OsString::from("DESTDIR=");
        destination.push(&stage);
        let made = Command::new("make")
            .args(["--no-print-directory", "install", "PREFIX=/usr"])
            .arg(destination)
            .env("CARGO_TARGET_DIR", target())
            .current_dir(root())
            .output()
            .expect("make runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        stage
    })
}

/// The installed program, in an environment without anybody's settings.
fn usvm(words: &[&str]) -> Command {
    let mut command = Command::new(stage().join("usr/bin/usvm"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("USVM_")) {
        command.env_remove(name);
    }
    command.env_remove("LD_PRELOAD").env_remove("OPENCL_LAYERS").stdin(Stdio::null()).args(words);
    command
}

struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

/// Runs it to its end, which must come.
fn said(command: &mut Command) -> Said {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    ended(child, &format!("{command:?}"))
}

fn ended(mut child: Child, what: &str) -> Said {
    // Both are read meanwhile, or a program that says much would wait.
    let mut err = child.stderr.take().expect("a pipe");
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        err.read_to_string(&mut text).map(|_| text)
    });
    let pid = child.id().to_string();
    let (done, over) = std::sync::mpsc::channel::<()>();
    let what = what.to_owned();
    let guard = std::thread::spawn(move || {
        if over.recv_timeout(LIMIT).is_err() {
            let _ = Command::new("kill").args(["-KILL", &pid]).status();
            panic!("{what} hangs");
        }
    });
    let output = child.wait_with_output().expect("its output");
    done.send(()).expect("the guard waits");
    guard.join().expect("it did not hang");
    Said {
        code: output.status.code(),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: reader.join().expect("the reader").expect("text"),
    }
}

/// Compiles a program of the repository.
fn compile(source: &str, more: &[&str]) -> PathBuf {
    let source = root().join(source);
    let program = scratch().join(source.file_stem().expect("a file"));
    let compiler = if source.extension().is_some_and(|e| e == "cc") { "c++" } else { "cc" };
    let mut command = Command::new(compiler);
    command.args(["-O1", "-w", "-o"]).arg(&program).arg(&source).args(["-pthread", "-ldl"]).args(more);
    assert!(command.status().expect("a compiler").success(), "{} compiles", source.display());
    program
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

fn migrations(stats: &Value) -> u64 {
    ["migrations_4k", "migrations_64k", "migrations_2m"]
        .iter()
        .map(|name| stats[name].as_u64().expect("a number"))
        .sum()
}

#[test]
fn everything_is_in_its_place() {
    let prefix = stage().join("usr");
    for file in [
        "bin/usvm",
        "lib/libusvm.so.0",
        "lib/libusvm.a",
        "lib/pkgconfig/usvm.pc",
        "lib/cmake/usvm/usvm-config.cmake",
        "lib/usvm/libusvm_preload.so",
        "lib/usvm/libusvm_heap.so",
        "include/usvm.h",
        "include/usvm.hpp",
        "include/usvm_umf.h",
        "share/man/man1/usvm.1",
        "share/man/man1/usvm-run.1",
        "share/bash-completion/completions/usvm",
        "share/zsh/site-functions/_usvm",
        "share/fish/vendor_completions.d/usvm.fish",
    ] {
        assert!(prefix.join(file).is_file(), "{file} is not installed");
    }
}

#[test]
fn the_doctor_speaks_json() {
    let doctor = said(&mut usvm(&["doctor", "--json"]));
    let told = parse(&doctor.out);
    let verdict = told["verdict"].as_str().expect("a verdict");
    assert_eq!(doctor.code, Some(i32::from(verdict == "fail")), "{}", doctor.out);
    let checks = told["checks"].as_array().expect("a list");
    assert!(checks.len() > 10, "{}", doctor.out);
    for check in checks {
        let status = check["status"].as_str().expect("a status");
        assert!(["ok", "warn", "fail"].contains(&status), "{check}");
        assert!(status == "ok" || check["fix"].is_string() || check["means"].is_string(), "{check}");
    }
    let devices = said(&mut usvm(&["devices", "--json"]));
    assert!(devices.code == Some(0) && parse(&devices.out).to_string().contains("sim"), "{}", devices.out);
}

#[test]
fn a_program_under_chaos_leaves_statistics_and_a_trace() {
    let program = compile("tests/programs/c/churn.c", &[]);
    let (stats, trace) = (scratch().join("stats.json"), scratch().join("trace.json"));
    for file in [&stats, &trace] {
        let _ = std::fs::remove_file(file);
    }
    let plain = said(Command::new(&program).args(["0.1", "2", "0"]));
    let mut command = usvm(&["run", "--chaos", "1500", "--stats-file"]);
    command.arg(&stats).arg("--trace").arg(&trace).arg("--").arg(&program).args(["2", "3", "0"]);
    let ran = said(&mut command);
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), plain.out.as_str()), "{}", ran.err);

    let numbers = parse(&std::fs::read_to_string(&stats).expect("statistics"));
    assert!(migrations(&numbers) > 500, "{numbers}");
    let table = said(usvm(&["stats"]).arg(&stats));
    assert!(table.code == Some(0) && table.out.contains("bytes_to_device"), "{}{}", table.out, table.err);

    let events = parse(&std::fs::read_to_string(&trace).expect("a trace"));
    let events = events.as_array().expect("a list of events");
    let lasting = events.iter().filter(|event| event["ph"] == "X" && event["dur"].is_number()).count();
    assert!(lasting > 500, "{lasting} events of {}", events.len());
}

/// GNU's programs close their standard error before any library ends.
#[test]
fn statistics_of_a_program_that_closes_its_standard_error() {
    let mut command = usvm(&["run", "--chaos", "1500", "--stats", "--"]);
    let ran = said(command.args(["sleep", "0.5"]));
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), ""), "{}", ran.err);
    assert!(ran.err.lines().any(|line| line.starts_with("bytes_to_device ")), "{}", ran.err);
}

/// What goes wrong in a program that knows nothing of usvm is told all the same.
#[test]
fn errors_are_told() {
    let program = compile("tests/programs/c/churn.c", &[]);
    let mut command = usvm(&["run", "--chaos", "1500", "--"]);
    let ran = said(command.arg(&program).args(["0.3", "2", "0"]).env("USVM_STATS_FILE", "/no/such/%p.json"));
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), "all as it should be\n"), "{}", ran.err);
    let told: Vec<_> = ran.err.lines().collect();
    assert!(
        told.len() == 1 && told[0].starts_with("usvm: cannot write the statistics to /no/such/"),
        "{}",
        ran.err
    );
}

#[test]
fn the_heap_is_the_programs() {
    let program = compile("tests/programs/c/heapuse.cc", &["-std=c++17"]);
    let plain = said(&mut Command::new(&program));
    let with = |words: &[&str]| said(usvm(words).arg("--").arg(&program).arg("owned"));
    let owned = with(&["run", "--heap"]);
    assert_eq!((owned.code, plain.code), (Some(0), Some(0)), "{}{}", owned.out, owned.err);
    assert_ne!(with(&["run"]).code, Some(0), "without --heap the blocks are the C library's");
    let disturbed = said(usvm(&["run", "--heap", "--chaos", "1500"]).arg("--").arg(&program));
    assert_eq!((disturbed.code, disturbed.out), (Some(0), plain.out), "{}", disturbed.err);
}

#[test]
fn a_running_program_can_be_looked_at() {
    let program = compile("tests/programs/c/churn.c", &[]);
    let mut command = usvm(&["run", "--chaos", "1500", "--"]);
    command.arg(&program).args(["8", "2", "0"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("it starts");
    let pid = child.id().to_string();
    // Its runtime starts a moment later.
    let until = Instant::now() + Duration::from_secs(5);
    let first = loop {
        let look = said(&mut usvm(&["stats", &pid, "--json"]));
        if look.code == Some(0) || Instant::now() > until {
            break look;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let live = parse(&first.out);
    assert_eq!(live["chaos_per_second"], 1500, "{}", first.err);
    let table = said(&mut usvm(&["stats", &pid]));
    assert!(
        table.code == Some(0) && table.out.contains(&format!("churn (process {pid})")),
        "{}{}",
        table.out,
        table.err
    );
    let top = said(&mut usvm(&["top", "--once", &pid]));
    assert!(top.code == Some(0) && top.out.contains("per second"), "{}{}", top.out, top.err);
    let rate = top.out.lines().find_map(|line| line.trim().strip_prefix("bytes_to_device")).expect("a rate");
    assert!(!rate.trim().starts_with("0 "), "nothing moves: {}", top.out);
    assert!(migrations(&parse(&said(&mut usvm(&["stats", &pid, "--json"])).out)["stats"]) > 0);
    let ran = ended(child, "churn");
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), "all as it should be\n"), "{}", ran.err);
}

/// A name that nobody knows is told of once, by whoever meets it first, whether a runtime starts or not.
#[test]
fn unknown_names_are_told_once() {
    let preload = stage().join("usr/lib/usvm/libusvm_preload.so");
    let churn = compile("tests/programs/c/churn.c", &[]);
    let twice = format!("{0} 0.2 1 1; {0} 0.2 1 1 | /bin/cat", churn.display());
    let bare = |words: &[&str]| {
        let mut command = usvm(&[]);
        let mut inner = Command::new(words[0]);
        inner.args(&words[1..]).env_clear().envs(command.get_envs().filter_map(|(k, v)| Some((k, v?))));
        inner.env("LD_PRELOAD", &preload).stdin(Stdio::null());
        command = inner;
        command
    };
    let line = "usvm: unknown environment variable USVM_CHOAS; did you mean USVM_CHAOS?\n";
    let said_ok = "all as it should be\nall as it should be\n";
    for chaos in [None, Some("1500,3")] {
        for mut command in [usvm(&["run", "--", "/bin/sh", "-c", &twice]), bare(&["/bin/sh", "-c", &twice])] {
            command.envs(chaos.map(|rate| ("USVM_CHAOS", rate)));
            let known = said(command.env("USVM_VRAM", "64M"));
            assert_eq!((known.out.as_str(), known.err.as_str()), (said_ok, ""), "{command:?}");
            let typo = said(command.env("USVM_CHOAS", "1000"));
            assert_eq!((typo.out.as_str(), typo.err.as_str()), (said_ok, line), "{command:?}");
        }
    }
    // Where no library is loaded that could tell, `usvm run` does.
    let program = compile("tests/programs/c/ends.c", &["-static"]);
    let mut command = usvm(&["run", "--"]);
    let told = said(command.arg(&program).args(["return", "0"]).env("USVM_CHOAS", "1"));
    assert!(told.err.contains(line) && told.err.lines().count() == 2, "{}", told.err);
    let dry = said(usvm(&["run", "--dry-run", "--", "true"]).env("USVM_CHOAS", "1"));
    assert_eq!((dry.code, dry.err.as_str()), (Some(0), line));
    let off = said(usvm(&["run", "--", "true"]).env("USVM_CHOAS", "1").env("USVM_ENABLE", "0"));
    assert_eq!((off.code, off.err.as_str()), (Some(0), ""), "switched off it says nothing");
}

#[test]
fn a_program_that_needs_usm_runs() {
    let driver = std::fs::read_dir("/etc/OpenCL/vendors")
        .is_ok_and(|all| all.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("pocl")));
    if !driver || !Path::new("/usr/include/CL/cl.h").exists() {
        return skipped("this needs Debian's pocl-opencl-icd and ocl-icd-opencl-dev");
    }
    let program = compile("examples/opencl/usm_list.c", &["-lOpenCL"]);
    assert_eq!(said(&mut Command::new(&program)).code, Some(1), "it cannot run alone");
    let ran = said(usvm(&["run", "--stats", "--"]).arg(&program));
    assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
    assert!(ran.out.ends_with(": verified\n"), "{}", ran.out);
    let row = |name: &str| ran.err.lines().any(|line| line.split_whitespace().eq([name, "10003"]));
    assert!(row("opencl_usm_provided") && !ran.out.contains("opencl_"), "{}", ran.err);
}
