//! Records of images: names that lead to content, and the labels by which the collector follows them.

use std::collections::HashMap;
use std::sync::Arc;

use containerd_client::services::v1::{Image, ImageCreate, ImageUpdate};

use super::Transfers;
use super::document::Descriptor;
use super::lease::EXPIRE;
use super::tree::Tree;
use crate::content::{Digest, hold, not_found};
use crate::error::{Error, Object, Result};
use crate::name::{self, Namespace};
use crate::store::{Meta, blobs, images, namespaces};
use crate::timestamp;

/// Where blobs came from: a registry's host, and a repository there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) host: String,
    pub(super) repository: String,
}

impl Origin {
    /// The label of a blob with the repositories of a host that have it.
    pub(super) fn label(host: &str) -> String {
        format!("{DISTRIBUTION_SOURCE}.{host}")
    }

    /// The label's value with this one added, unless there is no room for it.
    fn add_to(&self, labels: &mut HashMap<String, String>) -> bool {
        let key = Self::label(&self.host);
        let mut repositories: Vec<_> = labels.get(&key).map(|old| old.split(',').collect()).unwrap_or_default();
        if repositories.contains(&self.repository.as_str()) {
            return false;
        }
        repositories.push(&self.repository);
        repositories.sort_unstable();
        let value = repositories.join(",");
        let has_room = key.len() + value.len() <= MOST_LABEL_BYTES;
        if has_room {
            labels.insert(key, value);
        }
        has_room
    }
}

/// Writes the record of an image. The lease holds it if it expires; others need none, as with containerd, which does not look for it then.
pub(crate) fn put(db: &mut Meta<'_>, namespace: &str, image: &Image, lease: Option<&str>) -> Result<()> {
    images::put(db, namespace, &image.name, image)?;
    images::note_target(db, namespace, image)?;
    hold(db, namespace, lease.filter(|_| image.labels.contains_key(EXPIRE)), IMAGES, &image.name)
}

/// Refuses what cannot be an image's record.
pub(crate) fn validate(image: &Image) -> Result<()> {
    if image.name.len() > MAX_NAME_BYTES {
        return Err(Error::Invalid(format!("an image name of {} bytes; the maximum is {MAX_NAME_BYTES}", image.name.len())));
    }
    name::labels(&image.labels)?;
    let target = image.target.clone().unwrap_or_default();
    if Digest::of(&target.digest).is_none() {
        let shown: String = target.digest.chars().take(200).collect();
        return Err(Error::Invalid(format!("Target.Digest {shown:?} invalid: invalid digest")));
    }
    if target.size <= 0 {
        return Err(Error::Invalid("Target.Size must be greater than zero".to_owned()));
    }
    if target.media_type.is_empty() {
        return Err(Error::Invalid("Target.MediaType must be set".to_owned()));
    }
    name::labels(&target.annotations)
}

impl Transfers {
    /// The target of an image.
    pub(super) async fn target(&self, namespace: &Namespace, name: &str) -> Result<Descriptor> {
        let (place, id) = (namespace.clone(), name.to_owned());
        let get = move |db: &Meta<'_>| images::get(db, place.as_str(), &id)?.ok_or(Error::NotFound(Object::Image(id)));
        Descriptor::from_wire(&self.store.read(get).await?.target.unwrap_or_default())
    }

