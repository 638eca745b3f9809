//! A sandbox, made in a shim as CRI makes one with `sandboxer = "shim"`, and the containers in it.
//!
//! ```text
//! Sandbox::shim ─create▶ not ready ─start▶ ready ─stop▶ not ready ─shutdown▶ no shim
//!                            containers: │ member ─▶ Bundle ─▶ Container │
//! ```

mod network;
mod service;

use anyhow::{Result, ensure};
use containerd_shim_protos::sandbox_api as api;
use protobuf::{Message as _, MessageField};

pub use network::{Network, namespace_of};
pub use service::{NOT_READY, PendingWait, READY, SERVICE, Service};

use crate::bundle::{self, Bundle};
use crate::eventually::{SOON, eventually_true};
pub use crate::pod_config::{CONTAINER, Linux, NODE, POD, PodConfig, Profile, Selinux};
use crate::runner::skip;
use crate::stand::Stand;
use crate::task::Task;
use crate::ttrpc::{Answer, CallError, Code};
use crate::{isolation, proc};

/// Why a case is skipped: the sandbox service is optional.
pub const NOT_SERVED: &str = "the shim does not serve containerd.runtime.sandbox.v1.Sandbox";

/// A sandbox whose shim runs; dropping it ends nothing.
#[derive(Debug)]
pub struct Sandbox {
    /// A client of its shim.
    pub service: Service,
    /// The task service of the same shim, on the same connection.
    pub task: Task,
    /// Its id.
    pub id: String,
    /// Its bundle, without a spec.
    pub bundle: Bundle,
    /// What the kubelet wants.
    pub config: PodConfig,
    network: Option<Network>,
}

impl Sandbox {
    /// Starts a shim for a sandbox with a network namespace; skips if the shim does not serve sandboxes.
    pub async fn shim(stand: &Stand, id: &str) -> Result<Self> {
        Self::shim_of(stand.bundle(id, &[])).await
    }

    /// The same with a bundle of which everything but the spec is used.
    pub async fn shim_of(bundle: Bundle) -> Result<Self> {
        let bundle = bundle.without_spec();
        let (stand, id) = (bundle.stand().clone(), bundle.id.clone());
        let network = Network::new(&stand.folder().join(format!("{id}.net")))?;
        let options = bundle.options().write_to_bytes()?;
        let task = match bundle.start_shim_with(&[], &options).await {
            Ok(socket) => Task::connect(&socket).await?,
            Err(error) => return skip(format!("{NOT_SERVED}: {error:#}")),
        };
        let service = Service::new(&task);
        if service.status(&id).await.is_err_and(|error| error.code() == Some(Code::Unimplemented)) {
            bundle::leave(&task, bundle.shim_pid()?, &id).await?;
            return skip(NOT_SERVED);
        }
        let config = PodConfig::new(&id, &format!("/{}", parent(&stand, &id)));
        Ok(Self { service, task, id, bundle, config, network: Some(network) })
    }

    /// Starts a shim, creates the sandbox and starts it.
    pub async fn run(stand: &Stand, id: &str) -> Result<Self> {
        let sandbox = Self::shim(stand, id).await?;
        sandbox.create().await?;
        sandbox.start().await?;
        Ok(sandbox)
    }

    /// Closes the connection, and makes another one.
    pub async fn reconnect(self) -> Result<Self> {
        let socket = self.task.socket().to_owned();
        let Self { service, task, id, bundle, config, network } = self;
        drop((service, task));
        let task = Task::connect(&socket).await?;
        Ok(Self { service: Service::new(&task), task, id, bundle, config, network })
    }

    /// Leaves it in the host's network.
    #[must_use]
    pub fn on_the_hosts_network(mut self) -> Self {
        self.network = None;
        self.config.namespaces().network = NODE;
        self
    }

    /// Its network namespace, if it has one of its own.
    pub fn network(&self) -> Option<&Network> {
        self.network.as_ref()
    }

    /// The request that creates it.
    pub fn request(&self) -> api::CreateSandboxRequest {
        api::CreateSandboxRequest {
            sandbox_id: self.id.clone(),
            bundle_path: self.bundle.folder.display().to_string(),
            options: MessageField::some(self.config.any()),
            netns_path: self.network.as_ref().map(|network| network.path().display().to_string()).unwrap_or_default(),
            ..Default::default()
        }
    }

    /// Creates it.
    pub async fn create(&self) -> Answer<()> {
        self.service.create(&self.request()).await
    }

    /// Starts it, and returns the pid of the process that holds its namespaces.
    pub async fn start(&self) -> Answer<u32> {
        self.service.start(&self.id).await.map(|answer| answer.pid)
    }

    /// Stops it.
    pub async fn stop(&self) -> Answer<()> {
        self.service.stop(&self.id).await
    }

    /// The name of its cgroup in every hierarchy.
    pub fn cgroup(&self) -> String {
        parent(self.bundle.stand(), &self.id)
    }

    /// A container's bundle as CRI writes it: in the namespaces of the process `holder`, and in the pod's cgroup.
    pub fn member(&self, id: &str, holder: u32, args: &[&str]) -> Bundle {
        let cgroup = format!("/{}/{id}", self.cgroup());
        let joined = |kind: &str, name: &str| serde_json::json!({ "type": kind, "path": format!("/proc/{holder}/ns/{name}") });
        self.bundle.stand().bundle(id, args).spec(|spec| {
            let spec =
                spec.annotation("io.kubernetes.cri.sandbox-id", &self.id).annotation("io.kubernetes.cri.container-type", "container");
            spec.with(|spec| {
                if let Some(fields) = spec.as_object_mut() {
                    fields.remove("hostname");
                }
                spec["linux"]["cgroupsPath"] = cgroup.into();
                spec["linux"]["namespaces"] = serde_json::json!([
                    { "type": "pid" }, { "type": "mount" }, joined("network", "net"), joined("ipc", "ipc"), joined("uts", "uts"),
                ]);
            })
        })
    }

    /// Stops it and ends its shim, as CRI removes a pod.
    pub async fn end(&self) -> Result<()> {
        self.stop().await?;
        self.dismiss().await
    }

    /// Ends its shim, which has no sandbox or one that was stopped.
    pub async fn dismiss(&self) -> Result<()> {
        let shim = self.bundle.shim_pid()?;
        match self.service.shutdown(&self.id).await {
            Ok(()) | Err(CallError::Closed) => {}
            Err(error) => {
                ensure!(error.code().is_some(), "{error}");
                self.bundle.delete_command().await?;
            }
        }
        eventually_true("the shim has exited", SOON, || !proc::is_alive(shim)).await
    }
}

fn parent(stand: &Stand, id: &str) -> String {
    format!("{}/{}/{id}", isolation::cgroup(), stand.namespace())
}
