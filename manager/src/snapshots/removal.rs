//! Removal: the row first, then the folder, which is renamed aside at once and deleted by a pool.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use log::warn;

use super::folders::{Named, blocking_move_aside, blocking_remove_unless, named};
use super::{Snapshots, Snapshotter, existing};
use crate::content::Scan;
use crate::error::{Error, IoContext as _, Result};
use crate::gc::Snapshotters;
use crate::store::snapshots::{Place, kind_of};
use crate::store::{self, Meta, Node, Resource, resources};

impl Snapshots {
    /// Deletes what a snapshotter has of no snapshot.
    pub(crate) async fn cleanup_of(&self, name: &str) -> Result<()> {
        match self.proxy(name) {
            Some(proxy) => self.cleanup_at(proxy).await,
            None => self.cleanup(Snapshotter::parse(name)?).await,
        }
    }

    /// Removes a snapshot without children. Its files go later; nothing waits for that.
    pub(crate) async fn remove(&self, place: &Place, key: &str, lease: Option<String>) -> Result<()> {
        self.check_name(&place.snapshotter)?;
        let (at, wanted) = (place.clone(), key.to_owned());
        let remove = move |db: &mut Meta<'_>| {
            let snapshot = existing(db, &at, &wanted)?;
            if store::snapshots::has_children(db, snapshot.id)? {
                return Err(Error::Precondition("cannot remove snapshot with child".to_owned()));
            }
            store::snapshots::remove(db, snapshot.id)?;
            if let Some(lease) = &lease {
                let held = Resource { kind: kind_of(&at.snapshotter), id: wanted.clone() };
                resources::remove(db, &at.namespace, lease, &held)?;
            }
            Ok(snapshot.id)
        };
        let id = self.store.remove(remove).await?;
        match self.proxy(&place.snapshotter) {
            Some(proxy) => self.remove_at(proxy, vec![(place.namespace.clone(), id, key.to_owned())]),
            None => {
                let (this, snapshotter) = (self.clone(), Snapshotter::parse(&place.snapshotter)?);
                tokio::spawn(async move { this.remove_folders(vec![(snapshotter, id)]).await });
            }
        }
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

    /// Deletes a folder with the number of a snapshot whose row could not be written.
    pub(super) async fn remove_unrecorded(&self, folder: PathBuf) -> Result<()> {
        let aside = self.set_aside(vec![folder]).await?;
        self.delete(aside).await;
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
                self.has_left.store(true, Ordering::Relaxed);
                warn!(folder:% = folder.display(), error = error.chain(); "cannot delete the files of a removed snapshot; a later collection tries again");
            }
        }
    }
}

#[async_trait::async_trait]
impl Snapshotters for Snapshots {
    async fn remove_files(&self, removed: Vec<(Node, i64)>, scan: Scan) {
        let name = |node: &Node| node.kind.strip_prefix("snapshots/").unwrap_or_default().to_owned();
        for proxy in self.proxies() {
            let of_it: Vec<_> = removed.iter().filter(|(node, _)| name(node) == proxy.plugin.name).cloned().collect();
            if !of_it.is_empty() {
                self.remove_at(proxy, of_it.into_iter().map(|(node, number)| (node.namespace, number, node.id)).collect());
            }
        }
        let known = |(node, id): (Node, i64)| Some((Snapshotter::parse(&name(&node)).ok()?, id));
        self.remove_folders(removed.into_iter().filter_map(known).collect()).await;
        if scan == Scan::Known {
            return;
        }
        for proxy in self.proxies() {
            let (this, proxy) = (self.clone(), proxy.clone());
            tokio::spawn(async move {
                if let Err(error) = this.cleanup_at(&proxy).await {
                    warn!(error = error.chain(); "cannot look for snapshots without a row");
                    this.has_left.store(true, Ordering::Relaxed);
                }
            });
        }
        for snapshotter in Snapshotter::ALL {
            if let Err(error) = self.cleanup(snapshotter).await {
                warn!(snapshotter = snapshotter.name(), error = error.chain(); "cannot look for folders without a snapshot");
                self.has_left.store(true, Ordering::Relaxed);
            }
        }
    }

    fn take_left(&self) -> bool {
        self.has_left.swap(false, Ordering::Relaxed)
    }
}

/// Folders that are renamed while no snapshot is made.
const BATCH: usize = 64;
