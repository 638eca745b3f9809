//! A bundle, written as containerd writes it, and the container that a shim creates from it.
//!
//! ```text
//! Bundle ─start_shim▶ address ─Task::connect▶ Task ─create_in▶ Container ─start▶ … ─destroy▶ gone
//! ```

mod container;

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::shim::oci::Options;
use containerd_shim_protos::types::mount::Mount;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};

pub use container::Container;

use crate::eventually::{SOON, eventually, eventually_true, within};
use crate::spec::{self, Spec};
use crate::stand::Stand;
use crate::stdio;
use crate::task::{self, Task, V2, V3, any_json};
use crate::{isolation, messages, proc, rootfs, trace};

fn bind_mount(source: &Path) -> Mount {
    Mount {
        type_: "bind".to_owned(),
        source: source.display().to_string(),
        options: vec!["rbind".to_owned(), "rw".to_owned()],
        ..Mount::default()
    }
}

/// The bundle of a container that has not been created yet.
#[derive(Debug, Clone)]
pub struct Bundle {
    stand: Stand,
    /// The container's id.
    pub id: String,
    /// Its folder.
    pub folder: PathBuf,
    spec: Spec,
    runtime: PathBuf,
    stdio: [String; 3],
    terminal: bool,
    mounts: Vec<Mount>,
    log_is_read: bool,
    environment: Vec<(String, String)>,
    systemd_cgroup: bool,
    has_spec: bool,
    /// Where its containerd's gRPC API would be: with the namespace and the id, the name of its shim's socket.
    grpc: PathBuf,
}

impl Bundle {
    /// A busybox container of the stand's faster runtime.
    pub(crate) fn new(stand: &Stand, id: &str, args: &[&str]) -> Result<Self> {
        let cgroup = format!("/{}/{}/{id}", isolation::cgroup(), stand.namespace());
        Ok(Self {
            stand: stand.clone(),
            id: id.to_owned(),
            folder: stand.folder().join("b").join(id),
            spec: Spec::new(args, &cgroup),
            runtime: stand.runtime(),
            stdio: [String::new(), String::new(), String::new()],
            terminal: false,
            mounts: vec![bind_mount(&rootfs::shared()?)],
            log_is_read: true,
            environment: Vec::new(),
            systemd_cgroup: false,
            has_spec: true,
            grpc: stand.grpc(),
        })
    }

    /// Moves it to another daemon of the same namespace, with a shim and a folder of its own.
    #[must_use]
    pub fn of_another_daemon(mut self) -> Self {
        self.folder = self.stand.folder().join("other").join(&self.id);
        self.grpc = self.stand.folder().join("other.sock");
        self
    }

    /// Leaves out the spec, as in the bundle of a sandbox.
    #[must_use]
    pub fn without_spec(mut self) -> Self {
        self.has_spec = false;
        self
    }

    /// Leaves the fifo of the shim's log without a reader.
    #[must_use]
    pub fn without_log_reader(mut self) -> Self {
        self.log_is_read = false;
        self
    }

    /// Gives its shim another environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Changes the spec.
    #[must_use]
    pub fn spec(mut self, change: impl FnOnce(Spec) -> Spec) -> Self {
        self.spec = change(self.spec);
        self
    }

    /// Puts it into a group.
    #[must_use]
    pub fn group(self, group: &str) -> Self {
        self.spec(|spec| spec.annotation("io.containerd.runc.v2.group", group))
    }

    /// Chooses the OCI runtime.
    #[must_use]
    pub fn runtime(mut self, runtime: &Path) -> Self {
        runtime.clone_into(&mut self.runtime);
        self
    }

    /// Has systemd make its cgroup: `SLICE:PREFIX:NAME`.
    #[must_use]
    pub fn systemd_cgroup(mut self, path: &str) -> Self {
        self.systemd_cgroup = true;
        self.spec(|spec| spec.with(|spec| spec["linux"]["cgroupsPath"] = path.into()))
    }

    /// Connects stdin, stdout and stderr.
    #[must_use]
    pub fn stdio(mut self, stdin: &str, stdout: &str, stderr: &str) -> Self {
        self.stdio = [stdin, stdout, stderr].map(str::to_owned);
        self
    }

