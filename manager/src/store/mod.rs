//! The metadata store: all data that must survive this process, in two SQLite files.
//!
//! ```text
//!          ┌─ write, remove ─▶ thread store ──────────▶ ROOT/meta.db, -wal   objects of the API; waits for the disk
//! callers ─┼─ read ──────────▶ thread store-reader ──▶    the same           waits for no write
//!          └─ note, recall ──▶ thread notes ──────────▶ STATE/notes.db       what is true of tasks until the next boot; in memory
//! ```
//! What is acknowledged to a client survives a power failure ([`Store::write`]). What only this process needs after its own crash, until the
//! next boot, is noted ([`Store::note`]) beside the bundles, on a file system in memory.
//! docs/decisions/0009-sqlite-for-metadata.md has the reasons.
//!
//! **Invariants:** a job is one transaction, committed whole or not at all. A read writes nothing, not even to the index of the log, which is
//! on the disk as well: see `leave_mark`. No statement reaches the wrong file, and no read changes anything: a job gets its file as a type of
//! its own, [`Meta`] or [`Notes`], and exclusively only if it may change it.

mod conditions;
mod edges;
mod facts;
pub(crate) mod garbage;
mod labels;
mod objects;
mod processes;
pub(crate) mod proxied;
mod queue;
pub(crate) mod remote;
mod reserve;
mod schema;
pub(crate) mod snapshots;
mod upkeep;

use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::{fs, io};

use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};
use tokio::sync::watch;

pub(crate) use facts::{new_boot, restarts, uuid};
pub(crate) use garbage::{Node, Swept, is_mount_held};
pub(crate) use labels::Wanted;
pub(crate) use objects::{Resource, blobs, containers, images, leases, namespaces, resources, sandboxes};
pub(crate) use processes::{Exit, Kind, ended, execs, exits};
pub(crate) use queue::Load;
pub(crate) use upkeep::{Aside, backup, check, rehearse, sizes};

use crate::error::{Error, IoContext as _, Result};
use queue::Queue;
use reserve::Reserve;

/// A handle on the store; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    files: Files,
    writer: Queue,
    reader: Queue,
    notes: Queue,
    reserve: Reserve,
    changes: watch::Sender<Changes>,
}

/// How often the metadata was changed since this process began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Changes of any kind.
    pub(crate) all: u64,
    /// Those that may have left garbage.
    pub(crate) removals: u64,
}

/// Where the store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Files {
    /// Data that survives a reboot.
    pub(crate) meta: PathBuf,
    /// Data that does not.
    pub(crate) notes: PathBuf,
}

/// `meta.db` within one transaction; `&mut` in one that may change it.
#[derive(Debug)]
pub(crate) struct Meta<'t>(&'t Connection);

/// The same for `notes.db`.
#[derive(Debug)]
pub(crate) struct Notes<'t>(&'t Connection);

