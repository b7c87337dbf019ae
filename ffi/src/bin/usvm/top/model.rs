//! What is known of the process, and how fast it changes.

use std::collections::VecDeque;
use std::fs;
use std::time::{Duration, Instant};

use usvm::observe::live::{HotRange, Live, printable};
use usvm::observe::stats::{StatsSnapshot, Unit};

/// Points of each history: as wide as a wide terminal.
const HISTORY: usize = 300;

/// How long a range's moves are looked back for its rate: its numbers are renewed about once a second.
const LOOK_BACK_US: u64 = 4_000_000;

/// What is looked back on, at most: the clock is the process's, and may stand still.
const MOST_EARLIER: usize = 64;

/// How often mappings are named anew.
const NAME_EVERY: Duration = Duration::from_secs(2);

/// Without news for this long, the process is asked after.
const SILENCE: Duration = Duration::from_secs(2);

/// Takes one number out of the statistics.
type Take = fn(&StatsSnapshot) -> u64;

/// One number that changes all the time.
#[derive(Debug)]
pub struct Series {
    /// What it is called everywhere.
    pub name: &'static str,
    /// What it counts, each second.
    pub unit: Unit,
    sum: Take,
    /// A second's worth now.
    pub rate: u64,
    /// Rates so far, the newest last.
    pub history: VecDeque<u64>,
}

const SERIES: [(&str, Unit, Take); 6] = [
    ("cpu_faults", Unit::Count, |s| s.cpu_faults),
    ("gpu_faults", Unit::Count, |s| s.gpu_faults),
    ("bytes_to_device", Unit::Bytes, |s| s.bytes_to_device),
    ("bytes_to_host", Unit::Bytes, |s| s.bytes_to_host),
    ("migrations", Unit::Count, |s| {
        s.migrations_4k.saturating_add(s.migrations_64k).saturating_add(s.migrations_2m)
    }),
    ("evictions", Unit::Count, |s| s.evictions),
];

/// A range that moves, with what can be said about it here.
#[derive(Debug, Clone, PartialEq)]
pub struct Hot {
    /// What the process says.
    pub range: HotRange,
    /// Moves a second.
    pub rate: f64,
    /// What lies there: `[heap]`, `[stack]`, a name, or nothing special.
    pub mapping: String,
}

/// Everything that is shown.
#[derive(Debug)]
pub struct Model {
    /// The process.
    pub pid: u32,
    /// Its name.
    pub name: String,
    /// What it published last.
    pub now: Live,
    /// Rates and their histories.
    pub series: Vec<Series>,
    /// The ranges that moved most.
    pub hottest: Vec<Hot>,
    /// Why nothing new comes, if so.
    pub silent: Option<String>,
    earlier: VecDeque<(u64, Vec<HotRange>)>,
    heard: Instant,
    named: Option<Instant>,
    mappings: Vec<(u64, u64, String)>,
}

impl Model {
    /// Of process `pid`, which published `now`.
    pub fn new(pid: u32, now: Live) -> Self {
        let series =
            SERIES.map(|(name, unit, sum)| Series { name, unit, sum, rate: 0, history: VecDeque::new() });
        let mut model = Self {
            pid,
            name: crate::stats::command(pid),
            now: Live::default(),
            series: series.into(),
            hottest: Vec::new(),
            silent: None,
            earlier: VecDeque::new(),
            heard: Instant::now(),
            named: None,
            mappings: Vec::new(),
        };
        model.show(now);
        model
    }

    /// The process published `live`.
    pub fn take(&mut self, live: Live) {
        let elapsed = live.uptime_us.saturating_sub(self.now.uptime_us);
        for series in &mut self.series {
            // A reset of the counters is no negative rate.
            let more = (series.sum)(&live.stats).saturating_sub((series.sum)(&self.now.stats));
            series.rate = per_second(more, elapsed).round() as u64;
            series.history.push_back(series.rate);
            if series.history.len() > HISTORY {
                series.history.pop_front();
            }
        }
        self.show(live);
    }

