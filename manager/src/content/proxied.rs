//! What is done with content of which a proxy has the bytes: the same as with other content, but for the files.
//!
//! ```text
//! ingest: written, hashed and synced here ─▶ noted ─▶ at the proxy ─▶ row: answered ─▶ ingest removed
//!                                              └─ crash: no row names it ──▶ deleted there
//! last row removed ─▶ noted as leaving ─▶ deleted at the proxy ─▶ forgotten
//! ```
//! docs/decisions/0031-content-of-a-proxy.md has the reasons. Files that are here, from before the proxy was configured, are used as ever.
//!
//! **Invariants:** a row is written after the proxy has said that it has the blob; what is noted as leaving gets no row before it was deleted
//! there. Bytes that the proxy sends are used after their digest was found right. Nothing is waited for there while the gate, or the naming of
//! files, is held.

#[cfg(test)]
mod double;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use log::{debug, warn};
use tokio::sync::Semaphore;

use super::digest::Hasher;
use super::files::Ingest;
use super::near::{Near, blocking_reopen};
use super::proxy::{Proxy, Source};
use super::turns::Turns;
use super::writer::State;
use super::{Blob, Content, Digest, Writer, blocking_open, is_absence, lock};
use crate::error::{Error, IoContext as _, Object, Result};
use crate::name::Namespace;
use crate::proxy::LONG;
use crate::settings::ContentProxy;
use crate::store::{Meta, blobs, remote};

/// The proxy, and what is done with it now.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) proxy: Proxy,
    near: Arc<Near>,
    /// Blobs that are written, given rows, or deleted there.
    pub(super) turns: Turns,
    /// Blobs that are fetched.
    fetched: Turns,
    fetches: Semaphore,
    /// Bytes that are to be written by fetches.
    expected: Mutex<u64>,
    /// One removal at a time.
    removing: tokio::sync::Mutex<()>,
    /// Whether there may be something to delete.
    has_unnamed: AtomicBool,
}

impl Remote {
    pub(super) fn new(settings: &ContentProxy) -> Self {
        Self {
            proxy: Proxy::new(settings),
            near: Arc::default(),
            turns: Turns::default(),
            fetched: Turns::default(),
            fetches: Semaphore::new(FETCHES),
            expected: Mutex::default(),
            removing: tokio::sync::Mutex::default(),
            has_unnamed: AtomicBool::new(false),
        }
    }

    /// The file of a blob that was read or written lately.
    pub(super) fn near(&self, digest: &Digest, size: u64) -> Option<Arc<File>> {
        self.near.get(digest, size)
    }

    /// Notes that there may be something to delete there.
    pub(super) fn look_for_unnamed(&self) {
        self.has_unnamed.store(true, Ordering::Relaxed);
    }
}

impl Content {
    /// The size of a blob at the proxy, for a row to be made of it without its bytes; none if there is none, or no answer.
    pub(super) async fn size_there(&self, remote: &Remote, digest: &Digest) -> Option<u64> {
        // what is being deleted is not there any more then; later it is pinned
        let _turn = remote.turns.take(digest).await;
        let size = async {
            match self.noted(remote, digest).await? {
                Some(kept) if kept.is_leaving => Ok(None),
                _ => remote.proxy.size(digest).await,
            }
        };
        // its bytes can be written nevertheless
        size.await.inspect_err(|error| debug!(digest:%, error = error.chain(); "cannot look for a blob at the content proxy")).ok()?
    }

    async fn noted(&self, remote: &Remote, digest: &Digest) -> Result<Option<remote::Kept>> {
        let (name, id) = (Arc::clone(&remote.proxy.name), digest.clone());
        self.store.read(move |db| remote::get(db, &name, id.as_str())).await
    }

    /// Whether the proxy has a blob that has a row. That it cannot be asked says nothing.
    pub(super) async fn is_there(&self, remote: &Remote, digest: &Digest, size: i64) -> bool {
        match remote.proxy.size(digest).await {
            Ok(found) => found.and_then(|found| i64::try_from(found).ok()) == Some(size),
            Err(error) => {
                debug!(digest:%, error = error.chain(); "cannot look for a blob at the content proxy");
                true
            }
        }
    }

