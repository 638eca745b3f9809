//! Upgrades of x-manager while images move: the clients notice nothing. A registry holds back half of each layer until the upgrades are over, so that
//! everything is certainly under way when they take place.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::snapshots::PrepareSnapshotRequest;
use containerd_client::services::v1::{ApplyRequest, ListStatusesRequest, ReadContentRequest};
use containerd_client::to_any;
use containerd_client::types::Descriptor;
use containerd_client::types::transfer::{
    AuthRequest, AuthResponse, AuthType, Data, ImageExportStream, ImageImportStream, ImageStore, Progress, WindowUpdate,
};
use prost::Message as _;
use prost_types::Any;
use serde_json::json;
use shim_tests::client::{Answer, Client};
use shim_tests::context::Context;
use shim_tests::dice::Dice;
use shim_tests::eventually::{SOON, eventually, eventually_true, within};
use shim_tests::operator::{output_text, upgrade};
use shim_tests::power::HeldFile;
use shim_tests::proc;
use shim_tests::registry::Registry;
use shim_tests::suite::Suite;
use shim_tests::times::times;
use shim_tests::transfers::{
    OCI_CONFIG, OCI_LAYER, Parts, Stream, export, image, import_store, names, nothing_is_left, own, registry_of, remove, sha256, snapshots,
    store, tar, this_machine,
};
use shim_tests::upload::{Upload, commit, read, stat, write};
use tokio::task::JoinHandle;

/// An image of one large layer, which no other test has, published as `name:1`. Returns the layer's digest.
fn publish(cx: &Context, registry: &Registry, name: &str) -> Result<String> {
    let mut parts = Parts::default();
    let layer = layer(cx, name);
    let digest = sha256(&layer);
    let descriptor = parts.put(OCI_LAYER, layer);
    let manifest = parts.manifest(&this_machine().architecture, &[descriptor], std::slice::from_ref(&digest));
    parts.publish(registry, &format!("{name}:1"), &manifest)?;
    Ok(digest)
}

fn layer(cx: &Context, name: &str) -> Vec<u8> {
    let bytes = Dice::new(name.bytes().map(u64::from).sum()).bytes(3 << 20);
    tar(&[(&own(cx, name), &bytes)])
}

/// A transfer in a task of its own: a client that no upgrade ends.
fn begin(client: &Client, source: Any, destination: Any, progress: &str) -> JoinHandle<Answer<()>> {
    let (client, progress) = (client.clone(), progress.to_owned());
    tokio::spawn(async move { shim_tests::transfers::transfer(&client, source, destination, &progress).await })
}

/// Everything that a stream of progress says.
async fn progress(client: &Client, id: &str) -> Result<JoinHandle<Vec<Progress>>> {
    let mut stream = Stream::named(client, id).await?;
    Ok(tokio::spawn(async move {
        let mut events = Vec::new();
        while let Ok(Some(any)) = stream.answers.message().await {
            events.push(Progress::decode(any.value.as_slice()).unwrap_or_default());
        }
        events
    }))
}

/// `ctr`, until it has ended.
fn ctr(cx: &Context, suite: Suite, arguments: &[&str]) -> JoinHandle<Result<()>> {
    let mut command = Command::new(suite.program("ctr"));
    command.arg("--address").arg(cx.daemon().address()).args(["--namespace", cx.client().namespace()]).args(arguments);
    command.stdin(Stdio::null());
    let (shown, mut command) = (format!("{command:?}"), tokio::process::Command::from(command));
    tokio::spawn(async move {
        let output = command.kill_on_drop(true).output().await?;
        ensure!(output.status.success(), "{shown}: {}", output_text(&output));
        Ok(())
    })
}

