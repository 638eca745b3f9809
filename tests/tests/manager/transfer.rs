//! The Transfer and Streaming services: images that are pulled, pushed, imported, exported and tagged.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use containerd_client::events::ContentCreate;
use containerd_client::services::v1::snapshots::ListSnapshotsRequest;
use containerd_client::services::v1::{
    GetImageRequest, Image, InfoRequest, ListContentRequest, ListImagesRequest, ListRequest, ListStatusesRequest, StreamInit,
    SubscribeRequest, TransferOptions, TransferRequest,
};
use containerd_client::to_any;
use containerd_client::types::Platform;
use containerd_client::types::transfer::{
    AuthRequest, AuthResponse, AuthType, Data, ImageExportStream, ImageImportStream, ImageReference, ImageStore, OciRegistry, Progress,
    RegistryResolver, UnpackConfiguration, WindowUpdate,
};
use prost::Message as _;
use prost_types::Any;
use serde_json::{Value, json};
use shim_tests::client::{Answer, Client};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, within};
use shim_tests::registry::Registry;
use shim_tests::upload::{digest, refused, store as store_blob};
use tokio::sync::mpsc;
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

fn sha256(bytes: &[u8]) -> String {
    digest("sha256", bytes).expect("sha256sum runs")
}

/// A tar archive with files.
fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, data) in files {
        archive.extend(header(name, data.len(), b'0', ""));
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

fn header(name: &str, size: usize, kind: u8, link: &str) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[157..157 + link.len()].copy_from_slice(link.as_bytes());
    for (place, text) in [(100, "0000644\0"), (108, "0000000\0"), (116, "0000000\0"), (136, "00000000000\0"), (148, "        ")] {
        block[place..place + text.len()].copy_from_slice(text.as_bytes());
    }
    block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// What an image is made of: blobs by digest, documents with their media type.
#[derive(Default, Clone)]
struct Parts {
    blobs: BTreeMap<String, (String, Vec<u8>)>,
}

impl Parts {
    fn put(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest = sha256(&bytes);
        let descriptor = json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() });
        self.blobs.insert(digest, (media_type.to_owned(), bytes));
        descriptor
    }

    /// A manifest with its configuration, and layers with one file each.
    fn image(&mut self, architecture: &str, layers: &[&str]) -> Value {
        let tars: Vec<_> = layers.iter().map(|text| tar(&[(text, text.as_bytes())])).collect();
        let diff_ids: Vec<_> = tars.iter().map(|tar| sha256(tar)).collect();
        let layers: Vec<_> = tars.into_iter().map(|tar| self.put(OCI_LAYER, tar)).collect();
        self.manifest(architecture, &layers, &diff_ids)
    }

    fn manifest(&mut self, architecture: &str, layers: &[Value], diff_ids: &[String]) -> Value {
        let rootfs = json!({ "type": "layers", "diff_ids": diff_ids });
        let config = json!({ "architecture": architecture, "os": "linux", "rootfs": rootfs, "config": {} });
        let config = self.put(OCI_CONFIG, config.to_string().into_bytes());
        let manifest = json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers });
        let mut descriptor = self.put(OCI_MANIFEST, manifest.to_string().into_bytes());
        descriptor["platform"] = json!({ "os": "linux", "architecture": architecture });
        descriptor
    }

    fn index(&mut self, manifests: &[Value]) -> Value {
        let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests });
        self.put(OCI_INDEX, index.to_string().into_bytes())
    }

    /// Puts everything into a registry, and names the root.
    fn publish(&self, registry: &Registry, name: &str, root: &Value) -> Result<()> {
        let (repository, tag) = name.split_once(':').context("a tag")?;
        for (digest, (media_type, bytes)) in &self.blobs {
            if media_type.contains(".manifest.") || media_type.contains(".index.") {
                registry.put_manifest(repository, if root["digest"] == *digest { tag } else { digest }, media_type, bytes);
            } else {
                registry.put_blob(repository, bytes);
            }
        }
        Ok(())
    }

    /// An archive as OCI tools write it, of these images.
    fn layout(&self, entries: &[Value]) -> Vec<u8> {
        let index = json!({ "schemaVersion": 2, "manifests": entries }).to_string();
        let names: Vec<_> = self.blobs.keys().map(|digest| format!("blobs/{}", digest.replace(':', "/"))).collect();
        let mut files = vec![("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#.as_slice()), ("index.json", index.as_bytes())];
        files.extend(names.iter().map(String::as_str).zip(self.blobs.values().map(|(_, bytes)| bytes.as_slice())));
        tar(&files)
    }
}

fn this_machine() -> Platform {
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    Platform { os: "linux".to_owned(), architecture: architecture.to_owned(), ..Platform::default() }
}

/// One for which nothing here is.
const OTHER: &str = "s390x";

/// The store as the destination of a pull.
fn store(name: &str) -> ImageStore {
    let unpack = UnpackConfiguration { platform: Some(this_machine()), snapshotter: "overlayfs".to_owned() };
    ImageStore { name: name.to_owned(), platforms: vec![this_machine()], unpacks: vec![unpack], ..ImageStore::default() }
}

fn registry_of(name: &str) -> OciRegistry {
    let resolver = RegistryResolver { default_scheme: "http".to_owned(), ..RegistryResolver::default() };
    OciRegistry { reference: name.to_owned(), resolver: Some(resolver) }
}

struct Stream {
    requests: Option<mpsc::Sender<Any>>,
    answers: Streaming<Any>,
}

impl Stream {
    async fn open(client: &Client, first: Any) -> Answer<Self> {
        let (requests, receiver) = mpsc::channel(4);
        let _ = requests.send(first).await;
        let mut answers = client.api().streaming().stream(client.request(ReceiverStream::new(receiver))).await?.into_inner();
        let ready = within("the stream is ready", SOON, answers.message()).await;
        let ready = ready.map_err(|error| Status::deadline_exceeded(error.to_string()))??;
        ready.ok_or_else(|| Status::aborted("the stream has ended"))?;
        Ok(Self { requests: Some(requests), answers })
    }

    async fn named(client: &Client, id: &str) -> Answer<Self> {
        Self::open(client, to_any(&StreamInit { id: id.to_owned() })).await
    }
}

async fn transfer(client: &Client, source: Any, destination: Any, progress: &str) -> Answer<()> {
    let options = Some(TransferOptions { progress_stream: progress.to_owned() });
    let request = TransferRequest { source: Some(source), destination: Some(destination), options };
    let answer = within("the transfer", Duration::from_secs(30), client.api().transfer().transfer(client.request(request))).await;
    answer.map_err(|error| Status::deadline_exceeded(error.to_string()))?.map(drop)
}

async fn pull(client: &Client, name: &str) -> Answer<()> {
    transfer(client, to_any(&registry_of(name)), to_any(&store(name)), "").await
}

/// Sends an archive, and has it imported.
async fn import(client: &Client, archive: Vec<u8>, store: ImageStore) -> Answer<()> {
    let mut stream = Stream::named(client, "import").await?;
    let requests = stream.requests.take().expect("it is open");
    let sending = async move {
        for part in archive.chunks(32 << 10) {
            if requests.send(to_any(&Data { data: part.to_vec() })).await.is_err() {
                return;
            }
        }
        drop(requests);
        while let Ok(Some(_update)) = stream.answers.message().await {}
    };
    let source = ImageImportStream { stream: "import".to_owned(), ..ImageImportStream::default() };
    let (imported, ()) = tokio::join!(transfer(client, to_any(&source), to_any(&store), ""), sending);
    imported
}

/// A store that names what archives name, and what has only a tag below `p`.
fn import_store() -> ImageStore {
    let names = ImageReference { name: "p".to_owned(), is_prefix: true, allow_overwrite: true, ..ImageReference::default() };
    ImageStore { extra_references: vec![names], ..store("") }
}

async fn export(client: &Client, name: &str, export: ImageExportStream) -> Answer<Vec<u8>> {
    let mut stream = Stream::named(client, "export").await?;
    let receiving = async {
        let requests = stream.requests.take().expect("it is open");
        let mut archive = Vec::new();
        let _ = requests.send(to_any(&WindowUpdate { update: 100_000 })).await;
        while let Ok(Some(any)) = stream.answers.message().await {
            let data = Data::decode(any.value.as_slice()).unwrap_or_default().data;
            let update = i32::try_from(data.len()).unwrap_or_default();
            archive.extend(data);
            let _ = requests.send(to_any(&WindowUpdate { update })).await;
        }
        archive
    };
    let export = ImageExportStream { stream: "export".to_owned(), ..export };
    let source = ImageStore { name: name.to_owned(), ..ImageStore::default() };
    let (exported, archive) = tokio::join!(transfer(client, to_any(&source), to_any(&export), ""), receiving);
    exported.map(|()| archive)
}

async fn image(client: &Client, name: &str) -> Answer<Image> {
    let answer = client.api().images().get(client.request(GetImageRequest { name: name.to_owned() })).await?;
    Ok(answer.into_inner().image.unwrap_or_default())
}

async fn names(client: &Client) -> Result<Vec<String>> {
    let images = client.api().images().list(client.request(ListImagesRequest::default())).await?.into_inner().images;
    Ok(images.into_iter().map(|image| image.name).collect())
}

async fn blobs(client: &Client) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut pages = client.api().content().list(client.request(ListContentRequest::default())).await?.into_inner();
    while let Some(page) = pages.message().await? {
        found.extend(page.info.into_iter().map(|info| info.digest));
    }
    Ok(found)
}

