//! Blobs that are being written, for those who read them at the same time.
//!
//! ```text
//! writer: begins ─▶ advances … ─▶ whole      reader: waits for the next bytes, or for the end
//!            └──────────────────▶ cut off    (its client left, or begins again): readers get an error
//! ```
//! **Invariant:** the bytes that are read are not checked before the writer commits them: what is made of them must not be recorded before.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::broadcast;

use super::{Blob, Content, Digest, lock};
use crate::error::Result;
use crate::layers::Cancel;
use crate::name::Namespace;
use crate::settings::Sharing;
use crate::store::blobs;

/// A blob of a namespace.
type Key = (Namespace, Digest);

/// What is being written, by the digest that is expected.
#[derive(Debug)]
pub(super) struct Arrivals {
    all: Mutex<HashMap<Key, Arc<Arrival>>>,
    /// What begins or ceases to be written, or is recorded.
    changes: broadcast::Sender<Key>,
}

/// What happens to blobs from now on: to be had before they are looked for.
#[derive(Debug)]
pub(crate) struct Changes(broadcast::Receiver<Key>);

#[derive(Debug)]
struct Arrival {
    file: File,
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Debug, Clone, Copy)]
struct State {
    /// Bytes that can be read.
    written: u64,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Writing,
    Whole,
    Cut,
}

/// The writer's side: readers get an error if it is dropped before it was [whole](Self::whole).
#[derive(Debug)]
pub(super) struct Arriving {
    content: Arc<Content>,
    key: Key,
    arrival: Arc<Arrival>,
}

/// Reads a blob while it is written.
#[derive(Debug)]
pub(crate) struct Follower {
    arrival: Arc<Arrival>,
    at: u64,
    cancel: Cancel,
}

/// Where the bytes of a blob are, of which nothing is open yet.
#[derive(Debug)]
pub(crate) enum Found {
    /// In a blob.
    Whole,
    /// In what is being written.
    Arriving(Follower),
}

/// The bytes of a blob.
#[derive(Debug)]
pub(crate) enum Bytes {
    /// In a blob.
    Whole(Blob),
    /// In what is being written.
    Arriving(Follower),
}

impl Default for Arrivals {
    fn default() -> Self {
        Self { all: Mutex::default(), changes: broadcast::Sender::new(CHANGES) }
    }
}

impl Arrivals {
    pub(super) fn changed(&self, namespace: &Namespace, digest: &Digest) {
        // no one may be waiting
        let _ = self.changes.send((namespace.clone(), digest.clone()));
    }
}

impl Changes {
    /// Waits until something may have happened to a blob.
    pub(crate) async fn of(&mut self, namespace: &Namespace, digest: &Digest) {
        loop {
            match self.0.recv().await {
                Ok(changed) if changed.0 != *namespace || changed.1 != *digest => {}
                // also if it was among those that were missed; the sender is part of the content
                Ok(_) | Err(_) => return,
            }
        }
    }

    /// The same for any blob.
    pub(crate) async fn any(&mut self) {
        let _ = self.0.recv().await;
    }
}

impl Arriving {
    /// Announces an ingest that has `written` bytes so far.
    pub(super) fn begin(content: &Arc<Content>, namespace: &Namespace, digest: &Digest, file: File, written: u64) -> Self {
        let state = Mutex::new(State { written, phase: Phase::Writing });
        let arrival = Arc::new(Arrival { file, state, moved: Condvar::new() });
        let key = (namespace.clone(), digest.clone());
        // of several writers the first one is followed, until any of them is done
        lock(&content.arrivals.all).entry(key.clone()).or_insert_with(|| Arc::clone(&arrival));
        content.arrivals.changed(namespace, digest);
        Self { content: Arc::clone(content), key, arrival }
    }

    /// More bytes can be read.
    pub(super) fn advance(&self, written: u64) {
        lock(&self.arrival.state).written = written;
        self.arrival.moved.notify_all();
    }

