//! The objects of the API: namespaces, containers, sandboxes, leases and their resources.
//!
//! Each object is stored as its protobuf message; its labels have a table of their own, and any in a record of an earlier version do not count.
//! These functions enforce no rules; the services do.

use std::collections::HashMap;

use containerd_client::services::v1::{Container, Image, Info as Content, Lease};
use containerd_client::types::Sandbox;
use rusqlite::{OptionalExtension as _, params, params_from_iter};

use super::labels::{self, Labelled, Wanted};
use super::{Doing as _, Meta, edges};
use crate::error::{Error, Result};
use crate::timestamp;

pub(super) fn decode<M: Labelled>(id: &str, bytes: &[u8]) -> Result<M> {
    M::decode(bytes).map_err(|error| Error::Record(format!("{} {id} ({error})", M::KIND)))
}

/// The object of that id, from the table of its kind.
fn get<M: Labelled>(db: &Meta<'_>, namespace: &str, id: &str) -> Result<Option<M>> {
    let sql = format!("SELECT record FROM {} WHERE namespace = ? AND id = ?", M::KIND);
    let mut select = db.0.prepare_cached(&sql).doing("prepare")?;
    let record: Option<Vec<u8>> = select.query_row([namespace, id], |row| row.get(0)).optional().doing("read")?;
    let Some(record) = record else { return Ok(None) };
    let mut object: M = decode(id, &record)?;
    *object.labels() = labels::get(db.0, M::KIND, namespace, id)?;
    Ok(Some(object))
}

/// Objects of the namespace that follow `after`, by id, up to about this many bytes: those that have one of the labels, where some are wanted.
fn page<M: Labelled>(db: &Meta<'_>, namespace: &str, after: &str, wanted: Option<&[Wanted]>, bytes: usize) -> Result<Vec<M>> {
    let (condition, mut parameters) =
        wanted.map_or(("true".to_owned(), Vec::new()), |wanted| labels::condition(M::KIND, namespace, wanted));
    parameters.splice(..0, [namespace, after].map(ToOwned::to_owned));
    let sql = format!("SELECT id, record FROM {} WHERE namespace = ? AND id > ? AND {condition} ORDER BY id", M::KIND);
    let mut select = db.0.prepare_cached(&sql).doing("prepare")?;
    let mut rows = select.query(params_from_iter(parameters)).doing("read")?;
    let (mut found, mut read) = (Vec::new(), 0);
    while read < bytes
        && let Some(row) = rows.next().doing("read")?
    {
        let id: String = row.get(0).doing("read")?;
        let record = row.get_ref(1).and_then(|value| Ok(value.as_blob()?)).doing("read")?;
        let mut object: M = decode(&id, record)?;
        *object.labels() = labels::get(db.0, M::KIND, namespace, &id)?;
        read += object.encoded_len();
        found.push(object);
    }
    Ok(found)
}

/// Inserts, or replaces what has that id.
fn put<M: Labelled>(db: &mut Meta<'_>, namespace: &str, id: &str, object: &M) -> Result<()> {
    let mut object = object.clone();
    if let Some(references) = object.references() {
        edges::set(db.0, M::KIND, namespace, id, &references)?;
    }
    labels::set(db.0, M::KIND, namespace, id, &std::mem::take(object.labels()))?;
    let sql = format!(
        "INSERT INTO {} (namespace, id, record) VALUES (?, ?, ?) ON CONFLICT (namespace, id) DO UPDATE SET record = excluded.record",
        M::KIND
    );
    let mut insert = db.0.prepare_cached(&sql).doing("prepare")?;
    insert.execute(params![namespace, id, object.encode_to_vec()]).doing("write").map(drop)
}

/// Whether the namespace has none.
fn is_empty<M: Labelled>(db: &Meta<'_>, namespace: &str) -> Result<bool> {
    let sql = format!("SELECT NOT EXISTS (SELECT 1 FROM {} WHERE namespace = ?)", M::KIND);
    db.0.prepare_cached(&sql).and_then(|mut select| select.query_row([namespace], |row| row.get(0))).doing("read")
}

/// Whether there was one to remove.
fn remove<M: Labelled>(db: &mut Meta<'_>, namespace: &str, id: &str) -> Result<bool> {
    let mut delete = db.0.prepare_cached(&format!("DELETE FROM {} WHERE namespace = ? AND id = ?", M::KIND)).doing("prepare")?;
    Ok(delete.execute([namespace, id]).doing("remove")? > 0)
}

