//! `containerd.services.tasks.v1.Tasks`

use std::borrow::Cow;
use std::sync::Arc;

use containerd_client::services::v1::{
    CheckpointTaskRequest, CheckpointTaskResponse, CloseIoRequest, CreateTaskRequest, CreateTaskResponse, DeleteProcessRequest,
    DeleteResponse, DeleteTaskRequest, ExecProcessRequest, GetRequest, GetResponse, KillRequest, ListPidsRequest, ListPidsResponse,
    ListTasksRequest, ListTasksResponse, MetricsRequest, MetricsResponse, PauseTaskRequest, ResizePtyRequest, ResumeTaskRequest,
    StartRequest, StartResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_client::types::Metric;
use containerd_client::types::v1::{Process, ProcessInfo, Status as ProcessStatus};
use containerd_shim_protos::api as shim;
use containerd_shim_protos::shim::oci;
use log::warn;
use protobuf::Message;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::call::Call;
use super::containers;
use super::search::Filters;
use crate::error::{Error, Object, Result};
use crate::filter::{Fields, Filter, text};
use crate::gate::Gate;
use crate::store::{Exit, Meta, Notes, Store, execs, exits};
use crate::tasks::limits::{LONG, SHORT, STATE, VERY_LONG};
use crate::tasks::{NewTask, Phase, Task, Tasks, Unanswered};
use crate::{name, store, timestamp, wire};

impl Fields for Task {
    fn field(&self, path: &[&str]) -> Option<Cow<'_, str>> {
        match path {
            ["id"] => text(&self.id),
            ["namespace"] => text(self.namespace.as_str()),
            _ => None,
        }
    }
}

/// The service.
#[derive(Debug)]
pub(crate) struct TaskService {
    pub(crate) tasks: Arc<Tasks>,
    /// Containers, and what is noted of their processes.
    pub(crate) store: Store,
    pub(crate) gate: Gate,
    pub(crate) filters: Filters,
}

impl TaskService {
    fn find(&self, call: &Call, id: &str) -> Result<Arc<Task>> {
        self.tasks.find(&call.namespace()?, id)
    }

    pub(super) async fn create(self: Arc<Self>, call: Call, request: CreateTaskRequest) -> Result<CreateTaskResponse> {
        let (namespace, id) = (call.namespace()?, request.container_id);
        name::identifier("container id", &id)?;
        let (place, name) = (namespace.clone(), id.clone());
        let get =
            move |db: &Meta<'_>| store::containers::get(db, place.as_str(), &name)?.ok_or_else(|| containers::not_found(&place, &name));
        let container = self.store.read(get).await?;
        // the container's own options name where its checkpoints are written, not the one to restore
        let checkpoint = restore_path(request.options.as_ref())?;
        if let Some(checkpoint) = request.checkpoint.filter(|checkpoint| !checkpoint.digest.is_empty()) {
            return Err(Error::Unimplemented(format!(
                "a task from checkpoint {}: x-manager reads checkpoints from folders only",
                checkpoint.digest
            )));
        }
        let new = NewTask {
            container,
            runtime: Some(request.runtime_path).filter(|path| !path.is_empty()),
            options: request.options.filter(|options| !options.type_url.is_empty()),
            rootfs: request.rootfs,
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            checkpoint,
        };
        let pid = self.tasks.create(&namespace, new).await?;
        Ok(CreateTaskResponse { container_id: id, pid })
    }

    pub(super) async fn start(self: Arc<Self>, call: Call, request: StartRequest) -> Result<StartResponse> {
        let task = self.find(&call, &request.container_id)?;
        Ok(StartResponse { pid: self.tasks.start(&task, &request.exec_id).await? })
    }

    pub(super) async fn delete(self: Arc<Self>, call: Call, request: DeleteTaskRequest) -> Result<DeleteResponse> {
        let task = self.find(&call, &request.container_id)?;
        let exit = self.tasks.delete(&task).await?;
        Ok(DeleteResponse { id: task.id.clone(), pid: exit.pid, exit_status: exit.status, exited_at: Some(timestamp::from_nanos(exit.at)) })
    }

