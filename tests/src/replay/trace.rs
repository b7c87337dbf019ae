//! Reading a recorded trace (`tests/kernel-ref/TRACE.md`).

use std::io::Read;
use std::path::Path;
use usvm::ground::addr::{SZ_4K, Span};
use usvm::space::ports::{Vma, VmaKind};
use usvm::space::{Event, EventKind};

/// What is wrong with a trace.
pub type Bad = String;

/// One run: a process with one space over one arena.
#[derive(Debug)]
pub struct Trace {
    /// Its name.
    pub name: String,
    /// The addresses it speaks of.
    pub arena: Span,
    /// What was done, in order.
    pub ops: Vec<Op>,
}

/// One call of the kernel's invalidate callback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// The event, not clipped to the notifier.
    pub event: Event,
    /// Start of the notifier it was delivered to.
    pub window: u64,
    /// Ranges it met there.
    pub hits: usize,
    /// From the first range's start to the last one's end; empty without hits.
    pub met: Span,
}

/// A range after an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeView {
    /// Its addresses.
    pub span: Span,
    /// `MUPDA`, a dash for each that is not set.
    pub flags: String,
    /// System pages mapped.
    pub sys: usize,
    /// Device pages mapped.
    pub dev: usize,
    /// Entries of dma_addr.
    pub segments: usize,
    /// `rw`, `ro` or `-`.
    pub mode: &'static str,
    /// Whether it waits for the collector.
    pub queued: bool,
}

impl std::fmt::Display for RangeView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { span, flags, sys, dev, segments, mode, queued } = self;
        write!(f, "{:x} {:x} {flags} {sys} {dev} {segments} {mode}", span.start, span.end)?;
        if *queued { f.write_str(" gc") } else { Ok(()) }
    }
}

/// One operation and all that is known of it.
#[derive(Debug, Default)]
pub struct Op {
    /// Counted from zero.
    pub number: usize,
    /// Its name.
    pub name: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// The kernel's answer.
    pub result: String,
    /// Invalidations, in order.
    pub calls: Vec<Call>,
    /// The VMAs after it, if they changed.
    pub vmas: Option<Vec<Vma>>,
    /// Pages that are now in a state.
    pub pages: Vec<(Span, u8)>,
    /// New and changed ranges.
    pub ranges: Vec<RangeView>,
    /// Starts of ranges that are gone.
    pub gone: Vec<u64>,
    /// New notifiers.
    pub notifiers: Vec<Span>,
    /// Starts of notifiers that are gone.
    pub notifiers_gone: Vec<u64>,
    /// Ranges in the collector's queue, if that changed.
    pub queue: Option<usize>,
    /// Events were lost: the state after it must be taken as it is.
    pub resync: bool,
}

impl Op {
    /// The operation as the trace has it.
    pub fn text(&self) -> String {
        format!("op {} {} {}", self.number, self.name, self.args.join(" "))
    }

    /// The `i`th argument, a hexadecimal number.
    pub fn hex(&self, i: usize) -> u64 {
        u64::from_str_radix(&self.args[i], 16).expect("arguments were checked when the trace was read")
    }

    /// The span of an operation whose first arguments are an address and a length.
    pub fn span(&self) -> Span {
        Span::sized(self.hex(0), self.hex(1))
    }
}

/// Reads a trace, compressed if its name ends in `.xz`.
///
/// # Errors
/// The file and line, and what is wrong there.
pub fn read(path: &Path) -> Result<Trace, Bad> {
    let at = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let file = std::fs::File::open(path).map_err(|e| at(&e))?;
    let mut text = String::new();
    if path.extension().is_some_and(|e| e == "xz") {
        lzma_rust2::XzReader::new(file, true).read_to_string(&mut text).map_err(|e| at(&e))?;
    } else {
        std::io::BufReader::new(file).read_to_string(&mut text).map_err(|e| at(&e))?;
    }
    parse(&text).map_err(|e| at(&e))
}

