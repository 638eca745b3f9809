//! A sandbox that a shim holds, through the controller of containerd that its CRI plugin calls too: for what the plugin never asks, or cannot.
//!
//! ```text
//! Sandbox::create ─ start ─▶ pid ─ containers join ─ stop ─ wait ─ shutdown ─▶ gone
//! ```

use containerd_client::services::v1::sandbox as api;
use containerd_client::types::sandbox::Runtime;
use prost_types::Any;
use tonic::{Response, Status};

use crate::client::{Answer, Client};
use crate::container::Builder;
use crate::context::Context;
use crate::cri::PodSpec;
use crate::eventually;
use crate::messages::{Options, any};
use crate::spec::Spec;
use crate::ttrpc::DEADLINE;

/// containerd's controller that hands sandboxes to shims.
const SANDBOXER: &str = "shim";
/// The annotation by which a container belongs to a pod.
const MEMBERSHIP: &str = "io.kubernetes.cri.sandbox-id";

/// The state of a sandbox that runs.
pub const READY: &str = "SANDBOX_READY";
/// The state of one that does not.
pub const NOT_READY: &str = "SANDBOX_NOTREADY";

/// A sandbox of the test's namespace; cheap to clone.
#[derive(Debug, Clone)]
pub struct Sandbox {
    client: Client,
    /// Its id.
    pub id: String,
}

/// Waits for the answer to a call.
async fn answer<T>(name: &str, call: impl Future<Output = Answer<Response<T>>>) -> Answer<T> {
    match eventually::timeout(DEADLINE, call).await {
        Ok(answer) => answer.map(Response::into_inner),
        Err(_elapsed) => Err(Status::deadline_exceeded(format!("{name}: no answer within {DEADLINE:?}"))),
    }
}

impl Sandbox {
    /// Creates one, which is a pod on the host's network.
    pub async fn create(cx: &Context, id: &str, pod: &PodSpec) -> Answer<Self> {
        let sandbox = Self { client: cx.client().clone(), id: id.to_owned() };
        let options: Any = any(&Options { binary_name: cx.runtime_binary().display().to_string(), ..Options::default() });
        let described = containerd_client::types::Sandbox {
            sandbox_id: id.to_owned(),
            runtime: Some(Runtime { name: cx.shim().runtime_type.clone(), options: Some(options) }),
            sandboxer: SANDBOXER.to_owned(),
            ..Default::default()
        };
        let request = api::ControllerCreateRequest {
            sandbox_id: id.to_owned(),
            options: Some(pod.on_the_hosts_network(&cx.cgroup_path(id))),
            sandbox: Some(described),
            sandboxer: SANDBOXER.to_owned(),
            ..Default::default()
        };
        let (client, request) = (cx.client(), cx.client().request(request));
        answer("create sandbox", client.api().sandbox_controller().create(request)).await?;
        Ok(sandbox)
    }

    /// One that may exist.
    pub fn known(cx: &Context, id: &str) -> Self {
        Self { client: cx.client().clone(), id: id.to_owned() }
    }

    /// Starts it, and returns the pid whose namespaces containers join.
    pub async fn start(&self) -> Answer<u32> {
        let message = api::ControllerStartRequest { sandbox_id: self.id.clone(), sandboxer: SANDBOXER.to_owned() };
        let request = self.client.request(message);
        answer("start sandbox", self.client.api().sandbox_controller().start(request)).await.map(|started| started.pid)
    }

    /// Its status.
    pub async fn status(&self) -> Answer<api::ControllerStatusResponse> {
        let message = api::ControllerStatusRequest { sandbox_id: self.id.clone(), verbose: false, sandboxer: SANDBOXER.to_owned() };
        let request = self.client.request(message);
        answer("status of sandbox", self.client.api().sandbox_controller().status(request)).await
    }

    /// Waits for its end, and returns its status.
    pub async fn wait(&self) -> Answer<u32> {
        let message = api::ControllerWaitRequest { sandbox_id: self.id.clone(), sandboxer: SANDBOXER.to_owned() };
        let request = self.client.request(message);
        answer("wait for sandbox", self.client.api().sandbox_controller().wait(request)).await.map(|waited| waited.exit_status)
    }

    /// Stops it.
    pub async fn stop(&self) -> Answer<()> {
        let message = api::ControllerStopRequest { sandbox_id: self.id.clone(), timeout_secs: 10, sandboxer: SANDBOXER.to_owned() };
        let request = self.client.request(message);
        answer("stop sandbox", self.client.api().sandbox_controller().stop(request)).await.map(drop)
    }

    /// Ends its shim.
    pub async fn shutdown(&self) -> Answer<()> {
        let message = api::ControllerShutdownRequest { sandbox_id: self.id.clone(), sandboxer: SANDBOXER.to_owned() };
        let request = self.client.request(message);
        answer("shut down sandbox", self.client.api().sandbox_controller().shutdown(request)).await.map(drop)
    }

    /// Puts a container into it, whose namespaces are those of the process `pid`.
    pub fn member(&self, container: Builder, pid: u32) -> Builder {
        container.spec(|spec: Spec| spec.annotation(MEMBERSHIP, &self.id).join("ipc", pid).join("uts", pid).join("network", pid))
    }
}
