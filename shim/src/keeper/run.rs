//! The loop: who is told what, and when the keeper leaves.
mod saved;

use std::ffi::CString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use log::{error, info, warn};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::blame::{Blame, Open};
use super::children::{Children, Found};
use super::control::Control;
use super::image::{self, Descriptors, Error, Saver, Sections};
use super::ledger::{Asked, Asker, Due, Ledger, What};
use super::life::{End, Executable};
use super::poll::{Poll, Source};
use super::publisher::Publisher;
use super::relay::Relay;
use super::streams::Streams;
use super::supervisor::{Ended, Supervisor};
use super::upgrade::{SETTLED_WITHIN, Stage, Upgrade};
use crate::disguise::{self, Place};
use crate::frame::{self, Code};
use crate::handover::{
    Cause, Commit, ControlReply, ControlRequest, MAX_MESSAGE_BYTES, Op, Outcome, PartResult, RequestSnapshot, Snapshot, Step, ToKeeper,
    ToWorker, UpgradeReport,
};
use crate::journal::Journal;
use crate::settings::Settings;
use crate::sys;

/// Told to leave, the keeper gives the last events and bytes so long to go out.
const LEAVE_WITHIN: Duration = Duration::from_secs(12);
/// So long after the last activity the keeper gives memory back.
const TRIM_AFTER: Duration = Duration::from_millis(500);
/// A worker with so much unread is given nothing more of clients that have much unanswered; what they send waits in their sockets.
const MAX_BACKLOG_BYTES: usize = 8 << 20;
/// When it is tried again to accept connections, for which there was no descriptor or no memory.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);
/// How much state a snapshot holds: less than a message, which is for other things too.
const SNAPSHOT_STATE_BYTES: usize = MAX_MESSAGE_BYTES / 2;

/// Runs until the last container was deleted and the client has said Shutdown.
///
/// `listener`, `control`: bound and listening already. Errors are logged; the exit code is for whoever started it by hand.
pub(crate) fn run(settings: Settings, listener: OwnedFd, control: OwnedFd) -> ExitCode {
    info!(pid = std::process::id(); "keeper started");
    end(Keeper::new(settings, listener.into(), control.into()).and_then(|mut keeper| keeper.serve()))
}

/// Goes on from the state of the image before.
///
/// `state`: what that has saved. `before`: its program, to go back to if the state cannot be read; none if this is the way back.
/// Nothing is taken over before everything was read once.
pub(crate) fn resume(settings: Settings, state: OwnedFd, before: Option<OwnedFd>) -> ExitCode {
    disguise::misbehave(Place::Resume);
    let is_back = before.is_none();
    let read = read_state(&state).and_then(|bytes| Keeper::load(settings.clone(), &bytes, &mut Descriptors::rehearsed()).map(|_| bytes));
    let bytes = match (read, &before) {
        (Ok(bytes), _) => bytes,
        (Err(error), Some(before)) => {
            error!(error:% = chain(&error); "the new image cannot go on, going back to the one before");
            return end(go_back(&settings, &state, before));
        }
        (Err(error), None) => {
            error!(error:% = chain(&error); "the keeper cannot go on");
            return ExitCode::FAILURE;
        }
    };
    drop((state, before));
    end(Keeper::load(settings, &bytes, &mut Descriptors::inherited()).map_err(io::Error::other).and_then(|mut keeper| {
        keeper.resumed(is_back);
        keeper.serve()
    }))
}

/// Says on `verdict` whether this image could go on from a state. Touches nothing.
pub(crate) fn rehearse(settings: Settings, state: OwnedFd, verdict: OwnedFd) -> ExitCode {
    disguise::misbehave(Place::Rehearsal);
    let result = read_state(&state).and_then(|bytes| Keeper::load(settings, &bytes, &mut Descriptors::rehearsed()));
    let words = match &result {
        Ok(_) => image::ACCEPTS.to_owned(),
        Err(error) => format!("{}{}", image::REFUSES, chain(error)),
    };
    match std::fs::File::from(verdict).write_all(words.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn end(result: io::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(error:%; "the keeper ends");
            ExitCode::FAILURE
        }
    }
}

