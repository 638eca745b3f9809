//! Unpacking: the layers of an image become a chain of snapshots, also while their bytes still arrive.
//!
//! ```text
//! manifest, config ─▶ plan ─▶ each layer: waits for its bytes ─▶ inflated, hashed, written to a folder of its own (several at once)
//!                                                                        │ its diffID is the config's
//!                         all done: folders put on each other ─▶ one syncfs ─▶ one transaction: rows, labels ─▶ Unpacked
//! ```
//! A layer needs nothing of the ones below until its folder is put on them. No row is written before that: a crash, an error or a caller that
//! leaves leaves only folders without a row, which are removed at once, or by the next start.
//!
//! **Invariants:** a chain ID stands for layers whose diffIDs were computed from their bytes. One caller unpacks a chain at a time; others
//! that want it wait for it. When the caller no longer waits, the work ends at its next buffer.

mod claims;
pub(in crate::images) mod layer;
pub(in crate::images) mod record;
#[cfg(test)]
pub(in crate::images) mod tests;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use tokio::task::JoinSet;

use super::plan::Plan;
use crate::content::{Content, Digest};
use crate::error::{Error, Result};
use crate::gate::Gate;
use crate::layers::LayerLimits;
use crate::name::Namespace;
use crate::pools::{Pool, Pools};
use crate::settings::UNPACKS;
use crate::snapshots::{Snapshots, Snapshotter};
use crate::store::snapshots::Place;
use crate::store::{Meta, Store};
use claims::{Claim, Claims};
use layer::{Job, Outcome, Slots};
pub(in crate::images) use record::label as label_all;
use record::{Recorded, label, label_layer};

/// Which image to unpack, and how.
#[derive(Debug, Clone)]
pub(crate) struct Unpack {
    pub(crate) namespace: Namespace,
    pub(crate) snapshotter: Snapshotter,
    /// Of the image's manifest for one platform: an image manifest, not an index. It and its config must be in the content store.
    pub(crate) manifest: Digest,
    /// Of each new snapshot.
    pub(crate) labels: HashMap<String, String>,
    /// Holds the snapshots, if it is named.
    pub(crate) lease: Option<String>,
    /// Whether layers that are not in the content store may still arrive. They are waited for until the caller leaves: it fetches them at the
    /// same time (`try_join!`), with [`crate::content::Opening::expected`] set, so that their bytes are read while they arrive.
    pub(crate) waits: bool,
}

/// What happens to a layer; given to a function that must not block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Of the layer's blob.
    pub(crate) layer: Digest,
    /// Of the layer and those below it: its snapshot's key.
    pub(crate) chain: Digest,
    pub(crate) step: Step,
}

/// What has become of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Its snapshot was there.
    Exists,
    /// So many bytes of the blob are unpacked, of a blob of `of` bytes.
    Unpacking { bytes: u64, of: u64 },
    /// All of it is unpacked; its snapshot is not recorded yet.
    Unpacked,
    /// Its snapshot is recorded, and survives a loss of power.
    Recorded,
}

/// Receives the progress.
pub(crate) type OnProgress = Arc<dyn Fn(Progress) + Send + Sync>;

/// An unpacked image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unpacked {
    pub(crate) config: Digest,
    /// The key of its uppermost snapshot; none for an image without layers. The config has the label `containerd.io/gc.ref.snapshot.NAME` with
    /// it, and each layer's blob `containerd.io/uncompressed`.
    pub(crate) chain: Option<Digest>,
    /// Layers whose snapshots were not there.
    pub(crate) new_layers: usize,
}

/// Unpacks images; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Unpacker {
    pub(crate) store: Store,
    pub(crate) content: Arc<Content>,
    pub(crate) snapshots: Snapshots,
    pub(crate) gate: Gate,
    /// Applies layers that are there.
    pub(crate) layers: Pool,
    /// Applies layers that arrive.
    pub(crate) arriving: Pool,
    pub(crate) limits: LayerLimits,
    /// Layers of one image that are unpacked at the same time.
    pub(crate) at_once: usize,
    claims: Claims,
}

