//! A process's stdin, from the client's fifo.
//!
//! ```text
//!  Open ──(CloseIO)──▶ Closing ──(clients' ends closed, fifo empty)──▶ finished: the process reads the end
//!    └──(the process closed it, or exited)──▶ finished: a client that writes gets EPIPE
//! ```
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::process::Client;
use super::splice::{Stop, TURN_BYTES, move_bytes};
use super::{Turn, pipes};
use crate::keeper::poll::{Poll, Source};
use crate::saved::saved;

/// See the module.
#[derive(Debug)]
pub(super) struct Incoming {
    /// Both ends until CloseIO, so that a client that reconnects causes no end of file; then only the read end.
    source: OwnedFd,
    sink: OwnedFd,
    closing: bool,
    pub(super) target: String,
    pub(super) bytes: u64,
}

saved!(Incoming { source, sink, closing, target, bytes });

impl Incoming {
    pub(super) fn new(client: Client, sink: OwnedFd) -> Self {
        Self { source: client.fd, sink, closing: false, target: client.target, bytes: 0 }
    }

    /// Watches both ends.
    pub(super) fn register(&self, source: Source, poll: &Poll) -> io::Result<()> {
        poll.add_reader(&self.source, source)?;
        poll.add_writer(&self.sink, source)
    }

    /// Moves what can be moved.
    pub(super) fn turn(&mut self) -> Turn {
        let (moved, stop) = move_bytes(self.source.as_fd(), self.sink.as_fd(), None, TURN_BYTES);
        self.bytes += moved;
        match stop {
            Stop::Idle => Turn::Waits,
            Stop::Turn => Turn::Again,
            Stop::End if self.closing => Turn::Finished { lost: 0 },
            // We hold a write end ourselves, so this is a terminal that no process has open at the moment.
            Stop::End => Turn::Waits,
            Stop::Closed | Stop::Failed(_) => Turn::Finished { lost: 0 },
        }
    }

    /// CloseIO: returns the descriptor to watch from now on; none if it was closed before.
    pub(super) fn close(&mut self) -> io::Result<Option<&OwnedFd>> {
        if self.closing {
            return Ok(None);
        }
        self.source = pipes::read_end(&self.source)?;
        self.closing = true;
        Ok(Some(&self.source))
    }
}
