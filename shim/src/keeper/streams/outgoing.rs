//! One output of a process on its way to the client's fifo.
//!
//! ```text
//!  Flowing ──(process side ended, or given up)──▶ Draining ──(a reader is there and has taken everything)──▶ finished
//!     │ full fifo and spill allowed: process ─▶ file ─▶ fifo
//!     └ full fifo else: the process waits, as with any pipe
//! ```
//!
//! **Invariant:** the fifo keeps a write end of ours until everything was taken, or the container was deleted and the stated drain is over.
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use log::warn;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;

use super::fifo;
use super::splice::{Stop, TURN_BYTES, move_bytes};
use crate::keeper::image::{Error, Loader, Saver};
use crate::sys::descriptors::waiting_bytes;

/// After a process has ended, somebody else may still hold its output: so long it may stay quiet before it is given up.
pub(super) const QUIET_AFTER_EXIT: Duration = Duration::from_millis(500);
/// So much is copied at once: what a fifo holds.
const PART_BYTES: usize = 64 << 10;
/// Less is not worth a call.
const AT_ONCE_BYTES: libc::loff_t = 256 << 10;
/// And so long it may go on in all, as far as its reader takes the bytes.
pub(super) const LIMIT_AFTER_EXIT: Duration = Duration::from_secs(10);
/// After Delete, a reader that is there has so long to take what is left. Without a reader, nobody will come.
pub(super) const DRAIN_AFTER_DELETE: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// The process's side, until it has ended.
    source: Option<OwnedFd>,
    sink: OwnedFd,
    spill: Option<Spill>,
    pub(super) target: String,
    pub(super) bytes: u64,
    last_moved: Instant,
    /// Only our write end of the fifo is left.
    draining: bool,
}

/// What a turn has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Waits,
    /// It stopped because others must get their turn.
    Again,
    /// Nothing is left to do; `lost` bytes were not taken by anybody.
    Finished {
        lost: u64,
    },
}

impl Outgoing {
    pub(super) fn new(source: OwnedFd, sink: OwnedFd, target: String, spill: Option<Spill>) -> Self {
        Self { source: Some(source), sink, spill, target, bytes: 0, last_moved: Instant::now(), draining: false }
    }

    pub(super) fn save(&self, s: &mut Saver) {
        s.optional_fd(self.source.as_ref());
        s.fd(&self.sink);
        s.bool(self.spill.is_some());
        if let Some(spill) = &self.spill {
            s.fd(&spill.file);
            s.u64(spill.limit).i64(spill.head).i64(spill.tail);
        }
        s.str(&self.target).u64(self.bytes).bool(self.draining);
        s.instant(self.last_moved);
    }

    pub(super) fn load(l: &mut Loader<'_, '_>) -> Result<Self, Error> {
        let (source, sink) = (l.optional_fd()?, l.fd()?);
        let spill = if l.bool()? { Some(Spill::load(l)?) } else { None };
        let (target, bytes, draining) = (l.string()?, l.u64()?, l.bool()?);
        Ok(Self { source, sink, spill, target, bytes, draining, last_moved: l.instant()? })
    }

    pub(super) fn source(&self) -> Option<&OwnedFd> {
        self.source.as_ref()
    }

    pub(super) fn sink(&self) -> &OwnedFd {
        &self.sink
    }

    /// Moves what can be moved. `exited`, `deleted`: since when.
    pub(super) fn turn(&mut self, now: Instant, exited: Option<Instant>, deleted: Option<Instant>) -> Turn {
        if deleted.is_some_and(|at| now >= at + DRAIN_AFTER_DELETE) {
            // Somebody may still write, and as fast as it is moved.
            self.source = None;
        } else if let Some(stop) = self.flow() {
            match stop {
                Stop::Turn => return Turn::Again,
                Stop::Idle => {}
                // A terminal may be opened again by another process, as long as there is one.
                Stop::End => {
                    if exited.is_some() || !self.is_terminal() {
                        self.source = None;
                    }
                }
                Stop::Closed => self.source = None,
                Stop::Failed(error) => {
                    warn!(target_path:% = self.target, error:%; "cannot move output, giving it up");
                    self.source = None;
                }
            }
        }
        if self.source.is_some() && self.is_given_up(now, exited, deleted) {
            self.source = None;
        }
        if self.source.is_some() {
            return Turn::Waits;
        }
        if !self.draining {
            match fifo::write_end(&self.sink) {
                Ok(write_end) => self.sink = write_end,
                Err(error) => {
                    warn!(target_path:% = self.target, error:%; "cannot give the read end of a fifo up");
                    return Turn::Finished { lost: self.waiting() };
                }
            }
            self.draining = true;
        }
        self.drain(now, deleted)
    }

