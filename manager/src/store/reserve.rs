//! Disk space that is kept for removing things: SQLite writes what it removes to its log first.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use log::warn;
use nix::fcntl::{FallocateFlags, fallocate};

/// A file whose blocks are given up when the disk is full.
#[derive(Debug, Clone)]
pub(super) struct Reserve {
    path: PathBuf,
}

impl Reserve {
    /// The one beside a store; it may not be there yet.
    pub(super) fn beside(store: &Path) -> Self {
        Self { path: store.with_file_name("reserve") }
    }

    /// Makes it unless it is there. On a disk that is full it is made when there is room again.
    pub(super) fn keep(&self) {
        if fs::metadata(&self.path).is_ok_and(|about| about.len() == u64::from(BYTES.unsigned_abs())) {
            return;
        }
        let made = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&self.path).and_then(|file| {
            // a file that is merely long would have no blocks
            fallocate(file, FallocateFlags::empty(), 0, BYTES.into()).map_err(Into::into)
        });
        if made.is_err() {
            let _half_of_it_is_of_no_use = fs::remove_file(&self.path);
        }
    }

    /// Gives it up. False if it was not there.
    pub(super) fn give_up(&self) -> bool {
        let is_given_up = fs::remove_file(&self.path).is_ok();
        if is_given_up {
            warn!(reserve:% = self.path.display(); "the disk of the metadata store is full, its reserve is used to remove things");
        }
        is_given_up
    }
}

/// Twice as much as the log is long when it is moved into the store.
const BYTES: i32 = 2 << 20;
