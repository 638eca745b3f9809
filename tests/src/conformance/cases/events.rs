//! What the shim publishes: every event, once, in order, whatever containerd does meanwhile.

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
        let told = stand.containerd().events().of_until(&id, "delete").await?;
        ensure!(told == ["create", "start", "exit", "delete"], "{told:?}");
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
    let told = events.of("c1");
    ensure!(told.first().is_some_and(|event| event == "create") && !told.contains(&"start".to_owned()), "{told:?}");
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
    let told = stand.containerd().events().of_until("c1", "delete").await?;
    ensure!(told == ["create", "start", "paused", "resumed", "exit", "delete"], "{told:?}");
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn the_deletion_of_an_exec_is_published(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    ensure!(container.run("e", &["sh", "-c", "exit 4"]).await? == 4);
    ensure!(container.destroy().await? == 137);
    let told = stand.containerd().events().of_until("c1", "delete").await?;
    let expected = ["create", "start", "exec-added(e)", "exec-started(e)", "exit(e)", "delete(e)", "exit", "delete"];
    leave(&container.task, container.shim_pid()?, "c1").await?;
    ensure!(told == expected, "{told:?}");
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
        let told = stand.containerd().events().of_until(&id, "delete").await?;
        init_is_the_last_of(3, &told).with_context(|| format!("round {round}"))?;
    }
    anchor.shut_down().await.map(drop)
}

/// The runtime is busy with one exec when init dies; a second one is asked for meanwhile.
async fn inits_exit_is_published_while_execs_start(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime())?;
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
        // neither can be started in a container that is dead, or it was before that
        let _either = within("start", SOON, start).await??;
    }
    ensure!(waiting.status(SOON).await? == 137);
    for exec in ["e1", "e2"] {
        container.task.delete("c1", exec).await?;
    }
    ensure!(container.task.delete("c1", "").await?.exit_status == 137);
    let told = stand.containerd().events().of_until("c1", "delete").await?;
    ensure!(told.iter().filter(|event| *event == "exit").count() == 1, "{told:?}");
    ensure!(told.iter().any(|event| event == "exit") && told.last().is_some_and(|event| event == "delete"), "{told:?}");
    crate::bundle::leave(&container.task, container.shim_pid()?, "c1").await
}

/// Adds, runs and deletes processes, and says what is to be told of them.
async fn run_some(container: &Container, round: usize) -> Result<Vec<String>> {
    let mut expected = Vec::new();
    for number in 0..3 {
        let exec = format!("e{round}-{number}");
        ensure!(container.run(&exec, &["true"]).await? == 0);
        expected.extend(["exec-added", "exec-started", "exit"].map(|topic| format!("{topic}({exec})")));
    }
    Ok(expected)
}

/// What was told of a container, without the deletions of execs and without what came twice in a row.
async fn told_of(stand: &Stand) -> Result<Vec<String>> {
    let mut told = stand.containerd().events().of_until("c1", "delete").await?;
    told.retain(|event| !event.starts_with("delete("));
    told.dedup();
    Ok(told)
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
        eventually("it tries again and again", SOON, async || {
            ensure!(fake.tries() > before + 1, "{manner:?}: {} tries", fake.tries() - before);
            Ok(())
        })
        .await?;
    }
    fake.behave(Manner::Accept);
    ensure!(container.destroy().await? == 137);
    expected.extend(["exit", "delete"].map(str::to_owned));
    let told = told_of(&stand).await?;
    ensure!(told == expected, "{told:?}");
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// Longer than the patience of the shims that give up.
async fn events_wait_for_an_absent_daemon(stand: Stand) -> Result<()> {
    let fake = stand.containerd();
    let container = sleeper(&stand, "c1").await?;
    let mut expected = fake.events().of_until("c1", "start").await?;
    fake.vanish();
    expected.extend(run_some(&container, 0).await?);
    tokio::time::sleep(Duration::from_secs(25) * times()).await; // how long it is away is what is tested
    expected.extend(run_some(&container, 1).await?);
    fake.come_back()?;
    ensure!(container.destroy().await? == 137);
    expected.extend(["exit", "delete"].map(str::to_owned));
    let told = told_of(&stand).await?;
    ensure!(told == expected, "{told:?}");
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// Whether the event was taken, nobody can know: it comes again, at its place, and nothing else does.
async fn an_event_in_flight_when_the_daemon_crashes_is_sent_again(stand: Stand) -> Result<()> {
    let fake = stand.containerd();
    let container = sleeper(&stand, "c1").await?;
    fake.events().of_until("c1", "start").await?;
    fake.behave(Manner::HangUp { taken: true });
    container.add("e", &["true"]).await?;
    let times = || fake.events().of("c1").iter().filter(|event| *event == "exec-added(e)").count();
    eventually("it was taken, and comes again", SOON, async || {
        ensure!(times() >= 2, "{} times", times());
        Ok(())
    })
    .await?;
    fake.behave(Manner::Accept);
    container.task.start("c1", "e").await?;
    ensure!(container.task.wait("c1", "e").await? == 0);
    ensure!(container.destroy().await? == 137);
    let told = told_of(&stand).await?;
    ensure!(told == ["create", "start", "exec-added(e)", "exec-started(e)", "exit(e)", "exit", "delete"], "{told:?}");
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// A daemon that refuses an event as such will refuse it for ever: the others have to come through.
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
    let told = fake.events().of_until("c1", "delete").await?;
    ensure!(told.ends_with(&["start", "exit", "delete"].map(str::to_owned)), "{told:?}");
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
