//! Starts, watches and replaces the worker: its generations, the candidate of an upgrade, and their executables.
//!
//! ```text
//!  Absent ──(start)──▶ Starting ──(hello)──▶ Serving ──(dies, hangs, or sends garbage)──▶ Absent ──(back-off)──▶ …
//!                                              ▲ cut-over
//!          candidate: Starting ──(hello)──▶ Trying ──(fit)
//!
//!  Serving ──(idle for a while, and may hibernate)──▶ Asleep ──(a cause, or a watch)──▶ Absent
//! ```
//!
//! **Invariant:** a generation that committed nothing makes the next one wait longer; one that committed anything does not.
//! **Invariant:** a candidate takes over only after it has answered Fit; until then the serving worker is not touched.
//! **Invariant:** after the cut-over the previous executable is kept for [`PROBATION`], and used again if a worker of the new one fails.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use log::{debug, error, info, warn};

use super::generation::{End, Executable, Fault, Generation, Program};
use super::poll::{Poll, Source};
use crate::handover::{ToKeeper, ToWorker, Versions};
use crate::saved::saved;
use crate::settings::Settings;
use crate::sys;

/// How many generations in a row may commit nothing before the next one has to wait.
const FREE_RETRIES: u32 = 3;
const FIRST_BACKOFF: Duration = Duration::from_millis(10);
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// How long a new executable is on probation.
pub(super) const PROBATION: Duration = Duration::from_secs(300);

/// Which process exited.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Neither the worker nor the candidate.
    Other,
    Candidate(End),
    /// `rolled_back`: its executable failed on probation and was replaced by the previous one.
    Worker {
        end: End,
        rolled_back: bool,
    },
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Supervisor {
    program: Program,
    pub(super) executable: Executable,
    /// The previous executable, and until when it is kept.
    pub(super) previous: Option<(Executable, Instant)>,
    worker: Option<Generation>,
    candidate: Option<Generation>,
    /// Workers that were killed and have not exited. Their links are closed.
    stuck: Vec<u32>,
    pub(super) last_number: u32,
    pub(super) generations: u32,
    pub(super) fruitless: u32,
    pub(super) retry_at: Option<Instant>,
    /// Why the last worker failed.
    pub(super) last_end: Option<String>,
    /// After how long an idle worker hibernates; absent: never.
    idle_after: Option<Duration>,
    /// Descriptors that the worker handed over for its hibernation.
    watches: Vec<OwnedFd>,
    /// There is no worker because it hibernates.
    asleep: bool,
}

saved! {
    Supervisor {
        executable, previous, last_number, generations, fruitless, retry_at, last_end; program, worker, candidate, stuck, idle_after,
        watches, asleep
    }
}

/// The environment variable with the seconds after which an idle worker hibernates; 0: never.
const IDLE_VARIABLE: &str = "X_SHIM_IDLE_SECONDS";
const DEFAULT_IDLE: Duration = Duration::from_secs(60);
/// A worker may still check for an OOM kill that the kernel has not counted yet.
const MIN_IDLE: Duration = Duration::from_secs(5);
/// Longer than any uptime, and still representable as an [`Instant`].
const MAX_IDLE: Duration = Duration::from_secs(u32::MAX as u64);

/// The status of a process that was killed.
const KILLED: u32 = 128 + 9;

/// After how long an idle worker hibernates, from the value of the variable.
///
/// Errors: it is not a number.
fn parse_idle(text: Option<&OsStr>) -> Result<Option<Duration>, &OsStr> {
    let named = match text {
        Some(text) => {
            let seconds: u64 = text.to_str().and_then(|text| text.trim().parse().ok()).ok_or(text)?;
            Duration::from_secs(seconds).min(MAX_IDLE)
        }
        None => DEFAULT_IDLE,
    };
    Ok(Some(named).filter(|idle_after| !idle_after.is_zero()).map(|idle_after| idle_after.max(MIN_IDLE)))
}

/// How long the next worker has to wait after `fruitless` generations that committed nothing.
fn back_off(fruitless: u32) -> Duration {
    match fruitless.saturating_sub(FREE_RETRIES).min(16) {
        0 => Duration::ZERO,
        doublings => (FIRST_BACKOFF * (1 << (doublings - 1))).min(MAX_BACKOFF),
    }
}

