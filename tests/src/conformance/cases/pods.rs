//! The sandbox service: containers in a sandbox.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::sandboxes::SHORTLY;
use super::{Streams, text};
use crate::bundle::Bundle;
use crate::clauses;
use crate::conformance::Case;
use crate::eventually::{SOON, eventually_true, patience};
use crate::proc;
use crate::sandbox::{CONTAINER, NOT_READY, POD, READY, Sandbox, namespace_of};
use crate::stand::Stand;
use crate::task::Task;
use crate::ttrpc::CallError;

pub(super) fn cases() -> Vec<Case> {
    clauses![pods:
        "N21" => containers_are_in_the_network_of_their_sandbox;
        "N22" => a_pod_on_the_hosts_network_is_in_it;
        "N23" => containers_share_shared_memory_and_host_name;
        "N24" => start_of_a_container_answers_its_sandboxs_shim;
        "N25" => containers_get_the_files_of_their_pod;
        "N26" => containers_can_share_process_ids;
        "N27" => a_shutdown_ends_containers_that_are_left;
        "N28" => a_pod_whose_process_is_killed_is_not_ready;
        "N29" => delete_ends_the_containers_of_a_dead_shims_sandbox;
    ]
}

/// Runs a container in the sandbox's shim, and returns what it writes.
async fn output_of(stand: &Stand, sandbox: &Sandbox, bundle: Bundle) -> Result<String> {
    let streams = Streams::new(stand, &bundle.id)?;
    let container = streams.output(bundle).run_in(&sandbox.task).await?;
    let status = container.finish().await?;
    ensure!(status == 0, "{}: exit code {status}: {}", container.id, streams.err.to_end().await?);
    streams.out.to_end().await
}

async fn containers_are_in_the_network_of_their_sandbox(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::shim(&stand, "s1").await?;
    sandbox.create().await?;
    let holder = sandbox.start().await?;
    let network = sandbox.network().context("a network")?.number()?;
    ensure!(namespace_of(holder, "net")? == network, "the process of the sandbox is in another network");
    let container = sandbox.member("c1", holder, &["sleep", "1000"]).run_in(&sandbox.task).await?;
    ensure!(namespace_of(container.pid, "net")? == network, "the container is in another network");
    container.destroy().await?;
    sandbox.end().await
}

/// Its host name is the host's, which stays as it is.
async fn a_pod_on_the_hosts_network_is_in_it(stand: Stand) -> Result<()> {
    let hostname = || fs::read_to_string("/proc/sys/kernel/hostname");
    let (before, here) = (hostname()?, std::process::id());
    let sandbox = Sandbox::shim(&stand, "s1").await?.on_the_hosts_network();
    sandbox.create().await.context("Create without a network namespace")?;
    let holder = sandbox.start().await?;
    ensure!(namespace_of(holder, "net")? == namespace_of(here, "net")?, "the process of the sandbox is in another network");
    let container = sandbox.member("c1", holder, &["sleep", "1000"]).run_in(&sandbox.task).await?;
    ensure!(namespace_of(container.pid, "net")? == namespace_of(here, "net")?, "the container is in another network");
    container.destroy().await?;
    ensure!(hostname()? == before, "the host is called {:?} now", hostname()?);
    sandbox.end().await
}

async fn containers_share_shared_memory_and_host_name(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::shim(&stand, "s1").await?;
    sandbox.create().await?;
    let holder = sandbox.start().await?;
    let mut containers = Vec::new();
    for id in ["c1", "c2"] {
        containers.push(sandbox.member(id, holder, &["sleep", "1000"]).run_in(&sandbox.task).await?);
    }
    for kind in ["ipc", "uts"] {
        let theirs = [namespace_of(containers[0].pid, kind)?, namespace_of(containers[1].pid, kind)?];
        ensure!(theirs[0] == theirs[1], "two {kind} namespaces");
        ensure!(theirs[0] != namespace_of(std::process::id(), kind)?, "the host's {kind} namespace");
    }
    let name = output_of(&stand, &sandbox, sandbox.member("c3", holder, &["hostname"])).await?;
    ensure!(name.trim() == sandbox.config.hostname, "the host name is {name:?}");
    for container in containers {
        container.destroy().await?;
    }
    sandbox.end().await
}

/// And a container may be created there without a `start` of its own.
async fn start_of_a_container_answers_its_sandboxs_shim(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::shim(&stand, "s1").await?;
    sandbox.create().await?;
    let holder = sandbox.start().await?;
    let bundle = sandbox.member("c1", holder, &["sh", "-c", "exit 3"]);
    let socket = bundle.start_shim().await?;
    ensure!(socket == sandbox.task.socket(), "another shim: {} and {}", socket.display(), sandbox.task.socket().display());
    let first = bundle.run_in(&Task::connect(&socket).await?).await?;
    ensure!(first.finish().await? == 3);
    // the daemon calls Shutdown after each Delete
    first.task.shutdown("c1").await?;
    let second = sandbox.member("c2", holder, &["sh", "-c", "exit 4"]).run_in(&sandbox.task).await?;
    ensure!(second.finish().await? == 4);
    second.task.shutdown("c2").await?;
    ensure!(sandbox.service.status("s1").await?.state == READY, "it ended with its containers");
    sandbox.end().await
}

