//! When a shim exits: as soon as the last container is deleted, not before. At the host's shutdown once no container runs. Not on any
//! other signal.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use shim_tests::bundle::Container;
use shim_tests::eventually::{SOON, a_second, eventually_true};
use shim_tests::proc;
use shim_tests::stand::Stand;
use shim_tests::ttrpc::{Answer, CallError};

/// An answer, or a closed connection of a shim that had no container left.
fn answered_or_gone<T>(answer: Answer<T>) -> Answer<Option<T>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(CallError::Closed) => Ok(None),
        Err(error) => Err(error),
    }
}

async fn gone_within_a_second(shim: i32) -> Result<()> {
    let begin = Instant::now();
    eventually_true("the shim has exited", SOON, || !proc::is_alive(shim)).await?;
    ensure!(begin.elapsed() < a_second(), "it took {:?}", begin.elapsed());
    Ok(())
}

pub(crate) async fn a_shim_exits_with_its_last_container_and_not_before(stand: Stand) -> Result<()> {
    let first = stand.instant("c1", &["sleep", "1000"]).group("pod").run().await?;
    let shim = first.shim_pid()?;
    let mut others: Vec<Container> = Vec::new();
    for number in 2..5 {
        others.push(stand.instant(&format!("c{number}"), &["sleep", "1000"]).group("pod").run_in(&first.task).await?);
    }
    for container in [first].iter().chain(&others[..2]) {
        container.task.shutdown(&container.id).await?;
        container.destroy().await?;
        container.task.shutdown(&container.id).await?;
        let rest = others[2].task.state("c4", "").await?;
        ensure!(rest.pid == others[2].pid, "{rest:?}");
    }
    ensure!(proc::is_alive(shim));
    others[2].destroy().await?;
    // deleted, but without Shutdown: the client may want to create another
    ensure!(others[2].task.state("c4", "").await.is_err() && proc::is_alive(shim));
    let again = stand.instant("c5", &["sleep", "1000"]).group("pod").run_in(&others[2].task).await?;
    again.destroy().await?;
    answered_or_gone(again.task.shutdown("c5").await)?;
    gone_within_a_second(shim).await?;
    ensure!(!again.task.socket().exists(), "its socket still exists");
    Ok(())
}

/// Sends a signal by its number: real-time ones have no name.
async fn signal(pid: i32, number: i32) -> Result<()> {
    let status = tokio::process::Command::new("kill").args([format!("-{number}"), pid.to_string()]).status().await.context("run kill")?;
    ensure!(status.success(), "signal {number} to {pid}: {status}");
    Ok(())
}

pub(crate) async fn no_stray_signal_ends_a_shim_or_its_worker(stand: Stand) -> Result<()> {
    let container = stand.instant("c1", &["sleep", "1000"]).run().await?;
    let (keeper, worker) = (container.shim_pid()?, container.worker_pid().await?);
    let shutdown = [Signal::SIGTERM as i32];
    let uncatchable = [Signal::SIGKILL as i32, Signal::SIGSTOP as i32];
    let crashes = [Signal::SIGABRT, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL, Signal::SIGSEGV, Signal::SIGSYS, Signal::SIGTRAP];
    for number in (1..=64).filter(|number| !uncatchable.contains(number)) {
        if !shutdown.contains(&number) {
            signal(keeper, number).await?;
        }
        // a worker that crashes is replaced
        if !crashes.iter().any(|crash| *crash as i32 == number) {
            signal(worker, number).await?;
        }
        let state = container.task.state("c1", "").await.with_context(|| format!("after signal {number}"))?;
        ensure!(state.pid == container.pid && proc::is_alive(keeper), "signal {number}: {state:?}");
        ensure!(container.worker_pid().await? == worker, "signal {number} ended the worker");
    }
    // the container's own processes do not inherit the signal mask
    ensure!(proc::status_field(container.pid.cast_signed(), "SigBlk")? == "0000000000000000");
    ensure!(stand.log_of("c1").contains("children of the keeper"), "SIGUSR1 has logged no state: {}", stand.log_of("c1"));
    ensure!(container.shut_down().await? == 137);
    Ok(())
}

pub(crate) async fn a_shim_exits_at_shutdown_once_no_container_runs_and_delete_knows_the_codes(stand: Stand) -> Result<()> {
    for daemon_is_there in [true, false] {
        let first = stand.instant("c1", &["sleep", "1000"]).group("pod").run().await?;
        let second = stand.instant("c2", &["sleep", "1000"]).group("pod").run_in(&first.task).await?;
        let shim = first.shim_pid()?;
        if !daemon_is_there {
            stand.containerd().vanish();
        }
        proc::signal(shim, Signal::SIGTERM)?;
        first.task.kill("c1", "", Signal::SIGTERM as u32).await?;
        let ended = first.task.wait("c1", "").await?;
        ensure!(ended == 143, "{ended}");
        ensure!(second.task.state("c2", "").await?.pid == second.pid, "it waits for the other container");
        proc::signal(second.pid.cast_signed(), Signal::SIGINT)?;
        let begin = Instant::now();
        eventually_true("the shim has exited", SOON, || !proc::is_alive(shim)).await?;
        let limit = if daemon_is_there { a_second() } else { a_second() * 4 };
        ensure!(begin.elapsed() < limit, "it took {:?}", begin.elapsed());
        ensure!(!first.task.socket().exists(), "its socket still exists");
        for (container, status) in [(&first, 143), (&second, 130)] {
            let published = stand.containerd().events().exits(&container.id, "");
            ensure!(!daemon_is_there || published.iter().any(|exit| exit.status == status), "{published:?}");
            ensure!(container.bundle.delete_command().await?.exit_status == status, "{}", container.id);
        }
        if !daemon_is_there {
            stand.containerd().come_back()?;
        }
        for container in [first, second] {
            std::fs::remove_dir_all(&container.bundle.folder)?;
        }
    }
    Ok(())
}

/// Its client was killed between Delete and Shutdown.
pub(crate) async fn a_shim_without_containers_and_clients_exits_without_shutdown(stand: Stand) -> Result<()> {
    let container = stand.instant("c1", &["sleep", "1000"]).run().await?;
    let (shim, socket) = (container.shim_pid()?, container.task.socket().to_owned());
    container.destroy().await?;
    // while a client is connected, it may want to create another
    ensure!(container.task.state("c1", "").await.is_err() && proc::is_alive(shim));
    drop(container);
    eventually_true("the shim has exited", SOON * 3, || !proc::is_alive(shim)).await?;
    ensure!(!socket.exists(), "its socket still exists");
    Ok(())
}
