//! A client that imports and unpacks images step by step, as ctr does without the transfer service, and reports each answer.

use std::sync::Arc;

use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use containerd_client::services::v1::{
    ApplyRequest, CreateImageRequest, CreateRequest, DeleteImageRequest, DeleteRequest, Image as Record, Info, UpdateRequest,
};
use containerd_client::types::Descriptor;
use prost_types::FieldMask;
use tonic::{Code, Status};

use crate::client::{Answer, Client};
use crate::image::{Image, Layer, MANIFEST, digest};
use crate::upload::{Upload, commit, stat};

/// Something that a daemon has acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fact {
    /// Content is there.
    Blob(String),
    /// An image is there, by its name.
    Image(String),
    /// A committed snapshot is there, by its chain ID.
    Snapshot(String),
    /// An image is not there.
    NoImage(String),
}

/// One import under a lease of its own.
#[derive(Debug)]
pub struct Import<'i> {
    client: Client,
    image: &'i Image,
    lease: String,
}

impl<'i> Import<'i> {
    /// Creates the lease, whose name no other attempt has had.
    pub async fn begin(client: &Client, image: &'i Image, lease: &str) -> Answer<Self> {
        let request = CreateRequest { id: lease.to_owned(), ..CreateRequest::default() };
        client.api().leases().create(client.request(request)).await?;
        Ok(Self { client: client.with_existing_lease(lease), image, lease: lease.to_owned() })
    }

    /// Uploads, names and unpacks the image; `report` gets what was acknowledged.
    pub async fn run(&self, report: &mut (dyn FnMut(Fact) + Send)) -> Answer<()> {
        self.upload(report).await?;
        self.name().await?;
        report(Fact::Image(self.image.name.clone()));
        self.unpack(report).await
    }

    /// Uploads all content. The store does not label a blob that it already has: this client labels such a blob with an Update, as
    /// containerd's clients do with every blob.
    pub async fn upload(&self, report: &mut (dyn FnMut(Fact) + Send)) -> Answer<()> {
        let layers = self.image.layers.iter().enumerate().map(|(number, layer)| (format!("{GC_CONTENT}l.{number}"), layer.digest.clone()));
        let links: Vec<_> = layers.chain([(format!("{GC_CONTENT}config"), digest(&self.image.config))]).collect();
        let manifest = digest(&self.image.manifest);
        for (digest, bytes) in self.image.blobs() {
            let labels = if digest == manifest { &links[..] } else { &[] };
            let is_new = self.put(&digest, bytes, labels).await?;
            if !is_new && !labels.is_empty() {
                self.label(&digest, labels).await?;
            }
            report(Fact::Blob(digest));
        }
        Ok(())
    }

    /// Uploads all content without labels: what ctr has left when it is killed before it labels anything.
    pub async fn upload_without_labels(&self) -> Answer<()> {
        for (digest, bytes) in self.image.blobs() {
            self.put(&digest, bytes, &[]).await?;
        }
        Ok(())
    }

    /// Sets labels of content.
    async fn label(&self, digest: &str, labels: &[(String, String)]) -> Answer<()> {
        let paths = labels.iter().map(|(key, _)| format!("labels.{key}")).collect();
        let info = Info { digest: digest.to_owned(), labels: labels.iter().cloned().collect(), ..Info::default() };
        let request = UpdateRequest { info: Some(info), update_mask: Some(FieldMask { paths }) };
        self.client.api().content().update(self.client.request(request)).await.map(drop)
    }

    /// Uploads a blob, and returns whether it was not there.
    async fn put(&self, digest: &str, bytes: &[u8], labels: &[(String, String)]) -> Answer<bool> {
        let size = i64::try_from(bytes.len()).unwrap_or(i64::MAX);
        let mut first = stat(&format!("{}-{digest}", self.lease));
        (first.expected, first.total) = (digest.to_owned(), size);
        let (mut upload, _) = match Upload::begin(&self.client, first).await {
            Err(status) if status.code() == Code::AlreadyExists => return Ok(false),
            begun => begun?,
        };
        let mut last = commit(0, size, digest);
        last.labels = labels.iter().cloned().collect();
        // in the parts that ctr sends
        let parts = bytes.chunks(PART).count();
        for (number, part) in bytes.chunks(PART).enumerate() {
            let offset = i64::try_from(number * PART).unwrap_or(i64::MAX);
            if number + 1 == parts {
                (last.offset, last.data) = (offset, part.to_vec());
            } else {
                upload.send(crate::upload::write(offset, part)).await?;
            }
        }
        match upload.send(last).await {
            Err(status) if status.code() == Code::AlreadyExists => Ok(false),
            committed => committed.map(|_answer| true),
        }
    }

