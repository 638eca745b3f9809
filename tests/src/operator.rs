//! An operator's actions with x-manager: its commands, and processes of it with a configuration file.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::client::Client;
use crate::context::Context;
use crate::daemon::Daemon;
use crate::eventually::{SOON, eventually};
use crate::{isolation, proc, suite};

/// The x-manager under test.
pub fn binary() -> Result<&'static Path> {
    suite::manager().context("no x-manager is under test")
}

/// The output of a command, if it succeeded.
///
/// Errors: its status and everything that it printed.
pub fn printed(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}: {}", output.status, output_text(&output));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Both outputs as text.
pub fn output_text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The client of the test's suite, for the test's namespace.
pub fn ctr(cx: &Context) -> Command {
    let mut command = Command::new(cx.suite().program("ctr"));
    command.arg("--address").arg(cx.daemon().address()).args(["--namespace", cx.client().namespace()]);
    command
}

/// `ctr run` of a busybox container, up to the command that it runs.
pub fn ctr_run(cx: &Context, id: &str, flags: &[&str]) -> Result<Command> {
    let mut command = ctr(cx);
    command
        .args(["run", "--runtime", &cx.shim().runtime_type])
        .args(["--cgroup", &cx.cgroup_path(id)])
        .args(flags)
        .arg("--rootfs")
        .arg(crate::rootfs::shared()?)
        .arg(id);
    Ok(command)
}

/// `x-manager upgrade`, not yet run.
pub fn upgrade(daemon: &Daemon) -> Result<Command> {
    let mut command = Command::new(binary()?);
    command.arg("--state").arg(daemon.folder().join("state")).arg("upgrade");
    Ok(command)
}

/// Replaces the daemon by another process of the same program, and returns its pid.
pub async fn upgraded(daemon: &Daemon) -> Result<i32> {
    let mut command = tokio::process::Command::from(upgrade(daemon)?);
    let output = command.output().await?;
    ensure!(output.status.success(), "{}\n{}", output_text(&output), daemon.log());
    let pid = output_text(&output).split(' ').nth(1).and_then(|pid| pid.parse().ok()).with_context(|| output_text(&output))?;
    daemon.is_succeeded_by(pid).await?;
    Ok(pid)
}

/// An x-manager with a folder and a configuration file of its own.
#[derive(Debug)]
pub struct Own {
    folder: PathBuf,
    process: Option<Child>,
}

impl Own {
    /// One that has not been started. `settings` are lines that follow those about its places.
    pub fn new(folder: &Path, settings: &str) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let own = Self { folder: folder.to_owned(), process: None };
        own.configure(settings)?;
        Ok(own)
    }

    /// Replaces its configuration.
    pub fn configure(&self, settings: &str) -> Result<()> {
        let folder = self.folder.display();
        let text = format!("root = \"{folder}/root\"\nstate = \"{folder}/state\"\naddress = \"{folder}/x.sock\"\n{settings}");
        Ok(fs::write(self.folder.join("config.toml"), text)?)
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The socket of its API.
    pub fn address(&self) -> PathBuf {
        self.folder.join("x.sock")
    }

    /// Everything that it and its successors have logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// One of its commands; without arguments it serves.
    pub fn command(&self, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(binary()?);
        command.arg("--config").arg(self.folder.join("config.toml")).args(words);
        Ok(command)
    }

    /// Starts it and waits until it answers.
    pub async fn start(&mut self) -> Result<Client> {
        self.start_as(self.command(&[])?).await
    }

    /// The same by this command.
    pub async fn start_as(&mut self, mut command: Command) -> Result<Client> {
        let log = File::options().create(true).append(true).open(self.folder.join("log"))?;
        let child = command.stdout(Stdio::null()).stderr(log).spawn()?;
        isolation::keep(child.id());
        self.process = Some(child);
        eventually("x-manager answers", SOON, async || self.client().await).await.with_context(|| self.log())
    }

    /// A client on a new connection, that has called once.
    pub async fn client(&self) -> Result<Client> {
        let client = Client::connect(&self.address(), "default").await?;
        client.version().await?;
        Ok(client)
    }

    /// Its pid, or that of its first process.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Child::id)
    }

    /// Kills its first process, if that runs.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.process.take() {
            child.kill()?;
            child.wait()?;
            isolation::forget(child.id());
        }
        Ok(())
    }

    /// Waits until its first process exits and returns whether that was a success.
    pub async fn ended(&mut self) -> Result<bool> {
        let Some(child) = &mut self.process else { bail!("it does not run") };
        let status = eventually("it has ended", Duration::from_secs(20), async || child.try_wait()?.context("it runs")).await?;
        isolation::forget(child.id());
        self.process = None;
        Ok(status.success())
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if let Some(mut child) = self.process.take() {
            let _it_may_have_ended = child.kill();
            let _ = child.wait();
            isolation::forget(child.id());
        }
        let folder = format!("{}/", self.folder.display());
        proc::all().into_keys().filter(|pid| *pid != 1 && proc::mentions(*pid, &folder)).for_each(proc::kill_hard);
    }
}
