//! A worker with nothing to do hibernates; the keeper starts one when a call or an exit needs it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_client::types::v1::Status as Phase;
use shim_tests::builds;
use shim_tests::cgroups::Own;
use shim_tests::container::Stdio;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::proc;

/// The shortest idle time that can be configured.
const IDLE_TIME: (&str, &str) = ("X_SHIM_IDLE_SECONDS", "5");

pub(crate) async fn a_request_an_exit_or_an_event_starts_a_hibernating_worker(cx: Context) -> Result<()> {
    let cx = cx.with_own_shim(cx.shim(), &[IDLE_TIME]).await?;
    let events = cx.events().await?;
    let script = "read go; (tail /dev/zero); read go; exit 3";
    let container = cx.container(&["sh", "-c", script]).spec(|spec| spec.memory_limit(16 << 20)).stdio(Stdio::ALL).start().await?;
    let (client, id) = (cx.client().clone(), container.id.clone());
    let wait = tokio::spawn(async move { client.wait_for_ever(&id, "").await });
    builds::hibernates(&cx, &container.id).await?;
    // the keeper answers what it knows without a worker
    let state = container.state().await?;
    ensure!(state.pid == container.pid && state.status() == Phase::Running, "{state:?}");
    builds::hibernates(&cx, &container.id).await?;

    ensure!(container.exec("e", &["sh", "-c", "exit 4"]).run().await? == 4);
    builds::hibernates(&cx, &container.id).await?;

    let mut stdin = container.io.stdin().await?;
    stdin.write_all(b"go\n")?;
    events.until("oom", |all| all.iter().any(|event| event.topic == "oom")).await?;
    builds::hibernates(&cx, &container.id).await?;

    stdin.write_all(b"go\n")?;
    let waited = tokio::time::timeout(SOON, wait).await.context("no worker answers the Wait")???;
    ensure!(waited.into_inner().exit_status == 3);
    ensure!(container.finish().await? == 3);
    let published = cx.history(&events, &container.id).await?;
    ensure!(published == ["create", "start", "exec-added(e)", "exec-started(e)", "exit(e)", "oom", "exit", "delete"], "{published:?}");
    cx.leaves_nothing().await
}

pub(crate) async fn a_shim_with_a_hibernating_worker_is_upgraded_and_survives_its_daemon(cx: Context) -> Result<()> {
    let shim = shim_tests::suite::Shim { binary: Some(crate::build(&cx, "first", "build=old")?), ..cx.shim().clone() };
    let cx = cx.with_own_shim(&shim, &[IDLE_TIME]).await?;
    let container = cx.container(&["sh", "-c", "read go; exit 3"]).stdio(Stdio::ALL).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    // of a file system in memory, as this build's is, pages count as shared memory
    let mapped_kib = || -> Result<u64> {
        let kib = |name| anyhow::Ok(shim_tests::proc::status_field(keeper, name)?.trim_end_matches(" kB").parse::<u64>()?);
        Ok(kib("RssFile")? + kib("RssShmem")?)
    };
    ensure!(container.exec("e", &["sh", "-c", "exit 4"]).run().await? == 4);
    let awake = mapped_kib()?;
    builds::hibernates(&cx, &container.id).await?;
    eventually("the keeper unmaps its executable", SOON, async || {
        let asleep = mapped_kib()?;
        ensure!(asleep < awake / 2, "{asleep} KiB are mapped, of {awake}");
        Ok(())
    })
    .await?;
    cx.crash_daemon().await?;
    ensure!(container.state().await?.pid == container.pid);
    builds::hibernates(&cx, &container.id).await?;
    let program = crate::build(&cx, "new", "build=new")?;
    builds::upgrade(&cx, &program, &["--all"]).await?.is_done()?;
    builds::hibernates(&cx, &container.id).await?;
    container.io.stdin().await?.write_all(b"go\n")?;
    ensure!(container.finish().await? == 3);
    cx.leaves_nothing().await
}

