//! The tables of the store, and the way from each older version to the newest.

mod images;

use std::path::Path;
use std::time::Duration;

use containerd_client::services::v1::{Container, Lease, Namespace};
use rusqlite::{Connection, ErrorCode, params};

use super::labels::{self, Labelled};
use super::objects::decode;
use super::{Doing as _, leases};
use crate::error::{Error, Result};

/// One kind of file: its identity, and the way to its newest version.
#[derive(Debug)]
pub(super) struct Schema {
    application_id: i64,
    /// The n-th leads from version n - 1 to version n, in one transaction. What has been released is never changed.
    migrations: &'static [Migration],
}

type Migration = fn(&Connection) -> Result<()>;

impl Schema {
    /// The version that this program works with.
    pub(super) fn newest(&self) -> i64 {
        i64::try_from(self.migrations.len()).unwrap_or(i64::MAX)
    }

    /// The version of a file; a new file has version 0.
    ///
    /// Errors: [`Error::Precondition`] when it is something else, or of a newer version.
    pub(super) fn check(&self, connection: &Connection, path: &Path) -> Result<i64> {
        let number = |name: &str| connection.query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, i64>(0));
        let version = match number("user_version") {
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::NotADatabase) => return Err(foreign(path)),
            version => version.on_store(path, "read version")?,
        };
        let application = number("application_id").on_store(path, "read identity")?;
        let is_new = version == 0 && number("schema_version").on_store(path, "read identity")? == 0;
        if !is_new && application != self.application_id {
            return Err(foreign(path));
        }
        let newest = self.newest();
        if version > newest {
            return Err(Error::Precondition(format!(
                "metadata store {} is of version {version}, from a newer x-manager; this one knows versions up to {newest}",
                path.display()
            )));
        }
        Ok(version)
    }

    /// Makes a connection fit for use: settings, identity, version.
    pub(super) fn prepare(&self, connection: &mut Connection, path: &Path) -> Result<()> {
        let version = self.check(connection, path)?;
        if version == 0 {
            // only a file without tables takes it
            connection.execute_batch("PRAGMA auto_vacuum = INCREMENTAL").on_store(path, "set up")?;
        }
        connection
            .execute_batch("PRAGMA journal_mode = WAL; PRAGMA journal_size_limit = 0; PRAGMA synchronous = FULL")
            .on_store(path, "set up")?;
        set_up(connection).on_store(path, "set up")?;
        for (index, migration) in (1_i64..).zip(self.migrations).filter(|(index, _)| *index > version) {
            let transaction = connection.transaction().doing("begin migration")?;
            migration(&transaction)?;
            transaction.pragma_update(None, "application_id", self.application_id).doing("write identity")?;
            transaction.pragma_update(None, "user_version", index).doing("write version")?;
            transaction.commit().doing("commit migration")?;
        }
        let is_shrinkable = connection.query_row("PRAGMA auto_vacuum", [], |row| row.get::<_, i64>(0)).on_store(path, "set up")? != 0;
        if !is_shrinkable {
            connection.execute_batch("PRAGMA auto_vacuum = INCREMENTAL; VACUUM").on_store(path, "make shrinkable")?;
        }
        Ok(())
    }
}

/// Settings of every connection.
pub(super) fn set_up(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.execute_batch("PRAGMA cache_size = -256; PRAGMA foreign_keys = ON; PRAGMA temp_store = MEMORY")
}

fn foreign(path: &Path) -> Error {
    let path = path.display();
    Error::Precondition(format!(
        "{path} is not a metadata store of x-manager; if it was one, put a copy that `x-manager backup` has made in its place"
    ))
}

fn run(db: &Connection, sql: &str) -> Result<()> {
    db.execute_batch(sql).doing("migrate")
}

/// Data that survives a reboot.
///
/// `record` holds the object as the API has it, in protobuf, whose labels do not count; what is looked up by has a column of its own.
/// `facts` are about the store itself: whose it is (`uuid`).
pub(super) const META: Schema =
    Schema { application_id: 0x786d_6772, migrations: &[first, edges_and_expiry, labels_apart, sandboxes, images::images] }; // xmgr

