//! Operations on the whole store: copy, restore, check, rehearse a migration.

use std::fs;
use std::path::{Path, PathBuf};

use containerd_client::services::v1::{Container, Image, Info, Lease, Namespace};
use containerd_client::types::Sandbox;
use prost::Message;
use rusqlite::backup::Backup;
use rusqlite::{Connection, OpenFlags};

use super::{Doing as _, Files, Store, schema};
use crate::error::{Error, IoContext as _, Result};

impl Store {
    /// Sets the maximum size.
    pub(crate) async fn limit(&self, bytes: u64) -> Result<()> {
        self.writer
            .run(move |connection| {
                let page: i64 = connection.query_row("PRAGMA page_size", [], |row| row.get(0)).doing("read page size")?;
                let pages = i64::try_from(bytes).unwrap_or(i64::MAX) / page.max(1);
                connection.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(())).doing("set size")
            })
            .await
    }

    /// Gives back what removed objects have left of the file, a few steps at a time, and makes the reserve again that a full disk has cost.
    pub(crate) async fn shrink(&self) -> Result<()> {
        let reserve = self.reserve.clone();
        let free = "SELECT freelist_count FROM pragma_freelist_count";
        if self.read(move |db| db.0.query_row(free, [], |row| row.get::<_, i64>(0)).doing("count free pages")).await? >= FREE_PAGES {
            self.writer
                .run(move |connection| {
                    // it yields a row for each page
                    let mut vacuum = connection.prepare(&format!("PRAGMA incremental_vacuum({STEP_PAGES})")).doing("shrink")?;
                    let mut rows = vacuum.query([]).doing("shrink")?;
                    while rows.next().doing("shrink")?.is_some() {}
                    drop(rows);
                    drop(vacuum);
                    super::leave_mark(connection);
                    super::checkpoint(connection, "TRUNCATE");
                    Ok(())
                })
                .await?;
        }
        // it waits for the disk
        self.writer
            .run(move |_connection| {
                reserve.keep();
                Ok(())
            })
            .await
    }

    /// Moves everything from the log into the file, so that the file alone is the store: before this process stops.
    pub(crate) async fn settle(&self) -> Result<()> {
        self.writer.run(|connection| connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_row| Ok(())).doing("settle")).await
    }

    /// Copies both files, each to one beside it.
    pub(crate) async fn set_aside(&self) -> Result<Aside> {
        let aside = Aside(Files { meta: aside(&self.files.meta), notes: aside(&self.files.notes) });
        let (meta, notes) = (aside.0.meta.clone(), aside.0.notes.clone());
        self.writer.run(move |connection| copy(connection, &meta)).await?;
        self.notes.run(move |connection| copy(connection, &notes)).await?;
        Ok(aside)
    }

    /// Makes everything as it is in copies.
    pub(crate) async fn put_back(&self, aside: &Aside) -> Result<()> {
        let (meta, notes) = (aside.0.meta.clone(), aside.0.notes.clone());
        self.writer.run(move |connection| put_back(connection, &meta)).await?;
        self.notes.run(move |connection| put_back(connection, &notes)).await
    }
}

/// Copies of the files.
#[derive(Debug)]
pub(crate) struct Aside(Files);

impl Aside {
    /// Removes them.
    pub(crate) fn remove(&self) -> Result<()> {
        [&self.0.meta, &self.0.notes].into_iter().try_for_each(|path| fs::remove_file(path).on("remove copy", path))
    }
}

fn aside(path: &Path) -> PathBuf {
    path.with_extension("before-upgrade")
}

fn put_back(connection: &mut Connection, path: &Path) -> Result<()> {
    let copy = open(path)?;
    Backup::new(&copy, connection).and_then(|backup| backup.step(ALL).map(drop)).on_store(path, "put back")
}

/// Copies the store at `path` to a new file, even while a daemon uses it.
///
/// Errors: [`Error::Precondition`] when the file is there; nothing is left of a copy that failed.
pub(crate) fn backup(path: &Path, to: &Path) -> Result<()> {
    let store = open(path)?;
    if to.symlink_metadata().is_ok() {
        return Err(Error::Precondition(format!("{} already exists", to.display())));
    }
    copy(&store, to)
}

/// Whether a store would have to be migrated, after trying that on a copy in memory.
///
/// Errors: why it could not be used.
pub(crate) fn rehearse(files: &Files) -> Result<bool> {
    // both are tried
    let (meta, notes) = (rehearse_file(&files.meta, &schema::META)?, rehearse_file(&files.notes, &schema::NOTES)?);
    Ok(meta || notes)
}

