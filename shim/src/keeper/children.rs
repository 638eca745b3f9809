//! The processes: helpers that the keeper starts, performers that it forks, and claimed ones that both leave behind.
//!
//! Owns every child. An exit is recorded while the child is still a zombie, and only then reaped, so that its pid cannot be
//! reused before.
//!
//! ```text
//!  helper, performer:  started ─▶ (ready) ─▶ exited: outcome of its operation; of an exec's performer, it is the report
//!  other:   orphan  ─▶ claimed by a commit ─▶ exited: a cause
//!                   └▶ exited unclaimed: left a zombie while an operation may still report its pid, then reaped
//! ```
mod helper;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::SystemTime;

use log::{debug, error, info, warn};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use x_engine::perform::{self, Descriptors, Report};

use self::helper::{Console, Helper};
use super::gates::Gates;
use super::home::Home;
use super::poll::{Poll, Source};
use super::streams::Streams;
use crate::capture::Capture;
use crate::handover::{Cause, Claim, Fd, Outcome, POD_KEY, Perform, PlanKind, ProcessExit, ProcessSnapshot, Spawn, Step, Stream, is_of};
use crate::helper::Pipes;
use crate::journal::{Journal, RecordedExit};
use crate::processes::kill_tree;
use crate::saved::saved;
use crate::sys::{self, spawn::Started};

/// The status of a process that another process reaped.
const UNKNOWN_STATUS: u32 = 255;
/// The most children reaped in one turn: a container in the host's pid namespace may leave thousands behind.
const REAPED_AT_ONCE: usize = 1024;

/// A performer that was forked, and the keeper's ends of what it uses.
struct Forked {
    pid: u32,
    report: Capture,
    gate: Option<OwnedFd>,
    terminal: Option<OwnedFd>,
}

/// A container's process.
#[derive(Debug)]
struct Claimed {
    key: String,
    /// Absent if the process was gone when it was claimed, or descriptors had run out.
    handle: Option<OwnedFd>,
    journal: Option<Journal>,
    /// Not our child: the handle shows its exit, its status is unknown.
    foreign: bool,
}

saved!(Claimed { key, handle, journal, foreign });

/// A result of reaping.
#[derive(Debug)]
pub(crate) enum Found {
    /// An operation has its outcome.
    Outcome { cause: Cause, step: Step, outcome: Outcome },
    /// A claimed process exited.
    Exit(ProcessExit),
    /// A child that is no helper and not claimed: perhaps the worker.
    Other { pid: u32, status: u32 },
    /// A process that read outputs exited.
    ReaderGone { key: String, stream: Stream },
}

/// All children.
#[derive(Debug, Default)]
pub(crate) struct Children {
    // Boxed: a map has room for eleven values from its first one on.
    helpers: BTreeMap<u32, Box<Helper>>,
    claimed: BTreeMap<u32, Box<Claimed>>,
    /// The last pid claimed under a key.
    pids: BTreeMap<String, u32>,
    /// Claims whose process was gone already: their exits are to be reported.
    vanished: Vec<u32>,
    pub(crate) started: u64,
    pub(crate) exits_seen: u64,
    gates: Gates,
    /// The keeper's own namespaces, to which each child goes.
    pub(crate) home: Home,
}

saved!(Children { helpers, claimed, vanished, started, exits_seen, gates, home; pids });

impl Children {
    /// Resumes after a re-exec.
    pub(crate) fn resume(&mut self, poll: &mut Poll) -> io::Result<()> {
        for (pid, helper) in &self.helpers {
            helper.pipes.captures().try_for_each(|capture| poll.add_reader(capture, Source::Helper(*pid)))?;
            poll.again(Source::Helper(*pid));
        }
        for (pid, claimed) in &self.claimed {
            if let (true, Some(handle)) = (claimed.foreign, &claimed.handle) {
                poll.add_reader(handle, Source::Foreign(*pid))?;
            }
            self.pids.insert(claimed.key.clone(), *pid);
        }
        Ok(())
    }

