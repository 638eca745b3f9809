//! Calls of the service for tasks, each with a sentence for its failure.

use std::time::Duration;

use containerd_client::services::v1::{
    CloseIoRequest, CreateTaskRequest, DeleteProcessRequest, DeleteTaskRequest, ExecProcessRequest, GetRequest, KillRequest,
    ListPidsRequest, ListTasksRequest, MetricsRequest, ResizePtyRequest, StartRequest, WaitRequest,
};
use containerd_client::types::Metric;
use containerd_client::types::v1::{Process, ProcessInfo, Status};
use tonic::Code;

use crate::client::{Client, call, call_within};
use crate::error::{Error, Result};

/// A process of a task: its init, or an exec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Id {
    /// The task's id, which is the container's.
    pub(crate) container: String,
    /// Empty for init, as on the wire.
    pub(crate) exec: String,
}

impl Id {
    /// The init of a container.
    pub(crate) fn init(container: &str) -> Self {
        Self { container: container.to_owned(), exec: String::new() }
    }

    fn name(&self) -> String {
        if self.exec.is_empty() {
            format!("container {}", self.container)
        } else {
            format!("exec {} in container {}", self.exec, self.container)
        }
    }
}

/// Creates a task. Its init is made, and waits.
pub(crate) async fn create(client: &Client, request: CreateTaskRequest) -> Result<u32> {
    let doing = format!("create the task of container {}", request.container_id);
    Ok(call_within(CREATED, doing, client.tasks().create(client.request(request))).await?.pid)
}

/// Adds a process to a task.
pub(crate) async fn exec(client: &Client, request: ExecProcessRequest) -> Result<()> {
    let doing = format!("exec in container {}", request.container_id);
    call(doing, client.tasks().exec(client.request(request))).await
}

/// Starts a process. A daemon that restarts meanwhile is asked again, for a minute: the shim knows whether it has started.
pub(crate) async fn start(client: &Client, id: &Id) -> Result<()> {
    let request = || client.request(StartRequest { container_id: id.container.clone(), exec_id: id.exec.clone() });
    let doing = format!("start {}", id.name());
    let mut lost = match call(&doing, client.tasks().start(request())).await {
        Err(error) if error.is_lost() => error,
        started => return started.map(drop),
    };
    for _attempt in 0..ATTEMPTS {
        tokio::time::sleep(AGAIN).await;
        match get(client, id).await {
            Ok(None) => return Err(lost),
            Ok(Some(process)) => match process.status() {
                Status::Unknown => {}
                Status::Created => match call(&doing, client.tasks().start(request())).await {
                    Err(error) if error.is_lost() => lost = error,
                    started => return started.map(drop),
                },
                Status::Running | Status::Stopped | Status::Paused | Status::Pausing => return Ok(()),
            },
            Err(error) if error.is_lost() => lost = error,
            Err(error) => return Err(error),
        }
    }
    Err(lost)
}

/// Waits until a process has exited, for as long as it takes, and returns its status: also over restarts of the daemon, as the shim keeps it.
pub(crate) async fn wait(client: &Client, id: &Id) -> Result<u32> {
    let mut failures = 0;
    loop {
        let begin = tokio::time::Instant::now();
        let request = WaitRequest { container_id: id.container.clone(), exec_id: id.exec.clone() };
        let error = match client.tasks().wait(client.request(request)).await {
            Ok(answer) => return Ok(answer.into_inner().exit_status),
            Err(status) => Error::Call { doing: format!("wait for {}", id.name()), status },
        };
        failures = if begin.elapsed() > AGAIN { 1 } else { failures + 1 };
        if !error.is_lost() || failures > ATTEMPTS {
            return Err(error);
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// The state of a process, if there is one.
pub(crate) async fn get(client: &Client, id: &Id) -> Result<Option<Process>> {
    let request = GetRequest { container_id: id.container.clone(), exec_id: id.exec.clone() };
    match call(format!("get the state of {}", id.name()), client.tasks().get(client.request(request))).await {
        Ok(answer) => Ok(answer.process),
        Err(error) if error.code() == Some(Code::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The states of all tasks of the namespace.
pub(crate) async fn list(client: &Client) -> Result<Vec<Process>> {
    let request = client.request(ListTasksRequest::default());
    Ok(call("list tasks", client.tasks().list(request)).await?.tasks)
}

/// Sends a signal. False if the process has ended already.
pub(crate) async fn kill(client: &Client, id: &Id, signal: u32, all: bool) -> Result<bool> {
    let request = KillRequest { container_id: id.container.clone(), exec_id: id.exec.clone(), signal, all };
    match call(format!("send signal {signal} to {}", id.name()), client.tasks().kill(client.request(request))).await {
        Ok(()) => Ok(true),
        Err(error) if error.code() == Some(Code::NotFound) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Deletes a process that has ended, if there is one, and returns its status.
pub(crate) async fn delete(client: &Client, id: &Id) -> Result<Option<u32>> {
    let doing = format!("delete the task of {}", id.name());
    let deleted = if id.exec.is_empty() {
        let request = DeleteTaskRequest { container_id: id.container.clone() };
        call(doing, client.tasks().delete(client.request(request))).await
    } else {
        let request = DeleteProcessRequest { container_id: id.container.clone(), exec_id: id.exec.clone() };
        call(doing, client.tasks().delete_process(client.request(request))).await
    };
    match deleted {
        Ok(answer) => Ok(Some(answer.exit_status)),
        Err(error) if error.code() == Some(Code::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Sets the size of a process' terminal.
pub(crate) async fn resize(client: &Client, id: &Id, width: u32, height: u32) -> Result<()> {
    let request = ResizePtyRequest { container_id: id.container.clone(), exec_id: id.exec.clone(), width, height };
    call(format!("resize the terminal of {}", id.name()), client.tasks().resize_pty(client.request(request))).await
}

/// Ends a process' stdin.
pub(crate) async fn close_stdin(client: &Client, id: &Id) -> Result<()> {
    let request = CloseIoRequest { container_id: id.container.clone(), exec_id: id.exec.clone(), stdin: true };
    call(format!("close the stdin of {}", id.name()), client.tasks().close_io(client.request(request))).await
}

/// The processes of a container.
pub(crate) async fn pids(client: &Client, container: &str) -> Result<Vec<ProcessInfo>> {
    let request = client.request(ListPidsRequest { container_id: container.to_owned() });
    Ok(call(format!("list the processes of container {container}"), client.tasks().list_pids(request)).await?.processes)
}

/// What running containers use: of one, or of all.
pub(crate) async fn metrics(client: &Client, container: Option<&str>) -> Result<Vec<Metric>> {
    let filters = container.map(|id| format!("id=={id}")).into_iter().collect();
    let request = client.request(MetricsRequest { filters });
    Ok(call("get metrics", client.tasks().metrics(request)).await?.metrics)
}

/// Before a daemon that restarts is asked again.
const AGAIN: Duration = Duration::from_millis(200);
/// A minute of a daemon that is down.
const ATTEMPTS: u32 = 300;
/// An image's mounts may take their time, as do engines under load.
const CREATED: Duration = Duration::from_secs(600);
