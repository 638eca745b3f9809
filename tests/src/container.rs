//! A container under test: its spec, its stdio, its task, its execs.
//!
//! ```text
//! Builder ─create▶ Container (task created) ─start▶ … ─delete▶ gone
//!                      └─exec▶ ExecBuilder ─add▶ Process ─start▶ … ─delete▶ gone
//! ```

use std::fs;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::{CreateTaskRequest, DeleteResponse, ExecProcessRequest};
use containerd_client::types::v1::{Process as State, Status as Phase};
use containerd_client::types::{Descriptor, Mount};
use prost_types::Any;
use serde_json::json;

use crate::client::{Answer, Client};
use crate::context::Context;
use crate::eventually::{SOON, eventually};
use crate::messages::{self, Options, any, any_json};
use crate::spec::{self, Spec};
use crate::stdio::{self, Pace, Reader, Writer};

/// What a process's stdin, stdout and stderr are connected to.
#[derive(Debug, Clone)]
pub enum Stdio {
    /// Nothing.
    None,
    /// Fifos of the test for stdout and stderr, and for stdin if asked for.
    Fifos {
        /// Whether there is a stdin.
        stdin: bool,
        /// How they are read; none leaves them without a reader.
        pace: Option<Pace>,
    },
    /// Stdin, stdout and stderr as given.
    Given(String, String, String),
}

impl Stdio {
    /// Fifos for stdout and stderr, read at once and kept.
    pub const OUTPUT: Self = Self::Fifos { stdin: false, pace: Some(Pace::Keep) };
    /// The same with stdin.
    pub const ALL: Self = Self::Fifos { stdin: true, pace: Some(Pace::Keep) };

    /// The same URI for stdout and stderr.
    pub fn uri(uri: impl Into<String>) -> Self {
        let uri = uri.into();
        Self::Given(String::new(), uri.clone(), uri)
    }
}

/// The test's ends of a process's stdio.
#[derive(Debug, Default)]
pub struct Io {
    /// The reader of stdout.
    pub stdout: Option<Reader>,
    /// The reader of stderr.
    pub stderr: Option<Reader>,
    paths: [String; 3],
    _folder: Option<Folder>,
}

/// A folder that goes with its owner.
#[derive(Debug)]
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _the_run_folder_goes_anyway = fs::remove_dir_all(&self.0);
    }
}

impl Io {
    fn new(cx: &Context, stdio: &Stdio, terminal: bool) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        match stdio {
            Stdio::None => Ok(Self::default()),
            Stdio::Given(stdin, stdout, stderr) => Ok(Self { paths: [stdin.clone(), stdout.clone(), stderr.clone()], ..Self::default() }),
            Stdio::Fifos { stdin, pace } => {
                let folder = cx.folder().join(format!("io{}", NEXT.fetch_add(1, Ordering::Relaxed)));
                fs::create_dir_all(&folder)?;
                let mut io = Self { _folder: Some(Folder(folder.clone())), ..Self::default() };
                for (name, path, wanted) in [("0", 0, *stdin), ("1", 1, true), ("2", 2, !terminal)] {
                    if wanted {
                        stdio::fifo(&folder.join(name))?;
                        io.paths[path] = folder.join(name).display().to_string();
                    }
                }
                if let Some(pace) = *pace {
                    io.read(pace)?;
                }
                Ok(io)
            }
        }
    }

    /// Begins to read stdout and stderr.
    pub fn read(&mut self, pace: Pace) -> Result<()> {
        let open = |path: &str| if path.is_empty() { Ok(None) } else { Reader::open(path.as_ref(), pace).map(Some) };
        self.stdout = open(&self.paths[1])?;
        self.stderr = open(&self.paths[2])?;
        Ok(())
    }

    /// The reader of stdout.
    pub fn out(&self) -> &Reader {
        self.stdout.as_ref().expect("this test reads stdout")
    }

    /// The reader of stderr.
    pub fn err(&self) -> &Reader {
        self.stderr.as_ref().expect("this test reads stderr")
    }

    /// Opens stdin for writing, once the shim reads it.
    pub async fn stdin(&self) -> Result<Writer> {
        Writer::open(self.paths[0].as_ref()).await
    }

    /// The paths of stdin, stdout and stderr.
    pub fn paths(&self) -> &[String; 3] {
        &self.paths
    }
}

