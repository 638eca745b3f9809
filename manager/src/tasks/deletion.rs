//! The deletion of a task by a client, who receives its exit.
//!
//! ```text
//! Live ─▶ Deleting: the shim is asked ─▶ Ending: the shim is shut down, its bundle removed ─▶ Gone     (phase)
//!   ▲ └──────── it refused ──┘
//! Ended: only its exit record is left ─▶ Ending ─▶ Gone
//! ```
//! **Invariant:** one client at a time deletes, as a shim reports the exit to one of them only; others wait for the next phase.

use std::sync::Arc;
use std::time::Duration;

use containerd_client::events::TaskDelete;
use containerd_shim_protos::api::{DeleteRequest, DeleteResponse, Empty, ShutdownRequest};
use log::{info, warn};

use super::{Fact, Phase, Shim, Task, Tasks, Unanswered, load};
use crate::error::{Error, Result};
use crate::gate::Pass;
use crate::name::Namespace;
use crate::store::{Exit, Kind, ended, execs, exits};
use crate::timestamp;

impl Tasks {
    /// Deletes a task and returns its exit.
    ///
    /// Errors: [`Error::NotFound`], or the shim's refusal while it runs.
    pub(crate) async fn delete(self: &Arc<Self>, task: &Arc<Task>) -> Result<Exit> {
        loop {
            tokio::select! {
                () = task.not_being_deleted() => {}
                // another process continues what this one has begun
                () = self.gate.retired() => return Err(Error::Retired),
            }
            match task.settled().await? {
                Phase::Ended(exit) => {
                    let pass = self.gate.enter().await?;
                    return if self.collect(task, exit, &pass).await { Ok(exit) } else { Err(task.not_found()) };
                }
                Phase::Live(shim) => {
                    if let Some(deletion) = Deletion::begin(task)
                        && let Some(exit) = self.delete_with(deletion, &shim).await?
                    {
                        return Ok(exit);
                    }
                }
                Phase::Deleting(_) => {}
                Phase::Starting | Phase::Loading(_) | Phase::Cleaning(_) | Phase::Ending | Phase::Gone => return Err(task.not_found()),
            }
        }
    }

    /// Has the shim delete a task; none when it cannot be asked, and the next phase has the answer.
    async fn delete_with(self: &Arc<Self>, deletion: Deletion<'_>, shim: &Shim) -> Result<Option<Exit>> {
        let task = deletion.task;
        let request = DeleteRequest { id: task.id.clone(), ..DeleteRequest::default() };
        match shim.call::<DeleteResponse>("Delete", &request, Some(DELETE)).await {
            Ok(answer) => {
                let exit = exit_of(&answer);
                // after a handover the new process learns it from the events of the shim
                let pass = self.gate.enter().await?;
                self.note_end(task, exit, &pass).await;
                drop(pass);
                // otherwise the shim crashed while it answered, or no longer knew the task
                if !self.finish(task, shim).await?
                    && let Ok(Phase::Ended(noted)) = task.settled().await
                {
                    self.collect(task, noted, &self.gate.enter().await?).await;
                }
                Ok(Some(exit))
            }
            Err(Unanswered::Lost) => {
                task.left().await;
                Ok(None)
            }
            Err(reason @ Unanswered::Refused(_)) if reason.is_not_found() => {
                if !is_unknown(&load::state(task, shim, "").await) {
                    // clients would take NotFound for the task, not for what the shim did not find
                    return Err(Error::Undeletable { task: task.id.clone(), source: Box::new(reason.into()) });
                }
                // the store, or the shim's program, knows the exit
                if task.observe(Fact::ShimGone) {
                    let (tasks, task, shim) = (Arc::clone(self), Arc::clone(task), shim.clone());
                    tokio::spawn(async move { tasks.sweep(&task, &shim).await });
                }
                Ok(None)
            }
            Err(reason) => Err(reason.into()),
        }
    }

    /// Records the exit of a task that its shim has just deleted: if this process crashes before it answers the client, the record is the only source.
    pub(super) async fn note_end(&self, task: &Task, exit: Exit, _pass: &Pass) {
        let (kind, namespace, id) = (task.kind, task.namespace.clone(), task.id.clone());
        if let Err(error) = self.store.note(move |db| ended::put(db, kind, namespace.as_str(), &id, exit)).await {
            warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot record the exit of a task");
        }
    }

    /// Shuts the shim down once it has deleted its task, and removes the bundle. False when another caller is already ending the task.
    async fn finish(&self, task: &Arc<Task>, shim: &Shim) -> Result<bool> {
        // from here on the end of the connection is expected
        if !task.observe(Fact::Deleted) {
            return Ok(false);
        }
        self.dismiss_gracefully(task, shim).await;
        // after a handover the new process finds the record, finishes the deletion and gives the same answer
        let _pass = self.gate.enter().await?;
        self.remove_bundle(task).await;
        self.forget_processes(task).await;
        self.forget(task);
        info!(namespace:% = task.namespace, container = task.id.as_str(); "task deleted");
        Ok(true)
    }

