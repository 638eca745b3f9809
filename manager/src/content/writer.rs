//! Writers: one for each reference that is being written.
//!
//! ```text
//! Writing ──commit──▶ blob and row          Shared: another namespace has it; without a byte ──commit──▶ row
//!    ▲                                         │ bytes come nevertheless
//!    └─────────────────────────────────────────┘ the blob is copied
//! ```

use std::collections::HashMap;
use std::sync::Arc;

use containerd_client::services::v1::Info;
use hyper::body::Bytes;
use log::warn;
use prost_types::Timestamp;

use super::arrival::Arriving;
use super::digest::{Algorithm, Digest};
use super::files::Ingest;
use super::proxied::note;
use super::reference::Held;
use super::{CONTENT, Content, lock, name};
use crate::error::{Error, Object, Result};
use crate::name::Namespace;
use crate::settings::Sharing;
use crate::store::{Meta, Resource, blobs, leases, namespaces, resources};
use crate::timestamp;

/// What a writer is asked for.
#[derive(Debug, Clone)]
pub(crate) struct Opening {
    pub(crate) namespace: Namespace,
    pub(crate) reference: String,
    /// The size, if it is known; else 0.
    pub(crate) total: u64,
    pub(crate) expected: Option<Digest>,
    /// What holds the content from then on.
    pub(crate) lease: Option<String>,
}

/// The only writer of a reference.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(super) content: Arc<Content>,
    pub(super) opening: Opening,
    pub(super) name: String,
    pub(super) state: State,
    /// For those who read it at the same time.
    arriving: Option<Arriving>,
    /// Of jobs, too: they go on when their caller leaves.
    held: Arc<Held>,
}

#[derive(Debug)]
pub(super) enum State {
    Writing(Box<Ingest>),
    /// Another namespace has what is expected, or a proxy by itself.
    Shared {
        pin: Pin,
        size: u64,
        since: Timestamp,
    },
    /// It was committed, or has failed.
    Closed,
}

/// How far it is.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Progress {
    pub(crate) offset: u64,
    pub(crate) total: u64,
    pub(crate) started: Timestamp,
    pub(crate) updated: Timestamp,
    /// Of what was written so far.
    pub(crate) digest: Digest,
}

/// Keeps a blob's file.
#[derive(Debug)]
pub(super) struct Pin {
    content: Arc<Content>,
    digest: Digest,
}

impl Pin {
    fn new(content: &Arc<Content>, digest: &Digest) -> Self {
        *lock(&content.pinned).entry(digest.clone()).or_default() += 1;
        Self { content: Arc::clone(content), digest: digest.clone() }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pinned = lock(&self.content.pinned);
        if let Some(count) = pinned.get_mut(&self.digest) {
            *count -= 1;
            if *count == 0 {
                pinned.remove(&self.digest);
                if lock(&self.content.unreferenced).contains(&self.digest) {
                    // a collection has passed it over
                    self.content.store.changed_like_a_removal();
                }
            }
        }
    }
}

fn already_exists(digest: &Digest) -> Error {
    Error::AlreadyExists(Object::Content(digest.to_string()))
}

/// Adds something to a lease, if there is one to add it to.
pub(crate) fn hold(db: &mut Meta<'_>, namespace: &str, lease: Option<&str>, kind: &str, id: &str) -> Result<()> {
    let Some(lease) = lease else { return Ok(()) };
    check_lease(db, namespace, Some(lease))?;
    resources::add(db, namespace, lease, &Resource { kind: kind.to_owned(), id: id.to_owned() })
}

fn check_lease(db: &Meta<'_>, namespace: &str, lease: Option<&str>) -> Result<()> {
    match lease {
        Some(lease) if leases::get(db, namespace, lease)?.is_none() => Err(Error::NotFound(Object::NoLease)),
        _ => Ok(()),
    }
}