/// An unpack under way.
struct Work {
    image: Unpack,
    plan: Plan,
    place: Place,
    on_progress: OnProgress,
    slots: Arc<Slots>,
    /// Chains that no one else unpacks, by number of the layer.
    claimed: BTreeMap<usize, Claim>,
    /// Layers that are not recorded yet.
    done: BTreeMap<usize, Recorded>,
}

impl Unpacker {
    pub(crate) fn new(store: Store, content: Arc<Content>, snapshots: Snapshots, gate: Gate, pools: &Pools, limits: LayerLimits) -> Self {
        let (layers, arriving) = (pools.layers.clone(), pools.arriving.clone());
        Self { store, content, snapshots, gate, layers, arriving, limits, at_once: UNPACKS, claims: Claims::default() }
    }

    /// Sets how many layers of one image are unpacked at once.
    pub(crate) fn with_at_once(self, at_once: usize) -> Self {
        Self { at_once, ..self }
    }

    /// Unpacks an image that is in the content store, or arrives there meanwhile. Called again, it finds everything done.
    ///
    /// Errors: [`crate::error::Error::NotFound`] for a blob that is not there; [`crate::error::Error::Invalid`] for a manifest, config or layer
    /// that cannot be unpacked, with its digest; [`crate::error::Error::Precondition`] when a layer's diffID is not the config's.
    pub(crate) async fn unpack(&self, image: Unpack, on_progress: OnProgress) -> Result<Unpacked> {
        let plan = Plan::read(&self.content, &image.namespace, &image.manifest).await?;
        let place = Place { namespace: image.namespace.to_string(), snapshotter: image.snapshotter.name().to_owned() };
        let (claimed, done, slots) = (BTreeMap::new(), BTreeMap::new(), Arc::new(Slots::new(self.at_once)));
        let mut work = Work { image, plan, place, on_progress, slots, claimed, done };
        let (count, mut new_layers, mut seen) = (work.plan.layers.len(), 0, 0);
        // an image may have no layers
        let mut is_done = count == 0;
        while !is_done {
            let first = self.first_missing(&work).await?;
            work.claimed.retain(|number, _claim| *number >= first);
            work.done.retain(|number, _recorded| *number >= first);
            (seen..first).for_each(|number| work.report(number, Step::Exists));
            seen = seen.max(first);
            if first == count {
                break;
            }
            let own = self.claim(&mut work, first);
            self.extract(&mut work, first, own).await?;
            let end = (first..count).find(|number| !work.done.contains_key(number)).unwrap_or(count);
            if end > first {
                self.record_run(&mut work, first, end).await?;
                (first..end).for_each(|number| work.report(number, Step::Recorded));
                new_layers += end - first;
                seen = end;
            }
            is_done = end == count;
            // it is unpacked by another caller, or was
            if let Some(layer) = work.plan.layers.get(end) {
                self.claims.released(&work.place, &layer.chain).await;
            }
        }
        self.label(&work).await?;
        Ok(Unpacked { config: work.plan.config.clone(), chain: work.plan.layers.last().map(|layer| layer.chain.clone()), new_layers })
    }

    /// The number of the lowest layer without a snapshot. The lease holds what is there.
    async fn first_missing(&self, work: &Work) -> Result<usize> {
        let keys = work.plan.layers.iter().map(|layer| layer.chain.to_string()).collect();
        let found = self.snapshots.committed(&work.place, keys, work.image.lease.clone()).await?;
        // a snapshot has all those below it
        Ok(found.iter().rposition(|is_there| *is_there).map_or(0, |top| top + 1))
    }

    /// Claims what no one else unpacks, and returns what is to be unpacked of it.
    fn claim(&self, work: &mut Work, first: usize) -> Vec<usize> {
        for number in first..work.plan.layers.len() {
            if !work.claimed.contains_key(&number)
                && let Some(layer) = work.plan.layers.get(number)
                && let Some(claim) = self.claims.try_take(&work.place, &layer.chain)
            {
                work.claimed.insert(number, claim);
            }
        }
        work.claimed.keys().copied().filter(|number| !work.done.contains_key(number)).collect()
    }