/// Reads the text of a trace.
///
/// # Errors
/// The line, and what is wrong there.
pub(crate) fn parse(text: &str) -> Result<Trace, Bad> {
    let mut trace = Trace { name: String::new(), arena: Span::new(0, 0), ops: Vec::new() };
    let (mut version, mut ended) = (false, false);
    for (i, line) in text.lines().enumerate() {
        let words: Vec<&str> = line.split(' ').collect();
        let read = match (words[0], trace.ops.last_mut()) {
            _ if ended => Err("a line after the end".into()),
            ("op", _) => start_op(&words, trace.ops.len()).map(|op| trace.ops.push(op)),
            ("end", _) => {
                ended = true;
                let all = words.get(1) == Some(&trace.ops.len().to_string().as_str());
                if all { Ok(()) } else { Err("the number of operations is another".into()) }
            }
            (_, Some(op)) => item(op, &words),
            ("usvm-kernel-trace", None) => {
                version = words.get(1) == Some(&"1");
                Ok(())
            }
            ("name", None) => word(&words, 1).map(|name| trace.name = name.into()),
            ("arena", None) => sized(&words, 1).map(|span| trace.arena = span),
            ("kernel", None) => Ok(()),
            _ => Err("what is this?".into()),
        };
        read.map_err(|e: Bad| format!("line {}: {e}: {line}", i + 1))?;
    }
    match (version, ended, trace.arena.is_empty()) {
        (true, true, false) => Ok(trace),
        _ => Err("not a whole trace of version 1".into()),
    }
}

/// How many hexadecimal arguments an operation begins with.
fn hex_arguments(name: &str) -> usize {
    match name {
        "create" => 3,
        "find" | "pages" | "unmap" | "migrate" | "evict" | "remove" | "scan" => 1,
        "gpuw" | "gpur" => 2,
        _ => 0,
    }
}

fn start_op(words: &[&str], number: usize) -> Result<Op, Bad> {
    let name = word(words, 2)?.to_string();
    if word(words, 1)? != number.to_string() {
        return Err("operations are not counted".into());
    }
    for i in 0..hex_arguments(&name) {
        hex(words, 3 + i)?;
    }
    let least = match name.as_str() {
        "create" => 5,
        "find" => 4,
        "pages" | "migrate" | "scan" => 2,
        _ => 0,
    };
    let args: Vec<String> = words[3..].iter().map(|w| w.to_string()).collect();
    if args.len() < least {
        return Err("arguments are missing".into());
    }
    Ok(Op { number, name, args, ..Op::default() })
}

fn item(op: &mut Op, w: &[&str]) -> Result<(), Bad> {
    match w[0] {
        "=" => op.result = w[1..].join(" "),
        "e" => calls(op, w)?,
        "vma" => op.vmas = Some(Vec::new()),
        "v" => {
            let span = bounds(w, 1)?;
            let vma = vma(span, word(w, 3)?, word(w, 4)?)?;
            op.vmas.as_mut().ok_or("no vma line")?.push(vma);
        }
        "p" => op.pages.push((bounds(w, 1)?, state(word(w, 3)?)?)),
        "r" => op.ranges.push(range(w)?),
        "x" => op.gone.push(hex(w, 1)?),
        "n" => op.notifiers.push(bounds(w, 1)?),
        "nx" => op.notifiers_gone.push(hex(w, 1)?),
        "elost" => op.resync = true,
        "g" => op.queue = Some(decimal(w, 1)?),
        "ecount" | "left" => {}
        _ => return Err("what is this?".into()),
    }
    Ok(())
}

fn calls(op: &mut Op, w: &[&str]) -> Result<(), Bad> {
    let kind = match word(w, 1)? {
        "UNMAP" => EventKind::Unmap,
        "CLEAR" => EventKind::Clear,
        "PROT_VMA" => EventKind::ProtVma,
        "PROT_PAGE" => EventKind::ProtPage,
        "SOFT_DIRTY" => EventKind::SoftDirty,
        "RELEASE" => EventKind::Release,
        "MIGRATE" => EventKind::Migrate,
        "EXCLUSIVE" => EventKind::Exclusive,
        other => return Err(format!("{other} is no event")),
    };
    let span = bounds(w, 2)?;
    let (window, hits) = (hex(w, 4)?, decimal(w, 5)?);
    let met = if hits > 0 { bounds(w, 6)? } else { Span::new(0, 0) };
    let step = match w.last().and_then(|last| last.strip_prefix('/')) {
        Some(step) => u64::from_str_radix(step, 16).map_err(|e| e.to_string())?,
        None => span.len(),
    };
    if step == 0 || !span.len().is_multiple_of(step) {
        return Err("a step that does not divide its span".into());
    }
    for i in 0..span.len() / step {
        let event = Event::new(kind, Span::sized(span.start + i * step, step));
        op.calls.push(Call { event, window, hits, met });
    }
    Ok(())
}

