//! `usvm-bench alloc`: usvm's allocator beside mimalloc, jemalloc and glibc's, with mimalloc-bench's single programs.
//!
//! # Overview
//! Each pattern runs with each allocator in a process of its own (this program, started again), so that its peak of resident
//! memory is its own; the processes of one pattern alternate between the allocators. In a process the pattern runs once to
//! warm up and then some measured times. What is compared is the median over all processes.
//!
//! jemalloc the rival and jemalloc inside usvm-alloc are the same library, linked once; usvm-alloc sets everything
//! that differs at run time, so a process that never calls usvm-alloc has jemalloc with its defaults.
//!
//! # Limits
//! Resident memory counts this program too (about 3 MiB, the same for all).

mod heap;
mod patterns;

use crate::case::Result;
use crate::report::{Table, git_revision, number};
use clap::Args;
use heap::Heap;
use patterns::{ALL, Pattern};
use serde::{Deserialize, Serialize};
use std::process::Command;
use std::time::Instant;

/// What the others are compared with.
const RIVAL: &str = "mimalloc";

/// What to run.
#[derive(Args)]
pub struct Alloc {
    /// Patterns to run; all when none is named.
    names: Vec<String>,
    /// Processes for each pattern and allocator.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    processes: u32,
    /// Measured runs in each process, after one that is not measured.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Threads of patterns with threads; as many as processors, 2 to 16, when not given.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    threads: Option<u32>,
    /// Only these allocators.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    heaps: Vec<String>,
}

/// One process's part.
#[derive(Args)]
pub struct One {
    pattern: String,
    heap: String,
    #[arg(long)]
    runs: u32,
    #[arg(long)]
    threads: u32,
}

/// What one process tells.
#[derive(Serialize, Deserialize)]
struct Told {
    millis: Vec<f64>,
    check: u64,
    peak_kib: u64,
}

/// One pattern with one allocator.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    pattern: &'static str,
    heap: &'static str,
    median_ms: f64,
    p90_ms: f64,
    n: usize,
    peak_rss_kib: u64,
    /// How many times as fast as mimalloc.
    speed: Option<f64>,
    /// Its memory for each byte of mimalloc's.
    rss: Option<f64>,
}

/// The geometric means of one allocator.
#[derive(Debug, Clone, Serialize)]
pub struct Mean {
    heap: &'static str,
    patterns: usize,
    speed: f64,
    rss: f64,
}

/// Everything measured.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    git: String,
    threads: u32,
    rival: &'static str,
    results: Vec<Line>,
    geometric_means: Vec<Mean>,
}

impl One {
    /// Runs the pattern and prints what came out.
    pub fn run(&self) -> Result<()> {
        let heap = Heap::named(&self.heap).ok_or("no such allocator")?;
        let pattern = ALL.iter().find(|p| p.name == self.pattern).ok_or("no such pattern")?;
        let work = || (pattern.run)(heap, self.threads as usize);
        let check = work();
        let mut millis = Vec::new();
        for _ in 0..self.runs {
            let start = Instant::now();
            let again = std::hint::black_box(work());
            millis.push(start.elapsed().as_secs_f64() * 1e3);
            if again != check {
                return Err("two runs gave different results".into());
            }
        }
        println!("{}", serde_json::to_string(&Told { millis, check, peak_kib: peak_kib()? })?);
        Ok(())
    }
}

/// This process's most resident memory.
fn peak_kib() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

impl Alloc {
    /// Runs everything; `progress` hears what is being run.
    pub fn run(&self, progress: impl Fn(&str)) -> Result<Comparison> {
        let heaps: Vec<&'static str> = Heap::names()
            .filter(|name| self.heaps.is_empty() || self.heaps.iter().any(|wanted| wanted == name))
            .collect();
        let cores = std::thread::available_parallelism().map_or(2, |n| n.get() as u32);
        let threads = self.threads.unwrap_or(cores.clamp(2, 16));
        let mut results = Vec::new();
        for pattern in self.chosen()? {
            progress(pattern.name);
            results.extend(compare(self.measure(pattern, &heaps, threads)?));
        }
        progress("");
        let geometric_means = heaps.iter().filter_map(|heap| mean(heap, &results)).collect();
        Ok(Comparison { git: git_revision(), threads, rival: RIVAL, results, geometric_means })
    }

    fn chosen(&self) -> Result<Vec<&'static Pattern>> {
        if let Some(unknown) = self.names.iter().find(|name| ALL.iter().all(|p| p.name != name.as_str())) {
            let known: Vec<_> = ALL.iter().map(|p| format!("{:13} {}", p.name, p.about)).collect();
            return Err(format!("there is no pattern `{unknown}`; there are\n{}", known.join("\n")).into());
        }
        Ok(ALL.iter().filter(|p| self.names.is_empty() || self.names.iter().any(|n| n == p.name)).collect())
    }

    /// One line for each allocator, without the comparison.
    fn measure(&self, pattern: &Pattern, heaps: &[&'static str], threads: u32) -> Result<Vec<Line>> {
        let mut told: Vec<Vec<Told>> = heaps.iter().map(|_| Vec::new()).collect();
        for process in 0..self.processes as usize {
            for turn in 0..heaps.len() {
                // Nobody always runs after the same other.
                let index = (turn + process) % heaps.len();
                told[index].push(start(pattern.name, heaps[index], self.runs, threads)?);
            }
        }
        let check = told[0][0].check;
        if told.iter().flatten().any(|t| t.check != check) {
            return Err(format!("{}: the allocators' results differ", pattern.name).into());
        }
        Ok(heaps.iter().zip(told).map(|(heap, told)| line(pattern.name, heap, &told)).collect())
    }
}

