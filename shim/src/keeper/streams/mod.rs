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
mod incoming;
mod outgoing;
mod pace;
mod pipes;
mod process;
mod spill;
mod splice;
mod watches;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use log::{info, warn};
use nix::errno::Errno;

use self::outgoing::Outgoing;
use self::process::{LENT, Process, Pump, Stage, source_of};
use self::watches::Watches;
use super::poll::{Poll, Source};
use crate::handover::{Cause, Stdio, Step, Stream, StreamSnapshot};
use crate::saved::saved;
use crate::sys;

/// How long a Delete waits until the output is read and its last writer is gone, as containerd's own shim does; up to [`CHECK_EVERY`] less while
/// other outputs are checked.
const DRAIN_WITHIN: Duration = Duration::from_secs(10);
/// How often to check an output that drains, and one whose readers inotify does not report: no instances left, or splices on an old kernel.
const CHECK_EVERY: Duration = Duration::from_secs(1);

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
    /// By number. A stream's own number, as in [`Source::Stream`], is that of its process times 4 and its place in it. In a block of its own: a node of the map
    /// has room for eleven, and stays.
    processes: BTreeMap<u32, Box<Process>>,
    /// The numbers of the processes that are not released.
    numbers: BTreeMap<String, u32>,
    /// Drain operations that are finished.
    drained: Vec<(Cause, Step)>,
    watches: Watches,
    /// Streams that are checked every second, and when next.
    checked: BTreeSet<u32>,
    check_at: Option<Instant>,
    /// Streams to which the clock gives their next turn, by its time.
    timed: BTreeSet<(Instant, u32)>,
    /// Counters of pumps that are finished: bytes from processes, bytes lost.
    pub(crate) bytes_moved: u64,
    pub(crate) bytes_lost: u64,
}

saved!(Streams { last_number, processes, bytes_moved, bytes_lost; numbers, drained, watches, checked, check_at, timed });

