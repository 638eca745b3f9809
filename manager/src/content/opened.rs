//! Blobs that clients read on: Docker reads a blob by a call for every 32 KiB.
//!
//! **Invariants:** a blob is given out only while its row exists: code that removes a row calls [`Opened::clear`] before it answers. A client that begins anew opens
//! the file anew. What clients have left unread holds a few descriptors, until something is removed.

use std::collections::VecDeque;
use std::sync::Mutex;

use super::{Blob, Digest, lock};
use crate::name::Namespace;

/// Those that were read last, up to where.
#[derive(Debug, Default)]
pub(super) struct Opened(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// How often rows were removed.
    removals: u64,
    blobs: VecDeque<Reading>,
}

#[derive(Debug)]
struct Reading {
    namespace: Namespace,
    digest: Digest,
    next: u64,
    blob: Blob,
}

impl Opened {
    /// How often rows were removed; to be asked before one is looked up.
    pub(super) fn removals(&self) -> u64 {
        lock(&self.0).removals
    }

    /// The blob that a client has read up to there.
    pub(super) fn take(&self, namespace: &Namespace, digest: &Digest, offset: u64) -> Option<Blob> {
        let mut inner = lock(&self.0);
        let is_it = |reading: &Reading| reading.next == offset && reading.digest == *digest && reading.namespace == *namespace;
        let place = inner.blobs.iter().position(is_it)?;
        inner.blobs.remove(place).map(|reading| reading.blob)
    }

    /// Keeps a blob for the client that has read it up to there, unless a row was removed since it was looked up.
    pub(super) fn keep(&self, namespace: &Namespace, digest: &Digest, next: u64, blob: Blob) {
        let mut inner = lock(&self.0);
        if blob.removals != inner.removals {
            return;
        }
        if inner.blobs.len() >= MOST {
            inner.blobs.pop_front();
        }
        inner.blobs.push_back(Reading { namespace: namespace.clone(), digest: digest.clone(), next, blob });
    }

    /// Rows, or files, were removed.
    pub(super) fn clear(&self) {
        let mut inner = lock(&self.0);
        inner.removals += 1;
        inner.blobs.clear();
    }
}

/// A client of Docker's reads one at a time.
const MOST: usize = 8;

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::Path;
    use std::sync::Arc;

    use super::*;

    fn blob(opened: &Opened) -> Blob {
        let file = File::open("/dev/null").expect("it is there");
        Blob { file: Arc::new(file), path: Arc::from(Path::new("/dev/null")), size: 100, removals: opened.removals() }
    }

    #[test]
    fn a_blob_is_kept_for_who_reads_on_until_something_is_removed() {
        let (opened, namespace) = (Opened::default(), Namespace::parse("n").expect("a name"));
        let other = Namespace::parse("o").expect("a name");
        let digest = Digest::of_text("a");
        opened.keep(&namespace, &digest, 10, blob(&opened));
        assert!(opened.take(&other, &digest, 10).is_none() && opened.take(&namespace, &digest, 11).is_none());
        assert!(opened.take(&namespace, &Digest::of_text("b"), 10).is_none());
        assert!(opened.take(&namespace, &digest, 10).is_some());
        assert!(opened.take(&namespace, &digest, 10).is_none(), "one client has it");
        let before = blob(&opened);
        opened.keep(&namespace, &digest, 10, blob(&opened));
        opened.clear();
        assert!(opened.take(&namespace, &digest, 10).is_none());
        opened.keep(&namespace, &digest, 10, before);
        assert!(opened.take(&namespace, &digest, 10).is_none(), "its row was looked up before");
        (0..20).for_each(|next| opened.keep(&namespace, &digest, next, blob(&opened)));
        assert_eq!((0..20).filter(|next| opened.take(&namespace, &digest, *next).is_some()).count(), MOST);
    }
}
