//! Upgrades: another executable for the worker, then for the keeper itself.
//!
//! ```text
//!  asked ─▶ Trial ──(fit)──▶ Ending ──(old worker exits)──▶ Settling ──(first response)──▶ Rehearsal ──(accepts)──▶ Leaving
//!             │ crashes, hangs, refuses                       │ fails                        │ anything else          │
//!             ▼                                               ▼                              ▼                        ▼
//!           kept                                         rolled back              kept (the worker stays)     re-exec, Settling
//! A worker that fails between Settling and the re-exec is rolled back, and the keeper is kept.
//! ```
//!
//! **Invariant:** the result is reported to the command that asked, in the log, and by `ps` and `inspect`.
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime};

use log::{error, info, warn};
use minicbor::decode;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::generation::{End, Executable, Fault};
use super::reexec;
use super::run::Keeper;
use crate::capture::Capture;
use crate::handover::{ControlReply, PartResult, ToKeeper, ToWorker, UpgradeReport};
use crate::saved::{Reader, Saved, Writer, saved};
use crate::sys::{
    self,
    spawn::{Command, Failure, spawn},
};

/// How long a candidate may take to answer Fit.
const FIT_WITHIN: Duration = Duration::from_secs(10);
/// How long a new executable may take to read a copy of the state.
const REHEARSED_WITHIN: Duration = Duration::from_secs(10);
/// How long a killed rehearsal may take to exit: its executable may be on a disk that hangs.
const ENDS_WITHIN: Duration = Duration::from_secs(3);
/// The number of the ping whose answer shows that a worker has caught up after the cut-over.
const SETTLED: u32 = 1;

/// How long the upgrade waits for a worker to catch up. It may still fail on probation later.
pub(super) const SETTLED_WITHIN: Duration = Duration::from_secs(20);

/// An upgrade under way.
#[derive(Debug)]
pub(super) struct Upgrade {
    /// The command that waits for the report.
    pub(super) asker: u32,
    pub(super) executable: Executable,
    /// Whether the keeper is to re-exec too.
    pub(super) keeper_too: bool,
    pub(super) report: UpgradeReport,
    pub(super) stage: Stage,
}

saved!(Upgrade { asker, executable, keeper_too, report, stage });

#[derive(Debug)]
pub(super) enum Stage {
    /// A worker of the new executable reads the state and answers Fit.
    Trial { until: Instant },
    /// It is fit; the previous worker is being stopped.
    Ending { since: Instant },
    /// The previous worker has exited. The new one is sent everything once all messages of the previous one were handled.
    Ended { since: Instant },
    /// A new worker catches up. `since`: when the previous one was killed.
    Settling { since: Instant, until: Instant },
    /// A child of the new executable reads a copy of the state.
    Rehearsal { pid: u32, until: Instant, verdict: Capture, failure: Failure, is_late: bool },
    /// It could read it; the worker is being stopped.
    Leaving { since: Instant },
    /// The worker has exited. The keeper re-execs at the end of the turn: exits reaped in this turn are not yet part of the state.
    Left { since: Instant },
}

/// The next executable finds no worker and lets its own settle, so only the begin of the pause is handed over.
impl Saved for Stage {
    fn save(&self, writer: &mut Writer) {
        match self {
            Self::Left { since }
            | Self::Leaving { since }
            | Self::Ended { since }
            | Self::Ending { since }
            | Self::Settling { since, .. } => since.save(writer),
            Self::Trial { until } | Self::Rehearsal { until, .. } => until.save(writer),
        }
    }

    fn load(reader: &mut Reader<'_>) -> Result<Self, decode::Error> {
        Ok(Self::Settling { since: Instant::load(reader)?, until: Instant::now() + SETTLED_WITHIN })
    }
}

impl Keeper {
    /// Begins an upgrade to the executable in `file`. `path`: its path, for reports.
    pub(super) fn begin_upgrade(&mut self, asker: u32, file: OwnedFd, path: String, keeper_too: bool, now: Instant) {
        if self.upgrade.is_some() {
            self.control.reply(asker, &ControlReply::Refused { why: "another upgrade is under way".into() });
            return;
        }
        let executable = Executable { file, path: path.clone(), versions: None, build: String::new() };
        let own = &self.supervisor.executable;
        let report = UpgradeReport {
            from: own.build.clone(),
            path,
            at_seconds: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            ..UpgradeReport::default()
        };
        let is_same = own.is(&executable);
        let mut upgrade = Upgrade { asker, executable, keeper_too, report, stage: Stage::Trial { until: now + FIT_WITHIN } };
        if is_same {
            upgrade.report.to = upgrade.report.from.clone();
            upgrade.executable.build.clone_from(&upgrade.report.from);
            upgrade.executable.versions = own.versions;
            self.upgrade_keeper(upgrade, now);
            return;
        }
        match self.supervisor.try_out(&upgrade.executable, now, &self.poll) {
            Ok(()) => self.upgrade = Some(upgrade),
            Err(error) => self.keep_worker(upgrade, format!("it cannot be started: {error}")),
        }
    }