async fn snapshots(client: &Client) -> Result<Vec<String>> {
    let request = ListSnapshotsRequest { snapshotter: "overlayfs".to_owned(), ..ListSnapshotsRequest::default() };
    let mut pages = client.api().snapshots().list(client.request(request)).await?.into_inner();
    let mut found = Vec::new();
    while let Some(page) = pages.message().await? {
        found.extend(page.info.into_iter().map(|info| info.name));
    }
    Ok(found)
}

async fn labels(client: &Client, digest: &Value) -> Result<std::collections::HashMap<String, String>> {
    let digest = digest.as_str().context("a digest")?.to_owned();
    let info = client.api().content().info(client.request(InfoRequest { digest })).await?.into_inner().info;
    Ok(info.context("an info")?.labels)
}

/// Nothing is left of images, as soon as the collector has seen it.
async fn nothing_is_left(client: &Client) -> Result<()> {
    eventually("nothing is left", SOON, async || {
        let leases = client.api().leases().list(client.request(ListRequest::default())).await?.into_inner().leases;
        let ingests = client.api().content().list_statuses(client.request(ListStatusesRequest::default())).await?.into_inner().statuses;
        let (names, blobs, snapshots) = (names(client).await?, blobs(client).await?, snapshots(client).await?);
        ensure!(
            leases.is_empty() && ingests.is_empty() && names.is_empty() && blobs.is_empty() && snapshots.is_empty(),
            "{leases:?} {ingests:?} {names:?} {blobs:?} {snapshots:?}"
        );
        Ok(())
    })
    .await
}

