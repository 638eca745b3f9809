//! A file that holds output while the client's fifo is full.
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;

use super::splice::{Stop, TURN_BYTES, move_bytes};
use crate::saved::saved;

/// Bytes copied at once: the capacity of a fifo.
const PART_BYTES: usize = 64 << 10;
/// The smallest hole worth a system call.
const AT_ONCE_BYTES: libc::loff_t = 256 << 10;

/// See the module. Its read part is returned to the file system: with a slow reader the file is hardly ever empty.
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

    pub(super) fn len(&self) -> u64 {
        (self.tail - self.head) as u64
    }

    pub(super) fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    /// Moves spilled bytes to the sink. No stop means that the file is empty again.
    pub(super) fn empty_into(&mut self, sink: &OwnedFd) -> (u64, Option<Stop>) {
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
    pub(super) fn fill_from(&mut self, source: &OwnedFd) -> Stop {
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

    #[cfg(test)]
    pub(super) fn file(&self) -> &File {
        &self.file
    }
}
