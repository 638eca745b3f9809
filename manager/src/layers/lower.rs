//! The layers below an overlay's upper folder, as they are seen together.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{Mode, OFlags, Stat, fstat, openat};

use super::tree::{self, Found};
use super::{OnFile as _, Result};

/// Folders of lower layers, the uppermost first.
#[derive(Debug, Default)]
pub(crate) struct Lowers {
    roots: Vec<OwnedFd>,
    /// What was last found of a path.
    last: Mutex<Option<Last>>,
}

/// A path, and what is seen there.
type Last = (Vec<Vec<u8>>, Seen);

/// Folders of several layers that are seen as one, the uppermost first.
#[derive(Debug, Clone)]
pub(super) struct Seen(Arc<Vec<OwnedFd>>);

impl Seen {
    /// What is seen of a name in it.
    pub(super) fn find(&self, name: &[u8]) -> rustix::io::Result<Below> {
        for folder in &*self.0 {
            match tree::look(folder.as_fd(), name)? {
                Found::Absent => {}
                Found::Whiteout => break,
                Found::Folder(stat) => return Ok(Below::Folder(tree::open_folder(folder.as_fd(), name)?, stat)),
                Found::Symlink(_) => return Ok(Below::Symlink(tree::link_target(folder.as_fd(), name)?)),
                Found::Other(stat) => return Ok(Below::Other(tree::open_folder(folder.as_fd(), b".")?, stat)),
            }
        }
        Ok(Below::Absent)
    }

    /// What is seen in the folder of that name in it.
    pub(super) fn enter(&self, name: &[u8]) -> rustix::io::Result<Self> {
        let mut folders = Vec::new();
        for folder in &*self.0 {
            match tree::look(folder.as_fd(), name)? {
                Found::Absent => {}
                Found::Folder(_) => {
                    let folder = tree::open_folder(folder.as_fd(), name)?;
                    let hides_lower = tree::is_opaque(folder.as_fd());
                    folders.push(folder);
                    if hides_lower {
                        break;
                    }
                }
                Found::Symlink(_) | Found::Whiteout | Found::Other(_) => break,
            }
        }
        Ok(Self(Arc::new(folders)))
    }
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
        Ok(Self { roots: paths.iter().map(open).collect::<Result<_>>()?, last: Mutex::default() })
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
        let Some((last, above)) = path.split_last() else { return Ok(Below::Absent) };
        self.seen(above)?.find(last)
    }

    /// The folders that are seen as one under a path. Files of one folder are looked for one after the other.
    pub(super) fn seen(&self, path: &[Vec<u8>]) -> rustix::io::Result<Seen> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, seen)) = &*last
            && of == path
        {
            return Ok(seen.clone());
        }
        let open = |root: &OwnedFd| openat(root, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let top = Seen(Arc::new(self.roots.iter().map(open).collect::<rustix::io::Result<_>>()?));
        let seen = path.iter().try_fold(top, |seen, name| seen.enter(name))?;
        *last = Some((path.to_vec(), seen.clone()));
        Ok(seen)
    }

    /// Owner, mode, attributes of the root that is seen.
    pub(super) fn root(&self) -> rustix::io::Result<Option<Stat>> {
        self.roots.first().map(fstat).transpose()
    }
}
