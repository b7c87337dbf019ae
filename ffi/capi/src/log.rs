//! What usvm has to say that is nobody's answer, on standard error.
//!
//! # Overview
//! The runtime tells of defects and losses by `tracing` events: memory that was lost with a device, a service thread that
//! died, statistics that cannot be written. In a Rust program its subscriber hears them; programs of libusvm and of the
//! preload library have none, so this is it there. Errors only, one line each, and [`MOST`] of them: a device that is lost
//! can lose many ranges.
//!
//! # Locking
//! None. Events come from service threads, too: a line is made on the stack and written by one system call.
//!
//! # Limits
//! A line that is longer than [`LONGEST`] is cut.

use std::fmt::{self, Debug, Write as _};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use tracing::field::{Field, Visit};
use tracing::metadata::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use usvm::ground::{alloc, words};

use crate::api::result::Fixed;

/// Lines that are told.
const MOST: u32 = 100;

/// Bytes of a line.
const LONGEST: usize = 512;

/// Lines told, or not told any more.
static TOLD: AtomicU32 = AtomicU32::new(0);

/// Begins to listen, once.
pub(crate) fn listen() {
    static LISTENS: AtomicBool = AtomicBool::new(false);
    if !LISTENS.swap(true, Ordering::AcqRel) {
        // Somebody may listen already, who then hears all.
        let _ = alloc::internal(|| tracing::subscriber::set_global_default(Ear));
    }
}

/// Hears events and tells the errors among them. It has no data: what a parent allocated may migrate in its child, and
/// service threads must not wait for it.
struct Ear;

impl Subscriber for Ear {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR && metadata.is_event()
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::ERROR)
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        match TOLD.fetch_add(1, Ordering::Relaxed) {
            n if n < MOST => words::write(line(event, &mut [0; LONGEST])),
            MOST => words::write(b"usvm: more errors are not told\n"),
            _ => {}
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// The event's words, then its fields.
fn line<'a>(event: &Event<'_>, buffer: &'a mut [u8; LONGEST]) -> &'a [u8] {
    let mut line = Fixed::new(buffer);
    // What does not fit is left out.
    let _ = line.write_str("usvm: ");
    event.record(&mut Part { to: &mut line, wanted: Wanted::Message });
    event.record(&mut Part { to: &mut line, wanted: Wanted::Fields });
    let used = line.used();
    buffer[used] = b'\n';
    &buffer[..=used]
}

#[derive(PartialEq)]
enum Wanted {
    Message,
    Fields,
}

/// Writes one part of an event.
struct Part<'a, 'b> {
    to: &'a mut Fixed<'b>,
    wanted: Wanted,
}

impl Part<'_, '_> {
    fn put(&mut self, name: &str, value: fmt::Arguments<'_>) {
        let _ = match (name, &self.wanted) {
            ("message", Wanted::Message) => self.to.write_fmt(value),
            ("message", Wanted::Fields) | (_, Wanted::Message) => Ok(()),
            (name, Wanted::Fields) => write!(self.to, "; {name} {value}"),
        };
    }
}

impl Visit for Part<'_, '_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.put(field.name(), format_args!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field.name(), format_args!("{value}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_words_first() {
        use std::sync::Mutex;
        static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());
        struct Catch(Ear);
        impl Subscriber for Catch {
            fn enabled(&self, metadata: &Metadata<'_>) -> bool {
                self.0.enabled(metadata)
            }
            fn new_span(&self, span: &Attributes<'_>) -> Id {
                self.0.new_span(span)
            }
            fn record(&self, _: &Id, _: &Record<'_>) {}
            fn record_follows_from(&self, _: &Id, _: &Id) {}
            fn event(&self, event: &Event<'_>) {
                let text = String::from_utf8(line(event, &mut [0; LONGEST]).to_vec()).unwrap();
                LINES.lock().unwrap().push(text);
            }
            fn enter(&self, _: &Id) {}
            fn exit(&self, _: &Id) {}
        }
        tracing::subscriber::with_default(Catch(Ear), || {
            tracing::error!(pages = 3, span = %"0x1000", "memory is lost");
            tracing::error!("{} died", "usvm-fault0");
            tracing::warn!("nobody's business");
            tracing::error!("{}", "x".repeat(2 * LONGEST));
        });
        let lines = LINES.lock().unwrap();
        assert_eq!(lines[..2], ["usvm: memory is lost; pages 3; span 0x1000\n", "usvm: usvm-fault0 died\n"]);
        assert_eq!(lines.len(), 3);
        assert!(lines[2].ends_with("x\n") && lines[2].len() == LONGEST, "{}", lines[2].len());
    }
}
