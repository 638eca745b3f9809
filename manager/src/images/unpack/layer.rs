//! One layer: from its blob, or from what is being written of it, to a draft.

use std::fmt;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use log::debug;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::Unpacker;
use crate::content::{Bytes, Digest, Found, not_found};
use crate::error::{Error, Result};
use crate::images::plan::Layer;
use crate::layers::{self, Applied, Beneath, Cancel, LayerError, LayerLimits, Lowers, Target};
use crate::name::Namespace;
use crate::snapshots::{Draft, Snapshotter, blocking_usage};
use crate::store::snapshots::Usage;

/// Receives how many bytes of a layer's blob are unpacked; it must not block.
pub(in crate::images) type OnBytes = Arc<dyn Fn(u64) + Send + Sync>;

/// What is to be unpacked to where.
#[derive(Clone)]
pub(in crate::images) struct Job {
    pub(in crate::images) namespace: Namespace,
    pub(in crate::images) snapshotter: Snapshotter,
    pub(in crate::images) layer: Layer,
    /// The trees below, the nearest first, if they are known. With the snapshotter `native` they must be.
    pub(in crate::images) below: Option<Vec<PathBuf>>,
    /// Whether the blob may still arrive.
    pub(in crate::images) waits: bool,
    /// Those of the same image.
    pub(in crate::images) slots: Arc<Slots>,
    pub(in crate::images) on_bytes: OnBytes,
}

/// How many layers of one image are unpacked at once: other images get their turn, and each takes some MiB for as long as it is unpacked.
#[derive(Debug)]
pub(in crate::images) struct Slots(Semaphore);

impl Slots {
    /// Lets that many layers be unpacked at once.
    pub(in crate::images) fn new(at_once: usize) -> Self {
        Self(Semaphore::new(at_once))
    }

    /// One for a layer that arrives, if one is free: it is held for as long as the layer's client likes, so that the last one is left to those
    /// that are there.
    fn try_take_arriving(&self) -> Option<SemaphorePermit<'_>> {
        self.0.try_acquire_many(2).ok()?.split(1)
    }
}

/// A layer in a draft. Its diffID is right, and its blob is in the content store.
#[derive(Debug)]
pub(in crate::images) struct Extracted {
    pub(in crate::images) draft: Draft,
    pub(in crate::images) implicit: Vec<Vec<u8>>,
    /// Of the uncompressed layer.
    pub(in crate::images) bytes: u64,
    /// If it does not depend on the layers below.
    pub(in crate::images) usage: Option<Usage>,
}

/// What has become of a layer.
#[derive(Debug)]
pub(in crate::images) enum Outcome {
    Extracted(Box<Extracted>),
    /// What it means depends on the layers below: it is to be unpacked again when they are.
    NeedsLowers,
}

impl Unpacker {
    /// Unpacks a layer, as soon as there are bytes of it.
    ///
    /// Errors: [`Error::Precondition`] when it has another diffID.
    pub(in crate::images) async fn layer(&self, job: Job) -> Result<Outcome> {
        let blob = job.layer.blob.clone();
        loop {
            let mut changes = self.content.arrivals();
            let cancel = Cancel::default();
            let _ends_with_caller = cancel.guard();
            match self.content.bytes(&job.namespace, &blob, &cancel).await? {
                Some(Found::Whole) => {
                    // what waits has no file open; the semaphore is never closed
                    let Ok(_slot) = job.slots.0.acquire().await else { return Err(not_found(&blob)) };
                    let bytes = Bytes::Whole(self.content.read(&job.namespace, &blob).await?);
                    let work = self.work(&job, bytes, cancel.clone()).await?;
                    return self.layers.run(work).await?;
                }
                Some(Found::Arriving(follower)) if job.waits => {
                    if let Some(slot) = job.slots.try_take_arriving() {
                        let work = self.work(&job, Bytes::Arriving(follower), cancel.clone()).await?;
                        match self.arriving.try_run(work).await {
                            Ok(Ok(outcome)) => {
                                drop(slot);
                                // only then its bytes were those that were asked for
                                self.content.wait(&job.namespace, &blob).await?;
                                return Ok(outcome);
                            }
                            // its bytes may be wrong, or its client is too slow: once all of it is there, the blob decides
                            Ok(Err(error)) => debug!(layer:% = blob, error = error.chain(); "a layer that arrives cannot be unpacked yet"),
                            // no thread is free
                            Err(Ok(work)) => drop(work),
                            Err(Err(error)) => return Err(error),
                        }
                    } else {
                        drop(follower);
                    }
                    self.content.wait(&job.namespace, &blob).await?;
                }
                Some(Found::Arriving(_)) | None if !job.waits => return Err(not_found(&blob)),
                _ => changes.of(&job.namespace, &blob).await,
            }
        }
    }