/// CRI leaves these files to the shim. Its specs have a /dev/shm of their own.
async fn containers_get_the_files_of_their_pod(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::shim(&stand, "s1").await?;
    sandbox.create().await?;
    let holder = sandbox.start().await?;
    let script = "cat /etc/hostname; cat /etc/resolv.conf; grep localhost /etc/hosts; echo written > /dev/shm/file";
    let text = output_of(&stand, &sandbox, sandbox.member("c1", holder, &["sh", "-c", script])).await?;
    for wanted in ["s1-host", "nameserver 192.0.2.53", "search pods.example", "options ndots:5", "127.0.0.1"] {
        ensure!(text.contains(wanted), "no {wanted:?} in {text:?}");
    }
    let text = output_of(&stand, &sandbox, sandbox.member("c2", holder, &["cat", "/dev/shm/file"])).await?;
    ensure!(text == "written\n", "{text:?}");
    sandbox.end().await
}

/// The process of the sandbox is the first one that every container sees.
async fn containers_can_share_process_ids(stand: Stand) -> Result<()> {
    let mut sandbox = Sandbox::shim(&stand, "s1").await?;
    sandbox.config.namespaces().pid = POD;
    sandbox.create().await?;
    let holder = sandbox.start().await?;
    let ids = namespace_of(holder, "pid")?;
    ensure!(ids != namespace_of(std::process::id(), "pid")?, "the process of the sandbox has the host's process ids");
    let mut containers = Vec::new();
    for id in ["c1", "c2"] {
        let bundle = sandbox.member(id, holder, &["sh", "-c", "sleep 1000 & exec sleep 1000"]).spec(|spec| spec.join_pids(holder));
        containers.push(bundle.run_in(&sandbox.task).await?);
    }
    ensure!(namespace_of(containers[0].pid, "pid")? == ids && namespace_of(containers[1].pid, "pid")? == ids, "other process ids");
    // the end of one ends neither the other nor the sandbox, and what it leaves is reaped
    ensure!(containers[0].destroy().await? == 137);
    let zombies = || proc::all().into_values().filter(|process| process.parent == holder.cast_signed() && process.is_zombie()).count();
    eventually_true("no zombie of the sandbox's process", SOON, || zombies() == 0).await?;
    ensure!(containers[1].task.state("c2", "").await?.status.value() == 2, "the other container has ended");
    ensure!(sandbox.service.status("s1").await?.state == READY);
    containers[1].destroy().await?;
    sandbox.end().await
}

async fn a_shutdown_ends_containers_that_are_left(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::shim(&stand, "s1").await?;
    sandbox.create().await?;
    let holder = sandbox.start().await?;
    let mut pids = Vec::new();
    for id in ["c1", "c2"] {
        let script = "trap '' TERM; sleep 1000 & sleep 1000";
        pids.push(sandbox.member(id, holder, &["sh", "-c", script]).run_in(&sandbox.task).await?.pid.cast_signed());
    }
    let shim = sandbox.bundle.shim_pid()?;
    sandbox.stop().await?;
    sandbox.service.shutdown("s1").await?;
    eventually_true("the containers have ended", SHORTLY, || !pids.iter().any(|pid| proc::is_alive(*pid))).await?;
    eventually_true("the shim has exited", SHORTLY, || !proc::is_alive(shim)).await
}

/// The pod's namespaces are those of that process: CRI must learn that it is gone.
async fn a_pod_whose_process_is_killed_is_not_ready(stand: Stand) -> Result<()> {
    for pids in [CONTAINER, POD] {
        let mut sandbox = Sandbox::shim(&stand, if pids == POD { "s2" } else { "s1" }).await?;
        sandbox.config.namespaces().pid = pids;
        sandbox.create().await?;
        let holder = sandbox.start().await?.cast_signed();
        let wait = sandbox.service.begin_wait(&sandbox.id).await?;
        let shim = sandbox.bundle.shim_pid()?;
        proc::kill_hard(holder);
        eventually_true("it is dead", SOON, || !proc::is_alive(holder)).await?;
        match wait.answer(SHORTLY).await {
            Ok(_end) => ensure!(sandbox.service.status(&sandbox.id).await?.state == NOT_READY, "it is still ready"),
            // it was the shim itself
            Err(CallError::Closed) => {}
            Err(error) => return Err(error).context("Wait"),
        }
        if proc::is_alive(shim) {
            sandbox.end().await?;
        }
        sandbox.bundle.delete_command().await?;
    }
    Ok(())
}

/// `delete` runs in the bundle of the sandbox, and in those of its containers.
async fn delete_ends_the_containers_of_a_dead_shims_sandbox(stand: Stand) -> Result<()> {
    for has_started in [true, false] {
        let number = u8::from(has_started);
        let sandbox = Sandbox::shim(&stand, &format!("s{number}")).await?;
        sandbox.create().await?;
        let holder = sandbox.start().await?;
        let mut pids = Vec::new();
        for id in ["a", "b"] {
            let bundle = sandbox.member(&format!("{id}{number}"), holder, &["sleep", "1000"]);
            if has_started {
                bundle.start_shim().await?;
            }
            pids.push(bundle.run_in(&sandbox.task).await?.pid.cast_signed());
        }
        let shim = sandbox.bundle.shim_pid()?;
        proc::kill_hard(shim);
        eventually_true("the shim is dead", SOON, || !proc::is_alive(shim)).await?;
        let begin = Instant::now();
        sandbox.bundle.delete_command().await?;
        ensure!(begin.elapsed() < Duration::from_secs(5) * patience(), "it took {:?}", begin.elapsed());
        for pid in pids {
            eventually_true("its init is dead", Duration::from_secs(2), || !proc::is_alive(pid)).await?;
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        ensure!(!mounts.contains(&text(&sandbox.bundle.folder)), "a mount is left: {mounts}");
    }
    Ok(())
}
