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
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use log::warn;
use nix::errno::Errno;
use nix::sys::inotify::WatchDescriptor;

use super::pace::Pace;
use super::process::{Client, Stage};
use super::spill::Spill;
use super::splice::{Stop, TURN_BYTES, move_bytes, move_once};
use super::{Turn, pipes};
use crate::keeper::poll::{Poll, Source};
use crate::saved::saved;
use crate::sys::descriptors::waiting_bytes;

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
    pub(super) pace: Pace,
    pub(super) bytes: u64,
    thrown_away: u64,
}

saved!(Outgoing { source, client, is_narrowed, spill, bytes, thrown_away; watch, pace });

impl Outgoing {
    pub(super) fn new(source: OwnedFd, client: Option<Client>, spill: Option<Spill>) -> Self {
        Self { source: Some(source), client, is_narrowed: false, watch: None, spill, pace: Pace::default(), bytes: 0, thrown_away: 0 }
    }

    /// Watches both ends.
    pub(super) fn register(&self, source: Source, poll: &Poll) -> io::Result<()> {
        if let Some(from) = &self.source {
            poll.add_reader(from, source)?;
        }
        self.client.as_ref().map_or(Ok(()), |client| poll.add_writer(&client.fd, source))
    }

    /// Moves what can be moved.
    pub(super) fn turn(&mut self, stage: Stage, id: Source, now: Instant, poll: &Poll) -> Turn {
        let before = self.bytes;
        let stop = self.flow();
        let may_be_fast = stage <= Stage::Exited && matches!(stop, Some(Stop::Turn | Stop::Idle));
        self.set_pace(self.bytes - before, may_be_fast, id, now, poll);
        match stop {
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
        if let Err(error) = self.narrow_if(stage >= Stage::Draining || self.source.is_none(), id, poll) {
            warn!(stream:% = self.target(), error:%; "cannot close the read end of a fifo");
            return self.finished();
        }
        if self.is_over(stage) { self.finished() } else { Turn::Waits }
    }

    /// Chooses, after a turn that has moved `moved` bytes, whether an event or a timer starts the next turn.
    fn set_pace(&mut self, moved: u64, may_be_fast: bool, id: Source, now: Instant, poll: &Poll) {
        let (source, fifo) = (self.source.as_ref(), self.client.as_ref().filter(|client| client.is_fifo && !self.is_narrowed));
        let fifo = fifo.map(|client| &client.fd);
        if self.pace.is_timed() {
            if may_be_fast && self.pace.go_on(moved) {
                return;
            }
            self.pace.end(source.into_iter().chain(fifo));
            let resumed = source.map_or(Ok(()), |source| poll.resume_reader(source, id));
            if let Err(error) = resumed.and_then(|()| fifo.map_or(Ok(()), |fifo| poll.resume_writer(fifo, id))) {
                warn!(stream:% = self.target(), error:%; "cannot watch an output again");
            }
        } else if let (true, Some(source), Some(fifo)) = (may_be_fast && self.pace.is_fast(moved, now), source, fifo)
            && self.pace.begin([source, fifo])
            && let Err(error) = poll.pause(source, id).and_then(|()| poll.pause(fifo, id))
        {
            warn!(stream:% = self.target(), error:%; "cannot watch an output less");
        }
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
            Stage::Running | Stage::Exited => is_taken && pipes::has_reader(&client.fd),
            Stage::Draining => is_taken || !pipes::has_reader(&client.fd),
            Stage::Over => true,
        }
    }

    fn finished(&self) -> Turn {
        let unread = self.source.as_ref().map_or(0, |source| waiting_bytes(source.as_fd()).unwrap_or(0) as u64);
        // A logger or the worker reads what its pipe holds.
        let is_lent = self.client.as_ref().is_some_and(|client| !client.is_fifo);
        Turn::Finished { lost: self.thrown_away + unread + if is_lent { self.spilled() } else { self.waiting() } }
    }

    /// The fifo, if only its write end is left and it is not watched for readers.
    pub(super) fn unwatched_fifo(&self) -> Option<&OwnedFd> {
        self.client.as_ref().filter(|_| self.is_narrowed && self.watch.is_none()).map(|client| &client.fd)
    }

    /// Closes the read end of the fifo, so that our write end shows whether there are readers.
    fn narrow_if(&mut self, is_due: bool, id: Source, poll: &Poll) -> io::Result<()> {
        if let Some(client) = self.client.as_mut().filter(|client| client.is_fifo && is_due && !self.is_narrowed) {
            client.fd = pipes::write_end(&client.fd)?;
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
        let (moved, stop) = match self.pace.is_timed() {
            true => move_once(source.as_fd(), client.fd.as_fd()),
            false => move_bytes(source.as_fd(), client.fd.as_fd(), None, TURN_BYTES),
        };
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
    pub(super) fn spill_file(&self) -> Option<&std::fs::File> {
        self.spill.as_ref().map(Spill::file)
    }
}
