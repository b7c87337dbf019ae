//! One snapshot as text, for pipes and files.

use std::fmt::Write as _;

use usvm::observe::stats::Unit;

use super::model::{Hot, Model};
use crate::{say, stats};

/// Characters of a bar.
const BAR: usize = 40;

/// The processes that can be looked at.
pub fn processes(pids: &[u32]) -> String {
    let lines = pids.iter().map(|pid| format!("{pid:>8}  {}\n", stats::command(*pid)));
    format!("{:>8}  program\n{}", "process", lines.collect::<String>())
}

/// All that the screen would show.
pub fn snapshot(model: &Model) -> String {
    let mut text = stats::heading(&model.now, model.pid, &model.name) + "\n";
    for device in &model.now.devices {
        let (used, all) = (say::bytes(device.allocated_bytes), say::bytes(device.vram_bytes));
        let _ = writeln!(text, "\n{}: {used} of {all} in use", device.name);
        let bars = [
            ("resident", device.resident_bytes),
            ("shared", device.shared_bytes),
            ("retained", device.retained_bytes),
        ];
        for (name, bytes) in bars {
            let scaled = (BAR as u64).saturating_mul(bytes);
            let full = scaled.div_ceil(device.vram_bytes.max(1)).min(BAR as u64) as usize;
            let bar = "#".repeat(full);
            let _ = writeln!(text, "  {name:<10}[{bar:<BAR$}] {:>10}", say::bytes(bytes));
        }
    }
    let _ = writeln!(text, "\nper second");
    for series in &model.series {
        let _ = writeln!(text, "  {:<18}{:>12}", series.name, series.unit.show(series.rate));
    }
    let s = &model.now.stats;
    let times = [s.fault_us_p50, s.fault_us_p90, s.fault_us_p99, s.fault_us_max];
    let [p50, p90, p99, max] = times.map(|us| Unit::Microseconds.show(us));
    let _ = writeln!(text, "\nCPU faults so far: p50 {p50}, p90 {p90}, p99 {p99}, max {max}");
    let _ = writeln!(text, "\nhottest of {} ranges", model.now.ranges);
    let _ =
        writeln!(text, "  {}", row(["address", "size", "on device", "out", "back", "moves/s", "mapping"]));
    for hot in &model.hottest {
        let _ = writeln!(text, "  {}", row(cells(hot).each_ref().map(String::as_str)));
    }
    text
}

fn row([address, size, on, out, back, rate, mapping]: [&str; 7]) -> String {
    format!("{address:<16}{size:>10}{on:>12}{out:>8}{back:>8}{rate:>10}  {mapping}")
}

/// A range's cells, in the table's order.
pub fn cells(hot: &Hot) -> [String; 7] {
    let range = &hot.range;
    let on_device = if range.shared { "shared".into() } else { say::bytes(range.resident_bytes) };
    [
        format!("{:#x}", range.start),
        say::bytes(range.bytes),
        on_device,
        range.to_device.to_string(),
        range.to_host.to_string(),
        format!("{:.1}", hot.rate),
        hot.mapping.clone(),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::model::tests::after;
    use super::*;

    #[test]
    fn a_snapshot_has_bars_rates_and_ranges() {
        let mut model = Model::new(std::process::id(), after(1));
        model.take(after(2));
        let text = snapshot(&model);
        let line =
            |start: &str| text.lines().find(|line| line.trim_start().starts_with(start)).unwrap().to_owned();
        assert!(line("sim:arc-a770").ends_with("48.0 MiB of 64.0 MiB in use"));
        assert_eq!(line("resident").matches('#').count(), BAR / 2);
        assert_eq!(line("shared").matches('#').count(), BAR / 8);
        assert!(line("bytes_to_device").ends_with("8.0 MiB"));
        assert!(line("0x7f0000000000").contains("10.0"));
        assert!(line("0x7f0000200000").contains("shared"));
        assert!(text.contains("hottest of 24 ranges"));
    }
}
