//! Descriptors that tasks wait for.
#![allow(unsafe_code)]
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Lets a task wait until `fd`, which must be non-blocking, can be read.
///
/// Must be called within a tokio runtime with I/O enabled.
pub(crate) fn to_read(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and keeps its number until it is dropped, and the `AsyncFd` owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

/// Lets a task wait until `fd`, which must be non-blocking, can be written.
pub(crate) fn to_write(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: as above.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::WRITABLE) }?)
}

/// Lets a task wait for priority data (POLLPRI) of `file`, which can always be read.
pub(crate) fn to_hear(file: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: a `File` owns its descriptor as an `OwnedFd` does.
    Ok(unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }?)
}
