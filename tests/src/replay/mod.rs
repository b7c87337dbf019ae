//! Recorded traces of the kernel's drm_gpusvm, replayed through usvm's space.
//!
//! # Overview
//! `tests/kernel-ref/TRACE.md` is the format. [`trace`] reads it; [`host`] is the recorded process, a source of VMAs and
//! pages that computes nothing; [`drive`] does a trace's operations on a [`usvm::space::Space`]; [`compare`] says where
//! the outcome differs. Three spaces run side by side:
//!
//! | space | must be equal to |
//! |---|---|
//! | kernel-exact | the trace: answers, ranges with all flags and mappings, notifiers, hits of every event |
//! | kernel-exact, asked with the rules of [`meant`] | (the reference of the next) |
//! | default | the one before |
//!
//! # Limits
//! What the host decides is an input: whether pages can move (migrate, evict, devevict, scan), and contents.

pub mod compare;
pub mod drive;
pub mod host;
pub mod meant;
pub mod tables;
pub mod trace;

pub use compare::{Report, Totals, replay};

use std::path::{Path, PathBuf};

fn kernel_ref() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernel-ref")
}

/// The traces that are kept, by name.
///
/// # Errors
/// Why their directory cannot be read.
pub fn kept_traces() -> Result<Vec<PathBuf>, String> {
    let dir = kernel_ref().join("traces");
    let entries = std::fs::read_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let paths = entries.filter_map(|entry| entry.ok().map(|e| e.path()));
    let mut paths: Vec<PathBuf> = paths.filter(|p| p.to_string_lossy().ends_with(".trace.xz")).collect();
    paths.sort();
    Ok(paths)
}

/// The written table of meant differences.
pub fn differences_file() -> PathBuf {
    kernel_ref().join("DIFFERENCES.md")
}
