//! Which descriptors learn that a snapshot's files could not be written to the disk.
//!
//! The kernel reports such an error once to each descriptor that was open by then, and to the next that asks: if that is another snapshot's
//! commit, one opened later learns nothing. So one is opened before a layer is applied, and kept until its snapshot is committed.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// By the snapshot's tree.
#[derive(Debug, Clone, Default)]
pub(super) struct Written(Arc<Mutex<HashMap<PathBuf, File>>>);

impl Written {
    /// Keeps a descriptor that was open before the tree was written to, if there is none yet.
    pub(super) fn keep(&self, tree: &Path, since: File) {
        let mut all = self.lock();
        if all.len() < MOST {
            all.entry(tree.to_owned()).or_insert(since);
        }
    }

    /// It, if there is one.
    pub(super) fn take(&self, tree: &Path) -> Option<File> {
        self.lock().remove(tree)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PathBuf, File>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Snapshots that a layer is applied to and that are neither committed nor removed.
const MOST: usize = 1024;
