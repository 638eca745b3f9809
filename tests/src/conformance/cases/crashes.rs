//! A shim that is killed or stopped: effect and answer of `delete`.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use protobuf::Message as _;

use super::{Streams, sleeper};
use crate::bundle::leave;
use crate::clauses;
use crate::conformance::Case;
use crate::eventually::{SOON, eventually, eventually_true, patience, within};
use crate::proc::{self, signal};
use crate::stand::Stand;
use crate::task::Task;
use crate::ttrpc::CallError;

pub(super) fn cases() -> Vec<Case> {
    clauses![crashes:
        "D1" => delete_kills_what_a_dead_shim_left_behind;
        "D2" => delete_unmounts_the_root_file_system;
        "D3" => delete_of_a_container_that_was_never_created_succeeds;
        "D4" => the_same_id_works_again_after_the_shim_was_killed;
        "D5" => an_exit_code_outlives_the_shim;
        "D6" => delete_returns_the_same_answer_each_time;
        "D7" => delete_after_a_deletion_affects_no_other_container;
        "D8" => delete_beside_a_stopped_shim_kills_the_container_in_time;
        "D9" => a_dead_shim_accepts_no_connection;
        "D10" => delete_ends_every_container_of_a_killed_shims_pod;
        "D11" => an_exit_is_recorded_on_a_full_disk;
        "D12" => delete_ends_a_create_in_progress;
        "D13" => delete_removes_the_socket_of_a_dead_shim;
    ]
}

/// Kills a shim and waits until it is dead.
async fn kill_shim(shim: i32) -> Result<()> {
    proc::kill_hard(shim);
    eventually_true("the shim is dead", SOON, || !proc::is_alive(shim)).await
}

async fn delete_kills_what_a_dead_shim_left_behind(stand: Stand) -> Result<()> {
    let paths = ["running", "created", "paused", "exec"];
    for id in paths {
        let container = stand.bundle(id, &["sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000"]).create().await?;
        if id != "created" {
            container.start().await?;
        }
        match id {
            "paused" => container.task.pause(id).await?,
            "exec" => drop(container.exec("e", &["sleep", "1000"]).await?),
            _ => {}
        }
        kill_shim(container.shim_pid()?).await?;
        let begin = Instant::now();
        let deleted = container.bundle.delete_command().await?;
        ensure!(begin.elapsed() < Duration::from_secs(5) * patience(), "{id}: it took {:?}", begin.elapsed());
        ensure!(deleted.exit_status == 137, "{id}: {deleted:?}");
        let pid = container.pid.cast_signed();
        eventually_true(format!("{id}: its init is dead"), Duration::from_secs(2), || !proc::is_alive(pid)).await?;
    }
    Ok(())
}

async fn delete_unmounts_the_root_file_system(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    let rootfs = container.bundle.folder.join("rootfs").display().to_string();
    // A shim may have mounted it in the container's mount namespace alone: then there is nothing to see before either.
    let is_mounted = || anyhow::Ok(fs::read_to_string("/proc/self/mountinfo")?.contains(&rootfs));
    kill_shim(container.shim_pid()?).await?;
    container.bundle.delete_command().await?;
    ensure!(!is_mounted()?, "it is still mounted");
    Ok(())
}

async fn delete_removes_the_socket_of_a_dead_shim(stand: Stand) -> Result<()> {
    for id in ["running", "deleted"] {
        let container = sleeper(&stand, id).await?;
        if id == "deleted" {
            // it is killed before Shutdown is called
            ensure!(container.destroy().await? == 137);
        }
        kill_shim(container.shim_pid()?).await?;
        container.bundle.delete_command().await?;
        ensure!(!container.task.socket().exists(), "{id}: {} is left", container.task.socket().display());
    }
    Ok(())
}

/// containerd runs it when `start` or Create has failed, too.
async fn delete_of_a_container_that_was_never_created_succeeds(stand: Stand) -> Result<()> {
    let bundle = stand.bundle("c1", &["true"]);
    bundle.write()?;
    let deleted = bundle.delete_command().await?;
    ensure!(deleted.exit_status == 137, "{deleted:?}");
    // and with a shim that has not created the container yet
    let other = stand.bundle("c2", &["true"]);
    let task = other.shim().await?;
    let shim = other.shim_pid()?;
    ensure!(other.delete_command().await?.exit_status == 137);
    let _it_may_have_left = task.shutdown("c2").await;
    eventually_true("the shim has exited", SOON, || !proc::is_alive(shim)).await
}

