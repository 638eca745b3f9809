//! The end of an unpack: layers are put on each other, and recorded together with the labels that say so.

use std::collections::HashMap;

use super::Unpacker;
use super::layer::{Extracted, Job, Outcome};
use crate::content::Digest;
use crate::error::{Error, Result};
use crate::images::plan::{Layer, Plan};
use crate::name::Namespace;
use crate::snapshots::{NewLayer, blocking_settle};
use crate::store::snapshots::Place;
use crate::store::{Meta, blobs};

/// A layer that is recorded.
#[derive(Debug)]
pub(in crate::images) struct Recorded {
    /// How it was unpacked.
    pub(in crate::images) job: Job,
    pub(in crate::images) outcome: Outcome,
}

impl Unpacker {
    /// Puts layers on each other, the first on the snapshot `below`, and records them in one transaction with `and`.
    pub(in crate::images) async fn record(
        &self,
        place: &Place,
        below: Option<&Digest>,
        layers: Vec<Recorded>,
        labels: &HashMap<String, String>,
        lease: Option<String>,
        and: impl FnOnce(&mut Meta<'_>) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let below = below.map(ToString::to_string);
        let mut trees = self.snapshots.trees(place, below.as_deref()).await?;
        let mut new = Vec::with_capacity(layers.len());
        for Recorded { job, outcome } in layers {
            let mut labels = labels.clone();
            labels.insert(TARGET_LABEL.to_owned(), job.layer.chain.to_string());
            let key = job.layer.chain.to_string();
            let settled = match outcome {
                Outcome::Extracted(extracted) => self.settle(&trees, named(*extracted, &key, &labels)).await?,
                Outcome::NeedsLowers => None,
            };
            let layer = match settled {
                Some(layer) => layer,
                None => {
                    let again = Job { below: Some(trees.clone()), waits: false, ..job };
                    let blob = again.layer.blob.clone();
                    let Outcome::Extracted(extracted) = self.layer(again).await? else {
                        return Err(Error::Invalid(format!("layer {blob} cannot be put on the layers below it")));
                    };
                    let layer = self.settle(&trees, named(*extracted, &key, &labels)).await?;
                    layer.ok_or_else(|| Error::Invalid(format!("layer {blob} cannot be put on the layers below it")))?
                }
            };
            trees.insert(0, layer.draft.tree());
            new.push(layer);
        }
        self.snapshots.record(place, below, new, lease, and).await
    }

    async fn settle(&self, trees: &[std::path::PathBuf], layer: NewLayer) -> Result<Option<NewLayer>> {
        let trees = trees.to_vec();
        let settle = move || {
            let mut layer = layer;
            let is_right = blocking_settle(&trees, &mut layer)?;
            Ok(is_right.then_some(layer))
        };
        self.layers.run(settle).await?
    }
}

fn named(extracted: Extracted, key: &str, labels: &HashMap<String, String>) -> NewLayer {
    let Extracted { draft, implicit, usage, .. } = extracted;
    NewLayer { draft, key: key.to_owned(), labels: labels.clone(), implicit, usage }
}

/// Writes what clients label an unpacked image with: the blob of a layer with its diffID, the config with the uppermost snapshot.
pub(in crate::images) fn label(db: &mut Meta<'_>, namespace: &Namespace, plan: &Plan, snapshotter: &str) -> Result<()> {
    for layer in &plan.layers {
        label_layer(db, namespace, layer)?;
    }
    let Some(top) = plan.layers.last() else { return Ok(()) };
    set(db, namespace, &plan.config, &format!("{SNAPSHOT_LABEL}{snapshotter}"), top.chain.as_str())
}

/// The same of one layer's blob.
pub(in crate::images) fn label_layer(db: &mut Meta<'_>, namespace: &Namespace, layer: &Layer) -> Result<()> {
    set(db, namespace, &layer.blob, UNCOMPRESSED_LABEL, layer.diff_id.as_str())
}

/// Sets a label of a blob, if the blob is there and lacks it.
fn set(db: &mut Meta<'_>, namespace: &Namespace, digest: &Digest, key: &str, value: &str) -> Result<()> {
    let Some(mut info) = blobs::get(db, namespace.as_str(), digest.as_str())? else { return Ok(()) };
    if info.labels.get(key).is_some_and(|found| found == value) {
        return Ok(());
    }
    info.labels.insert(key.to_owned(), value.to_owned());
    info.updated_at = Some(crate::timestamp::now());
    blobs::put(db, namespace.as_str(), digest.as_str(), &info)
}

/// Names the snapshot of a layer; a Prepare with it is answered that it exists.
const TARGET_LABEL: &str = "containerd.io/snapshot.ref";
/// On a layer's blob: the digest of what it is without compression.
const UNCOMPRESSED_LABEL: &str = "containerd.io/uncompressed";
/// On a config, before the snapshotter's name: the uppermost snapshot, which stays as long as the config.
const SNAPSHOT_LABEL: &str = "containerd.io/gc.ref.snapshot.";