/// Bytes that no other test has: content that another namespace has is not fetched.
fn own(cx: &Context, text: &str) -> String {
    format!("{}-{text}", cx.client().namespace())
}

pub(crate) async fn streams_are_opened_under_a_name_and_taken_once(cx: Context) -> Result<()> {
    let client = cx.client();
    let _open = Stream::named(client, "s").await?;
    refused(Stream::named(client, "s").await.map(drop), Code::AlreadyExists, "stream \"s\": already exists")?;
    refused(Stream::named(client, "").await.map(drop), Code::InvalidArgument, "a stream id of 0 bytes")?;
    refused(Stream::named(client, &"x".repeat(300)).await.map(drop), Code::InvalidArgument, "a stream id of 300 bytes")?;
    let other = to_any(&WindowUpdate { update: 1 });
    refused(Stream::open(client, other).await.map(drop), Code::InvalidArgument, "a stream begins with StreamInit")?;
    // it is closed with its client
    drop(Stream::named(client, "t").await?);
    eventually("the name is free again", SOON, async || Ok(drop(Stream::named(client, "t").await?))).await?;
    let (from, to) = (ImageStore { name: "none".to_owned(), ..ImageStore::default() }, registry_of("localhost:1/x:1"));
    let progress = transfer(client, to_any(&from), to_any(&to), "nothing").await;
    refused(progress, Code::NotFound, "stream \"nothing\": not found")?;
    // the stream is taken, though the transfer fails
    refused(transfer(client, to_any(&from), to_any(&to), "s").await, Code::NotFound, "image \"none\": not found")?;
    refused(transfer(client, to_any(&from), to_any(&to), "s").await, Code::NotFound, "stream \"s\": not found")?;
    let pair = transfer(client, to_any(&to), to_any(&to), "").await;
    refused(pair, Code::Unimplemented, "unable to transfer from a registry to a registry")?;
    let unknown = Any { type_url: "x.y/Z".to_owned(), value: Vec::new() };
    refused(transfer(client, unknown, to_any(&to), "").await, Code::Unimplemented, "\"Z\" as the source of a transfer")
}

pub(crate) async fn an_image_that_ten_clients_pull_is_fetched_once(cx: Context) -> Result<()> {
    let registry = Registry::start(None).await?;
    let mut parts = Parts::default();
    let (one, other) = (own(&cx, "one"), own(&cx, "other"));
    // the first digest comes twice
    let manifest = parts.image(&this_machine().architecture, &[&one, &other, &one]);
    parts.publish(&registry, "app:1", &manifest)?;
    let name = registry.image("app:1");
    let elsewhere = cx.with_own_namespace().await?;
    let clients = [cx.client().clone(), elsewhere.client().clone()];
    let pulls = (0..10).map(|number| {
        let (client, name) = (clients[number % 2].clone(), name.clone());
        tokio::spawn(async move { pull(&client, &name).await })
    });
    for pulled in pulls.collect::<Vec<_>>() {
        pulled.await??;
    }
    for (digest, (media_type, _)) in &parts.blobs {
        let count = registry.fetches(digest);
        ensure!(media_type == OCI_MANIFEST || count == 1, "{digest} was fetched {count} times");
    }
    for client in &clients {
        ensure!(names(client).await? == [name.clone()] && snapshots(client).await?.len() == 3);
        let image = image(client, &name).await?;
        let target = image.target.context("a target")?;
        ensure!(target.digest == manifest["digest"] && target.media_type == OCI_MANIFEST, "{target:?}");
        let labels = labels(client, &manifest["digest"]).await?;
        let keys = ["config", "l.0", "l.1", "l.2"].map(|key| format!("containerd.io/gc.ref.content.{key}"));
        ensure!(keys.iter().all(|key| labels.contains_key(key)), "{labels:?}");
        let source = registry.image("").trim_end_matches('/').to_owned();
        ensure!(labels.get(&format!("containerd.io/distribution.source.{source}")).is_some_and(|value| value == "app"), "{labels:?}");
        let config = labels["containerd.io/gc.ref.content.config"].clone();
        let config = self::labels(client, &json!(config)).await?;
        let top = config.get("containerd.io/gc.ref.snapshot.overlayfs").context("a snapshot")?;
        ensure!(snapshots(client).await?.contains(top), "{top}");
        let layer = self::labels(client, &json!(labels["containerd.io/gc.ref.content.l.0"])).await?;
        ensure!(layer.contains_key("containerd.io/uncompressed"), "{layer:?}");
        // a collection leaves it whole, and nothing once it has no name
        remove(client, &name).await?;
        nothing_is_left(client).await?;
    }
    Ok(())
}

