//! The streams of the containers' processes.
//!
//! Owns the pipes and terminals of every process and the client's side of them, and moves bytes between them with splice(2). Loggers and
//! the worker receive the read ends of the outputs that they read themselves.
//!
//! ```text
//!  Running ──(exit)──▶ Exited ──(Delete)──▶ Draining ──(10 s)──▶ Over
//!                                 all read, or no reader: finished
//! ```
//!
//! Output of the process's descendants belongs to the process: an output ends when its last writer has closed it. Only a Delete limits
//! that wait.
//!
//! **Invariant:** the work of a turn depends only on the streams that are due: they are looked up by number or key, never searched for.
//!
//! **Invariant:** no client can block the keeper: every descriptor here is non-blocking, every turn bounded.
mod fifo;
mod incoming;
mod outgoing;
mod spill;
mod splice;
mod watches;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use log::{info, warn};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::unistd::{Gid, Uid, fchown, pipe2};

use self::incoming::Incoming;
use self::outgoing::Outgoing;
use self::spill::Spill;
use self::watches::Watches;
use super::poll::{Poll, Source};
use crate::handover::{Cause, Output, Stdio, Step, Stream, StreamSnapshot};
use crate::saved::saved;
use crate::sys;

/// How long a Delete waits until the output is read and its last writer is gone, as containerd's own shim does; up to [`CHECK_EVERY`] less while
/// other outputs are checked.
const DRAIN_WITHIN: Duration = Duration::from_secs(10);
/// How often to check an output that drains, and one whose readers inotify does not report: no instances left, or splices on an old kernel.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// The streams of one process.
#[derive(Debug, Default)]
struct Entry {
    key: String,
    /// The process's ends, until they were given to it.
    process_ends: [Option<OwnedFd>; 3],
    /// Read ends for loggers or the worker, by stream.
    read_ends: [Option<OwnedFd>; 3],
    /// The streams that the keeper moves or watches.
    pumps: [Option<Pump>; 3],
    /// The client's side of a terminal, until it arrives.
    clients: [Option<Client>; 3],
    terminal: Option<OwnedFd>,
    wants_terminal: bool,
    size: Option<(u16, u16)>,
    stdin_closed: bool,
    spill_bytes: u64,
    spill_folder: String,
    exited: bool,
    /// Set by the first Delete.
    drain_until: Option<Instant>,
    /// Drain operations that wait for an outcome.
    waiting: Vec<(Cause, Step)>,
    /// The process is deleted: its key may be used again.
    released: bool,
}

saved! {
    Entry {
        key, process_ends, read_ends, pumps, clients, terminal, wants_terminal, size, stdin_closed, spill_bytes, spill_folder, exited,
        drain_until, waiting, released
    }
}

/// The client of a stream.
#[derive(Debug)]
struct Client {
    fd: OwnedFd,
    target: String,
    /// Otherwise it is the pipe to a logger or the worker.
    is_fifo: bool,
}

saved!(Client { fd, target, is_fifo });

#[derive(Debug)]
enum Pump {
    Out(Outgoing),
    In(Incoming),
    /// A copy of the read end of a logger's or the worker's pipe, held while a Delete waits to notice when the last writer is gone.
    Held(OwnedFd),
}

saved!(enum Pump { 0 => Out, 1 => In, 2 => Held });

/// The phase of a process, as far as it concerns its streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Running,
    Exited,
    /// A Delete waits, or has been answered without waiting.
    Draining,
    /// It has waited long enough.
    Over,
}

/// The result of a turn of a pump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Waits,
    /// It stopped to give other streams their turn.
    Again,
    /// Nothing is left to do; no reader took `lost` bytes.
    Finished {
        lost: u64,
    },
}