fn vma(span: Span, perms: &str, kind: &str) -> Result<Vma, Bad> {
    let kind = match kind {
        "anon" => VmaKind::Anonymous,
        "file" => VmaKind::File,
        "shmem" => VmaKind::Shared,
        "hugetlb" => VmaKind::Hugetlb,
        "io" => VmaKind::Special,
        other => return Err(format!("{other} is no kind of mapping")),
    };
    let may = |c| perms.contains(c);
    Ok(Vma { span, read: may('r'), write: may('w'), exec: may('x'), kind })
}

fn range(w: &[&str]) -> Result<RangeView, Bad> {
    let mode = match word(w, 7)? {
        "rw" => "rw",
        "ro" => "ro",
        "-" => "-",
        other => return Err(format!("{other} is no mode")),
    };
    Ok(RangeView {
        span: bounds(w, 1)?,
        flags: word(w, 3)?.into(),
        sys: decimal(w, 4)?,
        dev: decimal(w, 5)?,
        segments: decimal(w, 6)?,
        mode,
        queued: w.get(8) == Some(&"gc"),
    })
}

fn state(word: &str) -> Result<u8, Bad> {
    match word.as_bytes() {
        [c @ (b'.' | b'p' | b'H' | b'z' | b'Z' | b'd' | b'D')] => Ok(*c),
        _ => Err(format!("{word} is no state of a page")),
    }
}

fn word<'a>(w: &[&'a str], i: usize) -> Result<&'a str, Bad> {
    w.get(i).copied().ok_or_else(|| "words are missing".into())
}

fn hex(w: &[&str], i: usize) -> Result<u64, Bad> {
    u64::from_str_radix(word(w, i)?, 16).map_err(|e| e.to_string())
}

fn decimal(w: &[&str], i: usize) -> Result<usize, Bad> {
    word(w, i)?.parse().map_err(|e: std::num::ParseIntError| e.to_string())
}

/// A start and an end.
fn bounds(w: &[&str], i: usize) -> Result<Span, Bad> {
    let (start, end) = (hex(w, i)?, hex(w, i + 1)?);
    if start < end { Ok(Span::new(start, end)) } else { Err("an empty span".into()) }
}

/// A start and a length.
fn sized(w: &[&str], i: usize) -> Result<Span, Bad> {
    let span = Span::sized(hex(w, i)?, hex(w, i + 1)?);
    if span.len() >= SZ_4K { Ok(span) } else { Err("an empty arena".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "usvm-kernel-trace 1\nkernel x\nname t\narena 1000000000 1000000\n";

    #[test]
    fn a_stepped_event_is_many() {
        let text = format!(
            "{HEAD}op 0 devevict 1\n= 0 1\ne CLEAR 1000000000 1000003000 1000000000 1 1000000000 1000200000 /1000\nend 1\n"
        );
        let trace = parse(&text).unwrap();
        let spans: Vec<u64> = trace.ops[0].calls.iter().map(|c| c.event.span.start).collect();
        assert_eq!(spans, [0x10_0000_0000, 0x10_0000_1000, 0x10_0000_2000]);
        assert!(trace.ops[0].calls.iter().all(|c| c.hits == 1 && c.met.len() == 0x20_0000));
    }

    #[test]
    fn what_is_not_a_trace_is_refused() {
        for bad in [
            "",
            "op 0 gc\n= 0\n",
            "op 1 gc\n= 0\nend 1\n",
            "op 0 find zz - thr=0 lim=0:1\nend 1\n",
            "op 0 gc\np 1000 2000 q\nend 1\n",
            "op 0 gc\nend 2\n",
            "op 0 gc\nend 1\nop 1 gc\n",
        ] {
            assert!(parse(&format!("{HEAD}{bad}")).is_err(), "{bad:?}");
        }
        assert!(parse("op 0 gc\n= 0 0\nend 1\n").is_err(), "no header");
    }
}
