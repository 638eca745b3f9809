//! The beginning of a task.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::{CreateTaskRequest, CreateTaskResponse};
use log::{info, warn};
use protobuf::well_known_types::any::Any;

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
        match self.bring_up(&task, &program, new).await {
            Ok(pid) => {
                info!(namespace:%, container = id, pid; "task created");
                Ok(pid)
            }
            Err(error) => {
                self.forget(&task);
                Err(error)
            }
        }
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
                _ => return Err(taken()),
            }
        }
        Err(taken())
    }

    async fn bring_up(self: &Arc<Self>, task: &Arc<Task>, program: &Path, new: NewTask) -> Result<u32> {
        self.forget_earlier(&task.namespace, &task.id).await?;
        let bundle = task.bundle.clone();
        let (spec, path) = (new.spec, program.to_owned());
        blocking(move || {
            bundle.blocking_create(&spec)?;
            bundle.write_program(&path)
        })
        .await?;
        let made = self.launch(task, program, new.options.as_ref(), new.request).await;
        match made {
            Ok((shim, pid)) => {
                task.phase.send_replace(Phase::Live(shim.clone()));
                tokio::spawn(Arc::clone(self).watch(Arc::clone(task), shim));
                Ok(pid)
            }
            Err((shim, error)) => {
                self.discard(task, program, shim).await;
                Err(error)
            }
        }
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
        task.bundle.write_address(&address).map_err(|error| (None, error))?;
        let shim = Shim::connect(&address, &task.namespace).await.map_err(|error| (None, error))?;
        request.id.clone_from(&task.id);
        request.bundle = task.bundle.path().to_string_lossy().into_owned();
        match shim.call::<CreateTaskResponse>("Create", &request, Some(CREATE)).await {
            Ok(answer) => Ok((shim, answer.pid)),
            Err(reason) => Err((Some(shim), reason.into())),
        }
    }

    /// Undoes a creation that failed, as far as it went.
    async fn discard(&self, task: &Task, program: &Path, shim: Option<Shim>) {
        if let Some(shim) = shim {
            self.dismiss(task, &shim).await;
        }
        if let Err(error) = self.programs.delete(program, &task.bundle, &task.namespace, &task.id).await {
            warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot clean up after a failed creation");
        }
        self.remove_bundle(task).await;
    }
}

/// A creation takes no longer: hooks and checkpoints are part of it.
const CREATE: Duration = Duration::from_secs(600);
