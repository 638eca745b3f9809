//! Published events: every event, once, in order, also while containerd is slow, refuses events or is down.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::sleeper;
use crate::bundle::{Container, leave};
use crate::clauses;
use crate::conformance::Case;
use crate::events::init_is_the_last_of;
use crate::eventually::{SOON, eventually, within};
use crate::fake_containerd::Manner;
use crate::stand::Stand;
use crate::times::{repeated, times};
use crate::ttrpc::Code;
use crate::workloads;

pub(super) fn cases() -> Vec<Case> {
    clauses![events:
        "E1" => lifecycle_events_are_published_once_and_in_order;
        "E2" => each_exec_is_published_as_added_started_and_exited;
        "E3" => create_and_delete_of_an_unstarted_container_are_published;
        "E4" => events_name_the_namespace_and_the_process;
        "E5" => pause_and_resume_are_published;
        "E6" => the_deletion_of_an_exec_is_published;
        "E7" => exits_of_execs_are_published_before_inits;
        "E8" => inits_exit_is_published_while_execs_start;
        "E9" => an_event_refused_for_a_while_is_published_later;
        "E10" => events_wait_for_an_absent_daemon, an_event_in_flight_when_the_daemon_crashes_is_sent_again;
        "E11" => a_permanently_refused_event_does_not_delay_the_next_ones;
        "E12" => a_daemon_that_is_slow_to_take_events_delays_no_call;
    ]
}

async fn lifecycle_events_are_published_once_and_in_order(stand: Stand) -> Result<()> {
    for status in [0, 3] {
        let id = format!("c{status}");
        let container = stand.bundle(&id, &["sh", "-c", &format!("exit {status}")]).run().await?;
        ensure!(container.finish().await? == status);
        let published = stand.containerd().events().of_until(&id, "delete").await?;
        ensure!(published == ["create", "start", "exit", "delete"], "{published:?}");
        leave(&container.task, container.shim_pid()?, &id).await?;
        // and nothing comes after it
        ensure!(stand.containerd().events().of(&id).len() == 4, "{:?}", stand.containerd().events().of(&id));
    }
    Ok(())
}

