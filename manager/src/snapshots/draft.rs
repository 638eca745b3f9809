//! Drafts: folders that layers are unpacked to before their snapshots have rows. Several become snapshots at once.
//!
//! ```text
//! draft ─▶ a layer is applied ─▶ put on the layers below (rebase) ─▶ measured ─▶ all: one syncfs ─▶ all: one transaction
//!   └─dropped: deleted
//! ```

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use containerd_client::services::v1::snapshots::Kind;

use super::commit::blocking_sync;
use super::folders::{From, Made, blocking_make, blocking_name};
use super::{Snapshots, Snapshotter, parent};
use crate::content::hold;
use crate::error::{Error, IoContext as _, Result};
use crate::layers::{self, Beneath, Cancel, Lowers};
use crate::store::snapshots::{Place, Usage, kind_of};
use crate::store::{self, Meta, namespaces};

/// A folder without a row; deleted when it is dropped.
#[derive(Debug)]
pub(crate) struct Draft {
    snapshots: Snapshots,
    snapshotter: Snapshotter,
    /// Until it is a snapshot's.
    made: Option<Made>,
    /// Open since before it was written to: see [`super::written`].
    since: Arc<File>,
    begun: Instant,
}

/// A draft with its layer, to become a committed snapshot.
#[derive(Debug)]
pub(crate) struct NewLayer {
    pub(crate) draft: Draft,
    /// Of the snapshot.
    pub(crate) key: String,
    pub(crate) labels: HashMap<String, String>,
    /// Folders that the layer has no entries for.
    pub(crate) implicit: Vec<Vec<u8>>,
    /// If it does not depend on the layers below.
    pub(crate) usage: Option<Usage>,
}

impl Draft {
    /// Where the files are to be.
    pub(crate) fn tree(&self) -> PathBuf {
        let folder = self.made.as_ref().map(|made| made.path.clone()).unwrap_or_default();
        match self.snapshotter {
            Snapshotter::Overlayfs => folder.join(super::folders::FS),
            Snapshotter::Native => folder,
        }
    }

    /// Gives its files to the snapshot with that tree, which gets them by other means: its commit learns what cannot be written to the disk.
    pub(crate) fn is_written_to(&self, tree: &Path) -> Result<()> {
        let since = self.since.try_clone().on("open", tree)?;
        self.snapshots.written.keep(tree, since);
        Ok(())
    }

    /// Whether it is a folder for what differs from the layers below, rather than a copy of them.
    pub(crate) fn is_upper(&self) -> bool {
        self.snapshotter == Snapshotter::Overlayfs
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let Some(made) = self.made.take() else { return };
        // without an executor this process exits, and the next one finds the folder
        let Ok(executor) = tokio::runtime::Handle::try_current() else { return };
        let snapshots = self.snapshots.clone();
        executor.spawn(async move {
            snapshots.delete(vec![made.path.clone()]).await;
            // until then no cleanup deletes it too
            drop(made);
        });
    }
}

impl Snapshots {
    /// Makes a draft: for `native` a copy of what is below it.
    pub(crate) async fn draft(&self, snapshotter: Snapshotter, below: Option<PathBuf>) -> Result<Draft> {
        self.check_usable(snapshotter)?;
        let (base, making) = (self.base(snapshotter), self.making.clone());
        let below = below.filter(|_| snapshotter == Snapshotter::Native);
        let pool = if below.is_some() { &self.copies } else { &self.files };
        let snapshots = self.clone();
        let make = move || {
            let (begun, since) = (Instant::now(), Arc::new(File::open(&base).on("open", &base)?));
            let stops = || snapshots.gate.is_retired();
            let from = below.as_deref().map_or(From::Nothing, |below| From::Copy(below, &stops));
            let made = blocking_make(&making, snapshotter, &base, from)?;
            // a draft from here on: its caller may have left, and no one else would delete the folder
            Ok(Draft { snapshots, snapshotter, made: Some(made), since, begun })
        };
        pool.run(make).await?
    }

