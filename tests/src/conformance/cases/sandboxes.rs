//! The sandbox service: the life of a sandbox without containers.

use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, ensure};
use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use protobuf::well_known_types::any::Any;
use serde_json::Value;

use crate::cgroups::{self, Version};
use crate::clauses;
use crate::conformance::Case;
use crate::eventually::{SOON, eventually, eventually_true};
use crate::messages::{METRICS_V1, METRICS_V2, SPEC};
use crate::proc;
use crate::runner::Skip;
use crate::sandbox::{NOT_READY, NOT_SERVED, READY, Sandbox, Service, namespace_of};
use crate::stand::Stand;
use crate::times::repeated;
use crate::ttrpc::{Answer, CallError, Code, code_of};

/// containerd gives the end of a shim that long.
pub(super) const SHORTLY: Duration = Duration::from_secs(5);

pub(super) fn cases() -> Vec<Case> {
    clauses![sandboxes:
        "N1" => the_sandbox_service_is_served;
        "N2" => a_started_sandbox_is_ready_and_names_its_process;
        "N3" => a_sandbox_is_not_ready_before_its_start_and_after_its_stop;
        "N4" => the_platform_is_the_hosts;
        "N5" => no_wait_is_answered_while_the_sandbox_is_ready;
        "N6" => a_stop_answers_every_wait;
        "N7" => a_stop_can_be_repeated;
        "N8" => a_shutdown_is_answered_and_the_shim_exits;
        "N9" => a_sandbox_that_was_never_created_is_not_found;
        "N10" => a_sandbox_without_its_network_is_refused;
        "N11" => options_that_cannot_be_read_are_refused;
        "N12" => a_new_connection_finds_the_sandbox;
        "N13" => a_sandbox_that_is_ready_answers_pings;
        "N14" => a_verbose_status_can_be_read;
        "N15" => a_second_create_or_start_does_no_harm;
        "N16" => the_answer_to_start_contains_a_spec;
        "N17" => metrics_match_the_hosts_cgroup_version;
        "N18" => the_pods_cgroup_exists_from_the_start_on;
        "N19" => a_stopped_sandbox_is_out_of_its_network;
        "N20" => delete_ends_a_sandbox_that_was_not_started, delete_after_a_shutdown_succeeds;
    ]
}

async fn the_sandbox_service_is_served(stand: Stand) -> Result<()> {
    let sandbox = match Sandbox::shim(&stand, "s1").await {
        // here it is the verdict
        Err(error) if error.is::<Skip>() => return Err(anyhow!("{NOT_SERVED}")),
        sandbox => sandbox?,
    };
    sandbox.create().await?;
    sandbox.start().await?;
    sandbox.end().await
}

async fn a_started_sandbox_is_ready_and_names_its_process(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::shim(&stand, "s1").await?;
    let before = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    sandbox.create().await?;
    let started = sandbox.service.start("s1").await?;
    ensure!(started.pid > 0 && proc::is_alive(started.pid.cast_signed()), "Start names no process: {started}");
    let status = sandbox.service.status("s1").await?;
    ensure!(status.sandbox_id == "s1" && status.state == READY, "{status}");
    ensure!(status.pid == started.pid, "Start and Status name two processes: {started}, {status}");
    ensure!(status.created_at == started.created_at, "Start and Status report two times: {started}, {status}");
    let created = u64::try_from(started.created_at.as_ref().context("Start reports no time")?.seconds)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    ensure!((before..=now).contains(&created), "{before}, {created}, {now}");
    sandbox.end().await
}

async fn a_sandbox_is_not_ready_before_its_start_and_after_its_stop(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::shim(&stand, "s1").await?;
    let state = async || anyhow::Ok(sandbox.service.status("s1").await?.state);
    sandbox.create().await?;
    ensure!(state().await? == NOT_READY, "before Start: {}", state().await?);
    sandbox.start().await?;
    ensure!(state().await? == READY, "after Start: {}", state().await?);
    sandbox.stop().await?;
    ensure!(state().await? == NOT_READY, "after Stop: {}", state().await?);
    sandbox.end().await
}

