//! When a shim leaves: not before the last container is deleted, and then at once.

use std::time::Instant;

use anyhow::{Result, ensure};
use shim_tests::bundle::Container;
use shim_tests::eventually::{SOON, a_second, eventually_true, within};
use shim_tests::proc;
use shim_tests::stand::Stand;
use shim_tests::task::Task;
use shim_tests::ttrpc::{Answer, CallError};
use tokio::task::JoinSet;

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
    // deleted, but not told to leave: whoever has the connection may want to create another
    ensure!(others[2].task.state("c4", "").await.is_err() && proc::is_alive(shim));
    let again = stand.instant("c5", &["sleep", "1000"]).group("pod").run_in(&others[2].task).await?;
    again.destroy().await?;
    answered_or_gone(again.task.shutdown("c5").await)?;
    gone_within_a_second(shim).await?;
    ensure!(!again.task.socket().exists(), "its socket is there");
    Ok(())
}

pub(crate) async fn delete_and_shutdown_at_once_leave_nothing_a_hundred_times(stand: Stand) -> Result<()> {
    for round in 0..100 {
        let container = stand.instant(&format!("c{round}"), &["true"]).run().await?;
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
        // that Shutdown may have come first; one that comes after the answer to Delete is obeyed
        answered_or_gone(other.shutdown(id).await)?;
        gone_within_a_second(shim).await?;
    }
    Ok(())
}

/// As with a pod that is removed: everybody deletes and says Shutdown at the same time.
pub(crate) async fn a_group_that_is_deleted_all_at_once_leaves_nothing(stand: Stand) -> Result<()> {
    for round in 0..10 {
        let first = stand.instant(&format!("c{round}-0"), &["true"]).group(&format!("pod{round}")).run().await?;
        let shim = first.shim_pid()?;
        let mut ends = JoinSet::new();
        for number in 1..10 {
            let bundle = stand.instant(&format!("c{round}-{number}"), &["true"]).group(&format!("pod{round}"));
            let task = Task::connect(&bundle.start_shim().await?).await?;
            let member = bundle.run_in(&task).await?;
            ends.spawn(end(member));
        }
        ends.spawn(end(first));
        while let Some(end) = within("the end of a member", SOON, ends.join_next()).await? {
            end??;
        }
        gone_within_a_second(shim).await?;
    }
    Ok(())
}

async fn end(container: Container) -> Result<()> {
    container.finish().await?;
    answered_or_gone(container.task.shutdown(&container.id).await)?;
    Ok(())
}
