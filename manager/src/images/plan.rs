//! What is to be unpacked, from an image's manifest and config.
//!
//! **Invariant:** both are bounded before they are read, and every digest in them is one.

use serde::Deserialize;

use crate::content::{Content, Digest};
use crate::error::{Error, Result};
use crate::name::Namespace;

/// An image whose layers can be unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) config: Digest,
    /// The lowest first.
    pub(crate) layers: Vec<Layer>,
}

/// A layer of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layer {
    /// Of the blob, compressed or not.
    pub(crate) blob: Digest,
    /// Of the blob.
    pub(crate) bytes: u64,
    /// Of the uncompressed layer, as the config says.
    pub(crate) diff_id: Digest,
    /// Of this layer and those below: the key of its snapshot.
    pub(crate) chain: Digest,
}

/// What is used of a manifest.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
    /// Those of an index.
    manifests: Option<serde::de::IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    #[serde(default)]
    size: u64,
}

/// What is used of a config.
#[derive(Debug, Deserialize)]
struct Config {
    rootfs: Option<Rootfs>,
}

#[derive(Debug, Deserialize)]
struct Rootfs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

impl Plan {
    /// The one of a manifest. Both it and its config must be in the content store.
    ///
    /// Errors: [`Error::NotFound`]; [`Error::Invalid`] if it is none of an image.
    pub(crate) async fn read(content: &Content, namespace: &Namespace, manifest: &Digest) -> Result<Self> {
        let (document, of) = (document(content, namespace, manifest, "manifest").await?, manifest.clone());
        // megabytes of JSON would keep the executor
        let (config, layers) = content.run(move || layers_of(&of, &document)).await?;
        let document = self::document(content, namespace, &config, "config").await?;
        content.run(move || Self::of(config, layers, &document)).await
    }

    /// The same, of documents that are at hand.
    #[cfg(any(test, fuzzing))]
    pub(super) fn of_documents(name: &Digest, manifest: &[u8], config: &[u8]) -> Result<Self> {
        let (of, layers) = layers_of(name, manifest)?;
        Self::of(of, layers, config)
    }

    fn of(config: Digest, layers: Vec<Descriptor>, document: &[u8]) -> Result<Self> {
        let parsed: Config = serde_json::from_slice(document).map_err(|error| Error::Invalid(format!("config {config}: {error}")))?;
        let diff_ids = parsed.rootfs.map(|rootfs| rootfs.diff_ids).unwrap_or_default();
        if diff_ids.len() != layers.len() {
            return Err(Error::Invalid(format!("config {config} has {} diff_ids for {} layers", diff_ids.len(), layers.len())));
        }
        let mut planned: Vec<Layer> = Vec::with_capacity(layers.len());
        for (layer, diff_id) in layers.into_iter().zip(diff_ids) {
            let (blob, diff_id) = (Digest::parse(&layer.digest)?, Digest::parse(&diff_id)?);
            let chain = chain(planned.last().map(|below| &below.chain), &diff_id);
            planned.push(Layer { blob, bytes: layer.size, diff_id, chain });
        }
        Ok(Self { config, layers: planned })
    }
}

/// The config that a blob names, if that is the manifest of an image, and no longer than those of images are.
pub(crate) async fn config_of(content: &Content, namespace: &Namespace, digest: &Digest) -> Result<Option<Digest>> {
    let blob = content.read(namespace, digest).await?;
    let Some(size) = usize::try_from(blob.size).ok().filter(|size| *size <= LOOKED_AT_BYTES) else { return Ok(None) };
    let of = digest.clone();
    let found = content.run(move || {
        // most small blobs are no JSON
        if !blob.blocking_read(0, BEGIN_BYTES)?.trim_ascii_start().starts_with(b"{") {
            return Ok(None);
        }
        Ok(layers_of(&of, &blob.blocking_read(0, size)?).ok().map(|(config, _layers)| config))
    });
    found.await
}

fn layers_of(manifest: &Digest, document: &[u8]) -> Result<(Digest, Vec<Descriptor>)> {
    let invalid = |why: &str| Error::Invalid(format!("manifest {manifest} {why}"));
    let parsed: Manifest = serde_json::from_slice(document).map_err(|error| invalid(&format!("cannot be read: {error}")))?;
    if parsed.manifests.is_some() {
        return Err(invalid("is an index, which is not unpacked itself"));
    }
    let config = parsed.config.ok_or_else(|| invalid("has no config"))?;
    if parsed.layers.len() > MOST_LAYERS {
        return Err(invalid(&format!("has {} layers; the most is {MOST_LAYERS}", parsed.layers.len())));
    }
    for layer in &parsed.layers {
        if !is_tar(&layer.media_type) {
            let (digest, kind): (String, String) =
                (layer.digest.chars().take(SHOWN).collect(), layer.media_type.chars().take(SHOWN).collect());
            return Err(invalid(&format!("has the layer {digest} of type {kind:?}, which is no archive of files")));
        }
    }
    Ok((Digest::parse(&config.digest)?, parsed.layers))
}