/// All streams.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    last_number: u32,
    /// By number. A stream's own number, as in [`Source::Stream`], is that of its entry times 4 and its place in it.
    entries: BTreeMap<u32, Entry>,
    /// The numbers of the processes that are not released.
    numbers: BTreeMap<String, u32>,
    /// Drain operations that are finished.
    drained: Vec<(Cause, Step)>,
    watches: Watches,
    /// Streams that are checked every second, and when next.
    checked: BTreeSet<u32>,
    check_at: Option<Instant>,
    /// Counters of pumps that are finished: bytes from processes, bytes lost.
    pub(crate) bytes_moved: u64,
    pub(crate) bytes_lost: u64,
}

saved!(Streams { last_number, entries, bytes_moved, bytes_lost; numbers, drained, watches, checked, check_at });

impl Streams {
    /// Resumes after a re-exec. The content of the pipes stays there.
    pub(crate) fn resume(&mut self, poll: &mut Poll) -> io::Result<()> {
        for (number, entry) in &mut self.entries {
            for (index, slot) in entry.pumps.iter_mut().enumerate() {
                *slot = slot.take().map(|pump| pump.registered(*number, index, poll)).transpose()?;
            }
            if !entry.released {
                self.numbers.insert(entry.key.clone(), *number);
            }
        }
        Ok(())
    }

    /// Makes the streams of a process.
    ///
    /// Errors: the first failure; then nothing was made. EEXIST if the key has streams already.
    pub(crate) fn open(&mut self, stdio: Stdio, poll: &mut Poll) -> Result<(), (String, io::Error)> {
        let key = stdio.key.clone();
        if self.numbers.contains_key(&key) {
            return Err((format!("make streams of {key}"), Errno::EEXIST.into()));
        }
        let open = |path: &String| {
            let opened = fifo::open(path).map(|fd| Client { fd, target: path.clone(), is_fifo: true });
            opened.map_err(|error| (format!("open fifo {path}"), error))
        };
        let client_of = |output: &Output| match output {
            Output::Fifo(path) => open(path).map(Some),
            Output::None | Output::Pipe => Ok(None),
        };
        let clients = [stdio.stdin.as_ref().map(open).transpose()?, client_of(&stdio.stdout)?, client_of(&stdio.stderr)?];
        let entry = Entry {
            key: key.clone(),
            clients,
            wants_terminal: stdio.terminal,
            spill_bytes: stdio.spill_bytes,
            spill_folder: stdio.spill_folder.clone(),
            ..Entry::default()
        };
        let number = self.free_number();
        let entry = entry.with_ends(&stdio, number, poll).map_err(|error| (format!("make a pipe for {key}"), error))?;
        self.entries.insert(number, entry);
        self.numbers.insert(key, number);
        Ok(())
    }

    fn free_number(&mut self) -> u32 {
        loop {
            self.last_number = (self.last_number + 1) % (1 << 30);
            if !self.entries.contains_key(&self.last_number) {
                return self.last_number;
            }
        }
    }

    /// The process's end of a stream: given once. `None` where it has none.
    pub(crate) fn take_process_end(&mut self, key: &str, stream: Stream) -> Option<OwnedFd> {
        self.find(key)?.1.process_ends[stream as usize].take()
    }

    /// A copy of the end that a logger or the worker reads.
    pub(crate) fn read_end(&mut self, key: &str, stream: Stream) -> io::Result<OwnedFd> {
        match self.find(key).and_then(|(_, entry)| entry.read_ends[stream as usize].as_ref()) {
            Some(end) => sys::descriptors::duplicate(end),
            None => Err(Errno::ENOENT.into()),
        }
    }

    /// Takes over the terminal of a process. Returns whether the process was to have one.
    pub(crate) fn attach(&mut self, key: &str, terminal: OwnedFd, poll: &mut Poll) -> bool {
        let Some((number, entry)) = self.find(key) else { return false };
        if !entry.wants_terminal || entry.terminal.is_some() {
            return false;
        }
        if let Err(error) = entry.attach(terminal, number, poll) {
            warn!(container:% = key, error:%; "cannot take over a terminal");
            return false;
        }
        if entry.stdin_closed {
            self.close_stdin(key, poll);
        }
        true
    }

