//! The screen: bars for each device, rates with their histories, the hottest ranges.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::symbols;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, LineGauge, Paragraph, Row, Sparkline, Table, TableState};
use usvm::observe::live::LiveDevice;
use usvm::observe::stats::Unit;

use super::model::{Hot, Model, Series};
use super::plain;
use super::terminal::Key;
use crate::{say, stats};

/// The table's columns: title, width, alignment to the right.
const COLUMNS: [(&str, u16); 7] = [
    ("address", 16),
    ("size", 10),
    ("on device", 10),
    ("out", 8),
    ("back", 8),
    ("moves/s", 9),
    ("mapping", 16),
];

/// The column that is sorted by at first.
const RATE: usize = 5;

/// How the user wants to see it.
#[derive(Debug)]
pub struct View {
    /// Nothing new is taken.
    pub paused: bool,
    sort: usize,
    table: TableState,
}

impl Default for View {
    fn default() -> Self {
        Self { paused: false, sort: RATE, table: TableState::default() }
    }
}

impl View {
    /// Does what `key` asks for; `false` when that is to leave.
    pub fn key(&mut self, key: Key) -> bool {
        match key {
            Key::Quit => return false,
            Key::Pause => self.paused = !self.paused,
            Key::Left => self.sort = (self.sort + COLUMNS.len() - 1) % COLUMNS.len(),
            Key::Right => self.sort = (self.sort + 1) % COLUMNS.len(),
            Key::Up => self.table.select_previous(),
            Key::Down => self.table.select_next(),
            Key::Enter | Key::Other => {}
        }
        true
    }

    /// The ranges in the chosen order: addresses and names ascending, numbers descending.
    fn sorted<'a>(&self, hottest: &'a [Hot]) -> Vec<&'a Hot> {
        let mut ranges: Vec<&Hot> = hottest.iter().collect();
        ranges.sort_by(|a, b| {
            let (x, y) = (&a.range, &b.range);
            let chosen = match self.sort {
                1 => y.bytes.cmp(&x.bytes),
                2 => y.resident_bytes.cmp(&x.resident_bytes),
                3 => y.to_device.cmp(&x.to_device),
                4 => y.to_host.cmp(&x.to_host),
                RATE => b.rate.total_cmp(&a.rate).then(y.moves().cmp(&x.moves())),
                6 => a.mapping.cmp(&b.mapping),
                _ => std::cmp::Ordering::Equal,
            };
            chosen.then(x.start.cmp(&y.start))
        });
        ranges
    }
}

