//! What nothing refers to: found by reading beside the writer, and checked again when it is removed.
//!
//! ```text
//! roots: images, leases, containers, sandboxes, label containerd.io/gc.root
//! from a root forwards: edges of labels; the target of an image; the parent of a snapshot; back_edges the other way round
//! ```
//! References under a condition (`conditions.rs`) are edges from what is live, if the condition is true at that moment.
//! Of what a lease with the label `containerd.io/gc.flat` holds, only targets and parents are kept too, not what labels name.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use rusqlite::{OptionalExtension as _, params};

use super::conditions::{self, Conditional};
use super::edges::References;
use super::{Doing as _, Meta, blobs, containers, images, leases, snapshots};
use crate::error::Result;

/// An object that may be collected.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Node {
    pub(crate) namespace: String,
    /// `content`, `images` or `snapshots/NAME`.
    pub(crate) kind: String,
    pub(crate) id: String,
}

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Swept {
    pub(crate) content: Vec<Node>,
    pub(crate) images: Vec<Node>,
    /// With the numbers of their folders.
    pub(crate) snapshots: Vec<(Node, i64)>,
    /// What these use, as far as it was recorded.
    pub(crate) bytes: i64,
    /// How many of the marked objects were looked at, from the first on.
    pub(crate) seen: usize,
}

/// Everything that no root leads to at the moment `now`, in an order in which it can be removed.
pub(crate) fn mark(db: &Meta<'_>, now: i64) -> Result<Vec<Node>> {
    let live = live(db, now)?;
    let mut garbage = Vec::new();
    for sql in [
        "SELECT namespace, 'images', id FROM images WHERE expires <= ?",
        "SELECT namespace, 'content', id FROM content WHERE ? IS NOT NULL",
        // children come before their parents
        "WITH RECURSIVE depths (id, depth) AS (
            SELECT id, 0 FROM snapshots WHERE parent IS NULL
            UNION ALL SELECT s.id, depth + 1 FROM depths d CROSS JOIN snapshots s ON s.parent = d.id
         ) SELECT namespace, 'snapshots/' || snapshotter, key FROM depths d CROSS JOIN snapshots s ON s.id = d.id
         WHERE ? IS NOT NULL ORDER BY depth DESC",
    ] {
        let mut select = db.0.prepare(sql).doing("prepare")?;
        let mut rows = select.query([now]).doing("mark")?;
        while let Some(row) = rows.next().doing("mark")? {
            let node = node(row).doing("mark")?;
            if !live.contains_key(&node) {
                garbage.push(node);
            }
        }
    }
    Ok(garbage)
}

/// Everything that a root leads to, and whether nothing but a flat lease does.
fn live(db: &Meta<'_>, now: i64) -> Result<HashMap<Node, bool>> {
    let mut conditions = conditions::satisfied(db, now)?;
    let mut held = Vec::new();
    let mut round = 0;
    loop {
        round += 1;
        let more = serde_json::Value::from(held.clone()).to_string();
        let mut live = HashMap::new();
        let mut select = db.0.prepare(LIVE).doing("prepare")?;
        let mut rows = select.query(params![now, more]).doing("mark")?;
        while let Some(row) = rows.next().doing("mark")? {
            live.insert(node(row).doing("mark")?, row.get(3).doing("mark")?);
        }
        // what they hold may have references under a condition, too
        let before = held.len();
        conditions.retain(|conditional| {
            let Conditional { namespace, from: (kind, id), to } = conditional;
            let from = Node { namespace: namespace.clone(), kind: kind.clone(), id: id.clone() };
            // what a longer chain of conditions leads to is kept, without the marks that would tell
            let leads = live.get(&from) == Some(&false) || round == MOST_ROUNDS;
            if leads {
                held.push(vec![namespace.clone(), to.0.clone(), to.1.clone()]);
            }
            !leads
        });
        if held.len() == before {
            return Ok(live);
        }
    }
}

fn node(row: &rusqlite::Row<'_>) -> rusqlite::Result<Node> {
    Ok(Node { namespace: row.get(0)?, kind: row.get(1)?, id: row.get(2)? })
}

