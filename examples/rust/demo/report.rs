//! What the demo tells: what it works on, what moved and why, how fast, next to memcpy on this machine.

use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use usvm::Runtime;

use crate::blocks::Blocks;

/// What is computed on, and where.
pub fn opening(runtime: &Runtime, file: &Path, heap: &Blocks) {
    let device = &runtime.devices()[0];
    println!(
        "{} on the heap: {} in {} blocks; device {} with {} of its own",
        file.file_name().unwrap_or_default().display(),
        mib(heap.len()),
        heap.count(),
        device.name,
        mib(device.vram_bytes),
    );
}

/// A bar on a terminal, once it takes long enough to be worth one.
pub fn progress(steps: u64) -> ProgressBar {
    let bar = ProgressBar::new(steps);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} ({elapsed})") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// What moved, why, and how fast.
pub fn closing(runtime: &Runtime) {
    let stats = runtime.stats();
    println!("\nwhat moved, and why");
    print!("{stats}");
    if let Ok(device) = runtime.device(0) {
        let modelled = Duration::from_nanos(device.modelled().total_ns());
        println!(
            "modelled time of the device's share on {}: {modelled:.1?} (modelled, not measured)",
            device.profile().name
        );
    }
    let memcpy = memcpy_2m();
    println!("\non this machine, 2 MiB each, median of 64");
    println!("  memcpy               {:7.1} us", memcpy);
    match migrate_2m(runtime) {
        Ok((there, back)) => {
            println!("  to the device        {there:7.1} us = {:.2} x memcpy", there / memcpy);
            println!("  CPU touch until back {back:7.1} us = {:.2} x memcpy", back / memcpy);
        }
        Err(e) => println!("  migration could not be timed: {e}"),
    }
    println!();
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}

const SIZE: usize = 2 << 20;
const ROUNDS: usize = 64;

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

fn micros(since: Instant) -> f64 {
    since.elapsed().as_nanos() as f64 / 1000.0
}

/// Eight blocks in turn, so that memory and not the cache is measured.
fn memcpy_2m() -> f64 {
    let from = vec![1u8; 8 * SIZE];
    let mut to = vec![2u8; 8 * SIZE];
    let samples = (0..ROUNDS + 8).map(|round| {
        let part = (round % 8) * SIZE..(round % 8 + 1) * SIZE;
        let begin = Instant::now();
        to[part.clone()].copy_from_slice(std::hint::black_box(&from[part]));
        std::hint::black_box(&to);
        micros(begin)
    });
    median(samples.skip(8).collect())
}

/// A device write of a range that is on the host, and the CPU's touch that brings it back.
fn migrate_2m(runtime: &Runtime) -> usvm::Result<(f64, f64)> {
    let memory = vec![3u8; 5 * SIZE];
    let first = (memory.as_ptr() as usize).next_multiple_of(SIZE);
    let (mut there, mut back) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS + 8 {
        let at = first + (round % 4) * SIZE;
        let took = runtime.on_service_thread(move |svm| {
            let begin = Instant::now();
            let held =
                svm.gpu_access(0, at as u64, 1, usvm::space::svm::Want::fault(usvm::GpuAccess::Write))?;
            let took = micros(begin);
            svm.release(0, &held);
            Ok(took)
        })?;
        let begin = Instant::now();
        std::hint::black_box(memory[at - memory.as_ptr() as usize]);
        back.push(micros(begin));
        there.push(took);
    }
    Ok((median(there.split_off(8)), median(back.split_off(8))))
}
