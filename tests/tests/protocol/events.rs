//! Published events: every event, once, in order, also while containerd is slow, refuses events or is down.

use std::time::Duration;

use anyhow::{Result, ensure};
use shim_tests::bundle::Container;
use shim_tests::events::init_is_the_last_of;
use shim_tests::eventually::{SOON, eventually, within};
use shim_tests::fake_containerd::Manner;
use shim_tests::stand::Stand;
use shim_tests::stdio;
use shim_tests::times::{repeated, times};
use shim_tests::ttrpc::Code;
use shim_tests::workloads;

/// How long containerd refuses altogether.
fn refusal_time() -> Duration {
    Duration::from_secs(20) * times()
}

/// Adds, runs and deletes execs; returns all events so far, with `create` and `start`.
async fn run_some(container: &Container, round: usize) -> Result<Vec<String>> {
    let mut expected = Vec::new();
    for number in 0..5 {
        let exec = format!("e{round}-{number}");
        ensure!(container.run(&exec, &["true"]).await? == 0);
        expected.extend([format!("exec-added({exec})"), format!("exec-started({exec})"), format!("exit({exec})")]);
    }
    Ok(expected)
}

pub(crate) async fn every_event_arrives_once_and_in_order_however_it_is_refused(stand: Stand) -> Result<()> {
    let fake = stand.containerd();
    // no daemon runs when the shim starts
    fake.vanish();
    let container = stand.instant("c1", &["sleep", "1000"]).run().await?;
    let mut expected = vec!["create".to_owned(), "start".to_owned()];
    let ways: [&dyn Fn() -> Result<()>; 6] = [
        &|| Ok(()),
        &|| {
            fake.behave(Manner::Refuse(Code::Unavailable));
            fake.come_back()
        },
        &|| {
            fake.behave(Manner::HangUp { taken: false });
            Ok(())
        },
        &|| {
            fake.behave(Manner::HangUpEarly);
            Ok(())
        },
        &|| {
            fake.behave(Manner::Refuse(Code::Unknown));
            Ok(())
        },
        &|| {
            fake.vanish();
            Ok(())
        },
    ];
    for (round, way) in ways.into_iter().enumerate() {
        way()?;
        expected.extend(run_some(&container, round).await?);
        let before = fake.tries();
        if round > 0 && round < 5 {
            eventually("the shim keeps trying", SOON, async || {
                ensure!(fake.tries() > before + 1, "{} tries", fake.tries() - before);
                Ok(())
            })
            .await?;
        }
        tokio::time::sleep(refusal_time() / 6).await; // the length of the refusal is under test
        ensure!(fake.events().all().is_empty());
    }
    fake.behave(Manner::Accept);
    fake.come_back()?;
    expected.extend(run_some(&container, 6).await?);
    ensure!(container.destroy().await? == 137);
    expected.extend(["exit".to_owned(), "delete".to_owned()]);
    let published = fake.events().of_until("c1", "delete").await?;
    ensure!(published == expected, "{published:#?}");
    shim_tests::bundle::leave(&container.task, container.shim_pid()?, "c1").await
}

/// The shim waits for a containerd that never acknowledges an event, and sends the event again when containerd crashes.
pub(crate) async fn an_event_without_an_acknowledgement_holds_back_the_next_ones(stand: Stand) -> Result<()> {
    let fake = stand.containerd();
    fake.behave(Manner::Silent);
    let container = stand.instant("c1", &["sleep", "1000"]).run().await?;
    let first = run_some(&container, 0).await?;
    eventually("the first has come", SOON, async || {
        ensure!(fake.tries() == 1, "{}", fake.tries());
        Ok(())
    })
    .await?;
    fake.vanish();
    fake.behave(Manner::Accept);
    fake.come_back()?;
    ensure!(container.destroy().await? == 137);
    let mut expected = vec!["create".to_owned(), "start".to_owned()];
    expected.extend(first);
    expected.extend(["exit".to_owned(), "delete".to_owned()]);
    let published = fake.events().of_until("c1", "delete").await?;
    ensure!(published == expected, "{published:?}");
    shim_tests::bundle::leave(&container.task, container.shim_pid()?, "c1").await
}

