//! Unpacking: the layers of an image become a chain of snapshots, also while their bytes still arrive.
//!
//! ```text
//! manifest, config ─▶ plan ─▶ each layer: waits for its bytes ─▶ inflated, hashed, written to a folder of its own (several at once)
//!                                                                        │ its diffID is the config's
//!                         all done: folders put on each other ─▶ one syncfs ─▶ one transaction: rows, labels ─▶ Unpacked
//! ```
//! A layer needs nothing of the ones below until its folder is put on them. No row is written before that: a crash, an error or a caller that
//! leaves leaves only folders without a row, which are removed at once, or by the next start.
//!
//! **Invariants:** a chain ID stands for layers whose diffIDs were computed from their bytes. One caller unpacks a chain at a time; others
//! that want it wait for it. When the caller no longer waits, the work ends at its next buffer.

use std::collections::HashMap;
use std::sync::Arc;

use crate::content::Digest;
use crate::error::{Error, Result};
use crate::name::Namespace;
use crate::snapshots::Snapshotter;

/// Which image to unpack, and how.
#[derive(Debug, Clone)]
pub(crate) struct Unpack {
    pub(crate) namespace: Namespace,
    pub(crate) snapshotter: Snapshotter,
    /// Of the image's manifest for one platform: an image manifest, not an index. It and its config must be in the content store.
    pub(crate) manifest: Digest,
    /// Of each new snapshot.
    pub(crate) labels: HashMap<String, String>,
    /// Holds the snapshots, if it is named.
    pub(crate) lease: Option<String>,
    /// Whether layers that are not in the content store may still arrive. They are waited for until the caller leaves: it fetches them at the
    /// same time (`try_join!`), with [`crate::content::Opening::expected`] set, so that their bytes are read while they arrive.
    pub(crate) waits: bool,
}

/// What happens to a layer; given to a function that must not block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Of the layer's blob.
    pub(crate) layer: Digest,
    /// Of the layer and those below it: its snapshot's key.
    pub(crate) chain: Digest,
    pub(crate) step: Step,
}

/// What has become of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Its snapshot was there.
    Exists,
    /// So many bytes of the blob are unpacked, of a blob of `of` bytes.
    Unpacking { bytes: u64, of: u64 },
    /// All of it is unpacked; its snapshot is not recorded yet.
    Unpacked,
    /// Its snapshot is recorded, and survives a loss of power.
    Recorded,
}

/// Receives the progress.
pub(crate) type OnProgress = Arc<dyn Fn(Progress) + Send + Sync>;

/// An unpacked image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unpacked {
    pub(crate) config: Digest,
    /// The key of its uppermost snapshot; none for an image without layers. The config has the label `containerd.io/gc.ref.snapshot.NAME` with
    /// it, and each layer's blob `containerd.io/uncompressed`.
    pub(crate) chain: Option<Digest>,
    /// Layers whose snapshots were not there.
    pub(crate) new_layers: usize,
}

/// Unpacks images; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Unpacker {}

impl Unpacker {
    /// Unpacks an image that is in the content store, or arrives there meanwhile. Called again, it finds everything done.
    ///
    /// Errors: [`Error::NotFound`] for a blob that is not there; [`Error::Invalid`] for a manifest, config or layer that cannot be unpacked, with
    /// its digest; [`Error::Precondition`] when a layer's diffID is not the config's.
    pub(crate) async fn unpack(&self, image: Unpack, on_progress: OnProgress) -> Result<Unpacked> {
        let _ = (image, on_progress);
        Err(Error::Unimplemented("unpacking of images".to_owned()))
    }
}
