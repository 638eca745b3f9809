//! The end of a pod: Stop, Shutdown, and the exit of its holder.
//!
//! ```text
//!  Stop       containers killed ─▶ namespaces left, or the holder killed ─▶ NotReady, waiters answered
//!  Shutdown   containers deleted ─▶ the same ─▶ cgroup and files removed ─▶ the keeper exits once its clients have gone
//! ```
use std::rc::Rc;
use std::time::Duration;

use super::calls::now_nanos;
use super::record::{Phase, Record};
use super::{Apply, Pod, PodChange, files, find};
use crate::handover::{Op, POD_KEY, ProcessExit};
use crate::worker::cause::{Cause, step};
use crate::worker::container::{self, Change, Reply, Shared, blocking, delete_for_command};
use crate::worker::error::Error;
use crate::worker::id::ContainerId;
use crate::worker::phase::Exit;

/// How long a keeper whose pod was shut down stays for its clients. containerd closes its connection after the answer.
pub(in crate::worker) const LINGER: Duration = Duration::from_millis(500);

/// Ends the containers of a pod and leaves its namespaces. One that has stopped stays so.
pub(in crate::worker) async fn stop(shared: &Shared, cause: &Cause, id: &str, apply: &impl Apply) -> Result<Change, Error> {
    let pod = find(shared, id)?;
    pod.is_stopping.set(true);
    let _turn = pod.turn.lock().await;
    if let Phase::NotReady { .. } = pod.record().phase {
        return Ok(Change::reply(Reply::Empty));
    }
    let _waiting = Stopping(&pod);
    end_containers(shared, cause, &pod, apply).await?;
    let pod = leave(cause, &pod, Exit { status: 0, at_nanos: now_nanos() }).await;
    Ok(Change { pod, ..Change::reply(Reply::Empty) })
}

/// Takes the mark back if the pod could not be stopped.
struct Stopping<'a>(&'a Pod);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        if self.0.record().phase.pid().is_some() {
            self.0.is_stopping.set(false);
        }
    }
}

/// Removes the pod with all that it has, its containers too. One that is not there is removed.
pub(in crate::worker) async fn shutdown(shared: &Shared, cause: &Cause, id: &str, apply: &impl Apply) -> Result<Change, Error> {
    let Ok(pod) = find(shared, id) else {
        return Ok(Change { leave: shared.registry.is_empty() && shared.pod.borrow().is_none(), ..Change::reply(Reply::Empty) });
    };
    pod.is_stopping.set(true);
    let _turn = pod.turn.lock().await;
    // By another call, in whose turn this one has waited.
    if find(shared, id).is_err() {
        return Ok(Change { leave: shared.registry.is_empty(), ..Change::reply(Reply::Empty) });
    }
    let _waiting = Stopping(&pod);
    if let Err(error) = end_containers(shared, cause, &pod, apply).await {
        log::warn!(sandbox:% = id, error:% = error.chain(); "cannot end all containers of the sandbox at once");
    }
    delete_containers(shared, cause, &pod, apply).await?;
    let phase = pod.record().phase;
    let left = match phase {
        Phase::Created | Phase::Ready { .. } => leave(cause, &pod, Exit { status: 0, at_nanos: now_nanos() }).await,
        Phase::NotReady { .. } => PodChange::default(),
    };
    let record = pod.record().clone();
    record.cgroup.remove().await;
    // Last: they name the cgroup for `delete`, should the keeper be killed meanwhile.
    if let Err(error) = remove_files(record).await {
        return Ok(Change { pod: left, ..Change::refuse(error) });
    }
    log::info!(sandbox:% = id; "sandbox removed");
    shared.pod.borrow_mut().take();
    let pod = PodChange { save: false, remove: true, ..left };
    Ok(Change { pod, leave: true, ..Change::reply(Reply::Empty) })
}

/// Shutdown of the task service, which clients call after each container: it ends a pod that it names and that has no containers.
pub(in crate::worker) async fn shutdown_by_task(shared: &Shared, cause: &Cause, id: &str, apply: &impl Apply) -> Result<Change, Error> {
    if find(shared, id).is_ok() && shared.registry.is_empty() {
        return shutdown(shared, cause, id, apply).await;
    }
    Ok(Change { leave: shared.registry.is_empty() && shared.pod.borrow().is_none(), ..Change::reply(Reply::Empty) })
}

