//! Configuration: one table of options, from the environment, from `USVM_CONF`, or from code.
//!
//! # Overview
//! Every option is one row of [`OPTIONS`]: its key, its environment variable if it has one of its own, what values are
//! allowed, its default, and a line of help. The same row parses the value wherever it comes from and prints it, so the
//! sources cannot disagree. Later sources win: defaults, then `USVM_CONF="key=value;key=value"`, then the variables of
//! their own, then code. [`Config`] prints (`Display`) as the effective values with the origin of each.
//!
//! In a program that runs with more rights than its caller (set-uid, set-gid, file capabilities: AT_SECURE) the
//! environment is ignored altogether, as `secure_getenv` does.
//!
//! Unknown `USVM_*` names are told on stderr once: by the first process that meets them. What a process inherits together
//! with the preload library its parent has told already.
//!
//! # Limits
//! Whether a parent has told is judged by the environment that it started with; who was handed on to init tells again.
//! Sizes are bytes with an optional K, M, G or T (powers of 1024). Names and values are case-sensitive, except for
//! booleans and size suffixes.
//!
//! # Safety
//! One call into the C library, which asks the kernel's auxiliary vector for AT_SECURE.
#![allow(unsafe_code)]

use crate::ground::addr::{SZ_2M, SZ_4K, SZ_64K};
use crate::ground::error::{Error, Result};
use std::ffi::OsString;
use std::fmt;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

/// The variable that holds further options.
pub const CONF: &str = "USVM_CONF";

/// Forced migrations: a stress test for the program and for usvm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chaos {
    /// Migrations per second.
    pub rate: u64,
    /// Seed of the random choices.
    pub seed: u64,
}

/// How usvm is to run. Build one with [`Config::default`], [`Config::from_env`] or [`Config::parse`], then change fields
/// at will.
#[derive(Debug, Clone)]
pub struct Config {
    /// Whether usvm does anything at all.
    pub enable: bool,
    /// Which device: `auto`, `sim`, `sim:profile` or a render node's path.
    pub device: String,
    /// Name of the migration policy.
    pub policy: String,
    /// Bytes of device memory to use; `None` is what the device has.
    pub vram: Option<u64>,
    /// Whether to print version and effective configuration at start, and more on the way.
    pub verbose: bool,
    /// Whether to print the statistics at exit.
    pub show_stats: bool,
    /// File for the statistics as JSON at exit; `%p` stands for the process id.
    pub stats_file: Option<String>,
    /// File for the trace; `%p` stands for the process id.
    pub trace: Option<String>,
    /// Forced migrations.
    pub chaos: Option<Chaos>,
    /// Bytes of a notifier's window, a power of two of at least 2 MiB.
    pub notifier_size: u64,
    /// Range sizes to use, descending; the last is always 4 KiB.
    pub chunk_sizes: Vec<u64>,
    /// Most bytes of host memory kept for ranges that are on the device; `None` is as much as host memory allows.
    pub retained: Option<u64>,
    /// Service threads; at least two run. Where they are as many as processors, each stays on its own.
    pub workers: usize,
    /// Microseconds that a service thread spins for the next fault before it sleeps.
    pub spin_us: u64,
    /// Whether the simulated device's faults are recoverable.
    pub faults: bool,
    /// Bytes of device memory that the CPU can reach (small BAR); `None` is all.
    pub visible: Option<u64>,
    /// Milliseconds that a range stays on the device before the CPU may have it back; doubled when it ping-pongs, up to
    /// 64 times as long. Zero: no time at all.
    pub timeslice_ms: u64,
    /// Whether ranges may be valid on both sides at once.
    pub share: bool,
    /// Events that the trace's ring holds.
    pub trace_events: usize,
    /// How bytes are copied: `auto` or the name of a kind.
    pub copy: String,
    /// Helper threads for large copies; `None` is chosen by the number of processors.
    pub copy_threads: Option<usize>,
    /// What each option was set to and by whom, in the table's order: what differs now was changed by code.
    given: Vec<(String, Origin)>,
}

/// Where a value came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The table.
    Default,
    /// `USVM_CONF`.
    Conf,
    /// Its own environment variable.
    Env,
    /// The program.
    Code,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Origin::Default => "default",
            Origin::Conf => "conf",
            Origin::Env => "env",
            Origin::Code => "code",
        })
    }
}

