//! The main job of usvm, on a file of yours: ordinary heap memory, pointers and all, computed on a device that has its
//! own memory, page table and faults, while the CPU keeps using the same addresses.
//!
//! The file is read with plain `read(2)` into heap blocks, more than the device's memory holds. On the device: a byte
//! histogram, an in-place transform, and walks over structures that the CPU built out of boxed nodes. Between launches
//! the CPU edits a few pages, reallocates some blocks and frees others. Everything is compared with a plain CPU
//! computation; the last line is `verified`, or the exit status is 1.

mod blocks;
mod index;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use usvm::device::sim::{Profile, SimConfig};
use usvm::{Builder, Config, Runtime};

/// usvm's own memory must not be migratable.
#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

/// What a step of the demo may fail with.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Computes on ordinary heap memory with a device, and checks every byte.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The file to compute on; this program itself when left out.
    file: Option<PathBuf>,
    /// Megabytes of heap to fill with the file, again and again if it is shorter.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(8..=65536))]
    megabytes: u64,
    /// Megabytes of device memory; less than the heap, so that not all of it fits.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u64).range(2..=65536))]
    vram: u64,
    /// Rounds of launches and edits.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Has the device change one byte that it should not, to show that this is noticed.
    #[arg(long, hide = true)]
    spoil: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => {
            println!("verified");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("demo: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let file = match &args.file {
        Some(file) => file.clone(),
        None => std::env::current_exe()?,
    };
    let runtime = start(args)?;
    let mut heap = blocks::Blocks::read(&file, args.megabytes << 20)?;
    report::opening(&runtime, &file, &heap);

    let words = index::Index::build(heap.bytes(0));
    let progress = report::progress(args.rounds * 5);
    for round in 0..args.rounds {
        progress.set_message("histogram");
        heap.check_histogram(&runtime)?;
        progress.inc(1);
        progress.set_message("transform");
        heap.transform(&runtime, round)?;
        progress.inc(1);
        progress.set_message("hash map and list");
        words.check_lookups(&runtime)?;
        words.check_list(&runtime)?;
        progress.inc(1);
        progress.set_message("CPU edits, reallocates, frees");
        heap.edit(round)?;
        progress.inc(1);
        if args.spoil && round + 1 == args.rounds {
            heap.spoil(&runtime)?;
        }
        progress.set_message("comparing with the CPU");
        heap.compare()?;
        progress.inc(1);
    }
    progress.finish_and_clear();
    report::closing(&runtime);
    runtime.shutdown();
    heap.compare()
}

fn start(args: &Args) -> Result<Runtime> {
    let config = Config::from_env()?;
    let device = SimConfig { prefault: true, ..SimConfig::of(Profile::ARC_A770, args.vram << 20) };
    // Profiles follow their hardware; the demo shows faults, so they are recoverable here whatever the profile.
    let device = SimConfig { recoverable_faults: true, ..device };
    Ok(Builder::new(config).device(device).start()?)
}
