//! Garbage collection: what nothing refers to is removed.
//!
//! ```text
//! changes of the store ─▶ schedule ─▶ mark: a query beside the writer ─▶ sweep: rows, each checked again, some at a time ─▶ files
//! sync deletes ──────────────▲                                                                                        └─▶ answered
//! ```
//! The rules are in the store (`garbage.rs`), and containerd's: docs/images.md has them.
//!
//! **Invariants:** nothing is removed that a root leads to at that moment; rows go before files. What cannot be removed does not keep the rest.

mod schedule;
#[cfg(test)]
mod tests;

use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use containerd_client::services::v1::ImageDelete;
use log::{debug, warn};
use tokio::sync::oneshot;

pub(crate) use schedule::run;

use crate::content::{Content, Digest, Scan};
use crate::error::{Error, Result};
use crate::events::Exchange;
use crate::gate::Gate;
use crate::mounts::Mounts;
use crate::name::Namespace;
use crate::settings::Collection;
use crate::store::{Meta, Node, Store, Swept, garbage};
use crate::timestamp;

/// What removes the files of snapshots.
#[async_trait]
pub(crate) trait Snapshotters: Debug + Send + Sync {
    /// Removes the files of snapshots whose rows are gone, each with its number; with [`Scan::All`] also those that a process has left which
    /// was killed. It logs what it cannot remove.
    async fn remove_files(&self, removed: Vec<(Node, i64)>, scan: Scan);

    /// Whether something could not be removed since this was asked last.
    fn take_left(&self) -> bool;
}

/// The collector.
#[derive(Debug)]
pub(crate) struct Collector {
    store: Store,
    content: Arc<Content>,
    snapshotters: Arc<dyn Snapshotters>,
    mounts: Mounts,
    events: Arc<Exchange>,
    gate: Gate,
    settings: Collection,
    /// Those that wait for a collection to begin and end.
    waiting: Mutex<Vec<oneshot::Sender<Result<()>>>>,
    wake: tokio::sync::Notify,
    totals: Mutex<Totals>,
}

/// What collections have done since this process began.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Totals {
    pub(crate) collections: u64,
    /// Those that ended with an error.
    pub(crate) failed: u64,
    /// How long they took, without the removal of files.
    pub(crate) took: Duration,
    pub(crate) content: u64,
    pub(crate) images: u64,
    pub(crate) snapshots: u64,
    /// Of the files of blobs, and of snapshots as they were measured when they were committed.
    pub(crate) freed_bytes: u64,
}

impl Collector {
    pub(crate) fn new(
        store: Store,
        content: Arc<Content>,
        snapshotters: Arc<dyn Snapshotters>,
        mounts: Mounts,
        events: Arc<Exchange>,
        gate: Gate,
        settings: Collection,
    ) -> Self {
        let (waiting, wake) = (Mutex::default(), tokio::sync::Notify::new());
        Self { store, content, snapshotters, mounts, events, gate, settings, waiting, wake, totals: Mutex::default() }
    }

    /// What collections have done since this process began.
    pub(crate) fn totals(&self) -> Totals {
        let totals = *self.totals_mut();
        Totals { freed_bytes: totals.freed_bytes.saturating_add(self.content.freed()), ..totals }
    }

    fn totals_mut(&self) -> std::sync::MutexGuard<'_, Totals> {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether something could not be removed since this was asked last.
    fn take_left(&self) -> bool {
        // both
        self.content.take_left() | self.snapshotters.take_left()
    }

    /// Notes that a reference was removed by a change that is no removal.
    pub(crate) fn removed(&self) {
        self.store.changed_like_a_removal();
    }

    /// Waits for a collection that begins from now on. If another process takes over meanwhile, that one collects when it starts.
    ///
    /// Errors: it has failed.
    pub(crate) async fn collect(&self) -> Result<()> {
        let (done, is_done) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(done);
        self.wake.notify_one();
        tokio::select! {
            done = is_done => match done {
                Ok(Err(Error::Retired)) | Err(_) => Ok(()),
                Ok(done) => done,
            },
            () = self.gate.retired() => Ok(()),
        }
    }

    /// One collection, and how long it kept the store busy.
    async fn collect_now(&self, scan: Scan) -> Result<Duration> {
        let begin = Instant::now();
        let now = timestamp::to_nanos(&timestamp::now());
        let marked: Arc<[Node]> = self.store.read_beside(move |db| garbage::mark(db, now)).await?.into();
        let mut took = begin.elapsed();
        let (mut all, mut most) = (Swept::default(), BATCH);
        while all.seen < marked.len() {
            let rows = async {
                let begin = Instant::now();
                let swept = self.sweep(now, &marked, all.seen, most).await;
                took += begin.elapsed();
                swept
            };
            // files of the previous rows go meanwhile; those that fail are looked at again below
            let (swept, _files) = tokio::join!(rows, self.content.remove_unreferenced());
            let swept = match swept {
                // fewer take less of the disk
                Err(error) if error.is_full() && most > FEW => {
                    most = FEW;
                    continue;
                }
                swept => swept?,
            };
            for image in &swept.images {
                self.publish(image);
            }
            self.content.dereferenced(swept.content.iter().filter_map(|node| Digest::of(&node.id)));
            all.content.extend(swept.content);
            all.images.extend(swept.images);
            all.snapshots.extend(swept.snapshots);
            all.bytes = all.bytes.saturating_add(swept.bytes);
            all.seen += swept.seen;
        }
        let (content, images, snapshots) = (all.content.len(), all.images.len(), all.snapshots.len());
        {
            let mut totals = self.totals_mut();
            totals.collections += 1;
            totals.took += took;
            totals.content += content as u64;
            totals.images += images as u64;
            totals.snapshots += snapshots as u64;
            totals.freed_bytes = totals.freed_bytes.saturating_add(u64::try_from(all.bytes).unwrap_or_default());
        }
        if content + images + snapshots > 0 {
            debug!(content, images, snapshots, took:?; "garbage collected");
        }
        if !all.snapshots.is_empty() || scan == Scan::All {
            self.snapshotters.remove_files(all.snapshots, scan).await;
        }
        // one that fails does not keep the other, nor does a mount that hangs
        let content = self.content.collect(scan).await;
        self.mounts.collect().await?;
        content?;
        Ok(took)
    }

    /// Removes the rows of those of the marked objects that still no root leads to, from one of them on: as many as other writes do not wait for.
    async fn sweep(&self, now: i64, marked: &Arc<[Node]>, from: usize, most: usize) -> Result<Swept> {
        let (marked, store) = (Arc::clone(marked), self.store.clone());
        let _pass = self.gate.enter().await?;
        let sweep = move |db: &mut Meta<'_>| {
            let begin = Instant::now();
            let is_enough = |count| count >= most || begin.elapsed() >= SHORT && store.has_waiting_writes();
            garbage::sweep(db, now, &marked[from..], &is_enough)
        };
        self.store.sweep(sweep).await
    }

    fn publish(&self, image: &Node) {
        match Namespace::parse(&image.namespace) {
            Ok(namespace) => self.events.publish(&namespace, "/images/delete", &ImageDelete { name: image.id.clone() }),
            Err(error) => warn!(error = error.chain(); "an image was in no namespace"),
        }
    }
}

/// Objects that are removed in one transaction: rows are spread over the store by the digests of blobs, and each transaction writes every page that
/// it changes once.
const BATCH: usize = 4096;
/// The same when the disk is nearly full.
const FEW: usize = 128;
/// For that long other writes wait for the next commit: as long as for the disk.
const SHORT: Duration = Duration::from_millis(10);