impl Supervisor {
    pub(crate) fn new(settings: &Settings) -> io::Result<Self> {
        let idle_after = std::env::var_os(IDLE_VARIABLE);
        let idle_after = parse_idle(idle_after.as_deref()).unwrap_or_else(|text| {
            let text = text.display();
            warn!(text:%; "{IDLE_VARIABLE} is not a number of seconds, using {} s", DEFAULT_IDLE.as_secs());
            Some(DEFAULT_IDLE)
        });
        let program = Program { arguments: settings.command_line(&["worker"])?, environment: sys::exec::environment() };
        Ok(Self {
            program,
            executable: Executable::own()?,
            previous: None,
            worker: None,
            candidate: None,
            stuck: Vec::new(),
            last_number: 0,
            generations: 0,
            fruitless: 0,
            retry_at: None,
            last_end: None,
            idle_after,
            watches: Vec::new(),
            asleep: false,
        })
    }

    /// Resumes after a re-exec. The worker has exited by then.
    pub(crate) fn resume(self, settings: &Settings) -> io::Result<Self> {
        let Self { program, idle_after, .. } = Self::new(settings)?;
        Ok(Self { program, idle_after, ..self })
    }

    /// Stops waiting for a worker that was killed and does not exit, so that the next one can start.
    pub(crate) fn give_up(&mut self, now: Instant) -> Option<Ended> {
        let worker = match self.candidate.take_if(|worker| worker.is_stuck(now)) {
            Some(candidate) => {
                self.stuck.push(candidate.pid);
                return Some(Ended::Candidate(candidate.end(KILLED)));
            }
            None => self.worker.take_if(|worker| worker.is_stuck(now))?,
        };
        warn!(pid = worker.pid; "the worker was killed and does not exit, starting the next one");
        self.stuck.push(worker.pid);
        Some(self.worker_ended(worker, KILLED, now))
    }

    /// Starts a worker if there is none and one is due, and kills one that hangs. `is_busy`: a cause is open.
    pub(crate) fn ensure(&mut self, now: Instant, is_busy: bool, poll: &Poll) {
        if self.previous.as_ref().is_some_and(|(_, until)| *until <= now) {
            self.previous = None;
        }
        if let Some(candidate) = &mut self.candidate {
            candidate.check(now, true);
        }
        if let Some(worker) = &mut self.worker {
            if let (Some(idle_after), false) = (self.idle_after, is_busy) {
                worker.ask_to_hibernate(idle_after, now);
            }
            return worker.check(now, is_busy);
        }
        if self.asleep && !is_busy {
            return;
        }
        self.wake();
        if self.retry_at.is_some_and(|at| at > now) {
            return;
        }
        self.generations += 1;
        self.last_number += 1;
        match Generation::start(self.last_number, &self.program, &self.executable, now, poll) {
            Ok(worker) => self.worker = Some(worker),
            Err(error) => {
                warn!(error:%; "cannot start a worker, will retry");
                self.last_end = Some(format!("it cannot be started: {error}"));
                self.failed(now);
            }
        }
    }

    fn failed(&mut self, now: Instant) {
        self.fruitless += 1;
        self.retry_at = Some(now + back_off(self.fruitless));
    }

    /// Kills the worker on purpose.
    pub(crate) fn kill(&mut self) {
        if let Some(worker) = &mut self.worker {
            worker.kill(Fault::Keeper, "stopped by the keeper".into());
        }
    }

    /// A child exited.
    pub(crate) fn ended(&mut self, pid: u32, status: u32, now: Instant) -> Ended {
        if let Some(candidate) = self.candidate.take_if(|candidate| candidate.pid == pid) {
            return Ended::Candidate(candidate.end(status));
        }
        self.stuck.retain(|stuck| *stuck != pid);
        match self.worker.take_if(|worker| worker.pid == pid) {
            Some(worker) => self.worker_ended(worker, status, now),
            None => Ended::Other,
        }
    }

