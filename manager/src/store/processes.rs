//! Facts about tasks and sandboxes that this process needs after its own crash and that shims do not keep.
//!
//! `execs`: added execs, so that their exits can be queried. `exits`: published exits, so that none is published twice.
//! `ended`: exits of tasks and sandboxes whose shim is dead, until a client collects them. No task has the id of a sandbox in its namespace.

use rusqlite::{OptionalExtension as _, Row, params};

use super::{Doing as _, Notes};
use crate::error::{Error, Result};

/// What a shim was started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A container's.
    Task,
    /// A group of containers, which share its shim.
    Sandbox,
}

impl Kind {
    /// Both.
    pub(crate) const ALL: [Self; 2] = [Self::Task, Self::Sandbox];

    /// Its name in the store.
    fn name(self) -> &'static str {
        match self {
            Self::Task => "task",
            Self::Sandbox => "sandbox",
        }
    }

    fn named(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| Error::Record(format!("an exit of kind {name:?}")))
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// The process.
    pub(crate) pid: u32,
    /// 0–255, or 128 + signal number.
    pub(crate) status: u32,
    /// When, in nanoseconds since 1970.
    pub(crate) at: i64,
}

impl Exit {
    fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self { pid: row.get(0)?, status: row.get(1)?, at: row.get(2)? })
    }
}

pub(crate) mod execs {
    use super::*;

    /// Records an exec. False when it was recorded before.
    pub(crate) fn add(db: &mut Notes<'_>, namespace: &str, id: &str, exec: &str) -> Result<bool> {
        let mut insert = db.0.prepare_cached("INSERT OR IGNORE INTO execs (namespace, id, exec) VALUES (?, ?, ?)").doing("prepare")?;
        Ok(insert.execute([namespace, id, exec]).doing("write")? > 0)
    }

    /// Forgets one.
    pub(crate) fn remove(db: &mut Notes<'_>, namespace: &str, id: &str, exec: &str) -> Result<()> {
        let mut delete = db.0.prepare_cached("DELETE FROM execs WHERE namespace = ? AND id = ? AND exec = ?").doing("prepare")?;
        delete.execute([namespace, id, exec]).doing("remove")?;
        Ok(())
    }

    /// Those of a task.
    pub(crate) fn list(db: &Notes<'_>, namespace: &str, id: &str) -> Result<Vec<String>> {
        let mut select = db.0.prepare_cached("SELECT exec FROM execs WHERE namespace = ? AND id = ?").doing("prepare")?;
        let rows = select.query_map([namespace, id], |row| row.get(0)).doing("read")?;
        rows.collect::<rusqlite::Result<_>>().doing("read")
    }

    /// Forgets those of a task.
    pub(crate) fn clear(db: &mut Notes<'_>, namespace: &str, id: &str) -> Result<()> {
        let mut delete = db.0.prepare_cached("DELETE FROM execs WHERE namespace = ? AND id = ?").doing("prepare")?;
        delete.execute([namespace, id]).doing("remove")?;
        Ok(())
    }
}

pub(crate) mod exits {
    use super::*;

    /// Whether this exit was published before. A shim's timestamps of one exit may differ slightly.
    pub(crate) fn is_published(db: &Notes<'_>, namespace: &str, id: &str, exec: &str, exit: Exit) -> Result<bool> {
        let sql = "SELECT EXISTS (SELECT 1 FROM exits WHERE namespace = ? AND id = ? AND exec = ? AND pid = ? AND at BETWEEN ? AND ?)";
        let mut select = db.0.prepare_cached(sql).doing("prepare")?;
        let (from, to) = (exit.at.saturating_sub(SAME_EXIT_NANOS), exit.at.saturating_add(SAME_EXIT_NANOS));
        select.query_row(params![namespace, id, exec, exit.pid, from, to], |row| row.get(0)).doing("read")
    }

    /// The published exit of a process that has not been deleted; init's `exec` is empty.
    pub(crate) fn last(db: &Notes<'_>, namespace: &str, id: &str, exec: &str) -> Result<Option<Exit>> {
        let sql = "SELECT pid, status, at FROM exits WHERE namespace = ? AND id = ? AND exec = ? AND collected IS NULL ORDER BY at DESC";
        let mut select = db.0.prepare_cached(sql).doing("prepare")?;
        select.query_row([namespace, id, exec], Exit::from_row).optional().doing("read")
    }

