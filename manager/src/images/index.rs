//! The index of an archive that is imported: its own, or one that is made of the manifest.json of `docker save`.

use std::collections::HashMap;

use hyper::body::Bytes;
use serde::{Deserialize, Serialize};

use super::document::{Configuration, DOCKER_CONFIG, DOCKER_MANIFEST, Descriptor, Document, MOST_CHILDREN, OCI_INDEX, RawDescriptor};
use super::import::Contents;
use super::names::{IMAGE_NAME, REF_NAME, normalized, tag};
use super::tree::Documents as _;
use super::{Transfers, of};
use crate::content::{Digest, Opening};
use crate::error::{Error, Object, Result};
use crate::name::Namespace;

impl Transfers {
    /// The index of an archive: its own, or one that is made.
    pub(super) async fn index(&self, namespace: &Namespace, lease: &str, contents: &Contents, compresses: bool) -> Result<Descriptor> {
        let Some(layout) = contents.documents.get("oci-layout") else {
            return match contents.documents.get("manifest.json") {
                Some(manifest) => self.of_docker(namespace, lease, contents, manifest, compresses).await,
                None => Err(Error::Invalid(
                    "the archive has neither index.json and oci-layout nor manifest.json: it is no archive of images".to_owned(),
                )),
            };
        };
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Layout {
            image_layout_version: String,
        }
        let wrong = |error| Error::Invalid(format!("oci-layout of the archive: {error}"));
        let Layout { image_layout_version: version } = serde_json::from_slice(layout).map_err(wrong)?;
        if version != LAYOUT_VERSION {
            let shown: String = version.chars().take(20).collect();
            return Err(Error::Invalid(format!("an OCI layout of version {shown}; {LAYOUT_VERSION} is supported")));
        }
        let index = contents.documents.get("index.json");
        let index = index.ok_or_else(|| Error::Invalid("the archive has oci-layout, and no index.json".to_owned()))?;
        self.put(namespace, lease, OCI_INDEX, index.clone()).await
    }

