//! `usvm top` and `usvm stats` at a process that runs usvm.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use usvm::observe::live::Live;
use usvm::{Config, Runtime};

use crate::stand::{FOLDER, STANDIN, USVM, clean, said, usvm};

const PART: &str = "USVM_TEST_PART";

/// Another process of this test binary that plays a part until its stdin ends, and the children it has.
pub struct Player(Child, Vec<String>);

impl Player {
    pub fn start(part: &str) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["look::player", "--exact", "--nocapture", "--test-threads=1"])
            .env(PART, part)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut player = Self(child, Vec::new());
        let out = BufReader::new(player.0.stdout.take().unwrap());
        let begun = out.lines().map(Result::unwrap).any(|line| {
            player.1.extend(line.split_once("child ").map(|(_, pid)| pid.to_owned()));
            line.contains("playing")
        });
        assert!(begun, "{part} starts");
        player
    }

    pub fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Player {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The other process: memory goes to the device and comes back, all the time.
/// What daemons do that close all they do not know, to the live page alone: the rest of usvm's descriptors is kept from
/// programs by the preload library, which this one does without.
fn close_the_page() {
    for entry in fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let page = fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().contains("usvm-live"));
        if let (true, Ok(fd)) = (page, entry.file_name().to_string_lossy().parse()) {
            // SAFETY: nothing of this test uses the descriptor, and usvm must bear it.
            unsafe { libc::close(fd) };
        }
    }
}

#[test]
fn player() {
    let Ok(part) = std::env::var(PART) else { return };
    let mut config = Config::default();
    config.set("device", "sim:arc-b580").unwrap();
    config.set("vram", "16M").unwrap();
    let runtime = (part != "bystander").then(|| Runtime::start(config).unwrap());
    if part == "daemon" {
        close_the_page();
    }
    if part == "parent" {
        children();
    }
    let mut numbers = vec![1u64; 1 << 20];
    let (at, len) = (numbers.as_mut_ptr() as u64, numbers.len() as u64 * 8);
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
    let parent = std::os::unix::process::parent_id();
    println!("playing");
    while std::os::unix::process::parent_id() == parent {
        if let Some(runtime) = &runtime {
            let kernel = move |gpu: &mut usvm::device::sim::Gpu<'_>| {
                gpu.update(at, len, |tile, _| tile[0] = tile[0].wrapping_add(1))
            };
            runtime.launch(0, kernel).wait(None).unwrap();
            numbers.iter_mut().step_by(1 << 15).for_each(|number| *number += 1);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Forks a child by the C library and one past it, which both live as long as this process, and says their ids.
fn children() {
    for bare in [false, true] {
        // SAFETY: the children only sleep; they hold copies of everything and use nothing.
        let pid = unsafe {
            if bare { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) as i32 } else { libc::fork() }
        };
        if pid == 0 {
            // SAFETY: asks for a signal at the parent's end, and waits for it.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                loop {
                    libc::pause();
                }
            }
        }
        println!("child {pid}");
    }
}

#[test]
fn forked_children_do_not_show_their_parents_page() {
    let player = Player::start("parent");
    assert_eq!(player.1.len(), 2);
    assert_eq!(said(&mut usvm(["stats", &player.pid()])).code, Some(0));
    for child in &player.1 {
        let ended = said(&mut usvm(["stats", child]));
        assert!(ended.err.contains("does not run in process"), "{}{}", ended.out, ended.err);
    }
}

