//! The loop: who is told what, and when the keeper leaves.
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use log::{error, info, warn};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::children::{Children, Found};
use super::control::Control;
use super::ledger::{Asked, Asker, Due, Ledger, What};
use super::poll::{Poll, Source};
use super::publisher::Publisher;
use super::relay::Relay;
use super::streams::Streams;
use super::supervisor::Supervisor;
use crate::frame::RequestView;
use crate::handover::{
    Cause, Commit, ControlReply, ControlRequest, MAX_MESSAGE_BYTES, Op, Outcome, RequestSnapshot, Snapshot, Step, ToKeeper, ToWorker,
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
    match Keeper::new(settings, listener.into(), control.into()).and_then(|mut keeper| keeper.serve()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(error:%; "the keeper ends");
            ExitCode::FAILURE
        }
    }
}

struct Keeper {
    settings: Settings,
    poll: Poll,
    signals: SignalFd,
    relay: Relay,
    control: Control,
    ledger: Ledger,
    children: Children,
    streams: Streams,
    publisher: Publisher,
    supervisor: Supervisor,
    born: Instant,
    leaving_since: Option<Instant>,
    /// Clients that are not read from until the worker has caught up.
    paused: Vec<u32>,
    /// When to give memory back, if anything has happened since the last time.
    trim_at: Option<Instant>,
    /// Connections wait that could not be accepted.
    accept_at: Option<Instant>,
}

