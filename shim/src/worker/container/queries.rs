//! The calls that change nothing: State, Pids, Stats, Wait. From records and the kernel, without asking anybody.
use std::path::PathBuf;

use super::{Change, Container, Phase, ProcessKey, Record, Reply, Streams, Target};
use crate::worker::Worker;
use crate::worker::error::Error;

/// What State tells of a process.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::worker) struct StateOf {
    /// The container's id, or the added process's.
    pub(in crate::worker) id: String,
    /// Empty for init.
    pub(in crate::worker) exec: String,
    pub(in crate::worker) bundle: PathBuf,
    pub(in crate::worker) pid: Option<u32>,
    pub(in crate::worker) status: Status,
    pub(in crate::worker) stdio: Streams,
    pub(in crate::worker) exit: Option<super::Exit>,
}

/// The statuses that containerd knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::worker) enum Status {
    Created,
    Running,
    Paused,
    Stopped,
}

/// Describes a process from the records.
pub(in crate::worker) fn state_of(record: &Record, key: &ProcessKey) -> Option<StateOf> {
    let process = record.process(key)?;
    let status = match process.phase {
        // What is stopped for a client is what it was told of.
        Phase::Created | Phase::Starting { .. } | Phase::Dying { started: false, .. } => Status::Created,
        Phase::Running | Phase::Dying { started: true, .. } if record.init.phase == Phase::Paused => Status::Paused,
        Phase::Running | Phase::Dying { started: true, .. } => Status::Running,
        Phase::Paused => Status::Paused,
        Phase::Exited(_) => Status::Stopped,
    };
    let exec = key.exec.as_ref().map(ToString::to_string).unwrap_or_default();
    Some(StateOf {
        id: if exec.is_empty() { record.id.to_string() } else { exec.clone() },
        exec,
        bundle: record.bundle.clone(),
        pid: process.pid,
        status,
        stdio: process.stdio.clone(),
        exit: process.exit(),
    })
}

/// The processes of a container that the records name: init until Delete, dead or not, and the added ones that run.
pub(in crate::worker) fn recorded_pids(record: &Record) -> Vec<(u32, Option<String>)> {
    let init = record.init.pid.map(|pid| (pid, None));
    let added = record.execs.iter().filter(|(_, process)| process.phase.is_under_way());
    let added = added.filter_map(|(exec, process)| Some((process.pid?, Some(exec.to_string()))));
    init.into_iter().chain(added).collect()
}

/// Lists the processes of a container: those of the records, then whoever else is in its cgroup.
pub(in crate::worker) fn pids(container: &Container) -> Vec<(u32, Option<String>)> {
    let record = container.record();
    let mut pids = recorded_pids(&record);
    let mut others = record.cgroup.pids();
    others.sort_unstable();
    for pid in others {
        if pids.iter().all(|(known, _)| *known != pid) {
            pids.push((pid, None));
        }
    }
    pids
}

/// The metrics of a container, until it is deleted.
pub(in crate::worker) fn stats(worker: &Worker, id: &str) -> Result<Change, Error> {
    let container = worker.registry.get(id)?;
    let metrics = container.record().cgroup.metrics();
    Ok(Change::reply(Reply::Stats(metrics)))
}

/// Waits for the end of a process: parked with the keeper, where it costs a few bytes.
pub(in crate::worker) fn wait(worker: &Worker, target: &Target) -> Result<Change, Error> {
    let container = worker.registry.get(&target.id)?;
    let key = container.key(&target.exec)?;
    Ok(match container.process(&key, super::Process::exit)? {
        Some(exit) => Change::reply(Reply::Exit(exit)),
        None => Change { park: Some(key), ..Change::default() },
    })
}