    /// Starts a helper.
    ///
    /// Errors: what failed; then nothing was started.
    pub(crate) fn start(
        &mut self,
        cause: Cause,
        step: Step,
        order: Spawn,
        streams: &mut Streams,
        poll: &Poll,
    ) -> Result<(), (String, io::Error)> {
        let program = order.argv.first().map(|path| String::from_utf8_lossy(path).into_owned()).unwrap_or_default();
        let failed = |error| (format!("start {program}"), error);
        let console = order.console_socket.as_deref().map(Console::listen).transpose().map_err(failed)?;
        let end_of = |fd: &Fd| match fd {
            Fd::Process(key, stream) => Ok(streams.take_process_end(key, *stream)),
            Fd::ReadEnd(key, stream) => streams.read_end(key, *stream).map(Some),
            Fd::Null | Fd::Output | Fd::Ready => Ok(None),
        };
        let (Started { pid, failure }, pipes) = crate::helper::start(&order, self.home.namespaces(), end_of).map_err(failed)?;
        self.started += 1;
        debug!(pid, program:%; "helper started");
        if let Err(error) = pipes.captures().try_for_each(|capture| poll.add_reader(capture, Source::Helper(pid))) {
            warn!(pid, error:%; "cannot watch a helper's pipes, they are read when the helper has exited");
        }
        let reads = order.fds.into_iter().filter_map(|fd| if let Fd::ReadEnd(key, stream) = fd { Some((key, stream)) } else { None });
        let reads = reads.collect();
        let helper = Helper {
            cause,
            step,
            key: order.key,
            program,
            failure: Some(failure),
            pipes,
            reported: false,
            console,
            reads,
            terminal: None,
            is_done_by_report: false,
        };
        self.helpers.insert(pid, Box::new(helper));
        Ok(())
    }

    /// Forks a performer.
    ///
    /// Errors: what failed; then nothing was forked.
    pub(crate) fn perform(
        &mut self,
        cause: Cause,
        step: Step,
        order: Perform,
        streams: &mut Streams,
        poll: &Poll,
    ) -> Result<(), (String, io::Error)> {
        let program = format!("perform {}", order.kind.name());
        let Forked { pid, report, gate, terminal } = self.fork(&order, streams).map_err(|error| (program.clone(), error))?;
        self.started += 1;
        debug!(pid, program:%; "performer forked");
        if let Err(error) = poll.add_reader(&report, Source::Helper(pid)) {
            warn!(pid, error:%; "cannot watch a performer's report, it is read when the performer has exited");
        }
        if let Some(gate) = gate {
            match order.kind {
                PlanKind::Placeholder => self.gates.add_placeholder(&order.key, cause, gate),
                _ => self.gates.add(&order.key, cause, gate),
            }
        }
        let helper = Helper {
            cause,
            step,
            key: order.key,
            program,
            failure: None,
            pipes: Pipes::of_output(report),
            reported: false,
            console: None,
            reads: Vec::new(),
            terminal,
            // An init may have another parent until its performer has exited; an exec is the keeper's child from the beginning.
            is_done_by_report: order.kind == PlanKind::Exec,
        };
        self.helpers.insert(pid, Box::new(helper));
        Ok(())
    }

    fn fork(&self, order: &Perform, streams: &mut Streams) -> io::Result<Forked> {
        let mut null = None::<OwnedFd>;
        let mut stream = |stream, streams: &mut Streams| {
            let end = if order.terminal || !order.kind.has_streams() { None } else { streams.take_process_end(&order.key, stream) };
            match (end, &null) {
                (Some(end), _) => Ok(end),
                (None, Some(null)) => null.try_clone(),
                (None, None) => {
                    let file = File::options().read(true).write(true).open("/dev/null")?;
                    null.insert(file.into()).try_clone()
                }
            }
        };
        let stdio = [stream(Stream::Stdin, streams)?, stream(Stream::Stdout, streams)?, stream(Stream::Stderr, streams)?];
        let (report, theirs) = Capture::new()?;
        let (gate_end, gate) = order.kind.has_gate().then(|| pipe2(OFlag::O_CLOEXEC)).transpose()?.unzip();
        let (console, terminal) = order.terminal.then(UnixStream::pair).transpose()?.unzip();
        let descriptors = Descriptors { stdio, report: theirs, gate: gate_end, console: console.map(OwnedFd::from) };
        let plan = &order.plan;
        let home = || self.home.go();
        let pid = match order.kind {
            PlanKind::Create => perform::fork_after(home, || perform::create(plan, descriptors))?,
            PlanKind::Exec => {
                let init = self.handle(&order.init)?;
                perform::fork_after(home, || perform::exec(plan, init, descriptors))?
            }
            PlanKind::Poststart => {
                let claimed = self.claimed(&order.init).map(|(init, _)| init);
                let init = claimed.or(order.pid).ok_or(Errno::ESRCH)?;
                let has_exited = claimed.is_none_or(|init| matches!(sys::process::peek(Some(init)), Ok(Some(_))));
                perform::fork_after(home, || perform::poststart(plan, init, has_exited, descriptors))?
            }
            PlanKind::Checkpoint => {
                let (init, _) = self.claimed(&order.init).ok_or(Errno::ESRCH)?;
                perform::fork_after(home, || perform::checkpoint(plan, init, descriptors))?
            }
            PlanKind::Restore => perform::fork_after(home, || perform::restore(plan, descriptors))?,
            PlanKind::Poststop => perform::fork_after(home, || perform::poststop(plan, descriptors))?,
            PlanKind::Placeholder => perform::fork_after(home, || perform::placeholder(descriptors))?,
            PlanKind::Holder => perform::fork_after(home, || perform::holder(plan, descriptors))?,
        };
        Ok(Forked { pid, report, gate, terminal: terminal.map(OwnedFd::from) })
    }

