//! Waiting for one descriptor, with a deadline.
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Waits for the exit of the process behind a pidfd. Returns whether it exited in time.
pub(crate) fn for_end(process: BorrowedFd<'_>, deadline: Instant) -> bool {
    for_input(process, Some(deadline)).unwrap_or(false)
}

/// Reads a descriptor that may be non-blocking to its end.
pub(crate) fn read_to_end(fd: OwnedFd) -> io::Result<Vec<u8>> {
    let mut file = File::from(fd);
    let mut bytes = Vec::new();
    loop {
        for_input(file.as_fd(), None)?;
        match file.read_to_end(&mut bytes) {
            Ok(_) => return Ok(bytes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Waits until there is input or end of file. Without a deadline, for ever.
pub(crate) fn for_input(fd: BorrowedFd<'_>, deadline: Option<Instant>) -> io::Result<bool> {
    loop {
        let timeout = match deadline {
            None => PollTimeout::NONE,
            Some(deadline) => {
                // Rounded up, or the last millisecond would be a busy loop.
                let left = deadline.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
                PollTimeout::try_from(i32::try_from(left).unwrap_or(i32::MAX)).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
