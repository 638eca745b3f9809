//! Marking and sweeping beside a model that is simple enough to be right.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use containerd_client::services::v1::snapshots::Kind;
use containerd_client::services::v1::{Container, Image, Info, Lease};
use containerd_client::types::Descriptor;

use crate::error::Result;
use crate::store::snapshots::{self, Place};
use crate::store::{Meta, Node, Resource, Store, blobs, containers, garbage, images, leases, namespaces, resources};

type Name = (String, String);
type Labels = BTreeMap<String, String>;

/// A collectable object: its labels, its target or parent, and whether it has expired.
#[derive(Debug, Clone, Default, PartialEq)]
struct Object {
    labels: Labels,
    leads_to: Option<Name>,
    is_expired: bool,
}

#[derive(Debug, Clone, Default)]
struct Holder {
    holds: BTreeSet<Name>,
    is_expired: bool,
    is_flat: bool,
}

/// Everything in one namespace.
#[derive(Debug, Clone, Default)]
struct Model {
    objects: BTreeMap<Name, Object>,
    containers: BTreeMap<String, Name>,
    leases: BTreeMap<String, Holder>,
}

fn kind_in(key: &str, prefix: &str) -> Option<String> {
    let rest = key.strip_prefix(prefix)?;
    Some(
        if rest.starts_with("content") {
            CONTENT
        } else if rest.starts_with("image") {
            IMAGES
        } else {
            SNAPSHOTS
        }
        .to_owned(),
    )
}

impl Model {
    /// Objects that no root leads to, found by adding to the live ones until nothing changes.
    fn dead(&self) -> BTreeSet<Name> {
        let mut live: BTreeSet<(Name, bool)> = BTreeSet::new();
        for lease in self.leases.values().filter(|lease| !lease.is_expired) {
            live.extend(lease.holds.iter().map(|name| (name.clone(), lease.is_flat)));
        }
        live.extend(self.containers.values().map(|name| (name.clone(), false)));
        for (name, object) in &self.objects {
            let is_root = if name.0 == IMAGES { !object.is_expired } else { object.labels.contains_key(ROOT) };
            if is_root {
                live.insert((name.clone(), false));
            }
        }
        loop {
            let mut more = BTreeSet::new();
            for (name, object) in &self.objects {
                for is_flat in [false, true] {
                    if live.contains(&(name.clone(), is_flat)) {
                        more.extend(object.leads_to.clone().map(|to| (to, is_flat)));
                    }
                }
                for (key, value) in &object.labels {
                    // conditions on snapshots refer to nothing
                    let may_have_conditions = name.0 != SNAPSHOTS;
                    if let Some(kind) = kind_in(key, REF)
                        && live.contains(&(name.clone(), false))
                    {
                        more.insert(((kind, value.clone()), false));
                    }
                    if let Some((condition, to)) = value.split_once('|')
                        && key.starts_with(CONDITION)
                        && may_have_conditions
                        && live.contains(&(name.clone(), false))
                        && self.was_used(to, condition)
                    {
                        more.insert(((SNAPSHOTS.to_owned(), to.to_owned()), false));
                    }
                    if key.starts_with(BACK_CONTAINER) {
                        more.extend(self.containers.contains_key(value).then(|| (name.clone(), false)));
                    } else if let Some(kind) = kind_in(key, BACK)
                        && live.contains(&((kind, value.clone()), false))
                    {
                        more.insert((name.clone(), false));
                    }
                }
            }
            let before = live.len();
            live.extend(more);
            if live.len() == before {
                let is_live = |name: &Name| live.contains(&(name.clone(), false)) || live.contains(&(name.clone(), true));
                return self.objects.keys().filter(|name| !is_live(name)).cloned().collect();
            }
        }
    }

    /// Whether one of the conditions is true of a snapshot: it was used an hour ago, or never.
    fn was_used(&self, id: &str, conditions: &str) -> bool {
        let is_known = self.objects.get(&(SNAPSHOTS.to_owned(), id.to_owned())).is_some_and(|snapshot| snapshot.labels.contains_key(USED));
        is_known && conditions.split(',').any(|condition| matches!(condition, "usedat<2h" | "usedat>1m"))
    }

