//! The daemon is killed with SIGKILL at each step of a container's life and started again.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_client::types::v1::Status as Phase;
use shim_tests::container::{Builder, Container, Process, Stdio, code_of};
use shim_tests::context::Context;
use shim_tests::events::Events;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::proc;
use shim_tests::suite;
use tokio::task::LocalSet;
use tonic::Code;

/// Exits with 3 when it reads a line.
const ON_COMMAND: [&str; 3] = ["sh", "-c", "echo up; read go; exit 3"];

/// Checks that the container has not changed.
async fn is_the_same(container: &Container) -> Result<()> {
    let state = container.state().await?;
    ensure!(state.status() == Phase::Running && state.pid == container.pid, "{state:?}");
    Ok(())
}

/// Checks that every call reports that it exited with `status`, and that this was published once.
async fn ended_with(cx: &Context, container: &Process, events: &Events, status: u32, in_all: usize) -> Result<()> {
    let state = container.phase(Phase::Stopped).await?;
    ensure!(state.exit_status == status, "state: {state:?}");
    let waited = container.wait().await?;
    ensure!(waited == status, "wait reports {waited}");
    let deleted = container.delete().await?;
    ensure!(deleted.exit_status == status, "delete reports {deleted:?}");
    published_once(cx, events, container, status, in_all).await
}

/// Checks that the process's exit was published once, with that status, and `in_all` exits in this namespace, over all runs of the daemon.
///
/// The event may be published before a client has subscribed again: then only the daemon's log shows it.
async fn published_once(cx: &Context, events: &Events, process: &Process, status: u32, in_all: usize) -> Result<()> {
    let namespace = cx.client().namespace();
    // x-manager does not log events; the stock shim drops them
    if suite::manager().is_none() && cx.shim().is_ours() {
        eventually("the exit is published", SOON, async || {
            let received = cx.daemon().received_exits(namespace);
            ensure!(received >= in_all, "{received} exits of {in_all} were published");
            Ok(())
        })
        .await?;
    }
    events.catch_up(cx.client()).await?;
    let exits = events.exits(&process.id, &process.exec);
    ensure!(exits.len() <= 1 && exits.iter().all(|exit| exit.status == status), "{exits:?}");
    let received = cx.daemon().received_exits(namespace);
    ensure!(received <= in_all, "{received} exits were published, not {in_all}");
    Ok(())
}

pub(crate) async fn a_container_keeps_running_while_the_daemon_is_down(cx: Context) -> Result<()> {
    let cx = cx.with_own_verbose_daemon().await?;
    let container = cx.container(&ON_COMMAND).stdio(Stdio::ALL).start().await?;
    container.io.out().until("up").await?;
    for _crash in 0..2 {
        cx.crash_daemon().await?;
        is_the_same(&container).await?;
    }
    let events = cx.events().await?;
    ensure!(container.exec("e", &["sh", "-c", "exit 4"]).run().await? == 4);
    container.io.stdin().await?.write_all(b"go\n")?;
    eventually_true("the exit event", SOON, || !events.exits(&container.id, "").is_empty()).await?;
    ended_with(&cx, &container, &events, 3, 2).await?;
    cx.leaves_nothing().await
}

async fn exits_while_down(cx: Context, end: impl Fn(&Context) -> Result<()>) -> Result<()> {
    let cx = cx.with_own_verbose_daemon().await?;
    let container = cx.container(&ON_COMMAND).stdio(Stdio::ALL).start().await?;
    container.io.out().until("up").await?;
    let mut stdin = container.io.stdin().await?;
    let events = cx.events().await?;
    end(&cx)?;
    stdin.write_all(b"go\n")?;
    let pid = container.pid.cast_signed();
    eventually_true("it has exited", SOON, || !proc::is_alive(pid)).await?;
    cx.revive_daemon().await?;
    events.resubscribe(cx.client()).await?;
    ended_with(&cx, &container, &events, 3, 1).await?;
    cx.leaves_nothing().await
}

pub(crate) async fn an_exit_while_the_daemon_is_down_is_published_afterwards(cx: Context) -> Result<()> {
    exits_while_down(cx, |cx| cx.daemon().kill()).await
}

pub(crate) async fn an_exit_while_the_daemon_is_upgraded_is_published_afterwards(cx: Context) -> Result<()> {
    exits_while_down(cx, |cx| cx.daemon().stop()).await
}

pub(crate) async fn an_exec_survives_the_daemon(cx: Context) -> Result<()> {
    let cx = cx.with_own_verbose_daemon().await?;
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let exec = container.exec("e", &["sh", "-c", "read x; echo got $x; exit 5"]).stdio(Stdio::ALL).start().await?;
    let mut stdin = exec.io.stdin().await?;
    cx.crash_daemon().await?;
    let events = cx.events().await?;
    stdin.write_all(b"it\n")?;
    exec.io.out().until("got it").await?;
    ended_with(&cx, &exec, &events, 5, 1).await?;
    container.destroy().await?;
    cx.leaves_nothing().await
}

