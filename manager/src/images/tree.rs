//! What an image consists of: its documents, followed from the root, and the blobs that they lead to.
//!
//! **Invariants:** depth and number of what is followed are bounded. A digest is followed once, so that no cycle and no repetition costs more.

use std::collections::{HashMap, HashSet, VecDeque};

use hyper::body::Bytes;

use super::document::{Configuration, DOCUMENT_BYTES, Descriptor, Document, Kind};
use super::platform::{Platform, Platforms};
use super::{Transfers, of};
use crate::content::{Content, Digest, not_found};
use crate::error::{Error, Object, Result};
use crate::name::Namespace;
use crate::pools::Pool;

/// Where documents are read.
pub(super) trait Documents: Sync {
    /// A document; none if it is not there.
    fn read(&self, descriptor: &Descriptor) -> impl Future<Output = Result<Option<Bytes>>> + Send;
}

/// What of an image to follow.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Selection {
    pub(crate) platforms: Platforms,
    /// Manifests and configurations of other platforms, too.
    pub(crate) all_metadata: bool,
    /// The most manifests of an index; 0 for any number.
    pub(crate) manifest_limit: usize,
    /// Whether manifests that are not there are left out, as long as one is.
    pub(crate) skips_missing: bool,
}

/// A document or blob of an image.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    pub(super) descriptor: Descriptor,
    pub(super) is_document: bool,
    /// For the collector.
    pub(super) labels: HashMap<String, String>,
}

/// The manifest of an image for one platform.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Manifest {
    pub(super) descriptor: Descriptor,
    pub(super) config: Option<Descriptor>,
    pub(super) layers: Vec<Descriptor>,
    /// The image that it belongs to: an entry of the root, or the root itself.
    pub(super) top: Digest,
}

/// An image, or several under one index.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Tree {
    /// Each once, documents before what they lead to.
    pub(super) nodes: Vec<Node>,
    /// Those whose layers were asked for, in the order of preference.
    pub(super) manifests: Vec<Manifest>,
}

/// What is still to be followed.
struct Step {
    descriptor: Descriptor,
    parents: Vec<String>,
    depth: usize,
    /// Without its layers.
    is_metadata: bool,
    top: Option<Digest>,
}

impl Tree {
    /// Follows an image from its root. `found` learns of each part when it is met, with the names of what leads to it.
    pub(super) async fn follow(
        documents: &impl Documents,
        root: &Descriptor,
        selection: &Selection,
        mut found: impl FnMut(&Descriptor, &[String]) + Send,
    ) -> Result<Self> {
        let mut tree = Self::default();
        let mut seen: HashSet<Digest> = HashSet::new();
        let first = Step { descriptor: root.clone(), parents: Vec::new(), depth: 0, is_metadata: false, top: None };
        let mut steps = VecDeque::from([first]);
        let mut room = ALL_DOCUMENTS_BYTES;
        while let Some(step) = steps.pop_front() {
            let Step { descriptor, parents, depth, is_metadata, top } = step;
            if depth > DEEPEST {
                return Err(Error::Invalid(format!("indexes within indexes, more than {DEEPEST} deep: {}", descriptor.digest)));
            }
            if !seen.insert(descriptor.digest.clone()) {
                continue;
            }
            if seen.len() + steps.len() > MOST_NODES {
                return Err(Error::Invalid(format!("an image of more than {MOST_NODES} blobs")));
            }
            found(&descriptor, &parents);
            if depth > 0 && !descriptor.kind().is_document() {
                tree.nodes.push(Node { descriptor, is_document: false, labels: HashMap::new() });
                continue;
            }
            let Some(bytes) = documents.read(&descriptor).await? else {
                if depth > 0 && selection.skips_missing {
                    continue;
                }
                return Err(not_found(&descriptor.digest));
            };
            // what they have is held many times over
            room = room
                .checked_sub(bytes.len())
                .ok_or_else(|| Error::Invalid(format!("an image whose documents have more than {ALL_DOCUMENTS_BYTES} bytes")))?;
            let (document, media_type) = Document::parse(&bytes, &descriptor.media_type).map_err(of(&descriptor.digest))?;
            let own = Descriptor { media_type, ..descriptor };
            let reference = vec![own.reference()];
            tree.nodes.push(Node { descriptor: own.clone(), is_document: true, labels: document.labels() });
            match document {
                Document::Index(children) => {
                    let chosen = selection.platforms.choose(children.iter().map(|child| child.platform.as_ref()));
                    let limit = if selection.manifest_limit == 0 { usize::MAX } else { selection.manifest_limit };
                    let chosen: Vec<_> = chosen.into_iter().take(limit).collect();
                    let others = (0..children.len()).filter(|index| selection.all_metadata && !chosen.contains(index));
                    let next = chosen.iter().map(|index| (*index, is_metadata)).chain(others.map(|index| (index, true)));
                    for (index, is_metadata) in next {
                        let descriptor = children[index].clone();
                        let top = top.clone().or_else(|| Some(descriptor.digest.clone()));
                        let parents = reference.clone();
                        steps.push_back(Step { descriptor, parents, depth: depth + 1, is_metadata, top });
                    }
                }
                Document::Manifest { config, layers } => {
                    let leaves = config.iter().chain(layers.iter().filter(|_| !is_metadata));
                    for leaf in leaves {
                        let (descriptor, parents) = (leaf.clone(), reference.clone());
                        // a leaf: what is called a document here is not followed
                        if seen.insert(descriptor.digest.clone()) {
                            found(&descriptor, &parents);
                            tree.nodes.push(Node { descriptor, is_document: false, labels: HashMap::new() });
                        }
                    }
                    if !is_metadata {
                        let top = top.unwrap_or_else(|| own.digest.clone());
                        tree.manifests.push(Manifest { descriptor: own, config, layers, top });
                    }
                }
            }
        }
        Ok(tree)
    }

