//! Containers with restart labels.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_client::types::v1::Status as Phase;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::operator::{ctr, ctr_run, printed};
use tonic::Code;

/// The deadline of restarts, with their pauses.
const LATER: Duration = Duration::from_secs(30);

fn run(cx: &Context, id: &str, labels: &[&str], script: &str) -> Result<()> {
    let mut flags = ["--detach", "--null-io"].map(str::to_owned).to_vec();
    flags.extend(labels.iter().flat_map(|label| ["--label".to_owned(), format!("containerd.io/restart.{label}")]));
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    printed(ctr_run(cx, id, &flags)?.args(["/bin/sh", "-c", script])).map(drop)
}

fn label(cx: &Context, id: &str, label: &str) -> Result<()> {
    printed(ctr(cx).args(["containers", "label", id]).arg(format!("containerd.io/restart.{label}"))).map(drop)
}

fn count(cx: &Context, id: &str) -> Result<u32> {
    let info: serde_json::Value = serde_json::from_str(&printed(ctr(cx).args(["containers", "info", id]))?)?;
    let count = info["Labels"]["containerd.io/restart.count"].as_str().unwrap_or("0");
    count.parse().with_context(|| count.to_owned())
}

async fn running(cx: &Context, id: &str, but: u32) -> Result<u32> {
    eventually(format!("{id} runs as another process than {but}"), LATER, async || {
        let state = cx.client().state(id, "").await?;
        ensure!(state.status() == Phase::Running && state.pid != but, "{state:?}");
        Ok(state.pid)
    })
    .await
}

async fn remove(cx: &Context, id: &str) -> Result<()> {
    label(cx, id, "status=stopped")?;
    eventually("it is stopped", SOON, async || match cx.client().state(id, "").await {
        Err(status) if status.code() == Code::NotFound => Ok(()),
        Ok(state) if state.status() == Phase::Stopped => cx.client().delete(id).await.map(drop).map_err(Into::into),
        state => anyhow::bail!("{state:?}"),
    })
    .await?;
    printed(ctr(cx).args(["containers", "delete", id])).map(drop)
}

pub(crate) async fn a_container_is_started_again_after_it_was_killed(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    for (id, label) in [("uri", "loguri=file://"), ("path", "logpath=")] {
        is_started_again(&cx, id, label).await?;
    }
    cx.leaves_nothing().await
}

async fn is_started_again(cx: &Context, id: &str, label: &str) -> Result<()> {
    let log = cx.folder().join(format!("log-of-{id}"));
    let labels = ["status=running".to_owned(), format!("{label}{}", log.display())];
    let labels: Vec<_> = labels.iter().map(String::as_str).collect();
    run(cx, id, &labels, "echo up; sleep 1000")?;
    let mut pid = running(cx, id, 0).await?;
    for round in 1..=2 {
        cx.client().kill(id, "", 9, false).await?;
        pid = running(cx, id, pid).await?;
        ensure!(count(cx, id)? == round);
        // it has got that far before it is killed again
        eventually("its output is in the file", SOON, async || {
            let text = std::fs::read_to_string(&log)?;
            ensure!(text == "up\n".repeat(usize::try_from(round)?), "{text:?}");
            Ok(())
        })
        .await?;
    }
    remove(cx, id).await
}

pub(crate) async fn failures_are_counted_and_end_at_the_number_of_the_policy(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let runs = cx.folder().join("runs");
    let mount = format!("type=bind,src={},dst=/mnt,options=rbind", cx.folder().display());
    let labels = ["--label", "containerd.io/restart.status=running", "--label", "containerd.io/restart.policy=on-failure:2"];
    let flags = [["--detach", "--null-io", "--mount", &mount].as_slice(), &labels].concat();
    printed(ctr_run(&cx, "fails", &flags)?.args(["/bin/sh", "-c", "echo run >> /mnt/runs; exit 5"]))?;
    let begin = std::time::Instant::now();
    eventually("it has run three times", LATER, async || {
        let text = std::fs::read_to_string(&runs)?;
        ensure!(text.lines().count() == 3, "{text:?}");
        Ok(())
    })
    .await?;
    ensure!(begin.elapsed() > Duration::from_millis(2500), "no pauses: {:?}", begin.elapsed());
    eventually("it is not restarted again", SOON, async || {
        let state = cx.client().state("fails", "").await?;
        ensure!(state.status() == Phase::Stopped && state.exit_status == 5, "{state:?}");
        Ok(())
    })
    .await?;
    // no further restart: the next pause would be four seconds
    tokio::time::sleep(Duration::from_secs(6)).await;
    ensure!(std::fs::read_to_string(&runs)?.lines().count() == 3 && count(&cx, "fails")? == 2);
    remove(&cx, "fails").await?;
    cx.leaves_nothing().await
}

