//! The streams of one process: the ends of its pipes or its terminal, and the client's side of them.
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use super::incoming::Incoming;
use super::outgoing::Outgoing;
use super::pipes;
use super::spill::Spill;
use crate::handover::{Cause, Output, Stdio, Step, Stream};
use crate::keeper::poll::{Poll, Source};
use crate::saved::saved;
use crate::sys;

/// The target of streams that a logger or the worker reads itself.
pub(super) const LENT: &str = "a reader of its own";

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Process {
    pub(super) key: String,
    /// The process's ends, until they were given to it.
    pub(super) process_ends: [Option<OwnedFd>; 3],
    /// Read ends for loggers or the worker, by stream.
    pub(super) read_ends: [Option<OwnedFd>; 3],
    /// The streams that the keeper moves or watches.
    pub(super) pumps: [Option<Pump>; 3],
    /// The client's side of a terminal, until it arrives.
    pub(super) clients: [Option<Client>; 3],
    pub(super) terminal: Option<OwnedFd>,
    pub(super) wants_terminal: bool,
    pub(super) size: Option<(u16, u16)>,
    pub(super) stdin_closed: bool,
    pub(super) spill_bytes: u64,
    pub(super) spill_folder: String,
    pub(super) exited: bool,
    /// Set by the first Delete.
    pub(super) drain_until: Option<Instant>,
    /// Drain operations that wait for an outcome.
    pub(super) waiting: Vec<(Cause, Step)>,
    /// The process is deleted: its key may be used again.
    pub(super) released: bool,
}

saved! {
    Process {
        key, process_ends, read_ends, pumps, clients, terminal, wants_terminal, size, stdin_closed, spill_bytes, spill_folder, exited,
        drain_until, waiting, released
    }
}

/// The client of a stream.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) fd: OwnedFd,
    pub(super) target: String,
    /// Otherwise it is the pipe to a logger or the worker.
    pub(super) is_fifo: bool,
}

saved!(Client { fd, target, is_fifo });

#[derive(Debug)]
pub(super) enum Pump {
    Out(Outgoing),
    In(Incoming),
    /// A copy of the read end of a logger's or the worker's pipe, held while a Delete waits to notice when the last writer is gone.
    Held(OwnedFd),
}

saved!(enum Pump { 0 => Out, 1 => In, 2 => Held });

/// The phase of a process, as far as it concerns its streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    Running,
    Exited,
    /// A Delete waits, or has been answered without waiting.
    Draining,
    /// It has waited long enough.
    Over,
}

impl Process {
    /// Opens the client's fifos, makes the pipes, and starts to move bytes.
    pub(super) fn open(stdio: &Stdio, number: u32, poll: &mut Poll) -> Result<Self, (String, io::Error)> {
        let open = |path: &String| match pipes::open_fifo(path) {
            Ok(fd) => Ok(Some(Client { fd, target: path.clone(), is_fifo: true })),
            Err(error) => Err((format!("open fifo {path}"), error)),
        };
        let client_of = |output: &Output| match output {
            Output::Fifo(path) => open(path),
            Output::None | Output::Pipe => Ok(None),
        };
        let stdin = stdio.stdin.as_ref().map_or(Ok(None), open)?;
        let process = Self {
            key: stdio.key.clone(),
            clients: [stdin, client_of(&stdio.stdout)?, client_of(&stdio.stderr)?],
            wants_terminal: stdio.terminal,
            spill_bytes: stdio.spill_bytes,
            spill_folder: stdio.spill_folder.clone(),
            ..Self::default()
        };
        process.with_ends(stdio, number, poll).map_err(|error| (format!("make a pipe for {}", stdio.key), error))
    }

    /// Makes the pipes of the process, or of its terminal.
    fn with_ends(mut self, stdio: &Stdio, number: u32, poll: &mut Poll) -> io::Result<Self> {
        let owner = (stdio.uid, stdio.gid);
        if stdio.terminal {
            // The terminal's one output goes to stdout; a logger or the worker reads it through a pipe.
            if stdio.stdout == Output::Pipe {
                let (read, fd) = pipes::make(owner)?;
                pipes::set_nonblocking(&fd)?;
                self.read_ends[1] = Some(read);
                self.clients[1] = Some(Client { fd, target: LENT.into(), is_fifo: false });
            }
            return Ok(self);
        }
        for (index, is_pipe) in [false, stdio.stdout == Output::Pipe, stdio.stderr == Output::Pipe].into_iter().enumerate() {
            let client = self.clients[index].take();
            if !is_pipe && client.is_none() {
                continue;
            }
            let (read, write) = pipes::make(owner)?;
            let (process_end, our_end) = if index == Stream::Stdin as usize { (read, write) } else { (write, read) };
            self.process_ends[index] = Some(process_end);
            match client {
                Some(client) => {
                    pipes::set_nonblocking(&our_end)?;
                    self.start(index, our_end, client, number, poll)?;
                }
                None => self.read_ends[index] = Some(our_end),
            }
        }
        Ok(self)
    }

    pub(super) fn attach(&mut self, terminal: OwnedFd, number: u32, poll: &mut Poll) -> io::Result<()> {
        pipes::set_nonblocking(&terminal)?;
        if let Some((rows, columns)) = self.size {
            sys::terminal::resize(terminal.as_fd(), rows, columns)?;
        }
        for index in [1, 0] {
            if let Some(client) = self.clients[index].take() {
                self.start(index, sys::descriptors::duplicate(&terminal)?, client, number, poll)?;
            }
        }
        self.terminal = Some(terminal);
        Ok(())
    }

    /// Starts to move bytes between our end of a process's stream and its client.
    fn start(&mut self, index: usize, our_end: OwnedFd, client: Client, number: u32, poll: &mut Poll) -> io::Result<()> {
        let pump = if index == Stream::Stdin as usize {
            Pump::In(Incoming::new(client, our_end))
        } else {
            let spill = (self.spill_bytes > 0).then(|| Spill::new(Path::new(&self.spill_folder), self.spill_bytes)).transpose()?;
            Pump::Out(Outgoing::new(our_end, Some(client), spill))
        };
        self.pumps[index] = Some(pump.registered(number, index, poll)?);
        Ok(())
    }

    pub(super) fn stage(&self, now: Instant) -> Stage {
        match self.drain_until {
            Some(until) if until <= now => Stage::Over,
            Some(_) => Stage::Draining,
            None if self.exited => Stage::Exited,
            None => Stage::Running,
        }
    }

    pub(super) fn is_finished(&self) -> bool {
        self.pumps.iter().all(Option::is_none)
    }
}

impl Pump {
    /// Watches its ends and schedules a first turn.
    pub(super) fn registered(self, number: u32, stream: usize, poll: &mut Poll) -> io::Result<Self> {
        let source = source_of(number, stream);
        match &self {
            Self::Out(out) => out.register(source, poll)?,
            Self::In(input) => input.register(source, poll)?,
            Self::Held(end) => poll.add_reader(end, source)?,
        }
        poll.again(source);
        Ok(self)
    }
}

pub(super) fn source_of(number: u32, stream: usize) -> Source {
    Source::Stream(number << 2 | stream as u32)
}