impl Streams {
    /// Resumes after a re-exec. The content of the pipes stays there.
    pub(crate) fn resume(&mut self, poll: &mut Poll) -> io::Result<()> {
        for (number, process) in &mut self.processes {
            for (index, slot) in process.pumps.iter_mut().enumerate() {
                *slot = slot.take().map(|pump| pump.registered(*number, index, poll)).transpose()?;
            }
            if !process.released {
                self.numbers.insert(process.key.clone(), *number);
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
        let number = self.free_number();
        let process = Process::open(&stdio, number, poll)?;
        self.processes.insert(number, Box::new(process));
        self.numbers.insert(key, number);
        Ok(())
    }

    fn free_number(&mut self) -> u32 {
        loop {
            self.last_number = (self.last_number + 1) % (1 << 30);
            if !self.processes.contains_key(&self.last_number) {
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
        match self.find(key).and_then(|(_, process)| process.read_ends[stream as usize].as_ref()) {
            Some(end) => sys::descriptors::duplicate(end),
            None => Err(Errno::ENOENT.into()),
        }
    }

    /// Takes over the terminal of a process. Returns whether the process was to have one.
    pub(crate) fn attach(&mut self, key: &str, terminal: OwnedFd, poll: &mut Poll) -> bool {
        let Some((number, process)) = self.find(key) else { return false };
        if !process.wants_terminal || process.terminal.is_some() {
            return false;
        }
        if let Err(error) = process.attach(terminal, number, poll) {
            warn!(container:% = key, error:%; "cannot take over a terminal");
            return false;
        }
        if process.stdin_closed {
            self.close_stdin(key, poll);
        }
        true
    }

    /// CloseIO: the client will write no more.
    pub(crate) fn close_stdin(&mut self, key: &str, poll: &mut Poll) {
        let Some((number, process)) = self.find(key) else { return };
        process.stdin_closed = true;
        let source = source_of(number, 0);
        let Some(Pump::In(input)) = &mut process.pumps[Stream::Stdin as usize] else { return };
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
        let Some((_, process)) = self.find(key) else { return Err(Errno::ENOENT.into()) };
        if !process.wants_terminal {
            return Err(Errno::ENOTTY.into());
        }
        process.size = Some((rows, columns));
        match &process.terminal {
            Some(terminal) => sys::terminal::resize(terminal.as_fd(), rows, columns),
            None => Ok(()),
        }
    }

    /// A process exited: its output and that of its descendants is still moved.
    pub(crate) fn exited(&mut self, key: &str, poll: &mut Poll) {
        let Some((number, process)) = self.find(key) else { return };
        process.exited = true;
        process.process_ends = Default::default();
        self.finish(number, Stream::Stdin as usize, 0);
        for stream in [Stream::Stdout, Stream::Stderr] {
            poll.again(source_of(number, stream as usize));
        }
    }

    /// A Delete waits until the output is read and its last writer is gone, or there is no reader.
    pub(crate) fn drain(&mut self, key: &str, waiting: (Cause, Step), now: Instant, poll: &mut Poll) {
        let Some((number, process)) = self.find(key) else { return self.drained.push(waiting) };
        process.waiting.push(waiting);
        for stream in [1, 2] {
            if let (Some(end), None) = (&process.read_ends[stream], &process.pumps[stream]) {
                let held = sys::descriptors::duplicate(end).and_then(|end| Pump::Held(end).registered(number, stream, poll));
                match held {
                    Ok(held) => process.pumps[stream] = Some(held),
                    Err(error) => warn!(container:% = key, error:%; "cannot watch an output for its end"),
                }
            }
        }
        self.begin_drain(number, now, poll);
    }

    /// A process is deleted. A connected reader still receives the rest, within the time of a drain.
    pub(crate) fn release(&mut self, key: &str, now: Instant, poll: &mut Poll) {
        let Some(number) = self.numbers.remove(key) else { return };
        let Some(process) = self.processes.get_mut(&number) else { return };
        process.released = true;
        process.read_ends = Default::default();
        process.clients = Default::default();
        self.begin_drain(number, now, poll);
    }

    fn begin_drain(&mut self, number: u32, now: Instant, poll: &mut Poll) {
        let Some(process) = self.processes.get_mut(&number) else { return };
        // Its last check is its end.
        let first_check = self.check_at.unwrap_or(now + CHECK_EVERY);
        process.drain_until.get_or_insert(first_check + DRAIN_WITHIN - CHECK_EVERY);
        process.process_ends = Default::default();
        self.finish(number, Stream::Stdin as usize, 0);
        for id in [1, 2].map(|stream| number << 2 | stream) {
            self.turn(id, now, poll);
        }
        self.settle(number);
    }

    /// The logger of an output exited: discards the output from now on, so that the process does not block.
    pub(crate) fn reader_gone(&mut self, key: &str, stream: Stream, poll: &mut Poll) {
        let Some((number, process)) = self.find(key) else { return };
        let Some(end) = process.read_ends[stream as usize].take() else { return };
        if !process.exited {
            warn!(container:% = key, stream:?; "the logger exited before the process, discarding its output");
        }
        // A terminal's stream notices by itself: its pipe is broken now.
        if !process.wants_terminal {
            let pump = pipes::set_nonblocking(&end)
                .and_then(|()| Pump::Out(Outgoing::new(end, None, None)).registered(number, stream as usize, poll));
            match pump {
                Ok(pump) => process.pumps[stream as usize] = Some(pump),
                Err(error) => warn!(container:% = key, error:%; "cannot take over an output from its logger"),
            }
        }
        poll.again(source_of(number, stream as usize));
    }

    /// Moves bytes of one stream.
    pub(crate) fn turn(&mut self, id: u32, now: Instant, poll: &mut Poll) {
        let (number, stream, source) = (id >> 2, (id & 3) as usize, Source::Stream(id));
        let Some(process) = self.processes.get_mut(&number) else { return };
        let stage = process.stage(now);
        let Some(pump) = process.pumps.get_mut(stream).and_then(Option::as_mut) else { return };
        if let Pump::Out(out) = pump
            && let Some(at) = out.pace.take_due()
        {
            self.timed.remove(&(at, id));
        }
        let turn = match pump {
            Pump::Out(out) => out.turn(stage, source, now, poll),
            Pump::In(input) => input.turn(),
            Pump::Held(end) if stage == Stage::Over || process.read_ends[stream].is_none() || pipes::is_ended(end) => {
                Turn::Finished { lost: 0 }
            }
            Pump::Held(_) => Turn::Waits,
        };
        let due = match pump {
            Pump::Out(out) => out.pace.make_due(),
            Pump::In(_) | Pump::Held(_) => None,
        };
        match (turn, due) {
            (Turn::Finished { lost }, _) => {
                self.finish(number, stream, lost);
                self.settle(number);
            }
            (Turn::Again | Turn::Waits, Some(at)) => {
                self.timed.insert((at, id));
            }
            (Turn::Again, None) => poll.again(source),
            (Turn::Waits, None) => {
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
        let Some(pump) = self.processes.get_mut(&number).and_then(|process| process.pumps[stream].take()) else { return };
        let id = number << 2 | stream as u32;
        self.checked.remove(&id);
        if let Pump::Out(mut out) = pump {
            self.bytes_moved += out.bytes;
            if let Some(at) = out.pace.take_due() {
                self.timed.remove(&(at, id));
            }
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
        let Some(process) = self.processes.get_mut(&number).filter(|process| process.is_finished()) else { return };
        self.drained.append(&mut process.waiting);
        if process.released {
            self.processes.remove(&number);
        }
    }

    /// Gives another turn to the streams that are due. Returns the drain operations that are finished.
    pub(crate) fn tick(&mut self, now: Instant, poll: &mut Poll) -> Vec<(Cause, Step)> {
        while let Some((_, id)) = self.timed.first().copied().filter(|(at, _)| *at <= now) {
            self.timed.pop_first();
            self.turn(id, now, poll);
        }
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
        self.check_at.into_iter().chain(self.timed.first().map(|(at, _)| *at)).min()
    }

    /// Whether every stream of a deleted process is finished.
    pub(crate) fn is_drained(&self) -> bool {
        self.processes.is_empty()
    }

    /// Whether readers have taken all output so far.
    pub(crate) fn all_is_read(&self) -> bool {
        let mut pumps = self.processes.values().flat_map(|process| &process.pumps);
        pumps.all(|pump| !matches!(pump, Some(Pump::Out(out)) if out.waiting() > 0))
    }

    pub(crate) fn snapshot(&self) -> Vec<StreamSnapshot> {
        let mut snapshots = Vec::new();
        for process in self.processes.values() {
            for (index, name) in ["stdin", "stdout", "stderr"].into_iter().enumerate() {
                let (target, bytes, waiting_bytes, spilled_bytes) = match &process.pumps[index] {
                    Some(Pump::Out(out)) => (out.target(), out.bytes, out.waiting(), out.spilled()),
                    Some(Pump::In(input)) => (input.target.as_str(), input.bytes, 0, 0),
                    Some(Pump::Held(_)) => (LENT, 0, 0, 0),
                    None if process.read_ends[index].is_some() => (LENT, 0, 0, 0),
                    None => continue,
                };
                let (key, stream, target) = (process.key.clone(), name.into(), target.into());
                snapshots.push(StreamSnapshot { key, stream, target, bytes, waiting_bytes, spilled_bytes });
            }
        }
        snapshots
    }

    fn find(&mut self, key: &str) -> Option<(u32, &mut Process)> {
        let number = *self.numbers.get(key)?;
        Some((number, self.processes.get_mut(&number)?))
    }
}

#[cfg(test)]
mod tests;
