//! The end of a task: a client deletes it, or its shim crashes.

use std::sync::Arc;
use std::time::Duration;

use containerd_client::events::{TaskDelete, TaskExit};
use containerd_shim_protos::api::{DeleteRequest, DeleteResponse, Empty, ShutdownRequest};
use log::{info, warn};

use super::bundle::Claim;
use super::program::Ended;
use super::{AGAIN, Fact, LONGEST_PAUSE, Phase, Shim, Task, Tasks, Unanswered, blocking, load};
use crate::error::{Error, Result};
use crate::gate::Pass;
use crate::name::Namespace;
use crate::store::{Exit, ended, execs, exits};
use crate::timestamp;

impl Tasks {
    /// Deletes a task and returns its exit.
    ///
    /// Errors: [`Error::NotFound`], or the shim's refusal while it runs.
    pub(crate) async fn delete(self: &Arc<Self>, task: &Arc<Task>) -> Result<Exit> {
        let _exclusive = task.deletion.lock().await;
        loop {
            match task.settled().await? {
                Phase::Ended(exit) => {
                    let pass = self.gate.enter().await?;
                    return if self.collect(task, exit, &pass).await { Ok(exit) } else { Err(task.not_found()) };
                }
                Phase::Live(shim) => {
                    let request = DeleteRequest { id: task.id.clone(), ..DeleteRequest::default() };
                    match shim.call::<DeleteResponse>("Delete", &request, Some(DELETE)).await {
                        Ok(answer) => {
                            let exit = exit_of(&answer);
                            // after a handover the new process learns it from the events of the shim
                            let pass = self.gate.enter().await?;
                            self.note_end(task, exit, &pass).await;
                            drop(pass);
                            // otherwise the shim crashed while it answered, or no longer knew the task
                            if !self.take_leave(task, &shim).await?
                                && let Ok(Phase::Ended(noted)) = task.settled().await
                            {
                                self.collect(task, noted, &self.gate.enter().await?).await;
                            }
                            return Ok(exit);
                        }
                        Err(Unanswered::Lost) => task.left().await,
                        Err(Unanswered::Refused(error)) if error.is_not_found() => {
                            if !is_unknown(&load::state(task, &shim, "").await) {
                                // clients would take NotFound for the task, not for what the shim did not find
                                return Err(Error::Launch(format!("the shim of task {} cannot delete it: {}", task.id, error.chain())));
                            }
                            // the store, or the shim's program, knows the exit
                            if task.observe(Fact::ShimGone) {
                                let (tasks, task) = (Arc::clone(self), Arc::clone(task));
                                tokio::spawn(async move { tasks.sweep(&task, &shim).await });
                            }
                        }
                        Err(reason) => return Err(reason.into()),
                    }
                }
                Phase::Starting | Phase::Loading(_) | Phase::Cleaning(_) | Phase::Ending | Phase::Gone => return Err(task.not_found()),
            }
        }
    }

    /// Records the exit of a task that its shim has just deleted: if this process crashes before it answers the client, the record is the only source.
    async fn note_end(&self, task: &Task, exit: Exit, _pass: &Pass) {
        let (namespace, id) = (task.namespace.clone(), task.id.clone());
        if let Err(error) = self.store.note(move |db| ended::put(db, namespace.as_str(), &id, exit)).await {
            warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot record the exit of a task");
        }
    }

