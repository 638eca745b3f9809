//! A daemon on a disk: x-manager, or a stock containerd to compare it with.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::Client;
use crate::eventually::eventually;
use crate::operator::{binary, printed};
use crate::suite::Suite;
use crate::{isolation, proc};

/// Which daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// The x-manager under test.
    Manager,
    /// The newest stock containerd.
    Containerd,
}

/// A daemon with everything in one folder.
#[derive(Debug)]
pub struct Server {
    program: Program,
    folder: PathBuf,
    root: PathBuf,
    process: Option<Child>,
}

impl Server {
    /// One that has not been started.
    pub fn new(program: Program, folder: &Path) -> Result<Self> {
        Self::with_root(program, folder, &folder.join("root"))
    }

    /// The same with what survives a reboot elsewhere.
    pub fn with_root(program: Program, folder: &Path, root: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        fs::create_dir_all(root)?;
        let server = Self { program, folder: folder.to_owned(), root: root.to_owned(), process: None };
        let folder = folder.display();
        let places = format!("root = \"{}\"\nstate = \"{folder}/state\"\n", root.display());
        let text = match program {
            Program::Manager => format!("{places}address = \"{folder}/x.sock\"\n"),
            Program::Containerd => {
                format!("version = 3\n{places}{DISABLED}[grpc]\naddress = \"{folder}/x.sock\"\n[ttrpc]\naddress = \"{folder}/t.sock\"\n")
            }
        };
        fs::write(server.folder.join("config.toml"), text)?;
        Ok(server)
    }

    /// Where what survives a reboot is.
    pub fn root(&self) -> PathBuf {
        self.root.clone()
    }

    /// Starts it, and waits until it answers.
    pub async fn start(&mut self) -> Result<Client> {
        let log = File::options().create(true).append(true).open(self.folder.join("log"))?;
        let program = match self.program {
            Program::Manager => binary()?.to_owned(),
            Program::Containerd => Suite::Forky.program("containerd"),
        };
        let mut command = Command::new(program);
        command.arg("--config").arg(self.folder.join("config.toml")).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn()?;
        isolation::keep(child.id());
        self.process = Some(child);
        let address = self.folder.join("x.sock");
        let answers = eventually("the daemon answers", Duration::from_secs(30), async || {
            let client = Client::connect(&address, "default").await?;
            client.version().await?;
            Ok(client)
        });
        answers.await.with_context(|| self.log())
    }

    /// Everything that it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// Ends it by that signal.
    pub fn end(&mut self, signal: Signal) -> Result<()> {
        if let Some(mut child) = self.process.take() {
            kill(Pid::from_raw(child.id().cast_signed()), signal)?;
            child.wait()?;
            isolation::forget(child.id());
        }
        Ok(())
    }

    /// Has x-manager check its store, while no process serves.
    pub fn check(&self) -> Result<()> {
        match self.program {
            Program::Manager => printed(Command::new(binary()?).arg("--root").arg(self.root()).arg("check")).map(drop),
            Program::Containerd => Ok(()),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _it_may_have_ended = self.end(Signal::SIGKILL);
        let folder = format!("{}/", self.folder.display());
        proc::all().into_keys().filter(|pid| *pid != 1 && proc::mentions(*pid, &folder)).for_each(proc::kill_hard);
    }
}

/// What is not needed here, and does not start everywhere.
const DISABLED: &str = r#"disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
  "io.containerd.podsandbox.controller.v1.podsandbox", "io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
"#;
