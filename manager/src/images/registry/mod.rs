//! A client of registries: it resolves names, and fetches and pushes content.
//!
//! ```text
//! Reference ──▶ hosts.toml ──▶ hosts in order: mirrors, then the server ──▶ per host: connections (dns, proxy, tls), tokens
//!                                     │
//!            resolve: HEAD, else GET  │  fetch: a body that resumes  │  push: exists, mounted, or uploaded
//! ```
//! HTTP/1.1 only: a blob has a connection of its own, and no window to wait for. docs/registry.md has what operators see of it.
//!
//! **Invariants:** a credential goes to the host that it is for, and into no log and no error. Everything that a server sends is bounded. No
//! byte of a blob is given twice, and none beyond the size of its descriptor. This module verifies no digest of a blob: its caller hashes the
//! bytes as they come.

mod error;
mod options;
mod reference;

use std::sync::Arc;

use async_trait::async_trait;
use hyper::body::Bytes;

pub(crate) use error::{Attempt, RegistryError, Result};
pub(crate) use options::{Challenge, Credentials, Limits, Options, Secret};
pub(crate) use reference::Reference;

use crate::content::Digest;

/// What content is, and where else it may be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    /// Of layers that their registry may not have. No credential is ever sent there.
    pub(crate) urls: Vec<String>,
}

impl Descriptor {
    /// Content of that type; no URLs.
    pub(crate) fn new(media_type: impl Into<String>, digest: Digest, size: u64) -> Self {
        Self { media_type: media_type.into(), digest, size, urls: Vec::new() }
    }

    /// Whether a registry has it among the manifests.
    pub(crate) fn is_manifest(&self) -> bool {
        is_manifest(&self.media_type)
    }
}

/// Whether content of that type is a manifest or an index.
pub(crate) fn is_manifest(media_type: &str) -> bool {
    MANIFESTS.contains(&media_type)
}

/// The registry of a reference, with the mirrors that are configured for it. Cheap to clone: clones share connections and tokens.
#[derive(Debug, Clone)]
pub(crate) struct Registry {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    reference: Reference,
    options: Options,
}

/// Bytes that arrive. They are the descriptor's in number; whether they are its content, their digest tells.
#[derive(Debug)]
pub(crate) struct Blob {
    /// How many bytes are left.
    left: u64,
}

/// What is pushed. It may be read several times, and from any offset.
#[async_trait]
pub(crate) trait Source: Send + Sync {
    /// At least one byte from that offset, which is before the end, and `most` at most.
    async fn read(&self, offset: u64, most: usize) -> crate::error::Result<Bytes>;
}

/// How content came to be in a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pushed {
    /// It was there.
    Exists,
    /// Another repository of the registry had it.
    Mounted,
    /// It was sent.
    Uploaded,
}

/// Is called with the number of bytes that a registry has received.
pub(crate) type Progress<'a> = &'a (dyn Fn(u64) + Send + Sync);

impl Registry {
    /// The registry of a reference. Reads hosts.toml; connects to nothing.
    pub(crate) async fn new(reference: Reference, options: Options) -> Result<Self> {
        Ok(Self { inner: Arc::new(Inner { reference, options }) })
    }

    /// What it was made for.
    pub(crate) fn reference(&self) -> &Reference {
        &self.inner.reference
    }

    /// The content that the reference's digest or tag names.
    pub(crate) async fn resolve(&self) -> Result<Descriptor> {
        Err(RegistryError::Unfinished)
    }

    /// Content from that offset on.
    pub(crate) async fn fetch(&self, _content: &Descriptor, _offset: u64) -> Result<Blob> {
        Err(RegistryError::Unfinished)
    }

    /// All of a manifest or another small document, its digest verified.
    pub(crate) async fn fetch_document(&self, _content: &Descriptor) -> Result<Bytes> {
        Err(RegistryError::Unfinished)
    }

    /// Pushes a blob. `mount_from` are repositories of the same registry that may have it, the likeliest first.
    pub(crate) async fn push(
        &self,
        _content: &Descriptor,
        _mount_from: &[String],
        _source: &dyn Source,
        _progress: Progress<'_>,
    ) -> Result<Pushed> {
        Err(RegistryError::Unfinished)
    }

    /// Pushes a manifest or an index, under its digest, or under a tag as well.
    pub(crate) async fn push_manifest(&self, _content: &Descriptor, _body: Bytes, _tag: Option<&str>) -> Result<Pushed> {
        Err(RegistryError::Unfinished)
    }
}

impl Blob {
    /// The next bytes; none at the end. After an error there are no more.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>> {
        Err(RegistryError::Unfinished)
    }

    /// How many bytes are left.
    pub(crate) fn left(&self) -> u64 {
        self.left
    }
}

/// Types of manifests and indexes. Asked for in this order.
pub(crate) const MANIFESTS: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
/// A longer manifest or index is refused.
pub(crate) const DOCUMENT_BYTES: u64 = 8 << 20;