    /// Gives init a terminal.
    #[must_use]
    pub fn terminal(mut self) -> Self {
        self.terminal = true;
        self.spec = self.spec.terminal(true);
        self
    }

    /// Chooses the mounts of the root file system.
    #[must_use]
    pub fn mounts(mut self, mounts: Vec<Mount>) -> Self {
        self.mounts = mounts;
        self
    }

    /// Writes the bundle as containerd does.
    pub fn write(&self) -> Result<&Self> {
        fs::create_dir_all(self.folder.join("rootfs"))?;
        fs::create_dir_all(self.folder.join("work"))?;
        if self.has_spec {
            fs::write(self.folder.join("config.json"), self.spec.0.to_string())?;
        }
        if !self.folder.join("log").exists() {
            stdio::fifo(&self.folder.join("log"))?;
        }
        Ok(self)
    }

    /// Its stand.
    pub(crate) fn stand(&self) -> &Stand {
        &self.stand
    }

    /// The options.
    pub fn options(&self) -> Any {
        let options =
            Options { binary_name: self.runtime.display().to_string(), systemd_cgroup: self.systemd_cgroup, ..Options::default() };
        let value = options.write_to_bytes().expect("a message without required fields is always complete");
        Any { type_url: "containerd.runc.v1.Options".to_owned(), value, ..Any::default() }
    }