    /// CloseIO: the client will write no more.
    pub(crate) fn close_stdin(&mut self, key: &str, poll: &mut Poll) {
        let Some((number, entry)) = self.find(key) else { return };
        entry.stdin_closed = true;
        let source = source_of(number, 0);
        let Some(Pump::In(input)) = &mut entry.pumps[Stream::Stdin as usize] else { return };
        match input.close() {
            Ok(Some(fifo)) => {
                if let Err(error) = poll.add_reader(fifo, source) {
                    warn!(container:% = key, error:%; "cannot watch stdin");
                }
                poll.again(source);
            }
            Ok(None) => {}
            Err(error) => warn!(container:% = key, error:%; "cannot close stdin"),
        }
    }

    /// Sets a terminal's size, now or as soon as it arrives.
    ///
    /// Errors: ENOTTY for a process without one, ENOENT for no process.
    pub(crate) fn resize(&mut self, key: &str, rows: u16, columns: u16) -> io::Result<()> {
        let Some((_, entry)) = self.find(key) else { return Err(Errno::ENOENT.into()) };
        if !entry.wants_terminal {
            return Err(Errno::ENOTTY.into());
        }
        entry.size = Some((rows, columns));
        match &entry.terminal {
            Some(terminal) => sys::terminal::resize(terminal.as_fd(), rows, columns),
            None => Ok(()),
        }
    }

    /// A process exited: its output and that of its descendants is still moved.
    pub(crate) fn exited(&mut self, key: &str, poll: &mut Poll) {
        let Some((number, entry)) = self.find(key) else { return };
        entry.exited = true;
        entry.process_ends = Default::default();
        self.finish(number, Stream::Stdin as usize, 0);
        for stream in [Stream::Stdout, Stream::Stderr] {
            poll.again(source_of(number, stream as usize));
        }
    }

    /// A Delete waits until the output is read and its last writer is gone, or there is no reader.
    pub(crate) fn drain(&mut self, key: &str, waiting: (Cause, Step), now: Instant, poll: &mut Poll) {
        let Some((number, entry)) = self.find(key) else { return self.drained.push(waiting) };
        entry.waiting.push(waiting);
        for stream in [1, 2] {
            if let (Some(end), None) = (&entry.read_ends[stream], &entry.pumps[stream]) {
                let held = sys::descriptors::duplicate(end).and_then(|end| Pump::Held(end).registered(number, stream, poll));
                match held {
                    Ok(held) => entry.pumps[stream] = Some(held),
                    Err(error) => warn!(container:% = key, error:%; "cannot watch an output for its end"),
                }
            }
        }
        self.begin_drain(number, now, poll);
    }

    /// A process is deleted. A connected reader still receives the rest, within the time of a drain.
    pub(crate) fn release(&mut self, key: &str, now: Instant, poll: &mut Poll) {
        let Some(number) = self.numbers.remove(key) else { return };
        let Some(entry) = self.entries.get_mut(&number) else { return };
        entry.released = true;
        entry.read_ends = Default::default();
        entry.clients = Default::default();
        self.begin_drain(number, now, poll);
    }

    fn begin_drain(&mut self, number: u32, now: Instant, poll: &mut Poll) {
        let Some(entry) = self.entries.get_mut(&number) else { return };
        // Its last check is its end.
        let first_check = self.check_at.unwrap_or(now + CHECK_EVERY);
        entry.drain_until.get_or_insert(first_check + DRAIN_WITHIN - CHECK_EVERY);
        entry.process_ends = Default::default();
        self.finish(number, Stream::Stdin as usize, 0);
        for id in [1, 2].map(|stream| number << 2 | stream) {
            self.turn(id, now, poll);
        }
        self.settle(number);
    }