async fn remove(client: &Client, name: &str) -> Result<()> {
    use containerd_client::services::v1::DeleteImageRequest;
    let request = DeleteImageRequest { name: name.to_owned(), sync: true, ..DeleteImageRequest::default() };
    client.api().images().delete(client.request(request)).await?;
    Ok(())
}

pub(crate) async fn a_pull_that_is_cancelled_leaves_nothing(cx: Context) -> Result<()> {
    let client = cx.client();
    let registry = Registry::start(None).await?;
    let mut parts = Parts::default();
    let large = "x".repeat(3_000_000);
    let layers = [own(&cx, "a"), own(&cx, "b")].map(|name| tar(&[(&name, large.as_bytes())]));
    let diff_ids: Vec<_> = layers.iter().map(|layer| sha256(layer)).collect();
    let descriptors: Vec<_> = layers.into_iter().map(|layer| parts.put(OCI_LAYER, layer)).collect();
    let manifest = parts.manifest(&this_machine().architecture, &descriptors, &diff_ids);
    parts.publish(&registry, "app:1", &manifest)?;
    registry.hold(&diff_ids[1]);
    let name = registry.image("app:1");
    let pulling = tokio::spawn({
        let (client, name) = (client.clone(), name.clone());
        async move { pull(&client, &name).await }
    });
    eventually("half of a layer is here", SOON, async || {
        let statuses = client.api().content().list_statuses(client.request(ListStatusesRequest::default())).await?.into_inner().statuses;
        ensure!(statuses.iter().any(|status| status.r#ref.contains(&diff_ids[1]) && status.offset > 1_000_000), "{statuses:?}");
        Ok(())
    })
    .await?;
    pulling.abort();
    nothing_is_left(client).await?;
    // a second one is not in the way of what the first has left
    registry.release();
    pull(client, &name).await?;
    ensure!(snapshots(client).await?.len() == 2);
    remove(client, &name).await?;
    nothing_is_left(client).await
}

/// What is wrong, a sentence of the refusal, and how it is made.
type Wrong = (&'static str, &'static str, fn(&mut Parts, &str) -> Value);

pub(crate) async fn an_image_that_is_wrong_is_refused_with_its_reason_and_leaves_nothing(cx: Context) -> Result<()> {
    let client = cx.client();
    let registry = Registry::start(None).await?;
    let architecture = this_machine().architecture;
    let cases: [Wrong; 9] = [
        ("schema1", "schema 1", |parts, _| {
            let old = json!({ "schemaVersion": 1, "name": "x", "fsLayers": [{ "blobSum": "sha256:0" }], "history": [] });
            parts.put("application/vnd.docker.distribution.manifest.v1+prettyjws", old.to_string().into_bytes())
        }),
        ("both", "both manifests and layers", |parts, own| {
            let image = parts.image("amd64", &[own]);
            let both = json!({ "schemaVersion": 2, "manifests": [image], "layers": [], "config": image });
            parts.put(OCI_MANIFEST, both.to_string().into_bytes())
        }),
        ("named-otherwise", "calls itself", |parts, own| {
            let image = parts.image("amd64", &[own]);
            let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [image] });
            parts.put(OCI_MANIFEST, index.to_string().into_bytes())
        }),
        ("path", "invalid digest", |parts, own| {
            let mut image = parts.image("amd64", &[own]);
            image["digest"] = json!("sha256:../../../../etc/passwd");
            parts.index(&[image])
        }),
        ("deep", "deep", |parts, own| {
            let mut image = parts.image("amd64", &[own]);
            for _ in 0..10 {
                image = parts.index(&[image]);
            }
            image
        }),
        ("other", "has nothing for linux/", |parts, own| {
            let image = parts.image(OTHER, &[own]);
            parts.index(&[image])
        }),
        ("config-of-another", "has nothing for linux/", |parts, own| parts.image(OTHER, &[own])),
        ("long", "8388608", |parts, own| {
            let image = parts.image("amd64", &[own]);
            let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [image], "x": "x".repeat(9 << 20) });
            parts.put(OCI_INDEX, index.to_string().into_bytes())
        }),
        ("diff-id", "sha256:", |parts, own| {
            let layer = parts.put(OCI_LAYER, tar(&[(own, b"x")]));
            let architecture = this_machine().architecture;
            parts.manifest(&architecture, &[layer], &[sha256(b"something else")])
        }),
    ];
    for (what, sentence, make) in cases {
        let mut parts = Parts::default();
        let root = make(&mut parts, &own(&cx, what));
        parts.publish(&registry, &format!("{what}:1"), &root)?;
        let Err(status) = pull(client, &registry.image(&format!("{what}:1"))).await else { bail!("{what} was pulled") };
        ensure!(status.message().contains(sentence) && status.code() != Code::Internal, "{what}: {status:?}");
        nothing_is_left(client).await.context(what)?;
    }
    // a layer of other bytes, and then of the right ones
    let mut parts = Parts::default();
    let manifest = parts.image(&architecture, &[&own(&cx, "layer")]);
    parts.publish(&registry, "bytes:1", &manifest)?;
    let (layer, (_, good)) = parts.blobs.iter().find(|(_, (media_type, _))| media_type == OCI_LAYER).context("a layer")?;
    let mut bad = good.clone();
    bad[0] ^= 1;
    registry.falsify_blob("bytes", layer, &bad);
    ensure!(pull(client, &registry.image("bytes:1")).await.is_err());
    nothing_is_left(client).await?;
    registry.falsify_blob("bytes", layer, good);
    pull(client, &registry.image("bytes:1")).await?;
    remove(client, &registry.image("bytes:1")).await?;
    nothing_is_left(client).await
}

