//! Pause, limits, statistics, OOM kills, checkpoints.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::cgroups_v2::metrics::Metrics as MetricsV2;
use protobuf::Message as _;
use serde_json::json;

use super::{Streams, sleeper, text};
use crate::bundle::leave;
use crate::cgroups::{self, Version};
use crate::clauses;
use crate::conformance::{Case, Need};
use crate::eventually::{SOON, eventually};
use crate::messages::{METRICS_V1, METRICS_V2, MetricsV1};
use crate::proc;
use crate::runner::skip;
use crate::stand::Stand;
use crate::times::repeated;

const LIMIT: u64 = 64 << 20;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = clauses![resources:
        "R1" => a_paused_container_is_frozen_and_resumes;
        "R2" => a_container_killed_while_paused_ends;
        "R4" => statistics_are_reported_until_delete;
        "R7" => cgroups_are_gone_after_delete;
    ];
    let limited = clauses![resources:
        "R3" => statistics_match_the_hosts_cgroup_version;
        "R5" => an_update_changes_the_limit;
        "R6" => an_oom_kill_is_published_before_the_exit, an_oom_kill_of_an_exec_is_published;
    ];
    cases.extend(limited.into_iter().map(|case| case.needs(&[Need::Controller("memory")])));
    cases.extend(clauses![resources: "R8" => a_checkpoint_is_written].into_iter().map(|case| case.needs(&[Need::Criu])));
    cases
}

