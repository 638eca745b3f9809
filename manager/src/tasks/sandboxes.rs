//! Sandboxes: what differs from a container's task.
//!
//! ```text
//! CreateSandbox ─▶ created, noted in the bundle ─ StartSandbox ─▶ runs ─ it ends, or StopSandbox ─▶ ShutdownSandbox: nothing is left
//!        │ crash before the note: undone                │ refused: as after ShutdownSandbox
//! ```
//! The shim keeps the state. This process publishes the exit once, whether the shim reports it or has crashed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use containerd_client::types::{Mount, Sandbox};
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse,
    StartSandboxRequest, StartSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};
use log::{info, warn};
use prost_types::{Any, Timestamp};

use super::bundle::Contents;
use super::cleanup::Left;
use super::create::{Home, Launch, Order};
use super::deletion::{Deletion, SHUTDOWN, is_unknown};
use super::limits::{LONG, STATE};
use super::{AGAIN, Fact, LONGEST_PAUSE, Phase, Shim, Task, Tasks, Unanswered, program};
use crate::error::{Error, Result};
use crate::name::Namespace;
use crate::store::{Exit, Kind};
use crate::{timestamp, wire};

/// What a sandbox is made of.
#[derive(Debug, Clone, Default)]
pub(crate) struct NewSandbox {
    /// Its record: id, runtime and spec.
    pub(crate) record: Sandbox,
    /// What its shim makes it from.
    pub(crate) options: Option<Any>,
    /// What is mounted as its root.
    pub(crate) rootfs: Vec<Mount>,
    /// Its network namespace; empty for none.
    pub(crate) netns_path: String,
    pub(crate) annotations: HashMap<String, String>,
}

impl Tasks {
    /// Starts a shim and has it create a sandbox.
    ///
    /// Errors: nothing is left of it.
    pub(crate) async fn create_sandbox(self: &Arc<Self>, namespace: &Namespace, new: NewSandbox) -> Result<()> {
        let key = (namespace.clone(), new.record.sandbox_id.clone());
        let launch = launch(new)?;
        let sandbox = self.reserve(Kind::Sandbox, key, None).await?;
        self.bring_up(&sandbox, launch).await?;
        info!(namespace:%, sandbox = sandbox.id.as_str(); "sandbox created");
        Ok(())
    }

    /// Has the shim start a sandbox. If it cannot, nothing is left of the sandbox but its record.
    pub(crate) async fn start_sandbox(self: &Arc<Self>, sandbox: &Arc<Task>) -> Result<StartSandboxResponse> {
        let shim = sandbox.shim().await?;
        let request = StartSandboxRequest { sandbox_id: sandbox.id.clone(), ..StartSandboxRequest::default() };
        match shim.call_sandbox::<StartSandboxResponse>("StartSandbox", &request, Some(LONG)).await {
            Ok(answer) => {
                info!(namespace:% = sandbox.namespace, sandbox = sandbox.id.as_str(), pid = answer.pid; "sandbox started");
                tokio::spawn(Arc::clone(self).watch_exit(Arc::clone(sandbox), shim));
                Ok(answer)
            }
            Err(reason) => {
                // it may run already, and a client may have asked twice
                let runs = status(sandbox, &shim, false).await.map(|status| status.state == READY);
                if matches!(reason, Unanswered::Refused(_)) && matches!(runs, Ok(false)) {
                    drop(shim);
                    // the first error is the one that counts
                    let _ = self.shut_down(sandbox).await;
                }
                Err(reason.into())
            }
        }
    }

    /// Has the shim end a sandbox and itself, and removes what is left. A sandbox whose shim is dead is forgotten.
    ///
    /// Errors: [`Error::NotFound`], or the shim's refusal.
    pub(crate) async fn shut_down(self: &Arc<Self>, sandbox: &Arc<Task>) -> Result<()> {
        loop {
            tokio::select! {
                () = sandbox.not_being_deleted() => {}
                // another process continues what this one has begun
                () = self.gate.retired() => return Err(Error::Retired),
            }
            match sandbox.settled().await? {
                Phase::Ended(exit) => {
                    let pass = self.gate.enter().await?;
                    return if self.collect(sandbox, exit, &pass).await { Ok(()) } else { Err(sandbox.not_found()) };
                }
                Phase::Live(shim) => {
                    if let Some(deletion) = Deletion::begin(sandbox)
                        && self.shut_down_with(sandbox, deletion, shim).await?
                    {
                        return Ok(());
                    }
                }
                Phase::Deleting(_) => {}
                Phase::Starting | Phase::Loading(_) | Phase::Cleaning(_) | Phase::Ending | Phase::Gone => return Err(sandbox.not_found()),
            }
        }
    }

