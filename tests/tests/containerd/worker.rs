//! The worker of our shim is killed at any time: clients see no error.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_client::types::v1::Status as Phase;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shim_tests::container::Stdio;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::proc;
use shim_tests::runner::skip;
use tokio::task::LocalSet;

pub(crate) fn ours_only(cx: &Context) -> Result<()> {
    if cx.shim().is_ours() { Ok(()) } else { skip("the stock shim has no worker to kill") }
}

/// The worker of a keeper, once there is one.
pub(crate) async fn worker_of(keeper: i32) -> Result<i32> {
    eventually("the keeper has a worker", SOON, async || {
        let is_worker = |child: &proc::Process| child.command.split(' ').any(|word| word == "worker");
        proc::children(keeper).into_iter().find(is_worker).map(|child| child.pid).context("no child is called worker")
    })
    .await
}

/// Kills the worker of a keeper and waits until it is gone; the keeper may start another one.
pub(crate) async fn kill_worker(keeper: i32) -> Result<()> {
    let worker = worker_of(keeper).await?;
    proc::kill_hard(worker);
    eventually_true("the worker is dead", SOON, || !proc::is_alive(worker)).await
}

pub(crate) async fn a_killed_worker_is_not_noticed_by_a_running_container(cx: Context) -> Result<()> {
    ours_only(&cx)?;
    let events = cx.events().await?;
    let container = cx.container(&["sh", "-c", "read go; exit 3"]).stdio(Stdio::ALL).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    for round in 0..5 {
        kill_worker(keeper).await?;
        let state = container.state().await?;
        ensure!(state.status() == Phase::Running && state.pid == container.pid, "{state:?}");
        ensure!(container.exec(&format!("e{round}"), &["sh", "-c", "exit 4"]).run().await? == 4);
    }
    kill_worker(keeper).await?;
    container.io.stdin().await?.write_all(b"go\n")?;
    ensure!(container.finish().await? == 3);
    let published = cx.history(&events, &container.id).await?;
    ensure!(published.iter().filter(|event| event.starts_with("exit")).count() == 6, "{published:?}");
    ensure!(published.ends_with(&["exit".to_owned(), "delete".to_owned()]), "{published:?}");
    Ok(())
}

pub(crate) async fn a_killed_worker_is_not_noticed_by_a_pending_wait(cx: Context) -> Result<()> {
    ours_only(&cx)?;
    let container = cx.container(&["sh", "-c", "read go; exit 3"]).stdio(Stdio::ALL).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    let mut waits = tokio::task::JoinSet::new();
    for _waiter in 0..20 {
        let (client, id) = (cx.client().clone(), container.id.clone());
        waits.spawn(async move { client.wait(&id, "").await });
    }
    kill_worker(keeper).await?;
    // killed again as soon as the next one runs, and then during the exit
    kill_worker(keeper).await?;
    let worker = worker_of(keeper).await?;
    container.io.stdin().await?.write_all(b"go\n")?;
    proc::kill_hard(worker);
    while let Some(answer) = waits.join_next().await {
        ensure!(answer??.exit_status == 3);
    }
    ensure!(container.delete().await?.exit_status == 3);
    Ok(())
}

pub(crate) async fn a_killed_worker_is_not_noticed_by_a_create_in_flight(cx: Context) -> Result<()> {
    ours_only(&cx)?;
    for after in [false, true] {
        let gate = cx.gate()?;
        let container = cx.container(&["sh", "-c", "exit 3"]).runtime_binary(&gate.binary());
        if after {
            gate.hold_after("create")?
        } else {
            gate.hold("create")?
        }
        let local = LocalSet::new();
        let container = local
            .run_until(async {
                let create = tokio::task::spawn_local(container.create());
                gate.held("create").await?;
                let shims = cx.shims();
                let [shim] = &shims[..] else { anyhow::bail!("exactly one shim expected: {shims:?}") };
                kill_worker(shim.pid).await?;
                gate.release("create")?;
                create.await?
            })
            .await?;
        ensure!(gate.count("create") == 1 + usize::from(after), "{:?}", gate.calls());
        ensure!(container.run().await? == 3);
        cx.leaves_nothing().await?;
    }
    Ok(())
}