/// Removes those of the marked objects that still no root leads to, in their order. After each [`STEP`] of them it asks `is_enough`, with how many it has
/// looked at, whether to stop.
pub(crate) fn sweep(db: &mut Meta<'_>, now: i64, marked: &[Node], is_enough: &dyn Fn(usize) -> bool) -> Result<Swept> {
    let mut swept = Swept::default();
    let conditions = conditions::satisfied(db, now)?;
    let (mut dead, mut flat) = (HashSet::new(), HashMap::new());
    for some in marked.chunks(STEP) {
        let free = unreferenced(db, some)?;
        let mut check = Check { db, now, dead, flat, conditions: &conditions };
        let (mut content, mut others) = (BTreeMap::<_, Vec<_>>::new(), Vec::new());
        for node in some {
            if free.contains(node) || !check.is_live(node)? {
                if node.kind == CONTENT {
                    content.entry(node.namespace.as_str()).or_default().push(node.id.as_str());
                } else {
                    others.push(node);
                }
            }
        }
        (dead, flat) = (check.dead, check.flat);
        // no root leads to any of them: what leads to the next ones is the same without them
        for (namespace, ids) in content {
            let node = |id| Node { namespace: namespace.to_owned(), kind: CONTENT.to_owned(), id };
            swept.content.extend(blobs::remove_all(db, namespace, &ids)?.into_iter().map(node));
        }
        for node in others {
            remove(db, node, &mut swept)?;
        }
        swept.seen += some.len();
        if is_enough(swept.seen) {
            break;
        }
    }
    Ok(swept)
}

fn remove(db: &mut Meta<'_>, node: &Node, swept: &mut Swept) -> Result<()> {
    let (namespace, id) = (node.namespace.as_str(), node.id.as_str());
    match node.kind.strip_prefix(SNAPSHOTS) {
        Some(snapshotter) => {
            let place = snapshots::Place { namespace: namespace.to_owned(), snapshotter: snapshotter.to_owned() };
            let Some(found) = snapshots::get(db, &place, id)? else { return Ok(()) };
            // a child that is younger than the marks goes first, next time
            if !snapshots::has_children(db, found.id)? && snapshots::remove(db, found.id)? {
                swept.snapshots.push((node.clone(), found.id));
                swept.bytes += found.usage.map_or(0, |usage| usage.bytes);
            }
        }
        None => {
            if images::remove(db, namespace, id)? {
                swept.images.push(node.clone());
            }
        }
    }
    Ok(())
}

/// Those of the objects that are blobs to which nothing at all leads: most of what is marked. One query for many takes a fraction of the time.
fn unreferenced<'n>(db: &Meta<'_>, nodes: &'n [Node]) -> Result<HashSet<&'n Node>> {
    let mut by_namespace = BTreeMap::<_, Vec<_>>::new();
    for node in nodes.iter().filter(|node| node.kind == CONTENT) {
        by_namespace.entry(node.namespace.as_str()).or_default().push(node);
    }
    let mut free = HashSet::new();
    for (namespace, nodes) in by_namespace {
        let ids = serde_json::Value::from(nodes.iter().map(|node| node.id.as_str()).collect::<Vec<_>>()).to_string();
        let mut select = db.0.prepare_cached(UNREFERENCED).doing("prepare")?;
        let places = select.query_map([namespace, &ids], |row| row.get::<_, u32>(0)).doing("check")?;
        for place in places {
            free.extend(usize::try_from(place.doing("check")?).ok().and_then(|place| nodes.get(place)));
        }
    }
    Ok(free)
}

