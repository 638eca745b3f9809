//! Documents: the JSON of which images are made, as far as it is looked at.
//!
//! ```text
//! index ─▶ manifests (or indexes) ─▶ configuration, layers
//! ```
//! **Invariant:** everything that a document names was checked: its digest, its length, and that the document is of one kind. A document that
//! could be read as another kind, too, is refused: two programs would see two images in it.

use std::collections::{BTreeMap, HashMap};

use containerd_client::types::Descriptor as WireDescriptor;
use serde::{Deserialize, Serialize};

use super::platform::Platform;
use crate::content::Digest;
use crate::error::{Error, Result};

/// What a blob is, and which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    /// What an index says that it is for.
    pub(crate) platform: Option<Platform>,
    pub(crate) annotations: HashMap<String, String>,
    /// Of layers that registries leave to other hosts.
    pub(crate) urls: Vec<String>,
}

/// A kind of blob, by its media type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Index,
    Manifest,
    Config,
    Layer,
    /// Signatures, attestations, artifacts and what comes next.
    Other,
}

/// What a document leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Document {
    Index(Vec<Descriptor>),
    Manifest { config: Option<Descriptor>, layers: Vec<Descriptor> },
}

/// What is needed of an image's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Configuration {
    /// What it says that it is for, if it does.
    pub(crate) platform: Option<Platform>,
}

impl Descriptor {
    /// One without anything more.
    pub(crate) fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self { media_type: media_type.to_owned(), digest, size, platform: None, annotations: HashMap::new(), urls: Vec::new() }
    }

    /// What it is.
    pub(crate) fn kind(&self) -> Kind {
        Kind::of(&self.media_type)
    }

    /// Whether its maker alone distributes it, as layers of Windows.
    pub(crate) fn is_non_distributable(&self) -> bool {
        self.kind() == Kind::Layer && (self.media_type.contains("nondistributable") || self.media_type.contains(".foreign."))
    }

    /// What its ingest and its progress are called, as by containerd.
    pub(crate) fn reference(&self) -> String {
        let kind = match self.kind() {
            Kind::Index => "index",
            Kind::Manifest => "manifest",
            Kind::Config => "config",
            Kind::Layer => "layer",
            Kind::Other if self.media_type == "application/vnd.in-toto+json" => "attestation",
            Kind::Other => "unknown",
        };
        format!("{kind}-{}", self.digest)
    }

    /// As the API has it.
    pub(crate) fn to_wire(&self) -> WireDescriptor {
        WireDescriptor {
            media_type: self.media_type.clone(),
            digest: self.digest.to_string(),
            size: i64::try_from(self.size).unwrap_or(i64::MAX),
            annotations: self.annotations.clone(),
        }
    }

    /// From the target of an image.
    pub(crate) fn from_wire(descriptor: &WireDescriptor) -> Result<Self> {
        let size = u64::try_from(descriptor.size).map_err(|_| Error::Invalid(format!("a size of {} bytes", descriptor.size)))?;
        let mut target = Self::new(&descriptor.media_type, Digest::parse(&descriptor.digest)?, size);
        target.annotations.clone_from(&descriptor.annotations);
        Ok(target)
    }
}

impl Kind {
    fn of(media_type: &str) -> Self {
        match media_type {
            OCI_INDEX | DOCKER_INDEX => Self::Index,
            OCI_MANIFEST | DOCKER_MANIFEST => Self::Manifest,
            "application/vnd.oci.image.config.v1+json" | DOCKER_CONFIG => Self::Config,
            _ if media_type.starts_with("application/vnd.oci.image.layer.")
                || media_type.starts_with("application/vnd.docker.image.rootfs.") =>
            {
                Self::Layer
            }
            _ => Self::Other,
        }
    }

    /// Whether it leads to others.
    pub(crate) fn is_document(self) -> bool {
        matches!(self, Self::Index | Self::Manifest)
    }
}

