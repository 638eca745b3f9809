//! Sandboxes: their records, their shims, and the containers in them.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::sandbox::{
    ControllerMetricsRequest, ControllerPlatformRequest, ControllerUpdateRequest, ControllerWaitRequest, StoreListRequest,
    StoreUpdateRequest,
};
use containerd_client::services::v1::{DeleteNamespaceRequest, PluginsRequest};
use containerd_client::types::Sandbox;
use prost_types::Any;
use shim_tests::client::Answer;
use shim_tests::container::code_of;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, within};
use shim_tests::operator::upgraded;
use shim_tests::suite::Suite;
use shim_tests::{proc, programs};
use tonic::{Code, Request};

use crate::pod::{CONTROLLER, Pod, Published, refused, unless};

pub(crate) async fn a_record_of_a_sandbox_is_created_updated_listed_and_deleted(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = cx.client();
    let any = |value: u8| Any { type_url: "t".to_owned(), value: vec![value] };
    let labels =
        |pairs: &[(&str, &str)]| pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect::<HashMap<_, _>>();
    let (one, two) = (Pod::new(&cx, "one"), Pod::new(&cx, "two"));
    let made = one.store(Sandbox { labels: labels(&[("a", "1"), ("b.c", "2")]), spec: Some(any(1)), ..one.record() }).await?;
    ensure!(made.created_at.is_some() && made.created_at == made.updated_at && made.sandboxer == CONTROLLER, "{made:?}");
    refused(one.store(one.record()).await, Code::AlreadyExists, "sandbox \"one\": already exists")?;
    two.store(Sandbox { extensions: [("x".to_owned(), any(2))].into(), ..two.record() }).await?;
    ensure!(one.get().await? == made);
    let update = async |sandbox: Sandbox, fields: &[&str]| -> Answer<Sandbox> {
        let fields = fields.iter().map(|field| (*field).to_owned()).collect();
        let request = client.request(StoreUpdateRequest { sandbox: Some(sandbox), fields });
        Ok(client.api().sandbox_store().update(request).await?.into_inner().sandbox.unwrap_or_default())
    };
    let new = Sandbox { labels: labels(&[("b.c", "3")]), extensions: [("y".to_owned(), any(3))].into(), ..one.record() };
    let updated = update(new.clone(), &["labels.b.c", "labels.a", "extensions.y"]).await?;
    ensure!(
        updated == Sandbox { spec: Some(any(1)), created_at: made.created_at, updated_at: updated.updated_at, ..new.clone() },
        "{updated:?}"
    );
    ensure!(updated.updated_at != made.updated_at && one.get().await? == updated);
    refused(update(new.clone(), &["sandboxer"]).await, Code::InvalidArgument, "cannot update \"sandboxer\" field on sandbox \"one\"")?;
    refused(update(Sandbox { runtime: None, ..new.clone() }, &[]).await, Code::InvalidArgument, "immutable")?;
    refused(update(Pod::new(&cx, "none").record(), &["labels"]).await, Code::NotFound, "sandbox \"none\": not found")?;
    let list = async |filters: &[&str]| -> Answer<Vec<String>> {
        let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
        let found = client.api().sandbox_store().list(client.request(StoreListRequest { filters })).await?.into_inner();
        Ok(found.list.into_iter().map(|sandbox| sandbox.sandbox_id).collect())
    };
    for (filters, found) in [
        (&[][..], &["one", "two"][..]),
        (&["id==two"], &["two"]),
        (&["labels.\"b.c\"==3"], &["one"]),
        (&["labels.none", "id~=/^o/"], &["one"]),
        (&["runtime.name==io.containerd.x.v2"], &[]),
    ] {
        ensure!(list(filters).await? == found, "{filters:?}");
    }
    refused(list(&["id=one"]).await, Code::InvalidArgument, "at character")?;
    // a store that was left by a crash has them too, and they keep their namespace
    cx.crash_daemon().await?;
    ensure!(one.get().await? == updated);
    let name = client.namespace().to_owned();
    let delete_namespace = async || client.api().namespaces().delete(Request::new(DeleteNamespaceRequest { name: name.clone() })).await;
    refused(delete_namespace().await, Code::FailedPrecondition, "must be empty, but it still has sandboxes")?;
    let elsewhere = cx.with_own_namespace().await?;
    refused(Pod::new(&elsewhere, "one").get().await, Code::NotFound, "sandbox \"one\": not found")?;
    for pod in [&one, &two] {
        pod.forget().await?;
        refused(pod.forget().await, Code::NotFound, "not found")?;
    }
    delete_namespace().await?;
    Ok(())
}

