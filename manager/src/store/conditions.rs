//! References that hold under a condition: of content and images, to snapshots, as long as these were used lately, or were not.
//!
//! ```text
//! on an image or a blob   containerd.io/gc.cond.snapshot.NAME[/x] = CONDITION[,CONDITION …]|KEY    CONDITION = usedat<DURATION, usedat>DURATION
//! on the snapshot         containerd.io/gc.cond.value-usedat[x]   = when it was used (RFC 3339)
//! ```
//! One condition that is true is enough. What cannot be read refers to nothing, as in containerd.

use rusqlite::params;

use super::{Doing as _, Meta};
use crate::duration::nanos;
use crate::error::Result;
use crate::timestamp;

/// A reference whose condition is true at the moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Conditional {
    pub(super) namespace: String,
    /// Kind and id of what refers.
    pub(super) from: (String, String),
    /// The same of what is referred to.
    pub(super) to: (String, String),
}

/// All of them.
pub(super) fn satisfied(db: &Meta<'_>, now: i64) -> Result<Vec<Conditional>> {
    let sql = "SELECT l.namespace, l.kind, l.id, l.key, l.value FROM namespaces n CROSS JOIN labels l
        ON l.namespace = n.name AND l.kind IN ('content', 'images') AND l.key >= ?1 AND l.key < ?2";
    let mut select = db.0.prepare_cached(sql).doing("prepare")?;
    let (from, to) = range(REFERENCE);
    let rows = select.query_map([from, to], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?)));
    let rows = rows.and_then(Iterator::collect::<rusqlite::Result<Vec<(String, String, String, String, String)>>>).doing("read")?;
    drop(select);
    let mut satisfied = Vec::new();
    for (namespace, kind, id, label, value) in rows {
        let Some(snapshotter) = snapshotter(&label) else { continue };
        let Some((conditions, key)) = value.split_once('|') else { continue };
        let to = (super::snapshots::kind_of(snapshotter), key.to_owned());
        let used = used(db, &namespace, &to)?;
        let is_true = |condition| used.iter().any(|used| holds(condition, now.saturating_sub(*used)));
        if conditions.split(',').any(is_true) {
            satisfied.push(Conditional { namespace, from: (kind, id), to });
        }
    }
    Ok(satisfied)
}

/// The snapshotter in a label's key.
fn snapshotter(label: &str) -> Option<&str> {
    let rest = label.strip_prefix(REFERENCE)?.strip_prefix(['.', '/'])?;
    rest.split('/').next().filter(|name| !name.is_empty())
}

/// When a snapshot was used, as its labels say.
fn used(db: &Meta<'_>, namespace: &str, (kind, id): &(String, String)) -> Result<Vec<i64>> {
    let sql = "SELECT value FROM labels WHERE namespace = ? AND kind = ? AND id = ? AND key >= ? AND key < ?";
    let mut select = db.0.prepare_cached(sql).doing("prepare")?;
    let (from, to) = range(USED);
    let values = select.query_map(params![namespace, kind, id, from, to], |row| row.get(0));
    let values = values.and_then(Iterator::collect::<rusqlite::Result<Vec<String>>>).doing("read")?;
    Ok(values.iter().filter_map(|value| value.parse().ok()).map(|at| timestamp::to_nanos(&at)).collect())
}

/// Keys that begin with a prefix, as a range.
fn range(prefix: &str) -> (String, String) {
    let mut end = prefix.to_owned();
    // both end with a letter that has a next one
    if let Some(last) = end.pop() {
        end.push(char::from_u32(u32::from(last) + 1).unwrap_or(char::MAX));
    }
    (prefix.to_owned(), end)
}

/// Whether a condition is true of something that was used so many nanoseconds ago.
fn holds(condition: &str, age: i64) -> bool {
    let Some(rest) = condition.strip_prefix("usedat") else { return false };
    let is_within = rest.strip_prefix('<').and_then(nanos).map(|limit| i128::from(age) < limit);
    let is_beyond = rest.strip_prefix('>').and_then(nanos).map(|limit| i128::from(age) > limit);
    is_within.or(is_beyond).unwrap_or(false)
}

const REFERENCE: &str = "containerd.io/gc.cond.snapshot";
const USED: &str = "containerd.io/gc.cond.value-usedat";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_those_of_containerd() {
        const MINUTE: i64 = 60_000_000_000;
        for (condition, age, expected) in [
            ("usedat<2m", MINUTE, true),
            ("usedat<2m", 2 * MINUTE, false),
            ("usedat>2m", 3 * MINUTE, true),
            ("usedat>2m", MINUTE, false),
            ("usedat<=2m", MINUTE, false),
            ("usedat=2m", 2 * MINUTE, false),
            ("usedat!2m", MINUTE, false),
            ("other<2m", MINUTE, false),
            ("usedat", MINUTE, false),
        ] {
            assert_eq!(holds(condition, age), expected, "{condition} {age}");
        }
        for (label, expected) in [
            ("containerd.io/gc.cond.snapshot.overlayfs", Some("overlayfs")),
            ("containerd.io/gc.cond.snapshot/overlayfs/one", Some("overlayfs")),
            ("containerd.io/gc.cond.snapshot", None),
            ("containerd.io/gc.cond.snapshot.", None),
            ("containerd.io/gc.cond.snapshots.x", None),
        ] {
            assert_eq!(snapshotter(label), expected, "{label}");
        }
    }
}