    fn has_children(&self, name: &Name) -> bool {
        self.objects.iter().any(|(child, object)| child.0 == SNAPSHOTS && object.leads_to.as_ref() == Some(name))
    }
}

/// Numbers that are the same each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }

    fn name(&mut self) -> Name {
        let kind = [CONTENT, IMAGES, SNAPSHOTS][usize::try_from(self.below(3)).expect("small")];
        (kind.to_owned(), self.below(COUNT).to_string())
    }

    fn labels(&mut self) -> Labels {
        let mut labels = Labels::new();
        for number in 0..self.below(4) {
            let (kind, value) = self.name();
            let kind = match kind.as_str() {
                CONTENT => format!("content.{number}"),
                IMAGES => format!("image/{number}"),
                _ => format!("snapshot.overlayfs/{number}"),
            };
            let direction = if self.below(4) == 0 { BACK } else { REF };
            labels.insert(format!("{direction}{kind}"), value);
        }
        for number in 0..self.below(3) {
            let conditions = ["usedat<2h", "usedat>1m", "usedat>2h", "usedat<1m", "usedat>3h,usedat<2h", "usedat=1h,other<1h"];
            let condition = conditions[usize::try_from(self.below(6)).expect("small")];
            labels.insert(format!("{CONDITION}.overlayfs/{number}"), format!("{condition}|{}", self.below(COUNT)));
        }
        if self.below(16) == 0 {
            labels.insert(format!("{BACK_CONTAINER}/x"), self.below(COUNT).to_string());
        }
        if self.below(2) == 0 {
            let hour_ago = crate::timestamp::from_nanos(crate::timestamp::to_nanos(&crate::timestamp::now()) - 3_600_000_000_000);
            labels.insert(USED.to_owned(), hour_ago.to_string());
        }
        if self.below(12) == 0 {
            labels.insert(ROOT.to_owned(), "x".to_owned());
        }
        labels
    }
}

/// Does something to the model and to the store.
fn act(dice: &mut Dice, model: &mut Model, db: &mut Meta<'_>) -> Result<()> {
    let name = dice.name();
    let (kind, id) = (name.0.as_str(), name.1.as_str());
    match dice.below(10) {
        0..=3 => {
            let mut object = Object { labels: dice.labels(), ..Object::default() };
            let labels: HashMap<_, _> = object.labels.clone().into_iter().collect();
            match kind {
                CONTENT => blobs::put(db, NAMESPACE, id, &Info { digest: id.to_owned(), labels, ..Info::default() })?,
                IMAGES => {
                    object.leads_to = Some((CONTENT.to_owned(), dice.below(COUNT).to_string()));
                    object.is_expired = dice.below(3) > 0;
                    put_image(db, id, &object, labels)?;
                }
                _ => {
                    let place = place();
                    if let Some(found) = snapshots::get(db, &place, id)? {
                        object.leads_to = (!found.info.parent.is_empty()).then(|| (SNAPSHOTS.to_owned(), found.info.parent));
                        snapshots::update(db, &place, id, &labels)?;
                    } else {
                        let parent = dice.below(COUNT).to_string();
                        let found = snapshots::get(db, &place, &parent)?;
                        object.leads_to = found.as_ref().map(|_| (SNAPSHOTS.to_owned(), parent));
                        snapshots::insert(db, &place, id, found.map(|found| found.id), Kind::Committed, &labels)?;
                    }
                }
            }
            model.objects.insert(name, object);
        }
        4 => match kind {
            CONTENT => drop((blobs::remove(db, NAMESPACE, id)?, model.objects.remove(&name))),
            IMAGES => drop((images::remove(db, NAMESPACE, id)?, model.objects.remove(&name))),
            _ if model.has_children(&name) => {}
            _ => {
                if let Some(found) = snapshots::get(db, &place(), id)? {
                    snapshots::remove(db, found.id)?;
                    model.objects.remove(&name);
                }
            }
        },
        5 if kind == SNAPSHOTS => {
            let container =
                Container { id: id.to_owned(), snapshotter: "overlayfs".to_owned(), snapshot_key: id.to_owned(), ..Container::default() };
            containers::put(db, NAMESPACE, id, &container)?;
            model.containers.insert(id.to_owned(), name);
        }
        5..=8 => {
            containers::remove(db, NAMESPACE, id)?;
            model.containers.remove(id);
            leases::remove(db, NAMESPACE, id)?;
            model.leases.remove(id);
        }
        _ => {
            let lease = dice.below(3).to_string();
            if !model.leases.contains_key(&lease) {
                let holder = Holder { is_expired: dice.below(4) == 0, is_flat: dice.below(3) == 0, ..Holder::default() };
                put_lease(db, &lease, &holder)?;
                model.leases.insert(lease.clone(), holder);
            }
            resources::add(db, NAMESPACE, &lease, &Resource { kind: name.0.clone(), id: name.1.clone() })?;
            model.leases.entry(lease).or_default().holds.insert(name);
        }
    }
    Ok(())
}

