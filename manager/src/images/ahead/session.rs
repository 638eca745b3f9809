//! What is known of a client's work under one lease.

use std::sync::Arc;

use tokio::task::AbortHandle;

use super::job::Job;
use crate::content::Digest;

/// What a small blob is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Document {
    /// Not known yet.
    New,
    /// An image's manifest, whose config is not there yet.
    Manifest { config: Digest },
    /// Nothing more is to be done about it.
    Other,
}

/// A client's work.
#[derive(Debug)]
pub(super) struct Session {
    /// Small blobs, by digest.
    documents: Vec<(Digest, Document)>,
    /// Whether the client unpacks.
    is_meant: bool,
    pub(super) jobs: Vec<Arc<Job>>,
    /// Waits for the end of the client's connection.
    until: AbortHandle,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.until.abort();
    }
}

impl Session {
    pub(super) fn new(until: AbortHandle) -> Self {
        Self { documents: Vec::new(), is_meant: false, jobs: Vec::new(), until }
    }

    /// Adds a blob. Whether there is something to look at then.
    pub(super) fn add(&mut self, digest: &Digest) -> bool {
        let is_known = self.documents.iter().any(|(known, _document)| known == digest);
        if !is_known && self.documents.len() < MOST_DOCUMENTS {
            self.documents.push((digest.clone(), Document::New));
        }
        // it may be the config that a manifest was waiting for
        let is_awaited =
            self.documents.iter().any(|(_digest, document)| matches!(document, Document::Manifest { config } if config == digest));
        self.is_meant && (is_awaited || !is_known)
    }

    /// Notes that the client unpacks. Whether that is new.
    pub(super) fn mean(&mut self) -> bool {
        !std::mem::replace(&mut self.is_meant, true)
    }

    /// What is to be looked at, if the client unpacks: a manifest that was looked at once its config is there, which is named too.
    pub(super) fn to_look_at(&self) -> Option<Vec<(Digest, Option<Digest>)>> {
        let open = |(digest, document): &(Digest, Document)| match document {
            Document::New => Some((digest.clone(), None)),
            Document::Manifest { config } => Some((digest.clone(), Some(config.clone()))),
            Document::Other => None,
        };
        self.is_meant.then(|| self.documents.iter().filter_map(open).collect())
    }

    /// Notes what a blob is.
    pub(super) fn examined(&mut self, digest: &Digest, found: Document) {
        if let Some((_digest, document)) = self.documents.iter_mut().find(|(known, _document)| known == digest) {
            *document = found;
        }
    }
}

/// Of one lease: manifests and configs, and small layers among them.
const MOST_DOCUMENTS: usize = 256;