    /// The logger of an output exited: discards the output from now on, so that the process does not block.
    pub(crate) fn reader_gone(&mut self, key: &str, stream: Stream, poll: &mut Poll) {
        let Some((number, entry)) = self.find(key) else { return };
        let Some(end) = entry.read_ends[stream as usize].take() else { return };
        if !entry.exited {
            warn!(container:% = key, stream:?; "the logger exited before the process, discarding its output");
        }
        // A terminal's stream notices by itself: its pipe is broken now.
        if !entry.wants_terminal {
            let pump =
                set_nonblocking(&end).and_then(|()| Pump::Out(Outgoing::new(end, None, None)).registered(number, stream as usize, poll));
            match pump {
                Ok(pump) => entry.pumps[stream as usize] = Some(pump),
                Err(error) => warn!(container:% = key, error:%; "cannot take over an output from its logger"),
            }
        }
        poll.again(source_of(number, stream as usize));
    }

    /// Moves bytes of one stream.
    pub(crate) fn turn(&mut self, id: u32, now: Instant, poll: &mut Poll) {
        let (number, stream, source) = (id >> 2, (id & 3) as usize, Source::Stream(id));
        let Some(entry) = self.entries.get_mut(&number) else { return };
        let stage = entry.stage(now);
        let Some(pump) = entry.pumps.get_mut(stream).and_then(Option::as_mut) else { return };
        let turn = match pump {
            Pump::Out(out) => out.turn(stage, source, poll),
            Pump::In(input) => input.turn(),
            Pump::Held(end) if stage == Stage::Over || entry.read_ends[stream].is_none() || is_ended(end) => Turn::Finished { lost: 0 },
            Pump::Held(_) => Turn::Waits,
        };
        match turn {
            Turn::Again => poll.again(source),
            Turn::Finished { lost } => {
                self.finish(number, stream, lost);
                self.settle(number);
            }
            Turn::Waits => {
                let mut is_checked = stage >= Stage::Draining;
                if let Pump::Out(out) = pump
                    && let Some(fifo) = out.unwatched_fifo().filter(|_| !self.checked.contains(&id))
                {
                    match self.watches.add(fifo, id, poll) {
                        Ok(watch) => out.watch = Some(watch),
                        Err(error) => {
                            warn!(error:%; "cannot watch a fifo, checking it every second");
                            is_checked = true;
                        }
                    }
                    // Another turn catches what happened before the watch.
                    poll.again(source);
                }
                if is_checked {
                    self.checked.insert(id);
                    self.check_at.get_or_insert(now + CHECK_EVERY);
                }
            }
        }
    }

    /// A fifo was opened or read from.
    pub(crate) fn fifos_touched(&mut self, poll: &mut Poll) {
        self.watches.touched(poll);
    }

    /// Ends a pump.
    fn finish(&mut self, number: u32, stream: usize, lost: u64) {
        let Some(pump) = self.entries.get_mut(&number).and_then(|entry| entry.pumps[stream].take()) else { return };
        let id = number << 2 | stream as u32;
        self.checked.remove(&id);
        if let Pump::Out(out) = &pump {
            self.bytes_moved += out.bytes;
            if let Some(watch) = out.watch {
                self.watches.remove(watch, id);
            }
            if lost > 0 {
                self.bytes_lost += lost;
                info!(stream:% = out.target(), bytes = lost; "dropping output that no reader took");
            }
        }
    }

    /// Once all streams of a process are finished: completes the drains that wait, and forgets the process if it is deleted.
    fn settle(&mut self, number: u32) {
        let Some(entry) = self.entries.get_mut(&number).filter(|entry| entry.is_finished()) else { return };
        self.drained.append(&mut entry.waiting);
        if entry.released {
            self.entries.remove(&number);
        }
    }

    /// Gives another turn to the streams that are due. Returns the drain operations that are finished.
    pub(crate) fn tick(&mut self, now: Instant, poll: &mut Poll) -> Vec<(Cause, Step)> {
        if self.check_at.take_if(|at| *at <= now).is_some() {
            for id in self.checked.clone() {
                self.turn(id, now, poll);
            }
            self.check_at = (!self.checked.is_empty()).then_some(now + CHECK_EVERY);
        }
        std::mem::take(&mut self.drained)
    }

