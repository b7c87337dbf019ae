//! Which process, when there are several.

use std::io;
use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, List, ListState};

use super::terminal::{Key, Signals, Terminal};
use crate::stats;

/// How long nothing is drawn anew when nothing happens.
const STILL: Duration = Duration::from_secs(1);

/// The one that the user takes; `None` when the user leaves.
pub fn one_of(signals: &Signals, pids: &[u32]) -> io::Result<Option<u32>> {
    let mut terminal = Terminal::take(signals)?;
    let chosen = ask(&mut terminal, pids);
    terminal.leave();
    chosen
}

fn ask(terminal: &mut Terminal<'_>, pids: &[u32]) -> io::Result<Option<u32>> {
    let lines: Vec<String> = pids.iter().map(|pid| format!("{pid:>8}  {}", stats::command(*pid))).collect();
    let mut state = ListState::default().with_selected(Some(0));
    loop {
        terminal.draw(|frame| draw(frame, &lines, &mut state))?;
        for key in terminal.keys(STILL)? {
            match key {
                Key::Enter => return Ok(state.selected().and_then(|index| pids.get(index)).copied()),
                Key::Quit => return Ok(None),
                Key::Up => state.select_previous(),
                Key::Down => state.select_next(),
                _ => {}
            }
        }
    }
}

fn draw(frame: &mut Frame<'_>, lines: &[String], state: &mut ListState) {
    let [list, foot] = Layout::vertical([Constraint::Fill(1), Constraint::Length(1)]).areas(frame.area());
    let choices = List::new(lines.iter().map(String::as_str))
        .block(Block::bordered().title(" several processes run usvm "))
        .highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    frame.render_stateful_widget(choices, list, state);
    frame.render_widget(Line::from(" Enter watch it   arrows choose   q quit"), foot);
}