/// One row of the option table.
#[derive(Debug)]
pub struct OptionRow {
    /// Key in `USVM_CONF` and in code.
    pub key: &'static str,
    /// Environment variable of its own.
    pub env: Option<&'static str>,
    /// The value when nothing sets it.
    pub default: &'static str,
    /// What values are allowed, in words.
    pub allowed: &'static str,
    /// The word for "not set", where the option has one.
    pub none: Option<&'static str>,
    /// What it does, in one line.
    pub help: &'static str,
    set: fn(&mut Config, &str) -> Option<()>,
    get: fn(&Config) -> String,
}

/// A kind of value: how it is read, written, and described.
trait Kind {
    type Value;
    const ALLOWED: &'static str;
    fn read(text: &str) -> Option<Self::Value>;
    fn write(value: &Self::Value) -> String;
}

struct Bool;
impl Kind for Bool {
    type Value = bool;
    const ALLOWED: &'static str = "1, on, true, yes, or 0, off, false, no";

    fn read(text: &str) -> Option<bool> {
        match text.to_ascii_lowercase().as_str() {
            "1" | "on" | "true" | "yes" => Some(true),
            "0" | "off" | "false" | "no" => Some(false),
            _ => None,
        }
    }

    fn write(value: &bool) -> String {
        if *value { "on".into() } else { "off".into() }
    }
}

struct Number;
impl Kind for Number {
    type Value = u64;
    const ALLOWED: &'static str = "a whole number";

    fn read(text: &str) -> Option<u64> {
        text.parse().ok()
    }

    fn write(value: &u64) -> String {
        value.to_string()
    }
}

struct Count;
impl Kind for Count {
    type Value = usize;
    const ALLOWED: &'static str = Number::ALLOWED;

    fn read(text: &str) -> Option<usize> {
        text.parse().ok()
    }

    fn write(value: &usize) -> String {
        value.to_string()
    }
}

struct Size;
impl Kind for Size {
    type Value = u64;
    const ALLOWED: &'static str = "a size in bytes, or with K, M, G or T";

    fn read(text: &str) -> Option<u64> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            "K" | "KB" | "KIB" => 10,
            "M" | "MB" | "MIB" => 20,
            "G" | "GB" | "GIB" => 30,
            "T" | "TB" | "TIB" => 40,
            _ => return None,
        };
        digits.trim_end().parse::<u64>().ok()?.checked_mul(1 << shift)
    }

    fn write(value: &u64) -> String {
        let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
        let whole = units.iter().find(|(shift, _)| *value >= 1 << shift && value.is_multiple_of(1 << shift));
        whole.map_or_else(|| value.to_string(), |(shift, unit)| format!("{}{unit}", value >> shift))
    }
}

/// A size that a notifier's window may have.
struct Window;
impl Kind for Window {
    type Value = u64;
    const ALLOWED: &'static str = "a power of two of at least 2M";

    fn read(text: &str) -> Option<u64> {
        Size::read(text).filter(|size| size.is_power_of_two() && *size >= SZ_2M)
    }

    fn write(value: &u64) -> String {
        Size::write(value)
    }
}

/// The sizes of ranges, largest first.
struct Chunks;
impl Kind for Chunks {
    type Value = Vec<u64>;
    const ALLOWED: &'static str = "some of 2M,64K,4K, descending, with 4K last";

    fn read(text: &str) -> Option<Vec<u64>> {
        let sizes: Vec<u64> = text.split(',').map(|part| Size::read(part.trim())).collect::<Option<_>>()?;
        let known = sizes.iter().all(|size| [SZ_2M, SZ_64K, SZ_4K].contains(size));
        let descending = sizes.windows(2).all(|pair| pair[0] > pair[1]);
        (known && descending && sizes.last() == Some(&SZ_4K)).then_some(sizes)
    }

    fn write(value: &Vec<u64>) -> String {
        value.iter().map(Size::write).collect::<Vec<_>>().join(",")
    }
}

struct Text;
impl Kind for Text {
    type Value = String;
    const ALLOWED: &'static str = "a name";

    fn read(text: &str) -> Option<String> {
        (!text.is_empty()).then(|| text.to_owned())
    }

