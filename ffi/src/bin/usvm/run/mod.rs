//! `usvm run`: becomes the program, with an environment in which its loader loads usvm.
//!
//! # Overview
//! A [`Plan`] is made of the command line and the environment: which program, which variables are set to what, and what
//! the user should know. It is printed (`--dry-run`) or carried out by execve(2), so that no process stands between the
//! caller and the program: process id, terminal, signals, limits and exit status are the program's.
//!
//! # Exit status
//! As env(1) and nohup(1) do: 127 if the command is not found, 126 if it cannot be executed; 2 for wrong options or
//! values, also in the environment; 1 if usvm's library is missing, or a right that chaos needs. Otherwise the program's.

mod library;
mod target;

pub use library::{PRELOAD, find as find_library};

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use usvm::Config;

use crate::cli::RunArgs;
use crate::{Outcome, USAGE, say};
use target::{Fitness, Unusable};

type Environment = BTreeMap<OsString, OsString>;

/// Intel's compute driver submits work past the kernel by default, where usvm cannot see it. The second variable
/// means something to it only with the first.
const DRIVER: [(&str, &str); 2] = [("NEOReadDebugKeys", "1"), ("EnableDirectSubmission", "0")];

/// Whether usvm's allocator serves the program's malloc.
const HEAP: &str = "USVM_HEAP";

/// `usvm run`.
pub fn run(args: RunArgs) -> Outcome {
    let environment: Environment = std::env::vars_os().collect();
    let command = args.command.first().cloned().unwrap_or_default();
    let found = target::locate(&command, environment.get(OsStr::new("PATH")))
        .and_then(|program| Ok((target::inspect(&program)?, program)));
    let (fitness, program) = match found {
        Ok(found) => found,
        Err(Unusable { status, why }) => {
            say::warn(why);
            return Ok(status);
        }
    };
    // Whoever would write it says so at the program's end.
    if let Some(file) = [&args.stats_file, &args.trace].into_iter().flatten().find(|file| !has_place(file)) {
        say::warn(format!("{}: there is no such folder", file.display()));
        return Ok(USAGE);
    }
    let plan = Plan::new(&args, program, fitness, &environment)?;
    let parsed = Config::parse(plan.environment(&environment), false);
    let config = match parsed
        .and_then(|(config, unknown)| usvm::runtime::check(&config).map(|()| (config, unknown)))
    {
        Ok((config, unknown)) => {
            // The library tells, and only once, where it is loaded.
            if args.dry_run || !plan.loads {
                unknown.iter().for_each(say::warn);
            }
            config
        }
        Err(e) => {
            say::warn(e);
            return Ok(USAGE);
        }
    };
    if plan.loads && config.enable && config.chaos.is_some() && !args.dry_run {
        // Only for chaos: a userfaultfd takes time.
        usvm::runtime::check_rights(&config).map_err(|e| e.to_string())?;
    }
    plan.notes.iter().for_each(say::warn);
    if args.dry_run {
        return say::done(plan.line(&args.command)?);
    }
    Ok(plan.become_program(&args.command, &environment))
}

/// What is to be done.
#[derive(Debug)]
struct Plan {
    program: PathBuf,
    /// Variables to set, in the order in which they are shown.
    set: Vec<(OsString, OsString)>,
    /// What the user should know.
    notes: Vec<String>,
    /// Whether the library will be loaded into the program itself.
    loads: bool,
}

impl Plan {
    fn new(
        args: &RunArgs,
        program: PathBuf,
        fitness: Fitness,
        environment: &Environment,
    ) -> Result<Self, String> {
        let mut plan = Self { set: Vec::new(), notes: Vec::new(), program, loads: false };
        let preload = library::find()?;
        match fitness {
            Fitness::Foreign(why) => plan.notes.push(why),
            Fitness::Inert(why) => {
                plan.notes.push(why);
                plan.load(args, &preload, environment)?;
            }
            Fitness::Fits => {
                plan.loads = true;
                plan.load(args, &preload, environment)?;
            }
        }
        plan.options(args)?;
        Ok(plan)
    }