#[test]
fn top_shows_devices_rates_and_ranges_as_text() {
    let player = Player::start("worker");
    let ended = said(&mut usvm(["top", "--once", "--delay", "1.5", &player.pid()]));
    assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""));
    let line = |start: &str| {
        let found = ended.out.lines().find(|line| line.trim_start().starts_with(start));
        found.unwrap_or_else(|| panic!("no {start}: {}", ended.out)).to_owned()
    };
    assert!(line("sim:arc-b580").contains("of 16.0 MiB in use"));
    assert!(line("gpu_faults").split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() > 0);
    assert!(line("bytes_to_device").contains("MiB"), "{}", ended.out);
    let moved = ended.out.lines().any(|line| line.contains("2.0 MiB") && line.contains("anonymous"));
    assert!(moved, "a hot range and what it lies in: {}", ended.out);
    let plain = said(&mut usvm(["top", "--delay", "0.3", &player.pid()]));
    assert_eq!(plain.code, Some(0), "no terminal, no screen");
    assert!(plain.out.contains("hottest of"));
}

#[test]
fn stats_of_a_process_are_those_of_its_page() {
    let player = Player::start("worker");
    let look =
        || serde_json::from_str::<Live>(&said(&mut usvm(["stats", "--json", &player.pid()])).out).unwrap();
    let busy = |live: &Live| live.stats.cpu_faults > 0 && live.hottest.iter().any(|range| range.to_host > 0);
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut live = look();
    while !busy(&live) && Instant::now() < deadline {
        live = look();
    }
    assert!(busy(&live), "{live:?}");
    assert_eq!((live.pid.to_string(), live.devices.len()), (player.pid(), 1));
    assert_eq!(live.devices[0].vram_bytes, 16 << 20);
    assert!(live.hottest.len() >= 4, "{live:?}");
    let resident: u64 = live.hottest.iter().map(|range| range.resident_bytes).sum();
    assert!(resident <= 16 << 20, "{live:?}");
    std::thread::sleep(Duration::from_millis(400));
    let later = look();
    assert!(later.uptime_us > live.uptime_us && later.stats.gpu_faults > live.stats.gpu_faults);
    let text = said(&mut usvm(["stats", &player.pid()])).out;
    assert!(text.contains("sim:arc-b580:") && text.contains("cpu_faults"), "{text}");
}

#[test]
fn a_closed_stdout_is_not_the_page() {
    let player = Player::start("worker");
    for command in ["top --once --delay 0.1", "stats", "stats --json"] {
        for closed in [">&-", "<&- >&-", "<&- >&- 2>&-"] {
            let line = format!("{USVM} {command} {} {closed}", player.pid());
            let mut shell = Command::new("sh");
            clean(shell.args(["-c", &line]).stdin(Stdio::null()));
            assert_eq!(said(&mut shell).code, Some(1), "{line}");
            let after = said(&mut usvm(["stats", &player.pid()]));
            assert_eq!(after.code, Some(0), "{line}: {}", after.err);
        }
    }
}

#[test]
fn a_process_that_cannot_be_looked_at_says_why() {
    let refused = |words: &[&str], part: &str| {
        let ended = said(&mut usvm(words));
        assert_eq!((ended.code, ended.out.as_str()), (Some(1), ""), "{words:?}");
        assert!(ended.err.starts_with("usvm: ") && ended.err.contains(part), "{words:?}: {}", ended.err);
    };
    let bystander = Player::start("bystander");
    for command in ["top", "stats"] {
        refused(&[command, "2000000000"], "there is no process");
        refused(&[command, &bystander.pid()], "does not run in process");
    }
    let player = Player::start("worker");
    // SAFETY: stops a child of ours.
    assert_eq!(unsafe { libc::kill(player.0.id() as i32, libc::SIGSTOP) }, 0);
    let begin = Instant::now();
    let ended = said(&mut usvm(["stats", &player.pid()]));
    assert!(
        ended.err.contains("is it stopped?") && begin.elapsed() < Duration::from_secs(8),
        "{}",
        ended.err
    );
}

#[test]
fn a_program_that_closes_what_it_does_not_know_is_told_of_and_lives() {
    let mut player = Player::start("daemon");
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let ended = said(&mut usvm(["stats", "--json", &player.pid()]));
        if ended.code != Some(0) {
            assert!(ended.err.contains("has closed the descriptor"), "{}", ended.err);
            break;
        }
        // Root opens the mapping's file.
        if serde_json::from_str::<Live>(&ended.out).unwrap().stats.gpu_faults > 0 {
            break;
        }
        assert!(Instant::now() < deadline, "no device access in {}", ended.out);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(player.0.try_wait().unwrap().is_none(), "it goes on");
}

