//! The streams of the containers' processes.
//!
//! Owns the pipes and terminals of every process and the client's side of them. Bytes go by splice(2) from one to the other; loggers
//! and the worker get read ends of outputs that are theirs.
//!
//! **Invariant:** no client can block the keeper: every descriptor here is non-blocking, every turn bounded.
mod fifo;
mod incoming;
mod outgoing;
mod saved;
mod splice;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use log::{info, warn};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use nix::unistd::{Gid, Uid, fchown, pipe2};

use self::incoming::Incoming;
use self::outgoing::{Outgoing, Spill};
use super::poll::{Poll, Source};
use crate::handover::{Output, Stdio, Stream, StreamSnapshot};
use crate::sys;

/// How often a fifo without an edge is looked at, should its watch have missed something.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The streams of one process.
#[derive(Debug)]
struct Entry {
    key: String,
    /// The process's ends, until they were given to it.
    process_ends: [Option<OwnedFd>; 3],
    /// Ends that loggers or the worker read, by stream.
    read_ends: [Option<OwnedFd>; 3],
    /// What is moved by us.
    pumps: [Option<u32>; 3],
    /// The client's fifos, until the terminal arrives that they belong to.
    fifos: [Option<(OwnedFd, String)>; 3],
    terminal: Option<OwnedFd>,
    wants_terminal: bool,
    size: Option<(u16, u16)>,
    stdin_closed: bool,
    spill_bytes: u64,
    spill_folder: String,
    exited: Option<Instant>,
    deleted: Option<Instant>,
}

#[derive(Debug)]
enum Pump {
    Out(Outgoing),
    In(Incoming),
    /// An output whose reader has died: the process must not wait for it.
    Discard {
        source: OwnedFd,
        sink: File,
        bytes: u64,
    },
}

/// All streams.
#[derive(Debug)]
pub(crate) struct Streams {
    entries: Vec<Entry>,
    pumps: BTreeMap<u32, Pump>,
    last_pump: u32,
    /// Tells of readers that open a fifo or read from it, while there is one to watch: a host has 128 of these by default.
    inotify: Option<Inotify>,
    watches: Vec<(WatchDescriptor, u32)>,
    /// Counters of pumps that are finished: bytes from processes, bytes lost.
    pub(crate) bytes_moved: u64,
    pub(crate) bytes_lost: u64,
}

impl Streams {
    pub(crate) fn new() -> Self {
        Self {
            entries: Vec::new(),
            pumps: BTreeMap::new(),
            last_pump: 0,
            inotify: None,
            watches: Vec::new(),
            bytes_moved: 0,
            bytes_lost: 0,
        }
    }

    /// Makes the streams of a process.
    ///
    /// Errors: what and errno of the first thing that failed; then nothing was made. EEXIST if the key has streams.
    pub(crate) fn open(&mut self, stdio: Stdio, poll: &mut Poll) -> Result<(), (String, io::Error)> {
        if self.find(&stdio.key).is_some() {
            return Err((format!("make streams of {}", stdio.key), Errno::EEXIST.into()));
        }
        let open = |path: &String| fifo::open(path).map(|fd| (fd, path.clone())).map_err(|error| (format!("open fifo {path}"), error));
        let fifo_of = |output: &Output| match output {
            Output::Fifo(path) => open(path).map(Some),
            Output::None | Output::Pipe => Ok(None),
        };
        let fifos = [stdio.stdin.as_ref().map(open).transpose()?, fifo_of(&stdio.stdout)?, fifo_of(&stdio.stderr)?];
        let mut entry = Entry {
            key: stdio.key.clone(),
            process_ends: [None, None, None],
            read_ends: [None, None, None],
            pumps: [None; 3],
            fifos,
            terminal: None,
            wants_terminal: stdio.terminal,
            size: None,
            stdin_closed: false,
            spill_bytes: stdio.spill_bytes,
            spill_folder: stdio.spill_folder.clone(),
            exited: None,
            deleted: None,
        };
        if let Err(error) = self.make_ends(&mut entry, &stdio, poll) {
            self.take_back(entry.pumps);
            return Err((format!("make a pipe for {}", entry.key), error));
        }
        self.entries.push(entry);
        Ok(())
    }

