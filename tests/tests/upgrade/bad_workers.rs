//! Workers that hang, that crash on a request or an exit, and that cannot start.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use containerd_client::types::v1::Status as Phase;
use containerd_shim_protos::api::ShutdownRequest;
use nix::sys::signal::Signal;
use protobuf::Message as _;
use shim_tests::builds;
use shim_tests::bundle::worker_of;
use shim_tests::cgroups::Own;
use shim_tests::container::Stdio;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::proc;
use shim_tests::stand::Stand;
use shim_tests::suite::Shim;
use shim_tests::ttrpc::{Code, Frame, Wire, refusal};

use crate::{build, on_build};

/// Longer than the shim takes to notice that a worker hangs.
const NOTICED: Duration = Duration::from_secs(30);

pub(crate) async fn a_stopped_worker_is_replaced(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    let (client, id) = (cx.client().clone(), container.id.clone());
    let wait = tokio::spawn(async move { client.wait_for_ever(&id, "").await });
    for round in 0..2 {
        let worker = worker_of(keeper).await?;
        proc::signal(worker, Signal::SIGSTOP)?;
        let begin = Instant::now();
        let exec = tokio::time::timeout(NOTICED, container.exec(&format!("e{round}"), &["sh", "-c", "exit 4"]).run());
        ensure!(exec.await.context("the keeper has not detected the stopped worker")?? == 4);
        ensure!(!proc::is_alive(worker), "the stopped worker is alive");
        ensure!(begin.elapsed() > Duration::from_secs(1), "it was not stopped");
    }
    ensure!(container.destroy().await? == 137);
    ensure!(wait.await??.into_inner().exit_status == 137);
    cx.leaves_nothing().await
}

pub(crate) async fn a_request_that_crashes_the_worker_is_answered_with_an_error_and_the_others_succeed(cx: Context) -> Result<()> {
    for how in ["crash", "exit", "kill"] {
        given_up(&cx, how).await.with_context(|| how.to_owned())?;
    }
    Ok(())
}

pub(crate) async fn a_request_that_hangs_its_worker_is_answered_with_an_error_and_the_others_succeed(cx: Context) -> Result<()> {
    given_up(&cx, "hang").await
}

async fn given_up(cx: &Context, how: &str) -> Result<()> {
    let cx = on_build(cx, &format!("build=bad request=poison do={how}")).await?;
    let gate = cx.gate()?;
    let container = cx.container(&["sleep", "1000"]).runtime_binary(&gate.binary()).start().await?;
    // one call that is in progress all the time, and one that only waits
    let slow = container.exec("slow", &["sh", "-c", "exit 5"]).add().await?;
    gate.hold("exec")?;
    let (client, id) = (cx.client().clone(), container.id.clone());
    let start = tokio::spawn(async move { client.start(&id, "slow").await });
    gate.held("exec").await?;
    let (client, id) = (cx.client().clone(), container.id.clone());
    let wait = tokio::spawn(async move { client.wait_for_ever(&id, "").await });
    let refused = tokio::time::timeout(Duration::from_secs(60), container.exec("poison", &["true"]).add()).await.context("no answer")?;
    let message = format!("{:#}", refused.err().context("it was accepted")?);
    ensure!(message.contains("every worker of this shim crashes over this request (Exec"), "{message}");
    gate.release("exec")?;
    start.await??;
    ensure!(slow.finish().await? == 5);
    ensure!(gate.count("exec") == 1, "{:?}", gate.calls());
    ensure!(container.exec("e", &["sh", "-c", "exit 4"]).run().await? == 4);
    ensure!(container.destroy().await? == 137);
    ensure!(wait.await??.into_inner().exit_status == 137);
    cx.leaves_nothing().await
}