#[test]
fn a_program_that_has_not_used_a_device_says_so() {
    let library = FOLDER.path().join("loaded/libusvm_preload.so");
    fs::create_dir_all(library.parent().unwrap()).unwrap();
    fs::copy(&*STANDIN, &library).unwrap();
    let mut sleeper =
        usvm(["run", "--", "sleep", "60"]).env("USVM_PRELOAD_LIBRARY", &library).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    let loaded = loop {
        let ended = said(&mut usvm(["stats", &sleeper.id().to_string()]));
        if ended.err.contains("is loaded") || Instant::now() > deadline {
            break ended.err;
        }
    };
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    assert!(loaded.contains("it starts when the program first uses a device"), "{loaded}");
}

#[test]
fn nothing_stays_behind_after_a_crash() {
    let player = Player::start("worker");
    let pid = player.pid();
    assert_eq!(said(&mut usvm(["stats", &pid])).code, Some(0));
    drop(player);
    assert!(said(&mut usvm(["stats", &pid])).err.contains("there is no process"));
}

#[test]
fn an_end_of_usvm_ends_the_page() {
    let fds =
        || fs::read_dir("/proc/self/fd").unwrap().flatten().filter_map(|e| fs::read_link(e.path()).ok());
    let pages = || fds().filter(|link| link.to_string_lossy().contains("usvm-live")).count();
    let runtime = Runtime::start(Config::default()).unwrap();
    assert_eq!(pages(), 1);
    runtime.shutdown();
    assert_eq!(pages(), 0);
}

#[test]
fn statistics_files_are_read() {
    let file = FOLDER.path().join("stats.json");
    let text = r#"{"size":232,"version":1,"cpu_faults":12,"bytes_to_host":5242880,"fault_us_p50":22}"#;
    fs::write(&file, text).unwrap();
    let shown = said(usvm(["stats"]).arg(&file));
    assert_eq!(shown.code, Some(0));
    assert!(shown.out.contains("bytes_to_host") && shown.out.contains("5.0 MiB"), "{}", shown.out);
    let json = said(usvm(["stats", "--json"]).arg(&file));
    let read: Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(read, serde_json::from_str::<Value>(text).unwrap());
    fs::write(&file, "[]").unwrap();
    assert!(said(usvm(["stats"]).arg(&file)).err.contains("not a statistics file"));
    let mut limited = Command::new("sh");
    clean(
        limited
            .args(["-c", "ulimit -v 2000000; exec timeout 20 \"$0\" stats /dev/zero", USVM])
            .stdin(Stdio::null()),
    );
    let endless = said(&mut limited);
    assert_eq!(endless.code, Some(1));
    assert!(endless.err.contains("/dev/zero: not a statistics file of usvm"), "{}", endless.err);
    let mut piped = Command::new("sh");
    clean(piped.args(["-c", "echo \"$1\" | \"$0\" stats /dev/stdin", USVM, text]).stdin(Stdio::null()));
    assert!(said(&mut piped).out.contains("5.0 MiB"), "a pipe is read");
    let missing = said(&mut usvm(["stats", "/no/such.json"]));
    assert_eq!(missing.code, Some(1));
    assert!(missing.err.starts_with("usvm: /no/such.json: "));
}

#[test]
fn the_processes_are_listed() {
    let (one, two) = (Player::start("worker"), Player::start("worker"));
    let listed = said(&mut usvm(["top", "--once", "--delay", "0.1"])).out;
    for player in [&one, &two] {
        let words = format!("{:>8}  ", player.pid());
        assert!(listed.lines().any(|line| line.starts_with(&words)), "{listed}");
    }
}
