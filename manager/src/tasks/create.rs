//! The beginning of a task.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use containerd_client::services::v1::Container;
use containerd_client::types::Mount;
use containerd_shim_protos::api::{CreateTaskRequest, CreateTaskResponse};
use log::info;
use prost_types::Any;
use protobuf::well_known_types::any::Any as ShimAny;

use super::bundle::Claim;
use super::cleanup::Left;
use super::{Fact, Phase, Shim, Task, Tasks, Unanswered, log_fifo, program};
use crate::error::{Error, Object, Result};
use crate::name::Namespace;
use crate::wire;

/// What a task is made of.
#[derive(Debug, Clone, Default)]
pub(crate) struct NewTask {
    /// Its container: spec, runtime and the options that the shim is started with.
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
        let launch = Launch::of(new)?;
        let task = self.reserve(namespace, &launch.request.id).await?;
        let pid = self.bring_up(&task, launch).await?;
        info!(namespace:%, container = task.id.as_str(), pid; "task created");
        Ok(pid)
    }

    /// Reserves the id. A task whose shim is dead is replaced.
    async fn reserve(&self, namespace: &Namespace, id: &str) -> Result<Arc<Task>> {
        let taken = || Error::AlreadyExists(Object::Task(id.to_owned()));
        for _attempt in 0..3 {
            let old = {
                let mut all = self.all();
                match all.entry((namespace.clone(), id.to_owned())) {
                    std::collections::btree_map::Entry::Vacant(place) => {
                        let task = Task::new(&self.settings, namespace.clone(), id.to_owned(), Phase::Starting);
                        return Ok(Arc::clone(place.insert(task)));
                    }
                    std::collections::btree_map::Entry::Occupied(old) => Arc::clone(old.get()),
                }
            };
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
                Ok(_) | Err(_) => return Err(taken()),
            }
        }
        Err(taken())
    }

    async fn bring_up(self: &Arc<Self>, task: &Arc<Task>, launch: Launch) -> Result<u32> {
        let claim = match self.prepare(task, &launch.program, launch.spec).await {
            Ok(claim) => claim,
            Err(error) => {
                self.forget(task);
                return Err(error);
            }
        };
        // no store change from here on: a process that takes over meanwhile waits for the claim
        let made = self.launch(task, &launch.program, launch.options.as_ref(), launch.request).await;
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

    async fn prepare(&self, task: &Task, program: &Path, spec: Vec<u8>) -> Result<Claim> {
        // a process that takes over must find the bundle of every creation in progress
        let _pass = self.gate.enter().await?;
        self.forget_earlier(&task.namespace, &task.id).await?;
        let (bundle, program) = (task.bundle.clone(), program.to_owned());
        let prepared = self.pool.run(move || {
            bundle.blocking_create(&spec)?;
            let claim = bundle.claim()?.ok_or_else(|| Error::Locked(bundle.path().to_owned()))?;
            bundle.write_program(&program)?;
            Ok(claim)
        });
        prepared.await?
    }

    async fn launch(
        &self,
        task: &Task,
        program: &Path,
        options: Option<&ShimAny>,
        mut request: CreateTaskRequest,
    ) -> Result<(Shim, u32), Failure> {
        let without_shim = |error| Failure { shim: None, may_have_created: false, error };
        log_fifo::copy(task.bundle.path()).map_err(without_shim)?;
        let address = self.programs.start(program, &task.bundle, &task.namespace, &task.id, options).await.map_err(without_shim)?;
        let shim = Shim::connect(&address, &task.namespace).await.map_err(without_shim)?;
        if let Err(error) = task.bundle.write_address(&address) {
            return Err(Failure { shim: Some(shim), may_have_created: false, error });
        }
        request.bundle = task.bundle.path().to_string_lossy().into_owned();
        match shim.call::<CreateTaskResponse>("Create", &request, Some(CREATE)).await {
            Ok(answer) => Ok((shim, answer.pid)),
            Err(reason) => {
                Err(Failure { shim: Some(shim), may_have_created: !matches!(reason, Unanswered::Refused(_)), error: reason.into() })
            }
        }
    }

    /// Undoes a failed creation. What cannot be undone at once is retried in the background.
    async fn discard(self: &Arc<Self>, task: &Arc<Task>, shim: Option<Shim>, may_have_created: bool, claim: Claim) {
        // a shim that refused or was not asked, and does not know the task, has created nothing: containerd 1.7's program fails to delete that
        let may_exist = match &shim {
            Some(shim) => self.dismiss(task, shim).await || may_have_created,
            None => false,
        };
        let left = if may_exist { Left::Unacknowledged(None) } else { Left::Unmade };
        let turn = self.programs.turn().await;
        let attempt = self.try_to_clean_up(task, left, 0).await;
        drop(turn);
        if attempt.is_err() {
            let (tasks, task) = (Arc::clone(self), Arc::clone(task));
            tokio::spawn(async move { tasks.clean_up(&task, left, claim).await });
        }
    }
}

/// What a shim is started with and asked for.
struct Launch {
    program: PathBuf,
    options: Option<ShimAny>,
    /// The JSON of config.json.
    spec: Vec<u8>,
    /// Without the bundle.
    request: CreateTaskRequest,
}

impl Launch {
    /// Errors: the runtime is unknown or not installed.
    fn of(new: NewTask) -> Result<Self> {
        let runtime = new.container.runtime.unwrap_or_default();
        let program = program::find(new.runtime.as_deref().unwrap_or(&runtime.name))?;
        let options = runtime.options.filter(|options| !options.type_url.is_empty());
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
        Ok(Self { program, options: options.map(wire::to_shim), spec: new.container.spec.unwrap_or_default().value, request })
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
