//! Waiting for one descriptor, with a deadline.
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Waits for the exit of the process behind a pidfd. Returns whether it exited in time.
pub(crate) fn for_end(process: BorrowedFd<'_>, deadline: Instant) -> bool {
    for_input(process, Some(deadline)).unwrap_or(false)
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