impl Document {
    /// Reads a document, which is what its descriptor says, or where that says nothing, what it says itself. Returns its media type too.
    ///
    /// Errors: [`Error::Invalid`]; the sentence is about the document alone.
    pub(crate) fn parse(bytes: &[u8], media_type: &str) -> Result<(Self, String)> {
        if is_schema1(media_type) {
            return Err(schema1());
        }
        let raw: Raw = serde_json::from_slice(bytes).map_err(|error| Error::Invalid(format!("it is no document of an image: {error}")))?;
        if raw.schema_version == Some(1) || raw.fs_layers.is_some() {
            return Err(schema1());
        }
        let own = raw.media_type.as_deref().unwrap_or_default();
        let (own_kind, named_kind) = (Kind::of(own), Kind::of(media_type));
        if own_kind.is_document() && named_kind.is_document() && own != media_type {
            return Err(Error::Invalid(format!("it is called {media_type}, and calls itself {}", shown(own))));
        }
        let (has_manifests, has_layers) = (raw.manifests.is_some(), raw.layers.is_some() || raw.config.is_some());
        if has_manifests && has_layers {
            return Err(Error::Invalid("it has both manifests and layers, so that it could be read as two images".to_owned()));
        }
        let (kind, media_type) = match (named_kind, own_kind) {
            (Kind::Index | Kind::Manifest, _) => (named_kind, media_type),
            (_, Kind::Index | Kind::Manifest) => (own_kind, own),
            _ if has_manifests => (Kind::Index, OCI_INDEX),
            _ if has_layers => (Kind::Manifest, OCI_MANIFEST),
            _ => {
                let called = if media_type.is_empty() { own } else { media_type };
                return Err(Error::Invalid(format!("{:?} is neither an index nor a manifest", shown(called))));
            }
        };
        let several = |list: Option<Vec<RawDescriptor>>| -> Result<Vec<Descriptor>> {
            let list = list.unwrap_or_default();
            if list.len() > MOST_CHILDREN {
                return Err(Error::Invalid(format!("it leads to {} blobs; the most is {MOST_CHILDREN}", list.len())));
            }
            list.into_iter().map(RawDescriptor::check).collect()
        };
        let document = match kind {
            Kind::Index if has_layers => return Err(Error::Invalid("an index with layers".to_owned())),
            Kind::Manifest if has_manifests => return Err(Error::Invalid("a manifest with manifests".to_owned())),
            Kind::Index => Self::Index(several(raw.manifests)?),
            _ => Self::Manifest { config: raw.config.map(RawDescriptor::check).transpose()?, layers: several(raw.layers)? },
        };
        Ok((document, media_type.to_owned()))
    }

    /// Everything that it leads to.
    pub(crate) fn children(&self) -> Vec<&Descriptor> {
        match self {
            Self::Index(manifests) => manifests.iter().collect(),
            Self::Manifest { config, layers } => config.iter().chain(layers).collect(),
        }
    }

    /// Labels by which the collector knows what it leads to, as containerd names them.
    pub(crate) fn labels(&self) -> HashMap<String, String> {
        let mut counts: HashMap<&str, usize> = HashMap::new();
        let label = |child: &Descriptor| {
            let key = match child.kind() {
                Kind::Config => "config",
                Kind::Manifest => "m.",
                Kind::Layer => "l.",
                Kind::Index | Kind::Other => "",
            };
            let count = counts.entry(key).or_default();
            let number = if *count > 0 || key.ends_with('.') || key.is_empty() { count.to_string() } else { String::new() };
            *count += 1;
            let dot = if key.is_empty() || key.ends_with('.') || number.is_empty() { "" } else { "." };
            let key = if key.is_empty() { number } else { format!("{key}{dot}{number}") };
            (format!("{CONTENT_REFERENCE}.{key}"), child.digest.to_string())
        };
        self.children().into_iter().map(label).collect()
    }
}

impl Configuration {
    /// Reads it.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Raw {
            os: Option<String>,
            architecture: Option<String>,
            variant: Option<String>,
        }
        let raw: Raw = serde_json::from_slice(bytes).map_err(|error| Error::Invalid(format!("it is no configuration: {error}")))?;
        let text = |text: Option<String>| text.unwrap_or_default();
        let (os, architecture) = (text(raw.os), text(raw.architecture));
        let is_known = !os.is_empty() && !architecture.is_empty();
        Ok(Self { platform: is_known.then(|| Platform::new(&os, &architecture, &text(raw.variant))) })
    }
}

