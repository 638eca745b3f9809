//! The beginning of a task.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::{CreateTaskRequest, CreateTaskResponse};
use log::info;
use protobuf::well_known_types::any::Any;

use super::end::Left;
use super::{Phase, Shim, Task, Tasks, blocking, log as shim_log, program};
use crate::error::{Error, Result};
use crate::name::Namespace;

/// What a task is made of.
#[derive(Debug, Clone)]
pub(crate) struct NewTask {
    /// The name of the runtime, or the path of a shim.
    pub(crate) runtime: String,
    /// What the shim is started with.
    pub(crate) options: Option<Any>,
    /// The JSON of config.json.
    pub(crate) spec: Vec<u8>,
    /// What the shim is asked; the bundle is put in.
    pub(crate) request: CreateTaskRequest,
}

impl Tasks {
    /// Creates a task and returns the pid of its init.
    ///
    /// Errors: nothing is left of it.
    pub(crate) async fn create(self: &Arc<Self>, namespace: &Namespace, id: &str, new: NewTask) -> Result<u32> {
        let program = program::find(&new.runtime)?;
        let task = self.reserve(namespace, id).await?;
        let pid = self.bring_up(&task, &program, new).await?;
        info!(namespace:%, container = id, pid; "task created");
        Ok(pid)
    }

    /// Takes the id. A task whose shim is dead makes room.
    async fn reserve(&self, namespace: &Namespace, id: &str) -> Result<Arc<Task>> {
        let taken = || Error::AlreadyExists(format!("task {id}"));
        for _attempt in 0..3 {
            let old = {
                let mut all = self.all();
                match all.entry((namespace.clone(), id.to_owned())) {
                    std::collections::btree_map::Entry::Vacant(place) => {
                        let task = Task::new(&self.settings, namespace.clone(), id.to_owned(), Phase::Hidden);
                        return Ok(Arc::clone(place.insert(task)));
                    }
                    std::collections::btree_map::Entry::Occupied(old) => Arc::clone(old.get()),
                }
            };
            match old.settled().await {
                Ok(Phase::Ended(exit)) => {
                    if !self.collect(&old, exit).await {
                        old.gone().await;
                    }
                }
                Err(Error::NotFound(_)) if matches!(old.phase(), Phase::Gone) => {}
                Err(unknown @ Error::Unavailable(_)) => return Err(unknown),
                Ok(_) | Err(_) => return Err(taken()),
            }
        }
        Err(taken())
    }

    async fn bring_up(self: &Arc<Self>, task: &Arc<Task>, program: &Path, new: NewTask) -> Result<u32> {
        if let Err(error) = self.prepare(task, program, new.spec).await {
            self.forget(task);
            return Err(error);
        }
        let made = self.launch(task, program, new.options.as_ref(), new.request).await;
        match made {
            Ok((shim, pid)) => {
                task.phase.send_replace(Phase::Live(shim.clone()));
                tokio::spawn(Arc::clone(self).watch(Arc::clone(task), shim));
                Ok(pid)
            }
            Err((shim, error)) => {
                self.discard(task, shim).await;
                Err(error)
            }
        }
    }

    async fn prepare(&self, task: &Task, program: &Path, spec: Vec<u8>) -> Result<()> {
        self.forget_earlier(&task.namespace, &task.id).await?;
        let (bundle, program) = (task.bundle.clone(), program.to_owned());
        blocking(move || {
            bundle.blocking_create(&spec)?;
            bundle.write_program(&program)
        })
        .await
    }

    async fn launch(
        &self,
        task: &Task,
        program: &Path,
        options: Option<&Any>,
        mut request: CreateTaskRequest,
    ) -> Result<(Shim, u32), (Option<Shim>, Error)> {
        shim_log::copy(task.bundle.path()).map_err(|error| (None, error))?;
        let address =
            self.programs.start(program, &task.bundle, &task.namespace, &task.id, options).await.map_err(|error| (None, error))?;
        let shim = Shim::connect(&address, &task.namespace).await.map_err(|error| (None, error))?;
        if let Err(error) = task.bundle.write_address(&address) {
            return Err((Some(shim), error));
        }
        request.id.clone_from(&task.id);
        request.bundle = task.bundle.path().to_string_lossy().into_owned();
        match shim.call::<CreateTaskResponse>("Create", &request, Some(CREATE)).await {
            Ok(answer) => Ok((shim, answer.pid)),
            Err(reason) => Err((Some(shim), reason.into())),
        }
    }

    /// Undoes a creation that failed, as far as it went. What cannot be undone at once is tried again while others are served.
    async fn discard(self: &Arc<Self>, task: &Arc<Task>, shim: Option<Shim>) {
        let left = if shim.is_some() { Left::Unacknowledged(None) } else { Left::Unstarted };
        if let Some(shim) = shim {
            self.dismiss(task, &shim).await;
        }
        let turn = self.programs.turn().await;
        let attempt = self.try_to_clean_up(task, left, 0).await;
        drop(turn);
        if attempt.is_err() {
            let (tasks, task) = (Arc::clone(self), Arc::clone(task));
            tokio::spawn(async move { tasks.clean_up(&task, left).await });
        }
    }
}

/// A creation takes no longer: hooks and checkpoints are part of it.
const CREATE: Duration = Duration::from_secs(600);
