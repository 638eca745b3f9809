//! Unpacking ahead: layers of an image are unpacked while a client still writes them, and before it asks for it. The client needs to know
//! nothing of it.
//!
//! ```text
//! client, under a lease:  manifest, config written    layers arrive …           Stat of a chain ID          Diff.Apply of a layer's blob
//!                                   │                       │                        │ waits                        │ waits
//!                                   ▼                       ▼                        ▼                              ▼
//!                         plan ─ an unpack is meant ─▶ drafts, several at once ─▶ recorded: "it is there"   the draft becomes the
//!                                                           │                                               client's snapshot
//!                                          lease or connection ends: dropped
//! ```
//! An unpack is meant when a client lists, under a lease, what is being written (a pull shows its progress so, under the lease of all its steps; a
//! fetch alone has none there), or asks under a lease for the snapshot of a chain.
//!
//! **Invariants:** nothing is recorded that no client asked for, nor before the layer's own blob is in the client's namespace and its diffID was
//! checked. No call waits for bytes that are not on their way. Whatever fails here, the client finds what it would find without this.

pub(crate) mod adopt;
mod job;
mod session;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::{debug, info};
use tokio::sync::watch;

use super::plan::{self, Plan};
use super::unpack::Unpacker;
use crate::content::Digest;
use crate::error::Result;
use crate::name::Namespace;
use crate::snapshots::Snapshotter;
use crate::store::snapshots::Place;
use crate::store::{leases, namespaces};
use job::Job;
use session::{Document, Session};

/// Ends when a client's connection does: its sender is dropped.
pub(crate) type Connection = watch::Receiver<()>;

/// A lease in a namespace.
type Lease = (Namespace, String);

/// Unpacks ahead; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Ahead(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    unpacker: Unpacker,
    /// Whether it does anything.
    is_on: bool,
    sessions: Mutex<HashMap<Lease, Session>>,
    /// One call at a time begins jobs.
    looking: tokio::sync::Mutex<()>,
    /// How many blobs were looked at.
    #[cfg(test)]
    examined: std::sync::atomic::AtomicUsize,
}

impl Ahead {
    pub(crate) fn new(unpacker: Unpacker, is_on: bool) -> Self {
        Self(Arc::new(Inner {
            unpacker,
            is_on,
            sessions: Mutex::default(),
            looking: tokio::sync::Mutex::default(),
            #[cfg(test)]
            examined: std::sync::atomic::AtomicUsize::default(),
        }))
    }

    /// A client has written a blob, or finds it there, or reads it: it may be a manifest or a config.
    pub(crate) fn seen(&self, namespace: &Namespace, lease: Option<&str>, connection: Option<&Connection>, digest: &Digest) {
        if let Some(key) = self.session(namespace, lease, connection)
            && lock(&self.0.sessions).get_mut(&key).is_some_and(|session| session.add(digest))
        {
            self.look_later(key);
        }
    }

    /// A client that has a lease does what only one does that unpacks.
    pub(crate) fn meant(&self, namespace: &Namespace, lease: Option<&str>, connection: Option<&Connection>) {
        if let Some(key) = self.session(namespace, lease, connection)
            && lock(&self.0.sessions).get_mut(&key).is_some_and(Session::mean)
        {
            self.look_later(key);
        }
    }

    /// A client asks for the snapshot of a chain, which is not there. Returns when it is, or when there is nothing to wait for.
    pub(crate) async fn settle(&self, place: &Place, key: &str, lease: Option<&str>, connection: Option<&Connection>) {
        let (Some(chain), Ok(namespace)) = (Digest::of(key), Namespace::parse(&place.namespace)) else { return };
        if !self.0.is_on || place.snapshotter != Snapshotter::Overlayfs.name() {
            return;
        }
        if self.job(|job| job.place == *place && job.number_of(&chain).is_some()).is_none() {
            // what it has written so far may say which image that is
            let Some(key) = self.session(&namespace, lease, connection) else { return };
            if let Some(session) = lock(&self.0.sessions).get_mut(&key) {
                session.mean();
            }
            self.look(&key).await;
        }
        let Some(job) = self.job(|job| job.place == *place && job.number_of(&chain).is_some()) else { return };
        let settled = tokio::select! {
            settled = job.settle(&self.0.unpacker, &chain, lease.map(ToOwned::to_owned)) => settled,
            // another process has taken over, and the client goes on there
            () = self.0.unpacker.gate.retired() => return,
        };
        if let Err(error) = settled {
            info!(chain:%, error = error.chain(); "cannot record layers that were unpacked ahead; the client unpacks them");
        }
    }

    /// Drops what belonged to leases that are gone, whenever something was removed, and all when another process takes over.
    pub(crate) async fn watch(&self) {
        tokio::select! {
            () = self.watch_leases() => {}
            () = self.0.unpacker.gate.retired() => {}
        }
        // its jobs end when they are dropped: not while the lock is held
        let ended = std::mem::take(&mut *lock(&self.0.sessions));
        drop(ended);
    }

