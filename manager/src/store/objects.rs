//! The objects of the API: namespaces, containers, leases and their resources.
//!
//! Each object is stored as its protobuf message. These functions enforce no rules; the services do.

use containerd_client::services::v1::{Container, Lease};
use prost::Message;
use rusqlite::{OptionalExtension as _, params};

use super::{Doing as _, Meta};
use crate::error::{Error, Result};
use crate::timestamp;

fn decode<M: Message + Default>(what: &str, bytes: &[u8]) -> Result<M> {
    M::decode(bytes).map_err(|error| Error::Record(format!("{what} ({error})")))
}

/// Functions on one table of objects in namespaces.
macro_rules! table {
    ($module:ident, $message:ty, $table:literal, { $($more:item)* }) => {
        pub(crate) mod $module {
            use super::*;

            /// The object of that id.
            pub(crate) fn get(db: &Meta<'_>, namespace: &str, id: &str) -> Result<Option<$message>> {
                let sql = concat!("SELECT record FROM ", $table, " WHERE namespace = ? AND id = ?");
                let mut select = db.0.prepare_cached(sql).doing("prepare")?;
                let record: Option<Vec<u8>> = select.query_row([namespace, id], |row| row.get(0)).optional().doing("read")?;
                record.map(|bytes| decode(&format!("{} {id}", $table), &bytes)).transpose()
            }

            /// Objects of the namespace that follow `after`, by id, up to about this many bytes. None when there are no more.
            pub(crate) fn page(db: &Meta<'_>, namespace: &str, after: &str, bytes: usize) -> Result<Vec<$message>> {
                let sql = concat!("SELECT record FROM ", $table, " WHERE namespace = ? AND id > ? ORDER BY id");
                let mut select = db.0.prepare_cached(sql).doing("prepare")?;
                let mut rows = select.query([namespace, after]).doing("read")?;
                let (mut found, mut read) = (Vec::new(), 0);
                while read < bytes && let Some(row) = rows.next().doing("read")? {
                    let record = row.get_ref(0).and_then(|value| Ok(value.as_blob()?)).doing("read")?;
                    read += record.len();
                    found.push(decode($table, record)?);
                }
                Ok(found)
            }

            /// Inserts, or replaces what has that id.
            pub(crate) fn put(db: &mut Meta<'_>, namespace: &str, id: &str, object: &$message) -> Result<()> {
                let sql = concat!(
                    "INSERT INTO ",
                    $table,
                    " (namespace, id, record) VALUES (?, ?, ?) ON CONFLICT (namespace, id) DO UPDATE SET record = excluded.record"
                );
                let mut insert = db.0.prepare_cached(sql).doing("prepare")?;
                insert.execute(params![namespace, id, object.encode_to_vec()]).doing("write")?;
                Ok(())
            }

            /// Whether there was one to remove.
            pub(crate) fn remove(db: &mut Meta<'_>, namespace: &str, id: &str) -> Result<bool> {
                let sql = concat!("DELETE FROM ", $table, " WHERE namespace = ? AND id = ?");
                let mut delete = db.0.prepare_cached(sql).doing("prepare")?;
                Ok(delete.execute([namespace, id]).doing("remove")? > 0)
            }

            $($more)*
        }
    };
}