fn put_image(db: &mut Meta<'_>, id: &str, object: &Object, mut labels: HashMap<String, String>) -> Result<()> {
    if object.is_expired {
        labels.insert(EXPIRE.to_owned(), PAST.to_owned());
    }
    let digest = object.leads_to.clone().unwrap_or_default().1;
    let target = Some(Descriptor { digest, ..Descriptor::default() });
    let image = Image { name: id.to_owned(), labels, target, ..Image::default() };
    images::put(db, NAMESPACE, id, &image)?;
    images::note_target(db, NAMESPACE, &image)
}

fn put_lease(db: &mut Meta<'_>, id: &str, holder: &Holder) -> Result<()> {
    let mut labels = HashMap::new();
    if holder.is_expired {
        labels.insert(EXPIRE.to_owned(), PAST.to_owned());
    }
    if holder.is_flat {
        labels.insert("containerd.io/gc.flat".to_owned(), "true".to_owned());
    }
    let lease = Lease { id: id.to_owned(), labels, ..Lease::default() };
    leases::put(db, NAMESPACE, id, &lease)?;
    leases::note_expiry(db, NAMESPACE, &lease)
}

fn place() -> Place {
    Place { namespace: NAMESPACE.to_owned(), snapshotter: "overlayfs".to_owned() }
}

fn names(nodes: impl IntoIterator<Item = Node>) -> BTreeSet<Name> {
    nodes.into_iter().map(|node| (node.kind, node.id)).collect()
}

fn swept(swept: garbage::Swept) -> BTreeSet<Name> {
    names(swept.content.into_iter().chain(swept.images).chain(swept.snapshots.into_iter().map(|(node, _)| node)))
}

