//! What the preload library must survive: small C programs, each run without it, with it, and under chaos. What they print
//! and how they end must be the same to the byte.
//!
//! The programs are in `tests/programs/c`. Real programs are run by `tests/programs/run.sh`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use usvm_tests::isolated::skipped;

/// Longer than any program takes, also on a busy machine.
const LIMIT: Duration = Duration::from_secs(90);

/// Races want the processors for themselves: one program at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ has a parent").to_owned()
}

/// The folder with both libraries, built once.
fn libraries() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let status = Command::new(env!("CARGO"))
            .args(["build", "--release", "--quiet", "-p", "usvm-preload", "-p", "usvm-preload-heap"])
            .current_dir(root())
            .status()
            .expect("cargo runs");
        assert!(status.success(), "the preload libraries are built");
        let exe = std::env::current_exe().expect("the test's own path");
        let target = exe.ancestors().nth(3).expect("target/debug/deps/test");
        target.join("release")
    })
}

fn scratch() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = libraries().join("../programs/c");
        fs::create_dir_all(&dir).expect("a folder under target/");
        dir.canonicalize().expect("it is there")
    })
}

/// Compiles `tests/programs/c/SOURCE` to `name`.
fn compile(source: &str, name: &str, options: &[&str]) -> PathBuf {
    let program = scratch().join(name);
    let compiler = if source.ends_with(".cc") { "c++" } else { "cc" };
    let status = Command::new(compiler)
        .args(["-O1", "-w", "-o"])
        .arg(&program)
        .arg(root().join("tests/programs/c").join(source))
        .args(["-pthread", "-ldl"])
        .args(options)
        .status()
        .expect("a C compiler");
    assert!(status.success(), "{source} compiles");
    program
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Mode {
    Off,
    On,
    Chaos(u64),
    Heap,
    HeapChaos(u64),
}

fn command(program: &Path, args: &[&str], mode: Mode) -> Command {
    let preload = libraries().join("libusvm_preload.so");
    let both = format!("{}:{}", libraries().join("libusvm_heap.so").display(), preload.display());
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).env("USVM_STATS_FILE", stats_file());
    match mode {
        Mode::Off => &mut command,
        Mode::On => command.env("LD_PRELOAD", preload),
        Mode::Chaos(seed) => command.env("LD_PRELOAD", preload).env("USVM_CHAOS", format!("3000,{seed}")),
        Mode::Heap => command.env("LD_PRELOAD", both).env("USVM_HEAP", "1"),
        Mode::HeapChaos(seed) => {
            command.env("LD_PRELOAD", both).env("USVM_HEAP", "1").env("USVM_CHAOS", format!("3000,{seed}"))
        }
    };
    command
}

fn stats_file() -> PathBuf {
    scratch().join("stats.%p")
}

/// Migrations that processes told of since the last call.
fn migrations() -> u64 {
    let mut sum = 0;
    for entry in fs::read_dir(scratch()).expect("the folder").flatten() {
        if entry.file_name().to_string_lossy().starts_with("stats.") {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            let numbers = text.split(['{', ',', '}']).filter(|field| field.contains("\"migrations_"));
            sum += numbers.filter_map(|n| n.rsplit(':').next()?.trim().parse::<u64>().ok()).sum::<u64>();
            let _ = fs::remove_file(entry.path());
        }
    }
    sum
}

