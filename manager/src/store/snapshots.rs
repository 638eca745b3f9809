//! Rows of snapshots; their files belong to the snapshotters.
//!
//! These functions enforce no rules but one of SQLite: a snapshot with children cannot be removed. An object's kind for labels, edges and
//! leases is `snapshots/SNAPSHOTTER` ([`kind_of`]), its id there is the snapshot's key.

use std::collections::HashMap;

use containerd_client::services::v1::snapshots::{Info, Kind};
use prost::Message as _;
use rusqlite::{OptionalExtension as _, Row, params, params_from_iter};

use super::edges::{self, References};
use super::labels::{self, Wanted};
use super::{Doing as _, Meta};
use crate::error::Result;
use crate::timestamp;

/// A snapshotter within a namespace.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) namespace: String,
    pub(crate) snapshotter: String,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Snapshot {
    /// The number of its folder, which is never used again.
    pub(crate) id: i64,
    /// The same of its parent.
    pub(crate) parent_id: Option<i64>,
    /// What a committed one uses; none if it has not been measured.
    pub(crate) usage: Option<Usage>,
    /// What clients see.
    pub(crate) info: Info,
}

/// What a snapshot uses, without its parents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) bytes: i64,
    pub(crate) inodes: i64,
}

/// Kind of the labels and edges of a snapshotter's snapshots, and of the resources of leases.
pub(crate) fn kind_of(snapshotter: &str) -> String {
    format!("snapshots/{snapshotter}")
}

/// The snapshot of that key.
pub(crate) fn get(db: &Meta<'_>, place: &Place, key: &str) -> Result<Option<Snapshot>> {
    let sql = format!("SELECT {COLUMNS} FROM {TABLE} WHERE s.namespace = ? AND s.snapshotter = ? AND s.key = ?");
    let mut select = db.0.prepare_cached(&sql).doing("prepare")?;
    let found = select.query_row([&place.namespace, &place.snapshotter, key], from_row).optional().doing("read")?;
    found.map(|found| with_labels(db, place, found)).transpose()
}

/// Numbers of the snapshot's folder and of those of its parents, the nearest first.
pub(crate) fn chain(db: &Meta<'_>, id: i64) -> Result<Vec<i64>> {
    let sql = "WITH RECURSIVE chain (id, parent, depth) AS (
            SELECT id, parent, 0 FROM snapshots WHERE id = ?
            UNION ALL SELECT s.id, s.parent, depth + 1 FROM snapshots s JOIN chain ON s.id = chain.parent
        ) SELECT id FROM chain ORDER BY depth";
    let mut select = db.0.prepare_cached(sql).doing("prepare")?;
    select.query_map([id], |row| row.get(0)).and_then(Iterator::collect).doing("read")
}

/// Whether another has it as its parent.
pub(crate) fn has_children(db: &Meta<'_>, id: i64) -> Result<bool> {
    let sql = "SELECT EXISTS (SELECT 1 FROM snapshots WHERE parent = ?)";
    db.0.prepare_cached(sql).and_then(|mut select| select.query_row([id], |row| row.get(0))).doing("read")
}

/// Whether there is one of that number.
pub(crate) fn exists(db: &Meta<'_>, id: i64) -> Result<bool> {
    let sql = "SELECT EXISTS (SELECT 1 FROM snapshots WHERE id = ?)";
    db.0.prepare_cached(sql).and_then(|mut select| select.query_row([id], |row| row.get(0))).doing("read")
}

/// Snapshots that follow the key `after`, up to about this many bytes: those that have one of the labels, where some are wanted. None when there
/// are no more.
pub(crate) fn page(db: &Meta<'_>, place: &Place, after: &str, wanted: Option<&[Wanted]>, bytes: usize) -> Result<Vec<Info>> {
    let kind = kind_of(&place.snapshotter);
    let (condition, mut parameters) =
        wanted.map_or(("true".to_owned(), Vec::new()), |wanted| labels::condition(&kind, &place.namespace, wanted));
    parameters.splice(..0, [&place.namespace, &place.snapshotter, after].map(ToString::to_string));
    let keys = format!(
        "SELECT number FROM (SELECT id AS number, namespace, snapshotter, key AS id FROM snapshots)
         WHERE namespace = ? AND snapshotter = ? AND id > ? AND {condition}"
    );
    let sql = format!("SELECT {COLUMNS} FROM {TABLE} WHERE s.id IN ({keys}) ORDER BY s.key");
    let mut select = db.0.prepare_cached(&sql).doing("prepare")?;
    let mut rows = select.query(params_from_iter(parameters)).doing("read")?;
    let (mut found, mut read) = (Vec::new(), 0);
    while read < bytes
        && let Some(row) = rows.next().doing("read")?
    {
        let snapshot = with_labels(db, place, from_row(row).doing("read")?)?;
        read += snapshot.info.encoded_len();
        found.push(snapshot.info);
    }
    Ok(found)
}