/// Waits until an ingest whose reference has that in it has some bytes.
async fn arrives(client: &Client, what: &str) -> Result<()> {
    eventually(format!("{what} arrives"), 3 * SOON, async || {
        let statuses = client.api().content().list_statuses(client.request(ListStatusesRequest::default())).await?.into_inner().statuses;
        ensure!(statuses.iter().any(|status| status.r#ref.contains(what) && status.offset > 0), "{statuses:?}");
        Ok(())
    })
    .await
}

/// Two upgrades, one after the other; processes before the last one serve on for what is under way. Returns the pids of the new ones.
async fn upgraded_twice(cx: &Context) -> Result<Vec<i32>> {
    Ok(vec![upgraded_once(cx).await?, upgraded_once(cx).await?])
}

async fn upgraded_once(cx: &Context) -> Result<i32> {
    let output = tokio::process::Command::from(upgrade(cx.daemon())?).output().await?;
    ensure!(output.status.success(), "{}\n{}", output_text(&output), cx.daemon().log());
    output_text(&output).split(' ').nth(1).and_then(|pid| pid.parse().ok()).with_context(|| output_text(&output))
}

/// All processes but the last one have ended.
async fn are_over(cx: &Context, pids: &[i32]) -> Result<()> {
    let last = *pids.last().context("an upgrade")?;
    cx.daemon().is_succeeded_by(last).await?;
    for pid in pids.iter().filter(|pid| **pid != last) {
        eventually_true("a process that was replaced has ended", 2 * SOON, || !proc::is_alive(*pid)).await?;
    }
    Ok(())
}

pub(crate) async fn upgrades_under_pulls_and_pushes_are_noticed_by_no_client(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = cx.client();
    let registry = Registry::start(None).await?;
    let pushed = publish(&cx, &registry, "pushed")?;
    let name = |name: &str| registry.image(&format!("{name}:1"));
    shim_tests::transfers::pull(client, &name("pushed")).await?;
    let clients = ["raw", "transfer", "local", "old"];
    let layers = clients.map(|name| publish(&cx, &registry, name));
    let layers = layers.into_iter().collect::<Result<Vec<_>>>()?;
    layers.iter().for_each(|layer| registry.hold(layer));
    registry.hold(&pushed);
    let events = progress(client, "progress").await?;
    let unused = progress(client, "unused").await?;
    let raw = begin(client, to_any(&registry_of(&name("raw"))), to_any(&store(&name("raw"))), "progress");
    let from = ImageStore { name: name("pushed"), ..ImageStore::default() };
    let push = begin(client, to_any(&from), to_any(&registry_of(&name("copy"))), "");
    let pull = |name: &str, suite, more: &[&str]| ctr(&cx, suite, &[&["images", "pull", "--plain-http"], more, &[name]].concat());
    let pulls = [
        pull(&name("transfer"), Suite::Forky, &[]),
        pull(&name("local"), Suite::Forky, &["--local"]),
        pull(&name("old"), Suite::Bookworm, &[]),
    ];
    for layer in &layers {
        arrives(client, layer).await?;
    }
    let is_pushed = || registry.requests().iter().any(|request| request.starts_with("PUT /v2/copy/blobs/"));
    eventually_true("the layer is pushed", SOON, is_pushed).await?;
    let pids = upgraded_twice(&cx).await?;
    // the stream was opened before, and the call that uses it comes over another connection
    let fresh = cx.daemon().client(client.namespace()).await?;
    let late = begin(&fresh, to_any(&registry_of(&name("pushed"))), to_any(&store(&name("late"))), "unused");
    ensure!(!raw.is_finished() && !push.is_finished() && pulls.iter().all(|pull| !pull.is_finished()), "{}", cx.daemon().log());
    registry.release();
    for pull in pulls {
        pull.await?.with_context(|| cx.daemon().log())?;
    }
    for (what, transfer) in [("pull", raw), ("push", push)] {
        let ended = transfer.await?;
        ensure!(ended.is_ok(), "{what}: {ended:?}\n{}", cx.daemon().log());
    }
    let events = within("the stream of progress is closed", SOON, events).await??;
    ensure!(events.last().is_some_and(|last| last.event.starts_with("Completed pull")), "{events:?}");
    let late = late.await?;
    ensure!(late.is_ok(), "{late:?}");
    ensure!(!within("the other stream of progress is closed", SOON, unused).await??.is_empty());
    are_over(&cx, &pids).await?;
    let client = fresh;
    let here = names(&client).await?;
    ensure!(clients.iter().all(|client| here.contains(&name(client))), "{here:?}");
    ensure!(snapshots(&client).await?.len() == 5, "{:?}", snapshots(&client).await?);
    ensure!(registry.requests().contains(&"PUT /v2/copy/manifests/1".to_owned()), "{:?}", registry.requests());
    for name in here {
        remove(&client, &name).await?;
    }
    nothing_is_left(&client).await
}

/// Sends a part of an archive in the messages of a client.
async fn send(stream: &Stream, bytes: &[u8]) -> Result<()> {
    let requests = stream.requests.as_ref().context("it is open")?;
    for part in bytes.chunks(32 << 10) {
        requests.send(to_any(&Data { data: part.to_vec() })).await.context("the stream has ended")?;
    }
    Ok(())
}

pub(crate) async fn upgrades_under_imports_and_exports_are_noticed_by_no_client(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = cx.client();
    let registry = Registry::start(None).await?;
    publish(&cx, &registry, "exported")?;
    let exported = registry.image("exported:1");
    shim_tests::transfers::pull(client, &exported).await?;
    let whole = export(client, &exported, ImageExportStream::default()).await?;
    // one of each kind: blobs by their digests, and layers by names of which only the contents tell the digest
    let architecture = this_machine().architecture;
    let mut parts = Parts::default();
    let layers = ["oci", "docker"].map(|name| layer(&cx, name));
    let ids = layers.clone().map(|layer| sha256(&layer));
    let descriptor = parts.put(OCI_LAYER, layers[0].clone());
    let mut manifest = parts.manifest(&architecture, &[descriptor], &ids[..1]);
    manifest["annotations"] = json!({ "io.containerd.image.name": "example.com/oci:1" });
    let oci = parts.layout(&[manifest]);
    let rootfs = json!({ "type": "layers", "diff_ids": [ids[1]] });
    let config = json!({ "architecture": architecture, "os": "linux", "rootfs": rootfs, "config": {} }).to_string();
    Parts::default().put(OCI_CONFIG, config.clone().into_bytes());
    let saved = json!([{ "Config": "c.json", "RepoTags": ["example.com/docker:1"], "Layers": ["a/layer.tar"] }]).to_string();
    let docker = tar(&[("a/layer.tar", &layers[1]), ("c.json", config.as_bytes()), ("manifest.json", saved.as_bytes())]);
    let mut imports = Vec::new();
    for (id, archive) in [("oci", &oci), ("docker", &docker)] {
        let stream = Stream::named(client, id).await?;
        let source = ImageImportStream { stream: id.to_owned(), ..ImageImportStream::default() };
        let import = begin(client, to_any(&source), to_any(&import_store()), "");
        // within the layer
        send(&stream, &archive[..archive.len() / 2]).await?;
        imports.push((id, stream, import, &archive[archive.len() / 2..]));
    }
    arrives(client, &ids[0]).await?;
    arrives(client, "import-transfer-").await?;
    let mut reading = Stream::named(client, "export").await?;
    let source = ImageStore { name: exported.clone(), ..ImageStore::default() };
    let export =
        begin(client, to_any(&source), to_any(&ImageExportStream { stream: "export".to_owned(), ..ImageExportStream::default() }), "");
    let grants = reading.requests.take().context("it is open")?;
    grants.send(to_any(&WindowUpdate { update: 100_000 })).await?;
    let mut archive = Vec::new();
    let mut next = async |archive: &mut Vec<u8>| match reading.answers.message().await? {
        Some(any) => {
            archive.extend(Data::decode(any.value.as_slice())?.data);
            anyhow::Ok(true)
        }
        None => Ok(false),
    };
    while archive.len() < 100_000 {
        ensure!(within("more of the archive", SOON, next(&mut archive)).await??, "it has ended");
    }
    let data = Dice::new(5).bytes(3000);
    let expected = shim_tests::image::digest(&data);
    let first = containerd_client::services::v1::WriteContentRequest { total: 3000, expected: expected.clone(), ..stat("r") };
    let leased = client.with_lease("l").await?;
    let (mut upload, _) = Upload::begin(&leased, first).await?;
    upload.send(write(0, &data[..1000])).await?;
    let pids = upgraded_twice(&cx).await?;
    let mut last = commit(1000, 0, "");
    last.data = data[1000..].to_vec();
    ensure!(upload.send(last).await?.digest == expected);
    drop(upload);
    for (id, mut stream, import, rest) in imports {
        ensure!(!import.is_finished(), "{id}: {}", cx.daemon().log());
        send(&stream, rest).await.with_context(|| cx.daemon().log())?;
        drop(stream.requests.take());
        let imported = import.await?;
        ensure!(imported.is_ok(), "{id}: {imported:?}\n{}", cx.daemon().log());
    }
    ensure!(!export.is_finished(), "{}", cx.daemon().log());
    grants.send(to_any(&WindowUpdate { update: 1 << 30 })).await?;
    while within("more of the archive", SOON, next(&mut archive)).await?? {}
    export.await??;
    ensure!(archive == whole, "{} bytes instead of {}", archive.len(), whole.len());
    are_over(&cx, &pids).await?;
    let client = cx.daemon().client(client.namespace()).await?;
    ensure!(read(&client, &expected, 0, 0).await? == data);
    let here = names(&client).await?;
    ensure!(here == [&*exported, "example.com/docker:1", "example.com/oci:1"].map(str::to_owned), "{here:?}");
    ensure!(snapshots(&client).await?.len() == 3 && image(&client, "example.com/oci:1").await?.target.is_some());
    for name in here {
        remove(&client, &name).await?;
    }
    shim_tests::import::end_lease(&client, "l").await?;
    nothing_is_left(&client).await
}

pub(crate) async fn an_upgrade_asks_again_for_credentials_and_takes_no_late_answer_for_those(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = cx.client();
    // user:secret
    let registry = Registry::start(Some("dXNlcjpzZWNyZXQ=")).await?;
    let layer = publish(&cx, &registry, "app")?;
    let name = registry.image("app:1");
    let mut stream = Stream::named(client, "auth").await?;
    let answers = stream.requests.take().context("it is open")?;
    let mut source = registry_of(&name);
    source.resolver.get_or_insert_default().auth_stream = "auth".to_owned();
    let pulling = begin(client, to_any(&source), to_any(&store(&name)), "");
    let answer = move |secret: &str| {
        let (username, secret) = ("user".to_owned(), secret.to_owned());
        to_any(&AuthResponse { auth_type: AuthType::Credentials.into(), username, secret, ..AuthResponse::default() })
    };
    let question = within("a question", 2 * SOON, stream.answers.message()).await??.context("it is closed")?;
    ensure!(AuthRequest::decode(question.value.as_slice())?.reference.contains("/app"));
    let pids = upgraded_twice(&cx).await?;
    // to the question of the first process, which is not there to take it
    answers.send(answer("late")).await?;
    let answering = tokio::spawn(async move {
        let mut questions = 1;
        while let Ok(Some(_question)) = stream.answers.message().await {
            questions += 1;
            let _ = answers.send(answer("secret")).await;
        }
        questions
    });
    let pulled = pulling.await?;
    ensure!(pulled.is_ok(), "{pulled:?}\n{}", cx.daemon().log());
    let questions = within("the stream of secrets is closed", SOON, answering).await??;
    ensure!((2..5).contains(&questions) && registry.fetches(&layer) > 0, "{questions} questions");
    are_over(&cx, &pids).await
}

pub(crate) async fn a_fetch_goes_on_over_upgrades_where_it_was(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = cx.client();
    let registry = Registry::start(None).await?;
    let layer = publish(&cx, &registry, "app")?;
    let name = registry.image("app:1");
    registry.hold(&layer);
    let pulling = begin(client, to_any(&registry_of(&name)), to_any(&store(&name)), "");
    arrives(client, &layer).await?;
    let mut pids = Vec::new();
    for fetches in 2..4 {
        pids.push(upgraded_once(&cx).await?);
        // half of the rest comes with each
        let asked = || registry.begins(&layer).len() == fetches;
        eventually_true("the next process fetches the rest", 2 * SOON, asked).await.with_context(|| cx.daemon().log())?;
        let next = cx.daemon().client(client.namespace()).await?;
        arrives(&next, &layer).await?;
    }
    ensure!(!pulling.is_finished(), "{}", cx.daemon().log());
    registry.release();
    let pulled = pulling.await?;
    ensure!(pulled.is_ok(), "{pulled:?}\n{}", cx.daemon().log());
    let begins = registry.begins(&layer);
    ensure!(begins.len() == 3 && begins[0] == 0 && begins[1] > 0 && begins[2] >= begins[1], "{begins:?}");
    are_over(&cx, &pids).await?;
    let client = cx.daemon().client(client.namespace()).await?;
    ensure!(names(&client).await? == [&*name] && snapshots(&client).await?.len() == 1);
    remove(&client, &name).await?;
    nothing_is_left(&client).await
}

pub(crate) async fn an_apply_and_a_read_of_a_part_go_on_over_upgrades(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = cx.client().with_lease("l").await?;
    let blob = layer(&cx, "layer");
    let digest = shim_tests::upload::store(&client, "r", &blob, &[]).await?;
    let hex = digest.trim_start_matches("sha256:");
    let file = cx.daemon().folder().join("root/io.containerd.content.v1.content/blobs/sha256").join(hex);
    let mut held = HeldFile::over(&file, 1 << 20)?;
    let (snapshotter, key) = ("overlayfs".to_owned(), "a".to_owned());
    let request = PrepareSnapshotRequest { snapshotter, key, ..PrepareSnapshotRequest::default() };
    let mounts = client.api().snapshots().prepare(client.request(request)).await?.into_inner().mounts;
    let diff = Some(Descriptor { digest: digest.clone(), ..Descriptor::default() });
    let (to, applier) = (mounts.clone(), client.clone());
    let applying = tokio::spawn(async move {
        let request = applier.request(ApplyRequest { diff, mounts: to, ..ApplyRequest::default() });
        applier.api().diff().apply(request).await
    });
    eventually_true("the apply waits for the rest of the blob", SOON, || held.is_waited_for()).await?;
    let (offset, size) = (1000, 2_000_000);
    let request = client.request(ReadContentRequest { digest: digest.clone(), offset, size });
    let mut reading = client.api().content().read(request).await?.into_inner();
    let mut received = within("a block", SOON, reading.message()).await??.context("a block")?.data;
    let pids = upgraded_twice(&cx).await?;
    if times() > 1 {
        // longer than calls have that are no such streams
        tokio::time::sleep(Duration::from_secs(20)).await;
    }
    ensure!(!applying.is_finished(), "{}", cx.daemon().log());
    held.release();
    let applied = applying.await?;
    let applied = applied.with_context(|| cx.daemon().log())?.into_inner().applied.context("a layer")?;
    ensure!(applied.digest == digest, "{applied:?}");
    while let Some(block) = within("a block", SOON, reading.message()).await?? {
        ensure!(usize::try_from(block.offset)? == received.len(), "{} after {} bytes", block.offset, received.len());
        received.extend(block.data);
    }
    ensure!(received == blob[1000..2_001_000], "{} bytes", received.len());
    drop((reading, held));
    are_over(&cx, &pids).await?;
    let tree = PathBuf::from(&mounts[0].source);
    let written = std::fs::read(tree.join(own(&cx, "layer")))?;
    // after its header
    ensure!(written == blob[512..512 + written.len()] && written.len() == 3 << 20, "{} bytes", written.len());
    let client = cx.daemon().client(client.namespace()).await?;
    shim_tests::import::end_lease(&client, "l").await?;
    nothing_is_left(&client).await
}
