//! The read-only mount that keepers are executed on.
//!
//! Owns why a container cannot write to the shim's program: what enters a container may be a copy of the keeper, so `/proc/self/exe` leads there
//! to the keeper's file. The kernel refuses to write to a file that is being executed; this mount refuses it also when no keeper runs any more.
//!
//! The mount is a clone of the program's folder that is attached nowhere, so `/proc/PID/exe` shows the file's name without its folder.
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{FileStat, Mode, fstat};

/// An executable on a read-only mount of its own.
#[derive(Debug)]
pub(crate) struct Protected {
    /// To be executed; cannot be read through.
    pub(crate) file: OwnedFd,
    /// Closing its last copy dissolves the mount, for which the kernel waits up to milliseconds on a busy machine; so the keeper keeps one. What is
    /// executed or open stays on the mount in any case.
    pub(crate) mount: OwnedFd,
}

/// Finds `program` on a read-only mount that is made for it.
///
/// Errors: EPERM without CAP_SYS_ADMIN, ENOSYS before Linux 5.12, EINVAL if the file is on a mount of another mount namespace.
pub(crate) fn protect(program: BorrowedFd<'_>) -> io::Result<Protected> {
    let handle = handle_of(program);
    let named = std::fs::read_link(&handle)?;
    // Without its folder if it was replaced or removed since; then its path is "/".
    in_folder(program, &named).or_else(|_| {
        let mount = x_engine::readonly_executable(&handle)?;
        Ok(Protected { file: mount.try_clone()?, mount })
    })
}

fn in_folder(program: BorrowedFd<'_>, path: &Path) -> io::Result<Protected> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return Err(io::ErrorKind::NotFound.into()) };
    let mount = x_engine::readonly_executable(folder)?;
    let file = openat(&mount, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
    let identity = |about: FileStat| (about.st_dev, about.st_ino);
    if identity(fstat(&file)?) != identity(fstat(program)?) {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(Protected { file, mount })
}

/// Logs why a keeper is executed without [`protect`].
pub(crate) fn warn_of_unprotected(error: &impl std::fmt::Display) {
    log::warn!(error:%; "the shim's program is not executed on a read-only mount: a container may write to it when no shim runs");
}

/// The path under which this process can execute what a descriptor leads to.
pub(crate) fn handle_of(program: impl AsFd) -> PathBuf {
    format!("/proc/self/fd/{}", program.as_fd().as_raw_fd()).into()
}
