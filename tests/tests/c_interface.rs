//! The C interface, from C and C++ programs against an installed tree.
//!
//! `make install-lib` puts everything into a staging folder once; each test compiles one program of `tests/c` or `examples`
//! against that and runs it. A program checks itself, says so in its last line, and aborts otherwise.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use usvm_tests::isolated::skipped;

/// How long one program may take.
const LIMIT: Duration = Duration::from_secs(100);
const STRICT: [&str; 5] = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// The target folder that this test was built into.
fn target() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(3).unwrap().to_owned()
}

fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// Runs a tool that must succeed; gives what it printed.
fn tool(command: &mut Command) -> String {
    let done = output(command);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(done.status.success(), "{command:?}:\n{}{}", text(&done.stdout), text(&done.stderr));
    text(&done.stdout)
}

/// The folder that `make install DESTDIR=… PREFIX=/usr` filled.
fn stage() -> &'static Path {
    static STAGE: OnceLock<PathBuf> = OnceLock::new();
    STAGE.get_or_init(|| {
        let stage = target().join("c-stage");
        let _ = std::fs::remove_dir_all(&stage);
        let mut destination = std::ffi::OsString::from("DESTDIR=");
        destination.push(&stage);
        tool(
            Command::new("make")
                .args(["--no-print-directory", "install-lib", "PREFIX=/usr"])
                .arg(destination)
                .env("CARGO_TARGET_DIR", target())
                .current_dir(root()),
        );
        stage
    })
}

fn include() -> String {
    format!("-I{}", stage().join("usr/include").display())
}

fn libraries() -> PathBuf {
    stage().join("usr/lib")
}

/// Compiles `source` (a path in the repository) with `compiler` and `more` against the stage; gives the program.
fn compile(compiler: &str, standard: &str, source: &str, more: &[&str]) -> PathBuf {
    let programs = target().join("c-programs");
    std::fs::create_dir_all(&programs).unwrap();
    // Tests run at once, and a program that runs cannot be written.
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let program = programs.join(format!("{}-{number}", source.replace(['/', '.', '+'], "_")));
    let link = format!("-L{}", libraries().display());
    tool(
        Command::new(compiler)
            .arg(standard)
            .args(STRICT)
            .arg(include())
            .args(["-o".as_ref(), program.as_os_str(), root().join(source).as_os_str()])
            .args([link.as_str(), "-lusvm", "-lpthread"])
            .args(more),
    );
    program
}

/// A command that runs `program` with the staged library.
fn staged(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("LD_LIBRARY_PATH", libraries());
    command
}

/// Runs it to its end; gives its output, which must be a success and is ended after [`LIMIT`].
fn run(command: &mut Command) -> String {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + LIMIT;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("{command:?}: no end after {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let done = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{command:?}: {}\n{text}", done.status);
    text
}

/// Compiles and runs a test of `tests/c`, which must say that it is good.
fn good(name: &str) {
    let program = compile("cc", "-std=c11", &format!("tests/c/{name}.c"), &[]);
    let said = run(&mut staged(&program));
    assert!(said.ends_with(&format!("{name}: good\n")), "{said}");
}

#[test]
fn every_function_does_what_the_header_says() {
    // The oldest standard that the header promises.
    let program = compile("cc", "-std=c99", "tests/c/basic.c", &[]);
    assert_eq!(run(&mut staged(&program)), "basic: good\n");
}

#[test]
fn misuse_is_an_error_that_names_the_argument() {
    good("misuse");
}

#[test]
fn the_end_comes_beside_calls_of_other_threads() {
    good("shutdown");
}

#[test]
fn two_devices_share_one_address_space() {
    let program = compile("cc", "-std=c11", "tests/c/devices.c", &[]);
    let devices = "sim:arc-a770,sim:max-1550";
    let said = run(staged(&program).env("USVM_DEVICE", devices).env("USVM_VRAM", "32M"));
    assert_eq!(said, "devices: good\n");
}

#[test]
fn notifiers_are_told_before_the_pages_go() {
    good("notify");
}

const SHARED: &[&str] = &["-DSHARED", "-ldl"];

