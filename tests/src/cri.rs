//! The kubelet's calls to containerd: the part of the Container Runtime Interface that pods need.
//!
//! ```text
//! Cri::start ─▶ containerd with its CRI plugin, the shim under test as a runtime handler, an image
//!   └─ run_pod ─▶ Pod ─ create ─▶ id ─ start, exec, stats, status, stop, remove
//! ```

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use prost::Message;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic_prost::ProstCodec;

use crate::context::Context;
use crate::daemon::Daemon;
use crate::eventually::{self, SOON, eventually};
use crate::proc::{self, Process};
use crate::runner::needs_controller;
use crate::suite::Suite;
use crate::{cgroups, rootfs};

/// The image of every container, of the pause container too.
const IMAGE: &str = "localhost/busybox:1";
/// The name of the runtime handler, as in docs/kubernetes.md.
const HANDLER: &str = "x";
/// The configuration in the documentation.
const GUIDE: &str = include_str!("../../docs/kubernetes.md");

/// A containerd with its CRI plugin.
#[derive(Debug)]
pub struct Cri {
    cx: Context,
    daemon: Arc<Daemon>,
}

/// A pod that runs.
#[derive(Debug)]
pub struct Pod {
    /// The id of its sandbox.
    pub id: String,
    config: PodConfig,
}

impl Cri {
    /// Starts one, with the configuration of docs/kubernetes.md, and imports the image.
    pub async fn start(cx: &Context) -> Result<Self> {
        Self::start_with(cx, "").await
    }

    /// The same, with one more line of docs/kubernetes.md in the plugin's own table.
    pub async fn start_with_setting(cx: &Context, setting: &str) -> Result<Self> {
        Self::start_configured(cx, "", setting).await
    }

    /// The same, with one more line of docs/kubernetes.md among the options of the runtime.
    pub async fn start_with(cx: &Context, option: &str) -> Result<Self> {
        Self::start_configured(cx, option, "").await
    }

    async fn start_configured(cx: &Context, option: &str, setting: &str) -> Result<Self> {
        // of which every pod gets a share
        needs_controller("cpu")?;
        for line in [option, setting] {
            ensure!(GUIDE.lines().any(|other| other.trim() == line), "docs/kubernetes.md does not have {line:?}");
        }
        let handler = configuration(cx, option, setting)?;
        let daemon = Daemon::start_for_pods(cx.suite(), cx.shim(), |_folder| handler).await?;
        let cri = Self { cx: cx.clone(), daemon: Arc::new(daemon) };
        cri.import()?;
        Ok(cri)
    }

