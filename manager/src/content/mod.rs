//! Content: blobs by their digest, and the ingests from which they are made.
//!
//! ```text
//! begin ─▶ ingest: bytes are hashed and written as they come ─▶ on the disk ─▶ named as a blob ─▶ row of the namespace: answered
//!              │ client gone                                                                            │ the last row is removed
//!              ▼                                                                                        ▼
//!         stays for the next writer of its reference, a day at most              taken away by the collector, then its space is freed
//! ```
//! A namespace has what it has a row of; the file belongs to all. docs/images.md has what clients see of it.
//!
//! **Invariants:** a row's file is whole and on the disk: it is named before the row is written, and removed after the last one. One writer
//! has a reference at a time. Files are touched by threads of a pool only. With a content proxy, its blobs take the place of files: `proxied.rs`.

mod arrival;
mod collect;
mod digest;
mod files;
mod near;
mod proxied;
mod proxy;
mod reference;
#[cfg(test)]
mod tests;
mod turns;
mod verify;
mod writer;

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_client::services::v1::{Info, Status};

pub(crate) use arrival::{Bytes, Found};
pub(crate) use collect::Scan;
pub(crate) use digest::{Algorithm, Digest, Hasher};
pub(crate) use verify::Verified;
pub(crate) use writer::{Opening, Writer, hold};

use crate::error::{Error, IoContext as _, Object, Result};
use crate::gate::Gate;
use crate::name::Namespace;
use crate::pools::Pool;
use crate::settings::{ContentProxy, Sharing};
use crate::store::{Meta, Resource, Store, blobs, resources};
use arrival::Arrivals;
use files::Files;
use proxied::Remote;
use reference::References;

/// All content.
#[derive(Debug)]
pub(crate) struct Content {
    store: Store,
    files: Arc<Files>,
    pool: Pool,
    gate: Gate,
    sharing: Sharing,
    references: References,
    arrivals: Arrivals,
    /// Blobs that writers are about to give another namespace, and how many do so.
    pinned: Mutex<HashMap<Digest, usize>>,
    /// Files that may have no row.
    unreferenced: Mutex<BTreeSet<Digest>>,
    /// Bytes of removed blobs.
    freed: AtomicU64,
    /// Whether something could not be removed.
    has_left: AtomicBool,
    /// Held for reading from the naming of a blob until its row is written.
    publishing: Arc<tokio::sync::RwLock<()>>,
    /// Held by the verification that reads all blobs.
    verifying: tokio::sync::Mutex<()>,
    /// The proxy that has the bytes of blobs, if one does.
    remote: Option<Remote>,
}

/// A blob that can be read, also when it is removed meanwhile.
#[derive(Debug, Clone)]
pub(crate) struct Blob {
    file: Arc<File>,
    path: Arc<Path>,
    pub(crate) size: u64,
}

impl Blob {
    /// Bytes at an offset; fewer at the end. Blocks.
    pub(crate) fn blocking_read(&self, offset: u64, bytes: usize) -> Result<Vec<u8>> {
        let left = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut buffer = vec![0; bytes.min(left)];
        self.file.read_exact_at(&mut buffer, offset).on("read blob", &self.path)?;
        Ok(buffer)
    }

    /// With bytes of it.
    fn blocking_with(self, offset: u64, bytes: usize) -> Result<(Self, Vec<u8>)> {
        let read = self.blocking_read(offset, bytes)?;
        Ok((self, read))
    }

    /// Its file, which is at no particular offset.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

/// Opens the file of a blob: the one that was fetched from a proxy, or its own.
fn blocking_open(path: &Arc<Path>, expected: u64, fetched: Option<&File>) -> Result<Blob> {
    let file = match fetched {
        Some(file) => near::blocking_reopen(file, path)?,
        None => File::options().read(true).custom_flags(nix::libc::O_NOFOLLOW).open(path).on("open blob", path)?,
    };
    let size = file.metadata().on("look at", path)?.len();
    if expected != size {
        return Err(Error::DataLoss(format!("blob {} has {size} bytes instead of {expected}", path.display())));
    }
    Ok(Blob { file: Arc::new(file), path: Arc::clone(path), size })
}

/// Whether an error says that there is no such file.
fn is_absence(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
}

pub(crate) fn not_found(digest: &Digest) -> Error {
    Error::NotFound(Object::ContentDigest(digest.to_string()))
}

impl Content {
    /// The content in a folder, which is made.
    pub(crate) fn open(folder: &Path, sharing: Sharing, store: Store, pool: Pool, gate: Gate) -> Result<Self> {
        Ok(Self {
            store,
            files: Arc::new(Files::open(folder)?),
            pool,
            gate,
            sharing,
            references: References::default(),
            arrivals: Arrivals::default(),
            pinned: Mutex::default(),
            unreferenced: Mutex::default(),
            freed: AtomicU64::new(0),
            has_left: AtomicBool::new(false),
            publishing: Arc::default(),
            verifying: tokio::sync::Mutex::default(),
            remote: None,
        })
    }

    /// The same with the bytes of blobs at a proxy.
    pub(crate) fn with_proxy(self, proxy: Option<&ContentProxy>) -> Self {
        Self { remote: proxy.map(Remote::new), ..self }
    }

    /// What is known of a blob.
    pub(crate) async fn info(&self, namespace: &Namespace, digest: &Digest) -> Result<Info> {
        let (namespace, id) = (namespace.clone(), digest.clone());
        let found = self.store.read(move |db| blobs::get(db, namespace.as_str(), id.as_str())).await?;
        found.ok_or_else(|| not_found(digest))
    }