async fn the_same_id_works_again_after_the_shim_was_killed(stand: Stand) -> Result<()> {
    let first = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    kill_shim(first.shim_pid()?).await?;
    ensure!(first.bundle.delete_command().await?.exit_status == 137);
    // containerd removes the bundle, and creates another one with the same id
    fs::remove_dir_all(&first.bundle.folder)?;
    let second = stand.bundle("c1", &["sh", "-c", "exit 4"]).run().await?;
    ensure!(second.finish().await? == 4);
    crate::bundle::leave(&second.task, second.shim_pid()?, "c1").await
}

async fn an_exit_code_outlives_the_shim(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sh", "-c", "exit 3"]).run().await?;
    ensure!(container.task.wait("c1", "").await? == 3);
    let state = container.task.state("c1", "").await?;
    kill_shim(container.shim_pid()?).await?;
    for _ in 0..3 {
        let begin = Instant::now();
        let deleted = container.bundle.delete_command().await?;
        ensure!(begin.elapsed() < Duration::from_secs(5) * patience(), "it took {:?}", begin.elapsed());
        ensure!(deleted.exit_status == 3 && deleted.pid == container.pid, "{deleted:?}");
        // to the nanosecond
        ensure!(deleted.exited_at == state.exited_at, "{:?} and {:?}", deleted.exited_at, state.exited_at);
    }
    Ok(())
}

async fn delete_returns_the_same_answer_each_time(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    kill_shim(container.shim_pid()?).await?;
    let first = container.bundle.delete_command().await?;
    for _ in 0..2 {
        let again = container.bundle.delete_command().await?;
        ensure!(again == first, "{first:?}, then {again:?}");
    }
    Ok(())
}

/// containerd runs it after each normal deletion, with the shim alive or just gone.
async fn delete_after_a_deletion_affects_no_other_container(stand: Stand) -> Result<()> {
    let anchor = stand.bundle("anchor", &["sleep", "1000"]).group("pod").run().await?;
    let container = stand.bundle("c1", &["sh", "-c", "exit 3"]).group("pod");
    container.start_shim().await?;
    let container = container.run_in(&anchor.task).await?;
    ensure!(container.finish().await? == 3);
    container.bundle.delete_command().await?;
    ensure!(anchor.task.state("anchor", "").await?.pid == anchor.pid && proc::is_alive(anchor.pid.cast_signed()));
    ensure!(anchor.shut_down().await? == 137);
    for bundle in [&container.bundle, &anchor.bundle] {
        bundle.delete_command().await?;
    }
    Ok(())
}

/// The shim does not answer: `delete` cleans up by itself.
async fn delete_beside_a_stopped_shim_kills_the_container_in_time(stand: Stand) -> Result<()> {
    let running = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let ended = stand.bundle("c2", &["sh", "-c", "exit 3"]).run().await?;
    ensure!(ended.task.wait("c2", "").await? == 3);
    for (container, status) in [(&running, 137), (&ended, 3)] {
        let shim = container.shim_pid()?;
        signal(shim, Signal::SIGSTOP)?;
        let begin = Instant::now();
        let deleted = container.bundle.delete_command().await;
        let took = begin.elapsed();
        signal(shim, Signal::SIGCONT)?;
        ensure!(deleted?.exit_status == status);
        ensure!(took < Duration::from_secs(5) * patience(), "it took {took:?}");
        let pid = container.pid.cast_signed();
        ensure!(!proc::is_alive(pid), "its init is alive");
        // once continued, the shim answers calls unless it has exited
        match container.task.delete(&container.id, "").await {
            Ok(deleted) => ensure!(deleted.exit_status == status, "{deleted:?}"),
            Err(CallError::Closed) => {}
            Err(error) => ensure!(error.code().is_some(), "{error}"),
        }
        leave(&container.task, shim, &container.id).await?;
    }
    Ok(())
}

