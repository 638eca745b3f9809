//! `containerd.services.diff.v1.Diff`

use std::sync::Arc;

use containerd_client::services::v1::{ApplyRequest, ApplyResponse, DiffRequest, DiffResponse};
use containerd_client::types::{Descriptor, Mount};
use log::info;

use super::call::Call;
use crate::content::Digest;
use crate::diff::{Differ, NewBlob};
use crate::error::{Error, Result};
use crate::images::ahead::Ahead;
use crate::images::ahead::adopt::Adopted;
use crate::layers::{Compression, Times};
use crate::name::Namespace;

/// The service.
#[derive(Debug)]
pub(crate) struct DiffService {
    pub(crate) differ: Differ,
    /// May have unpacked a layer already.
    pub(crate) ahead: Ahead,
}

impl DiffService {
    /// The answer names the uncompressed layer; clients compare it with what the image says.
    pub(super) async fn apply(self: Arc<Self>, call: Call, request: ApplyRequest) -> Result<ApplyResponse> {
        let namespace = call.namespace()?;
        let diff = request.diff.ok_or_else(|| Error::Invalid("diff must be set".to_owned()))?;
        if let Some(kind) = request.payloads.keys().next() {
            return Err(Error::Unimplemented(format!("a layer with a payload for {kind:?}")));
        }
        let digest_of_blob = Digest::parse(&diff.digest)?;
        if let Some(adopted) = self.adopt(&namespace, &digest_of_blob, &request.mounts, request.sync_fs).await {
            let size = i64::try_from(adopted.bytes).unwrap_or(i64::MAX);
            let digest = adopted.diff_id.to_string();
            let applied = Descriptor { media_type: OCI_LAYER.to_owned(), digest, size, annotations: [].into() };
            return Ok(ApplyResponse { applied: Some(applied) });
        }
        let applied = self.differ.apply(&namespace, &digest_of_blob, request.mounts, request.sync_fs).await?;
        let size = i64::try_from(applied.bytes).unwrap_or(i64::MAX);
        let applied = Descriptor {
            media_type: OCI_LAYER.to_owned(),
            digest: Digest::of_sha256(&applied.diff_id).to_string(),
            size,
            annotations: [].into(),
        };
        Ok(ApplyResponse { applied: Some(applied) })
    }

    /// Takes what is unpacked already, where the client wants it as it is.
    async fn adopt(&self, namespace: &Namespace, blob: &Digest, mounts: &[Mount], syncs: bool) -> Option<Adopted> {
        let upper = self.differ.upper(mounts).filter(|_| !syncs)?;
        match self.ahead.adopt(namespace, blob, upper).await {
            Ok(adopted) => adopted,
            Err(error) => {
                info!(layer:% = blob, error = error.chain(); "cannot use a layer that was unpacked ahead, it is applied");
                None
            }
        }
    }

    pub(super) async fn diff(self: Arc<Self>, call: Call, request: DiffRequest) -> Result<DiffResponse> {
        let namespace = call.namespace()?;
        let (media_type, compression) = compression(&request.media_type)?;
        let times = Times::Seconds(request.source_date_epoch.map(|epoch| epoch.seconds));
        let new = NewBlob { reference: request.r#ref, labels: request.labels, lease: call.lease(), compression, times };
        let (digest, size) = self.differ.create(&namespace, request.left, request.right, new).await?;
        let size = i64::try_from(size).unwrap_or(i64::MAX);
        let diff = Descriptor { media_type: media_type.to_owned(), digest: digest.to_string(), size, annotations: [].into() };
        Ok(DiffResponse { diff: Some(diff) })
    }
}

/// The media type, and what it says of compression.
fn compression(media_type: &str) -> Result<(&str, Compression)> {
    let media_type = if media_type.is_empty() { OCI_GZIP } else { media_type };
    match media_type {
        OCI_LAYER | DOCKER_LAYER => Ok((media_type, Compression::Plain)),
        OCI_GZIP | DOCKER_GZIP => Ok((media_type, Compression::Gzip)),
        OCI_ZSTD | DOCKER_ZSTD => Ok((media_type, Compression::Zstd)),
        other => Err(Error::Unimplemented(format!("unsupported diff media type: {}", other.chars().take(100).collect::<String>()))),
    }
}

const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const OCI_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const OCI_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
const DOCKER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
const DOCKER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";