pub(crate) async fn an_explicitly_stopped_container_stays_stopped(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let labels = ["status=running", "policy=unless-stopped"];
    run(&cx, "lasting", &labels, "sleep 1000")?;
    run(&cx, "stopped", &labels, "sleep 1000")?;
    let (lasting, _) = (running(&cx, "lasting", 0).await?, running(&cx, "stopped", 0).await?);
    label(&cx, "stopped", "explicitly-stopped=true")?;
    for id in ["lasting", "stopped"] {
        cx.client().kill(id, "", 9, false).await?;
    }
    running(&cx, "lasting", lasting).await?;
    ensure!(cx.client().state("stopped", "").await?.status() == Phase::Stopped && count(&cx, "stopped")? == 0);
    for id in ["lasting", "stopped"] {
        remove(&cx, id).await?;
    }
    cx.leaves_nothing().await
}

pub(crate) async fn a_container_labelled_stopped_is_stopped(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    run(&cx, "turned", &["status=running"], "sleep 1000")?;
    running(&cx, "turned", 0).await?;
    remove(&cx, "turned").await?;
    run(&cx, "paused", &["status=running"], "sleep 1000")?;
    running(&cx, "paused", 0).await?;
    cx.client().pause("paused").await?;
    remove(&cx, "paused").await?;
    let created = cx.container(&["sleep", "1000"]).id("created").create().await?;
    remove(&cx, "created").await?;
    drop(created);
    cx.leaves_nothing().await
}

pub(crate) async fn a_starting_daemon_starts_containers_labelled_running(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    run(&cx, "again", &["status=running"], "sleep 1000")?;
    let pid = running(&cx, "again", 0).await?;
    cx.daemon().kill()?;
    // its shim is killed as well, as in a reboot
    shim_tests::proc::kill_hard(cx.shim_pid("again")?);
    cx.revive_daemon().await?;
    running(&cx, "again", pid).await?;
    ensure!(count(&cx, "again")? == 1);
    remove(&cx, "again").await?;
    cx.leaves_nothing().await
}

pub(crate) async fn a_daemon_crash_during_a_restart_is_repaired(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let gate = cx.gate()?;
    // a restart knows only the root of the spec
    let root = shim_tests::rootfs::shared()?;
    let container = cx.container(&["sleep", "1000"]).id("half").runtime_binary(&gate.binary()).rootfs(Vec::new());
    let container = container.spec(|spec| spec.with(|spec| spec["root"]["path"] = root.display().to_string().into())).start().await?;
    // without a task, the failure of a container could not be seen
    label(&cx, "half", "policy=on-failure")?;
    label(&cx, "half", "status=running")?;
    gate.hold("create")?;
    container.kill(9).await?;
    gate.held("create").await?;
    cx.daemon().kill()?;
    gate.release("create")?;
    cx.revive_daemon().await?;
    running(&cx, "half", container.pid).await?;
    remove(&cx, "half").await?;
    drop(container);
    cx.leaves_nothing().await
}

pub(crate) async fn a_container_is_started_again_while_other_shims_do_not_answer(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let ids = ["silent0", "silent1", "silent2", "silent3", "silent4", "well"];
    for id in ids {
        run(&cx, id, &["status=running"], "sleep 1000")?;
    }
    let pid = running(&cx, "well", 0).await?;
    let silent: Vec<_> = ids[..5].iter().map(|id| cx.shim_pid(id)).collect::<Result<_>>()?;
    for shim in &silent {
        shim_tests::proc::signal(*shim, nix::sys::signal::Signal::SIGSTOP)?;
    }
    // in the middle of a round that checks all of them
    tokio::time::sleep(Duration::from_secs(10)).await;
    cx.client().kill("well", "", 9, false).await?;
    let begin = std::time::Instant::now();
    let again = running(&cx, "well", pid).await;
    let took = begin.elapsed();
    for shim in &silent {
        shim_tests::proc::signal(*shim, nix::sys::signal::Signal::SIGCONT)?;
    }
    again?;
    ensure!(took < Duration::from_secs(5), "it was started after {took:?}");
    for id in ids {
        remove(&cx, id).await?;
    }
    cx.leaves_nothing().await
}
