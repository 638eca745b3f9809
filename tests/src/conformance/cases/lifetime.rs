//! Lifetime of a shim: when it stays, when it exits, and leftovers.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::task::JoinSet;

use super::{Streams, sleeper};
use crate::bundle::Container;
use crate::clauses;
use crate::conformance::Case;
use crate::eventually::{SOON, a_second, eventually, eventually_true, within};
use crate::proc;
use crate::programs;
use crate::stand::Stand;
use crate::suite::Shim;
use crate::task::Task;
use crate::times::repeated;
use crate::ttrpc::{Answer, CallError};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = clauses![lifetime:
        "G1" => a_new_connection_finds_everything_unchanged;
        "G2" => a_shim_stays_while_it_has_a_container;
        "G3" => a_shim_exits_on_shutdown, the_socket_is_removed_when_the_shim_exits;
        "G4" => concurrent_delete_and_shutdown_are_answered;
        "G5" => a_group_deleted_concurrently_leaves_nothing;
        "G6" => an_exec_with_open_stdin_keeps_no_shim_alive;
        "G7" => the_last_events_are_published_before_the_shim_exits;
        "G8" => a_removed_binary_affects_no_running_container;
    ];
    cases.extend(clauses![lifetime: "G9" => nothing_grows].into_iter().map(|case| case.within(Duration::from_secs(120))));
    cases
}

/// An answer, or a closed connection of a shim that had no container left.
fn answered_or_gone<T>(answer: Answer<T>) -> Answer<Option<T>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(CallError::Closed) => Ok(None),
        Err(error) => Err(error),
    }
}

async fn gone(shim: i32) -> Result<()> {
    eventually_true("the shim has exited", SOON, || !proc::is_alive(shim)).await
}

/// As after a restart of the daemon: all old connections are closed.
async fn a_new_connection_finds_everything_unchanged(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let container = streams.all(stand.bundle("c1", &["sh", "-c", "read line; echo got $line; exit 3"])).run().await?;
    container.exec("e", &["sleep", "1000"]).await?;
    let shim = container.shim_pid()?;
    let before = container.task.state("c1", "").await?;
    let socket = container.task.socket().to_owned();
    // a Wait is in progress when the connection closes
    drop(container.task.begin_wait("c1", "").await?);
    let Container { task, pid, bundle, .. } = container;
    drop(task);
    let task = Task::connect(&socket).await?;
    ensure!(task.state("c1", "").await? == before, "State has changed");
    ensure!(task.state("c1", "e").await?.status.value() == 2, "the exec");
    let connect = task.connect_to("c1").await?;
    ensure!(connect.task_pid == pid && connect.shim_pid.cast_signed() == shim, "{connect}");
    ensure!(task.pids("c1").await?.contains(&pid));
    streams.writer().await?.write_all(b"it\n")?;
    ensure!(task.wait("c1", "").await? == 3);
    ensure!(streams.out.until("got it").await?.contains("got it"));
    let container = Container { task, id: "c1".to_owned(), pid, bundle };
    ensure!(container.finish().await? == 3);
    crate::bundle::leave(&container.task, shim, "c1").await
}

async fn a_shim_stays_while_it_has_a_container(stand: Stand) -> Result<()> {
    let first = stand.bundle("c1", &["sleep", "1000"]).group("pod").run().await?;
    let second = stand.bundle("c2", &["sleep", "1000"]).group("pod").run_in(&first.task).await?;
    let shim = first.shim_pid()?;
    // as when the pause container of a pod is deleted first
    first.task.shutdown("c1").await?;
    first.destroy().await?;
    first.task.shutdown("c1").await?;
    for _ in 0..20 {
        ensure!(second.task.state("c2", "").await?.pid == second.pid);
    }
    ensure!(proc::is_alive(shim) && second.run("e", &["sh", "-c", "exit 4"]).await? == 4);
    second.destroy().await?;
    crate::bundle::leave(&second.task, shim, "c2").await
}