    /// False when the shim cannot be asked, and the next phase has the answer.
    async fn shut_down_with(self: &Arc<Self>, sandbox: &Arc<Task>, _deletion: Deletion<'_>, shim: Shim) -> Result<bool> {
        match shut_down(sandbox, &shim, LONG).await {
            Ok(_) => {}
            Err(reason) if reason.is_not_found() => {}
            Err(Unanswered::Lost) => {
                sandbox.left().await;
                return Ok(false);
            }
            Err(reason) => return Err(reason.into()),
        }
        // from here on the end of the connection is expected
        if !sandbox.observe(Fact::Deleted) {
            return Ok(false);
        }
        // a shim stays for as long as it has clients
        drop(shim);
        let claim = self.claim(sandbox).await?;
        self.finish_off(sandbox, Left::ShutDown, claim).await;
        info!(namespace:% = sandbox.namespace, sandbox = sandbox.id.as_str(); "sandbox shut down");
        Ok(true)
    }

    /// Asks a shim to end a sandbox that it may have. Returns whether it may have had it: false if the shim does not know it. The program's
    /// `delete` removes the leftovers.
    pub(super) async fn dismiss_sandbox(&self, sandbox: &Task, shim: &Shim) -> bool {
        let answer = shut_down(sandbox, shim, SHUTDOWN).await;
        if answer.as_ref().is_err_and(|reason| !matches!(reason, Unanswered::Lost)) {
            // one that has no sandbox, or does not serve any, may have a task service that ends it
            self.dismiss_gracefully(sandbox, shim).await;
        }
        !is_unknown(&answer) && !answer.is_err_and(|reason| reason.is_unimplemented())
    }

    /// The sandbox that a task is to join.
    ///
    /// Errors: there is none, or its shim is dead.
    pub(super) async fn home(&self, namespace: &Namespace, id: &str) -> Result<Home> {
        let sandbox = self.find_sandbox(namespace, id)?;
        let shim = sandbox.shim().await?;
        let program = sandbox.bundle.program()?.ok_or_else(|| sandbox.not_found())?;
        Ok(Home { program, address: shim.at().clone() })
    }