    fn show(&mut self, live: Live) {
        self.heard = Instant::now();
        self.silent = None;
        self.hottest = live.hottest.iter().map(|range| self.hot(range, live.uptime_us)).collect();
        self.earlier.push_back((live.uptime_us, live.hottest.clone()));
        let begin = live.uptime_us.saturating_sub(LOOK_BACK_US);
        // One that lies before the time looked back to is kept: that is where the rate begins.
        let old = |(at, _): &(u64, _)| *at <= begin;
        while self.earlier.get(1).is_some_and(old) || self.earlier.len() > MOST_EARLIER {
            self.earlier.pop_front();
        }
        self.now = live;
    }

    fn hot(&self, range: &HotRange, now: u64) -> Hot {
        let before = self.earlier.iter().find_map(|(at, ranges)| {
            let same = ranges.iter().find(|r| r.start == range.start && r.bytes == range.bytes)?;
            Some((*at, same.moves()))
        });
        let rate = before.map_or(0.0, |(at, moves)| {
            per_second(range.moves().saturating_sub(moves), now.saturating_sub(at))
        });
        Hot { range: *range, rate, mapping: self.mapping(range.start) }
    }

    fn mapping(&self, addr: u64) -> String {
        let found = self.mappings.iter().find(|(start, end, _)| (*start..*end).contains(&addr));
        found.map_or_else(String::new, |(.., name)| name.clone())
    }

    /// Reads the names of the process's mappings, if it is time.
    pub fn name_mappings(&mut self) {
        if self.named.is_some_and(|last| last.elapsed() < NAME_EVERY) {
            return;
        }
        let maps = fs::read(format!("/proc/{}/maps", self.pid)).unwrap_or_default();
        self.mappings = named(&String::from_utf8_lossy(&maps));
        self.named = Some(Instant::now());
        let names: Vec<_> = self.hottest.iter().map(|hot| self.mapping(hot.range.start)).collect();
        self.hottest.iter_mut().zip(names).for_each(|(hot, name)| hot.mapping = name);
    }

    /// Nothing new came; `gone` says why if the process or its page is not there any more.
    pub fn no_news(&mut self, gone: impl FnOnce() -> Option<String>) {
        if self.heard.elapsed() >= SILENCE {
            self.silent = Some(gone().unwrap_or_else(|| "it does not answer; is it stopped?".into()));
        }
    }
}

fn per_second(count: u64, elapsed_us: u64) -> f64 {
    count as f64 * 1e6 / elapsed_us.max(1) as f64
}

