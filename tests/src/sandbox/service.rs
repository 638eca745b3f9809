//! The calls of containerd's sandbox service, spoken to a shim directly.

use std::fmt::Display;
use std::time::Duration;

use containerd_shim_protos::sandbox_api as api;
use protobuf::Message;
use tokio::sync::oneshot::Receiver;

use crate::eventually;
use crate::task::Task;
use crate::ttrpc::{Answer, CallError, DEADLINE, Frame, read_answer};

/// The name of the service.
pub const SERVICE: &str = "containerd.runtime.sandbox.v1.Sandbox";
/// The state of a sandbox that has been started and not stopped.
pub const READY: &str = "SANDBOX_READY";
/// The state of every other sandbox.
pub const NOT_READY: &str = "SANDBOX_NOTREADY";

/// A client of a shim's sandbox service; cheap to clone.
#[derive(Debug, Clone)]
pub struct Service(Task);

impl Service {
    /// The sandbox service at the other end of a connection.
    pub fn new(task: &Task) -> Self {
        Self(task.clone().service(SERVICE))
    }

    /// A connection of its own to the same shim.
    pub async fn another(&self) -> anyhow::Result<Self> {
        Ok(Self(self.0.another().await?))
    }

    /// Calls any method, and waits as long as clients do.
    pub async fn call<A: Message + Display>(&self, method: &str, message: &(impl Message + Display)) -> Answer<A> {
        self.0.call(method, message, DEADLINE).await
    }

    /// Creates a sandbox.
    pub async fn create(&self, request: &api::CreateSandboxRequest) -> Answer<()> {
        self.call::<api::CreateSandboxResponse>("CreateSandbox", request).await.map(drop)
    }

    /// Starts it.
    pub async fn start(&self, id: &str) -> Answer<api::StartSandboxResponse> {
        self.call("StartSandbox", &api::StartSandboxRequest { sandbox_id: id.to_owned(), ..Default::default() }).await
    }

    /// The platform that its containers run on.
    pub async fn platform(&self, id: &str) -> Answer<api::PlatformResponse> {
        self.call("Platform", &api::PlatformRequest { sandbox_id: id.to_owned(), ..Default::default() }).await
    }

    /// Stops it.
    pub async fn stop(&self, id: &str) -> Answer<()> {
        let request = api::StopSandboxRequest { sandbox_id: id.to_owned(), ..Default::default() };
        self.call::<api::StopSandboxResponse>("StopSandbox", &request).await.map(drop)
    }

    /// Waits until it has been stopped.
    pub async fn wait(&self, id: &str) -> Answer<api::WaitSandboxResponse> {
        self.call("WaitSandbox", &wait(id)).await
    }

    /// Sends a WaitSandbox: when this returns, the request is sent.
    pub async fn begin_wait(&self, id: &str) -> Answer<PendingWait> {
        let payload = wait(id).write_to_bytes().expect("a message without required fields is always complete");
        self.0.connection().begin(SERVICE, "WaitSandbox", payload).await.map(PendingWait)
    }

    /// Its status.
    pub async fn status(&self, id: &str) -> Answer<api::SandboxStatusResponse> {
        self.status_with(id, false).await
    }

    /// Its status with everything that the shim knows.
    pub async fn verbose_status(&self, id: &str) -> Answer<api::SandboxStatusResponse> {
        self.status_with(id, true).await
    }

    async fn status_with(&self, id: &str, verbose: bool) -> Answer<api::SandboxStatusResponse> {
        self.call("SandboxStatus", &api::SandboxStatusRequest { sandbox_id: id.to_owned(), verbose, ..Default::default() }).await
    }

    /// Asks whether it is there.
    pub async fn ping(&self, id: &str) -> Answer<()> {
        let request = api::PingRequest { sandbox_id: id.to_owned(), ..Default::default() };
        self.call::<api::PingResponse>("PingSandbox", &request).await.map(drop)
    }

    /// Ends the sandbox and the shim.
    pub async fn shutdown(&self, id: &str) -> Answer<()> {
        let request = api::ShutdownSandboxRequest { sandbox_id: id.to_owned(), ..Default::default() };
        self.call::<api::ShutdownSandboxResponse>("ShutdownSandbox", &request).await.map(drop)
    }

    /// Its metrics.
    pub async fn metrics(&self, id: &str) -> Answer<api::SandboxMetricsResponse> {
        self.call("SandboxMetrics", &api::SandboxMetricsRequest { sandbox_id: id.to_owned(), ..Default::default() }).await
    }
}

fn wait(id: &str) -> api::WaitSandboxRequest {
    api::WaitSandboxRequest { sandbox_id: id.to_owned(), ..Default::default() }
}

/// A WaitSandbox that was sent.
#[derive(Debug)]
pub struct PendingWait(Receiver<Frame>);

impl PendingWait {
    /// Waits for its answer.
    pub async fn answer(self, deadline: Duration) -> Answer<api::WaitSandboxResponse> {
        let frame = eventually::timeout(deadline, self.0).await.map_err(|_| CallError::Silent)?.map_err(|_| CallError::Closed)?;
        read_answer(&frame.answer()?)
    }

    /// Whether it has been answered, or the connection has ended.
    pub fn is_over(&mut self) -> bool {
        !matches!(self.0.try_recv(), Err(tokio::sync::oneshot::error::TryRecvError::Empty))
    }
}