    /// Creates the image.
    pub async fn name(&self) -> Answer<()> {
        let size = i64::try_from(self.image.manifest.len()).unwrap_or(i64::MAX);
        let target = Descriptor { media_type: MANIFEST.to_owned(), digest: digest(&self.image.manifest), size, ..Descriptor::default() };
        let image = Some(Record { name: self.image.name.clone(), target: Some(target), ..Record::default() });
        let request = CreateImageRequest { image, ..CreateImageRequest::default() };
        unless(self.client.api().images().create(self.client.request(request)).await.map(drop), Code::AlreadyExists)
    }

    /// Makes a snapshot of each of the lowest layers.
    pub async fn unpack_some(&self, layers: usize) -> Answer<()> {
        self.unpack_layers(layers, &mut |_fact| {}).await.map(drop)
    }

    async fn unpack_layers(&self, layers: usize, report: &mut (dyn FnMut(Fact) + Send)) -> Answer<String> {
        let mut parent = String::new();
        for (layer, chain) in self.image.layers.iter().zip(self.image.chains()).take(layers) {
            self.unpack_layer(layer, &chain, &parent).await?;
            report(Fact::Snapshot(chain.clone()));
            parent = chain;
        }
        Ok(parent)
    }

    /// Makes a snapshot of each layer, and has the configuration hold the uppermost.
    pub async fn unpack(&self, report: &mut (dyn FnMut(Fact) + Send)) -> Answer<()> {
        let uppermost = self.unpack_layers(usize::MAX, report).await?;
        self.label(&digest(&self.image.config), &[(format!("containerd.io/gc.ref.snapshot.{OVERLAYFS}"), uppermost)]).await
    }

    async fn unpack_layer(&self, layer: &Arc<Layer>, chain: &str, parent: &str) -> Answer<()> {
        let (client, snapshotter) = (&self.client, OVERLAYFS.to_owned());
        let key = format!("extract-{} {chain}", self.lease);
        let labels: std::collections::HashMap<_, _> = [(SNAPSHOT_REF.to_owned(), chain.to_owned())].into();
        let (parent, prepared) = (parent.to_owned(), labels.clone());
        let request = PrepareSnapshotRequest { snapshotter: snapshotter.clone(), key: key.clone(), parent, labels: prepared };
        let mounts = match client.api().snapshots().prepare(client.request(request)).await {
            Err(status) if status.code() == Code::AlreadyExists => {
                let request = StatSnapshotRequest { snapshotter, key: chain.to_owned() };
                return client.api().snapshots().stat(client.request(request)).await.map(drop);
            }
            prepared => prepared?.into_inner().mounts,
        };
        let diff = Some(Descriptor {
            media_type: "application/vnd.oci.image.layer.v1.tar".to_owned(),
            digest: layer.digest.clone(),
            size: i64::try_from(layer.archive.len()).unwrap_or(i64::MAX),
            ..Descriptor::default()
        });
        let request = ApplyRequest { diff, mounts, ..ApplyRequest::default() };
        let applied = client.api().diff().apply(client.request(request)).await?.into_inner().applied.unwrap_or_default();
        if applied.digest != layer.digest {
            return Err(Status::data_loss(format!("{} was applied as {}", layer.digest, applied.digest)));
        }
        let request = CommitSnapshotRequest { snapshotter: snapshotter.clone(), key: key.clone(), name: chain.to_owned(), labels };
        match client.api().snapshots().commit(client.request(request)).await {
            // another client was faster
            Err(status) if status.code() == Code::AlreadyExists => {
                client.api().snapshots().remove(client.request(RemoveSnapshotRequest { snapshotter, key })).await.map(drop)
            }
            committed => committed.map(drop),
        }
    }

    /// Deletes the lease.
    pub async fn end(&self) -> Answer<()> {
        end_lease(&self.client, &self.lease).await
    }
}

/// Deletes a lease, and waits for the collection; that there is none is fine.
pub async fn end_lease(client: &Client, id: &str) -> Answer<()> {
    let request = DeleteRequest { id: id.to_owned(), sync: true };
    unless(client.api().leases().delete(client.request(request)).await.map(drop), Code::NotFound)
}

/// Deletes an image, and waits for the collection if `sync`; that there is none is fine.
pub async fn delete_image(client: &Client, name: &str, sync: bool) -> Answer<()> {
    let request = DeleteImageRequest { name: name.to_owned(), sync, ..DeleteImageRequest::default() };
    unless(client.api().images().delete(client.request(request)).await.map(drop), Code::NotFound)
}

fn unless(answer: Answer<()>, code: Code) -> Answer<()> {
    answer.or_else(|status| if status.code() == code { Ok(()) } else { Err(status) })
}

/// The snapshotter that clients use by default.
pub const OVERLAYFS: &str = "overlayfs";
const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";
const GC_CONTENT: &str = "containerd.io/gc.ref.content.";
const PART: usize = 1 << 20;
