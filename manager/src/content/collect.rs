//! What of content no row needs: files, and ingests that their writers have left.

use std::sync::Arc;
use std::time::Duration;

use containerd_client::services::v1::Status;
use log::warn;

use super::files::{age_of, remove};
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
    pub(crate) async fn collect(&self, scan: Scan) -> Result<()> {
        self.collect_ingests(scan).await?;
        if scan == Scan::All {
            let files = Arc::clone(&self.files);
            let all = self.pool.run(move || files.remove_taken().and_then(|()| files.all())).await??;
            self.dereferenced(all);
        }
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
        let files = Arc::clone(&self.files);
        let taken = self.pool.run(move || unheld.iter().map(|digest| files.take_away(digest)).collect::<Vec<_>>()).await?;
        {
            let pinned = lock(&self.pinned);
            // one that is pinned meanwhile is looked at again
            lock(&self.unreferenced).retain(|digest| !batch.contains(digest) || pinned.contains_key(digest));
        }
        drop(publishing);
        let remove_all = move || {
            for path in taken {
                // one that cannot be removed does not keep the others; all are looked at again when this process starts
                if let Err(error) = path.and_then(|path| path.map_or(Ok(()), |path| remove(&path))) {
                    warn!(error = error.chain(); "cannot remove a blob");
                }
            }
        };
        self.pool.run(remove_all).await
    }

    async fn collect_ingests(&self, scan: Scan) -> Result<()> {
        let files = Arc::clone(&self.files);
        let ingests = self.pool.run(move || files.statuses()).await??;
        if scan == Scan::All {
            let files = Arc::clone(&self.files);
            let remove_broken = move || {
                let broken = files.broken()?;
                broken.iter().filter(|path| age_of(path).is_none_or(|age| age > BROKEN)).try_for_each(|path| remove(path))
            };
            self.pool.run(remove_broken).await??;
        }
        if ingests.is_empty() {
            return Ok(());
        }
        let now = timestamp::to_nanos(&timestamp::now());
        let abandoned = self.store.read(move |db| abandoned(db, ingests, now)).await?;
        for name in abandoned {
            // one with a writer is not abandoned
            let Some(_held) = self.references.try_take(&name) else { continue };
            let _pass = self.gate.enter().await?;
            let files = Arc::clone(&self.files);
            if let Err(error) = self.pool.run(move || files.abort(&name)).await? {
                warn!(error = error.chain(); "cannot remove an ingest");
            }
        }
        Ok(())
    }
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
const BATCH: usize = 64;
/// An ingest without a lease stays that long after it was written last.
const EXPIRY: Duration = Duration::from_secs(24 * 60 * 60);
/// A folder that is no whole ingest may be in the making for that long.
const BROKEN: Duration = Duration::from_secs(60);
