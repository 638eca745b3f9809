//! What the keeper does in the stages of an upgrade.
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::Instant;

use log::info;

use super::Keeper;
use crate::executable::{protect, warn_of_unprotected};
use crate::handover::{ControlReply, PartResult, ToKeeper, ToWorker};
use crate::keeper::generation::{End, Executable, Fault, Surroundings};
use crate::keeper::upgrade::{FIT_WITHIN, SETTLED_WITHIN, Stage, Upgrade};
use crate::sys;

/// The number of the ping whose answer shows that a worker has caught up after the cut-over.
pub(super) const SETTLED: u32 = 1;

impl Keeper {
    /// Begins an upgrade to the executable in `file`. `path`: its path, for reports.
    pub(super) fn begin_upgrade(&mut self, asker: u32, file: OwnedFd, path: String, keeper_too: bool, now: Instant) {
        if self.upgrade.is_some() {
            self.control.reply(asker, &ControlReply::Refused { why: "another upgrade is under way".into() });
            return;
        }
        let executable = Executable { file, path, versions: None, build: String::new() };
        let with = Surroundings { settings: &self.settings, home: &self.children.home };
        let own = &self.supervisor.executable;
        let is_same = own.is(&executable);
        let upgrade = self.upgrade.insert(Upgrade::new(asker, keeper_too, executable, own, now));
        if is_same {
            upgrade.report.to.clone_from(&upgrade.report.from);
            self.upgrade_keeper(now);
        } else if let Err(error) = upgrade.executable.iter().try_for_each(|new| self.supervisor.try_out(with, new, now, &self.poll)) {
            upgrade.report.worker = PartResult::Kept(format!("it cannot be started: {error}"));
            self.end_upgrade();
        }
    }

    /// Ends a stage that takes too long.
    pub(super) fn tick_upgrade(&mut self, now: Instant) {
        let Some(upgrade) = &mut self.upgrade else { return };
        if upgrade.until.take_if(|until| *until <= now).is_none() {
            return;
        }
        match upgrade.stage {
            Stage::Settling if upgrade.wants_keeper() => {
                self.keep_keeper(format!("the new worker did not respond within {SETTLED_WITHIN:?}"));
            }
            Stage::Settling => self.end_upgrade(),
            _ => {
                // Its exit ends the upgrade with a report.
                if let Some(candidate) = self.supervisor.candidate() {
                    candidate.kill(Fault::Worker, format!("it did not answer within {FIT_WITHIN:?} whether it can take over"));
                }
            }
        }
    }

    /// Handles a message of the candidate.
    pub(super) fn candidate_sent(&mut self, message: ToKeeper, now: Instant) {
        let (Some(candidate), Some(upgrade)) = (self.supervisor.candidate(), &mut self.upgrade) else { return };
        match (message, upgrade.stage, &mut upgrade.executable) {
            (ToKeeper::Hello { versions, build }, Stage::Trial, Some(executable)) => {
                upgrade.report.to.clone_from(&build);
                if candidate.greet(versions, build, executable) {
                    for (key, value) in self.ledger.state() {
                        candidate.send(&ToWorker::Try { key: key.clone(), value: value.clone() }, None, now);
                    }
                    candidate.send(&ToWorker::Tried, None, now);
                }
            }
            (ToKeeper::Fit { refusal: Some(why) }, ..) => candidate.kill(Fault::Worker, why),
            (ToKeeper::Fit { .. }, Stage::Trial, _) if candidate.version.is_some() => {
                // First its messages so far, so that less is replayed.
                if let Some(number) = self.supervisor.number() {
                    self.worker_sent(number, now);
                }
                self.stop_for(Stage::CutOver);
            }
            (ToKeeper::Fit { .. }, Stage::Rehearsal, _) => candidate.kill(Fault::Keeper, "it is fit".into()),
            (ToKeeper::Pong { .. }, ..) => {}
            _ => candidate.kill(Fault::Worker, "it sent an unexpected message".into()),
        }
    }

    /// The candidate exited.
    pub(super) fn candidate_ended(&mut self, end: End) {
        match self.upgrade.as_mut().map(|upgrade| upgrade.candidate_ended(end)) {
            Some(true) => self.stop_for(Stage::Reexec),
            Some(false) => self.end_upgrade(),
            None => {}
        }
    }