/// Whether something holds mounts that were made for a client: a lease, or what their labels name.
pub(crate) fn is_mount_held(db: &Meta<'_>, namespace: &str, lease: &str, labels: &HashMap<String, String>, now: i64) -> Result<bool> {
    if !lease.is_empty() && leases::get(db, namespace, lease)?.is_some_and(|lease| !leases::is_expired(&lease, now)) {
        return Ok(true);
    }
    for to in References::in_labels(labels).back {
        let is_there = match to.kind.strip_prefix(SNAPSHOTS) {
            Some(snapshotter) => {
                let place = snapshots::Place { namespace: namespace.to_owned(), snapshotter: snapshotter.to_owned() };
                snapshots::get(db, &place, &to.id)?.is_some()
            }
            None if to.kind == IMAGES => images::get(db, namespace, &to.id)?.is_some(),
            None if to.kind == "containers" => containers::get(db, namespace, &to.id)?.is_some(),
            None => blobs::get(db, namespace, &to.id)?.is_some(),
        };
        if is_there {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Looks for roots backwards from an object.
struct Check<'c, 't> {
    db: &'c Meta<'t>,
    now: i64,
    /// To which no root leads.
    dead: HashSet<(Node, bool)>,
    /// What is known of leases: whether they are live, and flat.
    flat: HashMap<(String, String), (bool, bool)>,
    /// References whose condition is true.
    conditions: &'c [Conditional],
}

impl Check<'_, '_> {
    fn is_live(&mut self, node: &Node) -> Result<bool> {
        // with whether what leads there must lead on through labels, which it does not from a flat lease
        let (mut seen, mut next) = (BTreeSet::new(), vec![(node.clone(), false)]);
        while let Some(step) = next.pop() {
            if self.dead.contains(&step) || !seen.insert(step.clone()) {
                continue;
            }
            let (node, through_labels) = step;
            if self.is_root(&node)? || self.is_held(&node, through_labels, &mut next)? {
                return Ok(true);
            }
            self.owners(&node, through_labels, &mut next)?;
        }
        self.dead.extend(seen);
        Ok(false)
    }

    fn is_root(&self, node: &Node) -> Result<bool> {
        let sql = if node.kind == IMAGES {
            "SELECT EXISTS (SELECT 1 FROM images WHERE namespace = ?1 AND id = ?3 AND ?2 = 'images' AND (expires IS NULL OR expires > ?4))"
        } else {
            "SELECT EXISTS (SELECT 1 FROM labels WHERE namespace = ?1 AND kind = ?2 AND id = ?3 AND key = 'containerd.io/gc.root' AND ?4 NOT NULL)"
        };
        let mut select = self.db.0.prepare_cached(sql).doing("prepare")?;
        select.query_row(params![node.namespace, node.kind, node.id, self.now], |row| row.get(0)).doing("check")
    }

    /// Whether a root has an edge to it. Others that have one are put on the list.
    fn is_held(&mut self, node: &Node, through_labels: bool, next: &mut Vec<(Node, bool)>) -> Result<bool> {
        // without a look for those that are in both
        let sql = "SELECT from_type, from_id FROM edges WHERE namespace = ? AND to_type = ? AND to_id = ?
            UNION ALL SELECT to_type, to_id FROM back_edges WHERE namespace = ? AND from_type = ? AND from_id = ?";
        let mut select = self.db.0.prepare_cached(sql).doing("prepare")?;
        let parameters = [&node.namespace, &node.kind, &node.id, &node.namespace, &node.kind, &node.id];
        let from = select.query_map(parameters, |row| Ok((row.get(0)?, row.get(1)?))).doing("check")?;
        let from = from.collect::<rusqlite::Result<Vec<(String, String)>>>().doing("check")?;
        drop(select);
        let is_of = |found: &&Conditional| found.namespace == node.namespace && found.to.0 == node.kind && found.to.1 == node.id;
        for Conditional { from: (kind, id), .. } in self.conditions.iter().filter(is_of) {
            next.push((Node { namespace: node.namespace.clone(), kind: kind.clone(), id: id.clone() }, true));
        }
        for (kind, id) in from {
            match kind.as_str() {
                "sandboxes" => return Ok(true),
                // a label may name one that is not there
                "containers" if containers::get(self.db, &node.namespace, &id)?.is_some() => return Ok(true),
                "containers" => {}
                "leases" => {
                    let (is_live, is_flat) = self.lease(&node.namespace, &id)?;
                    if is_live && !(is_flat && through_labels) {
                        return Ok(true);
                    }
                }
                _ => next.push((Node { namespace: node.namespace.clone(), kind, id }, true)),
            }
        }
        Ok(false)
    }

    fn lease(&mut self, namespace: &str, id: &str) -> Result<(bool, bool)> {
        let key = (namespace.to_owned(), id.to_owned());
        if let Some(known) = self.flat.get(&key) {
            return Ok(*known);
        }
        let sql = "SELECT expires IS NULL OR expires > ?3, EXISTS (
                SELECT 1 FROM labels WHERE namespace = ?1 AND kind = 'leases' AND id = ?2 AND key = 'containerd.io/gc.flat'
            ) FROM leases WHERE namespace = ?1 AND id = ?2";
        let mut select = self.db.0.prepare_cached(sql).doing("prepare")?;
        let found = select.query_row(params![namespace, id, self.now], |row| Ok((row.get(0)?, row.get(1)?))).optional().doing("check")?;
        let found = found.unwrap_or_default();
        self.flat.insert(key, found);
        Ok(found)
    }

    /// Images whose target it is, and snapshots whose parent it is.
    fn owners(&self, node: &Node, through_labels: bool, next: &mut Vec<(Node, bool)>) -> Result<()> {
        let (sql, name) = match node.kind.strip_prefix(SNAPSHOTS) {
            Some(snapshotter) => (
                "SELECT child.key FROM snapshots s CROSS JOIN snapshots child ON child.parent = s.id
                 WHERE s.namespace = ? AND s.snapshotter = ? AND s.key = ?",
                snapshotter,
            ),
            None if node.kind == CONTENT => ("SELECT id FROM images WHERE namespace = ? AND ? = 'images' AND target = ?", IMAGES),
            None => return Ok(()),
        };
        let kind = if node.kind == CONTENT { IMAGES.to_owned() } else { node.kind.clone() };
        let mut select = self.db.0.prepare_cached(sql).doing("prepare")?;
        let owners = select.query_map([&node.namespace, name, &node.id], |row| row.get(0)).doing("check")?;
        for id in owners {
            next.push((Node { namespace: node.namespace.clone(), kind: kind.clone(), id: id.doing("check")? }, through_labels));
        }
        Ok(())
    }
}

/// References under a condition, one behind the other: each takes all marks once more.
pub(crate) const MOST_ROUNDS: usize = 16;
/// Objects that are looked at, and then removed, before it is asked whether that is enough.
const STEP: usize = 128;
const CONTENT: &str = "content";
const IMAGES: &str = "images";
const SNAPSHOTS: &str = "snapshots/";

/// The places, in the list of the second parameter, of blobs that are no roots and to which no object leads. Conditions lead to snapshots only.
const UNREFERENCED: &str = "
    SELECT one.key FROM json_each(?2) one
    WHERE NOT EXISTS (SELECT 1 FROM labels WHERE namespace = ?1 AND kind = 'content' AND id = one.value AND key = 'containerd.io/gc.root')
        AND NOT EXISTS (SELECT 1 FROM edges WHERE namespace = ?1 AND to_type = 'content' AND to_id = one.value)
        AND NOT EXISTS (SELECT 1 FROM back_edges WHERE namespace = ?1 AND from_type = 'content' AND from_id = one.value)
        AND NOT EXISTS (SELECT 1 FROM images WHERE namespace = ?1 AND target = one.value)";

/// All objects that a root leads to at the moment of the parameter, whether or not they exist.
const LIVE: &str = "
    WITH RECURSIVE live (namespace, kind, id, flat) AS (
        SELECT e.namespace, e.to_type, e.to_id, EXISTS (
                SELECT 1 FROM labels f
                WHERE f.namespace = l.namespace AND f.kind = 'leases' AND f.id = l.id AND f.key = 'containerd.io/gc.flat'
            )
            FROM leases l CROSS JOIN edges e ON e.namespace = l.namespace AND e.from_type = 'leases' AND e.from_id = l.id
            WHERE l.expires IS NULL OR l.expires > ?1
        UNION SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'), 0 FROM json_each(?2)
        UNION SELECT namespace, 'images', id, 0 FROM images WHERE expires IS NULL OR expires > ?1
        UNION SELECT e.namespace, e.to_type, e.to_id, 0 FROM namespaces n
            CROSS JOIN edges e ON e.namespace = n.name AND e.from_type IN ('containers', 'sandboxes')
        UNION SELECT b.namespace, b.from_type, b.from_id, 0 FROM namespaces n
            CROSS JOIN back_edges b ON b.namespace = n.name AND b.to_type = 'containers'
            CROSS JOIN containers c ON c.namespace = b.namespace AND c.id = b.to_id
        UNION SELECT namespace, kind, id, 0 FROM labels WHERE key = 'containerd.io/gc.root' AND (kind = 'content' OR kind GLOB 'snapshots/*')
        UNION SELECT e.namespace, e.to_type, e.to_id, 0 FROM live l
            CROSS JOIN edges e ON e.namespace = l.namespace AND e.from_type = l.kind AND e.from_id = l.id WHERE l.flat = 0
        UNION SELECT b.namespace, b.from_type, b.from_id, 0 FROM live l
            CROSS JOIN back_edges b ON b.namespace = l.namespace AND b.to_type = l.kind AND b.to_id = l.id WHERE l.flat = 0
        UNION SELECT i.namespace, 'content', i.target, l.flat FROM live l
            CROSS JOIN images i ON i.namespace = l.namespace AND i.id = l.id WHERE l.kind = 'images'
        UNION SELECT s.namespace, l.kind, p.key, l.flat FROM live l
            CROSS JOIN snapshots s ON s.namespace = l.namespace AND s.snapshotter = substr(l.kind, 11) AND s.key = l.id
            CROSS JOIN snapshots p ON p.id = s.parent WHERE l.kind GLOB 'snapshots/*'
    ) SELECT namespace, kind, id, min(flat) FROM live GROUP BY namespace, kind, id";