    /// Unpacks layers: all at once where they need nothing of those below.
    async fn extract(&self, work: &mut Work, first: usize, numbers: Vec<usize>) -> Result<()> {
        if work.image.snapshotter == Snapshotter::Native {
            return self.extract_copies(work, first).await;
        }
        let mut tasks = JoinSet::new();
        for number in numbers {
            let Some(job) = work.job(number, None) else { continue };
            let this = self.clone();
            tasks.spawn(async move { (number, this.layer(job.clone()).await.map(|outcome| Recorded { job, outcome })) });
        }
        // when one fails, the others end with the set
        while let Some(ended) = tasks.join_next().await {
            let (number, recorded) = ended.map_err(|source| Error::Panicked { what: "an unpack", source })?;
            work.done.insert(number, recorded?);
            work.report(number, Step::Unpacked);
        }
        Ok(())
    }

    /// The same for copies: one after the other.
    async fn extract_copies(&self, work: &mut Work, first: usize) -> Result<()> {
        let below = first.checked_sub(1).and_then(|number| work.plan.layers.get(number)).map(|layer| layer.chain.to_string());
        let mut trees = self.snapshots.trees(&work.place, below.as_deref()).await?;
        for number in first..work.plan.layers.len() {
            if !work.claimed.contains_key(&number) {
                break;
            }
            if !work.done.contains_key(&number)
                && let Some(job) = work.job(number, Some(trees.clone()))
            {
                let outcome = self.layer(job.clone()).await?;
                work.done.insert(number, Recorded { job, outcome });
                work.report(number, Step::Unpacked);
            }
            if let Some(Recorded { outcome: Outcome::Extracted(extracted), .. }) = work.done.get(&number) {
                trees.insert(0, extracted.draft.tree());
            }
        }
        Ok(())
    }

    async fn record_run(&self, work: &mut Work, first: usize, end: usize) -> Result<()> {
        let layers: Vec<_> = (first..end).filter_map(|number| work.done.remove(&number)).collect();
        let below = first.checked_sub(1).and_then(|number| work.plan.layers.get(number)).map(|layer| layer.chain.clone());
        let (namespace, labelled) = (work.image.namespace.clone(), work.plan.layers.get(first..end).unwrap_or_default().to_vec());
        let and = move |db: &mut Meta<'_>| labelled.iter().try_for_each(|layer| label_layer(db, &namespace, layer));
        let lease = work.image.lease.clone();
        self.record(&work.place, below.as_ref(), layers, &work.image.labels, lease, and).await?;
        work.claimed.retain(|number, _claim| *number >= end);
        Ok(())
    }

    /// Labels what was there already, too.
    async fn label(&self, work: &Work) -> Result<()> {
        let _pass = self.gate.enter().await?;
        let (namespace, plan, snapshotter) = (work.image.namespace.clone(), work.plan.clone(), work.image.snapshotter.name());
        self.store.write(move |db| label(db, &namespace, &plan, snapshotter)).await
    }
}

impl Work {
    fn job(&self, number: usize, below: Option<Vec<PathBuf>>) -> Option<Job> {
        let layer = self.plan.layers.get(number)?.clone();
        // the lowest is on nothing
        let below = below.or_else(|| (number == 0).then(Vec::new));
        let (on_progress, of) = (Arc::clone(&self.on_progress), layer.clone());
        let on_bytes = move |bytes| {
            let step = Step::Unpacking { bytes, of: of.bytes };
            on_progress(Progress { layer: of.blob.clone(), chain: of.chain.clone(), step });
        };
        Some(Job {
            namespace: self.image.namespace.clone(),
            snapshotter: self.image.snapshotter,
            layer,
            below,
            waits: self.image.waits,
            slots: Arc::clone(&self.slots),
            on_bytes: Arc::new(on_bytes),
        })
    }

    fn report(&self, number: usize, step: Step) {
        if let Some(layer) = self.plan.layers.get(number) {
            (self.on_progress)(Progress { layer: layer.blob.clone(), chain: layer.chain.clone(), step });
        }
    }
}
