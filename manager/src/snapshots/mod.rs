//! Snapshots: folders that overlay mounts are made of, and their rows.
//!
//! ```text
//! Prepare ─▶ active ──Commit──▶ committed ◀─parent─ others        ROOT/io.containerd.snapshotter.v1.overlayfs/snapshots/N/{fs,work}
//! View ────▶ view      │           │                              ROOT/io.containerd.snapshotter.v1.native/snapshots/N
//!              └───────┴── Remove ─┴─▶ row removed ─▶ folder renamed aside ─▶ folder deleted
//! ```
//! A folder is there before its row and goes after it: what a crash leaves is a folder without a row, which [`Snapshots::cleanup`] removes.
//!
//! **Invariants:** no number is used for two snapshots. A committed snapshot's files are on the disk before its row says so. Work on files is
//! done in a pool; removal, which may take long, in one of its own.

mod change;
mod commit;
mod draft;
mod folders;
mod found;
mod idmap;
mod mounts;
mod overlay;
mod prepare;
mod proxied;
mod proxy;
mod quota;
mod removal;
#[cfg(test)]
mod tests;
mod written;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use containerd_client::services::v1::snapshots::{Info, Kind};
use containerd_client::types::Mount;
use tokio::sync::RwLock;

pub(crate) use change::Change;
pub(crate) use commit::Commit;
pub(crate) use draft::{Draft, NewLayer, blocking_settle, blocking_usage};
pub(crate) use idmap::{Maps, is_map};
pub(crate) use overlay::{blocking_mapped, in_own_mounts};
pub(crate) use prepare::New;

use crate::error::{Error, Object, Result};
use crate::gate::Gate;
use crate::layers::{self, Beneath, Cancel};
use crate::pools::Pool;
use crate::settings::ProxyPlugin;
use crate::store::snapshots::{Place, Snapshot, Usage};
use crate::store::{self, Meta, Store};

/// How snapshots are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Snapshotter {
    /// A folder for what differs from the parent.
    Overlayfs,
    /// A copy of everything: for file systems without overlays.
    Native,
}

impl Snapshotter {
    /// All of them.
    pub(crate) const ALL: [Self; 2] = [Self::Overlayfs, Self::Native];

    /// What clients call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Native => "native",
        }
    }

    /// Whether a snapshot can get its parent when it is committed.
    pub(crate) fn can_rebase(self) -> bool {
        self == Self::Overlayfs
    }

    /// The one of that name.
    ///
    /// Errors: there is none.
    pub(crate) fn parse(name: &str) -> Result<Self> {
        if name.is_empty() {
            return Err(Error::Invalid("snapshotter argument missing".to_owned()));
        }
        let found = Self::ALL.into_iter().find(|snapshotter| snapshotter.name() == name);
        found.ok_or_else(|| Error::Invalid(format!("snapshotter not loaded: {}", name.chars().take(100).collect::<String>())))
    }
}

/// All snapshots; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Snapshots {
    store: Store,
    gate: Gate,
    root: PathBuf,
    /// Work on files that a call waits for.
    files: Pool,
    /// Walks through trees that are in use: none that is quicker waits for one.
    usage: Pool,
    /// Copies of trees.
    copies: Pool,
    /// Deletion of files.
    removal: Pool,
    /// Held from the naming of a folder until its row is written; exclusively while folders are looked for that have none.
    naming: Arc<RwLock<()>>,
    /// Folders that have no number yet.
    making: folders::Making,
    /// Kept until a snapshot is committed.
    written: written::Written,
    /// Snapshots that are being committed.
    committing: commit::Committing,
    /// Whether files could not be removed.
    has_left: Arc<AtomicBool>,
    /// Snapshotters that other processes serve.
    proxies: proxy::Proxies,
    /// Why overlays cannot be used here.
    overlay_error: Option<Arc<str>>,
    /// Why their lower folders cannot be id-mapped.
    remap_error: Option<Arc<str>>,
}

/// A snapshot's folder, and those of its parents, the nearest first.
#[derive(Debug, Clone)]
struct Chain {
    snapshot: Snapshot,
    parents: Vec<i64>,
}

impl Snapshots {
    /// Those below `root`; folders are made, and it is tried whether overlays can be mounted there.
    pub(crate) fn open(root: &Path, store: Store, gate: Gate, files: Pool, removal: Pool) -> Result<Self> {
        let mut snapshots = Self {
            store,
            gate,
            root: root.to_owned(),
            files,
            usage: Pool::new("usage", 1),
            copies: Pool::new("copies", 1),
            removal,
            naming: Arc::default(),
            making: folders::Making::default(),
            written: written::Written::default(),
            committing: commit::Committing::default(),
            has_left: Arc::default(),
            proxies: proxy::Proxies::default(),
            overlay_error: None,
            remap_error: None,
        };
        for snapshotter in Snapshotter::ALL {
            folders::blocking_make_base(&snapshots.base(snapshotter))?;
        }
        snapshots.overlay_error = overlay::blocking_probe(&snapshots.base(Snapshotter::Overlayfs)).err().map(Into::into);
        snapshots.remap_error = match &snapshots.overlay_error {
            Some(why) => Some(Arc::clone(why)),
            None => overlay::blocking_probe_maps(&snapshots.base(Snapshotter::Overlayfs)).err().map(Into::into),
        };
        Ok(snapshots)
    }

    /// Has pools of their own measure trees that are in use, and copy trees.
    pub(crate) fn with_pools(self, usage: Pool, copies: Pool) -> Self {
        Self { usage, copies, ..self }
    }

