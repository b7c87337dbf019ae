//! `usvm run`: the program is as it would be without.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use crate::stand::{FOLDER, STANDIN, USVM, clean, compile, copy_to, is_root, make_pipe, run, said, usvm};

#[test]
fn the_exit_status_is_the_programs_and_nothing_is_said() {
    for code in [0, 1, 7, 77, 126, 127, 255] {
        let ended = run(["sh", "-c", &format!("echo out; exit {code}")]);
        assert_eq!((ended.code, ended.out.as_str(), ended.err.as_str()), (Some(code), "out\n", ""));
    }
}

#[test]
fn the_process_is_the_programs_and_dies_as_it_does() {
    let mut child =
        usvm(["run", "--", "sh", "-c", "echo $$; kill -TERM $$"]).stdout(Stdio::piped()).spawn().unwrap();
    let (pid, status) = (child.id(), child.wait().unwrap());
    let said = std::io::read_to_string(child.stdout.take().unwrap()).unwrap();
    assert_eq!(said.trim(), pid.to_string(), "no process stands in between");
    assert_eq!(status.signal(), Some(libc::SIGTERM));
}

/// Runs `line` by the shell, once with `exec PROGRAM` and once with `exec usvm run -- PROGRAM`, for the same output.
fn same(line: &str, program: &str) {
    let by_shell = |what: String| {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("{line} exec {what}")]).stdin(Stdio::null());
        clean(&mut command);
        said(&mut command)
    };
    let (without, with) = (by_shell(program.into()), by_shell(format!("{USVM} run -- {program}")));
    assert!(!without.out.is_empty());
    assert_eq!((without.out, without.err), (with.out, with.err), "{line} {program}");
}

#[test]
fn signals_descriptors_limits_and_niceness_are_inherited() {
    for line in ["", "trap '' PIPE;", "trap '' PIPE HUP INT USR1;"] {
        same(line, "grep -E 'Sig(Ign|Blk|Cgt)' /proc/self/status");
    }
    for line in ["", "exec 0<&-;", "exec 7</dev/null;"] {
        same(line, "ls /proc/self/fd");
    }
    same("ulimit -n 77; ulimit -c 0; ulimit -s 4096;", "cat /proc/self/limits");
    same("umask 027; cd /tmp;", "sh -c 'umask; pwd; nice'");
}

#[test]
fn the_library_is_loaded_and_the_users_own_are_kept() {
    let speaks = |command: &mut Command| said(command.env("STANDIN_SPEAKS", "1")).err;
    assert_eq!(speaks(&mut usvm(["run", "--", "true"])), "standin\n");
    assert_eq!(
        speaks(&mut usvm(["run", "--", USVM, "run", "true"])),
        "standin\nstandin\n",
        "usvm, then the program"
    );
    let list = "echo $LD_PRELOAD; echo $OPENCL_LAYERS";
    let other = compile("other.so", "int other;", &["-shared", "-fPIC"]).display().to_string();
    let mut command = usvm(["run", "--", USVM, "run", "--", "sh", "-c", list]);
    let ended = said(command.env("LD_PRELOAD", &other).env("OPENCL_LAYERS", "/x.so"));
    let ours = STANDIN.display();
    assert_eq!(ended.out, format!("{ours}:{other}\n/x.so:{ours}\n"), "each once, also in a run within a run");
}

#[test]
fn a_dry_run_runs_nothing_and_its_line_does_the_same() {
    let words = ["run", "--stats", "--vram", "64M", "--dry-run", "--"];
    let touched = FOLDER.path().join("touched by a dry run");
    let line = said(usvm(words).arg("touch").arg(&touched));
    assert_eq!((line.code, line.err.as_str()), (Some(0), ""));
    assert!(!touched.exists());
    let by_shell = Command::new("sh").args(["-c", &line.out]).status().unwrap();
    assert!(by_shell.success() && touched.exists());

    let sorted = |text: String| {
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        // The shell's own, and what names the stand-in to usvm.
        lines.retain(|line| !["_=", "PWD=", "OLDPWD=", "SHLVL="].iter().any(|own| line.starts_with(own)));
        lines.sort();
        lines
    };
    let line = said(usvm(words).arg("env")).out;
    let mut shell = Command::new("sh");
    clean(shell.args(["-c", &line]).stdin(Stdio::null()));
    let with = said(&mut usvm(["run", "--stats", "--vram", "64M", "--", "env"])).out;
    assert!(with.contains("USVM_SHOW_STATS=1\n") && with.contains("USVM_VRAM=64M\n"), "{with}");
    assert_eq!(sorted(said(&mut shell).out), sorted(with));
}

