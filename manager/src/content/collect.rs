//! What of content no row needs: files, and ingests that their writers have left.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use containerd_client::services::v1::Status;
use log::warn;

use super::files::{Removed, age_of, remove};
use super::{Content, Digest, lock};
use crate::error::Result;
use crate::store::{Meta, blobs, leases, resources};
use crate::timestamp;

/// How thoroughly files are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scan {
    /// Those of which it is known that they have lost a row.
    Known,
    /// All that are there: a process that was killed may have left some.
    All,
}

impl Content {
    /// Removes files that no row needs, and ingests that nothing holds.
    pub(crate) async fn collect(self: &Arc<Self>, scan: Scan) -> Result<()> {
        if let Some(remote) = self.remote.as_ref().filter(|_| scan == Scan::All) {
            remote.look_for_unnamed();
        }
        self.collect_there();
        self.collect_ingests().await?;
        if scan == Scan::All {
            let files = Arc::clone(&self.files);
            let (taken, all) = self.pool.run(move || Ok::<_, crate::error::Error>((files.taken()?, files.all()?))).await??;
            self.remove_all(taken).await?;
            self.dereferenced(all);
        }
        self.remove_unreferenced().await
    }

    /// Removes the files of blobs that have lost a row, if it was the last.
    pub(crate) async fn remove_unreferenced(&self) -> Result<()> {
        loop {
            let batch: Vec<_> = {
                let pinned = lock(&self.pinned);
                lock(&self.unreferenced).iter().filter(|digest| !pinned.contains_key(digest)).take(BATCH).cloned().collect()
            };
            if batch.is_empty() {
                return Ok(());
            }
            self.collect_files(batch).await?;
        }
    }

    /// Removes those of the files that no namespace has.
    async fn collect_files(&self, batch: Vec<Digest>) -> Result<()> {
        // a blob that is named has its row before this goes on
        let publishing = self.publishing.write().await;
        let _pass = self.gate.enter().await?;
        let candidates = batch.clone();
        let mut unheld = self
            .store
            .read(move |db| {
                let mut unheld = Vec::new();
                for digest in candidates {
                    if !blobs::is_anywhere(db, digest.as_str())? {
                        unheld.push(digest);
                    }
                }
                Ok(unheld)
            })
            .await?;
        {
            let pinned = lock(&self.pinned);
            unheld.retain(|digest| !pinned.contains_key(digest));
        }
        let remove = |digests: Vec<Digest>| {
            let files = Arc::clone(&self.files);
            self.pool.run(move || digests.iter().map(|digest| files.remove(digest)).collect::<Vec<_>>())
        };
        // the folder is locked for half of what a removal has to do
        let half = unheld.split_off(unheld.len() / 2);
        let (removed, others) = tokio::join!(remove(unheld), remove(half));
        let removed = removed?.into_iter().chain(others?);
        {
            let pinned = lock(&self.pinned);
            let mut unreferenced = lock(&self.unreferenced);
            // one that is pinned meanwhile is looked at again
            for digest in batch.iter().filter(|digest| !pinned.contains_key(digest)) {
                unreferenced.remove(digest);
            }
        }
        drop(publishing);
        let mut aside = Vec::new();
        for removed in removed {
            match removed {
                Ok(Removed::Freed(bytes)) => drop(self.freed.fetch_add(bytes, Ordering::Relaxed)),
                Ok(Removed::Aside(path)) => aside.push(path),
                Err(error) => self.leave(&error),
            }
        }
        if aside.is_empty() { Ok(()) } else { self.remove_all(aside).await }
    }

    /// Removes files. One that cannot be removed does not keep the others.
    async fn remove_all(&self, paths: Vec<PathBuf>) -> Result<()> {
        let removed = self.pool.run(move || paths.iter().map(|path| blocking_remove(path)).collect::<Vec<_>>()).await?;
        for removed in removed {
            match removed {
                Ok(bytes) => drop(self.freed.fetch_add(bytes, Ordering::Relaxed)),
                Err(error) => self.leave(&error),
            }
        }
        Ok(())
    }

    /// Notes that something is left that a later collection has to look for.
    fn leave(&self, error: &crate::error::Error) {
        warn!(error = error.chain(); "cannot remove a file of content; a later collection tries again");
        self.has_left.store(true, Ordering::Relaxed);
    }

    /// Bytes of the blobs that were removed since this process began.
    pub(crate) fn freed(&self) -> u64 {
        self.freed.load(Ordering::Relaxed)
    }

    /// Whether something could not be removed since this was asked last.
    pub(crate) fn take_left(&self) -> bool {
        self.has_left.swap(false, Ordering::Relaxed)
    }

    async fn collect_ingests(&self) -> Result<()> {
        let files = Arc::clone(&self.files);
        let ingests = self.pool.run(move || files.statuses()).await??;
        // not at a start alone: what a power failure has left may be too young then
        let files = Arc::clone(&self.files);
        let mut broken = self.pool.run(move || files.broken()).await??;
        broken.retain(|path| age_of(path).is_none_or(|age| age > BROKEN));
        self.remove_all(broken).await?;
        if ingests.is_empty() {
            return Ok(());
        }
        let now = timestamp::to_nanos(&timestamp::now());
        let names = self.store.read(move |db| abandoned(db, ingests, now)).await?;
        for name in names {
            // one with a writer is not abandoned
            let Some(_held) = self.references.try_take(&name) else { continue };
            let _pass = self.gate.enter().await?;
            // it may have been written, or leased, since it was listed; from now on it is not
            let (files, of) = (Arc::clone(&self.files), name.clone());
            let Some(status) = self.pool.run(move || files.status_with_lease(&of)).await?? else { continue };
            let now = timestamp::to_nanos(&timestamp::now());
            if self.store.read(move |db| abandoned(db, vec![status], now)).await?.is_empty() {
                continue;
            }
            let files = Arc::clone(&self.files);
            if let Err(error) = self.pool.run(move || files.abort(&name)).await? {
                self.leave(&error);
            }
        }
        Ok(())
    }
}

/// Removes a file or folder, and returns the bytes of a file.
fn blocking_remove(path: &Path) -> Result<u64> {
    let bytes = path.symlink_metadata().ok().filter(std::fs::Metadata::is_file).map_or(0, |about| about.len());
    remove(path).map(|()| bytes)
}

/// Names of ingests that no lease holds: their lease is gone, or they have none and were not written for a day.
fn abandoned(db: &Meta<'_>, ingests: Vec<(Status, Option<String>)>, now: i64) -> Result<Vec<String>> {
    let mut abandoned = Vec::new();
    for (status, lease) in ingests {
        let Some((namespace, reference)) = status.r#ref.split_once('/') else { continue };
        let is_leased = match &lease {
            Some(lease) => leases::get(db, namespace, lease)?.is_some(),
            None => false,
        };
        let updated = status.updated_at.as_ref().map_or(0, timestamp::to_nanos);
        let is_recent = lease.is_none() && now.saturating_sub(updated) < i64::try_from(EXPIRY.as_nanos()).unwrap_or(i64::MAX);
        if !is_leased && !is_recent && !resources::is_leased(db, namespace, "ingests", reference)? {
            abandoned.push(status.r#ref);
        }
    }
    Ok(abandoned)
}

/// Files that are looked at while no blob can be committed.
const BATCH: usize = 128;
/// An ingest without a lease stays that long after it was written last.
const EXPIRY: Duration = Duration::from_secs(24 * 60 * 60);
/// A folder that is no whole ingest may be in the making for that long.
const BROKEN: Duration = Duration::from_secs(60);
