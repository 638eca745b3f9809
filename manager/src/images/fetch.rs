//! Fetching: one blob from a registry into the content store, hashed while it arrives.
//!
//! ```text
//! wait for another pull of the digest ─▶ there already? ─▶ place among the downloads ─▶ bytes ─▶ hashed, written ─▶ digest right: content
//! ```
//! **Invariant:** however many pulls want a blob, in whatever namespaces, one at a time fetches it; the others find it then.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use containerd_client::events::ContentCreate;
use hyper::body::Bytes;
use tokio::sync::{Mutex as Turn, OwnedMutexGuard, mpsc};

use super::Transfers;
use super::document::{DOCUMENT_BYTES, Descriptor};
use super::progress::{Progress, word};
use super::registry::{self, Blob, Registry};
use super::tree::Documents;
use crate::content::{Digest, Opening, Writer};
use crate::error::{Error, Result};
use crate::name::Namespace;

/// Digests that are being fetched.
#[derive(Debug, Default)]
pub(super) struct Flights(Mutex<HashMap<Digest, Arc<Turn<()>>>>);

/// The turn to fetch a digest.
#[derive(Debug)]
struct Flight<'a> {
    flights: &'a Flights,
    digest: Digest,
    turn: Option<OwnedMutexGuard<()>>,
}

impl Flights {
    /// Waits until no other call fetches the digest.
    async fn take(&self, digest: &Digest) -> Flight<'_> {
        let turn = Arc::clone(self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(digest.clone()).or_default());
        let mut flight = Flight { flights: self, digest: digest.clone(), turn: None };
        flight.turn = Some(turn.lock_owned().await);
        flight
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        drop(self.turn.take());
        let mut flights = self.flights.0.lock().unwrap_or_else(PoisonError::into_inner);
        // the last one, unless others wait
        if flights.get(&self.digest).is_some_and(|turn| Arc::strong_count(turn) == 1) {
            flights.remove(&self.digest);
        }
    }
}

/// A registry, and where what it has goes.
#[derive(Debug, Clone)]
pub(super) struct Fetching {
    pub(super) transfers: Arc<Transfers>,
    pub(super) registry: Registry,
    pub(super) namespace: Namespace,
    pub(super) lease: String,
    pub(super) progress: Progress,
}

impl Fetching {
    /// Fetches a blob, unless it is there.
    pub(super) async fn fetch(&self, part: &Descriptor) -> Result<()> {
        let _turn = self.transfers.flights.take(&part.digest).await;
        for attempt in 1.. {
            let mut writer = match self.open(part).await {
                Err(Error::AlreadyExists(_)) => {
                    self.progress.part(word::EXISTS, part, part.size);
                    return Ok(());
                }
                opened => opened?,
            };
            if writer.progress()?.offset > part.size {
                writer.truncate().await?;
            }
            let offset = writer.progress()?.offset;
            let received = if offset == part.size { Ok(None) } else { self.receive(part, &mut writer, offset).await };
            let source = match received {
                Ok(source) => source,
                Err(error) => {
                    // the next attempt goes on from there
                    writer.close().await?;
                    return Err(error);
                }
            };
            let committed = match writer.commit(part.size, Some(&part.digest), HashMap::new()).await {
                // what an earlier attempt has left was something else, or a host has sent it
                Err(Error::Precondition(_)) if attempt < ATTEMPTS => {
                    // with nothing left there is nothing to go on with
                    if let Some(source) = source.filter(|_| offset == 0) {
                        source.distrust();
                    }
                    continue;
                }
                committed => committed,
            };
            match committed {
                Ok(digest) => {
                    let size = i64::try_from(part.size).unwrap_or(i64::MAX);
                    let event = ContentCreate { digest: digest.to_string(), size };
                    self.transfers.events.publish(&self.namespace, "/content/create", &event);
                }
                Err(Error::AlreadyExists(_)) => {}
                Err(error) => return Err(error),
            }
            self.progress.part(word::COMPLETE, part, part.size);
            return Ok(());
        }
        Ok(())
    }

    /// The writer of a blob, once no client writes it.
    async fn open(&self, part: &Descriptor) -> Result<Writer> {
        let opening = Opening {
            namespace: self.namespace.clone(),
            reference: part.reference(),
            total: part.size,
            expected: Some(part.digest.clone()),
            lease: Some(self.lease.clone()),
        };
        self.transfers.open(&opening).await
    }

