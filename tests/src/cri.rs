//! The kubelet's calls to containerd: the part of the Container Runtime Interface that pods need.
//!
//! ```text
//! Cri::start ─▶ containerd with its CRI plugin, the shim under test as a runtime handler, an image
//!   └─ run_pod ─▶ Pod ─ create ─▶ id ─ start, exec, stats, status, stop, remove
//! ```
//!
//! | module | owns |
//! | --- | --- |
//! | `setup` | the plugin's configuration, and the network plugin |
//! | `containers` | the calls for a container |
//! | `pod` | pods and containers as tests describe them |
//! | `messages` | the messages of the interface |

mod containers;
mod messages;
mod pod;
mod setup;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, umount2};
use prost::Message;
use serde_json::Value;
use tokio::sync::Mutex;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic_prost::ProstCodec;

use crate::audit::BUNDLES;
use crate::builds::{self, Upgraded};
use crate::context::Context;
use crate::daemon::Daemon;
use crate::eventually::{self, SOON, eventually};
use crate::pod_config::PodConfig;
use crate::proc::{self, Process};
use crate::runner::needs_controller;
use crate::suite::Shim;
use crate::{cgroups, rootfs};
use messages::{
    ImageSpec, ImageStatusRequest, ImageStatusResponse, Nothing, PodId, PodList, PodStatsResponse, PodStatusRequest, PodStatusResponse,
    RunPodRequest, method,
};

pub use messages::{ContainerStatus, EXITED, NOT_READY, READY, RUNNING};
pub use pod::{ContainerSpec, HOST_IDS, Namespace, PodSpec};
pub use setup::{Plugin, Sandboxer, Setup};

/// The image of every container, of the pause container too.
const IMAGE: &str = "localhost/busybox:1";
/// The name of the runtime handler, as in docs/kubernetes.md.
const HANDLER: &str = "x";
/// The namespace that containerd gives to pods.
pub const NAMESPACE: &str = "k8s.io";

/// A containerd with its CRI plugin; cheap to clone.
#[derive(Debug, Clone)]
pub struct Cri {
    cx: Context,
    shim: Shim,
    daemon: Arc<Daemon>,
    sandboxer: Sandboxer,
    channel: Arc<Mutex<Option<Channel>>>,
}

/// A pod that runs.
#[derive(Debug, Clone)]
pub struct Pod {
    /// The id of its sandbox.
    pub id: String,
    config: PodConfig,
}

/// What the kubelet gets to know about a pod.
#[derive(Debug, Clone)]
pub struct PodStatus {
    /// [`READY`] or [`NOT_READY`].
    pub state: i32,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    /// The address of its network; empty on the host's.
    pub ip: String,
}

impl Cri {
    /// Starts one with pause containers, with the configuration of docs/kubernetes.md, and imports the image.
    pub async fn start(cx: &Context) -> Result<Self> {
        Self::start_with(cx, &Setup::default()).await
    }

    /// The same, with what holds the namespaces of pods.
    pub async fn start_as(cx: &Context, sandboxer: Sandboxer) -> Result<Self> {
        Self::start_with(cx, &Setup { sandboxer, ..Setup::default() }).await
    }

    /// The same, with what a test changes.
    pub async fn start_with(cx: &Context, setup: &Setup<'_>) -> Result<Self> {
        if setup.sandboxer == Sandboxer::Pause {
            // of which the pause container gets a share
            needs_controller("cpu")?;
        }
        let configuration = |folder: &Path| setup.configuration(cx, folder);
        let shim = setup.shim(cx);
        let daemon = Arc::new(Daemon::start_for_pods(cx.suite(), &shim, setup.environment, configuration).await?);
        let cri = Self { cx: cx.clone(), shim, daemon, sandboxer: setup.sandboxer, channel: Arc::default() };
        cri.import().await?;
        Ok(cri)
    }