    /// The variables that bring usvm into the program and keep its driver's work visible.
    fn load(&mut self, args: &RunArgs, preload: &Path, environment: &Environment) -> Result<(), String> {
        let given = |name: &str| environment.get(OsStr::new(name));
        let mut preloaded = library::joined(given("LD_PRELOAD"), preload, true);
        if args.heap || given(HEAP).is_some_and(|value| is_on(value)) {
            // Its malloc must be found before any other.
            preloaded = library::joined(Some(&preloaded), &library::beside(preload, library::HEAP)?, true);
        }
        self.set("LD_PRELOAD", preloaded);
        self.set("OPENCL_LAYERS", library::joined(given("OPENCL_LAYERS"), preload, false));
        for (name, value) in DRIVER {
            match given(name) {
                Some(own) if own != value => self.notes.push(format!(
                    "{name}={} is kept as you set it; usvm wants {value}, or Intel's driver may hide work from it",
                    own.display()
                )),
                _ => self.set(name, value),
            }
        }
        Ok(())
    }

    /// The variables that the options stand for.
    fn options(&mut self, args: &RunArgs) -> Result<(), String> {
        if args.stats {
            self.set("USVM_SHOW_STATS", "1");
        }
        // The program may change its directory before it ends.
        for (name, file) in [("USVM_STATS_FILE", &args.stats_file), ("USVM_TRACE", &args.trace)] {
            if let Some(file) = file {
                let file = std::path::absolute(file).map_err(|e| format!("{}: {e}", file.display()))?;
                self.set(name, file);
            }
        }
        let texts = [
            ("USVM_CHAOS", &args.chaos),
            ("USVM_POLICY", &args.policy),
            ("USVM_DEVICE", &args.device),
            ("USVM_VRAM", &args.vram),
        ];
        for (name, value) in texts {
            if let Some(value) = value {
                self.set(name, value);
            }
        }
        if args.heap {
            self.set(HEAP, "1");
        }
        Ok(())
    }

    fn set(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.set.push((name.into(), value.as_ref().to_owned()));
    }

    /// The whole environment of the program.
    fn environment(&self, given: &Environment) -> Environment {
        let mut all = given.clone();
        all.extend(self.set.iter().cloned());
        all
    }

    /// One line for the shell that does the same.
    fn line(&self, command: &[OsString]) -> Result<Vec<u8>, String> {
        let quoted = |word: &OsStr| {
            shlex::bytes::try_quote(word.as_bytes())
                .map(|word| word.into_owned())
                .map_err(|e| format!("{}: {e}", word.display()))
        };
        let mut words = Vec::new();
        for (name, value) in &self.set {
            words.push([name.as_bytes(), b"=", &quoted(value)?].concat());
        }
        for word in command {
            words.push(quoted(word)?);
        }
        Ok([words.join(&b' '), b"\n".to_vec()].concat())
    }

    /// Becomes the program; gives the exit status if that is not possible.
    fn become_program(&self, command: &[OsString], given: &Environment) -> u8 {
        let c_string = |bytes: &[u8]| CString::new(bytes).unwrap_or_default();
        let environment: Vec<CString> = self
            .environment(given)
            .iter()
            .map(|(name, value)| c_string(&[name.as_bytes(), b"=", value.as_bytes()].concat()))
            .collect();
        let mut words: Vec<CString> = command.iter().map(|word| c_string(word.as_bytes())).collect();
        let program = c_string(self.program.as_os_str().as_bytes());
        let Err(mut errno) = nix::unistd::execve(&program, &words, &environment);
        if errno == Errno::ENOEXEC {
            // A script without a first line that says so: the shell's, as for execvp.
            words.splice(0..1, [c"/bin/sh".to_owned(), program]);
            Err(errno) = nix::unistd::execve(c"/bin/sh", &words, &environment);
        }
        say::warn(format!("{}: {}", self.program.display(), errno.desc()));
        // The file itself is there: what is not found is its interpreter.
        if errno == Errno::ENOENT { 127 } else { 126 }
    }
}