/// Inserts one, and returns its number.
pub(crate) fn insert(
    db: &mut Meta<'_>,
    place: &Place,
    key: &str,
    parent: Option<i64>,
    kind: Kind,
    labels: &HashMap<String, String>,
) -> Result<i64> {
    let now = timestamp::to_nanos(&timestamp::now());
    let sql = "INSERT INTO snapshots (namespace, snapshotter, key, parent, kind, created, updated) VALUES (?, ?, ?, ?, ?, ?, ?)";
    let mut insert = db.0.prepare_cached(sql).doing("prepare")?;
    insert.execute(params![place.namespace, place.snapshotter, key, parent, kind as i32, now, now]).doing("write")?;
    drop(insert);
    set_labels(db, place, key, labels)?;
    Ok(db.0.last_insert_rowid())
}

/// Makes an active one a committed one: with another key and parent, other labels, and what it uses.
pub(crate) fn commit(
    db: &mut Meta<'_>,
    place: &Place,
    id: i64,
    name: &str,
    parent: Option<i64>,
    usage: Option<Usage>,
    labels: &HashMap<String, String>,
) -> Result<()> {
    let now = timestamp::to_nanos(&timestamp::now());
    let (size, inodes) = (usage.map(|usage| usage.bytes), usage.map(|usage| usage.inodes));
    let sql = "UPDATE snapshots SET key = ?, parent = ?, kind = ?, created = ?, updated = ?, size = ?, inodes = ? WHERE id = ?";
    let mut update = db.0.prepare_cached(sql).doing("prepare")?;
    update.execute(params![name, parent, Kind::Committed as i32, now, now, size, inodes, id]).doing("write")?;
    drop(update);
    set_labels(db, place, name, labels)
}

/// Replaces the labels of one, and records that it was updated now.
pub(crate) fn update(db: &mut Meta<'_>, place: &Place, key: &str, labels: &HashMap<String, String>) -> Result<()> {
    let now = timestamp::to_nanos(&timestamp::now());
    let sql = "UPDATE snapshots SET updated = ? WHERE namespace = ? AND snapshotter = ? AND key = ?";
    let mut update = db.0.prepare_cached(sql).doing("prepare")?;
    update.execute(params![now, place.namespace, place.snapshotter, key]).doing("write")?;
    drop(update);
    set_labels(db, place, key, labels)
}

fn set_labels(db: &mut Meta<'_>, place: &Place, key: &str, labels: &HashMap<String, String>) -> Result<()> {
    let kind = kind_of(&place.snapshotter);
    labels::set(db.0, &kind, &place.namespace, key, labels)?;
    edges::set(db.0, &kind, &place.namespace, key, &References::in_labels(labels))
}

/// Whether there was one to remove.
///
/// Errors: it has children.
pub(crate) fn remove(db: &mut Meta<'_>, id: i64) -> Result<bool> {
    let mut delete = db.0.prepare_cached("DELETE FROM snapshots WHERE id = ?").doing("prepare")?;
    Ok(delete.execute([id]).doing("remove")? > 0)
}

/// Numbers of all snapshots of a snapshotter, of every namespace: folders with other numbers are left over.
pub(crate) fn all(db: &Meta<'_>, snapshotter: &str) -> Result<Vec<i64>> {
    let mut select = db.0.prepare_cached("SELECT id FROM snapshots WHERE snapshotter = ?").doing("prepare")?;
    select.query_map([snapshotter], |row| row.get(0)).and_then(Iterator::collect).doing("read")
}