    /// The daemon.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    fn import(&self) -> Result<()> {
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
        run(ctr.arg("--address").arg(self.daemon.address()).args(["--namespace", "k8s.io", "images", "import"]).arg(&archive))?;
        Ok(())
    }

    async fn call<A: Message + Default + 'static>(&self, method: &'static str, request: impl Message + 'static) -> Result<A> {
        let channel: Channel = containerd_client::connect(self.daemon.address()).await?;
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await?;
        let path = PathAndQuery::from_static(method);
        let call = client.unary(tonic::Request::new(request), path, ProstCodec::default());
        let answer = eventually::timeout(Duration::from_secs(40), call).await.with_context(|| format!("{method}: no answer"))?;
        Ok(answer.with_context(|| method.to_owned())?.into_inner())
    }

    /// Runs a pod on the host's network.
    pub async fn run_pod(&self, name: &str) -> Result<Pod> {
        let (config, request) = self.pod(name)?;
        // the plugin notices an image some time after it was imported
        let answer = eventually("the pod runs", SOON, async || self.call::<PodId>(method::RUN_POD, request.clone()).await).await;
        let answer = answer.with_context(|| self.complaints())?;
        Ok(Pod { id: answer.id, config })
    }

    /// Waits until a pod is refused for one of those reasons.
    pub async fn no_pod_runs(&self, name: &str, reasons: &[&str]) -> Result<()> {
        let (_, request) = self.pod(name)?;
        eventually("the pod is refused", SOON, async || {
            let ran = self.call::<PodId>(method::RUN_POD, request.clone()).await.map(|pod| pod.id);
            let message = ran.err().map(|error| format!("{error:#}")).context("the pod runs")?;
            ensure!(reasons.iter().any(|reason| message.contains(reason)), "{message}");
            Ok(())
        })
        .await
    }

    fn pod(&self, name: &str) -> Result<(PodConfig, RunPodRequest)> {
        let logs = self.cx.folder().join("logs").join(name);
        fs::create_dir_all(&logs)?;
        let namespaces = NamespaceOption { network: NODE, pid: CONTAINER, ipc: 0 };
        let config = PodConfig {
            metadata: Some(PodMetadata { name: name.to_owned(), uid: format!("uid-{name}"), namespace: "default".to_owned(), attempt: 0 }),
            log_directory: logs.display().to_string(),
            linux: Some(LinuxPod {
                cgroup_parent: self.cx.cgroup_path(name),
                security_context: Some(SandboxSecurity { namespace_options: Some(namespaces) }),
            }),
        };
        let request = RunPodRequest { config: Some(config.clone()), runtime_handler: HANDLER.to_owned() };
        Ok((config, request))
    }

    /// The daemon's warnings and errors.
    fn complaints(&self) -> String {
        let log = self.daemon.log();
        log.lines().filter(|line| line.contains("level=error") || line.contains("level=warning")).map(|line| format!("{line}\n")).collect()
    }

    /// Creates a container in a pod, with a limit of memory in bytes, or none.
    pub async fn create(&self, pod: &Pod, name: &str, command: &[&str], memory_bytes: i64) -> Result<String> {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(ImageSpec { image: IMAGE.to_owned() }),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainer {
                resources: Some(Resources { memory_limit_in_bytes: memory_bytes, memory_swap_limit_in_bytes: memory_bytes }),
                security_context: Some(ContainerSecurity {
                    namespace_options: Some(NamespaceOption { network: NODE, pid: CONTAINER, ipc: 0 }),
                }),
            }),
        };
        let request = CreateRequest { pod: pod.id.clone(), config: Some(config), sandbox_config: Some(pod.config.clone()) };
        Ok(self.call::<ContainerId>(method::CREATE, request).await?.id)
    }

    /// Starts a container.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        self.call::<Nothing>(method::START, ContainerId { id: id.to_owned() }).await.map(drop)
    }

    /// Creates and starts a container.
    pub async fn run(&self, pod: &Pod, name: &str, command: &[&str]) -> Result<String> {
        let id = self.create(pod, name, command, 0).await?;
        self.start_container(&id).await?;
        Ok(id)
    }

    /// The status of a container.
    pub async fn status(&self, id: &str) -> Result<ContainerStatus> {
        let answer: StatusResponse = self.call(method::STATUS, ContainerId { id: id.to_owned() }).await?;
        answer.status.context("no status")
    }

    /// Waits for the end of a container.
    pub async fn ended(&self, id: &str) -> Result<ContainerStatus> {
        eventually("the container has ended", SOON * 2, async || {
            let status = self.status(id).await?;
            ensure!(status.state == EXITED, "{status:?}");
            Ok(status)
        })
        .await
    }

    /// Runs a command in a container: exit code and stdout.
    pub async fn exec(&self, id: &str, command: &[&str]) -> Result<(i32, String)> {
        self.exec_within(id, command, 20).await
    }

    /// The same, ended by the plugin after `seconds`.
    pub async fn exec_within(&self, id: &str, command: &[&str], seconds: i64) -> Result<(i32, String)> {
        let command = command.iter().map(|word| (*word).to_owned()).collect();
        let answer: ExecResponse = self.call(method::EXEC, ExecRequest { id: id.to_owned(), command, timeout: seconds }).await?;
        Ok((answer.exit_code, String::from_utf8_lossy(&answer.stdout).into_owned()))
    }

    /// Processor time and memory of a container.
    pub async fn stats(&self, id: &str) -> Result<(u64, u64)> {
        let answer: StatsResponse = self.call(method::STATS, ContainerId { id: id.to_owned() }).await?;
        let stats = answer.stats.context("no statistics")?;
        let cpu = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).context("no processor time")?.value;
        let memory = stats.memory.and_then(|memory| memory.working_set_bytes).context("no memory")?.value;
        Ok((cpu, memory))
    }

    /// Stops a container: a signal, and a kill after `seconds`.
    pub async fn stop(&self, id: &str, seconds: i64) -> Result<()> {
        self.call::<Nothing>(method::STOP, StopRequest { id: id.to_owned(), timeout: seconds }).await.map(drop)
    }

    /// Removes a container.
    pub async fn remove(&self, id: &str) -> Result<()> {
        self.call::<Nothing>(method::REMOVE, ContainerId { id: id.to_owned() }).await.map(drop)
    }

    /// Stops and removes a pod with all its containers.
    pub async fn end_pod(&self, pod: &Pod) -> Result<()> {
        self.call::<Nothing>(method::STOP_POD, PodId { id: pod.id.clone() }).await?;
        self.call::<Nothing>(method::REMOVE_POD, PodId { id: pod.id.clone() }).await.map(drop)
    }

    /// The log of a container, without the time and the name of the stream at the beginning of each line.
    pub fn log(&self, pod: &Pod, name: &str) -> String {
        let path = PathBuf::from(&pod.config.log_directory).join(format!("{name}.log"));
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).map(|line| format!("{line}\n")).collect()
    }

    /// Kills the daemon, does something, and starts it again.
    pub async fn crash(&self, meanwhile: impl Future<Output = Result<()>>) -> Result<()> {
        self.daemon.kill()?;
        meanwhile.await?;
        self.daemon.restart().await
    }

    /// The shims of this daemon: the keepers of ours.
    pub fn shims(&self) -> Vec<Process> {
        let (folder, name) = (self.daemon.folder().display().to_string(), self.cx.shim().binary_name());
        let ours = |process: &Process| {
            process.parent == 1
                && process.command.split(' ').next().is_some_and(|it| it.ends_with(&name))
                && proc::mentions(process.pid, &folder)
        };
        proc::all().into_values().filter(ours).collect()
    }

    /// Checks that nothing of its pods is left.
    pub async fn leaves_nothing(&self) -> Result<()> {
        self.daemon.is_alone().await?;
        let folder = format!("{}/state/", self.daemon.folder().display());
        eventually("no mount of a pod is left", SOON, async || {
            let mounts = fs::read_to_string("/proc/self/mountinfo")?;
            let left: Vec<_> = mounts.lines().filter(|line| line.contains(&folder)).collect();
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

/// The configuration in docs/kubernetes.md for this version of containerd, and its OCI runtime.
fn configuration(cx: &Context, option: &str, setting: &str) -> Result<String> {
    let version = if cx.suite() == Suite::Forky { "version = 3" } else { "version = 2" };
    let blocks = GUIDE.split("```toml\n").skip(1).filter_map(|rest| rest.split_once("```")).map(|(block, _)| block);
    let block = blocks
        .into_iter()
        .find(|block| block.starts_with(version))
        .with_context(|| format!("docs/kubernetes.md has nothing for {version}"))?;
    let block = block.trim_start_matches(version).replace("io.containerd.x.v2", &cx.shim().runtime_type);
    let plugin = if cx.suite() == Suite::Forky { "io.containerd.cri.v1.runtime" } else { "io.containerd.grpc.v1.cri" };
    let image = match cx.suite() {
        // its socket would be the host's own
        Suite::Forky => format!(
            "[plugins.\"io.containerd.cri.v1.images\".pinned_images]\n  sandbox = \"{IMAGE}\"\n[plugins.\"io.containerd.nri.v1.nri\"]\n  disable = true\n"
        ),
        Suite::Bookworm | Suite::Trixie => String::new(),
    };
    let own = match cx.suite() {
        Suite::Forky => String::new(),
        Suite::Bookworm | Suite::Trixie => format!("  sandbox_image = \"{IMAGE}\"\n"),
    };
    let options = format!("BinaryName = \"{}\"\n  {option}", cx.runtime_binary().display());
    let options = if cx.suite() == Suite::Bookworm {
        // all that this one hands on, as docs/kubernetes.md has it
        let file = cx.folder().join("x.toml");
        fs::write(&file, options)?;
        format!("ConfigPath = \"{}\"", file.display())
    } else {
        options
    };
    Ok(format!(
        "[plugins.\"{plugin}\"]\n  restrict_oom_score_adj = true\n  {setting}\n{own}{block}\n[plugins.\"{plugin}\".containerd.runtimes.{HANDLER}.options]\n  {options}\n{image}"
    ))
}

mod method {
    pub(super) const RUN_POD: &str = "/runtime.v1.RuntimeService/RunPodSandbox";
    pub(super) const STOP_POD: &str = "/runtime.v1.RuntimeService/StopPodSandbox";
    pub(super) const REMOVE_POD: &str = "/runtime.v1.RuntimeService/RemovePodSandbox";
    pub(super) const CREATE: &str = "/runtime.v1.RuntimeService/CreateContainer";
    pub(super) const START: &str = "/runtime.v1.RuntimeService/StartContainer";
    pub(super) const STOP: &str = "/runtime.v1.RuntimeService/StopContainer";
    pub(super) const REMOVE: &str = "/runtime.v1.RuntimeService/RemoveContainer";
    pub(super) const STATUS: &str = "/runtime.v1.RuntimeService/ContainerStatus";
    pub(super) const EXEC: &str = "/runtime.v1.RuntimeService/ExecSync";
    pub(super) const STATS: &str = "/runtime.v1.RuntimeService/ContainerStats";
}

/// The namespace of the container alone.
const CONTAINER: i32 = 1;
/// The namespace of the host.
const NODE: i32 = 2;
/// The state of a container that runs.
pub const RUNNING: i32 = 1;
/// The state of a container that has ended.
pub const EXITED: i32 = 2;

#[derive(Clone, PartialEq, Message)]
struct Nothing {}

#[derive(Clone, PartialEq, Message)]
struct PodMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
    #[prost(uint32, tag = "4")]
    attempt: u32,
}

#[derive(Clone, PartialEq, Message)]
struct NamespaceOption {
    #[prost(int32, tag = "1")]
    network: i32,
    #[prost(int32, tag = "2")]
    pid: i32,
    #[prost(int32, tag = "3")]
    ipc: i32,
}

#[derive(Clone, PartialEq, Message)]
struct SandboxSecurity {
    #[prost(message, optional, tag = "1")]
    namespace_options: Option<NamespaceOption>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxPod {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
    #[prost(message, optional, tag = "2")]
    security_context: Option<SandboxSecurity>,
}

#[derive(Clone, PartialEq, Message)]
struct PodConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodMetadata>,
    #[prost(string, tag = "3")]
    log_directory: String,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPod>,
}

#[derive(Clone, PartialEq, Message)]
struct RunPodRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<PodConfig>,
    #[prost(string, tag = "2")]
    runtime_handler: String,
}

#[derive(Clone, PartialEq, Message)]
struct PodId {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerId {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint32, tag = "2")]
    attempt: u32,
}

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, Message)]
struct Resources {
    #[prost(int64, tag = "4")]
    memory_limit_in_bytes: i64,
    #[prost(int64, tag = "10")]
    memory_swap_limit_in_bytes: i64,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerSecurity {
    #[prost(message, optional, tag = "3")]
    namespace_options: Option<NamespaceOption>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxContainer {
    #[prost(message, optional, tag = "1")]
    resources: Option<Resources>,
    #[prost(message, optional, tag = "2")]
    security_context: Option<ContainerSecurity>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
    #[prost(string, tag = "11")]
    log_path: String,
    #[prost(message, optional, tag = "15")]
    linux: Option<LinuxContainer>,
}

#[derive(Clone, PartialEq, Message)]
struct CreateRequest {
    #[prost(string, tag = "1")]
    pod: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    sandbox_config: Option<PodConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct StopRequest {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(int64, tag = "2")]
    timeout: i64,
}

/// The container status that the kubelet gets.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerStatus {
    /// [`RUNNING`], [`EXITED`] …
    #[prost(int32, tag = "3")]
    pub state: i32,
    /// Nanoseconds since 1970.
    #[prost(int64, tag = "5")]
    pub started_at: i64,
    /// Nanoseconds since 1970.
    #[prost(int64, tag = "6")]
    pub finished_at: i64,
    /// The exit code.
    #[prost(int32, tag = "7")]
    pub exit_code: i32,
    /// One word: `Completed`, `Error`, `OOMKilled`.
    #[prost(string, tag = "10")]
    pub reason: String,
}

#[derive(Clone, PartialEq, Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<ContainerStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct ExecRequest {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, repeated, tag = "2")]
    command: Vec<String>,
    #[prost(int64, tag = "3")]
    timeout: i64,
}

#[derive(Clone, PartialEq, Message)]
struct ExecResponse {
    #[prost(bytes = "vec", tag = "1")]
    stdout: Vec<u8>,
    #[prost(int32, tag = "3")]
    exit_code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Number {
    #[prost(uint64, tag = "1")]
    value: u64,
}

#[derive(Clone, PartialEq, Message)]
struct CpuUsage {
    #[prost(message, optional, tag = "2")]
    usage_core_nano_seconds: Option<Number>,
}

#[derive(Clone, PartialEq, Message)]
struct MemoryUsage {
    #[prost(message, optional, tag = "2")]
    working_set_bytes: Option<Number>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerStats {
    #[prost(message, optional, tag = "2")]
    cpu: Option<CpuUsage>,
    #[prost(message, optional, tag = "3")]
    memory: Option<MemoryUsage>,
}

#[derive(Clone, PartialEq, Message)]
struct StatsResponse {
    #[prost(message, optional, tag = "1")]
    stats: Option<ContainerStats>,
}
