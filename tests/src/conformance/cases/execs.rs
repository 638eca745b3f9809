//! Execs.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim_protos::api;
use protobuf::MessageField;

use super::{Streams, sleeper};
use crate::bundle::leave;
use crate::clauses;
use crate::conformance::Case;
use crate::events::Event;
use crate::eventually::{SOON, eventually};
use crate::runner::skip;
use crate::stand::Stand;
use crate::task::any_json;
use crate::ttrpc::{Code, code_of};
use crate::{messages, proc, spec};

pub(super) fn cases() -> Vec<Case> {
    clauses![execs:
        "P1" => an_exec_has_its_own_output_and_exit_code;
        "P2" => an_exec_gets_its_user_folder_and_environment;
        "P3" => an_exec_is_killed_alone;
        "P4" => an_exec_of_a_missing_program_fails_and_can_be_deleted;
        "P5" => an_exec_id_is_free_again_after_delete;
        "P6" => execs_end_with_their_container;
        "P7" => an_exit_is_attributed_to_the_current_owner_of_the_pid;
        "P8" => a_killed_exec_takes_its_descendants;
        "P9" => what_an_exec_has_left_behind_keeps_running;
    ]
}

async fn an_exec_has_its_own_output_and_exit_code(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let container = sleeper(&stand, "c1").await?;
    let script = "read line; echo out $line; echo err >&2; exit 4";
    container.task.exec(&streams.exec(container.bundle.exec_request("e", &["sh", "-c", script]))).await?;
    let pid = container.task.start("c1", "e").await?;
    let state = container.task.state("c1", "e").await?;
    ensure!(state.pid == pid, "State reports another pid: {state}");
    streams.writer().await?.write_all(b"hello\n")?;
    ensure!(container.task.wait("c1", "e").await? == 4);
    let deleted = container.task.delete("c1", "e").await?;
    ensure!(deleted.exit_status == 4 && deleted.pid == pid, "{deleted}");
    ensure!(streams.out.to_end().await? == "out hello\n");
    ensure!(streams.err.to_end().await? == "err\n");
    ensure!(container.task.state("c1", "").await?.status.value() == 2, "init does not run any more");
    container.shut_down().await.map(drop)
}

async fn an_exec_gets_its_user_folder_and_environment(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let container = sleeper(&stand, "c1").await?;
    let mut process = spec::process(&["sh", "-c", "id -u; pwd; echo $COLOUR"]);
    process["user"]["uid"] = 1000.into();
    process["cwd"] = "/tmp".into();
    process["env"] = serde_json::json!(["PATH=/bin", "COLOUR=blue"]);
    let request = streams.exec(container.bundle.exec_request("e", &[]));
    container.task.exec(&api::ExecProcessRequest { spec: MessageField::some(any_json(messages::PROCESS, &process)), ..request }).await?;
    container.task.start("c1", "e").await?;
    ensure!(container.task.wait("c1", "e").await? == 0);
    container.task.delete("c1", "e").await?;
    let text = streams.out.to_end().await?;
    ensure!(text == "1000\n/tmp\nblue\n", "{text:?}");
    container.shut_down().await.map(drop)
}

async fn an_exec_is_killed_alone(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    let (_, other) = (container.exec("e", &["sleep", "1000"]).await?, container.exec("o", &["sleep", "1000"]).await?);
    container.task.kill("c1", "e", 9).await?;
    ensure!(container.task.wait("c1", "e").await? == 137);
    container.task.delete("c1", "e").await?;
    // a container that is about to end looks alive for a moment more, but nothing can be run in it
    let keeps_running = container.run("after", &["sh", "-c", "exit 4"]).await.is_ok_and(|status| status == 4);
    ensure!(keeps_running && proc::is_alive(other.cast_signed()), "another process was killed, too");
    ensure!(code_of(container.task.kill("c1", "e", 9).await)? == Code::NotFound);
    container.shut_down().await.map(drop)
}

/// By default the CRI plugin answers a probe that takes too long only when every process has closed the probe's output.
async fn a_killed_exec_takes_its_descendants(stand: Stand) -> Result<()> {
    let (streams, others) = (Streams::new(&stand, "io")?, "sleep 3001 & (sleep 3002 &); exec sleep 3003");
    let container = stand.bundle("c1", &["sh", "-c", others]).run().await?;
    let script = "trap '' HUP INT TERM; sleep 3004 & (sleep 3005 &); (setsid sh -c 'sleep 3006 & exit' &); echo ready; exec sleep 3007";
    container.task.exec(&streams.exec(container.bundle.exec_request("e", &["sh", "-c", script]))).await?;
    container.task.start("c1", "e").await?;
    streams.out.until("ready").await?;
    run(&["sleep 3001", "sleep 3002", "sleep 3003", "sleep 3004", "sleep 3005", "sleep 3006", "sleep 3007"]).await?;
    container.task.kill("c1", "e", 9).await?;
    ensure!(container.task.wait("c1", "e").await? == 137);
    streams.out.to_end_within(SOON).await.context("a descendant holds the output")?;
    container.task.delete("c1", "e").await?;
    let left: Vec<_> = proc::all().into_values().filter(|it| it.command.starts_with("sleep 300") && !it.is_zombie()).collect();
    let left: Vec<_> = left.iter().map(|it| it.command.as_str()).collect();
    ensure!(["sleep 3001", "sleep 3002", "sleep 3003"].iter().all(|wanted| left.contains(wanted)) && left.len() == 3, "{left:?}");
    container.shut_down().await.map(drop)
}

