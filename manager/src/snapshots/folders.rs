//! Folders of snapshots: made under a name of their own, then named by their number.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Snapshotter;
use crate::error::{IoContext as _, Result};
use crate::layers::copy_tree;

pub(super) fn blocking_make_base(base: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(base).on("make folder", base)?;
    // also what another program made: clients that are root mount what is in there, and no one else has any use for it
    fs::set_permissions(base, fs::Permissions::from_mode(0o700)).on("set mode of", base)
}

/// Folders that are being made by this process: no cleanup removes them.
#[derive(Debug, Clone, Default)]
pub(super) struct Making(Arc<Mutex<HashSet<PathBuf>>>);

impl Making {
    /// Whether a folder is one of them.
    pub(super) fn has(&self, folder: &Path) -> bool {
        self.lock().contains(folder)
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<PathBuf>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A folder under a temporary name.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) path: PathBuf,
    making: Making,
}

impl Made {
    /// Gives its tree another owner; if that fails, removes it.
    pub(super) fn owned_by(self, snapshotter: Snapshotter, owner: Option<(u32, u32)>) -> Result<Self> {
        let Some((uid, gid)) = owner else { return Ok(self) };
        let tree = tree_in(snapshotter, &self.path);
        let changed = std::os::unix::fs::chown(&tree, Some(uid), Some(gid)).on("set owner of", &tree);
        if changed.is_err() {
            // the next cleanup tries again
            let _ = blocking_remove(&self.path);
        }
        changed.map(|()| self)
    }
}

/// Where in its folder a snapshot's files are.
pub(super) fn tree_in(snapshotter: Snapshotter, folder: &Path) -> PathBuf {
    match snapshotter {
        Snapshotter::Overlayfs => folder.join(FS),
        Snapshotter::Native => folder.to_owned(),
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        self.making.lock().remove(&self.path);
    }
}

/// How a new folder gets what its parent has.
#[derive(Clone, Copy)]
pub(super) enum From<'p> {
    /// There is no parent.
    Nothing,
    /// Owner and mode of its tree.
    Attributes(&'p Path),
    /// Everything in it, until the copy is to stop.
    Copy(&'p Path, &'p dyn Fn() -> bool),
}

/// Makes the folder of a snapshot under a temporary name.
pub(super) fn blocking_make(making: &Making, snapshotter: Snapshotter, base: &Path, from: From<'_>) -> Result<Made> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let path = base.join(format!("{NEW}{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
    making.lock().insert(path.clone());
    let made = Made { path, making: making.clone() };
    // of an earlier process with this number
    blocking_remove(&made.path)?;
    if let Err(error) = blocking_fill(snapshotter, &made.path, from) {
        // the next cleanup tries again
        let _ = blocking_remove(&made.path);
        return Err(error);
    }
    Ok(made)
}

fn blocking_fill(snapshotter: Snapshotter, folder: &Path, from: From<'_>) -> Result<()> {
    let make = |path: &Path, mode| {
        DirBuilder::new().mode(mode).create(path).on("make folder", path)?;
        // whatever the umask
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).on("set mode of", path)
    };
    let tree = tree_in(snapshotter, folder);
    if snapshotter == Snapshotter::Overlayfs {
        make(folder, 0o700)?;
        make(&folder.join(WORK), 0o711)?;
    }
    make(&tree, 0o755)?;
    let parent = match from {
        From::Nothing => return Ok(()),
        From::Attributes(parent) => parent,
        From::Copy(parent, stops) => {
            copy_tree(parent, &tree, stops)?;
            parent
        }
    };
    // what is seen of the root is the uppermost layer's
    let about = fs::metadata(parent).on("look at", parent)?;
    let (uid, gid) = (std::os::unix::fs::MetadataExt::uid(&about), std::os::unix::fs::MetadataExt::gid(&about));
    std::os::unix::fs::chown(&tree, Some(uid), Some(gid)).on("set owner of", &tree)?;
    fs::set_permissions(&tree, about.permissions()).on("set mode of", &tree)
}

/// Names a folder by its number. One that is there was made by a process that crashed before it recorded it.
pub(super) fn blocking_name(made: &Path, folder: &Path) -> Result<()> {
    match fs::rename(made, folder) {
        Err(error) if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => {
            blocking_move_aside(folder)?;
            fs::rename(made, folder).on("rename folder to", folder)
        }
        renamed => renamed.on("rename folder to", folder),
    }
}

/// Gives a folder a name that no snapshot has. That there is none is fine.
pub(super) fn blocking_move_aside(folder: &Path) -> Result<Option<PathBuf>> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let (Some(base), Some(name)) = (folder.parent(), folder.file_name()) else { return Ok(None) };
    let mut aside = format!("{REMOVED}{}-{}-", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)).into_bytes();
    aside.extend_from_slice(name.as_bytes());
    let aside = base.join(std::ffi::OsString::from_vec(aside));
    match fs::rename(folder, &aside) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        renamed => renamed.on("rename", folder).map(|()| Some(aside)),
    }
}

/// Removes a folder; nothing that is mounted in it is touched. That there is none is fine.
pub(super) fn blocking_remove(folder: &Path) -> Result<()> {
    blocking_remove_unless(folder, &|| false)
}

/// The same, until it is to stop.
pub(super) fn blocking_remove_unless(folder: &Path, stops: &dyn Fn() -> bool) -> Result<()> {
    let project = super::quota::blocking_project(folder);
    crate::layers::remove_tree(folder, stops).on("remove", folder)?;
    match (project, folder.parent()) {
        (Some(project), Some(base)) => super::quota::blocking_release(base, project),
        _ => Ok(()),
    }
}

/// What a name in the folder of a snapshotter is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Named {
    /// A snapshot, by its number.
    Snapshot(i64),
    /// Left by what has ended.
    Left,
    /// Something else.
    Foreign,
}

pub(super) fn named(name: &OsStr) -> Named {
    let Some(name) = name.to_str() else { return Named::Foreign };
    if name.starts_with(NEW) || name.starts_with(REMOVED) {
        return Named::Left;
    }
    // as numbers are written here
    name.parse().ok().filter(|number: &i64| number.to_string() == name).map_or(Named::Foreign, Named::Snapshot)
}

/// Records the folders that a layer had no entries for, beside the snapshot's tree.
pub(super) fn blocking_note_implicit(folder: &Path, implicit: &[Vec<u8>]) -> Result<()> {
    let path = folder.join(IMPLICIT);
    fs::write(&path, implicit.join(&0)).on("write", &path)
}

/// What was recorded; none if no layer was applied without the layers below.
pub(super) fn blocking_implicit(folder: &Path) -> Result<Option<Vec<Vec<u8>>>> {
    let path = folder.join(IMPLICIT);
    match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => Ok(Some(read.on("read", &path)?.split(|byte| *byte == 0).map(ToOwned::to_owned).collect())),
    }
}

/// The tree of an overlay's snapshot, in its folder.
pub(super) const FS: &str = "fs";
/// What the kernel needs beside it.
pub(super) const WORK: &str = "work";
const IMPLICIT: &str = "implicit";
const NEW: &str = "new-";
const REMOVED: &str = "rm-";
