//! Unpacking with snapshotters of other processes: one layer after the other, as clients do it.
//!
//! ```text
//! Prepare, with the name of the layer ─▶ AlreadyExists: it is there, or the snapshotter has it by itself ─▶ the next layer
//!                                  └───▶ mounts ─▶ applied once its blob is here ─▶ its diffID is the config's ─▶ Commit
//! ```
//! Layers that a snapshotter has by itself are not fetched: it does so in its own way, when they are read.

use std::collections::{HashMap, HashSet};

use containerd_client::services::v1::snapshots::Kind;
use containerd_client::types::Mount;
use log::debug;

use super::Transfers;
use super::document::Descriptor;
use super::names::Where;
use super::plan::{Layer, Plan as Image};
use super::progress::{Progress, word};
use super::unpack::label_all;
use super::unpacking::Plan;
use crate::content::Digest;
use crate::error::{Error, Object, Result};
use crate::host;
use crate::name::Namespace;
use crate::snapshots::{Commit, New, Snapshotter};
use crate::store::snapshots::Place;

/// An image that is being unpacked by another process.
#[derive(Debug)]
pub(super) struct Remote {
    namespace: Namespace,
    place: Place,
    lease: String,
    /// The image's name, which the snapshotter gets as a label.
    name: String,
    manifest: Digest,
    image: Image,
    layers: Vec<Descriptor>,
    /// Layers from the lowest on that are there.
    there: usize,
    /// Blobs that the snapshotter has by itself.
    had: HashSet<Digest>,
    /// The next one, to be applied.
    prepared: Option<(String, Vec<Mount>)>,
}

impl Remote {
    /// What need not be fetched: it is had by itself wherever the image is unpacked.
    pub(super) fn had(all: &[Self], plans: &[Plan]) -> HashSet<Digest> {
        if all.len() < plans.len() {
            return HashSet::new();
        }
        let mut had = all.iter().map(|remote| remote.had.clone());
        let first = had.next().unwrap_or_default();
        had.fold(first, |had, other| &had & &other)
    }

    /// How clients name a layer to a snapshotter.
    fn labels(&self, number: usize, layer: &Layer) -> HashMap<String, String> {
        let mut labels = HashMap::from([
            (TARGET.to_owned(), layer.chain.to_string()),
            (format!("{ABOUT}.manifest-digest"), self.manifest.to_string()),
            (format!("{ABOUT}.layer-digest"), layer.blob.to_string()),
        ]);
        if !self.name.is_empty() {
            labels.insert(format!("{ABOUT}.image-ref"), self.name.clone());
        }
        let mut upper = String::new();
        for layer in self.image.layers.get(number..).unwrap_or_default() {
            // a label has so much room
            if upper.len() + layer.blob.as_str().len() > MOST_BYTES {
                break;
            }
            upper.push_str(if upper.is_empty() { "" } else { "," });
            upper.push_str(layer.blob.as_str());
        }
        labels.insert(format!("{ABOUT}.image-layers"), upper);
        labels
    }
}

impl Transfers {
    /// The snapshotter of that name.
    pub(crate) fn snapshotter(&self, name: &str) -> Result<Where> {
        if self.differ.snapshots.has_proxy(name) {
            return Ok(Where::Proxy(name.to_owned()));
        }
        Snapshotter::parse(name).map(Where::Own)
    }

    /// Looks for the layers that proxies are to unpack: which of them each proxy already has.
    pub(super) async fn begin_remote(&self, namespace: &Namespace, lease: &str, plans: &[Plan], name: &str) -> Result<Vec<Remote>> {
        let mut all = Vec::new();
        for plan in plans {
            let Where::Proxy(snapshotter) = &plan.snapshotter else { continue };
            let manifest = plan.manifest.descriptor.digest.clone();
            let mut remote = Remote {
                namespace: namespace.clone(),
                place: Place { namespace: namespace.to_string(), snapshotter: snapshotter.clone() },
                lease: lease.to_owned(),
                name: name.to_owned(),
                image: Image::read(&self.content, namespace, &manifest).await?,
                layers: plan.manifest.layers.clone(),
                manifest,
                there: 0,
                had: HashSet::new(),
                prepared: None,
            };
            let mut here = HashSet::new();
            while let Some(layer) = remote.image.layers.get(remote.there).cloned() {
                remote.prepared = self.prepare_remote(&remote, remote.there).await?;
                if remote.prepared.is_some() {
                    break;
                }
                let of = if self.differ.snapshots.is_had_by_proxy(&remote.place, layer.chain.as_str()).await? {
                    &mut remote.had
                } else {
                    &mut here
                };
                of.insert(layer.blob);
                remote.there += 1;
            }
            // one that comes twice
            here.extend(remote.image.layers[remote.there..].iter().map(|layer| layer.blob.clone()));
            remote.had.retain(|blob| !here.contains(blob));
            debug!(snapshotter = snapshotter.as_str(), there = remote.there, of = remote.image.layers.len(); "unpacking in another process");
            all.push(remote);
        }
        Ok(all)
    }