impl Content {
    /// Opens a reference for writing.
    ///
    /// Errors: [`Error::AlreadyExists`] when the namespace has what is expected, which the lease then holds; [`Error::Held`].
    pub(crate) async fn write(self: &Arc<Self>, opening: Opening) -> Result<Writer> {
        if opening.reference.is_empty() {
            return Err(Error::Invalid("ref must not be empty".to_owned()));
        }
        if opening.reference.len() > MAX_REFERENCE_BYTES {
            return Err(Error::Invalid(format!("a ref of {} bytes; the maximum is {MAX_REFERENCE_BYTES}", opening.reference.len())));
        }
        let name = name(&opening.namespace, &opening.reference);
        let held = self.references.take(&name).await?;
        let shared = match &opening.expected {
            Some(digest) => self.find(&opening, digest).await,
            None => Ok(None),
        };
        if self.remote.is_some() && matches!(shared, Err(Error::AlreadyExists(_))) {
            // a process that was killed may have left what it had committed
            let (files, name, _pass) = (Arc::clone(&self.files), name.clone(), self.gate.enter().await?);
            self.pool.run(move || files.abort(&name)).await??;
        }
        let shared = shared?;
        let (lease, place) = (opening.lease.clone(), opening.namespace.clone());
        if lease.is_some() {
            self.store.read(move |db| check_lease(db, place.as_str(), lease.as_deref())).await?;
        }
        let state = match shared {
            Some((pin, size)) => State::Shared { pin, size, since: timestamp::now() },
            None => self.begin(&opening, &name).await?,
        };
        let mut writer = Writer { content: Arc::clone(self), opening, name, state, arriving: None, held: Arc::new(held) };
        writer.announce()?;
        Ok(writer)
    }

    async fn begin(&self, opening: &Opening, name: &str) -> Result<State> {
        let (files, name, total, lease) = (Arc::clone(&self.files), name.to_owned(), opening.total, opening.lease.clone());
        let algorithm = opening.expected.as_ref().map_or(Algorithm::default(), Digest::algorithm);
        let _pass = self.gate.enter().await?;
        let begun = self.pool.run(move || files.begin(&name, total, algorithm, lease.as_deref())).await??;
        Ok(State::Writing(Box::new(begun)))
    }

    /// Looks for what is expected: in the namespace, which is an error; in others and at the proxy, with its length.
    async fn find(self: &Arc<Self>, opening: &Opening, digest: &Digest) -> Result<Option<(Pin, u64)>> {
        if self.is_whole(&opening.namespace, digest).await? {
            let (place, lease, id) = (opening.namespace.clone(), opening.lease.clone(), digest.clone());
            let is_held = if lease.is_some() {
                let _pass = self.gate.enter().await?;
                let hold = move |db: &mut Meta<'_>| {
                    let is_there = blobs::get(db, place.as_str(), id.as_str())?.is_some();
                    hold(db, place.as_str(), lease.as_deref().filter(|_| is_there), CONTENT, id.as_str()).map(|()| is_there)
                };
                self.store.write(hold).await?
            } else {
                true
            };
            if is_held {
                return Err(already_exists(digest));
            }
        }
        // before it is looked for: from then on it stays
        let pin = Pin::new(self, digest);
        let (id, is_shared) = (digest.clone(), self.sharing == Sharing::Shared);
        let elsewhere = self.store.read(move |db| blobs::elsewhere(db, id.as_str(), is_shared)).await?;
        let recorded = elsewhere.map(|info| info.size);
        let fits = |size: &u64| {
            (opening.total == 0 || opening.total == *size) && recorded.is_none_or(|recorded| i64::try_from(*size) == Ok(recorded))
        };
        if recorded.is_some() {
            let (files, digest) = (Arc::clone(&self.files), digest.clone());
            // a file of another length was damaged
            if let Some(size) = self.pool.run(move || files.size(&digest)).await?.filter(fits) {
                return Ok(Some((pin, size)));
            }
        }
        match &self.remote {
            Some(remote) if is_shared || recorded.is_some() => {
                Ok(self.size_there(remote, digest).await.filter(fits).map(|size| (pin, size)))
            }
            _ => Ok(None),
        }
    }

    /// Whether a namespace has a blob, and its file is there, or the proxy has it: what was lost can be written again.
    pub(crate) async fn is_whole(&self, namespace: &Namespace, digest: &Digest) -> Result<bool> {
        let (place, id) = (namespace.clone(), digest.clone());
        let Some(info) = self.store.read(move |db| blobs::get(db, place.as_str(), id.as_str())).await? else { return Ok(false) };
        let (files, of) = (Arc::clone(&self.files), digest.clone());
        let size = self.pool.run(move || files.size(&of)).await?;
        match &self.remote {
            _ if size.and_then(|size| i64::try_from(size).ok()) == Some(info.size) => Ok(true),
            Some(remote) => Ok(self.is_there(remote, digest, info.size).await),
            None => Ok(false),
        }
    }
}

