//! A disk on which writes hang for a while.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio as Io};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::GetContainerRequest;
use nix::mount::{MntFlags, umount2};
use shim_tests::container::Stdio;
use shim_tests::context::Context;
use shim_tests::operator::printed;

/// A file system of its own, in a file.
struct Disk(PathBuf);

impl Disk {
    fn mount(file: &Path, at: &Path) -> Result<Self> {
        std::fs::File::create(file)?.set_len(32 << 20)?;
        printed(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(file))?;
        printed(Command::new("mount").args(["-o", "loop"]).arg(file).arg(at))?;
        Ok(Self(at.to_owned()))
    }

    /// Blocks every write to it for as long as the result is kept.
    fn freeze(&self) -> Result<Frozen> {
        printed(Command::new("fsfreeze").arg("--freeze").arg(&self.0))?;
        // a separate process, so that it thaws even if this one is killed
        let mut thaws = Command::new("sh");
        let thaws = thaws.args(["-c", "read end; exec fsfreeze --unfreeze \"$0\""]).arg(&self.0).stdin(Io::piped()).spawn();
        if thaws.is_err() {
            printed(Command::new("fsfreeze").arg("--unfreeze").arg(&self.0))?;
        }
        Ok(Frozen(thaws?))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _it_goes_with_the_namespace = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

struct Frozen(Child);

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Some(mut end) = self.0.stdin.take() {
            let _its_end_is_enough = end.write_all(b"\n");
        }
        let _ = self.0.wait();
    }
}

async fn soon<T>(what: &str, answer: impl Future<Output = Result<T, impl Into<anyhow::Error>>>) -> Result<T> {
    let answer = tokio::time::timeout(Duration::from_secs(10), answer).await.with_context(|| format!("{what} waits for the disk"))?;
    answer.map_err(Into::into).context(what.to_owned())
}

pub(crate) async fn task_calls_work_while_the_disk_of_the_store_is_frozen(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    cx.daemon().stop()?;
    let root = cx.daemon().folder().join("root");
    std::fs::rename(&root, cx.folder().join("root"))?;
    std::fs::create_dir(&root)?;
    let disk = Disk::mount(&cx.folder().join("disk"), &root)?;
    cx.revive_daemon().await?;
    let result = on_a_frozen_disk(&cx, &disk).await;
    cx.daemon().stop()?;
    result
}

async fn on_a_frozen_disk(cx: &Context, disk: &Disk) -> Result<()> {
    let client = cx.client();
    let container = cx.container(&["sleep", "1000"]).id("c").start().await?;
    client.label("c", &[("a", "b")]).await?;
    let frozen = disk.freeze()?;
    let (other, label) = (client.clone(), [("a", "c")]);
    let mut written = tokio::spawn(async move { other.label("c", &label).await });
    // one call that waits for the disk, and others queued behind it
    for round in 0..3 {
        let exec = format!("e{round}");
        let exec = container.exec(&exec, &["echo", "out"]).stdio(Stdio::OUTPUT);
        let exec = soon("Exec", exec.add()).await?;
        soon("Start of an exec", exec.start()).await?;
        ensure!(soon("Wait for an exec", exec.wait()).await? == 0);
        soon("Delete of an exec", exec.delete()).await?;
        soon("State", container.state()).await?;
        ensure!(soon("List", client.list()).await?.len() == 1);
        soon("Metrics", client.metrics("c")).await?;
        soon("Pids", client.pids("c")).await?;
        let get = client.request(GetContainerRequest { id: "c".to_owned() });
        let found = soon("Get of the container", client.api().containers().get(get)).await?.into_inner().container.unwrap_or_default();
        ensure!(found.labels.get("a").is_some_and(|label| label == "b"), "{found:?}");
    }
    soon("Kill", container.kill(9)).await?;
    ensure!(soon("Wait", container.wait()).await? == 137);
    ensure!(tokio::time::timeout(Duration::ZERO, &mut written).await.is_err(), "a durable write waits for the disk");
    drop(frozen);
    soon("a write", written).await??;
    container.delete().await?;
    container.remove().await?;
    cx.leaves_nothing().await
}
