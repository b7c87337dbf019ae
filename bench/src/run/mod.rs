//! `usvm-bench run`: whole workloads under each policy, with more and less device memory than they use.
//!
//! # Overview
//! A [`workload::Workload`] is a piece of computing that processor and device share: its data is ordinary memory, the
//! device computes in launches, the processor works on the same addresses in between. For every combination of workload,
//! policy and oversubscription a runtime is started with as much device memory as that leaves, the workload runs, and its
//! result is compared, bit by bit, with the same computation done by the processor alone.
//!
//! Two times come of it. *Wall time* is measured, on this machine, whose simulated device computes with the processor's
//! cores: it says what usvm itself costs. *Modelled time* is what the profile's device would have taken for the same bytes,
//! faults and submissions, as if nothing overlapped; it is computed, never measured, and says what a policy costs there.
//!
//! [`report`] turns results into a table of policies side by side.
//!
//! # Limits
//! One device. The processor's own part of the work is not in the modelled time.

pub mod report;
mod workload;
mod workloads;

use std::fmt;
use std::str::FromStr;
use std::time::Instant;

use clap::Args;
use serde::{Deserialize, Serialize};
use usvm::device::sim::Profile;
use usvm::policy;
use usvm::{Config, Runtime};

use crate::case::Result;
use crate::report::{Table, git_revision, number};
use workload::Workload;

/// Memory is given to devices in steps of a large page.
const STEP: u64 = 2 << 20;
/// The least device memory: a smaller device could not hold what one kernel uses at a time.
const LEAST: u64 = 4 << 20;

/// What to run.
#[derive(Debug, Args)]
pub struct Run {
    /// Workloads to run; all when none is named. `usvm-bench run --list` tells what they are.
    names: Vec<String>,
    /// Say what workloads there are, and run none.
    #[arg(long)]
    list: bool,
    /// The device whose time is modelled.
    #[arg(long, value_name = "NAME", default_value = "arc-b580", value_parser = profile)]
    profile: Profile,
    /// Policies to compare.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = known_policy, default_values = policy::NAMES)]
    policies: Vec<String>,
    /// What the workload uses, in percent of the device's memory.
    #[arg(long, value_name = "PERCENT,…", value_delimiter = ',', default_values = ["75", "125", "150"])]
    oversubscription: Vec<Percent>,
    /// Bytes that a workload uses, about.
    #[arg(long, value_name = "BYTES", default_value = "16M", value_parser = bytes)]
    footprint: u64,
    /// How often each combination runs; the median wall time counts, and what that run counted.
    #[arg(long, short = 'n', default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
}

/// Percent of the device's memory, more than none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Percent(u32);

impl FromStr for Percent {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.trim_end_matches('%').parse() {
            Ok(percent @ 1..=10_000) => Ok(Self(percent)),
            _ => Err("percent of the device's memory, from 1 to 10000".into()),
        }
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

fn profile(name: &str) -> std::result::Result<Profile, String> {
    let known = || Profile::ALL.map(|p| p.name).join(", ");
    Profile::named(name).ok_or_else(|| format!("not one of {}", known()))
}

fn known_policy(name: &str) -> std::result::Result<String, String> {
    policy::by_name(name).map(|p| p.name().to_owned()).map_err(|e| e.to_string())
}

fn bytes(text: &str) -> std::result::Result<u64, String> {
    let mut config = Config::default();
    config.set("vram", text).map_err(|e| e.to_string())?;
    config.vram.filter(|b| *b >= 1 << 20).ok_or_else(|| "1M or more".into())
}

/// The results of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// The revision that ran.
    pub git: String,
    /// Whose time is modelled.
    pub profile: String,
    /// One for each combination.
    pub results: Vec<Measured>,
}