#[test]
fn freeing_what_is_on_the_device_moves_nothing() {
    let program = compile("cc", "-std=c11", "tests/c/heap.c", SHARED);
    assert_eq!(run(&mut staged(&program)), "heap: good\n");
}

#[test]
fn freeing_in_a_program_without_the_shared_library() {
    for kind in ["-no-pie", "-static"] {
        let program = target().join("c-programs").join(format!("heap{kind}"));
        std::fs::create_dir_all(target().join("c-programs")).unwrap();
        let mut command = Command::new("cc");
        command.args(["-std=c11", kind]).args(STRICT).arg(include()).arg("-o").arg(&program);
        command.args([root().join("tests/c/heap.c"), libraries().join("libusvm.a")]);
        tool(command.args(if kind == "-static" { ["-lgcc_eh", "-lm"] } else { ["-lgcc_s", "-lm"] }));
        assert_eq!(run(&mut Command::new(&program)), "heap: good\n", "{kind}");
    }
}

/// The preload library, built once.
fn preload_library() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        tool(
            Command::new(env!("CARGO"))
                .args(["build", "--release", "--quiet", "-p", "usvm-preload"])
                .env("CARGO_TARGET_DIR", target())
                .current_dir(root()),
        );
        target().join("release/libusvm_preload.so")
    })
}

/// A program of libusvm under the preload library has one usvm: everything but the heap is the preload library's.
#[test]
fn under_the_preload_library() {
    let heap = compile("cc", "-std=c11", "tests/c/heap.c", SHARED);
    let mut command = staged(&heap);
    command.arg("preloaded").env("LD_PRELOAD", preload_library());
    assert_eq!(run(&mut command), "heap: good\n");
    for name in ["basic", "misuse", "notify", "threads", "fork", "nofault"] {
        let program = compile("cc", "-std=c11", &format!("tests/c/{name}.c"), &[]);
        let said = run(staged(&program).env("LD_PRELOAD", preload_library()));
        assert!(said.ends_with(&format!("{name}: good\n")), "{said}");
    }
}

/// Nobody ends what is open at the end of the program, and nobody waits for it.
#[test]
fn accesses_that_are_open_at_the_end() {
    let program = compile("cc", "-std=c11", "tests/c/unended.c", &[]);
    let mut command = staged(&program);
    command.env("LD_PRELOAD", preload_library());
    let began = Instant::now();
    assert_eq!(run(&mut command), "unended: good\n");
    assert!(began.elapsed() < Duration::from_secs(7), "{:?}", began.elapsed());
}

#[test]
fn eight_threads_at_once() {
    good("threads");
}

#[test]
fn children_of_fork_begin_anew() {
    good("fork");
}

#[test]
fn random_arguments_are_survived() {
    let program = compile("cc", "-std=c11", "tests/c/fuzz.c", &[]);
    for seed in ["1", "20261120", "987654321"] {
        assert_eq!(run(staged(&program).args(["4000", seed])), "fuzz: good\n", "seed {seed}");
    }
}

#[test]
fn a_device_that_cannot_fault() {
    let program = compile("cc", "-std=c11", "tests/c/nofault.c", &[]);
    assert_eq!(run(&mut staged(&program)), "nofault: good\n");
}

/// Without the right to kernel-mode faults, system calls on memory that is on the device fail; the interface does not.
#[test]
fn without_rights() {
    // SAFETY: only asks.
    if unsafe { libc::geteuid() } != 0 {
        return skipped("only root can give its rights away to try this");
    }
    let folder = tempfile::Builder::new().permissions(open_to_all()).tempdir().unwrap();
    let library = "libusvm.so.0";
    std::fs::copy(libraries().join(library), folder.path().join(library)).unwrap();
    for name in ["notify", "misuse"] {
        let copy = folder.path().join(name);
        std::fs::copy(compile("cc", "-std=c11", &format!("tests/c/{name}.c"), &[]), &copy).unwrap();
        let mut command = Command::new(&copy);
        command.env("LD_LIBRARY_PATH", folder.path()).uid(65534).gid(65534).current_dir("/");
        assert_eq!(run(&mut command), format!("{name}: good\n"));
    }
}

fn open_to_all() -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o755)
}

