//! `usvm top`: a running program's memory, live.
//!
//! # Overview
//! [`model`] turns what the process publishes into rates and histories, [`screen`] draws it, [`plain`] prints it once,
//! [`choose`] asks which process if there are several.
//!
//! # Limits
//! The process publishes a few times a second at most; what happens between two looks is seen in sums only.

mod choose;
mod model;
mod plain;
mod screen;

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use signal_hook::consts::SIGTERM;
use usvm::observe::live::{self, Viewer};

use crate::cli::TopArgs;
use crate::{Outcome, say, stats};
use model::Model;

/// The process stops publishing when nobody asks for this long, and some.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// What is printed once looks back for at least so long: ranges are looked through once a second.
const SHORTEST: Duration = Duration::from_millis(1200);

/// `usvm top`.
pub fn top(args: &TopArgs) -> Outcome {
    let on_screen = !args.once && io::stdout().is_terminal();
    let pid = match args.pid {
        Some(pid) => pid,
        None => match live::processes().as_slice() {
            [] => return Err("usvm runs in no process that this user may look into".into()),
            [only] => *only,
            several if on_screen => match choose::one_of(several)? {
                Some(pid) => pid,
                None => return Ok(0),
            },
            several => return say::done(plain::processes(several)),
        },
    };
    let mut viewer = Viewer::open(pid).map_err(|e| e.to_string())?;
    let mut model = Model::new(pid, stats::look(&mut viewer)?);
    if !on_screen {
        std::thread::sleep(args.delay.max(SHORTEST));
        model.take(stats::look(&mut viewer)?);
        model.name_mappings();
        return say::done(plain::snapshot(&model));
    }
    let failed = |e: io::Error| format!("the terminal cannot be used: {e}");
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let watched = watch(&mut terminal, viewer, model, args.delay);
    ratatui::restore();
    if matches!(watched, Ok(Left::Terminated)) {
        // Ends as without a handler.
        let _ = signal_hook::low_level::emulate_default_handler(SIGTERM);
    }
    watched.map(|_| 0).map_err(failed)
}

/// How the screen was left.
enum Left {
    ByKey,
    Terminated,
}

/// Draws, looks and listens until the user has seen enough, or SIGTERM ends it.
fn watch(
    terminal: &mut DefaultTerminal,
    mut viewer: Viewer,
    mut model: Model,
    delay: Duration,
) -> io::Result<Left> {
    // The terminal must be put right before the process ends. (At SIGHUP there is none any more: that just ends it.)
    let ended = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGTERM, ended.clone())?;
    let mut view = screen::View::default();
    let mut next_look = Instant::now() + delay;
    loop {
        terminal.draw(|frame| screen::draw(frame, &model, &mut view))?;
        let wait = next_look.saturating_duration_since(Instant::now()).min(ASK_EVERY);
        let heard = heard(event::poll(wait))?;
        if ended.load(Ordering::Relaxed) {
            return Ok(Left::Terminated);
        }
        if heard {
            match event::read()? {
                Event::Key(key) if key.kind == KeyEventKind::Press && !view.key(meaning(key)) => {
                    return Ok(Left::ByKey);
                }
                _ => {}
            }
        }
        // A page that cannot be written any more shows below as one without news.
        let _ = viewer.ask();
        if Instant::now() >= next_look {
            next_look = Instant::now() + delay;
            if !view.paused {
                look(&mut viewer, &mut model)?;
            }
        }
    }
}

/// A signal may end the waiting for a key.
fn heard(key: io::Result<bool>) -> io::Result<bool> {
    match key {
        Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(false),
        other => other,
    }
}

fn look(viewer: &mut Viewer, model: &mut Model) -> io::Result<()> {
    match viewer.read()? {
        Some(live) => {
            model.take(live);
            model.name_mappings();
        }
        None => model.no_news(|| Viewer::open(viewer.pid()).err().map(|e| e.to_string())),
    }
    Ok(())
}

fn meaning(key: KeyEvent) -> screen::Key {
    use screen::Key;
    match key.code {
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Key::Quit,
        KeyCode::Char('q') | KeyCode::Esc => Key::Quit,
        KeyCode::Char('p' | ' ') => Key::Pause,
        KeyCode::Left => Key::Left,
        KeyCode::Right => Key::Right,
        KeyCode::Up => Key::Up,
        KeyCode::Down => Key::Down,
        _ => Key::Other,
    }
}