    /// Makes the pipes of a process, or of its terminal, and begins to move their bytes.
    fn make_ends(&mut self, entry: &mut Entry, stdio: &Stdio, poll: &mut Poll) -> io::Result<()> {
        if stdio.terminal {
            // The terminal's one output goes to stdout; a logger or the worker reads it through a pipe.
            if stdio.stdout == Output::Pipe {
                let (read, write) = pipe((stdio.uid, stdio.gid))?;
                set_nonblocking(&write)?;
                entry.read_ends[Stream::Stdout as usize] = Some(read);
                entry.fifos[Stream::Stdout as usize] = Some((write, "a reader of its own".into()));
            }
        } else {
            let owner = (stdio.uid, stdio.gid);
            for (index, stream) in [Stream::Stdin, Stream::Stdout, Stream::Stderr].into_iter().enumerate() {
                let is_pipe = match stream {
                    Stream::Stdin => false,
                    Stream::Stdout => stdio.stdout == Output::Pipe,
                    Stream::Stderr => stdio.stderr == Output::Pipe,
                };
                if !is_pipe && entry.fifos[index].is_none() {
                    continue;
                }
                let (read, write) = pipe(owner)?;
                let (process_end, our_end) = if stream == Stream::Stdin { (read, write) } else { (write, read) };
                entry.process_ends[index] = Some(process_end);
                if is_pipe {
                    entry.read_ends[index] = Some(our_end);
                    continue;
                }
                set_nonblocking(&our_end)?;
                if let Some((fifo, target)) = entry.fifos[index].take() {
                    let pump = if stream == Stream::Stdin {
                        Pump::In(Incoming::new(fifo, our_end, target))
                    } else {
                        let spill = make_spill(entry)?;
                        Pump::Out(Outgoing::new(our_end, fifo, target, spill))
                    };
                    entry.pumps[index] = Some(self.start(pump, poll)?);
                }
            }
        }
        Ok(())
    }

    /// Ends what was begun and came to nothing.
    fn take_back(&mut self, pumps: [Option<u32>; 3]) {
        for id in pumps.into_iter().flatten() {
            self.finish(id, 0);
        }
    }

    fn start(&mut self, pump: Pump, poll: &mut Poll) -> io::Result<u32> {
        self.last_pump += 1;
        pump.watch(self.last_pump, poll)?;
        self.pumps.insert(self.last_pump, pump);
        poll.again(Source::Stream(self.last_pump));
        Ok(self.last_pump)
    }

    /// The process's end of a stream: given once. `None` where it has none.
    pub(crate) fn take_process_end(&mut self, key: &str, stream: Stream) -> Option<OwnedFd> {
        self.find(key)?.process_ends[stream as usize].take()
    }

    /// A copy of the end that a logger or the worker reads.
    pub(crate) fn read_end(&mut self, key: &str, stream: Stream) -> io::Result<OwnedFd> {
        match self.find(key).and_then(|entry| entry.read_ends[stream as usize].as_ref()) {
            Some(end) => sys::descriptors::duplicate(end),
            None => Err(Errno::ENOENT.into()),
        }
    }