pub(crate) async fn a_created_container_survives_the_daemon(cx: Context) -> Result<()> {
    let cx = cx.with_own_verbose_daemon().await?;
    let container = cx.container(&["sh", "-c", "exit 3"]).create().await?;
    let other = cx.container(&["sleep", "1000"]).create().await?;
    cx.crash_daemon().await?;
    let state = container.state().await?;
    ensure!(state.status() == Phase::Created && state.pid == container.pid, "{state:?}");
    let events = cx.events().await?;
    container.start().await?;
    ended_with(&cx, &container, &events, 3, 1).await?;
    other.delete().await?;
    cx.leaves_nothing().await
}

pub(crate) async fn a_paused_container_survives_the_daemon(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let container = cx.container(&["sleep", "1000"]).start().await?;
    cx.client().pause(&container.id).await?;
    cx.crash_daemon().await?;
    ensure!(container.state().await?.status() == Phase::Paused);
    cx.client().resume(&container.id).await?;
    ensure!(container.destroy().await? == 137);
    cx.leaves_nothing().await
}

/// Runs `create`, which a gated runtime blocks, while `meanwhile` kills the daemon.
async fn create_meanwhile(create: Builder, meanwhile: impl AsyncFnOnce() -> Result<()>) -> Result<()> {
    let local = LocalSet::new();
    local
        .run_until(async move {
            // the metadata stays, with or without a task
            let create = tokio::task::spawn_local(create.metadata().await?.create_task());
            meanwhile().await?;
            // the call failed with the daemon; the restarted daemon reports the result
            create.await?.err().map_or(Ok(()), |_| Ok(()))
        })
        .await
}

/// Checks that there is a whole container with that id, or none and the id is free; then runs it to its exit.
///
/// The shim may still be completing the call, so a task may appear a moment later.
async fn whole_or_none(cx: &Context, id: &str, again: impl Fn() -> Builder) -> Result<()> {
    let made_anew = eventually("a whole container, or a free id", SOON, async || match cx.client().state(id, "").await {
        Ok(state) => {
            ensure!(state.status() == Phase::Created, "{state:?}");
            Ok(None)
        }
        Err(status) => {
            ensure!(status.code() == Code::NotFound, "{status:?}");
            Ok(Some(again().create_task().await?))
        }
    })
    .await?;
    if let Some(container) = made_anew {
        ensure!(container.run().await? == 3);
    } else {
        let state = cx.client().state(id, "").await?;
        ensure!(proc::is_alive(state.pid.cast_signed()), "{state:?}");
        let pid = cx.client().start(id, "").await?;
        ensure!(pid == state.pid);
        ensure!(cx.client().wait(id, "").await?.exit_status == 3);
        ensure!(cx.client().delete(id).await?.exit_status == 3);
    }
    cx.leaves_nothing().await
}

pub(crate) async fn a_daemon_killed_during_create_leaves_a_whole_container_or_none(cx: Context) -> Result<()> {
    for restart_first in [false, true] {
        let cx = cx.with_own_daemon().await?;
        let gate = cx.gate()?;
        let build = || cx.container(&["sh", "-c", "exit 3"]).id("half").runtime_binary(&gate.binary());
        gate.hold("create")?;
        create_meanwhile(build(), async || {
            gate.held("create").await?;
            cx.daemon().kill()?;
            if restart_first {
                cx.revive_daemon().await?;
            }
            gate.release("create")?;
            if !restart_first {
                cx.revive_daemon().await?;
            }
            Ok(())
        })
        .await?;
        whole_or_none(&cx, "half", build).await.with_context(|| format!("restarted first: {restart_first}"))?;
    }
    Ok(())
}

pub(crate) async fn a_daemon_killed_after_create_was_done_leaves_a_whole_container_or_none(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let gate = cx.gate()?;
    let build = || cx.container(&["sh", "-c", "exit 3"]).id("half").runtime_binary(&gate.binary());
    gate.hold_after("create")?;
    create_meanwhile(build(), async || {
        gate.held("create").await?;
        cx.daemon().kill()?;
        gate.release("create")?;
        cx.revive_daemon().await
    })
    .await?;
    whole_or_none(&cx, "half", build).await
}

pub(crate) async fn a_daemon_killed_during_start_loses_no_exit(cx: Context) -> Result<()> {
    let cx = cx.with_own_verbose_daemon().await?;
    let gate = cx.gate()?;
    let events = cx.events().await?;
    let container = cx.container(&["sh", "-c", "exit 3"]).runtime_binary(&gate.binary()).create().await?;
    gate.hold("start")?;
    let (client, id) = (cx.client().clone(), container.id.clone());
    let start = tokio::spawn(async move { client.start(&id, "").await });
    gate.held("start").await?;
    cx.daemon().kill()?;
    start.await?.err().context("the connection died")?;
    gate.release("start")?;
    cx.revive_daemon().await?;
    events.resubscribe(cx.client()).await?;
    // a request whose client has gone is carried out, still in progress, or dropped; a dropped one can be repeated
    eventually("it was started and has ended", SOON, async || {
        let state = container.state().await?;
        if state.status() == Phase::Created {
            container.start().await?;
        }
        ensure!(state.status() == Phase::Stopped, "{state:?}");
        Ok(())
    })
    .await?;
    ended_with(&cx, &container, &events, 3, 1).await?;
    cx.leaves_nothing().await
}