    /// Makes the manifests and the index that `docker save` has not written before its version 25.
    async fn of_docker(
        &self,
        namespace: &Namespace,
        lease: &str,
        contents: &Contents,
        manifest: &[u8],
        compresses: bool,
    ) -> Result<Descriptor> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Saved {
            config: String,
            repo_tags: Option<Vec<String>>,
            layers: Option<Vec<String>>,
        }
        let wrong = |error| Error::Invalid(format!("manifest.json of the archive: {error}"));
        let saved: Vec<Saved> = serde_json::from_slice(manifest).map_err(wrong)?;
        let missing = |path: &str| {
            let shown: String = path.chars().take(200).collect();
            Error::Invalid(format!("manifest.json of the archive names {shown:?}, which the archive does not have"))
        };
        let mut entries = Vec::new();
        let mut compressed: HashMap<Digest, (Digest, u64)> = HashMap::new();
        for image in saved {
            let config = contents.find(&image.config).ok_or_else(|| missing(&image.config))?;
            let config = Descriptor::new(DOCKER_CONFIG, config.digest.clone(), config.size);
            let mut layers = Vec::new();
            let (paths, names) = (image.layers.unwrap_or_default(), image.repo_tags.unwrap_or_default());
            // no document that is made of more could be read
            if paths.len() > MOST_CHILDREN || entries.len() + names.len().max(1) > MOST_CHILDREN {
                return Err(Error::Invalid(format!(
                    "manifest.json of the archive has more than {MOST_CHILDREN} layers of an image, or names"
                )));
            }
            for path in paths {
                let layer = contents.find(&path).ok_or_else(|| missing(&path))?;
                let media_type = layer_type(&layer.magic);
                let layer = if compresses && media_type == PLAIN_LAYER {
                    // images share layers
                    let (digest, size) = match compressed.get(&layer.digest) {
                        Some(done) => done.clone(),
                        None => self.compress(namespace, lease, &layer.digest).await?,
                    };
                    compressed.insert(layer.digest.clone(), (digest.clone(), size));
                    Descriptor::new(GZIP_LAYER, digest, size)
                } else {
                    Descriptor::new(media_type, layer.digest.clone(), layer.size)
                };
                layers.push(RawDescriptor::from(&layer));
            }
            let manifest = NewDocument {
                schema_version: 2,
                media_type: DOCKER_MANIFEST,
                config: Some(RawDescriptor::from(&config)),
                layers: Some(layers),
                manifests: None,
            };
            let mut entry = self.put(namespace, lease, DOCKER_MANIFEST, json(&manifest)?).await?;
            let bytes = self.stored(namespace).read(&config).await?.ok_or_else(|| missing(&image.config))?;
            entry.platform = Configuration::parse(&bytes).map_err(of(&config.digest))?.platform;
            if names.is_empty() {
                entries.push(RawDescriptor::from(&entry));
            }
            for name in names {
                let whole = normalized(&name);
                entry.annotations.insert(REF_NAME.to_owned(), tag(&whole));
                entry.annotations.insert(IMAGE_NAME.to_owned(), whole);
                entries.push(RawDescriptor::from(&entry));
            }
        }
        let index = NewDocument { schema_version: 2, media_type: OCI_INDEX, config: None, layers: None, manifests: Some(entries) };
        self.put(namespace, lease, OCI_INDEX, json(&index)?).await
    }

    /// What an index of an archive leads to itself.
    pub(super) async fn entries(&self, namespace: &Namespace, index: &Descriptor) -> Result<Vec<Descriptor>> {
        let gone = || Error::NotFound(Object::ContentDigest(index.digest.to_string()));
        let bytes = self.stored(namespace).read(index).await?.ok_or_else(gone)?;
        match Document::parse(&bytes, &index.media_type).map_err(of(&index.digest))?.0 {
            Document::Index(entries) => Ok(entries),
            Document::Manifest { .. } => Ok(vec![index.clone()]),
        }
    }

    /// Makes content of a document.
    async fn put(&self, namespace: &Namespace, lease: &str, media_type: &str, bytes: Vec<u8>) -> Result<Descriptor> {
        let descriptor = Descriptor::new(media_type, Digest::of_bytes(&bytes), bytes.len() as u64);
        let opening = Opening {
            namespace: namespace.clone(),
            reference: descriptor.reference(),
            total: descriptor.size,
            expected: Some(descriptor.digest.clone()),
            lease: Some(lease.to_owned()),
        };
        let mut writer = match self.open(&opening).await {
            Err(Error::AlreadyExists(_)) => return Ok(descriptor),
            writer => writer?,
        };
        if writer.progress()?.offset != descriptor.size {
            writer.truncate().await?;
            writer.write(Bytes::from(bytes)).await?;
        }
        match writer.commit(descriptor.size, Some(&descriptor.digest), HashMap::new()).await {
            Ok(_) | Err(Error::AlreadyExists(_)) => Ok(descriptor),
            Err(error) => Err(error),
        }
    }
}

/// A document that is written.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NewDocument {
    schema_version: u8,
    media_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    config: Option<RawDescriptor>,
    #[serde(skip_serializing_if = "Option::is_none")]
    layers: Option<Vec<RawDescriptor>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    manifests: Option<Vec<RawDescriptor>>,
}

fn json(document: &NewDocument) -> Result<Vec<u8>> {
    serde_json::to_vec(document).map_err(|error| Error::Invalid(format!("the index of the archive: {error}")))
}

/// By its first bytes.
fn layer_type(magic: &[u8]) -> &'static str {
    match magic {
        [0x1f, 0x8b, ..] => GZIP_LAYER,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "application/vnd.docker.image.rootfs.diff.tar.zstd",
        _ => PLAIN_LAYER,
    }
}

pub(super) const LAYOUT_VERSION: &str = "1.0.0";
const PLAIN_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
const GZIP_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