/// Init or an exec of a container.
#[derive(Debug)]
pub struct Process {
    client: Client,
    /// The container.
    pub id: String,
    /// The exec, empty for init.
    pub exec: String,
    /// Its stdio.
    pub io: Io,
}

impl Process {
    /// Starts it and returns its pid.
    pub async fn start(&self) -> Answer<u32> {
        self.client.start(&self.id, &self.exec).await
    }

    /// Waits for its end and returns the exit status.
    pub async fn wait(&self) -> Answer<u32> {
        self.client.wait(&self.id, &self.exec).await.map(|answer| answer.exit_status)
    }

    /// Deletes it and returns what it ended with.
    pub async fn delete(&self) -> Answer<DeleteResponse> {
        if self.exec.is_empty() { self.client.delete(&self.id).await } else { self.client.delete_exec(&self.id, &self.exec).await }
    }

    /// Its state.
    pub async fn state(&self) -> Answer<State> {
        self.client.state(&self.id, &self.exec).await
    }

    /// Waits until it is in that phase.
    pub async fn phase(&self, phase: Phase) -> Result<State> {
        eventually(format!("{}/{} is {phase:?}", self.id, self.exec), SOON, async || {
            let state = self.state().await?;
            ensure!(state.status() == phase, "{state:?}");
            Ok(state)
        })
        .await
    }

    /// Sends it a signal.
    pub async fn kill(&self, signal: u32) -> Answer<()> {
        self.client.kill(&self.id, &self.exec, signal, false).await
    }

    /// Closes its stdin.
    pub async fn close_stdin(&self) -> Answer<()> {
        self.client.close_stdin(&self.id, &self.exec).await
    }

    /// Resizes its terminal.
    pub async fn resize(&self, width: u32, height: u32) -> Answer<()> {
        self.client.resize(&self.id, &self.exec, width, height).await
    }

    /// Starts it, waits for its end, deletes it, and returns the exit status, which the last two have to agree about.
    pub async fn run(&self) -> Result<u32> {
        self.start().await?;
        self.finish().await
    }

    /// Waits for the end of what was started, deletes it, and returns the exit status.
    pub async fn finish(&self) -> Result<u32> {
        let waited = self.wait().await?;
        let deleted = self.delete().await?.exit_status;
        ensure!(waited == deleted, "wait says {waited}, delete says {deleted}");
        Ok(waited)
    }
}

/// A container whose task has been created.
#[derive(Debug)]
pub struct Container {
    init: Process,
    cx: Context,
    /// The pid of init.
    pub pid: u32,
    metadata: bool,
}

impl Deref for Container {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.init
    }
}

impl Container {
    /// Begins an exec.
    pub fn exec(&self, exec: &str, args: &[&str]) -> ExecBuilder {
        ExecBuilder {
            cx: self.cx.clone(),
            id: self.id.clone(),
            exec: exec.to_owned(),
            process: spec::process(args),
            stdio: Stdio::None,
            terminal: false,
        }
    }

    /// Its stdio, to be changed.
    pub fn io_mut(&mut self) -> &mut Io {
        &mut self.init.io
    }

    /// Kills every process of it.
    pub async fn kill_all(&self, signal: u32) -> Answer<()> {
        self.client.kill(&self.id, "", signal, true).await
    }

    /// The folder of its bundle.
    pub fn bundle(&self) -> PathBuf {
        self.cx.daemon().bundle(self.cx.client().namespace(), &self.id)
    }

