//! containerd's task service, spoken to a shim directly.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::Result;
use containerd_shim_protos::api;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use crate::ttrpc::{Answer, CallError, Connection, DEADLINE, Frame, read_answer};
use crate::{eventually, trace};

/// The service up to containerd 1.7.
pub const V2: &str = "containerd.task.v2.Task";
/// The service from 2.0 on.
pub const V3: &str = "containerd.task.v3.Task";

static SERVICES: Mutex<BTreeMap<PathBuf, &str>> = Mutex::new(BTreeMap::new());

/// Chooses the service that clients of a socket use; [`V2`] by default.
pub(crate) fn remember(socket: &Path, service: &'static str) {
    SERVICES.lock().expect("no panic under this lock").insert(socket.to_owned(), service);
}

/// The service that clients of a socket use.
pub fn service_at(socket: &Path) -> &'static str {
    SERVICES.lock().expect("no panic under this lock").get(socket).copied().unwrap_or(V2)
}

/// A client of a shim's task service; cheap to clone.
#[derive(Debug, Clone)]
pub struct Task {
    connection: Connection,
    socket: PathBuf,
    service: &'static str,
}

impl Task {
    /// Connects to the shim that listens at `socket`.
    pub async fn connect(socket: &Path) -> Result<Self> {
        Ok(Self { connection: Connection::connect(socket).await?, socket: socket.to_owned(), service: service_at(socket) })
    }

    /// A connection of its own to the same shim.
    pub async fn another(&self) -> Result<Self> {
        Ok(Self { service: self.service, ..Self::connect(&self.socket).await? })
    }

    /// The same connection under another name of the service.
    #[must_use]
    pub fn service(mut self, service: &'static str) -> Self {
        self.service = service;
        self
    }

