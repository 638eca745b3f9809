//! Files of blobs that are at a proxy: what was written or fetched lately, so that a client that reads by small pieces does not fetch a blob for
//! each. They have no names, and are gone with this process.
//!
//! **Invariant:** the bytes of each were hashed, here, and are those of its digest.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Digest, lock};
use crate::error::{IoContext as _, Result};

/// The files, the one that was used last at the end.
#[derive(Debug, Default)]
pub(super) struct Near {
    all: Mutex<VecDeque<Kept>>,
    /// Whether a task closes what is not used.
    is_watched: AtomicBool,
}

#[derive(Debug)]
struct Kept {
    digest: Digest,
    file: Arc<File>,
    size: u64,
    used: Instant,
}

impl Near {
    /// The file of a blob, to be opened again.
    pub(super) fn get(&self, digest: &Digest, size: u64) -> Option<Arc<File>> {
        let mut all = lock(&self.all);
        let index = all.iter().position(|kept| kept.digest == *digest && kept.size == size)?;
        let mut kept = all.remove(index)?;
        kept.used = Instant::now();
        let file = Arc::clone(&kept.file);
        all.push_back(kept);
        Some(file)
    }

    /// Keeps a file for a while; those that were not used for the longest make room.
    pub(super) fn put(self: &Arc<Self>, digest: &Digest, file: Arc<File>, size: u64) {
        self.add(digest, file, size);
        if self.is_watched.swap(true, Ordering::Relaxed) {
            return;
        }
        let this = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                let Some(pause) = this.upgrade().and_then(|near| near.expire()) else { return };
                tokio::time::sleep(pause).await;
            }
        });
    }

    fn add(&self, digest: &Digest, file: Arc<File>, size: u64) {
        let mut all = lock(&self.all);
        all.retain(|kept| kept.digest != *digest);
        all.push_back(Kept { digest: digest.clone(), file, size, used: Instant::now() });
        let mut bytes: u64 = all.iter().map(|kept| kept.size).sum();
        // the last one stays, whatever its size: it is being read
        while all.len() > 1 && (all.len() > MOST_FILES || bytes > MOST_BYTES) {
            bytes -= all.pop_front().map_or(0, |kept| kept.size);
        }
    }

    /// Closes those that were not used for a while, and returns when to look again, if any is left.
    fn expire(&self) -> Option<Duration> {
        let mut all = lock(&self.all);
        all.retain(|kept| kept.used.elapsed() < KEPT);
        // under the lock: what is added from now on starts a task
        self.is_watched.store(!all.is_empty(), Ordering::Relaxed);
        all.front().map(|kept| KEPT.saturating_sub(kept.used.elapsed()))
    }

    /// Closes the file of a blob.
    pub(super) fn forget(&self, digest: &Digest) {
        lock(&self.all).retain(|kept| kept.digest != *digest);
    }

    /// Closes all.
    pub(super) fn clear(&self) {
        lock(&self.all).clear();
    }
}

/// Opens a file once more, to read it from its beginning, though it has no name. Blocks.
pub(super) fn blocking_reopen(file: &File, path: &Path) -> Result<File> {
    let link = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    File::open(link).on("open", path)
}

/// Bytes of all files together, but for the last one.
const MOST_BYTES: u64 = 1 << 30;
/// Each is a descriptor.
const MOST_FILES: usize = 64;
/// How long a file is kept that is not used.
const KEPT: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_were_not_used_for_the_longest_make_room() {
        let (near, file) = (Near::default(), Arc::new(File::open("/dev/null").expect("a file")));
        let digests: Vec<_> = (0..=MOST_FILES).map(|number| Digest::of_bytes(number.to_string().as_bytes())).collect();
        for digest in &digests[..MOST_FILES] {
            near.add(digest, Arc::clone(&file), 1);
        }
        assert!(near.get(&digests[0], 1).is_some() && near.get(&digests[0], 2).is_none());
        near.add(&digests[MOST_FILES], Arc::clone(&file), 1);
        assert!(near.get(&digests[0], 1).is_some() && near.get(&digests[1], 1).is_none());
        near.add(&digests[1], Arc::clone(&file), MOST_BYTES + 1);
        assert!(near.get(&digests[1], MOST_BYTES + 1).is_some() && near.get(&digests[0], 1).is_none());
        assert!(near.expire().is_some());
        near.forget(&digests[1]);
        assert_eq!((near.expire(), Arc::strong_count(&file)), (None, 1));
    }
}
