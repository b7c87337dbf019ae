//! `usvm top`: a running program's memory, live.
//!
//! # Overview
//! [`model`] turns what the process publishes into rates and histories, [`screen`] draws it, [`plain`] prints it once,
//! [`choose`] asks which process if there are several; both use the [`terminal`].
//!
//! # Limits
//! The process publishes a few times a second at most; what happens between two looks is seen in sums only.

mod choose;
mod model;
mod plain;
mod screen;
mod terminal;

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use usvm::observe::live::{self, Viewer};

use crate::cli::TopArgs;
use crate::{Outcome, say, stats};
use model::Model;
use terminal::{Signals, Terminal};

/// The process stops publishing when nobody asks for this long, and some.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// What is printed once looks back for at least so long: ranges are looked through once a second.
const SHORTEST: Duration = Duration::from_millis(1200);

/// `usvm top`.
pub fn top(args: &TopArgs) -> Outcome {
    let failed = |e: io::Error| format!("the terminal cannot be used: {e}");
    let signals = Signals::new().map_err(failed)?;
    let on_screen = !args.once && io::stdout().is_terminal();
    let pid = match args.pid {
        Some(pid) => pid,
        None => match live::processes().as_slice() {
            [] => return Err("usvm runs in no process that this user may look into".into()),
            [only] => *only,
            several if on_screen => match choose::one_of(&signals, several).map_err(failed)? {
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
    let mut terminal = Terminal::take(&signals).map_err(failed)?;
    let watched = watch(&mut terminal, viewer, model, args.delay);
    terminal.leave();
    watched.map(|()| 0).map_err(failed)
}

/// Draws, looks and listens until the user has seen enough.
fn watch(
    terminal: &mut Terminal<'_>,
    mut viewer: Viewer,
    mut model: Model,
    delay: Duration,
) -> io::Result<()> {
    let mut view = screen::View::default();
    let mut next_look = Instant::now() + delay;
    loop {
        terminal.draw(|frame| screen::draw(frame, &model, &mut view))?;
        let wait = next_look.saturating_duration_since(Instant::now()).min(ASK_EVERY);
        for key in terminal.keys(wait)? {
            if !view.key(key) {
                return Ok(());
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