impl Keeper {
    fn new(settings: Settings, listener: UnixListener, control: UnixListener) -> io::Result<Self> {
        nix::sys::prctl::set_child_subreaper(true)?;
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGPIPE, Signal::SIGUSR1, Signal::SIGUSR2]
        {
            mask.add(signal);
        }
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let poll = Poll::new()?;
        poll.add_reader(&signals, Source::Signals)?;
        let supervisor = Supervisor::new(&settings)?;
        Ok(Self {
            relay: Relay::new(listener, &poll)?,
            control: Control::new(control, &poll)?,
            ledger: Ledger::default(),
            children: Children::default(),
            streams: Streams::new(&poll)?,
            publisher: Publisher::new(settings.ttrpc_address.as_deref()),
            supervisor,
            born: Instant::now(),
            leaving_since: None,
            paused: Vec::new(),
            trim_at: None,
            accept_at: None,
            settings,
            poll,
            signals,
        })
    }

    fn serve(&mut self) -> io::Result<()> {
        info!(pid = std::process::id(); "keeper started");
        self.supervisor.ensure(Instant::now(), &self.poll);
        loop {
            if self.may_leave() {
                self.leave();
                return Ok(());
            }
            let sources = self.poll.wait(self.deadline())?;
            // Streams use no memory, and a container that writes all the time shall not make us trim all the time.
            if sources.iter().any(|source| !matches!(source, Source::Stream(_))) {
                self.trim_at = Some(Instant::now() + TRIM_AFTER);
            }
            for source in sources {
                self.dispatch(source);
            }
            self.tick();
        }
    }

    fn dispatch(&mut self, source: Source) {
        let now = Instant::now();
        match source {
            Source::Signals => {
                while let Ok(Some(signal)) = self.signals.read_signal() {
                    if signal.ssi_signo != Signal::SIGCHLD as u32 {
                        info!(signal = signal.ssi_signo; "signal ignored: a shim ends with its containers");
                    }
                }
                self.reap();
            }
            Source::Listener | Source::ControlListener => self.accept(now),
            Source::Publisher => self.publisher.turn(now, &self.poll),
            Source::Fifos => self.streams.fifos_touched(&mut self.poll),
            Source::Worker(life) => {
                self.supervisor.flush();
                if self.supervisor.backlog_bytes() <= MAX_BACKLOG_BYTES {
                    for id in self.paused.drain(..) {
                        self.poll.again(Source::Client(id));
                    }
                }
                for message in self.supervisor.receive(life, &mut self.poll) {
                    self.take(message);
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
            Source::Foreign(pid) => {
                for found in self.children.foreign_ended(pid) {
                    self.found(found);
                }
            }
        }
    }

    /// What is due by the clock, and what the last turns have made possible.
    fn tick(&mut self) {
        let now = Instant::now();
        if self.trim_at.is_some_and(|at| at <= now) {
            self.trim_at = None;
            sys::memory::trim();
        }
        if self.accept_at.is_some_and(|at| at <= now) {
            self.accept(now);
        }
        self.supervisor.ensure(now, &self.poll);
        self.ledger.expire(now);
        for due in self.ledger.overdue(now, !self.supervisor.is_serving()) {
            self.answer(due);
        }
        self.streams.tick(now, &mut self.poll);
        self.publisher.turn(now, &self.poll);
        self.supervisor.flush();
    }

    fn deadline(&self) -> Option<Instant> {
        let now = Instant::now();
        [
            self.supervisor.deadline(),
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
            self.open_request(Asker::Client(request.caller), request.payload, now);
        }
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

    fn open_request(&mut self, asker: Asker, payload: Vec<u8>, now: Instant) {
        let cause = self.ledger.open_request(asker, payload, now);
        self.tell_worker(cause, now);
    }

    fn tell_worker(&mut self, cause: Cause, now: Instant) {
        if self.supervisor.is_serving()
            && let Some(message) = self.ledger.announce(cause, now)
        {
            self.supervisor.send(&message, None);
        }
    }

    fn answer(&mut self, due: Due) {
        match due.asker {
            Asker::Client(caller) => self.relay.answer(caller, due.request_bytes, &due.response, &mut self.poll),
            Asker::Commander(id) => self.control.reply(id, &ControlReply::Answer { response: due.response }),
        }
    }

    fn commander(&mut self, id: u32, now: Instant) {
        let Some(request) = self.control.turn(id) else { return };
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
            ControlRequest::Ask { payload } => self.open_request(Asker::Commander(id), payload, now),
        }
    }

    /// Somebody has removed a container by hand, or nobody will make it: it holds nothing here any more.
    fn forget(&mut self, container: &str, now: Instant) {
        if self.ledger.forget_container(container) {
            warn!(container:%; "removed by hand, forgetting it");
            self.children.end_helpers(container);
            self.children.release(container);
            self.streams.release(container, now, &mut self.poll);
            // A worker that lives has it in mind still; the next one has not.
            self.supervisor.kill();
        }
    }

    // --- the worker --------------------------------------------------------------------------------------------------

    fn take(&mut self, message: ToKeeper) {
        match message {
            ToKeeper::Hello { version, build } => {
                if !self.supervisor.hello(version, build) {
                    self.supervisor.kill();
                    return;
                }
                for message in self.ledger.replay(Instant::now()) {
                    self.supervisor.send(&message, None);
                }
            }
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
            self.supervisor.send(&ToWorker::Done { cause, step, outcome }, descriptor);
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
            self.supervisor.send(&ToWorker::Done { cause, step, outcome }, None);
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
        let found = self.children.reap(self.ledger.awaits_pid(), self.supervisor.pid(), &mut self.streams, &mut self.poll);
        for found in found {
            self.found(found);
        }
    }

    fn found(&mut self, found: Found) {
        let now = Instant::now();
        match found {
            Found::Outcome { cause, step, outcome } => {
                if self.ledger.settle(cause, step, &outcome) {
                    self.supervisor.send(&ToWorker::Done { cause, step, outcome }, None);
                }
            }
            Found::Exit(exit) => {
                self.streams.exited(&exit.key, now, &mut self.poll);
                let cause = self.ledger.open_exit(exit);
                self.tell_worker(cause, now);
            }
            Found::Other { pid } => {
                if self.supervisor.ended(pid, now) {
                    // Its unread messages went with it.
                    for id in self.paused.drain(..) {
                        self.poll.again(Source::Client(id));
                    }
                }
            }
            Found::ReaderGone { key, stream } => self.streams.reader_gone(&key, stream, &mut self.poll),
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
            let (method, age_nanos) = match &open.what {
                What::Request { payload, arrived, .. } => {
                    let method = RequestView::parse(payload).map_or("?".into(), |view| String::from_utf8_lossy(view.method).into_owned());
                    (method, now.saturating_duration_since(*arrived).as_nanos() as u64)
                }
                What::Exit(exit) => (format!("exit of {}", exit.key), 0),
            };
            RequestSnapshot {
                cause: *cause,
                method,
                age_nanos,
                operations: open.operations.len() as u32,
                operations_done: open.operations.iter().filter(|(_, outcome)| outcome.is_some()).count() as u32,
            }
        });
        Snapshot {
            namespace: self.settings.namespace.clone(),
            group: self.settings.id.clone(),
            keeper_pid: std::process::id(),
            keeper_build: env!("CARGO_PKG_VERSION").into(),
            worker_pid: self.supervisor.pid(),
            worker_build: self.supervisor.build().unwrap_or_default().into(),
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
        }
    }
}

fn failed(error: &io::Error, what: String) -> Outcome {
    Outcome::Failed { errno: error.raw_os_error().unwrap_or(Errno::EINVAL as i32), what }
}
