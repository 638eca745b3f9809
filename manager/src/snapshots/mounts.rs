//! How a snapshot is mounted by its client, which may be in another mount namespace: paths are absolute.

use std::path::Path;

use containerd_client::services::v1::snapshots::Kind;
use containerd_client::types::Mount;

use super::folders::{WORK, blocking_note_implicit};
use super::{Chain, Snapshots, Snapshotter, idmap};
use crate::error::{Error, IoContext as _, Result};

impl Snapshots {
    /// Errors: a folder is gone.
    pub(super) fn blocking_mounts(&self, snapshotter: Snapshotter, key: &str, chain: &Chain) -> Result<Vec<Mount>> {
        let (own, is_view) = (chain.snapshot.id, chain.snapshot.info.kind() == Kind::View);
        let upper = self.tree(snapshotter, own);
        let lowers: Vec<_> = chain.parents.iter().map(|id| self.tree(snapshotter, *id)).collect();
        for tree in [&upper].into_iter().chain(&lowers) {
            if !tree.is_dir() {
                return Err(gone(key, tree));
            }
        }
        let maps = idmap::options(&chain.snapshot.info.labels);
        let bind = |source: &Path, mode: &str| Mount {
            r#type: "bind".to_owned(),
            source: source.display().to_string(),
            target: String::new(),
            options: [&maps[..], &[mode.to_owned(), "rbind".to_owned()]].concat(),
        };
        Ok(vec![match (snapshotter, &lowers[..]) {
            (Snapshotter::Native, [parent, ..]) if is_view => bind(parent, "ro"),
            (Snapshotter::Native, _) | (Snapshotter::Overlayfs, []) => bind(&upper, if is_view { "ro" } else { "rw" }),
            // an overlay has at least two
            (Snapshotter::Overlayfs, [parent]) if is_view => bind(parent, "ro"),
            (Snapshotter::Overlayfs, _) => {
                let mut options = maps;
                if Path::new(INDEX_PARAMETER).exists() {
                    // an upper folder may be mounted over other lower ones, and lower ones by several at once
                    options.push("index=off".to_owned());
                }
                if !is_view {
                    options.push(format!("workdir={}", self.folder(snapshotter, own).join(WORK).display()));
                    options.push(format!("upperdir={}", upper.display()));
                }
                let lowers: Vec<_> = lowers.iter().map(|lower| lower.display().to_string()).collect();
                options.push(format!("lowerdir={}", lowers.join(":")));
                Mount { r#type: "overlay".to_owned(), source: "overlay".to_owned(), target: String::new(), options }
            }
        }])
    }

    /// Whether a folder is the tree of an overlay's snapshot: whiteouts in it are those of overlayfs even if it has no parent, since it may get
    /// one when it is committed.
    pub(crate) fn is_upper(&self, tree: &Path) -> bool {
        self.folder_of_upper(tree).is_some()
    }

    fn folder_of_upper<'t>(&self, tree: &'t Path) -> Option<&'t Path> {
        let folder = tree.parent()?;
        let is_ours = tree.file_name()? == super::folders::FS && folder.parent()? == self.base(Snapshotter::Overlayfs);
        is_ours.then_some(folder)
    }

    /// Before a layer is applied to the tree of an overlay's snapshot: its commit learns from then on what cannot be written to the disk.
    pub(crate) fn blocking_begin(&self, tree: &Path) -> Result<()> {
        if self.is_upper(tree) {
            self.written.keep(tree, std::fs::File::open(tree).on("open", tree)?);
        }
        Ok(())
    }

    /// Records for the commit of the snapshot which folders a layer had no entries for, that was applied without knowing the layers below.
    pub(crate) fn blocking_note(&self, tree: &Path, implicit: &[Vec<u8>]) -> Result<()> {
        self.folder_of_upper(tree).map_or(Ok(()), |folder| blocking_note_implicit(folder, implicit))
    }
}

/// What to do about a folder that is gone.
pub(super) fn gone(key: &str, tree: &Path) -> Error {
    let tree = tree.display();
    Error::Precondition(format!(
        "snapshot {key} cannot be mounted: its folder {tree} is gone; remove the snapshots that need it, and pull or unpack the image again"
    ))
}

/// There where the kernel's overlayfs has the option.
const INDEX_PARAMETER: &str = "/sys/module/overlay/parameters/index";