    /// Writes a blob there. The caller has its turn until there is a row.
    async fn put_there(&self, remote: &Remote, namespace: &Namespace, digest: &Digest, blob: Blob) -> Result<()> {
        if let Some(kept) = self.noted(remote, digest).await?
            && kept.is_leaving
        {
            self.delete_there(remote, digest, &kept.namespace).await?;
        }
        // by itself, or of an attempt that was cut off: it is noted with its row
        if remote.proxy.size(digest).await? == Some(blob.size) {
            return Ok(());
        }
        let first = {
            let (name, id, place) = (Arc::clone(&remote.proxy.name), digest.clone(), namespace.clone());
            let _pass = self.gate.enter().await?;
            self.store.write(move |db| remote::put(db, &name, id.as_str(), place.as_str())).await?.namespace
        };
        let source = Source { digest, blob, pool: &self.pool, gate: &self.gate };
        remote.proxy.put(&reference(&first, digest), &source).await
    }

    /// A blob that any namespace has, or the proxy by itself.
    pub(super) async fn open_shared(&self, digest: &Digest, size: u64) -> Result<Blob> {
        let path: Arc<Path> = self.files.blob(digest).into();
        let of = Arc::clone(&path);
        match (self.pool.run(move || blocking_open(&of, size, None)).await?, &self.remote) {
            (Err(error), Some(remote)) if is_absence(&error) => {
                let file = self.fetch(remote, digest, size).await?;
                self.pool.run(move || blocking_open(&path, size, Some(&file))).await?
            }
            (opened, _) => opened,
        }
    }

    /// A file with the bytes of a blob that is at the proxy.
    ///
    /// Errors: [`Error::DataLoss`] if it has others.
    pub(super) async fn fetch(&self, remote: &Remote, digest: &Digest, size: u64) -> Result<Arc<File>> {
        // those who want the same wait for it
        let _one = remote.fetched.take(digest).await;
        if let Some(file) = remote.near(digest, size) {
            return Ok(file);
        }
        // the semaphore is never closed
        let _place = remote.fetches.acquire().await;
        let _room = self.room_for(remote, size).await?;
        let files = Arc::clone(&self.files);
        let file = Arc::new(self.pool.run(move || files.unnamed()).await??);
        self.receive(remote, digest, size, Some(Arc::clone(&file))).await?;
        remote.near.put(digest, Arc::clone(&file), size);
        Ok(file)
    }