/// The key of the snapshot of that number.
#[cfg(test)]
pub(crate) fn key(db: &Meta<'_>, id: i64) -> Result<String> {
    db.0.query_row("SELECT key FROM snapshots WHERE id = ?", [id], |row| row.get(0)).doing("read")
}

/// Whether the namespace has none.
pub(crate) fn is_empty(db: &Meta<'_>, namespace: &str) -> Result<bool> {
    let sql = "SELECT NOT EXISTS (SELECT 1 FROM snapshots WHERE namespace = ?)";
    db.0.prepare_cached(sql).and_then(|mut select| select.query_row([namespace], |row| row.get(0))).doing("read")
}

fn from_row(row: &Row<'_>) -> rusqlite::Result<Snapshot> {
    let time = |index| row.get(index).map(|nanos| Some(timestamp::from_nanos(nanos)));
    let (bytes, inodes): (Option<i64>, Option<i64>) = (row.get(5)?, row.get(6)?);
    Ok(Snapshot {
        id: row.get(0)?,
        parent_id: row.get(8)?,
        usage: bytes.zip(inodes).map(|(bytes, inodes)| Usage { bytes, inodes }),
        info: Info {
            name: row.get(1)?,
            kind: row.get(2)?,
            created_at: time(3)?,
            updated_at: time(4)?,
            parent: row.get::<_, Option<String>>(7)?.unwrap_or_default(),
            labels: HashMap::new(),
        },
    })
}

fn with_labels(db: &Meta<'_>, place: &Place, mut snapshot: Snapshot) -> Result<Snapshot> {
    snapshot.info.labels = labels::get(db.0, &kind_of(&place.snapshotter), &place.namespace, &snapshot.info.name)?;
    Ok(snapshot)
}

const COLUMNS: &str = "s.id, s.key, s.kind, s.created, s.updated, s.size, s.inodes, parent.key, s.parent";
const TABLE: &str = "snapshots s LEFT JOIN snapshots parent ON parent.id = s.parent";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use crate::store::tests::files;

    #[tokio::test]
    async fn a_snapshot_keeps_its_number_and_its_parents_when_it_is_committed() {
        let folder = scratch::Folder::new("snapshots");
        let store = Store::open(&files(&folder)).expect("a new store");
        let place = Place { namespace: "n".to_owned(), snapshotter: "overlayfs".to_owned() };
        let labels: HashMap<_, _> = [("containerd.io/gc.root".to_owned(), "x".to_owned())].into();
        let at = place.clone();
        let (one, two) = store
            .write(move |db| {
                let one = insert(db, &at, "one", None, Kind::Active, &labels)?;
                let usage = Some(Usage { bytes: 7, inodes: 2 });
                commit(db, &at, one, "chain", None, usage, &HashMap::new())?;
                let two = insert(db, &at, "two", Some(one), Kind::View, &labels)?;
                Ok((one, two))
            })
            .await
            .expect("written");
        let at = place.clone();
        let (committed, view, chain, found) = store
            .read(move |db| {
                let wanted = [Wanted { key: "containerd.io/gc.root".to_owned(), value: None }];
                Ok((get(db, &at, "chain")?, get(db, &at, "two")?, chain(db, two)?, page(db, &at, "", Some(&wanted), 1)?))
            })
            .await
            .expect("read");
        let (committed, view) = (committed.expect("it is there"), view.expect("it is there"));
        assert_eq!((committed.id, committed.info.kind(), committed.usage), (one, Kind::Committed, Some(Usage { bytes: 7, inodes: 2 })));
        assert!(committed.info.labels.is_empty(), "labels of the active one do not stay");
        assert_eq!((view.info.parent.as_str(), view.parent_id), ("chain", Some(one)));
        assert_eq!((chain, found.len()), (vec![two, one], 1));
        store.remove(move |db| remove(db, one)).await.expect_err("it has a child");
        let at = place.clone();
        let new =
            store.write(move |db| Ok((remove(db, two)?, remove(db, one)?, insert(db, &at, "three", None, Kind::Active, &HashMap::new())?)));
        let (.., three) = new.await.expect("children first");
        assert!(three > two, "numbers are not used again");
        drop(store);
    }
}