    fn write(value: &String) -> String {
        value.clone()
    }
}

struct Path;
impl Kind for Path {
    type Value = String;
    const ALLOWED: &'static str = "a path, %p stands for the process id";

    fn read(text: &str) -> Option<String> {
        Text::read(text)
    }

    fn write(value: &String) -> String {
        value.clone()
    }
}

struct Device;
impl Kind for Device {
    type Value = String;
    const ALLOWED: &'static str = "auto, sim, sim:profile, or the path of a render node such as /dev/dri/renderD128; \
        several with commas between them";

    fn read(text: &str) -> Option<String> {
        let is_one = |device: &str| {
            let profile = device.strip_prefix("sim:").is_some_and(|p| !p.is_empty());
            matches!(device, "auto" | "sim") || profile || device.starts_with("/dev/")
        };
        text.split(',').all(is_one).then(|| text.to_owned())
    }

    fn write(value: &String) -> String {
        value.clone()
    }
}

struct Copying;
impl Kind for Copying {
    type Value = String;
    const ALLOWED: &'static str = "auto, avx512, avx2, sse2, words or portable";

    fn read(text: &str) -> Option<String> {
        matches!(text, "auto" | "avx512" | "avx2" | "sse2" | "words" | "portable").then(|| text.to_owned())
    }

    fn write(value: &String) -> String {
        value.clone()
    }
}

struct ChaosRate;
impl Kind for ChaosRate {
    type Value = Chaos;
    const ALLOWED: &'static str = "migrations per second, or rate,seed";

    fn read(text: &str) -> Option<Chaos> {
        let (rate, seed) = text.split_once(',').unwrap_or((text, "1"));
        Some(Chaos { rate: rate.trim().parse().ok()?, seed: seed.trim().parse().ok()? })
    }

    fn write(value: &Chaos) -> String {
        format!("{},{}", value.rate, value.seed)
    }
}

macro_rules! row {
    ($field:ident, $env:expr, $kind:ty, default $default:literal, $help:literal) => {
        OptionRow {
            key: stringify!($field),
            env: $env,
            default: $default,
            allowed: <$kind as Kind>::ALLOWED,
            none: None,
            help: $help,
            set: |config, text| {
                config.$field = <$kind as Kind>::read(text)?;
                Some(())
            },
            get: |config| <$kind as Kind>::write(&config.$field),
        }
    };
    // An option that is not set unless someone sets it; `$none` is the word for that.
    ($field:ident, $env:expr, $kind:ty, or $none:literal, $help:literal) => {
        OptionRow {
            key: stringify!($field),
            env: $env,
            default: $none,
            allowed: <$kind as Kind>::ALLOWED,
            none: Some($none),
            help: $help,
            set: |config, text| {
                config.$field = if text == $none { None } else { Some(<$kind as Kind>::read(text)?) };
                Some(())
            },
            get: |config| config.$field.as_ref().map_or_else(|| $none.into(), <$kind as Kind>::write),
        }
    };
}

/// All options.
pub static OPTIONS: &[OptionRow] = &[
    row!(enable, Some("USVM_ENABLE"), Bool, default "on", "off: usvm stays out of the program"),
    row!(device, Some("USVM_DEVICE"), Device, default "auto", "the devices to mirror memory on, with commas between them"),
    row!(policy, Some("USVM_POLICY"), Text, default "adaptive", "the migration policy"),
    row!(vram, Some("USVM_VRAM"), Size, or "auto", "bytes of device memory to use"),
    row!(verbose, Some("USVM_VERBOSE"), Bool, default "off", "print version and configuration at start"),
    row!(show_stats, Some("USVM_SHOW_STATS"), Bool, default "off", "print the statistics at exit"),
    row!(stats_file, Some("USVM_STATS_FILE"), Path, or "none", "write the statistics as JSON at exit"),
    row!(trace, Some("USVM_TRACE"), Path, or "none", "write a timeline for Perfetto"),
    row!(chaos, Some("USVM_CHAOS"), ChaosRate, or "off", "force random migrations, a stress test"),
    row!(notifier_size, None, Window, default "512M", "bytes of a notifier's window"),
    row!(chunk_sizes, None, Chunks, default "2M,64K,4K", "range sizes to use"),
    row!(retained, None, Size, or "auto", "most host memory kept for ranges that are on the device"),
    row!(workers, None, Count, default "0", "service threads, two at least"),
    row!(spin_us, None, Number, default "500", "how long a service thread spins before it sleeps"),
    row!(faults, None, Bool, default "on", "whether the simulated device can fault and recover"),
    row!(visible, None, Size, or "all", "bytes of device memory that the CPU can reach"),
    row!(timeslice_ms, None, Number, default "0", "how long a range stays on the device at least, doubled when it ping-pongs"),
    row!(share, None, Bool, default "on", "whether both sides may hold a range at once"),
    row!(trace_events, None, Count, default "16384", "events that the trace's ring holds"),
    row!(copy, None, Copying, default "auto", "the instructions that copy"),
    row!(copy_threads, None, Count, or "auto", "helper threads for large copies"),
];

