//! When a shim leaves: not before the last container is deleted, and then at once.

use std::time::Instant;

use anyhow::{Result, ensure};
use shim_tests::bundle::Container;
use shim_tests::eventually::{SOON, a_second, eventually_true};
use shim_tests::proc;
use shim_tests::stand::Stand;
use shim_tests::ttrpc::{Answer, CallError};

/// An answer, or the end of a shim that had nothing left to do.
fn answered_or_gone<T>(answer: Answer<T>) -> Answer<Option<T>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(CallError::Closed) => Ok(None),
        Err(error) => Err(error),
    }
}

async fn gone_within_a_second(shim: i32) -> Result<()> {
    let begin = Instant::now();
    eventually_true("the shim has left", SOON, || !proc::is_alive(shim)).await?;
    ensure!(begin.elapsed() < a_second(), "it took {:?}", begin.elapsed());
    Ok(())
}

pub(crate) async fn a_shim_leaves_with_its_last_container_and_not_before(stand: Stand) -> Result<()> {
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
    ensure!(!again.task.socket().exists(), "its socket is there");
    Ok(())
}

/// Its client was killed between Delete and Shutdown.
pub(crate) async fn a_shim_without_containers_and_clients_leaves_without_shutdown(stand: Stand) -> Result<()> {
    let container = stand.instant("c1", &["sleep", "1000"]).run().await?;
    let (shim, socket) = (container.shim_pid()?, container.task.socket().to_owned());
    container.destroy().await?;
    // while a client is connected, it may want to create another
    ensure!(container.task.state("c1", "").await.is_err() && proc::is_alive(shim));
    drop(container);
    eventually_true("the shim has left", SOON * 3, || !proc::is_alive(shim)).await?;
    ensure!(!socket.exists(), "its socket is there");
    Ok(())
}
