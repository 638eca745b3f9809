//! Builders of containers and execs.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::{Container as Metadata, CreateTaskRequest, ExecProcessRequest};
use containerd_client::types::{Descriptor, Mount};
use prost_types::Any;
use serde_json::json;

use super::{Container, Io, Process, Stdio, bind};
use crate::context::Context;
use crate::messages::{self, Options, any, any_json};
use crate::spec::Spec;
use crate::suite::OUR_TYPE;

/// A builder of a container.
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
    sandbox: String,
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
            sandbox: String::new(),
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

    /// Uses another shim; with an OCI runtime, if it is not ours.
    #[must_use]
    pub fn runtime_type(mut self, runtime_type: &str) -> Self {
        runtime_type.clone_into(&mut self.runtime_type);
        if runtime_type == OUR_TYPE {
            return self;
        }
        let program = self.cx.runtime_program();
        self.runtime_binary(&program)
    }

    /// Mounts another root file system.
    #[must_use]
    pub fn rootfs(mut self, mounts: Vec<Mount>) -> Self {
        self.rootfs = mounts;
        self
    }

    /// Puts it into a sandbox.
    #[must_use]
    pub fn sandbox(mut self, id: &str) -> Self {
        id.clone_into(&mut self.sandbox);
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
        let metadata = Metadata {
            id: self.id.clone(),
            runtime: Some(Runtime { name: self.runtime_type.clone(), options: self.options.clone() }),
            spec: Some(spec),
            sandbox: self.sandbox.clone(),
            ..Metadata::default()
        };
        self.cx.client().create_metadata(metadata).await.context("create metadata")?;
        Ok(self)
    }

    /// Creates the task of a container whose metadata exists.
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
        ensure!(pid == container.pid, "create reports pid {}, start reports {pid}", container.pid);
        Ok(container)
    }

    /// Creates, starts, waits and deletes; returns the exit status.
    pub async fn run(self) -> Result<u32> {
        self.create().await?.run().await
    }
}

/// A builder of an exec.
#[derive(Debug)]
pub struct ExecBuilder {
    pub(super) cx: Context,
    pub(super) id: String,
    pub(super) exec: String,
    pub(super) process: serde_json::Value,
    pub(super) stdio: Stdio,
    pub(super) terminal: bool,
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
