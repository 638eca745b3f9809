//! What refers to what, as the daemon's collector follows it, read by the calls that containerd has too.
//!
//! ```text
//! roots: images, containers, leases, sandboxes; what has the label containerd.io/gc.root
//! image ─target─▶ content ─labels gc.ref.…─▶ content, snapshot ─parent─▶ snapshot ◀─ container
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::SystemTime;

use prost_types::Timestamp;

use crate::gc_labels::Reference;

/// An object of the namespace.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Node {
    /// `content`, `snapshots/NAME`, `images`, `containers`, `leases`, `sandboxes`: as leases name them.
    pub(crate) kind: String,
    /// A digest, a key, a name or an id.
    pub(crate) id: String,
}

impl Node {
    pub(crate) fn new(kind: impl Into<String>, id: impl Into<String>) -> Self {
        Self { kind: kind.into(), id: id.into() }
    }
}

/// One object refers to another.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Edge {
    from: Node,
    /// The label's key, or what else leads there.
    by: String,
    is_label: bool,
}

/// What keeps an object: a root, and the way from it, each step with what it goes by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) root: Node,
    pub(crate) way: Vec<(String, Node)>,
}

/// All objects, and what refers to each.
#[derive(Debug, Default)]
pub(crate) struct References {
    nodes: BTreeSet<Node>,
    /// By what they lead to.
    edges: HashMap<Node, Vec<Edge>>,
    roots: BTreeSet<Node>,
    /// Leases that hold nothing by labels.
    flat: BTreeSet<Node>,
}

