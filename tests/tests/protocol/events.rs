//! What the shim tells containerd: everything, once, in order, whatever containerd does meanwhile.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use shim_tests::bundle::Container;
use shim_tests::eventually::{SOON, eventually, within};
use shim_tests::fake_containerd::Manner;
use shim_tests::stand::Stand;
use shim_tests::stdio;
use shim_tests::ttrpc::Code;
use tokio::task::JoinSet;

/// How long containerd refuses altogether; `X_TESTS_REFUSE_SECONDS` changes it.
fn refusal_time() -> Duration {
    let seconds = std::env::var("X_TESTS_REFUSE_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(20))
}

/// Adds, runs and deletes processes; `create`, `start` and theirs are the events so far.
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
    // nobody is there when it begins
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
            eventually("it tries again and again", SOON, async || {
                ensure!(fake.tries() > before + 1, "{} tries", fake.tries() - before);
                Ok(())
            })
            .await?;
        }
        tokio::time::sleep(refusal_time() / 6).await; // how long it is refused is what is tested
        ensure!(fake.events().all().is_empty());
    }
    fake.behave(Manner::Accept);
    fake.come_back()?;
    expected.extend(run_some(&container, 6).await?);
    ensure!(container.destroy().await? == 137);
    expected.extend(["exit".to_owned(), "delete".to_owned()]);
    let told = fake.events().of_until("c1", "delete").await?;
    ensure!(told == expected, "{told:#?}");
    shim_tests::bundle::leave(&container.task, container.shim_pid()?, "c1").await
}

/// Whether the event was taken, nobody can know: it comes again, at its place, and nothing else does.
pub(crate) async fn an_event_under_way_when_containerd_dies_comes_again_at_its_place(stand: Stand) -> Result<()> {
    let fake = stand.containerd();
    let container = stand.instant("c1", &["sleep", "1000"]).run().await?;
    let mut expected = fake.events().of_until("c1", "start").await?;
    fake.behave(Manner::HangUp { taken: true });
    container.add("e", &["true"]).await?;
    eventually("it was taken", SOON, async || {
        ensure!(!fake.events().of("c1").iter().filter(|event| *event == "exec-added(e)").collect::<Vec<_>>().is_empty());
        Ok(())
    })
    .await?;
    fake.behave(Manner::Accept);
    container.task.start("c1", "e").await?;
    ensure!(container.task.wait("c1", "e").await? == 0);
    ensure!(container.destroy().await? == 137);
    let mut told = fake.events().of_until("c1", "delete").await?;
    let times = told.iter().filter(|event| *event == "exec-added(e)").count();
    ensure!(times >= 2, "{told:?}");
    told.dedup();
    expected.extend(["exec-added(e)", "exec-started(e)", "exit(e)", "exit", "delete"].map(str::to_owned));
    ensure!(told == expected, "{told:?}");
    shim_tests::bundle::leave(&container.task, container.shim_pid()?, "c1").await
}

/// A containerd that takes an event and never says so is waited for, and when it dies, told again.
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
    let told = fake.events().of_until("c1", "delete").await?;
    ensure!(told == expected, "{told:?}");
    shim_tests::bundle::leave(&container.task, container.shim_pid()?, "c1").await
}

/// What answers is not containerd, or it is beside itself.
pub(crate) async fn an_event_that_is_answered_with_garbage_is_told_again(stand: Stand) -> Result<()> {
    let fake = stand.containerd();
    fake.behave(Manner::Garbage);
    let container = stand.instant("c1", &["sleep", "1000"]).run().await?;
    eventually("it is told again", SOON, async || {
        ensure!(fake.tries() >= 3, "{} tries", fake.tries());
        Ok(())
    })
    .await?;
    fake.behave(Manner::Accept);
    ensure!(container.destroy().await? == 137);
    let told = fake.events().of_until("c1", "delete").await?;
    ensure!(told == ["create", "start", "exit", "delete"], "{told:?}");
    shim_tests::bundle::leave(&container.task, container.shim_pid()?, "c1").await
}

