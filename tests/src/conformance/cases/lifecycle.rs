//! The lifecycle of a container: the answer of each call, and leftovers.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;
use tokio::task::JoinSet;

use super::{Streams, sleeper, text};
use crate::bundle::{Container, leave};
use crate::clauses;
use crate::conformance::Case;
use crate::eventually::{SOON, eventually};
use crate::proc;
use crate::stand::Stand;
use crate::ttrpc::{Code, code_of};

/// Numbers of containerd's task states.
const CREATED: i32 = 1;
const RUNNING: i32 = 2;
const STOPPED: i32 = 3;
const PAUSED: i32 = 4;

pub(super) fn cases() -> Vec<Case> {
    clauses![lifecycle:
        "L1" => the_exit_code_is_the_same_in_every_answer;
        "L2" => a_signal_is_reported_as_128_plus_its_number, a_handled_signal_is_reported_as_the_exit_code;
        "L3" => state_reports_phase_pid_bundle_and_stdio;
        "L4" => many_clients_can_wait_before_and_after_the_exit, a_wait_on_a_created_container_ends_with_its_exit;
        "L5" => create_start_and_connect_agree_on_pids;
        "L6" => pids_name_init_and_execs, pids_name_init_until_delete;
        "L7" => a_created_container_can_be_killed, a_created_container_can_be_deleted;
        "L8" => a_failed_create_leaves_nothing_and_reports_the_reason, a_failed_start_reports_the_reason;
        "L9" => an_id_is_free_again_after_delete;
        "L10" => kill_all_ends_every_process;
        "L11" => a_container_in_the_hosts_pid_namespace_leaves_no_survivor, a_container_in_anothers_pid_namespace_leaves_no_survivor;
        "L12" => the_longest_id_works;
        "L13" => a_signal_for_all_reaches_every_process;
    ]
}

async fn the_exit_code_is_the_same_in_every_answer(stand: Stand) -> Result<()> {
    for status in [0, 3, 255] {
        let id = format!("c{status}");
        let container = stand.bundle(&id, &["sh", "-c", &format!("exit {status}")]).run().await?;
        let (task, pid) = (&container.task, container.pid);
        ensure!(task.wait(&id, "").await? == status);
        let state = task.state(&id, "").await?;
        ensure!(state.status.value() == STOPPED && state.exit_status == status && state.pid == pid, "State: {state}");
        let deleted = task.delete(&id, "").await?;
        ensure!(deleted.exit_status == status && deleted.pid == pid, "Delete: {deleted}");
        ensure!(deleted.exited_at == state.exited_at && state.exited_at.is_some(), "State: {state}; Delete: {deleted}");
        let events = stand.containerd().events();
        events.until("an exit", |_| !events.exits(&id, "").is_empty()).await?;
        let exits = events.exits(&id, "");
        ensure!(exits.len() == 1 && exits[0].status == status && exits[0].pid == pid, "events: {exits:?}");
        leave(task, container.shim_pid()?, &id).await?;
    }
    Ok(())
}

async fn a_signal_is_reported_as_128_plus_its_number(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    container.exec("e", &["sleep", "1000"]).await?;
    container.task.kill("c1", "e", 15).await?;
    ensure!(container.task.wait("c1", "e").await? == 143, "of an exec");
    ensure!(container.task.delete("c1", "e").await?.exit_status == 143);
    ensure!(container.shut_down().await? == 137, "of init");
    Ok(())
}

