//! Version 5: content, images and snapshots, and what refers to them.

use containerd_client::services::v1::Container;
use containerd_client::types::Sandbox;
use rusqlite::Connection;

use super::{records, run};
use crate::error::Result;
use crate::store::edges;
use crate::store::labels::{self, Labelled};

/// Content, images and snapshots have tables, and every object that can refer to them has edges.
///
/// - `content` has a row for each blob that a namespace has; `id` is its digest. The file is shared by all namespaces that have the blob: it is
///   there before the first row, and removed after the last.
/// - `images` have the digest of their target, and the instant after which they hold nothing (nanoseconds since 1970), in columns of their own.
/// - `snapshots` have a row for each snapshot: `id` is the number of its folder, which is never used again. `parent` is a row of the same
///   namespace and snapshotter; SQLite refuses to remove a parent. `kind` is the API's number: 1 view, 2 active, 3 committed. `created` and
///   `updated` are nanoseconds since 1970, `size` (bytes) and `inodes` what a committed one uses, without its parents. A snapshot's labels
///   and edges are those of an object of kind `snapshots/SNAPSHOTTER` whose id is its key.
/// - `edges` start from the object to which they belong. `back_edges` belong to the object that they lead to the other way round: as long as
///   what `to_type` and `to_id` name is there, the object of `from_type` and `from_id` is kept.
pub(super) fn images(db: &Connection) -> Result<()> {
    run(
        db,
        "
    CREATE TABLE content (
        namespace TEXT NOT NULL, id TEXT NOT NULL, record BLOB NOT NULL, PRIMARY KEY (namespace, id)
    ) STRICT;
    CREATE INDEX content_by_digest ON content (id);
    CREATE TABLE images (
        namespace TEXT NOT NULL, id TEXT NOT NULL, record BLOB NOT NULL,
        target TEXT NOT NULL DEFAULT '', expires INTEGER, PRIMARY KEY (namespace, id)
    ) STRICT;
    CREATE INDEX images_by_target ON images (namespace, target);
    CREATE INDEX edges_by_target ON edges (namespace, to_type, to_id);
    CREATE INDEX images_expires ON images (expires) WHERE expires IS NOT NULL;
    CREATE TABLE snapshots (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        namespace TEXT NOT NULL, snapshotter TEXT NOT NULL, key TEXT NOT NULL,
        parent INTEGER REFERENCES snapshots (id), kind INTEGER NOT NULL,
        created INTEGER NOT NULL, updated INTEGER NOT NULL, size INTEGER, inodes INTEGER,
        UNIQUE (namespace, snapshotter, key)
    ) STRICT;
    CREATE INDEX snapshots_by_parent ON snapshots (parent) WHERE parent IS NOT NULL;
    CREATE TABLE back_edges (
        namespace TEXT NOT NULL, from_type TEXT NOT NULL, from_id TEXT NOT NULL, to_type TEXT NOT NULL, to_id TEXT NOT NULL,
        PRIMARY KEY (namespace, to_type, to_id, from_type, from_id)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX back_edges_by_owner ON back_edges (namespace, from_type, from_id);
    CREATE INDEX labels_of_roots ON labels (namespace, kind, id) WHERE key = 'containerd.io/gc.root';
    CREATE TRIGGER references_of_container AFTER DELETE ON containers BEGIN
        DELETE FROM edges WHERE namespace = old.namespace AND from_type = 'containers' AND from_id = old.id;
    END;
    CREATE TRIGGER references_of_sandbox AFTER DELETE ON sandboxes BEGIN
        DELETE FROM edges WHERE namespace = old.namespace AND from_type = 'sandboxes' AND from_id = old.id;
    END;
    CREATE TRIGGER references_of_content AFTER DELETE ON content BEGIN
        DELETE FROM labels WHERE namespace = old.namespace AND kind = 'content' AND id = old.id;
        DELETE FROM edges WHERE namespace = old.namespace AND from_type = 'content' AND from_id = old.id;
        DELETE FROM back_edges WHERE namespace = old.namespace AND from_type = 'content' AND from_id = old.id;
    END;
    CREATE TRIGGER references_of_image AFTER DELETE ON images BEGIN
        DELETE FROM labels WHERE namespace = old.namespace AND kind = 'images' AND id = old.id;
        DELETE FROM edges WHERE namespace = old.namespace AND from_type = 'images' AND from_id = old.id;
        DELETE FROM back_edges WHERE namespace = old.namespace AND from_type = 'images' AND from_id = old.id;
    END;
    CREATE TRIGGER references_of_snapshot AFTER DELETE ON snapshots BEGIN
        DELETE FROM labels WHERE namespace = old.namespace AND kind = 'snapshots/' || old.snapshotter AND id = old.key;
        DELETE FROM edges WHERE namespace = old.namespace AND from_type = 'snapshots/' || old.snapshotter AND from_id = old.key;
        DELETE FROM back_edges WHERE namespace = old.namespace AND from_type = 'snapshots/' || old.snapshotter AND from_id = old.key;
    END;
    CREATE TRIGGER references_of_renamed_snapshot AFTER UPDATE OF key ON snapshots WHEN new.key <> old.key BEGIN
        DELETE FROM labels WHERE namespace = old.namespace AND kind = 'snapshots/' || old.snapshotter AND id = old.key;
        DELETE FROM edges WHERE namespace = old.namespace AND from_type = 'snapshots/' || old.snapshotter AND from_id = old.key;
        DELETE FROM back_edges WHERE namespace = old.namespace AND from_type = 'snapshots/' || old.snapshotter AND from_id = old.key;
    END;
",
    )?;
    add_edges::<Container>(db, |container| &container.id)?;
    add_edges::<Sandbox>(db, |sandbox| &sandbox.sandbox_id)
}

fn add_edges<M: Labelled>(db: &Connection, id: fn(&M) -> &String) -> Result<()> {
    for (_rowid, namespace, mut object) in records::<M>(db, "namespace")? {
        let id = id(&object).clone();
        *object.labels() = labels::get(db, M::KIND, &namespace, &id)?;
        if let Some(references) = object.references() {
            edges::set(db, M::KIND, &namespace, &id, &references)?;
        }
    }
    Ok(())
}
