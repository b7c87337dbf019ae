//! Read-only copies on a device of ranges that stay at home.
//!
//! Writes are tracked first and the copy is made afterwards, so that no store can fall between. A device may read a copy
//! only while work that announced it runs: afterwards the program may write, and whoever faults gets what is true then.

use std::sync::Arc;
use std::time::Instant;

use super::{Mover, Range, changed};
use crate::ground::addr::{PageMask, SZ_4K};
use crate::ground::error::{Error, Result};
use crate::observe::stats::{Cause, Direction};
use crate::space::order::Class;
use crate::space::ports::FlipError;
use crate::space::residency::{Moved, State, bytes};

/// Bytes of memory at home that are read before they are copied to the device.
const READ_AT_ONCE: u64 = 256 << 10;

impl Mover {
    /// Makes a read-only copy of the range on `device`, or brings the one it has up to date: copies the pages written
    /// since. Of a copy that is `held` nothing is taken away: if it cannot be brought up to date it stays as it is until it is
    /// not held any more.
    pub fn share(
        &self,
        range: &Arc<Range>,
        state: &mut State,
        device: u32,
        cause: Cause,
        held: bool,
    ) -> Result<()> {
        let span = range.span();
        if !state.is_home() {
            return Err(Error::Mixed { span });
        }
        if state.moved.as_ref().is_some_and(|m| m.shared && (m.device != device || m.outdated)) {
            self.unshare_copy(range, state);
        }
        let State { bound, moved, .. } = state;
        let moved = &mut **moved.get_or_insert_default();
        let result = self.accounted(range, moved, |m| self.share_steps(range, bound, m, device, cause, held));
        if result.is_err() && held {
            moved.outdated = true;
        } else if result.is_err() {
            self.unbind(range, bound);
            self.free_bo(range, moved);
        }
        if result.is_ok() {
            self.arrived(range, device, Class::Copies);
        }
        result
    }

    fn share_steps(
        &self,
        range: &Arc<Range>,
        bound: &mut u32,
        m: &mut Moved,
        device: u32,
        cause: Cause,
        held: bool,
    ) -> Result<()> {
        let span = range.span();
        let started = Instant::now();
        let written = if m.shared { self.host.take_written(span) } else { None };
        let tracked = written.is_some();
        let pages = match written {
            Some(written) => written,
            None if held => return Err(changed()),
            None => {
                // A device that writes over the link would change pages unseen.
                self.unbind(range, bound);
                self.host.register(span)?;
                self.host.track(span).map_err(|why| match why {
                    // The caller migrates instead.
                    FlipError::Os(_) => Error::NotSupported("tracking writes".into()),
                    why => why.to_error(span),
                })?;
                if m.bo.is_none() {
                    m.bo = Some(self.allocate(device, span)?);
                    m.device = device;
                }
                PageMask::first(span.pages())
            }
        };
        let Some(bo) = &m.bo else { unreachable!("made above or shared") };
        let present = self.host.present(span);
        let copying = pages.and(&present);
        let dev = self.device(device);
        let mut buffer = vec![0; bytes(&copying).min(READ_AT_ONCE) as usize];
        for (first, count) in copying.runs() {
            let (mut at, end) = (first as u64 * SZ_4K, (first + count) as u64 * SZ_4K);
            while at < end {
                let piece = &mut buffer[..(end - at).min(READ_AT_ONCE) as usize];
                // A page that the program drops in this moment is an error: to wait for it with the range locked would be
                // to wait for whoever needs the lock.
                let read = self.host.read_home(span.start + at, piece)?;
                dev.upload_bytes(bo, at, &piece[..read])?;
                at += read as u64;
            }
        }
        if !tracked {
            for (first, count) in pages.minus(&present).runs() {
                dev.clear(bo, first as u64 * SZ_4K, count as u64 * SZ_4K)?;
            }
        }
        m.shared = true;
        range.data.note_copy();
        let copied = bytes(&copying);
        let saved = bytes(&present.minus(&pages));
        self.observer.migrated(Direction::ToDevice, cause, span, copied, saved, device, started);
        Ok(())
    }

    /// The range's last use has ended: the device must not find its copy any more, which may be out of date at once. The next
    /// use brings it up to date.
    pub fn used(&self, range: &Arc<Range>) {
        if !range.data.take_copied() {
            return;
        }
        let mut state = range.data.lock();
        let State { bound, moved: Some(moved), .. } = &mut *state else { return };
        if !moved.shared {
            return;
        }
        range.data.note_copy();
        if !range.data.is_pinned() {
            self.unbind(range, bound);
        }
    }

    /// Gives up a shared range's copy; the application has the truth already.
    pub fn unshare_copy(&self, range: &Arc<Range>, state: &mut State) {
        let State { bound, moved: Some(moved), .. } = state else { return };
        if moved.shared {
            self.unbind(range, bound);
            self.free_bo(range, moved);
        }
    }
}
