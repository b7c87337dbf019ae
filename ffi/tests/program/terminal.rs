//! `usvm top` on a terminal: it draws, listens, and leaves the terminal as it was.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

use crate::look::Player;
use crate::stand::{USVM, clean};

/// Into the second screen of a terminal, and out of it.
const ENTER: &str = "\x1b[?1049h";
const LEAVE: &str = "\x1b[?1049l";

/// `usvm top` on a terminal of its own, and what it has written there until now.
struct Screen {
    top: Child,
    keys: File,
    terminal: OwnedFd,
    news: Receiver<Vec<u8>>,
    text: String,
}

/// `usvm` with `words` on a terminal, and both ends of that. Nobody else has the first: closing it hangs up.
fn start(words: &[&str]) -> (Child, PtyMaster, OwnedFd) {
    let ours = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let mut options = File::options();
    options.read(true).write(true).custom_flags(OFlag::O_NOCTTY.bits());
    let theirs = OwnedFd::from(options.open(ptsname_r(&ours).unwrap()).unwrap());
    let size = rustix::termios::Winsize { ws_row: 30, ws_col: 110, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&theirs, size).unwrap();
    let end = || Stdio::from(theirs.try_clone().unwrap());
    // Whoever runs the tests may have signals ignored (nohup), and what is ignored stays so.
    let mut command = Command::new("env");
    command.args(["--default-signal=HUP,INT,TERM", USVM]).args(words);
    clean(&mut command);
    command.stdin(end()).stdout(end()).stderr(end()).env("TERM", "xterm-256color");
    (command.spawn().unwrap(), ours, theirs)
}

impl Screen {
    fn new(of: &Player) -> Self {
        Self::of(&["top", "--delay", "0.2", &of.pid()])
    }

    fn of(words: &[&str]) -> Self {
        let (top, ours, terminal) = start(words);
        let keys = File::from(OwnedFd::from(ours));
        let mut written = keys.try_clone().unwrap();
        let (tell, news) = channel();
        std::thread::spawn(move || {
            let mut some = [0; 4096];
            while let Ok(len @ 1..) = written.read(&mut some) {
                if tell.send(some[..len].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { top, keys, terminal, news, text: String::new() }
    }

    /// Waits until `what` has been written.
    fn shows(&mut self, what: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.text.contains(what) {
            match self.news.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(some) => self.text += &String::from_utf8_lossy(&some),
                Err(_) => panic!("no {what:?} in {:?}", self.text),
            }
        }
    }

    fn press(&mut self, keys: &str) {
        self.text.clear();
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Whether lines are edited and echoed by the terminal, as a shell wants it.
    fn is_for_lines(&self) -> bool {
        let modes = tcgetattr(self.terminal.as_fd()).unwrap();
        modes.local_flags.contains(LocalFlags::ICANON | LocalFlags::ECHO)
    }

    fn signal(&mut self, signal: Signal) {
        self.text.clear();
        kill(Pid::from_raw(self.top.id() as i32), signal).unwrap();
    }

    fn ended(mut self) -> ExitStatus {
        self.shows(LEAVE);
        let status = self.top.wait().unwrap();
        assert!(self.is_for_lines(), "the terminal is as it was");
        status
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.top.kill();
        let _ = self.top.wait();
    }
}

#[test]
fn top_draws_listens_and_leaves() {
    let player = Player::start("worker");
    let mut screen = Screen::new(&player);
    screen.shows(ENTER);
    screen.shows("sim:arc-b580");
    screen.shows("moves/s");
    assert!(!screen.is_for_lines(), "keys are heard one by one");
    screen.press("p");
    screen.shows("[paused]");
    screen.press("q");
    assert_eq!(screen.ended().code(), Some(0));
}

#[test]
fn top_goes_on_when_the_process_ends_and_is_ended_by_a_signal() {
    let player = Player::start("worker");
    let mut screen = Screen::new(&player);
    screen.shows("sim:arc-b580");
    let pid = player.pid();
    drop(player);
    screen.shows(&format!("no process {pid}"));
    screen.signal(Signal::SIGTERM);
    assert_eq!(screen.ended().signal(), Some(Signal::SIGTERM as i32));
}

#[test]
fn signals_leave_either_screen_as_they_should() {
    let players = [Player::start("worker"), Player::start("worker")];
    let screens: [(&[&str], &str); 2] = [(&["top"], "processes"), (&["top", &players[0].pid()], "moves/s")];
    for (words, part) in screens {
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            let mut screen = Screen::of(words);
            screen.shows(part);
            screen.signal(signal);
            assert_eq!(screen.ended().signal(), Some(signal as i32), "{words:?}");
        }
    }
}

#[test]
fn the_choice_is_made_by_keys() {
    let players = [Player::start("worker"), Player::start("worker")];
    let mut screen = Screen::of(&["top"]);
    screen.shows("processes");
    let pid = players[1].pid();
    screen.shows(&pid);
    // Others may run usvm, too. The text is put in place by row and column; the first row is the frame's.
    let before = screen.text.split(&pid).next().unwrap();
    let row = before.rsplit("\x1b[").find_map(|part| part.split_once(';')?.0.parse::<usize>().ok()).unwrap();
    screen.press(&("\x1b[B".repeat(row - 2) + "\r"));
    screen.shows("moves/s");
    assert!(screen.text.contains(&pid), "{}", screen.text);
    screen.press("\x1b");
    assert_eq!(screen.ended().code(), Some(0));
    let mut screen = Screen::of(&["top"]);
    screen.shows("processes");
    screen.press("q");
    assert_eq!(screen.ended().code(), Some(0));
}

#[test]
fn a_terminal_that_hangs_up_ends_either_screen() {
    let players = [Player::start("worker"), Player::start("worker")];
    let screens: [(&[&str], &str); 2] = [(&["top"], "processes"), (&["top", &players[0].pid()], "moves/s")];
    for (words, part) in screens {
        // It is no controlling terminal: no signal comes.
        let (mut top, mut ours, theirs) = start(words);
        drop(theirs);
        let mut text = Vec::new();
        while !String::from_utf8_lossy(&text).contains(part) {
            let mut some = [0; 4096];
            let len = ours.read(&mut some).unwrap();
            text.extend_from_slice(&some[..len]);
        }
        drop(ours);
        let deadline = Instant::now() + Duration::from_secs(20);
        let status = loop {
            match top.try_wait().unwrap() {
                Some(status) => break Some(status),
                None if Instant::now() > deadline => break None,
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        if status.is_none() {
            top.kill().unwrap();
            top.wait().unwrap();
        }
        assert_eq!(status.and_then(|status| status.code()), Some(1), "{words:?}");
    }
}
