//! Starts, watches and replaces the worker: its generations, the candidate of an upgrade, and their executables.
//!
//! ```text
//!  Absent ──(start)──▶ Starting ──(hello)──▶ Serving ──(dies, hangs, or sends garbage)──▶ Absent ──(back-off)──▶ …
//!                                              ▲ cut-over
//!          candidate: Starting ──(hello)──▶ Trying ──(fit)        or a rehearsal: Starting ──(fit)──▶ stopped
//!
//!  Serving ──(idle for a while, and may hibernate)──▶ Asleep ──(a cause, or a watch)──▶ Absent
//! ```
//!
//! **Invariant:** a generation that committed nothing makes the next one wait longer; one that committed anything does not.
//! **Invariant:** a candidate takes over only after it has answered Fit; until then the serving worker is not touched.
//! **Invariant:** after the cut-over the previous executable is kept for [`PROBATION`], and used again if a worker of the new one fails.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use log::{debug, error, info, warn};

use super::first_worker::FirstWorker;
use super::generation::{End, Executable, Fault, Generation, Surroundings};
use super::poll::{Poll, Source};
use crate::handover::{ToKeeper, ToWorker, Versions};
use crate::saved::saved;
use crate::settings;

/// How many generations in a row may commit nothing before the next one has to wait.
const FREE_RETRIES: u32 = 3;
const FIRST_BACKOFF: Duration = Duration::from_millis(10);
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// How long a new executable is on probation.
const PROBATION: Duration = Duration::from_secs(300);

/// Which process exited.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Neither the worker nor the candidate.
    Other,
    Candidate(End),
    Worker(End),
    /// A worker whose executable failed on probation and was replaced by the previous one.
    RolledBack(End),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Supervisor {
    pub(super) executable: Executable,
    /// The previous executable, and until when it is kept.
    pub(super) previous: Option<(Executable, Instant)>,
    worker: Option<Generation>,
    candidate: Option<Generation>,
    /// Workers that were killed and have not exited. Their links are closed.
    stuck: Vec<u32>,
    last_number: u32,
    pub(super) generations: u32,
    pub(super) fruitless: u32,
    retry_at: Option<Instant>,
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
        executable, previous, last_number, generations, fruitless, retry_at, last_end, idle_after; worker, candidate, stuck, watches, asleep
    }
}

/// The status of a process that was killed.
const KILLED: u32 = 128 + 9;

/// How long the next worker has to wait after `fruitless` generations that committed nothing.
fn back_off(fruitless: u32) -> Duration {
    match fruitless.saturating_sub(FREE_RETRIES).min(16) {
        0 => Duration::ZERO,
        doublings => (FIRST_BACKOFF * (1 << (doublings - 1))).min(MAX_BACKOFF),
    }
}