pub(crate) async fn odd_images_are_pulled_as_far_as_they_can_be(cx: Context) -> Result<()> {
    let client = cx.client();
    let registry = Registry::start(None).await?;
    let architecture = this_machine().architecture;
    let mut parts = Parts::default();
    // no layers; an artifact; three indexes deep, with an attestation; an index that says another machine than the configuration
    let empty = parts.manifest(&architecture, &[], &[]);
    let chart = parts.put("application/vnd.cncf.helm.chart.content.v1.tar+gzip", own(&cx, "chart").into_bytes());
    let about = parts.put("application/vnd.cncf.helm.config.v1+json", own(&cx, "{}").into_bytes());
    let artifact = json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": about, "layers": [chart] });
    let artifact = parts.put(OCI_MANIFEST, artifact.to_string().into_bytes());
    let mut attestation = parts.manifest("unknown", &[], &[]);
    attestation["platform"] = json!({ "os": "unknown", "architecture": "unknown" });
    let image = parts.image(&architecture, &[&own(&cx, "image")]);
    let mut nested = parts.index(&[attestation, image]);
    for _ in 0..2 {
        nested = parts.index(&[nested]);
    }
    let mut lying = parts.image(OTHER, &[&own(&cx, "lying")]);
    lying["platform"]["architecture"] = json!(architecture);
    let lying = parts.index(&[lying]);
    let mut expected = 0;
    for (name, root, new_snapshots) in [("empty:1", &empty, 0), ("chart:1", &artifact, 0), ("nested:1", &nested, 1), ("lying:1", &lying, 1)]
    {
        parts.publish(&registry, name, root)?;
        pull(client, &registry.image(name)).await.with_context(|| name.to_owned())?;
        expected += new_snapshots;
        ensure!(snapshots(client).await?.len() == expected, "{name}");
    }
    // all platforms, with attestations, which are not unpacked
    let all = ImageStore { platforms: Vec::new(), ..store("all") };
    transfer(client, to_any(&registry_of(&registry.image("nested:1"))), to_any(&all), "").await?;
    ensure!(snapshots(client).await?.len() == expected);
    for name in ["empty:1", "chart:1", "nested:1", "lying:1"] {
        ensure!(!export(client, &registry.image(name), ImageExportStream::default()).await?.is_empty(), "{name}");
        remove(client, &registry.image(name)).await?;
    }
    remove(client, "all").await?;
    nothing_is_left(client).await
}