    /// Labels what an image consists of, and names it, all at once. A name that is taken leads here then.
    ///
    /// Errors: nothing has changed; [`Error::NotFound`] if a part of the image is not there.
    pub(super) async fn record(
        self: &Arc<Self>,
        namespace: &Namespace,
        tree: &Tree,
        origin: Option<Origin>,
        named: Vec<Image>,
        lease: Option<&str>,
    ) -> Result<()> {
        for image in &named {
            if image.name.is_empty() {
                return Err(Error::Invalid("image name is required for create".to_owned()));
            }
            validate(image)?;
        }
        let nodes: Vec<_> = tree.nodes.iter().map(|node| (node.descriptor.digest.clone(), node.labels.clone())).collect();
        let (place, now, lease) = (namespace.clone(), Some(timestamp::now()), lease.map(ToOwned::to_owned));
        let write = move |db: &mut Meta<'_>| {
            namespaces::ensure(db, place.as_str())?;
            for (digest, labels) in nodes {
                let mut info = blobs::get(db, place.as_str(), digest.as_str())?.ok_or_else(|| not_found(&digest))?;
                let is_new = labels.iter().any(|(key, value)| info.labels.get(key) != Some(value));
                info.labels.extend(labels);
                let has_origin = origin.as_ref().is_some_and(|origin| origin.add_to(&mut info.labels));
                if is_new || has_origin {
                    info.updated_at = now;
                    blobs::put(db, place.as_str(), digest.as_str(), &info)?;
                }
            }
            let mut done = Vec::with_capacity(named.len());
            for mut image in named {
                let old = images::get(db, place.as_str(), &image.name)?;
                image.created_at = old.as_ref().map_or(now, |old| old.created_at);
                image.updated_at = now;
                // the client's own lease may hold more than this transfer
                put(db, place.as_str(), &image, lease.as_deref())?;
                done.push((image, old.is_some()));
            }
            Ok(done)
        };
        let pass = self.gate.enter().await?;
        let done = self.store.write(write).await?;
        drop(pass);
        for (image, was_there) in done {
            let Image { name, labels, .. } = image;
            if was_there {
                self.events.publish(namespace, "/images/update", &ImageUpdate { name, labels });
                // it may have led elsewhere before
                self.collector.removed();
            } else {
                self.events.publish(namespace, "/images/create", &ImageCreate { name, labels });
            }
        }
        Ok(())
    }
}

/// References are shorter.
const MAX_NAME_BYTES: usize = 4096;
/// Of key and value.
const MOST_LABEL_BYTES: usize = 4096;
/// The kind of resource that a lease holds images as.
pub(crate) const IMAGES: &str = "images";
const DISTRIBUTION_SOURCE: &str = "containerd.io/distribution.source";

#[cfg(test)]
pub(super) mod tests {
    use containerd_client::types::Descriptor as Wire;

    use super::*;

    /// One with everything.
    pub(crate) fn image() -> Image {
        let target = Wire {
            digest: format!("sha256:{}", "0f".repeat(32)),
            size: 7,
            media_type: "application/vnd.oci.image.index.v1+json".to_owned(),
            annotations: [("a".to_owned(), "1".to_owned())].into(),
        };
        Image { name: "i".to_owned(), labels: [("a".to_owned(), "1".to_owned())].into(), target: Some(target), ..Image::default() }
    }

    #[test]
    fn what_no_image_can_be_is_refused() {
        assert!(validate(&image()).is_ok());
        let with = |change: fn(&mut Wire)| {
            let mut image = image();
            change(image.target.get_or_insert_default());
            image
        };
        for bad in [
            Image { target: None, ..image() },
            Image { labels: [("k".to_owned(), "v".repeat(5000))].into(), ..image() },
            Image { name: "n".repeat(5000), ..image() },
            with(|target| target.digest = "sha256:../x".to_owned()),
            with(|target| target.size = 0),
            with(|target| target.media_type.clear()),
        ] {
            assert_eq!(validate(&bad).expect_err("bad").code(), tonic::Code::InvalidArgument);
        }
    }

    #[test]
    fn a_blob_keeps_the_repositories_that_have_it_as_long_as_there_is_room() {
        let mut labels = HashMap::new();
        let origin = |repository: &str| Origin { host: "h:5000".to_owned(), repository: repository.to_owned() };
        assert!(origin("b").add_to(&mut labels) && origin("a/c").add_to(&mut labels));
        assert!(!origin("b").add_to(&mut labels), "nothing changes");
        assert_eq!(labels["containerd.io/distribution.source.h:5000"], "a/c,b");
        for number in 0..200 {
            origin(&format!("{number:03}-{}", "x".repeat(50))).add_to(&mut labels);
        }
        assert!(name::labels(&labels).is_ok());
    }
}