/// The functions on one kind of object.
macro_rules! kind {
    ($module:ident, $object:ty, { $($more:item)* }) => {
        pub(crate) mod $module {
            use super::*;

            /// The object of that id.
            pub(crate) fn get(db: &Meta<'_>, namespace: &str, id: &str) -> Result<Option<$object>> {
                super::get(db, namespace, id)
            }

            /// Objects of the namespace that follow `after`, by id, up to about this many bytes: those that have one of the labels, where some are
            /// wanted. None when there are no more.
            pub(crate) fn page(
                db: &Meta<'_>,
                namespace: &str,
                after: &str,
                wanted: Option<&[Wanted]>,
                bytes: usize,
            ) -> Result<Vec<$object>> {
                super::page(db, namespace, after, wanted, bytes)
            }

            /// Inserts, or replaces what has that id.
            pub(crate) fn put(db: &mut Meta<'_>, namespace: &str, id: &str, object: &$object) -> Result<()> {
                super::put(db, namespace, id, object)
            }

            /// Whether there was one to remove.
            pub(crate) fn remove(db: &mut Meta<'_>, namespace: &str, id: &str) -> Result<bool> {
                super::remove::<$object>(db, namespace, id)
            }

            $($more)*
        }
    };
}

kind!(containers, Container, {
    /// Whether the namespace has none.
    pub(crate) fn is_empty(db: &Meta<'_>, namespace: &str) -> Result<bool> {
        super::is_empty::<Container>(db, namespace)
    }

    /// Every object of the namespace that has a label, by id.
    pub(crate) fn labelled(db: &Meta<'_>, namespace: &str, key: &str) -> Result<Vec<Container>> {
        super::page(db, namespace, "", Some(&[Wanted { key: key.to_owned(), value: None }]), usize::MAX)
    }
});
kind!(blobs, Content, {
    /// Whether the namespace has none.
    pub(crate) fn is_empty(db: &Meta<'_>, namespace: &str) -> Result<bool> {
        super::is_empty::<Content>(db, namespace)
    }

    /// Whether any namespace has it.
    pub(crate) fn is_anywhere(db: &Meta<'_>, digest: &str) -> Result<bool> {
        let sql = "SELECT EXISTS (SELECT 1 FROM content WHERE id = ?)";
        db.0.prepare_cached(sql).and_then(|mut select| select.query_row([digest], |row| row.get(0))).doing("read")
    }

    /// Removes several, and returns those that were there.
    pub(crate) fn remove_all(db: &mut Meta<'_>, namespace: &str, ids: &[&str]) -> Result<Vec<String>> {
        let sql = "DELETE FROM content WHERE namespace = ? AND id IN (SELECT value FROM json_each(?)) RETURNING id";
        let mut delete = db.0.prepare_cached(sql).doing("prepare")?;
        let removed = delete.query_map([namespace, &serde_json::Value::from(ids).to_string()], |row| row.get(0));
        removed.and_then(Iterator::collect).doing("remove")
    }

    /// Digests of all content, each once.
    pub(crate) fn digests(db: &Meta<'_>) -> Result<Vec<String>> {
        let mut select = db.0.prepare_cached("SELECT DISTINCT id FROM content").doing("prepare")?;
        select.query_map([], |row| row.get(0)).and_then(Iterator::collect).doing("read")
    }

    /// What a namespace knows of it that gives it to others: any, or one with the label for that.
    pub(crate) fn elsewhere(db: &Meta<'_>, digest: &str, any: bool) -> Result<Option<Content>> {
        let sql = "SELECT namespace FROM content WHERE id = ?1 AND (?2 OR namespace IN (
                SELECT id FROM labels WHERE namespace = '' AND kind = 'namespaces' AND key = 'containerd.io/namespace.shareable' AND value = 'true'
            )) LIMIT 1";
        let mut select = db.0.prepare_cached(sql).doing("prepare")?;
        let namespace: Option<String> = select.query_row(params![digest, any], |row| row.get(0)).optional().doing("read")?;
        namespace.map_or(Ok(None), |namespace| get(db, &namespace, digest))
    }
});
kind!(images, Image, {
    /// Whether the namespace has none.
    pub(crate) fn is_empty(db: &Meta<'_>, namespace: &str) -> Result<bool> {
        super::is_empty::<Image>(db, namespace)
    }

    /// Records what an image leads to, and when it expires.
    pub(crate) fn note_target(db: &mut Meta<'_>, namespace: &str, image: &Image) -> Result<()> {
        let target = image.target.as_ref().map(|target| target.digest.as_str()).unwrap_or_default();
        let mut update =
            db.0.prepare_cached("UPDATE images SET target = ?, expires = ? WHERE namespace = ? AND id = ?").doing("prepare")?;
        update.execute(params![target, expiry(&image.labels), namespace, image.name]).doing("write").map(drop)
    }

    /// Whether any has expired.
    pub(crate) fn have_expired(db: &Meta<'_>, now: i64) -> Result<bool> {
        let sql = "SELECT EXISTS (SELECT 1 FROM images WHERE expires <= ?)";
        db.0.prepare_cached(sql).and_then(|mut select| select.query_row([now], |row| row.get(0))).doing("read")
    }
});
kind!(sandboxes, Sandbox, {
    /// Whether the namespace has none.
    pub(crate) fn is_empty(db: &Meta<'_>, namespace: &str) -> Result<bool> {
        super::is_empty::<Sandbox>(db, namespace)
    }
});
kind!(leases, Lease, {
    /// When a lease expires, from its label; without a valid label it never does.
    pub(in crate::store) fn expiry(lease: &Lease) -> Option<i64> {
        super::expiry(&lease.labels)
    }

    /// Records when a lease expires.
    pub(crate) fn note_expiry(db: &mut Meta<'_>, namespace: &str, lease: &Lease) -> Result<()> {
        let mut update = db.0.prepare_cached("UPDATE leases SET expires = ? WHERE namespace = ? AND id = ?").doing("prepare")?;
        update.execute(params![expiry(lease), namespace, lease.id]).doing("write").map(drop)
    }

    /// Whether one has expired.
    pub(crate) fn is_expired(lease: &Lease, now: i64) -> bool {
        expiry(lease).is_some_and(|expires| expires <= now)
    }

    /// Whether any has expired.
    pub(crate) fn have_expired(db: &Meta<'_>, now: i64) -> Result<bool> {
        let sql = "SELECT EXISTS (SELECT 1 FROM leases WHERE expires <= ?)";
        db.0.prepare_cached(sql).and_then(|mut select| select.query_row([now], |row| row.get(0))).doing("read")
    }

    /// Removes those that have expired, and returns how many.
    pub(crate) fn remove_expired(db: &mut Meta<'_>, now: i64) -> Result<usize> {
        db.0.execute("DELETE FROM leases WHERE expires <= ?", [now]).doing("remove")
    }

    /// Removes those of the namespace, and what they hold.
    pub(crate) fn remove_all(db: &mut Meta<'_>, namespace: &str) -> Result<()> {
        db.0.execute("DELETE FROM leases WHERE namespace = ?", [namespace]).doing("remove").map(drop)
    }
});

