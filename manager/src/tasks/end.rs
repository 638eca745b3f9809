//! The end of a task: deleted by a client, or left behind by a dead shim.

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
    /// Deletes a task and returns how it ended.
    ///
    /// Errors: [`Error::NotFound`], or the shim's refusal while it runs.
    pub(crate) async fn delete(self: &Arc<Self>, task: &Arc<Task>) -> Result<Exit> {
        let _the_other_is_through = task.deletion.lock().await;
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
                            // a process that has taken over finds out from what the shim published
                            let pass = self.gate.enter().await?;
                            self.note_end(task, exit, &pass).await;
                            drop(pass);
                            // otherwise it died over its answer, or was found not to know the task any more
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
                                // clients would take what it did not find for the task
                                return Err(Error::Launch(format!("the shim of task {} cannot delete it: {}", task.id, error.chain())));
                            }
                            // how it ended is known to the store, or to the shim's program
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

    /// Notes how a task ended that its shim has just deleted: if this process dies before its client knows, nobody else could say it.
    async fn note_end(&self, task: &Task, exit: Exit, _pass: &Pass) {
        let (namespace, id) = (task.namespace.clone(), task.id.clone());
        if let Err(error) = self.store.note(move |db| ended::put(db, namespace.as_str(), &id, exit)).await {
            warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot note how a task ended");
        }
    }

    /// What follows when a shim has deleted its task: it may go, and its bundle goes. False when somebody else has begun to end the task.
    async fn take_leave(&self, task: &Arc<Task>, shim: &Shim) -> Result<bool> {
        // from here on the connection's end is no news
        if !task.observe(Fact::Deleted) {
            return Ok(false);
        }
        self.dismiss_gracefully(task, shim).await;
        // a process that has taken over finds the note, does the rest, and answers the same
        let _pass = self.gate.enter().await?;
        self.remove_bundle(task).await;
        self.forget_processes(task).await;
        self.forget(task);
        info!(namespace:% = task.namespace, container = task.id.as_str(); "task deleted");
        Ok(true)
    }

    /// Forgets what is noted of a task that is gone. What a full disk leaves is forgotten with the next task of that id.
    async fn forget_processes(&self, task: &Task) {
        if let Err(error) = self.forget_earlier(&task.namespace, &task.id).await {
            warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot forget a task");
        }
    }

    /// Forgets what is noted of earlier tasks of that id.
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

    /// Forgets a task of which only its end is left, because its container goes.
    pub(crate) async fn collect_with_container(&self, namespace: &Namespace, id: &str, pass: &Pass) {
        if let Ok(task) = self.find(namespace, id)
            && let Phase::Ended(exit) = task.phase()
        {
            self.collect(&task, exit, pass).await;
        }
    }

    /// Hands out how a task ended whose shim is dead, and forgets it. False when somebody else does.
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

    /// Asks a shim to go that has nothing more to do for this task, and waits for it; one that has other tasks stays.
    pub(super) async fn dismiss_gracefully(&self, task: &Task, shim: &Shim) {
        let request = ShutdownRequest { id: task.id.clone(), ..ShutdownRequest::default() };
        let asked = shim.call::<Empty>("Shutdown", &request, Some(SHUTDOWN)).await;
        let is_shared =
            || self.all().values().any(|other| matches!(&*other.phase.borrow(), Phase::Live(live) if live.address() == shim.address()));
        if !matches!(asked, Err(Unanswered::Lost)) && !is_shared() {
            // an id that is used again at once shall not meet the old shim; one that stays all the same is waited for no longer
            let _ = tokio::time::timeout(LEAVE, shim.closed()).await;
        }
    }

    /// The same for a task that may still be something to its shim. Returns whether it may have been: false if the shim knows of none. What
    /// is left is for the program's `delete`.
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

    /// Waits for the right to change a bundle: a process from which this one has taken over may have begun something for it.
    ///
    /// Errors: [`Error::Retired`] when another process has taken over from this one.
    pub(super) async fn claim(&self, task: &Task) -> Result<Claim> {
        loop {
            match task.bundle.claim() {
                Ok(Some(claim)) => return Ok(claim),
                Ok(None) => drop(task.observe(Fact::Unreachable("an earlier x-manager is still busy with it".into()))),
                Err(error) => {
                    warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot claim a bundle, will retry");
                }
            }
            // a lock that becomes free wakes nobody who could do something else meanwhile
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

    /// Cleans up what a shim has left that is of no use any more, until that works: where its program was too slow or could not be run, there may be
    /// a container that is alive. When another process has taken over it is for that one, which finds the bundle.
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

    /// One attempt. `refusals`: how often the shim's program has said no.
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
            // these change nothing in the store
            Left::Unmade | Left::Unacknowledged(None) => None,
            Left::Unacknowledged(Some(told)) => {
                let pass = self.gate.enter().await?;
                self.note_end(task, told, &pass).await;
                Some((told, pass))
            }
            Left::Dead => {
                let pass = self.gate.enter().await?;
                let exit = self.last_words(task, answer.unwrap_or(Ended { pid: UNKNOWN, status: KILLED, at: None })).await;
                if let Some(exit) = exit {
                    self.tell_exit(task, "", exit).await;
                    info!(namespace:% = task.namespace, container = task.id.as_str(), pid = exit.pid, status = exit.status; "a dead shim's task was cleaned up");
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

    /// How the task of a dead shim ended; none if its shim died before it had made anything. Its record is in the store before its bundle
    /// goes.
    async fn last_words(&self, task: &Task, answer: Ended) -> Option<Exit> {
        // containerd's own shims say -1 when there never was a process
        let was_made = answer.pid != 0 && i32::try_from(answer.pid).is_ok();
        let now = timestamp::to_nanos(&timestamp::now());
        let (namespace, id) = (task.namespace.clone(), task.id.clone());
        let recorded = self
            .store
            .note(move |db| {
                // what was told before of this process stays true
                let told =
                    exits::last(db, namespace.as_str(), &id, "")?.filter(|told| !was_made || [told.pid, UNKNOWN].contains(&answer.pid));
                let at = answer.at.filter(|at| *at > 0).unwrap_or(now);
                let told = ended::get(db, namespace.as_str(), &id)?.or(told);
                let exit = told.or_else(|| was_made.then_some(Exit { pid: answer.pid, status: answer.status, at }));
                if let Some(exit) = exit {
                    ended::put(db, namespace.as_str(), &id, exit)?;
                }
                Ok(exit)
            })
            .await;
        recorded.unwrap_or_else(|error| {
            warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot record how a task ended");
            was_made.then_some(Exit { pid: answer.pid, status: answer.status, at: answer.at.unwrap_or(now) })
        })
    }

    /// Tells an exit that no shim has told.
    pub(super) async fn tell_exit(&self, task: &Task, exec: &str, exit: Exit) {
        let event = TaskExit {
            container_id: task.id.clone(),
            id: if exec.is_empty() { task.id.clone() } else { exec.to_owned() },
            pid: exit.pid,
            exit_status: exit.status,
            exited_at: Some(timestamp::from_nanos(exit.at)),
        };
        let (events, told, namespace) = (Arc::clone(&self.events), event.clone(), task.namespace.clone());
        let tell = move || events.publish(&namespace, "/tasks/exit", &told);
        if let Err(error) = self.once(&task.namespace, &event, tell).await {
            warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot tell an exit");
        }
    }
}

/// What a shim has left.
#[derive(Debug, Clone, Copy)]
pub(super) enum Left {
    /// A task whose shim is dead: how it ended is told, and kept until somebody collects it.
    Dead,
    /// A creation or deletion that was under way: how it ended, if anybody was told.
    Unacknowledged(Option<Exit>),
    /// A creation for which nothing was made: the program has not even started a shim, or that has refused and knows of no task.
    Unmade,
}

impl Left {
    /// How often the program may refuse before that is taken for an answer: for some ten minutes. One that starts nothing may be no shim's.
    fn refusals(self) -> u32 {
        match self {
            Self::Dead | Self::Unacknowledged(_) => 25,
            Self::Unmade => 0,
        }
    }
}

/// Whether a shim's program said no, or is none. Everything else is a shortage, of time too.
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

/// Whether a shim says that it has no such task.
pub(super) fn is_unknown<A>(answer: &Result<A, Unanswered>) -> bool {
    matches!(answer, Err(Unanswered::Refused(error)) if error.is_not_found())
}

fn exit_of(answer: &DeleteResponse) -> Exit {
    let at = answer.exited_at.as_ref().map(|at| at.seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(at.nanos)));
    Exit { pid: answer.pid, status: answer.exit_status, at: at.unwrap_or_default() }
}

/// Before the next attempt to claim a bundle.
const CLAIM_AGAIN: Duration = Duration::from_millis(20);
/// No process has that pid: stands for the one that nobody can name any more.
const UNKNOWN: u32 = i32::MAX.cast_unsigned();
/// 128 + SIGKILL: what is said of a task when nobody knows.
const KILLED: u32 = 137;
/// A deletion takes no longer: the runtime's hooks are part of it.
const DELETE: Duration = Duration::from_secs(120);
/// To ask a shim to go.
const SHUTDOWN: Duration = Duration::from_secs(3);
/// For it to go.
const LEAVE: Duration = Duration::from_millis(1500);
