//! The leftovers of a shim that has crashed, or that does not know its task.
//!
//! Its program's `delete` removes what the runtime has left and reports the exit, which is published and kept for a client.

use std::sync::Arc;
use std::time::Duration;

use containerd_client::events::TaskExit;
use log::{info, warn};

use super::bundle::Claim;
use super::program::Ended;
use super::{AGAIN, Fact, LONGEST_PAUSE, Shim, Task, Tasks};
use crate::error::{Error, Result};
use crate::events::SandboxExit;
use crate::store::{Exit, Kind, ended, exits};
use crate::timestamp;

impl Tasks {
    /// Waits for a live shim to exit, and cleans up unless it was asked to.
    pub(super) async fn watch(self: Arc<Self>, task: Arc<Task>, shim: Shim) {
        tokio::select! {
            () = shim.closed() => {}
            () = task.left() => return,
        }
        // a client's Delete may have begun at the same moment
        if task.observe(Fact::ShimGone) {
            warn!(namespace:% = task.namespace, container = task.id.as_str(); "a shim has crashed");
            // otherwise another process has taken over
            if let Ok(claim) = self.claim(&task).await {
                self.clean_up(&task, Left::Dead, claim).await;
            }
        }
    }

    /// Cleans up a task that its shim does not know: an interrupted creation or deletion. Its exit is kept for the client that deleted it and
    /// got no answer.
    pub(super) async fn sweep(&self, task: &Arc<Task>, shim: &Shim) {
        let published = self.published_exit(task).await;
        // otherwise another process has taken over
        if let Ok(claim) = self.claim(task).await {
            let may_exist = self.dismiss(task, shim).await;
            // with an exit there was a container, and its deletion was interrupted
            let left = if may_exist || published.is_some() { Left::Unacknowledged(published) } else { Left::Unmade };
            self.clean_up(task, left, claim).await;
        }
    }

    /// The exit of a task, if it was published: exits published from here on belong to a task that no client has seen.
    pub(super) async fn published_exit(&self, task: &Task) -> Option<Exit> {
        let (namespace, id) = (task.namespace.clone(), task.id.clone());
        let published = self.store.recall(move |db| match ended::get(db, namespace.as_str(), &id)? {
            Some(published) => Ok(Some(published)),
            None => exits::last(db, namespace.as_str(), &id, ""),
        });
        published.await.unwrap_or_default()
    }

    pub(super) async fn remove_bundle(&self, task: &Task) {
        let bundle = task.bundle.clone();
        if let Err(error) = self.pool.run(move || bundle.blocking_remove()).await.and_then(|removed| removed) {
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
            Err(error) if is_refusal(&error) && refusals >= left.refusals(task.kind) => {
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
            Left::ShutDown => {
                let _pass = self.gate.enter().await?;
                self.remove_bundle(task).await;
                self.forget_processes(task).await;
                self.forget(task);
                return Ok(());
            }
            // no store change
            Left::Unmade | Left::Unstarted | Left::Unacknowledged(None) => None,
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
        // containerd's own shims report -1 when there never was a process; a sandbox may have none
        let was_made = task.kind == Kind::Sandbox || (answer.pid != 0 && i32::try_from(answer.pid).is_ok());
        let now = timestamp::to_nanos(&timestamp::now());
        let (kind, namespace, id) = (task.kind, task.namespace.clone(), task.id.clone());
        let recorded = self
            .store
            .note(move |db| {
                // an exit of this process that was published before takes precedence
                let is_of_this = |published: &Exit| !was_made || [published.pid, UNKNOWN].contains(&answer.pid);
                let published =
                    exits::last(db, namespace.as_str(), &id, "")?.filter(|published| kind == Kind::Sandbox || is_of_this(published));
                let at = answer.at.filter(|at| *at > 0).unwrap_or(now);
                let published = ended::get(db, namespace.as_str(), &id)?.or(published);
                let exit = published.or_else(|| was_made.then_some(Exit { pid: answer.pid, status: answer.status, at }));
                if let Some(exit) = exit {
                    ended::put(db, kind, namespace.as_str(), &id, exit)?;
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
        let (events, kind, (namespace, id)) = (Arc::clone(&self.events), task.kind, task.key());
        let process = if exec.is_empty() { id.clone() } else { exec.to_owned() };
        let publish = move || {
            let exited_at = Some(timestamp::from_nanos(exit.at));
            match kind {
                Kind::Task => {
                    let event = TaskExit { container_id: id, id: process, pid: exit.pid, exit_status: exit.status, exited_at };
                    events.publish(&namespace, "/tasks/exit", &event);
                }
                Kind::Sandbox => {
                    let event = SandboxExit { sandbox_id: id, exit_status: exit.status, exited_at };
                    events.publish(&namespace, "/sandboxes/exit", &event);
                }
            }
        };
        if let Err(error) = self.once(task.key(), exec.to_owned(), exit, publish).await {
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
    /// An interrupted creation that has not come to a shim: there may be one, which was asked for nothing.
    Unstarted,
    /// A sandbox that its shim has shut down for a client.
    ShutDown,
    /// A creation that left nothing: the program did not start a shim, or the shim does not know the task.
    Unmade,
}

impl Left {
    /// How often the program may fail before cleanup gives up: for about ten minutes where there may be a container, for four seconds where
    /// there may be a shim, or a sandbox, whose containers are cleaned up one by one: containerd 1.7's program always fails there. Where nothing was made, or is left, containerd's own programs up to 1.7 fail, as the shim has not written its files.
    fn refusals(self, kind: Kind) -> u32 {
        match (self, kind) {
            (Self::Dead | Self::Unacknowledged(_), Kind::Task) => 25,
            (Self::Dead | Self::Unacknowledged(_), Kind::Sandbox) | (Self::Unstarted, _) => 3,
            (Self::Unmade | Self::ShutDown, _) => 0,
        }
    }
}

/// Whether a shim's program failed or cannot be executed. Every other error is a lack of time or resources.
fn is_refusal(error: &Error) -> bool {
    matches!(error, Error::ProgramFailed { .. } | Error::ProgramAnswer { .. } | Error::ProgramUnusable { .. })
}

/// Before the next attempt to claim a bundle.
const CLAIM_AGAIN: Duration = Duration::from_millis(20);
/// No process has this pid: it stands for one that is no longer known.
const UNKNOWN: u32 = i32::MAX.cast_unsigned();
/// 128 + SIGKILL: the status of a task whose exit is unknown.
const KILLED: u32 = 137;