/// Data that does not: see `processes.rs`.
///
/// `facts` has the boot of the machine (`boot`), and the tasks that the restart monitor is creating.
pub(super) const NOTES: Schema = Schema { application_id: 0x786d_676e, migrations: &[notes, ends_of_sandboxes] }; // xmgn

fn first(db: &Connection) -> Result<()> {
    run(
        db,
        "
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE namespaces (name TEXT PRIMARY KEY, record BLOB NOT NULL) STRICT;
    CREATE TABLE containers (
        namespace TEXT NOT NULL, id TEXT NOT NULL, record BLOB NOT NULL, PRIMARY KEY (namespace, id)
    ) STRICT;
    CREATE TABLE leases (
        namespace TEXT NOT NULL, id TEXT NOT NULL, record BLOB NOT NULL, PRIMARY KEY (namespace, id)
    ) STRICT;
    CREATE TABLE lease_resources (
        namespace TEXT NOT NULL, lease TEXT NOT NULL, type TEXT NOT NULL, id TEXT NOT NULL,
        PRIMARY KEY (namespace, lease, type, id),
        FOREIGN KEY (namespace, lease) REFERENCES leases (namespace, id) ON DELETE CASCADE
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE execs (
        namespace TEXT NOT NULL, id TEXT NOT NULL, exec TEXT NOT NULL, PRIMARY KEY (namespace, id, exec)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE exits (
        namespace TEXT NOT NULL, id TEXT NOT NULL, exec TEXT NOT NULL, pid INTEGER NOT NULL,
        status INTEGER NOT NULL, at INTEGER NOT NULL, collected INTEGER,
        PRIMARY KEY (namespace, id, exec, pid, at)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX exits_collected ON exits (collected) WHERE collected IS NOT NULL;
    CREATE TABLE ended (
        namespace TEXT NOT NULL, id TEXT NOT NULL, pid INTEGER NOT NULL, status INTEGER NOT NULL, at INTEGER NOT NULL,
        PRIMARY KEY (namespace, id)
    ) STRICT, WITHOUT ROWID;
",
    )
}

/// References are edges from any object to any other, which go with the object that they start from. Leases have an instant in nanoseconds
/// since 1970 after which they hold nothing. What is known of tasks moves to a file of its own.
fn edges_and_expiry(db: &Connection) -> Result<()> {
    run(
        db,
        "
    CREATE TABLE edges (
        namespace TEXT NOT NULL, from_type TEXT NOT NULL, from_id TEXT NOT NULL, to_type TEXT NOT NULL, to_id TEXT NOT NULL,
        PRIMARY KEY (namespace, from_type, from_id, to_type, to_id)
    ) STRICT, WITHOUT ROWID;
    INSERT INTO edges SELECT namespace, 'leases', lease, type, id FROM lease_resources;
    DROP TABLE lease_resources;
    DROP TABLE execs;
    DROP TABLE exits;
    DROP TABLE ended;
    DELETE FROM facts WHERE name <> 'uuid';
    ALTER TABLE leases ADD COLUMN expires INTEGER;
    CREATE INDEX leases_expires ON leases (expires) WHERE expires IS NOT NULL;
    CREATE TRIGGER edges_of_lease AFTER DELETE ON leases BEGIN
        DELETE FROM edges WHERE namespace = old.namespace AND from_type = 'leases' AND from_id = old.id;
    END;
",
    )?;
    for (rowid, _namespace, lease) in records::<Lease>(db, "namespace")? {
        db.execute("UPDATE leases SET expires = ? WHERE rowid = ?", params![leases::expiry(&lease), rowid]).doing("migrate")?;
    }
    Ok(())
}

/// Labels have a table, from which they go with their object. Records that are there keep theirs until they are written again: during an upgrade
/// the previous process reads them.
fn labels_apart(db: &Connection) -> Result<()> {
    run(
        db,
        "
    CREATE TABLE labels (
        namespace TEXT NOT NULL, kind TEXT NOT NULL, id TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,
        PRIMARY KEY (namespace, kind, id, key)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX labels_by_value ON labels (namespace, kind, key, value, id);
    CREATE TRIGGER labels_of_container AFTER DELETE ON containers BEGIN
        DELETE FROM labels WHERE namespace = old.namespace AND kind = 'containers' AND id = old.id;
    END;
    CREATE TRIGGER labels_of_lease AFTER DELETE ON leases BEGIN
        DELETE FROM labels WHERE namespace = old.namespace AND kind = 'leases' AND id = old.id;
    END;
    CREATE TRIGGER labels_of_namespace AFTER DELETE ON namespaces BEGIN
        DELETE FROM labels WHERE namespace = '' AND kind = 'namespaces' AND id = old.name;
    END;
",
    )?;
    copy_labels::<Container>(db, "namespace", |container| &container.id)?;
    copy_labels::<Lease>(db, "namespace", |lease| &lease.id)?;
    copy_labels::<Namespace>(db, "''", |namespace| &namespace.name)
}

/// Sandboxes are objects like containers.
fn sandboxes(db: &Connection) -> Result<()> {
    run(
        db,
        "
    CREATE TABLE sandboxes (
        namespace TEXT NOT NULL, id TEXT NOT NULL, record BLOB NOT NULL, PRIMARY KEY (namespace, id)
    ) STRICT;
    CREATE TRIGGER labels_of_sandbox AFTER DELETE ON sandboxes BEGIN
        DELETE FROM labels WHERE namespace = old.namespace AND kind = 'sandboxes' AND id = old.id;
    END;
",
    )
}

fn copy_labels<M: Labelled>(db: &Connection, namespace: &str, id: fn(&M) -> &String) -> Result<()> {
    for (_rowid, namespace, mut object) in records::<M>(db, namespace)? {
        let copied = std::mem::take(object.labels());
        labels::set(db, M::KIND, &namespace, id(&object), &copied)?;
    }
    Ok(())
}

/// All records of a kind: row, namespace, object.
fn records<M: Labelled>(db: &Connection, namespace: &str) -> Result<Vec<(i64, String, M)>> {
    let mut select = db.prepare(&format!("SELECT rowid, {namespace}, record FROM {}", M::KIND)).doing("migrate")?;
    let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get::<_, Vec<u8>>(2)?))).doing("migrate")?;
    rows.map(|row| {
        let (rowid, namespace, record): (i64, String, _) = row.doing("migrate")?;
        let object = decode(&format!("row {rowid}"), &record)?;
        Ok((rowid, namespace, object))
    })
    .collect()
}

fn notes(db: &Connection) -> Result<()> {
    run(
        db,
        "
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE execs (
        namespace TEXT NOT NULL, id TEXT NOT NULL, exec TEXT NOT NULL, PRIMARY KEY (namespace, id, exec)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE exits (
        namespace TEXT NOT NULL, id TEXT NOT NULL, exec TEXT NOT NULL, pid INTEGER NOT NULL,
        status INTEGER NOT NULL, at INTEGER NOT NULL, collected INTEGER,
        PRIMARY KEY (namespace, id, exec, pid, at)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX exits_collected ON exits (collected) WHERE collected IS NOT NULL;
    CREATE TABLE ended (
        namespace TEXT NOT NULL, id TEXT NOT NULL, pid INTEGER NOT NULL, status INTEGER NOT NULL, at INTEGER NOT NULL,
        PRIMARY KEY (namespace, id)
    ) STRICT, WITHOUT ROWID;
",
    )
}

/// Sandboxes end like tasks.
fn ends_of_sandboxes(db: &Connection) -> Result<()> {
    run(db, "ALTER TABLE ended ADD COLUMN kind TEXT NOT NULL DEFAULT 'task'")
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::store::tests::files;
    use crate::store::{Exit, Files, Kind, Meta, Notes, Store, ended};

    #[test]
    fn a_store_of_a_newer_version_is_refused_with_a_sentence() {
        let folder = scratch::Folder::new("newer");
        let files = files(&folder);
        drop(Store::open(&files).expect("a new store"));
        drop(Store::open(&files).expect("the same again"));
        for file in [&files.notes, &files.meta] {
            Connection::open(file).expect("it is SQLite's").pragma_update(None, "user_version", 99).expect("a change");
            let error = Store::open(&files).expect_err("newer").to_string();
            let sentence = format!("{} is of version 99, from a newer x-manager; this one knows versions up to", file.display());
            assert!(error.contains(&sentence), "{error}");
        }
    }

    /// A store of version 1 with a namespace and leases, of which one holds something and one expires.
    fn old(path: &Path) -> Connection {
        let mut store = Connection::open(path).expect("a file");
        ONE.prepare(&mut store, path).expect("a new store");
        let lease = |id: &str, expiry: &str| {
            let labels = [("containerd.io/gc.expire".to_owned(), expiry.to_owned())].into();
            Lease { id: id.to_owned(), labels, ..Lease::default() }.encode_to_vec()
        };
        store
            .execute_batch(
                "INSERT INTO namespaces VALUES ('one', x''); INSERT INTO facts VALUES ('uuid', 'u'), ('boot', 'b');
                 INSERT INTO leases VALUES ('one', 'm', x''); INSERT INTO lease_resources VALUES ('one', 'l', 'images', 'i')",
            )
            .expect_err("what a lease holds needs the lease");
        let sql = "INSERT INTO leases VALUES ('one', ?, ?)";
        store.execute(sql, ("l", lease("l", "2026-01-02T03:04:05.5Z"))).expect("room");
        store.execute(sql, ("n", lease("n", "tomorrow"))).expect("room");
        store.execute("INSERT INTO lease_resources VALUES ('one', 'l', 'images', 'i')", ()).expect("room");
        store
    }

    /// What the newest version has of the labels of an old one.
    fn labels_of(store: &Connection, kind: &str, namespace: &str, id: &str) -> Vec<(String, String)> {
        labels::get(store, kind, namespace, id).expect("labels").into_iter().collect()
    }

    const ONE: Schema = Schema { application_id: META.application_id, migrations: &[first] };

    fn number(store: &Connection, sql: &str) -> i64 {
        store.query_row(sql, [], |row| row.get(0)).expect(sql)
    }

    #[test]
    fn a_store_of_an_older_version_is_brought_forward_and_keeps_what_is_in_it() {
        let folder = scratch::Folder::new("forward");
        let (path, new) = (folder.join("meta.db"), folder.join("new.db"));
        let old = old(&path);
        let tables = |store: &Connection| {
            let mut select = store.prepare("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name").expect("tables");
            let tables = select.query_map([], |row| row.get::<_, String>(0)).expect("tables");
            tables.collect::<rusqlite::Result<Vec<_>>>().expect("tables")
        };
        old.execute_batch("PRAGMA auto_vacuum = NONE; VACUUM").expect("as it was once");
        drop(old);
        for _opened_again in 0..2 {
            let mut store = Connection::open(&path).expect("a store");
            META.prepare(&mut store, &path).expect("a way forward");
            assert_eq!((number(&store, "PRAGMA user_version"), number(&store, "PRAGMA auto_vacuum")), (META.newest(), 2));
            assert_eq!(number(&store, "SELECT count(*) FROM leases"), 3);
            assert_eq!(number(&store, "SELECT expires FROM leases WHERE id = 'l'"), 1_767_323_045_500_000_000);
            assert_eq!(number(&store, "SELECT count(*) FROM leases WHERE expires IS NULL"), 2);
            assert_eq!(number(&store, "SELECT count(*) FROM edges WHERE from_type = 'leases' AND from_id = 'l' AND to_id = 'i'"), 1);
            assert_eq!(number(&store, "SELECT count(*) FROM facts"), 1);
            let expires = ("containerd.io/gc.expire".to_owned(), "tomorrow".to_owned());
            assert_eq!(labels_of(&store, "leases", "one", "n"), [expires]);
            let record: Vec<u8> = store.query_row("SELECT record FROM leases WHERE id = 'n'", [], |row| row.get(0)).expect("a lease");
            assert_eq!(Lease::decode(&*record).expect("a lease").labels.len(), 1, "the previous process still reads it");
            let mut made = Connection::open(&new).expect("a file");
            META.prepare(&mut made, &new).expect("a new store");
            assert_eq!(tables(&store), tables(&made), "a new one goes the same way");
        }
        let mut store = Connection::open(&path).expect("a store");
        labels::set(&store, "leases", "one", "n", &[].into()).expect("removal");
        let unlabelled = leases::get(&Meta(&store), "one", "n").expect("read").expect("it is there");
        assert_eq!(unlabelled.labels, [].into(), "labels of an old record do not count");
        store.execute("DELETE FROM leases WHERE id = 'l'", ()).expect("removal");
        assert_eq!(number(&store, "SELECT count(*) FROM edges"), 0, "edges go with what they start from");
        assert_eq!(labels_of(&store, "leases", "one", "l"), [], "and labels with their object");
        let error = ONE.prepare(&mut store, &path).expect_err("newer").to_string();
        assert!(error.contains("from a newer x-manager; this one knows versions up to 1"), "{error}");
    }

    #[test]
    fn an_exit_that_an_older_version_noted_is_a_tasks() {
        let folder = scratch::Folder::new("notes");
        let path = folder.join("notes.db");
        let mut store = Connection::open(&path).expect("a file");
        let old = Schema { application_id: NOTES.application_id, migrations: &[notes] };
        old.prepare(&mut store, &path).expect("a new store");
        store.execute("INSERT INTO ended VALUES ('n', 'c', 7, 3, 1)", ()).expect("room");
        NOTES.prepare(&mut store, &path).expect("a way forward");
        let exit = Exit { pid: 7, status: 3, at: 1 };
        ended::put(&mut Notes(&store), Kind::Sandbox, "n", "s", exit).expect("room");
        let mut all = ended::list(&Notes(&store)).expect("read");
        all.sort_by(|one, other| one.2.cmp(&other.2));
        let noted = |kind, id: &str| (kind, "n".to_owned(), id.to_owned(), exit);
        assert_eq!(all, [noted(Kind::Task, "c"), noted(Kind::Sandbox, "s")]);
    }

    #[test]
    fn a_migration_that_fails_leaves_the_store_as_it_was() {
        let folder = scratch::Folder::new("backward");
        let path = folder.join("meta.db");
        drop(old(&path));
        let fails: Migration = |db| {
            edges_and_expiry(db)?;
            run(db, "INSERT INTO none VALUES (1)")
        };
        let failing = Schema { application_id: META.application_id, migrations: Box::leak(Box::new([first, fails])) };
        let mut store = Connection::open(&path).expect("a store");
        let error = failing.prepare(&mut store, &path).expect_err("no such table").chain();
        assert!(error.contains("migrate") && error.contains("none"), "{error}");
        drop(store);
        let mut store = Connection::open(&path).expect("a store");
        ONE.prepare(&mut store, &path).expect("of the old version");
        assert_eq!(number(&store, "SELECT count(*) FROM lease_resources JOIN leases USING (namespace) WHERE leases.id = lease"), 1);
        assert_eq!(number(&store, "SELECT count(*) FROM sqlite_schema WHERE name = 'edges'"), 0);
    }

    #[test]
    fn a_file_that_is_something_else_is_left_alone() {
        let folder = scratch::Folder::new("foreign");
        let text = folder.join("text.db");
        std::fs::write(&text, "not a database, but long enough to be taken for one. ".repeat(50)).expect("a file");
        let other = folder.join("other.db");
        Connection::open(&other).and_then(|other| other.execute_batch("CREATE TABLE t (a)")).expect("another database");
        for path in [text, other] {
            let before = std::fs::read(&path).expect("a file");
            let error = Store::open(&Files { meta: path.clone(), notes: folder.join("notes.db") }).expect_err("foreign").to_string();
            assert!(error.contains("is not a metadata store of x-manager"), "{error}");
            assert_eq!(std::fs::read(&path).expect("a file"), before);
        }
    }
}
