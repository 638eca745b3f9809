//! Opening the client's fifos.
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sys;

/// Opens a client's fifo for both directions: that does not block, and a client that closes its end causes no end of file.
///
/// Errors: NotFound; InvalidInput if it is not a fifo.
pub(super) fn open(path: &str) -> io::Result<OwnedFd> {
    // Checked before the open: opening a device can have side effects.
    let found = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC | libc::O_NOFOLLOW).open(path)?;
    if !found.metadata()?.file_type().is_fifo() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a fifo"));
    }
    sys::descriptors::reopen(found.as_fd(), libc::O_NONBLOCK, true, true)
}

/// Closes the read end of a fifo, so that our write end shows whether there are readers. Its content stays.
pub(super) fn write_end(fifo: &OwnedFd) -> io::Result<OwnedFd> {
    sys::descriptors::reopen(fifo.as_fd(), libc::O_NONBLOCK, false, true)
}

/// Closes the write end of a fifo: the read end reaches end of file when the clients' write ends are closed and it is empty.
pub(super) fn read_end(fifo: &OwnedFd) -> io::Result<OwnedFd> {
    sys::descriptors::reopen(fifo.as_fd(), libc::O_NONBLOCK, true, false)
}

/// Whether a fifo of which we hold only the write end has a reader.
pub(super) fn has_reader(write_end: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(write_end, PollFlags::empty())];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(_) => !fds[0].revents().is_some_and(|flags| flags.contains(PollFlags::POLLERR)),
        Err(_) => false,
    }
}