    /// Queries the shim until it answers whether it has the sandbox, and whether that has ended.
    pub(super) async fn reconcile_sandbox(self: &Arc<Self>, sandbox: &Arc<Task>, shim: &Shim) {
        let mut pause = AGAIN;
        loop {
            match status(sandbox, shim, false).await {
                Ok(status) => {
                    if status.state == READY || status.exited_at.is_some() {
                        tokio::spawn(Arc::clone(self).watch_exit(Arc::clone(sandbox), shim.clone()));
                    }
                    return;
                }
                Err(reason) if reason.is_not_found() || reason.is_unimplemented() => {
                    // otherwise a client's Shutdown, or the end of the shim, was faster
                    if sandbox.observe(Fact::ShimGone) {
                        self.sweep(sandbox, shim).await;
                    }
                    return;
                }
                Err(Unanswered::Lost) => return,
                Err(Unanswered::Refused(error) | Unanswered::Late(error)) => {
                    warn!(namespace:% = sandbox.namespace, sandbox = sandbox.id.as_str(), error = error.chain(); "a shim does not report the status of its sandbox");
                }
            }
            if self.pause(pause).await.is_err() {
                return;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Publishes the exit of a sandbox when its shim reports it.
    async fn watch_exit(self: Arc<Self>, sandbox: Arc<Task>, shim: Shim) {
        let mut waiting = std::pin::pin!(wait(&sandbox, &shim));
        let answer = tokio::select! {
            biased;
            answer = &mut waiting => answer,
            () = self.gate.retired() => return,
            // the answer may be on its way
            () = sandbox.left() => match tokio::time::timeout(LAST_ANSWER, waiting).await {
                Ok(answer) => answer,
                Err(_elapsed) => return,
            },
        };
        // a shim that reports no time answers before the sandbox has ended: the pause of containerd 1.7's does
        let Ok(Some((status, at))) = answer.map(|answer| Some((answer.exit_status, answer.exited_at.into_option()?))) else { return };
        // after an upgrade the subscribers are those of the next process
        let Ok(_pass) = self.gate.enter().await else { return };
        let at = at.seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(at.nanos));
        self.publish_exit(&sandbox, "", Exit { pid: 0, status, at }).await;
    }
}

/// How a sandbox has ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SandboxEnd {
    pub(crate) status: u32,
    pub(crate) at: Option<Timestamp>,
}

impl Task {
    /// Waits for the end of a sandbox.
    pub(crate) async fn end_of_sandbox(&self) -> Result<SandboxEnd> {
        loop {
            match self.settled().await {
                Ok(Phase::Live(shim) | Phase::Deleting(shim)) => match wait(self, &shim).await {
                    Err(Unanswered::Lost) => self.left().await,
                    answer => {
                        let answer = answer?;
                        return Ok(SandboxEnd { status: answer.exit_status, at: wire::time_from_shim(answer.exited_at.into_option()) });
                    }
                },
                Ok(Phase::Ended(exit)) => return Ok(SandboxEnd { status: exit.status, at: Some(timestamp::from_nanos(exit.at)) }),
                Ok(_) => return Err(self.not_found()),
                // Wait has no deadline
                Err(Error::Unsettled { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The status of a sandbox, from its shim if it has one.
    pub(crate) async fn status_of_sandbox(&self, verbose: bool) -> Result<(SandboxStatusResponse, Option<Shim>)> {
        loop {
            match self.settled().await? {
                Phase::Live(shim) | Phase::Deleting(shim) => match status(self, &shim, verbose).await {
                    Err(Unanswered::Lost) => self.left().await,
                    answer => return Ok((answer?, Some(shim))),
                },
                Phase::Ended(exit) => {
                    let exited_at = wire::time_to_shim(timestamp::from_nanos(exit.at));
                    let (sandbox_id, state) = (self.id.clone(), NOT_READY.to_owned());
                    return Ok((SandboxStatusResponse { sandbox_id, state, exited_at, ..SandboxStatusResponse::default() }, None));
                }
                Phase::Starting | Phase::Loading(_) | Phase::Cleaning(_) | Phase::Ending | Phase::Gone => return Err(self.not_found()),
            }
        }
    }
}

/// Errors: the runtime is unknown or not installed.
fn launch(new: NewSandbox) -> Result<Launch> {
    let runtime = new.record.runtime.unwrap_or_default();
    let request = CreateSandboxRequest {
        sandbox_id: new.record.sandbox_id,
        rootfs: new.rootfs.into_iter().map(wire::mount_to_shim).collect(),
        options: wire::to_shim_field(new.options),
        netns_path: new.netns_path,
        annotations: new.annotations,
        ..CreateSandboxRequest::default()
    };
    Ok(Launch {
        program: program::find(&runtime.name)?,
        home: None,
        options: runtime.options.filter(|options| !options.type_url.is_empty()).map(wire::to_shim),
        contents: Contents { spec: new.record.spec.map(|spec| spec.value).filter(|spec| !spec.is_empty()), sandbox: None },
        order: Order::Sandbox(request),
    })
}

async fn status(sandbox: &Task, shim: &Shim, verbose: bool) -> Result<SandboxStatusResponse, Unanswered> {
    let request = SandboxStatusRequest { sandbox_id: sandbox.id.clone(), verbose, ..SandboxStatusRequest::default() };
    shim.call_sandbox("SandboxStatus", &request, Some(STATE)).await
}

async fn wait(sandbox: &Task, shim: &Shim) -> Result<WaitSandboxResponse, Unanswered> {
    let request = WaitSandboxRequest { sandbox_id: sandbox.id.clone(), ..WaitSandboxRequest::default() };
    shim.call_sandbox("WaitSandbox", &request, None).await
}

async fn shut_down(sandbox: &Task, shim: &Shim, limit: Duration) -> Result<ShutdownSandboxResponse, Unanswered> {
    let request = ShutdownSandboxRequest { sandbox_id: sandbox.id.clone(), ..ShutdownSandboxRequest::default() };
    shim.call_sandbox("ShutdownSandbox", &request, Some(limit)).await
}

/// For the answer to Wait of a shim that has shut its sandbox down.
const LAST_ANSWER: Duration = Duration::from_millis(200);
/// The states of a sandbox, as containerd and shims write them.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";