    /// Receives what is missing, and writes it at the same time. Returns where it came from, if it is not verified yet.
    async fn receive(&self, part: &Descriptor, writer: &mut Writer, offset: u64) -> Result<Option<Blob>> {
        if part.kind().is_document() && offset == 0 {
            // the registry may have sent it when it was asked what there is
            let bytes = self.registry.fetch_document(&part.to_registry()).await?;
            writer.write(bytes).await?;
            return Ok(None);
        }
        // the semaphore is never closed
        let _place = self.transfers.downloads.acquire().await;
        let mut blob = self.registry.fetch(&part.to_registry(), offset).await?;
        let (send, chunks) = mpsc::channel::<Bytes>(CHUNKS);
        let receive = async {
            let send = send;
            let mut buffer = Vec::with_capacity(CHUNK_BYTES);
            while let Some(bytes) = blob.next().await? {
                buffer.extend_from_slice(&bytes);
                if buffer.len() >= CHUNK_BYTES {
                    let full = std::mem::replace(&mut buffer, Vec::with_capacity(CHUNK_BYTES));
                    if send.send(full.into()).await.is_err() {
                        return Ok(());
                    }
                }
            }
            // the writer's error is reported
            let _ = send.send(buffer.into()).await;
            Ok::<_, Error>(())
        };
        let write = async {
            let (mut chunks, mut offset) = (chunks, offset);
            while let Some(chunk) = chunks.recv().await {
                offset += chunk.len() as u64;
                writer.write(chunk).await?;
                self.progress.part(word::DOWNLOADING, part, offset);
            }
            Ok::<_, Error>(())
        };
        // both to their ends: what has come is kept
        let (received, written) = tokio::join!(receive, write);
        written?;
        received?;
        Ok(Some(blob))
    }
}

impl Documents for Fetching {
    async fn read(&self, descriptor: &Descriptor) -> Result<Option<Bytes>> {
        if descriptor.size > DOCUMENT_BYTES {
            return Err(Error::Invalid(format!(
                "{} has {} bytes; a document of an image has {DOCUMENT_BYTES} at most",
                descriptor.digest, descriptor.size
            )));
        }
        self.fetch(descriptor).await?;
        self.transfers.stored(&self.namespace).read(descriptor).await
    }
}

impl Transfers {
    /// Opens a reference for writing, once no other writer has it.
    pub(super) async fn open(&self, opening: &Opening) -> Result<Writer> {
        for _ in 0..PATIENCE {
            match self.content.write(opening.clone()).await {
                // it has waited for a second
                Err(Error::Held { .. }) => {}
                opened => return opened,
            }
        }
        self.content.write(opening.clone()).await
    }
}

impl Descriptor {
    /// As the client of registries has it.
    pub(super) fn to_registry(&self) -> registry::Descriptor {
        registry::Descriptor { urls: self.urls.clone(), ..registry::Descriptor::new(&self.media_type, self.digest.clone(), self.size) }
    }
}

/// With what an earlier pull has left, or from a host that sends something else; and anew.
const ATTEMPTS: usize = 2;
const CHUNKS: usize = 4;
const CHUNK_BYTES: usize = 256 << 10;
/// In seconds: a client that writes the same reference may have a slow source.
const PATIENCE: usize = 600;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_digest_is_fetched_by_one_at_a_time_and_forgotten_then() {
        let flights = Flights::default();
        let (one, other) = (Digest::of_bytes(b"1"), Digest::of_bytes(b"2"));
        let first = flights.take(&one).await;
        let _another = flights.take(&other).await;
        let mut second = Box::pin(flights.take(&one));
        let waits = std::future::poll_fn(|cx| std::task::Poll::Ready(second.as_mut().poll(cx).is_pending())).await;
        assert!(waits, "the first has the turn");
        drop(first);
        drop(second.await);
        assert_eq!(flights.0.lock().expect("no panic").len(), 1);
        let given_up = flights.take(&one).await;
        let mut waiting = Box::pin(flights.take(&one));
        let _ = std::future::poll_fn(|cx| std::task::Poll::Ready(waiting.as_mut().poll(cx).is_pending())).await;
        drop(waiting);
        drop(given_up);
        assert_eq!(flights.0.lock().expect("no panic").len(), 1, "who gives up leaves nothing");
    }
}