    /// Stops the worker, so that the next stage can begin.
    fn stop_for(&mut self, stage: Stage) {
        self.supervisor.kill();
        if let Some(upgrade) = &mut self.upgrade {
            upgrade.enter(stage, Instant::now());
        }
    }

    /// Cuts over to the new worker, or re-execs the keeper, once the worker has exited. To be called between turns only: exits reaped in a turn
    /// are part of the state at its end.
    pub(super) fn proceed(&mut self, now: Instant) {
        let Some(upgrade) = self.upgrade.as_mut().filter(|_| self.supervisor.pid().is_none()) else { return };
        match upgrade.stage {
            Stage::CutOver => {
                let Some(executable) = upgrade.executable.take() else { return };
                upgrade.enter(Stage::Settling, now);
                upgrade.report.worker = PartResult::Upgraded;
                self.supervisor.cut_over(executable, now);
                self.poison.reset();
                self.welcome(now);
            }
            Stage::Reexec => {
                let Err(error) = self.reexec();
                self.keep_keeper(format!("cannot execute it: {error}"));
            }
            _ => {}
        }
    }

    /// The worker answered the ping that it was sent when it had been sent everything.
    pub(super) fn settled(&mut self, now: Instant) {
        let Some(upgrade) = self.upgrade.as_mut().filter(|upgrade| upgrade.stage == Stage::Settling) else { return };
        upgrade.settled(now);
        self.upgrade_keeper(now);
    }

    /// The worker exited, and its executable was replaced by the previous one.
    pub(super) fn rolled_back(&mut self, end: &End) {
        self.poison.reset();
        if self.upgrade.as_mut().is_some_and(|upgrade| upgrade.rolled_back(end)) {
            // A rehearsal is of no use any more.
            if let Some(candidate) = self.supervisor.candidate() {
                candidate.kill(Fault::Keeper, "the worker was rolled back".into());
            }
            self.end_upgrade();
        } else if let Some(report) = &mut self.last_upgrade {
            report.worker = PartResult::RolledBack(end.why.clone());
        }
    }

    /// The worker is done; upgrades the keeper itself.
    fn upgrade_keeper(&mut self, now: Instant) {
        let Some(upgrade) = self.upgrade.as_mut().filter(|upgrade| upgrade.wants_keeper()) else { return self.end_upgrade() };
        if Executable::own().is_ok_and(|own| own.is(&self.supervisor.executable)) {
            upgrade.report.keeper = PartResult::Unchanged;
            return self.end_upgrade();
        }
        upgrade.enter(Stage::Rehearsal, now);
        let copy = self.save();
        let with = Surroundings { settings: &self.settings, home: &self.children.home };
        if let Err(error) = copy.and_then(|(copy, _)| self.supervisor.rehearse(with, &copy, now, &self.poll)) {
            self.keep_keeper(format!("cannot rehearse: {error}"));
        }
    }

    /// Executes the new executable in this process. Returns only on failure, with nothing changed.
    fn reexec(&mut self) -> io::Result<Infallible> {
        if let Some(Upgrade { report, .. }) = &mut self.upgrade {
            report.keeper = PartResult::Upgraded;
            // Logged before the exec, after which this executable cannot log.
            info!(to:% = report.to, path:% = report.path; "the keeper re-executes itself");
        }
        let (state, mut kept) = self.save()?;
        let own = Executable::own()?;
        kept.extend([state.as_raw_fd(), own.file.as_raw_fd()]);
        let words = ["keeper", "resume", &state.as_raw_fd().to_string(), &own.file.as_raw_fd().to_string()];
        let executable = &self.supervisor.executable;
        let protected = protect(executable.file.as_fd()).inspect_err(warn_of_unprotected).ok();
        let program = protected.as_ref().map_or(&executable.file, |protected| &protected.file);
        let arguments = self.settings.command_line(&words)?;
        sys::exec::execute(program.as_fd(), &arguments, &sys::exec::environment(), &kept)
    }

    fn keep_keeper(&mut self, why: String) {
        if let Some(upgrade) = &mut self.upgrade {
            upgrade.report.keeper = PartResult::Kept(why);
        }
        self.end_upgrade();
    }

    fn end_upgrade(&mut self) {
        let Some(upgrade) = self.upgrade.take() else { return };
        upgrade.log();
        self.control.reply(upgrade.asker, &ControlReply::Upgraded(Box::new(upgrade.report.clone())));
        self.last_upgrade = Some(upgrade.report);
    }
}
