//! Pools of threads for work that would block the executor. The store has threads of its own.
//!
//! **Invariants:** no pool waits for another's threads. A job that its caller no longer waits for keeps its place until it ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{Error, Result};

/// All pools.
#[derive(Debug, Clone)]
pub(crate) struct Pools {
    /// Bundles and what is mounted in them.
    pub(crate) bundles: Pool,
    /// Mounts that are made for clients: a server that does not answer may keep all of them.
    pub(crate) mounts: Pool,
    /// Files of snapshots, for which calls wait.
    pub(crate) snapshots: Pool,
    /// Sizes of trees that are in use.
    pub(crate) usage: Pool,
    /// Copies of trees, for snapshotters without overlays.
    pub(crate) copies: Pool,
    /// Layers that are applied or created: each has another thread of its own.
    pub(crate) layers: Pool,
    /// Layers that are applied while their bytes arrive: they wait for slow clients.
    pub(crate) arriving: Pool,
    /// Deletion of files of snapshots.
    pub(crate) removal: Pool,
    /// Archives of images: as slow as the clients that send and receive them.
    pub(crate) archives: Pool,
    /// Bytes of content: hashed and written as they come, and read.
    pub(crate) content: Pool,
    /// Filters of lists: they may use all of a CPU.
    pub(crate) list_filters: Pool,
    /// Filters of subscriptions: one at a time, so that they use one CPU at most.
    pub(crate) event_filters: Pool,
}

impl Default for Pools {
    fn default() -> Self {
        Self {
            bundles: Pool::new("bundles", BUNDLES),
            mounts: Pool::new("mounts", MOUNTS),
            snapshots: Pool::new("snapshots", SNAPSHOTS),
            usage: Pool::new("usage", USAGE),
            copies: Pool::new("copies", COPIES),
            layers: Pool::new("layers", LAYERS),
            arriving: Pool::new("arriving_layers", ARRIVING),
            removal: Pool::new("removal", REMOVAL),
            archives: Pool::new("archives", ARCHIVES),
            content: Pool::new("content", CONTENT),
            list_filters: Pool::new("list_filters", LIST_FILTERS),
            event_filters: Pool::new("event_filters", EVENT_FILTERS),
        }
    }
}

impl Pools {
    /// Each of them.
    pub(crate) fn all(&self) -> [&Pool; 12] {
        [
            &self.bundles,
            &self.mounts,
            &self.archives,
            &self.content,
            &self.snapshots,
            &self.usage,
            &self.copies,
            &self.layers,
            &self.arriving,
            &self.removal,
            &self.list_filters,
            &self.event_filters,
        ]
    }
}

/// A number of threads, which exit when they are idle; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Pool {
    name: &'static str,
    threads: usize,
    free: Arc<Semaphore>,
    /// Jobs that have not ended.
    jobs: Arc<AtomicUsize>,
}

impl Pool {
    pub(crate) fn new(name: &'static str, threads: usize) -> Self {
        Self { name, threads, free: Arc::new(Semaphore::new(threads)), jobs: Arc::default() }
    }

    /// What metrics call it.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Jobs that run.
    pub(crate) fn busy(&self) -> usize {
        self.threads - self.free.available_permits()
    }

    /// Jobs that wait for a thread.
    pub(crate) fn waiting(&self) -> usize {
        self.jobs.load(Ordering::Relaxed).saturating_sub(self.busy())
    }

    /// Does a job on a thread of this pool, once one is free.
    ///
    /// Errors: [`Error::Panicked`].
    pub(crate) async fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let counted = Counted::new(&self.jobs);
        // the semaphore is never closed
        let place = Arc::clone(&self.free).acquire_owned().await.ok();
        self.run_at(place, counted, job).await
    }

    /// The same if a thread is free now: the job otherwise.
    pub(crate) async fn try_run<T: Send + 'static, J: FnOnce() -> T + Send + 'static>(&self, job: J) -> Result<T, Result<J, Error>> {
        let Ok(place) = Arc::clone(&self.free).try_acquire_owned() else { return Err(Ok(job)) };
        self.run_at(Some(place), Counted::new(&self.jobs), job).await.map_err(Err)
    }

    async fn run_at<T: Send + 'static>(
        &self,
        place: Option<OwnedSemaphorePermit>,
        counted: Counted,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        let done = tokio::task::spawn_blocking(move || {
            let result = job();
            // In this order: the next job may end before this line does, and nothing would be waiting then.
            drop(counted);
            drop(place);
            result
        });
        done.await.map_err(|source| Error::Panicked { what: self.name, source })
    }
}

struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(jobs: &Arc<AtomicUsize>) -> Self {
        jobs.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(jobs))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

const BUNDLES: usize = 13;
const MOUNTS: usize = 4;
const SNAPSHOTS: usize = 4;
const USAGE: usize = 2;
const COPIES: usize = 2;
/// As many as clients pull at once for one image.
const LAYERS: usize = 3;
/// Without a free one, a layer is applied once all of it is there.
const ARRIVING: usize = 6;
const REMOVAL: usize = 1;
/// Further imports and exports wait.
const ARCHIVES: usize = 8;
const CONTENT: usize = 8;
const LIST_FILTERS: usize = 2;
const EVENT_FILTERS: usize = 1;
/// Long reads of the store: one collection at a time.
const LONG_READS: usize = 1;
/// Of all pools.
pub(crate) const THREADS: usize = BUNDLES
    + MOUNTS
    + CONTENT
    + ARCHIVES
    + SNAPSHOTS
    + USAGE
    + COPIES
    + LAYERS
    + ARRIVING
    + REMOVAL
    + LIST_FILTERS
    + EVENT_FILTERS
    + LONG_READS;

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_job_whose_caller_is_gone_keeps_its_place_until_it_ends() {
        let pool = Pool::new("test", 1);
        let (begun, begins) = mpsc::channel();
        let (end, ends) = mpsc::channel::<()>();
        let caller = tokio::spawn({
            let pool = pool.clone();
            async move {
                pool.run(move || {
                    begun.send(()).expect("the test waits");
                    ends.recv().expect("the test ends it");
                })
                .await
            }
        });
        tokio::task::yield_now().await;
        begins.recv().expect("it runs");
        caller.abort();
        assert!(caller.await.expect_err("it was given up").is_cancelled());
        let mut next = std::pin::pin!(pool.run(|| 7));
        let early = std::future::poll_fn(|cx| std::task::Poll::Ready(next.as_mut().poll(cx).is_ready())).await;
        assert!(!early, "its thread is not free");
        assert_eq!((pool.busy(), pool.waiting()), (1, 1));
        end.send(()).expect("it runs");
        assert_eq!(next.await.expect("no panic"), 7);
        assert_eq!((pool.busy(), pool.waiting()), (0, 0));
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_frees_the_thread() {
        let pool = Pool::new("test", 1);
        let error = pool.run(|| panic!("as the test wants")).await.expect_err("it has panicked");
        assert!(matches!(error, Error::Panicked { what: "test", .. }), "{error:?}");
        assert_eq!(pool.run(|| 7).await.expect("no panic"), 7);
    }
}
