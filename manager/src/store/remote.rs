//! Blobs that are at a content proxy because of us: written there, or given a row here. One fact of the store each.
//!
//! ```text
//! put ─▶ kept, whether or not a row names it yet ─no row─▶ leaving: to be deleted there, whatever comes ─▶ forgotten
//! ```
//! A fact is written before the first byte is sent, or with the row of a blob that the proxy has by itself, and removed after the proxy has
//! deleted the blob.

use rusqlite::{OptionalExtension as _, params};

use super::{Doing as _, Meta};
use crate::error::{Error, Result};

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) digest: String,
    /// That has written it first: part of its reference there.
    pub(crate) namespace: String,
    pub(crate) is_leaving: bool,
}

/// Records that a blob is, or is about to be, at a proxy, and returns what is known of it.
///
/// Errors: it is being deleted there.
pub(crate) fn put(db: &mut Meta<'_>, proxy: &str, digest: &str, namespace: &str) -> Result<Kept> {
    let name = format!("{}{digest}", prefix(proxy));
    let mut insert = db.0.prepare_cached("INSERT OR IGNORE INTO facts (name, value) VALUES (?, ?)").doing("prepare")?;
    insert.execute([name.as_str(), namespace]).doing("write")?;
    match get(db, proxy, digest)? {
        Some(kept) if !kept.is_leaving => Ok(kept),
        _ => Err(Error::Precondition(format!("content {digest} is being deleted at the content proxy {proxy}"))),
    }
}

/// What is known of a blob.
pub(crate) fn get(db: &Meta<'_>, proxy: &str, digest: &str) -> Result<Option<Kept>> {
    let mut select = db.0.prepare_cached("SELECT value FROM facts WHERE name = ?").doing("prepare")?;
    let value: Option<String> = select.query_row([format!("{}{digest}", prefix(proxy))], |row| row.get(0)).optional().doing("read")?;
    Ok(value.map(|value| kept(digest.to_owned(), &value)))
}

/// Those of a proxy that no row of any namespace names, by digest, that follow `after`.
pub(crate) fn unnamed(db: &Meta<'_>, proxy: &str, after: &str, most: usize) -> Result<Vec<Kept>> {
    let prefix = prefix(proxy);
    let sql = "SELECT substr(name, ?1), value FROM facts f WHERE name GLOB ?2 AND name > ?3
        AND NOT EXISTS (SELECT 1 FROM content WHERE id = substr(f.name, ?1)) ORDER BY name LIMIT ?4";
    let mut select = db.0.prepare_cached(sql).doing("prepare")?;
    let begin = i64::try_from(prefix.len() + 1).unwrap_or_default();
    let most = i64::try_from(most).unwrap_or(i64::MAX);
    let rows = select.query_map(params![begin, format!("{prefix}*"), format!("{prefix}{after}"), most], |row| {
        Ok(kept(row.get(0)?, row.get::<_, String>(1)?.as_str()))
    });
    rows.and_then(Iterator::collect).doing("read")
}

/// Decides that a blob is deleted at a proxy. False if a row names it, or it is not there because of us.
pub(crate) fn leave(db: &mut Meta<'_>, proxy: &str, digest: &str) -> Result<bool> {
    let sql = "UPDATE facts SET value = ?1 || substr(value, 1 + length(?1) * (value GLOB ?1 || '*'))
        WHERE name = ?2 AND NOT EXISTS (SELECT 1 FROM content WHERE id = ?3)";
    let mut update = db.0.prepare_cached(sql).doing("prepare")?;
    Ok(update.execute(params![LEAVING, format!("{}{digest}", prefix(proxy)), digest]).doing("write")? > 0)
}

/// Forgets a blob that the proxy has deleted.
pub(crate) fn forget(db: &mut Meta<'_>, proxy: &str, digest: &str) -> Result<()> {
    db.0.execute("DELETE FROM facts WHERE name = ?", [format!("{}{digest}", prefix(proxy))]).doing("write").map(drop)
}

fn kept(digest: String, value: &str) -> Kept {
    match value.strip_prefix(LEAVING) {
        Some(namespace) => Kept { digest, namespace: namespace.to_owned(), is_leaving: true },
        None => Kept { digest, namespace: value.to_owned(), is_leaving: false },
    }
}

/// Names of proxies have no blanks, nor anything that a pattern has.
fn prefix(proxy: &str) -> String {
    format!("remote {proxy} ")
}

/// Namespaces have no blanks.
const LEAVING: &str = "leaving ";

#[cfg(test)]
mod tests {
    use containerd_client::services::v1::Info;

    use super::*;
    use crate::store::{Store, blobs, namespaces};

    #[tokio::test]
    async fn what_no_row_names_leaves_a_proxy_and_is_not_put_there_meanwhile() {
        let folder = scratch::Folder::new("remote");
        let store = Store::new(&folder);
        let done = store.write(|db| {
            for digest in ["sha256:1", "sha256:2"] {
                assert_eq!(put(db, "p", digest, "one")?.namespace, "one");
            }
            put(db, "p.q", "sha256:3", "one")?;
            assert_eq!(put(db, "p", "sha256:1", "two")?.namespace, "one", "the first stays");
            namespaces::ensure(db, "two")?;
            blobs::put(db, "two", "sha256:1", &Info::default())?;
            let found: Vec<_> = unnamed(db, "p", "", 9)?.into_iter().map(|kept| kept.digest).collect();
            assert_eq!(found, ["sha256:2"]);
            assert_eq!(unnamed(db, "p", "sha256:2", 9)?, []);
            assert!(!leave(db, "p", "sha256:1")? && !leave(db, "q", "sha256:2")?);
            for _again in 0..2 {
                assert!(leave(db, "p", "sha256:2")?);
                let kept = get(db, "p", "sha256:2")?.expect("it is still known");
                assert!(kept.is_leaving && kept.namespace == "one", "{kept:?}");
            }
            put(db, "p", "sha256:2", "one").expect_err("it is being deleted");
            forget(db, "p", "sha256:2")?;
            assert!(get(db, "p", "sha256:2")?.is_none() && put(db, "p", "sha256:2", "two")?.namespace == "two");
            Ok(())
        });
        done.await.expect("written");
    }
}