    /// Makes sure that the disk has room for a fetch, beside those that are under way.
    async fn room_for<'r>(&self, remote: &'r Remote, size: u64) -> Result<Room<'r>> {
        let mut is_cleared = false;
        loop {
            let files = Arc::clone(&self.files);
            let free = self.pool.run(move || files.free_bytes()).await??;
            {
                let mut expected = lock(&remote.expected);
                if expected.saturating_add(size).saturating_add(SPARED_BYTES) <= free {
                    *expected += size;
                    return Ok(Room { remote, size });
                }
            }
            if is_cleared {
                return Err(Error::Exhausted(format!(
                    "a blob of {size} bytes cannot be fetched from content proxy {}: the disk has {free} bytes left",
                    remote.proxy.name
                )));
            }
            remote.near.clear();
            is_cleared = true;
        }
    }

    /// Reads a blob there, and finds out whether its digest is right; its bytes are written to a file, if there is one.
    async fn receive(&self, remote: &Remote, digest: &Digest, size: u64, to: Option<Arc<File>>) -> Result<()> {
        let begin = Instant::now();
        let limit = LONG + Duration::from_secs(size / LEAST_RATE);
        let (mut hasher, mut offset) = (Hasher::new(digest.algorithm()), 0);
        let mut is_first = true;
        while offset < size || is_first {
            is_first = false;
            let (asked_from, mut reading) = (offset, remote.proxy.read(digest, offset, size - offset).await?);
            while let Some(bytes) = reading.next(limit.saturating_sub(begin.elapsed())).await? {
                if bytes.len() as u64 > size - offset {
                    return Err(remote.proxy.lost(digest, &format!("has more than {size} bytes there")));
                }
                let to = to.clone();
                let (from, length) = (offset, bytes.len() as u64);
                let path = self.files.blob(digest);
                hasher = self
                    .pool
                    .run(move || {
                        hasher.update(&bytes);
                        to.map_or(Ok(()), |to| to.write_all_at(&bytes, from)).on("write", &path).map(|()| hasher)
                    })
                    .await??;
                offset += length;
                if offset == size && size > 0 {
                    break;
                }
            }
            if offset == asked_from && size > 0 {
                return Err(remote.proxy.lost(digest, &format!("ends there at {offset} of {size} bytes")));
            }
        }
        let found = hasher.digest();
        if found != *digest {
            return Err(remote.proxy.lost(digest, &format!("has other bytes there: their digest is {found}")));
        }
        Ok(())
    }

    /// Starts to delete what the proxy has because of us and no row names. Nothing waits for that.
    pub(super) fn collect_there(self: &Arc<Self>) {
        let Some(remote) = &self.remote else { return };
        if !remote.has_unnamed.load(Ordering::Relaxed) {
            return;
        }
        let this = Arc::clone(self);
        tokio::spawn(async move {
            match this.delete_unnamed().await {
                Ok(()) | Err(Error::Retired) => {}
                Err(error) => {
                    this.has_left.store(true, Ordering::Relaxed);
                    warn!(error = error.chain(); "cannot delete content of a proxy; a later collection tries again");
                }
            }
        });
    }

    async fn delete_unnamed(&self) -> Result<()> {
        let Some(remote) = &self.remote else { return Ok(()) };
        let _one = remote.removing.lock().await;
        if !remote.has_unnamed.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let mut after = String::new();
        loop {
            let (name, from) = (Arc::clone(&remote.proxy.name), after);
            let batch = self.store.read(move |db| remote::unnamed(db, &name, &from, BATCH)).await?;
            let Some(last) = batch.last() else { return Ok(()) };
            after = last.digest.clone();
            for kept in batch {
                // only digests are noted
                let Some(digest) = Digest::of(&kept.digest) else { continue };
                let turn = remote.turns.try_take(&digest);
                if turn.is_none() || lock(&self.pinned).contains_key(&digest) {
                    // it may get a row; otherwise the end of the writer causes another collection
                    self.dereferenced([digest]);
                    remote.look_for_unnamed();
                    continue;
                }
                let marked = {
                    let (name, id) = (Arc::clone(&remote.proxy.name), kept.digest.clone());
                    let _pass = self.gate.enter().await?;
                    self.store.sweep(move |db| remote::leave(db, &name, &id)).await?
                };
                if marked {
                    self.delete_there(remote, &digest, &kept.namespace).await?;
                }
            }
        }
    }

    /// Deletes a blob there that is noted as leaving, and forgets it. The caller has its turn.
    async fn delete_there(&self, remote: &Remote, digest: &Digest, first: &str) -> Result<()> {
        remote.proxy.delete(&reference(first, digest), digest).await?;
        remote.near.forget(digest);
        let (name, id) = (Arc::clone(&remote.proxy.name), digest.clone());
        let _pass = self.gate.enter().await?;
        self.store.sweep(move |db| remote::forget(db, &name, id.as_str())).await
    }

    /// Reads a blob there that has a row. What is not what its digest says is deleted there, and its row stays, so that the next pull brings it.
    /// Returns whether it is right; none if it is not there.
    pub(super) async fn verify_there(&self, remote: &Remote, digest: &Digest) -> Result<Option<bool>> {
        let size = async || {
            let id = digest.clone();
            let info = self.store.read(move |db| blobs::elsewhere(db, id.as_str(), true)).await?;
            Ok::<_, Error>(info.and_then(|info| u64::try_from(info.size).ok()))
        };
        let look = async || match size().await? {
            Some(size) => match self.receive(remote, digest, size, None).await {
                Ok(()) => Ok(Some(true)),
                Err(Error::DataLoss(why)) => {
                    warn!(digest:%, error = why; "a blob is damaged");
                    Ok(Some(false))
                }
                Err(error) if error.code() == tonic::Code::NotFound => Ok(None),
                Err(error) => Err(error),
            },
            // it was removed meanwhile
            None => Ok(Some(true)),
        };
        let found = look().await?;
        if found != Some(false) {
            return Ok(found);
        }
        let _turn = remote.turns.take(digest).await;
        // it may have been written again
        let found = look().await?;
        if found == Some(false) {
            let first = self.noted(remote, digest).await?.map(|kept| kept.namespace).unwrap_or_default();
            remote.proxy.delete(&reference(&first, digest), digest).await?;
        }
        Ok(found)
    }
}