pub(crate) async fn a_killed_worker_is_not_noticed_by_an_exec_in_flight(cx: Context) -> Result<()> {
    ours_only(&cx)?;
    let gate = cx.gate()?;
    let container = cx.container(&["sleep", "1000"]).runtime_binary(&gate.binary()).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    let exec = container.exec("e", &["sh", "-c", "echo hello; exit 5"]).stdio(Stdio::OUTPUT).add().await?;
    gate.hold("exec")?;
    let (client, id) = (cx.client().clone(), container.id.clone());
    let start = tokio::spawn(async move { client.start(&id, "e").await });
    gate.held("exec").await?;
    kill_worker(keeper).await?;
    gate.release("exec")?;
    start.await??;
    ensure!(exec.finish().await? == 5);
    ensure!(exec.io.out().to_end().await? == "hello\n");
    ensure!(gate.count("exec") == 1, "{:?}", gate.calls());
    container.destroy().await?;
    Ok(())
}

pub(crate) async fn a_killed_worker_is_not_noticed_by_a_delete_in_flight(cx: Context) -> Result<()> {
    ours_only(&cx)?;
    let gate = cx.gate()?;
    let container = cx.container(&["sh", "-c", "exit 3"]).runtime_binary(&gate.binary()).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    ensure!(container.wait().await? == 3);
    gate.hold("delete")?;
    let (client, id) = (cx.client().clone(), container.id.clone());
    let delete = tokio::spawn(async move { client.delete(&id).await });
    if gate.held("delete").await.is_ok() {
        kill_worker(keeper).await?;
    }
    gate.release("delete")?;
    ensure!(delete.await??.exit_status == 3);
    Ok(())
}

pub(crate) async fn a_worker_killed_with_the_daemon_down_loses_no_exit(cx: Context) -> Result<()> {
    ours_only(&cx)?;
    let cx = cx.with_own_daemon().await?;
    let container = cx.container(&["sh", "-c", "read go; exit 3"]).stdio(Stdio::ALL).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    let mut stdin = container.io.stdin().await?;
    cx.daemon().kill()?;
    kill_worker(keeper).await?;
    stdin.write_all(b"go\n")?;
    let pid = container.pid.cast_signed();
    eventually_true("it has exited", SOON, || !proc::is_alive(pid)).await?;
    kill_worker(keeper).await?;
    cx.revive_daemon().await?;
    ensure!(container.finish().await? == 3);
    cx.leaves_nothing().await
}

pub(crate) async fn a_killed_worker_costs_no_line_of_output(cx: Context) -> Result<()> {
    ours_only(&cx)?;
    let lines = 200_000;
    let script = format!("seq 1 {lines}; exit 3");
    let container = cx.container(&["sh", "-c", &script]).stdio(Stdio::OUTPUT).create().await?;
    let keeper = cx.shim_pid(&container.id)?;
    container.start().await?;
    let mut kills = 0;
    while container.io.out().count() < 1_000_000 {
        kill_worker(keeper).await?;
        kills += 1;
        tokio::task::yield_now().await;
    }
    ensure!(container.finish().await? == 3);
    let text = container.io.out().to_end().await?;
    let expected: String = (1..=lines).map(|number| format!("{number}\n")).collect();
    ensure!(text == expected, "{} bytes instead of {} after {kills} kills", text.len(), expected.len());
    Ok(())
}

pub(crate) async fn a_stopped_worker_leaves_the_daemon_able_to_load(cx: Context) -> Result<()> {
    ours_only(&cx)?;
    let cx = cx.with_own_daemon().await?;
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let worker = worker_of(cx.shim_pid(&container.id)?).await?;
    // like a hung worker: the keeper must answer the daemon's calls at its start without it
    kill(Pid::from_raw(worker), Signal::SIGSTOP)?;
    cx.crash_daemon().await?;
    let state = container.state().await?;
    ensure!(state.status() == Phase::Running && state.pid == container.pid, "{state:?}");
    kill(Pid::from_raw(worker), Signal::SIGCONT)?;
    ensure!(container.destroy().await? == 137);
    cx.leaves_nothing().await
}

