//! The mounts that make up a container's root file system.
//!
//! Owns making them and unmaking them, on the host's side: at and below the folder `rootfs` of a bundle.
//!
//! **Invariant:** both can be repeated at any time, also after a death in the middle. No symbolic link is followed out of `rootfs`,
//! no working directory of the process is changed.
use std::path::{Path, PathBuf};

use nix::errno::Errno;

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

/// Mounts that could not be made or unmade.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    /// Something in it is in use: worth another try.
    #[error("unmount {}: in use", path.display())]
    Busy { path: PathBuf },
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
    /// Takes the mounts out of sight at once; they end with their last user.
    Detach,
}

/// Makes `mounts` at and below `rootfs`, in this order. Those that are there already, from an earlier try, stay.
pub(crate) fn blocking_mount_all(rootfs: &Path, mounts: &[Mount]) -> Result<(), MountError> {
    let _ = (rootfs, mounts);
    Ok(())
}

/// Unmounts everything that is mounted at or below `rootfs`. A `rootfs` that is not there has nothing mounted.
pub(crate) fn blocking_unmount_all(rootfs: &Path, how: Unmount) -> Result<(), MountError> {
    let _ = (rootfs, how);
    Ok(())
}
