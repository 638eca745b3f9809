//! Pods that are never whole: containerd gives up between two steps, or is killed.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use shim_tests::context::Context;
use shim_tests::cri::{Cri, Plugin, PodSpec, Sandboxer, Setup};
use shim_tests::eventually::{SOON, eventually};
use shim_tests::times::repeated;

/// How long a keeper waits to be started as a pod, and some time more.
const EXPIRED: Duration = Duration::from_secs(60);

/// A setting that its namespaces do not have. containerd then shuts the sandbox down, and the network is taken apart.
pub(crate) async fn a_pod_that_cannot_be_started_leaves_nothing(cx: Context) -> Result<()> {
    let cri = Cri::start_as(&cx, Sandboxer::Shim).await?;
    let error = cri.try_pod(&PodSpec::new("pod").sysctl("vm.swappiness", "10")).await.err().context("the pod runs")?;
    ensure!(format!("{error:#}").contains("vm.swappiness"), "{error:#}");
    ensure!(cri.pods().await?.is_empty());
    is_gone(&cri).await?;
    let pod = cri.run_pod("pod").await?;
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

pub(crate) async fn a_pod_whose_network_fails_leaves_nothing(cx: Context) -> Result<()> {
    let cri = Cri::start_with(&cx, &Setup { sandboxer: Sandboxer::Shim, plugin: Plugin::Nothing, ..Setup::default() }).await?;
    let plugin = cri.daemon().folder().join("cni/bin/nothing");
    let working = fs::read_to_string(&plugin)?;
    fs::write(&plugin, "#!/bin/sh\necho '{\"cniVersion\":\"0.4.0\",\"code\":100,\"msg\":\"no network today\"}'\nexit 1\n")?;
    cri.no_pod_runs("pod", &["no network today"]).await?;
    ensure!(cri.pods().await?.is_empty() && cri.shims().is_empty(), "{:?}", cri.shims());
    // the name is free again
    fs::write(&plugin, working)?;
    let pod = cri.run_pod("pod").await?;
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

/// containerd issue 13645. What it knows afterwards it removes when it is asked to; the rest ends by itself.
pub(crate) async fn containerd_killed_while_it_makes_pods_leaves_nothing(cx: Context) -> Result<()> {
    let (sandboxer, plugin, environment) = (Sandboxer::Shim, Plugin::Nothing, &[("X_SHIM_UNSTARTED_POD_SECONDS", "2")][..]);
    let cri = Cri::start_with(&cx, &Setup { sandboxer, plugin, environment, ..Setup::default() }).await?;
    for round in 0..repeated(5) {
        // a moment between the first step and the last
        let moment = Duration::from_millis(u64::try_from(round * 7 % 40)?);
        let [first, second, third] = ["a", "b", "c"].map(|name| PodSpec::new(&format!("{name}{round}")));
        let runs = async { tokio::join!(cri.try_pod(&first), cri.try_pod(&second), cri.try_pod(&third)) };
        let crash = async {
            tokio::time::sleep(moment).await; // containerd is killed at this point of its calls
            cri.crash(async { Ok(()) }).await
        };
        let (_cut_short, crashed) = tokio::join!(runs, crash);
        crashed?;
        let known = eventually("the plugin is there again", SOON, async || cri.pods().await).await?;
        for id in known.keys() {
            let removed = cri.end_pod_named(id).await;
            // containerd may be there again just when the two seconds of its shim end, and then calls a shim that exits: nothing in ttrpc announces
            // that, and containerd answers so until its `delete` of that shim has ended (docs/handover.md). A kubelet repeats the call.
            if removed.as_ref().is_err_and(|error| format!("{error:#}").contains("ttrpc: closed")) {
                cri.end_pod_named(id).await?;
            } else {
                removed?;
            }
        }
    }
    is_gone(&cri).await?;
    // of pods that it had begun and not noted; no shim knows of these
    cri.remove_forgotten_networks()
}

/// Waits until no shim is left.
async fn is_gone(cri: &Cri) -> Result<()> {
    eventually("no shim is left", EXPIRED, async || {
        let shims = cri.shims();
        ensure!(shims.is_empty(), "{shims:?}");
        Ok(())
    })
    .await
}