/// No client has called for a while: only the keeper runs when the container exits.
pub(crate) async fn an_exit_with_the_daemon_down_and_the_worker_hibernating_is_published(cx: Context) -> Result<()> {
    ours_only(&cx)?;
    let cx = cx.with_own_shim(cx.shim(), &[("X_SHIM_IDLE_SECONDS", "5")]).await?;
    let ends = cx.container(&["sh", "-c", "read go; exit 3"]).stdio(Stdio::ALL).start().await?;
    let stays = cx.container(&["sh", "-c", "read go; exit 4"]).stdio(Stdio::ALL).start().await?;
    let keepers = [cx.shim_pid(&ends.id)?, cx.shim_pid(&stays.id)?];
    let mut stdin = ends.io.stdin().await?;
    eventually_true("both workers hibernate", SOON * 3, || keepers.iter().all(|keeper| no_worker(*keeper))).await?;
    cx.daemon().kill()?;
    stdin.write_all(b"go\n")?;
    let pid = ends.pid.cast_signed();
    eventually_true("it has exited", SOON, || !proc::is_alive(pid)).await?;
    ensure!(no_worker(keepers[1]), "the other shim's worker was started");
    cx.revive_daemon().await?;
    ensure!(ends.finish().await? == 3);
    ensure!(stays.state().await?.pid == stays.pid);
    stays.io.stdin().await?.write_all(b"go\n")?;
    ensure!(stays.finish().await? == 4);
    cx.leaves_nothing().await
}

fn no_worker(keeper: i32) -> bool {
    proc::children(keeper).iter().all(|child| !child.command.split(' ').any(|word| word == "worker"))
}

pub(crate) async fn a_killed_keeper_ends_its_containers_with_true_exit_codes(cx: Context) -> Result<()> {
    ours_only(&cx)?;
    let events = cx.events().await?;
    let ended = cx.container(&["sh", "-c", "exit 3"]).start().await?;
    ensure!(ended.wait().await? == 3);
    let running = cx.container(&["sleep", "1000"]).start().await?;
    for container in [&ended, &running] {
        proc::kill_hard(cx.shim_pid(&container.id)?);
    }
    let pid = running.pid.cast_signed();
    eventually_true("the container of a dead keeper is killed", SOON, || !proc::is_alive(pid)).await?;
    let published = |id: String, status: u32| {
        let events = events.clone();
        async move {
            events
                .until_within("its exit", Duration::from_secs(15), |_| events.exits(&id, "").iter().any(|exit| exit.status == status))
                .await
        }
    };
    published(ended.id.clone(), 3).await?;
    published(running.id.clone(), 137).await?;
    cx.leaves_nothing().await
}

/// containerd runs `delete` for each member, also for those without a `start` of their own.
pub(crate) async fn a_killed_keeper_ends_each_member_of_its_group_with_its_true_exit_code(cx: Context) -> Result<()> {
    ours_only(&cx)?;
    let events = cx.events().await?;
    let member = |spec: shim_tests::spec::Spec| spec.annotation("io.kubernetes.cri.sandbox-id", "pod");
    let first = cx.container(&["sleep", "1000"]).id("pod").spec(member).start().await?;
    let second = cx.container(&["sleep", "1000"]).spec(member).start().await?;
    let ended = cx.container(&["sh", "-c", "exit 3"]).spec(member).start().await?;
    ensure!(ended.wait().await? == 3);
    ensure!(cx.shims().len() == 1, "{:?}", cx.shims());
    proc::kill_hard(cx.shim_pid("pod")?);
    for (container, status) in [(&first, 137), (&second, 137), (&ended, 3)] {
        let pid = container.pid.cast_signed();
        eventually_true("the container of a dead keeper is killed", SOON, || !proc::is_alive(pid)).await?;
        let published = |_: &[_]| events.exits(&container.id, "").iter().any(|exit| exit.status == status);
        events.until_within("its exit", Duration::from_secs(15), published).await?;
    }
    cx.leaves_nothing().await
}
