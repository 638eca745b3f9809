//! A thread with a connection, and its queue of jobs.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use crate::error::{Error, IoContext as _, Result};

/// A handle on a thread that does jobs one after the other; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Queue {
    path: Arc<Path>,
    jobs: mpsc::Sender<Job>,
    times: Arc<Times>,
}

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// Count and duration of its jobs.
#[derive(Debug, Default)]
struct Times {
    count: AtomicU64,
    nanos: AtomicU64,
}

/// The same at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    /// Jobs that are done.
    pub(crate) count: u64,
    /// How long they took.
    pub(crate) took: Duration,
    /// Jobs that wait.
    pub(crate) waiting: usize,
}

impl Queue {
    /// Starts a thread of that name. After each job it does `afterwards`, for which the job's caller does not wait.
    pub(super) fn start(
        name: &str,
        path: &Path,
        mut connection: Connection,
        mut afterwards: impl FnMut(&mut Connection) + Send + 'static,
    ) -> Result<Self> {
        let (jobs, mut queue) = mpsc::channel::<Job>(LENGTH);
        let times = Arc::<Times>::default();
        let of_the_thread = Arc::clone(&times);
        let run = move || {
            while let Some(job) = queue.blocking_recv() {
                let begin = Instant::now();
                job(&mut connection);
                of_the_thread.count.fetch_add(1, Ordering::Relaxed);
                of_the_thread.nanos.fetch_add(u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
                afterwards(&mut connection);
            }
        };
        thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES).spawn(run).on("start thread for", path)?;
        Ok(Self { path: path.into(), jobs, times })
    }

    /// Does a job after those that wait already.
    pub(super) async fn run<T: Send + 'static>(&self, job: impl FnOnce(&mut Connection) -> Result<T> + Send + 'static) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            // the caller may have been dropped; the change stands
            let _ = answer.send(job(connection));
        });
        self.jobs.send(job).await.map_err(|_| Error::StoreStopped)?;
        answered.await.map_err(|_| Error::StoreStopped)?.map_err(|error| super::named(error, &self.path))
    }

    /// What its jobs have cost, and how many wait.
    pub(super) fn load(&self) -> Load {
        Load {
            count: self.times.count.load(Ordering::Relaxed),
            took: Duration::from_nanos(self.times.nanos.load(Ordering::Relaxed)),
            waiting: self.jobs.max_capacity() - self.jobs.capacity(),
        }
    }
}

/// Jobs that may wait; further callers wait for a place.
const LENGTH: usize = 256;
/// SQLite needs little.
const STACK_BYTES: usize = 256 << 10;