/// Runs it to its end, which must come.
fn run(mut command: Command) -> Output {
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let deadline = Instant::now() + LIMIT;
    while child.try_wait().expect("a child can be waited for").is_none() {
        if Instant::now() > deadline {
            child.kill().expect("our own child");
            let out = child.wait_with_output().expect("its output");
            panic!("{command:?} hangs; it said: {}", String::from_utf8_lossy(&out.stdout));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().expect("its output")
}

fn told(output: &Output) -> String {
    let end = match output.status.code() {
        Some(code) => format!("code {code}"),
        None => format!("signal {:?}", output.status.signal()),
    };
    format!("{}{end}", String::from_utf8_lossy(&output.stdout))
}

/// Runs `program` in all modes. Under chaos something must have migrated, if it tells.
#[track_caller]
fn the_same(program: &Path, args: &[&str], modes: &[Mode], tells: bool) {
    let _alone = alone();
    let expected = told(&run(command(program, args, Mode::Off)));
    migrations();
    for mode in modes {
        let output = run(command(program, args, *mode));
        let is = told(&output);
        assert_eq!(is, expected, "{mode:?}: {}", String::from_utf8_lossy(&output.stderr));
        let moved = migrations();
        match mode {
            Mode::Chaos(_) | Mode::HeapChaos(_) if tells => assert!(moved > 0, "{mode:?}: nothing migrated"),
            Mode::On | Mode::Heap => assert_eq!(moved, 0, "nothing asked for a runtime"),
            _ => {}
        }
    }
}

const ALL: &[Mode] = &[Mode::On, Mode::Chaos(1), Mode::Chaos(2)];
const HEAPS: &[Mode] = &[Mode::Heap, Mode::HeapChaos(1)];

#[test]
fn own_signal_handlers() {
    the_same(&compile("handlers.c", "handlers", &[]), &[], ALL, true);
}

#[test]
fn every_descriptor_closed() {
    the_same(&compile("closes.c", "closes", &[]), &[], ALL, true);
}

#[test]
fn a_limit_of_open_files_below_usvms_own() {
    the_same(&compile("lowered.c", "lowered", &[]), &[], ALL, true);
}

#[test]
fn forks_of_all_kinds() {
    the_same(&compile("forks.c", "forks", &[]), &[], ALL, true);
}

#[test]
fn threads_that_end_in_every_way() {
    the_same(&compile("threads.c", "threads", &[]), &[], ALL, true);
}

/// What the kernel writes to when a thread has ended cannot be waited for there: no device gets it, although asked to.
#[test]
fn children_whose_last_thread_leaves() {
    the_same(&compile("lasts.c", "lasts", &[]), &[], ALL, true);
}

#[test]
fn what_the_kernel_writes_at_a_threads_end_is_home() {
    let folder = libraries().to_str().expect("a plain path");
    let (search, path) = (format!("-L{folder}"), format!("-Wl,-rpath,{folder}"));
    let include = format!("-I{}", root().join("include").display());
    let program = compile("blocks.c", "blocks", &[&include, &search, "-l:libusvm_preload.so", &path]);
    let _alone = alone();
    let output = run(command(&program, &[], Mode::Off));
    let mut expected = String::new();
    (0..4).for_each(|i| expected += &format!("thread {i}: 0 of its block away, 1 of its stack\n"));
    expected += "main: 0 of its block away\nended 7 7\nended 7 7\nlocks: 1 of them away\n";
    (0..3).for_each(|i| expected += &format!("lock {i}: its owner died\n"));
    assert_eq!(told(&output), expected + "code 0", "{}", String::from_utf8_lossy(&output.stderr));
    migrations();
}

#[test]
fn mappings_under_the_programs_hands() {
    the_same(&compile("maps.c", "maps", &[]), &[], ALL, true);
}

#[test]
fn guard_regions() {
    the_same(&compile("guards.c", "guards", &[]), &[], ALL, true);
}

#[test]
fn mappings_that_move_over_others() {
    let program = compile("remap.c", "remap", &[]);
    the_same(&program, &[], ALL, true);
    // No descriptor is left for the statistics either.
    the_same(&program, &["few"], ALL, false);
}

/// What another library interposes comes after the preload library, and is called once for each call of the program.
#[test]
fn other_libraries_that_watch_mappings() {
    compile("counter.c", "libcounter.so", &["-shared", "-fPIC"]);
    let folder = scratch().to_str().expect("a plain path");
    let (search, path) = (format!("-L{folder}"), format!("-Wl,-rpath,{folder}"));
    let program = compile("counted.c", "counted", &["-Wl,--no-as-needed", &search, &path, "-lcounter"]);
    the_same(&program, &[], &[Mode::On], false);
    let _alone = alone();
    let off = {
        let mut command = command(&program, &[], Mode::On);
        command.env("USVM_ENABLE", "0");
        run(command)
    };
    let text = String::from_utf8_lossy(&off.stdout).into_owned();
    assert_eq!(text, "mmap 2 mmap64 1 mprotect 1 madvise 1 mremap 1 munmap 3 errno kept\n");
}

#[test]
fn a_limited_address_space() {
    let program = compile("maps.c", "maps-limited", &[]);
    let limited = format!("ulimit -v 3000000; exec {}", program.display());
    // The shell is under chaos, too, until it execs.
    the_same(Path::new("/bin/sh"), &["-c", &limited], &[Mode::On, Mode::Chaos(1)], true);
    let program = compile("limited.c", "limited", &[]);
    for limit in [150_000, 4_000_000] {
        let limited = format!("ulimit -v {limit}; exec {}", program.display());
        the_same(Path::new("/bin/sh"), &["-c", &limited], &[Mode::Heap], false);
    }
    the_same(Path::new("/bin/sh"), &["-c", "ulimit -v 200000; exec ls /"], &[Mode::Heap], false);
}

#[test]
fn libraries_opened_late() {
    let program = compile("opens.c", "opens", &[]);
    for i in 0..6 {
        compile("constructor.c", &format!("libconstructor{i}.so"), &["-shared", "-fPIC"]);
    }
    let folder = scratch().to_str().expect("a plain path").to_owned();
    the_same(&program, &[&folder], ALL, true);
}

#[test]
fn memory_that_knows_its_contents() {
    let program = compile("churn.c", "churn", &[]);
    the_same(&program, &["3", "3", "0"], &[Mode::On, Mode::Chaos(1), Mode::HeapChaos(2)], true);
    the_same(&program, &["3", "2", "1"], &[Mode::Chaos(3)], true);
}

#[test]
fn the_end_in_every_way() {
    let program = compile("ends.c", "ends", &[]);
    for how in ["return", "exit", "quick", "thread", "_exit"] {
        the_same(&program, &[how, "37"], ALL, true);
    }
    for how in ["abort", "kill"] {
        the_same(&program, &[how, "37"], ALL, false);
    }
}

/// Children that begin without a runtime, threads that end unseen, and the end beside forks and new threads.
#[test]
fn ends_that_are_easily_missed() {
    let program = compile("leaves.c", "leaves", &["-lrt"]);
    for how in ["child", "alone", "call", "timer"] {
        the_same(&program, &[how], ALL, matches!(how, "call"));
    }
    the_same(&program, &["starts"], &[Mode::On], false);
    // What its threads have for a name says nothing of whose they are.
    the_same(&compile("leaves.c", "usvm-leaves", &["-lrt"]), &["timer"], ALL, false);
    for how in ["forks", "makes"] {
        for _ in 0..10 {
            the_same(&program, &[how], ALL, true);
        }
    }
}

#[test]
fn threads_cancelled_inside_a_call() {
    the_same(&compile("cancels.c", "cancels", &[]), &[], ALL, false);
}

/// What a preloaded library needs is searched for every symbol that any library of the program looks up.
#[test]
fn they_need_the_c_library_alone() {
    let unwinder = Command::new("cc").arg("-print-file-name=libgcc_eh.a").output().expect("cc runs");
    if !Path::new(String::from_utf8_lossy(&unwinder.stdout).trim()).is_absolute() {
        skipped("the compiler has no static unwinder");
        return;
    }
    for library in ["libusvm_preload.so", "libusvm_heap.so"] {
        let dynamic = Command::new("readelf").arg("-dW").arg(libraries().join(library)).output();
        let dynamic = String::from_utf8(dynamic.expect("readelf runs").stdout).unwrap();
        let needed: Vec<&str> = dynamic.lines().filter(|line| line.contains("(NEEDED)")).collect();
        assert!(matches!(needed[..], [libc] if libc.contains("[libc.so.6]")), "{library}: {needed:?}");
    }
}

#[test]
fn the_malloc_family() {
    let program = compile("heapuse.cc", "heapuse", &["-std=c++17"]);
    the_same(&program, &[], &[Mode::On, Mode::Chaos(1)], false);
    the_same(&program, &[], HEAPS, false);
    let _alone = alone();
    let owned = run(command(&program, &["owned"], Mode::Heap));
    assert!(owned.status.success(), "blocks are usvm's: {}", told(&owned));
    let mut bare = command(&program, &[], Mode::On);
    bare.env("USVM_HEAP", "1");
    let bare = run(bare);
    assert!(bare.status.success());
    assert!(String::from_utf8_lossy(&bare.stderr).contains("libusvm_heap.so"), "it says what is missing");
}

#[test]
fn operators_of_the_programs_own() {
    let program = compile("ownnew.cc", "ownnew", &["-std=c++17"]);
    the_same(&program, &[], &[Mode::On, Mode::Chaos(1)], true);
    the_same(&program, &[], HEAPS, true);
    let library = compile("localnew.cc", "liblocalnew.so", &["-shared", "-fPIC"]);
    let program = compile("local.c", "local", &[]);
    the_same(&program, &[library.to_str().expect("a plain path")], HEAPS, false);
}

#[test]
fn the_heap_under_threads_forks_and_signals() {
    for source in ["handlers.c", "forks.c", "threads.c", "closes.c"] {
        let program = compile(source, &format!("{source}-heap"), &[]);
        the_same(&program, &[], HEAPS, true);
    }
}

#[test]
fn switched_off_it_does_nothing() {
    let _alone = alone();
    let program = compile("threads.c", "threads-off", &[]);
    let expected = told(&run(command(&program, &[], Mode::Off)));
    migrations();
    let mut off = command(&program, &[], Mode::Chaos(1));
    off.env("USVM_ENABLE", "0");
    assert_eq!(told(&run(off)), expected);
    assert_eq!(migrations(), 0);
}

#[test]
fn a_filter_that_forbids_userfaultfd() {
    let _alone = alone();
    let filtered = compile("filtered.c", "filtered", &[]);
    let program = compile("maps.c", "maps-filtered", &[]);
    let expected = told(&run(command(&program, &[], Mode::Off)));
    migrations();
    for verdict in ["errno", "kill"] {
        let output =
            run(command(&filtered, &[verdict, program.to_str().expect("a plain path")], Mode::Chaos(1)));
        if output.status.code() == Some(77) {
            return skipped("seccomp filters are not allowed here");
        }
        assert_eq!(told(&output), expected, "{verdict}");
        // The program that sets the filter ran under chaos itself, until it exec'ed.
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("no chaos in process"), "{verdict}: {said}");
    }
}

#[test]
fn statically_linked_programs_do_not_notice() {
    // The same program with the libraries it can load tells that chaos would have been seen.
    the_same(&compile("maps.c", "maps-dynamic", &[]), &[], &[Mode::Chaos(1)], true);
    let program = compile("maps.c", "maps-static", &["-static"]);
    the_same(&program, &[], &[Mode::On, Mode::Chaos(1)], false);
    let _alone = alone();
    let output = run(command(&program, &[], Mode::Chaos(1)));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(migrations(), 0, "nothing is loaded there");
}

#[test]
fn set_uid_programs_run_without_it() {
    let _alone = alone();
    let program = compile("maps.c", "maps-setuid", &[]);
    // SAFETY: asks who runs this.
    if unsafe { libc::geteuid() } != 0 || std::os::unix::fs::chown(&program, Some(65534), None).is_err() {
        return skipped("only root can make a set-uid program");
    }
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).expect("our own file");
    migrations();
    // Named without a slash the library is searched in trusted folders only, and not found: that is said, no more.
    let output = run(command(&program, &[], Mode::Chaos(1)));
    let expected = told(&run(command(&compile("maps.c", "maps-plain", &[]), &[], Mode::Off)));
    assert_eq!(told(&output), expected);
    assert_eq!(migrations(), 0);
}