    /// Spilled bytes first, then new ones. `None` if there is nothing left to move.
    fn flow(&mut self) -> Option<Stop> {
        if let Some(spill) = &mut self.spill
            && !spill.is_empty()
        {
            let (moved, stop) = spill.empty_into(&self.sink);
            self.count(moved);
            let stop = stop?;
            if let (Stop::Idle, Some(source), Some(spill)) = (&stop, &self.source, &mut self.spill) {
                return Some(spill.fill_from(source));
            }
            return Some(stop);
        }
        let source = self.source.as_ref()?;
        let (moved, stop) = move_bytes(source.as_fd(), self.sink.as_fd(), None, TURN_BYTES);
        let source_waits = waiting_bytes(source.as_fd()).unwrap_or(0) > 0;
        if let (Stop::Idle, true, Some(spill)) = (&stop, source_waits, &mut self.spill) {
            let stop = spill.fill_from(source);
            self.count(moved);
            return Some(stop);
        }
        self.count(moved);
        Some(stop)
    }

    fn count(&mut self, moved: u64) {
        if moved > 0 {
            self.bytes += moved;
            self.last_moved = Instant::now();
        }
    }

    fn is_terminal(&self) -> bool {
        self.source.as_ref().is_some_and(|source| nix::unistd::isatty(source).unwrap_or(false))
    }

    /// Whether the process has ended and whoever still holds its output had their time.
    fn is_given_up(&self, now: Instant, exited: Option<Instant>, deleted: Option<Instant>) -> bool {
        let Some(exited) = exited.or(deleted) else { return false };
        let source_is_empty = self.source.as_ref().is_none_or(|source| waiting_bytes(source.as_fd()).unwrap_or(0) == 0);
        let quiet = now >= self.last_moved.max(exited) + QUIET_AFTER_EXIT;
        source_is_empty && (quiet || now >= exited + LIMIT_AFTER_EXIT)
    }

    /// Only the fifo's content and its reader matter now.
    fn drain(&mut self, now: Instant, deleted: Option<Instant>) -> Turn {
        let left = self.waiting();
        let has_reader = fifo::has_reader(self.sink.as_fd());
        let is_over = match deleted {
            Some(at) => left == 0 || !has_reader || now >= at + DRAIN_AFTER_DELETE,
            None => left == 0 && has_reader,
        };
        if is_over { Turn::Finished { lost: left } } else { Turn::Waits }
    }

    /// Bytes that nobody has taken yet.
    pub(super) fn waiting(&self) -> u64 {
        waiting_bytes(self.sink.as_fd()).unwrap_or(0) as u64 + self.spilled()
    }

    pub(super) fn spilled(&self) -> u64 {
        self.spill.as_ref().map_or(0, Spill::len)
    }

    #[cfg(test)]
    pub(super) fn spill_file(&self) -> Option<&File> {
        self.spill.as_ref().map(|spill| &spill.file)
    }

    /// Whether it waits for its reader to come, or to read: only a look at the fifo tells.
    pub(super) fn is_draining(&self) -> bool {
        self.draining
    }