async fn the_platform_is_the_hosts(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::run(&stand, "s1").await?;
    // as Go names them
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let answer = sandbox.service.platform("s1").await?;
    ensure!(answer.platform.os == "linux" && answer.platform.architecture == architecture, "{answer}");
    sandbox.end().await
}

async fn no_wait_is_answered_while_the_sandbox_is_ready(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::run(&stand, "s1").await?;
    let mut wait = sandbox.service.begin_wait("s1").await?;
    // for as long as twenty other calls take
    for _ in 0..20 {
        ensure!(sandbox.service.status("s1").await?.state == READY);
    }
    ensure!(!wait.is_over(), "it is answered before Stop");
    sandbox.end().await
}

async fn a_stop_answers_every_wait(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::run(&stand, "s1").await?;
    let another = sandbox.service.another().await?;
    let waits = [sandbox.service.begin_wait("s1").await?, sandbox.service.begin_wait("s1").await?, another.begin_wait("s1").await?];
    sandbox.stop().await?;
    let mut ends = Vec::new();
    for wait in waits {
        ends.push(wait.answer(SHORTLY).await.context("a Wait from before Stop")?);
    }
    ends.push(another.begin_wait("s1").await?.answer(SOON).await.context("a Wait from after Stop")?);
    ensure!(ends.iter().all(|end| *end == ends[0]), "{ends:?}");
    ensure!(ends[0].exited_at.is_some(), "it has no time: {:?}", ends[0]);
    sandbox.end().await
}

/// CRI stops a pod whose state it does not know, and the kubelet repeats what failed.
async fn a_stop_can_be_repeated(stand: Stand) -> Result<()> {
    for is_started in [true, false] {
        let id = if is_started { "s1" } else { "s2" };
        let sandbox = Sandbox::shim(&stand, id).await?;
        sandbox.create().await?;
        if is_started {
            sandbox.start().await?;
        }
        for time in ["first", "second", "third"] {
            sandbox.stop().await.with_context(|| format!("the {time} Stop, started: {is_started}"))?;
        }
        sandbox.end().await?;
    }
    Ok(())
}

/// The answer must not be lost with the connection: CRI then keeps the pod and its name.
async fn a_shutdown_is_answered_and_the_shim_exits(stand: Stand) -> Result<()> {
    for round in 0..repeated(5) {
        let sandbox = Sandbox::run(&stand, &format!("s{round}")).await?;
        let (shim, socket) = (sandbox.bundle.shim_pid()?, sandbox.task.socket().to_owned());
        sandbox.stop().await?;
        sandbox.service.shutdown(&sandbox.id).await.context("the answer to ShutdownSandbox")?;
        eventually_true("the shim has exited", SHORTLY, || !proc::is_alive(shim)).await?;
        eventually_true("the socket is gone", SOON, || !socket.exists()).await?;
    }
    Ok(())
}

async fn a_sandbox_that_was_never_created_is_not_found(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::shim(&stand, "s1").await?;
    unknown(&sandbox.service, "s1").await.context("before Create")?;
    sandbox.create().await?;
    sandbox.start().await?;
    unknown(&sandbox.service, "other").await.context("beside another sandbox")?;
    // these need not be refused, but they are not for this sandbox
    for answer in [sandbox.service.stop("other").await, sandbox.service.shutdown("other").await] {
        ensure!(matches!(answer, Ok(()) | Err(CallError::Refused { code: Code::NotFound, .. })), "{answer:?}");
    }
    ensure!(sandbox.service.status("s1").await?.state == READY, "another sandbox was stopped");
    sandbox.end().await
}

async fn unknown(service: &Service, id: &str) -> Result<()> {
    let answers: [(&str, Answer<()>); 3] = [
        ("Start", service.start(id).await.map(drop)),
        ("Wait", service.begin_wait(id).await?.answer(SOON).await.map(drop)),
        ("Status", service.status(id).await.map(drop)),
    ];
    for (method, answer) in answers {
        let code = code_of(answer).with_context(|| format!("{method} of {id}"))?;
        ensure!(code == Code::NotFound, "{method} of {id}: {code:?}");
    }
    for (method, answer) in [("Ping", service.ping(id).await), ("Metrics", service.metrics(id).await.map(drop))] {
        code_of(answer).with_context(|| format!("{method} of {id}"))?;
    }
    Ok(())
}