fn start(pattern: &str, heap: &str, runs: u32, threads: u32) -> Result<Told> {
    let out = Command::new(std::env::current_exe()?)
        .args(["alloc-one", pattern, heap, "--runs", &runs.to_string(), "--threads", &threads.to_string()])
        .env_remove("_RJEM_MALLOC_CONF")
        .output()?;
    if !out.status.success() {
        let words = String::from_utf8_lossy(&out.stderr);
        return Err(format!("{pattern} with {heap} failed ({}): {words}", out.status).into());
    }
    Ok(serde_json::from_slice(&out.stdout)?)
}

fn line(pattern: &'static str, heap: &'static str, told: &[Told]) -> Line {
    let mut millis: Vec<f64> = told.iter().flat_map(|t| t.millis.iter().copied()).collect();
    millis.sort_by(f64::total_cmp);
    let mut peaks: Vec<u64> = told.iter().map(|t| t.peak_kib).collect();
    peaks.sort_unstable();
    let n = millis.len();
    Line {
        pattern,
        heap,
        median_ms: millis[n / 2],
        p90_ms: millis[(n * 9 / 10).min(n - 1)],
        n,
        peak_rss_kib: peaks[peaks.len() / 2],
        speed: None,
        rss: None,
    }
}

fn compare(mut lines: Vec<Line>) -> Vec<Line> {
    if let Some(rival) = lines.iter().find(|l| l.heap == RIVAL).cloned() {
        for line in &mut lines {
            line.speed = Some(rival.median_ms / line.median_ms);
            line.rss = Some(line.peak_rss_kib as f64 / rival.peak_rss_kib as f64);
        }
    }
    lines
}

fn mean(heap: &'static str, lines: &[Line]) -> Option<Mean> {
    let own: Vec<&Line> = lines.iter().filter(|l| l.heap == heap).collect();
    let geometric = |values: Option<Vec<f64>>| {
        values
            .filter(|v| !v.is_empty())
            .map(|v| (v.iter().map(|x| x.ln()).sum::<f64>() / v.len() as f64).exp())
    };
    Some(Mean {
        heap,
        patterns: own.len(),
        speed: geometric(own.iter().map(|l| l.speed).collect())?,
        rss: geometric(own.iter().map(|l| l.rss).collect())?,
    })
}

impl Comparison {
    /// For people.
    pub fn table(&self) -> Table {
        let mut table =
            Table::new(&["pattern", "heap", "median_ms", "p90_ms", "n", "peak_rss_kib", "speed", "rss"]);
        let ratio = |r: Option<f64>| r.map_or_else(|| "-".into(), |r| format!("{r:.3}"));
        for l in &self.results {
            table.row([
                l.pattern.into(),
                l.heap.into(),
                number(l.median_ms),
                number(l.p90_ms),
                l.n.to_string(),
                l.peak_rss_kib.to_string(),
                ratio(l.speed),
                ratio(l.rss),
            ]);
        }
        for m in &self.geometric_means {
            let dash = || "-".to_owned();
            table.row([
                "geometric mean".into(),
                m.heap.into(),
                dash(),
                dash(),
                m.patterns.to_string(),
                dash(),
                ratio(Some(m.speed)),
                ratio(Some(m.rss)),
            ]);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_is_verified_and_the_same_with_every_allocator() {
        // The shortest ones; the others run in `usvm-bench alloc` only.
        for pattern in ALL.iter().filter(|p| ["cfrac", "glibc-simple"].contains(&p.name)) {
            let sums: Vec<u64> =
                Heap::names().map(|name| (pattern.run)(Heap::named(name).unwrap(), 2)).collect();
            assert!(sums.iter().all(|s| *s == sums[0] && *s != 0), "{}: {sums:?}", pattern.name);
        }
    }

    #[test]
    fn ratios_are_against_the_rival() {
        let told = |ms: f64, kib| Told { millis: vec![ms, ms, ms], check: 1, peak_kib: kib };
        let lines = compare(vec![
            line("x", "usvm", &[told(50.0, 300)]),
            line("x", RIVAL, &[told(100.0, 200), told(100.0, 200)]),
        ]);
        assert_eq!((lines[0].speed, lines[0].rss), (Some(2.0), Some(1.5)));
        let mean = mean("usvm", &lines).unwrap();
        assert!((mean.speed - 2.0).abs() < 1e-9 && (mean.rss - 1.5).abs() < 1e-9);
    }
}
