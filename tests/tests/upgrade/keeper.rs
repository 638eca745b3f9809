//! A keeper is killed, the one fatal case: its containers are killed, each exit is published once, and the daemon recovers by itself.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use shim_tests::context::Context;
use shim_tests::cri::{Cri, RUNNING};
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::runner::skip;
use shim_tests::suite::Runtime;
use shim_tests::{builds, proc};

use crate::crashes::inspected;
use crate::{build, on_build};

pub(crate) async fn a_pod_whose_keeper_is_killed_exits_once_and_can_be_recreated(cx: Context) -> Result<()> {
    let cri = Cri::start(&cx).await?;
    let pod = cri.run_pod("pod").await?;
    let known = cri.run(&pod, "known", &["sh", "-c", "exit 3"]).await?;
    ensure!(cri.ended(&known).await?.exit_code == 3);
    let gate = format!("/tmp/go-{}", cx.client().namespace());
    let mut running = Vec::new();
    for name in ["one", "two"] {
        running.push(cri.run(&pod, name, &["sh", "-c", "echo begun; exec sleep 98765"]).await?);
    }
    let script = format!("echo begun; until [ -e {gate} ]; do usleep 20000; done; exit 5");
    let untold = cri.run(&pod, "untold", &["sh", "-c", &script]).await?;
    let shims = cri.shims();
    let [shim] = &shims[..] else { anyhow::bail!("exactly one shim expected: {shims:?}") };
    for name in ["one", "two", "untold"] {
        eventually_true(format!("{name} has begun"), SOON, || cri.log(&pod, name) == "begun\n").await?;
    }
    let inits: Vec<_> = proc::children(shim.pid).into_iter().filter(|child| !child.command.contains(" worker")).collect();
    // the pause container and three more
    ensure!(inits.len() == 4, "{inits:?}");

    // an exit that the daemon has not received when the keeper is killed
    let daemon = cri.daemon().pid().context("the daemon runs")?.cast_signed();
    let ends = inits.iter().find(|init| init.command.contains(&gate)).context("one waits at the gate")?;
    proc::signal(daemon, Signal::SIGSTOP)?;
    std::fs::write(format!("/proc/{}/root{gate}", ends.pid), "")?;
    let over = eventually_true("it has exited", SOON, || !proc::is_alive(ends.pid)).await;
    // the answer to the daemon's Wait is in its socket: without it, the plugin reports 255 if the connection closes first
    let answered = eventually("the daemon's Wait is answered", SOON, async || {
        let shown = inspected(&cx, &untold).await?;
        ensure!(shown["state"]["init"]["phase"]["exited"]["status"] == 5 && shown["waiters"] == serde_json::json!([]), "{shown:#}");
        Ok(())
    })
    .await;
    proc::kill_hard(shim.pid);
    proc::signal(daemon, Signal::SIGCONT)?;
    over.and(answered)?;

    for init in &inits {
        eventually_true(format!("{} is gone", init.command), SOON, || {
            proc::Process::read(init.pid).map_or(true, |process| process.start != init.start)
        })
        .await?;
    }
    // if a shim closes the connection before it has answered a Wait, the plugin reports 255
    for (id, codes) in [(&known, &[3][..]), (&untold, &[5]), (&running[0], &[137, 255]), (&running[1], &[137, 255])] {
        eventually("the daemon reports the exits", Duration::from_secs(30), async || {
            let status = cri.status(id).await?;
            ensure!(status.state != RUNNING && codes.contains(&status.exit_code), "{status:?}, not {codes:?}");
            Ok(())
        })
        .await?;
    }
    // containerd 2.1 accepts it
    if let Ok(late) = cri.create(&pod, "late", &["true"], 0).await {
        ensure!(cri.start_container(&late).await.is_err(), "a container is started in a dead pod");
    }
    let next = cri.run_pod("next").await?;
    let id = cri.run(&next, "app", &["sh", "-c", "exit 6"]).await?;
    ensure!(cri.ended(&id).await?.exit_code == 6);
    cri.end_pod(&next).await?;
    cri.end_pod(&pod).await?;
    for name in ["one", "two", "untold"] {
        ensure!(cri.log(&pod, name) == "begun\n", "{name} has begun more than once: {:?}", cri.log(&pod, name));
    }
    cri.leaves_nothing().await
}

/// It would create a container without a shim.
pub(crate) async fn a_running_oci_runtime_ends_with_its_keeper(cx: Context) -> Result<()> {
    let gate = cx.gate()?;
    gate.hold("create")?;
    let create = cx.container(&["sleep", "1000"]).id("under-way").runtime_binary(&gate.binary()).create();
    let crash = async {
        let runtime = gate.held("create").await?;
        proc::kill_hard(cx.shim_pid("under-way")?);
        let ended = eventually_true("the runtime has ended", SOON, || !proc::is_alive(runtime)).await;
        gate.release("create")?;
        ended
    };
    let (created, died) = tokio::join!(create, crash);
    died?;
    ensure!(created.is_err(), "a dead shim has created a container");
    eventually("nothing is left behind", SOON, async || cx.leaves_nothing().await).await
}

/// The kernel kills the performer and the hook that it runs, because no other process would remove the container that it makes.
pub(crate) async fn a_performer_ends_with_its_keeper(cx: Context) -> Result<()> {
    if cx.runtime() != Runtime::Native {
        return skip("an OCI runtime makes the containers");
    }
    let begun = cx.folder().join("begun");
    let hook = format!("echo $$ > {}; exec sleep 1000", begun.display());
    let create =
        cx.container(&["sleep", "1000"]).id("under-way").spec(|spec| spec.hook("createRuntime", "/bin/sh", &["sh", "-c", &hook])).create();
    let crash = async {
        let pid: i32 = eventually("the hook runs", SOON, async || Ok(std::fs::read_to_string(&begun)?.trim().parse()?)).await?;
        proc::kill_hard(cx.shim_pid("under-way")?);
        eventually_true("the hook has ended", SOON, || !proc::is_alive(pid)).await
    };
    let (created, died) = tokio::join!(create, crash);
    died?;
    ensure!(created.is_err(), "a dead shim has created a container");
    eventually("nothing is left behind", SOON, async || cx.leaves_nothing().await).await
}

/// It waits for its program then, at a gate that the keeper holds.
pub(crate) async fn a_created_container_can_be_started_after_its_keeper_was_replaced(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let container = cx.container(&["sh", "-c", "exit 6"]).create().await?;
    let new = build(&cx, "new", "build=new")?;
    builds::upgrade(&cx, &new, &["--all"]).await?.is_done()?;
    container.start().await?;
    ensure!(container.finish().await? == 6);
    cx.leaves_nothing().await
}

pub(crate) async fn an_idle_time_beyond_the_clock_never_elapses(cx: Context) -> Result<()> {
    let cx = cx.with_own_shim(cx.shim(), &[("X_SHIM_IDLE_SECONDS", "18446744073709551615")]).await?;
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let shims = builds::ps(&cx, cx.shim().binary.as_ref().context("X_SHIM must name our own shim")?).await?;
    ensure!(shims.len() == 1, "{shims:?}");
    ensure!(container.state().await?.pid == container.pid);
    ensure!(container.destroy().await? == 137);
    cx.leaves_nothing().await
}
