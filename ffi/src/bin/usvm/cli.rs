//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Parser, Subcommand, ValueHint};
use usvm::Config;

const EXAMPLES: &str = "\
Examples:
  usvm doctor                           what this machine offers, and what to do
  usvm run -- ./app data.bin            any malloc pointer works on the device
  usvm run --stats --vram 1G -- ./app   with 1 GiB of it, and numbers at the end
  usvm run --chaos 500 -- ./tests       500 forced migrations a second
  usvm top                              watch it from another terminal

Exit status: 0 ok, 1 failure, 2 usage. `usvm run` ends as the program does.";

const RUN: &str = "\
The program is executed in place of usvm: same process, same terminal; signals and exit status are its own. \
What usvm has to say goes to stderr. Options become environment variables (--dry-run shows them), so that \
programs started by the program run under usvm as well.

Statically linked, 32-bit and set-user-ID programs cannot be helped: they run as without usvm, and a line on \
stderr says so.

Statistics and the trace are a runtime's, and a program has one where it uses one: by libusvm, by OpenCL with \
--policy, or by --chaos. Of a program without there is nothing to print or write, except counts of its OpenCL calls.

Exit status: the program's; 126 if it cannot be executed, 127 if it is not found, 2 for wrong options or values, \
1 if usvm's library is missing.

Examples:
  usvm run -- ./app --its-own-option
  usvm run --stats -- python3 train.py
  usvm run --stats-file 'stats-%p.json' --trace 'trace-%p.json' -- ./app
  usvm run --chaos 500,42 -- ./app      forced migrations, from seed 42
  eval \"$(usvm run --dry-run -- ./app)\"  the same, by the shell";

const DOCTOR: &str = "\
Each line is ok, warn (usvm works, slower or with a limit) or fail (usvm cannot run), followed by what that means \
and the command that changes it. Nothing is changed by usvm itself.

Exit status: 0 if usvm can run, 1 if any line is fail.

JSON (--json):
  {\"usvm\": VERSION, \"verdict\": STATUS, \"checks\": [CHECK, ...]}
  CHECK:  {\"group\", \"name\", \"status\": STATUS, \"found\",
           \"means\": TEXT or null, \"fix\": COMMAND or null}
  STATUS: \"ok\", \"warn\" or \"fail\"";

const DEVICES: &str = "\
JSON (--json):
  {\"simulated\": [{\"name\", \"device\", \"memory_bytes\", \"link_gbps\",
                  \"memory_gbps\", \"fault_us\", \"submit_us\",
                  \"recoverable_faults\"}, ...],
   \"drm\": [{\"path\", \"driver\", \"pci\", \"vendor_device\",
            \"window_bytes\", \"accessible\", \"used\"}, ...]}
  Bandwidths are in 10^9 bytes a second. What is not known is null.";

const TOP: &str = "\
Keys: q quit, p pause, left and right choose the column to sort by, up and down scroll.

The process publishes its numbers only while somebody looks. Looking needs the same right as debugging it: the \
same user and no more rights, or root.

Without a terminal, or with --once, one snapshot is printed as text, with rates over one delay (at least 1.2 s).

Examples:
  usvm top                  the process that runs usvm; a choice if several do
  usvm top 4711
  usvm top --once 4711 | less";

const STATS: &str = "\
What to read is a file that USVM_STATS_FILE (usvm run --stats-file) named, or the id of a running process. A file \
is printed as it is with --json; a process as {\"usvm\", \"pid\", \"uptime_us\", \"policy\", \"chaos_per_second\", \
\"devices\", \"stats\", \"ranges\", \"hottest\"}, where stats is what the file would hold.

Examples:
  usvm stats stats-4711.json
  usvm stats 4711
  usvm stats --json 4711 | jq .stats.cpu_faults";

/// Shared virtual memory for GPUs, from user space: any malloc pointer works on the device, at the same address.
#[derive(Debug, Parser)]
#[command(name = "usvm", version, after_help = EXAMPLES, max_term_width = 100, disable_help_subcommand = true)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a program under usvm
    Run(RunArgs),
    /// Say what this machine offers to usvm, and the command that fixes what is missing
    Doctor(DoctorArgs),
    /// List the devices
    Devices(DevicesArgs),
    /// Watch a running program
    Top(TopArgs),
    /// Print the statistics of a run, or of a running program
    Stats(StatsArgs),
    /// Print a shell's completion script
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write all of them into a directory
    Man {
        /// Where to write usvm.1, usvm-run.1 and so on
        #[arg(value_hint = ValueHint::DirPath)]
        directory: Option<PathBuf>,
    },
    /// Load libraries into this process and say where they came from
    #[command(hide = true)]
    Load {
        #[arg(required = true)]
        libraries: Vec<PathBuf>,
    },
}

#[derive(Debug, clap::Args)]
#[command(after_help = RUN)]
pub struct RunArgs {
    /// Print statistics to stderr when the program ends
    #[arg(long)]
    pub stats: bool,
    /// Write statistics as JSON when the program ends; %p is the process id
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub stats_file: Option<PathBuf>,
    /// Write a timeline for chrome://tracing or ui.perfetto.dev; %p is the process id
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub trace: Option<PathBuf>,
    /// Force so many migrations a second, as a test: results must not change
    #[arg(long, value_name = "RATE[,SEED]", value_parser = option("chaos"))]
    pub chaos: Option<String>,
    /// Who lives where
    #[arg(long, value_parser = PossibleValuesParser::new(usvm::policy::NAMES))]
    pub policy: Option<String>,
    /// The device: auto, sim or sim:PROFILE (see usvm devices); several with commas between them
    #[arg(long, value_parser = option("device"))]
    pub device: Option<String>,
    /// Device memory to use, e.g. 512M or 4G
    #[arg(long, value_name = "SIZE", value_parser = option("vram"))]
    pub vram: Option<String>,
    /// Let usvm's allocator serve the program's malloc: memory laid out for migration
    #[arg(long)]
    pub heap: bool,
    /// Print the command with its environment instead of running it
    #[arg(long, short = 'n')]
    pub dry_run: bool,
    /// The program and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        value_name = "COMMAND",
        value_hint = ValueHint::CommandWithArguments
    )]
    pub command: Vec<OsString>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = DOCTOR)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = DEVICES)]