#[test]
fn containers_of_cpp() {
    let program = compile("c++", "-std=c++17", "tests/c/pmr.cpp", &[]);
    assert_eq!(run(&mut staged(&program)), "pmr: good\n");
}

#[test]
fn a_provider_of_unified_memory_framework() {
    let umf = target().join("c-umf");
    let script = output(Command::new("sh").arg(root().join("tests/c/umf.sh")).arg(&umf));
    match script.status.code() {
        Some(0) => {}
        Some(77) => return skipped(format!("UMF: {}", String::from_utf8_lossy(&script.stdout).trim())),
        _ => panic!("{script:?}"),
    }
    let (headers, libs) = (umf.join("include"), umf.join("lib"));
    let (headers, link) = (headers.display().to_string(), format!("-L{}", libs.display()));
    for (compiler, standard) in [("cc", "-std=c99"), ("cc", "-std=c11")] {
        let program = compile(compiler, standard, "tests/c/umf.c", &["-isystem", &headers, &link, "-lumf"]);
        let paths = format!("{}:{}", libraries().display(), libs.display());
        assert_eq!(run(Command::new(program).env("LD_LIBRARY_PATH", paths)), "umf: good\n");
    }
    let check = "#include <usvm_umf.h>\nint main() { return usvm_umf_provider_ops().version == 0; }\n";
    compile_text("c++", "-std=c++17", "umf.cpp", check, &["-isystem", &headers]);
}

#[test]
fn loaded_while_the_program_runs() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("late");
    tool(
        Command::new("cc")
            .args(["-std=c99", "-D_POSIX_C_SOURCE=200809L"])
            .args(STRICT)
            .arg("-o")
            .args([program.as_os_str(), root().join("tests/c/late.c").as_os_str()])
            .args(["-ldl", "-lpthread"]),
    );
    let library = libraries().join("libusvm.so.0");
    assert_eq!(run(Command::new(&program).arg(&library)), "late: good\n");
    // Where no room at all is left for static storage beyond what was there at the start.
    let mut full = Command::new(&program);
    full.arg(&library).env("GLIBC_TUNABLES", "glibc.rtld.optional_static_tls=0");
    assert_eq!(run(&mut full), "late: good\n");
}

const CTYPES: &str = r#"
import ctypes, sys, threading
usvm = ctypes.CDLL(sys.argv[1])
usvm.usvm_malloc.restype = ctypes.c_void_p
usvm.usvm_malloc.argtypes = [ctypes.c_size_t]
usvm.usvm_free.argtypes = [ctypes.c_void_p]
usvm.usvm_fill.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
usvm.usvm_device_get.argtypes = [ctypes.c_uint32, ctypes.c_void_p]
usvm.usvm_space_create.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
usvm.usvm_space_destroy.argtypes = [ctypes.c_void_p]
assert usvm.usvm_init(None) == 0
device, space = ctypes.c_void_p(), ctypes.c_void_p()
assert usvm.usvm_device_get(0, ctypes.byref(device)) == 0
assert usvm.usvm_space_create(device, None, ctypes.byref(space)) == 0
def use(seed):
    for size in (100, 70_000, 3 << 20):
        block = usvm.usvm_malloc(size)
        assert usvm.usvm_fill(space, block, seed, size) == 0
        assert ctypes.string_at(block, size) == bytes([seed]) * size
        assert usvm.usvm_fill(space, block, 0, size) == 0
        usvm.usvm_free(block)
threads = [threading.Thread(target=use, args=(n,)) for n in range(1, 5)]
[t.start() for t in threads], use(9), [t.join() for t in threads]
assert usvm.usvm_space_destroy(space) == 0 and usvm.usvm_shutdown() == 0
print("ctypes: good")
"#;

#[test]
fn loaded_by_python() {
    if !output(Command::new("sh").args(["-c", "command -v python3"])).status.success() {
        return skipped("python3 is not installed");
    }
    let mut command = Command::new("python3");
    command.args(["-c", CTYPES]).arg(libraries().join("libusvm.so.0"));
    assert_eq!(run(&mut command), "ctypes: good\n");
}