    /// Deletes the metadata, so that the id is free again.
    pub async fn remove(mut self) -> Answer<()> {
        self.metadata = false;
        self.client.delete_container(&self.id).await
    }

    /// Kills init, waits for it and deletes the task.
    pub async fn destroy(&self) -> Result<u32> {
        self.kill(9).await?;
        self.finish().await
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if !self.metadata {
            return;
        }
        // of no interest any more; a task that is still there is found and reported by the runner
        let (client, id) = (self.client.clone(), self.id.clone());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { client.delete_container(&id).await });
        }
    }
}

/// A container to be.
#[derive(Debug)]
pub struct Builder {
    cx: Context,
    id: String,
    spec: Spec,
    stdio: Stdio,
    terminal: bool,
    runtime_type: String,
    options: Option<Any>,
    rootfs: Vec<Mount>,
    checkpoint: Option<Descriptor>,
}

impl Builder {
    /// A busybox container that runs `args`.
    pub(crate) fn new(cx: &Context, args: &[&str]) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let id = format!("c{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let spec = Spec::new(args, &cx.cgroup_path(&id));
        let options = Options { binary_name: cx.runtime_binary().display().to_string(), ..Options::default() };
        Ok(Self {
            cx: cx.clone(),
            id,
            spec,
            stdio: Stdio::None,
            terminal: false,
            runtime_type: cx.shim().runtime_type.clone(),
            options: Some(any(&options)),
            rootfs: vec![bind(&crate::rootfs::shared()?.display().to_string())],
            checkpoint: None,
        })
    }

    /// Gives it an id of the test's choice.
    #[must_use]
    pub fn id(mut self, id: &str) -> Self {
        self.spec.0["linux"]["cgroupsPath"] = json!(self.cx.cgroup_path(id));
        id.clone_into(&mut self.id);
        self
    }

    /// Changes its spec.
    #[must_use]
    pub fn spec(mut self, change: impl FnOnce(Spec) -> Spec) -> Self {
        self.spec = change(self.spec);
        self
    }

    /// Connects its stdio.
    #[must_use]
    pub fn stdio(mut self, stdio: Stdio) -> Self {
        self.stdio = stdio;
        self
    }

    /// Gives init a terminal.
    #[must_use]
    pub fn terminal(mut self) -> Self {
        self.terminal = true;
        self.spec = self.spec.terminal(true);
        self
    }

    /// Uses another OCI runtime program.
    #[must_use]
    pub fn runtime_binary(self, binary: &std::path::Path) -> Self {
        self.options(Some(any(&Options { binary_name: binary.display().to_string(), ..Options::default() })))
    }

    /// Sends other options.
    #[must_use]
    pub fn options(mut self, options: Option<Any>) -> Self {
        self.options = options;
        self
    }

    /// Uses another shim.
    #[must_use]
    pub fn runtime_type(mut self, runtime_type: &str) -> Self {
        runtime_type.clone_into(&mut self.runtime_type);
        self
    }

    /// Mounts another root file system.
    #[must_use]
    pub fn rootfs(mut self, mounts: Vec<Mount>) -> Self {
        self.rootfs = mounts;
        self
    }

    /// Restores it from a checkpoint instead of starting its program.
    #[must_use]
    pub fn restore(mut self, image: Descriptor) -> Self {
        self.checkpoint = Some(image);
        self
    }

    /// Creates metadata and task.
    ///
    /// Errors: a refusal is a [`tonic::Status`]; see [`code_of`].
    pub async fn create(self) -> Result<Container> {
        let client = self.cx.client().clone();
        let id = self.id.clone();
        let created = self.metadata().await?.create_task().await;
        if created.is_err() {
            let _of_a_task_that_never_was = client.delete_container(&id).await;
        }
        created
    }

    /// Creates the metadata alone.
    pub async fn metadata(self) -> Result<Self> {
        let spec = any_json(messages::SPEC, &self.spec.0);
        let client = self.cx.client();
        client.create_container(&self.id, &self.runtime_type, self.options.clone(), spec).await.context("create metadata")?;
        Ok(self)
    }