    /// Takes a terminal in for a process. Returns whether it was wanted.
    pub(crate) fn attach(&mut self, key: &str, terminal: OwnedFd, poll: &mut Poll) -> bool {
        let Some(index) = self.index(key) else { return false };
        let entry = &mut self.entries[index];
        if !entry.wants_terminal || entry.terminal.is_some() {
            return false;
        }
        let mut fifos = std::mem::take(&mut entry.fifos);
        let size = entry.size;
        let stdin_closed = entry.stdin_closed;
        let mut pumps = [None; 3];
        let result = (|| {
            set_nonblocking(&terminal)?;
            if let Some((rows, columns)) = size {
                sys::terminal::resize(terminal.as_fd(), rows, columns)?;
            }
            if let Some((fifo, target)) = fifos[1].take() {
                let spill = make_spill(&self.entries[index])?;
                let out = Outgoing::new(sys::descriptors::duplicate(&terminal)?, fifo, target, spill);
                pumps[1] = Some(self.start(Pump::Out(out), poll)?);
            }
            if let Some((fifo, target)) = fifos[0].take() {
                pumps[0] = Some(self.start(Pump::In(Incoming::new(fifo, sys::descriptors::duplicate(&terminal)?, target)), poll)?);
            }
            io::Result::Ok(())
        })();
        match result {
            Ok(()) => {
                self.entries[index].pumps = pumps;
                self.entries[index].terminal = Some(terminal);
                if stdin_closed {
                    self.close_stdin(key, poll);
                }
                true
            }
            Err(error) => {
                warn!(container:% = key, error:%; "cannot take a terminal in");
                self.take_back(pumps);
                false
            }
        }
    }

    /// The client will write no more.
    pub(crate) fn close_stdin(&mut self, key: &str, poll: &mut Poll) {
        let Some(entry) = self.find(key) else { return };
        entry.stdin_closed = true;
        let Some(id) = entry.pumps[Stream::Stdin as usize] else { return };
        let Some(Pump::In(input)) = self.pumps.get_mut(&id) else { return };
        match input.close() {
            Ok(Some(source)) => {
                if let Err(error) = poll.add_reader(source, Source::Stream(id)) {
                    warn!(container:% = key, error:%; "cannot watch stdin");
                }
                poll.again(Source::Stream(id));
            }
            Ok(None) => {}
            Err(error) => warn!(container:% = key, error:%; "cannot close stdin"),
        }
    }

    /// Sets a terminal's size, now or as soon as it arrives.
    ///
    /// Errors: ENOTTY for a process without one, ENOENT for no process.
    pub(crate) fn resize(&mut self, key: &str, rows: u16, columns: u16) -> io::Result<()> {
        let Some(entry) = self.find(key) else { return Err(Errno::ENOENT.into()) };
        if !entry.wants_terminal {
            return Err(Errno::ENOTTY.into());
        }
        entry.size = Some((rows, columns));
        match &entry.terminal {
            Some(terminal) => sys::terminal::resize(terminal.as_fd(), rows, columns),
            None => Ok(()),
        }
    }

    /// A process has ended: what it wrote still goes out, what others write for it only for a while.
    pub(crate) fn exited(&mut self, key: &str, now: Instant, poll: &mut Poll) {
        let Some(entry) = self.find(key) else { return };
        entry.exited = Some(now);
        entry.process_ends = [None, None, None];
        let pumps = entry.pumps;
        if let Some(stdin) = pumps[Stream::Stdin as usize] {
            self.finish(stdin, 0);
        }
        for id in pumps.into_iter().flatten() {
            poll.again(Source::Stream(id));
        }
    }

    /// A process is deleted: only a reader that is there gets what is left, within the stated drain.
    pub(crate) fn release(&mut self, key: &str, now: Instant, poll: &mut Poll) {
        let Some(entry) = self.find(key) else { return };
        entry.deleted = Some(now);
        entry.process_ends = [None, None, None];
        entry.read_ends = [None, None, None];
        entry.fifos = [None, None, None];
        let pumps = entry.pumps;
        if let Some(stdin) = pumps[Stream::Stdin as usize] {
            self.finish(stdin, 0);
        }
        for id in pumps.into_iter().flatten() {
            poll.again(Source::Stream(id));
        }
        self.forget_finished();
    }

    /// The logger of an output has died: from now on it is thrown away, so that the process does not wait for nobody.
    pub(crate) fn reader_gone(&mut self, key: &str, stream: Stream, poll: &mut Poll) {
        let Some(entry) = self.find(key) else { return };
        let Some(end) = entry.read_ends[stream as usize].take() else { return };
        let result = (|| {
            set_nonblocking(&end)?;
            let sink = File::options().write(true).open("/dev/null")?;
            self.start(Pump::Discard { source: end, sink, bytes: 0 }, poll)
        })();
        match result {
            Ok(id) => {
                if let Some(entry) = self.find(key) {
                    entry.pumps[stream as usize] = Some(id);
                    if entry.exited.is_none() {
                        warn!(container:% = key, stream:?; "the logger has ended before the process, its output is thrown away");
                    }
                }
            }
            Err(error) => warn!(container:% = key, error:%; "cannot take an output over from its logger"),
        }
    }

