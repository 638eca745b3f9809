//! Checkpoints by the shim's own engine with a criu that the test plays: what happens to the container meanwhile, and what does not block.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use shim_tests::bundle::Container;
use shim_tests::eventually::{SOON, eventually_true};
use shim_tests::stand::Stand;
use shim_tests::ttrpc::{Answer, Code, refusal};
use shim_tests::{cgroups, programs};

/// A container of a shim that finds this criu.
async fn container(stand: &Stand, id: &str, criu: &str) -> Result<Container> {
    let folder = stand.folder().join(format!("criu-{id}"));
    fs::create_dir_all(&folder)?;
    programs::script(&folder, "criu", &format!("#!/bin/sh\n{criu}\n"))?;
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", folder.display());
    stand.bundle(id, &["sleep", "1000"]).runtime(Path::new("native")).env("PATH", &path).run().await
}

async fn checkpoint(container: &Container, image: &Path) -> Answer<api::Empty> {
    let request = api::CheckpointTaskRequest { id: container.id.clone(), path: image.display().to_string(), ..Default::default() };
    container.task.call("Checkpoint", &request, SOON * 3).await
}

fn is_frozen(container: &Container) -> Result<bool> {
    let folder = cgroups::of(container.pid, "freezer")?;
    Ok(match fs::read_to_string(folder.join("freezer.state")) {
        Ok(state) => state.trim() != "THAWED",
        Err(_) => fs::read_to_string(folder.join("cgroup.freeze"))?.trim() == "1",
    })
}

/// Whatever criu has found, and left.
pub(crate) async fn what_is_paused_or_resumed_during_a_checkpoint_stays_so(stand: Stand) -> Result<()> {
    let (started, go) = (stand.folder().join("started"), stand.folder().join("go"));
    mkfifo(&go, Mode::S_IRWXU)?;
    let criu = format!(": > {}; read line < {}; exit 3", started.display(), go.display());
    let container = container(&stand, "c1", &criu).await?;
    for is_paused in [true, false] {
        let change = async {
            eventually_true("criu runs", SOON, || started.exists()).await?;
            let (code, message) = refusal(checkpoint(&container, &stand.folder().join("other")).await)?;
            ensure!(code == Code::FailedPrecondition && message.contains("another checkpoint"), "{code:?} {message}");
            if is_paused {
                container.task.pause("c1").await?
            } else {
                container.task.resume("c1").await?
            }
            fs::remove_file(&started)?;
            fs::write(&go, "go\n").context("criu does not wait")
        };
        let image = stand.folder().join("image");
        let (saved, changed) = tokio::join!(checkpoint(&container, &image), change);
        changed?;
        let (_, message) = refusal(saved)?;
        ensure!(message.contains("criu has exited"), "{message}");
        ensure!(is_frozen(&container)? == is_paused, "paused: {is_paused}, frozen: {}", !is_paused);
    }
    container.shut_down().await.map(drop)
}

/// The folders are a client's: others may write there.
pub(crate) async fn pipes_in_place_of_the_files_of_a_checkpoint_do_not_block(stand: Stand) -> Result<()> {
    let container = container(&stand, "c1", "exit 3").await?;
    let image = stand.folder().join("image");
    fs::create_dir_all(&image)?;
    let descriptors = image.join("descriptors.json");
    mkfifo(&descriptors, Mode::S_IRWXU)?;
    let (_, message) = refusal(checkpoint(&container, &image).await)?;
    ensure!(message.contains("descriptors.json: no such device or address"), "{message}");
    fs::remove_file(&descriptors)?;
    let log = container.bundle.folder.join("criu-work/dump.log");
    fs::create_dir_all(log.parent().context("a folder")?)?;
    mkfifo(&log, Mode::S_IRWXU)?;
    let worker = container.worker_pid().await?;
    let (_, message) = refusal(checkpoint(&container, &image).await)?;
    ensure!(message.contains("criu has exited"), "{message}");
    ensure!(container.worker_pid().await? == worker, "the worker was replaced");
    container.shut_down().await.map(drop)
}