pub(crate) async fn of_an_index_what_is_here_is_exported_and_pushed(cx: Context) -> Result<()> {
    let client = cx.client();
    let registry = Registry::start(None).await?;
    let mut parts = Parts::default();
    let here = parts.image(&this_machine().architecture, &[&own(&cx, "here")]);
    let other = parts.image(OTHER, &[&own(&cx, "other")]);
    let index = parts.index(&[other.clone(), here.clone()]);
    parts.publish(&registry, "app:1", &index)?;
    let name = registry.image("app:1");
    pull(client, &name).await?;
    ensure!(image(client, &name).await?.target.context("a target")?.digest == index["digest"]);
    let all = export(client, &name, ImageExportStream { all_platforms: true, ..ImageExportStream::default() }).await;
    let missing = other["digest"].as_str().context("a digest")?;
    refused(all.map(drop), Code::FailedPrecondition, &format!("image {name} is incomplete: the store does not have {missing}"))?;
    let archive = export(client, &name, ImageExportStream::default()).await?;
    let whole = transfer(
        client,
        to_any(&ImageStore { name: name.clone(), ..ImageStore::default() }),
        to_any(&registry_of(&registry.image("copy:1"))),
        "",
    )
    .await;
    refused(whole, Code::FailedPrecondition, &format!("image {name} is incomplete: the store does not have {missing}"))?;
    let one = ImageStore { name: name.clone(), platforms: vec![this_machine()], ..ImageStore::default() };
    transfer(client, to_any(&one), to_any(&registry_of(&registry.image("copy:1"))), "").await?;
    let requests = registry.requests();
    ensure!(requests.iter().any(|request| request == "PUT /v2/copy/manifests/1"), "{requests:?}");
    // the archive is imported where nothing is
    remove(client, &name).await?;
    nothing_is_left(client).await?;
    import(client, archive.clone(), import_store()).await?;
    ensure!(names(client).await? == [name.clone()]);
    ensure!(image(client, &name).await?.target.context("a target")?.digest == index["digest"]);
    ensure!(snapshots(client).await?.len() == 1);
    remove(client, &name).await?;
    nothing_is_left(client).await?;
    let wrong = Platform { architecture: OTHER.to_owned(), ..this_machine() };
    let lacking = import(client, archive, ImageStore { platforms: vec![wrong], unpacks: Vec::new(), ..import_store() }).await;
    refused(lacking, Code::NotFound, missing)?;
    nothing_is_left(client).await
}

/// An archive as Docker before 25 writes it.
fn docker_archive(files: &[(&str, &[u8])], links: &[(&str, &str)], config: &[u8], manifest: &Value) -> Vec<u8> {
    let mut archive = tar(files);
    archive.truncate(archive.len() - 1024);
    for (name, target) in links {
        archive.extend(header(name, 0, b'2', target));
    }
    archive.extend(tar(&[("config.json", config), ("manifest.json", manifest.to_string().as_bytes())]));
    archive
}

pub(crate) async fn archives_of_docker_and_of_tools_are_imported(cx: Context) -> Result<()> {
    let client = cx.client();
    let (one, other) = (own(&cx, "one"), own(&cx, "other"));
    let layers = [tar(&[(&one, b"1")]), tar(&[(&other, b"2")])];
    let ids: Vec<_> = layers.iter().map(|layer| sha256(layer)).collect();
    let rootfs = json!({ "type": "layers", "diff_ids": [ids[0], ids[1], ids[0]] });
    let config = json!({ "architecture": this_machine().architecture, "os": "linux", "rootfs": rootfs }).to_string();
    // the third layer is a link to the first, as old versions of Docker write it
    let files = [("0a/layer.tar", layers[0].as_slice()), ("0b/layer.tar", &layers[1]), ("0b/VERSION", b"1.0"), ("repositories", b"{}")];
    let saved =
        |tags: Value| json!([{ "Config": "config.json", "RepoTags": tags, "Layers": ["0a/layer.tar", "0b/layer.tar", "0c/layer.tar"] }]);
    let with = |tags: Value| docker_archive(&files, &[("0c/layer.tar", "../0a/layer.tar")], config.as_bytes(), &saved(tags));
    import(client, with(json!(["local:1", "h.example/x"])), import_store()).await?;
    ensure!(names(client).await? == ["docker.io/library/local:1", "h.example/x:latest"], "{:?}", names(client).await?);
    ensure!(snapshots(client).await?.len() == 3);
    for name in names(client).await? {
        remove(client, &name).await?;
    }
    nothing_is_left(client).await?;
    // without a name, by its digest
    import(client, with(Value::Null), import_store()).await?;
    let [name] = &names(client).await?[..] else { bail!("one image") };
    ensure!(name.starts_with("p@sha256:"), "{name}");
    remove(client, name).await?;
    // a tag alone
    let mut parts = Parts::default();
    let mut tagged = parts.image(&this_machine().architecture, &[&own(&cx, "tagged")]);
    tagged["annotations"] = json!({ "org.opencontainers.image.ref.name": "7" });
    let whole = ImageStore { name: "index".to_owned(), ..import_store() };
    import(client, parts.layout(&[tagged]), whole).await?;
    ensure!(names(client).await? == ["index", "p:7"]);
    // and another name for it, which may be another image's
    for _ in 0..2 {
        let (from, to) = (
            ImageStore { name: "p:7".to_owned(), ..ImageStore::default() },
            ImageStore { name: "index".to_owned(), ..ImageStore::default() },
        );
        transfer(client, to_any(&from), to_any(&to), "").await?;
    }
    ensure!(image(client, "index").await?.target == image(client, "p:7").await?.target);
    for name in ["index", "p:7"] {
        remove(client, name).await?;
    }
    nothing_is_left(client).await
}

