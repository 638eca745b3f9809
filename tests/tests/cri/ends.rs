//! The end of a pod: asked for, twice, out of order, and by kills.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use shim_tests::context::Context;
use shim_tests::cri::{Cri, NOT_READY, Namespace, Pod, PodSpec, READY, RUNNING, Sandboxer};
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::proc;

use crate::namespaces::{holder_of, namespace};
use crate::upgrades::worker;

const SLEEP: [&str; 2] = ["sleep", "100000"];

/// Waits until processes have ended, whose pids may belong to others by then.
pub(crate) async fn have_ended(processes: &[proc::Process]) -> Result<()> {
    for process in processes {
        eventually_true(format!("{} has ended", process.command), SOON, || {
            proc::Process::read(process.pid).map_or(true, |now| now.start != process.start || now.is_zombie())
        })
        .await?;
    }
    Ok(())
}

/// containerd issues 8367, 10461 and 11029: containers that live on in a pod that is not ready, and a crash that is not seen.
pub(crate) async fn a_killed_keeper_ends_its_pod_once(cx: Context) -> Result<()> {
    let cri = Cri::start_as(&cx, Sandboxer::Shim).await?;
    let (pod, other) = (cri.run_pod("pod").await?, cri.run_pod("other").await?);
    let known = cri.run(&pod, "known", &["sh", "-c", "exit 3"]).await?;
    ensure!(cri.ended(&known).await?.exit_code == 3);
    let (mut running, mut inits) = (Vec::new(), Vec::new());
    for name in ["one", "two", "three"] {
        running.push(cri.run(&pod, name, &["sh", "-c", "echo begun; exec sleep 98765"]).await?);
        eventually_true(format!("{name} has begun"), SOON, || cri.log(&pod, name) == "begun\n").await?;
        inits.push(proc::Process::read(cri.init_of(&running[running.len() - 1]).await?)?);
    }
    let bystander = cri.run(&other, "app", &SLEEP).await?;
    let keeper = cri.keeper(&pod)?;
    proc::kill_hard(keeper.pid);
    have_ended(&inits).await?;
    cri.pod_becomes(&pod, NOT_READY).await?;
    ensure!(cri.status(&known).await?.exit_code == 3);
    for id in &running {
        let status = cri.ended(id).await?;
        // containerd reports 255 where the connection ends before the answer to its Wait
        ensure!([137, 255].contains(&status.exit_code), "{status:?}");
    }
    if let Ok(late) = cri.create(&pod, "late", &["true"], 0).await {
        ensure!(cri.start_container(&late).await.is_err(), "a container is started in a dead pod");
    }
    // another pod is not affected
    ensure!(cri.pod_status(&other).await?.state == READY && cri.status(&bystander).await?.state == RUNNING);
    cri.end_pod(&pod).await?;
    for name in ["one", "two", "three"] {
        ensure!(cri.log(&pod, name) == "begun\n", "{name} has begun more than once: {:?}", cri.log(&pod, name));
    }
    // its name is free again
    let again = cri.run_pod("pod").await?;
    let id = cri.run(&again, "app", &["sh", "-c", "exit 6"]).await?;
    ensure!(cri.ended(&id).await?.exit_code == 6);
    cri.end_pod(&again).await?;
    cri.end_pod(&other).await?;
    cri.leaves_nothing().await
}

pub(crate) async fn a_killed_worker_is_not_noticed(cx: Context) -> Result<()> {
    let cri = Cri::start_as(&cx, Sandboxer::Shim).await?;
    let pod = cri.run_pod("pod").await?;
    let before = cri.pod_status(&pod).await?;
    let keeper = cri.keeper(&pod)?.pid;
    let kill = async || {
        proc::kill_hard(worker(&cri, &pod).await?);
        anyhow::Ok(())
    };
    kill().await?;
    let id = cri.run(&pod, "app", &["sh", "-c", "trap 'exit 7' TERM; sleep 100000 & wait"]).await?;
    kill().await?;
    ensure!(cri.exec(&id, &["sh", "-c", "exit 4"]).await?.0 == 4);
    kill().await?;
    let after = cri.pod_status(&pod).await?;
    ensure!(after.state == READY && after.created_at == before.created_at && after.ip == before.ip, "{before:?}, then {after:?}");
    ensure!(namespace(cri.init_of(&id).await?, "net")? == namespace(keeper, "net")?);
    kill().await?;
    cri.stop(&id, 10).await?;
    ensure!(cri.ended(&id).await?.exit_code == 7);
    kill().await?;
    cri.stop_pod(&pod).await?;
    kill().await?;
    ensure!(cri.pod_status(&pod).await?.state == NOT_READY);
    cri.remove_pod(&pod).await?;
    cri.leaves_nothing().await
}

