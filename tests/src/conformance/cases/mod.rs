//! The cases, by area, and their shared helpers.

mod bootstrap;
mod calls;
mod crashes;
mod events;
mod execs;
mod lifecycle;
mod lifetime;
mod pods;
mod requests;
mod resources;
mod sandboxes;
mod security;
mod slow;
mod stdio;
mod terminals;
mod wire;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use containerd_shim_protos::api;

pub use calls::markdown as table_of_calls;

use super::Case;
use crate::bundle::{self, Bundle, Container};
use crate::stand::Stand;
use crate::stdio::{Pace, Reader, Writer, fifo};
use crate::task::Task;

/// All cases, in the order of the clauses.
pub fn all() -> Vec<Case> {
    [
        bootstrap::cases(),
        security::cases(),
        crashes::cases(),
        calls::cases(),
        lifecycle::cases(),
        execs::cases(),
        resources::cases(),
        slow::cases(),
        requests::cases(),
        events::cases(),
        stdio::cases(),
        terminals::cases(),
        lifetime::cases(),
        wire::cases(),
        sandboxes::cases(),
        pods::cases(),
    ]
    .concat()
}

/// The case of that name.
pub fn find(name: &str) -> Option<Case> {
    all().into_iter().find(|case| case.name == name)
}

/// The fifos of a process, and their readers.
struct Streams {
    stdin: PathBuf,
    stdout: PathBuf,
    stderr: PathBuf,
    out: Reader,
    err: Reader,
}

impl Streams {
    /// Three fifos, with stdout and stderr read.
    fn new(stand: &Stand, name: &str) -> Result<Self> {
        Self::at_pace(stand, name, Pace::Keep)
    }

    fn at_pace(stand: &Stand, name: &str, pace: Pace) -> Result<Self> {
        let [stdin, stdout, stderr] = unread(stand, name)?;
        Ok(Self { out: Reader::open(&stdout, pace)?, err: Reader::open(&stderr, pace)?, stdin, stdout, stderr })
    }

    /// Connects stdout and stderr of init.
    fn output(&self, bundle: Bundle) -> Bundle {
        bundle.stdio("", &text(&self.stdout), &text(&self.stderr))
    }

    /// Connects all three of init.
    fn all(&self, bundle: Bundle) -> Bundle {
        bundle.stdio(&text(&self.stdin), &text(&self.stdout), &text(&self.stderr))
    }

    /// Connects all three of a process that is added.
    fn exec(&self, request: api::ExecProcessRequest) -> api::ExecProcessRequest {
        api::ExecProcessRequest { stdin: text(&self.stdin), stdout: text(&self.stdout), stderr: text(&self.stderr), ..request }
    }

    /// The writing end of stdin.
    async fn writer(&self) -> Result<Writer> {
        Writer::open(&self.stdin).await
    }
}

/// Three fifos without readers and writers.
fn unread(stand: &Stand, name: &str) -> Result<[PathBuf; 3]> {
    let paths = ["0", "1", "2"].map(|number| stand.folder().join(format!("{name}.{number}")));
    paths.iter().try_for_each(|path| fifo(path))?;
    Ok(paths)
}

fn text(path: &std::path::Path) -> String {
    path.display().to_string()
}

/// Runs `start` by a shell script that gets the command as `$@`, and connects to the shim.
async fn start_through(stand: &Stand, bundle: &Bundle, script: &str) -> Result<Task> {
    bundle.write()?;
    stand.read_log_of(&bundle.id, &bundle.folder.join("log"))?;
    let start = bundle.command("start", &[]);
    let mut command = tokio::process::Command::new("/bin/sh");
    command.args(["-c", script, "sh"]).arg(start.as_std().get_program()).args(start.as_std().get_args());
    command.current_dir(&bundle.folder).env_clear();
    for (name, value) in start.as_std().get_envs() {
        command.env(name, value.unwrap_or_default());
    }
    let output = bundle::run(command, &[]).await?;
    ensure!(output.status.success(), "{output:?}");
    Task::connect(&bundle::read_address(&output.stdout)?).await
}

/// A container that sleeps, running.
async fn sleeper(stand: &Stand, id: &str) -> Result<Container> {
    stand.bundle(id, &["sleep", "1000"]).run().await
}
