//! The poll loop: dispatches events and timers, and decides when the keeper exits.
mod clients;
mod exits;
mod resume;
mod snapshot;
mod upgrade;
mod worker;

pub(crate) use resume::{rehearse, resume, run};

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use log::{info, warn};
use nix::errno::Errno;
use nix::libc;

use super::children::{Children, Found};
use super::control::Control;
use super::generation::Surroundings;
use super::ledger::Ledger;
use super::poison::Poison;
use super::poll::{Poll, Source};
use super::publisher::Publisher;
use super::relay::Relay;
use super::streams::Streams;
use super::supervisor::Supervisor;
use super::upgrade::Upgrade;
use crate::handover::{Outcome, ToWorker, UpgradeReport};
use crate::settings::Settings;
use crate::sys;

/// How long an exiting keeper waits for its last events and bytes to be taken.
const EXIT_WITHIN: Duration = Duration::from_secs(12);
/// The same while the host shuts down and no container runs any more: the daemon may be gone for good.
const SHUT_DOWN_WITHIN: Duration = Duration::from_secs(2);
/// A keeper without containers and clients exits after this: no client is left to call Shutdown.
const UNUSED_FOR: Duration = Duration::from_secs(10);
/// While the worker has more than this unread, the keeper does not read from clients with many unanswered bytes.
const MAX_BACKLOG_BYTES: usize = 8 << 20;

/// Whether the keeper exits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leave {
    No,
    /// If nothing more has arrived.
    Idle,
    /// At once.
    Overdue,
}

/// All parts of the keeper, and the state of the loop.
struct Keeper {
    settings: Settings,
    poll: Poll,
    signals: OwnedFd,
    relay: Relay,
    control: Control,
    ledger: Ledger,
    children: Children,
    streams: Streams,
    publisher: Publisher,
    supervisor: Supervisor,
    poison: Poison,
    upgrade: Option<Upgrade>,
    /// The report of the last upgrade.
    last_upgrade: Option<UpgradeReport>,
    started_at: Instant,
    /// SIGTERM was received: the keeper exits once no container runs.
    is_shutting_down: bool,
    timers: Timers,
}

/// The timers of the loop. Not part of the handed-over state: the next executable sets them again.
#[derive(Default)]
struct Timers {
    exit_by: Option<Instant>,
    /// Since when the keeper has had no container, reservation or client.
    unused_since: Option<Instant>,
    /// Clients that the keeper does not read from until the worker has caught up.
    paused: Vec<u32>,
    /// How long an exiting keeper stays for its clients to close their connections.
    linger_until: Option<Instant>,
    /// When to return memory, if there was any activity since the last time.
    trim_at: Option<Instant>,
    /// When to retry accepting connections.
    accept_at: Option<Instant>,
}

impl Keeper {
    /// Never inlined, and boxed: the frames of the loop are those that stay on the stack for as long as the keeper runs.
    #[inline(never)]
    fn new(settings: Settings, relay: Relay, control: Control) -> io::Result<Box<Self>> {
        nix::sys::prctl::set_child_subreaper(true)?;
        let mut poll = Poll::new()?;
        // No stray signal may end the keeper. With SIGXFSZ blocked, a write beyond the limit for files fails like any other.
        sys::signals::block_all_but(&[])?;
        let signals = sys::signals::descriptor()?;
        poll.add_reader(&signals, Source::Signals)?;
        relay.watch(&mut poll)?;
        control.watch(&poll)?;
        let supervisor = Supervisor::new()?;
        Ok(Box::new(Self {
            relay,
            control,
            ledger: Ledger::default(),
            children: Children::default(),
            streams: Streams::default(),
            publisher: Publisher::new(settings.ttrpc_address.as_deref()),
            supervisor,
            poison: Poison::default(),
            upgrade: None,
            last_upgrade: None,
            started_at: Instant::now(),
            is_shutting_down: false,
            timers: Timers::default(),
            settings,
            poll,
            signals,
        }))
    }

