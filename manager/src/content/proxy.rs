//! The client of a content proxy: containerd's Content service of another process, which has the bytes of blobs below our rows.
//!
//! ```text
//! STAT ─▶ where it is ─▶ WRITE, a MiB each, answered one by one ─▶ COMMIT ─▶ Info says that it has it
//! ```
//! **Invariant:** nothing that it answers is believed without a bound: sizes are compared, waits have limits, and bytes that it sends are
//! hashed by who asked for them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::{
    AbortRequest, DeleteContentRequest, InfoRequest, ReadContentRequest, ReadContentResponse, WriteAction, WriteContentRequest,
    WriteContentResponse,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::{Blob, Digest};
use crate::error::{Error, Result};
use crate::gate::Gate;
use crate::pools::Pool;
use crate::proxy::{ANSWER_BYTES, Client, LONG, SHORT, is_answer, within};
use crate::settings::ContentProxy;

/// A content store of another process; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Proxy {
    pub(super) name: Arc<str>,
    /// In which everything is there.
    namespace: Arc<str>,
    client: Client,
}

/// A blob that is written there.
pub(super) struct Source<'a> {
    pub(super) digest: &'a Digest,
    pub(super) blob: Blob,
    pub(super) pool: &'a Pool,
    pub(super) gate: &'a Gate,
}

/// What it sends of a blob.
pub(super) struct Reading<'a> {
    proxy: &'a Proxy,
    answers: Streaming<ReadContentResponse>,
}

/// Why a blob could not be written there.
enum Failed {
    /// It has it, or another connection has its reference.
    Refused(Status),
    /// What it has of an earlier attempt is not what it should be.
    Stale(Error),
    Other(Error),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

impl Proxy {
    /// Nothing is connected yet.
    pub(super) fn new(settings: &ContentProxy) -> Self {
        let client = Client::new(&format!("content proxy {}", settings.name), &settings.address);
        Self { name: settings.name.as_str().into(), namespace: settings.namespace.as_str().into(), client }
    }

    fn service(&self) -> ContentClient<Channel> {
        ContentClient::new(self.client.channel()).max_decoding_message_size(ANSWER_BYTES)
    }

    /// An error that names it, and a blob.
    pub(super) fn lost(&self, digest: &Digest, why: &str) -> Error {
        Error::DataLoss(format!("content proxy {}: {digest} {why}", self.name))
    }

    /// The size of a blob, if it has it.
    pub(super) async fn size(&self, digest: &Digest) -> Result<Option<u64>> {
        let mut service = self.service();
        let request = InfoRequest { digest: digest.to_string() };
        let info = self.client.call(SHORT, &self.namespace, request, |request| async move { service.info(request).await }).await;
        let info = match info {
            Err(error) if error.code() == Code::NotFound => return Ok(None),
            answer => answer?.info.unwrap_or_default(),
        };
        match u64::try_from(info.size) {
            Ok(size) if info.digest == digest.as_str() => Ok(Some(size)),
            _ => Err(self.lost(digest, &format!("was asked for, and it describes {:?} of {} bytes", info.digest, info.size))),
        }
    }