    /// Lets the init of a container that the native engine has made execute its program.
    pub(crate) fn open_gate(&mut self, key: &str) -> io::Result<()> {
        self.gates.open(key)
    }

    /// Reads what a helper has written. Returns its outcome if it has become ready, or reports.
    pub(crate) fn read(&mut self, pid: u32, streams: &mut Streams, poll: &mut Poll) -> Option<Found> {
        let helper = self.helpers.get_mut(&pid)?;
        if helper.pipes.read() {
            poll.again(Source::Helper(pid));
        }
        if helper.is_done_by_report && !helper.reported && Report::parse(helper.pipes.output()).is_some() {
            helper.reported = true;
            return Some(helper.outcome(0, streams, poll));
        }
        let ready = helper.pipes.ready.as_ref()?;
        let byte = ready.has_bytes();
        // A pipe closed by the exit is no readiness; the exit follows. An exiting process loses its executable before its descriptors.
        let is_ready = byte || (ready.is_closed() && std::fs::read_link(format!("/proc/{pid}/exe")).is_ok());
        if !is_ready {
            return None;
        }
        helper.pipes.ready = None;
        helper.reported = true;
        Some(Found::Outcome { cause: helper.cause, step: helper.step, outcome: Outcome::Ready { byte } })
    }

    /// Makes a child a process of a container.
    pub(crate) fn claim(&mut self, claim: Claim, poll: &Poll) {
        let journal = claim.journal.and_then(|path| {
            Journal::open(path.as_ref()).inspect_err(|error| error!(path:%, error:%; "cannot open the journal, an exit may be lost")).ok()
        });
        let handle = sys::process::open(claim.pid).ok();
        let foreign = sys::process::peek(Some(claim.pid)).is_err();
        if foreign {
            match &handle {
                Some(handle) if poll.add_reader(handle, Source::Foreign(claim.pid)).is_ok() => {
                    warn!(container:% = claim.key, pid = claim.pid; "the runtime started a process that is not our child, its exit status will be unknown");
                }
                _ => self.vanished.push(claim.pid),
            }
        }
        self.started += 1;
        self.pids.insert(claim.key.clone(), claim.pid);
        self.claimed.insert(claim.pid, Box::new(Claimed { key: claim.key, handle, journal, foreign }));
    }

    /// Looks for children that have exited. `awaits_pid`: unclaimed zombies are not reaped.
    /// `ours`: other children that are never claimed.
    pub(crate) fn reap(&mut self, awaits_pid: bool, ours: &[u32], streams: &mut Streams, poll: &mut Poll) -> Vec<Found> {
        let mut found = Vec::new();
        for pid in std::mem::take(&mut self.vanished) {
            self.exited(pid, UNKNOWN_STATUS, &mut found);
        }
        for _child in 0..REAPED_AT_ONCE {
            let Ok(Some(ended)) = sys::process::peek(None) else { return found };
            if awaits_pid && !self.is_known(ended.pid, ours) {
                // The kernel reports this zombie first each time, so look at each known child.
                let known: Vec<u32> = self.helpers.keys().chain(self.claimed.keys()).chain(ours).copied().collect();
                for ended in known.into_iter().filter_map(|pid| sys::process::peek(Some(pid)).ok().flatten()) {
                    self.ended(ended, streams, poll, &mut found);
                }
                return found;
            }
            self.ended(ended, streams, poll, &mut found);
        }
        poll.again(Source::Signals);
        found
    }

    /// Whether a container's process runs. That of a pod ends with the keeper.
    pub(crate) fn have_claimed(&self) -> bool {
        self.claimed.values().any(|claimed| claimed.key != POD_KEY)
    }

    fn is_known(&self, pid: u32, ours: &[u32]) -> bool {
        self.helpers.contains_key(&pid) || self.claimed.contains_key(&pid) || ours.contains(&pid)
    }