pub(crate) async fn a_daemon_killed_during_exec_loses_no_container(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let gate = cx.gate()?;
    let container = cx.container(&["sleep", "1000"]).runtime_binary(&gate.binary()).start().await?;
    let exec = container.exec("e", &["sh", "-c", "exit 5"]).add().await?;
    gate.hold("exec")?;
    let (client, id) = (cx.client().clone(), container.id.clone());
    let start = tokio::spawn(async move { client.start(&id, "e").await });
    gate.held("exec").await?;
    cx.daemon().kill()?;
    start.await?.err().context("the connection died")?;
    gate.release("exec")?;
    cx.revive_daemon().await?;
    is_the_same(&container).await?;
    // a request whose client has gone is carried out or dropped; in both cases the exec can be deleted
    eventually("the exec can be deleted", SOON, async || {
        let state = exec.state().await?;
        if state.status() == Phase::Stopped {
            ensure!(state.exit_status == 5, "{state:?}");
        }
        exec.delete().await?;
        Ok(())
    })
    .await?;
    ensure!(container.exec("e", &["sh", "-c", "exit 6"]).run().await? == 6);
    ensure!(container.destroy().await? == 137);
    cx.leaves_nothing().await
}

pub(crate) async fn a_daemon_killed_during_delete_leaves_nothing(cx: Context) -> Result<()> {
    let cx = cx.with_own_verbose_daemon().await?;
    let gate = cx.gate()?;
    let events = cx.events().await?;
    let container = cx.container(&["sh", "-c", "exit 3"]).runtime_binary(&gate.binary()).start().await?;
    ensure!(container.wait().await? == 3);
    gate.hold("delete")?;
    let (client, id) = (cx.client().clone(), container.id.clone());
    let delete = tokio::spawn(async move { client.delete(&id).await });
    if cx.shim().is_ours() {
        // the shim may do without the runtime's delete, or run it before it publishes the exit
        let _may_not_come = gate.held("delete").await;
    } else {
        gate.held("delete").await?;
    }
    cx.daemon().kill()?;
    let _its_connection_died = delete.await?;
    gate.release("delete")?;
    cx.revive_daemon().await?;
    events.resubscribe(cx.client()).await?;
    eventually("it is deleted, or can be", SOON, async || match container.delete().await {
        Ok(deleted) => {
            ensure!(deleted.exit_status == 3, "{deleted:?}");
            Ok(())
        }
        Err(status) => {
            ensure!(status.code() == Code::NotFound, "{status:?}");
            Ok(())
        }
    })
    .await?;
    ensure!(code_of(container.state().await)? == Code::NotFound);
    published_once(&cx, &events, &container, 3, 1).await?;
    cx.leaves_nothing().await
}

pub(crate) async fn a_group_survives_the_daemon(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let member = |spec: shim_tests::spec::Spec| spec.annotation("io.kubernetes.cri.sandbox-id", "pod");
    let first = cx.container(&["sleep", "1000"]).id("pod").spec(member).start().await?;
    let second = cx.container(&ON_COMMAND).spec(member).stdio(Stdio::ALL).start().await?;
    second.io.out().until("up").await?;
    cx.crash_daemon().await?;
    is_the_same(&first).await?;
    is_the_same(&second).await?;
    let third = cx.container(&["sh", "-c", "exit 7"]).spec(member).create().await?;
    ensure!(cx.shims().len() == 1, "{:?}", cx.shims());
    ensure!(third.run().await? == 7);
    second.io.stdin().await?.write_all(b"go\n")?;
    ensure!(second.finish().await? == 3);
    ensure!(first.destroy().await? == 137);
    cx.leaves_nothing().await
}

pub(crate) async fn output_continues_without_a_gap_over_a_restart(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let script = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); [ $((i % 100)) = 0 ] && read go; done; exit 3";
    let container = cx.container(&["sh", "-c", script]).stdio(Stdio::ALL).start().await?;
    let mut stdin = container.io.stdin().await?;
    for hundred in 0..30 {
        container.io.out().until(&format!("line {}\n", hundred * 100 + 99)).await?;
        if hundred == 10 {
            cx.daemon().kill()?;
        } else if hundred == 20 {
            cx.revive_daemon().await?;
        }
        stdin.write_all(b"go\n")?;
    }
    ensure!(container.finish().await? == 3);
    let text = container.io.out().to_end_within(Duration::from_secs(20)).await?;
    let expected: String = (0..3000).map(|number| format!("line {number}\n")).collect();
    ensure!(text == expected, "{} bytes instead of {}", text.len(), expected.len());
    cx.leaves_nothing().await
}
