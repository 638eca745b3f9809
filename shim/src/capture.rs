//! A pipe that a child writes to, and what it has written.
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

use crate::handover::MAX_OUTPUT_BYTES;
use crate::inbox::{READ_BYTES, Read, read_some};
use crate::saved::saved;

/// The most bytes of one turn, so that a fast writer does not occupy its reader.
const TURN_BYTES: usize = 256 << 10;

/// A pipe that is read as it fills, so that its writer never waits. Of more than [`MAX_OUTPUT_BYTES`], the end is kept.
#[derive(Debug)]
pub(crate) struct Capture {
    pipe: File,
    bytes: Vec<u8>,
    /// Every write end was closed.
    closed: bool,
}

saved!(Capture { pipe, bytes, closed });

impl Capture {
    /// Makes the pipe; returns its write end too, which blocks as a program expects.
    pub(crate) fn new() -> io::Result<(Self, OwnedFd)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok((Self { pipe: read.into(), bytes: Vec::new(), closed: false }, write))
    }

    /// Reads what the pipe holds, up to [`TURN_BYTES`]. Returns whether there may be more.
    pub(crate) fn read(&mut self) -> bool {
        let mut left = TURN_BYTES;
        while !self.closed {
            if left == 0 {
                return true;
            }
            left = left.saturating_sub(READ_BYTES);
            match read_some(&self.pipe, &mut self.bytes) {
                Ok(Read::Some) => {}
                Ok(Read::Empty) => return false,
                Ok(Read::End) | Err(_) => self.closed = true,
            }
            if self.bytes.len() > 2 * MAX_OUTPUT_BYTES {
                self.bytes.drain(..self.bytes.len() - MAX_OUTPUT_BYTES);
            }
        }
        false
    }

    /// Whether anything was read so far.
    pub(crate) fn has_bytes(&self) -> bool {
        !self.bytes.is_empty()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Reads the rest and closes the pipe. A pipe holds no more than one turn reads, so everything the child wrote is included; descendants
    /// that still write are not waited for.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        let _ = self.read();
        let excess = self.bytes.len().saturating_sub(MAX_OUTPUT_BYTES);
        self.bytes.drain(..excess);
        self.bytes
    }
}

impl AsFd for Capture {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}