/// A containerd that refuses an event as such will refuse it for ever: the others have to come through.
pub(crate) async fn an_event_that_is_refused_for_good_holds_nothing_back(stand: Stand) -> Result<()> {
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
    let told = fake.events().of_until("c1", "delete").await?;
    ensure!(told == ["start", "exit", "delete"], "{told:?}");
    shim_tests::bundle::leave(&container.task, container.shim_pid()?, "c1").await
}

pub(crate) async fn two_thousand_short_execs_are_told_as_added_started_and_exited_each(stand: Stand) -> Result<()> {
    let total = 2000;
    let container = stand.instant("c1", &["sleep", "1000"]).run().await?;
    let mut runs = JoinSet::new();
    let mut statuses = 0;
    for number in 0..total {
        let (task, request) = (container.task.clone(), container.bundle.exec_request(&format!("e{number}"), &["true"]));
        runs.spawn(async move {
            task.exec(&request).await?;
            task.start("c1", &request.exec_id).await?;
            let status = task.wait("c1", &request.exec_id).await?;
            task.delete("c1", &request.exec_id).await?;
            anyhow::Ok(status)
        });
        if runs.len() >= 8 {
            statuses += runs.join_next().await.context("it was spawned")???;
        }
    }
    while let Some(status) = runs.join_next().await {
        statuses += status??;
    }
    ensure!(statuses == 0, "{statuses}");
    ensure!(container.destroy().await? == 137);
    let told = stand.containerd().events().of_until("c1", "delete").await?;
    ensure!(told.len() == 4 + 3 * total, "{} events", told.len());
    let positions: std::collections::BTreeMap<&str, usize> = told.iter().enumerate().map(|(at, event)| (event.as_str(), at)).collect();
    ensure!(positions.len() == told.len(), "an event was told twice");
    for number in 0..total {
        let at = ["exec-added", "exec-started", "exit"].map(|topic| positions.get(&*format!("{topic}(e{number})")));
        ensure!(at[0].is_some() && at[0] < at[1] && at[1] < at[2], "e{number}: {at:?}");
    }
    shim_tests::bundle::leave(&container.task, container.shim_pid()?, "c1").await
}

/// Init and a process that was added end at the same moment, by the same cause.
pub(crate) async fn processes_that_end_together_are_told_with_init_last(stand: Stand) -> Result<()> {
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
        let told = stand.containerd().events().of_until(&id, "delete").await?;
        let exits: Vec<_> = told.iter().filter(|event| event.starts_with("exit")).collect();
        ensure!(exits.len() == 3 && *exits[2] == "exit", "{told:?}");
    }
    anchor.shut_down().await.map(drop)
}

/// A signal for all that the runtime takes its time over, while processes end by the hundred.
pub(crate) async fn exits_are_told_while_the_runtime_is_busy_with_a_signal(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.program("instant-runtime"))?;
    let container = stand.instant("c1", &["sleep", "1000"]).runtime(&gate.binary()).run().await?;
    gate.hold("kill")?;
    let (task, request) =
        (container.task.clone(), containerd_shim_protos::api::KillRequest { id: "c1".into(), signal: 15, all: true, ..Default::default() });
    let kill = tokio::spawn(async move { task.call::<containerd_shim_protos::api::Empty>("Kill", &request, SOON * 6).await });
    gate.held("kill").await?;
    let total = 200;
    for number in 0..total {
        ensure!(container.run(&format!("e{number}"), &["true"]).await? == 0);
    }
    let exits = || stand.containerd().events().of("c1").iter().filter(|event| event.starts_with("exit")).count();
    eventually("every exit is told", SOON, async || {
        ensure!(exits() == total, "{}", exits());
        Ok(())
    })
    .await?;
    ensure!(!kill.is_finished());
    gate.release("kill")?;
    kill.await??;
    ensure!(container.finish().await? == 143);
    stand.containerd().events().of_until("c1", "delete").await?;
    ensure!(exits() == total + 1, "{}", exits());
    shim_tests::bundle::leave(&container.task, container.shim_pid()?, "c1").await
}