async fn a_shim_exits_on_shutdown(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["true"]).run().await?;
    let shim = container.shim_pid()?;
    container.finish().await?;
    answered_or_gone(container.task.shutdown("c1").await)?;
    gone(shim).await
}

async fn the_socket_is_removed_when_the_shim_exits(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["true"]).run().await?;
    let shim = container.shim_pid()?;
    container.finish().await?;
    answered_or_gone(container.task.shutdown("c1").await)?;
    gone(shim).await?;
    eventually_true("the socket is gone", SOON, || !container.task.socket().exists()).await
}

async fn concurrent_delete_and_shutdown_are_answered(stand: Stand) -> Result<()> {
    for round in 0..repeated(50) {
        let container = stand.bundle(&format!("c{round}"), &["true"]).run().await?;
        let (shim, id) = (container.shim_pid()?, container.id.as_str());
        let other = container.task.another().await?;
        container.task.wait(id, "").await?;
        // on one connection, on two, and with a State and a Wait in between
        let (deleted, shut, state, waited) = match round % 2 {
            0 => tokio::join!(container.task.delete(id, ""), container.task.shutdown(id), other.state(id, ""), other.wait(id, "")),
            _ => tokio::join!(container.task.delete(id, ""), other.shutdown(id), container.task.state(id, ""), other.wait(id, "")),
        };
        ensure!(deleted?.exit_status == 0);
        answered_or_gone(shut)?;
        for answer in [state.map(drop), waited.map(drop)] {
            ensure!(!matches!(answer, Err(CallError::Silent)), "no answer");
        }
        // that Shutdown may have been handled before Delete; this one comes after its answer, so the shim exits
        answered_or_gone(other.shutdown(id).await)?;
        gone(shim).await?;
    }
    Ok(())
}

/// Another member's Shutdown may be faster than the answer to this one's Delete.
async fn end(container: Container) -> Result<()> {
    answered_or_gone(container.task.wait(&container.id, "").await)?;
    answered_or_gone(container.task.delete(&container.id, "").await)?;
    answered_or_gone(container.task.shutdown(&container.id).await)?;
    Ok(())
}

/// As with a pod that is removed: every container is deleted and Shutdown called at the same time.
async fn a_group_deleted_concurrently_leaves_nothing(stand: Stand) -> Result<()> {
    for round in 0..5 {
        let first = stand.bundle(&format!("c{round}-0"), &["true"]).group(&format!("pod{round}")).run().await?;
        let shim = first.shim_pid()?;
        let mut ends = JoinSet::new();
        for number in 1..10 {
            let bundle = stand.bundle(&format!("c{round}-{number}"), &["true"]).group(&format!("pod{round}"));
            let task = Task::connect(&bundle.start_shim().await?).await?;
            let member = bundle.run_in(&task).await?;
            ends.spawn(end(member));
        }
        ends.spawn(end(first));
        while let Some(end) = within("the end of a member", SOON, ends.join_next()).await? {
            end??;
        }
        gone(shim).await?;
    }
    Ok(())
}

/// stdin is open on both sides and stays open.
async fn an_exec_with_open_stdin_keeps_no_shim_alive(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let container = sleeper(&stand, "c1").await?;
    container.task.exec(&streams.exec(container.bundle.exec_request("e", &["cat"]))).await?;
    container.task.start("c1", "e").await?;
    let mut writer = streams.writer().await?;
    writer.write_all(b"hello\n")?;
    streams.out.until("hello").await?;
    let shim = container.shim_pid()?;
    ensure!(container.destroy().await? == 137);
    answered_or_gone(container.task.shutdown("c1").await)?;
    eventually_true("the shim has exited", a_second(), || !proc::is_alive(shim)).await?;
    drop(writer);
    Ok(())
}

