//! What objects refer to, as rows that are written with the object.
//!
//! Labels lead to objects as `gc_labels.rs` says. The target of an image and the parent of a snapshot are columns of those.
//! **Invariant:** edges are a function of the object that they start from, except for leases, whose edges are the resources that clients add.

use std::collections::HashMap;

use rusqlite::Connection;

use super::{Doing as _, Resource};
use crate::error::Result;
use crate::gc_labels::Reference;

/// What one object refers to, and what keeps it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct References {
    /// What it keeps.
    pub(crate) to: Vec<Resource>,
    /// What it is kept by.
    pub(crate) back: Vec<Resource>,
}

impl References {
    /// Those in labels.
    pub(crate) fn in_labels(labels: &HashMap<String, String>) -> Self {
        let mut references = Self::default();
        for (key, value) in labels {
            match Reference::of(key) {
                Some(Reference::To(kind)) => references.to.push(Resource { kind, id: value.clone() }),
                Some(Reference::Back(kind)) => references.back.push(Resource { kind, id: value.clone() }),
                None => {}
            }
        }
        references
    }
}

/// Replaces those of one object.
pub(super) fn set(db: &Connection, kind: &str, namespace: &str, id: &str, references: &References) -> Result<()> {
    for (table, resources) in [("edges", &references.to), ("back_edges", &references.back)] {
        let sql = format!("DELETE FROM {table} WHERE namespace = ? AND from_type = ? AND from_id = ?");
        db.prepare_cached(&sql).and_then(|mut delete| delete.execute([namespace, kind, id])).doing("remove")?;
        let sql = format!("INSERT OR IGNORE INTO {table} (namespace, from_type, from_id, to_type, to_id) VALUES (?, ?, ?, ?, ?)");
        let mut insert = db.prepare_cached(&sql).doing("prepare")?;
        for to in resources {
            insert.execute([namespace, kind, id, &to.kind, &to.id]).doing("write")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_lead_where_containerd_takes_them() {
        for (key, expected) in [
            ("containerd.io/gc.ref.content", Some("content")),
            ("containerd.io/gc.ref.content.config", Some("content")),
            ("containerd.io/gc.ref.content.l.0", Some("content")),
            ("containerd.io/gc.ref.content/x", Some("content")),
            ("containerd.io/gc.ref.contents", None),
            ("containerd.io/gc.ref.snapshot.overlayfs", Some("snapshots/overlayfs")),
            ("containerd.io/gc.ref.snapshot.overlayfs/x", Some("snapshots/overlayfs")),
            ("containerd.io/gc.ref.snapshot.", None),
            ("containerd.io/gc.ref.snapshot", None),
            ("containerd.io/gc.ref.image", Some("images")),
            ("containerd.io/gc.ref.image.a", Some("images")),
            ("containerd.io/gc.ref.volume", None),
            ("containerd.io/gc.root", None),
        ] {
            let references = References::in_labels(&[(key.to_owned(), "v".to_owned())].into());
            let kinds: Vec<_> = references.to.iter().map(|to| to.kind.as_str()).collect();
            assert_eq!((kinds, references.back.len()), (expected.into_iter().collect(), 0), "{key}");
        }
        let back = [("containerd.io/gc.bref.image.x".to_owned(), "v".to_owned())].into();
        assert_eq!(References::in_labels(&back).back, [Resource { kind: "images".to_owned(), id: "v".to_owned() }]);
        let back = [("containerd.io/gc.bref.container/x".to_owned(), "v".to_owned())].into();
        assert_eq!(References::in_labels(&back).back, [Resource { kind: "containers".to_owned(), id: "v".to_owned() }]);
    }
}
