//! The start of a container, and its end: what a client does in several calls, as one.

use std::sync::Arc;

use containerd_shim_protos::api::{Empty, KillRequest, StartRequest, StartResponse, WaitRequest, WaitResponse};

use super::limits::LONG;
use super::{NewTask, Task, Tasks, Unanswered};
use crate::error::{Error, Result};
use crate::name::Namespace;

impl Tasks {
    /// Creates a container's task and starts it, and returns the pid of its init.
    ///
    /// Errors: nothing is left of it, unless another process has taken over.
    pub(crate) async fn start_container(self: &Arc<Self>, namespace: &Namespace, new: NewTask) -> Result<u32> {
        let id = new.container.id.clone();
        self.create(namespace, new).await?;
        // a process that has taken over finds it created
        drop(self.gate.enter().await?);
        let task = self.find(namespace, &id)?;
        let started = self.start(&task, "").await;
        if started.is_err() {
            drop(self.gate.enter().await?);
            // the first error is the one that counts
            let _ = self.end(&task).await;
        }
        started
    }

    /// Starts a process of a task, init for an empty `exec`, and returns its pid.
    pub(crate) async fn start(&self, task: &Task, exec: &str) -> Result<u32> {
        let request = StartRequest { id: task.id.clone(), exec_id: exec.to_owned(), ..StartRequest::default() };
        task.call::<StartResponse>("Start", &request, LONG).await.map(|answer| answer.pid)
    }

    /// Kills and deletes a container's task, if there is one.
    pub(crate) async fn end_container(self: &Arc<Self>, namespace: &Namespace, id: &str) -> Result<()> {
        match self.find(namespace, id) {
            Ok(task) => self.end(&task).await,
            Err(_none) => Ok(()),
        }
    }

    async fn end(self: &Arc<Self>, task: &Arc<Task>) -> Result<()> {
        if let Ok(shim) = task.shim().await {
            let kill = KillRequest { id: task.id.clone(), signal: SIGKILL, all: true, ..KillRequest::default() };
            match shim.call::<Empty>("Kill", &kill, Some(LONG)).await {
                Ok(_) => {
                    let wait = WaitRequest { id: task.id.clone(), ..WaitRequest::default() };
                    shim.call::<WaitResponse>("Wait", &wait, Some(LONG)).await?;
                }
                // it has exited, or Delete reports that it has not
                Err(Unanswered::Refused(_) | Unanswered::Lost) => {}
                Err(reason) => return Err(reason.into()),
            }
        }
        match self.delete(task).await {
            Err(Error::NotFound(_)) => Ok(()),
            deleted => deleted.map(drop),
        }
    }
}

const SIGKILL: u32 = 9;