/// Loaded although the program is set-uid, by an absolute path in the program itself, it does nothing and hears nothing.
#[test]
fn linked_with_a_set_uid_program_it_is_inert() {
    let _alone = alone();
    let folder =
        tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().expect("a folder");
    fs::copy(libraries().join("libusvm_preload.so"), folder.path().join("libusvm_preload.so"))
        .expect("a copy");
    let path = folder.path().to_str().expect("a plain path");
    let (search, rpath) = (format!("-L{path}"), format!("-Wl,-rpath,{path}"));
    let link = ["-Wl,--no-as-needed", &search, "-l:libusvm_preload.so", &rpath];
    let program = compile("secure.c", "secure", &link);
    let as_it_is = || {
        migrations();
        let mut command = command(&program, &[], Mode::Off);
        // The second is refused aloud where the other library is missing: the library's constructor itself hears it.
        command.env("USVM_CHAOS", "3000,1").env("USVM_HEAP", "1");
        let output = run(command);
        (told(&output), String::from_utf8_lossy(&output.stderr).into_owned(), migrations())
    };
    let (plain, said, moved) = as_it_is();
    assert!(plain.starts_with("secure 0: more threads 1, environment heard, sum "), "{plain}");
    assert!(said.contains("libusvm_heap.so"), "{said}");
    assert!(moved > 0, "linked with it the program has chaos");
    // SAFETY: asks who runs this.
    if unsafe { libc::geteuid() } != 0 || std::os::unix::fs::chown(&program, Some(65534), None).is_err() {
        return skipped("only root can make a set-uid program");
    }
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).expect("our own file");
    let (secure, said, moved) = as_it_is();
    if secure.starts_with("secure 0") {
        return skipped("set-uid programs get no other rights in this file system");
    }
    let sum = plain.split("sum ").nth(1).expect("a sum");
    assert_eq!(secure, format!("secure 1: more threads 0, environment not heard, sum {sum}"));
    assert!(!said.contains("usvm: "), "{said}");
    assert_eq!(moved, 0);
}

