//! The API, call by call, where x-manager does more than forward to a shim.

use std::collections::HashMap;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_client::events::TaskStart;
use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::{
    AddResourceRequest, Container, CreateContainerRequest, CreateNamespaceRequest, CreateRequest, DeleteContainerRequest,
    DeleteNamespaceRequest, DeleteRequest, DeleteResourceRequest, GetContainerRequest, GetRequest, ListContainersRequest,
    ListNamespacesRequest, ListRequest, ListResourcesRequest, Namespace, PluginsRequest, PublishRequest, Resource, SubscribeRequest,
    UpdateContainerRequest, UpdateNamespaceRequest,
};
use prost::Message as _;
use prost_types::{Any, FieldMask};
use shim_tests::client::Client;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true, within};
use shim_tests::suite;
use tokio::task::JoinSet;
use tonic::{Code, Request, Status};

fn container(id: &str) -> Container {
    Container {
        id: id.to_owned(),
        runtime: Some(Runtime { name: "io.containerd.x.v2".to_owned(), options: None }),
        spec: Some(Any { type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".to_owned(), value: b"{}".to_vec() }),
        ..Container::default()
    }
}

fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

async fn create(client: &Client, container: Container) -> Result<Container, Status> {
    let request = client.request(CreateContainerRequest { container: Some(container) });
    Ok(client.api().containers().create(request).await?.into_inner().container.unwrap_or_default())
}

async fn list(client: &Client, filters: &[&str]) -> Result<Vec<String>, Status> {
    let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
    let request = client.request(ListContainersRequest { filters });
    let found = client.api().containers().list(request).await?.into_inner();
    Ok(found.containers.into_iter().map(|container| container.id).collect())
}

async fn delete(client: &Client, id: &str) -> Result<(), Status> {
    client.api().containers().delete(client.request(DeleteContainerRequest { id: id.to_owned() })).await.map(drop)
}

fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, message: &str) -> Result<()> {
    let status = answer.err().context("it was accepted")?;
    ensure!(status.code() == code && status.message().contains(message), "{status:?} instead of {code:?} with {message:?}");
    Ok(())
}

fn as_status(error: anyhow::Error) -> Status {
    error.downcast().unwrap_or_else(|error| Status::internal(format!("{error:#}")))
}

pub(crate) async fn namespaces_are_kept_apart(cx: Context) -> Result<()> {
    let other = cx.with_own_namespace().await?;
    let (here, there) = (cx.client(), other.client());
    create(here, container("same")).await?;
    create(there, Container { image: "another".into(), ..container("same") }).await?;
    create(there, container("alone")).await?;
    ensure!(list(here, &[]).await? == ["same"] && list(there, &[]).await? == ["alone", "same"]);
    let get = here.request(GetContainerRequest { id: "alone".into() });
    let message = format!("container \"alone\" in namespace {:?}: not found", here.namespace());
    refused(here.api().containers().get(get).await, Code::NotFound, &message)?;
    refused(create(here, container("same")).await, Code::AlreadyExists, "container \"same\": already exists")?;
    let running = cx.container(&["sleep", "1000"]).id("task").start().await?;
    refused(there.state("task", "").await, Code::NotFound, "task task: not found")?;
    ensure!(there.list().await?.is_empty() && here.list().await?.len() == 1);
    delete(here, "same").await?;
    ensure!(list(there, &["id==same"]).await? == ["same"]);
    for id in ["same", "alone"] {
        delete(there, id).await?;
    }
    ensure!(running.destroy().await? == 137);
    Ok(())
}

pub(crate) async fn a_namespace_is_deleted_only_when_it_is_empty(cx: Context) -> Result<()> {
    let client = cx.client();
    let name = client.namespace().to_owned();
    let delete_it = async || client.api().namespaces().delete(Request::new(DeleteNamespaceRequest { name: name.clone() })).await;
    create(client, container("c")).await?;
    client.with_lease("l").await?;
    refused(delete_it().await, Code::FailedPrecondition, "must be empty, but it still has containers")?;
    delete(client, "c").await?;
    // leases keep things in it, but not the namespace
    delete_it().await?;
    client.with_lease("l").await.context("the old one is gone")?;
    delete_it().await?;
    refused(delete_it().await, Code::NotFound, "not found")?;
    let names = client.api().namespaces().list(Request::new(ListNamespacesRequest::default())).await?.into_inner().namespaces;
    ensure!(names.iter().all(|namespace| namespace.name != name), "{names:?}");
    // the first use creates it
    create(client, container("c")).await?;
    delete(client, "c").await?;
    client.api().namespaces().get(Request::new(containerd_client::services::v1::GetNamespaceRequest { name })).await?;
    Ok(())
}

pub(crate) async fn labelling_a_namespace_creates_it(cx: Context) -> Result<()> {
    let client = cx.client();
    let name = format!("{}-labelled", client.namespace());
    let update = async |paths: &[&str], pairs: &[(&str, &str)]| -> Result<HashMap<String, String>, Status> {
        let namespace = Some(Namespace { name: name.clone(), labels: labels(pairs) });
        let update_mask = Some(FieldMask { paths: paths.iter().map(|path| (*path).to_owned()).collect() });
        let request = Request::new(UpdateNamespaceRequest { namespace, update_mask });
        let updated = client.api().namespaces().update(request).await?.into_inner().namespace;
        Ok(updated.unwrap_or_default().labels)
    };
    ensure!(update(&["labels.a"], &[("a", "1"), ("b", "2")]).await? == labels(&[("a", "1")]));
    ensure!(update(&["labels."], &[]).await? == labels(&[("a", "1")]), "no label with an empty name is added");
    refused(update(&["labels."], &[("", "3")]).await, Code::InvalidArgument, "must not be empty")?;
    let names = client.api().namespaces().list(Request::new(ListNamespacesRequest::default())).await?.into_inner().namespaces;
    ensure!(names.iter().any(|namespace| namespace.name == name), "{names:?}");
    client.api().namespaces().delete(Request::new(DeleteNamespaceRequest { name })).await?;
    Ok(())
}

pub(crate) async fn a_container_is_updated_by_its_field_mask(cx: Context) -> Result<()> {
    let client = cx.client();
    let made = create(client, Container { labels: labels(&[("a", "1"), ("b", "2")]), image: "i".into(), ..container("c") }).await?;
    ensure!(made.created_at.is_some() && made.created_at == made.updated_at);
    let update = async |container: Container, paths: &[&str]| -> Result<Container, Status> {
        let paths: Vec<_> = paths.iter().map(|path| (*path).to_owned()).collect();
        let update_mask = (!paths.is_empty()).then_some(FieldMask { paths });
        let request = client.request(UpdateContainerRequest { container: Some(container), update_mask });
        Ok(client.api().containers().update(request).await?.into_inner().container.unwrap_or_default())
    };
    let new = Container { labels: labels(&[("b", "3"), ("c", "4")]), image: "j".into(), ..container("c") };
    let updated = update(new.clone(), &["labels.b"]).await?;
    ensure!(updated.labels == labels(&[("a", "1"), ("b", "3")]) && updated.image == "i", "{updated:?}");
    ensure!(updated.created_at == made.created_at && updated.updated_at != made.updated_at);
    ensure!(
        update(new.clone(), &["labels.a", "image"]).await?.labels == labels(&[("b", "3")]),
        "a label that is not in the request is removed"
    );
    ensure!(update(new.clone(), &["labels."]).await?.labels == labels(&[("b", "3")]), "no label with an empty name is added");
    refused(update(new.clone(), &["extensions."]).await, Code::InvalidArgument, "must not be empty")?;
    let updated = update(new.clone(), &[]).await?;
    ensure!(updated.labels == new.labels && updated.image == "j", "{updated:?}");
    refused(update(new.clone(), &["runtime.name"]).await, Code::InvalidArgument, "cannot update field")?;
    refused(update(Container { runtime: None, ..new.clone() }, &[]).await, Code::InvalidArgument, "immutable")?;
    refused(update(container("none"), &["image"]).await, Code::NotFound, "not found")?;
    ensure!(
        client.api().containers().get(client.request(GetContainerRequest { id: "c".into() })).await?.into_inner().container
            == Some(updated)
    );
    delete(client, "c").await?;
    Ok(())
}

pub(crate) async fn filters_select_containers_leases_plugins_and_events(cx: Context) -> Result<()> {
    let client = cx.client();
    create(client, Container { labels: labels(&[("env", "prod"), ("x.y/z", "1")]), image: "one".into(), ..container("a") }).await?;
    create(client, Container { labels: labels(&[("env", "dev")]), image: "two".into(), ..container("b") }).await?;
    for (filters, found) in [
        (&["id==a"][..], &["a"][..]),
        (&["labels.env==prod,image==two"], &[]),
        (&["labels.env==prod", "image==two"], &["a", "b"]),
        (&["labels.\"x.y/z\""], &["a"]),
        (&["image~=/^t/"], &["b"]),
        (&["runtime.name==io.containerd.x.v2,id!=a"], &["b"]),
    ] {
        ensure!(list(client, filters).await? == found, "{filters:?}");
    }
    refused(list(client, &["id=a"]).await, Code::InvalidArgument, "at character")?;
    let mut stream = client.api().containers().list_stream(client.request(ListContainersRequest::default())).await?.into_inner();
    let mut streamed = Vec::new();
    while let Some(message) = stream.message().await? {
        streamed.push(message.container.unwrap_or_default().id);
    }
    ensure!(streamed == ["a", "b"]);
    let make = CreateRequest { id: "l1".into(), labels: labels(&[("gc", "no")]) };
    client.api().leases().create(client.request(make)).await?;
    client.api().leases().create(client.request(CreateRequest { id: "l2".into(), ..CreateRequest::default() })).await?;
    let found = client.api().leases().list(client.request(ListRequest { filters: vec!["labels.gc==no".into()] })).await?.into_inner();
    ensure!(found.leases.len() == 1 && found.leases[0].id == "l1", "{found:?}");
    let plugins = PluginsRequest { filters: vec!["type==io.containerd.runtime.v2".into()] };
    let plugins = client.api().introspection().plugins(Request::new(plugins)).await?.into_inner().plugins;
    ensure!(plugins.len() == 1 && plugins[0].id == "task", "{plugins:?}");
    let filters = vec![format!("topic==\"/x/y\",namespace=={},event.container_id==wanted", client.namespace())];
    let mut events = client.api().events().subscribe(client.request(SubscribeRequest { filters })).await?.into_inner();
    for id in ["other", "wanted"] {
        let event = TaskStart { container_id: id.into(), pid: 7 };
        let event = Any { type_url: "containerd.events.TaskStart".into(), value: event.encode_to_vec() };
        client.api().events().publish(client.request(PublishRequest { topic: "/x/y".into(), event: Some(event) })).await?;
    }
    let received = within("the event", SOON, events.message()).await??.context("an event")?;
    ensure!(TaskStart::decode(&*received.event.unwrap_or_default().value)?.container_id == "wanted");
    for id in ["a", "b"] {
        delete(client, id).await?;
    }
    for id in ["l1", "l2"] {
        client.api().leases().delete(client.request(DeleteRequest { id: id.into(), sync: false })).await?;
    }
    Ok(())
}

pub(crate) async fn leases_hold_resources(cx: Context) -> Result<()> {
    let client = cx.client();
    let mut leases = client.api().leases();
    client.with_lease("l").await?;
    let digest = format!("sha256:{}", "0".repeat(64));
    let resource = |kind: &str| Some(Resource { id: digest.clone(), r#type: kind.into() });
    for kind in ["content", "snapshots/overlayfs", "content"] {
        leases.add_resource(client.request(AddResourceRequest { id: "l".into(), resource: resource(kind) })).await?;
    }
    let held = async || -> Result<usize> {
        let request = client.request(ListResourcesRequest { id: "l".into() });
        Ok(client.api().leases().list_resources(request).await?.into_inner().resources.len())
    };
    ensure!(held().await? == 2);
    leases.delete_resource(client.request(DeleteResourceRequest { id: "l".into(), resource: resource("content") })).await?;
    ensure!(held().await? == 1);
    let add = AddResourceRequest { id: "l".into(), resource: resource("volumes") };
    refused(leases.add_resource(client.request(add)).await, Code::Unimplemented, "volumes")?;
    for (kind, id) in [("content", "sha256:1"), ("content/x", digest.as_str()), ("snapshots", "s")] {
        let resource = Some(Resource { id: id.into(), r#type: kind.into() });
        let add = AddResourceRequest { id: "l".into(), resource };
        refused(leases.add_resource(client.request(add)).await, Code::InvalidArgument, "resource").with_context(|| kind.to_owned())?;
    }
    let add = AddResourceRequest { id: "none".into(), resource: resource("content") };
    refused(leases.add_resource(client.request(add)).await, Code::NotFound, "lease \"none\"")?;
    refused(client.with_lease("l").await.map(drop), Code::AlreadyExists, "already exists")?;
    leases.delete(client.request(DeleteRequest { id: "l".into(), sync: true })).await?;
    refused(held().await.map_err(as_status), Code::NotFound, "lease")?;
    Ok(())
}

pub(crate) async fn invalid_requests_are_refused_with_a_code(cx: Context) -> Result<()> {
    let client = cx.client();
    let api = client.api();
    refused(api.tasks().get(Request::new(GetRequest::default())).await, Code::FailedPrecondition, "namespace is required")?;
    let mut request = Request::new(GetRequest::default());
    request.metadata_mut().insert("containerd-namespace", "a/b".parse()?);
    refused(api.tasks().get(request).await, Code::InvalidArgument, "namespace: identifier \"a/b\"")?;
    refused(client.state("none", "").await, Code::NotFound, "task none: not found")?;
    refused(client.start("none", "").await, Code::NotFound, "task none: not found")?;
    refused(client.delete_container("none").await, Code::NotFound, "container \"none\" in namespace")?;
    refused(client.delete_container("../c").await, Code::NotFound, "container \"../c\" in namespace")?;
    let get = GetContainerRequest { id: String::new() };
    refused(api.containers().get(client.request(get)).await, Code::NotFound, "container \"\" in namespace")?;
    refused(create(client, Container { spec: None, ..container("c") }).await, Code::InvalidArgument, "container.Spec must be set")?;
    refused(create(client, container("../c")).await, Code::InvalidArgument, "identifier")?;
    let publish = PublishRequest { topic: "no slash".into(), event: None };
    refused(api.events().publish(client.request(publish)).await, Code::InvalidArgument, "must start with '/'")?;
    let huge = Container { image: "x".repeat(17 << 20), ..container("c") };
    refused(create(client, huge).await, Code::ResourceExhausted, "larger than max")?;
    for (runtime, code, message) in [
        ("io.containerd.none.v2", Code::FailedPrecondition, "no containerd-shim-none-v2 in PATH"),
        ("/none/shim", Code::FailedPrecondition, "is not installed"),
        ("nonsense", Code::InvalidArgument, "it should be like io.containerd.runc.v2"),
        ("/bin/true", Code::Unknown, "its answer cannot be read"),
        ("/bin/false", Code::Unknown, "exit status: 1"),
    ] {
        let made = cx.container(&["true"]).runtime_type(runtime).create().await;
        refused(made.map(drop).map_err(as_status), code, message)?;
    }
    Ok(())
}

pub(crate) async fn what_is_not_served_is_unimplemented(cx: Context) -> Result<()> {
    refused(cx.client().unserved().await, Code::Unimplemented, "x-manager does not serve /containerd.services.none.v1.None/Nothing")
}

pub(crate) async fn a_subscriber_that_never_reads_is_dropped_and_delays_no_other(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = cx.client();
    let mut slow = client.api().events().subscribe(client.request(SubscribeRequest::default())).await?.into_inner();
    let events = cx.events().await?;
    let filler = Any { type_url: "x".into(), value: vec![0; 100_000] };
    for _event in 0..200 {
        let publish = PublishRequest { topic: "/filler".into(), event: Some(filler.clone()) };
        within("a publish", SOON, client.api().events().publish(client.request(publish))).await??;
    }
    let container = cx.container(&["sh", "-c", "exit 3"]).start().await?;
    ensure!(container.wait().await? == 3);
    eventually_true("a subscriber that reads receives everything", SOON, || !events.exits(&container.id, "").is_empty()).await?;
    container.delete().await?;
    let mut read = 0;
    let error = loop {
        match within("the stream continues", SOON, slow.message()).await? {
            Ok(Some(_)) => read += 1,
            Ok(None) => anyhow::bail!("the stream ended without an error after {read} events"),
            Err(status) => break status,
        }
    };
    ensure!(error.code() == Code::ResourceExhausted && error.message().contains("waiting to be read"), "{error:?}");
    ensure!(read < 100, "{read} events were kept for it");
    Ok(())
}

pub(crate) async fn the_server_reports_that_it_is_healthy(cx: Context) -> Result<()> {
    let server = cx.client().api().introspection().server(Request::new(())).await?.into_inner();
    ensure!(Some(server.pid) == cx.daemon().pid().map(u64::from) && server.uuid.len() == 36, "{server:?}");
    let own = cx.with_own_daemon().await?;
    let uuid = async || -> Result<String> { Ok(own.client().api().introspection().server(Request::new(())).await?.into_inner().uuid) };
    let before = uuid().await?;
    own.crash_daemon().await?;
    ensure!(uuid().await? == before, "it is the same one after a restart");
    Ok(())
}

/// `grpc.health.v1`: the request has one field; the answer has one, or a map of such answers.
#[derive(Clone, PartialEq, prost::Message)]
struct HealthRequest {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Health {
    #[prost(int32, tag = "1")]
    status: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct HealthList {
    #[prost(map = "string, message", tag = "1")]
    statuses: HashMap<String, Health>,
}

pub(crate) async fn health_is_reported_by_each_method(cx: Context) -> Result<()> {
    let mut grpc = tonic::client::Grpc::new(cx.client().api().channel().clone());
    let ask = |service: &str| Request::new(HealthRequest { service: service.to_owned() });
    let path = |method| http::uri::PathAndQuery::from_static(method);
    let codec = tonic_prost::ProstCodec::<HealthRequest, Health>::default;
    grpc.ready().await?;
    let answer = grpc.unary(ask(""), path("/grpc.health.v1.Health/Check"), codec()).await?.into_inner();
    ensure!(answer.status == 1, "{answer:?}");
    grpc.ready().await?;
    refused(grpc.unary(ask("none"), path("/grpc.health.v1.Health/Check"), codec()).await, Code::NotFound, "\"none\"")?;
    for (service, status) in [("", 1), ("none", 3)] {
        grpc.ready().await?;
        let mut watched = grpc.server_streaming(ask(service), path("/grpc.health.v1.Health/Watch"), codec()).await?.into_inner();
        let first = within("the first health", SOON, watched.message()).await??;
        ensure!(first == Some(Health { status }), "{service:?}: {first:?}");
    }
    let codec = tonic_prost::ProstCodec::<HealthRequest, HealthList>::default;
    grpc.ready().await?;
    let list = grpc.unary(ask(""), path("/grpc.health.v1.Health/List"), codec()).await?.into_inner();
    ensure!(list.statuses == HashMap::from([(String::new(), Health { status: 1 })]), "{list:?}");
    Ok(())
}

pub(crate) async fn a_list_that_is_too_long_for_an_answer_is_refused_and_can_be_streamed(cx: Context) -> Result<()> {
    let client = cx.client();
    let ids: Vec<_> = (0..6).map(|number| format!("long{number}")).collect();
    for id in &ids {
        create(client, Container { image: "x".repeat(3 << 20), ..container(id) }).await?;
    }
    let all = client.request(ListContainersRequest::default());
    let answer = client.api().containers().max_decoding_message_size(64 << 20).list(all).await;
    refused(answer.map(|answer| answer.into_inner().containers.len()), Code::ResourceExhausted, "the list is longer than")?;
    let mut stream = client.api().containers().list_stream(client.request(ListContainersRequest::default())).await?.into_inner();
    let mut streamed = Vec::new();
    while let Some(message) = within("the next one", SOON, stream.message()).await?? {
        streamed.push(message.container.unwrap_or_default().id);
    }
    ensure!(streamed == ids, "{streamed:?}");
    ensure!(list(client, &["id==long3"]).await? == ["long3"]);
    for id in &ids {
        delete(client, id).await?;
    }
    Ok(())
}

pub(crate) async fn a_call_whose_client_disconnects_is_completed(cx: Context) -> Result<()> {
    let gate = cx.gate()?;
    gate.hold("create")?;
    let container = cx.container(&["sleep", "1000"]).id("given-up").runtime_binary(&gate.binary()).metadata().await?;
    let creating = tokio::time::timeout(Duration::from_secs(2), container.create_task()).await;
    ensure!(creating.is_err(), "the gate is closed");
    gate.held("create").await?;
    gate.release("create")?;
    let client = cx.client();
    eventually("the task exists nevertheless", SOON, async || Ok(client.state("given-up", "").await.map(drop)?)).await?;
    client.kill("given-up", "", 9, true).await?;
    ensure!(client.wait("given-up", "").await?.exit_status == 137);
    client.delete("given-up").await?;
    client.delete_container("given-up").await?;
    Ok(())
}

pub(crate) async fn a_name_that_could_be_a_path_is_refused_everywhere(cx: Context) -> Result<()> {
    let client = cx.client();
    let api = client.api();
    let running = cx.container(&["sleep", "1000"]).start().await?;
    for name in ["", ".", "..", "../c", "a/../b", "a/b", "/", "a\0b", "a\nb", "a b", "-a", "a-", "a..b", "é", "%2e%2e"] {
        let named = |what: &str| format!("{what} {name:?}");
        let message = "identifier";
        refused(create(client, container(name)).await, Code::InvalidArgument, message).with_context(|| named("container"))?;
        let namespace = Namespace { name: name.to_owned(), ..Namespace::default() };
        let made = api.namespaces().create(client.request(CreateNamespaceRequest { namespace: Some(namespace) })).await;
        refused(made, Code::InvalidArgument, message).with_context(|| named("namespace"))?;
        refused(running.exec(name, &["true"]).add().await.map_err(as_status), Code::InvalidArgument, message)
            .with_context(|| named("exec"))?;
        // an empty exec id would delete init
        refused(client.delete_exec(&running.id, name).await, Code::InvalidArgument, message).with_context(|| named("delete exec"))?;
        let topic = PublishRequest { topic: format!("/{name}"), event: None };
        let published = api.events().publish(client.request(topic)).await;
        ensure!(name == "a/b" || published.is_err_and(|status| status.code() == Code::InvalidArgument), "{}", named("topic"));
    }
    ensure!(running.state().await?.pid == running.pid);
    ensure!(running.destroy().await? == 137);
    Ok(())
}

pub(crate) async fn labels_are_bounded_in_total_and_a_long_update_drops_no_label(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = cx.client();
    let many = |count: usize| (0..count).map(|number| (format!("label{number}"), "x".repeat(4000))).collect::<HashMap<_, _>>();
    refused(create(client, Container { labels: many(70), ..container("c") }).await, Code::InvalidArgument, "labels of ")?;
    create(client, Container { labels: many(60), ..container("c") }).await?;
    let events = cx.events().await?;
    for round in 0..20 {
        let update = Container { labels: labels(&[("label0", &round.to_string())]), ..container("c") };
        let update_mask = Some(FieldMask { paths: vec!["labels.label0".to_owned()] });
        let request = UpdateContainerRequest { container: Some(update), update_mask };
        api_update(client, request).await?;
        events.catch_up(client).await?;
    }
    delete(client, "c").await?;
    Ok(())
}

async fn api_update(client: &Client, request: UpdateContainerRequest) -> Result<(), Status> {
    client.api().containers().update(client.request(request)).await.map(drop)
}

/// An HTTP/2 client that starts requests and never finishes them.
pub(crate) async fn requests_that_are_never_finished_are_refused_before_they_cost_much(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let pid = cx.daemon().pid().context("a daemon")?.cast_signed();
    let before = shim_tests::proc::private_kib(pid)?;
    let socket = tokio::net::UnixStream::connect(cx.daemon().address()).await?;
    let (mut sender, connection) = h2::client::handshake(socket).await?;
    tokio::spawn(connection);
    let mut bodies = Vec::new();
    let mut answers = Vec::new();
    for _request in 0..12 {
        sender = sender.ready().await?;
        let request = http::Request::post("http://x/containerd.services.containers.v1.Containers/Create");
        let request =
            request.header("content-type", "application/grpc").header("te", "trailers").header("containerd-namespace", "n").body(())?;
        let (answer, mut body) = sender.send_request(request, false)?;
        // the length says 15 MiB, and all but the last byte is sent
        let mut bytes = vec![0, 0, 0xf0, 0, 0];
        bytes.resize(15 << 20, b'x');
        body.send_data(bytes.into(), false)?;
        bodies.push(body);
        answers.push(answer);
    }
    let mut refusals = 0;
    for answer in answers {
        if let Ok(answer) = tokio::time::timeout(Duration::from_secs(2), answer).await {
            let status = answer?.headers().get("grpc-status").and_then(|status| status.to_str().ok().map(ToOwned::to_owned));
            ensure!(status.as_deref() == Some("8"), "{status:?}");
            refusals += 1;
        }
    }
    ensure!(refusals >= 8, "only {refusals} of 12 were refused");
    let grown = shim_tests::proc::private_kib(pid)?.saturating_sub(before);
    ensure!(grown < 80 << 10, "memory has grown by {grown} KiB");
    // another client is served, with a request of some length
    create(cx.client(), Container { image: "x".repeat(3 << 20), ..container("long") }).await?;
    delete(cx.client(), "long").await?;
    drop(bodies);
    Ok(())
}

pub(crate) async fn an_event_is_published_from_the_command_line(cx: Context) -> Result<()> {
    let mut received = cx.client().subscribe().await?;
    let publish = |arguments: &[&str], bytes: &[u8]| {
        let mut command = Command::new(suite::manager().context("x-manager is under test")?);
        // as a shim runs containerd's binary
        command.arg("--address").arg(cx.daemon().address()).args(arguments);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let _it_may_not_read = child.stdin.take().context("a pipe")?.write_all(bytes);
        child.wait_with_output().context("publish")
    };
    let event = Any { type_url: "example.test/event".to_owned(), value: b"text".to_vec() };
    let namespace = cx.client().namespace();
    let output = publish(&["publish", "--topic", "/from/shim", "--namespace", namespace], &event.encode_to_vec())?;
    ensure!(output.status.success(), "{output:?}");
    let envelope = loop {
        let envelope = within("the event", SOON, received.message()).await??.context("the stream ended")?;
        if envelope.topic == "/from/shim" {
            break envelope;
        }
    };
    ensure!(envelope.event == Some(event) && envelope.namespace == namespace && envelope.timestamp.is_some(), "{envelope:?}");
    for (arguments, bytes, status, message) in [
        (&["publish", "--topic", "none", "--namespace", namespace][..], &b""[..], 1, "must start with '/'"),
        (&["publish", "--topic", "/a", "--namespace", "../n"], b"", 1, "identifier"),
        (&["publish", "--topic", "/a", "--namespace", namespace], b"\xff\xff", 1, "is not an event"),
        (&["publish", "--namespace", namespace], b"", 2, "--topic"),
    ] {
        let output = publish(arguments, bytes)?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(status) && text.contains(message), "{arguments:?}: {output:?}");
    }
    Ok(())
}

pub(crate) async fn a_burst_of_calls_over_one_connection_is_answered(cx: Context) -> Result<()> {
    let mut calls = JoinSet::new();
    // most are sent before the daemon has read the first, and clients of tonic end each request with a frame of its own
    for _call in 0..5000 {
        let client = cx.client().clone();
        calls.spawn(async move { client.state("none", "").await });
    }
    let answers = within("all calls end", Duration::from_secs(60), calls.join_all()).await?;
    let is_refused = |answer: &Result<_, Status>| answer.as_ref().is_err_and(|status| status.code() == Code::NotFound);
    let others: Vec<_> = answers.iter().filter(|answer| !is_refused(answer)).collect();
    ensure!(others.is_empty(), "{} calls were not answered, one with {:?}", others.len(), others[0]);
    Ok(())
}