    /// Creates the task of a container whose metadata is there.
    pub async fn create_task(self) -> Result<Container> {
        let client = self.cx.client().clone();
        let io = Io::new(&self.cx, &self.stdio, self.terminal)?;
        let [stdin, stdout, stderr] = io.paths.clone();
        let request = CreateTaskRequest {
            container_id: self.id.clone(),
            rootfs: self.rootfs,
            stdin,
            stdout,
            stderr,
            terminal: self.terminal,
            checkpoint: self.checkpoint,
            // as CRI does it: a task without options has those of its container
            options: None,
            runtime_path: String::new(),
        };
        let init = Process { client: client.clone(), id: self.id.clone(), exec: String::new(), io };
        let pid = client.create_task(request).await?;
        Ok(Container { init, cx: self.cx, pid, metadata: true })
    }

    /// Creates and starts.
    pub async fn start(self) -> Result<Container> {
        let container = self.create().await?;
        let pid = container.start().await?;
        ensure!(pid == container.pid, "create says pid {}, start says {pid}", container.pid);
        Ok(container)
    }

    /// Creates, starts, waits and deletes; returns the exit status.
    pub async fn run(self) -> Result<u32> {
        self.create().await?.run().await
    }
}

/// An exec to be.
#[derive(Debug)]
pub struct ExecBuilder {
    cx: Context,
    id: String,
    exec: String,
    process: serde_json::Value,
    stdio: Stdio,
    terminal: bool,
}

impl ExecBuilder {
    /// Connects its stdio.
    #[must_use]
    pub fn stdio(mut self, stdio: Stdio) -> Self {
        self.stdio = stdio;
        self
    }

    /// Gives it a terminal.
    #[must_use]
    pub fn terminal(mut self) -> Self {
        self.terminal = true;
        self.process["terminal"] = json!(true);
        self
    }

    /// Changes its process spec.
    #[must_use]
    pub fn process(mut self, change: impl FnOnce(&mut serde_json::Value)) -> Self {
        change(&mut self.process);
        self
    }

    /// Adds it to the task.
    pub async fn add(self) -> Result<Process> {
        let client = self.cx.client().clone();
        let io = Io::new(&self.cx, &self.stdio, self.terminal)?;
        let [stdin, stdout, stderr] = io.paths.clone();
        let request = ExecProcessRequest {
            container_id: self.id.clone(),
            exec_id: self.exec.clone(),
            stdin,
            stdout,
            stderr,
            terminal: self.terminal,
            spec: Some(any_json(messages::PROCESS, &self.process)),
        };
        client.exec(request).await?;
        Ok(Process { client, id: self.id, exec: self.exec, io })
    }

    /// Adds and starts it.
    pub async fn start(self) -> Result<Process> {
        let process = self.add().await?;
        process.start().await?;
        Ok(process)
    }

    /// Adds, starts, waits and deletes; returns the exit status.
    pub async fn run(self) -> Result<u32> {
        self.add().await?.run().await
    }
}

/// A bind mount of a folder as root file system.
pub fn bind(source: &str) -> Mount {
    Mount {
        r#type: "bind".to_owned(),
        source: source.to_owned(),
        target: String::new(),
        options: vec!["rbind".to_owned(), "rw".to_owned()],
    }
}

/// The code of a refusal.
///
/// Errors: when it was no refusal.
pub fn code_of<T>(result: std::result::Result<T, impl Into<anyhow::Error>>) -> Result<tonic::Code> {
    match result {
        Ok(_) => anyhow::bail!("it was accepted"),
        Err(error) => {
            let error = error.into();
            match error.downcast_ref::<tonic::Status>() {
                Some(status) => Ok(status.code()),
                None => Err(error.context("not a refusal")),
            }
        }
    }
}
