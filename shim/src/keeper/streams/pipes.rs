//! The clients' fifos and the processes' pipes.
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Gid, Uid, fchown, pipe2};

use crate::sys;

/// Opens a client's fifo for both directions: that does not block, and a client that closes its end causes no end of file.
///
/// Errors: NotFound; InvalidInput if it is not a fifo.
pub(super) fn open_fifo(path: &str) -> io::Result<OwnedFd> {
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
pub(super) fn has_reader(write_end: &OwnedFd) -> bool {
    !state(write_end).contains(PollFlags::POLLERR)
}

/// Whether the last writer of a pipe is gone.
pub(super) fn is_ended(read_end: &OwnedFd) -> bool {
    state(read_end).contains(PollFlags::POLLHUP)
}

fn state(end: &OwnedFd) -> PollFlags {
    let mut fds = [PollFd::new(end.as_fd(), PollFlags::empty())];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(_) => fds[0].revents().unwrap_or(PollFlags::empty()),
        Err(_) => PollFlags::POLLERR,
    }
}

/// Makes a pipe that belongs to a user and a group.
pub(super) fn make((uid, gid): (u32, u32)) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    if (uid, gid) != (0, 0) {
        for end in [&read, &write] {
            fchown(end, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
    }
    Ok((read, write))
}

/// Sets our end non-blocking; the process's end is another open file description and keeps blocking.
pub(super) fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Sets how many bytes a pipe holds. Returns whether that was possible: it is a pipe, holds no more already, and its user may have as much.
pub(super) fn resize(pipe: &OwnedFd, bytes: usize) -> bool {
    fcntl(pipe, FcntlArg::F_SETPIPE_SZ(bytes as libc::c_int)).is_ok()
}