fn read_state(state: &OwnedFd) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let file = std::fs::File::from(sys::descriptors::duplicate(state)?);
    file.take(image::MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Executes the image before, with everything that this one was given and has not touched.
fn go_back(settings: &Settings, state: &OwnedFd, before: &OwnedFd) -> io::Result<()> {
    nix::unistd::lseek(state, 0, nix::unistd::Whence::SeekSet)?;
    let name = std::env::args().next().unwrap_or_default();
    let words = std::iter::once(name).chain(settings.to_arguments()).chain(["keeper", "resume"].map(str::to_owned));
    let words = words.chain([state.as_raw_fd().to_string()]);
    let arguments = words.map(CString::new).collect::<Result<Vec<_>, _>>()?;
    let environment = std::env::vars().map(|(name, value)| CString::new(format!("{name}={value}"))).collect::<Result<Vec<_>, _>>()?;
    match sys::exec::execute(before.as_fd(), &arguments, &environment, &[state.as_raw_fd()])? {}
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut sentence = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        sentence = format!("{sentence}: {error}");
        cause = error.source();
    }
    sentence
}

pub(super) struct Keeper {
    pub(super) settings: Settings,
    pub(super) poll: Poll,
    signals: SignalFd,
    pub(super) relay: Relay,
    pub(super) control: Control,
    pub(super) ledger: Ledger,
    pub(super) children: Children,
    pub(super) streams: Streams,
    pub(super) publisher: Publisher,
    pub(super) supervisor: Supervisor,
    pub(super) blame: Blame,
    pub(super) upgrade: Option<Upgrade>,
    /// What came of the last one.
    pub(super) last_upgrade: Option<UpgradeReport>,
    pub(super) born: Instant,
    leaving_since: Option<Instant>,
    /// Clients that are not read from until the worker has caught up.
    paused: Vec<u32>,
    /// When to give memory back, if anything has happened since the last time.
    trim_at: Option<Instant>,
    /// Connections wait that could not be accepted.
    accept_at: Option<Instant>,
}

impl Keeper {
    /// Never inlined, and boxed: the frames of the loop are those that stay on the stack for as long as the keeper lives.
    #[inline(never)]
    fn new(settings: Settings, listener: UnixListener, control: UnixListener) -> io::Result<Box<Self>> {
        nix::sys::prctl::set_child_subreaper(true)?;
        let poll = Poll::new()?;
        let signals = block_signals(&poll)?;
        let supervisor = Supervisor::new(&settings)?;
        Ok(Box::new(Self {
            relay: Relay::new(listener, &poll)?,
            control: Control::new(control, &poll)?,
            ledger: Ledger::default(),
            children: Children::default(),
            streams: Streams::new(),
            publisher: Publisher::new(settings.ttrpc_address.as_deref()),
            supervisor,
            blame: Blame::default(),
            upgrade: None,
            last_upgrade: None,
            born: Instant::now(),
            leaving_since: None,
            paused: Vec::new(),
            trim_at: None,
            accept_at: None,
            settings,
            poll,
            signals,
        }))
    }

    fn serve(&mut self) -> io::Result<()> {
        self.supervisor.ensure(Instant::now(), self.ledger.is_busy(), &self.poll);
        loop {
            if self.may_leave() {
                self.leave();
                return Ok(());
            }
            let sources = self.poll.wait(self.deadline())?;
            // Streams use no memory, and a container that writes all the time shall not make us trim all the time.
            if sources.iter().any(|source| !matches!(source, Source::Stream(_))) {
                // Not put off by what comes later: somebody who asks all shims all the time would keep them big.
                self.trim_at.get_or_insert_with(|| Instant::now() + TRIM_AFTER);
            }
            for source in sources {
                self.dispatch(source);
            }
            self.tick();
            if self.trim_at.is_some_and(|at| at <= Instant::now()) {
                self.trim_at = None;
                sys::memory::trim();
                if self.supervisor.is_asleep() {
                    sys::memory::leave_program();
                }
            }
        }
    }