impl Writer {
    /// How far it is.
    pub(crate) fn progress(&self) -> Result<Progress> {
        match &self.state {
            State::Writing(ingest) => Ok(Progress {
                offset: ingest.offset,
                total: ingest.total,
                started: ingest.started,
                updated: ingest.updated,
                digest: ingest.digest(),
            }),
            State::Shared { pin, size, since } => {
                Ok(Progress { offset: *size, total: *size, started: *since, updated: *since, digest: pin.digest.clone() })
            }
            State::Closed => Err(closed()),
        }
    }

    /// Lets others read what is written from now on, if its digest is known.
    fn announce(&mut self) -> Result<()> {
        let (State::Writing(ingest), Some(digest)) = (&self.state, &self.opening.expected) else { return Ok(()) };
        let arriving = Arriving::begin(&self.content, &self.opening.namespace, digest, ingest.reader()?, ingest.offset);
        self.arriving = Some(arriving);
        Ok(())
    }

    /// Appends bytes.
    pub(crate) async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.write_all(vec![bytes]).await
    }

    /// Appends bytes that came in several pieces, in one turn of a thread.
    pub(crate) async fn write_all(&mut self, pieces: Vec<Bytes>) -> Result<()> {
        if pieces.iter().all(Bytes::is_empty) {
            return Ok(());
        }
        self.unshare(true).await?;
        self.with_ingest(move |ingest| pieces.iter().try_for_each(|bytes| ingest.append(bytes))).await?;
        if let (Some(arriving), State::Writing(ingest)) = (&self.arriving, &self.state) {
            arriving.advance(ingest.offset);
        }
        Ok(())
    }

    /// Drops everything that has been written.
    pub(crate) async fn truncate(&mut self) -> Result<()> {
        self.unshare(false).await?;
        // who has read what is dropped now must not go on with what follows
        self.arriving = None;
        self.with_ingest(|ingest| ingest.truncate()).await?;
        self.announce()
    }

    async fn with_ingest(&mut self, job: impl FnOnce(&mut Ingest) -> Result<()> + Send + 'static) -> Result<()> {
        let State::Writing(mut ingest) = std::mem::replace(&mut self.state, State::Closed) else { return Err(closed()) };
        // another process may have taken over, and go on with the file
        let during = (self.content.gate.enter().await?, Arc::clone(&self.held));
        let (ingest, done) = self
            .content
            .pool
            .run(move || {
                let done = job(&mut ingest);
                // not with the caller, who may have left: another writer, or another process, would go on with the file meanwhile
                drop(during);
                (ingest, done)
            })
            .await?;
        self.state = State::Writing(ingest);
        done
    }

    /// Makes an ingest of what another namespace has, with its bytes or without.
    async fn unshare(&mut self, keep: bool) -> Result<()> {
        let State::Shared { pin, size, .. } = &self.state else { return Ok(()) };
        let (path, size) = (self.content.files.blob(&pin.digest), *size);
        // whose bytes they are does not matter: the digest is the same
        let from = if keep { Some(self.content.open_shared(&pin.digest, size).await?) } else { None };
        let State::Writing(mut ingest) = self.content.begin(&self.opening, &self.name).await? else { return Err(closed()) };
        let during = (self.content.gate.enter().await?, Arc::clone(&self.held));
        let copy = move || {
            ingest.truncate()?;
            if let Some(from) = from {
                ingest.copy(from.file(), &path, size)?;
            }
            drop(during);
            Ok::<_, Error>(ingest)
        };
        self.state = State::Writing(self.content.pool.run(copy).await??);
        self.announce()
    }

    /// Makes content of it, and returns its digest.
    ///
    /// Errors: [`Error::AlreadyExists`] when the namespace has it, and [`Error::Precondition`] when it is not what was expected; then nothing is
    /// left of it, except of what is too short.
    pub(crate) async fn commit(&mut self, size: u64, expected: Option<&Digest>, labels: HashMap<String, String>) -> Result<Digest> {
        crate::name::labels(&labels)?;
        let (place, lease) = (self.opening.namespace.clone(), self.opening.lease.clone());
        if lease.is_some() {
            self.content.store.read(move |db| check_lease(db, place.as_str(), lease.as_deref())).await?;
        }
        match std::mem::replace(&mut self.state, State::Closed) {
            State::Writing(ingest) => self.commit_ingest(ingest, size, expected.cloned(), labels).await,
            State::Shared { pin, size: has, since } => {
                if size != 0 && size != has {
                    self.state = State::Shared { pin, size: has, since };
                    return Err(wrong_size(&self.opening.reference, has, size));
                }
                if expected.is_some_and(|expected| *expected != pin.digest) {
                    return Err(Error::Precondition(format!("{:?} unexpected digest", self.opening.reference)));
                }
                let content = Arc::clone(&self.content);
                let named = content.publishing.read().await;
                let pass = content.gate.enter().await?;
                let (digest, lost) = (pin.digest.clone(), pin.digest.clone());
                let files = Arc::clone(&content.files);
                if content.pool.run(move || files.size(&lost)).await? == Some(has) {
                    self.record(&digest, has, labels, false).await?;
                    return Ok(digest);
                }
                drop((named, pass));
                match &content.remote {
                    Some(remote) => self.share_there(remote, &digest, has, labels).await?,
                    None => return Err(Error::DataLoss(format!("the file of content {digest} is gone, or has another length"))),
                }
                Ok(digest)
            }
            State::Closed => Err(closed()),
        }
    }

    async fn commit_ingest(
        &mut self,
        ingest: Box<Ingest>,
        size: u64,
        expected: Option<Digest>,
        labels: HashMap<String, String>,
    ) -> Result<Digest> {
        let has = ingest.offset;
        if size != 0 && has < size {
            // more may come
            self.state = State::Writing(ingest);
            return Err(wrong_size(&self.opening.reference, has, size));
        }
        let (pool, files, name) = (&self.content.pool, Arc::clone(&self.content.files), self.name.clone());
        let during = (self.content.gate.enter().await?, Arc::clone(&self.held));
        let checked = pool.run(move || {
            let algorithm = expected.as_ref().map_or(Algorithm::default(), Digest::algorithm);
            let digest = ingest.digest_by(algorithm)?;
            let is_expected = expected.as_ref().is_none_or(|expected| *expected == digest);
            if is_expected && let Err(error) = ingest.sync() {
                // bytes that could not be written may be read back from memory, and the kernel reports them lost only once: none may go on with it
                if let Err(error) = files.abort(&name) {
                    warn!(error = error.chain(); "cannot remove an ingest that cannot be written to the disk");
                }
                return Err(error);
            }
            Ok::<_, Error>((ingest, digest, expected.filter(|_| !is_expected), during))
        });
        let (ingest, digest, unmet, pass) = checked.await??;
        if let Some(expected) = unmet {
            self.drop_ingest().await?;
            return Err(Error::Precondition(format!("unexpected commit digest {digest}, expected {expected}")));
        }
        if size != 0 && has != size {
            self.drop_ingest().await?;
            return Err(wrong_size(&self.opening.reference, has, size));
        }
        drop(pass);
        let content = Arc::clone(&self.content);
        if let Some(remote) = &content.remote {
            return self.commit_there(remote, ingest, digest, labels).await;
        }
        let named = Arc::clone(&content.publishing).read_owned().await;
        let during = (named, content.gate.enter().await?, Arc::clone(&self.held));
        // until there is a row it has none
        self.content.dereferenced([digest.clone()]);
        let (files, to) = (Arc::clone(&self.content.files), digest.clone());
        // if the caller leaves, the collector looks for the file once it is named
        let (is_published, _during) = self.content.pool.run(move || (files.publish(*ingest, &to), during)).await?;
        if !is_published? {
            // a client has aborted it
            return Err(Error::NotFound(Object::Ingest(self.opening.reference.clone())));
        }
        let recorded = self.record(&digest, has, labels, false).await;
        if matches!(recorded, Ok(()) | Err(Error::AlreadyExists(_))) {
            self.committed(&digest);
        }
        recorded?;
        Ok(digest)
    }

    /// Notes that its bytes are those of a blob with a row.
    pub(super) fn committed(&mut self, digest: &Digest) {
        if let Some(arriving) = self.arriving.take() {
            arriving.whole(digest);
        }
    }

    /// Writes the row. `is_remote` if the bytes are at the proxy.
    pub(super) async fn record(&self, digest: &Digest, size: u64, labels: HashMap<String, String>, is_remote: bool) -> Result<()> {
        let (place, lease, id) = (self.opening.namespace.clone(), self.opening.lease.clone(), digest.clone());
        let now = Some(timestamp::now());
        let size = i64::try_from(size).unwrap_or(i64::MAX);
        let info = Info { digest: digest.to_string(), size, created_at: now, updated_at: now, labels };
        let proxy = self.content.remote.as_ref().filter(|_| is_remote).map(|remote| Arc::clone(&remote.proxy.name));
        let write = move |db: &mut Meta<'_>| {
            if let Some(proxy) = &proxy {
                note(db, proxy, &id, &place)?;
            }
            let is_there = blobs::get(db, place.as_str(), id.as_str())?.is_some();
            if !is_there {
                namespaces::ensure(db, place.as_str())?;
                blobs::put(db, place.as_str(), id.as_str(), &info)?;
            }
            hold(db, place.as_str(), lease.as_deref(), CONTENT, id.as_str())?;
            Ok(is_there)
        };
        let was_there = self.content.store.write(write).await?;
        self.content.arrivals.changed(&self.opening.namespace, digest);
        if was_there { Err(already_exists(digest)) } else { Ok(()) }
    }

    pub(super) async fn drop_ingest(&self) -> Result<()> {
        let (files, name) = (Arc::clone(&self.content.files), self.name.clone());
        self.content.pool.run(move || files.abort(&name)).await?.map(drop)
    }

    /// Leaves what has been written to the next writer.
    pub(crate) async fn close(mut self) -> Result<()> {
        let State::Writing(ingest) = std::mem::replace(&mut self.state, State::Closed) else { return Ok(()) };
        // otherwise another process goes on with the file
        let Ok(_pass) = self.content.gate.enter().await else { return Ok(()) };
        self.content.pool.run(move || ingest.close()).await?
    }

    /// Drops it.
    pub(crate) async fn abort(mut self) -> Result<()> {
        self.state = State::Closed;
        let _pass = self.content.gate.enter().await?;
        self.drop_ingest().await
    }
}