    /// When [`Keeper::tick_upgrade`] has something to do.
    pub(super) fn upgrade_deadline(&self) -> Option<Instant> {
        match self.upgrade.as_ref()?.stage {
            Stage::Trial { until } | Stage::Settling { until, .. } | Stage::Rehearsal { until, .. } => Some(until),
            _ => None,
        }
    }

    pub(super) fn tick_upgrade(&mut self, now: Instant) {
        if self.upgrade_deadline().is_none_or(|at| at > now) {
            return;
        }
        match self.upgrade.as_mut().map(|upgrade| &mut upgrade.stage) {
            Some(Stage::Trial { until }) => {
                // Its exit ends the upgrade with a report.
                *until = now + FIT_WITHIN;
                if let Some(candidate) = self.supervisor.candidate() {
                    candidate.kill(Fault::Worker, format!("it did not answer within {FIT_WITHIN:?} whether it can take over"));
                }
            }
            Some(Stage::Rehearsal { pid, until, is_late, .. }) if !*is_late => {
                (*is_late, *until) = (true, now + ENDS_WITHIN);
                end_rehearsal(*pid);
            }
            Some(Stage::Rehearsal { .. }) => {
                if let Some(upgrade) = self.upgrade.take() {
                    self.keep_keeper(upgrade, format!("its rehearsal took longer than {REHEARSED_WITHIN:?}, and cannot be killed"));
                }
            }
            Some(Stage::Settling { .. }) => {
                if let Some(upgrade) = self.upgrade.take() {
                    let is_left_out = upgrade.keeper_too && upgrade.report.keeper == PartResult::Unasked;
                    if is_left_out {
                        self.keep_keeper(upgrade, format!("the new worker did not respond within {SETTLED_WITHIN:?}"));
                    } else {
                        self.end_upgrade(upgrade);
                    }
                }
            }
            _ => {}
        }
    }

    /// Handles a message of the candidate.
    pub(super) fn candidate_sent(&mut self, message: ToKeeper, now: Instant) {
        let Some(candidate) = self.supervisor.candidate() else { return };
        match message {
            ToKeeper::Hello { versions, build } if candidate.hello.is_none() => {
                if let Some(upgrade) = &mut self.upgrade {
                    upgrade.report.to.clone_from(&build);
                    (upgrade.executable.versions, upgrade.executable.build) = (Some(versions), build.clone());
                }
                if candidate.greet(versions, build) {
                    for (key, value) in self.ledger.state() {
                        candidate.send(&ToWorker::Try { key: key.clone(), value: value.clone() }, None, now);
                    }
                    candidate.send(&ToWorker::Tried, None, now);
                }
            }
            ToKeeper::Fit { refusal: None } if candidate.hello.is_some() => self.end_worker(now),
            ToKeeper::Fit { refusal: Some(why) } => candidate.kill(Fault::Worker, why),
            ToKeeper::Pong { .. } => {}
            _ => candidate.kill(Fault::Worker, "it sent an unexpected message".into()),
        }
    }

    /// The candidate is fit: stops the previous worker. Its messages so far are handled first, so that less is replayed.
    fn end_worker(&mut self, now: Instant) {
        if let Some(number) = self.supervisor.number() {
            for message in self.supervisor.receive(number, now, &mut self.poll) {
                self.take(message);
            }
        }
        let since = Instant::now();
        if let Some(upgrade) = &mut self.upgrade {
            upgrade.stage = Stage::Ending { since };
        }
        match self.supervisor.pid() {
            Some(_) => self.supervisor.kill(),
            None => self.worker_left(),
        }
    }

    /// The worker that the upgrade stopped is gone.
    pub(super) fn worker_left(&mut self) {
        let next = match self.upgrade.as_ref().map(|upgrade| &upgrade.stage) {
            Some(Stage::Ending { since }) => Stage::Ended { since: *since },
            Some(Stage::Leaving { since }) => Stage::Left { since: *since },
            _ => return,
        };
        if let Some(upgrade) = &mut self.upgrade {
            upgrade.stage = next;
        }
    }

