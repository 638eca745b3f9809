//! The execs of a container: processes that were added to it.
//!
//! Owns which of them are kept. A spent exec, one that has exited or could not be started, is kept until its client deletes it, or until
//! those spent after it take up [`MAX_SPENT_BYTES`]: a client that never deletes its execs can add more for ever.
//!
//! **Invariant:** an exec that runs, or is still to be started, is never dropped. All counts follow from the execs.
use std::collections::{BTreeMap, BTreeSet};

use super::process::Process;
use crate::worker::id::ExecId;
use crate::worker::phase::Phase;

/// The most bytes that spent execs take up, oldest dropped first: some thousands of them.
const MAX_SPENT_BYTES: usize = 2 << 20;
/// The most bytes that the others take up, beyond which none is added: more of them than any host runs.
const MAX_LIVE_BYTES: usize = 8 << 20;
/// The most bytes that one takes up.
const MAX_PROCESS_BYTES: usize = 64 << 10;
/// The bytes that an exec takes up beside its texts, roughly.
const FIXED_BYTES: usize = 128;

/// See the module.
#[derive(Debug, Clone, Default)]
pub(crate) struct Execs {
    processes: BTreeMap<ExecId, Process>,
    /// The spent ones, oldest first.
    spent: BTreeSet<(i64, ExecId)>,
    spent_bytes: usize,
    live_bytes: usize,
    under_way: usize,
}

impl Execs {
    pub(crate) fn get(&self, exec: &str) -> Option<&Process> {
        self.processes.get(exec)
    }

    /// The stored id of an exec, if it exists.
    pub(crate) fn id(&self, exec: &str) -> Option<&ExecId> {
        self.processes.get_key_value(exec).map(|(id, _)| id)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&ExecId, &Process)> {
        self.processes.iter()
    }

    /// How many of them are being started.
    pub(crate) fn starting(&self) -> usize {
        self.processes.values().filter(|process| matches!(process.phase, Phase::Starting { .. })).count()
    }

    /// Whether one of them has not exited yet.
    pub(crate) fn are_under_way(&self) -> bool {
        self.under_way > 0
    }

    /// Whether this exec would exceed a bound: its bytes or the total, and the bound.
    pub(crate) fn excess(&self, exec: &ExecId, process: &Process) -> Option<(usize, usize)> {
        let bytes = bytes(exec, process);
        [(bytes, MAX_PROCESS_BYTES), (self.live_bytes + bytes, MAX_LIVE_BYTES)].into_iter().find(|(bytes, limit)| bytes > limit)
    }

    pub(crate) fn insert(&mut self, exec: ExecId, process: Process) {
        self.remove(&exec);
        self.count(&exec, &process);
        self.processes.insert(exec, process);
    }

    /// Changes one, and returns what `change` does.
    pub(crate) fn update<T>(&mut self, exec: &ExecId, change: impl FnOnce(&mut Process) -> T) -> Option<T> {
        let mut process = self.remove(exec)?;
        let result = change(&mut process);
        self.insert(exec.clone(), process);
        Some(result)
    }

    pub(crate) fn remove(&mut self, exec: &ExecId) -> Option<Process> {
        let process = self.processes.remove(exec)?;
        let bytes = bytes(exec, &process);
        match process.spent_at() {
            Some(at) => {
                self.spent.remove(&(at, exec.clone()));
                self.spent_bytes -= bytes;
            }
            None => self.live_bytes -= bytes,
        }
        self.under_way -= usize::from(process.phase.is_under_way());
        Some(process)
    }

    /// The oldest spent exec, if there are too many.
    pub(crate) fn surplus(&self) -> Option<ExecId> {
        self.spent.first().filter(|_| self.spent_bytes > MAX_SPENT_BYTES).map(|(_, exec)| exec.clone())
    }

    fn count(&mut self, exec: &ExecId, process: &Process) {
        let bytes = bytes(exec, process);
        match process.spent_at() {
            Some(at) => {
                self.spent.insert((at, exec.clone()));
                self.spent_bytes += bytes;
            }
            None => self.live_bytes += bytes,
        }
        self.under_way += usize::from(process.phase.is_under_way());
    }
}

fn bytes(exec: &ExecId, process: &Process) -> usize {
    let streams = &process.stdio;
    let files = process.files.iter().map(|path| path.as_os_str().len()).sum::<usize>();
    FIXED_BYTES + exec.as_str().len() + streams.stdin.len() + streams.stdout.len() + streams.stderr.len() + files
}

#[cfg(test)]
mod tests {
    use super::super::Streams;
    use super::*;
    use crate::worker::phase::{Exit, Fact};

    fn id(number: usize) -> ExecId {
        ExecId::new(&format!("e{number}")).expect("it is a name")
    }

    fn ended(at_nanos: i64) -> Process {
        let stdio = Streams { stdout: "x".repeat(500), ..Streams::default() };
        let mut process = Process::new(stdio);
        for fact in [Fact::StartAsked, Fact::Started, Fact::Reaped(Exit { status: 0, at_nanos }), Fact::Settled] {
            (process.phase, _) = process.phase.observe(fact);
        }
        process
    }

    #[test]
    fn the_oldest_spent_ones_are_surplus_and_never_one_that_is_live() {
        let mut execs = Execs::default();
        execs.insert(id(0), Process::new(Streams::default()));
        let mut dropped = Vec::new();
        for number in 1..10_000 {
            // the one with the highest number has ended first
            execs.insert(id(number), ended(-(number as i64)));
            while let Some(exec) = execs.surplus() {
                execs.remove(&exec);
                dropped.push(exec);
            }
        }
        assert!(execs.spent_bytes <= MAX_SPENT_BYTES && execs.spent.len() > 1000, "{} spent", execs.spent.len());
        assert_eq!(dropped.len(), 9_999 - execs.spent.len());
        assert!(execs.get("e0").is_some() && execs.get("e1").is_some() && execs.get("e9999").is_none());
    }

    #[test]
    fn counts_follow_from_the_processes() {
        let mut execs = Execs::default();
        execs.insert(id(1), Process::new(Streams::default()));
        execs.insert(id(2), ended(1));
        assert!(!execs.are_under_way());
        execs.update(&id(1), |process| (process.phase, _) = process.phase.observe(Fact::StartAsked));
        assert!(execs.are_under_way());
        let failed = |process: &mut Process| {
            (process.phase, _) = process.phase.observe(Fact::StartFailed);
            process.failed_at_nanos = Some(7);
        };
        execs.update(&id(1), failed);
        assert_eq!((execs.are_under_way(), execs.live_bytes, execs.spent.len()), (false, 0, 2));
        for number in [1, 2] {
            execs.remove(&id(number));
        }
        assert_eq!((execs.live_bytes, execs.spent_bytes, execs.spent.len(), execs.under_way), (0, 0, 0, 0));
    }

    #[test]
    fn one_that_is_too_long_or_one_too_many_is_refused() {
        let mut execs = Execs::default();
        let long = Process::new(Streams { stderr: "x".repeat(MAX_PROCESS_BYTES), ..Streams::default() });
        assert!(execs.excess(&id(0), &long).is_some());
        let process = Process::new(Streams { stderr: "x".repeat(8000), ..Streams::default() });
        let fitting = (0..5000).take_while(|number| {
            let fits = execs.excess(&id(*number), &process).is_none();
            execs.insert(id(*number), process.clone());
            fits
        });
        assert!((900..1100).contains(&fitting.count()));
    }
}
