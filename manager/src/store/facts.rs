//! What the store says about itself.

use rusqlite::{Connection, OptionalExtension as _};

use super::Doing as _;
use crate::error::Result;

fn get(db: &Connection, name: &str) -> Result<Option<String>> {
    db.query_row("SELECT value FROM facts WHERE name = ?", [name], |row| row.get(0)).optional().doing("read")
}

fn set(db: &Connection, name: &str, value: &str) -> Result<()> {
    db.execute("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", [name, value]).doing("write").map(drop)
}

/// The store's own name: `new`, if it has none yet.
pub(crate) fn uuid(db: &Connection, new: &str) -> Result<String> {
    if let Some(uuid) = get(db, "uuid")? {
        return Ok(uuid);
    }
    set(db, "uuid", new)?;
    Ok(new.to_owned())
}

/// Says which boot of the machine this is. After another one nothing is left of any task, and what was known of them is forgotten.
pub(crate) fn new_boot(db: &Connection, boot: &str) -> Result<()> {
    if get(db, "boot")?.as_deref() != Some(boot) {
        db.execute_batch("DELETE FROM execs; DELETE FROM exits; DELETE FROM ended").doing("forget tasks")?;
        set(db, "boot", boot)?;
    }
    Ok(())
}
