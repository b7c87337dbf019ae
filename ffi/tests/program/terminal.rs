//! `usvm top` on a terminal: it draws, listens, and leaves the terminal as it was.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

use crate::look::Player;
use crate::stand::usvm;

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

impl Screen {
    fn new(of: &Player) -> Self {
        let size = Winsize { ws_row: 30, ws_col: 110, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(Some(&size), None).unwrap();
        let end = || Stdio::from(pair.slave.try_clone().unwrap());
        let top = usvm(["top", "--delay", "0.2", &of.pid()])
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .env("TERM", "xterm-256color")
            .spawn()
            .unwrap();
        let keys = File::from(pair.master);
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
        Self { top, keys, terminal: pair.slave, news, text: String::new() }
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
    screen.text.clear();
    kill(Pid::from_raw(screen.top.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(screen.ended().signal(), Some(Signal::SIGTERM as i32));
}
