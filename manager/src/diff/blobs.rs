//! Layers that are read from content and written to it.

use std::collections::HashMap;

use containerd_client::types::Mount;
use tokio::sync::mpsc;

use super::Differ;
use crate::chunks::Sink;
use crate::content::{Digest, Opening, Writer};
use crate::error::{Error, Result};
use crate::host;
use crate::layers::{Cancel, Compression, Times};
use crate::name::Namespace;

/// What a new layer is to be.
#[derive(Debug, Clone)]
pub(crate) struct NewBlob {
    /// Of the ingest; empty for any.
    pub(crate) reference: String,
    pub(crate) labels: HashMap<String, String>,
    /// Holds it, if it is named.
    pub(crate) lease: Option<String>,
    pub(crate) compression: Compression,
    pub(crate) times: Times,
}

impl Differ {
    /// Makes content of what differs between two mounts. That the content is there already is fine.
    pub(crate) async fn create(&self, namespace: &Namespace, left: Vec<Mount>, right: Vec<Mount>, new: NewBlob) -> Result<(Digest, u64)> {
        let reference = if new.reference.is_empty() { format!("diff-{}", host::kernel_id("uuid")?) } else { new.reference };
        let opening = Opening { namespace: namespace.clone(), reference, total: 0, expected: None, lease: new.lease };
        let mut writer = self.content.write(opening).await?;
        // what an earlier attempt has left
        writer.truncate().await?;
        let (this, cancel) = (self.clone(), Cancel::default());
        let _ends_with_caller = cancel.guard();
        let (send, chunks) = mpsc::channel(CHUNKS);
        let create = self.pool.run(move || {
            let mut sink = Sink::new(send);
            this.blocking_diff(&left, &right, &mut sink, new.compression, new.times, &cancel)
        });
        // when it fails, the channel closes, and the other side fails too
        let store = async {
            let mut chunks = chunks;
            while let Some(chunk) = chunks.recv().await {
                writer.write(chunk).await?;
            }
            Ok(())
        };
        let (created, stored) = tokio::join!(create, store);
        let result = match (created.flatten(), stored) {
            (_, Err(error)) | (Err(error), Ok(())) => Err(error),
            (Ok(created), Ok(())) => {
                let mut labels = new.labels;
                if new.compression != Compression::Plain {
                    labels.insert(UNCOMPRESSED_LABEL.to_owned(), Digest::of_sha256(&created.diff_id).to_string());
                }
                commit(&mut writer, labels).await
            }
        };
        if result.is_err() {
            // it expires otherwise
            let _ = writer.abort().await;
        }
        result
    }
}

async fn commit(writer: &mut Writer, labels: HashMap<String, String>) -> Result<(Digest, u64)> {
    let progress = writer.progress()?;
    match writer.commit(0, Some(&progress.digest), labels).await {
        Ok(_) | Err(Error::AlreadyExists(_)) => Ok((progress.digest, progress.offset)),
        Err(error) => Err(error),
    }
}

const CHUNKS: usize = 4;
/// On compressed content: the digest of what it is without compression.
const UNCOMPRESSED_LABEL: &str = "containerd.io/uncompressed";