/// The receiver answers garbage.
pub(crate) async fn an_event_answered_with_garbage_is_sent_again(stand: Stand) -> Result<()> {
    let fake = stand.containerd();
    fake.behave(Manner::Garbage);
    let container = stand.instant("c1", &["sleep", "1000"]).run().await?;
    eventually("it is sent again", SOON, async || {
        ensure!(fake.tries() >= 3, "{} tries", fake.tries());
        Ok(())
    })
    .await?;
    fake.behave(Manner::Accept);
    ensure!(container.destroy().await? == 137);
    let published = fake.events().of_until("c1", "delete").await?;
    ensure!(published == ["create", "start", "exit", "delete"], "{published:?}");
    shim_tests::bundle::leave(&container.task, container.shim_pid()?, "c1").await
}

/// containerd refuses one event for good: the others must arrive.
pub(crate) async fn a_permanently_refused_event_does_not_delay_the_next_ones(stand: Stand) -> Result<()> {
    let fake = stand.containerd();
    fake.behave(Manner::Refuse(Code::InvalidArgument));
    let container = stand.instant("c1", &["sleep", "1000"]).create().await?;
    eventually("it was refused", SOON, async || {
        ensure!(fake.tries() == 1, "{}", fake.tries());
        Ok(())
    })
    .await?;
    fake.behave(Manner::Accept);
    container.start().await?;
    ensure!(container.destroy().await? == 137);
    let published = fake.events().of_until("c1", "delete").await?;
    ensure!(published == ["start", "exit", "delete"], "{published:?}");
    shim_tests::bundle::leave(&container.task, container.shim_pid()?, "c1").await
}

pub(crate) async fn events_of_two_thousand_short_execs_are_published_in_order(stand: Stand) -> Result<()> {
    let total = repeated(2000);
    let container = stand.instant("c1", &["sleep", "1000"]).run().await?;
    let published = workloads::short_execs(&container, total, 8).await?;
    ensure!(published.len() == 4 + 3 * total, "{} events", published.len());
    let different: std::collections::BTreeSet<_> = published.iter().collect();
    ensure!(different.len() == published.len(), "an event was published twice");
    shim_tests::bundle::leave(&container.task, container.shim_pid()?, "c1").await
}

/// Init and an exec exit at the same moment, for the same reason.
pub(crate) async fn simultaneous_exits_are_published_with_init_last(stand: Stand) -> Result<()> {
    let anchor = stand.instant("anchor", &["sleep", "1000"]).group("pod").run().await?;
    for round in 0..30 {
        let id = format!("c{round}");
        let gate = stand.folder().join(&id);
        stdio::fifo(&gate)?;
        let script = format!("read line < {}", gate.display());
        let container = stand.instant(&id, &["sh", "-c", &script]).group("pod").run_in(&anchor.task).await?;
        for exec in ["e1", "e2"] {
            container.exec(exec, &["sh", "-c", &script]).await?;
        }
        // a blocking open would wait for the first of them only
        eventually("all three read", SOON, async || {
            let pids = [container.pid, container.task.state(&id, "e1").await?.pid, container.task.state(&id, "e2").await?.pid];
            for pid in pids {
                let name = std::fs::read_to_string(format!("/proc/{pid}/wchan"))?;
                ensure!(name.contains("wait_for_partner"), "{pid} is in {name}");
            }
            Ok(())
        })
        .await?;
        drop(stdio::Writer::open(&gate).await?);
        within("the end", SOON, container.task.wait(&id, "")).await??;
        container.task.delete(&id, "").await?;
        let published = stand.containerd().events().of_until(&id, "delete").await?;
        init_is_the_last_of(3, &published)?;
    }
    anchor.shut_down().await.map(drop)
}