    /// Without blobs that are not kept here.
    pub(super) fn without(mut self, blobs: &HashSet<Digest>) -> Self {
        self.nodes.retain(|node| !blobs.contains(&node.descriptor.digest));
        self
    }

    /// Its blobs that are no documents.
    pub(super) fn leaves(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| !node.is_document)
    }
}

impl Manifest {
    /// Whether it is an image that can be unpacked: attestations and artifacts are not.
    pub(super) fn can_be_unpacked(&self) -> bool {
        self.config.as_ref().is_some_and(|config| config.kind() == Kind::Config)
            && self.layers.iter().all(|layer| layer.kind() == Kind::Layer)
    }
}

/// Documents in the content store.
#[derive(Debug)]
pub(super) struct Stored<'a> {
    pub(super) content: &'a Content,
    pub(super) pool: &'a Pool,
    pub(super) namespace: &'a Namespace,
}

impl Documents for Stored<'_> {
    async fn read(&self, descriptor: &Descriptor) -> Result<Option<Bytes>> {
        let blob = match self.content.read(self.namespace, &descriptor.digest).await {
            Err(Error::NotFound(Object::ContentDigest(_))) => return Ok(None),
            blob => blob?,
        };
        if blob.size > DOCUMENT_BYTES {
            return Err(Error::Invalid(format!(
                "{} has {} bytes; a document of an image has {DOCUMENT_BYTES} at most",
                descriptor.digest, blob.size
            )));
        }
        let digest = descriptor.digest.clone();
        let read = move || {
            let bytes = blob.blocking_read(0, usize::try_from(blob.size).unwrap_or(usize::MAX))?;
            if !digest.is_of(&bytes) {
                return Err(Error::DataLoss(format!("content {digest} is damaged")));
            }
            Ok(Bytes::from(bytes))
        };
        self.pool.run(read).await?.map(Some)
    }
}

impl Transfers {
    /// Documents of a namespace.
    pub(super) fn stored<'a>(&'a self, namespace: &'a Namespace) -> Stored<'a> {
        Stored { content: &self.content, pool: &self.pool, namespace }
    }

