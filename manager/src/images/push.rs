//! Pushing: an image to a registry, blobs before the documents that lead to them, and the name last.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use hyper::body::Bytes;
use log::debug;
use tokio::task::JoinSet;

use super::Transfers;
use super::document::Descriptor;
use super::lease::{Lease, Place};
use super::platform::Platforms;
use super::progress::{Progress, word};
use super::record::Origin;
use super::registry::{Pushed, Registry, Source};
use super::tree::{Documents as _, Selection, Tree};
use crate::content::{Blob, not_found};
use crate::error::{Error, Object, Result};
use crate::name::Namespace;
use crate::pools::Pool;

/// What to push.
#[derive(Debug)]
pub(crate) struct Push {
    pub(crate) place: Place,
    /// In the store.
    pub(crate) name: String,
    /// What of it: everything, or the manifest for one platform.
    pub(crate) platforms: Platforms,
    pub(crate) registry: Registry,
    pub(crate) progress: Progress,
}

/// A push under way.
#[derive(Debug, Clone)]
struct Pushing {
    transfers: Arc<Transfers>,
    namespace: Namespace,
    registry: Registry,
    progress: Progress,
}

/// A blob that is read when it is sent.
#[derive(Debug)]
struct Reading {
    blob: Blob,
    pool: Pool,
}

#[async_trait]
impl Source for Reading {
    async fn read(&self, offset: u64, most: usize) -> Result<Bytes> {
        let blob = self.blob.clone();
        self.pool.run(move || blob.blocking_read(offset, most)).await?.map(Bytes::from)
    }
}

impl Transfers {
    /// Pushes an image. It ends with its caller; what a registry has by then it has.
    pub(crate) async fn push(self: &Arc<Self>, lease: &Lease, push: Push) -> Result<()> {
        let Push { place, name, platforms, registry, progress } = push;
        let destination = format!("OCI Registry ({})", registry.reference());
        let target = self.target(&place.namespace, &name).await?;
        lease.hold(&target.digest).await?;
        let root = self.part_for(&place.namespace, &name, target, &platforms).await?;
        progress.overall(format!("Pushing to {destination}"));
        progress.image("pushing content", &name, &root);
        let found = |part: &Descriptor, parents: &[String]| {
            progress.waits(part, if parents.is_empty() { std::slice::from_ref(&name) } else { parents });
        };
        let all = Selection::default();
        let tree = Tree::follow(&self.stored(&place.namespace), &root, &all, found).await.map_err(|error| incomplete(&name, error))?;
        let pushing = Pushing {
            transfers: Arc::clone(self),
            namespace: place.namespace.clone(),
            registry: registry.clone(),
            progress: progress.clone(),
        };
        pushing.blobs(&name, &tree).await?;
        // documents come before what they lead to
        let tag = registry.reference().tag.clone();
        for node in tree.nodes.iter().rev().filter(|node| node.is_document) {
            let document = &node.descriptor;
            let bytes = self.stored(&place.namespace).read(document).await?.ok_or_else(|| not_found(&document.digest))?;
            let tag = tag.as_deref().filter(|_| document.digest == root.digest);
            let pushed = registry.push_manifest(&document.to_registry(), bytes, tag).await?;
            progress.part(done(pushed), document, document.size);
        }
        debug!(image = name, to:% = registry.reference(), blobs = tree.nodes.len(); "image pushed");
        progress.image("pushed content", &name, &root);
        progress.overall(format!("Completed push to {destination}"));
        Ok(())
    }

    /// The part of an image that is for a platform, if one is asked for; else all of it.
    async fn part_for(&self, namespace: &Namespace, name: &str, target: Descriptor, platforms: &Platforms) -> Result<Descriptor> {
        if platforms.are_all() {
            return Ok(target);
        }
        if platforms.count() > 1 {
            return Err(Error::Invalid("an image is pushed for all platforms, or for one".to_owned()));
        }
        let selection = Selection { platforms: platforms.clone(), ..Selection::default() };
        let tree = Tree::follow(&self.stored(namespace), &target, &selection, |_, _| ()).await.map_err(|error| incomplete(name, error))?;
        let chosen = self.choose(namespace, &tree, platforms).await?;
        let manifest = chosen.first().ok_or_else(|| Error::Invalid(format!("image {name} has nothing for {platforms}")))?;
        Ok(manifest.descriptor.clone())
    }
}

impl Pushing {
    /// Pushes everything that is no document, several at the same time.
    async fn blobs(&self, name: &str, tree: &Tree) -> Result<()> {
        // all are there, or the registry gets none
        let mut parts = Vec::new();
        for node in tree.leaves() {
            let part = &node.descriptor;
            match self.transfers.content.info(&self.namespace, &part.digest).await {
                Ok(info) => parts.push((part.clone(), info.labels)),
                // registries leave it to other hosts
                Err(_) if !part.urls.is_empty() => {}
                Err(error) => return Err(incomplete(name, error)),
            }
        }
        // when it is dropped, all end
        let mut tasks = JoinSet::new();
        for (part, labels) in parts {
            let this = self.clone();
            tasks.spawn(async move { this.blob(&part, &labels).await });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap_or_else(|source| Err(Error::Panicked { what: "an upload", source }))?;
        }
        Ok(())
    }

    async fn blob(&self, part: &Descriptor, labels: &HashMap<String, String>) -> Result<()> {
        // the semaphore is never closed
        let _place = self.transfers.uploads.acquire().await;
        let reference = self.registry.reference();
        let mounts = mounts(labels, &reference.host, &reference.repository);
        let blob = self.transfers.content.read(&self.namespace, &part.digest).await?;
        let source = Reading { blob, pool: self.transfers.pool.clone() };
        let report = |bytes: u64| self.progress.part(word::UPLOADING, part, bytes);
        let pushed = self.registry.push(&part.to_registry(), &mounts, &source, &report).await?;
        self.progress.part(done(pushed), part, part.size);
        Ok(())
    }
}

fn done(pushed: Pushed) -> &'static str {
    match pushed {
        Pushed::Exists => word::EXISTS,
        Pushed::Mounted | Pushed::Uploaded => word::COMPLETE,
    }
}

/// Other repositories of the registry that may have a blob.
fn mounts(labels: &HashMap<String, String>, host: &str, repository: &str) -> Vec<String> {
    let known = labels.get(&Origin::label(host)).map(String::as_str).unwrap_or_default();
    known.split(',').filter(|known| !known.is_empty() && *known != repository).take(MOST_MOUNTS).map(ToOwned::to_owned).collect()
}

/// Says which part is missing, and what to do.
fn incomplete(name: &str, error: Error) -> Error {
    match error {
        Error::NotFound(Object::ContentDigest(digest)) => Error::Precondition(format!(
            "image {name} is incomplete: the store does not have {digest}; pull it for all platforms, or push one platform"
        )),
        error => error,
    }
}

/// That are tried.
const MOST_MOUNTS: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_is_mounted_from_other_repositories_of_the_same_registry() {
        let labels = [("containerd.io/distribution.source.h:5000".to_owned(), "a,b/c,d".to_owned())].into();
        assert_eq!(mounts(&labels, "h:5000", "a"), ["b/c", "d"]);
        assert!(mounts(&labels, "h", "a").is_empty() && mounts(&HashMap::new(), "h:5000", "a").is_empty());
    }
}
