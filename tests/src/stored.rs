//! What a daemon has stored: its rows, by its API, beside its files, by their paths.
//!
//! **Invariant:** rows are asked for by the same calls with every daemon, and files are where containerd has them too.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use containerd_client::services::v1::snapshots::{Info as Snapshot, Kind, ListSnapshotsRequest, ViewSnapshotRequest};
use containerd_client::services::v1::{AbortRequest, ListContentRequest, ListImagesRequest, ListRequest, ListStatusesRequest};
use containerd_client::types::Mount;
use tonic::Code;

use crate::client::{Answer, Client};
use crate::eventually::{SOON, eventually};
use crate::image::{Image, Layer, digest};
use crate::import::{Fact, OVERLAYFS, end_lease};

/// The rows of a namespace.
#[derive(Debug, Default)]
pub struct Rows {
    /// Digest and size of content.
    pub content: BTreeMap<String, i64>,
    /// Name and target of images.
    pub images: BTreeMap<String, String>,
    /// Snapshots by their key.
    pub snapshots: BTreeMap<String, Snapshot>,
    /// Leases.
    pub leases: Vec<String>,
    /// References of ingests.
    pub ingests: Vec<String>,
}

/// A store of one daemon, in which a single namespace is used.
#[derive(Debug, Clone)]
pub struct Stored {
    client: Client,
    root: PathBuf,
}

impl Stored {
    /// The one with its files in `root`.
    pub fn new(client: &Client, root: &Path) -> Self {
        Self { client: client.clone(), root: root.to_owned() }
    }