pub(crate) async fn an_exit_that_crashes_the_worker_is_published_by_another_build(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=bad exit=poison do=crash").await?;
    let events = cx.events().await?;
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let poison = container.exec("poison", &["sh", "-c", "exit 6"]).start().await?;
    let program = build(&cx, "good", "build=good")?;
    eventually("the exit is withheld", SOON, async || {
        let shown = builds::ps(&cx, &program).await?.remove(0);
        ensure!(shown["remark"].as_str().is_some_and(|remark| remark.contains("/poison")), "{shown:#}");
        Ok(())
    })
    .await?;
    ensure!(container.exec("e", &["sh", "-c", "exit 4"]).run().await? == 4);
    ensure!(events.exits(&container.id, "poison").is_empty());
    builds::upgrade(&cx, &program, &["--all"]).await?.is_done()?;
    ensure!(poison.finish().await? == 6);
    ensure!(container.destroy().await? == 137);
    cx.history(&events, &container.id).await?;
    let exits = events.exits(&container.id, "poison");
    ensure!(exits.len() == 1 && exits[0].status == 6, "{exits:?}");
    cx.leaves_nothing().await
}

/// A slow runtime or a waiting client must not make the worker look hung.
pub(crate) async fn a_slow_operation_is_not_taken_for_a_hang(cx: Context) -> Result<()> {
    let gate = cx.gate()?;
    let container = cx.container(&["sleep", "1000"]).runtime_binary(&gate.binary()).start().await?;
    let worker = worker_of(cx.shim_pid(&container.id)?).await?;
    let exec = container.exec("e", &["sh", "-c", "exit 5"]).add().await?;
    gate.hold("exec")?;
    let (client, id) = (cx.client().clone(), container.id.clone());
    let start = tokio::spawn(async move { client.start(&id, "e").await });
    gate.held("exec").await?;
    // longer than two responses may take
    tokio::time::sleep(Duration::from_secs(14)).await;
    ensure!(proc::is_alive(worker), "the worker was killed");
    gate.release("exec")?;
    start.await??;
    ensure!(exec.finish().await? == 5);
    ensure!(worker_of(cx.shim_pid(&container.id)?).await? == worker, "another worker");
    ensure!(container.destroy().await? == 137);
    cx.leaves_nothing().await
}

pub(crate) async fn an_idle_worker_is_not_pinged(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let (client, id) = (cx.client().clone(), container.id.clone());
    let wait = tokio::spawn(async move { client.wait_for_ever(&id, "").await });
    let keeper = cx.shim_pid(&container.id)?;
    let worker = worker_of(keeper).await?;
    let switches = || -> Result<u64> {
        let mut sum = 0;
        for pid in [keeper, worker] {
            for kind in ["voluntary_ctxt_switches", "nonvoluntary_ctxt_switches"] {
                sum += proc::status_field(pid, kind)?.parse::<u64>()?;
            }
        }
        Ok(sum)
    };
    let mut last = switches()?;
    let mut quiet_since = Instant::now();
    // background work after the start is done after a second
    eventually_true("eight seconds without a wake-up", Duration::from_secs(30), || {
        let now = switches().unwrap_or_default();
        if now != last {
            (last, quiet_since) = (now, Instant::now());
        }
        quiet_since.elapsed() > Duration::from_secs(8)
    })
    .await?;
    ensure!(container.destroy().await? == 137);
    ensure!(wait.await??.into_inner().exit_status == 137);
    cx.leaves_nothing().await
}

