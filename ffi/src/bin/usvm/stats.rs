//! `usvm stats`: the numbers of a run that ended, or of one that goes on.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::Duration;

use usvm::observe::live::{Live, Viewer, printable};
use usvm::observe::stats::StatsSnapshot;

use crate::cli::StatsArgs;
use crate::{Outcome, file, say};

/// How long a running program has to answer.
pub const PATIENCE: Duration = Duration::from_secs(3);

/// Bytes that a statistics file has at most: a hundred times what is written.
const LONGEST: u64 = 1 << 20;

/// `usvm stats`.
pub fn stats(args: &StatsArgs) -> Outcome {
    match process(&args.what) {
        Some(pid) => of_process(pid, args.json),
        None => of_file(&args.what, args.json),
    }
}

/// The process that `what` names; a file of digits is named as ./4711.
fn process(what: &Path) -> Option<u32> {
    what.to_str()?.parse().ok()
}

fn of_process(pid: u32, json: bool) -> Outcome {
    let live = look(&mut Viewer::open(pid).map_err(|e| e.to_string())?)?;
    if json {
        return say::done(say::json(&live)?);
    }
    let name = command(pid);
    say::done(format!("{}\n{}{}", heading(&live, pid, &name), device_lines(&live), table(&live.stats)))
}

/// What the process shows now.
pub fn look(viewer: &mut Viewer) -> Result<Live, String> {
    let pid = viewer.pid();
    let news =
        viewer.news(PATIENCE).map_err(|e| format!("the live page of process {pid} cannot be read: {e}"))?;
    news.ok_or_else(|| {
        format!("process {pid} does not answer within {} s: is it stopped?", PATIENCE.as_secs())
    })
}

/// One line that says what is looked at.
pub fn heading(live: &Live, pid: u32, name: &str) -> String {
    let chaos = match live.chaos_per_second {
        0 => String::new(),
        rate => format!(", chaos {rate}/s"),
    };
    let up = live.uptime_us / 1_000_000;
    format!(
        "{name} (process {pid}): usvm {} up {}:{:02}:{:02}, policy {}{chaos}, {} ranges",
        live.usvm,
        up / 3600,
        up / 60 % 60,
        up % 60,
        live.policy,
        live.ranges
    )
}

/// The name of a process; a question mark if it has ended.
pub fn command(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .map_or_else(|_| "?".into(), |name| printable(name.trim_end()))
}

/// A line for each device.
pub fn device_lines(live: &Live) -> String {
    let line = |d: &usvm::observe::live::LiveDevice| {
        format!(
            "{}: {} of {} in use; {} resident, {} shared, {} retained on the host\n",
            d.name,
            say::bytes(d.allocated_bytes),
            say::bytes(d.vram_bytes),
            say::bytes(d.resident_bytes),
            say::bytes(d.shared_bytes),
            say::bytes(d.retained_bytes)
        )
    };
    live.devices.iter().map(line).collect()
}

fn of_file(path: &Path, json: bool) -> Outcome {
    let shown = path.display();
    let failed = |e: io::Error| format!("{shown}: {e}");
    // It may be a pipe (of a shell, say), which ends when its writer does.
    let bytes = file::up_to(File::open(path).map_err(failed)?, LONGEST).map_err(|e| match e.kind() {
        io::ErrorKind::FileTooLarge => format!("{shown}: not a statistics file of usvm: {e}"),
        _ => failed(e),
    })?;
    let text = String::from_utf8(bytes).map_err(|e| format!("{shown}: not JSON: {e}"))?;
    let stats = parse(&text).map_err(|e| format!("{shown}: {e}"))?;
    say::done(if json { text } else { table(&stats) })
}

/// Reads a statistics file. What another version wrote is read as far as it is known.
fn parse(text: &str) -> Result<StatsSnapshot, String> {
    let value: serde_json::Value = serde_json::from_str(text).map_err(|e| format!("not JSON: {e}"))?;
    let is_ours = ["size", "version", "cpu_faults"].iter().all(|key| value.get(key).is_some());
    if !is_ours {
        return Err("JSON, but not a statistics file of usvm".into());
    }
    serde_json::from_value(value).map_err(|e| format!("not a statistics file of usvm: {e}"))
}

/// All numbers that are not zero.
fn table(stats: &StatsSnapshot) -> String {
    stats.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_statistics_files_are_read() {
        let stats = StatsSnapshot { bytes_to_device: 3 << 20, cpu_faults: 4, ..StatsSnapshot::default() };
        assert_eq!(parse(&stats.to_json()).unwrap(), stats);
        assert!(parse("{}").unwrap_err().contains("not a statistics file"));
        assert!(parse("[1]").unwrap_err().contains("not a statistics file"));
        assert!(parse("nonsense").unwrap_err().contains("not JSON"));
        assert!(table(&stats).contains("3.0 MiB"));
    }

    #[test]
    fn digits_are_a_process() {
        assert_eq!(process(Path::new("4711")), Some(4711));
        assert_eq!(process(Path::new("./4711")), None);
        assert_eq!(process(Path::new("stats-4711.json")), None);
    }
}
