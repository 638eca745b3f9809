//! New snapshots.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use containerd_client::services::v1::snapshots::Kind;
use containerd_client::types::Mount;

use super::folders::{From, blocking_make, blocking_name, blocking_remove};
use super::mounts::gone as lost;
use super::{Chain, Maps, Snapshots, Snapshotter, parent, quota};
use crate::content::hold;
use crate::error::{Error, Object, Result};
use crate::layers::Cancel;
use crate::store::snapshots::{Place, kind_of};
use crate::store::{self, Meta, namespaces};

/// What a new snapshot is to be.
#[derive(Debug, Clone)]
pub(crate) struct New {
    pub(crate) key: String,
    /// Empty for none.
    pub(crate) parent: String,
    /// [`Kind::Active`] or [`Kind::View`].
    pub(crate) kind: Kind,
    pub(crate) labels: HashMap<String, String>,
    /// Holds it, if it is named.
    pub(crate) lease: Option<String>,
}

impl New {
    /// The name that it is to have when it is committed, if its client says so.
    pub(crate) fn target(&self) -> Option<&str> {
        self.labels.get(TARGET_LABEL).map(String::as_str)
    }
}

impl Snapshots {
    /// Makes a snapshot, and returns how it is mounted.
    pub(crate) async fn prepare(&self, place: &Place, new: New) -> Result<Vec<Mount>> {
        self.prepare_unless(place, new, Cancel::default()).await
    }

    /// The same, unless it is cancelled while files are copied for it.
    pub(crate) async fn prepare_unless(&self, place: &Place, new: New, gone: Cancel) -> Result<Vec<Mount>> {
        if let Some(proxy) = self.proxy(&place.snapshotter) {
            return self.prepare_at(proxy, place, new).await;
        }
        let snapshotter = Snapshotter::parse(&place.snapshotter)?;
        self.check_usable(snapshotter)?;
        let maps = Maps::in_labels(&new.labels)?;
        if maps.is_some()
            && let Some(why) = self.cannot_remap(snapshotter)
        {
            return Err(Error::Unimplemented(format!("snapshotter {} cannot map users and groups: {why}", snapshotter.name())));
        }
        let limit = if new.kind == Kind::Active { quota::asked(&new.labels)? } else { None };
        let above = loop {
            let (at, asked) = (place.clone(), new.clone());
            let checked = self.store.read(move |db| check(db, &at, &asked)).await;
            if let Err(Error::AlreadyExists(Object::TargetSnapshot(target))) = &checked
                && !self.hold_found(place, target, new.lease.as_deref()).await?
            {
                continue;
            }
            break checked?;
        };
        if above.len() > MOST_LAYERS {
            return Err(Error::Precondition(format!("a snapshot on {} others: the kernel's overlayfs takes {MOST_LAYERS}", above.len())));
        }
        let (base, making) = (self.base(snapshotter), self.making.clone());
        let parent_tree = above.first().map(|id| self.tree(snapshotter, *id));
        let copies = snapshotter == Snapshotter::Native && new.kind == Kind::Active;
        // who mounts an upper folder does not map it
        let owner = maps.filter(|_| parent_tree.is_some() && new.kind == Kind::Active).map(|maps| maps.root()).transpose()?;
        let key = new.key.clone();
        let gate = self.gate.clone();
        let make = move || {
            if limit.is_some() {
                quota::blocking_check(snapshotter, &base)?;
            }
            let stops = || gone.is_cancelled() || gate.is_retired();
            let from = match &parent_tree {
                Some(tree) if !tree.is_dir() => return Err(lost(&key, tree)),
                Some(tree) if copies => From::Copy(tree, &stops),
                Some(tree) => From::Attributes(tree),
                None => From::Nothing,
            };
            // the client repeats it to the next process
            let made = blocking_make(&making, snapshotter, &base, from);
            let made = made.map_err(|error| if gate.is_retired() { Error::Retired } else { error })?;
            made.owned_by(snapshotter, owner)
        };
        let pool = if copies { &self.copies } else { &self.files };
        let made = pool.run(make).await??;
        let (key, path, lease) = (new.key.clone(), made.path.clone(), new.lease.clone());
        let naming = self.naming.read().await;
        let named = Arc::new(OnceLock::new());
        let inserted = match self.gate.enter().await {
            Err(error) => Err(error),
            Ok(_pass) => {
                let (at, base, names) = (place.clone(), self.base(snapshotter), Arc::clone(&named));
                let insert = move |db: &mut Meta<'_>| {
                    let chain = check(db, &at, &new)?;
                    namespaces::ensure(db, &at.namespace)?;
                    let id = store::snapshots::insert(db, &at, &new.key, chain.first().copied(), new.kind, &new.labels)?;
                    hold(db, &at.namespace, new.lease.as_deref(), &kind_of(&at.snapshotter), &new.key)?;
                    let chain = super::chain(db, &at, &new.key)?;
                    // a rename waits for no more of the disk than the commit that follows
                    let folder = base.join(id.to_string());
                    blocking_name(&path, &folder)?;
                    // it is set once
                    let folder = names.get_or_init(|| folder);
                    if let Some(bytes) = limit {
                        quota::blocking_bound(folder, id, bytes)?;
                    }
                    Ok(chain)
                };
                self.store.write(insert).await
            }
        };
        drop(naming);
        let chain = match inserted {
            Ok(chain) => chain,
            Err(error) => {
                self.files.run(move || blocking_remove(&made.path)).await??;
                if let Some(folder) = named.get() {
                    // the row could not be written, on a full disk: the number is free, and may be another's by now
                    self.remove_unrecorded(folder.clone()).await?;
                }
                if let Error::AlreadyExists(Object::TargetSnapshot(target)) = &error {
                    // if it is gone again, the client finds that out, and repeats
                    self.hold_found(place, target, lease.as_deref()).await?;
                }
                return Err(error);
            }
        };
        drop(made);
        self.mounts_of(snapshotter, &key, chain).await
    }

    pub(super) async fn mounts_of(&self, snapshotter: Snapshotter, key: &str, chain: Chain) -> Result<Vec<Mount>> {
        let (this, key) = (self.clone(), key.to_owned());
        self.files.run(move || this.blocking_mounts(snapshotter, &key, &chain)).await?
    }
}

/// Whether a snapshot can be made: numbers of its parents, the nearest first.
pub(super) fn check(db: &Meta<'_>, place: &Place, new: &New) -> Result<Vec<i64>> {
    if store::snapshots::get(db, place, &new.key)?.is_some() {
        return Err(Error::AlreadyExists(Object::Snapshot(new.key.clone())));
    }
    // clients ask this way whether a layer is there, and then neither fetch nor unpack it
    if let Some(target) = new.target()
        && store::snapshots::get(db, place, target)?.is_some()
    {
        return Err(Error::AlreadyExists(Object::TargetSnapshot(target.to_owned())));
    }
    if new.parent.is_empty() {
        return Ok(Vec::new());
    }
    let parent = parent(db, place, &new.parent)?;
    store::snapshots::chain(db, parent.id)
}

/// The name that the snapshot is to have when it is committed.
const TARGET_LABEL: &str = "containerd.io/snapshot.ref";
/// `OVL_MAX_STACK` of Linux.
const MOST_LAYERS: usize = 500;
