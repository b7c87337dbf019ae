//! The terminal: taken, listened to, and given back as it was, whatever ends the program.
//!
//! # Overview
//! [`Terminal::take`] takes it and [`Terminal::leave`] gives it back. In between, [`Signals`] that end programs are only
//! remembered; [`Terminal::keys`] then says so, and leaving ends the process as without a handler.
//!
//! Keys are read here, not by crossterm: at a terminal that has hung up it would read for ever.
//!
//! # Limits
//! A signal that comes right before the waiting for a key begins is seen when that ends; one that comes while the terminal
//! takes no output, when it does again.

use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use ratatui::{DefaultTerminal, Frame};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};
use signal_hook::{flag, low_level};

/// What a key asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    Quit,
    Pause,
    Enter,
    Left,
    Right,
    Up,
    Down,
    Other,
}

/// Signals that end a program, unless it was started to ignore them.
const ENDS: [i32; 3] = [SIGTERM, SIGINT, SIGHUP];

/// A terminal in use.
pub struct Terminal<'a> {
    screen: DefaultTerminal,
    keys: OwnedFd,
    signals: &'a Signals,
}

impl<'a> Terminal<'a> {
    /// Takes the terminal.
    pub fn take(signals: &'a Signals) -> io::Result<Self> {
        let stdin = io::stdin();
        // As crossterm chooses.
        let keys = if stdin.is_terminal() {
            stdin.as_fd().try_clone_to_owned()?
        } else {
            File::options().read(true).write(true).open("/dev/tty")?.into()
        };
        signals.hold(true);
        match ratatui::try_init() {
            Ok(screen) => Ok(Self { screen, keys, signals }),
            Err(e) => {
                let _ = ratatui::try_restore();
                signals.hold(false);
                Err(e)
            }
        }
    }

    /// Gives it back. If a signal came, the process ends by it here.
    pub fn leave(mut self) {
        // There may be no terminal any more, nor anybody to tell.
        let _ = self.screen.show_cursor();
        let _ = ratatui::try_restore();
        self.signals.hold(false);
        // Its own end would complain to stderr, and panic where that is gone, too.
        std::mem::forget(self.screen);
    }

    /// Draws.
    pub fn draw(&mut self, draw: impl FnOnce(&mut Frame<'_>)) -> io::Result<()> {
        self.screen.draw(draw).map(|_| ())
    }

    /// The keys that are pressed within `limit`, at the first of them or when the window changes.
    ///
    /// # Errors
    /// Also when a signal has come, or the terminal has hung up.
    pub fn keys(&self, limit: Duration) -> io::Result<Vec<Key>> {
        let limit = Timespec::try_from(limit).map_err(|_| ErrorKind::InvalidInput)?;
        let mut asked = [PollFd::new(&self.keys, PollFlags::IN)];
        let heard = poll(&mut asked, Some(&limit));
        if self.signals.came() != 0 {
            return Err(ErrorKind::Interrupted.into());
        }
        match heard {
            Ok(0) | Err(Errno::INTR) => return Ok(Vec::new()),
            Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
        let hung_up = || io::Error::other("it has hung up");
        if asked[0].revents().intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
            return Err(hung_up());
        }
        let mut bytes = [0; 256];
        match rustix::io::read(&self.keys, &mut bytes) {
            Ok(0) | Err(Errno::IO) => Err(hung_up()),
            Ok(len) => Ok(meanings(&bytes[..len])),
            Err(Errno::INTR | Errno::AGAIN) => Ok(Vec::new()),
            Err(e) => Err(e.into()),
        }
    }
}

/// Signals that wait while the terminal is in use.
pub struct Signals {
    at_once: Arc<AtomicBool>,
    came: Arc<AtomicUsize>,
}

impl Signals {
    /// Takes charge of them.
    pub fn new() -> io::Result<Self> {
        let signals = Self { at_once: Arc::new(AtomicBool::new(true)), came: Arc::default() };
        let ignored = ignored();
        for signal in ENDS.into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0) {
            flag::register_conditional_default(signal, signals.at_once.clone())?;
            flag::register_usize(signal, signals.came.clone(), signal as usize)?;
        }
        // Only to end the waiting: the screen is drawn anew then, in its new size.
        flag::register(SIGWINCH, Arc::default())?;
        Ok(signals)
    }

    /// Whether they wait; what came ends the process when they no longer do.
    fn hold(&self, wait: bool) {
        self.at_once.store(!wait, Ordering::SeqCst);
        if !wait && self.came() != 0 {
            let _ = low_level::emulate_default_handler(self.came() as i32);
        }
    }

    /// The one that came last; 0 if none did.
    fn came(&self) -> usize {
        self.came.load(Ordering::SeqCst)
    }
}

/// The signals that this process ignores, a bit for each.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// What the keys ask for that a terminal tells of by `bytes`.
fn meanings(bytes: &[u8]) -> Vec<Key> {
    let mut keys = Vec::new();
    let mut rest = bytes;
    while let Some((first, after)) = rest.split_first() {
        let (key, after) = match (first, after.first()) {
            (0x1b, Some(b'[' | b'O')) => sequence(&after[1..]),
            (0x1b, Some(_)) => (Key::Other, &after[1..]),
            // Control and C.
            (0x1b | 3 | b'q', _) => (Key::Quit, after),
            (b'p' | b' ', _) => (Key::Pause, after),
            (b'\r' | b'\n', _) => (Key::Enter, after),
            _ => (Key::Other, after),
        };
        keys.push(key);
        rest = after;
    }
    keys
}

/// A key that is told by a sequence, of which `bytes` are the part after its start, and what comes after it.
fn sequence(bytes: &[u8]) -> (Key, &[u8]) {
    let Some(end) = bytes.iter().position(|byte| (0x40..0x7f).contains(byte)) else {
        return (Key::Other, &[]);
    };
    let key = match bytes[end] {
        b'A' => Key::Up,
        b'B' => Key::Down,
        b'C' => Key::Right,
        b'D' => Key::Left,
        _ => Key::Other,
    };
    (key, &bytes[end + 1..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_told_apart() {
        assert_eq!(meanings(b"q"), [Key::Quit]);
        assert_eq!(meanings(b"\x1b"), [Key::Quit]);
        assert_eq!(meanings(b"\x03"), [Key::Quit]);
        assert_eq!(meanings(b"p \r"), [Key::Pause, Key::Pause, Key::Enter]);
        assert_eq!(meanings(b"\x1b[A\x1bOB\x1b[1;5C\x1b[D"), [Key::Up, Key::Down, Key::Right, Key::Left]);
        assert_eq!(meanings(b"\x1b[3~\x1bqxq"), [Key::Other, Key::Other, Key::Other, Key::Quit]);
        assert_eq!(meanings(b"\x1b[1;"), [Key::Other]);
    }
}
