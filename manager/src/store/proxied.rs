//! Snapshots that a proxy has had by itself, under a name of its own: which that is, by the number of the row.
//!
//! The name is kept when the row is removed, until the proxy has removed the snapshot.

use rusqlite::OptionalExtension as _;

use super::{Doing as _, Meta, snapshots};
use crate::error::Result;

/// One whose row is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Left {
    pub(crate) number: i64,
    pub(crate) namespace: String,
    pub(crate) name: String,
}

/// Records the proxy's name of a snapshot.
pub(crate) fn put(db: &mut Meta<'_>, number: i64, place: &snapshots::Place, name: &str) -> Result<()> {
    let value = value(place, name);
    let mut insert = db.0.prepare_cached("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)").doing("prepare")?;
    insert.execute([&key(number), &value]).doing("write").map(drop)
}

/// The proxy's name of a snapshot, if it has one of its own.
pub(crate) fn name(db: &Meta<'_>, number: i64) -> Result<Option<String>> {
    let mut select = db.0.prepare_cached("SELECT value FROM facts WHERE name = ?").doing("prepare")?;
    let value: Option<String> = select.query_row([key(number)], |row| row.get(0)).optional().doing("read")?;
    Ok(value.and_then(|value| value.splitn(3, '\n').nth(2).map(ToOwned::to_owned)))
}

/// Those of a proxy whose rows are gone, the youngest first: children come before their parents.
pub(crate) fn left(db: &Meta<'_>, snapshotter: &str) -> Result<Vec<Left>> {
    let mut select = db.0.prepare_cached("SELECT name, value FROM facts WHERE name GLOB ?").doing("prepare")?;
    let facts = select.query_map([format!("{PREFIX}*")], |row| Ok((row.get(0)?, row.get(1)?))).doing("read")?;
    let facts = facts.collect::<rusqlite::Result<Vec<(String, String)>>>().doing("read")?;
    let mut left = Vec::new();
    for (fact, value) in facts {
        let mut parts = value.splitn(3, '\n');
        let (Some(of), Some(namespace), Some(name)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let Some(number) = fact.strip_prefix(PREFIX).and_then(|number| number.parse().ok()) else { continue };
        if of == snapshotter && !snapshots::exists(db, number)? {
            left.push(Left { number, namespace: namespace.to_owned(), name: name.to_owned() });
        }
    }
    left.sort_by_key(|left| std::cmp::Reverse(left.number));
    Ok(left)
}

/// Whether a row has the snapshot of that name.
pub(crate) fn is_used(db: &Meta<'_>, place: &snapshots::Place, name: &str) -> Result<bool> {
    let sql = "SELECT EXISTS (
            SELECT 1 FROM facts f CROSS JOIN snapshots s ON s.id = CAST(substr(f.name, ?) AS INTEGER) WHERE f.name GLOB ? AND f.value = ?
        )";
    let mut select = db.0.prepare_cached(sql).doing("prepare")?;
    let begin = i64::try_from(PREFIX.len() + 1).unwrap_or_default();
    select.query_row(rusqlite::params![begin, format!("{PREFIX}*"), value(place, name)], |row| row.get(0)).doing("read")
}

/// Forgets a name.
pub(crate) fn forget(db: &mut Meta<'_>, number: i64) -> Result<()> {
    db.0.execute("DELETE FROM facts WHERE name = ?", [key(number)]).doing("write").map(drop)
}

/// Neither snapshotters nor namespaces have line ends in their names.
fn value(place: &snapshots::Place, name: &str) -> String {
    format!("{}\n{}\n{name}", place.snapshotter, place.namespace)
}

fn key(number: i64) -> String {
    format!("{PREFIX}{number}")
}

const PREFIX: &str = "proxied ";
