//! Fetching: one blob from a registry into the content store, hashed while it arrives.
//!
//! ```text
//! wait for another pull of the digest ─▶ there already? ─▶ place among the downloads ─▶ ingest ─▶ bytes ─▶ hashed, written ─▶ digest right: content
//! ```
//! **Invariants:** however many pulls want a blob of one registry, in whatever namespaces, one at a time fetches it; the others find it then. None
//! waits for another registry, which may be as slow as it likes. What waits for its place has no file open.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use containerd_client::events::ContentCreate;
use hyper::body::Bytes;
use tokio::sync::{Mutex as Turn, OwnedMutexGuard, SemaphorePermit, mpsc};

use super::Transfers;
use super::document::{DOCUMENT_BYTES, Descriptor};
use super::progress::{Progress, word};
use super::registry::{self, Blob, Registry};
use super::tree::Documents;
use crate::content::{Digest, Opening, Writer};
use crate::error::{Error, Result};
use crate::name::Namespace;

/// Digests that are being fetched, from each registry.
#[derive(Debug, Default)]
pub(super) struct Flights(Mutex<HashMap<Digest, ByHost>>);

/// Turns by the registry's host.
type ByHost = HashMap<String, Arc<Turn<()>>>;

/// The turn to fetch a digest from a registry.
#[derive(Debug)]
struct Flight<'a> {
    flights: &'a Flights,
    digest: Digest,
    host: String,
    /// Whether it was being fetched from another registry when this one was asked for.
    is_elsewhere: bool,
    turn: Option<OwnedMutexGuard<()>>,
}