async fn a_handled_signal_is_reported_as_the_exit_code(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let script = "trap 'exit 7' TERM; echo ready; sleep 1000 & wait";
    let container = streams.output(stand.bundle("c1", &["sh", "-c", script])).run().await?;
    streams.out.until("ready").await?;
    container.task.kill("c1", "", 15).await?;
    ensure!(container.finish().await? == 7);
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn state_reports_phase_pid_bundle_and_stdio(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let container = streams.all(stand.bundle("c1", &["sleep", "1000"])).create().await?;
    let task = &container.task;
    let check = async |phase: i32| -> Result<()> {
        let state = task.state("c1", "").await?;
        ensure!(state.status.value() == phase, "phase {phase} expected: {state}");
        ensure!(state.id == "c1" && state.pid == container.pid && state.bundle == text(&container.bundle.folder), "{state}");
        let paths = [&state.stdin, &state.stdout, &state.stderr];
        ensure!(paths == [&text(&streams.stdin), &text(&streams.stdout), &text(&streams.stderr)] && !state.terminal, "{state}");
        Ok(())
    };
    check(CREATED).await?;
    container.start().await?;
    check(RUNNING).await?;
    task.pause("c1").await?;
    check(PAUSED).await?;
    task.resume("c1").await?;
    check(RUNNING).await?;
    task.kill("c1", "", 9).await?;
    task.wait("c1", "").await?;
    check(STOPPED).await?;
    container.finish().await?;
    ensure!(code_of(task.state("c1", "").await)? == Code::NotFound, "it is known after Delete");
    leave(task, container.shim_pid()?, "c1").await
}

async fn many_clients_can_wait_before_and_after_the_exit(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let container = streams.all(stand.bundle("c1", &["sh", "-c", "read line; exit 5"])).run().await?;
    let mut waits = JoinSet::new();
    for number in 0..50 {
        // half of them on a connection of their own
        let task = if number % 2 == 0 { container.task.clone() } else { container.task.another().await? };
        let waiting = task.begin_wait("c1", "").await?;
        waits.spawn(async move { (waiting.status(SOON).await, task) });
    }
    streams.writer().await?.write_all(b"go\n")?;
    while let Some(answer) = waits.join_next().await {
        ensure!(answer?.0? == 5);
    }
    for _late in 0..50 {
        ensure!(container.task.wait("c1", "").await? == 5);
    }
    ensure!(container.finish().await? == 5);
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn a_wait_on_a_created_container_ends_with_its_exit(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sh", "-c", "exit 6"]).create().await?;
    let waiting = container.task.begin_wait("c1", "").await?;
    container.start().await?;
    ensure!(waiting.status(SOON).await? == 6);
    ensure!(container.finish().await? == 6);
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn create_start_and_connect_agree_on_pids(stand: Stand) -> Result<()> {
    // Start's answer is compared with Create's
    let container = sleeper(&stand, "c1").await?;
    let connect = container.task.connect_to("c1").await?;
    ensure!(connect.task_pid == container.pid, "{connect}");
    ensure!(proc::is_alive(connect.shim_pid.cast_signed()) && connect.shim_pid != container.pid, "{connect}");
    ensure!(connect.shim_pid.cast_signed() == container.shim_pid()?, "{connect}, but the shim is {}", container.shim_pid()?);
    eventually("init is the program", SOON, async || {
        let init = proc::Process::read(container.pid.cast_signed())?;
        ensure!(init.command == "sleep 1000", "{init:?}");
        Ok(())
    })
    .await?;
    container.shut_down().await.map(drop)
}

async fn pids_name_init_and_execs(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    let exec = container.exec("e", &["sleep", "1000"]).await?;
    let request = api::PidsRequest { id: "c1".to_owned(), ..Default::default() };
    let answer: api::PidsResponse = container.task.call("Pids", &request, SOON).await?;
    let mut pids: Vec<_> = answer.processes.iter().map(|process| process.pid).collect();
    pids.sort_unstable();
    ensure!(pids == [container.pid, exec], "{pids:?}, not {} and {exec}", container.pid);
    let info = answer.processes.iter().find(|process| process.pid == exec).and_then(|process| process.info.as_ref());
    let info = info.context("no field names the exec")?;
    ensure!(info.type_url.ends_with("containerd.runc.v1.ProcessDetails") && info.value == b"\x0a\x01e", "{info}");
    container.shut_down().await.map(drop)
}

/// An empty list, or an error, makes containerd 1.7 and later discard the task and its exit code when they start.
async fn pids_name_init_until_delete(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sh", "-c", "exit 3"]).run().await?;
    ensure!(container.task.wait("c1", "").await? == 3);
    let pids = container.task.pids("c1").await?;
    ensure!(pids.contains(&container.pid), "{pids:?}");
    ensure!(container.finish().await? == 3);
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn a_created_container_can_be_killed(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).create().await?;
    ensure!(container.shut_down().await? == 137);
    Ok(())
}

async fn a_created_container_can_be_deleted(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).create().await?;
    container.task.delete("c1", "").await?;
    ensure!(code_of(container.task.state("c1", "").await)? == Code::NotFound);
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn a_failed_create_leaves_nothing_and_reports_the_reason(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime_program()?)?;
    let bundle = stand.bundle("c1", &["sh", "-c", "exit 3"]).runtime(&gate.binary());
    let task = bundle.shim().await?;
    gate.fail("create", Some("the sky has fallen"))?;
    let Err(error) = task.create(&bundle.request()).await else { anyhow::bail!("it was accepted") };
    ensure!(error.to_string().contains("the sky has fallen"), "{error}");
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains(&text(&bundle.folder)), "a root file system is mounted");
    ensure!(code_of(task.state("c1", "").await)? == Code::NotFound);
    gate.fail("create", None)?;
    let container = bundle.run_in(&task).await.context("the id is not free")?;
    ensure!(container.finish().await? == 3);
    leave(&task, container.shim_pid()?, "c1").await
}

async fn a_failed_start_reports_the_reason(stand: Stand) -> Result<()> {
    // runc looks for the program when it starts it, crun before that
    let bundle = stand.bundle("c1", &["/no/such/program"]);
    let task = bundle.shim().await?;
    let error = match task.create(&bundle.request()).await {
        Err(error) => error,
        Ok(_) => {
            let error = task.start("c1", "").await.err().context("it was accepted")?;
            task.delete("c1", "").await?;
            error
        }
    };
    ensure!(error.to_string().contains("/no/such/program"), "{error}");
    leave(&task, bundle.shim_pid()?, "c1").await
}

async fn an_id_is_free_again_after_delete(stand: Stand) -> Result<()> {
    let anchor = stand.bundle("anchor", &["sleep", "1000"]).group("pod").run().await?;
    for status in 0..5 {
        let bundle = stand.bundle("again", &["sh", "-c", &format!("exit {status}")]).group("pod");
        let container = bundle.run_in(&anchor.task).await?;
        ensure!(container.finish().await? == status);
        fs::remove_dir_all(&container.bundle.folder)?;
    }
    anchor.shut_down().await.map(drop)
}

async fn kill_all_ends_every_process(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let script = "sleep 3000 & sleep 3000 & echo ready; wait";
    let container = streams.output(stand.bundle("c1", &["sh", "-c", script]).spec(|spec| spec.host_pids())).run().await?;
    streams.out.until("ready").await?;
    container.exec("e", &["sleep", "3000"]).await?;
    kill_all(&container, 9).await?;
    ensure!(container.task.wait_within("c1", "e", SOON).await? == 137);
    ensure!(container.finish().await? == 137);
    no_survivor("sleep 3000").await?;
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// Init traps the signal and keeps running, so no other process exits because of it.
async fn a_signal_for_all_reaches_every_process(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let script = "trap 'echo trapped' TERM; sleep 3000 & echo ready; while :; do sleep 0.1; done";
    let container = streams.output(stand.bundle("c1", &["sh", "-c", script]).spec(|spec| spec.host_pids())).run().await?;
    streams.out.until("ready").await?;
    container.exec("e", &["sleep", "1000"]).await?;
    kill_all(&container, 15).await?;
    ensure!(container.task.wait_within("c1", "e", SOON).await? == 143);
    streams.out.until("trapped").await?;
    no_survivor("sleep 3000").await?;
    ensure!(container.task.state("c1", "").await?.status.value() == RUNNING, "init has ended");
    container.shut_down().await.map(drop)
}

async fn kill_all(container: &Container, signal: u32) -> Result<()> {
    let request = api::KillRequest { id: container.id.clone(), signal, all: true, ..Default::default() };
    container.task.call::<api::Empty>("Kill", &request, SOON).await?;
    Ok(())
}

async fn no_survivor(command: &str) -> Result<()> {
    eventually("no process of it is left", SOON, async || {
        let left: Vec<_> = proc::all().into_values().filter(|process| process.command == command).collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await
}

/// Init exits by itself, and the bundle's config.json is gone: only the shim knows which processes to kill.
async fn ends_and_leaves_no_survivor(container: Container, streams: &Streams) -> Result<()> {
    streams.out.until("ready").await?;
    container.task.kill(&container.id, "", 9).await?;
    ensure!(container.finish().await? == 137);
    no_survivor("sleep 2000").await
}

async fn a_container_in_the_hosts_pid_namespace_leaves_no_survivor(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let bundle = stand.bundle("c1", &["sh", "-c", "sleep 2000 & echo ready; wait"]).spec(|spec| spec.host_pids());
    let container = streams.output(bundle).run().await?;
    fs::remove_file(container.bundle.folder.join("config.json"))?;
    let (task, shim) = (container.task.clone(), container.shim_pid()?);
    ends_and_leaves_no_survivor(container, &streams).await?;
    leave(&task, shim, "c1").await
}

async fn a_container_in_anothers_pid_namespace_leaves_no_survivor(stand: Stand) -> Result<()> {
    let first = stand.bundle("c1", &["sleep", "1000"]).group("pod").run().await?;
    let streams = Streams::new(&stand, "io")?;
    let bundle = stand.bundle("c2", &["sh", "-c", "sleep 2000 & echo ready; wait"]).group("pod");
    let bundle = streams.output(bundle.spec(|spec| spec.join_pids(first.pid)));
    let second = bundle.run_in(&first.task).await?;
    ends_and_leaves_no_survivor(second, &streams).await?;
    first.shut_down().await.map(drop)
}

async fn the_longest_id_works(stand: Stand) -> Result<()> {
    let id = format!("{}.{}", "a".repeat(38), "b".repeat(37));
    let container = stand.bundle(&id, &["sh", "-c", "exit 3"]).run().await?;
    ensure!(container.finish().await? == 3);
    leave(&container.task, container.shim_pid()?, &id).await
}
