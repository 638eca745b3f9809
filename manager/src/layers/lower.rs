//! The layers below an overlay's upper folder, as they are seen together.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags, Stat, fstat, openat};

use super::tree::{self, Found};
use super::{OnFile as _, Result};

/// Folders of lower layers, the uppermost first.
#[derive(Debug, Default)]
pub(crate) struct Lowers {
    roots: Vec<OwnedFd>,
}

/// What the lower layers have under a path.
#[derive(Debug)]
pub(super) enum Below {
    Absent,
    /// The uppermost of its folders.
    Folder(OwnedFd, Stat),
    /// The folder that it is in, open, and the link's target.
    Symlink(Vec<u8>),
    /// The folder that it is in, open.
    Other(OwnedFd, Stat),
}

impl Lowers {
    /// Those of an overlay's `lowerdir` option.
    pub(crate) fn open(paths: &[PathBuf]) -> Result<Self> {
        let open = |path: &PathBuf| tree::open_root(path).file("open lower folder", path.as_os_str().as_encoded_bytes());
        Ok(Self { roots: paths.iter().map(open).collect::<Result<_>>()? })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.roots.is_empty()
    }

    /// The names in the roots of all layers, whiteouts included.
    pub(super) fn root_names(&self) -> rustix::io::Result<Vec<Vec<u8>>> {
        let mut all = Vec::new();
        for root in &self.roots {
            all.extend(tree::names(root.as_fd())?);
        }
        all.sort();
        all.dedup();
        Ok(all)
    }

    /// What is seen under a path, none of whose folders is a link.
    pub(super) fn find(&self, path: &[Vec<u8>]) -> rustix::io::Result<Below> {
        let Some((last, folders)) = path.split_last() else { return Ok(Below::Absent) };
        'layers: for root in &self.roots {
            let mut folder = openat(root, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
            let mut hides_lower = false;
            for name in folders {
                match tree::look(folder.as_fd(), name)? {
                    Found::Absent if hides_lower => return Ok(Below::Absent),
                    Found::Absent => continue 'layers,
                    Found::Folder(_) => folder = tree::open_folder(folder.as_fd(), name)?,
                    Found::Symlink(_) | Found::Whiteout | Found::Other(_) => return Ok(Below::Absent),
                }
                hides_lower |= tree::is_opaque(folder.as_fd());
            }
            match tree::look(folder.as_fd(), last)? {
                Found::Absent if hides_lower => return Ok(Below::Absent),
                Found::Absent => {}
                Found::Whiteout => return Ok(Below::Absent),
                Found::Folder(stat) => return Ok(Below::Folder(tree::open_folder(folder.as_fd(), last)?, stat)),
                Found::Symlink(_) => return Ok(Below::Symlink(tree::link_target(folder.as_fd(), last)?)),
                Found::Other(stat) => return Ok(Below::Other(folder, stat)),
            }
        }
        Ok(Below::Absent)
    }

    /// Owner, mode, attributes of the root that is seen.
    pub(super) fn root(&self) -> rustix::io::Result<Option<Stat>> {
        self.roots.first().map(fstat).transpose()
    }
}
