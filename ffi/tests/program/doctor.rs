//! `usvm doctor` and `usvm devices`: they run everywhere and say what they find.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::stand::{FOLDER, STANDIN, clean, copy_to, is_root, make_pipe, said, usvm};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// The check called `name`.
fn check<'a>(report: &'a Value, name: &str) -> &'a Value {
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name} in {report:#}"))
}

/// Every check has its fields, the verdict is the worst of them, and the exit status follows.
fn sound(report: &Value, code: Option<i32>) {
    let worth = |status: &Value| ["ok", "warn", "fail"].iter().position(|word| status == word).unwrap();
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.len() > 12);
    for check in checks {
        assert!(["group", "name", "found"].iter().all(|field| check[field].is_string()), "{check}");
        assert!(check["status"] == "ok" || check["fix"].is_string(), "{check}");
    }
    let worst = checks.iter().map(|check| worth(&check["status"])).max().unwrap();
    assert_eq!(worth(&report["verdict"]), worst);
    assert_eq!(code, Some(i32::from(worst == 2)));
}

#[test]
fn the_report_is_sound_as_json_and_as_text() {
    let ended = said(&mut usvm(["doctor", "--json"]));
    assert_eq!(ended.err, "");
    let report = json(&ended.out);
    sound(&report, ended.code);
    assert_eq!(check(&report, "libusvm_preload.so")["status"], "ok");
    let text = said(&mut usvm(["doctor"]));
    assert_eq!(text.code, ended.code);
    for check in report["checks"].as_array().unwrap() {
        assert!(text.out.contains(check["name"].as_str().unwrap()), "{check}");
    }
}

#[test]
fn a_library_that_is_missing_or_broken_is_a_failure_with_its_fix() {
    let broken = FOLDER.path().join("broken.so");
    std::fs::write(&broken, "no library").unwrap();
    for library in [broken.as_path(), "/no/such.so".as_ref()] {
        let ended = said(usvm(["doctor", "--json"]).env("USVM_PRELOAD_LIBRARY", library));
        let report = json(&ended.out);
        sound(&report, ended.code);
        let check = check(&report, "libusvm_preload.so");
        assert_eq!((ended.code, &check["status"]), (Some(1), &Value::from("fail")), "{check}");
        assert!(check["fix"].as_str().unwrap().contains("make install"));
    }
}

#[test]
fn drivers_are_tried_without_harm() {
    let crash = "#include <stdlib.h>\n__attribute__((constructor)) static void now(void) { abort(); }";
    let crash = crate::stand::compile("crash.so", crash, &["-shared", "-fPIC"]);
    let vendors = FOLDER.path().join("vendors");
    std::fs::create_dir_all(&vendors).unwrap();
    let drivers = [("crash", crash.as_path()), ("fine", &STANDIN), ("missing", "libno-such.so.1".as_ref())];
    for (name, library) in drivers {
        std::fs::write(vendors.join(format!("{name}.icd")), format!("{}\n", library.display())).unwrap();
    }
    let report = json(&said(usvm(["doctor", "--json"]).env("OCL_ICD_VENDORS", &vendors)).out);
    assert_eq!(check(&report, "fine.icd")["status"], "ok");
    assert!(check(&report, "crash.icd")["found"].as_str().unwrap().contains("signal 6"));
    assert!(check(&report, "missing.icd")["found"].as_str().unwrap().contains("libno-such.so.1"));
}

#[test]
fn what_drivers_leave_behind_and_pipes_are_not_waited_for() {
    let stays = "#include <unistd.h>\n__attribute__((constructor)) static void now(void) { if (!fork()) { sleep(40); _exit(0); } }";
    let stays = crate::stand::compile("stays.so", stays, &["-shared", "-fPIC"]);
    let folder = FOLDER.path().join("slow vendors");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("stays.icd"), stays.to_str().unwrap()).unwrap();
    make_pipe(&folder.join("pipe.icd"));
    let begin = Instant::now();
    let report = json(&said(usvm(["doctor", "--json"]).env("OCL_ICD_VENDORS", &folder)).out);
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    assert_eq!(check(&report, "stays.icd")["status"], "ok");
    let pipe = check(&report, "pipe.icd");
    assert_eq!((&pipe["status"], &pipe["found"]), (&"warn".into(), &"it is no regular file".into()));
}