    /// Never inlined: see [`Keeper::new`].
    #[inline(never)]
    fn dispatch(&mut self, source: Source) {
        let now = Instant::now();
        match source {
            Source::Signals => {
                while let Ok(Some(signal)) = self.signals.read_signal() {
                    if ![Signal::SIGCHLD as u32, Signal::SIGXFSZ as u32].contains(&signal.ssi_signo) {
                        info!(signal = signal.ssi_signo; "signal ignored: a shim ends with its containers");
                    }
                }
                self.reap();
            }
            Source::Listener | Source::ControlListener => self.accept(now),
            Source::Publisher => self.publisher.turn(now, &self.poll),
            Source::Fifos => self.streams.fifos_touched(&mut self.poll),
            Source::Worker(life) => {
                self.supervisor.flush(now);
                if self.supervisor.backlog_bytes() <= MAX_BACKLOG_BYTES {
                    for id in self.paused.drain(..) {
                        self.poll.again(Source::Client(id));
                    }
                }
                for message in self.supervisor.receive(life, now, &mut self.poll) {
                    self.take(message);
                }
                for message in self.supervisor.receive_from_candidate(life, now, &mut self.poll) {
                    self.candidate_said(message, now);
                }
            }
            Source::Client(id) => self.client(id, now),
            Source::Commander(id) => self.commander(id, now),
            Source::Helper(pid) => {
                if let Some(found) = self.children.read(pid, &mut self.poll) {
                    self.found(found);
                }
            }
            Source::Stream(id) => self.streams.turn(id, now, &mut self.poll),
            Source::Watch => self.supervisor.wake(),
            Source::Foreign(pid) => {
                for found in self.children.foreign_ended(pid) {
                    self.found(found);
                }
            }
        }
    }

    /// What is due by the clock, and what the last turns have made possible. Never inlined: see [`Keeper::new`].
    #[inline(never)]
    fn tick(&mut self) {
        self.go_on();
        let now = Instant::now();
        if self.accept_at.is_some_and(|at| at <= now) {
            self.accept(now);
        }
        // Before a worker is brought back for what needs none.
        for (due, pending) in self.ledger.overdue(now, !self.supervisor.is_serving()) {
            for (cause, step) in pending {
                let outcome = failed(&Errno::ECANCELED.into(), "operation of a request that was answered meanwhile".into());
                self.supervisor.send(&ToWorker::Done { cause, step, outcome }, None, now);
            }
            self.answer(due);
        }
        if let Some(ended) = self.supervisor.give_up(now) {
            self.ended(ended, now);
        }
        self.supervisor.ensure(now, self.ledger.is_busy(), &self.poll);
        self.tick_upgrade(now);
        self.tell(now);
        self.ledger.expire(now);
        self.streams.tick(now, &mut self.poll);
        self.publisher.turn(now, &self.poll);
        self.supervisor.flush(now);
    }