    /// Which of some keys have a committed snapshot. With a lease, it holds them from then on.
    pub(crate) async fn committed(&self, place: &Place, keys: Vec<String>, lease: Option<String>) -> Result<Vec<bool>> {
        let at = place.clone();
        let look = move |db: &Meta<'_>| {
            let is_there = |key: &String| {
                let found = store::snapshots::get(db, &at, key)?;
                Ok(found.is_some_and(|found| found.info.kind() == Kind::Committed))
            };
            keys.iter().map(is_there).collect::<Result<Vec<_>>>().map(|found| (keys, found))
        };
        let (keys, found) = self.store.read(look).await?;
        if lease.is_none() || !found.contains(&true) {
            return Ok(found);
        }
        let _pass = self.gate.enter().await?;
        let at = place.clone();
        let hold_all = move |db: &mut Meta<'_>| {
            let mut held = Vec::with_capacity(keys.len());
            for key in &keys {
                let is_there = store::snapshots::get(db, &at, key)?.is_some_and(|found| found.info.kind() == Kind::Committed);
                if is_there {
                    hold(db, &at.namespace, lease.as_deref(), &kind_of(&at.snapshotter), key)?;
                }
                held.push(is_there);
            }
            Ok(held)
        };
        self.store.write(hold_all).await
    }

    /// The trees of a committed snapshot and of those below it, the nearest first; none without a key.
    pub(crate) async fn trees(&self, place: &Place, key: Option<&str>) -> Result<Vec<PathBuf>> {
        let snapshotter = Snapshotter::parse(&place.snapshotter)?;
        let (at, key) = (place.clone(), key.map(ToOwned::to_owned));
        let parents = self.store.read(move |db| parents(db, &at, key.as_deref())).await?;
        Ok(parents.into_iter().map(|id| self.tree(snapshotter, id)).collect())
    }

    /// Makes committed snapshots of layers that were put on each other, the first on `below`; `and` is part of the transaction. One that is there by
    /// then, made by another client, takes its place. When this returns, all survive a loss of power.
    pub(crate) async fn record(
        &self,
        place: &Place,
        below: Option<String>,
        mut new: Vec<NewLayer>,
        lease: Option<String>,
        and: impl FnOnce(&mut Meta<'_>) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let snapshotter = Snapshotter::parse(&place.snapshotter)?;
        if let Some(first) = new.iter().min_by_key(|layer| layer.draft.begun) {
            // on the file system of all of them; the first learns of all errors
            let (since, tree) = (Arc::clone(&first.draft.since), first.draft.tree());
            self.files.run(move || blocking_sync(&since, &tree)).await??;
        }
        let named: Vec<_> = new
            .iter()
            .map(|layer| {
                let folder = layer.draft.made.as_ref().map(|made| made.path.clone()).unwrap_or_default();
                (layer.key.clone(), layer.labels.clone(), layer.usage, folder)
            })
            .collect();
        let naming = self.naming.read().await;
        let pass = self.gate.enter().await?;
        let numbered = Arc::new(Mutex::new(Vec::new()));
        let (at, base, numbers) = (place.clone(), self.base(snapshotter), Arc::clone(&numbered));
        let write = move |db: &mut Meta<'_>| {
            namespaces::ensure(db, &at.namespace)?;
            let mut above = match &below {
                Some(key) => Some(parent(db, &at, key)?.id),
                None => None,
            };
            let mut recorded = Vec::with_capacity(named.len());
            for (key, labels, usage, folder) in &named {
                let found = store::snapshots::get(db, &at, key)?;
                recorded.push(found.is_none());
                let id = match found {
                    Some(found) if found.info.kind() == Kind::Committed => found.id,
                    Some(_) => return Err(Error::Precondition(format!("snapshot {key} is there, and not committed"))),
                    None => {
                        let id = store::snapshots::insert(db, &at, key, above, Kind::Active, labels)?;
                        store::snapshots::commit(db, &at, id, key, above, *usage, labels)?;
                        let numbered = base.join(id.to_string());
                        blocking_name(folder, &numbered)?;
                        numbers.lock().unwrap_or_else(PoisonError::into_inner).push(numbered);
                        id
                    }
                };
                hold(db, &at.namespace, lease.as_deref(), &kind_of(&at.snapshotter), key)?;
                above = Some(id);
            }
            and(db)?;
            Ok(recorded)
        };
        let recorded = self.store.write(write).await;
        drop((naming, pass));
        let recorded = match recorded {
            Ok(recorded) => recorded,
            Err(error) => {
                // there are no rows: the numbers are free, and may be others' by now
                let unrecorded = std::mem::take(&mut *numbered.lock().unwrap_or_else(PoisonError::into_inner));
                for folder in unrecorded {
                    self.remove_unrecorded(folder).await?;
                }
                return Err(error);
            }
        };
        for (layer, is_recorded) in new.iter_mut().zip(recorded) {
            if is_recorded {
                layer.draft.made = None;
            }
        }
        Ok(())
    }
}

/// Numbers of a snapshot and of those below it, the nearest first.
fn parents(db: &Meta<'_>, place: &Place, key: Option<&str>) -> Result<Vec<i64>> {
    let Some(key) = key else { return Ok(Vec::new()) };
    let parent = parent(db, place, key)?;
    store::snapshots::chain(db, parent.id)
}

/// Puts a layer on the trees below it, the nearest first, and measures it. False if it must be applied again with those known.
pub(crate) fn blocking_settle(below: &[PathBuf], layer: &mut NewLayer) -> Result<bool> {
    let tree = layer.draft.tree();
    if !layer.draft.is_upper() {
        layer.usage = Some(blocking_usage(&tree, Beneath::Known)?);
        return Ok(true);
    }
    let lowers = Lowers::open(below)?;
    if !layers::rebase(&tree, &lowers, &layer.implicit)? {
        return Ok(false);
    }
    if layer.usage.is_none() {
        let beneath = if below.is_empty() { Beneath::Nothing } else { Beneath::Layers(&lowers) };
        layer.usage = Some(blocking_usage(&tree, beneath)?);
    }
    Ok(true)
}

/// What a tree uses.
pub(crate) fn blocking_usage(tree: &Path, beneath: Beneath<'_>) -> Result<Usage> {
    let measured = layers::measure(tree, beneath, &Cancel::default())?;
    Ok(Usage { bytes: measured.bytes, inodes: measured.inodes })
}