/// When an object expires, from its label; without a valid label it never does.
fn expiry(labels: &HashMap<String, String>) -> Option<i64> {
    labels.get(EXPIRE).and_then(|text| text.parse().ok()).map(|at| timestamp::to_nanos(&at))
}

/// The label with the expiry of a lease or an image.
const EXPIRE: &str = "containerd.io/gc.expire";

pub(crate) mod namespaces {
    use containerd_client::services::v1::Namespace;
    use prost::Message as _;

    use super::*;

    /// The namespace of that name.
    pub(crate) fn get(db: &Meta<'_>, name: &str) -> Result<Option<Namespace>> {
        let mut select = db.0.prepare_cached("SELECT record FROM namespaces WHERE name = ?").doing("prepare")?;
        let record: Option<Vec<u8>> = select.query_row([name], |row| row.get(0)).optional().doing("read")?;
        record.map(|record| with_labels(db, name, &record)).transpose()
    }

    /// All of them, by name.
    pub(crate) fn list(db: &Meta<'_>) -> Result<Vec<Namespace>> {
        let mut select = db.0.prepare_cached("SELECT name, record FROM namespaces ORDER BY name").doing("prepare")?;
        let rows = select.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, Vec<u8>>(1)?))).doing("read")?;
        rows.map(|row| row.doing("read").and_then(|(name, record)| with_labels(db, &name, &record))).collect()
    }

    fn with_labels(db: &Meta<'_>, name: &str, record: &[u8]) -> Result<Namespace> {
        let mut namespace: Namespace = decode(name, record)?;
        namespace.labels = labels::get(db.0, Namespace::KIND, "", name)?;
        Ok(namespace)
    }

    /// Inserts, or replaces the one of that name.
    pub(crate) fn put(db: &mut Meta<'_>, namespace: &Namespace) -> Result<()> {
        labels::set(db.0, Namespace::KIND, "", &namespace.name, &namespace.labels)?;
        let sql = "INSERT INTO namespaces (name, record) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET record = excluded.record";
        let mut insert = db.0.prepare_cached(sql).doing("prepare")?;
        let record = Namespace { name: namespace.name.clone(), ..Namespace::default() };
        insert.execute(params![namespace.name, record.encode_to_vec()]).doing("write").map(drop)
    }

    /// Creates one without labels, unless it exists.
    pub(crate) fn ensure(db: &mut Meta<'_>, name: &str) -> Result<()> {
        let namespace = Namespace { name: name.to_owned(), ..Namespace::default() };
        let mut insert = db.0.prepare_cached("INSERT OR IGNORE INTO namespaces (name, record) VALUES (?, ?)").doing("prepare")?;
        insert.execute(params![name, namespace.encode_to_vec()]).doing("write").map(drop)
    }

    /// Whether there was one to remove.
    pub(crate) fn remove(db: &mut Meta<'_>, name: &str) -> Result<bool> {
        let mut delete = db.0.prepare_cached("DELETE FROM namespaces WHERE name = ?").doing("prepare")?;
        Ok(delete.execute([name]).doing("remove")? > 0)
    }
}

