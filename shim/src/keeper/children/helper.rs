//! A helper that the keeper has started, or a performer that it has forked, and what it leaves: an outcome, and perhaps a terminal.
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use log::{debug, warn};

use super::Found;
use crate::handover::{Cause, Exited, Outcome, Step, Stream};
use crate::helper::Pipes;
use crate::keeper::poll::Poll;
use crate::keeper::streams::Streams;
use crate::saved::saved;
use crate::sys::{self, spawn::Failure};

/// A process that the keeper started.
#[derive(Debug)]
pub(super) struct Helper {
    pub(super) cause: Cause,
    pub(super) step: Step,
    pub(super) key: String,
    pub(super) program: String,
    /// Absent for a performer, which executes nothing.
    pub(super) failure: Option<Failure>,
    pub(super) pipes: Pipes,
    /// The outcome was reported already.
    pub(super) reported: bool,
    pub(super) console: Option<Console>,
    /// Outputs that it reads, and that the keeper must take over when it exits.
    pub(super) reads: Vec<(String, Stream)>,
    /// Where a performer sends the terminal of its process.
    pub(super) terminal: Option<OwnedFd>,
    /// Its outcome is a report: it has nothing left to do then but its exit, which takes a while. After a re-exec, its exit is waited for all the same.
    pub(super) is_done_by_report: bool,
}

saved!(Helper { cause, step, key, program, failure, pipes, reported, console, reads, terminal; is_done_by_report });

/// Where a runtime delivers a terminal.
#[derive(Debug)]
pub(super) struct Console {
    listener: UnixListener,
    path: PathBuf,
}

saved!(Console { listener, path });

impl Drop for Console {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Helper {
    /// Adds the outcome of a helper that exited.
    pub(super) fn finish(mut self, status: u32, streams: &mut Streams, poll: &mut Poll, found: &mut Vec<Found>) {
        for (key, stream) in std::mem::take(&mut self.reads) {
            found.push(Found::ReaderGone { key, stream });
        }
        if self.reported {
            debug!(program:% = self.program, status; "helper exited");
            return;
        }
        found.push(self.outcome(status, streams, poll));
    }

    /// The outcome of a helper that has nothing left to do, with the terminal that it has sent.
    pub(super) fn outcome(&mut self, status: u32, streams: &mut Streams, poll: &mut Poll) -> Found {
        let outcome = if let Some(error) = self.failure.take().and_then(Failure::error) {
            Outcome::Failed { errno: error.raw_os_error().unwrap_or_default(), what: format!("execute {}", self.program) }
        } else {
            let sent = self.terminal.take().and_then(|socket| receive_terminal(socket.as_fd()));
            let terminal = sent.or_else(|| self.console.take().and_then(|console| console.receive()));
            let terminal = terminal.is_some_and(|terminal| streams.attach(&self.key, terminal, poll));
            let (log, output) = std::mem::take(&mut self.pipes).finish();
            Outcome::Exited(Exited { status, log, output, terminal })
        };
        Found::Outcome { cause: self.cause, step: self.step, outcome }
    }
}

impl Console {
    pub(super) fn listen(path: &str) -> io::Result<Self> {
        let path = PathBuf::from(path);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    /// The terminal that was delivered, if one was.
    fn receive(&self) -> Option<OwnedFd> {
        let (socket, _) = self.listener.accept().ok()?;
        receive_terminal(socket.as_fd())
    }
}

fn receive_terminal(socket: BorrowedFd<'_>) -> Option<OwnedFd> {
    let mut name = [0; 4096];
    let (_, terminal) = sys::descriptors::receive(socket, &mut name)
        .inspect_err(|error| warn!(error:%; "cannot receive a terminal from the console socket"))
        .ok()?;
    terminal
}
