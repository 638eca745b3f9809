//! One output of a process, moved to the client's fifo or to the pipe of a logger or the worker.
//!
//! ```text
//!  process ──▶ [file, while the fifo is full and spill is allowed] ──▶ fifo ──▶ reader
//! ```
//!
//! The keeper holds both ends of the fifo while the process may write and no Delete waits: a reader that goes away is no error then.
//! Afterwards it holds only the write end, which shows whether there is a reader.
//!
//! **Invariant:** the keeper holds a write end of the fifo until all output was read, or a Delete has waited its full time.
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use log::warn;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use nix::sys::inotify::WatchDescriptor;

use super::splice::{Stop, TURN_BYTES, move_bytes};
use super::{Client, Stage, Turn, fifo};
use crate::keeper::poll::{Poll, Source};
use crate::saved::saved;
use crate::sys::descriptors::waiting_bytes;

/// Bytes copied at once: the capacity of a fifo.
const PART_BYTES: usize = 64 << 10;
/// The smallest hole worth a system call.
const AT_ONCE_BYTES: libc::loff_t = 256 << 10;

/// See the module.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// The process's side, until its last writer has closed it.
    source: Option<OwnedFd>,
    /// Absent for an output whose logger exited: it is discarded, so that the process does not block.
    pub(super) client: Option<Client>,
    /// We hold only the write end of the fifo.
    pub(super) is_narrowed: bool,
    /// The narrowed fifo is watched for readers.
    pub(super) watch: Option<WatchDescriptor>,
    spill: Option<Spill>,
    pub(super) bytes: u64,
    thrown_away: u64,
}

saved!(Outgoing { source, client, is_narrowed, spill, bytes, thrown_away; watch });

impl Outgoing {
    pub(super) fn new(source: OwnedFd, client: Option<Client>, spill: Option<Spill>) -> Self {
        Self { source: Some(source), client, is_narrowed: false, watch: None, spill, bytes: 0, thrown_away: 0 }
    }

    /// Watches both ends.
    pub(super) fn register(&self, source: Source, poll: &Poll) -> io::Result<()> {
        if let Some(from) = &self.source {
            poll.add_reader(from, source)?;
        }
        self.client.as_ref().map_or(Ok(()), |client| poll.add_writer(&client.fd, source))
    }

    /// Moves what can be moved.
    pub(super) fn turn(&mut self, stage: Stage, id: Source, poll: &Poll) -> Turn {
        if let Err(error) = self.narrow_if(stage >= Stage::Draining, id, poll) {
            warn!(stream:% = self.target(), error:%; "cannot close the read end of a fifo");
            return self.finished();
        }
        match self.flow() {
            Some(Stop::Turn) if stage < Stage::Over => return Turn::Again,
            // Another process may open the terminal again, as long as there is one.
            Some(Stop::End) if stage >= Stage::Exited || !self.is_terminal() => self.source = None,
            Some(Stop::Turn | Stop::End | Stop::Idle) | None => {}
            // A fifo without a reader is noticed below; a logger does not come back.
            Some(Stop::Closed) => {
                if self.client.take_if(|client| !client.is_fifo).is_some() {
                    return Turn::Again;
                }
            }
            Some(Stop::Failed(error)) => {
                warn!(stream:% = self.target(), error:%; "cannot move output, dropping it");
                self.source = None;
            }
        }
        if let Err(error) = self.narrow_if(self.source.is_none(), id, poll) {
            warn!(stream:% = self.target(), error:%; "cannot close the read end of a fifo");
            return self.finished();
        }
        if self.is_over(stage) { self.finished() } else { Turn::Waits }
    }

    /// Whether nothing is left to do, or nothing can be done.
    fn is_over(&self, stage: Stage) -> bool {
        let Some(client) = &self.client else { return self.source.is_none() || stage >= Stage::Draining };
        if !client.is_fifo {
            // The logger or the worker holds the other end and reads what the pipe holds.
            return self.source.is_none() || stage == Stage::Over;
        }
        let is_taken = self.source.is_none() && self.waiting() == 0;
        match stage {
            Stage::Running | Stage::Exited => is_taken && fifo::has_reader(client.fd.as_fd()),
            Stage::Draining => is_taken || !fifo::has_reader(client.fd.as_fd()),
            Stage::Over => true,
        }
    }

    fn finished(&self) -> Turn {
        let unread = self.source.as_ref().map_or(0, |source| waiting_bytes(source.as_fd()).unwrap_or(0) as u64);
        // A logger or the worker reads what its pipe holds.
        let is_lent = self.client.as_ref().is_some_and(|client| !client.is_fifo);
        Turn::Finished { lost: self.thrown_away + unread + if is_lent { self.spilled() } else { self.waiting() } }
    }

    /// Closes the read end of the fifo, so that our write end shows whether there are readers.
    fn narrow_if(&mut self, is_due: bool, id: Source, poll: &Poll) -> io::Result<()> {
        if let Some(client) = self.client.as_mut().filter(|client| client.is_fifo && is_due && !self.is_narrowed) {
            client.fd = fifo::write_end(&client.fd)?;
            self.is_narrowed = true;
            poll.add_writer(&client.fd, id)?;
        }
        Ok(())
    }