impl Store {
    /// A new one for a test.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn new(folder: &Path) -> Self {
        Self::open(&Files { meta: folder.join("meta.db"), notes: folder.join("notes.db") }).expect("a new store")
    }

    /// Opens the store, creates it if there is none, and migrates an older one.
    ///
    /// Errors: with a sentence, when a file is something else, damaged, or of a newer version.
    pub(crate) fn open(files: &Files) -> Result<Self> {
        let meta = open_file(&files.meta, &schema::META)?;
        let notes = open_file(&files.notes, &schema::NOTES)?;
        notes.pragma_update(None, "synchronous", "OFF").on_store(&files.notes, "set up")?;
        // a large transaction would write a page again and again otherwise; afterwards the memory is free
        meta.pragma_update(None, "cache_spill", SPILL_PAGES).on_store(&files.meta, "set up")?;
        // from here on the WAL is checkpointed between jobs, when no caller waits for it
        meta.pragma_update(None, "wal_autocheckpoint", 0).on_store(&files.meta, "set up")?;
        leave_mark(&meta);
        let reader = open_to_read(&files.meta)?;
        let reserve = Reserve::beside(&files.meta);
        reserve.keep();
        let log = with_suffix(&files.meta, "-wal");
        let move_log = move |connection: &mut Connection| {
            if fs::metadata(&log).is_ok_and(|about| about.len() > LOG_BYTES) {
                checkpoint(connection, "PASSIVE");
            }
        };
        Ok(Self {
            files: files.clone(),
            writer: Queue::start("store", &files.meta, meta, move_log)?,
            reader: Queue::start("store-reader", &files.meta, reader, |_| {})?,
            notes: Queue::start("notes", &files.notes, notes, |_| {})?,
            reserve,
            changes: watch::Sender::default(),
        })
    }

    /// Reads what was written, without waiting for what is being written.
    pub(crate) async fn read<T: Send + 'static>(&self, job: impl FnOnce(&Meta<'_>) -> Result<T> + Send + 'static) -> Result<T> {
        self.reader.run(|connection| look(connection, |db| job(&Meta(db)))).await
    }

    /// Reads with a connection and a thread of its own: for what takes long, so that other reads do not wait for it.
    pub(crate) async fn read_beside<T: Send + 'static>(&self, job: impl FnOnce(&Meta<'_>) -> Result<T> + Send + 'static) -> Result<T> {
        let path = self.files.meta.clone();
        let read = move || {
            let mut connection = open_to_read(&path)?;
            look(&mut connection, |db| job(&Meta(db))).map_err(|error| named(error, &path))
        };
        tokio::task::spawn_blocking(read).await.map_err(|source| Error::Panicked { what: "a long read", source })?
    }

    /// Whether a write waits for another to end.
    pub(crate) fn has_waiting_writes(&self) -> bool {
        self.writer.load().waiting > 0
    }

    /// Makes a change that survives everything but the loss of the disk.
    ///
    /// Errors: nothing has changed.
    pub(crate) async fn write<T: Send + 'static>(&self, job: impl FnOnce(&mut Meta<'_>) -> Result<T> + Send + 'static) -> Result<T> {
        let written = self
            .writer
            .run(|connection| {
                let result = durably(connection, job);
                if is_full(&result) {
                    // duplicates in the WAL may take the space that the next write needs
                    checkpoint(connection, "TRUNCATE");
                }
                result
            })
            .await;
        if written.is_ok() {
            self.changes.send_modify(|changes| changes.all += 1);
        }
        written
    }

    /// How often it was changed.
    pub(crate) fn changes(&self) -> watch::Receiver<Changes> {
        self.changes.subscribe()
    }

    /// Counts a change that may have left garbage, though it was no removal.
    pub(crate) fn changed_like_a_removal(&self) {
        self.changes.send_modify(|changes| changes.removals += 1);
    }

    /// The same for removals: on a full disk they can use the reserve.
    ///
    /// Errors: nothing has changed.
    pub(crate) async fn remove<T: Send + 'static>(&self, job: impl Fn(&mut Meta<'_>) -> Result<T> + Send + 'static) -> Result<T> {
        let removed = self.sweep(job).await;
        if removed.is_ok() {
            self.changes.send_modify(|changes| {
                changes.all += 1;
                changes.removals += 1;
            });
        }
        removed
    }

    /// The same for what is removed because nothing refers to it.
    ///
    /// Errors: nothing has changed.
    pub(crate) async fn sweep<T: Send + 'static>(&self, job: impl Fn(&mut Meta<'_>) -> Result<T> + Send + 'static) -> Result<T> {
        let reserve = self.reserve.clone();
        self.writer
            .run(move |connection| {
                let mut result = durably(connection, &job);
                if is_full(&result) {
                    checkpoint(connection, "TRUNCATE");
                    result = durably(connection, &job);
                }
                if is_full(&result) && reserve.give_up() {
                    result = durably(connection, &job);
                    // frees the space of the WAL
                    checkpoint(connection, "TRUNCATE");
                }
                result
            })
            .await
    }

    /// Notes something about tasks so that it survives a crash of this process. It waits for no disk.
    ///
    /// Errors: nothing has changed.
    pub(crate) async fn note<T: Send + 'static>(&self, job: impl FnOnce(&mut Notes<'_>) -> Result<T> + Send + 'static) -> Result<T> {
        self.note_and_then(job, || {}).await
    }

    /// The same, and then does `then`, whether or not it could be noted, before any other note is taken: it must be short.
    pub(crate) async fn note_and_then<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Notes<'_>) -> Result<T> + Send + 'static,
        then: impl FnOnce() + Send + 'static,
    ) -> Result<T> {
        self.notes
            .run(|connection| {
                let noted = change(connection, |db| job(&mut Notes(db)));
                then();
                noted
            })
            .await
    }

    /// Reads what was noted.
    pub(crate) async fn recall<T: Send + 'static>(&self, job: impl FnOnce(&Notes<'_>) -> Result<T> + Send + 'static) -> Result<T> {
        self.notes.run(|connection| look(connection, |db| job(&Notes(db)))).await
    }

    /// What its threads have done: name and load.
    pub(crate) fn loads(&self) -> [(&'static str, Load); 3] {
        [("write", self.writer.load()), ("read", self.reader.load()), ("note", self.notes.load())]
    }

    /// Its files: name and size in bytes.
    pub(crate) fn sizes(&self) -> Vec<(&'static str, u64)> {
        let files =
            [("meta", self.files.meta.clone()), ("log", with_suffix(&self.files.meta, "-wal")), ("notes", self.files.notes.clone())];
        files.into_iter().filter_map(|(name, path)| Some((name, fs::metadata(path).ok()?.len()))).collect()
    }
}

/// Opens a file of the store that is there.
fn open_to_read(path: &Path) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let reader = Connection::open_with_flags(path, flags).on_store(path, "open")?;
    schema::set_up(&reader).on_store(path, "set up")?;
    Ok(reader)
}