    /// What a manifest is for: what its index says, else its configuration, if that says it.
    pub(super) async fn platform_of(&self, namespace: &Namespace, manifest: &Manifest) -> Result<Option<Platform>> {
        if manifest.descriptor.platform.is_some() {
            return Ok(manifest.descriptor.platform.clone());
        }
        let Some(config) = manifest.config.as_ref().filter(|config| config.kind() == Kind::Config) else { return Ok(None) };
        let bytes = self.stored(namespace).read(config).await?.ok_or_else(|| not_found(&config.digest))?;
        Ok(Configuration::parse(&bytes).map_err(of(&config.digest))?.platform)
    }

    /// The manifests that a platform takes, of each image the nearest; none if all are for others.
    pub(super) async fn choose<'a>(&self, namespace: &Namespace, tree: &'a Tree, platforms: &Platforms) -> Result<Vec<&'a Manifest>> {
        let mut images: Vec<(&Digest, Vec<&Manifest>)> = Vec::new();
        for manifest in tree.manifests.iter().filter(|manifest| manifest.can_be_unpacked()) {
            match images.iter_mut().find(|(top, _)| **top == manifest.top) {
                Some((_, manifests)) => manifests.push(manifest),
                None => images.push((&manifest.top, vec![manifest])),
            }
        }
        let mut chosen = Vec::new();
        for (_, manifests) in images {
            let mut offered = Vec::with_capacity(manifests.len());
            for manifest in &manifests {
                offered.push(self.platform_of(namespace, manifest).await?);
            }
            chosen.extend(platforms.choose(offered.iter().map(Option::as_ref)).into_iter().map(|index| manifests[index]));
        }
        Ok(chosen)
    }
}