    /// Shuts the shim down once it has deleted its task, and removes the bundle. False when another caller is already ending the task.
    async fn take_leave(&self, task: &Arc<Task>, shim: &Shim) -> Result<bool> {
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
    async fn forget_processes(&self, task: &Task) {
        if let Err(error) = self.forget_earlier(&task.namespace, &task.id).await {
            warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot forget a task");
        }
    }

    /// Removes the records of earlier tasks of that id.
    pub(super) async fn forget_earlier(&self, namespace: &Namespace, id: &str) -> Result<()> {
        let (namespace, id, now) = (namespace.clone(), id.to_owned(), timestamp::to_nanos(&timestamp::now()));
        self.store
            .note(move |db| {
                execs::clear(db, namespace.as_str(), &id)?;
                ended::take(db, namespace.as_str(), &id)?;
                exits::collect(db, namespace.as_str(), &id, None, now)
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
        let event = TaskDelete {
            container_id: task.id.clone(),
            pid: exit.pid,
            exit_status: exit.status,
            exited_at: Some(timestamp::from_nanos(exit.at)),
            id: String::new(),
        };
        self.events.publish(&task.namespace, "/tasks/delete", &event);
        self.forget(task);
        true
    }

    /// Asks a shim that has finished with this task to shut down, and waits for its exit; a shim with other tasks stays.
    pub(super) async fn dismiss_gracefully(&self, task: &Task, shim: &Shim) {
        let request = ShutdownRequest { id: task.id.clone(), ..ShutdownRequest::default() };
        let asked = shim.call::<Empty>("Shutdown", &request, Some(SHUTDOWN)).await;
        let is_shared =
            || self.all().values().any(|other| matches!(&*other.phase.borrow(), Phase::Live(live) if live.address() == shim.address()));
        if !matches!(asked, Err(Unanswered::Lost)) && !is_shared() {
            // a new task with the same id must not meet the old shim; the wait is bounded in case the shim stays
            let _ = tokio::time::timeout(LEAVE, shim.closed()).await;
        }
    }

    /// The same for a task that the shim may still have. Returns whether it may have had it: false if the shim does not know the task. The
    /// program's `delete` removes the leftovers.
    pub(super) async fn dismiss(&self, task: &Task, shim: &Shim) -> bool {
        let request = DeleteRequest { id: task.id.clone(), ..DeleteRequest::default() };
        let deleted = shim.call::<DeleteResponse>("Delete", &request, Some(SHUTDOWN)).await;
        self.dismiss_gracefully(task, shim).await;
        !is_unknown(&deleted)
    }

    pub(super) async fn remove_bundle(&self, task: &Task) {
        let bundle = task.bundle.clone();
        if let Err(error) = blocking(move || bundle.blocking_remove()).await {
            warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot remove a bundle");
        }
    }

    /// Waits for the lock of a bundle: the process from which this one has taken over may still be working on it.
    ///
    /// Errors: [`Error::Retired`] when another process has taken over from this one.
    pub(super) async fn claim(&self, task: &Task) -> Result<Claim> {
        loop {
            match task.bundle.claim() {
                Ok(Some(claim)) => return Ok(claim),
                Ok(None) => drop(task.observe(Fact::Unreachable("the previous x-manager process is still working on it".into()))),
                Err(error) => {
                    warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot claim a bundle, will retry");
                }
            }
            // a file lock cannot be awaited without blocking a thread
            self.pause(CLAIM_AGAIN).await?;
        }
    }

    /// Waits, unless another process takes over meanwhile.
    ///
    /// Errors: [`Error::Retired`] when one has.
    pub(super) async fn pause(&self, pause: Duration) -> Result<()> {
        tokio::select! {
            () = tokio::time::sleep(pause) => Ok(()),
            () = self.gate.retired() => Err(Error::Retired),
        }
    }

    /// Cleans up the leftovers of a shim, and retries until that works: when its program timed out or could not be run, a container may still be
    /// running. After a handover the new process finds the bundle and continues.
    pub(super) async fn clean_up(&self, task: &Task, left: Left, claim: Claim) {
        let (mut pause, mut refusals) = (AGAIN, 0);
        while !self.gate.is_retired() {
            let turn = self.programs.turn().await;
            match self.try_to_clean_up(task, left, refusals).await {
                Ok(()) | Err(Error::Retired) => break,
                Err(error) => refusals += u32::from(is_refusal(&error)),
            }
            drop(turn);
            if self.pause(pause).await.is_err() {
                break;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        drop(claim);
    }

    /// One attempt. `refusals`: how often the shim's program has failed.
    ///
    /// Errors: why it is to be tried again, or [`Error::Retired`].
    pub(super) async fn try_to_clean_up(&self, task: &Task, left: Left, refusals: u32) -> Result<()> {
        let answer = match task.bundle.program() {
            Ok(Some(program)) => self.programs.delete(&program, &task.bundle, &task.namespace, &task.id).await.map(Some),
            Ok(None) => Ok(None),
            Err(error) => Err(error),
        };
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) if is_refusal(&error) && refusals >= left.refusals() => {
                warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot clean up after a task, giving up");
                None
            }
            Err(error) => {
                warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot clean up after a task, will retry");
                task.observe(Fact::NotCleaned(error.chain().into()));
                return Err(error);
            }
        };
        let exit = match left {
            // no store change
            Left::Unmade | Left::Unacknowledged(None) => None,
            Left::Unacknowledged(Some(published)) => {
                let pass = self.gate.enter().await?;
                self.note_end(task, published, &pass).await;
                Some((published, pass))
            }
            Left::Dead => {
                let pass = self.gate.enter().await?;
                let exit = self.exit_record(task, answer.unwrap_or(Ended { pid: UNKNOWN, status: KILLED, at: None })).await;
                if let Some(exit) = exit {
                    self.publish_exit(task, "", exit).await;
                    info!(namespace:% = task.namespace, container = task.id.as_str(), pid = exit.pid, status = exit.status; "cleaned up the task of a dead shim");
                }
                exit.map(|exit| (exit, pass))
            }
        };
        self.remove_bundle(task).await;
        match exit {
            Some((exit, _pass)) => drop(task.observe(Fact::CleanedUp(exit))),
            None => self.forget(task),
        }
        Ok(())
    }

    /// The exit record of a dead shim's task; none if the shim crashed before it had created anything. It is stored before the bundle is
    /// removed.
    async fn exit_record(&self, task: &Task, answer: Ended) -> Option<Exit> {
        // containerd's own shims report -1 when there never was a process
        let was_made = answer.pid != 0 && i32::try_from(answer.pid).is_ok();
        let now = timestamp::to_nanos(&timestamp::now());
        let (namespace, id) = (task.namespace.clone(), task.id.clone());
        let recorded = self
            .store
            .note(move |db| {
                // an exit of this process that was published before takes precedence
                let published = exits::last(db, namespace.as_str(), &id, "")?
                    .filter(|published| !was_made || [published.pid, UNKNOWN].contains(&answer.pid));
                let at = answer.at.filter(|at| *at > 0).unwrap_or(now);
                let published = ended::get(db, namespace.as_str(), &id)?.or(published);
                let exit = published.or_else(|| was_made.then_some(Exit { pid: answer.pid, status: answer.status, at }));
                if let Some(exit) = exit {
                    ended::put(db, namespace.as_str(), &id, exit)?;
                }
                Ok(exit)
            })
            .await;
        recorded.unwrap_or_else(|error| {
            warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot record the exit of a dead shim's task");
            was_made.then_some(Exit { pid: answer.pid, status: answer.status, at: answer.at.unwrap_or(now) })
        })
    }

    /// Publishes an exit on behalf of a shim.
    pub(super) async fn publish_exit(&self, task: &Task, exec: &str, exit: Exit) {
        let event = TaskExit {
            container_id: task.id.clone(),
            id: if exec.is_empty() { task.id.clone() } else { exec.to_owned() },
            pid: exit.pid,
            exit_status: exit.status,
            exited_at: Some(timestamp::from_nanos(exit.at)),
        };
        let (events, published, namespace) = (Arc::clone(&self.events), event.clone(), task.namespace.clone());
        let publish = move || events.publish(&namespace, "/tasks/exit", &published);
        if let Err(error) = self.once(&task.namespace, &event, publish).await {
            warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot publish an exit");
        }
    }
}

/// The leftovers of a shim.
#[derive(Debug, Clone, Copy)]
pub(super) enum Left {
    /// A task whose shim crashed: its exit is published, and kept until a client collects it.
    Dead,
    /// An interrupted creation or deletion, with the exit if it was published.
    Unacknowledged(Option<Exit>),
    /// A creation that left nothing: the program did not start a shim, or the shim refused and does not know the task.
    Unmade,
}

impl Left {
    /// How often the program may fail before cleanup gives up: for about ten minutes. A program that never started a shim gets no retries.
    fn refusals(self) -> u32 {
        match self {
            Self::Dead | Self::Unacknowledged(_) => 25,
            Self::Unmade => 0,
        }
    }
}

/// Whether a shim's program failed or cannot be executed. Every other error is a lack of time or resources.
fn is_refusal(error: &Error) -> bool {
    use std::io::ErrorKind::{NotFound, PermissionDenied};
    match error {
        Error::Launch(_) => true,
        Error::Io { source, .. } => {
            matches!(source.kind(), NotFound | PermissionDenied) || source.raw_os_error() == Some(nix::libc::ENOEXEC)
        }
        _ => false,
    }
}

/// Whether a shim reports that it has no such task.
pub(super) fn is_unknown<A>(answer: &Result<A, Unanswered>) -> bool {
    matches!(answer, Err(Unanswered::Refused(error)) if error.is_not_found())
}

fn exit_of(answer: &DeleteResponse) -> Exit {
    let at = answer.exited_at.as_ref().map(|at| at.seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(at.nanos)));
    Exit { pid: answer.pid, status: answer.exit_status, at: at.unwrap_or_default() }
}

/// Before the next attempt to claim a bundle.
const CLAIM_AGAIN: Duration = Duration::from_millis(20);
/// No process has this pid: it stands for one that is no longer known.
const UNKNOWN: u32 = i32::MAX.cast_unsigned();
/// 128 + SIGKILL: the status of a task whose exit is unknown.
const KILLED: u32 = 137;
/// A deletion takes no longer: the runtime's hooks are part of it.
const DELETE: Duration = Duration::from_secs(120);
/// For the answer to Shutdown.
const SHUTDOWN: Duration = Duration::from_secs(3);
/// For the shim to exit after Shutdown.
const LEAVE: Duration = Duration::from_millis(1500);
