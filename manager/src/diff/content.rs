//! What the service of diffs needs of content.

use std::collections::HashMap;
use std::fmt::Debug;
use std::fs::File;
use std::io::Write;

use async_trait::async_trait;

use crate::error::Result;
use crate::name::Namespace;

/// Content, by namespace and digest.
#[async_trait]
pub(crate) trait Blobs: Debug + Send + Sync {
    /// A blob, for reading.
    async fn open(&self, namespace: &Namespace, digest: &str) -> Result<File>;

    /// A blob that is to be written under a reference; none chooses one.
    async fn begin(&self, namespace: &Namespace, reference: Option<String>) -> Result<Box<dyn Ingest>>;

    /// Makes content of what was written. That the content is there already is fine.
    async fn finish(
        &self,
        namespace: &Namespace,
        ingest: Box<dyn Ingest>,
        labels: HashMap<String, String>,
        lease: Option<String>,
    ) -> Result<Ingested>;
}

/// What is being written; dropped, it may be removed or not.
pub(crate) trait Ingest: Write + Send {}

/// New content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ingested {
    pub(crate) digest: String,
    pub(crate) bytes: u64,
}

/// Until there is content.
#[derive(Debug)]
pub(crate) struct NoBlobs;

#[async_trait]
impl Blobs for NoBlobs {
    async fn open(&self, _: &Namespace, _: &str) -> Result<File> {
        Err(crate::error::Error::Unimplemented("content".to_owned()))
    }
    async fn begin(&self, _: &Namespace, _: Option<String>) -> Result<Box<dyn Ingest>> {
        Err(crate::error::Error::Unimplemented("content".to_owned()))
    }
    async fn finish(&self, _: &Namespace, _: Box<dyn Ingest>, _: HashMap<String, String>, _: Option<String>) -> Result<Ingested> {
        Err(crate::error::Error::Unimplemented("content".to_owned()))
    }
}
