//! `xctl` in a test's namespace, with folders of the test's own.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shim_tests::context::Context;
use shim_tests::operator::output_text;
use shim_tests::{isolation, rootfs, suite};

/// `xctl` for a test.
pub(crate) struct Xctl<'a> {
    pub(crate) cx: &'a Context,
    program: PathBuf,
}

/// A program that is killed when the test is over.
pub(crate) struct Child(pub(crate) std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        let _it_may_have_ended = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Child {
    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.0.id().cast_signed()), signal)?)
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

    /// A command, not yet run.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
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
