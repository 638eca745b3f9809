//! An upgrade under way: another executable for the worker, then for the keeper itself.
//!
//! ```text
//!  Trial ──(fit)──▶ CutOver ──(old worker exits)──▶ Settling ──(first response)──▶ Rehearsal ──(fit)──▶ Reexec ──(worker exits)──▶ Settling
//!    │ anything else                                    │ the worker fails            │ anything else     │ it fails
//!    ▼                                                  ▼                             ▼                   ▼
//!  worker kept                                    worker rolled back            keeper kept         keeper kept
//! ```
//!
//! A candidate, which is a child of the new executable, checks a copy of the state: in a Trial the committed state, as a worker that can take
//! over; in a Rehearsal the keeper's own. A worker that fails between CutOver and the re-exec is rolled back, and the keeper is kept.
//!
//! Owns the stage and the report. What a stage requires is done by `run`.
//!
//! **Invariant:** the result is reported to the command that asked, in the log, and by `ps` and `inspect`.
use std::time::{Duration, Instant, SystemTime};

use log::{error, info, warn};

use super::generation::{End, Executable, Fault};
use crate::handover::{PartResult, UpgradeReport};
use crate::saved::saved;

/// How long a candidate may take to answer Fit.
pub(super) const FIT_WITHIN: Duration = Duration::from_secs(10);
/// How long the upgrade waits for a worker to catch up. It may still fail on probation later.
pub(super) const SETTLED_WITHIN: Duration = Duration::from_secs(20);

/// See the module.
#[derive(Debug)]
pub(super) struct Upgrade {
    /// The command that waits for the report.
    pub(super) asker: u32,
    /// Whether the keeper is to re-exec too.
    keeper_too: bool,
    pub(super) report: UpgradeReport,
    /// When a worker was last stopped.
    stopped_at: Instant,
    /// The executable, until it takes over.
    pub(super) executable: Option<Executable>,
    pub(super) stage: Stage,
    /// When the stage takes too long.
    pub(super) until: Option<Instant>,
}

// The next executable of the keeper begins with Settling: it finds no worker.
saved!(Upgrade { asker, keeper_too, report, stopped_at; executable, stage, until });

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Stage {
    /// A worker of the new executable reads the state and answers Fit.
    Trial,
    /// It is fit and takes over once the previous worker, which is being stopped, has exited.
    CutOver,
    /// A new worker catches up.
    #[default]
    Settling,
    /// A child of the new executable reads a copy of the keeper's state and answers Fit.
    Rehearsal,
    /// It could read it: the keeper re-execs once the worker, which is being stopped, has exited.
    Reexec,
}

impl Upgrade {
    /// `from`: the executable of the worker.
    pub(super) fn new(asker: u32, keeper_too: bool, executable: Executable, from: &Executable, now: Instant) -> Self {
        let report = UpgradeReport {
            from: from.build.clone(),
            path: executable.path.clone(),
            at_seconds: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            ..UpgradeReport::default()
        };
        let (executable, until) = (Some(executable), Some(now + FIT_WITHIN));
        Self { asker, keeper_too, report, stopped_at: now, executable, stage: Stage::Trial, until }
    }

    pub(super) fn enter(&mut self, stage: Stage, now: Instant) {
        self.stage = stage;
        self.until = None;
        match stage {
            Stage::CutOver | Stage::Reexec => self.stopped_at = now,
            Stage::Settling => self.until = Some(now + SETTLED_WITHIN),
            Stage::Trial | Stage::Rehearsal => {}
        }
    }

    /// Whether the keeper is still to be replaced.
    pub(super) fn wants_keeper(&self) -> bool {
        self.keeper_too && self.report.keeper == PartResult::Unasked
    }

    /// The worker has caught up.
    pub(super) fn settled(&mut self, now: Instant) {
        let pause_nanos = now.saturating_duration_since(self.stopped_at).as_nanos() as u64;
        self.report.pause_nanos = self.report.pause_nanos.max(pause_nanos);
    }

