//! Which process, when there are several.

use std::io;

use ratatui::crossterm::event::{self, Event, KeyEventKind};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, List, ListState};
use ratatui::{DefaultTerminal, Frame};

use super::{meaning, screen::Key};
use crate::stats;

/// The one that the user takes; `None` when the user leaves.
pub fn one_of(pids: &[u32]) -> Result<Option<u32>, String> {
    let failed = |e: io::Error| format!("the terminal cannot be used: {e}");
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let chosen = ask(&mut terminal, pids);
    ratatui::restore();
    chosen.map_err(failed)
}

fn ask(terminal: &mut DefaultTerminal, pids: &[u32]) -> io::Result<Option<u32>> {
    let lines: Vec<String> = pids.iter().map(|pid| format!("{pid:>8}  {}", stats::command(*pid))).collect();
    let mut state = ListState::default().with_selected(Some(0));
    loop {
        terminal.draw(|frame| draw(frame, &lines, &mut state))?;
        let Event::Key(key) = event::read()? else { continue };
        if key.kind != KeyEventKind::Press {
            continue;
        }
        if key.code == event::KeyCode::Enter {
            return Ok(state.selected().and_then(|index| pids.get(index)).copied());
        }
        match meaning(key) {
            Key::Quit => return Ok(None),
            Key::Up => state.select_previous(),
            Key::Down => state.select_next(),
            _ => {}
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