#[test]
fn what_cannot_be_run_has_the_shells_status() {
    let missing = run(["no-such-command-anywhere"]);
    assert_eq!(missing.code, Some(127));
    assert!(missing.err.starts_with("usvm: no-such-command-anywhere: "), "{}", missing.err);
    assert_eq!(run(["/no/such/file"]).code, Some(127));
    assert_eq!(run(["/etc/passwd"]).code, Some(126));
    assert_eq!(run(["/"]).code, Some(126));
    let orphan = FOLDER.path().join("orphan");
    fs::write(&orphan, "#!/no/such/interpreter\n").unwrap();
    fs::set_permissions(&orphan, fs::Permissions::from_mode(0o755)).unwrap();
    let orphan = run([orphan]);
    assert_eq!(orphan.code, Some(127), "{}", orphan.err);
}

#[test]
fn a_pipe_is_no_program_and_nobody_waits_for_it() {
    let folder = FOLDER.path().join("pipes");
    fs::create_dir_all(&folder).unwrap();
    let (pipe, script) = (folder.join("pipe"), folder.join("script"));
    make_pipe(&pipe);
    fs::write(&script, format!("#!{}\n", pipe.display())).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    for program in [&pipe, &script] {
        let mut command = Command::new("timeout");
        clean(command.args(["10", USVM, "run", "--"]).arg(program).stdin(Stdio::null()));
        let ended = said(&mut command);
        assert_eq!((ended.code, ended.out.as_str()), (Some(126), ""), "{}", ended.err);
        let name = format!("usvm: {}: ", program.display());
        assert!(ended.err.starts_with(&name) && ended.err.ends_with("no regular file\n"), "{}", ended.err);
    }
}

