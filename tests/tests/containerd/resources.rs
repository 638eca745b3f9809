//! Pause, kill, update, statistics, and OOM kills.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use containerd_client::types::v1::Status as Phase;
use containerd_shim_protos::cgroups_v2::metrics::Metrics as MetricsV2;
use prost::Message as _;
use serde_json::json;
use shim_tests::cgroups::{self, Version};
use shim_tests::container::{Container, Stdio};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::isolation;
use shim_tests::messages::{METRICS_V1, METRICS_V2, MetricsV1, RESOURCES, any_json};
use shim_tests::runner::needs_controller;
use shim_tests::times::repeated;

const LIMIT: u64 = 64 << 20;

pub(crate) async fn a_paused_container_is_frozen_and_resumes(cx: Context) -> Result<()> {
    let events = cx.events().await?;
    let script = "while read line; do echo got $line; done; exit 3";
    let container = cx.container(&["sh", "-c", script]).stdio(Stdio::ALL).start().await?;
    let mut stdin = container.io.stdin().await?;
    stdin.write_all(b"one\n")?;
    container.io.out().until("got one").await?;
    cx.client().pause(&container.id).await?;
    ensure!(container.state().await?.status() == Phase::Paused);
    stdin.write_all(b"two\n")?;
    eventually("it is frozen", SOON, async || {
        ensure!(frozen(&container)?, "not frozen");
        Ok(())
    })
    .await?;
    cx.client().resume(&container.id).await?;
    container.io.out().until("got two").await?;
    ensure!(container.state().await?.status() == Phase::Running);
    drop(stdin);
    container.close_stdin().await?;
    ensure!(container.finish().await? == 3);
    let published = cx.history(&events, &container.id).await?;
    ensure!(published == ["create", "start", "paused", "resumed", "exit", "delete"], "{published:?}");
    Ok(())
}

fn frozen(container: &Container) -> Result<bool> {
    let folder = cgroups::of(container.pid, "freezer")?;
    match Version::here() {
        Version::V1 => Ok(fs::read_to_string(folder.join("freezer.state"))?.trim() == "FROZEN"),
        Version::V2 => Ok(fs::read_to_string(folder.join("cgroup.events"))?.lines().any(|line| line == "frozen 1")),
    }
}

pub(crate) async fn a_container_killed_while_paused_ends(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).start().await?;
    cx.client().pause(&container.id).await?;
    container.kill(9).await?;
    let client = cx.client();
    // containerd's clients resume a paused container after a kill; on cgroup v2 it is not even needed
    let _it_may_have_ended = client.resume(&container.id).await;
    ensure!(container.wait().await? == 137);
    ensure!(container.delete().await?.exit_status == 137);
    Ok(())
}

/// As by `runc pause`, or by a Pause or a dump that failed half-way; and as by the container itself, in a cgroup of its own below.
pub(crate) async fn a_container_frozen_by_others_dies_of_sigkill(cx: Context) -> Result<()> {
    for below in [false, true] {
        let container = cx.container(&["sleep", "1000"]).start().await?;
        let mut folder = cgroups::of(container.pid, "freezer")?;
        if below {
            folder.push("below");
            fs::create_dir(&folder)?;
            fs::write(folder.join("cgroup.procs"), container.pid.to_string())?;
        }
        cgroups::freeze(&folder)?;
        container.kill(9).await?;
        ensure!(container.wait().await? == 137);
        ensure!(container.delete().await?.exit_status == 137);
    }
    Ok(())
}

pub(crate) async fn an_exec_of_a_frozen_container_dies_of_sigkill_and_the_rest_stays_frozen(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let exec = container.exec("e", &["sleep", "1000"]).start().await?;
    cgroups::freeze(&cgroups::of(container.pid, "freezer")?)?;
    exec.kill(9).await?;
    ensure!(exec.finish().await? == 137);
    // cgroup v2 reports the rest as frozen again a moment after the process has exited
    eventually("the rest is frozen", SOON, async || {
        ensure!(frozen(&container)?, "it was thawed");
        Ok(())
    })
    .await?;
    ensure!(container.destroy().await? == 137);
    Ok(())
}

pub(crate) async fn kill_all_reaches_every_process(cx: Context) -> Result<()> {
    let script = "sleep 1000 & sleep 1000 & echo ready; wait";
    let container = cx.container(&["sh", "-c", script]).spec(|spec| spec.host_pids()).stdio(Stdio::OUTPUT);
    let container = container.start().await?;
    container.io.out().until("ready").await?;
    let exec = container.exec("e", &["sleep", "1000"]).start().await?;
    container.kill_all(9).await?;
    ensure!(exec.finish().await? == 137);
    ensure!(container.finish().await? == 137);
    Ok(())
}