pub struct DevicesArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = TOP)]
pub struct TopArgs {
    /// The process; without it, the one that runs usvm
    pub pid: Option<u32>,
    /// Seconds between two looks
    #[arg(long, short, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    pub delay: std::time::Duration,
    /// Print one snapshot as text
    #[arg(long, visible_alias = "plain", action = ArgAction::SetTrue)]
    pub once: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = STATS)]
pub struct StatsArgs {
    /// A statistics file, or the id of a process
    #[arg(value_name = "FILE|PID", value_hint = ValueHint::FilePath)]
    pub what: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Reads the value of the configuration's option `key` and gives it back as text if it means something.
fn option(key: &'static str) -> impl TypedValueParser<Value = String> {
    clap::builder::NonEmptyStringValueParser::new().try_map(move |text| {
        let mut config = Config::default();
        match config.set(key, &text).and_then(|()| usvm::runtime::check(&config)) {
            Ok(()) => Ok(text),
            Err(usvm::Error::Invalid { reason, .. }) => Err(reason),
            Err(e) => Err(e.to_string()),
        }
    })
}

fn seconds(text: &str) -> Result<std::time::Duration, String> {
    let allowed = || "a number of seconds from 0.1 to 3600 is allowed".to_owned();
    let seconds: f64 = text.parse().map_err(|_| allowed())?;
    if (0.1..=3600.0).contains(&seconds) {
        Ok(std::time::Duration::from_secs_f64(seconds))
    } else {
        Err(allowed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }

    fn refused(line: &str) -> String {
        Args::try_parse_from(line.split(' ')).unwrap_err().to_string()
    }

    #[test]
    fn wrong_values_are_refused_with_what_is_allowed() {
        assert!(refused("usvm run --chaos often -- true").contains("RATE"));
        assert!(refused("usvm run --policy lru -- true").contains("adaptive, gpusvm, remote"));
        assert!(refused("usvm run --device sim:arc -- true").contains("arc-a770"));
        assert!(refused("usvm run --device /dev/dri/renderD128 -- true").contains("not supported yet"));
        assert!(refused("usvm run --vram 12Q -- true").contains("K, M, G"));
        assert!(refused("usvm top --delay 0").contains("0.1"));
        assert!(refused("usvm run").contains("COMMAND"));
    }

    #[test]
    fn options_end_where_the_command_begins() {
        for line in ["usvm run --stats -- app --stats -x", "usvm run --stats app --stats -x"] {
            let Command::Run(run) = Args::try_parse_from(line.split(' ')).unwrap().command else { panic!() };
            assert!(run.stats && !run.dry_run);
            assert_eq!(run.command, ["app", "--stats", "-x"]);
        }
    }
}