/// A worker cannot be started then: a keeper in a cgroup without room for one more process.
pub(crate) async fn containers_are_stopped_while_the_host_has_no_pids_for_a_worker(cx: Context) -> Result<()> {
    let cx = cx.with_own_shim(cx.shim(), &[IDLE_TIME]).await?;
    let events = cx.events().await?;
    let script = "trap 'exit 3' TERM; echo ready; read never";
    let polite = cx.container(&["sh", "-c", script]).stdio(Stdio::ALL).start().await?;
    let plain = cx.container(&["sleep", "1000"]).start().await?;
    let shared = cx.container(&["sleep", "1000"]).spec(|spec| spec.host_pids()).start().await?;
    polite.io.out().until("ready\n").await?;
    let full = Own::with(&format!("{}-full", cx.client().namespace()), "pids.max", "max")?;
    let all = [(&polite, 15, false, 3), (&plain, 9, true, 137), (&shared, 9, false, 137)];
    for (container, ..) in all {
        builds::hibernates(&cx, &container.id).await?;
        full.take(cx.shim_pid(&container.id)?)?;
    }
    full.set("pids.max", full.get("pids.current")?.trim())?;
    for (container, signal, to_all, _) in all {
        let state = container.state().await?;
        ensure!(state.pid == container.pid && state.status() == Phase::Running, "{state:?}");
        let pid = container.pid.cast_signed();
        let kill = cx.client().kill(&container.id, "", signal, to_all);
        tokio::time::timeout(SOON, kill).await.context("no worker answers Kill")??;
        eventually_true("it has exited", SOON, || !proc::is_alive(pid)).await?;
    }
    let refused: u64 = full.get("pids.events")?.trim().trim_start_matches("max ").parse()?;
    ensure!(refused > 0, "no worker was refused");
    full.set("pids.max", "max")?;
    for (container, .., status) in all {
        ensure!(container.finish().await? == status);
        let published = cx.history(&events, &container.id).await?;
        ensure!(published == ["create", "start", "exit", "delete"], "{published:?}");
    }
    full.emptied().await?;
    cx.leaves_nothing().await
}

/// The bytes of a file go through the worker.
pub(crate) async fn a_worker_that_copies_outputs_does_not_hibernate(cx: Context) -> Result<()> {
    let cx = cx.with_own_shim(cx.shim(), &[IDLE_TIME]).await?;
    let path = cx.folder().join("log");
    let stdio = Stdio::uri(format!("file://{}", path.display()));
    let container = cx.container(&["sh", "-c", "while :; do echo tick; sleep 1; done"]).stdio(stdio).start().await?;
    let program: PathBuf = cx.shim().binary.clone().context("ours")?;
    let ticks = || std::fs::read_to_string(&path).unwrap_or_default().lines().count();
    eventually("ten lines within twice the idle time", Duration::from_secs(30), async || {
        let shim = builds::ps(&cx, &program).await?.remove(0);
        ensure!(shim["worker_asleep"] == false && shim["worker_generation"] == 1, "{shim:#}");
        ensure!(ticks() >= 10, "{} lines", ticks());
        Ok(())
    })
    .await?;
    ensure!(container.destroy().await? == 137);
    cx.leaves_nothing().await
}

/// A host has 128 of them by default, and may have more shims.
pub(crate) async fn a_keeper_takes_an_inotify_instance_only_while_output_waits_for_its_reader(cx: Context) -> Result<()> {
    let container = cx.container(&["sh", "-c", "read go; echo left; exit 3"]);
    let mut container = container.stdio(Stdio::Fifos { stdin: true, pace: None }).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    let instances = || -> Result<usize> {
        let files = shim_tests::proc::open_files(keeper)?;
        Ok(files.values().filter(|target| target.display().to_string().contains("inotify")).count())
    };
    ensure!(instances()? == 0, "{:?}", shim_tests::proc::open_files(keeper)?);
    container.io.stdin().await?.write_all(b"go\n")?;
    ensure!(container.wait().await? == 3);
    let is = |wanted: usize| async move {
        eventually(format!("{wanted} instances"), SOON, async || {
            let found = instances()?;
            ensure!(found == wanted, "{found}");
            Ok(())
        })
        .await
    };
    is(1).await?;
    container.io_mut().read(shim_tests::stdio::Pace::Keep)?;
    ensure!(container.io.out().to_end().await? == "left\n");
    is(0).await?;
    container.delete().await?;
    cx.leaves_nothing().await
}