pub(crate) async fn what_containerd_needs_is_answered_while_no_worker_starts(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let program: PathBuf = cx.shim().binary.clone().context("ours")?;
    let container = cx.container(&["sh", "-c", "read go; exit 3"]).stdio(Stdio::ALL).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    let worker = worker_of(keeper).await?;
    fs::set_permissions(&program, Permissions::from_mode(0o600))?;
    proc::kill_hard(worker);
    eventually_true("the worker is dead", SOON, || !proc::is_alive(worker)).await?;
    // the daemon finds the shim, its container and its pids, and kills no process
    cx.crash_daemon().await?;
    let state = container.state().await?;
    ensure!(state.status() == Phase::Running && state.pid == container.pid, "{state:?}");
    ensure!(cx.client().pids(&container.id).await?.iter().any(|process| process.pid == container.pid));
    let person = build(&cx, "person", "build=person")?;
    let shown = eventually("ps reports the reason", SOON, async || {
        let shown = builds::ps(&cx, &person).await?.remove(0);
        ensure!(shown["remark"].as_str().is_some_and(|remark| remark.contains("cannot be executed: Permission denied")), "{shown:#}");
        Ok(shown)
    })
    .await?;
    ensure!(shown["containers"][0]["state"] == "running", "{shown:#}");
    let inspected = tokio::process::Command::new(&person).args(["inspect", &container.id, "-n", cx.client().namespace()]).output().await?;
    let text = String::from_utf8_lossy(&inspected.stdout);
    ensure!(inspected.status.success() && text.contains("Permission denied"), "{text}");
    // an upgrade fixes it
    builds::upgrade(&cx, &person, &["--all"]).await?.is_done()?;
    container.io.stdin().await?.write_all(b"go\n")?;
    ensure!(container.finish().await? == 3);
    fs::set_permissions(&program, Permissions::from_mode(0o755))?;
    cx.leaves_nothing().await
}

/// containerd calls Shutdown once and never again.
pub(crate) async fn a_shutdown_that_a_worker_was_too_slow_for_is_carried_out(cx: Context) -> Result<()> {
    let stand = Stand::new(cx.shim(), cx.program("gated-runtime").parent().context("a file is in a folder")?)?;
    let container = stand.bundle("c1", &["sh", "-c", "exit 3"]).run().await?;
    ensure!(container.finish().await? == 3);
    let (shim, worker) = (container.shim_pid()?, container.worker_pid().await?);
    proc::signal(worker, Signal::SIGSTOP)?;
    let request = ShutdownRequest { id: container.id.clone(), ..Default::default() }.write_to_bytes()?;
    let patience = Some(Duration::from_secs(1));
    let frame = Frame::request_of_bytes(1, container.task.service_name(), "Shutdown", request, patience);
    Wire::connect(container.task.socket()).await?.send(&frame.encode()).await?;
    eventually_true("the shim has exited", NOTICED, || !proc::is_alive(shim)).await?;
    stand.leaves_nothing().await
}

/// Like a worker with a thread that waits for a hanging disk.
pub(crate) async fn a_worker_that_cannot_be_killed_is_replaced(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let frozen = Own::with(&format!("{}-frozen", cx.client().namespace()), "freezer.state", "FROZEN")?;
    let keeper = cx.shim_pid(&container.id)?;
    let (client, id) = (cx.client().clone(), container.id.clone());
    let wait = tokio::spawn(async move { client.wait_for_ever(&id, "").await });
    let first = worker_of(keeper).await?;
    frozen.take(first)?;
    proc::kill_hard(first);
    let exec = tokio::time::timeout(NOTICED, container.exec("e1", &["sh", "-c", "exit 4"]).run());
    ensure!(exec.await.context("no other worker continues")?? == 4);
    let is_there = |pid: i32| proc::Process::read(pid).is_ok();
    ensure!(is_there(first), "the worker could exit");
    let second = worker_of_others(keeper, &[first]).await?;
    frozen.take(second)?;
    let program = build(&cx, "new", "build=new")?;
    builds::upgrade(&cx, &program, &["--all"]).await?.is_done()?;
    ensure!(is_there(second), "the worker could exit");
    ensure!(container.exec("e2", &["sh", "-c", "exit 5"]).run().await? == 5);
    frozen.set("freezer.state", "THAWED")?;
    frozen.emptied().await?;
    for pid in [first, second] {
        eventually_true("it is reaped", SOON, || !is_there(pid)).await?;
    }
    ensure!(container.destroy().await? == 137);
    ensure!(wait.await??.into_inner().exit_status == 137);
    cx.leaves_nothing().await
}