    /// Unpacks the rest; with `waits`, layers may still arrive.
    pub(super) async fn finish_remote(&self, all: Vec<Remote>, waits: bool, progress: &Progress) -> Result<()> {
        for mut remote in all {
            for number in remote.there..remote.image.layers.len() {
                let prepared = match remote.prepared.take() {
                    Some(prepared) => Some(prepared),
                    None => self.prepare_remote(&remote, number).await?,
                };
                let Some((key, mounts)) = prepared else { continue };
                let applied = self.apply_remote(&remote, number, mounts, waits, progress).await;
                let lease = Some(remote.lease.clone());
                let name = remote.image.layers[number].chain.to_string();
                let committed = match applied {
                    Ok(()) => {
                        let labels = HashMap::from([(TARGET.to_owned(), name.clone())]);
                        let commit = Commit { key: key.clone(), name, parent: String::new(), labels, lease: lease.clone() };
                        self.differ.snapshots.commit(&remote.place, commit).await
                    }
                    Err(error) => Err(error),
                };
                if let Err(error) = committed {
                    if let Err(error) = self.differ.snapshots.remove(&remote.place, &key, lease).await {
                        debug!(snapshot = key, error = error.chain(); "cannot remove what was to be a layer; it goes with its lease");
                    }
                    // another client has unpacked it meanwhile
                    if !matches!(error, Error::AlreadyExists(_)) {
                        return Err(error);
                    }
                }
                if let Some(layer) = remote.layers.get(number) {
                    progress.part(word::EXTRACTED, layer, layer.size);
                }
            }
            let _pass = self.gate.enter().await?;
            let (namespace, image, snapshotter) = (remote.namespace, remote.image, remote.place.snapshotter);
            self.store.write(move |db| label_all(db, &namespace, &image, &snapshotter)).await?;
        }
        Ok(())
    }

    /// Makes the snapshot that a layer is to be applied to; none if the layer is there.
    async fn prepare_remote(&self, remote: &Remote, number: usize) -> Result<Option<(String, Vec<Mount>)>> {
        let Some(layer) = remote.image.layers.get(number) else { return Ok(None) };
        let parent = number.checked_sub(1).and_then(|below| remote.image.layers.get(below));
        let key = format!("extract-{} {}", host::kernel_id("uuid")?, layer.chain);
        let new = New {
            key: key.clone(),
            parent: parent.map_or_else(String::new, |below| below.chain.to_string()),
            kind: Kind::Active,
            labels: remote.labels(number, layer),
            lease: Some(remote.lease.clone()),
        };
        match self.differ.snapshots.prepare(&remote.place, new).await {
            Err(Error::AlreadyExists(Object::TargetSnapshot(_))) => Ok(None),
            prepared => prepared.map(|mounts| Some((key, mounts))),
        }
    }

    async fn apply_remote(&self, remote: &Remote, number: usize, mounts: Vec<Mount>, waits: bool, progress: &Progress) -> Result<()> {
        let layer = &remote.image.layers[number];
        if waits {
            self.content.wait(&remote.namespace, &layer.blob).await?;
        }
        if let Some(part) = remote.layers.get(number) {
            progress.part(word::EXTRACTING, part, 0);
        }
        let applied = self.differ.apply(&remote.namespace, &layer.blob, mounts, true).await?;
        let found = Digest::of_sha256(&applied.diff_id);
        if found == layer.diff_id {
            return Ok(());
        }
        Err(Error::Precondition(format!("layer {} has the diffID {found}, and its image's config says {}", layer.blob, layer.diff_id)))
    }
}

/// The name that a snapshot is to have when it is committed.
const TARGET: &str = "containerd.io/snapshot.ref";
/// What snapshotters that fetch by themselves need to know.
const ABOUT: &str = "containerd.io/snapshot/cri";
/// Of a label's value.
const MOST_BYTES: usize = 3900;
