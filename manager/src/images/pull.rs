//! Pulling: an image from a registry, unpacked while it arrives.
//!
//! ```text
//! resolve ─▶ verifiers ─▶ documents ─▶ configurations ─▶ layers, some at a time ─┬─▶ labels and name, at once
//!                                                            └─▶ unpacked meanwhile┘
//! ```
//! **Invariant:** a lease holds everything until the name does; without the name the lease's end is the end of all of it.

use std::sync::Arc;

use log::debug;
use tokio::task::JoinSet;

use super::Transfers;
use super::document::{self, Descriptor, Kind};
use super::fetch::Fetching;
use super::lease::{Lease, Place};
use super::names::Wanted;
use super::progress::{Progress, word};
use super::record::Origin;
use super::registry::Registry;
use super::remote::Remote;
use super::tree::Tree;
use crate::error::{Error, Result};

/// What to pull.
#[derive(Debug)]
pub(crate) struct Pull {
    pub(crate) place: Place,
    pub(crate) registry: Registry,
    pub(crate) wanted: Wanted,
    pub(crate) progress: Progress,
}

impl Transfers {
    /// Pulls an image, and returns what it is. When the caller leaves, the pull ends, and the collector removes what has come.
    pub(crate) async fn pull(self: &Arc<Self>, lease: &Lease, pull: &Pull) -> Result<Descriptor> {
        let (progress, wanted, namespace) = (&pull.progress, &pull.wanted, &pull.place.namespace);
        let source = format!("OCI Registry ({})", pull.registry.reference());
        let name = if wanted.name.is_empty() { pull.registry.reference().to_string() } else { wanted.name.clone() };
        progress.overall(format!("Resolving from {source}"));
        let resolved = pull.registry.resolve().await?;
        document::check_type(&resolved.media_type)?;
        let root = Descriptor::new(&resolved.media_type, resolved.digest, resolved.size);
        self.verifiers.ask(&pull.registry.reference().to_string(), &root).await?;
        progress.overall(format!("Pulling from {source}"));
        progress.image("fetching image content", &name, &root);
        let fetching = Fetching {
            transfers: Arc::clone(self),
            registry: pull.registry.clone(),
            namespace: namespace.clone(),
            lease: lease.id().to_owned(),
            progress: progress.clone(),
        };
        let found = |part: &Descriptor, parents: &[String]| {
            progress.waits(part, if parents.is_empty() { std::slice::from_ref(&name) } else { parents });
        };
        let tree = Tree::follow(&fetching, &root, &wanted.selection, found).await?;
        if tree.manifests.is_empty() && !wanted.selection.platforms.are_all() {
            return Err(Error::Invalid(format!("{name} has nothing for {}", wanted.selection.platforms)));
        }
        let (configs, layers): (Vec<_>, Vec<_>) = tree.leaves().map(|node| &node.descriptor).partition(|leaf| leaf.kind() == Kind::Config);
        fetch_all(&fetching, configs).await?;
        let plans = self.plan(namespace, &tree, wanted).await?;
        let remote = self.begin_remote(namespace, lease.id(), &plans, &name).await?;
        let had = Remote::had(&remote, &plans);
        let layers = layers.into_iter().filter(|layer| !had.contains(&layer.digest)).collect();
        let unpack = self.unpack(namespace, lease.id(), plans, true, progress);
        // the first error ends all
        tokio::try_join!(fetch_all(&fetching, layers), unpack, self.finish_remote(remote, true, progress))?;
        let tree = tree.without(&had);
        let target = tree.nodes.first().map_or(root, |node| node.descriptor.clone());
        let mut images = wanted.whole(&target);
        if images.is_empty() {
            let wanted = Wanted { name: name.clone(), ..wanted.clone() };
            images = wanted.whole(&target);
        }
        let reference = pull.registry.reference();
        let origin = Origin { host: reference.host.clone(), repository: reference.repository.clone() };
        let names: Vec<_> = images.iter().map(|image| image.name.clone()).collect();
        self.record(namespace, &tree, Some(origin), images, pull.place.lease.as_deref()).await?;
        debug!(image = name, digest:% = target.digest, blobs = tree.nodes.len(); "image pulled");
        for name in names {
            progress.image(word::SAVED, &name, &target);
        }
        progress.overall(format!("Completed pull from {source}"));
        Ok(target)
    }
}

/// Fetches blobs, at the same time as far as the limit on downloads allows. The first error ends all.
async fn fetch_all(fetching: &Fetching, parts: Vec<&Descriptor>) -> Result<()> {
    // when it is dropped, all end
    let mut tasks = JoinSet::new();
    for part in parts {
        let (fetching, part) = (fetching.clone(), part.clone());
        tasks.spawn(async move { fetching.fetch(&part).await });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap_or_else(|source| Err(Error::Panicked { what: "a download", source }))?;
    }
    Ok(())
}
