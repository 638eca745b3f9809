//! A container under test: its spec, its stdio, its task, its execs.
//!
//! ```text
//! Builder ─create▶ Container (task created) ─start▶ … ─delete▶ gone
//!                      └─exec▶ ExecBuilder ─add▶ Process ─start▶ … ─delete▶ gone
//! ```

mod build;

use std::fs;
use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, ensure};
use containerd_client::services::v1::DeleteResponse;
use containerd_client::types::Mount;
use containerd_client::types::v1::{Process as State, Status as Phase};

pub use build::{Builder, ExecBuilder};

use crate::client::{Answer, Client};
use crate::context::Context;
use crate::eventually::{SOON, eventually};
use crate::spec;
use crate::stdio::{self, Pace, Reader, Writer};

/// The targets of a process's stdin, stdout and stderr.
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

/// A folder that is removed with its owner.
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

    /// Deletes it and returns its exit status.
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

    /// Starts it, waits for its end, deletes it, and returns the exit status, on which Wait and Delete must agree.
    pub async fn run(&self) -> Result<u32> {
        self.start().await?;
        self.finish().await
    }

    /// Waits for the exit, deletes it, and returns the exit status.
    pub async fn finish(&self) -> Result<u32> {
        let waited = self.wait().await?;
        let deleted = self.delete().await?.exit_status;
        ensure!(waited == deleted, "wait reports {waited}, delete reports {deleted}");
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

impl DerefMut for Container {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.init
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
        // errors do not matter; the runner finds and reports a leftover task
        let (client, id) = (self.client.clone(), self.id.clone());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { client.delete_container(&id).await });
        }
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