pub(crate) async fn a_sandbox_is_refused_with_a_code(cx: Context) -> Result<()> {
    let pod = Pod::new(&cx, "s");
    let named = |id: &str| Pod { id: id.to_owned(), ..Pod::new(&cx, "") };
    refused(named("../s").store(named("../s").record()).await, Code::InvalidArgument, "sandbox ID: identifier")?;
    refused(named("../s").create().await, Code::InvalidArgument, "sandbox ID: identifier")?;
    refused(pod.get().await, Code::NotFound, "sandbox \"s\": not found")?;
    refused(pod.start().await, Code::NotFound, "sandbox \"s\": not found")?;
    refused(pod.wait().await, Code::NotFound, "sandbox \"s\": not found")?;
    refused(pod.shut_down().await, Code::NotFound, "sandbox \"s\": not found")?;
    let other = Pod { sandboxer: "podsandbox".to_owned(), ..Pod::new(&cx, "s") };
    refused(other.create().await, Code::NotFound, "sandbox controller \"podsandbox\": not found")?;
    let unknown = Pod { runtime: "io.containerd.none.v2".to_owned(), ..Pod::new(&cx, "s") };
    refused(unknown.create().await, Code::FailedPrecondition, "is not installed")?;
    // as with containerd
    pod.stop().await?;
    let status = pod.status().await?;
    ensure!(status.sandbox_id == "s" && status.exited_at.is_some() && status.state.is_empty(), "{status:?}");
    // a container cannot join what is not there
    let container = cx.container(&["true"]).sandbox("s").create().await;
    ensure!(code_of(container)? == Code::NotFound);
    // nor can one have the id of the other
    let task = cx.container(&["sleep", "1000"]).id("s").start().await?;
    refused(pod.create().await, Code::AlreadyExists, "task s: already exists")?;
    ensure!(task.destroy().await? == 137);
    task.remove().await?;
    let plugins = PluginsRequest { filters: vec!["type~=/sandbox/".into(), "id~=/^sandbox/".into()] };
    let plugins = cx.client().api().introspection().plugins(Request::new(plugins)).await?.into_inner().plugins;
    let plugins: Vec<_> = plugins.iter().map(|plugin| format!("{}.{}", plugin.r#type, plugin.id)).collect();
    let expected = [
        "io.containerd.sandbox.store.v1.local",
        "io.containerd.sandbox.controller.v1.shim",
        "io.containerd.grpc.v1.sandbox-controllers",
        "io.containerd.grpc.v1.sandboxes",
    ];
    ensure!(plugins == expected, "{plugins:?}");
    Ok(())
}

pub(crate) async fn a_sandbox_lives_in_a_shim_and_its_containers_join_it(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let (published, pod) = (Published::from(cx.client()).await?, Pod::new(&cx, "s"));
    let started = pod.run().await?;
    ensure!(proc::is_alive(started.pid.cast_signed()) && started.created_at.is_some(), "{started:?}");
    ensure!(started.address.starts_with("ttrpc+unix:///") && [2, 3].contains(&started.version), "{started:?}");
    refused(pod.create().await, Code::AlreadyExists, "sandbox \"s\": already exists")?;
    let status = pod.status().await?;
    ensure!(status.state == "SANDBOX_READY" && status.pid == started.pid && status.address == started.address, "{status:?}");
    let request = ControllerPlatformRequest { sandbox_id: pod.id.clone(), sandboxer: pod.sandboxer.clone() };
    let platform = pod.client.api().sandbox_controller().platform(pod.client.request(request)).await?.into_inner().platform;
    ensure!(platform.is_some_and(|platform| platform.os == "linux" && !platform.architecture.is_empty()));
    let request = ControllerMetricsRequest { sandbox_id: pod.id.clone(), sandboxer: pod.sandboxer.clone() };
    let metrics = pod.client.api().sandbox_controller().metrics(pod.client.request(request)).await?.into_inner().metrics;
    ensure!(metrics.as_ref().is_some_and(|metrics| metrics.id == "s" && metrics.timestamp.is_some()), "{metrics:?}");
    let update = async |sandbox: Option<Sandbox>| -> Answer<()> {
        let (sandbox_id, sandboxer) = (pod.id.clone(), pod.sandboxer.clone());
        let request = ControllerUpdateRequest { sandbox_id, sandboxer, sandbox, fields: vec!["labels".to_owned()] };
        pod.client.api().sandbox_controller().update(pod.client.request(request)).await.map(drop)
    };
    update(Some(pod.record())).await?;
    refused(update(None).await, Code::InvalidArgument, "sandbox must be set")?;
    // one that runs is not ended for that
    refused(pod.start().await, Code::FailedPrecondition, "")?;
    let keeper = cx.shim_pid("s")?;
    let one = cx.container(&["sleep", "1000"]).sandbox("s").start().await?;
    let two = cx.container(&["sh", "-c", "exit 3"]).sandbox("s").start().await?;
    ensure!(cx.shims().len() == 1 && cx.shim_pid("s")? == keeper, "{:?}", cx.shims());
    ensure!(one.exec("e", &["sh", "-c", "exit 5"]).run().await? == 5 && two.finish().await? == 3);
    // the sandbox stays when its containers go, and is no task
    ensure!(one.destroy().await? == 137 && pod.client.list().await?.is_empty());
    ensure!(pod.status().await?.state == "SANDBOX_READY" && proc::is_alive(keeper));
    refused(pod.client.state("s", "").await, Code::NotFound, "task s: not found")?;
    ensure!(code_of(cx.container(&["true"]).id("s").create().await)? == Code::AlreadyExists);
    let waiting = tokio::spawn({
        let (client, id) = (cx.client().clone(), pod.id.clone());
        async move {
            let request = client.request(ControllerWaitRequest { sandbox_id: id, sandboxer: CONTROLLER.to_owned() });
            client.api().sandbox_controller().wait(request).await
        }
    });
    pod.stop().await?;
    pod.stop().await.context("again")?;
    let ended = within("Wait ends", SOON, waiting).await???.into_inner();
    let status = pod.status().await?;
    ensure!(status.state == "SANDBOX_NOTREADY" && status.exited_at.is_some() && ended.exited_at.is_some(), "{status:?} {ended:?}");
    pod.shut_down().await?;
    refused(pod.shut_down().await, Code::NotFound, "sandbox \"s\": not found")?;
    cx.leaves_nothing().await?;
    // its id is free
    pod.create().await?;
    pod.start().await?;
    pod.remove().await?;
    let once = ["/sandboxes/create s", "/sandboxes/start s", "/sandboxes/exit s"];
    published.are(&[once, once].concat()).await?;
    cx.leaves_nothing().await
}

/// The shim of containerd 1.7 makes a sandbox of itself.
pub(crate) async fn a_sandbox_of_another_shim_is_served(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let pod = Pod::of(Suite::Trixie, &cx, "s");
    let runtime = pod.runtime.clone();
    pod.run().await?;
    let container = cx.container(&["sh", "-c", "exit 3"]).sandbox("s").runtime_type(&runtime).create().await?;
    ensure!(container.run().await? == 3);
    ensure!(
        proc::all()
            .values()
            .filter(|process| process.command.contains(&runtime) && process.command.contains(pod.client.namespace()))
            .count()
            == 1
    );
    cx.crash_daemon().await?;
    let container = cx.container(&["sh", "-c", "exit 4"]).sandbox("s").runtime_type(&runtime).create().await?;
    ensure!(container.run().await? == 4);
    pod.remove().await?;
    cx.leaves_nothing().await
}

pub(crate) async fn a_shim_without_sandboxes_leaves_nothing(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let pod = Pod::of(Suite::Forky, &cx, "s");
    refused(pod.create().await, Code::Unimplemented, "containerd.runtime.sandbox.v1.Sandbox")?;
    cx.leaves_nothing().await?;
    // nor does a program that fails
    let program = programs::script(cx.folder(), "failing", "#!/bin/sh\necho no >&2\nexit 3\n")?;
    let pod = Pod { runtime: program.display().to_string(), ..Pod::new(&cx, "s") };
    refused(pod.create().await, Code::Unknown, "exit status: 3: no")?;
    cx.leaves_nothing().await
}

pub(crate) async fn a_sandbox_survives_a_crash_and_an_upgrade_of_the_daemon(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let pod = Pod::new(&cx, "s");
    let started = pod.run().await?;
    let container = cx.container(&["sh", "-c", "read go; exit 3"]).sandbox("s").stdio(shim_tests::container::Stdio::ALL).start().await?;
    let is_the_same = async || -> Result<()> {
        let status = pod.status().await?;
        ensure!(status.state == "SANDBOX_READY" && status.pid == started.pid, "{status:?}");
        ensure!(container.state().await?.pid == container.pid && cx.shims().len() == 1);
        Ok(())
    };
    cx.crash_daemon().await?;
    is_the_same().await?;
    upgraded(cx.daemon()).await?;
    is_the_same().await?;
    let joined = cx.container(&["sh", "-c", "exit 4"]).sandbox("s").create().await?;
    ensure!(joined.run().await? == 4 && cx.shims().len() == 1);
    container.io.stdin().await?.write_all(b"go\n")?;
    ensure!(container.finish().await? == 3);
    let published = Published::from(cx.client()).await?;
    let (removed, ended) = tokio::join!(pod.remove(), pod.wait());
    removed?;
    ensure!(ended?.exited_at.is_some());
    published.are(&["/sandboxes/exit s"]).await?;
    cx.leaves_nothing().await
}

pub(crate) async fn the_end_of_a_killed_sandbox_is_published_once_and_kept(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let (events, published, pod) = (cx.events().await?, Published::from(cx.client()).await?, Pod::new(&cx, "s"));
    pod.run().await?;
    let container = cx.container(&["sleep", "1000"]).sandbox("s").start().await?;
    proc::kill_hard(cx.shim_pid("s")?);
    let ended = within("Wait ends", SOON, pod.wait()).await??;
    ensure!(ended.exit_status == 137 && ended.exited_at.is_some(), "{ended:?}");
    ensure!(container.wait().await? == 137 && !proc::is_alive(container.pid.cast_signed()));
    ensure!(code_of(cx.container(&["true"]).sandbox("s").create().await)? == Code::FailedPrecondition);
    let is_over = async || -> Result<()> {
        let status = pod.status().await?;
        ensure!(status.state == "SANDBOX_NOTREADY" && status.exited_at == ended.exited_at, "{status:?}");
        ensure!(pod.wait().await? == ended);
        Ok(())
    };
    is_over().await?;
    published.are(&["/sandboxes/create s", "/sandboxes/start s", "/sandboxes/exit s"]).await?;
    ensure!(events.exits(&container.id, "").len() == 1, "{:?}", events.all());
    cx.crash_daemon().await?;
    is_over().await?;
    ensure!(container.delete().await?.exit_status == 137);
    pod.remove().await?;
    refused(pod.wait().await, Code::NotFound, "sandbox \"s\": not found")?;
    cx.crash_daemon().await?;
    refused(pod.wait().await, Code::NotFound, "sandbox \"s\": not found")?;
    cx.leaves_nothing().await
}

/// One of containerd 1.7 names no controller, and starts what it has only recorded.
pub(crate) async fn a_client_of_an_older_version_needs_no_create(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let pod = Pod { sandboxer: String::new(), ..Pod::new(&cx, "s") };
    refused(pod.start().await, Code::NotFound, "sandbox \"s\": not found")?;
    pod.store(pod.record()).await?;
    pod.start().await?;
    ensure!(pod.status().await?.state == "SANDBOX_READY");
    pod.stop().await?;
    pod.shut_down().await?;
    // it takes NotFound for a failure
    pod.shut_down().await?;
    pod.forget().await?;
    refused(pod.shut_down().await, Code::NotFound, "sandbox \"s\": not found")?;
    cx.leaves_nothing().await
}

/// Each call is cut off after ever more time, until one is answered first.
pub(crate) async fn a_crash_of_the_daemon_at_any_step_leaves_no_half_sandbox(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let mut cut_off = 0;
    for (number, step) in ["record", "create", "start", "stop", "shutdown", "delete"].into_iter().enumerate() {
        for round in 0..ROUNDS {
            let id = format!("s{number}r{round}");
            let pod = Pod::new(&cx, &id);
            prepare(&pod, step).await.with_context(|| format!("before {step}"))?;
            let call = perform(&pod, step);
            let is_answered = tokio::time::timeout(STRIDE * round * round, call).await.is_ok();
            cut_off += u32::from(!is_answered);
            cx.daemon().kill()?;
            cx.revive_daemon().await?;
            is_whole(&cx, &pod, step, is_answered).await.with_context(|| format!("{step} of {id}, answered: {is_answered}"))?;
            pod.remove().await.with_context(|| format!("{step} of {id} is undone"))?;
            cx.leaves_nothing().await.with_context(|| format!("{step} of {id}, answered: {is_answered}"))?;
        }
    }
    eprintln!("{} of {} calls were cut off", cut_off, 6 * ROUNDS);
    ensure!(cut_off > 0, "every call was answered before its crash");
    Ok(())
}

async fn prepare(pod: &Pod<'_>, step: &str) -> Result<()> {
    for done in ["record", "create", "start", "stop", "shutdown"].into_iter().take_while(|done| *done != step) {
        perform(pod, done).await?;
    }
    Ok(())
}

async fn perform(pod: &Pod<'_>, step: &str) -> Answer<()> {
    match step {
        "record" => pod.store(pod.record()).await.map(drop),
        "create" => pod.create().await,
        "start" => pod.start().await.map(drop),
        "stop" => pod.stop().await,
        "shutdown" => pod.shut_down().await,
        _ => pod.forget().await,
    }
}

/// Checks that what was acknowledged is there, and that the rest is there or not, and usable where it is.
async fn is_whole(cx: &Context, pod: &Pod<'_>, step: &str, is_answered: bool) -> Result<()> {
    let is_recorded = pod.get().await.is_ok();
    ensure!(if is_answered { is_recorded == (step != "delete") } else { is_recorded || ["record", "delete"].contains(&step) });
    let status = pod.status().await?;
    let has_shim = !status.state.is_empty();
    match step {
        "create" if is_answered => ensure!(has_shim, "{status:?}"),
        "start" if is_answered => ensure!(status.state == "SANDBOX_READY", "{status:?}"),
        "shutdown" if is_answered => ensure!(!has_shim, "{status:?}"),
        _ => {}
    }
    match step {
        // the same calls again have the same result
        "record" => unless(pod.store(pod.record()).await.map(drop), Code::AlreadyExists)?,
        "create" => unless(pod.create().await, Code::AlreadyExists)?,
        _ => {}
    }
    if ["record", "create", "start"].contains(&step) {
        if step == "record" {
            pod.create().await?;
        }
        // an interrupted Start may have an effect still
        let begun = pod.start().await;
        ensure!(begun.is_ok() || pod.status().await?.state == "SANDBOX_READY", "{begun:?}");
        ensure!(cx.container(&["sh", "-c", "exit 3"]).sandbox(&pod.id).create().await?.run().await? == 3);
    }
    Ok(())
}

const ROUNDS: u32 = 6;
/// The first crash comes with the call, and each later one after more time.
const STRIDE: Duration = Duration::from_millis(1);