impl References {
    /// Adds an object with its labels. One that is a root for its kind is none once it has expired.
    pub(crate) fn add<'l>(&mut self, node: &Node, is_root: bool, labels: impl IntoIterator<Item = (&'l String, &'l String)>) {
        let mut is_expired = false;
        let mut has_root_label = false;
        for (key, value) in labels {
            match Reference::of(key) {
                Some(Reference::To(kind)) => self.label(node, key, Node::new(kind, value)),
                Some(Reference::Back(kind)) => self.label(&Node::new(kind, value), key, node.clone()),
                None => {}
            }
            match key.as_str() {
                "containerd.io/gc.expire" => {
                    is_expired = value.parse::<Timestamp>().is_ok_and(|at| at.seconds < Timestamp::from(SystemTime::now()).seconds);
                }
                "containerd.io/gc.root" => has_root_label = true,
                "containerd.io/gc.flat" => drop(self.flat.insert(node.clone())),
                _ => {}
            }
        }
        self.nodes.insert(node.clone());
        if is_root && !is_expired || has_root_label {
            self.roots.insert(node.clone());
        }
    }

    fn label(&mut self, from: &Node, key: &str, to: Node) {
        self.edges.entry(to).or_default().push(Edge { from: from.clone(), by: key.to_owned(), is_label: true });
    }

    /// Adds a reference that is no label.
    pub(crate) fn lead(&mut self, from: &Node, by: &str, to: Node) {
        self.edges.entry(to).or_default().push(Edge { from: from.clone(), by: by.to_owned(), is_label: false });
    }

    /// Objects of content and snapshots whose digest or key begins so; those that are called so alone, if there are any.
    pub(crate) fn called(&self, text: &str) -> Vec<Node> {
        let hex = format!("sha256:{text}");
        let is_kept_by_others = |node: &&Node| node.kind == "content" || node.kind.starts_with("snapshots/");
        let begins = |node: &&Node| node.id.starts_with(text) || node.id.starts_with(&hex);
        let found: Vec<_> = self.nodes.iter().filter(is_kept_by_others).filter(begins).cloned().collect();
        let exact: Vec<_> = found.iter().filter(|node| node.id == text || node.id == hex).cloned().collect();
        if exact.is_empty() { found } else { exact }
    }

    /// Everything that keeps an object, each by its shortest way.
    pub(crate) fn keep(&self, node: &Node) -> Vec<Kept> {
        let (any, hard) = (self.reach(node, true), self.reach(node, false));
        let ways = self.roots.iter().filter_map(|root| {
            let steps = if self.flat.contains(root) { &hard } else { &any };
            let (mut at, mut way) = (root, Vec::new());
            while at != node {
                let (by, next) = steps.get(at)?;
                way.push((by.clone(), next.clone()));
                at = next;
            }
            Some(Kept { root: root.clone(), way })
        });
        ways.collect()
    }

    /// The next step towards an object, of all that lead there.
    fn reach(&self, to: &Node, with_labels: bool) -> BTreeMap<Node, (String, Node)> {
        let (mut steps, mut queue) = (BTreeMap::new(), VecDeque::from([to.clone()]));
        while let Some(at) = queue.pop_front() {
            for edge in self.edges.get(&at).into_iter().flatten().filter(|edge| with_labels || !edge.is_label) {
                // what is not there keeps nothing
                if edge.from != *to && self.nodes.contains(&edge.from) && !steps.contains_key(&edge.from) {
                    steps.insert(edge.from.clone(), (edge.by.clone(), at.clone()));
                    queue.push_back(edge.from.clone());
                }
            }
        }
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn content(id: &str) -> Node {
        Node::new("content", id)
    }

    /// An image of a manifest, a config and a snapshot on another, and a lease.
    fn references() -> References {
        let mut all = References::default();
        let image = Node::new("images", "i");
        all.add(&image, true, &labels(&[]));
        all.lead(&image, "target", content("manifest"));
        all.add(&content("manifest"), false, &labels(&[("containerd.io/gc.ref.content.config", "config")]));
        all.add(&content("config"), false, &labels(&[("containerd.io/gc.ref.snapshot.overlayfs", "top")]));
        for (key, parent) in [("top", "base"), ("base", "")] {
            let snapshot = Node::new("snapshots/overlayfs", key);
            all.add(&snapshot, false, &labels(&[]));
            if !parent.is_empty() {
                all.lead(&snapshot, "parent", Node::new("snapshots/overlayfs", parent));
            }
        }
        all
    }

    fn ways(all: &References, node: &Node) -> Vec<String> {
        let shown = |kept: &Kept| {
            kept.way.iter().fold(format!("{} {}", kept.root.kind, kept.root.id), |line, (by, node)| {
                format!("{line} {} {}", by.trim_start_matches("containerd.io/gc."), node.id)
            })
        };
        all.keep(node).iter().map(shown).collect()
    }

    #[test]
    fn the_shortest_way_from_each_root_is_found() {
        let mut all = references();
        let base = Node::new("snapshots/overlayfs", "base");
        let by_image = "images i target manifest ref.content.config config ref.snapshot.overlayfs top parent base";
        assert_eq!(ways(&all, &base), [by_image]);
        all.add(&Node::new("containers", "c"), true, &labels(&[]));
        all.lead(&Node::new("containers", "c"), "snapshot", Node::new("snapshots/overlayfs", "top"));
        assert_eq!(ways(&all, &base), ["containers c snapshot top parent base", by_image]);
        all.add(&content("free"), false, &labels(&[]));
        assert!(ways(&all, &content("free")).is_empty());
        all.add(&content("root"), false, &labels(&[("containerd.io/gc.root", "1")]));
        assert_eq!(ways(&all, &content("root")), ["content root"]);
    }

    #[test]
    fn a_lease_that_has_expired_keeps_nothing_and_a_flat_one_nothing_by_labels() {
        for (more, expected) in [
            (&[][..], 2),
            (&[("containerd.io/gc.expire", "2020-01-01T00:00:00+02:00")], 0),
            (&[("containerd.io/gc.expire", "2999-01-01T00:00:00Z")], 2),
            (&[("containerd.io/gc.flat", "")], 1),
        ] {
            let mut all = references();
            let lease = Node::new("leases", "l");
            all.roots.clear();
            all.add(&lease, true, &labels(more));
            all.lead(&lease, "resource", content("manifest"));
            let kept = ways(&all, &content("manifest")).len() + ways(&all, &content("config")).len();
            assert_eq!(kept, expected, "{more:?}");
        }
    }

    #[test]
    fn a_back_reference_keeps_its_object_as_long_as_the_other_is_there() {
        let mut all = references();
        all.add(
            &content("signature"),
            false,
            &labels(&[("containerd.io/gc.bref.content", "manifest"), ("containerd.io/gc.bref.image.x", "gone")]),
        );
        assert_eq!(ways(&all, &content("signature")), ["images i target manifest bref.content signature"]);
    }

    #[test]
    fn references_in_circles_end() {
        let mut all = References::default();
        for (from, to) in [("a", "b"), ("b", "a")] {
            all.add(&content(from), false, &labels(&[("containerd.io/gc.ref.content", to)]));
        }
        assert!(ways(&all, &content("a")).is_empty());
    }
}