impl OptionRow {
    /// How the option is named to people: by its variable, or as a key of `USVM_CONF`.
    fn shown(&self, origin: Origin) -> &'static str {
        if origin == Origin::Env { self.env.unwrap_or(self.key) } else { self.key }
    }

    fn refuse(&self, text: &str, origin: Origin) -> Error {
        let none = self.none.map_or_else(String::new, |word| format!(", or {word}"));
        let place = if origin == Origin::Conf { " in USVM_CONF" } else { "" };
        Error::Invalid {
            argument: self.shown(origin),
            reason: format!("`{text}`{place} is not allowed; allowed is {}{none}", self.allowed),
        }
    }
}

/// Variables that `usvm run` and its libraries read before there is a configuration.
const LOADING: [&str; 2] = ["USVM_HEAP", "USVM_PRELOAD_LIBRARY"];

/// Whether usvm reads the environment variable `name`.
pub fn is_variable(name: &[u8]) -> bool {
    variables().any(|known| known.as_bytes() == name)
}

/// Tells on stderr of `USVM_*` variables that usvm does not know, once in this process, and not if its parent did: a parent
/// that started with the same names and the preload library.
pub fn tell_unknown() {
    // Nobody waits for who tells: a child of fork would wait for ever.
    static TOLD: AtomicBool = AtomicBool::new(false);
    if TOLD.swap(true, Ordering::Relaxed) {
        return;
    }
    let is_unknown = |name: &OsString| {
        let name = name.as_encoded_bytes();
        name.starts_with(b"USVM_") && !is_variable(name)
    };
    let names: Vec<OsString> = std::env::vars_os().map(|(name, _)| name).filter(is_unknown).collect();
    if names.is_empty() || is_secure() || parent_met(&names) {
        return;
    }
    for name in names {
        // Where nobody reads there is nobody to tell.
        let _ = writeln!(io::stderr(), "usvm: {}", unknown(&name.to_string_lossy()));
    }
}

/// Whether the process that started this one started with the preload library and all of `names`.
fn parent_met(names: &[OsString]) -> bool {
    let parent = std::os::unix::process::parent_id();
    let environment = std::fs::read(format!("/proc/{parent}/environ")).unwrap_or_default();
    let entries: Vec<&[u8]> = environment.split(|byte| *byte == 0).collect();
    let has = |name: &[u8]| entries.iter().find_map(|entry| entry.strip_prefix(name)?.strip_prefix(b"="));
    let preloaded =
        has(b"LD_PRELOAD").is_some_and(|value| value.windows(12).any(|part| part == b"usvm_preload"));
    preloaded && names.iter().all(|name| has(name.as_encoded_bytes()).is_some())
}

/// Names of environment variables that usvm reads.
pub fn variables() -> impl Iterator<Item = &'static str> {
    OPTIONS.iter().filter_map(|row| row.env).chain([CONF]).chain(LOADING)
}

impl Default for Config {
    fn default() -> Self {
        let mut config = Self::blank();
        for (index, row) in OPTIONS.iter().enumerate() {
            config
                .give(index, row.default, Origin::Default)
                .expect("a test reads every default of the table");
        }
        config
    }
}

impl Config {
    /// The configuration that this process's environment asks for. Unknown `USVM_*` names are told on stderr, see
    /// [`tell_unknown`]. Errors: a value that is not allowed; the message names the variable, the value, and what is
    /// allowed.
    pub fn from_env() -> Result<Self> {
        tell_unknown();
        Ok(Self::parse(std::env::vars_os(), is_secure())?.0)
    }

