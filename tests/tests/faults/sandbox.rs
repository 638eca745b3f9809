//! Scenarios of sandboxes: the calls that containerd makes for a pod without a pause container.

use anyhow::{Result, ensure};
use shim_tests::controller::{READY, Sandbox};
use shim_tests::cri::{Namespace, PodSpec};

use crate::run::Run;
use crate::scenarios::Scenario;

/// A pod whose namespaces the keeper is in.
pub(crate) const SANDBOX: Scenario = Scenario {
    name: "sandbox",
    body: |run| Box::pin(sandbox(run, Namespace::Container)),
    late: false,
    generations: 1,
    events: EVENTS,
    calls: CALLS,
};

/// A pod with one pid namespace for all, which a process of its own holds.
pub(crate) const SHARED_SANDBOX: Scenario = Scenario {
    name: "sandbox with a holder",
    body: |run| Box::pin(sandbox(run, Namespace::Pod)),
    late: false,
    generations: 1,
    events: EVENTS,
    calls: CALLS,
};

/// The last two containerd publishes for the shim itself, once its connection has ended.
const EVENTS: &str = "create ID-b/b, start ID-b/b, exit ID-b/b 137, delete ID-b/b 137, exit ID/none 137, delete ID/none 137";
const CALLS: &str = "create, start, delete";

async fn sandbox(run: &Run, pids: Namespace) -> Result<()> {
    let sandbox = Sandbox::create(&run.cx, &run.id, &PodSpec::new(&run.id).pid(pids)).await?;
    run.note(format!("create: {}", sandbox.status().await?.state));
    let pid = sandbox.start().await?;
    run.name(pid, "pod");
    let status = sandbox.status().await?;
    run.note(format!("start: {} pid of {}", status.state, run.named(status.pid)));
    ensure!(status.state == READY && status.created_at.is_some(), "{status:?}");
    let waiting = sandbox.clone();
    let parked = tokio::spawn(async move { waiting.wait().await });
    let member = |builder| {
        let builder = sandbox.member(builder, pid);
        if pids == Namespace::Pod { builder.spec(|spec| spec.join("pid", pid)) } else { builder }
    };

    let runs = run.create(member(run.member("b", &["sleep", "1000"])), "b").await?;
    run.start(&runs, "b").await?;
    run.held("with a container").await?;
    run.done("kill", runs.kill(9).await)?;
    run.finish(&runs, "b").await?;
    run.done("stop", sandbox.stop().await)?;
    run.note(format!("parked wait: {}", parked.await??));
    let stopped = sandbox.status().await?;
    run.note(format!("stopped: {}", stopped.state));
    ensure!(stopped.created_at == status.created_at, "made at {:?}, then at {:?}", status.created_at, stopped.created_at);
    run.done("stop again", sandbox.stop().await)?;
    run.held("stopped").await?;
    run.done("shutdown", sandbox.shutdown().await)
}