/// Of indexes within indexes.
const DEEPEST: usize = 8;
/// Of one image for all its platforms.
const MOST_NODES: usize = 10_000;
/// Of all indexes and manifests of one image. Those with a thousand manifests have a few MiB.
const ALL_DOCUMENTS_BYTES: usize = 32 << 20;

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::document::{OCI_INDEX, OCI_MANIFEST};
    use super::*;

    /// Documents in memory.
    #[derive(Default)]
    struct Memory(HashMap<Digest, Vec<u8>>);

    impl Documents for Memory {
        async fn read(&self, descriptor: &Descriptor) -> Result<Option<Bytes>> {
            Ok(self.0.get(&descriptor.digest).map(|bytes| Bytes::from(bytes.clone())))
        }
    }

    impl Memory {
        fn put(&mut self, media_type: &str, value: &Value) -> Value {
            let bytes = value.to_string().into_bytes();
            let digest = Digest::of_bytes(&bytes);
            let descriptor = json!({ "mediaType": media_type, "digest": digest.as_str(), "size": bytes.len() });
            self.0.insert(digest, bytes);
            descriptor
        }

        fn image(&mut self, number: u8, platform: &str) -> Value {
            let blob = |kind: &str, number: u8| {
                let digest = Digest::of_bytes(&[number]);
                json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest.as_str(), "size": 1 })
            };
            let layers = [blob("layer.v1.tar", number), blob("layer.v1.tar", 255), blob("layer.v1.tar", number)];
            let manifest = json!({ "schemaVersion": 2, "config": blob("config.v1+json", number + 100), "layers": layers });
            let mut descriptor = self.put(OCI_MANIFEST, &manifest);
            if let Some((os, architecture)) = platform.split_once('/') {
                descriptor["platform"] = json!({ "os": os, "architecture": architecture });
            }
            descriptor
        }

        fn index(&mut self, manifests: &[Value]) -> Value {
            self.put(OCI_INDEX, &json!({ "schemaVersion": 2, "manifests": manifests }))
        }

        async fn follow(&self, root: &Value, selection: &Selection) -> Result<Tree> {
            let digest = Digest::parse(root["digest"].as_str().expect("a digest")).expect("a digest");
            Tree::follow(self, &Descriptor::new("", digest, 0), selection, |_, _| ()).await
        }
    }

    fn only(platform: &str) -> Selection {
        let (os, architecture) = platform.split_once('/').expect("a platform");
        Selection { platforms: Platforms::of([Platform::new(os, architecture, "")]), ..Selection::default() }
    }

    #[tokio::test]
    async fn an_image_is_followed_through_nested_indexes_each_digest_once() {
        let mut memory = Memory::default();
        let (amd, arm) = (memory.image(1, "linux/amd64"), memory.image(2, "linux/arm64"));
        let attestation = memory.image(3, "unknown/unknown");
        let inner = memory.index(&[amd.clone(), arm, attestation]);
        let middle = memory.index(&[inner.clone(), inner]);
        let root = memory.index(&[middle, amd]);
        let all = memory.follow(&root, &Selection::default()).await.expect("it is whole");
        // three indexes, three manifests; a configuration and a layer of each, and one layer of all
        assert_eq!((all.nodes.len(), all.manifests.len(), all.leaves().count()), (13, 3, 7));
        let one = memory.follow(&root, &only("linux/amd64")).await.expect("it is whole");
        assert_eq!((one.nodes.len(), one.manifests.len()), (7, 1));
        let none = memory.follow(&root, &only("linux/riscv64")).await.expect("it is whole");
        assert!(none.manifests.is_empty());
        let metadata = memory.follow(&root, &Selection { all_metadata: true, ..only("linux/amd64") }).await.expect("it is whole");
        assert_eq!((metadata.nodes.len(), metadata.manifests.len()), (11, 1));
        let limited = memory.follow(&root, &Selection { manifest_limit: 1, ..Selection::default() }).await.expect("it is whole");
        assert_eq!(limited.manifests.len(), 1);
    }

    /// With a digest that is none of its bytes, which only a broken disk can make, and no store reads.
    #[tokio::test]
    async fn indexes_that_lead_to_each_other_are_followed_once() {
        let mut memory = Memory::default();
        let image = memory.image(1, "");
        let [one, other] = ["one", "other"].map(Digest::of_text);
        for (own, next) in [(&one, &other), (&other, &one)] {
            let next = json!({ "mediaType": OCI_INDEX, "digest": next.as_str(), "size": 1 });
            let index = json!({ "manifests": [next, next, image] }).to_string();
            memory.0.insert(own.clone(), index.into_bytes());
        }
        let root = json!({ "digest": one.as_str() });
        let tree = memory.follow(&root, &Selection::default()).await.expect("it ends");
        // two indexes, one manifest, its configuration and two layers
        assert_eq!((tree.nodes.len(), tree.manifests.len()), (6, 1));
    }

    #[tokio::test]
    async fn documents_are_bounded_together() {
        let mut memory = Memory::default();
        let note = "x".repeat(7 << 20);
        let long = |number: usize| json!({ "layers": [], "annotations": { "note": note, "number": number.to_string() } });
        let manifests: Vec<_> = (0..5).map(|number| memory.put(OCI_MANIFEST, &long(number))).collect();
        let (four, five) = (memory.index(&manifests[..4]), memory.index(&manifests));
        assert_eq!(memory.follow(&four, &Selection::default()).await.expect("there is room").manifests.len(), 4);
        let error = memory.follow(&five, &Selection::default()).await.expect_err("too much").to_string();
        assert!(error.contains("documents have more than"), "{error}");
    }

    #[tokio::test]
    async fn depth_and_number_are_bounded_and_what_is_missing_is_named() {
        let mut memory = Memory::default();
        let mut deep = memory.image(1, "");
        let missing = memory.image(9, "");
        memory.0.retain(|digest, _| digest.as_str() != missing["digest"]);
        let partly = memory.index(&[deep.clone(), missing.clone()]);
        let error = memory.follow(&partly, &Selection::default()).await.expect_err("one is missing").to_string();
        assert!(error.contains(missing["digest"].as_str().expect("a digest")), "{error}");
        let skipping = Selection { skips_missing: true, ..Selection::default() };
        assert_eq!(memory.follow(&partly, &skipping).await.expect("one is there").manifests.len(), 1);
        for level in 0..DEEPEST {
            assert!(memory.follow(&deep, &Selection::default()).await.is_ok(), "{level} deep");
            deep = memory.index(&[deep]);
        }
        assert!(memory.follow(&deep, &Selection::default()).await.is_ok());
        deep = memory.index(&[deep]);
        assert!(memory.follow(&deep, &Selection::default()).await.expect_err("too deep").to_string().contains("deep"));
    }
}
