//! The `usvm` program: runs other programs under usvm, and tells what it finds and what happens.
//!
//! # Overview
//! One module for each subcommand: [`run`], [`doctor`], [`devices`], [`top`], [`stats`], and [`manual`] for the man pages
//! and shell completions. What they print goes through [`say`].
//!
//! # Exit status
//! 0 ok, 1 failure, 2 usage; `usvm run` has the program's, see [`run`].
//!
//! # Standard descriptors
//! Closed ones are taken by /dev/null before anything else is opened, which could get their numbers: what is printed would
//! go there. Only `usvm run` leaves them as they are. Output that is lost is a failure ([`say`]).
//!
//! # Safety
//! `main` is the C library's, not Rust's: Rust's start ignores SIGPIPE and opens closed standard descriptors, and a program
//! that `usvm run` becomes would inherit both. Nothing else here is unsafe except loading a library in a process of its
//! own ([`doctor`]).
#![cfg_attr(not(test), no_main)]
#![deny(unsafe_code)]

mod cli;
mod devices;
mod doctor;
mod drm;
mod file;
mod manual;
mod run;
mod say;
mod stats;
mod top;

use clap::Parser;
use cli::{Args, Command};

/// What a subcommand ends with: an exit status, or words for the user.
type Outcome = Result<u8, String>;

/// The exit status of a usage error.
const USAGE: u8 = 2;

#[cfg(not(test))]
#[allow(unsafe_code)]
// SAFETY: no other `main` is in the program; the C library calls it once, on the first thread.
#[unsafe(no_mangle)]
extern "C" fn main(_count: libc::c_int, _words: *const *const libc::c_char) -> libc::c_int {
    std::process::exit(i32::from(program()))
}

#[cfg_attr(test, expect(dead_code, reason = "the test harness has its own main"))]
fn program() -> u8 {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(e) => {
            // Help and version are errors, too, to clap; they go to stdout and are none.
            if !e.use_stderr() {
                return status(say::by(|| e.print()).map(|()| 0));
            }
            let words = e.render().to_string();
            say::warn(words.trim_start_matches("error: ").trim_end());
            return USAGE;
        }
    };
    if !matches!(args.command, Command::Run(_))
        && let Err(e) = say::keep_standard_descriptors()
    {
        say::warn(format!("a standard descriptor is closed, and /dev/null cannot take its place: {e}"));
        return 1;
    }
    status(match args.command {
        Command::Run(args) => run::run(args),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Devices(args) => devices::devices(&args),
        Command::Top(args) => top::top(&args),
        Command::Stats(args) => stats::stats(&args),
        Command::Completions { shell } => manual::completions(shell),
        Command::Man { directory } => manual::man(directory.as_deref()),
        Command::Load { libraries } => doctor::load::load(&libraries),
    })
}

/// The exit status, once the user has been told of a failure.
fn status(outcome: Outcome) -> u8 {
    outcome.unwrap_or_else(|words| {
        say::warn(words);
        1
    })
}
