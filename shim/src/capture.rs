//! A pipe that a child writes to, and what it has written.
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

use crate::handover::MAX_OUTPUT_BYTES;
use crate::inbox::{Inbox, READ_BYTES, Read};
use crate::saved::saved;

/// The most bytes of one turn, so that a fast writer does not occupy its reader.
const TURN_BYTES: usize = 256 << 10;

/// A pipe that is read as it fills, so that its writer never waits. Of more than [`MAX_OUTPUT_BYTES`], the end is kept.
#[derive(Debug)]
pub(crate) struct Capture {
    pipe: File,
    input: Inbox,
    /// Every write end was closed.
    closed: bool,
}

saved!(Capture { pipe, input, closed });

impl Capture {
    /// Makes the pipe; returns its write end too, which blocks as a program expects.
    pub(crate) fn new() -> io::Result<(Self, OwnedFd)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok((Self { pipe: read.into(), input: Inbox::default(), closed: false }, write))
    }

    /// Reads what the pipe holds, up to [`TURN_BYTES`]. Returns whether there may be more.
    pub(crate) fn read(&mut self) -> bool {
        let mut left = TURN_BYTES;
        while !self.closed {
            if left == 0 {
                return true;
            }
            left = left.saturating_sub(READ_BYTES);
            match self.input.read(&self.pipe) {
                Ok(Read::Some) => {}
                Ok(Read::Empty) => return false,
                Ok(Read::End) | Err(_) => self.closed = true,
            }
            if self.input.bytes().len() > 2 * MAX_OUTPUT_BYTES {
                self.drop_excess();
            }
        }
        false
    }

    /// Whether anything was read so far.
    pub(crate) fn has_bytes(&self) -> bool {
        !self.input.bytes().is_empty()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.input.bytes()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Reads the rest and closes the pipe. A pipe holds no more than one turn reads, so everything the child wrote is included; descendants
    /// that still write are not waited for.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        let _ = self.read();
        self.drop_excess();
        self.input.bytes().to_vec()
    }

    fn drop_excess(&mut self) {
        self.input.take(self.input.bytes().len().saturating_sub(MAX_OUTPUT_BYTES));
    }
}

impl AsFd for Capture {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}