/// What one workload did under one policy with so much memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The workload.
    pub workload: String,
    /// The policy.
    pub policy: String,
    /// Percent of the device's memory that the workload uses.
    pub oversubscription: u32,
    /// Modelled: what the profile's device would have taken, in milliseconds.
    pub modelled_ms: f64,
    /// Measured on this machine: median, in milliseconds.
    pub wall_ms: f64,
    /// Bytes that usvm moved to the device.
    pub bytes_to_device: u64,
    /// Bytes that usvm moved back.
    pub bytes_to_host: u64,
    /// Faults of the processor that usvm served.
    pub cpu_faults: u64,
    /// Faults of the device that usvm served.
    pub gpu_faults: u64,
    /// Ranges that had to leave for others.
    pub evictions: u64,
    /// Whether the result is what the processor alone computes.
    pub verified: bool,
    /// Bytes that the workload uses.
    pub footprint_bytes: u64,
    /// Bytes of device memory.
    pub vram_bytes: u64,
    /// Runs.
    pub n: u32,
}

impl Run {
    /// Runs all combinations, and says by `progress` which is next. What cannot run on the device is said by `skipped`.
    pub fn run(&self, progress: fn(&str), skipped: fn(&str)) -> Result<Results> {
        let mut results = Vec::new();
        for make in self.chosen()? {
            let mut workload = make(self.footprint);
            for oversubscription in &self.oversubscription {
                for policy in &self.policies {
                    let what = format!("{}, {policy}, {oversubscription}", workload.name());
                    progress(&what);
                    match self.measure(workload.as_mut(), policy, *oversubscription) {
                        Ok(measured) => results.push(measured),
                        Err(usvm::Error::OutOfDeviceMemory { .. }) if !self.profile.recoverable_faults => {
                            skipped(&format!(
                                "{what}: {} cannot fault, so all of it would have to fit in",
                                self.profile.name
                            ));
                        }
                        Err(e) => return Err(format!("{what}: {e}").into()),
                    }
                }
            }
        }
        progress("");
        Ok(Results { git: git_revision(), profile: self.profile.name.into(), results })
    }

    /// The names of the workloads, if that is all that was asked for.
    pub fn list(&self) -> Option<Table> {
        self.list.then(|| {
            let mut table = Table::new(&["workload", "about"]);
            for make in workloads::ALL {
                let workload = make(1 << 20);
                table.row([workload.name(), workload.about()].map(str::to_owned));
            }
            table
        })
    }

    fn chosen(&self) -> Result<Vec<workload::Make>> {
        let named: Vec<_> = workloads::ALL.iter().map(|make| (make(1 << 20).name(), *make)).collect();
        if let Some(unknown) = self.names.iter().find(|name| named.iter().all(|(known, _)| known != name)) {
            return Err(
                format!("there is no workload `{unknown}`; `usvm-bench run --list` names them").into()
            );
        }
        let wanted = |name: &str| self.names.is_empty() || self.names.iter().any(|n| n == name);
        Ok(named.into_iter().filter(|(name, _)| wanted(name)).map(|(_, make)| make).collect())
    }

    fn measure(
        &self,
        workload: &mut dyn Workload,
        policy: &str,
        oversubscription: Percent,
    ) -> usvm::Result<Measured> {
        let footprint = workload.footprint();
        let vram = (footprint * 100 / u64::from(oversubscription.0)).next_multiple_of(STEP).max(LEAST);
        let mut runs = (0..self.runs)
            .map(|_| {
                let mut config = Config::default();
                config.set("policy", policy)?;
                config.set("device", &device_of(&self.profile))?;
                config.vram = Some(vram);
                config.faults = self.profile.recoverable_faults;
                let runtime = Runtime::start(config)?;
                workload.reset();
                let began = Instant::now();
                let ran = workload.run(&runtime);
                let wall_ms = began.elapsed().as_secs_f64() * 1e3;
                let stats = runtime.stats();
                let modelled_ms = runtime.device(0)?.modelled().total_ns() as f64 / 1e6;
                runtime.shutdown();
                ran?;
                Ok(Measured {
                    workload: workload.name().into(),
                    policy: policy.into(),
                    oversubscription: oversubscription.0,
                    modelled_ms,
                    wall_ms,
                    bytes_to_device: stats.bytes_to_device,
                    bytes_to_host: stats.bytes_to_host,
                    cpu_faults: stats.cpu_faults,
                    gpu_faults: stats.gpu_faults,
                    evictions: stats.evictions,
                    verified: workload.is_right(),
                    footprint_bytes: footprint,
                    vram_bytes: vram,
                    n: self.runs,
                })
            })
            .collect::<usvm::Result<Vec<_>>>()?;
        let verified = runs.iter().all(|run| run.verified);
        runs.sort_by(|a, b| a.wall_ms.total_cmp(&b.wall_ms));
        let middle = runs.swap_remove(runs.len() / 2);
        Ok(Measured { verified, ..middle })
    }
}