#[test]
fn the_terminal_does_not_hear_a_drivers_words() {
    let speaks = "#include <unistd.h>\n__attribute__((constructor)) static void now(void) {\
        static const char words[] = \"usvm-load: ok /x\\33[2Jy\\302\\233z\\n\"; _exit(write(1, words, sizeof words - 1) < 0); }";
    let speaks = crate::stand::compile("speaks.so", speaks, &["-shared", "-fPIC"]);
    let folder = FOLDER.path().join("loud vendors");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("a\x1b[31m.icd"), speaks.to_str().unwrap()).unwrap();
    std::fs::write(folder.join("b.icd"), "lib\x1b]0;x\x07\u{9b}.so").unwrap();
    for words in [&["doctor"][..], &["doctor", "--json"]] {
        let ended = said(usvm(words).env("OCL_ICD_VENDORS", &folder));
        assert!(ended.out.contains("a?[31m.icd") && ended.out.contains("/x?[2Jy?z loads"), "{}", ended.out);
        let obeyed = ended.out.chars().find(|c| c.is_control() && *c != '\n');
        assert_eq!(obeyed, None, "{:?}", ended.out);
    }
}

#[test]
fn a_user_without_rights_is_told_what_to_do() {
    if !is_root() {
        return;
    }
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(FOLDER.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = FOLDER.path().join("everybodys/usvm");
    copy_to(&program);
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]);
    clean(command.arg(&program).args(["doctor", "--json"]).current_dir("/").stdin(Stdio::null()));
    let ended = said(&mut command);
    let report = json(&ended.out);
    sound(&report, ended.code);
    assert_eq!(check(&report, "CAP_SYS_PTRACE")["found"], "no");
    let faults = check(&report, "faults");
    if faults["status"] != "ok" {
        let fix = faults["fix"].as_str().unwrap();
        assert!(fix.contains("/dev/userfaultfd") || fix.contains("sysctl"), "{fix}");
    }
    let mut devices = Command::new("setpriv");
    devices
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&program)
        .args(["devices", "--json"]);
    assert_eq!(said(devices.current_dir("/").stdin(Stdio::null())).code, Some(0));
}

#[test]
fn tight_limits_are_warned_of() {
    let mut command = Command::new("sh");
    let line = "ulimit -v 2000000; ulimit -n 40; exec \"$0\" doctor --json";
    clean(command.args(["-c", line, crate::stand::USVM]).stdin(Stdio::null()));
    let ended = said(&mut command);
    let report = json(&ended.out);
    sound(&report, ended.code);
    for name in ["address space", "open files"] {
        assert_eq!(check(&report, name)["status"], "warn", "{name}");
    }
}

#[test]
fn devices_are_listed() {
    let ended = said(&mut usvm(["devices", "--json"]));
    let devices = json(&ended.out);
    let names: Vec<_> =
        devices["simulated"].as_array().unwrap().iter().map(|d| d["device"].as_str().unwrap()).collect();
    assert_eq!(names, ["sim", "sim:arc-a770", "sim:arc-b580", "sim:flex-170", "sim:max-1550"]);
    assert!(devices["drm"].is_array());
    for name in names {
        let run = said(&mut usvm(["run", "--device", name, "--", "true"]));
        assert_eq!((run.code, run.err.as_str()), (Some(0), ""), "{name} can be asked for");
    }
    let text = said(&mut usvm(["devices"])).out;
    assert!(text.contains("sim:max-1550") && text.contains("not used by this version"));
}