    /// When the next turn is due though nothing happens, after one at `turned`.
    pub(super) fn deadline(&self, turned: Instant, exited: Option<Instant>, deleted: Option<Instant>) -> Option<Instant> {
        let after_exit = exited.or(deleted).filter(|_| self.source.is_some()).map(|at| {
            let quiet = self.last_moved.max(at) + QUIET_AFTER_EXIT;
            // Past it, the output waits for its reader; the limit is looked at once more, then the reader's edge tells.
            if quiet > turned { quiet } else { at + LIMIT_AFTER_EXIT }
        });
        let after_delete = deleted.map(|at| at + DRAIN_AFTER_DELETE);
        [after_exit, after_delete].into_iter().flatten().filter(|at| *at > turned).min()
    }
}

/// A file that takes output while the fifo is full.
///
/// What was taken out of it is given back to the file system: with a slow reader it is hardly ever empty.
#[derive(Debug)]
pub(super) struct Spill {
    file: File,
    limit: u64,
    head: libc::loff_t,
    tail: libc::loff_t,
    /// What was given back so far.
    given_back: libc::loff_t,
    /// The file system gives nothing back before the file is empty.
    is_solid: bool,
}

impl Spill {
    /// Makes a file without a name in `folder`.
    pub(super) fn new(folder: &Path, limit: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE | libc::O_CLOEXEC).open(folder)?;
        Ok(Self { file, limit, head: 0, tail: 0, given_back: 0, is_solid: false })
    }

    fn load(l: &mut Loader<'_, '_>) -> Result<Self, Error> {
        let (file, limit, head, tail) = (l.fd()?.into(), l.u64()?, l.i64()?, l.i64()?);
        Ok(Self { file, limit, head, tail, given_back: 0, is_solid: false })
    }

    fn len(&self) -> u64 {
        (self.tail - self.head) as u64
    }

    fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    /// Moves spilled bytes on. No stop means that the file is empty again.
    fn empty_into(&mut self, sink: &OwnedFd) -> (u64, Option<Stop>) {
        let limit = (self.len() as usize).min(TURN_BYTES);
        let (moved, stop) = self.copy_into(sink, limit);
        if !self.is_empty() {
            self.give_back();
            return (moved, Some(stop));
        }
        (self.head, self.tail, self.given_back) = (0, 0, 0);
        // The space comes back with the next truncation, if not with this one.
        let _ = self.file.set_len(0);
        (moved, Some(Stop::Turn))
    }

    /// Copies: splice(2) would put the pages of the file themselves into the fifo, and what is given back of the file may change them.
    fn copy_into(&mut self, sink: &OwnedFd, limit: usize) -> (u64, Stop) {
        let mut moved = 0;
        let mut part = vec![0; limit.min(PART_BYTES)];
        while moved < limit {
            let wanted = part.len().min(limit - moved);
            let written = self.file.read_at(&mut part[..wanted], self.head as u64).and_then(|count| match count {
                0 => Err(io::ErrorKind::UnexpectedEof.into()),
                count => Ok(nix::unistd::write(sink, &part[..count])?),
            });
            match written {
                Ok(count) => {
                    moved += count;
                    self.head += count as libc::loff_t;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return (moved as u64, Stop::Idle),
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return (moved as u64, Stop::Closed),
                Err(error) => return (moved as u64, Stop::Failed(error)),
            }
        }
        (moved as u64, Stop::Turn)
    }

    /// Gives back what was copied out of the file.
    fn give_back(&mut self) {
        if self.head >= self.given_back + AT_ONCE_BYTES && !self.is_solid {
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            self.is_solid = fallocate(&self.file, hole, 0, self.head).is_err();
            self.given_back = self.head;
        }
    }

    /// Takes what the process has written, up to the limit.
    fn fill_from(&mut self, source: &OwnedFd) -> Stop {
        let held = if self.is_solid { self.tail as u64 } else { self.len() };
        let room = self.limit.saturating_sub(held).min(TURN_BYTES as u64) as usize;
        if room == 0 {
            return Stop::Idle;
        }
        match move_bytes(source.as_fd(), self.file.as_fd(), Some(&mut self.tail), room) {
            // A full disk: the process waits, as without a file.
            (_, Stop::Failed(_)) => Stop::Idle,
            (_, stop) => stop,
        }
    }
}