    /// The daemon.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    async fn import(&self) -> Result<()> {
        let folder = self.cx.folder().join("image");
        fs::create_dir_all(&folder)?;
        run(Command::new("tar").arg("-C").arg(rootfs::shared()?).arg("-cf").arg(folder.join("layer.tar")).arg("."))?;
        let digest = run(Command::new("sha256sum").arg(folder.join("layer.tar")))?;
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": { "Env": ["PATH=/bin"], "Entrypoint": ["/bin/sleep", "100000"] },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", digest.split(' ').next().unwrap_or_default())] },
        });
        fs::write(folder.join("config.json"), config.to_string())?;
        let manifest = serde_json::json!([{ "Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"] }]);
        fs::write(folder.join("manifest.json"), manifest.to_string())?;
        let archive = self.cx.folder().join("image.tar");
        run(Command::new("tar").arg("-C").arg(&folder).arg("-cf").arg(&archive).args(["manifest.json", "config.json", "layer.tar"]))?;
        let mut ctr = Command::new(self.cx.suite().program("ctr"));
        run(ctr.arg("--address").arg(self.daemon.address()).args(["--namespace", NAMESPACE, "images", "import"]).arg(&archive))?;
        // the plugin notices an image some time after it was imported
        eventually("the plugin has the image", SOON, async || {
            let request = ImageStatusRequest { image: Some(ImageSpec { image: IMAGE.to_owned() }) };
            self.call::<ImageStatusResponse>(method::IMAGE_STATUS, request).await?.image.context("it is not there").map(drop)
        })
        .await
    }

    async fn call<A: Message + Default + 'static>(&self, method: &'static str, request: impl Message + 'static) -> Result<A> {
        let mut client = tonic::client::Grpc::new(self.channel().await?);
        client.ready().await?;
        let path = PathAndQuery::from_static(method);
        let call = client.unary(tonic::Request::new(request), path, ProstCodec::default());
        let answer = eventually::timeout(Duration::from_secs(40), call).await.with_context(|| format!("{method}: no answer"))?;
        Ok(answer.with_context(|| method.to_owned())?.into_inner())
    }

    /// One connection until the daemon ends.
    async fn channel(&self) -> Result<Channel> {
        let mut channel = self.channel.lock().await;
        match &*channel {
            Some(channel) => Ok(channel.clone()),
            None => Ok(channel.insert(containerd_client::connect(self.daemon.address()).await?).clone()),
        }
    }

    /// Runs a pod: on the host's network with a pause container, with a network of its own without one.
    pub async fn run_pod(&self, name: &str) -> Result<Pod> {
        self.run_pod_of(&PodSpec::new(name)).await
    }

    /// Runs a pod.
    pub async fn run_pod_of(&self, spec: &PodSpec) -> Result<Pod> {
        self.try_pod(spec).await.with_context(|| self.complaints())
    }

    /// The same, with nothing but the plugin's own error.
    pub async fn try_pod(&self, spec: &PodSpec) -> Result<Pod> {
        let config = self.pod(spec)?;
        let request = RunPodRequest { config: Some(config.clone()), runtime_handler: HANDLER.to_owned() };
        let answer: PodId = self.call(method::RUN_POD, request).await?;
        Ok(Pod { id: answer.id, config })
    }

    /// Checks that a pod is refused for one of those reasons.
    pub async fn no_pod_runs(&self, name: &str, reasons: &[&str]) -> Result<()> {
        let error = self.try_pod(&PodSpec::new(name)).await.err().context("the pod runs")?;
        let message = format!("{error:#}");
        ensure!(reasons.iter().any(|reason| message.contains(reason)), "{message}");
        Ok(())
    }

    fn pod(&self, spec: &PodSpec) -> Result<PodConfig> {
        let logs = self.cx.folder().join("logs").join(&spec.name);
        fs::create_dir_all(&logs)?;
        // containerd 2.0 to 2.2 panics on a pod on the host's network whose namespaces the shim holds
        let usual = if self.sandboxer == Sandboxer::Shim { Namespace::Pod } else { Namespace::Node };
        Ok(spec.config(spec.network.unwrap_or(usual), logs.display().to_string(), self.cx.cgroup_path(&spec.name)))
    }

    /// The daemon's warnings and errors.
    pub fn complaints(&self) -> String {
        let log = self.daemon.log();
        log.lines().filter(|line| line.contains("level=error") || line.contains("level=warning")).map(|line| format!("{line}\n")).collect()
    }

    /// The status of a pod.
    pub async fn pod_status(&self, pod: &Pod) -> Result<PodStatus> {
        let answer: PodStatusResponse = self.call(method::POD_STATUS, PodStatusRequest { id: pod.id.clone(), verbose: false }).await?;
        let status = answer.status.context("no status")?;
        let ip = status.network.map(|network| network.ip).unwrap_or_default();
        Ok(PodStatus { state: status.state, created_at: status.created_at, ip })
    }

    /// The verbose part of the status of a pod.
    pub async fn pod_info(&self, pod: &Pod) -> Result<BTreeMap<String, String>> {
        let answer: PodStatusResponse = self.call(method::POD_STATUS, PodStatusRequest { id: pod.id.clone(), verbose: true }).await?;
        Ok(answer.info.into_iter().collect())
    }

    /// Waits until a pod has that state.
    pub async fn pod_becomes(&self, pod: &Pod, state: i32) -> Result<()> {
        eventually(format!("the pod's state is {state}"), SOON * 2, async || {
            let status = self.pod_status(pod).await?;
            ensure!(status.state == state, "{status:?}");
            Ok(())
        })
        .await
    }

    /// The ids and states of all pods.
    pub async fn pods(&self) -> Result<BTreeMap<String, i32>> {
        let list: PodList = self.call(method::LIST_PODS, Nothing {}).await?;
        Ok(list.items.into_iter().map(|item| (item.id, item.state)).collect())
    }

    /// Processor time and memory of a pod.
    pub async fn pod_stats(&self, pod: &Pod) -> Result<(u64, u64)> {
        let answer: PodStatsResponse = self.call(method::POD_STATS, PodId { id: pod.id.clone() }).await?;
        let stats = answer.stats.and_then(|stats| stats.linux).context("no statistics")?;
        let cpu = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).context("no processor time")?.value;
        let memory = stats.memory.and_then(|memory| memory.working_set_bytes).context("no memory")?.value;
        Ok((cpu, memory))
    }

    /// Stops a pod with all its containers.
    pub async fn stop_pod(&self, pod: &Pod) -> Result<()> {
        self.call::<Nothing>(method::STOP_POD, PodId { id: pod.id.clone() }).await.map(drop)
    }

    /// Removes a pod with all its containers.
    pub async fn remove_pod(&self, pod: &Pod) -> Result<()> {
        self.call::<Nothing>(method::REMOVE_POD, PodId { id: pod.id.clone() }).await.map(drop)
    }

    /// Stops and removes a pod with all its containers.
    pub async fn end_pod(&self, pod: &Pod) -> Result<()> {
        self.stop_pod(pod).await?;
        self.remove_pod(pod).await
    }

    /// The same for a pod of which only the id is known.
    pub async fn end_pod_named(&self, id: &str) -> Result<()> {
        self.call::<Nothing>(method::STOP_POD, PodId { id: id.to_owned() }).await?;
        self.call::<Nothing>(method::REMOVE_POD, PodId { id: id.to_owned() }).await.map(drop)
    }

    /// Kills the daemon, does something, and starts it again.
    pub async fn crash(&self, meanwhile: impl Future<Output = Result<()>>) -> Result<()> {
        self.daemon.kill()?;
        meanwhile.await?;
        self.daemon.restart().await?;
        *self.channel.lock().await = None;
        Ok(())
    }

    /// Removes the network namespaces that a killed containerd has made and forgotten, as it does: those of [`Plugin::Nothing`].
    pub fn remove_forgotten_networks(&self) -> Result<()> {
        let folder = self.daemon.folder().join("state");
        for mount in fs::read_to_string("/proc/self/mountinfo")?.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new) {
            if mount.starts_with(&folder) && mount.parent().is_some_and(|parent| parent.ends_with("netns")) {
                umount2(mount, MntFlags::MNT_DETACH)?;
                fs::remove_file(mount)?;
            }
        }
        Ok(())
    }

    /// The bundle of a pod whose namespaces the shim holds.
    pub fn sandbox_bundle(&self, pod: &Pod) -> PathBuf {
        self.daemon.sandbox_bundle(NAMESPACE, &pod.id)
    }

    /// The shims of this daemon: the keepers of ours.
    pub fn shims(&self) -> Vec<Process> {
        let folder = self.daemon.folder().display().to_string();
        let ours = |process: &Process| {
            process.parent == 1
                && process.command.split(' ').next().is_some_and(|it| it.contains("containerd-shim-"))
                && proc::mentions(process.pid, &folder)
        };
        proc::all().into_values().filter(ours).collect()
    }

    /// The keeper of a pod.
    pub fn keeper(&self, pod: &Pod) -> Result<Process> {
        let mut found = self.shims();
        found.retain(|shim| shim.command.split(' ').any(|word| word == pod.id));
        ensure!(found.len() == 1, "exactly one shim of {} expected: {found:?}", pod.id);
        Ok(found.remove(0))
    }

    /// What `ps` shows about the shim of a pod.
    pub async fn ps(&self, pod: &Pod) -> Result<Value> {
        let program = self.shim.binary.as_ref().context("X_SHIM must name our own shim")?;
        let shims = builds::ps_of(program, NAMESPACE).await?;
        shims.into_iter().find(|shim| shim["group"] == *pod.id).with_context(|| format!("ps does not show {}", pod.id))
    }

    /// Upgrades the shims of those pods.
    pub async fn upgrade(&self, program: &Path, pods: &[&Pod], words: &[&str]) -> Result<Upgraded> {
        let words: Vec<_> = words.iter().copied().chain(pods.iter().map(|pod| pod.id.as_str())).collect();
        builds::upgrade_of(program, NAMESPACE, &words).await
    }

    /// Checks that nothing of its pods is left.
    pub async fn leaves_nothing(&self) -> Result<()> {
        self.daemon.is_alone().await?;
        let state = self.daemon.folder().join("state");
        eventually("no mount and no bundle of a pod is left", SOON, async || {
            let (mounts, folder) = (fs::read_to_string("/proc/self/mountinfo")?, format!("{}/", state.display()));
            let mut left: Vec<_> = mounts.lines().filter(|line| line.contains(&folder)).map(str::to_owned).collect();
            for name in BUNDLES {
                let bundles = fs::read_dir(state.join(name).join(NAMESPACE)).into_iter().flatten().flatten();
                left.extend(bundles.map(|entry| entry.path().display().to_string()));
            }
            ensure!(left.is_empty(), "{left:#?}");
            Ok(())
        })
        .await?;
        // the pods' own cgroups are the kubelet's to remove
        cgroups::remove(self.cx.cgroup_path("").trim_matches('/'));
        Ok(())
    }
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}