    /// Also uses snapshotters of other processes.
    pub(crate) fn with_proxies(self, plugins: &[ProxyPlugin]) -> Self {
        Self { proxies: proxy::all(plugins), ..self }
    }

    /// Why a snapshotter cannot be used, if so.
    pub(crate) fn unusable(&self, snapshotter: Snapshotter) -> Option<&str> {
        match snapshotter {
            Snapshotter::Overlayfs => self.overlay_error.as_deref(),
            Snapshotter::Native => None,
        }
    }

    fn check_usable(&self, snapshotter: Snapshotter) -> Result<()> {
        let why = self.unusable(snapshotter);
        why.map_or(Ok(()), |why| Err(Error::Precondition(format!("snapshotter {} cannot be used: {why}", snapshotter.name()))))
    }

    /// Why a snapshotter cannot make id-mapped snapshots, if so.
    pub(crate) fn cannot_remap(&self, snapshotter: Snapshotter) -> Option<&str> {
        match snapshotter {
            Snapshotter::Overlayfs => self.remap_error.as_deref(),
            Snapshotter::Native => Some("it copies files as they are"),
        }
    }

    /// What clients see of one.
    pub(crate) async fn stat(&self, place: &Place, key: &str) -> Result<Info> {
        let (place, key) = (place.clone(), key.to_owned());
        Ok(self.store.read(move |db| existing(db, &place, &key)).await?.info)
    }

    /// How an active one or a view is mounted.
    pub(crate) async fn mounts(&self, place: &Place, key: &str) -> Result<Vec<Mount>> {
        if let Some(proxy) = self.proxy(&place.snapshotter) {
            return self.mounts_at(proxy, place, key).await;
        }
        let chain = self.chain(place, key).await?;
        if chain.snapshot.info.kind() == Kind::Committed {
            return Err(Error::Precondition(format!("requested snapshot {key} not active or view")));
        }
        self.mounts_of(Snapshotter::parse(&place.snapshotter)?, key, chain).await
    }

    /// What one uses, without its parents: of a committed one as it was recorded then. Of an active one its files are counted, until the
    /// caller does not wait any more.
    pub(crate) async fn usage(&self, place: &Place, key: &str) -> Result<Usage> {
        if let Some(proxy) = self.proxy(&place.snapshotter) {
            return self.usage_at(proxy, place, key).await;
        }
        let (at, wanted) = (place.clone(), key.to_owned());
        let snapshot = self.store.read(move |db| existing(db, &at, &wanted)).await?;
        if snapshot.info.kind() != Kind::Active {
            return Ok(snapshot.usage.unwrap_or_default());
        }
        let snapshotter = Snapshotter::parse(&place.snapshotter)?;
        if snapshotter == Snapshotter::Overlayfs && snapshot.info.labels.contains_key(quota::LABEL) {
            let (folder, id) = (self.folder(snapshotter, snapshot.id), snapshot.id);
            // the label may have come later
            if let Some(counted) = self.files.run(move || quota::blocking_usage(&folder, id)).await?? {
                return Ok(counted);
            }
        }
        let tree = self.tree(snapshotter, snapshot.id);
        let cancel = Cancel::default();
        let _ends_with_caller = cancel.guard();
        let measured = self.usage.run(move || layers::measure(&tree, Beneath::Known, &cancel)).await??;
        Ok(Usage { bytes: measured.bytes, inodes: measured.inodes })
    }

    async fn chain(&self, place: &Place, key: &str) -> Result<Chain> {
        let (place, key) = (place.clone(), key.to_owned());
        self.store.read(move |db| chain(db, &place, &key)).await
    }

    /// The folder of a snapshotter.
    pub(crate) fn root_of(&self, snapshotter: Snapshotter) -> PathBuf {
        self.root.join(format!("io.containerd.snapshotter.v1.{}", snapshotter.name()))
    }

    /// Where the folders of its snapshots are.
    fn base(&self, snapshotter: Snapshotter) -> PathBuf {
        self.root_of(snapshotter).join("snapshots")
    }

    fn folder(&self, snapshotter: Snapshotter, id: i64) -> PathBuf {
        self.base(snapshotter).join(id.to_string())
    }

    /// The folder with a snapshot's files.
    fn tree(&self, snapshotter: Snapshotter, id: i64) -> PathBuf {
        folders::tree_in(snapshotter, &self.folder(snapshotter, id))
    }
}

fn not_found(key: &str) -> Error {
    Error::NotFound(Object::NoSnapshot(key.to_owned()))
}

fn existing(db: &Meta<'_>, place: &Place, key: &str) -> Result<Snapshot> {
    store::snapshots::get(db, place, key)?.ok_or_else(|| not_found(key))
}

fn chain(db: &Meta<'_>, place: &Place, key: &str) -> Result<Chain> {
    let snapshot = existing(db, place, key)?;
    let parents = match snapshot.parent_id {
        Some(parent) => store::snapshots::chain(db, parent)?,
        None => Vec::new(),
    };
    Ok(Chain { snapshot, parents })
}

/// A parent, which must be committed.
fn parent(db: &Meta<'_>, place: &Place, name: &str) -> Result<Snapshot> {
    let parent = store::snapshots::get(db, place, name)?;
    let parent = parent.ok_or_else(|| Error::NotFound(Object::ParentSnapshot(name.to_owned())))?;
    if parent.info.kind() != Kind::Committed {
        return Err(Error::Invalid(format!("parent {name:?} is not committed snapshot")));
    }
    Ok(parent)
}