    /// Records a published exit; `collected` is when its task was deleted, if it was: the record then expires.
    pub(crate) fn add(db: &mut Notes<'_>, namespace: &str, id: &str, exec: &str, exit: Exit, collected: Option<i64>) -> Result<()> {
        let sql = "INSERT OR IGNORE INTO exits (namespace, id, exec, pid, status, at, collected) VALUES (?, ?, ?, ?, ?, ?, ?)";
        let mut insert = db.0.prepare_cached(sql).doing("prepare")?;
        insert.execute(params![namespace, id, exec, exit.pid, exit.status, exit.at, collected]).doing("write")?;
        Ok(())
    }

    /// Lets the exits of a deleted exec or task expire; until then a shim may publish them again.
    pub(crate) fn collect(db: &mut Notes<'_>, namespace: &str, id: &str, exec: Option<&str>, now: i64) -> Result<()> {
        let sql = "UPDATE exits SET collected = ? WHERE namespace = ? AND id = ? AND exec = coalesce(?, exec) AND collected IS NULL";
        let mut update = db.0.prepare_cached(sql).doing("prepare")?;
        update.execute(params![now, namespace, id, exec]).doing("write")?;
        let mut delete = db.0.prepare_cached("DELETE FROM exits WHERE collected < ?").doing("prepare")?;
        delete.execute([now.saturating_sub(KEPT_NANOS)]).doing("remove")?;
        Ok(())
    }

    /// Forgets the exits of a sandbox at once: no shim publishes them.
    pub(crate) fn clear(db: &mut Notes<'_>, namespace: &str, id: &str) -> Result<()> {
        let mut delete = db.0.prepare_cached("DELETE FROM exits WHERE namespace = ? AND id = ?").doing("prepare")?;
        delete.execute([namespace, id]).doing("remove")?;
        Ok(())
    }

    /// Two readings of the clock for one exit are nearer than that; two exits of one pid in one exec id are not.
    const SAME_EXIT_NANOS: i64 = 2_000_000_000;
    /// How long the exit of a process is kept after its deletion.
    const KEPT_NANOS: i64 = 600_000_000_000;
}

pub(crate) mod ended {
    use super::*;

    /// Records the exit of a task or sandbox whose shim is dead.
    pub(crate) fn put(db: &mut Notes<'_>, kind: Kind, namespace: &str, id: &str, exit: Exit) -> Result<()> {
        let sql = "INSERT OR REPLACE INTO ended (kind, namespace, id, pid, status, at) VALUES (?, ?, ?, ?, ?, ?)";
        let mut insert = db.0.prepare_cached(sql).doing("prepare")?;
        insert.execute(params![kind.name(), namespace, id, exit.pid, exit.status, exit.at]).doing("write")?;
        Ok(())
    }

    /// The exit of a task or sandbox, if it is recorded.
    pub(crate) fn get(db: &Notes<'_>, namespace: &str, id: &str) -> Result<Option<Exit>> {
        let mut select = db.0.prepare_cached("SELECT pid, status, at FROM ended WHERE namespace = ? AND id = ?").doing("prepare")?;
        select.query_row([namespace, id], Exit::from_row).optional().doing("read")
    }

    /// Removes and returns it.
    pub(crate) fn take(db: &mut Notes<'_>, namespace: &str, id: &str) -> Result<Option<Exit>> {
        let sql = "DELETE FROM ended WHERE namespace = ? AND id = ? RETURNING pid, status, at";
        let mut delete = db.0.prepare_cached(sql).doing("prepare")?;
        delete.query_row([namespace, id], Exit::from_row).optional().doing("remove")
    }

    /// All of them: kind, namespace, id, how.
    pub(crate) fn list(db: &Notes<'_>) -> Result<Vec<(Kind, String, String, Exit)>> {
        let mut select = db.0.prepare_cached("SELECT pid, status, at, namespace, id, kind FROM ended").doing("prepare")?;
        let rows =
            select.query_map([], |row| Ok((row.get::<_, String>(5)?, row.get(3)?, row.get(4)?, Exit::from_row(row)?))).doing("read")?;
        rows.map(|row| {
            let (kind, namespace, id, exit) = row.doing("read")?;
            Ok((Kind::named(&kind)?, namespace, id, exit))
        })
        .collect()
    }
}