/// The mappings that /proc/PID/maps names, with those in between that it does not as anonymous.
fn named(maps: &str) -> Vec<(u64, u64, String)> {
    let line = |line: &str| {
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let name = fields.nth(4).unwrap_or_default().trim();
        let name = name.strip_prefix("[anon:").map_or(name, |name| name.trim_end_matches(']'));
        let name = if name.is_empty() { "anonymous" } else { name.rsplit('/').next().unwrap_or(name) };
        let address = |hex| u64::from_str_radix(hex, 16).ok();
        Some((address(start)?, address(end)?, printable(name)))
    };
    maps.lines().filter_map(line).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use usvm::observe::live::LiveDevice;

    /// A process after `seconds`, with everything in proportion.
    pub fn after(seconds: u64) -> Live {
        let range = |index: u64| HotRange {
            start: 0x7f00_0000_0000 + (index << 21),
            bytes: 2 << 20,
            device: 0,
            resident_bytes: if index.is_multiple_of(2) { 2 << 20 } else { 0 },
            shared: index == 1,
            to_device: (seconds * (10 - index)) as u32,
            to_host: (seconds * index) as u32,
        };
        Live {
            usvm: "0.1.0".into(),
            pid: 1,
            uptime_us: seconds * 1_000_000,
            policy: "adaptive".into(),
            chaos_per_second: 0,
            devices: vec![LiveDevice {
                name: "sim:arc-a770".into(),
                vram_bytes: 64 << 20,
                allocated_bytes: 48 << 20,
                resident_bytes: 32 << 20,
                shared_bytes: 8 << 20,
                retained_bytes: 16 << 20,
            }],
            stats: StatsSnapshot {
                cpu_faults: seconds * 100,
                bytes_to_device: seconds * (8 << 20),
                migrations_4k: seconds,
                migrations_2m: seconds * 2,
                fault_us_p50: 20,
                fault_us_p90: 90,
                fault_us_p99: 900,
                fault_us_max: 2000,
                ..StatsSnapshot::default()
            },
            ranges: 24,
            hottest: (0..5).map(range).collect(),
        }
    }

    fn rate(model: &Model, name: &str) -> u64 {
        model.series.iter().find(|series| series.name == name).unwrap().rate
    }

    #[test]
    fn numbers_that_no_process_has_are_borne() {
        let most = u64::MAX;
        let stats = StatsSnapshot {
            migrations_4k: most,
            migrations_64k: most,
            migrations_2m: most,
            ..StatsSnapshot::default()
        };
        let device = LiveDevice { vram_bytes: 1, resident_bytes: most, ..LiveDevice::default() };
        let range = HotRange {
            start: most,
            bytes: most,
            to_device: u32::MAX,
            to_host: u32::MAX,
            ..HotRange::default()
        };
        let live = Live {
            uptime_us: 1,
            ranges: most,
            stats,
            devices: vec![device],
            hottest: vec![range],
            ..after(1)
        };
        let mut model = Model::new(1, live.clone());
        (0..200).for_each(|_| model.take(live.clone()));
        assert!(model.earlier.len() <= MOST_EARLIER);
        assert_eq!(rate(&model, "migrations"), 0);
        assert!(super::super::plain::snapshot(&model).contains("hottest"));
    }

    #[test]
    fn rates_are_per_second_of_the_processes_own_clock() {
        let mut model = Model::new(1, after(10));
        assert_eq!(rate(&model, "cpu_faults"), 0);
        model.take(after(12));
        assert_eq!(rate(&model, "cpu_faults"), 100);
        assert_eq!(rate(&model, "bytes_to_device"), 8 << 20);
        assert_eq!(rate(&model, "migrations"), 3);
        model.take(after(0));
        assert_eq!(rate(&model, "cpu_faults"), 0, "the counters were reset");
        assert_eq!(model.series[0].history, [100, 0]);
    }

    #[test]
    fn a_ranges_rate_looks_back_some_seconds() {
        let mut model = Model::new(1, after(1));
        for second in 2..20 {
            model.take(after(second));
            assert!((model.hottest[0].rate - 10.0).abs() < 0.01, "{}", model.hottest[0].rate);
            assert!(model.earlier.len() <= 6);
        }
        let mut idle = after(30);
        idle.hottest = after(19).hottest;
        model.take(idle);
        assert!(model.hottest[0].rate < 10.0);
    }

    #[test]
    fn silence_has_a_reason() {
        let mut model = Model::new(1, after(1));
        model.no_news(|| Some("gone".into()));
        assert_eq!(model.silent, None, "not yet");
        model.heard = Instant::now().checked_sub(SILENCE).unwrap();
        model.no_news(|| Some("gone".into()));
        assert_eq!(model.silent.as_deref(), Some("gone"));
        model.no_news(|| None);
        assert!(model.silent.as_deref().unwrap().contains("stopped"));
        model.take(after(2));
        assert_eq!(model.silent, None);
    }

    #[test]
    fn mappings_have_names() {
        let maps = "55d0-55e0 rw-p 00000000 00:00 0                          [heap]\n\
                    7f00-7f10 rw-p 00000000 00:00 0 \n\
                    7f20-7f30 rw-p 00000000 00:00 0                          [anon:my pool]\n\
                    7f40-7f50 rw-p 00000000 08:01 77                         /usr/lib/lib x.so\n";
        let names: Vec<_> = named(maps).into_iter().map(|(start, _, name)| (start, name)).collect();
        let want = [(0x55d0, "[heap]"), (0x7f00, "anonymous"), (0x7f20, "my pool"), (0x7f40, "lib x.so")];
        assert_eq!(names, want.map(|(start, name)| (start, name.to_owned())));
    }
}