    /// What a thread has to do for a layer.
    async fn work(&self, job: &Job, bytes: Bytes, cancel: Cancel) -> Result<impl FnOnce() -> Result<Outcome> + Send + 'static + use<>> {
        let below = job.below.as_ref().and_then(|below| below.first().cloned());
        let draft = self.snapshots.draft(job.snapshotter, below).await?;
        let source = Counted { bytes, read: 0, reported: 0, on_bytes: Arc::clone(&job.on_bytes) };
        let (layer, below, limits) = (job.layer.clone(), job.below.clone(), self.limits);
        Ok(move || blocking_extract(source, draft, &layer, below, limits, &cancel))
    }
}

fn blocking_extract(
    source: Counted,
    draft: Draft,
    layer: &Layer,
    below: Option<Vec<PathBuf>>,
    limits: LayerLimits,
    cancel: &Cancel,
) -> Result<Outcome> {
    let tree = draft.tree();
    let is_known = below.is_some();
    let target = match below {
        _ if !draft.is_upper() => Target::Merged(&tree),
        below => Target::Upper(&tree, Lowers::open(&below.unwrap_or_default())?),
    };
    let applied = match layers::apply(source, target, limits, cancel) {
        // for instance a hard link to a file of a lower layer
        Err(LayerError::Refused { .. }) if !is_known => return Ok(Outcome::NeedsLowers),
        applied => applied?,
    };
    check(layer, &applied)?;
    if applied.needs_lowers && !is_known {
        return Ok(Outcome::NeedsLowers);
    }
    let is_final = !draft.is_upper() || is_known || !applied.has_whiteouts;
    let usage = if is_final { Some(blocking_usage(&tree, Beneath::Known)?) } else { None };
    Ok(Outcome::Extracted(Box::new(Extracted { draft, implicit: applied.implicit, bytes: applied.bytes, usage })))
}

/// Errors: the layer is not the one that the config means.
fn check(layer: &Layer, applied: &Applied) -> Result<()> {
    let found = Digest::of_sha256(&applied.diff_id);
    if found == layer.diff_id {
        return Ok(());
    }
    Err(Error::Precondition(format!("layer {} has the diffID {found}, and its image's config says {}", layer.blob, layer.diff_id)))
}

/// Counts what is read.
struct Counted {
    bytes: Bytes,
    read: u64,
    reported: u64,
    on_bytes: OnBytes,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.bytes.read(buffer)?;
        self.read += count as u64;
        if self.read - self.reported >= REPORT_BYTES || (count == 0 && self.read > self.reported) {
            self.reported = self.read;
            (self.on_bytes)(self.read);
        }
        Ok(count)
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").field("layer", &self.layer).field("below", &self.below).field("waits", &self.waits).finish_non_exhaustive()
    }
}

/// How much is unpacked between two reports.
const REPORT_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    const AT_ONCE: usize = 4;

    #[test]
    fn layers_that_arrive_leave_one_slot_to_those_that_are_there() {
        let slots = Slots::new(AT_ONCE);
        let arriving: Vec<_> = std::iter::from_fn(|| slots.try_take_arriving()).collect();
        assert_eq!(arriving.len(), AT_ONCE - 1);
        let last = slots.0.try_acquire().expect("it is free");
        assert!(slots.0.try_acquire().is_err());
        drop((arriving, last));
        let there: Vec<_> = (0..AT_ONCE).map(|_| slots.0.try_acquire().expect("all are free")).collect();
        assert!(slots.try_take_arriving().is_none());
        drop(there);
        assert!(slots.try_take_arriving().is_some());
    }
}
