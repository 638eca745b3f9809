//! Workers that exit for any reason, and a worker that cannot be started: containers keep running, and calls are answered.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use shim_tests::bundle::worker_of;
use shim_tests::cgroups::Own;
use shim_tests::container::Stdio;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::stand::Stand;
use shim_tests::suite::Shim;
use shim_tests::ttrpc::Code;
use shim_tests::{builds, proc};

use crate::{build, on_build};

/// The output of `inspect` for a container; its id is unique among all namespaces.
pub(crate) async fn inspected(cx: &Context, id: &str) -> Result<serde_json::Value> {
    let mut command = tokio::process::Command::new(cx.shim().binary.as_ref().context("ours")?);
    let output = command.args(["inspect", "--json", id]).output().await?;
    ensure!(output.status.success(), "inspect: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

pub(crate) async fn a_crashed_worker_is_replaced_under_calls_in_progress(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let events = cx.events().await?;
    let gate = cx.gate()?;
    let container = cx.container(&["sh", "-c", "read go; exit 3"]).stdio(Stdio::ALL).runtime_binary(&gate.binary()).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    let (client, id) = (cx.client().clone(), container.id.clone());
    let wait = tokio::spawn(async move { client.wait_for_ever(&id, "").await });
    let signals = [Signal::SIGSEGV, Signal::SIGABRT, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL, Signal::SIGKILL];
    for (number, signal) in (1..).zip(signals) {
        let name = format!("e{number}");
        let exec = container.exec(&name, &["sh", "-c", "exit 4"]).add().await?;
        gate.hold("exec")?;
        let (client, id) = (cx.client().clone(), container.id.clone());
        let start = tokio::spawn(async move { client.start(&id, &name).await });
        gate.held("exec").await?;
        let worker = worker_of(keeper).await?;
        // Rust's handler ignores the first SIGSEGV or SIGBUS that the processor has not raised
        let ended = || !proc::is_alive(worker) || proc::signal(worker, signal).is_err();
        eventually_true("the worker is dead", SOON, ended).await?;
        gate.release("exec")?;
        start.await?.with_context(|| format!("start over {signal}"))?;
        ensure!(exec.finish().await? == 4, "{signal}");
        ensure!(gate.count("exec") == number, "{signal}: {:?}", gate.calls());
        let shown = inspected(&cx, &container.id).await?;
        ensure!(shown["shim"]["last_end"] == format!("signal {}", signal as i32), "{:#}", shown["shim"]);
        let state = container.state().await?;
        ensure!(state.pid == container.pid && cx.shim_pid(&container.id)? == keeper, "{state:?}");
    }
    ensure!(!wait.is_finished(), "the wait has ended");
    container.io.stdin().await?.write_all(b"go\n")?;
    ensure!(container.finish().await? == 3);
    ensure!(wait.await??.into_inner().exit_status == 3);
    let published = cx.history(&events, &container.id).await?;
    ensure!(published.iter().filter(|event| event.starts_with("exit(")).count() == signals.len(), "{published:?}");
    ensure!(published.iter().filter(|event| *event == "exit").count() == 1, "{published:?}");
    cx.leaves_nothing().await
}

/// In a cgroup in which a process can have next to no memory.
pub(crate) async fn a_worker_out_of_memory_is_replaced(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    let narrow = Own::with(&format!("{}-narrow", cx.client().namespace()), "memory.limit_in_bytes", "256K")?;
    for round in 1..=3 {
        let worker = worker_of(keeper).await?;
        narrow.take(worker)?;
        // more than the cgroup allows; the next worker starts in the keeper's cgroup
        let exec = container.exec(&format!("e{round}"), &["sh", "-c", "exit 4"]).process(|process| {
            let ballast = (0..4).map(|number| serde_json::json!(format!("BALLAST{number}={}", "x".repeat(100 << 10))));
            process["env"].as_array_mut().expect("a process has an environment").extend(ballast);
        });
        ensure!(exec.run().await? == 4);
        let kills = narrow.get("memory.oom_control")?;
        ensure!(!proc::is_alive(worker) && kills.lines().any(|line| line == format!("oom_kill {round}")), "after {round} rounds: {kills}");
        let state = container.state().await?;
        ensure!(state.pid == container.pid && cx.shim_pid(&container.id)? == keeper, "{state:?}");
    }
    narrow.emptied().await?;
    ensure!(container.destroy().await? == 137);
    cx.leaves_nothing().await
}

/// containerd runs `delete` when it gives a shim up.
pub(crate) async fn delete_works_while_no_worker_starts(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let program = cx.shim().binary.clone().context("ours")?;
    let running = cx.container(&["sleep", "1000"]).start().await?;
    let ended = cx.container(&["sh", "-c", "exit 3"]).start().await?;
    ensure!(ended.wait().await? == 3);
    fs::set_permissions(&program, Permissions::from_mode(0o600))?;
    for container in [&running, &ended] {
        let worker = worker_of(cx.shim_pid(&container.id)?).await?;
        proc::kill_hard(worker);
    }
    // their program is replaced, and they cannot execute the one that they hold open
    builds::make(&Shim::faulty()?.binary.context("X_SHIM must name our own shim")?, &program, "build=next")?;
    cx.crash_daemon().await?;
    for (container, status) in [(&running, 137), (&ended, 3)] {
        let begin = Instant::now();
        let report = cx.delete_command(container).await?;
        let took = begin.elapsed();
        ensure!(report.exit_status == status && report.pid == container.pid, "{report:?}");
        ensure!(took < Duration::from_secs(5), "it took {took:?}");
        let pid = container.pid.cast_signed();
        eventually_true("its init is gone", SOON, || !proc::is_alive(pid)).await?;
    }
    // the daemon removes its own records of them
    for (container, status) in [(&running, 137), (&ended, 3)] {
        eventually("the daemon deletes the task", SOON, async || match container.delete().await {
            Ok(deleted) => {
                ensure!(deleted.exit_status == status, "{deleted:?}");
                Ok(())
            }
            Err(error) if error.code() == tonic::Code::NotFound => Ok(()),
            Err(error) => Err(error.into()),
        })
        .await?;
    }
    cx.leaves_nothing().await
}

pub(crate) async fn a_state_that_cannot_be_saved_keeps_the_keeper_as_it_is(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let container = cx.container(&["sh", "-c", "read go; exit 3"]).stdio(Stdio::ALL).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    let program = build(&cx, "new", "build=new")?;
    // room for an exit record, none for the keeper's state
    limit_files(keeper, "96").await?;
    let upgraded = builds::upgrade(&cx, &program, &["--all"]).await?;
    let shim = upgraded.only()?;
    let why = shim["why"].as_str().unwrap_or_default();
    ensure!(shim["result"] == "rolled-back" && why.contains("the keeper was kept: cannot rehearse: File too large"), "{shim:#}");
    ensure!(shim["report"]["worker"]["result"] == "upgraded", "{shim:#}");
    let state = container.state().await?;
    ensure!(state.pid == container.pid && cx.shim_pid(&container.id)? == keeper, "{state:?}");
    limit_files(keeper, "unlimited").await?;
    builds::upgrade(&cx, &program, &["--all"]).await?.is_done()?;
    container.io.stdin().await?.write_all(b"go\n")?;
    ensure!(container.finish().await? == 3);
    cx.leaves_nothing().await
}

pub(crate) async fn saved_state_does_not_grow_with_the_number_of_past_execs(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    let journal = container.bundle().join("x-journal");
    // the state that a new worker, or a new executable, would get
    let saved = async || {
        let report = inspected(&cx, &container.id).await?;
        ensure!(report["shim"]["requests"].as_array().is_some_and(Vec::is_empty), "{report:#}");
        let state = report["state"].to_string().len();
        ensure!(state > 100, "{report:#}");
        let memory: u64 = proc::status_field(keeper, "RssAnon")?.trim_end_matches(" kB").parse()?;
        Ok((state, fs::metadata(&journal)?.len(), proc::fewest_open_files(keeper).await?, memory))
    };
    let (mut number, mut measured) = (0, Vec::new());
    for until in [100, 700] {
        while number < until {
            number += 1;
            let exec = container.exec(&format!("e{number:05}"), &["sh", "-c", "echo hello; exit 4"]).stdio(Stdio::OUTPUT);
            ensure!(exec.add().await?.run().await? == 4);
        }
        measured.push(saved().await?);
    }
    let [before, after] = measured[..] else { unreachable!("two were asked for") };
    ensure!((before.0, before.1, before.2) == (after.0, after.1, after.2), "{before:?}, then {after:?}");
    ensure!(after.3 <= before.3 + 128, "{before:?}, then {after:?}");
    ensure!(container.destroy().await? == 137);
    cx.leaves_nothing().await
}

/// Limits the size of the files that a process writes, in bytes.
async fn limit_files(pid: i32, bytes: &str) -> Result<()> {
    let mut command = tokio::process::Command::new("prlimit");
    let status = command.arg(format!("--pid={pid}")).arg(format!("--fsize={bytes}:unlimited")).status().await?;
    ensure!(status.success(), "prlimit: {status}");
    Ok(())
}

/// A stand whose shims have an executable of their own, which can be made impossible to execute.
fn stand_of_its_own(cx: &Context) -> Result<Stand> {
    let program = cx.folder().join(cx.shim().binary_name());
    builds::make(&Shim::faulty()?.binary.context("X_SHIM must name our own shim")?, &program, "build=old")?;
    let shim = Shim { binary: Some(program), ..cx.shim().clone() };
    Stand::new(&shim, cx.program("gated-runtime").parent().context("a file is in a folder")?)
}

/// Without a worker, `delete` does the manual cleanup; in a pod the shim and its clients stay.
pub(crate) async fn a_wait_for_a_container_that_delete_removed_is_answered(cx: Context) -> Result<()> {
    let stand = stand_of_its_own(&cx)?;
    let pod = stand.bundle("pod", &["sleep", "1000"]).group("pod").run().await?;
    let container = stand.bundle("c1", &["sleep", "1000"]).group("pod").run_in(&pod.task).await?;
    let waiting = pod.task.begin_wait("c1", "").await?;
    let keeper = pod.shim_pid()?;
    let worker = worker_of(keeper).await?;
    eventually("the wait is parked", SOON, async || {
        let mut command = stand.command(&["inspect", "--json", "c1", "--namespace", stand.namespace()]);
        let report: serde_json::Value = serde_json::from_slice(&command.output().await?.stdout)?;
        ensure!(report["waiters"][0]["count"] == 1, "{:#}", report["waiters"]);
        Ok(())
    })
    .await?;
    fs::set_permissions(stand.binary(), Permissions::from_mode(0o600))?;
    proc::kill_hard(worker);
    builds::make(&Shim::faulty()?.binary.context("X_SHIM must name our own shim")?, stand.binary(), "build=next")?;
    ensure!(container.bundle.delete_command().await?.exit_status == 137);
    let published = waiting.status(SOON).await;
    ensure!(published.as_ref().is_err_and(|error| error.code() == Some(Code::NotFound)), "{published:?}");
    // the other container keeps running, and can be deleted once a worker can start
    ensure!(pod.task.state("pod", "").await?.pid == pod.pid && proc::is_alive(pod.pid.cast_signed()));
    let mut upgrade = tokio::process::Command::new(stand.binary());
    let output = upgrade.args(["upgrade", "--all", "--namespace", stand.namespace()]).output().await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(pod.shut_down().await? == 137);
    stand.leaves_nothing().await
}

pub(crate) async fn delete_reports_the_workers_record_without_a_journal(cx: Context) -> Result<()> {
    let stand = Stand::new(cx.shim(), cx.program("gated-runtime").parent().context("a file is in a folder")?)?;
    let container = stand.bundle("c1", &["sh", "-c", "exit 3"]).run().await?;
    ensure!(container.task.wait("c1", "").await? == 3);
    let state = container.task.state("c1", "").await?;
    fs::remove_file(container.bundle.folder.join("x-journal"))?;
    let deleted = container.bundle.delete_command().await?;
    ensure!(deleted.exit_status == 3 && deleted.pid == container.pid && deleted.exited_at == state.exited_at, "{deleted:?} {state:?}");
    let shim = container.shim_pid()?;
    eventually_true("the shim has exited", SOON, || !proc::is_alive(shim)).await?;
    stand.leaves_nothing().await
}