    /// Moves bytes of one stream.
    pub(crate) fn turn(&mut self, id: u32, now: Instant, poll: &mut Poll) {
        let (exited, deleted) =
            self.entries.iter().find(|entry| entry.pumps.contains(&Some(id))).map_or((None, None), |entry| (entry.exited, entry.deleted));
        let Some(pump) = self.pumps.get_mut(&id) else { return };
        match pump {
            Pump::Out(out) => {
                let was_draining = out.is_draining();
                match out.turn(now, exited, deleted) {
                    outgoing::Turn::Again => poll.again(Source::Stream(id)),
                    outgoing::Turn::Finished { lost } => self.finish(id, lost),
                    outgoing::Turn::Waits if out.is_draining() && !was_draining => {
                        let number = out.sink().as_raw_fd();
                        self.watch_fifo(id, number, poll);
                        // What happened before the watch is seen by another look.
                        poll.again(Source::Stream(id));
                    }
                    outgoing::Turn::Waits => {}
                }
            }
            Pump::In(input) => match input.turn() {
                incoming::Turn::Again => poll.again(Source::Stream(id)),
                incoming::Turn::Finished => self.finish(id, 0),
                incoming::Turn::Waits => {}
            },
            Pump::Discard { source, sink, bytes } => {
                let (moved, stop) = splice::move_bytes(source.as_fd(), sink.as_fd(), None, splice::TURN_BYTES);
                *bytes += moved;
                let lost = *bytes;
                match stop {
                    splice::Stop::Turn if deleted.is_none() => poll.again(Source::Stream(id)),
                    splice::Stop::Idle if deleted.is_none() => {}
                    _ => self.finish(id, lost),
                }
            }
        }
    }

    /// Has readers that come and read tell of themselves: they make no edge on our end.
    fn watch_fifo(&mut self, id: u32, number: RawFd, poll: &Poll) {
        let path = format!("/proc/self/fd/{number}");
        let watched = self
            .ensure_inotify(poll)
            .and_then(|inotify| Ok(inotify.add_watch(path.as_str(), AddWatchFlags::IN_OPEN | AddWatchFlags::IN_ACCESS)?));
        match watched {
            Ok(watch) => self.watches.push((watch, id)),
            Err(error) => warn!(error:%; "cannot watch a fifo, looking at it every second"),
        }
    }

    fn ensure_inotify(&mut self, poll: &Poll) -> io::Result<&Inotify> {
        if self.inotify.is_none() {
            let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
            poll.add_reader(&inotify, Source::Fifos)?;
            self.inotify = Some(inotify);
        }
        self.inotify.as_ref().ok_or_else(|| Errno::EBADF.into())
    }

    /// A fifo was opened or read by somebody.
    pub(crate) fn fifos_touched(&mut self, poll: &mut Poll) {
        while let Some(events) = self.inotify.as_ref().and_then(|inotify| inotify.read_events().ok()) {
            for event in events {
                for (_, id) in self.watches.iter().filter(|(watch, _)| *watch == event.wd) {
                    poll.again(Source::Stream(*id));
                }
            }
        }
    }

    fn finish(&mut self, id: u32, lost: u64) {
        let Some(pump) = self.pumps.remove(&id) else { return };
        if let Some(at) = self.watches.iter().position(|(_, watched)| *watched == id) {
            let (watch, _) = self.watches.swap_remove(at);
            // Two streams may share a fifo, and so its watch.
            if let Some(inotify) = self.inotify.as_ref().filter(|_| self.watches.iter().all(|(other, _)| *other != watch)) {
                // The fifo itself may be gone.
                let _ = inotify.rm_watch(watch);
            }
            if self.watches.is_empty() {
                self.inotify = None;
            }
        }
        if let Pump::Out(out) = &pump {
            self.bytes_moved += out.bytes;
        }
        if lost > 0 {
            self.bytes_lost += lost;
            info!(stream:% = pump.target(), bytes = lost; "output that nobody has taken is dropped");
        }
        for entry in &mut self.entries {
            for slot in &mut entry.pumps {
                if *slot == Some(id) {
                    *slot = None;
                }
            }
        }
        drop(pump);
        self.forget_finished();
    }