    /// Removes the records of a deleted task. If the disk is full, they are removed with the next task of that id.
    pub(super) async fn forget_processes(&self, task: &Task) {
        if let Err(error) = self.forget_earlier(task).await {
            warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot forget a task");
        }
    }

    /// Removes the records of earlier tasks of that id.
    pub(super) async fn forget_earlier(&self, task: &Task) -> Result<()> {
        let (kind, (namespace, id), now) = (task.kind, task.key(), timestamp::to_nanos(&timestamp::now()));
        self.store
            .note(move |db| {
                execs::clear(db, namespace.as_str(), &id)?;
                ended::take(db, namespace.as_str(), &id)?;
                match kind {
                    // its shim may publish them again
                    Kind::Task => exits::collect(db, namespace.as_str(), &id, None, now),
                    Kind::Sandbox => exits::clear(db, namespace.as_str(), &id),
                }
            })
            .await
    }

    /// Forgets a task of which only the exit record is left, because its container is deleted.
    pub(crate) async fn collect_with_container(&self, namespace: &Namespace, id: &str, pass: &Pass) {
        if let Ok(task) = self.find(namespace, id)
            && let Phase::Ended(exit) = task.phase()
        {
            self.collect(&task, exit, pass).await;
        }
    }

    /// Returns the exit of a task whose shim is dead to the client, and forgets the task. False when another caller does.
    pub(super) async fn collect(&self, task: &Task, exit: Exit, _pass: &Pass) -> bool {
        if !task.observe(Fact::Collected) {
            return false;
        }
        self.forget_processes(task).await;
        if task.kind == Kind::Task {
            let event = TaskDelete {
                container_id: task.id.clone(),
                pid: exit.pid,
                exit_status: exit.status,
                exited_at: Some(timestamp::from_nanos(exit.at)),
                id: String::new(),
            };
            self.events.publish(&task.namespace, "/tasks/delete", &event);
        }
        self.forget(task);
        true
    }

    /// Asks a shim that has finished with this task to shut down, and waits for its exit; a shim with other tasks stays, and a sandbox's does.
    pub(super) async fn dismiss_gracefully(&self, task: &Task, shim: &Shim) {
        if task.sandbox.is_some() {
            return;
        }
        let request = ShutdownRequest { id: task.id.clone(), ..ShutdownRequest::default() };
        let asked = shim.call::<Empty>("Shutdown", &request, Some(SHUTDOWN)).await;
        // this task is not live any more
        let is_shared = || self.all().values().any(|other| other.phase.borrow().shim().is_some_and(|live| live.at() == shim.at()));
        if !matches!(asked, Err(Unanswered::Lost)) && !is_shared() {
            // a new task with the same id must not meet the old shim; the wait is bounded in case the shim stays
            let _ = tokio::time::timeout(LEAVE, shim.closed()).await;
        }
    }

    /// The same for a task that the shim may still have. Returns whether it may have had it: false if the shim does not know the task. The
    /// program's `delete` removes the leftovers.
    pub(super) async fn dismiss(&self, task: &Task, shim: &Shim) -> bool {
        if task.kind == Kind::Sandbox {
            return self.dismiss_sandbox(task, shim).await;
        }
        let request = DeleteRequest { id: task.id.clone(), ..DeleteRequest::default() };
        let deleted = shim.call::<DeleteResponse>("Delete", &request, Some(SHUTDOWN)).await;
        self.dismiss_gracefully(task, shim).await;
        !is_unknown(&deleted)
    }
}

/// The one deletion in progress of a task. Unless it succeeds, the task is live again afterwards, if its shim is.
pub(super) struct Deletion<'a> {
    task: &'a Arc<Task>,
}

impl<'a> Deletion<'a> {
    /// None when another client was faster, or the shim has crashed.
    pub(super) fn begin(task: &'a Arc<Task>) -> Option<Self> {
        task.observe(Fact::DeletionBegun).then_some(Self { task })
    }
}

impl Drop for Deletion<'_> {
    fn drop(&mut self) {
        self.task.observe(Fact::DeletionOver);
    }
}

/// Whether a shim reports that it has no such task.
pub(super) fn is_unknown<A>(answer: &Result<A, Unanswered>) -> bool {
    answer.as_ref().is_err_and(Unanswered::is_not_found)
}

fn exit_of(answer: &DeleteResponse) -> Exit {
    let at = answer.exited_at.as_ref().map(|at| at.seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(at.nanos)));
    Exit { pid: answer.pid, status: answer.exit_status, at: at.unwrap_or_default() }
}

/// A deletion takes no longer: the runtime's hooks are part of it.
const DELETE: Duration = Duration::from_secs(120);
/// For the answer to Shutdown.
pub(super) const SHUTDOWN: Duration = Duration::from_secs(3);
/// For the shim to exit after Shutdown.
const LEAVE: Duration = Duration::from_millis(1500);