    fn serve(&mut self) -> io::Result<()> {
        // after a re-exec, timers may have become due meanwhile
        let mut ticked = self.tick();
        loop {
            let leave = self.may_exit();
            // What has arrived is answered first: a client would take the end of its connection for a failure of the call.
            let sources = match leave {
                Leave::No => self.poll.wait(self.deadline(ticked))?,
                Leave::Idle => self.poll.wait(Some(ticked))?,
                Leave::Overdue => Vec::new(),
            };
            if leave != Leave::No && sources.is_empty() {
                self.exit();
                return Ok(());
            }
            // Streams use no memory, and a container that writes all the time shall not make us trim all the time.
            if sources.iter().any(|source| !matches!(source, Source::Stream(_))) {
                // Not postponed by later activity: frequent polling would keep the shim from ever returning memory.
                self.timers.trim_at.get_or_insert_with(|| Instant::now() + sys::memory::TRIM_AFTER);
            }
            for source in sources {
                self.dispatch(source);
            }
            ticked = self.tick();
            if self.timers.trim_at.is_some_and(|at| at <= Instant::now()) {
                self.timers.trim_at = None;
                self.ledger.compact();
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
                while let Some(signal) = sys::signals::next(&self.signals) {
                    self.signalled(signal, now);
                }
                self.reap();
            }
            Source::Listener | Source::ControlListener => self.accept(now),
            Source::Publisher => self.publisher.turn(now, &self.poll),
            Source::Fifos => self.streams.fifos_touched(&mut self.poll),
            Source::Worker(number) => {
                self.supervisor.flush(now);
                if self.supervisor.backlog_bytes() <= MAX_BACKLOG_BYTES {
                    for id in self.timers.paused.drain(..) {
                        self.poll.again(Source::Client(id));
                    }
                }
                self.worker_sent(number, now);
            }
            Source::Client(id) => self.client(id, now),
            Source::ControlClient(id) => self.control_client(id, now),
            Source::Helper(pid) => {
                if let Some(found) = self.children.read(pid, &mut self.streams, &mut self.poll) {
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

    /// Does everything that is due. Returns the time that it went by. Never inlined: see [`Keeper::new`].
    #[inline(never)]
    fn tick(&mut self) -> Instant {
        let now = Instant::now();
        for (cause, step) in self.streams.tick(now, &mut self.poll) {
            self.found(Found::Outcome { cause, step, outcome: Outcome::Done });
        }
        // Before another worker of the old executable is started.
        let ended = self.supervisor.give_up(now);
        self.ended(ended, now);
        self.proceed(now);
        let now = Instant::now();
        if self.timers.accept_at.is_some_and(|at| at <= now) {
            self.accept(now);
        }
        // Before a worker is started for requests that do not need one.
        let send = |key: &str, signal| self.children.signal(key, signal);
        for (due, pending) in self.ledger.overdue(now, !self.supervisor.is_serving(), send) {
            for (cause, step) in pending {
                let outcome = Outcome::failed(&Errno::ECANCELED.into(), "operation of a request that is already answered".into());
                self.supervisor.send(&ToWorker::Done { cause, step, outcome }, None, now);
            }
            self.answer(due);
        }
        let with = Surroundings { settings: &self.settings, home: &self.children.home };
        self.supervisor.ensure(with, now, self.ledger.is_busy(), &self.poll);
        self.tick_upgrade(now);
        self.send_causes(now);
        self.expire(now);
        self.publisher.tick(now, &self.poll);
        self.supervisor.flush(now);
        now
    }

    /// The next timer. `ticked`: the time up to which everything due was done; anything that became due since is due at once.
    fn deadline(&self, ticked: Instant) -> Option<Instant> {
        [
            self.supervisor.deadline(self.ledger.is_busy()),
            self.upgrade.as_ref().and_then(|upgrade| upgrade.until),
            self.poison.deadline(ticked).filter(|_| self.supervisor.is_serving()),
            self.ledger.deadline(ticked),
            self.streams.deadline(),
            self.publisher.deadline(),
            self.timers.exit_by,
            self.timers.linger_until.filter(|until| *until > ticked),
            self.timers.unused_since.map(|since| since + UNUSED_FOR),
            self.timers.trim_at,
            self.timers.accept_at,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn signalled(&mut self, signal: sys::signals::Received, now: Instant) {
        match signal.number as i32 {
            libc::SIGCHLD | libc::SIGXFSZ => {}
            libc::SIGTERM => {
                info!(sender = signal.sender; "shutting down: the keeper exits once no container runs");
                self.is_shutting_down = true;
            }
            libc::SIGUSR1 => crate::commands::log_snapshot(&self.snapshot(now), &self.settings.control_path),
            number => info!(signal = number, sender = signal.sender; "signal ignored: the shim exits after its containers"),
        }
    }

    fn may_exit(&mut self) -> Leave {
        let now = Instant::now();
        let is_unused = self.ledger.is_unused() && self.relay.count() == 0;
        self.timers.unused_since = is_unused.then(|| self.timers.unused_since.unwrap_or(now));
        if self.timers.unused_since.take_if(|since| now >= *since + UNUSED_FOR).is_some() {
            self.ledger.allow_exit();
        }
        // The init system stops processes that still run, with its own timeout.
        let is_shut_down = self.is_shutting_down && !self.children.have_claimed() && !self.ledger.awaits_pid();
        let within = match is_shut_down {
            true => SHUT_DOWN_WITHIN,
            false if self.ledger.may_exit(self.supervisor.is_failing()) => EXIT_WITHIN,
            false => {
                (self.timers.exit_by, self.timers.linger_until) = (None, None);
                return Leave::No;
            }
        };
        // A client that is still connected would take the end of the connection for a failure of its last call.
        let linger_until = *self.timers.linger_until.get_or_insert_with(|| now + self.ledger.linger());
        let is_alone = self.relay.count() == 0 || linger_until <= now;
        let by = self.timers.exit_by.map_or(now + within, |by| by.min(now + within));
        self.timers.exit_by = Some(by);
        // At shutdown no client may call Delete; only exits are pending, and they must reach the clients.
        let is_idle = if is_shut_down { self.streams.all_is_read() && !self.ledger.is_busy() } else { self.streams.is_drained() };
        let is_quiet = self.relay.is_flushed() && self.control.is_flushed() && !self.relay.is_receiving();
        match is_alone && is_idle && is_quiet && self.publisher.len() == 0 {
            _ if by <= now => Leave::Overdue,
            true => Leave::Idle,
            false => Leave::No,
        }
    }

    fn exit(&mut self) {
        if self.publisher.len() > 0 || !self.streams.all_is_read() {
            warn!(events = self.publisher.len(); "keeper exits with events or output that were not taken");
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
        info!(processes = self.children.started, exits = self.children.exits_seen, bytes = self.streams.bytes_moved, lost = self.streams.bytes_lost; "keeper exits");
    }
}