    /// The request that creates it.
    pub fn request(&self) -> api::CreateTaskRequest {
        let [stdin, stdout, stderr] = self.stdio.clone();
        api::CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.folder.display().to_string(),
            rootfs: self.mounts.clone(),
            terminal: self.terminal,
            stdin,
            stdout,
            stderr,
            options: MessageField::some(self.options()),
            ..Default::default()
        }
    }

    /// The request that adds a process to it.
    pub fn exec_request(&self, exec: &str, args: &[&str]) -> api::ExecProcessRequest {
        api::ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec.to_owned(),
            spec: MessageField::some(any_json(messages::PROCESS, &spec::process(args))),
            ..Default::default()
        }
    }

    /// One of containerd's commands on this bundle: `start` or `delete`.
    pub fn command(&self, action: &str, flags: &[&str]) -> tokio::process::Command {
        let (grpc, folder) = (self.grpc.display().to_string(), self.folder.display().to_string());
        let mut arguments = vec!["-namespace", self.stand.namespace(), "-address", &grpc, "-publish-binary", "/bin/true", "-id", &self.id];
        if action == "delete" {
            arguments.extend(["-bundle", &folder]);
        }
        arguments.extend(flags);
        arguments.push(action);
        let mut command = self.stand.command(&arguments);
        command.current_dir(&self.folder).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs `start`, and returns where the shim listens.
    pub async fn start_shim(&self) -> Result<PathBuf> {
        self.start_shim_with(&[], &[]).await
    }

    /// Runs `start` with more flags and with something on standard input, and returns where the shim listens.
    pub async fn start_shim_with(&self, flags: &[&str], input: &[u8]) -> Result<PathBuf> {
        self.write()?;
        if self.log_is_read {
            // containerd does before it runs `start`, and the stock shim waits for that
            self.stand.read_log_of(&self.id, &self.folder.join("log"))?;
        }
        let output = run(self.command("start", flags), input).await?;
        ensure!(output.status.success(), "start: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        // containerd reads both streams as one
        ensure!(output.stderr.is_empty(), "start prints {:?}", String::from_utf8_lossy(&output.stderr));
        read_address(&output.stdout)
    }

    /// Starts a shim for it, or joins the group's, and connects.
    pub async fn shim(&self) -> Result<Task> {
        let socket = self.start_shim().await?;
        // in older stock shims, the socket listens before the process accepts
        Task::connect(&socket).await
    }

    /// Starts a shim and creates the container.
    pub async fn create(self) -> Result<Container> {
        let task = self.shim().await?;
        self.create_in(&task).await
    }

    /// Creates the container in a running shim.
    pub async fn create_in(self, task: &Task) -> Result<Container> {
        self.write()?;
        let pid = task.create(&self.request()).await.with_context(|| format!("create {}", self.id))?;
        Ok(Container { task: task.clone(), id: self.id.clone(), pid, bundle: self })
    }

    /// Starts a shim, creates the container and starts it.
    pub async fn run(self) -> Result<Container> {
        let container = self.create().await?;
        container.start().await?;
        Ok(container)
    }

    /// Creates and starts the container in a running shim.
    pub async fn run_in(self, task: &Task) -> Result<Container> {
        let container = self.create_in(task).await?;
        container.start().await?;
        Ok(container)
    }

    /// Runs `delete`, and returns its answer.
    pub async fn delete_command(&self) -> Result<api::DeleteResponse> {
        let output = run(self.command("delete", &[]), &[]).await?;
        ensure!(output.status.success(), "delete: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        Ok(api::DeleteResponse::parse_from_bytes(&output.stdout)?)
    }

    /// The pid of its shim: the one in the pid file of `start`, else the only shim, or the one with its id.
    pub fn shim_pid(&self) -> Result<i32> {
        if let Ok(noted) = fs::read_to_string(self.folder.join("shim.pid")) {
            return Ok(noted.trim().parse()?);
        }
        let mut shims = self.stand.shims();
        if shims.len() > 1 {
            shims.retain(|shim| shim.command.split(' ').any(|word| word == self.id));
        }
        ensure!(shims.len() == 1, "exactly one shim of {} expected: {shims:?}", self.id);
        Ok(shims.remove(0).pid)
    }
}

/// The answer of `start`: an address, or JSON with a version of the protocol, that clients use from then on.
pub fn read_address(answer: &[u8]) -> Result<PathBuf> {
    let text = std::str::from_utf8(answer)?.trim();
    let (address, version) = match serde_json::from_str::<serde_json::Value>(text) {
        Ok(json) => (json["address"].as_str().unwrap_or_default().to_owned(), json["version"].as_u64().unwrap_or(2)),
        Err(_) => (text.to_owned(), 2),
    };
    let Some(path) = address.strip_prefix("unix://") else { bail!("not an address: {text:?}") };
    task::remember(Path::new(path), if version >= 3 { V3 } else { V2 });
    Ok(PathBuf::from(path))
}

/// Runs a command of the shim with that on its standard input.
pub async fn run(mut command: tokio::process::Command, input: &[u8]) -> Result<Output> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.as_std_mut().process_group(0);
    let mut child = command.spawn()?;
    let pid = child.id().unwrap_or_default();
    isolation::keep(pid);
    let mut stdin = child.stdin.take().expect("it was asked for");
    // it may answer without reading: then this pipe breaks
    let _its_own_business = stdin.write_all(input).await;
    drop(stdin);
    let output = within("a command of the shim", Duration::from_secs(30), output_of(&mut child)).await;
    isolation::forget(pid);
    let output = output??;
    trace::note("command", format_args!("{:?}: {output:?}", command.as_std().get_args()));
    Ok(output)
}

/// No command of a shim prints more.
const MOST_BYTES: u64 = 1 << 20;

/// The output of a process until it exits.
///
/// Errors: it is too much.
pub async fn output_of(child: &mut tokio::process::Child) -> Result<Output> {
    async fn all(stream: Option<impl AsyncRead + Unpin>) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if let Some(stream) = stream {
            stream.take(MOST_BYTES + 1).read_to_end(&mut bytes).await?;
        }
        ensure!(bytes.len() as u64 <= MOST_BYTES, "too much output: more than {MOST_BYTES} bytes");
        Ok(bytes)
    }
    let (stdout, stderr) = tokio::try_join!(all(child.stdout.take()), all(child.stderr.take()))?;
    Ok(Output { status: child.wait().await?, stdout, stderr })
}

/// Calls Shutdown, and waits until the shim has exited: immediately, because it has no container left.
pub async fn leave(task: &Task, shim: i32, id: &str) -> Result<()> {
    match task.shutdown(id).await {
        Ok(()) | Err(crate::ttrpc::CallError::Closed) => {}
        Err(error) => return Err(error.into()),
    }
    eventually_true("the shim has exited", SOON, || !proc::is_alive(shim)).await
}

/// The worker of a keeper, once there is one.
pub async fn worker_of(keeper: i32) -> Result<i32> {
    eventually("the keeper has a worker", SOON, async || {
        let is_worker = |child: &proc::Process| child.command.split(' ').any(|word| word == "worker");
        proc::children(keeper).into_iter().find(is_worker).map(|child| child.pid).context("no child is called worker")
    })
    .await
}