impl Flights {
    /// Waits until no other call fetches the digest from that registry.
    async fn take(&self, digest: &Digest, host: &str) -> Flight<'_> {
        let (turn, is_elsewhere) = {
            let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let hosts = flights.entry(digest.clone()).or_default();
            let turn = Arc::clone(hosts.entry(host.to_owned()).or_default());
            (turn, hosts.len() > 1)
        };
        let mut flight = Flight { flights: self, digest: digest.clone(), host: host.to_owned(), is_elsewhere, turn: None };
        flight.turn = Some(turn.lock_owned().await);
        flight
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        drop(self.turn.take());
        let mut flights = self.flights.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(hosts) = flights.get_mut(&self.digest) else { return };
        // the last one, unless others wait
        if hosts.get(&self.host).is_some_and(|turn| Arc::strong_count(turn) == 1) {
            hosts.remove(&self.host);
        }
        if hosts.is_empty() {
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
        let flight = self.transfers.flights.take(&part.digest, &self.registry.reference().host).await;
        for attempt in 1.. {
            let (mut writer, mut place) = match self.open(part, flight.is_elsewhere).await {
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
            let received = if offset == part.size { Ok(None) } else { self.receive(part, &mut writer, offset, &mut place).await };
            // the disk is not waited for in it
            drop(place);
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

    /// The writer of a blob, once no client writes it, and its place among the downloads where it needs one.
    async fn open(&self, part: &Descriptor, is_elsewhere: bool) -> Result<(Writer, Option<SemaphorePermit<'_>>)> {
        let shared = part.reference();
        let own = format!("{shared}@{}", self.registry.reference().host);
        for attempt in 1.. {
            // what fetches it from elsewhere, or a client that writes nothing, may take for ever
            let is_own = is_elsewhere || attempt > PATIENCE;
            let opening = Opening {
                namespace: self.namespace.clone(),
                reference: if is_own { own.clone() } else { shared.clone() },
                total: part.size,
                expected: Some(part.digest.clone()),
                lease: Some(self.lease.clone()),
            };
            let place = self.place(part).await?;
            match self.transfers.content.write(opening).await {
                // it has waited for a second; others may have the place meanwhile
                Err(Error::Held { .. }) if attempt < 2 * PATIENCE => {}
                opened => return opened.map(|writer| (writer, place)),
            }
        }
        Err(Error::Exhausted(format!("{shared} is written by others")))
    }

    /// A place among the downloads; none for what need not be fetched, and for documents.
    async fn place(&self, part: &Descriptor) -> Result<Option<SemaphorePermit<'_>>> {
        let downloads = &self.transfers.downloads;
        if let Ok(place) = downloads.try_acquire() {
            return Ok(Some(place));
        }
        if part.kind().is_document() || self.transfers.content.is_had(&self.namespace, &part.digest).await? {
            return Ok(None);
        }
        // the semaphore is never closed
        Ok(downloads.acquire().await.ok())
    }

    /// Receives what is missing, and writes it at the same time. Returns where it came from, if it is not verified yet.
    async fn receive<'s>(
        &'s self,
        part: &Descriptor,
        writer: &mut Writer,
        offset: u64,
        place: &mut Option<SemaphorePermit<'s>>,
    ) -> Result<Option<Blob>> {
        if part.kind().is_document() && offset == 0 {
            // the registry may have sent it when it was asked what there is
            let bytes = self.registry.fetch_document(&part.to_registry()).await?;
            writer.write(bytes).await?;
            return Ok(None);
        }
        if place.is_none() {
            // what others had is lost
            *place = self.transfers.downloads.acquire().await.ok();
        }
        let mut blob = self.registry.fetch(&part.to_registry(), offset).await?;
        let (send, pieces) = mpsc::channel::<Bytes>(PIECES);
        let receive = async {
            let send = send;
            while let Some(bytes) = blob.next().await? {
                // the writer's error is reported
                if send.send(bytes).await.is_err() {
                    break;
                }
            }
            Ok::<_, Error>(())
        };
        let write = async {
            let (mut pieces, mut offset) = (pieces, offset);
            loop {
                let mut come = Vec::with_capacity(PIECES);
                if pieces.recv_many(&mut come, PIECES).await == 0 {
                    return Ok::<_, Error>(());
                }
                offset += come.iter().map(|bytes| bytes.len() as u64).sum::<u64>();
                writer.write_all(come).await?;
                self.progress.part(word::DOWNLOADING, part, offset);
            }
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
        for _ in 0..LONG_PATIENCE {
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
/// Of a download, as long as a connection's buffer at most: they wait for the disk, as many again are being written.
const PIECES: usize = 8;
/// In seconds: a client that writes the same reference fetches it, too.
const PATIENCE: usize = 60;
/// The same where there is no other source.
const LONG_PATIENCE: usize = 600;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_digest_is_fetched_by_one_at_a_time_and_forgotten_then() {
        let flights = Flights::default();
        let (one, other) = (Digest::of_bytes(b"1"), Digest::of_bytes(b"2"));
        let first = flights.take(&one, "r").await;
        let _another = flights.take(&other, "r").await;
        let mut second = Box::pin(flights.take(&one, "r"));
        let waits = std::future::poll_fn(|cx| std::task::Poll::Ready(second.as_mut().poll(cx).is_pending())).await;
        assert!(waits, "the first has the turn");
        drop(first);
        drop(second.await);
        assert_eq!(flights.0.lock().expect("no panic").len(), 1);
        let given_up = flights.take(&one, "r").await;
        let mut waiting = Box::pin(flights.take(&one, "r"));
        let _ = std::future::poll_fn(|cx| std::task::Poll::Ready(waiting.as_mut().poll(cx).is_pending())).await;
        drop(waiting);
        drop(given_up);
        assert_eq!(flights.0.lock().expect("no panic").len(), 1, "who gives up leaves nothing");
    }

    #[tokio::test]
    async fn no_registry_waits_for_another() {
        let flights = Flights::default();
        let digest = Digest::of_bytes(b"1");
        let slow = flights.take(&digest, "slow").await;
        let quick = flights.take(&digest, "quick").await;
        assert!(!slow.is_elsewhere && quick.is_elsewhere);
        drop(slow);
        drop(quick);
        assert!(!flights.take(&digest, "quick").await.is_elsewhere && flights.0.lock().expect("no panic").is_empty());
    }
}
