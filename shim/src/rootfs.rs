//! The mounts that make up a container's root file system.
//!
//! Owns mounting and unmounting them on the host: at and below the folder `rootfs` of a bundle.
//!
//! **Invariant:** both can be repeated at any time, also after a crash in the middle: an existing mount stays, since a container
//! may already use it, and an overlay must not be mounted twice over the same upper folder. No symbolic link is followed out of
//! `rootfs`, no working directory of the process is changed.
use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::mount::MsFlags;
use nix::sys::stat::Mode;

use crate::mountinfo::{self, MountEntry};
use crate::sys;

mod make;
mod mapped;
mod options;
mod unmake;

use options::Options;

/// One mount, as containerd's snapshotters describe it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Mount {
    /// `overlay`, `bind`, `ext4`, …
    pub(crate) kind: String,
    pub(crate) source: String,
    /// Where, below `rootfs`; empty for `rootfs` itself.
    pub(crate) target: String,
    /// As in fstab: flags and what the file system understands.
    pub(crate) options: Vec<String>,
}

/// Why mounting or unmounting failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    /// Something in it is in use: try again later.
    #[error("unmount {}: it is in use by another process", path.display())]
    Busy { path: PathBuf },
    #[error("mount {kind} from {origin:?} at {}", path.display())]
    Refused { kind: String, origin: String, path: PathBuf, source: Errno },
    #[error("{op} {}", path.display())]
    System { op: &'static str, path: PathBuf, source: Errno },
    #[error("mount {kind} at {}: {why}", path.display())]
    Unsupported { kind: String, path: PathBuf, why: &'static str },
    #[error("mount {kind} at {}: {found} is mounted there already", path.display())]
    Occupied { kind: String, path: PathBuf, found: String },
}

/// How hard to unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unmount {
    /// Fails with [`MountError::Busy`] while anything is in use.
    Clean,
    /// Detaches the mounts at once; the kernel unmounts them after their last use.
    Detach,
}

/// Mounts `mounts` at and below `rootfs`, in this order, creating `rootfs` if needed. Existing ones, from an earlier
/// attempt, stay.
pub(crate) fn blocking_mount_all(rootfs: &Path, mounts: &[Mount]) -> Result<(), MountError> {
    if mounts.is_empty() {
        return Ok(());
    }
    match DirBuilder::new().mode(0o711).create(rootfs) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(system("make", rootfs)(errno(&error))),
        _ => {}
    }
    let mut done: Vec<PathBuf> = Vec::new();
    for mount in mounts {
        let options = Options::parse(&mount.options);
        let place = Place::open(rootfs, &mount.target)?;
        make::refuse_unsupported(mount, &options, &place.path)?;
        // Mounts are stacked: of those at this place, this number are earlier ones of this list.
        let below = done.iter().filter(|path| **path == place.path).count();
        let stack = place.stack()?;
        match stack.get(below) {
            None => mapped::first_mount(rootfs, mount, &options, &place)?,
            Some(entry) if entry.kind == mount.kind || options.flags.contains(MsFlags::MS_BIND) => {}
            Some(entry) => {
                return Err(MountError::Occupied { kind: mount.kind.clone(), path: place.path, found: entry.kind.clone() });
            }
        }
        done.push(place.path);
        // One below others was finished before they were mounted. Finishing the top one again changes nothing.
        if stack.len() <= below + 1 {
            // Opened again: now it is the mount's root.
            make::finish_mount(mount, &options, &Place::open(rootfs, &mount.target)?)?;
        }
    }
    Ok(())
}

/// Unmounts everything at or below `rootfs`. A missing `rootfs` has no mounts.
pub(crate) fn blocking_unmount_all(rootfs: &Path, how: Unmount) -> Result<(), MountError> {
    mapped::clear(rootfs)?;
    unmake::unmount_below(rootfs, how)
}

/// Whether anything is mounted at or below `rootfs`.
pub(crate) fn blocking_is_mounted(rootfs: &Path) -> Result<bool, MountError> {
    unmake::is_mounted(rootfs)
}

/// The target of a mount: a folder or file that is held open, so that its name cannot be redirected meanwhile.
struct Place {
    fd: OwnedFd,
    /// Its real path.
    path: PathBuf,
}

impl Place {
    /// Opens `target` below `rootfs`; links in it are resolved below `rootfs`.
    fn open(rootfs: &Path, target: &str) -> Result<Self, MountError> {
        let fd = open_folder(rootfs)?;
        let target = target.trim_start_matches('/');
        let fd = if target.is_empty() {
            fd
        } else {
            let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
            openat2(&fd, target, how).map_err(system("open", &rootfs.join(target)))?
        };
        let path = std::fs::read_link(link_to(&fd)).map_err(|error| system("resolve", rootfs)(errno(&error)))?;
        Ok(Self { fd, path })
    }

    /// The mounts stacked here.
    fn stack(&self) -> Result<Vec<MountEntry>, MountError> {
        if matches!(sys::mount::is_mount_root(self.fd.as_fd()), Ok(false)) {
            Ok(Vec::new())
        } else {
            list(|entry| entry.mount_point == self.path)
        }
    }

    fn link(&self) -> PathBuf {
        link_to(&self.fd)
    }
}

fn open_folder(path: &Path) -> Result<OwnedFd, MountError> {
    openat(AT_FDCWD, path, FOLDER | OFlag::O_NOFOLLOW, Mode::empty()).map_err(system("open", path))
}

fn list(wanted: impl FnMut(&MountEntry) -> bool) -> Result<Vec<MountEntry>, MountError> {
    mountinfo::blocking_list(wanted).map_err(|error| system("read", Path::new(mountinfo::PATH))(errno(&error)))
}

fn link_to(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

fn system(op: &'static str, path: &Path) -> impl FnOnce(Errno) -> MountError {
    move |source| MountError::System { op, path: path.to_owned(), source }
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

const FOLDER: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

#[cfg(test)]
mod tests;