fn rehearse_file(path: &Path, schema: &schema::Schema) -> Result<bool> {
    if !path.exists() {
        return Ok(false);
    }
    let store = open(path)?;
    let version = schema.check(&store, path)?;
    if version == 0 {
        return Ok(false);
    }
    // what a start reads first
    store.query_row("SELECT count(*) FROM facts", [], |_| Ok(())).on_store(path, "read")?;
    if version == schema.newest() {
        return Ok(false);
    }
    let mut trial = Connection::open_in_memory().doing("open in memory")?;
    Backup::new(&store, &mut trial).and_then(|backup| backup.step(ALL).map(drop)).on_store(path, "copy")?;
    schema.prepare(&mut trial, path)?;
    Ok(true)
}

/// Everything that is wrong with the store at `path`, a sentence each.
///
/// Errors: when it is no store, or one of another version.
pub(crate) fn check(path: &Path) -> Result<Vec<String>> {
    let store = open(path)?;
    let (version, newest) = (schema::META.check(&store, path)?, schema::META.newest());
    if version == 0 {
        // nothing is in it yet
        return Ok(Vec::new());
    }
    if version != newest {
        let sentence = format!("{} is of version {version}, which this x-manager would migrate to {newest}", path.display());
        return Ok(vec![sentence]);
    }
    let sentences = |sql: &str| -> Result<Vec<String>> {
        let mut select = store.prepare(sql).on_store(path, "check")?;
        let rows = select.query_map([], |row| row.get(0)).on_store(path, "check")?;
        rows.collect::<rusqlite::Result<_>>().on_store(path, "check")
    };
    let mut wrong = sentences("SELECT * FROM pragma_integrity_check WHERE integrity_check <> 'ok'")?;
    wrong.extend(sentences(
        "SELECT 'an edge starts from lease ' || from_id || ' in namespace ' || namespace || ', which does not exist' FROM edges
         WHERE from_type = 'leases' AND (namespace, from_id) NOT IN (SELECT namespace, id FROM leases)",
    )?);
    let in_namespaces = ["containers", "content", "images", "leases", "sandboxes"];
    let labelled = in_namespaces.map(|table| (table, "namespace", "id")).into_iter().chain([("namespaces", "''", "name")]);
    for (table, namespace, id) in labelled {
        wrong.extend(sentences(&format!(
            "SELECT DISTINCT 'there are labels of ' || kind || ' ' || id || ' in namespace ' || namespace || ', which does not exist' FROM labels
             WHERE kind = '{table}' AND (namespace, id) NOT IN (SELECT {namespace}, {id} FROM {table})"
        ))?);
    }
    wrong.extend(sentences(
        "SELECT DISTINCT 'there are labels of snapshot ' || id || ' in namespace ' || namespace || ', which does not exist' FROM labels
         WHERE kind GLOB 'snapshots/*'
           AND (namespace, kind, id) NOT IN (SELECT namespace, 'snapshots/' || snapshotter, key FROM snapshots)",
    )?);
    for table in ["edges", "back_edges"] {
        wrong.extend(sentences(&format!(
            "SELECT DISTINCT 'an edge starts from ' || from_type || ' ' || from_id || ' in namespace ' || namespace || ', which does not exist' FROM {table}
             WHERE from_type <> 'leases' AND (namespace, from_type, from_id) NOT IN (
                 SELECT namespace, 'containers', id FROM containers UNION SELECT namespace, 'content', id FROM content
                 UNION SELECT namespace, 'images', id FROM images UNION SELECT namespace, 'sandboxes', id FROM sandboxes
                 UNION SELECT namespace, 'snapshots/' || snapshotter, key FROM snapshots
             )"
        ))?);
    }
    wrong.extend(sentences(
        "SELECT 'snapshot ' || child.key || ' in namespace ' || child.namespace || ' has no parent of its own kind' FROM snapshots child
         LEFT JOIN snapshots parent ON parent.id = child.parent WHERE child.parent IS NOT NULL
           AND (parent.namespace, parent.snapshotter) IS NOT (child.namespace, child.snapshotter)",
    )?);
    for table in in_namespaces.into_iter().chain(["snapshots"]) {
        let name = if table == "snapshots" { "key" } else { "id" };
        wrong.extend(sentences(&format!(
            "SELECT '{table} ' || {name} || ' is in namespace ' || namespace || ', which does not exist' FROM {table}
             WHERE namespace NOT IN (SELECT name FROM namespaces)"
        ))?);
    }
    records::<Namespace>(&store, "SELECT 'namespace ' || name, record FROM namespaces", &mut wrong)?;
    records::<Container>(&store, "SELECT 'container ' || id || ' in ' || namespace, record FROM containers", &mut wrong)?;
    records::<Sandbox>(&store, "SELECT 'sandbox ' || id || ' in ' || namespace, record FROM sandboxes", &mut wrong)?;
    records::<Info>(&store, "SELECT 'content ' || id || ' in ' || namespace, record FROM content", &mut wrong)?;
    records::<Image>(&store, "SELECT 'image ' || id || ' in ' || namespace, record FROM images", &mut wrong)?;
    records::<Lease>(&store, "SELECT 'lease ' || id || ' in ' || namespace, record FROM leases", &mut wrong)?;
    Ok(wrong)
}