impl Writer {
    /// Makes content at the proxy of an ingest that is on the disk. If that fails, the next writer goes on with the ingest.
    pub(super) async fn commit_there(
        &mut self,
        remote: &Remote,
        ingest: Box<Ingest>,
        digest: Digest,
        labels: HashMap<String, String>,
    ) -> Result<Digest> {
        let content = Arc::clone(&self.content);
        let _turn = remote.turns.take(&digest).await;
        let size = ingest.offset;
        let recorded = async {
            let file = Arc::new(ingest.reader()?);
            let blob = Blob { file: Arc::clone(&file), path: content.files.blob(&digest).into(), size, removals: 0 };
            content.put_there(remote, &self.opening.namespace, &digest, blob).await?;
            let _pass = content.gate.enter().await?;
            let (files, name) = (Arc::clone(&content.files), self.name.clone());
            if content.pool.run(move || files.status(&name)).await??.is_none() {
                // a client has aborted it
                return Err(Error::NotFound(Object::Ingest(self.opening.reference.clone())));
            }
            let recorded = self.record(&digest, size, labels, true).await;
            recorded.map(|()| file)
        };
        match recorded.await {
            Ok(file) => {
                let path = content.files.blob(&digest);
                // it is not written to any more; that it cannot be kept costs a fetch
                if let Ok(Ok(file)) = content.pool.run(move || blocking_reopen(&file, &path)).await {
                    remote.near.put(&digest, Arc::new(file), size);
                }
                self.committed(&digest);
                self.drop_committed().await;
                Ok(digest)
            }
            Err(error @ Error::AlreadyExists(_)) => {
                self.committed(&digest);
                self.drop_committed().await;
                Err(error)
            }
            Err(error) => {
                // no row names the proxy's blob, unless the client comes again
                content.has_left.store(true, Ordering::Relaxed);
                if !matches!(error, Error::NotFound(Object::Ingest(_))) {
                    self.state = State::Writing(ingest);
                }
                Err(error)
            }
        }
    }

    /// Removes an ingest whose blob is at the proxy. A collection removes what stays of it.
    async fn drop_committed(&self) {
        let dropped = async {
            let _pass = self.content.gate.enter().await?;
            self.drop_ingest().await
        };
        if let Err(error) = dropped.await {
            debug!(reference = self.name, error = error.chain(); "cannot remove an ingest that is committed");
        }
    }

    /// Gives a row to a blob that is at the proxy, without its bytes.
    pub(super) async fn share_there(&self, remote: &Remote, digest: &Digest, size: u64, labels: HashMap<String, String>) -> Result<()> {
        let _turn = remote.turns.take(digest).await;
        let is_leaving = self.content.noted(remote, digest).await?.is_some_and(|kept| kept.is_leaving);
        if is_leaving || remote.proxy.size(digest).await? != Some(size) {
            return Err(remote.proxy.lost(digest, "is not there any more, or has another length"));
        }
        let _pass = self.content.gate.enter().await?;
        self.record(digest, size, labels, true).await
    }
}

/// The share of the disk that a fetch is going to take.
struct Room<'r> {
    remote: &'r Remote,
    size: u64,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        *lock(&self.remote.expected) -= self.size;
    }
}

/// Notes a blob in the transaction that writes its row.
pub(super) fn note(db: &mut Meta<'_>, name: &str, digest: &Digest, namespace: &Namespace) -> Result<()> {
    remote::put(db, name, digest.as_str(), namespace.as_str()).map(drop)
}

/// What is wrong with blobs that are at a proxy, as far as it says so, a sentence each. It reads none.
pub(super) fn blocking_check(settings: &ContentProxy, blobs: &[(Digest, i64)]) -> Result<Vec<String>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.on("start the executor of", Path::new("x-manager"))?.block_on(async {
        // its channel has a task
        let proxy = Proxy::new(settings);
        let mut wrong = Vec::new();
        for (digest, size) in blobs {
            match proxy.size(digest).await {
                Ok(Some(found)) if i64::try_from(found) == Ok(*size) => {}
                Ok(Some(found)) => wrong.push(format!("content proxy {}: {digest} has {found} bytes instead of {size}", proxy.name)),
                Ok(None) => wrong.push(format!("content proxy {}: {digest} is not there", proxy.name)),
                Err(error) => {
                    wrong.push(error.chain());
                    break;
                }
            }
        }
        Ok(wrong)
    })
}

/// What a blob is called there while it is written.
fn reference(namespace: &str, digest: &Digest) -> String {
    format!("{namespace}/{digest}")
}

/// Blobs that are fetched at the same time.
const FETCHES: usize = 4;
/// Bytes of the disk that fetches leave.
const SPARED_BYTES: u64 = 64 << 20;
/// Bytes in a second: a proxy that is slower, beyond its first minutes, is given up.
const LEAST_RATE: u64 = 256 << 10;
/// Blobs that are looked at in one step.
const BATCH: usize = 64;