/// Compiles a text without linking it.
fn compile_text(compiler: &str, standard: &str, name: &str, text: &str, more: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join(name);
    std::fs::write(&source, text).unwrap();
    let mut command = Command::new(compiler);
    command.arg(standard).args(STRICT).args(more).arg(include()).arg("-fsyntax-only").arg(&source);
    tool(&mut command);
}

#[test]
fn the_headers_compile_alone_and_everywhere() {
    let both = "#include <usvm.h>\n#include <usvm.h>\nint main(void) { return USVM_VERSION_PATCH(usvm_version()) > 255; }\n";
    for standard in ["-std=c99", "-std=c11", "-std=c17", "-std=gnu17"] {
        compile_text("cc", standard, "alone.c", both, &[]);
    }
    for standard in ["-std=c++11", "-std=c++17", "-std=c++20"] {
        compile_text("c++", standard, "alone.cpp", both, &[]);
    }
    for standard in ["-std=c++17", "-std=c++20"] {
        compile_text("c++", standard, "alone.cpp", "#include <usvm.hpp>\nint main() { return 0; }\n", &[]);
    }
}

/// Names that the C library has, too, and that are watched.
const WATCHED: [&str; 6] = ["madvise", "mmap", "mmap64", "mprotect", "mremap", "munmap"];

/// What the heap and whichever library has `usvm_last_error` say to each other.
const PRIVATE: [&str; 2] = ["usvm_heap_changed", "usvm_heap_error"];