    /// Spilled bytes first, then new ones. `None` if there is nothing left to move.
    fn flow(&mut self) -> Option<Stop> {
        let Some(client) = &self.client else { return self.throw_away() };
        if let Some(spill) = &mut self.spill
            && !spill.is_empty()
        {
            let (moved, stop) = spill.empty_into(&client.fd);
            self.bytes += moved;
            let stop = stop?;
            if let (Stop::Idle, Some(source)) = (&stop, &self.source) {
                return Some(spill.fill_from(source));
            }
            return Some(stop);
        }
        let source = self.source.as_ref()?;
        let (moved, stop) = move_bytes(source.as_fd(), client.fd.as_fd(), None, TURN_BYTES);
        self.bytes += moved;
        if let (Stop::Idle, Some(spill)) = (&stop, &mut self.spill)
            && waiting_bytes(source.as_fd()).unwrap_or(0) > 0
        {
            return Some(spill.fill_from(source));
        }
        Some(stop)
    }

    /// Reads, since a terminal cannot be spliced to a device.
    fn throw_away(&mut self) -> Option<Stop> {
        let source = self.source.as_ref()?;
        let mut part = [0; 16 << 10];
        let mut read = 0;
        while read < TURN_BYTES {
            match nix::unistd::read(source, &mut part) {
                Ok(0) | Err(Errno::EIO) => return Some(Stop::End),
                Ok(count) => {
                    read += count;
                    self.thrown_away += count as u64;
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Some(Stop::Idle),
                Err(error) => return Some(Stop::Failed(error.into())),
            }
        }
        Some(Stop::Turn)
    }

    fn is_terminal(&self) -> bool {
        self.source.as_ref().is_some_and(|source| nix::unistd::isatty(source).unwrap_or(false))
    }

    pub(super) fn target(&self) -> &str {
        self.client.as_ref().map_or("an output without its logger", |client| &client.target)
    }

    /// Bytes in the fifo or the spill file that no reader has taken yet.
    pub(super) fn waiting(&self) -> u64 {
        self.client.as_ref().map_or(0, |client| waiting_bytes(client.fd.as_fd()).unwrap_or(0) as u64) + self.spilled()
    }

    pub(super) fn spilled(&self) -> u64 {
        self.spill.as_ref().map_or(0, Spill::len)
    }

    #[cfg(test)]
    pub(super) fn spill_file(&self) -> Option<&File> {
        self.spill.as_ref().map(|spill| &spill.file)
    }
}

/// A file that holds output while the fifo is full.
///
/// Its read part is returned to the file system: with a slow reader the file is hardly ever empty.
#[derive(Debug)]
pub(super) struct Spill {
    file: File,
    limit: u64,
    head: libc::loff_t,
    tail: libc::loff_t,
    /// Bytes returned to the file system so far.
    given_back: libc::loff_t,
    /// The file system cannot punch holes: space is returned only when the file is empty.
    is_solid: bool,
}

saved!(Spill { file, limit, head, tail; given_back, is_solid });

impl Spill {
    /// Makes a file without a name in `folder`.
    pub(super) fn new(folder: &Path, limit: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE | libc::O_CLOEXEC).open(folder)?;
        Ok(Self { file, limit, head: 0, tail: 0, given_back: 0, is_solid: false })
    }

    fn len(&self) -> u64 {
        (self.tail - self.head) as u64
    }

    fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    /// Moves spilled bytes to the sink. No stop means that the file is empty again.
    fn empty_into(&mut self, sink: &OwnedFd) -> (u64, Option<Stop>) {
        let limit = (self.len() as usize).min(TURN_BYTES);
        let (moved, stop) = self.copy_into(sink, limit);
        if !self.is_empty() {
            self.give_back();
            return (moved, Some(stop));
        }
        (self.head, self.tail, self.given_back) = (0, 0, 0);
        // The next truncation may succeed if this one fails.
        let _ = self.file.set_len(0);
        (moved, Some(Stop::Turn))
    }

    /// Copies: splice(2) would put the pages of the file into the fifo, and punching a hole may change them.
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

    /// Returns the copied part of the file to the file system.
    fn give_back(&mut self) {
        if self.head >= self.given_back + AT_ONCE_BYTES && !self.is_solid {
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            self.is_solid = fallocate(&self.file, hole, 0, self.head).is_err();
            self.given_back = self.head;
        }
    }

    /// Moves output of the process into the file, up to the limit.
    fn fill_from(&mut self, source: &OwnedFd) -> Stop {
        let held = if self.is_solid { self.tail as u64 } else { self.len() };
        let room = self.limit.saturating_sub(held).min(TURN_BYTES as u64) as usize;
        if room == 0 {
            return Stop::Idle;
        }
        match move_bytes(source.as_fd(), self.file.as_fd(), Some(&mut self.tail), room) {
            // A full disk: the process blocks, as without a file.
            (_, Stop::Failed(_)) => Stop::Idle,
            (_, stop) => stop,
        }
    }
}