/// A socket that accepts connections and never answers would keep the daemon from starting.
async fn a_dead_shim_accepts_no_connection(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    kill_shim(container.shim_pid()?).await?;
    let asked = within("an end of the connection", SOON, container.task.state("c1", "")).await?;
    ensure!(asked == Err(CallError::Closed), "{asked:?}");
    if let Ok(socket) = tokio::net::UnixStream::connect(container.task.socket()).await {
        drop(socket);
        let task = Task::connect(container.task.socket()).await?;
        let asked = task.state_within("c1", "", Duration::from_secs(2)).await;
        ensure!(asked == Err(CallError::Closed), "a connection is accepted: {asked:?}");
    }
    container.bundle.delete_command().await.map(drop)
}

/// Each member's own `delete`, as containerd runs them when the connection ends.
async fn delete_ends_every_container_of_a_killed_shims_pod(stand: Stand) -> Result<()> {
    let first = stand.bundle("c1", &["sleep", "1000"]).group("pod").run().await?;
    let mut pod = Vec::new();
    for id in ["c2", "c3"] {
        let bundle = stand.bundle(id, &["sleep", "1000"]).group("pod");
        bundle.start_shim().await?;
        pod.push(bundle.run_in(&first.task).await?);
    }
    kill_shim(first.shim_pid()?).await?;
    pod.push(first);
    for container in &pod {
        let deleted = container.bundle.delete_command().await?;
        ensure!(deleted.exit_status == 137, "{}: {deleted:?}", container.id);
        let pid = container.pid.cast_signed();
        eventually_true(format!("{}: its init is dead", container.id), Duration::from_secs(2), || !proc::is_alive(pid)).await?;
    }
    Ok(())
}

/// The disk is full when the container ends: its exit code is recorded nevertheless.
async fn an_exit_is_recorded_on_a_full_disk(stand: Stand) -> Result<()> {
    use nix::mount::{MsFlags, mount};
    let disk = stand.folder().join("b");
    mount(Some("tmpfs"), &disk, Some("tmpfs"), MsFlags::empty(), Some("size=256k"))?;
    let streams = Streams::new(&stand, "io")?;
    let container = streams.all(stand.bundle("c1", &["sh", "-c", "read go; exit 3"])).run().await?;
    let full = fs::write(disk.join("filler"), vec![0; 1 << 20]);
    ensure!(full.is_err(), "the disk is not full");
    streams.writer().await?.write_all(b"go\n")?;
    ensure!(container.task.wait("c1", "").await? == 3);
    kill_shim(container.shim_pid()?).await?;
    let deleted = container.bundle.delete_command().await?;
    ensure!(deleted.exit_status == 3, "{deleted:?}");
    ensure!(container.bundle.delete_command().await? == deleted, "the second answer differs");
    nix::mount::umount2(&disk, nix::mount::MntFlags::MNT_DETACH)?;
    Ok(())
}

async fn delete_ends_a_create_in_progress(stand: Stand) -> Result<()> {
    for after in [false, true] {
        let gate = stand.gate(&stand.runtime_program()?)?;
        let bundle = stand.bundle(if after { "c2" } else { "c1" }, &["sleep", "1000"]).runtime(&gate.binary());
        let task = bundle.shim().await?;
        if after {
            gate.hold_after("create")?
        } else {
            gate.hold("create")?
        }
        let create = task.connection().begin(task.service_name(), "Create", bundle.request().write_to_bytes()?).await?;
        gate.held("create").await?;
        let begin = Instant::now();
        ensure!(bundle.delete_command().await?.exit_status == 137);
        ensure!(begin.elapsed() < Duration::from_secs(5) * patience(), "it took {:?}", begin.elapsed());
        let shim = bundle.shim_pid()?;
        gate.release("create")?;
        // the shim may have exited without an answer
        let _either = within("the answer to Create", SOON, create).await?;
        let _either = task.shutdown(&bundle.id).await;
        eventually_true("the shim has exited", SOON, || !proc::is_alive(shim)).await?;
        eventually("nothing is left behind", SOON, async || {
            let left = stand.leftovers();
            ensure!(left.is_empty(), "after: {after}: {left:#?}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}