    fn worker_ended(&mut self, worker: Generation, status: u32, now: Instant) -> Ended {
        let pid = worker.pid;
        let end = worker.end(status);
        if end.fault == Fault::Keeper {
            return Ended::Worker { end, rolled_back: false };
        }
        self.failed(now);
        self.last_end = Some(end.why.clone());
        let rolled_back = self.roll_back(&end);
        if !rolled_back {
            info!(pid, generation = self.generations, why:% = end.why; "the worker exited, starting the next one");
        }
        Ended::Worker { end, rolled_back }
    }

    /// Restores the previous executable, if it is still kept and works with this keeper.
    fn roll_back(&mut self, end: &End) -> bool {
        let ours = crate::test_identity::versions();
        let Some((previous, _)) = self.previous.take() else { return false };
        if previous.versions.is_none_or(|theirs| ours.agree(theirs).is_none()) {
            error!(why:% = end.why, to:% = previous.build; "a new worker failed, and the previous one speaks no message version of this keeper");
            return false;
        }
        error!(why:% = end.why, from:% = self.executable.build, to:% = previous.build; "a new worker failed, going back to the previous one");
        self.executable = previous;
        self.fruitless = 0;
        self.retry_at = None;
        true
    }

    /// The worker handed over a descriptor that becomes readable when a worker is needed.
    pub(crate) fn watch(&mut self) {
        self.watches.extend(self.worker.as_mut().and_then(Generation::take_attached));
    }

    /// The worker answered whether it may hibernate. It does, unless it is needed again.
    pub(crate) fn hibernate(&mut self, may: bool, is_needed: bool, poll: &Poll) {
        let watched = || self.watches.iter().all(|watch| poll.add_watch(watch, Source::Watch).is_ok());
        if !may || is_needed || !watched() {
            self.watches.clear();
            return;
        }
        debug!(generation = self.generations; "the worker hibernates");
        self.asleep = true;
        if let Some(worker) = &mut self.worker {
            worker.kill(Fault::Keeper, "it hibernates".into());
        }
    }

    /// A worker is needed again.
    pub(crate) fn wake(&mut self) {
        self.asleep = false;
        self.watches.clear();
    }

    /// Whether there is no worker because none is needed.
    pub(crate) fn is_asleep(&self) -> bool {
        self.asleep
    }

    /// Starts a worker of another executable beside the one that serves.
    pub(crate) fn try_out(&mut self, executable: &Executable, now: Instant, poll: &Poll) -> io::Result<()> {
        self.last_number += 1;
        self.candidate = Some(Generation::start(self.last_number, &self.program, executable, now, poll)?);
        Ok(())
    }

    pub(crate) fn candidate(&mut self) -> Option<&mut Generation> {
        self.candidate.as_mut()
    }

    /// Lets the candidate take over from a worker that has exited.
    pub(crate) fn cut_over(&mut self, executable: Executable, now: Instant) {
        let Some(candidate) = self.candidate.take() else { return };
        self.worker = Some(candidate);
        self.wake();
        let previous = std::mem::replace(&mut self.executable, executable);
        self.previous = Some((previous, now + PROBATION));
        self.generations += 1;
        self.fruitless = 0;
        self.retry_at = None;
    }

    /// The worker committed something: its generation was not fruitless.
    pub(crate) fn committed(&mut self) {
        self.fruitless = 0;
    }

    /// The worker sent Hello. Returns whether its version fits.
    pub(crate) fn hello(&mut self, versions: Versions, build: String) -> bool {
        let Some(worker) = self.worker.as_mut().filter(|worker| worker.hello.is_none()) else { return false };
        (self.executable.versions, self.executable.build) = (Some(versions), build.clone());
        worker.greet(versions, build)
    }

    /// Sends Welcome to the worker. Returns whether there is one.
    pub(crate) fn welcome(&mut self, now: Instant) -> bool {
        let Some(worker) = &mut self.worker else { return false };
        let Some(hello) = &worker.hello else { return false };
        let welcome = ToWorker::Welcome { version: hello.version, keeper_pid: std::process::id(), generation: self.generations };
        worker.send(&welcome, None, now);
        true
    }

    /// Whether there is a worker that was sent everything.
    pub(crate) fn is_serving(&self) -> bool {
        self.worker.as_ref().is_some_and(|worker| worker.hello.is_some() && !worker.is_killed())
    }

    /// Whether the worker has responded since the last message to it.
    pub(crate) fn is_lively(&self) -> bool {
        self.worker.as_ref().is_some_and(|worker| !worker.is_owing())
    }