    /// A blob, to read it.
    pub(crate) async fn read(&self, namespace: &Namespace, digest: &Digest) -> Result<Blob> {
        self.read_from(namespace, digest, 0, 0).await.map(|(blob, _nothing)| blob)
    }

    /// The same with bytes of it from an offset, fewer at its end. Docker reads blobs by 32 KiB a call: each is opened and read by one job.
    pub(crate) async fn read_from(&self, namespace: &Namespace, digest: &Digest, offset: u64, bytes: usize) -> Result<(Blob, Vec<u8>)> {
        let info = self.info(namespace, digest).await?;
        let path: Arc<Path> = self.files.blob(digest).into();
        let size = u64::try_from(info.size).unwrap_or_default();
        let near = self.remote.as_ref().and_then(|remote| remote.near(digest, size));
        let opened = {
            let path = Arc::clone(&path);
            self.pool.run(move || blocking_open(&path, size, near.as_deref())?.blocking_with(offset, bytes)).await?
        };
        let (Err(error), Some(remote)) = (&opened, &self.remote) else { return opened };
        if !matches!(error, Error::DataLoss(_)) && !is_absence(error) {
            return opened;
        }
        // what is damaged here may be sound there
        let file = self.fetch(remote, digest, size).await?;
        self.pool.run(move || blocking_open(&path, size, Some(&file))?.blocking_with(offset, bytes)).await?
    }

    /// Removes a blob from a namespace, and from the lease of the call. The collector removes its file when no other namespace has it.
    pub(crate) async fn delete(&self, namespace: &Namespace, digest: &Digest, lease: Option<String>) -> Result<()> {
        let (place, id) = (namespace.clone(), digest.clone());
        let remove = move |db: &mut Meta<'_>| {
            let held = Resource { kind: CONTENT.to_owned(), id: id.to_string() };
            if let Some(lease) = &lease {
                resources::remove(db, place.as_str(), lease, &held)?;
            }
            blobs::remove(db, place.as_str(), id.as_str())
        };
        let is_there = self.store.remove(remove).await?;
        if !is_there {
            return Err(not_found(digest));
        }
        self.dereferenced([digest.clone()]);
        Ok(())
    }

    /// Ingests of a namespace.
    pub(crate) async fn statuses(&self, namespace: &Namespace) -> Result<Vec<Status>> {
        let (files, prefix) = (Arc::clone(&self.files), format!("{namespace}/"));
        let mut statuses = self.pool.run(move || files.statuses()).await??;
        statuses.retain_mut(|(status, _lease)| {
            let reference = status.r#ref.strip_prefix(&prefix).map(ToOwned::to_owned);
            reference.map(|reference| status.r#ref = reference).is_some()
        });
        Ok(statuses.into_iter().map(|(status, _lease)| status).collect())
    }

    /// One of them.
    pub(crate) async fn status(&self, namespace: &Namespace, reference: &str) -> Result<Status> {
        let (files, name) = (Arc::clone(&self.files), name(namespace, reference));
        let status = self.pool.run(move || files.status(&name)).await??;
        let status = status.ok_or_else(|| Error::NotFound(Object::IngestStatus(reference.to_owned())))?;
        Ok(Status { r#ref: reference.to_owned(), ..status })
    }

    /// Drops an ingest.
    pub(crate) async fn abort(&self, namespace: &Namespace, reference: &str) -> Result<()> {
        let (files, name) = (Arc::clone(&self.files), name(namespace, reference));
        let is_there = self.pool.run(move || files.abort(&name)).await??;
        if is_there { Ok(()) } else { Err(Error::NotFound(Object::Ingest(reference.to_owned()))) }
    }

    /// Notes that blobs lost a row: their files go with the next collection if it was the last.
    pub(crate) fn dereferenced(&self, digests: impl IntoIterator<Item = Digest>) {
        let mut unreferenced = lock(&self.unreferenced);
        let before = unreferenced.len();
        unreferenced.extend(digests);
        if let Some(remote) = self.remote.as_ref().filter(|_| unreferenced.len() > before) {
            remote.look_for_unnamed();
        }
    }
}

/// Everything that is wrong with the files of the content that a store has, and with what a proxy has of it, a sentence each. It reads no blob.
pub(crate) fn check(folder: &Path, sizes: Vec<(String, i64)>, proxy: Option<&ContentProxy>) -> Result<Vec<String>> {
    let (mut wrong, mut elsewhere) = (Vec::new(), Vec::new());
    for (digest, size) in sizes {
        let path = folder.join("blobs").join(digest.replace(':', "/"));
        match (std::fs::symlink_metadata(&path), Digest::of(&digest).filter(|_| proxy.is_some())) {
            (Ok(about), _) if u64::try_from(size) == Ok(about.len()) => {}
            (_, Some(digest)) => elsewhere.push((digest, size)),
            (Ok(about), None) => wrong.push(format!("{} has {} bytes instead of {size}", path.display(), about.len())),
            (Err(error), None) => wrong.push(format!("{}: {error}", path.display())),
        }
    }
    if let Some(proxy) = proxy.filter(|_| !elsewhere.is_empty()) {
        wrong.extend(proxied::blocking_check(proxy, &elsewhere)?);
    }
    Ok(wrong)
}

/// What an ingest is called among those of all namespaces.
fn name(namespace: &Namespace, reference: &str) -> String {
    format!("{namespace}/{reference}")
}

/// The kind of resource that a lease holds content as.
const CONTENT: &str = "content";

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
