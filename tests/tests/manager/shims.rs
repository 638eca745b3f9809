//! Shims that hang or misbehave, but stay alive.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use containerd_client::types::v1::Status as Phase;
use nix::sys::signal::Signal;
use shim_tests::client::Client;
use shim_tests::container::{Container, code_of};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true, within};
use shim_tests::messages::{Options, any};
use shim_tests::{proc, programs};
use tokio::task::JoinSet;
use tonic::Code;

pub(crate) async fn a_shim_that_does_not_read_for_a_moment_keeps_its_container(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let events = cx.events().await?;
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    proc::signal(keeper, Signal::SIGSTOP)?;
    // more requests than its socket has room for: one of them is being written when its time is up
    let mut calls = JoinSet::new();
    for _call in 0..600 {
        let (client, id) = (cx.client().clone(), container.id.clone());
        calls.spawn(async move { client.state(&id, "").await });
    }
    let answers = within("all calls end", Duration::from_secs(60), calls.join_all()).await;
    proc::signal(keeper, Signal::SIGCONT)?;
    for state in answers? {
        ensure!(state.as_ref().is_ok_and(|state| state.status() == Phase::Unknown), "{state:?}");
    }
    let state = eventually("it is running", SOON, async || {
        let state = container.state().await?;
        ensure!(state.status() == Phase::Running, "{state:?}");
        Ok(state)
    })
    .await?;
    ensure!(state.pid == container.pid && proc::is_alive(container.pid.cast_signed()));
    ensure!(events.exits(&container.id, "").is_empty(), "{:?}", events.exits(&container.id, ""));
    ensure!(container.exec("e", &["sh", "-c", "exit 5"]).run().await? == 5);
    ensure!(container.destroy().await? == 137);
    cx.leaves_nothing().await
}

pub(crate) async fn a_shim_that_cannot_delete_its_task_keeps_it(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let runtime = programs::script(cx.folder(), "runtime", &format!("#!/bin/sh\nexec {} \"$@\"\n", cx.runtime_program().display()))?;
    let container = cx.container(&["sh", "-c", "exit 3"]).runtime_binary(&runtime).start().await?;
    ensure!(container.wait().await? == 3);
    let (aside, keeper) = (runtime.with_extension("aside"), cx.shim_pid(&container.id)?);
    fs::rename(&runtime, &aside)?;
    // clients take NotFound for success
    let status = container.delete().await.expect_err("its runtime is gone");
    ensure!(status.code() != Code::NotFound, "{status:?}");
    let state = container.phase(Phase::Stopped).await?;
    ensure!(state.exit_status == 3 && proc::is_alive(keeper), "{state:?}");
    fs::rename(&aside, &runtime)?;
    ensure!(container.delete().await?.exit_status == 3);
    cx.leaves_nothing().await
}

pub(crate) async fn of_two_clients_that_delete_a_task_at_once_one_gets_its_exit(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let (events, gate) = (cx.events().await?, cx.gate()?);
    let ended = async |id: &str| {
        let container = cx.container(&["sh", "-c", "exit 3"]).id(id).runtime_binary(&gate.binary()).start().await?;
        ensure!(container.wait().await? == 3);
        anyhow::Ok(container)
    };
    let deletions = async |container: &Container| {
        let delete = |(client, id): (Client, String)| tokio::spawn(async move { client.delete(&id).await });
        let both = [(); 2].map(|()| delete((cx.client().clone(), container.id.clone())));
        gate.held("delete").await?;
        anyhow::Ok(both)
    };
    let container = ended("refused").await?;
    gate.fail("delete", Some("as the test wants"))?;
    let both = tokio::join!(container.delete(), container.delete());
    ensure!([both.0, both.1].iter().all(|deleted| deleted.as_ref().is_err_and(|status| status.code() != Code::NotFound)));
    gate.fail("delete", None)?;
    gate.hold("delete")?;
    let [one, other] = deletions(&container).await?;
    gate.release("delete")?;
    let answers = [one.await?, other.await?];
    let exits: Vec<_> = answers.iter().flatten().map(|answer| answer.exit_status).collect();
    let codes: Vec<_> = answers.iter().filter_map(|answer| answer.as_ref().err()).map(tonic::Status::code).collect();
    ensure!((&*exits, &*codes) == (&[3], &[Code::NotFound]), "{answers:?}");
    events.catch_up(cx.client()).await?;
    ensure!(events.of(&container.id).iter().filter(|topic| ["exit", "delete"].contains(&topic.as_str())).count() == 2);
    let container = ended("crash").await?;
    gate.hold("delete")?;
    let both = deletions(&container).await?;
    cx.daemon().kill()?;
    gate.release("delete")?;
    for interrupted in both {
        ensure!(interrupted.await?.is_err());
    }
    cx.revive_daemon().await?;
    ensure!(container.delete().await?.exit_status == 3, "neither client has received it");
    cx.leaves_nothing().await
}

pub(crate) async fn a_shim_whose_address_cannot_be_recorded_is_shut_down_at_once(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    // a file cannot be written where a folder is; the `delete` of containerd's shims up to 1.7 fails before their first Create
    let stock = cx.suite().program("containerd-shim-runc-v2");
    let text = format!("#!/bin/sh\ncase \"$*\" in *start) mkdir -p .bootstrap.json ;; esac\nexec {} \"$@\"\n", stock.display());
    let program = programs::script(cx.folder(), "containerd-shim-unrecorded-v2", &text)?;
    let create = cx.container(&["true"]).id("again").runtime_type(&program.to_string_lossy()).create();
    ensure!(code_of(create.await)? == Code::Internal);
    ensure!(cx.client().list().await?.is_empty());
    ensure!(cx.container(&["sh", "-c", "exit 3"]).id("again").run().await? == 3);
    cx.leaves_nothing().await
}

pub(crate) async fn an_image_path_among_the_options_of_a_container_restores_nothing(cx: Context) -> Result<()> {
    let options = Options {
        binary_name: cx.runtime_binary().display().to_string(),
        criu_image_path: cx.folder().join("no-checkpoint").display().to_string(),
        ..Options::default()
    };
    ensure!(cx.container(&["sh", "-c", "exit 3"]).options(Some(any(&options))).run().await? == 3);
    cx.leaves_nothing().await
}

pub(crate) async fn a_program_that_hangs_is_ended_with_what_it_has_started(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let pid_file = cx.folder().join("pid");
    // the process that hangs is not the one that was started
    let text = format!("#!/bin/sh\ncase \"$*\" in *start) sleep 1000 & echo $! > {}; wait ;; esac\n", pid_file.display());
    let program = programs::script(cx.folder(), "containerd-shim-hangs-v1", &text)?;
    let create = cx.container(&["true"]).runtime_type(&program.to_string_lossy()).create();
    // its client may have given up before
    ensure!([Code::Unavailable, Code::DeadlineExceeded].contains(&code_of(create.await)?));
    let left: i32 = fs::read_to_string(&pid_file)?.trim().parse()?;
    eventually_true("its child is killed", Duration::from_secs(40), || !proc::is_alive(left)).await?;
    cx.leaves_nothing().await
}