    /// The handle of a process that is not our child shows that it exited.
    pub(crate) fn foreign_ended(&mut self, pid: u32) -> Vec<Found> {
        let mut found = Vec::new();
        if self.claimed.get(&pid).is_some_and(|claimed| claimed.foreign) {
            self.exited(pid, UNKNOWN_STATUS, &mut found);
        }
        found
    }

    fn ended(&mut self, ended: sys::process::Ended, streams: &mut Streams, poll: &mut Poll, found: &mut Vec<Found>) {
        if let Some(helper) = self.helpers.remove(&ended.pid) {
            helper.finish(ended.status, streams, poll, found);
            self.exits_seen += 1;
        } else if self.claimed.contains_key(&ended.pid) {
            self.exited(ended.pid, ended.status, found);
        } else {
            found.push(Found::Other { pid: ended.pid, status: ended.status });
        }
        if let Err(error) = sys::process::reap(ended.pid) {
            warn!(pid = ended.pid, error:%; "cannot reap a child");
        }
    }

    /// Records the exit of a claimed process, while it is a zombie.
    fn exited(&mut self, pid: u32, status: u32, found: &mut Vec<Found>) {
        let Some(claimed) = self.claimed.remove(&pid) else { return };
        if self.pids.get(&claimed.key) == Some(&pid) {
            self.pids.remove(&claimed.key);
        }
        self.exits_seen += 1;
        let at_nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i64);
        if let Some(journal) = &claimed.journal
            && let Err(error) = journal.write_exit(RecordedExit { pid, status, at_nanos })
        {
            error!(container:% = claimed.key, error:%; "cannot record an exit in the journal");
        }
        found.push(Found::Exit(ProcessExit { key: claimed.key, pid, status, at_nanos }));
    }

    /// The process that is claimed under a key, with its pid.
    fn claimed(&self, key: &str) -> Option<(u32, &Claimed)> {
        let pid = *self.pids.get(key)?;
        Some((pid, self.claimed.get(&pid)?))
    }

    /// A handle of the process that is claimed under a key.
    fn handle(&self, key: &str) -> io::Result<OwnedFd> {
        let (pid, claimed) = self.claimed(key).ok_or(Errno::ESRCH)?;
        match &claimed.handle {
            Some(handle) => handle.try_clone(),
            None if claimed.foreign => Err(Errno::ESRCH.into()),
            // Descriptors had run out. The child is not reaped, so its pid cannot mean another process.
            None => sys::process::open(pid),
        }
    }

    /// Signals a claimed process.
    pub(crate) fn signal(&self, key: &str, signal: i32) -> io::Result<()> {
        match self.claimed(key).and_then(|(_, claimed)| claimed.handle.as_ref()) {
            // Without a copy: descriptors may have run out.
            Some(handle) => sys::process::signal(handle.as_fd(), signal),
            None => sys::process::signal(self.handle(key)?.as_fd(), signal),
        }
    }

    /// Ends the placeholders of a cause that is over.
    pub(crate) fn end_placeholders_of(&mut self, cause: Cause) {
        self.gates.close_placeholders_of(cause);
    }

    /// Kills the helpers of a poisoned request, and their descendants. An init that it has made ends too.
    pub(crate) fn end_helpers_of(&mut self, cause: Cause) {
        self.gates.close_of(cause);
        for pid in self.helpers.iter().filter(|(_, helper)| helper.cause == cause).map(|(pid, _)| *pid) {
            kill_tree(pid);
        }
    }

    /// Kills the helpers of a process, or of a container with its execs, and their descendants.
    pub(crate) fn end_helpers(&self, key: &str) {
        for pid in self.helpers.iter().filter(|(_, helper)| is_of(&helper.key, key)).map(|(pid, _)| *pid) {
            info!(container:% = key, pid; "killing a helper");
            kill_tree(pid);
        }
    }

    /// Forgets the claimed process of a key. It is reaped like any orphan.
    pub(crate) fn release(&mut self, key: &str) {
        self.gates.close(key);
        if let Some(pid) = self.pids.remove(key) {
            self.claimed.remove(&pid);
        }
    }

    pub(crate) fn snapshot(&self) -> Vec<ProcessSnapshot> {
        let claimed =
            self.claimed.iter().map(|(pid, claimed)| ProcessSnapshot { key: claimed.key.clone(), pid: *pid, role: "claimed".into() });
        let helpers =
            self.helpers.iter().map(|(pid, helper)| ProcessSnapshot { key: helper.key.clone(), pid: *pid, role: helper.program.clone() });
        claimed.chain(helpers).collect()
    }
}
