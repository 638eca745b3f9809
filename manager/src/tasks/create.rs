//! The beginning of a task: what a shim is started with, or joined for, and asked to create.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use containerd_client::services::v1::Container;
use containerd_client::types::Mount;
use containerd_shim_protos::api::{CreateTaskRequest, CreateTaskResponse};
use containerd_shim_protos::sandbox_api::{CreateSandboxRequest, CreateSandboxResponse};
use log::info;
use prost_types::Any;
use protobuf::well_known_types::any::Any as ShimAny;

use super::bundle::{Address, Claim, Contents};
use super::cleanup::Left;
use super::{Fact, Key, Phase, Shim, Task, Tasks, Unanswered, log_fifo, program};
use crate::error::{Error, Result};
use crate::name::Namespace;
use crate::store::Kind;
use crate::wire;

/// What a task is made of.
#[derive(Debug, Clone, Default)]
pub(crate) struct NewTask {
    /// Its container: spec, sandbox if it is in one, runtime and the options that the shim is started with.
    pub(crate) container: Container,
    /// Another runtime than the container's.
    pub(crate) runtime: Option<String>,
    /// Other options for the runtime than the container's.
    pub(crate) options: Option<Any>,
    /// What is mounted as its root.
    pub(crate) rootfs: Vec<Mount>,
    /// Whether init has a terminal.
    pub(crate) terminal: bool,
    /// Where init's input comes from; empty for nowhere.
    pub(crate) stdin: String,
    /// Where its output goes.
    pub(crate) stdout: String,
    /// Where its errors go; with a terminal there is one output.
    pub(crate) stderr: String,
    /// The folder of the checkpoint to restore; empty for none.
    pub(crate) checkpoint: String,
}

impl Tasks {
    /// Creates a task and returns the pid of its init.
    ///
    /// Errors: nothing is left of it.
    pub(crate) async fn create(self: &Arc<Self>, namespace: &Namespace, new: NewTask) -> Result<u32> {
        let sandbox = Some(new.container.sandbox.clone()).filter(|sandbox| !sandbox.is_empty());
        let home = match &sandbox {
            Some(sandbox) => Some(self.home(namespace, sandbox).await?),
            None => None,
        };
        let id = new.container.id.clone();
        let launch = Launch::of(new, home)?;
        let task = self.reserve(Kind::Task, (namespace.clone(), id), sandbox).await?;
        let pid = self.bring_up(&task, launch).await?;
        info!(namespace:%, container = task.id.as_str(), pid; "task created");
        Ok(pid)
    }

    /// Reserves the id. A task whose shim is dead is replaced.
    pub(super) async fn reserve(&self, kind: Kind, key: Key, sandbox: Option<String>) -> Result<Arc<Task>> {
        let mut taken = super::object(kind, &key.1);
        for _attempt in 0..3 {
            let old = {
                let mut all = self.all();
                match all.entry(key.clone()) {
                    std::collections::btree_map::Entry::Vacant(place) => {
                        let task = Task::new(&self.settings, kind, key, sandbox, Phase::Starting);
                        return Ok(Arc::clone(place.insert(task)));
                    }
                    std::collections::btree_map::Entry::Occupied(old) => Arc::clone(old.get()),
                }
            };
            taken = old.object();
            match old.settled().await {
                Ok(Phase::Ended(exit)) => {
                    let pass = self.gate.enter().await?;
                    let is_collected = self.collect(&old, exit, &pass).await;
                    drop(pass);
                    if !is_collected {
                        old.gone().await;
                    }
                }
                Err(Error::NotFound(_)) if matches!(old.phase(), Phase::Gone) => {}
                Err(unknown @ Error::Unsettled { .. }) => return Err(unknown),
                Ok(_) | Err(_) => break,
            }
        }
        Err(Error::AlreadyExists(taken))
    }

    /// Makes what was reserved and returns its pid, which a sandbox does not have yet.
    ///
    /// Errors: nothing is left of it.
    pub(super) async fn bring_up(self: &Arc<Self>, task: &Arc<Task>, launch: Launch) -> Result<u32> {
        let claim = match self.prepare(task, &launch).await {
            Ok(claim) => claim,
            Err(error) => {
                self.forget(task);
                return Err(error);
            }
        };
        // no store change from here on: a process that takes over meanwhile waits for the claim
        let made = self.launch(task, launch).await;
        match made {
            Ok((shim, pid)) => {
                task.observe(Fact::Connected(shim.clone()));
                drop(claim);
                tokio::spawn(Arc::clone(self).watch(Arc::clone(task), shim));
                Ok(pid)
            }
            Err(failure) => {
                self.discard(task, failure.shim, failure.may_have_created, claim).await;
                Err(failure.error)
            }
        }
    }

    async fn prepare(&self, task: &Task, launch: &Launch) -> Result<Claim> {
        // a process that takes over must find the bundle of every creation in progress
        let _pass = self.gate.enter().await?;
        self.forget_earlier(task).await?;
        let (bundle, program, contents) = (task.bundle.clone(), launch.program.clone(), launch.contents.clone());
        let prepared = self.pool.run(move || {
            bundle.blocking_create(&contents)?;
            let claim = bundle.claim()?.ok_or_else(|| Error::Locked(bundle.path().to_owned()))?;
            bundle.write_program(&program)?;
            Ok(claim)
        });
        prepared.await?
    }