/// Draws all of it.
pub fn draw(frame: &mut Frame<'_>, model: &Model, view: &mut View) {
    let devices = model.now.devices.len() as u16;
    let [head, bars, rates, ranges, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(5 * devices),
        Constraint::Length(model.series.len() as u16 + 3),
        Constraint::Min(4),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    heading(frame, head, model, view);
    let each = Layout::vertical(model.now.devices.iter().map(|_| Constraint::Length(5))).split(bars);
    for (device, area) in model.now.devices.iter().zip(each.iter()) {
        device_bars(frame, *area, device);
    }
    rate_lines(frame, rates, model);
    range_table(frame, ranges, model, view);
    let keys = " q quit   p pause   left/right sort   up/down scroll";
    frame.render_widget(Line::from(keys).dim(), foot);
}

fn heading(frame: &mut Frame<'_>, area: Rect, model: &Model, view: &View) {
    let mut line = vec![Span::from(stats::heading(&model.now, model.pid, &model.name)).bold()];
    if view.paused {
        line.push(" [paused]".yellow());
    }
    if let Some(why) = &model.silent {
        line.push(format!(" [{why}]").red());
    }
    frame.render_widget(Line::from(line), area);
}

fn device_bars(frame: &mut Frame<'_>, area: Rect, device: &LiveDevice) {
    let used =
        format!(" {} of {} in use ", say::bytes(device.allocated_bytes), say::bytes(device.vram_bytes));
    let block = Block::bordered().title(format!(" {} ", device.name)).title(Line::from(used).right_aligned());
    let inside = block.inner(area);
    frame.render_widget(block, area);
    let bars = [
        ("resident", device.resident_bytes, Color::Green),
        ("shared", device.shared_bytes, Color::Cyan),
        ("retained", device.retained_bytes, Color::Magenta),
    ];
    let lines: [Rect; 3] = Layout::vertical([Constraint::Length(1); 3]).areas(inside);
    for ((name, bytes, color), line) in bars.into_iter().zip(lines) {
        let ratio = bytes as f64 / device.vram_bytes.max(1) as f64;
        let bar = LineGauge::default()
            .label(format!("{name:<10}{:>10}", say::bytes(bytes)))
            .filled_symbol(symbols::block::FULL)
            .unfilled_symbol("·")
            .filled_style(Style::new().fg(color))
            .unfilled_style(Style::new().add_modifier(Modifier::DIM))
            // Retained pages can be more than the device has.
            .ratio(ratio.clamp(0.0, 1.0));
        frame.render_widget(bar, line);
    }
}

fn rate_lines(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let block = Block::bordered().title(" per second ");
    let inside = block.inner(area);
    frame.render_widget(block, area);
    let heights = Constraint::from_lengths(vec![1; model.series.len() + 1]);
    let lines = Layout::vertical(heights).split(inside);
    for (series, line) in model.series.iter().zip(lines.iter()) {
        rate_line(frame, *line, series);
    }
    let s = &model.now.stats;
    let times = [s.fault_us_p50, s.fault_us_p90, s.fault_us_p99, s.fault_us_max];
    let [p50, p90, p99, max] = times.map(|us| Unit::Microseconds.show(us));
    let words = format!("CPU faults so far: p50 {p50}, p90 {p90}, p99 {p99}, max {max}");
    if let Some(last) = lines.last() {
        frame.render_widget(Line::from(words), *last);
    }
}

fn rate_line(frame: &mut Frame<'_>, area: Rect, series: &Series) {
    let [words, line] = Layout::horizontal([Constraint::Length(31), Constraint::Fill(1)]).areas(area);
    let text = format!("{:<18}{:>12}", series.name, series.unit.show(series.rate));
    frame.render_widget(Paragraph::new(text), words);
    let width = usize::from(line.width).min(series.history.len());
    let newest: Vec<u64> = series.history.iter().skip(series.history.len() - width).copied().collect();
    let history = Sparkline::default().data(newest).style(Style::new().fg(Color::Blue));
    frame.render_widget(history, line);
}

fn range_table(frame: &mut Frame<'_>, area: Rect, model: &Model, view: &mut View) {
    let title = format!(" hottest of {} ranges ", model.now.ranges);
    let numeric = |index: usize| (1..=RATE).contains(&index);
    let aligned = |index: usize, text: String| {
        let line = Line::from(text);
        Cell::from(if numeric(index) { line.right_aligned() } else { line })
    };
    let header = COLUMNS.iter().enumerate().map(|(index, (name, _))| {
        let cell = aligned(index, (*name).into());
        if index == view.sort {
            cell.style(Style::new().add_modifier(Modifier::REVERSED))
        } else {
            cell.bold()
        }
    });
    let rows: Vec<Row<'_>> = view
        .sorted(&model.hottest)
        .into_iter()
        .map(|hot| {
            Row::new(plain::cells(hot).into_iter().enumerate().map(|(index, text)| aligned(index, text)))
        })
        .collect();
    let table = Table::new(rows, COLUMNS.map(|(_, width)| Constraint::Length(width)))
        .header(Row::new(header))
        .block(Block::bordered().title(title))
        .row_highlight_style(Style::new().add_modifier(Modifier::BOLD));
    frame.render_stateful_widget(table, area, &mut view.table);
}

#[cfg(test)]
mod tests {
    use super::super::model::tests::after;
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn model() -> Model {
        let mut model = Model::new(std::process::id(), after(1));
        (2..12).for_each(|second| model.take(after(second)));
        model
    }

    fn shown(model: &Model, view: &mut View, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, model, view)).unwrap();
        let buffer = terminal.backend().buffer();
        let row = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..height).map(row).collect()
    }

    fn line<'a>(lines: &'a [String], part: &str) -> &'a str {
        lines.iter().find(|line| line.contains(part)).unwrap_or_else(|| panic!("no {part} in {lines:#?}"))
    }

    #[test]
    fn everything_is_on_the_screen() {
        let lines = shown(&model(), &mut View::default(), 100, 30);
        assert!(lines[0].contains("policy adaptive, 24 ranges"));
        assert!(line(&lines, "sim:arc-a770").contains("48.0 MiB of 64.0 MiB in use"));
        let resident = line(&lines, "resident");
        let (full, empty) = (resident.matches('█').count(), resident.matches('·').count());
        assert!(resident.contains("32.0 MiB") && full > 20 && full.abs_diff(empty) <= 1, "half: {resident}");
        assert!(line(&lines, "cpu_faults").contains("100"));
        assert!(line(&lines, "bytes_to_device").contains("8.0 MiB"));
        assert!(line(&lines, "cpu_faults").contains('█'), "a history");
        assert!(line(&lines, "p50").contains("max 2000 us"));
        assert!(line(&lines, "0x7f0000200000").contains("shared"));
        assert!(lines.last().unwrap().contains("q quit"));
    }

    #[test]
    fn keys_sort_pause_and_leave() {
        let model = model();
        let mut view = View::default();
        let first = |view: &mut View| {
            let lines = shown(&model, view, 100, 30);
            let at = lines.iter().position(|line| line.contains("moves/s")).unwrap();
            lines[at + 1].trim_matches('│').split_whitespace().next().unwrap().to_owned()
        };
        assert!(view.key(Key::Left));
        assert_eq!(first(&mut view), "0x7f0000800000", "came back most");
        assert!(view.key(Key::Left));
        assert_eq!(first(&mut view), "0x7f0000000000", "went out most");
        assert!(view.key(Key::Pause) && view.paused);
        assert!(shown(&model, &mut view, 100, 30)[0].contains("[paused]"));
        assert!(!view.key(Key::Quit));
    }

    #[test]
    fn silence_is_shown_and_small_terminals_do_no_harm() {
        let mut model = model();
        model.silent = Some("there is no process 7".into());
        let mut view = View::default();
        assert!(shown(&model, &mut view, 120, 30)[0].contains("there is no process 7"));
        for (width, height) in [(1, 1), (10, 3), (20, 8), (40, 12), (300, 5)] {
            assert_eq!(shown(&model, &mut view, width, height).len(), usize::from(height));
        }
    }
}