/// Digests and sizes of all content of the store at `path`, each once.
pub(crate) fn sizes(path: &Path) -> Result<Vec<(String, i64)>> {
    let store = open(path)?;
    if schema::META.check(&store, path)? != schema::META.newest() {
        return Ok(Vec::new());
    }
    let mut select = store.prepare("SELECT id, record FROM content GROUP BY id").on_store(path, "check")?;
    let rows = select.query_map([], |row| Ok((row.get(0)?, row.get::<_, Vec<u8>>(1)?))).on_store(path, "check")?;
    let rows = rows.collect::<rusqlite::Result<Vec<_>>>().on_store(path, "check")?;
    // one that cannot be read was reported as such
    Ok(rows.into_iter().filter_map(|(id, record)| Some((id, Info::decode(&*record).ok()?.size))).collect())
}

fn records<M: Message + Default>(store: &Connection, sql: &str, wrong: &mut Vec<String>) -> Result<()> {
    let mut select = store.prepare(sql).doing("check")?;
    let mut rows = select.query([]).doing("check")?;
    while let Some(row) = rows.next().doing("check")? {
        let (name, record): (String, Vec<u8>) = (row.get(0).doing("check")?, row.get(1).doing("check")?);
        if let Err(error) = M::decode(&*record) {
            wrong.push(format!("{name} cannot be read: {error}"));
        }
    }
    Ok(())
}

/// Opens a store to look at it.
fn open(path: &Path) -> Result<Connection> {
    fs::metadata(path).on("open metadata store", path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let store = Connection::open_with_flags(path, flags).on_store(path, "open")?;
    store.busy_timeout(std::time::Duration::from_secs(5)).doing("set time-out")?;
    Ok(store)
}

fn copy(store: &Connection, to: &Path) -> Result<()> {
    let mut unfinished = to.to_owned().into_os_string();
    unfinished.push(".unfinished");
    let unfinished = PathBuf::from(unfinished);
    let copied = write_copy(store, &unfinished).and_then(|()| fs::rename(&unfinished, to).on("name copy", to));
    if copied.is_err() {
        // the first error is the one that counts
        let _ = fs::remove_file(&unfinished);
    }
    copied
}

fn write_copy(store: &Connection, path: &Path) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let file = fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(path).on("make copy", path)?;
    let mut copy = Connection::open(path).doing("open copy")?;
    Backup::new(store, &mut copy).and_then(|backup| backup.step(ALL).map(drop)).doing("copy")?;
    // a copy is one file
    copy.query_row("PRAGMA journal_mode = DELETE", [], |_| Ok(())).doing("close copy")?;
    copy.close().map_err(|(_, source)| Error::Store { op: "close copy", source })?;
    file.sync_all().on("write copy", path)
}