#[tokio::test]
async fn nothing_referenced_is_lost_and_nothing_unreferenced_stays_whatever_the_order_of_calls() {
    let folder = scratch::Folder::new("gc");
    let store = Store::new(&folder);
    store.write(|db| namespaces::ensure(db, NAMESPACE)).await.expect("room");
    let (mut dice, mut model, mut removed) = (Dice(12), Model::default(), 0);
    let now = crate::timestamp::to_nanos(&crate::timestamp::now());
    for round in 0..ROUNDS {
        let calls = async |mut dice: Dice, mut model: Model, count: u64| {
            let calls = move |db: &mut Meta<'_>| {
                for _call in 0..count {
                    act(&mut dice, &mut model, db)?;
                }
                Ok((dice, model))
            };
            store.write(calls).await.expect("room")
        };
        let count = 1 + dice.below(8);
        (dice, model) = calls(dice, model, count).await;
        let marked = store.read_beside(move |db| garbage::mark(db, now)).await.expect("marks");
        assert_eq!(names(marked.clone()), model.dead(), "round {round}: marked, {model:#?}");
        // something happens between the marks and the removal
        let count = dice.below(4);
        let before = model.clone();
        (dice, model) = calls(dice, model, count).await;
        let dead = model.dead();
        let gone = swept(store.sweep(move |db| garbage::sweep(db, now, &marked, &|_| false)).await.expect("a sweep"));
        let lost: Vec<_> = gone.difference(&dead).collect();
        assert!(lost.is_empty(), "round {round}: {lost:?} lost, {model:#?}");
        let kept: Vec<_> = before.dead().intersection(&dead).filter(|name| !gone.contains(*name)).cloned().collect();
        assert!(kept.iter().all(|name| model.has_children(name)), "round {round}: {kept:?} stay, {model:#?}");
        removed += gone.len();
        model.objects.retain(|name, _| !gone.contains(name));
        // and all at once
        let everything = store
            .read(|db| {
                let mut everything: Vec<_> = ["content", "images"]
                    .into_iter()
                    .flat_map(|kind| (0..COUNT).map(move |id| (kind.to_owned(), id.to_string())))
                    .collect();
                let mut numbers = snapshots::all(db, "overlayfs")?;
                numbers.sort_unstable_by_key(|number| std::cmp::Reverse(*number));
                for number in numbers {
                    everything.push((SNAPSHOTS.to_owned(), snapshots::key(db, number)?));
                }
                Ok(everything)
            })
            .await
            .expect("read");
        let nodes: Vec<_> = everything.into_iter().map(|(kind, id)| Node { namespace: NAMESPACE.to_owned(), kind, id }).collect();
        let dead = model.dead();
        let gone = swept(store.sweep(move |db| garbage::sweep(db, now, &nodes, &|_| false)).await.expect("a sweep"));
        assert_eq!(gone, dead, "round {round}: swept, {model:#?}");
        removed += gone.len();
        model.objects.retain(|name, _| !gone.contains(name));
    }
    println!("{removed} objects were removed, {} are left", model.objects.len());
    assert!(removed > ROUNDS / 2, "{removed}");
    drop(store);
}

#[tokio::test]
async fn a_sweep_that_has_enough_goes_on_where_it_stopped_and_loses_nothing_that_is_held_meanwhile() {
    let folder = scratch::Folder::new("gc-steps");
    let store = Store::new(&folder);
    let written = store.write(|db| {
        namespaces::ensure(db, NAMESPACE)?;
        let mut parent = None;
        for number in 0..CHAIN {
            let place = place();
            snapshots::insert(db, &place, &number.to_string(), parent, Kind::Committed, &HashMap::new())?;
            parent = snapshots::get(db, &place, &number.to_string())?.map(|found| found.id);
            blobs::put(db, NAMESPACE, &number.to_string(), &Info { digest: number.to_string(), ..Info::default() })?;
        }
        Ok(())
    });
    written.await.expect("room");
    let now = crate::timestamp::to_nanos(&crate::timestamp::now());
    let marked = store.read_beside(move |db| garbage::mark(db, now)).await.expect("marks");
    assert_eq!(marked.len(), 2 * CHAIN);
    // from here on a snapshot in the middle is held, and those below it with it
    let (mut seen, mut gone, held) = (0, BTreeSet::new(), CHAIN / 2);
    while seen < marked.len() {
        let rest = marked[seen..].to_vec();
        let some = store.sweep(move |db| garbage::sweep(db, now, &rest, &|count| count > 40)).await.expect("a sweep");
        assert!(some.seen > 40 && some.seen < CHAIN || seen + some.seen == marked.len(), "{}", some.seen);
        if seen == 0 {
            let resource = Resource { kind: SNAPSHOTS.to_owned(), id: held.to_string() };
            let hold = move |db: &mut Meta<'_>| {
                put_lease(db, "l", &Holder::default())?;
                resources::add(db, NAMESPACE, "l", &resource)
            };
            store.write(hold).await.expect("room");
        }
        seen += some.seen;
        gone.extend(swept(some));
    }
    let blobs = (0..CHAIN).map(|number| (CONTENT.to_owned(), number.to_string()));
    let above = (held + 1..CHAIN).map(|number| (SNAPSHOTS.to_owned(), number.to_string()));
    assert_eq!(gone, blobs.chain(above).collect());
    let left = store.read(|db| snapshots::all(db, "overlayfs")).await.expect("read");
    assert_eq!(left.len(), held + 1);
}