    fn forget_finished(&mut self) {
        self.entries.retain(|entry| entry.deleted.is_none() || entry.pumps.iter().any(Option::is_some));
    }

    /// Gives the streams whose time has come another turn.
    pub(crate) fn tick(&mut self, now: Instant, poll: &mut Poll) {
        let due: Vec<u32> = self
            .pumps
            .iter()
            .filter(|(_, pump)| matches!(pump, Pump::Out(_)))
            .map(|(id, _)| *id)
            .filter(|id| self.entries.iter().any(|e| e.pumps.contains(&Some(*id)) && (e.exited.is_some() || e.deleted.is_some())))
            .collect();
        for id in due {
            self.turn(id, now, poll);
        }
    }

    /// When [`Streams::tick`] has something to do that was not due at `ticked`, its last time.
    pub(crate) fn deadline(&self, ticked: Instant) -> Option<Instant> {
        self.pumps
            .iter()
            .filter_map(|(id, pump)| {
                let Pump::Out(out) = pump else { return None };
                let entry = self.entries.iter().find(|entry| entry.pumps.contains(&Some(*id)))?;
                let own = out.deadline(ticked, entry.exited, entry.deleted);
                let look = (out.is_draining() && !self.watches.iter().any(|(_, watched)| watched == id)).then_some(ticked + LOOK_AGAIN);
                [own, look].into_iter().flatten().min()
            })
            .min()
    }

    /// Whether every stream of a deleted process is finished.
    pub(crate) fn is_drained(&self) -> bool {
        self.entries.is_empty()
    }

    pub(crate) fn snapshot(&self) -> Vec<StreamSnapshot> {
        let mut snapshots = Vec::new();
        for entry in &self.entries {
            for (index, name) in ["stdin", "stdout", "stderr"].into_iter().enumerate() {
                let pump = entry.pumps[index].and_then(|id| self.pumps.get(&id));
                let (target, bytes, waiting_bytes, spilled_bytes) = match pump {
                    Some(Pump::Out(out)) => (out.target.clone(), out.bytes, out.waiting(), out.spilled()),
                    Some(Pump::In(input)) => (input.target.clone(), input.bytes, 0, 0),
                    Some(Pump::Discard { bytes, .. }) => ("nobody".into(), *bytes, 0, 0),
                    None if entry.read_ends[index].is_some() => ("a reader of its own".into(), 0, 0, 0),
                    None => continue,
                };
                let (key, stream) = (entry.key.clone(), name.into());
                snapshots.push(StreamSnapshot { key, stream, target, bytes, waiting_bytes, spilled_bytes });
            }
        }
        snapshots
    }

    fn index(&self, key: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.key == key && entry.deleted.is_none())
    }

    fn find(&mut self, key: &str) -> Option<&mut Entry> {
        self.index(key).map(|index| &mut self.entries[index])
    }
}

impl Pump {
    fn target(&self) -> &str {
        match self {
            Self::Out(out) => &out.target,
            Self::In(input) => &input.target,
            Self::Discard { .. } => "an output without its logger",
        }
    }
}

fn make_spill(entry: &Entry) -> io::Result<Option<Spill>> {
    (entry.spill_bytes > 0).then(|| Spill::new(Path::new(&entry.spill_folder), entry.spill_bytes)).transpose()
}

fn pipe((uid, gid): (u32, u32)) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    if (uid, gid) != (0, 0) {
        for end in [&read, &write] {
            fchown(end, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
    }
    Ok((read, write))
}

/// Sets the flag of our end; the process's end is another description and keeps blocking.
fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

#[cfg(test)]
mod tests;
