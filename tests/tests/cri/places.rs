//! Which namespaces the keeper of a pod is in, and which the processes that it starts.

use anyhow::{Context as _, Result, ensure};
use shim_tests::context::Context;
use shim_tests::cri::{Cri, NOT_READY, Pod, Sandboxer, Setup};
use shim_tests::eventually::{SOON, eventually};
use shim_tests::proc;
use shim_tests::runner::needs_controller;

use crate::ends::have_ended;
use crate::namespaces::namespace;
use crate::upgrades;

/// What a pod has of its own.
const SHARED: [&str; 3] = ["net", "ipc", "uts"];

fn is_at_home(cri: &Cri, pid: i32) -> Result<()> {
    let daemon = cri.daemon().pid().context("the daemon runs")?.cast_signed();
    for name in ["net", "ipc", "uts", "mnt", "pid", "user", "cgroup"] {
        let (found, home) = (namespace(pid, name)?, namespace(daemon, name)?);
        ensure!(found == home, "{:?} is in {found}, not in {home}", proc::Process::read(pid));
    }
    Ok(())
}

/// Checks that the keeper is in the pod, or the process that holds its namespaces, and its worker is not.
pub(crate) async fn keeper_is_in_its_pod(cri: &Cri, pod: &Pod) -> Result<()> {
    let shown = cri.ps(pod).await?;
    let holder = i32::try_from(shown["pod"]["pid"].as_i64().with_context(|| format!("no pid of a pod: {shown:#}"))?)?;
    let daemon = cri.daemon().pid().context("the daemon runs")?.cast_signed();
    for name in SHARED {
        ensure!(namespace(holder, name)? != namespace(daemon, name)?, "{holder} is in the host's {name}");
    }
    is_at_home(cri, upgrades::worker(cri, pod).await?)
}

/// What it starts inherits its namespaces, unless it leaves them first; a keeper of a new build has to know the way.
pub(crate) async fn what_a_keeper_starts_is_in_the_namespaces_of_the_host(cx: Context) -> Result<()> {
    let shim = upgrades::build(&cx, "first", "build=old")?;
    let next = upgrades::build(&cx, "next", "build=new")?.binary.context("a build is a file")?;
    let gate = cx.gate()?;
    let setup = Setup { sandboxer: Sandboxer::Shim, shim: Some(&shim), runtime: Some(&gate.binary()), ..Setup::default() };
    let cri = Cri::start_with(&cx, &setup).await?;
    let pod = cri.run_pod("pod").await?;
    for (number, name) in ["before", "after", "later"].into_iter().enumerate() {
        keeper_is_in_its_pod(&cri, &pod).await.context(name)?;
        let id = cri.create(&pod, name, &["sleep", "1000"], 0).await?;
        gate.hold("create")?;
        let start = cri.start_container(&id);
        let look = async {
            let runtime = gate.held("create").await?;
            let found = is_at_home(&cri, runtime);
            gate.release("create")?;
            found
        };
        let (started, found) = tokio::join!(start, look);
        found.context(name)?;
        started?;
        ensure!(namespace(cri.init_of(&id).await?, "net")? == namespace(cri.keeper(&pod)?.pid, "net")?);
        match number {
            0 => cri.upgrade(&next, &[&pod], &[]).await?.is_done()?,
            // the next one is started by the new keeper
            1 => {
                let worker = proc::Process::read(upgrades::worker(&cri, &pod).await?)?;
                proc::kill_hard(worker.pid);
                have_ended(&[worker]).await?;
            }
            _ => {}
        }
    }
    // the way home is known to the new keeper
    cri.stop_pod(&pod).await?;
    is_at_home(&cri, cri.keeper(&pod)?.pid)?;
    cri.remove_pod(&pod).await?;
    cri.leaves_nothing().await
}

/// A process in a network namespace keeps it, and with it the other ends of its devices.
pub(crate) async fn a_stopped_pod_leaves_its_network_to_containerd(cx: Context) -> Result<()> {
    let cri = Cri::start_as(&cx, Sandboxer::Shim).await?;
    let pod = cri.run_pod("pod").await?;
    let id = cri.run(&pod, "app", &["sleep", "1000"]).await?;
    let keeper = cri.keeper(&pod)?.pid;
    let network = namespace(keeper, "net")?;
    cri.stop_pod(&pod).await?;
    let status = cri.pod_status(&pod).await?;
    ensure!(status.state == NOT_READY, "{status:?}");
    is_at_home(&cri, keeper)?;
    eventually("no process is in the network of the pod", SOON, async || {
        let is_there = |process: &proc::Process| namespace(process.pid, "net").is_ok_and(|it| it == network);
        let left: Vec<_> = proc::all().into_values().filter(is_there).collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains(&network), "the network namespace is still mounted");
    // until its removal the kubelet reads the results
    ensure!([137, 143].contains(&cri.status(&id).await?.exit_code), "{:?}", cri.status(&id).await?);
    cri.remove_pod(&pod).await?;
    cri.leaves_nothing().await
}

/// The kubelet asks for all pods at once: an error for one would be an error for all.
pub(crate) async fn a_pod_has_the_statistics_of_its_cgroup_before_its_first_container(cx: Context) -> Result<()> {
    needs_controller("memory")?;
    let cri = Cri::start_as(&cx, Sandboxer::Shim).await?;
    let pod = cri.run_pod("pod").await?;
    cri.pod_stats(&pod).await?;
    let id = cri.run(&pod, "app", &["sh", "-c", "seq 1 200000 >/dev/null; exec sleep 1000"]).await?;
    cri.exec(&id, &["true"]).await?;
    eventually("it has used something", SOON, async || {
        let (cpu, memory) = cri.pod_stats(&pod).await?;
        ensure!(cpu > 0 && memory > 0, "{cpu} ns, {memory} bytes");
        Ok(())
    })
    .await?;
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}