    /// Whether one generation after the other commits nothing.
    pub(crate) fn is_failing(&self) -> bool {
        self.fruitless > FREE_RETRIES
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        self.worker.as_ref().map(|worker| worker.pid)
    }

    /// Every child that is or was a worker.
    pub(crate) fn pids(&self) -> impl Iterator<Item = u32> {
        [&self.worker, &self.candidate].into_iter().flatten().map(|worker| worker.pid).chain(self.stuck.iter().copied())
    }

    /// The worker's build and message version.
    pub(crate) fn build(&self) -> Option<(&str, u16)> {
        let hello = self.worker.as_ref()?.hello.as_ref()?;
        Some((&hello.build, hello.version))
    }

    /// Queues a message if there is a worker; a later generation gets its content by the replay.
    pub(crate) fn send(&mut self, message: &ToWorker, descriptor: Option<OwnedFd>, now: Instant) {
        if let Some(worker) = self.worker.as_mut().filter(|worker| worker.hello.is_some()) {
            worker.send(message, descriptor, now);
        }
    }

    /// Writes what can be written.
    pub(crate) fn flush(&mut self, now: Instant) {
        for worker in [&mut self.worker, &mut self.candidate].into_iter().flatten() {
            worker.flush(now);
        }
    }

    /// Bytes that the worker has not read yet.
    pub(crate) fn backlog_bytes(&self) -> usize {
        self.worker.as_ref().map_or(0, Generation::backlog_bytes)
    }

    /// The messages of the worker with this number; none if it is gone or a candidate.
    pub(crate) fn receive(&mut self, number: u32, now: Instant, poll: &mut Poll) -> Vec<ToKeeper> {
        self.worker.as_mut().filter(|worker| worker.number == number).map(|worker| worker.receive(now, poll)).unwrap_or_default()
    }

    /// The same for the candidate.
    pub(crate) fn receive_from_candidate(&mut self, number: u32, now: Instant, poll: &mut Poll) -> Vec<ToKeeper> {
        self.candidate.as_mut().filter(|worker| worker.number == number).map(|worker| worker.receive(now, poll)).unwrap_or_default()
    }

    /// The number of the worker that serves.
    pub(crate) fn number(&self) -> Option<u32> {
        self.worker.as_ref().map(|worker| worker.number)
    }

    /// When [`Supervisor::ensure`] has something to do.
    pub(crate) fn deadline(&self, is_busy: bool) -> Option<Instant> {
        let worker = match &self.worker {
            Some(worker) => {
                let hibernation = self.idle_after.filter(|_| !is_busy).and_then(|idle_after| worker.hibernation_deadline(idle_after));
                worker.deadline(is_busy).into_iter().chain(hibernation).min()
            }
            None => self.retry_at.filter(|_| !self.asleep),
        };
        let candidate = self.candidate.as_ref().and_then(|candidate| candidate.deadline(true));
        [worker, candidate, self.previous.as_ref().map(|(_, until)| *until)].into_iter().flatten().min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_achieves_nothing_waits_longer_each_time_up_to_a_bound() {
        let waits: Vec<_> = (1..40).map(back_off).collect();
        assert_eq!(waits[..3], [Duration::ZERO; 3]);
        assert_eq!(waits[3..6], [10, 20, 40].map(Duration::from_millis));
        assert!(waits.is_sorted() && waits[13..].iter().all(|wait| *wait == MAX_BACKOFF), "{waits:?}");
    }

    #[test]
    fn the_idle_time_is_read_from_the_variable_within_bounds() {
        let of = |text: &'static str| parse_idle(Some(OsStr::new(text)));
        assert_eq!(parse_idle(None), Ok(Some(DEFAULT_IDLE)));
        assert_eq!(of("0"), Ok(None));
        assert_eq!(of("1"), Ok(Some(MIN_IDLE)));
        assert_eq!(of(" 90\n"), Ok(Some(Duration::from_secs(90))));
        assert_eq!(of("18446744073709551615"), Ok(Some(MAX_IDLE)));
        for text in ["", "never", "-1", "1.5", "18446744073709551616"] {
            assert_eq!(of(text), Err(OsStr::new(text)));
        }
    }
}