    /// Deletes a blob, and what was written of it under a reference. That it has neither is fine.
    pub(super) async fn delete(&self, reference: &str, digest: &Digest) -> Result<()> {
        let mut service = self.service();
        let request = AbortRequest { r#ref: reference.to_owned() };
        // first, so that no earlier attempt ends after the deletion
        absent(self.client.call(SHORT, &self.namespace, request, |request| async move { service.abort(request).await }).await)?;
        let mut service = self.service();
        let request = DeleteContentRequest { digest: digest.to_string() };
        absent(self.client.call(SHORT, &self.namespace, request, |request| async move { service.delete(request).await }).await)
    }

    /// Writes a blob, unless it has it. When that is answered, it says that it has it, with its size.
    ///
    /// Errors: [`Error::Retired`], so that the next process goes on.
    pub(super) async fn put(&self, reference: &str, source: &Source<'_>) -> Result<()> {
        let begin = Instant::now();
        let mut is_anew = false;
        loop {
            match self.write(reference, source).await {
                Ok(()) => break,
                Err(Failed::Refused(status)) if status.code() == Code::AlreadyExists => break,
                // the connection of a process that was killed or replaced may not be closed there yet
                Err(Failed::Refused(status)) if status.code() == Code::Unavailable && begin.elapsed() < RELEASED => {
                    tokio::time::sleep(PAUSE).await;
                }
                Err(Failed::Stale(_)) if !is_anew => {
                    is_anew = true;
                    let mut service = self.service();
                    let request = AbortRequest { r#ref: reference.to_owned() };
                    absent(self.client.call(SHORT, &self.namespace, request, |request| async move { service.abort(request).await }).await)?;
                }
                Err(Failed::Refused(status)) => return Err(self.client.failed(&status)),
                Err(Failed::Stale(error) | Failed::Other(error)) => return Err(error),
            }
            if source.gate.is_retired() {
                return Err(Error::Retired);
            }
        }
        match self.size(source.digest).await? {
            Some(size) if size == source.blob.size => Ok(()),
            Some(size) => Err(self.lost(source.digest, &format!("has {size} bytes there instead of {}", source.blob.size))),
            None => Err(self.lost(source.digest, "is not there, though it was written")),
        }
    }

    async fn write(&self, reference: &str, source: &Source<'_>) -> std::result::Result<(), Failed> {
        let (mut service, size) = (self.service(), source.blob.size);
        let (requests, stream) = mpsc::channel(1);
        let first = WriteContentRequest {
            r#ref: reference.to_owned(),
            total: signed(size),
            expected: source.digest.to_string(),
            ..WriteContentRequest::default()
        };
        // there is room for it
        let _ = requests.send(first).await;
        let stream = ReceiverStream::new(stream);
        let call = self.client.ask(SHORT, &self.namespace, stream, |request| async move { service.write(request).await });
        let mut answers = call.await.map_err(|status| self.refused(status))?;
        let begun = self.answer(&mut answers, SHORT).await?;
        // what another attempt has written is gone on with: the digest decides
        let mut offset = match u64::try_from(begun.offset) {
            Ok(offset) if offset <= size => offset,
            _ => return Err(Failed::Stale(self.lost(source.digest, &format!("begins there at {} of {size} bytes", begun.offset)))),
        };
        let is_resumed = offset > 0;
        while offset < size {
            if source.gate.is_retired() {
                return Err(Error::Retired.into());
            }
            let blob = source.blob.clone();
            let data = source.pool.run(move || blob.blocking_read(offset, WRITE_BYTES)).await??;
            let end = offset + data.len() as u64;
            let request = WriteContentRequest { offset: signed(offset), data, ..action(WriteAction::Write) };
            // if the stream has ended, its answer says why
            let _ = requests.send(request).await;
            let answer = self.answer(&mut answers, SHORT).await?;
            if answer.offset != signed(end) {
                return Err(Failed::Stale(self.lost(source.digest, &format!("is written up to {end}, and it says {}", answer.offset))));
            }
            offset = end;
        }
        let labels = [(GC_ROOT.to_owned(), "x-manager".to_owned())].into();
        let (expected, length) = (source.digest.to_string(), signed(size));
        let request = WriteContentRequest { total: length, offset: length, expected, labels, ..action(WriteAction::Commit) };
        let _ = requests.send(request).await;
        match self.answer(&mut answers, LONG).await {
            Ok(answer) if answer.digest == source.digest.as_str() => Ok(()),
            Ok(answer) => Err(Failed::Other(self.lost(source.digest, &format!("was committed there as {:?}", answer.digest)))),
            Err(Failed::Refused(status)) if is_resumed && matches!(status.code(), Code::FailedPrecondition | Code::OutOfRange) => {
                Err(Failed::Stale(self.client.failed(&status)))
            }
            Err(failed) => Err(failed),
        }
    }

    fn refused(&self, status: Status) -> Failed {
        if is_answer(&status) { Failed::Refused(status) } else { Failed::Other(self.client.failed(&status)) }
    }

    async fn answer(
        &self,
        answers: &mut Streaming<WriteContentResponse>,
        limit: Duration,
    ) -> std::result::Result<WriteContentResponse, Failed> {
        let answer = within(limit, answers.message()).await.map_err(|status| self.refused(status))?;
        answer.ok_or_else(|| Failed::Other(self.client.error(Code::Unavailable, "it has ended a write without an answer")))
    }

    /// Asks for bytes of a blob.
    pub(super) async fn read(&self, digest: &Digest, offset: u64, bytes: u64) -> Result<Reading<'_>> {
        let mut service = self.service();
        let request = ReadContentRequest { digest: digest.to_string(), offset: signed(offset), size: signed(bytes) };
        let answers = self.client.call(SHORT, &self.namespace, request, |request| async move { service.read(request).await }).await?;
        Ok(Reading { proxy: self, answers })
    }
}

impl Reading<'_> {
    /// The next bytes; none at the end.
    pub(super) async fn next(&mut self, limit: Duration) -> Result<Option<Vec<u8>>> {
        let answer = within(limit.min(SHORT), self.answers.message()).await;
        Ok(answer.map_err(|status| self.proxy.client.failed(&status))?.map(|answer| answer.data))
    }
}

/// That something is not there need not be removed.
fn absent(removed: Result<()>) -> Result<()> {
    match removed {
        Err(error) if error.code() == Code::NotFound => Ok(()),
        removed => removed,
    }
}

fn action(action: WriteAction) -> WriteContentRequest {
    WriteContentRequest { action: action as i32, ..WriteContentRequest::default() }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// What is sent at once, as containerd's clients do.
const WRITE_BYTES: usize = 1 << 20;
/// For a reference to be released there.
const RELEASED: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(100);
/// A proxy with a collector of its own, as containerd is one, must not collect what it has for us.
const GC_ROOT: &str = "containerd.io/gc.root";
