//! Unmounts.
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::Mode;

use super::{FOLDER, MountError, Unmount, errno, link_to, list, open_folder, system};
use crate::sys;

/// Unmounts everything that is mounted at or below `folder`, which is directly in a bundle and may be missing.
pub(super) fn unmount_below(folder: &Path, how: Unmount) -> Result<(), MountError> {
    let Some((bundle, top)) = resolve(folder)? else { return Ok(()) };
    let bundle_fd = open_folder(&bundle)?;
    let mut before = usize::MAX;
    for _ in 0..MAX_ROUNDS {
        if is_plainly_unused(&top) {
            return Ok(());
        }
        let mut entries = list(|entry| entry.mount_point.starts_with(&top))?;
        if entries.is_empty() {
            return Ok(());
        }
        // A mount may hide others below it, which only the next round reaches. A round that changes nothing is the last.
        let is_last = entries.len() >= before;
        before = entries.len();
        // The deepest first, and at one place the last first: the sort keeps the kernel's order, and is walked backwards.
        entries.sort_by_key(|entry| entry.mount_point.components().count());
        for entry in entries.iter().rev() {
            let relative = entry.mount_point.strip_prefix(&bundle).unwrap_or(&entry.mount_point);
            match unmount_one(&bundle_fd, relative, how) {
                Err(Errno::EBUSY) if is_last => return Err(MountError::Busy { path: entry.mount_point.clone() }),
                Err(source) if is_last => return Err(system("unmount", &entry.mount_point)(source)),
                Ok(()) | Err(_) => {}
            }
        }
    }
    Err(MountError::Busy { path: top })
}

/// Whether anything is mounted at or below `folder`.
pub(super) fn is_mounted(folder: &Path) -> Result<bool, MountError> {
    let Some((_, top)) = resolve(folder)? else { return Ok(false) };
    Ok(!is_plainly_unused(&top) && !list(|entry| entry.mount_point.starts_with(&top))?.is_empty())
}

/// Whether `folder` itself shows that nothing is mounted at or below it, as it mostly does: it is missing, or no mount and empty. A mount needs something
/// to be mounted on. Saves reading the list of all mounts, which is long on a busy host.
fn is_plainly_unused(folder: &Path) -> bool {
    let folder = match openat(AT_FDCWD, folder, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
    {
        Err(error) => return error == Errno::ENOENT,
        Ok(folder) => folder,
    };
    // "." and ".." are entries too.
    sys::mount::is_mount_root(folder.as_fd()).is_ok_and(|is_root| !is_root)
        && Dir::from_fd(folder).is_ok_and(|mut folder| folder.iter().take(3).try_fold(0, |count, entry| entry.map(|_| count + 1)) == Ok(2))
}

/// The real paths of the bundle and of `folder` in it, as the kernel names mounts. Absent if there is no such bundle.
fn resolve(folder: &Path) -> Result<Option<(PathBuf, PathBuf)>, MountError> {
    let (Some(bundle), Some(name)) = (folder.parent(), folder.file_name()) else {
        return Err(system("resolve", folder)(Errno::EINVAL));
    };
    match bundle.canonicalize() {
        Ok(bundle) => {
            let top = bundle.join(name);
            Ok(Some((bundle, top)))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(system("resolve", bundle)(errno(&error))),
    }
}

/// Unmounts `relative`, whose folder is reached from the bundle without any link.
///
/// An open mount would be busy: its parent folder is held open instead, and the name is not followed.
fn unmount_one(bundle: &OwnedFd, relative: &Path, how: Unmount) -> Result<(), Errno> {
    let (folder, name) = (relative.parent().ok_or(Errno::EINVAL)?, relative.file_name().ok_or(Errno::EINVAL)?);
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let folder = openat2(bundle, folder, OpenHow::new().flags(FOLDER).resolve(resolve))?;
    let detach = if how == Unmount::Detach { MntFlags::MNT_DETACH } else { MntFlags::empty() };
    umount2(&link_to(&folder).join(name), MntFlags::UMOUNT_NOFOLLOW | detach)
}

/// How many mounts may hide each other at one place, or appear while others are unmounted.
const MAX_ROUNDS: usize = 1000;