    /// Cuts over to the new worker, or re-execs the keeper, if the upgrade is at that stage. To be called between turns only.
    pub(super) fn proceed(&mut self) {
        if let Some(Upgrade { stage: Stage::Ended { since }, .. }) = self.upgrade {
            self.cut_over(since, Instant::now());
        }
        let Some(mut upgrade) = self.upgrade.take_if(|upgrade| matches!(upgrade.stage, Stage::Left { .. })) else { return };
        let error = match self.reexec(&mut upgrade) {
            Ok(never) => match never {},
            Err(error) => error,
        };
        self.keep_keeper(upgrade, format!("cannot execute it: {error}"));
    }

    fn cut_over(&mut self, since: Instant, now: Instant) {
        let Some(upgrade) = &mut self.upgrade else { return };
        let executable = match upgrade.executable.duplicate() {
            Ok(executable) => executable,
            Err(error) => {
                if let Some(candidate) = self.supervisor.candidate() {
                    candidate.kill(Fault::Worker, format!("cannot hold its executable open: {error}"));
                }
                // Until its exit is seen.
                upgrade.stage = Stage::Trial { until: now + FIT_WITHIN };
                return;
            }
        };
        upgrade.stage = Stage::Settling { since, until: now + SETTLED_WITHIN };
        upgrade.report.worker = PartResult::Upgraded;
        self.supervisor.cut_over(executable, now);
        self.poison.reset();
        self.welcome(now);
    }

    /// Pings a worker that was just sent everything, to learn when it has caught up.
    pub(super) fn ask_whether_settled(&mut self, now: Instant) {
        if self.upgrade.as_ref().is_some_and(|upgrade| matches!(upgrade.stage, Stage::Settling { .. })) {
            self.supervisor.send(&ToWorker::Ping { number: SETTLED }, None, now);
        }
    }

    /// The worker answered a ping.
    pub(super) fn ponged(&mut self, number: u32, now: Instant) {
        if number != SETTLED {
            return;
        }
        let Some(mut upgrade) = self.upgrade.take_if(|upgrade| matches!(upgrade.stage, Stage::Settling { .. })) else { return };
        if let Stage::Settling { since, .. } = upgrade.stage {
            upgrade.report.pause_nanos = upgrade.report.pause_nanos.max(now.saturating_duration_since(since).as_nanos() as u64);
        }
        match upgrade.report.keeper {
            PartResult::Unasked => self.upgrade_keeper(upgrade, now),
            _ => self.end_upgrade(upgrade),
        }
    }

    /// The candidate exited.
    pub(super) fn candidate_ended(&mut self, end: End) {
        if let Some(upgrade) = self.upgrade.take() {
            self.keep_worker(upgrade, end.why);
        }
    }

    /// The worker exited, and its executable was replaced by the previous one.
    pub(super) fn rolled_back(&mut self, end: &End) {
        self.poison.reset();
        // In an earlier stage, the worker is that of an earlier upgrade.
        let is_cut_over =
            |upgrade: &mut Upgrade| !matches!(upgrade.stage, Stage::Trial { .. } | Stage::Ending { .. } | Stage::Ended { .. });
        let Some(mut upgrade) = self.upgrade.take_if(is_cut_over) else {
            if let Some(report) = &mut self.last_upgrade {
                report.worker = PartResult::RolledBack(end.why.clone());
            }
            return;
        };
        upgrade.report.worker = PartResult::RolledBack(end.why.clone());
        if let Stage::Settling { .. } = upgrade.stage {
            return self.end_upgrade(upgrade);
        }
        if let Stage::Rehearsal { pid, .. } = upgrade.stage {
            end_rehearsal(pid);
        }
        self.keep_keeper(upgrade, "its worker was rolled back".into());
    }

    fn keep_worker(&mut self, mut upgrade: Upgrade, why: String) {
        upgrade.report.worker = PartResult::Kept(why);
        self.end_upgrade(upgrade);
    }

    fn keep_keeper(&mut self, mut upgrade: Upgrade, why: String) {
        upgrade.report.keeper = PartResult::Kept(why);
        self.end_upgrade(upgrade);
    }

    /// The worker is done; upgrades the keeper itself.
    fn upgrade_keeper(&mut self, mut upgrade: Upgrade, now: Instant) {
        if !upgrade.keeper_too {
            return self.end_upgrade(upgrade);
        }
        match Executable::own() {
            Ok(own) if own.is(&upgrade.executable) => {
                upgrade.report.keeper = PartResult::Unchanged;
                self.end_upgrade(upgrade);
            }
            _ => match self.rehearse(&upgrade) {
                Ok((pid, verdict, failure)) => {
                    upgrade.stage = Stage::Rehearsal { pid, until: now + REHEARSED_WITHIN, verdict, failure, is_late: false };
                    self.upgrade = Some(upgrade);
                }
                Err(error) => self.keep_keeper(upgrade, format!("cannot rehearse: {error}")),
            },
        }
    }