/// Refuses what is not worth fetching.
pub(super) fn check_type(media_type: &str) -> Result<()> {
    if is_schema1(media_type) { Err(schema1()) } else { Ok(()) }
}

/// Whether that is a manifest of the first kind, which has no digests of its layers' contents.
fn is_schema1(media_type: &str) -> bool {
    media_type.starts_with("application/vnd.docker.distribution.manifest.v1")
}

fn schema1() -> Error {
    Error::Invalid("schema 1 image manifests are no longer supported; push the image again with a newer program".to_owned())
}

fn shown(text: &str) -> String {
    text.chars().take(100).collect()
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: Option<i64>,
    media_type: Option<String>,
    manifests: Option<Vec<RawDescriptor>>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

/// A descriptor in a document that is read or written.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    platform: Option<RawPlatform>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    urls: Option<Vec<String>>,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
struct RawPlatform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    variant: Option<String>,
}

impl RawDescriptor {
    fn check(self) -> Result<Descriptor> {
        let digest = Digest::parse(&self.digest)?;
        let size = u64::try_from(self.size).map_err(|_| Error::Invalid(format!("{digest} has {} bytes", self.size)))?;
        let platform = self.platform.map(|raw| Platform::new(&raw.os, &raw.architecture, &raw.variant.unwrap_or_default()));
        Ok(Descriptor {
            media_type: self.media_type,
            digest,
            size,
            platform,
            annotations: self.annotations.unwrap_or_default().into_iter().collect(),
            urls: self.urls.unwrap_or_default(),
        })
    }
}

impl From<&Descriptor> for RawDescriptor {
    fn from(descriptor: &Descriptor) -> Self {
        let annotations: BTreeMap<_, _> = descriptor.annotations.clone().into_iter().collect();
        let platform = descriptor.platform.as_ref().map(|platform| RawPlatform {
            architecture: platform.architecture.clone(),
            os: platform.os.clone(),
            variant: Some(platform.variant.clone()).filter(|variant| !variant.is_empty()),
        });
        Self {
            media_type: descriptor.media_type.clone(),
            digest: descriptor.digest.to_string(),
            size: i64::try_from(descriptor.size).unwrap_or(i64::MAX),
            annotations: Some(annotations).filter(|annotations| !annotations.is_empty()),
            platform,
            urls: Some(descriptor.urls.clone()).filter(|urls| !urls.is_empty()),
        }
    }
}