/// The functions that the header declares.
fn declared() -> Vec<String> {
    let text = std::fs::read_to_string(root().join("include/usvm.h")).unwrap();
    let mut names: Vec<String> = text
        .lines()
        .filter_map(|line| line.strip_prefix("USVM_API ")?.split_once('('))
        .map(|(before, _)| before.rsplit([' ', '*']).next().unwrap().to_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn the_library_exports_the_header_and_nothing_else() {
    let so = libraries().join("libusvm.so");
    let mut want: Vec<String> = declared().iter().map(|name| format!("{name}@@USVM_0.1")).collect();
    assert_eq!(want.len(), 33);
    want.extend(WATCHED.map(String::from));
    want.extend(["USVM_0.1", "USVM_PRIVATE"].map(String::from));
    want.extend(PRIVATE.map(|name| format!("{name}@@USVM_PRIVATE")));
    want.sort();
    let symbols = tool(Command::new("nm").args(["-D", "--defined-only"]).arg(&so));
    let mut got: Vec<_> = symbols.lines().filter_map(|l| l.split_whitespace().nth(2)).collect();
    got.sort_unstable();
    assert_eq!(got, want);

    let dynamic = tool(Command::new("readelf").args(["-dW"]).arg(&so));
    assert!(dynamic.contains("soname: [libusvm.so.0]"), "{dynamic}");
    assert!(dynamic.contains("NODELETE") && !dynamic.contains("TEXTREL"), "{dynamic}");
    // It may be loaded late, and what it keeps for each thread is more than fits into static storage then.
    assert!(!dynamic.contains("STATIC_TLS"), "{dynamic}");
    let segments = tool(Command::new("readelf").args(["-lW"]).arg(&so));
    let kept = segments.lines().find_map(|l| l.trim().strip_prefix("TLS ")).expect("a segment for threads");
    let size = kept.split_whitespace().nth(4).and_then(|size| u64::from_str_radix(&size[2..], 16).ok());
    assert!(size.is_some_and(|size| size > 512), "{kept}");

    let archive =
        tool(Command::new("nm").args(["--defined-only", "--extern-only"]).arg(libraries().join("libusvm.a")));
    let mut want = declared();
    want.extend(WATCHED.map(String::from));
    want.extend(PRIVATE.map(String::from));
    want.sort();
    let mut got: Vec<_> = archive.lines().filter_map(|l| l.split_whitespace().nth(2)).collect();
    got.sort_unstable();
    got.dedup();
    assert_eq!(got, want);
}

#[test]
fn found_by_pkg_config() {
    if output(Command::new("sh").args(["-c", "command -v pkg-config"])).status.success() {
        let config = |arguments: &[&str]| {
            let found = tool(
                Command::new("pkg-config")
                    .args(arguments)
                    .arg("usvm")
                    .env("PKG_CONFIG_PATH", libraries().join("pkgconfig"))
                    .env("PKG_CONFIG_SYSROOT_DIR", stage())
                    // Where it is now is not where the system's files are.
                    .env("PKG_CONFIG_ALLOW_SYSTEM_CFLAGS", "1")
                    .env("PKG_CONFIG_ALLOW_SYSTEM_LIBS", "1"),
            );
            found.split_whitespace().map(String::from).collect::<Vec<_>>()
        };
        assert_eq!(config(&["--modversion"]), ["0.1.0"]);
        let program = target().join("c-programs/by-pkg-config");
        std::fs::create_dir_all(target().join("c-programs")).unwrap();
        let mut shared = Command::new("cc");
        shared.args(["-std=c99".as_ref(), root().join("tests/c/basic.c").as_os_str()]);
        tool(shared.args(config(&["--cflags", "--libs"])).arg("-o").arg(&program));
        assert_eq!(run(&mut staged(&program)), "basic: good\n");
        // And without the shared library.
        let mut alone = Command::new("cc");
        alone.args(["-std=c11".as_ref(), root().join("tests/c/notify.c").as_os_str()]);
        let libs = config(&["--libs", "--static"]);
        let libs = libs.iter().map(|l| if l == "-lusvm" { "-l:libusvm.a".to_owned() } else { l.clone() });
        tool(alone.args(config(&["--cflags"])).arg("-o").arg(&program).args(libs));
        assert_eq!(run(&mut Command::new(&program)), "notify: good\n");
    } else {
        skipped("pkg-config is not installed");
    }
}

#[test]
fn found_by_cmake() {
    if !output(Command::new("sh").args(["-c", "command -v cmake"])).status.success() {
        return skipped("cmake is not installed");
    }
    let build = target().join("c-cmake");
    let _ = std::fs::remove_dir_all(&build);
    // The tree may be moved after it was installed.
    let moved = target().join("c-moved");
    let _ = std::fs::remove_dir_all(&moved);
    tool(Command::new("cp").arg("-a").arg(stage().join("usr")).arg(&moved));
    let prefix = format!("-DCMAKE_PREFIX_PATH={}", moved.display());
    tool(Command::new("cmake").arg("-S").arg(root().join("tests/c")).arg("-B").arg(&build).arg(prefix));
    tool(Command::new("cmake").arg("--build").arg(&build));
    for program in ["basic", "basic_static", "pmr"] {
        let mut command = Command::new(build.join(program));
        let name = program.split('_').next().unwrap();
        // CMake writes where the library is into the program.
        assert_eq!(run(command.env_remove("LD_LIBRARY_PATH")), format!("{name}: good\n"));
    }
}

#[test]
fn every_folder_of_examples_says_what_is_in_it() {
    let mut seen = 0;
    for folder in std::fs::read_dir(root().join("examples")).unwrap().map(|entry| entry.unwrap().path()) {
        if !folder.is_dir() {
            continue;
        }
        let readme = std::fs::read_to_string(folder.join("README.md")).unwrap_or_default();
        for entry in std::fs::read_dir(&folder).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(name == "README.md" || readme.contains(&name), "{name}: {}", folder.display());
            seen += 1;
        }
    }
    assert!(seen > 14, "{seen}");
}

#[test]
fn the_examples_run() {
    let examples = root().join("examples");
    let mut seen = 0;
    for (language, compiler, standard, extension) in
        [("c", "cc", "-std=c99", "c"), ("cpp", "c++", "-std=c++17", "cpp")]
    {
        for entry in std::fs::read_dir(examples.join(language)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|e| e != extension) {
                continue;
            }
            let name = path.file_stem().unwrap().to_str().unwrap();
            let program =
                compile(compiler, standard, &format!("examples/{language}/{name}.{extension}"), &[]);
            let said = run(&mut staged(&program));
            assert!(said.ends_with("verified\n"), "{name}: {said}");
            let readme = std::fs::read_to_string(examples.join(language).join("README.md")).unwrap();
            assert!(readme.contains(&format!("`{name}.{extension}`")), "{name} is not in the README");
            seen += 1;
        }
    }
    assert_eq!(seen, 5);
}