/// Opens a file of the store, or makes it.
fn open_file(path: &Path, schema: &schema::Schema) -> Result<Connection> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::DirBuilder::new().recursive(true).mode(0o711).create(folder).on("make folder", folder)?;
    fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path).on("open metadata store", path)?;
    for suffix in ["", "-wal", "-shm"] {
        for_root_alone(&with_suffix(path, suffix))?;
    }
    let mut connection = Connection::open(path).on_store(path, "open")?;
    schema.prepare(&mut connection, path)?;
    Ok(connection)
}

/// Corrects the mode of a file, if it exists: a restored backup may have any mode, and a process that can open the store can lock it.
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

/// One transaction that changes nothing.
fn look<T>(connection: &mut Connection, job: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
    let transaction = connection.transaction().doing("begin")?;
    job(&transaction)
}

/// One transaction, committed unless the job fails.
fn change<T>(connection: &mut Connection, job: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).doing("begin")?;
    let result = job(&transaction)?;
    transaction.commit().doing("commit")?;
    Ok(result)
}

fn durably<T>(connection: &mut Connection, job: impl FnOnce(&mut Meta<'_>) -> Result<T>) -> Result<T> {
    let result = change(connection, |db| job(&mut Meta(db)));
    leave_mark(connection);
    result
}

/// Sets this connection's read mark in the WAL index: a reader that finds none for the last commit would write one, and the index is a file
/// beside the store, so that the read would wait for a slow disk.
fn leave_mark(connection: &Connection) {
    // if it fails, the reader sets one
    let _ = connection.query_row("SELECT EXISTS (SELECT 1 FROM facts)", [], |_| Ok(()));
}

fn is_full<T>(result: &Result<T>) -> bool {
    result.as_ref().is_err_and(Error::is_full)
}

/// Checkpoints the WAL. What cannot be moved now is moved later.
fn checkpoint(connection: &Connection, mode: &str) {
    let _ = connection.query_row(&format!("PRAGMA wal_checkpoint({mode})"), [], |_row| Ok(()));
}

/// Names what was done when SQLite failed.
trait Doing<T> {
    fn doing(self, op: &'static str) -> Result<T>;
    /// The same, with the file; damage is reported as such.
    fn on_store(self, path: &Path, op: &'static str) -> Result<T>;
}

impl<T> Doing<T> for rusqlite::Result<T> {
    fn doing(self, op: &'static str) -> Result<T> {
        self.map_err(|source| Error::Store { op, source })
    }

    fn on_store(self, path: &Path, op: &'static str) -> Result<T> {
        self.map_err(|source| named(Error::Store { op, source }, path))
    }
}

/// Names the file in an error of SQLite, and what to do if it is damaged.
fn named(error: Error, path: &Path) -> Error {
    let path = || path.to_owned();
    match error {
        Error::Store { source, .. } if matches!(source.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)) => {
            Error::Damaged { path: path(), source }
        }
        Error::Store { op, source } => Error::StoreFile { op, path: path(), source },
        other => other,
    }
}

/// Pages that one transaction may change before any are written to the WAL: 4 MiB.
const SPILL_PAGES: i64 = 1024;
/// A longer WAL is checkpointed.
const LOG_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn files(folder: &Path) -> Files {
        Files { meta: folder.join("root/meta.db"), notes: folder.join("state/notes.db") }
    }

    #[tokio::test]
    async fn what_follows_a_note_finds_it_committed_and_other_notes_come_later() {
        let folder = scratch::Folder::new("store");
        let files = files(&folder);
        let store = Store::open(&files).expect("a new store");
        let (found, finds) = std::sync::mpsc::channel();
        let then = move || {
            let other = Connection::open(&files.notes).expect("a store");
            found.send(execs::list(&Notes(&other), "n", "c").expect("read").len()).expect("the test waits");
        };
        let noted = store.note_and_then(|db| execs::add(db, "n", "c", "one"), then);
        let (noted, later) = tokio::join!(noted, store.note(|db| execs::add(db, "n", "c", "two")));
        assert!(noted.is_ok() && later.is_ok());
        assert_eq!(finds.recv(), Ok(1));
        drop(store);
    }

    #[tokio::test]
    async fn reads_and_notes_proceed_while_a_write_waits() {
        let folder = scratch::Folder::new("store");
        let store = Store::open(&files(&folder)).expect("a new store");
        store.write(|db| namespaces::ensure(db, "one")).await.expect("room");
        let (proceed, waits) = std::sync::mpsc::channel::<()>();
        let writing = store.write(move |db| {
            namespaces::ensure(db, "two")?;
            waits.recv().expect("the test proceeds");
            Ok(())
        });
        let beside = async {
            let before = store.read(namespaces::list).await.expect("read").len();
            store.note(|db| execs::add(db, "n", "c", "e")).await.expect("noted");
            let execs = store.recall(|db| execs::list(db, "n", "c")).await.expect("recalled");
            proceed.send(()).expect("it waits");
            (before, execs)
        };
        let (written, (before, execs)) = tokio::join!(writing, beside);
        written.expect("room");
        assert_eq!((before, execs), (1, vec!["e".to_owned()]));
        assert_eq!(store.read(namespaces::list).await.expect("read").len(), 2);
        drop(store);
    }
}
