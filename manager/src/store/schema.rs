//! The tables of the store, and the way from each older version to the newest.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode};

use super::Doing as _;
use crate::error::{Error, Result};

/// The version that this program works with.
pub(super) const NEWEST: i64 = MIGRATIONS.len() as i64;

/// Says of which version a store is; a new one is of version 0.
///
/// Errors: [`Error::Precondition`] when it is something else, or of a newer version.
pub(super) fn check(connection: &Connection, path: &Path) -> Result<i64> {
    check_up_to(NEWEST, connection, path)
}

fn check_up_to(newest: i64, connection: &Connection, path: &Path) -> Result<i64> {
    let number = |name: &str| connection.query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, i64>(0));
    let version = match number("user_version") {
        Err(error) if error.sqlite_error_code() == Some(ErrorCode::NotADatabase) => return Err(foreign(path)),
        version => version.doing("read version")?,
    };
    let application = number("application_id").doing("read identity")?;
    let is_new = version == 0 && number("schema_version").doing("read identity")? == 0;
    if !is_new && application != APPLICATION_ID {
        return Err(foreign(path));
    }
    if version > newest {
        return Err(Error::Precondition(format!(
            "metadata store {} is of version {version}, from a newer x-manager; this one knows versions up to {newest}",
            path.display()
        )));
    }
    Ok(version)
}

/// Makes a connection fit for use: settings, identity, version.
pub(super) fn prepare(connection: &mut Connection, path: &Path) -> Result<()> {
    prepare_by(MIGRATIONS, connection, path)
}

fn prepare_by(migrations: &[&str], connection: &mut Connection, path: &Path) -> Result<()> {
    let version = check_up_to(migrations.len() as i64, connection, path)?;
    connection.busy_timeout(Duration::from_secs(5)).doing("set time-out")?;
    connection
        .execute_batch("PRAGMA journal_mode = WAL; PRAGMA wal_autocheckpoint = 256; PRAGMA cache_size = -256; PRAGMA foreign_keys = ON; PRAGMA temp_store = MEMORY")
        .doing("set up")?;
    for (index, migration) in (1_i64..).zip(migrations).filter(|(index, _)| *index > version) {
        let transaction = connection.transaction().doing("begin migration")?;
        transaction.execute_batch(migration).doing("migrate")?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID).doing("write identity")?;
        transaction.pragma_update(None, "user_version", index).doing("write version")?;
        transaction.commit().doing("commit migration")?;
    }
    Ok(())
}

fn foreign(path: &Path) -> Error {
    Error::Precondition(format!("{} is not a metadata store of x-manager", path.display()))
}

/// `xmgr`
const APPLICATION_ID: i64 = 0x786d_6772;