/// The holder has exited: the namespaces of the pod are gone, or lost to containers that would join.
pub(in crate::worker) async fn exited(shared: &Shared, cause: &Cause, exit: &ProcessExit, apply: &impl Apply) -> Change {
    let Some(pod) = shared.pod.borrow().clone() else { return Change::default() };
    pod.is_stopping.set(true);
    let _turn = pod.turn.lock().await;
    if pod.record().phase.pid().is_none() {
        return Change::default();
    }
    log::warn!(sandbox:% = pod.record().id, pid = exit.pid, status = exit.status; "the process that holds the namespaces of the sandbox has exited");
    if let Err(error) = end_containers(shared, cause, &pod, apply).await {
        log::error!(sandbox:% = pod.record().id, error:% = error.chain(); "a container of a sandbox that is not ready lives on");
    }
    let pod = leave(cause, &pod, Exit { status: exit.status, at_nanos: exit.at_nanos }).await;
    Change { pod, ..Change::default() }
}

/// Leaves the namespaces. Failures are logged: they end with the keeper.
async fn leave(cause: &Cause, pod: &Rc<Pod>, exit: Exit) -> PodChange {
    let holder = pod.record().holder;
    let left = match holder {
        Some(_) => cause.perform(step::SIGNAL, Op::Signal { key: POD_KEY.to_owned(), signal: nix::libc::SIGKILL }).await,
        None => cause.perform(step::LEAVE_POD, Op::LeavePod).await,
    };
    match left {
        Ok(()) => {}
        // It has exited.
        Err(Error::Keeper { source, .. }) if source.raw_os_error() == Some(nix::libc::ESRCH) => {}
        Err(error) => log::error!(sandbox:% = pod.record().id, error:% = error.chain(); "cannot leave the namespaces of the pod"),
    }
    pod.update(|record| {
        let since_nanos = match record.phase {
            Phase::Ready { since_nanos, .. } => Some(since_nanos),
            Phase::Created | Phase::NotReady { .. } => None,
        };
        (record.phase, record.holder) = (Phase::NotReady { since_nanos, exit }, None);
    });
    log::info!(sandbox:% = pod.record().id; "sandbox stopped");
    PodChange { save: true, wake: Some(exit), release: holder.is_some(), ..PodChange::default() }
}

/// The containers to end, each with a number that is the same in a replay.
fn ending(shared: &Shared, pod: &Pod, apply: &impl Apply) -> Vec<(usize, ContainerId)> {
    let known = pod.record().ending.clone();
    let new: Vec<_> = shared.registry.ids().into_iter().filter(|id| !known.contains(id)).collect();
    if !new.is_empty() {
        pod.update(|record| record.ending.extend(new));
        apply.apply(Change { pod: PodChange { save: true, ..PodChange::default() }, ..Change::default() });
    }
    pod.record().ending.iter().cloned().enumerate().collect()
}

/// Kills the containers, all at once.
///
/// Errors: one has not exited in time.
async fn end_containers(shared: &Shared, cause: &Cause, pod: &Pod, apply: &impl Apply) -> Result<(), Error> {
    let mut killed = Vec::new();
    for (index, id) in ending(shared, pod, apply) {
        shared.registry.until_created(id.as_str(), CREATED_WITHIN).await;
        let Ok(container) = shared.registry.get(id.as_str()) else { continue };
        container::kill_for_good(&cause.part(index), &container).await;
        killed.push(container);
    }
    let mut ended = Ok(());
    for container in killed {
        ended = ended.and(container::until_ended(&container).await);
    }
    ended
}

/// Deletes the containers, by force.
///
/// Errors: one has not exited in time.
async fn delete_containers(shared: &Shared, cause: &Cause, pod: &Pod, apply: &impl Apply) -> Result<(), Error> {
    let mut failed = None;
    for (index, id) in ending(shared, pod, apply) {
        match delete_for_command(shared, &cause.part(index), id.to_string()).await {
            Ok(change) => apply.apply(Change { leave: false, reply: None, ..change }),
            Err(Error::NoContainer { .. }) => {}
            Err(error) => {
                log::warn!(sandbox:% = pod.record().id, container:% = id, error:% = error.chain(); "cannot delete a container of the sandbox");
                failed = failed.or(Some(error));
            }
        }
    }
    failed.map_or(Ok(()), Err)
}

async fn remove_files(record: Record) -> Result<(), Error> {
    blocking(move || files::blocking_remove(&record)).await
}

/// How long the end of a pod waits for a Create under way.
const CREATED_WITHIN: Duration = Duration::from_secs(3);