/// Fewer free pages are left to what comes.
const FREE_PAGES: i64 = 64;
/// Pages that are given back at once, while others wait to write.
const STEP_PAGES: i64 = 4096;
/// Pages: one step, so that no other write comes in between.
const ALL: i32 = -1;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::files;
    use crate::store::{execs, namespaces};

    async fn filled(folder: &Path) -> Store {
        let store = Store::open(&files(folder)).expect("a new store");
        store.write(|db| namespaces::ensure(db, "one")).await.expect("written");
        store
    }

    async fn names(store: &Store) -> Vec<String> {
        store.read(namespaces::list).await.expect("read").into_iter().map(|namespace| namespace.name).collect()
    }

    #[tokio::test]
    async fn a_copy_made_while_the_store_is_open_has_everything_and_is_sound() {
        let folder = scratch::Folder::new("copy");
        let (path, copy) = (files(&folder).meta, folder.join("copy.db"));
        let store = filled(&folder).await;
        backup(&path, &copy).expect("a copy");
        assert!(matches!(backup(&path, &copy), Err(Error::Precondition(_))), "nothing is overwritten");
        assert_eq!(check(&copy).expect("a store"), Vec::<String>::new());
        let restored = Store::open(&Files { meta: copy, notes: folder.join("notes.db") });
        assert_eq!(names(&restored.expect("a store")).await, ["one"]);
        assert!(backup(&folder.join("none.db"), &folder.join("x.db")).is_err());
        drop(store);
    }

    #[tokio::test]
    async fn what_another_process_made_of_the_store_is_undone_by_its_copy() {
        let folder = scratch::Folder::new("undo");
        let (files, store) = (files(&folder), filled(&folder).await);
        let path = files.meta.clone();
        store.note(|db| execs::add(db, "n", "c", "e")).await.expect("noted");
        let copies = store.set_aside().await.expect("copies");
        for (file, table) in [(&files.meta, "namespaces"), (&files.notes, "execs")] {
            let other = Connection::open(file).expect("a store");
            other.execute_batch(&format!("DROP TABLE {table}; PRAGMA user_version = 99")).expect("a newer version");
        }
        store.put_back(&copies).await.expect("as it was");
        copies.remove().expect("removal");
        assert_eq!(names(&store).await, ["one"]);
        assert_eq!(store.recall(|db| execs::list(db, "n", "c")).await.expect("recalled"), ["e"]);
        store.write(|db| namespaces::ensure(db, "two")).await.expect("a write");
        drop(store);
        assert_eq!(check(&path).expect("a store"), Vec::<String>::new());
    }

    #[tokio::test]
    async fn a_damaged_store_is_reported() {
        let folder = scratch::Folder::new("wrong");
        let path = files(&folder).meta;
        drop(filled(&folder).await);
        let other = Connection::open(&path).expect("a store");
        other
            .execute_batch(
                "PRAGMA foreign_keys = OFF;
                 INSERT INTO content VALUES ('one', 'sha256:0', x'ff');
                 INSERT INTO images VALUES ('nowhere', 'i1', x'', '', NULL);
                 INSERT INTO snapshots VALUES (7, 'one', 'overlayfs', 'k1', 6, 3, 1, 1, NULL, NULL);
                 INSERT INTO back_edges VALUES ('one', 'content', 'none', 'images', 'x');
                 INSERT INTO containers VALUES ('nowhere', 'c1', x'ff');
                 INSERT INTO sandboxes VALUES ('nowhere', 's1', x'ff');
                 INSERT INTO edges VALUES ('one', 'leases', 'none', 'content', 'x');
                 INSERT INTO labels VALUES ('one', 'containers', 'none', 'a', 'b'), ('', 'namespaces', 'none', 'a', 'b'),
                                           ('one', 'sandboxes', 'none', 'a', 'b'), ('one', 'snapshots/overlayfs', 'none', 'a', 'b')",
            )
            .expect("damage");
        drop(other);
        let wrong = check(&path).expect("a store").join("\n");
        for part in [
            "an edge starts from lease none in namespace one",
            "there are labels of containers none in namespace one, which does not exist",
            "there are labels of namespaces none",
            "containers c1 is in namespace nowhere",
            "container c1 in nowhere cannot be read",
            "there are labels of sandboxes none in namespace one, which does not exist",
            "content sha256:0 in one cannot be read",
            "images i1 is in namespace nowhere",
            "snapshot k1 in namespace one has no parent of its own kind",
            "an edge starts from content none in namespace one, which does not exist",
            "there are labels of snapshot none in namespace one, which does not exist",
            "sandboxes s1 is in namespace nowhere",
            "sandbox s1 in nowhere cannot be read",
        ] {
            assert!(wrong.contains(part), "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_full_store_reports_it_and_accepts_writes_again_after_a_deletion() {
        let folder = scratch::Folder::new("full");
        let store = filled(&folder).await;
        store.limit(1 << 20).await.expect("a limit");
        let long = |n: usize| format!("{n}{}", "x".repeat(10_000));
        let mut count = 0;
        let error = loop {
            let name = long(count);
            match store.write(move |db| namespaces::ensure(db, &name)).await {
                Ok(()) => count += 1,
                Err(error) => break error,
            }
        };
        assert!((10..100).contains(&count), "{count}");
        assert_eq!(error.code(), tonic::Code::ResourceExhausted, "{}", error.chain());
        assert_eq!(names(&store).await.len(), count + 1, "what was acknowledged is there");
        let gone = long(0);
        store.write(move |db| namespaces::remove(db, &gone)).await.expect("removing needs no room");
        drop(store);
    }

    #[tokio::test]
    async fn a_store_is_rehearsed_without_being_touched() {
        let folder = scratch::Folder::new("rehearse");
        let files = files(&folder);
        assert!(!rehearse(&files).expect("none is fine"));
        drop(filled(&folder).await);
        assert!(!rehearse(&files).expect("of this version"));
        let other = Connection::open(&files.notes).expect("a store");
        other.pragma_update(None, "user_version", 99).expect("newer");
        drop(other);
        assert!(rehearse(&files).expect_err("newer").to_string().contains("from a newer x-manager"));
    }
}