async fn a_paused_container_is_frozen_and_resumes(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let script = "while read line; do echo got $line; done; exit 3";
    let container = streams.all(stand.bundle("c1", &["sh", "-c", script])).run().await?;
    let mut stdin = streams.writer().await?;
    stdin.write_all(b"one\n")?;
    streams.out.until("got one").await?;
    container.task.pause("c1").await?;
    ensure!(container.task.state("c1", "").await?.status.value() == 4, "State does not report it as paused");
    let folder = cgroups::of(container.pid, "freezer")?;
    // some runtimes do not wait for the kernel
    eventually("it is frozen", SOON, async || {
        let frozen = fs::read_to_string(folder.join("freezer.state")).map(|state| state.trim() == "FROZEN");
        let frozen = frozen.or_else(|_| fs::read_to_string(folder.join("cgroup.events")).map(|events| events.contains("frozen 1")));
        ensure!(frozen?, "not yet");
        Ok(())
    })
    .await?;
    stdin.write_all(b"two\n")?;
    container.task.resume("c1").await?;
    streams.out.until("got two").await?;
    ensure!(container.task.state("c1", "").await?.status.value() == 2, "State does not report it as running");
    drop(stdin);
    container.task.close_stdin("c1", "").await?;
    ensure!(container.finish().await? == 3);
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn a_container_killed_while_paused_ends(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    container.task.pause("c1").await?;
    container.task.kill("c1", "", 9).await?;
    // containerd's clients resume a paused container after a kill; on cgroup v2 it is not even needed
    let _it_may_have_ended = container.task.resume("c1").await;
    ensure!(container.finish().await? == 137);
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn statistics_match_the_hosts_cgroup_version(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).spec(|spec| spec.memory_limit(LIMIT)).run().await?;
    // after Start, init may still be the OCI runtime, with its threads
    eventually("statistics are true", SOON, async || are_true(&container.task.stats("c1").await?)).await?;
    container.shut_down().await.map(drop)
}

/// Of one process with a limit of its memory.
fn are_true(answer: &api::StatsResponse) -> Result<()> {
    let stats = answer.stats.as_ref().context("an answer without statistics")?;
    if Version::here() == Version::V2 {
        ensure!(stats.type_url.ends_with(METRICS_V2), "{}", stats.type_url);
        let metrics = MetricsV2::parse_from_bytes(&stats.value)?;
        ensure!(metrics.memory.usage_limit == LIMIT && metrics.memory.usage > 0, "{metrics}");
        ensure!(metrics.pids.current == 1 && metrics.cpu.usage_usec > 0, "{metrics}");
    } else {
        ensure!(stats.type_url.ends_with(METRICS_V1), "{}", stats.type_url);
        let metrics = <MetricsV1 as prost::Message>::decode(&stats.value[..])?;
        ensure!(metrics.pids.as_ref().is_some_and(|pids| pids.current == 1), "{metrics:?}");
        ensure!(metrics.memory.as_ref().and_then(|memory| memory.usage.as_ref()).is_some_and(|usage| usage.limit == LIMIT), "{metrics:?}");
        ensure!(metrics.cpu.as_ref().and_then(|cpu| cpu.usage.as_ref()).is_some_and(|usage| usage.total > 0), "{metrics:?}");
    }
    Ok(())
}

async fn statistics_are_reported_until_delete(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    container.task.kill("c1", "", 9).await?;
    container.task.wait("c1", "").await?;
    container.task.stats("c1").await.context("after the exit")?;
    ensure!(container.finish().await? == 137);
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn an_update_changes_the_limit(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).spec(|spec| spec.memory_limit(LIMIT)).run().await?;
    container.task.update("c1", &json!({ "memory": { "limit": 2 * LIMIT } })).await?;
    let folder = cgroups::of(container.pid, "memory")?;
    let found = ["memory.limit_in_bytes", "memory.max"].iter().find_map(|file| fs::read_to_string(folder.join(file)).ok());
    ensure!(found.as_deref().map(str::trim) == Some((2 * LIMIT).to_string().as_str()), "{found:?}");
    container.shut_down().await.map(drop)
}

async fn an_oom_kill_is_published_before_the_exit(stand: Stand) -> Result<()> {
    let anchor = stand.bundle("anchor", &["sleep", "1000"]).group("pod").run().await?;
    for round in 0..repeated(10) {
        let id = format!("c{round}");
        let bundle = stand.bundle(&id, &["tail", "/dev/zero"]).group("pod").spec(|spec| spec.memory_limit(16 << 20));
        let container = bundle.run_in(&anchor.task).await?;
        ensure!(container.finish().await? == 137);
        let mut published = stand.containerd().events().of_until(&id, "delete").await?;
        // one for each process that was killed
        published.dedup();
        ensure!(published == ["create", "start", "oom", "exit", "delete"], "round {round}: {published:?}");
    }
    anchor.shut_down().await.map(drop)
}

async fn an_oom_kill_of_an_exec_is_published(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).spec(|spec| spec.memory_limit(16 << 20)).run().await?;
    ensure!(container.run("e", &["tail", "/dev/zero"]).await? == 137);
    stand.containerd().events().until("oom", |all| all.iter().any(|event| event.topic == "oom")).await?;
    container.shut_down().await.map(drop)
}

async fn cgroups_are_gone_after_delete(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    let folder = cgroups::of(container.pid, "memory")?;
    ensure!(container.shut_down().await? == 137);
    ensure!(!folder.exists(), "{} is left", folder.display());
    Ok(())
}

async fn a_checkpoint_is_written(stand: Stand) -> Result<()> {
    if !stand.is_native() {
        let help = Command::new(stand.runtime_program()?).args(["checkpoint", "--help"]).output()?;
        if !help.status.success() {
            return skip("the OCI runtime has no checkpoint");
        }
    }
    let container = sleeper(&stand, "c1").await?;
    let image = stand.folder().join("image");
    fs::create_dir(&image)?;
    let request = api::CheckpointTaskRequest { id: "c1".to_owned(), path: text(&image), ..Default::default() };
    proc::executes(container.pid, "sleep").await?;
    container.task.call::<api::Empty>("Checkpoint", &request, SOON * 3).await?;
    ensure!(image.join("inventory.img").exists(), "no image in {}", image.display());
    eventually("the event is published", SOON, async || {
        ensure!(stand.containerd().events().of("c1").contains(&"checkpointed".to_owned()));
        Ok(())
    })
    .await?;
    // by default a checkpoint leaves the container running
    ensure!(proc::is_alive(container.pid.cast_signed()), "it has ended");
    container.shut_down().await.map(drop)
}