/// Refused by Create or by Start; CRI then calls ShutdownSandbox.
async fn refused(sandbox: &Sandbox, request: &CreateSandboxRequest) -> Result<Code> {
    let answer = match sandbox.service.create(request).await {
        Ok(()) => sandbox.start().await.map(drop),
        refusal => refusal,
    };
    let code = code_of(answer)?;
    sandbox.dismiss().await?;
    Ok(code)
}

async fn a_sandbox_without_its_network_is_refused(stand: Stand) -> Result<()> {
    let file = stand.folder().join("file");
    fs::write(&file, "")?;
    let folder = stand.folder().to_owned();
    for (number, path) in [stand.folder().join("missing"), file, folder, "/proc/self/ns/uts".into()].into_iter().enumerate() {
        let id = format!("s{number}");
        let sandbox = Sandbox::shim(&stand, &id).await?;
        let request = CreateSandboxRequest { netns_path: path.display().to_string(), ..sandbox.request() };
        refused(&sandbox, &request).await.with_context(|| path.display().to_string())?;
        // and nothing of it is in the way
        drop(sandbox);
        let sandbox = Sandbox::run(&stand, &id).await?;
        sandbox.end().await?;
    }
    Ok(())
}

async fn options_that_cannot_be_read_are_refused(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::shim(&stand, "s0").await?;
    let good = sandbox.config.any();
    sandbox.dismiss().await?;
    let wrong = [
        Any { value: good.value[..good.value.len() - 1].to_vec(), ..good.clone() },
        Any { value: vec![0xff; 64], ..good.clone() },
        Any { type_url: "runtime.v1.ContainerConfig".to_owned(), ..good },
    ];
    for (number, options) in wrong.into_iter().enumerate() {
        let sandbox = Sandbox::shim(&stand, &format!("s{}", number + 1)).await?;
        let request = CreateSandboxRequest { options: Some(options).into(), ..sandbox.request() };
        let code = refused(&sandbox, &request).await.with_context(|| format!("options {number}"))?;
        ensure!(code == Code::InvalidArgument, "options {number}: {code:?}");
    }
    Ok(())
}

/// As after a restart of the daemon: it connects, and asks for the task of the sandbox's name, too.
async fn a_new_connection_finds_the_sandbox(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::run(&stand, "s1").await?;
    let before = sandbox.service.status("s1").await?;
    drop(sandbox.service.begin_wait("s1").await?);
    let shim = sandbox.bundle.shim_pid()?;
    let sandbox = sandbox.reconnect().await?;
    let connect = sandbox.task.connect_to("s1").await.context("Connect")?;
    ensure!(connect.shim_pid.cast_signed() == shim, "{connect}");
    let after = sandbox.service.status("s1").await?;
    ensure!(after == before, "Status has changed: {before}, then {after}");
    let wait = sandbox.service.begin_wait("s1").await?;
    sandbox.stop().await?;
    wait.answer(SOON).await.context("a Wait on the new connection")?;
    let sandbox = sandbox.reconnect().await?;
    ensure!(sandbox.service.status("s1").await?.state == NOT_READY);
    sandbox.end().await
}

async fn a_sandbox_that_is_ready_answers_pings(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::run(&stand, "s1").await?;
    for _ in 0..3 {
        sandbox.service.ping("s1").await.context("Ping")?;
    }
    sandbox.end().await
}

/// CRI reads the entry `info` as JSON, and fails the kubelet's call if it cannot.
async fn a_verbose_status_can_be_read(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::run(&stand, "s1").await?;
    let status = sandbox.service.verbose_status("s1").await?;
    ensure!(status.state == READY, "{status}");
    if let Some(info) = status.info.get("info") {
        let info: Value = serde_json::from_str(info).with_context(|| format!("the entry `info` is not JSON: {info:?}"))?;
        ensure!(info.is_object(), "{info}");
    }
    sandbox.end().await
}

