//! Images made blob by blob, and the calls by which a daemon moves them: Transfer, and the streams that it uses.

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::snapshots::ListSnapshotsRequest;
use containerd_client::services::v1::{
    DeleteImageRequest, GetImageRequest, Image, InfoRequest, ListContentRequest, ListImagesRequest, ListRequest, ListStatusesRequest,
    StreamInit, TransferOptions, TransferRequest,
};
use containerd_client::to_any;
use containerd_client::types::Platform;
use containerd_client::types::transfer::{
    Data, ImageExportStream, ImageImportStream, ImageReference, ImageStore, OciRegistry, RegistryResolver, UnpackConfiguration,
    WindowUpdate,
};
use prost::Message as _;
use prost_types::Any;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::client::{Answer, Client};
use crate::context::Context;
use crate::eventually::{SOON, eventually, within};
use crate::registry::Registry;
use crate::upload::digest;

/// Media types.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media types.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media types.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media types.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// Their digest.
pub fn sha256(bytes: &[u8]) -> String {
    digest("sha256", bytes).expect("sha256sum runs")
}

/// A tar archive with files.
pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, data) in files {
        archive.extend(header(name, data.len(), b'0', ""));
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

/// The header of an entry in an archive.
pub fn header(name: &str, size: usize, kind: u8, link: &str) -> Vec<u8> {
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
#[derive(Debug, Default, Clone)]
pub struct Parts {
    /// Media types and bytes.
    pub blobs: BTreeMap<String, (String, Vec<u8>)>,
}

impl Parts {
    /// Adds a blob, and returns its descriptor.
    pub fn put(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest = sha256(&bytes);
        let descriptor = json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() });
        self.blobs.insert(digest, (media_type.to_owned(), bytes));
        descriptor
    }

    /// A manifest with its configuration, and layers with one file each.
    pub fn image(&mut self, architecture: &str, layers: &[&str]) -> Value {
        let tars: Vec<_> = layers.iter().map(|text| tar(&[(text, text.as_bytes())])).collect();
        let diff_ids: Vec<_> = tars.iter().map(|tar| sha256(tar)).collect();
        let layers: Vec<_> = tars.into_iter().map(|tar| self.put(OCI_LAYER, tar)).collect();
        self.manifest(architecture, &layers, &diff_ids)
    }

    /// A manifest of these layers.
    pub fn manifest(&mut self, architecture: &str, layers: &[Value], diff_ids: &[String]) -> Value {
        let rootfs = json!({ "type": "layers", "diff_ids": diff_ids });
        let config = json!({ "architecture": architecture, "os": "linux", "rootfs": rootfs, "config": {} });
        let config = self.put(OCI_CONFIG, config.to_string().into_bytes());
        let manifest = json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers });
        let mut descriptor = self.put(OCI_MANIFEST, manifest.to_string().into_bytes());
        descriptor["platform"] = json!({ "os": "linux", "architecture": architecture });
        descriptor
    }

    /// An index.
    pub fn index(&mut self, manifests: &[Value]) -> Value {
        let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests });
        self.put(OCI_INDEX, index.to_string().into_bytes())
    }

    /// Puts everything into a registry, and names the root.
    pub fn publish(&self, registry: &Registry, name: &str, root: &Value) -> Result<()> {
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
    pub fn layout(&self, entries: &[Value]) -> Vec<u8> {
        let index = json!({ "schemaVersion": 2, "manifests": entries }).to_string();
        let names: Vec<_> = self.blobs.keys().map(|digest| format!("blobs/{}", digest.replace(':', "/"))).collect();
        let mut files = vec![("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#.as_slice()), ("index.json", index.as_bytes())];
        files.extend(names.iter().map(String::as_str).zip(self.blobs.values().map(|(_, bytes)| bytes.as_slice())));
        tar(&files)
    }
}

/// The platform of this machine.
pub fn this_machine() -> Platform {
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    Platform { os: "linux".to_owned(), architecture: architecture.to_owned(), ..Platform::default() }
}

/// One for which nothing here is.
pub const OTHER: &str = "s390x";

/// The store as the destination of a pull.
pub fn store(name: &str) -> ImageStore {
    let unpack = UnpackConfiguration { platform: Some(this_machine()), snapshotter: "overlayfs".to_owned() };
    ImageStore { name: name.to_owned(), platforms: vec![this_machine()], unpacks: vec![unpack], ..ImageStore::default() }
}

/// A registry on loopback, by the name of an image in it.
pub fn registry_of(name: &str) -> OciRegistry {
    let resolver = RegistryResolver { default_scheme: "http".to_owned(), ..RegistryResolver::default() };
    OciRegistry { reference: name.to_owned(), resolver: Some(resolver) }
}

/// A stream of the daemon.
#[derive(Debug)]
pub struct Stream {
    /// Until everything is sent.
    pub requests: Option<mpsc::Sender<Any>>,
    /// What the daemon sends.
    pub answers: Streaming<Any>,
}

impl Stream {
    /// Opens one with any first message.
    pub async fn open(client: &Client, first: Any) -> Answer<Self> {
        let (requests, receiver) = mpsc::channel(4);
        let _ = requests.send(first).await;
        let mut answers = client.api().streaming().stream(client.request(ReceiverStream::new(receiver))).await?.into_inner();
        let ready = within("the stream is ready", SOON, answers.message()).await;
        let ready = ready.map_err(|error| Status::deadline_exceeded(error.to_string()))??;
        ready.ok_or_else(|| Status::aborted("the stream has ended"))?;
        Ok(Self { requests: Some(requests), answers })
    }

    /// Opens one under a name.
    pub async fn named(client: &Client, id: &str) -> Answer<Self> {
        Self::open(client, to_any(&StreamInit { id: id.to_owned() })).await
    }
}

/// A transfer, with its progress in a stream, if one is named.
pub async fn transfer(client: &Client, source: Any, destination: Any, progress: &str) -> Answer<()> {
    let options = Some(TransferOptions { progress_stream: progress.to_owned() });
    let request = TransferRequest { source: Some(source), destination: Some(destination), options };
    let answer = within("the transfer", Duration::from_secs(30), client.api().transfer().transfer(client.request(request))).await;
    answer.map_err(|error| Status::deadline_exceeded(error.to_string()))?.map(drop)
}

/// Pulls an image, and unpacks it.
pub async fn pull(client: &Client, name: &str) -> Answer<()> {
    transfer(client, to_any(&registry_of(name)), to_any(&store(name)), "").await
}

/// Sends an archive, and has it imported.
pub async fn import(client: &Client, archive: Vec<u8>, store: ImageStore) -> Answer<()> {
    import_with(client, archive, store, ImageImportStream::default()).await
}

/// The same with options.
pub async fn import_with(client: &Client, archive: Vec<u8>, store: ImageStore, options: ImageImportStream) -> Answer<()> {
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
    let source = ImageImportStream { stream: "import".to_owned(), ..options };
    let (imported, ()) = tokio::join!(transfer(client, to_any(&source), to_any(&store), ""), sending);
    imported
}

/// A store that names what archives name, and what has only a tag below `p`.
pub fn import_store() -> ImageStore {
    let names = ImageReference { name: "p".to_owned(), is_prefix: true, allow_overwrite: true, ..ImageReference::default() };
    ImageStore { extra_references: vec![names], ..store("") }
}

/// Exports an image, and returns the archive.
pub async fn export(client: &Client, name: &str, export: ImageExportStream) -> Answer<Vec<u8>> {
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

/// The record of an image.
pub async fn image(client: &Client, name: &str) -> Answer<Image> {
    let answer = client.api().images().get(client.request(GetImageRequest { name: name.to_owned() })).await?;
    Ok(answer.into_inner().image.unwrap_or_default())
}

/// Names of all images.
pub async fn names(client: &Client) -> Result<Vec<String>> {
    let images = client.api().images().list(client.request(ListImagesRequest::default())).await?.into_inner().images;
    Ok(images.into_iter().map(|image| image.name).collect())
}

/// Digests of all content.
pub async fn blobs(client: &Client) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut pages = client.api().content().list(client.request(ListContentRequest::default())).await?.into_inner();
    while let Some(page) = pages.message().await? {
        found.extend(page.info.into_iter().map(|info| info.digest));
    }
    Ok(found)
}

/// Keys of all snapshots.
pub async fn snapshots(client: &Client) -> Result<Vec<String>> {
    let request = ListSnapshotsRequest { snapshotter: "overlayfs".to_owned(), ..ListSnapshotsRequest::default() };
    let mut pages = client.api().snapshots().list(client.request(request)).await?.into_inner();
    let mut found = Vec::new();
    while let Some(page) = pages.message().await? {
        found.extend(page.info.into_iter().map(|info| info.name));
    }
    Ok(found)
}

/// Labels of content.
pub async fn labels(client: &Client, digest: &Value) -> Result<HashMap<String, String>> {
    let digest = digest.as_str().context("a digest")?.to_owned();
    let info = client.api().content().info(client.request(InfoRequest { digest })).await?.into_inner().info;
    Ok(info.context("an info")?.labels)
}

/// Nothing is left of images, as soon as the collector has seen it.
pub async fn nothing_is_left(client: &Client) -> Result<()> {
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
pub fn own(cx: &Context, text: &str) -> String {
    format!("{}-{text}", cx.client().namespace())
}

/// Removes the name of an image, and waits until what it led to is collected.
pub async fn remove(client: &Client, name: &str) -> Result<()> {
    let request = DeleteImageRequest { name: name.to_owned(), sync: true, ..DeleteImageRequest::default() };
    client.api().images().delete(client.request(request)).await?;
    Ok(())
}

/// The same, compressed.
pub fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut tool = Command::new("gzip").arg("-n").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    tool.stdin.take().context("a pipe")?.write_all(bytes)?;
    Ok(tool.wait_with_output()?.stdout)
}
