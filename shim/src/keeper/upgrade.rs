//! Upgrades: another program for the worker, then for the keeper itself.
//!
//! ```text
//!  asked ─▶ Trial ──(fit)──▶ Ending ──(old worker is gone)──▶ Settling ──(first response)──▶ Rehearsal ──(says OK)──▶ Leaving
//!             │ crashes, hangs, refuses                          │ fails                          │ anything else              │
//!             ▼                                                  ▼                                ▼                            ▼
//!           kept                                            rolled back            kept, the worker stays upgraded      the new image, Settling
//! A worker that fails between Settling and the new image is rolled back, and the keeper is kept.
//! ```
//!
//! **Invariant:** whatever comes of it, whoever has asked is told, and so are the log, `ps` and `inspect`.
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime};

use log::{error, info, warn};
use minicbor::decode::{self, Decoder};
use minicbor::encode::{self, Encoder, Write};
use minicbor::{Decode, Encode};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::capture::Capture;
use super::generation::{End, Executable, Fault};
use super::reexec::{self, Carrier};
use super::run::Keeper;
use crate::handover::{ControlReply, Part, PartResult, ToKeeper, ToWorker, UpgradeReport, part};
use crate::sys;

/// So long a candidate may take to say that it is fit.
const FIT_WITHIN: Duration = Duration::from_secs(10);
/// So long an image may take to read a copy of the state.
const REHEARSED_WITHIN: Duration = Duration::from_secs(10);
/// So long one that was killed over that may take to end: it is not waited for any longer, whatever disk its program lies on.
const ENDS_WITHIN: Duration = Duration::from_secs(3);
/// The ping by which a worker shows that it has caught up after a cut-over.
const SETTLED: u32 = 1;

/// So long a worker may take to show that it has caught up; it is not waited for any longer, and may still fail on probation.
pub(super) const SETTLED_WITHIN: Duration = Duration::from_secs(20);

/// An upgrade under way.
#[derive(Debug, Encode, Decode)]
#[cbor(context_bound = "AsMut<Carrier>")]
pub(super) struct Upgrade {
    /// The command that waits for the report.
    #[n(0)]
    pub(super) asker: u32,
    #[n(1)]
    pub(super) executable: Executable,
    /// Whether the keeper's image shall be replaced too.
    #[n(2)]
    pub(super) keeper_too: bool,
    #[n(3)]
    pub(super) report: UpgradeReport,
    #[cbor(n(4), with = "part")]
    pub(super) stage: Stage,
}

#[derive(Debug)]
pub(super) enum Stage {
    /// A worker of the new program is asked whether it is fit.
    Trial { until: Instant },
    /// It is, and the one before ends.
    Ending { since: Instant },
    /// That has ended. The new one is told everything once everything that the one before has said was dealt with.
    Ended { since: Instant },
    /// A new worker catches up. `since`: when the one before was killed.
    Settling { since: Instant, until: Instant },
    /// A child of the new image reads a copy of the state.
    Rehearsal { pid: u32, until: Instant, verdict: Capture, failure: Capture, is_late: bool },
    /// It can, and the worker ends.
    Leaving { since: Instant },
    /// It has ended. The image is replaced once everything of this turn was dealt with: what was reaped already is nowhere but in our hands.
    Left { since: Instant },
}

/// The next executable finds the worker ended, and has its own worker settle. What counts is since when none has answered.
impl<C: AsMut<Carrier>> Part<C> for Stage {
    fn put<W: Write>(&self, e: &mut Encoder<W>, context: &mut C) -> Result<(), encode::Error<W::Error>> {
        match self {
            Self::Left { since }
            | Self::Leaving { since }
            | Self::Ended { since }
            | Self::Ending { since }
            | Self::Settling { since, .. } => since.put(e, context),
            Self::Trial { until } | Self::Rehearsal { until, .. } => until.put(e, context),
        }
    }

    fn take(d: &mut Decoder<'_>, context: &mut C) -> Result<Self, decode::Error> {
        Ok(Self::Settling { since: Instant::take(d, context)?, until: Instant::now() + SETTLED_WITHIN })
    }
}

