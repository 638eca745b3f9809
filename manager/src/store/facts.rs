//! Facts about a store file itself.

use rusqlite::{Connection, OptionalExtension as _};

use super::{Doing as _, Meta, Notes};
use crate::error::Result;

fn get(db: &Connection, name: &str) -> Result<Option<String>> {
    db.query_row("SELECT value FROM facts WHERE name = ?", [name], |row| row.get(0)).optional().doing("read")
}

fn set(db: &Connection, name: &str, value: &str) -> Result<()> {
    db.execute("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", [name, value]).doing("write").map(drop)
}

/// The store's UUID: `new`, if it has none yet.
pub(crate) fn uuid(db: &mut Meta<'_>, new: &str) -> Result<String> {
    if let Some(uuid) = get(db.0, "uuid")? {
        return Ok(uuid);
    }
    set(db.0, "uuid", new)?;
    Ok(new.to_owned())
}

/// Records the current boot of the machine. After a reboot no task is left, and all records of tasks are deleted.
pub(crate) fn new_boot(db: &mut Notes<'_>, boot: &str) -> Result<()> {
    if get(db.0, "boot")?.as_deref() != Some(boot) {
        db.0.execute_batch("DELETE FROM execs; DELETE FROM exits; DELETE FROM ended").doing("forget tasks")?;
        db.0.execute("DELETE FROM facts WHERE name GLOB ?", [format!("{RESTARTING}*")]).doing("forget restarts")?;
        set(db.0, "boot", boot)?;
    }
    Ok(())
}

/// Tasks that the restart monitor is creating: one that is found half-made after a crash of this process belongs to the monitor, not to a client.
pub(crate) mod restarts {
    use super::*;

    /// Records that a restart begins.
    pub(crate) fn begin(db: &mut Notes<'_>, namespace: &str, id: &str) -> Result<()> {
        set(db.0, &name(namespace, id), "")
    }

    /// Records that a restart has ended.
    pub(crate) fn end(db: &mut Notes<'_>, namespace: &str, id: &str) -> Result<()> {
        db.0.execute("DELETE FROM facts WHERE name = ?", [name(namespace, id)]).doing("write").map(drop)
    }

    /// Restarts that did not end: namespace and id.
    pub(crate) fn list(db: &Notes<'_>) -> Result<Vec<(String, String)>> {
        let mut select = db.0.prepare("SELECT name FROM facts WHERE name GLOB ?").doing("prepare")?;
        let names = select.query_map([format!("{RESTARTING}*")], |row| row.get::<_, String>(0)).doing("read")?;
        let names = names.collect::<rusqlite::Result<Vec<_>>>().doing("read")?;
        Ok(names
            .iter()
            .filter_map(|name| name.strip_prefix(RESTARTING)?.split_once(' '))
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .collect())
    }

    /// Neither namespaces nor ids contain blanks.
    fn name(namespace: &str, id: &str) -> String {
        format!("{RESTARTING}{namespace} {id}")
    }
}

const RESTARTING: &str = "restarting ";