async fn a_second_create_or_start_does_no_harm(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::shim(&stand, "s1").await?;
    sandbox.create().await?;
    ensure!(code_of(sandbox.create().await)? == Code::AlreadyExists, "before Start");
    let pid = sandbox.start().await?;
    ensure!(code_of(sandbox.create().await)? == Code::AlreadyExists, "after Start");
    match sandbox.start().await {
        Ok(again) => ensure!(again == pid, "{pid}, then {again}"),
        refusal => ensure!([Code::FailedPrecondition, Code::AlreadyExists].contains(&code_of(refusal)?)),
    }
    let status = sandbox.service.status("s1").await?;
    ensure!(status.state == READY && status.pid == pid, "{status}");
    sandbox.end().await
}

async fn the_answer_to_start_contains_a_spec(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::shim(&stand, "s1").await?;
    sandbox.create().await?;
    let started = sandbox.service.start("s1").await?;
    let any = started.spec.as_ref().context("no spec")?;
    ensure!(any.type_url.ends_with(SPEC), "{}", any.type_url);
    let spec: Value = serde_json::from_slice(&any.value)?;
    ensure!(spec["ociVersion"].is_string() && spec["linux"]["namespaces"].is_array(), "{spec}");
    ensure!(spec["hostname"] == sandbox.config.hostname.as_str(), "{spec}");
    sandbox.end().await
}

async fn metrics_match_the_hosts_cgroup_version(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::run(&stand, "s1").await?;
    let answer = sandbox.service.metrics("s1").await?;
    let metrics = answer.metrics.as_ref().context("no metrics")?;
    let wanted = if Version::here() == Version::V1 { METRICS_V1 } else { METRICS_V2 };
    ensure!(metrics.id == "s1" && metrics.timestamp.is_some(), "{answer}");
    ensure!(metrics.data.type_url.ends_with(wanted), "{}", metrics.data.type_url);
    sandbox.end().await
}

/// CRI reads a pod's statistics there; one pod without that cgroup fails the list of all.
async fn the_pods_cgroup_exists_from_the_start_on(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::run(&stand, "s1").await?;
    let folders = cgroups::folders(&sandbox.cgroup());
    ensure!(!folders.is_empty(), "there is no cgroup {}", sandbox.cgroup());
    if Version::here() == Version::V1 {
        let has = |controller: &str| folders.iter().any(|folder| folder.to_string_lossy().contains(&format!("/{controller}/")));
        let missing: Vec<_> = ["memory", "cpu", "pids"].into_iter().filter(|name| cgroups::lacks(name).is_none() && !has(name)).collect();
        ensure!(missing.is_empty(), "{folders:?}: without {missing:?}");
    }
    sandbox.end().await
}

/// CRI has the plugins take the network down after Stop, and removes the namespace: nothing may hold it.
async fn a_stopped_sandbox_is_out_of_its_network(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::run(&stand, "s1").await?;
    let network = sandbox.network().context("a network")?.number()?;
    let inside = || proc::all().into_keys().filter(|pid| namespace_of(pid.cast_unsigned(), "net").is_ok_and(|net| net == network)).count();
    ensure!(inside() > 0, "no process is in the network before Stop");
    sandbox.stop().await?;
    eventually("nothing is in the network", SOON, async || {
        ensure!(inside() == 0, "{} processes", inside());
        Ok(())
    })
    .await?;
    sandbox.end().await
}

/// containerd crashed between Create and Start: it finds the bundle when it starts again, and runs `delete`.
async fn delete_ends_a_sandbox_that_was_not_started(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::shim(&stand, "s1").await?;
    sandbox.create().await?;
    let shim = sandbox.bundle.shim_pid()?;
    sandbox.bundle.delete_command().await?;
    eventually_true("the shim has exited", SHORTLY, || !proc::is_alive(shim)).await?;
    // and one that was not even created is in the way of nothing
    let sandbox = Sandbox::shim(&stand, "s2").await?;
    sandbox.bundle.delete_command().await?;
    sandbox.dismiss().await
}

/// containerd runs it each time a connection ends.
async fn delete_after_a_shutdown_succeeds(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::run(&stand, "s1").await?;
    sandbox.end().await?;
    for _ in 0..2 {
        sandbox.bundle.delete_command().await?;
    }
    eventually_true("no socket is left", SHORTLY, || !sandbox.task.socket().exists()).await
}