#[test]
fn a_file_without_a_first_line_is_the_shells() {
    let script = FOLDER.path().join("bare script");
    fs::write(&script, "echo \"$0 $1\"; exit 3\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let ended = said(usvm(["run", "--"]).arg(&script).arg("x"));
    assert_eq!((ended.code, ended.out), (Some(3), format!("{} x\n", script.display())));
}

#[test]
fn wrong_words_are_usage_errors_and_run_nothing() {
    let cases: [(&[&str], &str); 11] = [
        (&["run"], "COMMAND"),
        (&["run", "--no-such-option", "--", "echo", "ran"], "--no-such-option"),
        (&["run", "--chaos", "x", "--", "echo", "ran"], "--chaos"),
        (&["run", "--policy", "lru", "--", "echo", "ran"], "adaptive, gpusvm, remote"),
        (&["run", "--device", "sim:gtx", "--", "echo", "ran"], "arc-a770"),
        (&["run", "--vram", "much", "--", "echo", "ran"], "K, M, G"),
        (&["run", "--vram", "0", "--", "echo", "ran"], "4 KiB or more"),
        (&["run", "--vram", "5000", "--", "echo", "ran"], "set 4096"),
        (&["run", "--stats-file", "/no/such/s.json", "--", "echo", "ran"], "/no/such/s.json"),
        (&["run", "--trace", "/etc/passwd/t.json", "--", "echo", "ran"], "no such folder"),
        (&["dance"], "dance"),
    ];
    for (words, part) in cases {
        let ended = said(&mut usvm(words));
        assert_eq!((ended.code, ended.out.as_str()), (Some(2), ""), "{words:?}");
        assert!(ended.err.starts_with("usvm: ") && ended.err.contains(part), "{words:?}: {}", ended.err);
    }
    let ended = said(usvm(["run", "--", "echo", "ran"]).env("USVM_POLICY", "lru"));
    assert_eq!((ended.code, ended.out.as_str()), (Some(2), ""));
    assert!(ended.err.contains("lru"), "{}", ended.err);
}

#[test]
fn the_heaps_library_comes_first() {
    let words = ["run", "--heap", "--", "sh", "-c", "echo $LD_PRELOAD $USVM_HEAP"];
    let folder = FOLDER.path().join("heap");
    fs::create_dir_all(&folder).unwrap();
    let [ours, heap] = ["libusvm_preload.so", "libusvm_heap.so"].map(|name| folder.join(name));
    fs::copy(&*STANDIN, &ours).unwrap();
    let missing = said(usvm(words).env("USVM_PRELOAD_LIBRARY", &ours));
    assert_eq!(missing.code, Some(1));
    assert!(missing.err.contains("libusvm_heap.so is missing"), "{}", missing.err);
    fs::copy(&*STANDIN, &heap).unwrap();
    let (ours, heap) = (ours.canonicalize().unwrap(), heap.canonicalize().unwrap());
    let want = format!("{}:{} 1\n", heap.display(), ours.display());
    assert_eq!(said(usvm(words).env("USVM_PRELOAD_LIBRARY", &ours)).out, want);
    let mut by_variable = usvm(words.into_iter().filter(|word| *word != "--heap"));
    by_variable.env("USVM_PRELOAD_LIBRARY", &ours).env("USVM_HEAP", "on");
    assert_eq!(said(&mut by_variable).out, want.replace(" 1", " on"));
}

#[test]
fn a_missing_library_is_named_and_one_beside_the_program_is_found() {
    let prefix = FOLDER.path().join("prefix");
    let program = prefix.join("bin/usvm");
    copy_to(&program);
    let at = |library: Option<&str>| {
        let mut command = Command::new(&program);
        clean(command.args(["run", "--", "sh", "-c", "echo $LD_PRELOAD"]).stdin(Stdio::null()));
        match library {
            Some(name) => command.env("USVM_PRELOAD_LIBRARY", name),
            None => command.env_remove("USVM_PRELOAD_LIBRARY"),
        };
        said(&mut command)
    };
    let missing = at(None);
    assert_eq!(missing.code, Some(1));
    assert!(missing.err.contains("libusvm_preload.so is missing"), "{}", missing.err);
    let named = at(Some("/no/such.so"));
    assert_eq!(named.code, Some(1));
    assert!(named.err.contains("USVM_PRELOAD_LIBRARY names /no/such.so"), "{}", named.err);
    let other = compile("other.o", "int other;", &["-c"]);
    for (name, why) in [
        ("/", "regular file"),
        ("/etc/passwd", "shared library"),
        (other.to_str().unwrap(), "shared library"),
    ] {
        let named = at(Some(name));
        assert_eq!((named.code, named.out.as_str()), (Some(1), ""), "{name}");
        assert!(named.err.contains(name) && named.err.contains(why), "{}", named.err);
    }
    let library = prefix.join("lib/usvm/libusvm_preload.so");
    fs::create_dir_all(library.parent().unwrap()).unwrap();
    fs::copy(&*STANDIN, &library).unwrap();
    assert_eq!(at(None).out.trim(), library.canonicalize().unwrap().to_str().unwrap());
}

#[test]
fn a_static_program_runs_and_is_told_of() {
    let program =
        compile("static", "#include <stdio.h>\nint main(void) { puts(\"static\"); return 5; }", &["-static"]);
    let ended = run([&program]);
    assert_eq!((ended.code, ended.out.as_str()), (Some(5), "static\n"));
    assert!(ended.err.contains("statically linked") && ended.err.lines().count() == 1, "{}", ended.err);
    let script = FOLDER.path().join("static script");
    fs::write(&script, format!("#!{}\n", program.display())).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(run([&script]).err.contains("statically linked"), "scripts are followed");
    let pie = compile("static-pie", "int main(void) { return 6; }", &["-static-pie"]);
    let ended = run([&pie]);
    assert_eq!(ended.code, Some(6));
    assert!(ended.err.contains("statically linked"), "{}", ended.err);
}

#[test]
fn a_set_user_id_program_runs_and_is_told_of() {
    if !is_root() {
        return;
    }
    let program =
        compile("suid", "#include <unistd.h>\nint main(void) { return geteuid() == 65534 ? 8 : 9; }", &[]);
    std::os::unix::fs::chown(&program, Some(65534), None).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
    fs::set_permissions(FOLDER.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let ended = run([&program]);
    assert!(ended.err.contains("inert"), "{}", ended.err);
    assert!(matches!(ended.code, Some(8 | 9)), "it ran: 9 where the file system ignores the bit");
}

#[test]
fn chaos_without_the_right_to_serve_system_calls_is_refused() {
    if !is_root() {
        return;
    }
    fs::set_permissions(FOLDER.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = FOLDER.path().join("nobodys/usvm");
    copy_to(&program);
    fs::copy(STANDIN.as_path(), program.with_file_name("libusvm_preload.so")).unwrap();
    let by_nobody = |words: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]);
        clean(command.arg(&program).args(words).current_dir("/").stdin(Stdio::null()));
        said(command.env_remove("USVM_PRELOAD_LIBRARY"))
    };
    let rights = by_nobody(&["doctor", "--json"]).out;
    if rights.contains("user-mode faults only") {
        let refused = by_nobody(&["run", "--chaos", "100", "--", "echo", "ran"]);
        assert_eq!((refused.code, refused.out.as_str()), (Some(1), ""), "{}", refused.err);
        assert!(refused.err.contains("/dev/userfaultfd"), "it names the fix: {}", refused.err);
    }
    let without = by_nobody(&["run", "--", "echo", "ran"]);
    assert_eq!((without.code, without.out.as_str()), (Some(0), "ran\n"), "{}", without.err);
}

#[test]
fn files_are_where_the_caller_meant_them() {
    let mut command = usvm(["run", "--stats-file", "s-%p.json", "--trace", "t.json", "--", "sh", "-c"]);
    let ended = said(command.arg("echo $USVM_STATS_FILE; echo $USVM_TRACE").current_dir(FOLDER.path()));
    let here = FOLDER.path().canonicalize().unwrap();
    let want = format!("{}\n{}\n", here.join("s-%p.json").display(), here.join("t.json").display());
    assert_eq!(ended.out, want);
}