/// The daemon is away while the last container is deleted, and while the shim is looked at fifty times after that.
async fn the_last_events_are_published_before_the_shim_exits(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let shim = container.shim_pid()?;
    stand.containerd().events().of_until("c1", "start").await?;
    stand.containerd().vanish();
    ensure!(container.destroy().await? == 137);
    answered_or_gone(container.task.shutdown("c1").await)?;
    for _ in 0..50 {
        ensure!(proc::is_alive(shim), "it has exited with unsent events");
        let _it_need_not_take_any_more = container.task.state("c1", "").await;
    }
    stand.containerd().come_back()?;
    let mut published = stand.containerd().events().of_until("c1", "delete").await?;
    // the event in flight when the daemon stopped may come twice
    published.dedup();
    ensure!(published == ["create", "start", "exit", "delete"], "{published:?}");
    gone(shim).await
}

/// An upgrade replaces the file, and moves the old one away.
async fn a_removed_binary_affects_no_running_container(stand: Stand) -> Result<()> {
    let program = stand.folder().join(stand.binary().file_name().context("a file")?);
    programs::copy(stand.binary(), &program)?;
    let other = stand.with_shim(&Shim { binary: Some(program.clone()), ..stand.shim().clone() })?;
    let streams = Streams::new(&other, "io")?;
    let container = streams.all(other.bundle("c1", &["sh", "-c", "read line; echo got $line; exit 3"]).group("pod")).run().await?;
    fs::rename(&program, stand.folder().join("moved"))?;
    ensure!(container.run("e", &["sh", "-c", "exit 4"]).await? == 4);
    let second = other.bundle("c2", &["sh", "-c", "exit 5"]).group("pod").run_in(&container.task).await?;
    ensure!(second.finish().await? == 5);
    streams.writer().await?.write_all(b"it\n")?;
    ensure!(container.finish().await? == 3);
    ensure!(streams.out.to_end().await? == "got it\n");
    let shim = container.shim_pid()?;
    answered_or_gone(container.task.shutdown("c1").await)?;
    gone(shim).await?;
    other.leaves_nothing().await
}

/// Containers and execs by the dozen, in one shim.
async fn nothing_grows(stand: Stand) -> Result<()> {
    let anchor = stand.bundle("anchor", &["sleep", "1000"]).group("pod").run().await?;
    let shim = anchor.shim_pid()?;
    let (mut after, mut files) = (Vec::new(), None);
    for round in 0..3 {
        for number in 0..repeated(10) {
            let id = format!("c{round}-{number}");
            let streams = Streams::new(&stand, &id)?;
            let bundle = streams.all(stand.bundle(&id, &["sh", "-c", "sleep 1000 & read line; exit 3"]).group("pod"));
            let container = bundle.run_in(&anchor.task).await?;
            ensure!(container.run("e", &["sh", "-c", "exit 4"]).await? == 4);
            streams.writer().await?.write_all(b"\n")?;
            ensure!(container.finish().await? == 3);
            streams.out.to_end().await?;
            streams.err.to_end().await?;
        }
        let zombies = || proc::all().into_values().filter(|process| process.parent == shim && process.is_zombie()).count();
        eventually_true("no zombie of the shim", SOON, || zombies() == 0).await?;
        let threads = proc::status_field(shim, "Threads")?;
        after.push((threads.parse::<usize>()?, proc::private_kib(shim)?));
        // some close a moment later
        let most = *files.get_or_insert(proc::open_files(shim)?.len());
        eventually("its descriptors are closed", SOON, async || {
            let files = proc::open_files(shim)?.len();
            ensure!(files <= most + 2, "{files}, {most} after the first round");
            Ok(())
        })
        .await?;
    }
    let [(threads, kib), .., (threads_now, kib_now)] = after[..] else { anyhow::bail!("three rounds") };
    ensure!(threads_now <= threads + 8 && kib_now <= kib + 4096, "threads, KiB: {after:?}");
    eventually("its mounts are gone", SOON, async || {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        ensure!(mounts.matches(&format!("/{}/b/c", stand.namespace())).count() == 0, "{mounts}");
        Ok(())
    })
    .await?;
    anchor.shut_down().await.map(drop)
}
