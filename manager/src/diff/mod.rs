//! Layers between content and mounts: applied to what a snapshotter says how to mount, and created from two such.
//!
//! ```text
//! overlay with an upper folder ─▶ straight into that, whiteouts as overlayfs has them
//! bind mount                   ─▶ straight into its source
//! anything else                ─▶ mounted, where only the thread that works on it sees it
//! ```
//! **Invariant:** when a caller no longer waits, the work ends at its next buffer; nothing stays mounted, whatever happens.

mod blobs;
mod mount;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use containerd_client::types::Mount;
use log::debug;

pub(crate) use blobs::NewBlob;
pub(crate) use mount::one as blocking_mount;

use crate::content::{Content, Digest};
use crate::error::{Error, IoContext as _, Result};
use crate::images::ahead::adopt::Upper;
use crate::layers::{self, Applied, Cancel, Change, Compression, Created, LayerError, LayerLimits, Lowers, Source, Target, Times};
use crate::name::Namespace;
use crate::pools::Pool;
use crate::snapshots::{Snapshots, in_own_mounts};
use mount::Layout;

/// Applies and creates layers; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Differ {
    pub(crate) snapshots: Snapshots,
    pub(crate) content: Arc<Content>,
    pub(crate) pool: Pool,
    pub(crate) limits: LayerLimits,
    /// Where mount points are made.
    pub(crate) state: PathBuf,
}

impl Differ {
    /// Applies a layer, compressed or not, to what the mounts show; with `syncs`, it survives a loss of power then.
    pub(crate) async fn apply(&self, namespace: &Namespace, digest: &Digest, mounts: Vec<Mount>, syncs: bool) -> Result<Applied> {
        let blob = self.content.read(namespace, digest).await?;
        let (this, cancel) = (self.clone(), Cancel::default());
        let _ends_with_caller = cancel.guard();
        let begin = Instant::now();
        let (blob, mounts) = (Arc::new(blob), Arc::new(mounts));
        let applied = loop {
            let (this, blob, mounts, cancel) = (this.clone(), Arc::clone(&blob), Arc::clone(&mounts), cancel.clone());
            match self.pool.run(move || this.blocking_apply(blob.file(), &mounts, syncs, &cancel)).await? {
                // It may be ending: a process that another has replaced cancels its own. No thread waits for that.
                Err(Error::Layer(LayerError::Busy)) if begin.elapsed() < PATIENCE => tokio::time::sleep(PAUSE).await,
                applied => break applied?,
            }
        };
        debug!(digest:%, bytes = applied.bytes, compression:? = applied.compression, took:? = begin.elapsed(); "layer applied");
        Ok(applied)
    }

    /// The empty folder that a layer is to be applied to, if it is the upper folder of a snapshot here.
    pub(crate) fn upper(&self, mounts: &[Mount]) -> Option<Upper> {
        if mount::is_mapped(mounts) {
            // its files have other owners
            return None;
        }
        match Layout::of(mounts) {
            Layout::Upper { upper, lowers } => Some(Upper { tree: upper.to_owned(), below: Some(lowers) }),
            Layout::Folder { path, is_read_only: false } => Some(Upper { tree: path.to_owned(), below: None }),
            Layout::Folder { .. } | Layout::Other => None,
        }
        .filter(|upper| self.snapshots.is_upper(&upper.tree))
    }

    /// Writes what differs between two mounts.
    fn blocking_diff(
        &self,
        left: &[Mount],
        right: &[Mount],
        mut sink: impl Write + Send,
        compression: Compression,
        times: Times,
        cancel: &Cancel,
    ) -> Result<Created> {
        self.blocking_create(left, right, &mut |source| match layers::create(&mut sink, source, compression, times, cancel)? {
            Change::Written(created) => Ok(created),
            Change::NeedsMount => Err(Error::Precondition(
                "the snapshot was written to by an overlay with redirect_dir or metacopy, which this kernel does not have on now"
                    .to_owned(),
            )),
        })
    }

    fn blocking_apply(&self, blob: &File, mounts: &[Mount], syncs: bool, cancel: &Cancel) -> Result<Applied> {
        if mount::is_mapped(mounts) {
            let [.., point] = &mount::points::<3>(&self.state)?;
            return in_own_mounts(|| {
                let mounts = mount::unmapped(mounts, point)?.unwrap_or_default();
                self.blocking_apply(blob, &mounts, syncs, cancel)
            });
        }
        let sync = |path: &Path| {
            if !syncs {
                return Ok(());
            }
            let folder = File::open(path).on("open", path)?;
            rustix::fs::syncfs(&folder).map_err(std::io::Error::from).on("write back", path)
        };
        match Layout::of(mounts) {
            Layout::Upper { upper, lowers } => {
                self.snapshots.blocking_begin(upper)?;
                let applied = layers::apply(blob, Target::Upper(upper, Lowers::open(&lowers)?), self.limits, cancel)?;
                sync(upper)?;
                Ok(applied)
            }
            Layout::Folder { path, is_read_only: true } => {
                Err(Error::Invalid(format!("a layer cannot be applied to {}, which is mounted read-only", path.display())))
            }
            // it may get parents when it is committed
            Layout::Folder { path, .. } if self.snapshots.is_upper(path) => {
                self.snapshots.blocking_begin(path)?;
                let applied = layers::apply(blob, Target::Upper(path, Lowers::default()), self.limits, cancel)?;
                self.snapshots.blocking_note(path, &applied.implicit)?;
                sync(path)?;
                Ok(applied)
            }
            Layout::Folder { path, .. } => {
                let applied = layers::apply(blob, Target::Merged(path), self.limits, cancel)?;
                sync(path)?;
                Ok(applied)
            }
            Layout::Other => {
                let [point] = &mount::points(&self.state)?;
                in_own_mounts(|| {
                    mount::all(mounts, point)?;
                    let applied = layers::apply(blob, Target::Merged(point), self.limits, cancel)?;
                    sync(point)?;
                    Ok(applied)
                })
            }
        }
    }

    fn blocking_create(
        &self,
        left: &[Mount],
        right: &[Mount],
        create: &mut (dyn FnMut(&Source<'_>) -> Result<Created> + Send),
    ) -> Result<Created> {
        if mount::is_mapped(right) {
            let [.., point] = &mount::points::<3>(&self.state)?;
            return in_own_mounts(|| {
                let right = mount::unmapped(right, point)?.unwrap_or_default();
                self.blocking_create(left, &right, create)
            });
        }
        let below = |layout: &Layout<'_>| match layout {
            Layout::Folder { path, .. } => vec![(*path).to_owned()],
            // it has what is in its upper folder too
            Layout::Upper { .. } => Vec::new(),
            Layout::Other => mount::lowers(left),
        };
        match (Layout::of(left), Layout::of(right)) {
            (layout, Layout::Upper { upper, lowers }) if below(&layout) == lowers && !mount::may_redirect(right) => {
                create(&Source::Upper(upper, Lowers::open(&lowers)?))
            }
            (Layout::Folder { path: left, .. }, Layout::Folder { path: right, .. }) => create(&Source::Trees(Some(left), right)),
            (Layout::Other, Layout::Folder { path: right, .. }) if left.is_empty() => create(&Source::Trees(None, right)),
            _ => {
                let [first, second] = &mount::points(&self.state)?;
                in_own_mounts(|| {
                    let before = if left.is_empty() { None } else { Some(first.as_path()) };
                    if before.is_some() {
                        mount::all(left, first)?;
                    }
                    mount::all(right, second)?;
                    create(&Source::Trees(before, second))
                })
            }
        }
    }
}

/// For another layer that is applied to the same folder.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);
