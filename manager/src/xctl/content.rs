//! Blobs of the daemon's content store.

use std::collections::HashMap;
use std::io::Read;

use containerd_client::services::v1::{
    Info, InfoRequest, ReadContentRequest, UpdateRequest, WriteAction, WriteContentRequest, WriteContentResponse,
};
use prost_types::FieldMask;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use crate::client::{Client, call};
use crate::error::{Error, IoContext as _, Result};

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
pub(crate) async fn copy(client: &Client, what: &str, digest: &str, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
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

/// Adds labels to a blob.
pub(crate) async fn label(client: &Client, digest: &str, labels: HashMap<String, String>) -> Result<()> {
    if labels.is_empty() {
        return Ok(());
    }
    let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
    let info = Info { digest: digest.to_owned(), labels, ..Info::default() };
    let request = client.request(UpdateRequest { info: Some(info), update_mask: Some(FieldMask { paths }) });
    call(format!("label {digest}"), client.content().update(request)).await.map(drop)
}

/// Writes a blob, unless it is there, and labels it. The daemon checks its length and its digest.
pub(crate) async fn write(client: &Client, digest: &str, size: u64, source: &mut impl Read, labels: HashMap<String, String>) -> Result<()> {
    if info(client, digest).await?.is_some() {
        return label(client, digest, labels).await;
    }
    let reference = format!("xctl-{digest}");
    let total = i64::try_from(size).map_err(|error| Error::unreadable(digest, error))?;
    let mut writer = Writer::open(client, digest).await?;
    let first = WriteContentRequest { r#ref: reference.clone(), total, expected: digest.to_owned(), ..WriteContentRequest::default() };
    let stat = match writer.step(WriteContentRequest { action: WriteAction::Stat.into(), ..first.clone() }).await {
        Err(error) if error.code() == Some(Code::AlreadyExists) => return label(client, digest, labels).await,
        stat => stat?,
    };
    // what an interrupted import has left is written again from the start: offset 0 truncates it
    let mut has_old = stat.offset > 0;
    let mut offset = 0;
    let mut buffer = vec![0; PART];
    loop {
        let length = fill(source, &mut buffer).on("read", digest)?;
        if length == 0 && !(has_old && offset == 0) {
            break;
        }
        let data = buffer[..length].to_vec();
        let answer = writer.step(WriteContentRequest { action: WriteAction::Write.into(), offset, data, ..first.clone() }).await?;
        has_old = false;
        offset = answer.offset;
        if length == 0 {
            break;
        }
    }
    match writer.step(WriteContentRequest { action: WriteAction::Commit.into(), offset, labels: labels.clone(), ..first }).await {
        Err(error) if error.code() == Some(Code::AlreadyExists) => label(client, digest, labels).await,
        committed => committed.map(drop),
    }
}

/// One write: each request has an answer before the next is sent.
struct Writer {
    doing: String,
    requests: mpsc::Sender<WriteContentRequest>,
    answers: Option<Streaming<WriteContentResponse>>,
    opening: Option<(Client, mpsc::Receiver<WriteContentRequest>)>,
}

impl Writer {
    async fn open(client: &Client, digest: &str) -> Result<Self> {
        let (requests, receiver) = mpsc::channel(1);
        Ok(Self { doing: format!("write {digest}"), requests, answers: None, opening: Some((client.clone(), receiver)) })
    }

    async fn step(&mut self, request: WriteContentRequest) -> Result<WriteContentResponse> {
        let lost = |doing: &str| Error::unreadable(doing, "the daemon has ended the write");
        self.requests.send(request).await.map_err(|_| lost(&self.doing))?;
        if let Some((client, receiver)) = self.opening.take() {
            // a server need not answer before the first request has come
            let stream = client.request(ReceiverStream::new(receiver));
            self.answers = Some(call(&self.doing, client.content().write(stream)).await?);
        }
        let answers = self.answers.as_mut().ok_or_else(|| lost(&self.doing))?;
        match tokio::time::timeout(ANSWERED, answers.message()).await {
            Ok(Ok(Some(answer))) => Ok(answer),
            Ok(Ok(None)) => Err(lost(&self.doing)),
            Ok(Err(status)) => Err(Error::Call { doing: self.doing.clone(), status }),
            Err(_elapsed) => Err(Error::Late { doing: self.doing.clone(), limit: ANSWERED }),
        }
    }
}

/// Fills the buffer as far as there is something.
fn fill(source: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match source.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

/// As digests are written.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether a digest is one of SHA-256, the only kind that is written here.
pub(crate) fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)))
}

/// Manifests and configurations are kilobytes.
const LONGEST: usize = 8 << 20;
/// As large as other clients' are.
const PART: usize = 1 << 20;
/// A commit may wait for the disk.
const ANSWERED: std::time::Duration = std::time::Duration::from_secs(300);