    /// Starts a child of the new executable that reads a copy of the state.
    fn rehearse(&mut self, upgrade: &Upgrade) -> io::Result<(u32, Capture, Failure)> {
        let (copy, _) = self.save(upgrade)?;
        let (verdict, write) = Capture::new()?;
        let (argv, env) = (self.settings.command_line(&["keeper", "rehearse"])?, sys::exec::environment());
        let started = spawn(&Command::of_executable(upgrade.executable.file.as_fd(), argv, env, &[copy.as_fd(), write.as_fd()])?)?;
        Ok((started.pid, verdict, started.failure))
    }

    /// A child exited. Returns whether it was a rehearsal.
    pub(super) fn rehearsal_ended(&mut self, ended: u32, status: u32) -> bool {
        let is_it = |upgrade: &mut Upgrade| matches!(upgrade.stage, Stage::Rehearsal { pid, .. } if pid == ended);
        let Some(mut upgrade) = self.upgrade.take_if(is_it) else { return false };
        let now = Instant::now();
        let stage = std::mem::replace(&mut upgrade.stage, Stage::Leaving { since: now });
        let Stage::Rehearsal { verdict, failure, is_late, .. } = stage else { return true };
        let answer = String::from_utf8_lossy(&verdict.finish()).into_owned();
        let why = match (answer.strip_prefix(reexec::REFUSES), failure.error()) {
            (_, Some(error)) => format!("it cannot be executed: {error}"),
            (Some(why), _) => why.to_owned(),
            _ if is_late => format!("its rehearsal took longer than {REHEARSED_WITHIN:?}"),
            _ if answer == reexec::ACCEPTS && status == 0 => {
                self.upgrade = Some(upgrade);
                match self.supervisor.pid() {
                    Some(_) => self.supervisor.kill(),
                    None => self.worker_left(),
                }
                return true;
            }
            _ => format!("its rehearsal exited with status {status}"),
        };
        self.keep_keeper(upgrade, why);
        true
    }

    /// The pid of a rehearsal under way.
    pub(super) fn rehearsal_pid(&self) -> Option<u32> {
        match self.upgrade.as_ref()?.stage {
            Stage::Rehearsal { pid, .. } => Some(pid),
            _ => None,
        }
    }

    /// Executes the new executable in this process. Returns only on failure, with nothing changed.
    fn reexec(&mut self, upgrade: &mut Upgrade) -> io::Result<std::convert::Infallible> {
        upgrade.report.keeper = PartResult::Upgraded;
        // Logged before the exec, after which this executable cannot log.
        info!(to:% = upgrade.report.to, path:% = upgrade.report.path; "the keeper re-executes itself");
        let result = self.save(upgrade).and_then(|(state, mut kept)| {
            let own = Executable::own()?;
            kept.extend([state.as_raw_fd(), own.file.as_raw_fd()]);
            let arguments =
                self.settings.command_line(&["keeper", "resume", &state.as_raw_fd().to_string(), &own.file.as_raw_fd().to_string()])?;
            sys::exec::execute(upgrade.executable.file.as_fd(), &arguments, &sys::exec::environment(), &kept)
        });
        upgrade.report.keeper = PartResult::Unasked;
        result
    }

    pub(super) fn end_upgrade(&mut self, upgrade: Upgrade) {
        let report = upgrade.report;
        for (part, result) in [("worker", &report.worker), ("keeper", &report.keeper)] {
            match result {
                PartResult::Upgraded => info!(part, from:% = report.from, to:% = report.to, path:% = report.path; "upgraded"),
                PartResult::Kept(why) => error!(part, from:% = report.from, path:% = report.path, error:% = why; "not upgraded"),
                PartResult::RolledBack(why) => warn!(part, from:% = report.from, to:% = report.to, error:% = why; "upgrade rolled back"),
                PartResult::Unasked | PartResult::Unchanged => {}
            }
        }
        self.control.reply(upgrade.asker, &ControlReply::Upgraded(Box::new(report.clone())));
        self.last_upgrade = Some(report);
    }
}

/// `pid` is a child that was not reaped, so the number cannot mean another process.
fn end_rehearsal(pid: u32) {
    // It may have exited.
    let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
}
