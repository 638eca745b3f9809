//! What a helper writes: its log, its output, its sign that it is ready.
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use super::inbox::{Read, read_some};
use super::poll::{Poll, Source};
use crate::handover::MAX_OUTPUT_BYTES;

/// A pipe that is read as it fills, so that its writer never waits. Of more than [`MAX_OUTPUT_BYTES`], the end is kept.
#[derive(Debug)]
pub(crate) struct Capture {
    pipe: File,
    bytes: Vec<u8>,
    /// Every write end was closed.
    closed: bool,
}

impl Capture {
    /// Makes the pipe; returns its write end too, which blocks as a program expects.
    pub(crate) fn new() -> io::Result<(Self, OwnedFd)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        nix::fcntl::fcntl(&read, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok((Self { pipe: read.into(), bytes: Vec::new(), closed: false }, write))
    }

    /// Reads from a pipe that does not block.
    pub(crate) fn from_pipe(pipe: OwnedFd) -> Self {
        Self { pipe: pipe.into(), bytes: Vec::new(), closed: false }
    }

    pub(crate) fn watch(&self, poll: &Poll, source: Source) -> io::Result<()> {
        poll.add_reader(&self.pipe, source)
    }

    /// Takes what is there.
    pub(crate) fn read(&mut self) {
        while !self.closed {
            match read_some(&self.pipe, &mut self.bytes) {
                Ok(Read::Some) => {}
                Ok(Read::Empty) => return,
                Ok(Read::End) | Err(_) => self.closed = true,
            }
            if self.bytes.len() > 2 * MAX_OUTPUT_BYTES {
                self.bytes.drain(..self.bytes.len() - MAX_OUTPUT_BYTES);
            }
        }
    }

    /// What was read so far is not empty.
    pub(crate) fn has_bytes(&self) -> bool {
        !self.bytes.is_empty()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Takes what is left and gives up.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.read();
        let excess = self.bytes.len().saturating_sub(MAX_OUTPUT_BYTES);
        self.bytes.drain(..excess);
        self.bytes
    }
}