    /// All rows.
    pub async fn rows(&self) -> Answer<Rows> {
        let (client, mut rows) = (&self.client, Rows::default());
        let request = ListContentRequest::default();
        let mut pages = client.api().content().list(client.request(request)).await?.into_inner();
        while let Some(page) = pages.message().await? {
            rows.content.extend(page.info.into_iter().map(|info| (info.digest, info.size)));
        }
        let images = client.api().images().list(client.request(ListImagesRequest::default())).await?.into_inner().images;
        rows.images = images.into_iter().map(|image| (image.name, image.target.unwrap_or_default().digest)).collect();
        let request = ListSnapshotsRequest { snapshotter: OVERLAYFS.to_owned(), ..ListSnapshotsRequest::default() };
        let mut pages = client.api().snapshots().list(client.request(request)).await?.into_inner();
        while let Some(page) = pages.message().await? {
            rows.snapshots.extend(page.info.into_iter().map(|info| (info.name.clone(), info)));
        }
        let leases = client.api().leases().list(client.request(ListRequest::default())).await?.into_inner().leases;
        rows.leases = leases.into_iter().map(|lease| lease.id).collect();
        let statuses = client.api().content().list_statuses(client.request(ListStatusesRequest::default())).await?.into_inner();
        rows.ingests = statuses.statuses.into_iter().map(|status| status.r#ref).collect();
        Ok(rows)
    }

    fn blobs(&self) -> PathBuf {
        self.root.join("io.containerd.content.v1.content/blobs/sha256")
    }

    fn snapshots(&self) -> PathBuf {
        self.root.join("io.containerd.snapshotter.v1.overlayfs/snapshots")
    }

    /// Everything that is wrong with what has a row: each is to be whole, whether or not it was acknowledged. `images` are those that may be there.
    pub async fn damage(&self, images: &[Image]) -> Result<Vec<String>> {
        // what goes meanwhile would be taken for lost
        self.collect().await?;
        let rows = self.rows().await?;
        let mut wrong = Vec::new();
        for (id, size) in &rows.content {
            match fs::read(self.blobs().join(id.trim_start_matches("sha256:"))) {
                Err(error) => wrong.push(format!("content {id}: {error}")),
                Ok(bytes) if i64::try_from(bytes.len()).ok() != Some(*size) => {
                    wrong.push(format!("content {id} has {} bytes instead of {size}", bytes.len()));
                }
                Ok(bytes) if digest(&bytes) != *id => wrong.push(format!("content {id} has other bytes")),
                Ok(_whole) => {}
            }
        }
        for (name, target) in &rows.images {
            match images.iter().find(|image| image.name == *name) {
                None => wrong.push(format!("image {name} is unknown")),
                Some(image) if digest(&image.manifest) != *target => wrong.push(format!("image {name} has target {target}")),
                Some(image) => {
                    let missing = image.blobs().filter(|(id, _)| !rows.content.contains_key(id));
                    wrong.extend(missing.map(|(id, _)| format!("image {name} lacks content {id}")));
                }
            }
        }
        let chains: BTreeMap<String, &Layer> =
            images.iter().flat_map(|image| image.chains().into_iter().zip(image.layers.iter().map(AsRef::as_ref))).collect();
        for (key, info) in rows.snapshots.iter().filter(|(_, info)| info.kind() == Kind::Committed) {
            match chains.get(key) {
                None => wrong.push(format!("snapshot {key} is unknown")),
                Some(layer) => match self.tree(key).await {
                    Ok(tree) => wrong.extend(layer.differs(&tree).map(|difference| format!("snapshot {key}: {difference}"))),
                    Err(error) => wrong.push(format!("snapshot {key}: {error:#}")),
                },
            }
            if !info.parent.is_empty() && !rows.snapshots.contains_key(&info.parent) {
                wrong.push(format!("snapshot {key} lacks its parent {}", info.parent));
            }
        }
        Ok(wrong)
    }

    /// What was acknowledged and is not so.
    pub async fn lost(&self, facts: impl IntoIterator<Item = Fact>) -> Result<Vec<String>> {
        let rows = self.rows().await?;
        let holds = |fact: &Fact| match fact {
            Fact::Blob(id) => rows.content.contains_key(id),
            Fact::Image(name) => rows.images.contains_key(name),
            Fact::Snapshot(chain) => rows.snapshots.contains_key(chain),
            Fact::NoImage(name) => !rows.images.contains_key(name),
        };
        Ok(facts.into_iter().filter(|fact| !holds(fact)).map(|fact| format!("acknowledged, and lost: {fact:?}")).collect())
    }

    /// The folder of a committed snapshot, which a view on it names.
    async fn tree(&self, chain: &str) -> Result<PathBuf> {
        let client = &self.client;
        let (snapshotter, key) = (OVERLAYFS.to_owned(), format!("look-at-{chain}"));
        let request =
            ViewSnapshotRequest { snapshotter: snapshotter.clone(), key: key.clone(), parent: chain.to_owned(), ..Default::default() };
        let mounts = client.api().snapshots().view(client.request(request)).await?.into_inner().mounts;
        let request = containerd_client::services::v1::snapshots::RemoveSnapshotRequest { snapshotter, key };
        match client.api().snapshots().remove(client.request(request)).await {
            // a collection may have been faster
            Err(status) if status.code() != Code::NotFound => return Err(status.into()),
            _ => {}
        }
        let tree = uppermost(&mounts);
        ensure!(tree.starts_with(&self.root), "{mounts:?}");
        Ok(tree)
    }

    /// Ends all leases, and waits until there is a file for each row and a row for each file, and no ingest.
    pub async fn settles(&self) -> Result<()> {
        self.end_leases().await?;
        self.collect().await?;
        eventually("nothing is left that has no row", SOON, async || {
            let leaked = self.leaked().await?;
            ensure!(leaked.is_empty(), "{leaked:#?}");
            Ok(())
        })
        .await
    }

    /// Ends all leases.
    pub async fn end_leases(&self) -> Result<()> {
        for lease in self.rows().await?.leases {
            end_lease(&self.client, &lease).await?;
        }
        Ok(())
    }

    /// Drops ingests that no lease holds: a power cut may have lost the names of their leases, and they would stay for a day.
    pub async fn abort_ingests(&self) -> Result<()> {
        for reference in self.rows().await?.ingests {
            let request = self.client.request(AbortRequest { r#ref: reference });
            self.client.api().content().abort(request).await?;
        }
        Ok(())
    }

    /// Waits for a collection that begins from now on.
    pub async fn collect(&self) -> Result<()> {
        self.client.with_lease("collect").await?;
        Ok(end_lease(&self.client, "collect").await?)
    }

    /// Files that have no row, rows without a file, and ingests.
    pub async fn leaked(&self) -> Result<Vec<String>> {
        let rows = self.rows().await?;
        let mut wrong: Vec<_> = rows.ingests.iter().map(|reference| format!("ingest {reference}")).collect();
        let rows_of_content = rows.content.keys().map(|id| id.trim_start_matches("sha256:").to_owned()).collect();
        compare("blob", &names(&self.blobs())?, &rows_of_content, &mut wrong);
        let folders = names(&self.snapshots())?;
        if folders.len() != rows.snapshots.len() {
            wrong.push(format!("{} folders of {} snapshots: {folders:?}", folders.len(), rows.snapshots.len()));
        }
        for folder in ["io.containerd.content.v1.content/ingest", "io.containerd.content.v1.content/removed"] {
            wrong.extend(names(&self.root.join(folder)).unwrap_or_default().into_iter().map(|name| format!("{folder}/{name}")));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let below = format!("{}/", self.root.display());
        wrong.extend(mounts.lines().filter(|line| line.contains(&below)).map(|line| format!("mount {line}")));
        Ok(wrong)
    }
}

fn compare(what: &str, files: &BTreeSet<String>, rows: &BTreeSet<String>, wrong: &mut Vec<String>) {
    wrong.extend(files.difference(rows).map(|name| format!("{what} {name} has no row")));
    wrong.extend(rows.difference(files).map(|name| format!("{what} {name} has no file")));
}

fn names(folder: &Path) -> Result<BTreeSet<String>> {
    fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// The folder that a mount shows first.
fn uppermost(mounts: &[Mount]) -> PathBuf {
    let Some(mount) = mounts.first() else { return PathBuf::new() };
    let lower = mount.options.iter().find_map(|option| option.strip_prefix("lowerdir="));
    lower.map_or(&*mount.source, |lower| lower.split(':').next().unwrap_or_default()).into()
}