    async fn launch(&self, task: &Task, launch: Launch) -> Result<(Shim, u32), Failure> {
        let without_shim = |error| Failure { shim: None, may_have_created: false, error };
        log_fifo::copy(task.bundle.path()).map_err(without_shim)?;
        let address = match launch.home {
            Some(address) => address,
            None => {
                let started = self.programs.start(&launch.program, &task.bundle, &task.namespace, &task.id, launch.options.as_ref());
                started.await.map_err(without_shim)?
            }
        };
        let shim = Shim::connect(&address, &task.namespace).await.map_err(without_shim)?;
        if let Err(error) = task.bundle.write_address(&address) {
            return Err(Failure { shim: Some(shim), may_have_created: false, error });
        }
        let bundle = task.bundle.path().to_string_lossy().into_owned();
        let made = match launch.order {
            Order::Task(mut request) => {
                request.bundle = bundle;
                shim.call::<CreateTaskResponse>("Create", &request, Some(CREATE)).await.map(|answer| answer.pid)
            }
            Order::Sandbox(mut request) => {
                request.bundle_path = bundle;
                shim.call_sandbox::<CreateSandboxResponse>("CreateSandbox", &request, Some(CREATE)).await.map(|_made| 0)
            }
        };
        let noted = |pid| if task.kind == Kind::Sandbox { task.bundle.write_created().map(|()| pid) } else { Ok(pid) };
        let (may_have_created, error) = match made.map(noted) {
            Ok(Ok(pid)) => return Ok((shim, pid)),
            Ok(Err(error)) => (true, error),
            Err(reason) => (!matches!(reason, Unanswered::Refused(_)), reason.into()),
        };
        Err(Failure { shim: Some(shim), may_have_created, error })
    }

    /// Undoes a failed creation. What cannot be undone at once is retried in the background.
    async fn discard(self: &Arc<Self>, task: &Arc<Task>, shim: Option<Shim>, may_have_created: bool, claim: Claim) {
        // a shim that refused or was not asked, and does not know the task, has created nothing: containerd 1.7's program fails to delete that
        let may_exist = match &shim {
            Some(shim) => self.dismiss(task, shim).await || may_have_created,
            None => false,
        };
        let left = if may_exist { Left::Unacknowledged(None) } else { Left::Unmade };
        self.finish_off(task, left, claim).await;
    }

    /// Cleans up what no client can use any more. If the first attempt fails, it is repeated in the background.
    pub(super) async fn finish_off(self: &Arc<Self>, task: &Arc<Task>, left: Left, claim: Claim) {
        let turn = self.programs.turn().await;
        let attempt = self.try_to_clean_up(task, left, 0).await;
        drop(turn);
        if attempt.is_err() {
            let (tasks, task) = (Arc::clone(self), Arc::clone(task));
            tokio::spawn(async move { tasks.clean_up(&task, left, claim).await });
        }
    }
}

/// A sandbox that a task joins: the program of its shim, and where that serves.
pub(super) struct Home {
    pub(super) program: PathBuf,
    pub(super) address: Address,
}

/// What a shim is started with and asked for.
pub(super) struct Launch {
    pub(super) program: PathBuf,
    /// Where the shim serves, if it is a sandbox's: then none is started.
    pub(super) home: Option<Address>,
    /// What `start` gets.
    pub(super) options: Option<ShimAny>,
    pub(super) contents: Contents,
    pub(super) order: Order,
}

/// What a shim is asked to create, without the bundle.
pub(super) enum Order {
    Task(CreateTaskRequest),
    Sandbox(CreateSandboxRequest),
}

impl Launch {
    /// Errors: the runtime is unknown or not installed.
    fn of(new: NewTask, home: Option<Home>) -> Result<Self> {
        let runtime = new.container.runtime.unwrap_or_default();
        // a task that joins is cleaned up by the program of the shim that has it
        let (program, home) = match home {
            Some(home) => (home.program, Some(home.address)),
            None => (program::find(new.runtime.as_deref().unwrap_or(&runtime.name))?, None),
        };
        let options = runtime.options.filter(|options| !options.type_url.is_empty());
        let sandbox = Some(new.container.sandbox).filter(|sandbox| !sandbox.is_empty());
        let request = CreateTaskRequest {
            id: new.container.id,
            rootfs: new.rootfs.into_iter().map(wire::mount_to_shim).collect(),
            terminal: new.terminal,
            stdin: new.stdin,
            stdout: new.stdout,
            stderr: new.stderr,
            checkpoint: new.checkpoint,
            options: wire::to_shim_field(new.options.or_else(|| options.clone())),
            ..CreateTaskRequest::default()
        };
        let contents = Contents { spec: Some(new.container.spec.unwrap_or_default().value), sandbox };
        Ok(Self { program, home, options: options.map(wire::to_shim), contents, order: Order::Task(request) })
    }
}

/// Why there is no task.
struct Failure {
    /// The shim that was started for it.
    shim: Option<Shim>,
    /// Whether the shim was asked to create it, and has not refused.
    may_have_created: bool,
    error: Error,
}

/// For Create: hooks and checkpoints are part of it.
const CREATE: Duration = Duration::from_secs(600);