/// The worker of a keeper that is none of these.
async fn worker_of_others(keeper: i32, not: &[i32]) -> Result<i32> {
    eventually("the keeper has another worker", SOON, async || {
        let is_it = |child: &proc::Process| !not.contains(&child.pid) && child.command.split(' ').any(|word| word == "worker");
        proc::children(keeper).into_iter().find(is_it).map(|child| child.pid).context("no other child is called worker")
    })
    .await
}

/// A Start that crashes every worker had an exec made, which has exited: its zombie was kept for the pid that Start might report.
pub(crate) async fn a_request_that_crashes_every_worker_leaves_no_zombie(cx: Context) -> Result<()> {
    let gate = cx.gate()?;
    let container = cx.container(&["sleep", "1000"]).id("poisoned").runtime_binary(&gate.binary());
    // the second to the fifth worker crash before they commit the Start: their fourth message, as the exec has no streams
    fs::create_dir_all(cx.daemon().faults())?;
    let plan = cx.daemon().faults().join("poisoned");
    fs::write(&plan, format!("in:999999:before{}", " out:4:before".repeat(4)))?;
    let container = container.start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    let exec = container.exec("e", &["true"]).add().await?;
    gate.hold("exec")?;
    let (client, id) = (cx.client().clone(), container.id.clone());
    let start = tokio::spawn(async move { client.start(&id, "e").await });
    gate.held("exec").await?;
    let worker = worker_of(keeper).await?;
    proc::kill_hard(worker);
    eventually_true("the worker is dead", SOON, || !proc::is_alive(worker)).await?;
    gate.release("exec")?;
    let refused = tokio::time::timeout(Duration::from_secs(60), start).await.context("no answer")??;
    let message = format!("{:#}", anyhow::Error::from(refused.err().context("it was started")?));
    let trace = fs::read_to_string(plan.with_extension("trace"))?;
    ensure!(message.contains("every worker of this shim crashes over this request (Start"), "{message}\n{trace}");
    eventually("no zombie is left", SOON, async || {
        let zombies = proc::zombies_of(keeper);
        ensure!(zombies.is_empty(), "{zombies:?}");
        Ok(())
    })
    .await?;
    exec.delete().await?;
    ensure!(container.destroy().await? == 137);
    cx.leaves_nothing().await
}

/// It is neither unknown nor free, and the command delete removes it.
pub(crate) async fn a_container_whose_record_cannot_be_read_is_unavailable_and_keeps_its_id(cx: Context) -> Result<()> {
    // every worker writes records of version 1, and reads those up to version 0
    let binary = build(&cx, "old", "build=old records=0")?;
    let shim = Shim { binary: Some(binary), ..cx.shim().clone() };
    let stand = Stand::new(&shim, cx.program("gated-runtime").parent().context("a file is in a folder")?)?;
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let worker = container.worker_pid().await?;
    proc::kill_hard(worker);
    eventually_true("the worker is dead", SOON, || !proc::is_alive(worker)).await?;
    let task = &container.task;
    // the keeper's own answers are given until a worker serves
    eventually("a worker answers", SOON, async || {
        ensure!(refusal(task.state("c1", "").await)?.0 == Code::Unavailable);
        Ok(())
    })
    .await?;
    let unavailable = |(code, message): (Code, String)| {
        ensure!(code == Code::Unavailable && message.contains("cannot read its record"), "{code:?} {message}");
        Ok(())
    };
    unavailable(refusal(task.state("c1", "").await)?).context("State")?;
    unavailable(refusal(task.start("c1", "").await)?).context("Start")?;
    unavailable(refusal(task.delete("c1", "").await)?).context("Delete")?;
    ensure!(refusal(task.create(&container.bundle.request()).await)?.0 == Code::AlreadyExists, "its id was free");
    task.shutdown("c1").await?;
    ensure!(proc::is_alive(container.pid.cast_signed()) && proc::is_alive(container.shim_pid()?), "it has ended");
    let deleted = container.bundle.delete_command().await?;
    ensure!(deleted.exit_status == 137 && deleted.pid == container.pid, "{deleted}");
    ensure!(!proc::is_alive(container.pid.cast_signed()), "it is alive");
    stand.leaves_nothing().await
}