    /// It is the blob of that digest now, with its row.
    pub(super) fn whole(self, digest: &Digest) {
        if *digest != self.key.1 {
            return;
        }
        lock(&self.arrival.state).phase = Phase::Whole;
        // there is no need to wait for a slower one
        let other = lock(&self.content.arrivals.all).get(&self.key).filter(|other| !Arc::ptr_eq(other, &self.arrival)).cloned();
        if let Some(other) = other {
            lock(&other.state).phase = Phase::Cut;
            other.moved.notify_all();
        }
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        {
            let mut state = lock(&self.arrival.state);
            if state.phase == Phase::Writing {
                state.phase = Phase::Cut;
            }
        }
        self.arrival.moved.notify_all();
        let mut all = lock(&self.content.arrivals.all);
        // another writer may have begun
        if all.get(&self.key).is_some_and(|arrival| Arc::ptr_eq(arrival, &self.arrival)) {
            all.remove(&self.key);
        }
        drop(all);
        self.content.arrivals.changed(&self.key.0, &self.key.1);
    }
}

impl Read for Follower {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let begin = Instant::now();
        let mut state = self.arrival.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.written <= self.at {
            match state.phase {
                Phase::Whole => return Ok(0),
                Phase::Cut => return Err(io::Error::other("its client has stopped to write it, or writes it again")),
                Phase::Writing if self.cancel.is_cancelled() => return Err(io::Error::other("the client has gone")),
                Phase::Writing if begin.elapsed() > STALL => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "its client writes nothing"));
                }
                Phase::Writing => {}
            }
            // not for ever: a cancellation does not notify
            state = self.arrival.moved.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        let available = usize::try_from(state.written - self.at).unwrap_or(usize::MAX).min(buffer.len());
        drop(state);
        let count = self.arrival.file.read_at(&mut buffer[..available], self.at)?;
        if count == 0 && available > 0 {
            return Err(io::Error::other("its bytes were taken back"));
        }
        self.at += count as u64;
        Ok(count)
    }
}

impl Read for Bytes {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Whole(blob) => blob.file().read(buffer),
            Self::Arriving(follower) => follower.read(buffer),
        }
    }
}

impl Content {
    /// Where the bytes of a blob are, now; none if it is neither in the namespace nor being written by a client that has named its digest.
    pub(crate) async fn bytes(&self, namespace: &Namespace, digest: &Digest, cancel: &Cancel) -> Result<Option<Found>> {
        // first: it is recorded before it is no arrival any more
        let arrival = lock(&self.arrivals.all).get(&(namespace.clone(), digest.clone())).cloned();
        if self.has(namespace, digest).await? {
            return Ok(Some(Found::Whole));
        }
        Ok(arrival.map(|arrival| Found::Arriving(Follower { arrival, at: 0, cancel: cancel.clone() })))
    }

    /// Whether a namespace has a blob.
    pub(crate) async fn has(&self, namespace: &Namespace, digest: &Digest) -> Result<bool> {
        let (place, id) = (namespace.clone(), digest.clone());
        Ok(self.store.read(move |db| blobs::get(db, place.as_str(), id.as_str())).await?.is_some())
    }

    /// Whether a blob is here, in the namespace or in another one that may give it.
    pub(crate) async fn is_had(&self, namespace: &Namespace, digest: &Digest) -> Result<bool> {
        let (place, id, is_shared) = (namespace.clone(), digest.clone(), self.sharing == Sharing::Shared);
        let had = self.store.read(move |db| {
            Ok(blobs::get(db, place.as_str(), id.as_str())?.is_some() || blobs::elsewhere(db, id.as_str(), is_shared)?.is_some())
        });
        had.await
    }

    /// Does something that blocks, on a thread for content.
    pub(crate) async fn run<T: Send + 'static>(&self, job: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        self.pool.run(job).await?
    }

    /// Whether a client is writing a blob.
    pub(crate) fn is_arriving(&self, namespace: &Namespace, digest: &Digest) -> bool {
        lock(&self.arrivals.all).contains_key(&(namespace.clone(), digest.clone()))
    }

    /// Waits until a namespace has a blob.
    pub(crate) async fn wait(&self, namespace: &Namespace, digest: &Digest) -> Result<()> {
        let mut changes = self.arrivals();
        while !self.has(namespace, digest).await? {
            changes.of(namespace, digest).await;
        }
        Ok(())
    }

    /// What happens to blobs from now on.
    pub(crate) fn arrivals(&self) -> Changes {
        Changes(self.arrivals.changes.subscribe())
    }
}

/// How long a reader waits for the next byte: it keeps a thread.
const STALL: Duration = Duration::from_secs(30);
/// How often a reader that waits looks whether it was cancelled.
const LOOK: Duration = Duration::from_millis(100);
/// Changes that one who waits may miss before it looks again.
const CHANGES: usize = 256;
