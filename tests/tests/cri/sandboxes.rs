//! Sandboxes that containerd's CRI plugin does not ask for: on the host's network, which its versions 2.0 to 2.2 do not survive.

use anyhow::{Context as _, Result, ensure};
use shim_tests::context::Context;
use shim_tests::controller::{NOT_READY, READY, Sandbox};
use shim_tests::cri::PodSpec;
use shim_tests::eventually::{SOON, eventually_true};
use shim_tests::proc;

use crate::namespaces::namespace;

pub(crate) async fn a_pod_on_the_hosts_network_runs_containers(cx: Context) -> Result<()> {
    let cx = cx.with_own_sandboxes().await?;
    let sandbox = Sandbox::create(&cx, "pod", &PodSpec::new("pod")).await?;
    let status = sandbox.status().await?;
    ensure!(status.state == NOT_READY, "{status:?}");
    let pid = sandbox.start().await?;
    let keeper = cx.shim_pid("pod")?;
    ensure!(pid.cast_signed() == keeper, "{pid} is not the keeper {keeper}");
    let own = std::process::id().cast_signed();
    for (name, is_shared) in [("net", true), ("uts", true), ("ipc", false)] {
        ensure!((namespace(keeper, name)? == namespace(own, name)?) == is_shared, "{name}");
    }
    let status = sandbox.status().await?;
    ensure!(status.state == READY && status.pid == pid && status.sandbox_id == "pod", "{status:?}");
    let (waiting, own_sandbox) = (sandbox.clone(), sandbox.clone());
    let wait = tokio::spawn(async move { waiting.wait().await });

    let first = sandbox.member(cx.container(&["sleep", "100000"]).id("first"), pid).start().await?;
    let second = sandbox.member(cx.container(&["sh", "-c", "exit 3"]).id("second"), pid).create().await?;
    ensure!(cx.shims().len() == 1, "{:?}", cx.shims());
    ensure!(namespace(first.pid.cast_signed(), "ipc")? == namespace(keeper, "ipc")?);
    ensure!(second.run().await? == 3);
    ensure!(first.destroy().await? == 137);
    for container in [first, second] {
        container.remove().await?;
    }
    own_sandbox.stop().await?;
    ensure!(wait.await?? == 0);
    let status = sandbox.status().await?;
    ensure!(status.state == NOT_READY, "{status:?}");
    sandbox.shutdown().await?;
    cx.leaves_nothing().await
}

pub(crate) async fn a_sandbox_that_is_never_started_is_shut_down(cx: Context) -> Result<()> {
    let cx = cx.with_own_sandboxes().await?;
    let sandbox = Sandbox::create(&cx, "pod", &PodSpec::new("pod")).await?;
    let keeper = cx.shim_pid("pod")?;
    sandbox.shutdown().await?;
    eventually_true("the keeper has ended", SOON, || !proc::is_alive(keeper)).await?;
    // its name is free
    let sandbox = Sandbox::create(&cx, "pod", &PodSpec::new("pod")).await.context("the same id again")?;
    sandbox.start().await?;
    sandbox.stop().await?;
    sandbox.shutdown().await?;
    cx.leaves_nothing().await
}
