//! Compressing: gzip made of a layer that is there, as content of its own.

use std::io::{self, Write as _};

use flate2::Compression;
use flate2::write::GzEncoder;
use tokio::sync::mpsc;

use super::Transfers;
use crate::chunks::{CHUNK_BYTES, Sink};
use crate::content::{Digest, Opening};
use crate::error::{Error, Result};
use crate::name::Namespace;

impl Transfers {
    /// Compresses a layer, and returns its new digest and length. That this was done before is fine.
    pub(super) async fn compress(&self, namespace: &Namespace, lease: &str, layer: &Digest) -> Result<(Digest, u64)> {
        let blob = self.content.read(namespace, layer).await?;
        let opening = Opening {
            namespace: namespace.clone(),
            reference: format!("compress-blob-{layer}"),
            total: 0,
            expected: None,
            lease: Some(lease.to_owned()),
        };
        let mut writer = self.open(&opening).await?;
        // what an earlier attempt has left
        writer.truncate().await?;
        let (send, chunks) = mpsc::channel(CHUNKS);
        let compress = self.archives.run(move || {
            let lost = |error: io::Error| Error::Invalid(format!("the layer cannot be compressed: {error}"));
            let mut encoder = GzEncoder::new(Sink::new(send), Compression::default());
            let mut offset = 0;
            while offset < blob.size {
                let bytes = blob.blocking_read(offset, CHUNK_BYTES)?;
                offset += bytes.len() as u64;
                encoder.write_all(&bytes).map_err(lost)?;
            }
            encoder.finish().and_then(|mut sink| sink.flush()).map_err(lost)
        });
        // when it fails, the channel closes, and the other side fails too
        let store = async {
            let mut chunks = chunks;
            while let Some(chunk) = chunks.recv().await {
                writer.write(chunk).await?;
            }
            Ok::<_, Error>(())
        };
        let (compressed, stored) = tokio::join!(compress, store);
        stored?;
        compressed??;
        let made = writer.progress()?;
        let labels = [("containerd.io/uncompressed".to_owned(), layer.to_string())].into();
        match writer.commit(made.offset, Some(&made.digest), labels).await {
            Ok(_) | Err(Error::AlreadyExists(_)) => Ok((made.digest, made.offset)),
            Err(error) => Err(error),
        }
    }
}

const CHUNKS: usize = 4;