    /// The configuration that `environment` asks for, and what to warn of. `secure` (AT_SECURE) ignores all of it.
    pub fn parse(
        environment: impl IntoIterator<Item = (OsString, OsString)>,
        secure: bool,
    ) -> Result<(Self, Vec<String>)> {
        let mut config = Self::default();
        let mut warnings = Vec::new();
        if secure {
            return Ok((config, warnings));
        }
        let mut own = Vec::new();
        for (name, value) in environment {
            let Some(name) = name.to_str().filter(|name| name.starts_with("USVM_")) else { continue };
            let row = OPTIONS.iter().position(|row| row.env == Some(name));
            if LOADING.contains(&name) {
                continue;
            }
            if row.is_none() && name != CONF {
                warnings.push(unknown(name));
                continue;
            }
            let value = value.into_string().map_err(|raw| Error::Invalid {
                argument: row.and_then(|index| OPTIONS[index].env).unwrap_or(CONF),
                reason: format!("{raw:?} is not UTF-8"),
            })?;
            match row {
                Some(index) => own.push((index, value)),
                None => config.read_conf(&value)?,
            }
        }
        for (index, value) in own {
            config.give(index, value.trim(), Origin::Env)?;
        }
        Ok((config, warnings))
    }

    /// Sets the option `key` from text, as the environment would, on the program's behalf.
    pub fn set(&mut self, key: &str, text: &str) -> Result<()> {
        self.give(find(key, "option")?, text, Origin::Code)
    }

    /// Reads `key=value;key=value`. Empty parts are skipped.
    pub fn read_conf(&mut self, text: &str) -> Result<()> {
        for part in text.split(';').map(str::trim).filter(|part| !part.is_empty()) {
            let Some((key, value)) = part.split_once('=') else {
                let reason = format!("`{part}` has no `=`; write key=value;key=value");
                return Err(Error::Invalid { argument: CONF, reason });
            };
            self.give(find(key.trim(), CONF)?, value.trim(), Origin::Conf)?;
        }
        Ok(())
    }

    /// The effective value of every option as text, with its origin, in the table's order.
    pub fn effective(&self) -> impl Iterator<Item = (&'static OptionRow, String, Origin)> {
        OPTIONS.iter().zip(&self.given).map(|(row, (given, origin))| {
            let value = (row.get)(self);
            let origin = if value == *given { *origin } else { Origin::Code };
            (row, value, origin)
        })
    }

    /// [`Config::stats_file`] for process `pid`.
    pub fn stats_path(&self, pid: u32) -> Option<PathBuf> {
        self.stats_file.as_deref().map(|path| expand(path, pid))
    }

    /// [`Config::trace`] for process `pid`.
    pub fn trace_path(&self, pid: u32) -> Option<PathBuf> {
        self.trace.as_deref().map(|path| expand(path, pid))
    }

    fn give(&mut self, index: usize, text: &str, origin: Origin) -> Result<()> {
        let row = &OPTIONS[index];
        (row.set)(self, text).ok_or_else(|| row.refuse(text, origin))?;
        self.given[index] = ((row.get)(self), origin);
        Ok(())
    }

    /// Every field without a value yet; [`Config::default`] fills them from the table.
    fn blank() -> Self {
        Self {
            enable: false,
            device: String::new(),
            policy: String::new(),
            vram: None,
            verbose: false,
            show_stats: false,
            stats_file: None,
            trace: None,
            chaos: None,
            notifier_size: 0,
            chunk_sizes: Vec::new(),
            retained: None,
            workers: 0,
            spin_us: 0,
            faults: false,
            visible: None,
            timeslice_ms: 0,
            share: false,
            trace_events: 0,
            copy: String::new(),
            copy_threads: None,
            given: vec![(String::new(), Origin::Default); OPTIONS.len()],
        }
    }
}

/// One line for each option: name, value, origin, help.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (row, value, origin) in self.effective() {
            let name = row.env.unwrap_or(row.key);
            writeln!(f, "{name:<16} {value:<12} {origin:<8} {}", row.help)?;
        }
        Ok(())
    }
}

