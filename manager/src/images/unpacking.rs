//! Which manifests of an image are unpacked where, and what clients see of it.

use std::collections::HashMap;
use std::sync::Arc;

use super::Transfers;
use super::document::Descriptor;
use super::names::{Wanted, Where};
use super::platform::{Platform, Platforms};
use super::progress::{Progress, word};
use super::tree::{Manifest, Tree};
use super::unpack::{OnProgress, Progress as Unpacking, Step, Unpack};
use crate::content::Digest;
use crate::error::{Error, Result};
use crate::name::Namespace;

/// A manifest that is to be unpacked.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Plan {
    pub(super) manifest: Manifest,
    pub(super) snapshotter: Where,
}

impl Transfers {
    /// What is to be unpacked. Configurations must be there.
    ///
    /// Errors: [`Error::Invalid`] if there are images, and none for a platform that is asked for: that would be noticed only when one is run.
    pub(super) async fn plan(&self, namespace: &Namespace, tree: &Tree, wanted: &Wanted) -> Result<Vec<Plan>> {
        let mut plans: Vec<Plan> = Vec::new();
        if !tree.manifests.iter().any(Manifest::can_be_unpacked) {
            // an artifact
            return Ok(plans);
        }
        for unpack in &wanted.unpacks {
            let chosen = self.choose(namespace, tree, &Platforms::of([unpack.platform.clone()])).await?;
            if chosen.is_empty() {
                return Err(self.nothing_for(namespace, tree, &unpack.platform).await);
            }
            for manifest in chosen {
                let plan = Plan { manifest: manifest.clone(), snapshotter: unpack.snapshotter.clone() };
                if !plans.contains(&plan) {
                    plans.push(plan);
                }
            }
        }
        Ok(plans)
    }

    async fn nothing_for(&self, namespace: &Namespace, tree: &Tree, platform: &Platform) -> Error {
        let mut offered = Vec::new();
        for manifest in tree.manifests.iter().filter(|manifest| manifest.can_be_unpacked()).take(10) {
            if let Ok(Some(platform)) = self.platform_of(namespace, manifest).await {
                offered.push(platform.to_string());
            }
        }
        Error::Invalid(format!("the image has nothing for {platform} that could be unpacked; it is for {}", offered.join(", ")))
    }

    /// Unpacks what is planned, layers in parallel, also while they arrive.
    pub(super) async fn unpack(
        &self,
        namespace: &Namespace,
        lease: &str,
        plans: Vec<Plan>,
        waits: bool,
        progress: &Progress,
    ) -> Result<()> {
        for plan in plans {
            let manifest = plan.manifest.descriptor.digest.clone();
            // others are unpacked in their own way
            let Where::Own(snapshotter) = plan.snapshotter else { continue };
            let image = Unpack {
                namespace: namespace.clone(),
                snapshotter,
                manifest,
                labels: HashMap::new(),
                lease: Some(lease.to_owned()),
                waits,
            };
            self.unpacker.unpack(image, reporter(plan.manifest, progress.clone())).await?;
        }
        Ok(())
    }
}

/// Passes on what happens to layers.
fn reporter(manifest: Manifest, progress: Progress) -> OnProgress {
    let layers: HashMap<Digest, Descriptor> = manifest.layers.into_iter().map(|layer| (layer.digest.clone(), layer)).collect();
    Arc::new(move |unpacking: Unpacking| {
        let Some(layer) = layers.get(&unpacking.layer) else { return };
        match unpacking.step {
            Step::Unpacking { bytes, .. } => progress.part(word::EXTRACTING, layer, bytes),
            Step::Recorded => progress.part(word::EXTRACTED, layer, layer.size),
            Step::Exists | Step::Unpacked => {}
        }
    })
}
