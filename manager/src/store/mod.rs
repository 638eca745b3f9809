//! The metadata store: everything that must outlive this process, in one SQLite file.
//!
//! ```text
//! callers ──jobs──▶ one thread, one connection ──▶ meta.db, meta.db-wal
//! ```
//! What is acknowledged to a client is written with [`Store::write`] and survives a power failure. What only this process needs after
//! its own crash is written with [`Store::note`], which waits for no disk. docs/decisions/0009-sqlite-for-metadata.md has the reasons.
//!
//! **Invariant:** a job is one transaction. It is committed whole or not at all.

mod facts;
mod objects;
mod processes;
mod schema;
mod upkeep;

use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::{fs, io};

use rusqlite::{Connection, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};
use tonic::Code;

pub(crate) use facts::{new_boot, restarts, uuid};
pub(crate) use objects::{Resource, containers, leases, namespaces, resources};
pub(crate) use processes::{Exit, ended, execs, exits};
pub(crate) use upkeep::{backup, check, rehearse};

use crate::error::{Error, IoContext as _, Result};

/// A handle on the store; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    jobs: mpsc::Sender<Job>,
}

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

impl Store {
    /// Opens the store, makes it if there is none, and brings an older one up to date.
    ///
    /// Errors: with a sentence, when the file is something else, damaged, or of a newer version.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::DirBuilder::new().recursive(true).mode(0o711).create(folder).on("make folder", folder)?;
        fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path).on("open metadata store", path)?;
        for suffix in ["", "-wal", "-shm"] {
            for_root_alone(&with_suffix(path, suffix))?;
        }
        let mut connection = Connection::open(path).doing("open")?;
        schema::prepare(&mut connection, path)?;
        let (jobs, mut queue) = mpsc::channel::<Job>(QUEUE);
        let run = move || {
            while let Some(job) = queue.blocking_recv() {
                job(&mut connection);
            }
        };
        thread::Builder::new().name("store".to_owned()).stack_size(STACK_BYTES).spawn(run).on("start thread for", path)?;
        Ok(Self { jobs })
    }

    /// Reads.
    pub(crate) async fn read<T: Send + 'static>(&self, job: impl FnOnce(&Connection) -> Result<T> + Send + 'static) -> Result<T> {
        self.run(|connection| {
            let transaction = connection.transaction().doing("begin")?;
            job(&transaction)
        })
        .await
    }

    /// Changes something so that it survives everything but the loss of the disk.
    ///
    /// Errors: nothing has changed.
    pub(crate) async fn write<T: Send + 'static>(&self, job: impl FnOnce(&Connection) -> Result<T> + Send + 'static) -> Result<T> {
        self.run(|connection| transact(connection, "FULL", job)).await
    }

    /// Changes something so that it survives the crash of this process; after a power failure it may not have happened.
    ///
    /// Errors: nothing has changed.
    pub(crate) async fn note<T: Send + 'static>(&self, job: impl FnOnce(&Connection) -> Result<T> + Send + 'static) -> Result<T> {
        self.run(|connection| transact(connection, "NORMAL", job)).await
    }

    /// The same, and then does `then`, whether or not it could be noted, before any other job: it must be short.
    pub(crate) async fn note_and_then<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
        then: impl FnOnce() + Send + 'static,
    ) -> Result<T> {
        self.run(|connection| {
            let noted = transact(connection, "NORMAL", job);
            then();
            noted
        })
        .await
    }

    /// Moves everything from the log into the file, so that the file alone is the store: before this process stops.
    pub(crate) async fn settle(&self) -> Result<()> {
        self.run(|connection| connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_row| Ok(())).doing("settle")).await
    }

    async fn run<T: Send + 'static>(&self, job: impl FnOnce(&mut Connection) -> Result<T> + Send + 'static) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            // whoever asked may have gone; the change stands
            let _ = answer.send(job(connection));
        });
        let stopped = || Error::Unavailable("the metadata store has stopped".to_owned());
        self.jobs.send(job).await.map_err(|_| stopped())?;
        answered.await.map_err(|_| stopped())?
    }
}

/// Corrects the mode of a file, if it is there: a backup may have been put in place by any means, and whoever can open the store can lock it.
fn for_root_alone(path: &Path) -> Result<()> {
    match fs::set_permissions(path, fs::Permissions::from_mode(0o600)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).on("set mode of", path),
        _ => Ok(()),
    }
}

/// The name of a file that SQLite keeps beside the store.
fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.to_owned().into_os_string();
    name.push(suffix);
    name.into()
}

fn transact<T>(connection: &mut Connection, synchronous: &str, job: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
    connection.pragma_update(None, "synchronous", synchronous).doing("choose durability")?;
    let result = attempt(connection, job);
    if let Err(error) = &result
        && error.code() == Code::ResourceExhausted
    {
        // what the log holds twice may be the space that the next one needs; whether it was enough shows then
        let _ = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_row| Ok(()));
    }
    result
}

fn attempt<T>(connection: &mut Connection, job: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).doing("begin")?;
    let result = job(&transaction)?;
    transaction.commit().doing("commit")?;
    Ok(result)
}

/// Names what was done when SQLite failed.
trait Doing<T> {
    fn doing(self, op: &'static str) -> Result<T>;
}

impl<T> Doing<T> for rusqlite::Result<T> {
    fn doing(self, op: &'static str) -> Result<T> {
        self.map_err(|source| Error::Store { op, source })
    }
}

/// Jobs that may wait; further callers wait for a place.
const QUEUE: usize = 256;
/// SQLite needs little.
const STACK_BYTES: usize = 256 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_follows_a_note_finds_it_committed_and_other_jobs_come_later() {
        let folder = std::env::temp_dir().join(format!("x-manager-store-{}", std::process::id()));
        let path = folder.join("meta.db");
        let store = Store::open(&path).expect("a new store");
        let (found, finds) = std::sync::mpsc::channel();
        let then = move || {
            let other = Connection::open(path).expect("a store");
            found.send(namespaces::list(&other).expect("read").len()).expect("somebody listens");
        };
        let noted = store.note_and_then(|db| namespaces::ensure(db, "one"), then);
        let (noted, later) = tokio::join!(noted, store.note(|db| namespaces::ensure(db, "two")));
        assert!(noted.is_ok() && later.is_ok());
        assert_eq!(finds.recv(), Ok(1));
        drop(store);
        fs::remove_dir_all(folder).expect("removal");
    }
}