/// Whether the kernel marked this process as running with more rights than its caller.
fn is_secure() -> bool {
    // SAFETY: getauxval takes any number and reads only the vector that the kernel gave this process.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

fn expand(path: &str, pid: u32) -> PathBuf {
    path.replace("%p", &pid.to_string()).into()
}

fn find(key: &str, argument: &'static str) -> Result<usize> {
    OPTIONS.iter().position(|row| row.key == key).ok_or_else(|| Error::Invalid {
        argument,
        reason: format!("there is no option `{key}`{}", suggestion(key, OPTIONS.iter().map(|row| row.key))),
    })
}

fn unknown(name: &str) -> String {
    format!("unknown environment variable {name}{}", suggestion(name, variables()))
}

/// Names the known word nearest to `word`, if one is near enough to have been meant.
fn suggestion(word: &str, known: impl Iterator<Item = &'static str>) -> String {
    let nearest = known.map(|k| (distance(word, k), k)).min();
    match nearest {
        Some((edits, name)) if edits <= 1 + word.len() / 4 => format!("; did you mean {name}?"),
        _ => String::new(),
    }
}

/// Levenshtein's distance, in bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let replace = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    fn parse(environment: &[(&str, &str)]) -> Result<(Config, Vec<String>)> {
        Config::parse(environment.iter().map(|&(k, v)| (k.into(), v.into())), false)
    }

    fn refused(environment: &[(&str, &str)]) -> String {
        parse(environment).unwrap_err().to_string()
    }

    #[test]
    fn every_default_reads_back() {
        let config = Config::default();
        for (row, value, origin) in config.effective() {
            assert_eq!(value, row.default, "{}", row.key);
            assert_eq!(origin, Origin::Default);
        }
    }

    #[test]
    fn keys_and_variables_are_unique() {
        let mut names: Vec<_> = OPTIONS.iter().map(|row| row.key).chain(variables()).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
        let mut promised =
            "USVM_ENABLE USVM_DEVICE USVM_POLICY USVM_VRAM USVM_VERBOSE USVM_SHOW_STATS USVM_STATS_FILE \
                            USVM_TRACE USVM_CONF USVM_CHAOS"
                .split(' ');
        assert!(promised.all(|name| variables().any(|v| v == name)));
    }

    #[test]
    fn the_environment_sets_fields() {
        let (config, warnings) = parse(&[
            ("PATH", "/bin"),
            ("USVM_ENABLE", "No"),
            ("USVM_DEVICE", "sim:arc-a770"),
            ("USVM_VRAM", "1536M"),
            ("USVM_STATS_FILE", "s-%p.json"),
            ("USVM_CHAOS", "100,7"),
            ("USVM_HEAP", "1"),
            ("USVM_CONF", "spin_us = 0; chunk_sizes=64K,4K ;;share=off;visible=256M;workers=3;"),
        ])
        .unwrap();
        assert!(warnings.is_empty(), "{warnings:?}");
        assert!(!config.enable && !config.share);
        assert_eq!(config.device, "sim:arc-a770");
        assert_eq!(config.vram, Some(1536 << 20));
        assert_eq!(config.stats_path(42), Some("s-42.json".into()));
        assert_eq!(config.trace_path(42), None);
        assert_eq!(config.chaos, Some(Chaos { rate: 100, seed: 7 }));
        assert_eq!((config.spin_us, config.workers, config.visible), (0, 3, Some(256 << 20)));
        assert_eq!(config.chunk_sizes, [SZ_64K, SZ_4K]);
    }

    #[test]
    fn its_own_variable_beats_conf_in_either_order() {
        let (one, two) = (("USVM_VRAM", "1G"), ("USVM_CONF", "vram=2G;policy=lru"));
        for environment in [[one, two], [two, one]] {
            let (config, _) = parse(&environment).unwrap();
            assert_eq!(config.vram, Some(1 << 30));
            assert_eq!(config.policy, "lru");
        }
    }

    #[test]
    fn refusals_name_variable_value_and_what_is_allowed() {
        let message = refused(&[("USVM_VRAM", "12Q")]);
        assert!(
            message.contains("USVM_VRAM") && message.contains("`12Q`") && message.contains("K, M, G"),
            "{message}"
        );
        assert!(message.contains("or auto"), "{message}");
        let message = refused(&[("USVM_CONF", "share=maybe")]);
        assert!(
            message.contains("share") && message.contains("USVM_CONF") && message.contains("off"),
            "{message}"
        );
        assert!(refused(&[("USVM_CONF", "spin_su=3")]).contains("did you mean spin_us?"));
        assert!(refused(&[("USVM_CONF", "share")]).contains("has no `=`"));
        assert!(refused(&[("USVM_DEVICE", "cuda")]).contains("sim:profile"));
        for bad in ["sim:", "sim,", ",sim", "sim,,sim", "sim cuda"] {
            assert!(refused(&[("USVM_DEVICE", bad)]).contains("USVM_DEVICE"), "{bad}");
        }
        for bad in ["", "-1", "1.5G", "99999999999G", "G", "1 2K"] {
            assert!(refused(&[("USVM_VRAM", bad)]).contains("USVM_VRAM"), "{bad}");
        }
        for bad in ["2M", "4K,2M", "8K,4K", "4K,4K", ""] {
            assert!(
                refused(&[("USVM_CONF", &format!("chunk_sizes={bad}"))]).contains("chunk_sizes"),
                "{bad}"
            );
        }
        for bad in ["1M", "3M", "0"] {
            assert!(
                refused(&[("USVM_CONF", &format!("notifier_size={bad}"))]).contains("power of two"),
                "{bad}"
            );
        }
    }

    #[test]
    fn bytes_that_are_not_text_are_refused_only_where_they_matter() {
        let raw = || OsString::from_vec(vec![0xff, 0xfe]);
        assert!(Config::parse([("OTHER".into(), raw()), (raw(), raw())], false).is_ok());
        let error = Config::parse([("USVM_POLICY".into(), raw())], false).unwrap_err();
        assert!(error.to_string().contains("USVM_POLICY"));
    }

    #[test]
    fn unknown_names_get_the_nearest_known() {
        let (_, warnings) =
            parse(&[("USVM_VRMA", "1G"), ("USVM_SOMETHING_ELSE", "1"), ("USVMX", "1")]).unwrap();
        assert_eq!(warnings.len(), 2);
        assert!(warnings[0].contains("USVM_VRMA") && warnings[0].contains("did you mean USVM_VRAM?"));
        assert!(!warnings[1].contains("did you mean"), "nothing is near: {}", warnings[1]);
        assert_eq!((distance("", "abc"), distance("kitten", "sitting")), (3, 3));
    }

    #[test]
    fn secure_programs_ignore_all_of_it() {
        let environment =
            [("USVM_VRAM", "rubbish"), ("USVM_ENABLE", "off")].map(|(k, v)| (k.into(), v.into()));
        let (config, warnings) = Config::parse(environment, true).unwrap();
        assert!(config.enable && warnings.is_empty());
    }

    #[test]
    fn it_tells_where_values_came_from() {
        let (mut config, _) = parse(&[("USVM_VRAM", "2048M"), ("USVM_CONF", "spin_us=9")]).unwrap();
        config.timeslice_ms = 11;
        config.set("copy", "avx2").unwrap();
        let text = config.to_string();
        let line = |name: &str| {
            text.lines().find(|l| l.starts_with(name)).unwrap().split_whitespace().collect::<Vec<_>>()
        };
        assert_eq!(line("USVM_VRAM")[1..3], ["2G", "env"]);
        assert_eq!(line("spin_us")[1..3], ["9", "conf"]);
        assert_eq!(line("timeslice_ms")[1..3], ["11", "code"]);
        assert_eq!(line("copy")[1..3], ["avx2", "code"]);
        assert_eq!(line("USVM_ENABLE")[1..3], ["on", "default"]);
        assert_eq!(text.lines().count(), OPTIONS.len());
        assert!(config.set("nonsense", "1").is_err());
    }

    #[test]
    fn sizes_print_as_they_read() {
        for (text, bytes) in
            [("0", 0), ("1000", 1000), ("4K", 4096), ("3m", 3 << 20), ("2 GiB", 2 << 30), ("1T", 1 << 40)]
        {
            assert_eq!(Size::read(text), Some(bytes), "{text}");
            assert_eq!(Size::read(&Size::write(&bytes)), Some(bytes));
        }
    }
}