    pub(super) async fn delete_process(self: Arc<Self>, call: Call, request: DeleteProcessRequest) -> Result<DeleteResponse> {
        let task = self.find(&call, &request.container_id)?;
        let exec = request.exec_id;
        // without one a shim would take init
        name::identifier("exec id", &exec)?;
        let delete = shim::DeleteRequest { id: task.id.clone(), exec_id: exec.clone(), ..shim::DeleteRequest::default() };
        let answer: shim::DeleteResponse = task.call("Delete", &delete, LONG).await?;
        let (namespace, id, name, now) = (task.namespace.clone(), task.id.clone(), exec.clone(), timestamp::to_nanos(&timestamp::now()));
        let forgotten = async {
            let _pass = self.gate.enter().await?;
            let forget = move |db: &mut Notes<'_>| {
                execs::remove(db, namespace.as_str(), &id, &name)?;
                exits::collect(db, namespace.as_str(), &id, Some(&name), now)
            };
            self.store.note(forget).await
        };
        if let Err(error) = forgotten.await {
            // the process is deleted all the same, and its exit is the client's; what stays goes with the task
            warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot forget a process");
        }
        Ok(DeleteResponse {
            id: exec,
            pid: answer.pid,
            exit_status: answer.exit_status,
            exited_at: wire::time_from_shim(answer.exited_at.into_option()),
        })
    }

    pub(super) async fn get(self: Arc<Self>, call: Call, request: GetRequest) -> Result<GetResponse> {
        let task = self.find(&call, &request.container_id)?;
        Ok(GetResponse { process: Some(process(&task, &request.exec_id).await?) })
    }

    pub(super) async fn list(self: Arc<Self>, call: Call, request: ListTasksRequest) -> Result<ListTasksResponse> {
        let (namespace, filter) = (call.namespace()?, Filter::parse(&[request.filter])?);
        let tasks = self.filters.matching(&filter, self.tasks.list(&namespace)).await?;
        // queried concurrently: a shim that does not answer delays no other
        let mut asked = JoinSet::new();
        for task in tasks {
            asked.spawn(async move {
                let process = timeout(STATE, process(&task, "")).await;
                process.map_or_else(|_late| Some(unknown(&task)), Result::ok)
            });
        }
        let mut tasks: Vec<_> = asked.join_all().await.into_iter().flatten().collect();
        tasks.sort_by(|one, other| one.id.cmp(&other.id));
        Ok(ListTasksResponse { tasks })
    }

    pub(super) async fn kill(self: Arc<Self>, call: Call, request: KillRequest) -> Result<()> {
        let task = self.find(&call, &request.container_id)?;
        let kill = shim::KillRequest {
            id: task.id.clone(),
            exec_id: request.exec_id,
            signal: request.signal,
            all: request.all,
            ..shim::KillRequest::default()
        };
        if let Phase::Ended(_) = task.settled().await? {
            return Err(Error::Finished(Object::Task(task.id.clone())));
        }
        task.call::<shim::Empty>("Kill", &kill, LONG).await.map(drop)
    }

    pub(super) async fn exec(self: Arc<Self>, call: Call, request: ExecProcessRequest) -> Result<()> {
        let exec = request.exec_id;
        name::identifier("exec id", &exec)?;
        let task = self.find(&call, &request.container_id)?;
        let shim = task.shim().await?;
        let (namespace, id, name) = (task.namespace.clone(), task.id.clone(), exec.clone());
        // recorded before it exists: after a crash of this process its exit is queried
        let is_new = {
            let _pass = self.gate.enter().await?;
            self.store.note(move |db| execs::add(db, namespace.as_str(), &id, &name)).await?
        };
        let add = shim::ExecProcessRequest {
            id: task.id.clone(),
            exec_id: exec.clone(),
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            spec: wire::to_shim_field(request.spec),
            ..shim::ExecProcessRequest::default()
        };
        let added = shim.call::<shim::Empty>("Exec", &add, Some(LONG)).await;
        if let Err(reason @ Unanswered::Refused(_)) = &added
            && is_new
            && !reason.is_already_exists()
            && let Ok(_pass) = self.gate.enter().await
        {
            let (namespace, id) = (task.namespace.clone(), task.id.clone());
            // a stale record is harmless, and removed with the task
            let _ = self.store.note(move |db| execs::remove(db, namespace.as_str(), &id, &exec)).await;
        }
        Ok(added.map(drop)?)
    }

    pub(super) async fn resize_pty(self: Arc<Self>, call: Call, request: ResizePtyRequest) -> Result<()> {
        let task = self.find(&call, &request.container_id)?;
        let resize = shim::ResizePtyRequest {
            id: task.id.clone(),
            exec_id: request.exec_id,
            width: request.width,
            height: request.height,
            ..shim::ResizePtyRequest::default()
        };
        task.call::<shim::Empty>("ResizePty", &resize, SHORT).await.map(drop)
    }

    pub(super) async fn close_io(self: Arc<Self>, call: Call, request: CloseIoRequest) -> Result<()> {
        let task = self.find(&call, &request.container_id)?;
        let close =
            shim::CloseIORequest { id: task.id.clone(), exec_id: request.exec_id, stdin: request.stdin, ..shim::CloseIORequest::default() };
        task.call::<shim::Empty>("CloseIO", &close, SHORT).await.map(drop)
    }

    pub(super) async fn pause(self: Arc<Self>, call: Call, request: PauseTaskRequest) -> Result<()> {
        let task = self.find(&call, &request.container_id)?;
        let pause = shim::PauseRequest { id: task.id.clone(), ..shim::PauseRequest::default() };
        task.call::<shim::Empty>("Pause", &pause, LONG).await.map(drop)
    }

    pub(super) async fn resume(self: Arc<Self>, call: Call, request: ResumeTaskRequest) -> Result<()> {
        let task = self.find(&call, &request.container_id)?;
        let resume = shim::ResumeRequest { id: task.id.clone(), ..shim::ResumeRequest::default() };
        task.call::<shim::Empty>("Resume", &resume, LONG).await.map(drop)
    }

    pub(super) async fn list_pids(self: Arc<Self>, call: Call, request: ListPidsRequest) -> Result<ListPidsResponse> {
        let task = self.find(&call, &request.container_id)?;
        let pids = shim::PidsRequest { id: task.id.clone(), ..shim::PidsRequest::default() };
        let answer: shim::PidsResponse = task.call("Pids", &pids, SHORT).await?;
        let info = |process: shim::ProcessInfo| ProcessInfo { pid: process.pid, info: process.info.into_option().map(wire::from_shim) };
        Ok(ListPidsResponse { processes: answer.processes.into_iter().map(info).collect() })
    }

    pub(super) async fn checkpoint(self: Arc<Self>, call: Call, request: CheckpointTaskRequest) -> Result<CheckpointTaskResponse> {
        let task = self.find(&call, &request.container_id)?;
        let path = match request.options.as_ref().filter(|options| options.type_url.ends_with("containerd.runc.v1.CheckpointOptions")) {
            Some(options) => {
                let options = oci::CheckpointOptions::parse_from_bytes(&options.value);
                options.map_err(|error| Error::Invalid(format!("checkpoint options: {error}")))?.image_path
            }
            None => String::new(),
        };
        if path.is_empty() {
            return Err(Error::Unimplemented(
                "checkpoint to an image: x-manager writes checkpoints to folders only; set image_path in the options to one".to_owned(),
            ));
        }
        let options = wire::to_shim_field(request.options);
        let checkpoint = shim::CheckpointTaskRequest { id: task.id.clone(), path, options, ..shim::CheckpointTaskRequest::default() };
        task.call::<shim::Empty>("Checkpoint", &checkpoint, VERY_LONG).await?;
        Ok(CheckpointTaskResponse::default())
    }

    pub(super) async fn update(self: Arc<Self>, call: Call, request: UpdateTaskRequest) -> Result<()> {
        let task = self.find(&call, &request.container_id)?;
        let update = shim::UpdateTaskRequest {
            id: task.id.clone(),
            resources: wire::to_shim_field(request.resources),
            annotations: request.annotations,
            ..shim::UpdateTaskRequest::default()
        };
        task.call::<shim::Empty>("Update", &update, LONG).await.map(drop)
    }

    pub(super) async fn metrics(self: Arc<Self>, call: Call, request: MetricsRequest) -> Result<MetricsResponse> {
        let (namespace, filter) = (call.namespace()?, Filter::parse(&request.filters)?);
        let tasks = self.filters.matching(&filter, self.tasks.list(&namespace)).await?;
        let mut asked = JoinSet::new();
        for task in tasks {
            asked.spawn(async move {
                let stats = shim::StatsRequest { id: task.id.clone(), ..shim::StatsRequest::default() };
                let timestamp = Some(timestamp::now());
                let answer: Result<shim::StatsResponse> = timeout(STATE, task.call("Stats", &stats, STATE)).await.ok()?;
                let data = answer.ok()?.stats.into_option().map(wire::from_shim);
                Some(Metric { timestamp, id: task.id.clone(), data })
            });
        }
        // a task without any, like one that has just ended, is left out
        let mut metrics: Vec<_> = asked.join_all().await.into_iter().flatten().collect();
        metrics.sort_by(|one, other| one.id.cmp(&other.id));
        Ok(MetricsResponse { metrics })
    }

    pub(super) async fn wait(self: Arc<Self>, call: Call, request: WaitRequest) -> Result<WaitResponse> {
        let task = self.find(&call, &request.container_id)?;
        let exec = request.exec_id;
        let answer = |exit: Exit| WaitResponse { exit_status: exit.status, exited_at: Some(timestamp::from_nanos(exit.at)) };
        loop {
            match task.settled().await {
                Ok(Phase::Live(live) | Phase::Deleting(live)) => {
                    let request = shim::WaitRequest { id: task.id.clone(), exec_id: exec.clone(), ..shim::WaitRequest::default() };
                    match live.call::<shim::WaitResponse>("Wait", &request, None).await {
                        Err(Unanswered::Lost) => task.left().await,
                        answer => {
                            let answer = answer?;
                            let exited_at = wire::time_from_shim(answer.exited_at.into_option());
                            return Ok(WaitResponse { exit_status: answer.exit_status, exited_at });
                        }
                    }
                }
                Ok(Phase::Ended(exit)) if exec.is_empty() => return Ok(answer(exit)),
                Ok(_) => {
                    let (namespace, id, name) = (task.namespace.clone(), task.id.clone(), exec.clone());
                    let exit = self.store.recall(move |db| exits::last(db, namespace.as_str(), &id, &name)).await?;
                    return exit.map(answer).ok_or_else(|| no_process(&task, &exec));
                }
                // Wait has no deadline
                Err(Error::Unsettled { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The folder of a checkpoint, when a client names one in the options of runc's shim.
fn restore_path(options: Option<&prost_types::Any>) -> Result<String> {
    let Some(options) = options.filter(|options| options.type_url.ends_with("containerd.runc.v1.Options")) else {
        return Ok(String::new());
    };
    let options = oci::Options::parse_from_bytes(&options.value).map_err(|error| Error::Invalid(format!("runtime options: {error}")))?;
    Ok(options.criu_image_path)
}

/// The state of a process; unknown when its shim does not answer in time.
async fn process(task: &Task, exec: &str) -> Result<Process> {
    let state = match task.settled().await {
        Ok(Phase::Live(live) | Phase::Deleting(live)) => {
            let request = shim::StateRequest { id: task.id.clone(), exec_id: exec.to_owned(), ..shim::StateRequest::default() };
            live.call::<shim::StateResponse>("State", &request, Some(STATE)).await
        }
        Ok(Phase::Ended(exit)) if exec.is_empty() => return Ok(ended(task, exit)),
        Ok(_) => return Err(no_process(task, exec)),
        Err(Error::Unsettled { .. }) if exec.is_empty() => return Ok(unknown(task)),
        Err(error) => return Err(error),
    };
    let state = match state {
        Ok(state) => state,
        Err(Unanswered::Late(_)) if exec.is_empty() => return Ok(unknown(task)),
        Err(Unanswered::Lost) => {
            task.left().await;
            return match task.settled().await? {
                Phase::Ended(exit) if exec.is_empty() => Ok(ended(task, exit)),
                _ => Err(no_process(task, exec)),
            };
        }
        Err(reason) => return Err(reason.into()),
    };
    Ok(Process {
        container_id: task.id.clone(),
        id: if exec.is_empty() { task.id.clone() } else { exec.to_owned() },
        pid: state.pid,
        status: status(state.status.enum_value().unwrap_or(shim::Status::UNKNOWN)).into(),
        stdin: state.stdin,
        stdout: state.stdout,
        stderr: state.stderr,
        terminal: state.terminal,
        exit_status: state.exit_status,
        exited_at: wire::time_from_shim(state.exited_at.into_option()),
    })
}

fn no_process(task: &Task, exec: &str) -> Error {
    Error::NotFound(Object::Process { exec: exec.to_owned(), task: task.id.clone() })
}

fn unknown(task: &Task) -> Process {
    Process { container_id: task.id.clone(), id: task.id.clone(), ..Process::default() }
}

fn ended(task: &Task, exit: Exit) -> Process {
    Process {
        container_id: task.id.clone(),
        id: task.id.clone(),
        pid: exit.pid,
        status: ProcessStatus::Stopped.into(),
        exit_status: exit.status,
        exited_at: Some(timestamp::from_nanos(exit.at)),
        ..Process::default()
    }
}

fn status(status: shim::Status) -> ProcessStatus {
    match status {
        shim::Status::UNKNOWN => ProcessStatus::Unknown,
        shim::Status::CREATED => ProcessStatus::Created,
        shim::Status::RUNNING => ProcessStatus::Running,
        shim::Status::STOPPED => ProcessStatus::Stopped,
        shim::Status::PAUSED => ProcessStatus::Paused,
        shim::Status::PAUSING => ProcessStatus::Pausing,
    }
}