    /// The name of the service that it uses.
    pub fn service_name(&self) -> &'static str {
        self.service
    }

    /// Where the shim listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The connection.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Calls any method, and waits no longer than `deadline`.
    pub async fn call<A: Message + Display>(&self, method: &str, message: &(impl Message + Display), deadline: Duration) -> Answer<A> {
        let payload = message.write_to_bytes().expect("a message without required fields is always complete");
        trace::note("call", format_args!("{method} {message}"));
        let answer = self.connection.call(self.service, method, payload, deadline).await;
        let answer = answer.and_then(|answer| read_answer::<A>(&answer));
        match &answer {
            Ok(answer) => trace::note("answer", format_args!("{method} {answer}")),
            Err(error) => trace::note("answer", format_args!("{method} {error}")),
        }
        answer
    }

    /// The state of a process.
    pub async fn state(&self, id: &str, exec: &str) -> Answer<api::StateResponse> {
        self.state_within(id, exec, DEADLINE).await
    }

    /// Like [`Self::state`], with a deadline.
    pub async fn state_within(&self, id: &str, exec: &str, deadline: Duration) -> Answer<api::StateResponse> {
        let request = api::StateRequest { id: id.to_owned(), exec_id: exec.to_owned(), ..Default::default() };
        self.call("State", &request, deadline).await
    }

    /// Creates a container, and returns its pid.
    pub async fn create(&self, request: &api::CreateTaskRequest) -> Answer<u32> {
        self.call::<api::CreateTaskResponse>("Create", request, DEADLINE).await.map(|answer| answer.pid)
    }

    /// Starts a process, and returns its pid.
    pub async fn start(&self, id: &str, exec: &str) -> Answer<u32> {
        let request = api::StartRequest { id: id.to_owned(), exec_id: exec.to_owned(), ..Default::default() };
        self.call::<api::StartResponse>("Start", &request, DEADLINE).await.map(|answer| answer.pid)
    }

    /// Deletes a process.
    pub async fn delete(&self, id: &str, exec: &str) -> Answer<api::DeleteResponse> {
        self.delete_within(id, exec, DEADLINE).await
    }

    /// Like [`Self::delete`], with a deadline.
    pub async fn delete_within(&self, id: &str, exec: &str, deadline: Duration) -> Answer<api::DeleteResponse> {
        let request = api::DeleteRequest { id: id.to_owned(), exec_id: exec.to_owned(), ..Default::default() };
        self.call("Delete", &request, deadline).await
    }

    /// The pids of a container.
    pub async fn pids(&self, id: &str) -> Answer<Vec<u32>> {
        self.pids_within(id, DEADLINE).await
    }

    /// Like [`Self::pids`], with a deadline.
    pub async fn pids_within(&self, id: &str, deadline: Duration) -> Answer<Vec<u32>> {
        let request = api::PidsRequest { id: id.to_owned(), ..Default::default() };
        let answer: api::PidsResponse = self.call("Pids", &request, deadline).await?;
        Ok(answer.processes.iter().map(|process| process.pid).collect())
    }

    /// Freezes a container.
    pub async fn pause(&self, id: &str) -> Answer<()> {
        let request = api::PauseRequest { id: id.to_owned(), ..Default::default() };
        self.call::<api::Empty>("Pause", &request, DEADLINE).await.map(drop)
    }

    /// Thaws a container.
    pub async fn resume(&self, id: &str) -> Answer<()> {
        let request = api::ResumeRequest { id: id.to_owned(), ..Default::default() };
        self.call::<api::Empty>("Resume", &request, DEADLINE).await.map(drop)
    }

    /// Sends a signal.
    pub async fn kill(&self, id: &str, exec: &str, signal: u32) -> Answer<()> {
        let request = api::KillRequest { id: id.to_owned(), exec_id: exec.to_owned(), signal, ..Default::default() };
        self.call::<api::Empty>("Kill", &request, DEADLINE).await.map(drop)
    }

    /// Adds a process.
    pub async fn exec(&self, request: &api::ExecProcessRequest) -> Answer<()> {
        self.call::<api::Empty>("Exec", request, DEADLINE).await.map(drop)
    }

    /// Sets a terminal's size.
    pub async fn resize(&self, id: &str, exec: &str) -> Answer<()> {
        let request = api::ResizePtyRequest { id: id.to_owned(), exec_id: exec.to_owned(), width: 80, height: 24, ..Default::default() };
        self.call::<api::Empty>("ResizePty", &request, DEADLINE).await.map(drop)
    }

    /// Closes stdin.
    pub async fn close_stdin(&self, id: &str, exec: &str) -> Answer<()> {
        let request = api::CloseIORequest { id: id.to_owned(), exec_id: exec.to_owned(), stdin: true, ..Default::default() };
        self.call::<api::Empty>("CloseIO", &request, DEADLINE).await.map(drop)
    }

    /// Changes limits: `resources` is a `LinuxResources` as JSON.
    pub async fn update(&self, id: &str, resources: &serde_json::Value) -> Answer<()> {
        let resources = MessageField::some(any_json(crate::messages::RESOURCES, resources));
        let request = api::UpdateTaskRequest { id: id.to_owned(), resources, ..Default::default() };
        self.call::<api::Empty>("Update", &request, DEADLINE).await.map(drop)
    }

    /// Waits for the end of a process, and returns its status.
    pub async fn wait(&self, id: &str, exec: &str) -> Answer<u32> {
        self.wait_within(id, exec, DEADLINE).await
    }

    /// Like [`Self::wait`], with a deadline.
    pub async fn wait_within(&self, id: &str, exec: &str, deadline: Duration) -> Answer<u32> {
        self.call::<api::WaitResponse>("Wait", &wait(id, exec), deadline).await.map(|answer| answer.exit_status)
    }

    /// Sends a Wait for a process: when this returns, the request is sent.
    pub async fn begin_wait(&self, id: &str, exec: &str) -> Answer<PendingWait> {
        let payload = wait(id, exec).write_to_bytes().expect("a message without required fields is always complete");
        self.connection.begin(self.service, "Wait", payload).await.map(PendingWait)
    }

    /// The metrics of a container.
    pub async fn stats(&self, id: &str) -> Answer<api::StatsResponse> {
        let request = api::StatsRequest { id: id.to_owned(), ..Default::default() };
        self.call("Stats", &request, DEADLINE).await
    }

    /// The pids of the shim and of a container's init.
    pub async fn connect_to(&self, id: &str) -> Answer<api::ConnectResponse> {
        self.connect_within(id, DEADLINE).await
    }

    /// Like [`Self::connect_to`], with a deadline.
    pub async fn connect_within(&self, id: &str, deadline: Duration) -> Answer<api::ConnectResponse> {
        let request = api::ConnectRequest { id: id.to_owned(), ..Default::default() };
        self.call("Connect", &request, deadline).await
    }

    /// Calls Shutdown: the shim exits if it has no container.
    pub async fn shutdown(&self, id: &str) -> Answer<()> {
        let request = api::ShutdownRequest { id: id.to_owned(), ..Default::default() };
        self.call::<api::Empty>("Shutdown", &request, DEADLINE).await.map(drop)
    }
}

/// A Wait that was sent.
#[derive(Debug)]
pub struct PendingWait(tokio::sync::oneshot::Receiver<Frame>);

impl PendingWait {
    /// Waits for its answer, the exit status.
    pub async fn status(self, deadline: Duration) -> Answer<u32> {
        let frame = eventually::timeout(deadline, self.0).await.map_err(|_| CallError::Silent)?.map_err(|_| CallError::Closed)?;
        Ok(read_answer::<api::WaitResponse>(&frame.answer()?)?.exit_status)
    }
}

/// The message of Wait.
pub fn wait(id: &str, exec: &str) -> api::WaitRequest {
    api::WaitRequest { id: id.to_owned(), exec_id: exec.to_owned(), ..Default::default() }
}

/// Packs JSON under `type_url`.
pub fn any_json(type_url: &str, value: &serde_json::Value) -> Any {
    Any { type_url: type_url.to_owned(), value: value.to_string().into_bytes(), ..Default::default() }
}
