//! Blobs of the daemon's content store.

use containerd_client::services::v1::{Info, InfoRequest, ReadContentRequest};
use sha2::{Digest as _, Sha256};
use tonic::Code;

use crate::client::{Client, call};
use crate::error::{Error, Result};

/// A whole blob of a few MiB at most, checked against its digest.
pub(crate) async fn read(client: &Client, what: &str, digest: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    copy(client, what, digest, |part| {
        bytes.extend_from_slice(part);
        if bytes.len() > LONGEST { Err(Error::unreadable(what, "it is longer than 8 MiB")) } else { Ok(()) }
    })
    .await?;
    Ok(bytes)
}

/// Hands a blob to `take`, part by part, and checks it against its digest at the end.
async fn copy(client: &Client, what: &str, digest: &str, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let request = client.request(ReadContentRequest { digest: digest.to_owned(), offset: 0, size: 0 });
    let doing = format!("read {what}");
    let mut stream = call(&doing, client.content().read(request)).await?;
    let mut hash = Sha256::new();
    while let Some(part) = stream.message().await.map_err(|status| Error::Call { doing: doing.clone(), status })? {
        hash.update(&part.data);
        take(&part.data)?;
    }
    let found = format!("sha256:{}", hex(&hash.finalize()));
    if digest.starts_with("sha256:") && found != digest {
        return Err(Error::unreadable(what, format!("its digest is {found}: the store is damaged")));
    }
    Ok(())
}

/// What is known of a blob, if it is in the store.
pub(crate) async fn info(client: &Client, digest: &str) -> Result<Option<Info>> {
    let request = client.request(InfoRequest { digest: digest.to_owned() });
    match call(format!("look for {digest} in the content store"), client.content().info(request)).await {
        Ok(answer) => Ok(answer.info),
        Err(error) if error.code() == Some(Code::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// As digests are written.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Manifests and configurations are kilobytes.
const LONGEST: usize = 8 << 20;