impl Keeper {
    /// Begins an upgrade to the program in `file`. `path`: where that was found.
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
                // Its end is seen, and told of.
                *until = now + FIT_WITHIN;
                if let Some(candidate) = self.supervisor.candidate() {
                    candidate.kill(Fault::Its, format!("it has not said within {FIT_WITHIN:?} that it can take over"));
                }
            }
            Some(Stage::Rehearsal { pid, until, is_late, .. }) if !*is_late => {
                (*is_late, *until) = (true, now + ENDS_WITHIN);
                end_rehearsal(*pid);
            }
            Some(Stage::Rehearsal { .. }) => {
                if let Some(upgrade) = self.upgrade.take() {
                    self.keep_keeper(upgrade, format!("its rehearsal took longer than {REHEARSED_WITHIN:?}, and does not end"));
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

    /// Takes what a candidate says.
    pub(super) fn candidate_said(&mut self, message: ToKeeper, now: Instant) {
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
            ToKeeper::Fit { refusal: Some(why) } => candidate.kill(Fault::Its, why),
            ToKeeper::Pong { .. } => {}
            _ => candidate.kill(Fault::Its, "it speaks out of turn".into()),
        }
    }

    /// The candidate is fit: the worker before it ends. What it has said until now counts, so that less is done again.
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

    /// No worker is left, as was wanted.
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

    /// Goes on with the new worker or as the new image, if that is what is left to do. To be called when nothing is half done.
    pub(super) fn proceed(&mut self) {
        if let Some(Upgrade { stage: Stage::Ended { since }, .. }) = self.upgrade {
            self.cut_over(since, Instant::now());
        }
        let Some(mut upgrade) = self.upgrade.take_if(|upgrade| matches!(upgrade.stage, Stage::Left { .. })) else { return };
        let error = match self.reexec(&mut upgrade) {
            Ok(never) => match never {},
            Err(error) => error,
        };
        self.keep_keeper(upgrade, format!("cannot replace the image: {error}"));
    }

    fn cut_over(&mut self, since: Instant, now: Instant) {
        let Some(upgrade) = &mut self.upgrade else { return };
        let executable = match upgrade.executable.duplicate() {
            Ok(executable) => executable,
            Err(error) => {
                if let Some(candidate) = self.supervisor.candidate() {
                    candidate.kill(Fault::Its, format!("cannot hold its program open: {error}"));
                }
                // Until its end is seen.
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

    /// Asks a worker that was just told everything to say when it has read that.
    pub(super) fn ask_whether_settled(&mut self, now: Instant) {
        if self.upgrade.as_ref().is_some_and(|upgrade| matches!(upgrade.stage, Stage::Settling { .. })) {
            self.supervisor.send(&ToWorker::Ping { number: SETTLED }, None, now);
        }
    }

    /// The worker has given a sign of life.
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

    /// The candidate has ended.
    pub(super) fn candidate_ended(&mut self, end: End) {
        if let Some(upgrade) = self.upgrade.take() {
            self.keep_worker(upgrade, end.why);
        }
    }

    /// The worker has ended, and its program was replaced by the one before.
    pub(super) fn rolled_back(&mut self, end: &End) {
        self.poison.reset();
        // Before that, it is the worker of an earlier upgrade.
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

    /// The worker is what it shall be; now the keeper itself.
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

    /// Starts a child of the new image that reads a copy of the state.
    fn rehearse(&mut self, upgrade: &Upgrade) -> io::Result<(u32, Capture, Capture)> {
        let (copy, _) = self.save(upgrade)?;
        let (verdict, write) = Capture::new()?;
        let null: OwnedFd = std::fs::File::options().read(true).write(true).open("/dev/null")?.into();
        let started = sys::spawn::spawn(&sys::spawn::Command {
            program: CString::new(format!("/proc/self/fd/{}", upgrade.executable.file.as_raw_fd()))?,
            argv: self.reexec_arguments(&["rehearse"])?,
            env: sys::exec::environment(),
            cwd: c"/".into(),
            descriptors: vec![null.as_fd(), null.as_fd(), null.as_fd(), copy.as_fd(), write.as_fd()],
            dies_with_parent: true,
        })?;
        Ok((started.pid, verdict, Capture::from_pipe(started.failure)))
    }

    /// A child has ended. Returns whether it was a rehearsal.
    pub(super) fn rehearsal_ended(&mut self, ended: u32, status: u32) -> bool {
        let is_it = |upgrade: &mut Upgrade| matches!(upgrade.stage, Stage::Rehearsal { pid, .. } if pid == ended);
        let Some(mut upgrade) = self.upgrade.take_if(is_it) else { return false };
        let now = Instant::now();
        let stage = std::mem::replace(&mut upgrade.stage, Stage::Leaving { since: now });
        let Stage::Rehearsal { verdict, failure, is_late, .. } = stage else { return true };
        let said = String::from_utf8_lossy(&verdict.finish()).into_owned();
        let why = match (said.strip_prefix(reexec::REFUSES), failure.finish().first_chunk()) {
            (_, Some(errno)) => format!("it cannot be executed: {}", io::Error::from_raw_os_error(i32::from_ne_bytes(*errno))),
            (Some(why), _) => why.to_owned(),
            _ if is_late => format!("its rehearsal took longer than {REHEARSED_WITHIN:?}"),
            _ if said == reexec::ACCEPTS && status == 0 => {
                self.upgrade = Some(upgrade);
                match self.supervisor.pid() {
                    Some(_) => self.supervisor.kill(),
                    None => self.worker_left(),
                }
                return true;
            }
            _ => format!("its rehearsal ended with status {status}"),
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

    /// Goes on as the new image. Returns only if that did not come to be, with everything as before.
    fn reexec(&mut self, upgrade: &mut Upgrade) -> io::Result<std::convert::Infallible> {
        upgrade.report.keeper = PartResult::Upgraded;
        // The last lines of this image are not lost with it.
        info!(to:% = upgrade.report.to, path:% = upgrade.report.path; "the keeper replaces its image");
        let result = self.save(upgrade).and_then(|(state, mut kept)| {
            let own = Executable::own()?;
            kept.extend([state.as_raw_fd(), own.file.as_raw_fd()]);
            let arguments = self.reexec_arguments(&["resume", &state.as_raw_fd().to_string(), &own.file.as_raw_fd().to_string()])?;
            sys::exec::execute(upgrade.executable.file.as_fd(), &arguments, &sys::exec::environment(), &kept)
        });
        upgrade.report.keeper = PartResult::Unasked;
        result
    }

    /// What an image is executed with: our own arguments, and behind the action what is special.
    fn reexec_arguments(&self, special: &[&str]) -> io::Result<Vec<CString>> {
        let name = std::env::args().next().unwrap_or_else(|| "containerd-shim-x-v2".into());
        let words = std::iter::once(name).chain(self.settings.to_arguments()).chain(["keeper".to_owned()]);
        let words = words.chain(special.iter().map(|word| (*word).to_owned()));
        Ok(words.map(CString::new).collect::<Result<_, _>>()?)
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

/// The number is its own as long as it is our child and not reaped.
fn end_rehearsal(pid: u32) {
    // It may have ended.
    let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
}