/// How the environment would name a device of this profile.
fn device_of(profile: &Profile) -> String {
    if *profile == Profile::GENERIC { "sim".into() } else { format!("sim:{}", profile.name) }
}

impl Results {
    /// Whether every result was right.
    pub fn is_right(&self) -> bool {
        self.results.iter().all(|r| r.verified)
    }

    /// For people.
    pub fn table(&self) -> Table {
        let mut table = Table::new(&[
            "workload",
            "oversubscription",
            "policy",
            "modelled_ms",
            "wall_ms",
            "to_device",
            "to_host",
            "cpu_faults",
            "gpu_faults",
            "evictions",
            "verified",
        ]);
        let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
        for r in &self.results {
            table.row([
                r.workload.clone(),
                format!("{}%", r.oversubscription),
                r.policy.clone(),
                number(r.modelled_ms),
                number(r.wall_ms),
                mib(r.bytes_to_device),
                mib(r.bytes_to_host),
                r.cpu_faults.to_string(),
                r.gpu_faults.to_string(),
                r.evictions.to_string(),
                if r.verified { "yes" } else { "NO" }.to_owned(),
            ]);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: Run,
    }

    fn line(words: &str) -> std::result::Result<Run, String> {
        let words = std::iter::once("run").chain(words.split_whitespace());
        Line::try_parse_from(words).map(|line| line.run).map_err(|e| e.to_string())
    }

    fn quiet(_: &str) {}

    #[test]
    fn words_that_mean_nothing_are_refused_with_what_would() {
        for (words, hint) in [
            ("--profile arc", "arc-b580"),
            ("--policies adaptive,best", "gpusvm"),
            ("--oversubscription 0", "1 to 10000"),
            ("--footprint 12Q", "K, M, G"),
            ("--footprint 4K", "1M"),
            ("-n 0", "1.."),
        ] {
            let refused = line(words).map(|_| ()).unwrap_err();
            assert!(refused.contains(hint), "{words}: {refused}");
        }
        assert!(line("nonsense").unwrap().chosen().unwrap_err().to_string().contains("--list"));
    }

    /// One process, one runtime: what needs one is one test.
    #[test]
    fn every_workload_is_right_under_every_policy_and_wrong_results_are_noticed() {
        let _alone = crate::tests::alone();
        let run = line("--footprint 5M --oversubscription 50,125 -n 1").unwrap();
        let results = run.run(quiet, quiet).unwrap();
        assert_eq!(results.results.len(), workloads::ALL.len() * policy::NAMES.len() * 2);
        for r in &results.results {
            assert!(r.verified, "{r:?}");
            assert!(r.modelled_ms > 0.0 && r.wall_ms > 0.0);
            let moved = r.bytes_to_device > 0;
            assert!(moved || r.policy == "remote", "nothing moved: {r:?}");
        }
        let evicted = |r: &&Measured| r.oversubscription == 125 && r.evictions > 0;
        assert!(results.results.iter().any(|r| evicted(&r)), "too little memory shows");
        let text = serde_json::to_string(&results).unwrap();
        let read = serde_json::from_str::<Results>(&text).unwrap();
        assert_eq!(read.table().separated(), results.table().separated());

        // Each workload notices one wrong word.
        let runtime = Runtime::start(Config::default()).unwrap();
        for make in workloads::ALL {
            let mut workload = make(1 << 20);
            workload.reset();
            workload.run(&runtime).unwrap();
            assert!(workload.is_right(), "{}", workload.name());
            workload.spoil();
            assert!(!workload.is_right(), "{}", workload.name());
        }
        runtime.shutdown();

        // On a device that cannot fault everything is announced, and what does not fit in is skipped.
        let words =
            "triad --profile flex-170 --footprint 6M --oversubscription 50,200 --policies gpusvm -n 1";
        let results = line(words).unwrap().run(quiet, quiet).unwrap();
        let [one] = &results.results[..] else { panic!("{results:?}") };
        assert!(one.oversubscription == 50 && one.verified, "{one:?}");
    }
}
