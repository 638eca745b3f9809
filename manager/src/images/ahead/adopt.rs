//! A client applies a layer that is unpacked already: the draft takes the place of the client's empty folder.

use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::Ahead;
use crate::content::Digest;
use crate::error::{IoContext as _, Result};
use crate::images::unpack::layer::{Extracted, Outcome};
use crate::name::Namespace;
use crate::snapshots::{NewLayer, Snapshots, blocking_settle};

/// What a client finds applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Adopted {
    pub(crate) diff_id: Digest,
    /// Of the uncompressed layer.
    pub(crate) bytes: u64,
}

/// The folder of a client's snapshot that a layer is to be applied to.
#[derive(Debug, Clone)]
pub(crate) struct Upper {
    pub(crate) tree: PathBuf,
    /// The nearest first. None if they are not known yet.
    pub(crate) below: Option<Vec<PathBuf>>,
}

impl Ahead {
    /// Gives a layer that is unpacked ahead, or is being so, to a client's snapshot, if there is one for it.
    pub(crate) async fn adopt(&self, namespace: &Namespace, blob: &Digest, upper: Upper) -> Result<Option<Adopted>> {
        let is_it =
            |job: &super::Job| job.place.namespace == namespace.as_str() && job.plan().layers.iter().any(|layer| layer.blob == *blob);
        let Some(job) = self.job(is_it) else { return Ok(None) };
        let taken = tokio::select! {
            taken = job.take_blob(blob) => taken,
            () = self.0.unpacker.gate.retired() => None,
        };
        let Some(recorded) = taken else { return Ok(None) };
        let Outcome::Extracted(extracted) = recorded.outcome else { return Ok(None) };
        let (diff_id, snapshots) = (recorded.job.layer.diff_id, self.0.unpacker.snapshots.clone());
        let bytes = extracted.bytes;
        let adopt = move || blocking_adopt(&snapshots, *extracted, &upper);
        let is_adopted = self.0.unpacker.layers.run(adopt).await??;
        Ok(is_adopted.then_some(Adopted { diff_id, bytes }))
    }
}

fn blocking_adopt(snapshots: &Snapshots, extracted: Extracted, upper: &Upper) -> Result<bool> {
    if !snapshots.is_upper(&upper.tree) || !is_empty(&upper.tree)? {
        return Ok(false);
    }
    let Extracted { draft, implicit, .. } = extracted;
    let tree = draft.tree();
    draft.is_written_to(&upper.tree)?;
    match &upper.below {
        Some(below) => {
            // measured again, with those below: whiteouts of nothing go
            let mut layer = NewLayer { draft, key: String::new(), labels: [].into(), implicit, usage: None };
            if !blocking_settle(below, &mut layer)? {
                return Ok(false);
            }
            exchange(&tree, &upper.tree)?;
        }
        None => {
            snapshots.blocking_note(&upper.tree, &implicit)?;
            exchange(&tree, &upper.tree)?;
        }
    }
    Ok(true)
}

fn is_empty(folder: &Path) -> Result<bool> {
    Ok(std::fs::read_dir(folder).on("read", folder)?.next().is_none())
}

fn exchange(one: &Path, other: &Path) -> Result<()> {
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).map_err(std::io::Error::from).on("exchange with another folder", one)
}