pub(crate) async fn an_archive_that_is_wrong_is_refused_and_leaves_nothing(cx: Context) -> Result<()> {
    let client = cx.client();
    let mut parts = Parts::default();
    let architecture = this_machine().architecture;
    let mut entry = parts.image(&architecture, &[&own(&cx, "layer")]);
    entry["annotations"] = json!({ "io.containerd.image.name": "example.com/x:1" });
    let whole = parts.layout(&[entry.clone()]);
    let layer = parts.blobs.iter().find(|(_, (media_type, _))| media_type == OCI_LAYER).map(|(digest, _)| digest.clone());
    let layer = layer.context("a layer")?;
    let mut lacking = parts.clone();
    lacking.blobs.remove(&layer);
    let mut flipped = parts.clone();
    flipped.blobs.get_mut(&layer).context("a layer")?.1[0] ^= 1;
    let config =
        json!({ "architecture": architecture, "os": "linux", "rootfs": { "type": "layers", "diff_ids": [sha256(b"x")] } }).to_string();
    let saved = |layers: Value| json!([{ "Config": "config.json", "RepoTags": ["local:1"], "Layers": layers }]);
    let of_docker = |links: &[(&str, &str)], layers: Value| docker_archive(&[], links, config.as_bytes(), &saved(layers));
    let long = json!({ "x": "x".repeat(9 << 20) }).to_string();
    for (what, archive, sentence) in [
        ("empty", Vec::new(), "neither index.json"),
        ("cut off", whole[..whole.len() / 2].to_vec(), "ends within"),
        ("no archive", vec![b'x'; 4096], "header at byte 0"),
        ("a blob is missing", lacking.layout(&[entry.clone()]), &layer[..]),
        ("a blob is another", flipped.layout(&[entry.clone()]), "unexpected commit digest"),
        ("no index", tar(&[("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)]), "no index.json"),
        ("another version", tar(&[("oci-layout", br#"{"imageLayoutVersion":"9"}"#), ("index.json", b"{}")]), "version 9"),
        ("a long document", tar(&[("manifest.json", long.as_bytes())]), "8388608 at most"),
        ("a layer is missing", of_docker(&[], json!(["layer.tar"])), "which the archive does not have"),
        ("a link out of it", of_docker(&[("layer.tar", "../../etc/passwd")], json!(["layer.tar"])), "leads out of it"),
        ("a link to the root", of_docker(&[("layer.tar", "/etc/passwd")], json!(["layer.tar"])), "leads out of it"),
        ("a link to nothing", of_docker(&[("layer.tar", "nothing")], json!(["layer.tar"])), "which the archive does not have"),
        ("a path as a digest", parts.layout(&[json!({ "mediaType": OCI_MANIFEST, "digest": "sha256:../x", "size": 1 })]), "invalid digest"),
    ] {
        let Err(status) = import(client, archive, import_store()).await else { bail!("{what}: it was imported") };
        ensure!(status.message().contains(sentence) && status.code() != Code::Internal, "{what}: {status:?}");
        nothing_is_left(client).await.context(what)?;
    }
    // none of its names begins as they all should
    let names = ImageReference { name: "other".to_owned(), is_prefix: true, ..ImageReference::default() };
    let strict = ImageStore { extra_references: vec![names], ..import_store() };
    refused(import(client, whole, strict).await, Code::InvalidArgument, "no image of the archive has a name that begins as it should")?;
    nothing_is_left(client).await
}

pub(crate) async fn an_import_that_was_made_before_writes_nothing(cx: Context) -> Result<()> {
    let client = cx.client();
    let mut parts = Parts::default();
    let mut entry = parts.image(&this_machine().architecture, &[&own(&cx, "layer")]);
    entry["annotations"] = json!({ "io.containerd.image.name": "example.com/x:1" });
    let archive = parts.layout(&[entry]);
    import(client, archive.clone(), import_store()).await?;
    let filters = vec![format!("namespace=={},topic==/content/create", client.namespace())];
    let mut events = client.api().events().subscribe(client.request(SubscribeRequest { filters })).await?.into_inner();
    let created = Arc::<Mutex<Vec<String>>>::default();
    let receiving = tokio::spawn({
        let created = Arc::clone(&created);
        async move {
            while let Ok(Some(envelope)) = events.message().await {
                let event = envelope.event.and_then(|event| ContentCreate::decode(event.value.as_slice()).ok()).unwrap_or_default();
                created.lock().expect("no panic under this lock").push(event.digest);
            }
        }
    });
    import(client, archive, import_store()).await?;
    // a subscription is not confirmed, and its events come in their order: this one comes after all others
    let last = eventually("an event comes", SOON, async || {
        let last = store_blob(client, "last", cx.client().namespace().as_bytes(), &[]).await?;
        let seen = created.lock().expect("no panic under this lock").contains(&last);
        ensure!(seen, "none of {last}");
        Ok(last)
    })
    .await?;
    receiving.abort();
    let created = created.lock().expect("no panic under this lock").clone();
    // the index of an archive has no name, so that it was collected
    ensure!(created.iter().all(|digest| *digest == last || !parts.blobs.contains_key(digest)), "{created:?}");
    // another client sees the image, and finds all of it
    ensure!(names(client).await? == ["example.com/x:1"]);
    remove(client, "example.com/x:1").await?;
    nothing_is_left(client).await
}

pub(crate) async fn a_registry_asks_the_client_for_its_secret(cx: Context) -> Result<()> {
    let client = cx.client();
    // user:secret
    let registry = Registry::start(Some("dXNlcjpzZWNyZXQ=")).await?;
    let mut parts = Parts::default();
    let manifest = parts.image(&this_machine().architecture, &[&own(&cx, "layer")]);
    parts.publish(&registry, "app:1", &manifest)?;
    let name = registry.image("app:1");
    let Err(status) = pull(client, &name).await else { bail!("without a secret it was pulled") };
    ensure!(status.message().contains("401"), "{status:?}");
    for (secret, works) in [("wrong", false), ("secret", true)] {
        let mut stream = Stream::named(client, "auth").await?;
        let mut progress = Stream::named(client, "progress").await?;
        let asked = tokio::spawn(async move {
            let requests = stream.requests.take().expect("it is open");
            let mut questions = Vec::new();
            while let Ok(Some(any)) = stream.answers.message().await {
                questions.push(AuthRequest::decode(any.value.as_slice()).unwrap_or_default());
                let (username, secret) = ("user".to_owned(), secret.to_owned());
                let answer = AuthResponse { auth_type: AuthType::Credentials.into(), username, secret, ..AuthResponse::default() };
                let _ = requests.send(to_any(&answer)).await;
            }
            questions
        });
        let reported = tokio::spawn(async move {
            let mut events = Vec::new();
            while let Ok(Some(any)) = progress.answers.message().await {
                events.push(Progress::decode(any.value.as_slice()).unwrap_or_default());
            }
            events
        });
        let mut source = registry_of(&name);
        source.resolver.get_or_insert_default().auth_stream = "auth".to_owned();
        let pulled = transfer(client, to_any(&source), to_any(&store(&name)), "progress").await;
        ensure!(pulled.is_ok() == works, "{secret}: {pulled:?}");
        let questions = within("the stream of secrets is closed", SOON, asked).await??;
        ensure!(!questions.is_empty() && questions.len() < 5, "{questions:?}");
        ensure!(questions.iter().all(|question| question.reference.contains("/app")), "{questions:?}");
        let events = within("the stream of progress is closed", SOON, reported).await??;
        if works {
            let seen = |event: &str, name: &str| events.iter().any(|seen| seen.event == event && seen.name.starts_with(name));
            let expected = [
                ("fetching image content", name.as_str()),
                ("waiting", "manifest-sha256:"),
                ("complete", "config-sha256:"),
                ("complete", "layer-sha256:"),
                ("extracted", "layer-sha256:"),
                ("saved", &name),
            ];
            for (event, name) in expected {
                ensure!(seen(event, name), "no {event} of {name}: {events:?}");
            }
            ensure!(events.last().is_some_and(|last| last.event.starts_with("Completed pull from OCI Registry (")), "{events:?}");
        }
    }
    remove(client, &name).await?;
    nothing_is_left(client).await
}

pub(crate) async fn layers_with_the_same_contents_keep_their_own_blobs(cx: Context) -> Result<()> {
    let client = cx.client();
    let registry = Registry::start(None).await?;
    let mut parts = Parts::default();
    let architecture = this_machine().architecture;
    let plain = tar(&[(&own(&cx, "layer"), b"x")]);
    let id = sha256(&plain);
    let gzip = gzip(&plain)?;
    // one configuration, two manifests
    let layers = [parts.put(OCI_LAYER, plain), parts.put(&format!("{OCI_LAYER}+gzip"), gzip)];
    let manifests = layers.map(|layer| parts.manifest(&architecture, &[layer], std::slice::from_ref(&id)));
    let index = parts.index(&manifests);
    parts.publish(&registry, "both:1", &index)?;
    let name = registry.image("both:1");
    pull(client, &name).await?;
    let here = blobs(client).await?;
    ensure!(parts.blobs.keys().all(|digest| here.contains(digest)) && here.len() == 6, "{here:?}");
    ensure!(snapshots(client).await?.len() == 1);
    // by names of their own, the second is not fetched for its snapshot that is there, and whole nevertheless
    remove(client, &name).await?;
    nothing_is_left(client).await?;
    for (number, manifest) in manifests.iter().enumerate() {
        parts.publish(&registry, &format!("one:{number}"), manifest)?;
        pull(client, &registry.image(&format!("one:{number}"))).await?;
    }
    ensure!(snapshots(client).await?.len() == 1);
    for number in 0..2 {
        let name = registry.image(&format!("one:{number}"));
        export(client, &name, ImageExportStream::default()).await?;
        remove(client, &name).await?;
    }
    nothing_is_left(client).await
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    use std::io::Write as _;
    use std::process::{Command, Stdio};
    let mut tool = Command::new("gzip").arg("-n").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    tool.stdin.take().context("a pipe")?.write_all(bytes)?;
    Ok(tool.wait_with_output()?.stdout)
}