#[test]
fn a_strict_filter_set_while_the_program_runs() {
    let program = compile("strict.c", "strict", &[]);
    if run(command(&program, &["few"], Mode::Off)).status.code() == Some(77) {
        return skipped("seccomp filters are not allowed here");
    }
    the_same(&program, &["all"], &[Mode::On, Mode::Heap], false);
    the_same(&program, &["few"], ALL, true);
    the_same(&program, &["few"], HEAPS, true);
}

#[test]
fn static_storage_for_threads_is_left_to_others() {
    let tls = ["-shared", "-fPIC", "-DLIBRARY", "-ftls-model=initial-exec"];
    let library = compile("statictls.c", "libstatictls.so", &tls);
    let program = compile("statictls.c", "statictls", &[]);
    let library = library.to_str().expect("a plain path");
    the_same(&program, &[library], ALL, true);
    the_same(&program, &[library], HEAPS, true);
    // Opened late itself, as a layer of OpenCL is, usvm's library takes of the same room.
    let _alone = alone();
    let preload = libraries().join("libusvm_preload.so");
    let preload = preload.to_str().expect("a plain path");
    let expected = told(&run(command(&program, &[library], Mode::Off)));
    let output = run(command(&program, &[preload, library], Mode::Off));
    assert_eq!(told(&output), expected, "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn stacks_that_nobody_keeps() {
    let program = compile("stacks.c", "stacks", &[]);
    the_same(&program, &[], &[Mode::On, Mode::Heap], false);
    the_same(&program, &[], &[Mode::Chaos(1), Mode::HeapChaos(2)], true);
}

#[test]
fn constructors_of_linked_libraries_that_allocate() {
    compile("constructor.c", "libearly.so", &["-shared", "-fPIC"]);
    let folder = scratch().to_str().expect("a plain path");
    let (search, path) = (format!("-L{folder}"), format!("-Wl,-rpath,{folder}"));
    let program = compile("early.c", "early", &["-Wl,--no-as-needed", &search, &path, "-learly"]);
    the_same(&program, &[], ALL, true);
    the_same(&program, &[], HEAPS, true);
}

#[test]
fn destructors_of_thread_local_objects() {
    let program = compile("threadlocals.cc", "threadlocals", &["-std=c++17"]);
    the_same(&program, &[], ALL, true);
    the_same(&program, &[], HEAPS, true);
}

#[test]
fn destructors_that_allocate_in_the_last_round() {
    let program = compile("lastround.c", "lastround", &[]);
    the_same(&program, &[], HEAPS, false);
}

#[test]
fn opened_by_dlopen_in_a_running_program() {
    let _alone = alone();
    let source = scratch().join("late.c");
    fs::write(
        &source,
        r#"
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
static unsigned n = 1 << 18, sum, *p;
static void *works(void *name) {
    void *lib = dlopen(name, RTLD_NOW);
    if (!lib) { puts(dlerror()); exit(1); }
    for (int round = 0; round < 40; round++) { usleep(2000); for (unsigned i = 0; i < n; i++) sum = sum * 31 + p[i]++; }
    return lib;
}
int main(int argc, char **argv) {
    pthread_t t;
    void *lib;
    p = malloc(n * 4);
    for (unsigned i = 0; i < n; i++) p[i] = i;
    // A thread that opens it and ends is not the last one.
    if (argc > 2) { pthread_create(&t, 0, works, argv[1]); pthread_join(t, &lib); } else lib = works(argv[1]);
    dlclose(lib);
    printf("%x\n", sum);
    return 3;
}
"#,
    )
    .expect("a file under target/");
    let program = compile(source.to_str().expect("a plain path"), "late", &[]);
    let library = libraries().join("libusvm_preload.so");
    let library = library.to_str().expect("a plain path");
    let expected = told(&run(command(&program, &["libm.so.6"], Mode::Off)));
    for args in [&[library][..], &[library, "in a thread"]] {
        migrations();
        // On a busy machine the program may have done its work before chaos begins: then once more.
        let began = (0..20).any(|_| {
            let mut late = command(&program, args, Mode::Off);
            late.env("USVM_CHAOS", "3000");
            let output = run(late);
            assert_eq!(told(&output), expected, "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
            migrations() > 0
        });
        assert!(began, "chaos begins in the background");
    }
}