pub(super) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(super) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub(super) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(super) const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// The labels that lead from one blob to another.
const CONTENT_REFERENCE: &str = "containerd.io/gc.ref.content";
/// Of one document: images have some tens.
pub(super) const MOST_CHILDREN: usize = 1000;
/// Of one document. Registries take 4 MiB.
pub(crate) const DOCUMENT_BYTES: u64 = 8 << 20;

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn descriptor(media_type: &str, digit: char) -> Value {
        json!({ "mediaType": media_type, "digest": format!("sha256:{}", digit.to_string().repeat(64)), "size": 7 })
    }

    fn parse(value: &Value, media_type: &str) -> Result<(Document, String)> {
        Document::parse(value.to_string().as_bytes(), media_type)
    }

    fn manifest() -> Value {
        let layer = descriptor("application/vnd.oci.image.layer.v1.tar+gzip", 'b');
        json!({ "schemaVersion": 2, "config": descriptor("application/vnd.oci.image.config.v1+json", 'a'), "layers": [layer] })
    }

    #[test]
    fn documents_without_a_media_type_are_what_they_have() {
        let index = json!({ "schemaVersion": 2, "manifests": [descriptor(OCI_MANIFEST, 'a')] });
        for named in ["", "application/octet-stream", "text/plain"] {
            assert_eq!(parse(&manifest(), named).expect("a manifest").1, OCI_MANIFEST);
            assert_eq!(parse(&index, named).expect("an index").1, OCI_INDEX);
        }
        assert_eq!(parse(&manifest(), DOCKER_MANIFEST).expect("a manifest").1, DOCKER_MANIFEST);
        let empty = json!({ "schemaVersion": 2, "config": descriptor(DOCKER_CONFIG, 'a'), "layers": [] });
        assert_eq!(parse(&empty, OCI_MANIFEST).expect("an image without layers").0.children().len(), 1);
    }

    #[test]
    fn what_could_be_read_as_two_images_is_refused() {
        let mut both = manifest();
        both["manifests"] = json!([descriptor(OCI_MANIFEST, 'c')]);
        for named in [OCI_MANIFEST, OCI_INDEX, ""] {
            assert!(parse(&both, named).expect_err("both").to_string().contains("both manifests and layers"));
        }
        let mut named = manifest();
        named["mediaType"] = json!(OCI_INDEX);
        assert!(parse(&named, OCI_MANIFEST).expect_err("named otherwise").to_string().contains("calls itself"));
        assert!(parse(&named, "").is_err());
        assert!(parse(&manifest(), OCI_INDEX).is_err());
        assert!(parse(&json!({ "manifests": [] }), DOCKER_MANIFEST).is_err());
    }

    #[test]
    fn schema_1_is_refused_in_one_sentence() {
        let old = json!({ "schemaVersion": 1, "fsLayers": [{ "blobSum": "sha256:0" }], "history": [] });
        for named in ["", "application/vnd.docker.distribution.manifest.v1+prettyjws", OCI_MANIFEST] {
            assert!(parse(&old, named).expect_err("old").to_string().contains("schema 1 image manifests are no longer supported"));
        }
    }

    #[test]
    fn digests_and_sizes_of_a_document_are_checked() {
        for (key, value) in [
            ("digest", json!("sha256:../../etc/passwd")),
            ("digest", json!("md5:00")),
            ("size", json!(-1)),
            ("size", json!("7")),
            ("size", json!(1e300)),
        ] {
            let mut bad = manifest();
            bad["layers"][0][key] = value.clone();
            assert_eq!(parse(&bad, OCI_MANIFEST).expect_err("bad").code(), tonic::Code::InvalidArgument, "{key} {value}");
        }
        let wide = json!({ "manifests": vec![descriptor(OCI_MANIFEST, 'a'); MOST_CHILDREN + 1] });
        assert!(parse(&wide, OCI_INDEX).is_err());
        for junk in ["", "[]", "null", "{}", "{\"manifests\":7}", "\u{1}"] {
            assert!(Document::parse(junk.as_bytes(), "").is_err(), "{junk:?}");
        }
    }

    #[test]
    fn labels_are_those_by_which_clients_know_an_image() {
        let mut manifest = manifest();
        manifest["layers"] = json!([
            descriptor("application/vnd.oci.image.layer.v1.tar", 'b'),
            descriptor("application/vnd.oci.image.layer.v1.tar", 'c'),
            descriptor("application/vnd.in-toto+json", 'd'),
            descriptor("application/x", 'e'),
        ]);
        let (document, _) = parse(&manifest, OCI_MANIFEST).expect("a manifest");
        let mut labels: Vec<_> = document.labels().into_iter().map(|(key, value)| format!("{key}={}", &value[7..8])).collect();
        labels.sort();
        let expected = ["0=d", "1=e", "config=a", "l.0=b", "l.1=c"].map(|rest| format!("{CONTENT_REFERENCE}.{rest}"));
        assert_eq!(labels, expected);
        let index = json!({ "manifests": [descriptor(OCI_MANIFEST, 'a'), descriptor(DOCKER_MANIFEST, 'b'), descriptor(OCI_INDEX, 'c')] });
        let mut keys: Vec<_> = parse(&index, OCI_INDEX).expect("an index").0.labels().into_keys().collect();
        keys.sort();
        assert_eq!(keys, ["0", "m.0", "m.1"].map(|rest| format!("{CONTENT_REFERENCE}.{rest}")));
    }
}
