//! Removal: the row first, then the folder, which is renamed aside at once and deleted by a pool.

use std::fs;
use std::path::PathBuf;

use log::warn;

use super::folders::{Named, blocking_move_aside, blocking_remove_unless, named};
use super::{Snapshots, Snapshotter, existing};
use crate::content::Scan;
use crate::error::{Error, IoContext as _, Result};
use crate::gc::Snapshotters;
use crate::store::snapshots::{Place, kind_of};
use crate::store::{self, Meta, Resource, resources};

impl Snapshots {
    /// Removes a snapshot without children. Its files go later; nothing waits for that.
    pub(crate) async fn remove(&self, place: &Place, key: &str, lease: Option<String>) -> Result<()> {
        let snapshotter = Snapshotter::parse(&place.snapshotter)?;
        let (at, key) = (place.clone(), key.to_owned());
        let remove = move |db: &mut Meta<'_>| {
            let snapshot = existing(db, &at, &key)?;
            if store::snapshots::has_children(db, snapshot.id)? {
                return Err(Error::Precondition("cannot remove snapshot with child".to_owned()));
            }
            store::snapshots::remove(db, snapshot.id)?;
            if let Some(lease) = &lease {
                let held = Resource { kind: kind_of(&at.snapshotter), id: key.clone() };
                resources::remove(db, &at.namespace, lease, &held)?;
            }
            Ok(snapshot.id)
        };
        let id = self.store.remove(remove).await?;
        let this = self.clone();
        tokio::spawn(async move { this.remove_folders(vec![(snapshotter, id)]).await });
        Ok(())
    }

    /// Deletes the folders of snapshots whose rows are removed. What cannot be deleted is left to a later cleanup.
    pub(crate) async fn remove_folders(&self, removed: Vec<(Snapshotter, i64)>) {
        let forget = |&(snapshotter, id): &(Snapshotter, i64)| drop(self.written.take(&self.tree(snapshotter, id)));
        removed.iter().for_each(forget);
        let folders: Vec<_> = removed.into_iter().map(|(snapshotter, id)| self.folder(snapshotter, id)).collect();
        self.delete(folders).await;
    }

    /// Deletes every folder of a snapshotter that has no row.
    pub(crate) async fn cleanup(&self, snapshotter: Snapshotter) -> Result<()> {
        let left = {
            // until the rows are read, no folder is there whose row is to come
            let _nothing_is_named = self.naming.write().await;
            let base = self.base(snapshotter);
            let found =
                self.files.run(move || fs::read_dir(&base).and_then(|entries| entries.collect::<Result<Vec<_>, _>>()).on("read", &base));
            let found = found.await??;
            let mut known = self.store.read(move |db| store::snapshots::all(db, snapshotter.name())).await?;
            known.sort_unstable();
            let is_left = |name: &std::ffi::OsStr| match named(name) {
                Named::Snapshot(id) => known.binary_search(&id).is_err(),
                Named::Left => true,
                Named::Foreign => false,
            };
            let found = found.into_iter().filter(|entry| is_left(&entry.file_name())).map(|entry| entry.path());
            found.filter(|folder| !self.making.has(folder)).collect()
        };
        let left = self.set_aside(left).await?;
        self.delete(left).await;
        Ok(())
    }

    /// Gives folders with the number of no snapshot another name. A number that no row has got yet, since a process crashed before it wrote one,
    /// is given to the next snapshot: its folder must not be taken for the one that was found.
    async fn set_aside(&self, found: Vec<PathBuf>) -> Result<Vec<PathBuf>> {
        let mut all = Vec::with_capacity(found.len());
        for batch in found.chunks(BATCH) {
            let (batch, _pass) = (batch.to_vec(), self.gate.enter().await?);
            // where numbers are given and folders named, too: neither happens meanwhile
            let set_aside = move |db: &mut Meta<'_>| {
                let mut aside = Vec::with_capacity(batch.len());
                for folder in &batch {
                    match folder.file_name().map(named) {
                        Some(Named::Snapshot(id)) if store::snapshots::exists(db, id)? => {}
                        Some(Named::Snapshot(_)) => match blocking_move_aside(folder) {
                            Ok(renamed) => aside.extend(renamed),
                            // it does not keep the others
                            Err(error) => warn!(folder:% = folder.display(), error = error.chain(); "cannot set a folder aside"),
                        },
                        _ => aside.push(folder.clone()),
                    }
                }
                Ok(aside)
            };
            all.extend(self.store.sweep(set_aside).await?);
        }
        Ok(all)
    }

    pub(super) async fn delete(&self, folders: Vec<PathBuf>) {
        for folder in folders {
            if self.gate.is_retired() {
                // the next process goes on with it: an exit does not wait for files
                return;
            }
            let (path, gate) = (folder.clone(), self.gate.clone());
            let is_aside = folder.file_name().map(named) == Some(Named::Left);
            let deleted = self.removal.run(move || {
                // a name that is given once more grows, and may be too long one day
                let aside = if is_aside { Some(path) } else { blocking_move_aside(&path)? };
                aside.map_or(Ok(()), |aside| blocking_remove_unless(&aside, &|| gate.is_retired()))
            });
            if let Err(error) = deleted.await.flatten()
                && !self.gate.is_retired()
            {
                warn!(folder:% = folder.display(), error = error.chain(); "cannot delete the files of a removed snapshot; the next cleanup tries again");
            }
        }
    }
}

#[async_trait::async_trait]
impl Snapshotters for Snapshots {
    async fn remove_files(&self, removed: Vec<(String, i64)>, scan: Scan) {
        let known = |(name, id): (String, i64)| Some((Snapshotter::parse(&name).ok()?, id));
        self.remove_folders(removed.into_iter().filter_map(known).collect()).await;
        if scan == Scan::Known {
            return;
        }
        for snapshotter in Snapshotter::ALL {
            if let Err(error) = self.cleanup(snapshotter).await {
                warn!(snapshotter = snapshotter.name(), error = error.chain(); "cannot look for folders without a snapshot");
            }
        }
    }
}

/// Folders that are renamed while no snapshot is made.
const BATCH: usize = 64;