async fn each_exec_is_published_as_added_started_and_exited(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    workloads::short_execs(&container, repeated(200), 4).await?;
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn create_and_delete_of_an_unstarted_container_are_published(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).create().await?;
    container.task.delete("c1", "").await?;
    let events = stand.containerd().events();
    events.until("delete", |all| all.iter().any(|event| event.topic == "delete")).await?;
    let published = events.of("c1");
    ensure!(published.first().is_some_and(|event| event == "create") && !published.contains(&"start".to_owned()), "{published:?}");
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn events_name_the_namespace_and_the_process(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    let exec = container.exec("e", &["sh", "-c", "exit 4"]).await?;
    ensure!(container.task.wait("c1", "e").await? == 4);
    container.task.delete("c1", "e").await?;
    ensure!(container.destroy().await? == 137);
    let events = stand.containerd().events();
    events.of_until("c1", "delete").await?;
    for event in events.all() {
        let pid = match (event.topic.as_str(), event.exec.as_str()) {
            ("create" | "start" | "exit" | "delete", "") => container.pid,
            ("exec-started" | "exit" | "delete", "e") => exec,
            _ => 0,
        };
        ensure!(event.pid == pid, "{event:?}, not {pid}");
        let status = match (event.topic.as_str(), event.exec.as_str()) {
            ("exit" | "delete", "") => 137,
            ("exit" | "delete", "e") => 4,
            _ => 0,
        };
        ensure!(event.status == status, "{event:?}, not {status}");
    }
    let namespaces = stand.containerd().namespaces();
    ensure!(namespaces.iter().eq([stand.namespace()]), "{namespaces:?}");
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn pause_and_resume_are_published(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    container.task.pause("c1").await?;
    container.task.resume("c1").await?;
    ensure!(container.destroy().await? == 137);
    let published = stand.containerd().events().of_until("c1", "delete").await?;
    ensure!(published == ["create", "start", "paused", "resumed", "exit", "delete"], "{published:?}");
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn the_deletion_of_an_exec_is_published(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    ensure!(container.run("e", &["sh", "-c", "exit 4"]).await? == 4);
    ensure!(container.destroy().await? == 137);
    let published = stand.containerd().events().of_until("c1", "delete").await?;
    let expected = ["create", "start", "exec-added(e)", "exec-started(e)", "exit(e)", "delete(e)", "exit", "delete"];
    leave(&container.task, container.shim_pid()?, "c1").await?;
    ensure!(published == expected, "{published:?}");
    Ok(())
}

/// All three end at the same moment, by the same cause: the kill of init.
async fn exits_of_execs_are_published_before_inits(stand: Stand) -> Result<()> {
    let anchor = stand.bundle("anchor", &["sleep", "1000"]).group("pod").run().await?;
    for round in 0..15 {
        let id = format!("c{round}");
        let container = stand.bundle(&id, &["sleep", "1000"]).group("pod").run_in(&anchor.task).await?;
        for exec in ["e1", "e2"] {
            container.exec(exec, &["sleep", "1000"]).await?;
        }
        container.task.kill(&id, "", 9).await?;
        within("the end", SOON, container.task.wait(&id, "")).await??;
        container.task.delete(&id, "").await?;
        let published = stand.containerd().events().of_until(&id, "delete").await?;
        init_is_the_last_of(3, &published).with_context(|| format!("round {round}"))?;
    }
    anchor.shut_down().await.map(drop)
}

/// The OCI runtime is starting one exec when init exits, and a second exec is requested meanwhile.
async fn inits_exit_is_published_while_execs_start(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime_program()?)?;
    let container = stand.bundle("c1", &["sleep", "1000"]).runtime(&gate.binary()).run().await?;
    container.add("e1", &["true"]).await?;
    container.add("e2", &["true"]).await?;
    gate.hold("exec")?;
    let (task, other) = (container.task.clone(), container.task.clone());
    let first = tokio::spawn(async move { task.start("c1", "e1").await });
    gate.held("exec").await?;
    container.task.kill("c1", "", 9).await?;
    let second = tokio::spawn(async move { other.start("c1", "e2").await });
    let waiting = container.task.begin_wait("c1", "").await?;
    gate.release("exec")?;
    for start in [first, second] {
        // either exec may have started before the exit, or its Start fails
        let _either = within("start", SOON, start).await??;
    }
    ensure!(waiting.status(SOON).await? == 137);
    for exec in ["e1", "e2"] {
        container.task.delete("c1", exec).await?;
    }
    ensure!(container.task.delete("c1", "").await?.exit_status == 137);
    let published = stand.containerd().events().of_until("c1", "delete").await?;
    ensure!(published.iter().filter(|event| *event == "exit").count() == 1, "{published:?}");
    ensure!(published.iter().any(|event| event == "exit") && published.last().is_some_and(|event| event == "delete"), "{published:?}");
    crate::bundle::leave(&container.task, container.shim_pid()?, "c1").await
}

/// Adds, runs and deletes execs, and returns the events that must be published about them.
async fn run_some(container: &Container, round: usize) -> Result<Vec<String>> {
    let mut expected = Vec::new();
    for number in 0..3 {
        let exec = format!("e{round}-{number}");
        ensure!(container.run(&exec, &["true"]).await? == 0);
        expected.extend(["exec-added", "exec-started", "exit"].map(|topic| format!("{topic}({exec})")));
    }
    Ok(expected)
}

/// The events published about a container, without deletions of execs and without repetitions.
async fn told_of(stand: &Stand) -> Result<Vec<String>> {
    let mut published = stand.containerd().events().of_until("c1", "delete").await?;
    published.retain(|event| !event.starts_with("delete("));
    published.dedup();
    Ok(published)
}

async fn an_event_refused_for_a_while_is_published_later(stand: Stand) -> Result<()> {
    let fake = stand.containerd();
    let container = sleeper(&stand, "c1").await?;
    let mut expected = fake.events().of_until("c1", "start").await?;
    for (round, manner) in
        [Manner::Refuse(Code::Unavailable), Manner::HangUp { taken: false }, Manner::HangUpEarly, Manner::Refuse(Code::Unknown)]
            .into_iter()
            .enumerate()
    {
        fake.behave(manner);
        let before = fake.tries();
        expected.extend(run_some(&container, round).await?);
        eventually("the shim keeps trying", SOON, async || {
            ensure!(fake.tries() > before + 1, "{manner:?}: {} tries", fake.tries() - before);
            Ok(())
        })
        .await?;
    }
    fake.behave(Manner::Accept);
    ensure!(container.destroy().await? == 137);
    expected.extend(["exit", "delete"].map(str::to_owned));
    let published = told_of(&stand).await?;
    ensure!(published == expected, "{published:?}");
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// Longer than shims with a time limit keep events.
async fn events_wait_for_an_absent_daemon(stand: Stand) -> Result<()> {
    let fake = stand.containerd();
    let container = sleeper(&stand, "c1").await?;
    let mut expected = fake.events().of_until("c1", "start").await?;
    fake.vanish();
    expected.extend(run_some(&container, 0).await?);
    tokio::time::sleep(Duration::from_secs(25) * times()).await; // the absence is under test
    expected.extend(run_some(&container, 1).await?);
    fake.come_back()?;
    ensure!(container.destroy().await? == 137);
    expected.extend(["exit", "delete"].map(str::to_owned));
    let published = told_of(&stand).await?;
    ensure!(published == expected, "{published:?}");
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// The shim cannot know whether the daemon got the event: it must send this one again, in its place, and no other.
async fn an_event_in_flight_when_the_daemon_crashes_is_sent_again(stand: Stand) -> Result<()> {
    let fake = stand.containerd();
    let container = sleeper(&stand, "c1").await?;
    fake.events().of_until("c1", "start").await?;
    fake.behave(Manner::HangUp { taken: true });
    container.add("e", &["true"]).await?;
    let times = || fake.events().of("c1").iter().filter(|event| *event == "exec-added(e)").count();
    eventually("the event was received, and is sent again", SOON, async || {
        ensure!(times() >= 2, "{} times", times());
        Ok(())
    })
    .await?;
    fake.behave(Manner::Accept);
    container.task.start("c1", "e").await?;
    ensure!(container.task.wait("c1", "e").await? == 0);
    ensure!(container.destroy().await? == 137);
    let published = told_of(&stand).await?;
    ensure!(published == ["create", "start", "exec-added(e)", "exec-started(e)", "exit(e)", "exit", "delete"], "{published:?}");
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// The daemon refuses one event for good: the others must arrive.
async fn a_permanently_refused_event_does_not_delay_the_next_ones(stand: Stand) -> Result<()> {
    let fake = stand.containerd();
    fake.behave(Manner::Refuse(Code::InvalidArgument));
    let container = stand.bundle("c1", &["sleep", "1000"]).create().await?;
    eventually("it was refused", SOON, async || {
        ensure!(fake.tries() >= 1, "{}", fake.tries());
        Ok(())
    })
    .await?;
    fake.behave(Manner::Accept);
    container.start().await?;
    ensure!(container.destroy().await? == 137);
    let published = fake.events().of_until("c1", "delete").await?;
    ensure!(published.ends_with(&["start", "exit", "delete"].map(str::to_owned)), "{published:?}");
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn a_daemon_that_is_slow_to_take_events_delays_no_call(stand: Stand) -> Result<()> {
    stand.containerd().behave(Manner::Silent);
    let container = within("run, though events wait", SOON, stand.bundle("c1", &["sleep", "1000"]).run()).await??;
    within("execs, though events wait", SOON, run_some(&container, 0)).await??;
    ensure!(within("the end, though events wait", SOON, container.destroy()).await?? == 137);
    stand.containerd().vanish();
    stand.containerd().behave(Manner::Accept);
    stand.containerd().come_back()?;
    leave(&container.task, container.shim_pid()?, "c1").await
}
