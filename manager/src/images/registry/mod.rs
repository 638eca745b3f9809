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

mod attempts;
mod auth;
mod challenge;
mod document;
mod error;
mod fetch;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod host;
mod hosts;
mod hosts_file;
mod http;
mod message;
mod net;
mod options;
mod push;
mod reference;
mod resolve;
#[cfg(test)]
mod tests;
mod text;
mod thread;
mod url;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use hyper::body::Bytes;

pub(crate) use error::{Attempt, RegistryError, Result};
pub(crate) use fetch::Blob;
#[cfg(test)]
use net::{Proxies, Resolver};
pub(crate) use options::{Challenge, Credentials, Limits, Options, Secret};
pub(crate) use reference::Reference;

use attempts::Task;
use auth::Scope;
use host::Host;

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
    /// As paths have it.
    repository: String,
    options: Options,
    hosts: Vec<Arc<Host>>,
    /// The document that resolving has brought: it is the first that is fetched.
    resolved: Mutex<Option<(Digest, Bytes)>>,
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
        let (config_path, host, plain_http) = (options.config_path.clone(), reference.host.clone(), options.plain_http);
        let loaded = thread::on_thread(move || hosts::blocking_load(&config_path, &host, plain_http)).await;
        let wrong = |why: String| RegistryError::Config { path: Path::new(&reference.host).to_owned(), line: None, why };
        let configured = loaded.map_err(|error| wrong(error.to_string()))??;
        let name = reference.to_string();
        let mut hosts = Vec::new();
        for config in configured {
            hosts.push(Arc::new(Host::new(config, &options, &name).map_err(|why| wrong(why.to_string()))?));
        }
        // Docker Hub's own images have no folder in their names
        let is_official = reference.host == hosts::HUB && !reference.repository.contains('/');
        let repository = if is_official { format!("library/{}", reference.repository) } else { reference.repository.clone() };
        Ok(Self { inner: Arc::new(Inner { reference, repository, options, hosts, resolved: Mutex::default() }) })
    }

    /// What it was made for.
    pub(crate) fn reference(&self) -> &Reference {
        &self.inner.reference
    }

    fn options(&self) -> &Options {
        &self.inner.options
    }

    fn limits(&self) -> &Limits {
        &self.inner.options.limits
    }

    fn repository(&self) -> &str {
        &self.inner.repository
    }

    /// Hosts that may be asked for something, in their order; those that have never answered come last.
    fn hosts(&self, can: impl Fn(&Host) -> bool) -> Vec<Arc<Host>> {
        let mut hosts: Vec<Arc<Host>> = self.inner.hosts.iter().filter(|host| can(host)).cloned().collect();
        hosts.sort_by_key(|host| host.is_down());
        hosts
    }

    /// The host among them that is worth several attempts: the registry itself, or what is configured last.
    fn steady(&self, hosts: &[Arc<Host>]) -> usize {
        let position = |own: &Arc<Host>| hosts.iter().position(|host| Arc::ptr_eq(host, own));
        self.inner.hosts.iter().rev().find_map(position).unwrap_or_default()
    }

    /// The parameter that names the registry for which a mirror is asked.
    fn namespace(&self, host: &Host) -> Vec<(&str, &str)> {
        if host.is_mirror { vec![("ns", self.reference().host.as_str())] } else { Vec::new() }
    }

    fn pull_scope(&self) -> [Scope; 1] {
        [Scope { repository: self.repository().to_owned(), push: false }]
    }

    fn content_path(&self, content: &Descriptor) -> String {
        // artifacts' manifests have types of their own
        let kind = if is_manifest(&content.media_type) || content.media_type.contains(".manifest.") { "manifests" } else { "blobs" };
        format!("/{}/{kind}/{}", self.repository(), content.digest)
    }

    fn fetching(&self, content: &Descriptor) -> Task {
        Task { op: "fetch", what: format!("{}@{}", self.reference().locator(), content.digest) }
    }

    fn remember(&self, digest: &Digest, body: Bytes) {
        *self.inner.resolved.lock().unwrap_or_else(PoisonError::into_inner) = Some((digest.clone(), body));
    }

    /// A document that is here already. It is wanted once.
    fn remembered(&self, digest: &Digest) -> Option<Bytes> {
        let mut resolved = self.inner.resolved.lock().unwrap_or_else(PoisonError::into_inner);
        resolved.take_if(|(known, _body)| known == digest).map(|(_digest, body)| body)
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