impl Supervisor {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
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
            idle_after: settings::idle_after(),
            watches: Vec::new(),
            asleep: false,
        })
    }

    /// Takes over the worker that was forked when the keeper started.
    pub(crate) fn adopt(&mut self, worker: FirstWorker, now: Instant, poll: &Poll) -> io::Result<()> {
        (self.generations, self.last_number) = (1, 1);
        self.worker = Some(Generation::of_forked(self.last_number, worker, now, poll)?);
        Ok(())
    }

    /// Stops waiting for a worker or candidate that was killed and does not exit, so that the next one can start.
    pub(crate) fn give_up(&mut self, now: Instant) -> Ended {
        let stuck = [&self.candidate, &self.worker].into_iter().flatten().find(|worker| worker.is_stuck(now));
        let Some(pid) = stuck.map(|worker| worker.pid) else { return Ended::Other };
        warn!(pid; "a worker was killed and does not exit, continuing without it");
        let ended = self.ended(pid, KILLED, now);
        self.stuck.push(pid);
        ended
    }

    /// Starts a worker if there is none and one is due, and kills one that hangs. `is_busy`: a cause is open.
    pub(crate) fn ensure(&mut self, with: Surroundings<'_>, now: Instant, is_busy: bool, poll: &Poll) {
        if self.previous.as_ref().is_some_and(|(_, until)| *until <= now) {
            self.previous = None;
        }
        if let Some(candidate) = &mut self.candidate {
            candidate.check(now, true, None);
        }
        if let Some(worker) = &mut self.worker {
            return worker.check(now, is_busy, self.idle_after);
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
        match Generation::start(self.last_number, with, &["worker"], &self.executable, None, now, poll) {
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
            return Ended::Worker(end);
        }
        self.failed(now);
        self.last_end = Some(end.why.clone());
        if self.roll_back(&end) {
            return Ended::RolledBack(end);
        }
        info!(pid, generation = self.generations, why:% = end.why; "the worker exited, starting the next one");
        Ended::Worker(end)
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

    /// Starts a candidate: a worker of another executable beside the one that serves.
    pub(crate) fn try_out(&mut self, with: Surroundings<'_>, executable: &Executable, now: Instant, poll: &Poll) -> io::Result<()> {
        self.add_candidate(Generation::start(self.last_number + 1, with, &["worker"], executable, None, now, poll)?);
        Ok(())
    }

    /// Starts a candidate: a child that reads a copy of the keeper's state.
    pub(crate) fn rehearse(&mut self, with: Surroundings<'_>, state: &OwnedFd, now: Instant, poll: &Poll) -> io::Result<()> {
        let words = ["keeper", "rehearse"];
        self.add_candidate(Generation::start(self.last_number + 1, with, &words, &self.executable, Some(state), now, poll)?);
        Ok(())
    }

    fn add_candidate(&mut self, candidate: Generation) {
        self.last_number = candidate.number;
        // One of an earlier upgrade that was killed may not have exited.
        self.stuck.extend(self.candidate.replace(candidate).map(|previous| previous.pid));
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

    /// The worker sent Hello. Returns whether its version fits.
    pub(crate) fn hello(&mut self, versions: Versions, build: String) -> bool {
        self.worker.as_mut().is_some_and(|worker| worker.greet(versions, build, &mut self.executable))
    }

    /// Sends Welcome to the worker.
    pub(crate) fn welcome(&mut self, now: Instant) {
        let version = self.version().unwrap_or_default();
        let welcome = ToWorker::Welcome { version, keeper_pid: std::process::id(), generation: self.generations };
        self.send(&welcome, None, now);
    }

    /// Whether there is a worker that was sent everything.
    pub(crate) fn is_serving(&self) -> bool {
        self.worker.as_ref().is_some_and(|worker| worker.version.is_some() && !worker.is_killed())
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

    /// The message version of the worker, once it has sent Hello.
    pub(crate) fn version(&self) -> Option<u16> {
        self.worker.as_ref()?.version
    }

    /// Queues a message if there is a worker; a later generation gets its content by the replay.
    pub(crate) fn send(&mut self, message: &ToWorker, descriptor: Option<OwnedFd>, now: Instant) {
        if let Some(worker) = self.worker.as_mut().filter(|worker| worker.version.is_some()) {
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

    /// The messages of the worker or candidate with this number; none if it is gone.
    pub(crate) fn receive(&mut self, number: u32, now: Instant, poll: &mut Poll) -> Vec<ToKeeper> {
        let mut workers = [&mut self.worker, &mut self.candidate].into_iter().flatten();
        workers.find(|worker| worker.number == number).map(|worker| worker.receive(now, poll)).unwrap_or_default()
    }

    /// The number of the worker that serves.
    pub(crate) fn number(&self) -> Option<u32> {
        self.worker.as_ref().map(|worker| worker.number)
    }

    /// When [`Supervisor::ensure`] has something to do.
    pub(crate) fn deadline(&self, is_busy: bool) -> Option<Instant> {
        let worker = match &self.worker {
            Some(worker) => worker.deadline(is_busy, self.idle_after),
            None => self.retry_at.filter(|_| !self.asleep),
        };
        let candidate = self.candidate.as_ref().and_then(|candidate| candidate.deadline(true, None));
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
}