    fn deadline(&self) -> Option<Instant> {
        let now = Instant::now();
        [
            self.supervisor.deadline(self.ledger.is_busy()),
            self.upgrade_deadline(),
            self.blame.deadline(now).filter(|_| self.supervisor.is_serving()),
            self.ledger.deadline(),
            self.streams.deadline(now),
            self.publisher.deadline(),
            self.leaving_since.map(|since| since + LEAVE_WITHIN),
            self.trim_at,
            self.accept_at,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    // --- clients -----------------------------------------------------------------------------------------------------

    fn client(&mut self, id: u32, now: Instant) {
        // The others are read from: what they ask may have a ready-made answer.
        if self.supervisor.backlog_bytes() > MAX_BACKLOG_BYTES && !self.relay.is_modest(id) {
            if !self.paused.contains(&id) {
                self.paused.push(id);
            }
            return;
        }
        let (requests, is_connected) = self.relay.turn(id, &mut self.poll);
        for request in requests {
            self.ledger.open_request(Asker::Client(request.caller), request.payload, now);
        }
        self.tell(now);
        if !is_connected {
            self.ledger.forget(|asker| matches!(asker, Asker::Client(caller) if caller.client == id));
        }
    }

    /// Takes new connections in. Those that cannot be are tried again: a listener tells once of each.
    fn accept(&mut self, now: Instant) {
        let was_well = self.accept_at.take().is_none();
        let (clients, commanders) = (self.relay.accept(&self.poll), self.control.accept(&self.poll));
        if let Err(error) = clients.and(commanders) {
            if was_well {
                warn!(error:%; "cannot accept a connection, will retry");
            }
            self.accept_at = Some(now + ACCEPT_AGAIN_AFTER);
        }
    }

    /// Tells the worker what it was not told of and may be.
    fn tell(&mut self, now: Instant) {
        if !self.supervisor.is_serving() || (self.ledger.untold().is_empty() && !self.blame.is_trying()) {
            return;
        }
        let is_open = |cause: Cause| self.ledger.causes().contains_key(&cause);
        let open = Open { untold: self.ledger.untold(), exits: self.ledger.exits(), is_open: &is_open };
        for cause in self.blame.next(&open, self.supervisor.is_lively(), now) {
            if let Some(message) = self.ledger.announce(cause, now) {
                self.supervisor.send(&message, None, now);
            }
        }
    }

    /// Tells a worker that has said hello everything, in the order that lets it go on: state, requests, exits.
    pub(super) fn welcome(&mut self, now: Instant) {
        if !self.supervisor.welcome(now) {
            return;
        }
        for (key, value) in self.ledger.state() {
            self.supervisor.send(&ToWorker::State { key: key.clone(), value: value.clone() }, None, now);
        }
        self.ledger.begin_life();
        self.tell(now);
        self.supervisor.send(&ToWorker::CaughtUp, None, now);
        self.ask_whether_settled(now);
        self.supervisor.flush(now);
    }

    fn answer(&mut self, due: Due) {
        match due.asker {
            Asker::Client(caller) => self.relay.answer(caller, due.request_bytes, &due.response, &mut self.poll),
            Asker::Commander(id) => self.control.reply(id, &ControlReply::Answer { response: due.response }),
        }
    }

    fn commander(&mut self, id: u32, now: Instant) {
        let Some((request, attached)) = self.control.turn(id) else { return };
        match request {
            ControlRequest::Describe => {
                let snapshot = Box::new(self.snapshot(now));
                self.control.reply(id, &ControlReply::Snapshot(snapshot));
            }
            ControlRequest::Reserve { id: container } => {
                // One that is leaving stays for it.
                self.ledger.reserve(container, now);
                self.control.reply(id, &ControlReply::Done);
            }
            ControlRequest::Forget { id: container } => {
                self.forget(&container, now);
                self.control.reply(id, &ControlReply::Done);
            }
            ControlRequest::Upgrade { path, keeper_too } => match attached {
                Some(file) => self.begin_upgrade(id, file, path, keeper_too, now),
                None => self.control.reply(id, &ControlReply::Refused { why: "no program came along".into() }),
            },
            ControlRequest::Ask { payload } => {
                self.ledger.open_request(Asker::Commander(id), payload, now);
                self.tell(now);
            }
        }
    }

    /// Somebody has removed a container by hand, or nobody will make it: it holds nothing here any more.
    fn forget(&mut self, container: &str, now: Instant) {
        let why = format!("container {container} was removed by hand: nobody will tell of its end");
        let (had_state, waiting) = self.ledger.forget_container(container, &frame::error_response(Code::NotFound, &why));
        for due in waiting {
            self.answer(due);
        }
        if had_state {
            warn!(container:%; "removed by hand, forgetting it");
            self.children.end_helpers(container);
            self.children.release(container);
            self.streams.release(container, now, &mut self.poll);
            // A worker that lives has it in mind still; the next one has not.
            self.supervisor.kill();
        }
    }

    // --- the worker --------------------------------------------------------------------------------------------------

    pub(super) fn take(&mut self, message: ToKeeper) {
        match message {
            ToKeeper::Hello { versions, build } => {
                let now = Instant::now();
                if self.supervisor.hello(versions, build, now) {
                    self.welcome(now);
                }
            }
            ToKeeper::Fit { .. } => {}
            ToKeeper::Watch => self.supervisor.watch(),
            ToKeeper::Rest { may } => {
                let is_needed = self.ledger.is_busy() || self.upgrade.is_some();
                self.supervisor.rest(may, is_needed, &self.poll);
            }
            ToKeeper::Pong { number } => self.ponged(number, Instant::now()),
            ToKeeper::Operation { cause, step, op } => self.operation(cause, step, op),
            ToKeeper::Commit(commit) => self.commit(commit),
        }
    }

    fn operation(&mut self, cause: Cause, step: Step, op: Op) {
        // Handing out a descriptor changes nothing and cannot be remembered.
        if let Op::ReadEnd { key, stream } = op {
            let (outcome, descriptor) = match self.streams.read_end(&key, stream) {
                Ok(end) => (Outcome::Descriptor, Some(end)),
                Err(error) => (failed(&error, format!("read end of {stream:?} of {key}")), None),
            };
            self.supervisor.send(&ToWorker::Done { cause, step, outcome }, descriptor, Instant::now());
            return;
        }
        let reports_pid = matches!(&op, Op::Spawn(spawn) if spawn.reports_pid);
        let outcome = match self.ledger.ask(cause, step, reports_pid) {
            Asked::Known(outcome) => Some(if op == Op::Once { failed(&Errno::EALREADY.into(), "once".into()) } else { outcome }),
            Asked::Pending => None,
            Asked::Over => Some(failed(&Errno::EINVAL.into(), format!("operation of cause {cause}, which is over"))),
            Asked::New => {
                let outcome = self.perform(cause, step, op);
                if let Some(outcome) = &outcome {
                    self.ledger.settle(cause, step, outcome);
                }
                outcome
            }
        };
        if let Some(outcome) = outcome {
            self.supervisor.send(&ToWorker::Done { cause, step, outcome }, None, Instant::now());
        }
    }

    /// Performs an operation for the first and only time. `None`: the outcome will come.
    fn perform(&mut self, cause: Cause, step: Step, op: Op) -> Option<Outcome> {
        let result = match op {
            Op::Spawn(order) => return self.children.start(cause, step, order, &mut self.streams, &self.poll).err(),
            Op::Signal { key, signal } => {
                self.children.signal(&key, signal).map_err(|error| (format!("send signal {signal} to {key}"), error))
            }
            Op::Once => Ok(()),
            Op::OpenStdio(stdio) => self.streams.open(stdio, &mut self.poll),
            Op::CloseStdin { key } => {
                self.streams.close_stdin(&key, &mut self.poll);
                Ok(())
            }
            Op::Resize { key, rows, columns } => {
                self.streams.resize(&key, rows, columns).map_err(|error| (format!("resize the terminal of {key}"), error))
            }
            Op::WriteJournal { path, body } => Journal::open(path.as_ref())
                .and_then(|journal| journal.write_body(&body))
                .map_err(|error| (format!("write journal {path}"), error)),
            Op::EndHelpers { key } => {
                self.children.end_helpers(&key);
                Ok(())
            }
            Op::ReadEnd { .. } => Err(("remember a descriptor".into(), Errno::EINVAL.into())),
        };
        Some(match result {
            Ok(()) => Outcome::Done,
            Err((what, error)) => failed(&error, what),
        })
    }

    fn commit(&mut self, mut commit: Commit) {
        self.supervisor.committed();
        let now = Instant::now();
        let (claims, awaited_pid) = (!commit.claims.is_empty(), self.ledger.awaits_pid());
        for claim in std::mem::take(&mut commit.claims) {
            self.children.claim(claim, &self.poll);
        }
        for event in std::mem::take(&mut commit.events) {
            self.publisher.push(event);
        }
        for due in self.ledger.commit(&mut commit) {
            self.answer(due);
        }
        let (relay, control) = (&self.relay, &self.control);
        let is_connected = |asker| match asker {
            Asker::Client(caller) => relay.is_connected(caller.client),
            Asker::Commander(id) => control.is_connected(id),
        };
        for (asker, bytes) in self.ledger.park(std::mem::take(&mut commit.parks), is_connected) {
            if let Asker::Client(caller) = asker {
                self.relay.settle(caller, Some(bytes), &mut self.poll);
            }
        }
        for key in std::mem::take(&mut commit.releases) {
            self.children.release(&key);
            self.streams.release(&key, now, &mut self.poll);
            self.ledger.release_reservation(&key);
        }
        self.publisher.turn(now, &self.poll);
        // A claimed process may have ended already, and zombies that were kept for this commit may go.
        if claims || (awaited_pid && !self.ledger.awaits_pid()) {
            self.reap();
        }
    }

    // --- processes ---------------------------------------------------------------------------------------------------

    fn reap(&mut self) {
        let ours: Vec<u32> = self.supervisor.pids().chain(self.rehearsal_pid()).collect();
        let found = self.children.reap(self.ledger.awaits_pid(), &ours, &mut self.streams, &mut self.poll);
        for found in found {
            self.found(found);
        }
    }

    fn found(&mut self, found: Found) {
        let now = Instant::now();
        match found {
            Found::Outcome { cause, step, outcome } => {
                if self.ledger.settle(cause, step, &outcome) {
                    self.supervisor.send(&ToWorker::Done { cause, step, outcome }, None, now);
                }
            }
            Found::Exit(exit) => {
                self.streams.exited(&exit.key, now, &mut self.poll);
                self.ledger.open_exit(exit);
                self.tell(now);
            }
            Found::Other { pid, status } => match self.supervisor.ended(pid, status, now) {
                Ended::Other => {
                    self.rehearsal_ended(pid, status);
                }
                ended => self.ended(ended, now),
            },
            Found::ReaderGone { key, stream } => self.streams.reader_gone(&key, stream, &mut self.poll),
        }
    }

    fn ended(&mut self, ended: Ended, now: Instant) {
        match ended {
            Ended::Worker { end, rolled_back } => self.worker_ended(&end, rolled_back, now),
            Ended::Candidate(end) => self.candidate_ended(end),
            Ended::Other => {}
        }
    }

    fn worker_ended(&mut self, end: &End, rolled_back: bool, now: Instant) {
        // Its unread messages went with it.
        for id in self.paused.drain(..) {
            self.poll.again(Source::Client(id));
        }
        let told = self.ledger.told();
        self.ledger.begin_life();
        if rolled_back {
            self.rolled_back(end);
        } else if let Some(guilty) = self.blame.ended(told, end, now) {
            self.guilty(guilty, end);
        }
        self.worker_left();
    }

    /// One worker after the other dies over a cause. A request is answered; an exit is a fact, and waits for another worker.
    fn guilty(&mut self, cause: Cause, end: &End) {
        let method = self.ledger.causes().get(&cause).map(|open| open.what.name()).unwrap_or_default();
        let why = format!("every worker of this shim dies over this request ({method}; last by: {}), so it is given up", end.why);
        match self.ledger.give_up(cause, frame::error_response(Code::Internal, &why)) {
            Some(due) => {
                error!(method:%, why:% = end.why; "every worker dies over a request, it is answered with an error");
                self.answer(due);
            }
            None => error!(what:% = method, why:% = end.why; "every worker dies over an exit, it is withheld for a while"),
        }
    }

    // --- the end -----------------------------------------------------------------------------------------------------

    fn may_leave(&mut self) -> bool {
        if !self.ledger.may_leave(self.supervisor.is_hopeless()) {
            self.leaving_since = None;
            return false;
        }
        let since = *self.leaving_since.get_or_insert_with(Instant::now);
        let all_is_out = self.publisher.len() == 0 && self.streams.is_drained() && self.relay.is_flushed() && self.control.is_flushed();
        all_is_out || since.elapsed() >= LEAVE_WITHIN
    }

    fn leave(&mut self) {
        if self.publisher.len() > 0 || !self.streams.is_drained() {
            warn!(events = self.publisher.len(); "leaving though not everything was taken");
        }
        let socket = self.settings.shim_address.strip_prefix("unix://").unwrap_or(&self.settings.shim_address);
        for path in [std::path::Path::new(socket), &self.settings.control_path] {
            if let Err(error) = std::fs::remove_file(path)
                && error.kind() != io::ErrorKind::NotFound
            {
                warn!(path:% = path.display(), error:%; "cannot remove a socket");
            }
        }
        self.supervisor.kill();
        info!(processes = self.children.started, exits = self.children.exits_seen, bytes = self.streams.bytes_moved, lost = self.streams.bytes_lost; "keeper leaves");
    }

    // --- for people --------------------------------------------------------------------------------------------------

    /// Every container, with what is known of it as far as that fits into one message: who is there matters most.
    fn state_for_people(&self) -> Vec<(String, Vec<u8>)> {
        let mut left = SNAPSHOT_STATE_BYTES;
        let fitting = self.ledger.state().iter().map(|(key, value)| {
            let fits = value.len() <= left;
            left -= if fits { value.len() } else { 0 };
            (key.clone(), if fits { value.clone() } else { Vec::new() })
        });
        fitting.collect()
    }

    fn snapshot(&self, now: Instant) -> Snapshot {
        let requests = self.ledger.causes().iter().map(|(cause, open)| {
            let age_nanos = match &open.what {
                What::Request { arrived, .. } => now.saturating_duration_since(*arrived).as_nanos() as u64,
                What::Exit(_) => 0,
            };
            RequestSnapshot {
                cause: *cause,
                method: open.what.name(),
                age_nanos,
                operations: open.operations.len() as u32,
                operations_done: open.operations.iter().filter(|(_, outcome)| outcome.is_some()).count() as u32,
            }
        });
        let withheld = self.blame.withheld(now).filter_map(|cause| self.ledger.causes().get(&cause)).map(|open| open.what.name());
        Snapshot {
            namespace: self.settings.namespace.clone(),
            group: self.settings.id.clone(),
            keeper_pid: std::process::id(),
            keeper_build: disguise::build().into(),
            worker_pid: self.supervisor.pid(),
            worker_build: self.supervisor.build().map_or("", |(build, _)| build).into(),
            lives: self.supervisor.lives,
            uptime_seconds: now.saturating_duration_since(self.born).as_secs(),
            state: self.state_for_people(),
            processes: self.children.snapshot(),
            requests: requests.collect(),
            streams: self.streams.snapshot(),
            waiters: self.ledger.parked().map(|(key, count)| (key.to_owned(), count as u32)).collect(),
            events_queued: self.publisher.len() as u32,
            events_sent: self.publisher.sent,
            reservations: self.ledger.reservations().map(str::to_owned).collect(),
            processes_started: self.children.started,
            exits_seen: self.children.exits_seen,
            connections: self.relay.count() as u32,
            worker_version: self.supervisor.build().map_or(0, |(_, version)| version),
            worker_path: self.supervisor.executable.path.clone(),
            fruitless: self.supervisor.fruitless,
            asleep: self.supervisor.is_asleep(),
            last_end: self.supervisor.last_end.clone().unwrap_or_default(),
            previous_build: self.supervisor.previous.as_ref().map(|(previous, _)| previous.build.clone()).unwrap_or_default(),
            upgrade: self.last_upgrade.clone(),
            withheld: withheld.collect(),
        }
    }
}

/// With SIGXFSZ blocked, a write beyond the limit for files fails like any other.
const BLOCKED: [Signal; 8] =
    [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGPIPE, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGXFSZ];

fn block_signals(poll: &Poll) -> io::Result<SignalFd> {
    let mask: SigSet = BLOCKED.into_iter().collect();
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    poll.add_reader(&signals, Source::Signals)?;
    Ok(signals)
}

fn failed(error: &io::Error, what: String) -> Outcome {
    Outcome::Failed { errno: error.raw_os_error().unwrap_or(Errno::EINVAL as i32), what }
}
