//! The calls that change nothing: State, Pids, Stats, Wait. Answered from records and the kernel.

use super::create::at;
use super::{Change, Container, Process, Record, Reply, Shared, StateOf, Status, Target};
use crate::cgroup::Cgroup;
use crate::engine::Engine;
use crate::worker::cause::{Cause, step};
use crate::worker::error::Error;
use crate::worker::id::ProcessKey;
use crate::worker::phase::Phase;

/// Describes a process from the records.
pub(in crate::worker) fn state_of(record: &Record, key: &ProcessKey) -> Option<StateOf> {
    let process = record.process(key)?;
    let status = match process.phase {
        // A process is stopped for clients once its exit was published.
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
pub(super) fn recorded_pids(record: &Record) -> Vec<(u32, Option<String>)> {
    let init = record.init.pid.map(|pid| (pid, None));
    let added = record.execs.iter().filter(|(_, process)| process.phase.is_under_way());
    let added = added.filter_map(|(exec, process)| Some((process.pid?, Some(exec.to_string()))));
    init.into_iter().chain(added).collect()
}

/// Lists the processes of a container: those of the records, then the others in its cgroup. Never fails for a container that exists.
pub(in crate::worker) async fn pids(shared: &Shared, cause: &Cause, id: &str) -> Result<Change, Error> {
    let container = shared.registry.get(id)?;
    let mut others = match others(cause, &container).await {
        Ok(others) => others,
        Err(error) => {
            log::debug!(container:% = container.id, error:% = error.chain(); "cannot list the processes beside the recorded ones");
            Vec::new()
        }
    };
    others.sort_unstable();
    let mut pids = recorded_pids(&container.record());
    for pid in others {
        if pids.iter().all(|(known, _)| *known != pid) {
            pids.push((pid, None));
        }
    }
    Ok(Change::reply(Reply::Pids(pids)))
}

async fn others(cause: &Cause, container: &Container) -> Result<Vec<u32>, Error> {
    let (engine, spawn) = {
        let record = container.record();
        match &record.engine {
            // Without a cgroup of its own, only its runtime can list them.
            Engine::Command(engine) if record.cgroup == Cgroup::default() && record.init.phase.is_under_way() => {
                (engine.clone(), engine.pids(&at(&record)))
            }
            _ => return Ok(record.cgroup.pids()),
        }
    };
    let exited = cause.run(step::ENGINE, spawn).await?;
    Ok(engine.interpret_pids(&exited)?)
}

/// The metrics of a container, until it is deleted.
pub(in crate::worker) fn stats(shared: &Shared, id: &str) -> Result<Change, Error> {
    let container = shared.registry.get(id)?;
    let metrics = container.record().cgroup.metrics();
    Ok(Change::reply(Reply::Stats(metrics)))
}

/// Waits for the exit of a process: parked with the keeper, where it costs a few bytes.
pub(in crate::worker) fn wait(shared: &Shared, target: &Target) -> Result<Change, Error> {
    let container = shared.registry.get(&target.id)?;
    let key = container.key(&target.exec)?;
    Ok(match container.process(&key, Process::exit)? {
        Some(exit) => Change::reply(Reply::Exit(exit)),
        None => Change { park: Some(key), ..Change::default() },
    })
}
