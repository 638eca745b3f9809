//! Committing: an active snapshot becomes one that others can build on.
//!
//! ```text
//! parents put right (rebase) ─▶ measured ─▶ written back (syncfs) ─▶ row
//! ```

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use containerd_client::services::v1::snapshots::Kind;
use tokio::sync::Notify;

use super::folders::blocking_implicit;
use super::{Chain, Snapshots, Snapshotter, chain, parent};
use crate::content::hold;
use crate::error::{Error, IoContext as _, Object, Result};
use crate::layers::{self, Beneath, Cancel, Lowers};
use crate::store::snapshots::{Place, Usage, kind_of};
use crate::store::{self, Meta, Resource, resources};

/// What is committed.
#[derive(Debug, Clone)]
pub(crate) struct Commit {
    pub(crate) key: String,
    /// Its key from then on.
    pub(crate) name: String,
    /// For one that was prepared without a parent: the one that it is put on; empty for none.
    pub(crate) parent: String,
    pub(crate) labels: HashMap<String, String>,
    /// Holds it, if it is named.
    pub(crate) lease: Option<String>,
}

/// Numbers of snapshots that are being committed.
#[derive(Debug, Clone, Default)]
pub(super) struct Committing {
    numbers: Arc<Mutex<HashSet<i64>>>,
    released: Arc<Notify>,
}

/// The right to commit a snapshot.
#[derive(Debug)]
pub(super) struct Turn {
    number: i64,
    committing: Committing,
}

impl Committing {
    /// Waits until no other commit of that snapshot is under way.
    pub(super) async fn take(&self, number: i64) -> Turn {
        loop {
            let released = self.released.notified();
            let mut released = std::pin::pin!(released);
            released.as_mut().enable();
            if self.numbers.lock().unwrap_or_else(PoisonError::into_inner).insert(number) {
                return Turn { number, committing: self.clone() };
            }
            released.await;
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.committing.numbers.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
        self.committing.released.notify_waiters();
    }
}

impl Snapshots {
    /// Commits a snapshot. When this returns, it survives a loss of power.
    pub(crate) async fn commit(&self, place: &Place, commit: Commit) -> Result<()> {
        let (name, lease) = (commit.name.clone(), commit.lease.clone());
        let committed = self.commit_new(place, commit).await;
        if let Err(Error::AlreadyExists(_)) = &committed {
            // another client was faster; both go on with it
            self.hold_found(place, &name, lease.as_deref()).await?;
        }
        committed
    }

    async fn commit_new(&self, place: &Place, commit: Commit) -> Result<()> {
        if let Some(proxy) = self.proxy(&place.snapshotter) {
            return self.commit_at(proxy, place, commit).await;
        }
        let snapshotter = Snapshotter::parse(&place.snapshotter)?;
        let (at, asked) = (place.clone(), commit.clone());
        let found = self.store.read(move |db| check(db, &at, &asked)).await?;
        let id = found.snapshot.id;
        // one at a time: files of a snapshot that is committed already must not change
        let _turn = self.committing.take(id).await;
        let (at, asked) = (place.clone(), commit.clone());
        let found = self.store.read(move |db| check(db, &at, &asked)).await?;
        let this = self.clone();
        let settled = self.files.run(move || this.blocking_settle(snapshotter, &found)).await?;
        let usage = match settled {
            Ok(usage) => usage,
            Err(error) => {
                // if it was removed meanwhile, that is why
                let (at, asked) = (place.clone(), commit.clone());
                self.store.read(move |db| check(db, &at, &asked)).await?;
                return Err(error);
            }
        };
        let _pass = self.gate.enter().await?;
        self.record_commit(place, commit, id, Some(usage)).await
    }

    /// Writes the row of what is committed.
    pub(super) async fn record_commit(&self, place: &Place, commit: Commit, id: i64, usage: Option<Usage>) -> Result<()> {
        let at = place.clone();
        let write = move |db: &mut Meta<'_>| {
            let found = check(db, &at, &commit)?;
            if found.snapshot.id != id {
                return Err(Error::Precondition(format!("snapshot {} was replaced while it was committed", commit.key)));
            }
            // what held the active one holds nothing now
            let held = Resource { kind: kind_of(&at.snapshotter), id: commit.key.clone() };
            if let Some(lease) = &commit.lease {
                hold(db, &at.namespace, Some(lease), &held.kind, &commit.name)?;
                resources::remove(db, &at.namespace, lease, &held)?;
            }
            store::snapshots::commit(db, &at, id, &commit.name, found.parents.first().copied(), usage, &commit.labels)
        };
        self.store.write(write).await
    }

    fn blocking_settle(&self, snapshotter: Snapshotter, found: &Chain) -> Result<Usage> {
        let tree = self.tree(snapshotter, found.snapshot.id);
        let lowers: Vec<_> = found.parents.iter().map(|id| self.tree(snapshotter, *id)).collect();
        let gets_parent = found.snapshot.parent_id.is_none() && !lowers.is_empty();
        let lowers = if gets_parent { Lowers::open(&lowers)? } else { Lowers::default() };
        if gets_parent && let Some(implicit) = blocking_implicit(&self.folder(snapshotter, found.snapshot.id))? {
            layers::rebase(&tree, &lowers, &implicit)?;
        }
        let beneath = match snapshotter {
            Snapshotter::Overlayfs if gets_parent => Beneath::Layers(&lowers),
            Snapshotter::Overlayfs if found.parents.is_empty() => Beneath::Nothing,
            Snapshotter::Overlayfs | Snapshotter::Native => Beneath::Known,
        };
        let measured = layers::measure(&tree, beneath, &Cancel::default())?;
        let since = match self.written.take(&tree) {
            Some(since) => since,
            None => File::open(&tree).on("open", &tree)?,
        };
        blocking_sync(&since, &tree)?;
        Ok(Usage { bytes: measured.bytes, inodes: measured.inodes })
    }
}

/// Whether it can be committed; with the parents that it will have.
pub(super) fn check(db: &Meta<'_>, place: &Place, commit: &Commit) -> Result<Chain> {
    if store::snapshots::get(db, place, &commit.name)?.is_some() {
        return Err(Error::AlreadyExists(Object::Snapshot(commit.name.clone())));
    }
    let mut found = chain(db, place, &commit.key)?;
    if found.snapshot.info.kind() != Kind::Active {
        return Err(Error::Precondition(format!("snapshot {} is not active", commit.key)));
    }
    if commit.parent.is_empty() || commit.parent == found.snapshot.info.parent {
        return Ok(found);
    }
    if found.snapshot.parent_id.is_some() {
        let (key, parent) = (&commit.key, &found.snapshot.info.parent);
        return Err(Error::Invalid(format!("snapshot {key} has the parent {parent}, and cannot be committed on another")));
    }
    if !Snapshotter::parse(&place.snapshotter).is_ok_and(Snapshotter::can_rebase) {
        return Err(Error::Unimplemented(format!(
            "snapshotter {} cannot give a snapshot a parent when it is committed",
            place.snapshotter
        )));
    }
    let parent = parent(db, place, &commit.parent)?;
    found.parents = store::snapshots::chain(db, parent.id)?;
    Ok(found)
}

/// Has the file system write everything back: there is no such call for one tree.
pub(super) fn blocking_sync(since: &File, tree: &Path) -> Result<()> {
    rustix::fs::syncfs(since).map_err(std::io::Error::from).on("write back", tree)
}