    async fn watch_leases(&self) {
        let mut changes = self.0.unpacker.store.changes();
        let mut removals = changes.borrow_and_update().removals;
        while changes.changed().await.is_ok() {
            let now = changes.borrow_and_update().removals;
            if std::mem::replace(&mut removals, now) == now {
                continue;
            }
            let all: Vec<_> = lock(&self.0.sessions).keys().cloned().collect();
            if all.is_empty() {
                continue;
            }
            let gone = self.0.unpacker.store.read(move |db| {
                let mut gone = Vec::new();
                for key in all {
                    if leases::get(db, key.0.as_str(), &key.1)?.is_none() {
                        gone.push(key);
                    }
                }
                Ok(gone)
            });
            match gone.await {
                Ok(gone) => gone.iter().for_each(|key| self.end(key)),
                Err(error) => debug!(error = error.chain(); "cannot look for leases"),
            }
        }
    }

    fn end(&self, key: &Lease) {
        // its jobs end when they are dropped: not while the lock is held
        let ended = lock(&self.0.sessions).remove(key);
        drop(ended);
    }

    /// The session of a lease, which is begun.
    fn session(&self, namespace: &Namespace, lease: Option<&str>, connection: Option<&Connection>) -> Option<Lease> {
        let (lease, connection) = (lease?, connection?);
        if !self.0.is_on || self.0.unpacker.gate.is_retired() {
            return None;
        }
        let key = (namespace.clone(), lease.to_owned());
        let mut sessions = lock(&self.0.sessions);
        if sessions.contains_key(&key) {
            return Some(key);
        }
        if sessions.len() >= MOST_SESSIONS {
            return None;
        }
        let (this, ended, mut connection) = (self.clone(), key.clone(), connection.clone());
        let until = tokio::spawn(async move {
            // nothing is ever sent
            while connection.changed().await.is_ok() {}
            this.end(&ended);
        });
        sessions.insert(key.clone(), Session::new(until.abort_handle()));
        Some(key)
    }

    /// A job of any client.
    fn job(&self, is_it: impl Fn(&Job) -> bool) -> Option<Arc<Job>> {
        let sessions = lock(&self.0.sessions);
        sessions.values().flat_map(|session| &session.jobs).find(|job| is_it(job)).cloned()
    }

    fn look_later(&self, key: Lease) {
        let this = self.clone();
        tokio::spawn(async move { this.look(&key).await });
    }

    /// Begins to unpack what a client has written the manifest and the config of, if it is known that it wants that.
    async fn look(&self, key: &Lease) {
        let _one_at_a_time = self.0.looking.lock().await;
        let Some(documents) = lock(&self.0.sessions).get(key).and_then(Session::to_look_at) else { return };
        for (digest, config) in documents {
            // it is not read again before
            if let Some(config) = config
                && !self.0.unpacker.content.has(&key.0, &config).await.unwrap_or_default()
            {
                continue;
            }
            match self.examine(key, &digest).await {
                Ok(document) => {
                    if let Some(session) = lock(&self.0.sessions).get_mut(key) {
                        session.examined(&digest, document);
                    }
                }
                Err(error) => debug!(blob:% = digest, error = error.chain(); "cannot look at a blob"),
            }
        }
    }

    async fn examine(&self, key: &Lease, digest: &Digest) -> Result<Document> {
        #[cfg(test)]
        self.0.examined.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (unpacker, namespace) = (&self.0.unpacker, &key.0);
        let Some(config) = plan::config_of(&unpacker.content, namespace, digest).await? else { return Ok(Document::Other) };
        if !unpacker.content.has(namespace, &config).await? {
            return Ok(Document::Manifest { config });
        }
        let Ok(plan) = Plan::read(&unpacker.content, namespace, digest).await else { return Ok(Document::Other) };
        if !self.is_default(namespace).await? || plan.layers.is_empty() {
            return Ok(Document::Other);
        }
        let place = Place { namespace: namespace.to_string(), snapshotter: Snapshotter::Overlayfs.name().to_owned() };
        // another client pulls the same image: its layers are unpacked once
        let is_under_way = self.job(|job| job.place == place && *job.plan() == plan).is_some();
        let jobs: usize = lock(&self.0.sessions).values().map(|session| session.jobs.len()).sum();
        if is_under_way || jobs >= MOST_JOBS {
            return Ok(Document::Other);
        }
        let job = Job::begin(unpacker, namespace.clone(), place, plan).await?;
        if let Some(session) = lock(&self.0.sessions).get_mut(key)
            && let Some(job) = job
        {
            debug!(manifest:% = digest, lease = key.1; "unpacking ahead");
            session.jobs.push(Arc::new(job));
        }
        Ok(Document::Other)
    }

    /// Whether clients that name no snapshotter in a namespace get the one that this works for.
    async fn is_default(&self, namespace: &Namespace) -> Result<bool> {
        let name = namespace.clone();
        let found = self.0.unpacker.store.read(move |db| namespaces::get(db, name.as_str())).await?;
        let label = found.and_then(|found| found.labels.get(DEFAULT_LABEL).cloned());
        let is_usable = self.0.unpacker.snapshots.unusable(Snapshotter::Overlayfs).is_none();
        Ok(is_usable && label.is_none_or(|name| name == Snapshotter::Overlayfs.name()))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// On a namespace: the snapshotter of clients that name none.
const DEFAULT_LABEL: &str = "containerd.io/defaults/snapshotter";
/// Leases of which it is remembered what was written under them.
const MOST_SESSIONS: usize = 256;
/// Images that are unpacked ahead at the same time, of all clients.
const MOST_JOBS: usize = 16;