pub(crate) async fn a_killed_holder_ends_the_readiness_of_its_pod(cx: Context) -> Result<()> {
    let cri = Cri::start_as(&cx, Sandboxer::Shim).await?;
    let pod = cri.run_pod_of(&PodSpec::new("pod").pid(Namespace::Pod)).await?;
    let id = cri.run(&pod, "app", &SLEEP).await?;
    let (keeper, init) = (cri.keeper(&pod)?.pid, cri.init_of(&id).await?);
    proc::kill_hard(holder_of(&cri, &pod, init)?.pid);
    cri.pod_becomes(&pod, NOT_READY).await?;
    // the kernel ends what is in the namespace
    ensure!(cri.ended(&id).await?.exit_code == 137);
    ensure!(cri.keeper(&pod)?.pid == keeper, "another keeper");
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

pub(crate) async fn a_keeper_killed_while_containerd_is_down_leaves_nothing(cx: Context) -> Result<()> {
    let cri = Cri::start_as(&cx, Sandboxer::Shim).await?;
    let pod = cri.run_pod("pod").await?;
    let id = cri.run(&pod, "app", &SLEEP).await?;
    let (keeper, init) = (cri.keeper(&pod)?, proc::Process::read(cri.init_of(&id).await?)?);
    cri.crash(async {
        proc::kill_hard(keeper.pid);
        have_ended(&[keeper]).await
    })
    .await?;
    eventually("the plugin is there again", SOON, async || cri.pod_status(&pod).await).await?;
    // containerd runs `delete` for it
    have_ended(&[init]).await?;
    cri.pod_becomes(&pod, NOT_READY).await?;
    cri.ended(&id).await?;
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

/// The kubelet repeats what it is not sure about.
pub(crate) async fn a_pod_is_stopped_and_removed_twice(cx: Context) -> Result<()> {
    let cri = Cri::start_as(&cx, Sandboxer::Shim).await?;
    let pod = cri.run_pod("pod").await?;
    let id = cri.run(&pod, "app", &SLEEP).await?;
    for _ in 0..2 {
        cri.stop_pod(&pod).await?;
        ensure!(cri.pod_status(&pod).await?.state == NOT_READY);
    }
    // the containers of a stopped pod are known until they are removed
    ensure!([137, 143].contains(&cri.ended(&id).await?.exit_code));
    cri.crash(async { Ok(()) }).await?;
    eventually("the plugin is there again", SOON, async || cri.pod_status(&pod).await).await?;
    ensure!(cri.pod_status(&pod).await?.state == NOT_READY);
    for _ in 0..2 {
        cri.remove_pod(&pod).await?;
    }
    ensure!(cri.pods().await?.is_empty());
    cri.leaves_nothing().await
}

/// containerd issues 11708, 11793, 11916 and 12560: shims that are left behind.
pub(crate) async fn a_pod_is_removed_without_being_stopped(cx: Context) -> Result<()> {
    let cri = Cri::start_as(&cx, Sandboxer::Shim).await?;
    let pod = cri.run_pod("pod").await?;
    for name in ["one", "two"] {
        cri.run(&pod, name, &SLEEP).await?;
    }
    cri.create(&pod, "never-started", &SLEEP, 0).await?;
    let ended = cri.run(&pod, "ended", &["true"]).await?;
    cri.ended(&ended).await?;
    cri.remove_pod(&pod).await?;
    cri.leaves_nothing().await
}

/// containerd issue 13668.
pub(crate) async fn no_container_is_made_in_a_pod_that_has_ended(cx: Context) -> Result<()> {
    let cri = Cri::start_as(&cx, Sandboxer::Shim).await?;
    let pod = cri.run_pod("pod").await?;
    let made = cri.create(&pod, "made", &SLEEP, 0).await?;
    cri.stop_pod(&pod).await?;
    ensure!(cri.start_container(&made).await.is_err(), "a container is started in a pod that has ended");
    if let Ok(late) = cri.create(&pod, "late", &SLEEP, 0).await {
        ensure!(cri.start_container(&late).await.is_err(), "a container is made and started in a pod that has ended");
    }
    cri.remove_pod(&pod).await?;
    cri.leaves_nothing().await
}

async fn delete_command(cx: &Context, cri: &Cri, pod: &Pod) -> Result<()> {
    let bundle = cri.sandbox_bundle(pod);
    ensure!(bundle.is_dir() && !bundle.join("config.json").exists(), "{}", bundle.display());
    let mut command = tokio::process::Command::new(cx.shim().binary.as_ref().context("X_SHIM must name our own shim")?);
    command.args(["-namespace", shim_tests::cri::NAMESPACE, "-id", &pod.id, "-address"]).arg(cri.daemon().address());
    command.arg("-bundle").arg(&bundle).arg("delete").current_dir(&bundle).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await?;
    ensure!(output.status.success(), "delete: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// containerd runs it for a shim that it believes dead, which may be so or not.
pub(crate) async fn the_delete_command_ends_a_pod_whose_bundle_has_no_configuration(cx: Context) -> Result<()> {
    let cri = Cri::start_as(&cx, Sandboxer::Shim).await?;
    for is_alive in [true, false] {
        let pod = cri.run_pod("pod").await?;
        let id = cri.run(&pod, "app", &SLEEP).await?;
        cri.sh(&id, "echo shared > /dev/shm/file").await?;
        let (keeper, init) = (cri.keeper(&pod)?, proc::Process::read(cri.init_of(&id).await?)?);
        cri.crash(async {
            if !is_alive {
                proc::kill_hard(keeper.pid);
                have_ended(std::slice::from_ref(&keeper)).await?;
            }
            delete_command(&cx, &cri, &pod).await?;
            have_ended(&[init]).await?;
            let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
            let bundle = cri.sandbox_bundle(&pod).display().to_string();
            ensure!(!mounts.contains(&bundle), "a mount of the pod is left");
            // its bundle is containerd's to remove
            Ok(())
        })
        .await?;
        // once it has published the exits
        have_ended(&[keeper]).await?;
        eventually("the pod is over", Duration::from_secs(30), async || {
            let status = cri.pod_status(&pod).await?;
            ensure!(status.state == NOT_READY, "{status:?}");
            Ok(())
        })
        .await?;
        cri.end_pod(&pod).await?;
    }
    cri.leaves_nothing().await
}