/// Whether the folder is there that `file` is to be in. One that is named by a process is not looked for.
fn has_place(file: &Path) -> bool {
    let Some(folder) = file.parent().filter(|folder| !folder.as_os_str().is_empty()) else { return true };
    folder.is_dir() || folder.as_os_str().as_bytes().windows(2).any(|part| part == b"%p")
}

/// Whether `value` switches something on, as the configuration reads it.
fn is_on(value: &OsStr) -> bool {
    ["1", "on", "true", "yes"].iter().any(|word| value.eq_ignore_ascii_case(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(args: &RunArgs, environment: &[(&str, &str)]) -> Plan {
        let environment = environment.iter().map(|(k, v)| (k.into(), v.into())).collect();
        let mut plan = Plan { program: "/bin/true".into(), set: Vec::new(), notes: Vec::new(), loads: true };
        plan.load(args, Path::new("/l/libusvm_preload.so"), &environment).unwrap();
        plan.options(args).unwrap();
        plan
    }

    fn args(line: &str) -> RunArgs {
        use clap::Parser;
        let words = shlex::split(line).unwrap();
        match crate::cli::Args::try_parse_from(words).unwrap().command {
            crate::cli::Command::Run(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_line_is_for_the_shell() {
        let args = args(r#"usvm run --stats -- echo "it's" '' a=b"#);
        let line = String::from_utf8(plan(&args, &[]).line(&args.command).unwrap()).unwrap();
        let words = shlex::split(&line).unwrap();
        let end = words.len() - 4;
        assert_eq!(words[end..], ["echo", "it's", "", "a=b"]);
        assert!(words.contains(&"LD_PRELOAD=/l/libusvm_preload.so".into()), "{line}");
        assert!(words.contains(&"USVM_SHOW_STATS=1".into()));
    }

    #[test]
    fn options_become_variables() {
        let args = args(
            "usvm run --stats-file s-%p --trace t --chaos 5,1 --policy remote --device sim --vram 1G -- x",
        );
        let set: BTreeMap<_, _> = plan(&args, &[]).set.into_iter().collect();
        let get = |name: &str| set[OsStr::new(name)].to_str().unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!(get("USVM_STATS_FILE"), here.join("s-%p").to_str().unwrap());
        assert_eq!(get("USVM_TRACE"), here.join("t").to_str().unwrap());
        assert_eq!((get("USVM_CHAOS"), get("USVM_POLICY"), get("USVM_DEVICE")), ("5,1", "remote", "sim"));
        assert_eq!(get("USVM_VRAM"), "1G");
        assert_eq!((get("NEOReadDebugKeys"), get("EnableDirectSubmission")), ("1", "0"));
        assert!(!set.contains_key(OsStr::new("USVM_SHOW_STATS")));
    }

    #[test]
    fn what_the_user_set_is_kept() {
        let given =
            [("LD_PRELOAD", "/own.so"), ("OPENCL_LAYERS", "/lay.so"), ("EnableDirectSubmission", "1")];
        let plan = plan(&args("usvm run -- x"), &given);
        let set: BTreeMap<_, _> = plan.set.into_iter().collect();
        assert_eq!(set[OsStr::new("LD_PRELOAD")], "/l/libusvm_preload.so:/own.so");
        assert_eq!(set[OsStr::new("OPENCL_LAYERS")], "/lay.so:/l/libusvm_preload.so");
        assert!(!set.contains_key(OsStr::new("EnableDirectSubmission")));
        assert!(plan.notes[0].contains("EnableDirectSubmission=1"));
    }
}
