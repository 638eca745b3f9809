//! `xctl` in a test's namespace, with folders of the test's own.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shim_tests::context::Context;
use shim_tests::operator::output_text;
use shim_tests::{isolation, rootfs, suite};
use tokio::io::{AsyncBufReadExt as _, BufReader};

/// `xctl` for a test.
pub(crate) struct Xctl<'a> {
    pub(crate) cx: &'a Context,
    program: PathBuf,
}

/// An `xctl` beside the test, killed when the test is over. Waiting for it is bounded by the deadline of the whole test.
pub(crate) struct Child {
    process: tokio::process::Child,
    /// Its standard input, if it is piped.
    pub(crate) stdin: Option<tokio::process::ChildStdin>,
    lines: Option<tokio::io::Lines<BufReader<tokio::process::ChildStdout>>>,
}

impl Child {
    /// With pipes.
    pub(crate) fn piped(command: &Command) -> Result<Self> {
        Self::spawn(command, Stdio::piped(), Stdio::piped(), Stdio::inherit())
    }

    /// With these.
    pub(crate) fn spawn(command: &Command, stdin: Stdio, stdout: Stdio, stderr: Stdio) -> Result<Self> {
        // without the deadline of its own, which would get the signals
        let mut words = command.get_args().skip(1);
        let mut child = tokio::process::Command::new(words.next().context("a program")?);
        child.args(words).env_remove("CONTAINERD_ADDRESS").env_remove("CONTAINERD_NAMESPACE");
        let mut process = child.stdin(stdin).stdout(stdout).stderr(stderr).kill_on_drop(true).spawn()?;
        let lines = process.stdout.take().map(|stdout| BufReader::new(stdout).lines());
        Ok(Self { stdin: process.stdin.take(), lines, process })
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.process.id().context("it runs")?.cast_signed()), signal)?)
    }

    /// Its next line.
    pub(crate) async fn line(&mut self) -> Result<String> {
        self.lines.as_mut().context("its output is piped")?.next_line().await?.context("its output has ended")
    }

    /// Reads its output no more.
    pub(crate) fn deafen(&mut self) {
        self.lines = None;
    }

    /// Its status.
    pub(crate) async fn status(&mut self) -> Result<i32> {
        self.process.wait().await?.code().context("it was killed")
    }
}

impl<'a> Xctl<'a> {
    pub(crate) fn new(cx: &'a Context) -> Result<Self> {
        Ok(Self { cx, program: suite::xctl()? })
    }

    /// The folder of its logs.
    pub(crate) fn logs(&self) -> PathBuf {
        self.cx.folder().join("logs")
    }

    /// A command with a deadline, not yet run.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.arg("50").arg(&self.program);
        command.env_remove("CONTAINERD_ADDRESS").env_remove("CONTAINERD_NAMESPACE").env("LENT", "borrowed");
        command.arg("--address").arg(self.cx.daemon().address()).args(["--namespace", self.cx.client().namespace()]);
        command.arg("--state").arg(self.cx.folder().join("state")).arg("--logs").arg(self.logs());
        command.args(words).stdin(Stdio::null());
        command
    }

    /// `run` or `create` of busybox from disk, up to the program.
    pub(crate) fn container(&self, verb: &str, flags: &[&str], program: &[&str]) -> Result<Command> {
        let mut command = self.command(&[verb]);
        command.arg("--rootfs").arg(rootfs::shared()?).args(self.place()).args(flags).args(program);
        Ok(command)
    }

    /// Where the test's containers are.
    pub(crate) fn place(&self) -> Vec<String> {
        let parent = format!("/{}/{}", isolation::cgroup(), self.cx.client().namespace());
        ["--runtime", &self.cx.shim().runtime_type, "--cgroup-parent", &parent].map(str::to_owned).to_vec()
    }

    /// Runs a container.
    pub(crate) fn run(&self, flags: &[&str], program: &[&str]) -> Result<Output> {
        self.container("run", flags, program)?.output().context("run xctl")
    }

    /// What a command prints, if it succeeds.
    pub(crate) fn prints(&self, words: &[&str]) -> Result<String> {
        let output = self.command(words).output().context("run xctl")?;
        ensure!(output.status.success(), "{words:?}: {}: {}", output.status, output_text(&output));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The status and what is printed of a command that fails.
    pub(crate) fn fails(&self, words: &[&str]) -> Result<(i32, String)> {
        let output = self.command(words).output().context("run xctl")?;
        ensure!(!output.status.success(), "{words:?} succeeds: {}", output_text(&output));
        Ok((output.status.code().unwrap_or(-1), output_text(&output)))
    }

    /// Nothing is left of any container, neither of the daemon's nor of `xctl`'s own.
    pub(crate) async fn leaves_nothing(&self) -> Result<()> {
        ensure!(self.prints(&["ps", "--all", "--quiet"])?.is_empty());
        let namespace = self.cx.client().namespace();
        for folder in [self.cx.folder().join("state").join(namespace), self.logs().join(namespace)] {
            let left: Vec<_> = std::fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
            ensure!(left.is_empty(), "{left:?}");
        }
        self.cx.leaves_nothing().await
    }
}