pub(crate) async fn statistics_are_reported_until_delete(cx: Context) -> Result<()> {
    needs_controller("memory")?;
    let spec = |spec: shim_tests::spec::Spec| spec.memory_limit(LIMIT);
    let container = cx.container(&["sh", "-c", "echo up; read go"]).spec(spec).stdio(Stdio::ALL).start().await?;
    container.io.out().until("up").await?;
    let measured = measure(&cx, &container).await?;
    ensure!(measured.pids == 1 && measured.memory_limit_bytes == LIMIT && measured.cpu_is_counted, "{measured:?}");
    container.io.stdin().await?.write_all(b"go\n")?;
    container.wait().await?;
    if cx.shim().is_ours() {
        cx.client().metrics(&container.id).await.context("after the exit")?;
    }
    container.delete().await?;
    Ok(())
}

/// The figures in statistics of either type.
#[derive(Debug)]
struct Measured {
    pids: u64,
    memory_limit_bytes: u64,
    cpu_is_counted: bool,
}

async fn measure(cx: &Context, container: &Container) -> Result<Measured> {
    let data = cx.client().metrics(&container.id).await?.data.context("no data")?;
    if Version::here() == Version::V2 {
        ensure!(data.type_url.ends_with(METRICS_V2), "{}", data.type_url);
        let metrics = <MetricsV2 as protobuf::Message>::parse_from_bytes(&data.value)?;
        let (pids, memory_limit_bytes) = (metrics.pids.current, metrics.memory.usage_limit);
        return Ok(Measured { pids, memory_limit_bytes, cpu_is_counted: metrics.cpu.usage_usec > 0 });
    }
    ensure!(data.type_url.ends_with(METRICS_V1), "{}", data.type_url);
    let metrics = MetricsV1::decode(&data.value[..])?;
    let memory = metrics.memory.and_then(|memory| memory.usage).context("no memory")?;
    let cpu = metrics.cpu.and_then(|cpu| cpu.usage).context("no processor time")?;
    let pids = metrics.pids.context("no pids")?.current;
    Ok(Measured { pids, memory_limit_bytes: memory.limit, cpu_is_counted: cpu.total > 0 })
}

pub(crate) async fn an_update_changes_the_limit(cx: Context) -> Result<()> {
    needs_controller("memory")?;
    let container = cx.container(&["sleep", "1000"]).spec(|spec| spec.memory_limit(LIMIT)).start().await?;
    let resources = any_json(RESOURCES, &json!({ "memory": { "limit": 2 * LIMIT } }));
    cx.client().update(&container.id, resources).await?;
    let file = if Version::here() == Version::V2 { "memory.max" } else { "memory.limit_in_bytes" };
    let found = fs::read_to_string(cgroups::of(container.pid, "memory")?.join(file))?;
    ensure!(found.trim() == (2 * LIMIT).to_string(), "{found}");
    let measured = measure(&cx, &container).await?;
    ensure!(measured.memory_limit_bytes == 2 * LIMIT, "{measured:?}");
    container.destroy().await?;
    Ok(())
}

pub(crate) async fn an_oom_kill_is_published_before_the_exit(cx: Context) -> Result<()> {
    needs_controller("memory")?;
    let rounds = if cx.shim().is_ours() { repeated(10) } else { 1 };
    for _round in 0..rounds {
        let events = cx.events().await?;
        let container = cx.container(&["tail", "/dev/zero"]).spec(|spec| spec.memory_limit(16 << 20));
        let container = container.start().await?;
        ensure!(container.finish().await? == 137);
        let published = cx.history(&events, &container.id).await?;
        ensure!(published == ["create", "start", "oom", "exit", "delete"], "{published:?}");
    }
    Ok(())
}

pub(crate) async fn an_oom_kill_of_an_exec_is_published_too(cx: Context) -> Result<()> {
    needs_controller("memory")?;
    let events = cx.events().await?;
    let container = cx.container(&["sleep", "1000"]).spec(|spec| spec.memory_limit(16 << 20)).start().await?;
    ensure!(container.exec("e", &["tail", "/dev/zero"]).run().await? == 137);
    events.until("oom", |all| all.iter().any(|event| event.topic == "oom")).await?;
    container.destroy().await?;
    Ok(())
}

pub(crate) async fn cgroups_are_gone_after_delete(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let folder = cgroups::of(container.pid, "memory")?;
    ensure!(folder.is_dir() && folder.display().to_string().contains(&isolation::cgroup()), "{}", folder.display());
    container.destroy().await?;
    ensure!(!folder.exists(), "{} is left", folder.display());
    Ok(())
}