/// The key of a layer's snapshot.
fn chain(below: Option<&Digest>, diff_id: &Digest) -> Digest {
    below.map_or_else(|| diff_id.clone(), |below| Digest::of_text(&format!("{below} {diff_id}")))
}

/// What is compressed how is found out by its first bytes.
fn is_tar(media_type: &str) -> bool {
    let is_known = |prefix: &str, suffixes: &[&str]| media_type.strip_prefix(prefix).is_some_and(|suffix| suffixes.contains(&suffix));
    is_known("application/vnd.oci.image.layer.v1.tar", &["", "+gzip", "+zstd"])
        || is_known("application/vnd.oci.image.layer.nondistributable.v1.tar", &["", "+gzip", "+zstd"])
        || is_known("application/vnd.docker.image.rootfs.diff.tar", &["", ".gzip", ".zstd"])
        || is_known("application/vnd.docker.image.rootfs.foreign.diff.tar", &["", ".gzip", ".zstd"])
}

/// All of a small blob.
pub(crate) async fn document(content: &Content, namespace: &Namespace, digest: &Digest, what: &str) -> Result<Vec<u8>> {
    let blob = content.read(namespace, digest).await?;
    let size = usize::try_from(blob.size).ok().filter(|size| *size <= MOST_BYTES);
    let size = size.ok_or_else(|| Error::Invalid(format!("{what} {digest} has {} bytes; the most is {MOST_BYTES}", blob.size)))?;
    content.run(move || blob.blocking_read(0, size)).await
}

/// Of a manifest or a config.
pub(crate) const MOST_BYTES: usize = 8 << 20;
/// Of a blob that is looked at since it may be a manifest. Those of images with a thousand layers have a quarter of it.
pub(crate) const LOOKED_AT_BYTES: usize = 1 << 20;
/// What is looked at to tell JSON from other data.
const BEGIN_BYTES: usize = 64;
/// More than overlays can have.
const MOST_LAYERS: usize = 1000;
/// Characters of what a manifest has where something else should be.
const SHOWN: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(digit: char) -> String {
        format!("sha256:{}", digit.to_string().repeat(64))
    }

    fn plan(manifest: &str, config: &str) -> Result<Plan> {
        let name = Digest::parse(&digest('0')).expect("a digest");
        Plan::of_documents(&name, manifest.as_bytes(), config.as_bytes())
    }

    fn manifest(layers: &[(&str, char)]) -> String {
        let layers: Vec<_> =
            layers.iter().map(|(kind, digit)| format!(r#"{{"mediaType":"{kind}","digest":"{}","size":7}}"#, digest(*digit))).collect();
        format!(r#"{{"config":{{"digest":"{}","size":1}},"layers":[{}]}}"#, digest('c'), layers.join(","))
    }

    fn config(diff_ids: &[char]) -> String {
        let ids: Vec<_> = diff_ids.iter().map(|digit| format!("{:?}", digest(*digit))).collect();
        format!(r#"{{"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#, ids.join(","))
    }

    const TAR: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

    #[test]
    fn a_plan_has_chain_ids_as_containerd_computes_them() {
        let found = plan(&manifest(&[(TAR, 'a'), (TAR, 'b'), (TAR, 'a')]), &config(&['1', '2', '1'])).expect("an image");
        assert_eq!(found.config.as_str(), digest('c'));
        let chains: Vec<_> = found.layers.iter().map(|layer| layer.chain.as_str()).collect();
        assert_eq!(chains[0], digest('1'), "the lowest is its diffID");
        assert_eq!(chains[1], Digest::of_text(&format!("{} {}", digest('1'), digest('2'))).as_str());
        assert_eq!(
            chains[2],
            Digest::of_text(&format!("{} {}", chains[1], digest('1'))).as_str(),
            "the same layer again is another snapshot"
        );
        assert_eq!(found.layers[2].blob, found.layers[0].blob);
    }

    #[test]
    fn an_image_may_have_no_layers() {
        assert!(plan(&manifest(&[]), &config(&[])).expect("an image").layers.is_empty());
        assert!(plan(&manifest(&[]), "{}").expect("an image").layers.is_empty());
    }

    #[test]
    fn what_cannot_be_unpacked_is_refused_with_a_reason() {
        let refused = |manifest: &str, config: &str| plan(manifest, config).expect_err(manifest).to_string();
        assert!(refused(&manifest(&[(TAR, 'a')]), &config(&['1', '2'])).contains("2 diff_ids for 1 layers"));
        assert!(refused(&manifest(&[("application/x-chart", 'a')]), &config(&['1'])).contains("no archive"));
        assert!(refused(r#"{"manifests":[]}"#, "").contains("index"));
        assert!(refused(r#"{"layers":[]}"#, "").contains("no config"));
        assert!(refused(&manifest(&[(TAR, 'a')]), r#"{"rootfs":{"diff_ids":["sha256:../x"]}}"#).contains("invalid digest"));
        assert!(refused("[", "").contains("cannot be read"));
    }
}