/// A hook of Kubernetes' may start a daemon. Every exec is killed before its deletion, also one that has exited.
async fn what_an_exec_has_left_behind_keeps_running(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    container.exec("e", &["sh", "-c", "(setsid sleep 3008 <&- >&- 2>&- &)"]).await?;
    ensure!(container.task.wait("c1", "e").await? == 0);
    run(&["sleep 3008"]).await?;
    ensure!(code_of(container.task.kill("c1", "e", 9).await)? == Code::NotFound);
    container.task.delete("c1", "e").await?;
    run(&["sleep 3008"]).await?;
    container.shut_down().await.map(drop)
}

/// Waits until all of these run.
async fn run(commands: &[&str]) -> Result<()> {
    eventually("all of them run", SOON, async || {
        let all = proc::all();
        let missing: Vec<_> = commands.iter().filter(|command| all.values().all(|process| process.command != **command)).collect();
        ensure!(missing.is_empty(), "not yet: {missing:?}");
        Ok(())
    })
    .await
}

async fn an_exec_of_a_missing_program_fails_and_can_be_deleted(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    container.add("e", &["/no/such/program"]).await?;
    let Err(error) = container.task.start("c1", "e").await else { bail!("it was accepted") };
    ensure!(error.to_string().contains("/no/such/program"), "{error}");
    container.task.delete("c1", "e").await?;
    ensure!(container.run("e", &["sh", "-c", "exit 3"]).await? == 3);
    container.shut_down().await.map(drop)
}

async fn an_exec_id_is_free_again_after_delete(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    for status in 0..3 {
        ensure!(container.run("again", &["sh", "-c", &format!("exit {status}")]).await? == status);
    }
    // and of one that never ran
    container.add("again", &["true"]).await?;
    container.task.delete("c1", "again").await?;
    ensure!(container.run("again", &["true"]).await? == 0);
    container.shut_down().await.map(drop)
}

async fn execs_end_with_their_container(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    let mut waits = Vec::new();
    for exec in ["e1", "e2", "e3"] {
        container.exec(exec, &["sleep", "1000"]).await?;
        waits.push(container.task.begin_wait("c1", exec).await?);
    }
    container.task.kill("c1", "", 9).await?;
    for waiting in waits {
        ensure!(waiting.status(SOON).await? == 137);
    }
    ensure!(container.finish().await? == 137);
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// The kernel reuses a pid while the exit of its first owner is still being published.
async fn an_exit_is_attributed_to_the_current_owner_of_the_pid(stand: Stand) -> Result<()> {
    if !Path::new(LAST_PID).exists() {
        return skip("a pid cannot be chosen: the kernel was built without CONFIG_CHECKPOINT_RESTORE");
    }
    let container = sleeper(&stand, "c1").await?;
    let task = &container.task;
    let before: u32 = fs::read_to_string(LAST_PID)?.trim().parse()?;
    let first = container.exec("first", &["sh", "-c", "exit 3"]).await?;
    ensure!(task.wait("c1", "first").await? == 3);
    // the runtime takes a few pids for itself first, as many as the last time
    let mut last = before;
    for attempt in 1..=50 {
        fs::write(LAST_PID, last.to_string())?;
        let exec = format!("e{attempt}");
        let pid = container.exec(&exec, &["sh", "-c", "sleep 0.05; exit 4"]).await?;
        ensure!(task.wait("c1", &exec).await? == 4, "the second owner of pid {pid}");
        if pid == first {
            ensure!(task.wait("c1", "first").await? == 3 && task.state("c1", "first").await?.exit_status == 3, "the first owner of {pid}");
            let events = stand.containerd().events();
            let exits = |all: &[Event]| all.iter().filter(|event| event.topic == "exit").count();
            events.until("every exit", |all| exits(all) > attempt).await?;
            for (exec, status) in [("first", 3), (exec.as_str(), 4)] {
                let exits = events.exits("c1", exec);
                ensure!(exits.len() == 1 && exits[0].status == status, "{exec}: {exits:?}");
            }
            return container.shut_down().await.map(drop);
        }
        last = (last + first).saturating_sub(pid);
        task.delete("c1", &exec).await?;
    }
    bail!("pid {first} was not reused")
}

/// The last pid that the kernel allocated in this namespace; root may change it.
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";