#[tokio::test]
async fn a_sweep_finds_out_that_a_write_waits_for_it() {
    let folder = scratch::Folder::new("gc-waits");
    let store = Store::new(&folder);
    let (begun, begins) = tokio::sync::oneshot::channel();
    let (begun, of_the_job) = (std::sync::Mutex::new(Some(begun)), store.clone());
    let sweep = store.sweep(move |_db| {
        let is_alone = !of_the_job.has_waiting_writes();
        if let Some(begun) = begun.lock().expect("no panic").take() {
            begun.send(()).expect("the test waits");
        }
        while !of_the_job.has_waiting_writes() {
            std::thread::yield_now();
        }
        Ok(is_alone)
    });
    let write = async {
        begins.await.expect("it begins");
        store.write(|db| namespaces::ensure(db, NAMESPACE)).await
    };
    let (is_alone, written) = tokio::join!(sweep, write);
    assert!(is_alone.expect("a sweep") && written.is_ok());
    assert!(!store.has_waiting_writes());
}

#[tokio::test]
async fn a_long_chain_of_conditions_takes_few_marks_and_keeps_rather_too_much() {
    for (length, keeps_more) in [(4, false), (3 * garbage::MOST_ROUNDS, true)] {
        let folder = scratch::Folder::new("gc-rounds");
        let files = crate::store::Files { meta: folder.join("meta.db"), notes: folder.join("notes.db") };
        let store = Store::open(&files).expect("a new store");
        let written = store.write(move |db| {
            namespaces::ensure(db, NAMESPACE)?;
            // each blob leads to a snapshot, under a condition, and that to the next blob; nothing leads to the last pair
            for number in 0..=length {
                let mut labels = HashMap::from([(format!("{CONDITION}.overlayfs"), format!("usedat>1m|{number}"))]);
                if number == 0 {
                    labels.insert(ROOT.to_owned(), String::new());
                }
                blobs::put(db, NAMESPACE, &number.to_string(), &Info { digest: number.to_string(), labels, ..Info::default() })?;
                let mut labels = HashMap::from([(USED.to_owned(), PAST.to_owned())]);
                if number + 1 < length {
                    labels.insert(format!("{REF}content"), (number + 1).to_string());
                }
                snapshots::insert(db, &place(), &number.to_string(), None, Kind::Committed, &labels)?;
            }
            Ok(())
        });
        written.await.expect("room");
        let now = crate::timestamp::to_nanos(&crate::timestamp::now());
        let garbage = names(store.read_beside(move |db| garbage::mark(db, now)).await.expect("marks"));
        let mut expected = BTreeSet::from([(CONTENT.to_owned(), length.to_string())]);
        expected.extend((!keeps_more).then(|| (SNAPSHOTS.to_owned(), length.to_string())));
        assert_eq!(garbage, expected, "{length}");
    }
}

const NAMESPACE: &str = "n";
const CONTENT: &str = "content";
const IMAGES: &str = "images";
const SNAPSHOTS: &str = "snapshots/overlayfs";
const REF: &str = "containerd.io/gc.ref.";
const BACK: &str = "containerd.io/gc.bref.";
const BACK_CONTAINER: &str = "containerd.io/gc.bref.container";
const ROOT: &str = "containerd.io/gc.root";
const CONDITION: &str = "containerd.io/gc.cond.snapshot";
const USED: &str = "containerd.io/gc.cond.value-usedat";
const EXPIRE: &str = "containerd.io/gc.expire";
const PAST: &str = "2001-02-03T04:05:06Z";
/// Several steps of a sweep.
const CHAIN: usize = 150;
/// So few that they often refer to each other.
const COUNT: u64 = 8;
/// Each waits for the disk a few times.
const ROUNDS: usize = 200;