/// The n-th leads from version n - 1 to version n. What has been released is never changed.
///
/// `record` holds the object as the API has it, in protobuf; what is looked up by has a column of its own.
/// `facts` are about the store itself: whose it is (`uuid`), and for which boot of the machine the tasks in it are (`boot`).
/// `execs`, `exits` and `ended` are what this process must know of tasks after its own crash: see `processes.rs`.
const MIGRATIONS: &[&str] = &["
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
"];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    fn folder(name: &str) -> std::path::PathBuf {
        let folder = std::env::temp_dir().join(format!("x-manager-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        folder
    }

    #[test]
    fn a_store_of_a_newer_version_is_refused_with_a_sentence() {
        let folder = folder("newer");
        let path = folder.join("meta.db");
        drop(Store::open(&path).expect("a new store"));
        drop(Store::open(&path).expect("the same again"));
        Connection::open(&path).expect("it is SQLite's").pragma_update(None, "user_version", 99).expect("a change");
        let error = Store::open(&path).expect_err("newer").to_string();
        assert!(error.contains("is of version 99, from a newer x-manager; this one knows versions up to 1"), "{error}");
        std::fs::remove_dir_all(folder).expect("removal");
    }

    /// A store of version 1 with a namespace and a lease that holds something.
    fn old(path: &Path) -> Connection {
        let mut store = Connection::open(path).expect("a file");
        prepare_by(&MIGRATIONS[..1], &mut store, path).expect("a new store");
        let fill = "INSERT INTO namespaces VALUES ('one', x''); INSERT INTO leases VALUES ('one', 'l', x'');
                    INSERT INTO lease_resources VALUES ('one', 'l', 'images', 'i')";
        store.execute_batch(fill).expect("room");
        store
    }

    fn number(store: &Connection, sql: &str) -> i64 {
        store.query_row(sql, [], |row| row.get(0)).expect(sql)
    }

    const NEXT: &str = "ALTER TABLE namespaces ADD COLUMN note TEXT NOT NULL DEFAULT 'new'; CREATE TABLE notes (a TEXT) STRICT";

    #[test]
    fn a_store_of_an_older_version_is_brought_forward_and_keeps_what_is_in_it() {
        let folder = folder("forward");
        let path = folder.join("meta.db");
        let migrations = [MIGRATIONS[0], NEXT, "INSERT INTO notes SELECT name || note FROM namespaces"];
        drop(old(&path));
        for _opened_again in 0..2 {
            let mut store = Connection::open(&path).expect("a store");
            prepare_by(&migrations, &mut store, &path).expect("a way forward");
            assert_eq!(number(&store, "PRAGMA user_version"), 3);
            assert_eq!(number(&store, "PRAGMA application_id"), APPLICATION_ID);
            assert_eq!(number(&store, "SELECT count(*) FROM lease_resources JOIN leases USING (namespace)"), 1);
            assert_eq!(number(&store, "SELECT count(*) FROM notes WHERE a = 'onenew'"), 1, "each of them once");
        }
        // the older program refuses what the newer one has made of it
        let mut store = Connection::open(&path).expect("a store");
        let error = prepare_by(&migrations[..2], &mut store, &path).expect_err("newer").to_string();
        assert!(error.contains("is of version 3, from a newer x-manager; this one knows versions up to 2"), "{error}");
        drop(store);
        // a new one goes the same way
        let new = folder.join("new.db");
        let mut store = Connection::open(&new).expect("a file");
        prepare_by(&migrations, &mut store, &new).expect("a new store");
        assert_eq!((number(&store, "PRAGMA user_version"), number(&store, "SELECT count(*) FROM notes")), (3, 0));
        std::fs::remove_dir_all(folder).expect("removal");
    }

    #[test]
    fn a_migration_that_fails_leaves_the_store_as_it_was() {
        let folder = folder("backward");
        let path = folder.join("meta.db");
        drop(old(&path));
        let fails = format!("{NEXT}; DELETE FROM leases; INSERT INTO none VALUES (1)");
        let mut store = Connection::open(&path).expect("a store");
        let error = prepare_by(&[MIGRATIONS[0], &fails], &mut store, &path).expect_err("no such table").chain();
        assert!(error.contains("migrate") && error.contains("none"), "{error}");
        drop(store);
        let mut store = Connection::open(&path).expect("a store");
        prepare_by(&MIGRATIONS[..1], &mut store, &path).expect("of the old version");
        assert_eq!(number(&store, "PRAGMA user_version"), 1);
        assert_eq!(number(&store, "SELECT count(*) FROM lease_resources JOIN leases USING (namespace)"), 1);
        assert_eq!(number(&store, "SELECT count(*) FROM pragma_table_info('namespaces')"), 2);
        assert_eq!(number(&store, "SELECT count(*) FROM sqlite_schema WHERE name = 'notes'"), 0);
        std::fs::remove_dir_all(folder).expect("removal");
    }

    #[test]
    fn a_file_that_is_something_else_is_left_alone() {
        let folder = folder("foreign");
        let text = folder.join("text.db");
        std::fs::write(&text, "not a database, but long enough to be taken for one. ".repeat(50)).expect("a file");
        let other = folder.join("other.db");
        Connection::open(&other).and_then(|other| other.execute_batch("CREATE TABLE t (a)")).expect("another database");
        for path in [text, other] {
            let before = std::fs::read(&path).expect("a file");
            let error = Store::open(&path).expect_err("foreign").to_string();
            assert!(error.contains("is not a metadata store of x-manager"), "{error}");
            assert_eq!(std::fs::read(&path).expect("a file"), before);
        }
        std::fs::remove_dir_all(folder).expect("removal");
    }
}
