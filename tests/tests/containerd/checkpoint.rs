//! Checkpoint and restore, where criu runs.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use shim_tests::container::{Container, Stdio};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::messages::{CheckpointOptions, RESOURCES, any, any_json};
use shim_tests::runner::{needs_checkpoint_images, needs_controller, needs_criu};
use shim_tests::suite::{Runtime, Suite};

/// Counts in a file of its own tmpfs, so that the count is a part of the checkpoint.
const COUNT: &str = "i=0; while :; do i=$((i+1)); echo $i > /tmp/i; sleep 0.05; done";

fn needs_checkpoints(cx: &Context) -> Result<()> {
    // Those of other suites come without.
    let suite = if cx.runtime() == Runtime::Native { Suite::Forky } else { cx.suite() };
    needs_criu(&suite.program("criu"))
}

/// How far a container has counted.
async fn count(container: &Container, exec: &str) -> Result<u32> {
    let exec = container.exec(exec, &["cat", "/tmp/i"]).stdio(Stdio::OUTPUT).start().await?;
    ensure!(exec.finish().await? == 0);
    let text = exec.io.out().to_end().await?;
    text.trim().parse().with_context(|| format!("{text:?}"))
}

async fn counted_to(container: &Container, goal: u32) -> Result<u32> {
    eventually(format!("a count of {goal}"), SOON, async || {
        let count = count(container, "c").await?;
        ensure!(count >= goal, "{count}");
        Ok(count)
    })
    .await
}

pub(crate) async fn a_container_is_restored_from_its_checkpoint(cx: Context) -> Result<()> {
    needs_checkpoint_images()?;
    // which criu wants to set as it was, even where it cannot be
    needs_controller("cpuset")?;
    needs_checkpoints(&cx)?;
    let container = cx.container(&["sh", "-c", COUNT]).id("saved").start().await?;
    let before = counted_to(&container, 20).await?;
    let options = CheckpointOptions { exit: true, ..CheckpointOptions::default() };
    let leased = cx.client().with_lease("checkpoint").await?;
    let descriptors = leased.checkpoint("saved", any(&options)).await?;
    let image = descriptors.into_iter().find(|found| found.media_type.contains("criu")).context("no checkpoint in the store")?;
    container.wait().await?;
    container.delete().await?;
    container.remove().await?;
    let restored = cx.container(&["sh", "-c", COUNT]).id("saved").restore(image).create().await?;
    restored.start().await?;
    let after = count(&restored, "after").await?;
    ensure!(after >= before, "counted to {before} before and to {after} after");
    counted_to(&restored, after + 5).await?;
    ensure!(restored.destroy().await? == 137);
    Ok(())
}

/// Images are the same for all: see `docs/engine.md`.
pub(crate) async fn a_checkpoint_is_restored_by_another_runtime(cx: Context) -> Result<()> {
    needs_checkpoint_images()?;
    needs_controller("cpuset")?;
    needs_checkpoints(&cx)?;
    let native = cx.suite().runtime(Runtime::Native);
    for (number, other) in Runtime::programs().into_iter().enumerate() {
        let other = cx.suite().runtime(other);
        for (way, from, to) in [("out", &native, &other), ("in", &other, &native)] {
            let id = format!("saved-{number}-{way}");
            let make = || cx.container(&["sh", "-c", COUNT]).id(&id);
            let container = make().runtime_binary(from).start().await?;
            let before = counted_to(&container, 20).await?;
            let leased = cx.client().with_lease(&id).await?;
            let options = any(&CheckpointOptions { exit: true, ..CheckpointOptions::default() });
            let descriptors = leased.checkpoint(&id, options).await?;
            let image = descriptors.into_iter().find(|found| found.media_type.contains("criu")).context("no checkpoint in the store")?;
            container.wait().await?;
            container.delete().await?;
            container.remove().await?;
            let restored = make().runtime_binary(to).restore(image).create().await?;
            restored.start().await.with_context(|| format!("{} to {}", from.display(), to.display()))?;
            counted_to(&restored, before + 5).await?;
            ensure!(restored.destroy().await? == 137);
        }
    }
    Ok(())
}

pub(crate) async fn a_restored_container_is_one_like_any_other(cx: Context) -> Result<()> {
    needs_checkpoint_images()?;
    needs_controller("cpuset")?;
    needs_checkpoints(&cx)?;
    let script = format!("trap 'echo ended; exit 7' TERM; {COUNT}");
    let make = || cx.container(&["sh", "-c", &script]).id("saved").stdio(Stdio::OUTPUT);
    let container = make().start().await?;
    counted_to(&container, 10).await?;
    let leased = cx.client().with_lease("saved").await?;
    let descriptors = leased.checkpoint("saved", any(&CheckpointOptions { exit: true, ..CheckpointOptions::default() })).await?;
    let image = descriptors.into_iter().find(|found| found.media_type.contains("criu")).context("no checkpoint in the store")?;
    container.wait().await?;
    container.delete().await?;
    container.remove().await?;
    let restored = make().restore(image).create().await?;
    restored.start().await?;
    counted_to(&restored, 12).await?;
    cx.client().pause("saved").await?;
    cx.client().resume("saved").await?;
    cx.client().update("saved", any_json(RESOURCES, &json!({ "memory": { "limit": 64 << 20 } }))).await?;
    ensure!(cx.client().pids("saved").await?.iter().any(|process| process.pid > 1));
    let before = count(&restored, "before").await?;
    restored.kill(15).await?;
    ensure!(restored.wait().await? == 7);
    ensure!(restored.io.out().to_end().await?.ends_with("ended\n"), "counted to {before}");
    restored.delete().await?;
    restored.remove().await?;
    Ok(())
}

pub(crate) async fn a_checkpoint_without_exit_disturbs_nothing(cx: Context) -> Result<()> {
    needs_checkpoints(&cx)?;
    let image = cx.folder().join("image");
    let work = cx.folder().join("work");
    std::fs::create_dir_all(&image)?;
    std::fs::create_dir_all(&work)?;
    let container = cx.container(&["sh", "-c", COUNT]).start().await?;
    let before = counted_to(&container, 2).await?;
    let options = CheckpointOptions { exit: false, image_path: image.display().to_string(), work_path: work.display().to_string() };
    cx.client().checkpoint(&container.id, any(&options)).await?;
    ensure!(image.join("inventory.img").exists(), "no image in {}", image.display());
    counted_to(&container, before + 5).await?;
    ensure!(container.destroy().await? == 137);
    Ok(())
}