fn closed() -> Error {
    Error::Precondition("cannot write to or commit a closed writer".to_owned())
}

fn wrong_size(reference: &str, has: u64, size: u64) -> Error {
    Error::Precondition(format!("{reference:?} failed size validation: {has} != {size}"))
}

/// References are made of names and digests.
const MAX_REFERENCE_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::gate::Gate;
    use crate::pools::Pool;
    use crate::store::Store;

    #[tokio::test]
    async fn a_write_whose_caller_has_left_keeps_its_reference_and_its_pass_until_it_is_done() {
        let folder = scratch::Folder::new("content-left");
        let gate = Gate::default();
        let content = Content::open(&folder.join("content"), Sharing::Shared, Store::new(&folder), Pool::new("test", 2), gate.clone())
            .expect("a folder");
        let content = Arc::new(content);
        let namespace = Namespace::parse("n").expect("a name");
        let opening = Opening { namespace, reference: "r".to_owned(), total: 0, expected: None, lease: None };
        let mut writer = content.write(opening.clone()).await.expect("a writer");
        let (begun, begins) = mpsc::channel();
        let (end, ends) = mpsc::channel::<()>();
        let caller = tokio::spawn(async move {
            let slow = move |ingest: &mut Ingest| {
                begun.send(()).expect("the test waits");
                ends.recv().expect("the test ends it");
                ingest.append(b"late")
            };
            writer.with_ingest(slow).await
        });
        tokio::task::spawn_blocking(move || begins.recv()).await.expect("no panic").expect("it runs");
        caller.abort();
        assert!(caller.await.expect_err("it was given up").is_cancelled());
        assert!(gate.close(Duration::ZERO).await.is_none(), "an upgrade waits for it");
        assert!(content.references.try_take("n/r").is_none(), "another writer waits for it");
        end.send(()).expect("it runs");
        let next = loop {
            match content.write(opening.clone()).await {
                Err(Error::Held { .. }) => {}
                next => break next.expect("a writer"),
            }
        };
        assert_eq!(next.progress().expect("open").offset, 4, "it goes on behind what was written");
        assert!(gate.close(Duration::from_secs(60)).await.is_some());
    }
}
