//! `usvm doctor`: what this machine offers to usvm, and what to do about the rest.
//!
//! # Overview
//! Everything is found by looking and trying, never by version alone, and nothing is changed. Each finding is a
//! [`Check`]; the rooms are [`memory`] (kernel, userfaultfd, huge pages), [`limits`] and [`drivers`].
//!
//! # Limits
//! Foreign libraries are loaded in processes of their own ([`load`]); one that hangs is given up on after some seconds. What
//! such a process leaves behind goes on.

mod drivers;
mod limits;
pub mod load;
mod memory;

use std::fmt::{self, Write as _};

use serde::Serialize;
use usvm::observe::live::printable;

use crate::cli::DoctorArgs;
use crate::{Outcome, say};

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// usvm works, slower or with a limit.
    Warn,
    /// usvm cannot run.
    Fail,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        })
    }
}

/// One finding.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    group: &'static str,
    name: String,
    status: Status,
    /// What is so.
    found: String,
    /// What that means for usvm.
    means: Option<String>,
    /// What changes it.
    fix: Option<String>,
}

impl Check {
    /// What is found may be words of a driver, or a name that somebody gave: a terminal must not obey them.
    fn new(group: &'static str, name: impl Into<String>, status: Status, found: impl Into<String>) -> Self {
        let (name, found) = (printable(&name.into()), printable(&found.into()));
        Self { group, name, status, found, means: None, fix: None }
    }

    fn ok(group: &'static str, name: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(group, name, Status::Ok, found)
    }

    fn warn(group: &'static str, name: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(group, name, Status::Warn, found)
    }

    fn fail(group: &'static str, name: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(group, name, Status::Fail, found)
    }

    fn means(mut self, words: impl Into<String>) -> Self {
        self.means = Some(printable(&words.into()));
        self
    }

    fn fix(mut self, command: impl Into<String>) -> Self {
        self.fix = Some(printable(&command.into()));
        self
    }
}

#[derive(Serialize)]
struct Findings<'a> {
    usvm: &'static str,
    verdict: Status,
    checks: &'a [Check],
}

/// `usvm doctor`.
pub fn doctor(args: &DoctorArgs) -> Outcome {
    let mut checks = memory::checks();
    checks.extend(limits::checks());
    checks.extend(drivers::checks());
    let verdict = verdict(&checks);
    let findings = Findings { usvm: env!("CARGO_PKG_VERSION"), verdict, checks: &checks };
    say::out(if args.json { say::json(&findings)? } else { table(&checks) })?;
    Ok(u8::from(verdict == Status::Fail))
}

fn verdict(checks: &[Check]) -> Status {
    checks.iter().map(|check| check.status).max().unwrap_or(Status::Ok)
}

fn table(checks: &[Check]) -> String {
    let mut text = String::new();
    let mut group = "";
    for check in checks {
        if check.group != group {
            group = check.group;
            let _ = writeln!(text, "{group}");
        }
        let _ = writeln!(text, "  {:<5}{:<22}{}", check.status, check.name, check.found);
        for (word, line) in [("", &check.means), ("fix: ", &check.fix)] {
            if let Some(line) = line {
                let _ = writeln!(text, "{:29}{word}{line}", "");
            }
        }
    }
    let count = |status, word: &str| {
        let count = checks.iter().filter(|check| check.status == status).count();
        format!("{count} {word}{}", if count == 1 { "" } else { "s" })
    };
    let warnings = count(Status::Warn, "warning");
    let summary = match verdict(checks) {
        Status::Ok => "usvm can run here".to_owned(),
        Status::Warn => format!("usvm can run here; {warnings}"),
        Status::Fail => format!("usvm cannot run here: {}, {warnings}", count(Status::Fail, "failure")),
    };
    text + &summary + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_finding_is_the_verdict() {
        let (ok, warn, fail) =
            (Check::ok("a", "x", "1"), Check::warn("a", "y", "2"), Check::fail("b", "z", "3"));
        assert_eq!(verdict(&[]), Status::Ok);
        assert_eq!(verdict(std::slice::from_ref(&ok)), Status::Ok);
        let some = [ok, warn];
        assert_eq!(verdict(&some), Status::Warn);
        assert!(table(&some).ends_with("usvm can run here; 1 warning\n"));
        let [ok, warn] = some;
        assert_eq!(verdict(&[ok, fail, warn]), Status::Fail);
    }

    #[test]
    fn a_line_has_its_fix_below() {
        let text = table(&[Check::warn("limits", "files", "8").means("too few").fix("ulimit -n 1024")]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "limits");
        assert!(lines[1].starts_with("  warn files ") && lines[1].ends_with(" 8"));
        assert_eq!(lines[2].trim(), "too few");
        assert_eq!(lines[3].trim(), "fix: ulimit -n 1024");
    }

    #[test]
    fn whatever_is_found_here_every_warning_says_what_to_do() {
        let checks: Vec<_> = memory::checks().into_iter().chain(limits::checks()).collect();
        assert!(checks.len() > 12);
        for check in checks {
            assert!(check.status == Status::Ok || check.fix.is_some(), "{check:?}");
        }
    }
}