    /// When [`Streams::tick`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.check_at
    }

    /// Whether every stream of a deleted process is finished.
    pub(crate) fn is_drained(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether readers have taken all output so far.
    pub(crate) fn all_is_read(&self) -> bool {
        let mut pumps = self.entries.values().flat_map(|entry| &entry.pumps);
        pumps.all(|pump| !matches!(pump, Some(Pump::Out(out)) if out.waiting() > 0))
    }

    pub(crate) fn snapshot(&self) -> Vec<StreamSnapshot> {
        let mut snapshots = Vec::new();
        for entry in self.entries.values() {
            for (index, name) in ["stdin", "stdout", "stderr"].into_iter().enumerate() {
                let (target, bytes, waiting_bytes, spilled_bytes) = match &entry.pumps[index] {
                    Some(Pump::Out(out)) => (out.target(), out.bytes, out.waiting(), out.spilled()),
                    Some(Pump::In(input)) => (input.target.as_str(), input.bytes, 0, 0),
                    Some(Pump::Held(_)) => (LENT, 0, 0, 0),
                    None if entry.read_ends[index].is_some() => (LENT, 0, 0, 0),
                    None => continue,
                };
                let (key, stream, target) = (entry.key.clone(), name.into(), target.into());
                snapshots.push(StreamSnapshot { key, stream, target, bytes, waiting_bytes, spilled_bytes });
            }
        }
        snapshots
    }

    fn find(&mut self, key: &str) -> Option<(u32, &mut Entry)> {
        let number = *self.numbers.get(key)?;
        Some((number, self.entries.get_mut(&number)?))
    }
}

impl Entry {
    /// Makes the pipes of the process, or of its terminal, and starts to move bytes.
    fn with_ends(mut self, stdio: &Stdio, number: u32, poll: &mut Poll) -> io::Result<Self> {
        let owner = (stdio.uid, stdio.gid);
        if stdio.terminal {
            // The terminal's one output goes to stdout; a logger or the worker reads it through a pipe.
            if stdio.stdout == Output::Pipe {
                let (read, fd) = pipe(owner)?;
                set_nonblocking(&fd)?;
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
            let (read, write) = pipe(owner)?;
            let (process_end, our_end) = if index == Stream::Stdin as usize { (read, write) } else { (write, read) };
            self.process_ends[index] = Some(process_end);
            match client {
                Some(client) => {
                    set_nonblocking(&our_end)?;
                    self.start(index, our_end, client, number, poll)?;
                }
                None => self.read_ends[index] = Some(our_end),
            }
        }
        Ok(self)
    }

    fn attach(&mut self, terminal: OwnedFd, number: u32, poll: &mut Poll) -> io::Result<()> {
        set_nonblocking(&terminal)?;
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

    fn stage(&self, now: Instant) -> Stage {
        match self.drain_until {
            Some(until) if until <= now => Stage::Over,
            Some(_) => Stage::Draining,
            None if self.exited => Stage::Exited,
            None => Stage::Running,
        }
    }

    fn is_finished(&self) -> bool {
        self.pumps.iter().all(Option::is_none)
    }
}

impl Pump {
    /// Watches its ends and schedules a first turn.
    fn registered(self, number: u32, stream: usize, poll: &mut Poll) -> io::Result<Self> {
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

fn source_of(number: u32, stream: usize) -> Source {
    Source::Stream(number << 2 | stream as u32)
}

/// Whether the last writer of a pipe is gone.
fn is_ended(read_end: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(read_end.as_fd(), PollFlags::empty())];
    nix::poll::poll(&mut fds, PollTimeout::ZERO).is_ok() && fds[0].revents().is_some_and(|flags| flags.contains(PollFlags::POLLHUP))
}

/// The target of streams that a logger or the worker reads itself.
const LENT: &str = "a reader of its own";

fn pipe((uid, gid): (u32, u32)) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    if (uid, gid) != (0, 0) {
        for end in [&read, &write] {
            fchown(end, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
    }
    Ok((read, write))
}

/// Sets our end non-blocking; the process's end is another open file description and keeps blocking.
fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

#[cfg(test)]
mod tests;