table!(containers, Container, "containers", {
    /// Whether the namespace has none.
    pub(crate) fn is_empty(db: &Meta<'_>, namespace: &str) -> Result<bool> {
        let sql = "SELECT NOT EXISTS (SELECT 1 FROM containers WHERE namespace = ?)";
        db.0.prepare_cached(sql).and_then(|mut select| select.query_row([namespace], |row| row.get(0))).doing("read")
    }

    /// Every object of the namespace that `keep` keeps, by id.
    pub(crate) fn list(db: &Meta<'_>, namespace: &str, keep: impl Fn(&Container) -> bool) -> Result<Vec<Container>> {
        let mut select = db.0.prepare_cached("SELECT record FROM containers WHERE namespace = ? ORDER BY id").doing("prepare")?;
        let mut rows = select.query([namespace]).doing("read")?;
        let mut found = Vec::new();
        while let Some(row) = rows.next().doing("read")? {
            let container = decode("containers", row.get_ref(0).and_then(|value| Ok(value.as_blob()?)).doing("read")?)?;
            if keep(&container) {
                found.push(container);
            }
        }
        Ok(found)
    }
});
table!(leases, Lease, "leases", {
    /// All of them, with their namespaces.
    pub(crate) fn all(db: &Meta<'_>) -> Result<Vec<(String, Lease)>> {
        let mut select = db.0.prepare("SELECT namespace, record FROM leases").doing("prepare")?;
        let rows = select.query_map([], |row| Ok((row.get(0)?, row.get::<_, Vec<u8>>(1)?))).doing("read")?;
        rows.map(|row| row.doing("read").and_then(|(namespace, record)| Ok((namespace, decode("leases", &record)?)))).collect()
    }

    /// Records when a lease expires, from its label; without a valid label it never does.
    pub(crate) fn note_expiry(db: &mut Meta<'_>, namespace: &str, lease: &Lease) -> Result<()> {
        let expires = lease.labels.get(EXPIRE).and_then(|text| text.parse().ok()).map(|at| timestamp::to_nanos(&at));
        let mut update = db.0.prepare_cached("UPDATE leases SET expires = ? WHERE namespace = ? AND id = ?").doing("prepare")?;
        update.execute(params![expires, namespace, lease.id]).doing("write").map(drop)
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

/// The label with the expiry of a lease.
const EXPIRE: &str = "containerd.io/gc.expire";

pub(crate) mod namespaces {
    use containerd_client::services::v1::Namespace;

    use super::*;

    /// The namespace of that name.
    pub(crate) fn get(db: &Meta<'_>, name: &str) -> Result<Option<Namespace>> {
        let mut select = db.0.prepare_cached("SELECT record FROM namespaces WHERE name = ?").doing("prepare")?;
        let record: Option<Vec<u8>> = select.query_row([name], |row| row.get(0)).optional().doing("read")?;
        record.map(|bytes| decode(&format!("namespace {name}"), &bytes)).transpose()
    }

    /// All of them, by name.
    pub(crate) fn list(db: &Meta<'_>) -> Result<Vec<Namespace>> {
        let mut select = db.0.prepare_cached("SELECT record FROM namespaces ORDER BY name").doing("prepare")?;
        let rows = select.query_map([], |row| row.get::<_, Vec<u8>>(0)).doing("read")?;
        rows.map(|record| decode("namespaces", &record.doing("read")?)).collect()
    }

    /// Inserts, or replaces the one of that name.
    pub(crate) fn put(db: &mut Meta<'_>, namespace: &Namespace) -> Result<()> {
        let sql = "INSERT INTO namespaces (name, record) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET record = excluded.record";
        let mut insert = db.0.prepare_cached(sql).doing("prepare")?;
        insert.execute(params![namespace.name, namespace.encode_to_vec()]).doing("write")?;
        Ok(())
    }

    /// Creates one without labels, unless it exists.
    pub(crate) fn ensure(db: &mut Meta<'_>, name: &str) -> Result<()> {
        let namespace = Namespace { name: name.to_owned(), ..Namespace::default() };
        let mut insert = db.0.prepare_cached("INSERT OR IGNORE INTO namespaces (name, record) VALUES (?, ?)").doing("prepare")?;
        insert.execute(params![name, namespace.encode_to_vec()]).doing("write")?;
        Ok(())
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

    /// Removes one, if it exists.
    pub(crate) fn remove(db: &mut Meta<'_>, namespace: &str, lease: &str, resource: &Resource) -> Result<()> {
        let sql = "DELETE FROM edges WHERE namespace = ? AND from_type = 'leases' AND from_id = ? AND to_type = ? AND to_id = ?";
        let mut delete = db.0.prepare_cached(sql).doing("prepare")?;
        delete.execute([namespace, lease, &resource.kind, &resource.id]).doing("remove")?;
        Ok(())
    }
}
