//! The client's fifos.
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sys;

/// Opens a client's fifo for both directions: that waits for nobody, and a client that leaves is not the end.
///
/// Errors: NotFound; InvalidInput if it is something else than a fifo.
pub(super) fn open(path: &str) -> io::Result<OwnedFd> {
    // Looked at before it is opened: to open a device can have effects of its own.
    let found = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC | libc::O_NOFOLLOW).open(path)?;
    if !found.metadata()?.file_type().is_fifo() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a fifo"));
    }
    sys::descriptors::reopen(found.as_fd(), libc::O_NONBLOCK, true, true)
}

/// Gives the read end of a fifo up, so that its readers' coming and going is seen. What is in it stays.
pub(super) fn write_end(fifo: &OwnedFd) -> io::Result<OwnedFd> {
    sys::descriptors::reopen(fifo.as_fd(), libc::O_NONBLOCK, false, true)
}

/// Gives the write end of a fifo up: it ends when the clients' write ends are closed and it is empty.
pub(super) fn read_end(fifo: &OwnedFd) -> io::Result<OwnedFd> {
    sys::descriptors::reopen(fifo.as_fd(), libc::O_NONBLOCK, true, false)
}

/// Whether a fifo of which we hold the write end alone has a reader.
pub(super) fn has_reader(write_end: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(write_end, PollFlags::empty())];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(_) => !fds[0].revents().is_some_and(|flags| flags.contains(PollFlags::POLLERR)),
        Err(_) => false,
    }
}