    /// The candidate exited. Returns whether the upgrade goes on: a rehearsal that was fit was stopped by the keeper.
    pub(super) fn candidate_ended(&mut self, end: End) -> bool {
        match self.stage {
            Stage::Rehearsal if end.fault == Fault::Keeper => return true,
            Stage::Rehearsal => self.report.keeper = PartResult::Kept(format!("its rehearsal failed: {}", end.why)),
            _ => self.report.worker = PartResult::Kept(end.why),
        }
        false
    }

    /// The worker exited, and its executable was replaced by the previous one. Returns whether that concerns this upgrade: before it cuts over,
    /// the worker is that of an earlier one.
    pub(super) fn rolled_back(&mut self, end: &End) -> bool {
        match self.stage {
            Stage::Trial | Stage::CutOver => return false,
            Stage::Settling => {}
            Stage::Rehearsal | Stage::Reexec => self.report.keeper = PartResult::Kept("its worker was rolled back".into()),
        }
        self.report.worker = PartResult::RolledBack(end.why.clone());
        true
    }

    /// Logs the report.
    pub(super) fn log(&self) {
        let report = &self.report;
        for (part, result) in [("worker", &report.worker), ("keeper", &report.keeper)] {
            match result {
                PartResult::Upgraded => info!(part, from:% = report.from, to:% = report.to, path:% = report.path; "upgraded"),
                PartResult::Kept(why) => error!(part, from:% = report.from, path:% = report.path, error:% = why; "not upgraded"),
                PartResult::RolledBack(why) => warn!(part, from:% = report.from, to:% = report.to, error:% = why; "upgrade rolled back"),
                PartResult::Unasked | PartResult::Unchanged => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(stage: Stage) -> Upgrade {
        let now = Instant::now();
        let own = Executable::own().expect("a test has an executable");
        let mut upgrade = Upgrade::new(1, true, Executable::own().expect("the same"), &own, now);
        upgrade.enter(stage, now);
        upgrade
    }

    fn end(fault: Fault) -> End {
        End { fault, why: "why".into() }
    }

    #[test]
    fn a_rehearsal_goes_on_only_if_the_keeper_ended_it() {
        let mut upgrade = at(Stage::Rehearsal);
        assert!(upgrade.candidate_ended(end(Fault::Keeper)) && upgrade.report.keeper == PartResult::Unasked);
        for fault in [Fault::Worker, Fault::Outside] {
            assert!(!upgrade.candidate_ended(end(fault)));
            assert_eq!(upgrade.report.keeper, PartResult::Kept("its rehearsal failed: why".into()));
        }
        for stage in [Stage::Trial, Stage::CutOver] {
            let mut upgrade = at(stage);
            assert!(!upgrade.candidate_ended(end(Fault::Worker)));
            assert_eq!((upgrade.report.worker, upgrade.report.keeper), (PartResult::Kept("why".into()), PartResult::Unasked));
        }
    }

    #[test]
    fn a_worker_is_rolled_back_by_the_upgrade_that_has_cut_over_to_it() {
        for stage in [Stage::Trial, Stage::CutOver] {
            let mut upgrade = at(stage);
            assert!(!upgrade.rolled_back(&end(Fault::Worker)) && upgrade.report.worker == PartResult::Unasked);
        }
        for (stage, is_keeper_kept) in [(Stage::Settling, false), (Stage::Rehearsal, true), (Stage::Reexec, true)] {
            let mut upgrade = at(stage);
            assert!(upgrade.rolled_back(&end(Fault::Worker)), "{stage:?}");
            assert_eq!(upgrade.report.worker, PartResult::RolledBack("why".into()));
            assert_eq!(matches!(upgrade.report.keeper, PartResult::Kept(_)), is_keeper_kept, "{stage:?}");
        }
    }
}
