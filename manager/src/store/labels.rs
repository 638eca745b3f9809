//! Labels of objects of every kind, in one table.
//!
//! The table is their only place: records are written without them. It is indexed by key and value, so that objects are found by a label without reading all.

use std::collections::HashMap;

use containerd_client::services::v1::{Container, Image, Info as Content, Lease, Namespace};
use containerd_client::types::Sandbox;
use prost::Message;
use rusqlite::{Connection, params};

use super::edges::References;
use super::{Doing as _, Resource};
use crate::error::Result;

/// An object with labels.
pub(super) trait Labelled: Message + Default + Clone {
    /// The table of its records, which is also the kind of its labels.
    const KIND: &'static str;
    /// Its labels.
    fn labels(&mut self) -> &mut HashMap<String, String>;
    /// What it refers to; none if its edges are not written with it.
    fn references(&self) -> Option<References>;
}

macro_rules! labelled {
    ($($object:ty: $kind:literal, $references:expr;)*) => {
        $(impl Labelled for $object {
            const KIND: &'static str = $kind;
            fn labels(&mut self) -> &mut HashMap<String, String> {
                &mut self.labels
            }
            fn references(&self) -> Option<References> {
                let references: fn(&Self) -> Option<References> = $references;
                references(self)
            }
        })*
    };
}

labelled! {
    Container: "containers", |container| Some(of_container(container));
    Content: "content", |content| Some(References::in_labels(&content.labels));
    Image: "images", |image| Some(References::in_labels(&image.labels));
    Lease: "leases", |_| None;
    Namespace: "namespaces", |_| None;
    Sandbox: "sandboxes", |sandbox| Some(References::in_labels(&sandbox.labels));
}

fn of_container(container: &Container) -> References {
    let mut references = References::in_labels(&container.labels);
    if !container.snapshotter.is_empty() && !container.snapshot_key.is_empty() {
        let kind = format!("snapshots/{}", container.snapshotter);
        references.to.push(Resource { kind, id: container.snapshot_key.clone() });
    }
    references
}

/// A label that an object must have.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Wanted {
    pub(crate) key: String,
    /// None for any value.
    pub(crate) value: Option<String>,
}

/// Those of one object, whose namespace is empty if it is one itself.
pub(super) fn get(db: &Connection, kind: &str, namespace: &str, id: &str) -> Result<HashMap<String, String>> {
    let sql = "SELECT key, value FROM labels WHERE namespace = ? AND kind = ? AND id = ?";
    let mut select = db.prepare_cached(sql).doing("prepare")?;
    let rows = select.query_map([namespace, kind, id], |row| Ok((row.get(0)?, row.get(1)?))).doing("read")?;
    rows.collect::<rusqlite::Result<_>>().doing("read")
}

/// Replaces those of one object.
pub(super) fn set(db: &Connection, kind: &str, namespace: &str, id: &str, labels: &HashMap<String, String>) -> Result<()> {
    let mut delete = db.prepare_cached("DELETE FROM labels WHERE namespace = ? AND kind = ? AND id = ?").doing("prepare")?;
    delete.execute([namespace, kind, id]).doing("remove")?;
    let sql = "INSERT INTO labels (namespace, kind, id, key, value) VALUES (?, ?, ?, ?, ?)";
    let mut insert = db.prepare_cached(sql).doing("prepare")?;
    labels.iter().try_for_each(|(key, value)| insert.execute(params![namespace, kind, id, key, value]).doing("write").map(drop))
}

/// A condition on `id`, for the objects that have one of the labels, and its parameters.
pub(super) fn condition(kind: &str, namespace: &str, wanted: &[Wanted]) -> (String, Vec<String>) {
    let (mut selects, mut parameters) = (Vec::new(), Vec::new());
    for label in wanted {
        let value = if label.value.is_some() { " AND value = ?" } else { "" };
        selects.push(format!("SELECT id FROM labels WHERE namespace = ? AND kind = ? AND key = ?{value}"));
        parameters.extend([namespace, kind, &label.key].map(ToOwned::to_owned));
        parameters.extend(label.value.clone());
    }
    (format!("id IN ({})", selects.join(" UNION ")), parameters)
}