/// Something that a lease keeps from being collected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resource {
    /// `content`, `snapshots/NAME`, …
    pub(crate) kind: String,
    /// Which of them.
    pub(crate) id: String,
}

pub(crate) mod resources {
    use super::*;

    /// What a lease holds.
    pub(crate) fn list(db: &Meta<'_>, namespace: &str, lease: &str) -> Result<Vec<Resource>> {
        let sql = "SELECT to_type, to_id FROM edges WHERE namespace = ? AND from_type = 'leases' AND from_id = ? ORDER BY to_type, to_id";
        let mut select = db.0.prepare_cached(sql).doing("prepare")?;
        let rows = select.query_map([namespace, lease], |row| Ok(Resource { kind: row.get(0)?, id: row.get(1)? })).doing("read")?;
        rows.collect::<rusqlite::Result<_>>().doing("read")
    }

    /// Adds one, unless it exists.
    pub(crate) fn add(db: &mut Meta<'_>, namespace: &str, lease: &str, resource: &Resource) -> Result<()> {
        let sql = "INSERT OR IGNORE INTO edges (namespace, from_type, from_id, to_type, to_id) VALUES (?, 'leases', ?, ?, ?)";
        let mut insert = db.0.prepare_cached(sql).doing("prepare")?;
        insert.execute([namespace, lease, &resource.kind, &resource.id]).doing("write")?;
        Ok(())
    }

    /// Whether any lease holds it.
    pub(crate) fn is_leased(db: &Meta<'_>, namespace: &str, kind: &str, id: &str) -> Result<bool> {
        let sql = "SELECT EXISTS (SELECT 1 FROM edges WHERE namespace = ? AND from_type = 'leases' AND to_type = ? AND to_id = ?)";
        db.0.prepare_cached(sql).and_then(|mut select| select.query_row([namespace, kind, id], |row| row.get(0))).doing("read")
    }

    /// Removes one, if it exists.
    pub(crate) fn remove(db: &mut Meta<'_>, namespace: &str, lease: &str, resource: &Resource) -> Result<()> {
        let sql = "DELETE FROM edges WHERE namespace = ? AND from_type = 'leases' AND from_id = ? AND to_type = ? AND to_id = ?";
        let mut delete = db.0.prepare_cached(sql).doing("prepare")?;
        delete.execute([namespace, lease, &resource.kind, &resource.id]).doing("remove")?;
        Ok(())
    }
}
