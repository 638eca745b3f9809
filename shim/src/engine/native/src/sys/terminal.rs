//! Terminals.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::check;

/// Unlocks a terminal, gives it a size (rows, columns) and opens its other side without a path.
pub(crate) fn open_peer(terminal: BorrowedFd<'_>, size: Option<(u16, u16)>) -> io::Result<OwnedFd> {
    let unlocked: libc::c_int = 0;
    // SAFETY: the request reads an integer.
    check(libc::c_long::from(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) }))?;
    if let Some((rows, columns)) = size {
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the request reads that structure.
        check(libc::c_long::from(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }))?;
    }
    // SAFETY: the request takes flags as an integer.
    let peer = check(libc::c_long::from(unsafe {
        libc::ioctl(terminal.as_raw_fd(), libc::TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC)
    }))?;
    // SAFETY: a descriptor that the kernel has just given to this process alone.
    Ok(unsafe { OwnedFd::from_raw_fd(peer as i32) })
}

/// Makes descriptor `terminal` the controlling terminal of the session that this process leads.
pub(crate) fn control(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the request takes an integer.
    check(libc::c_long::from(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) }))?;
    Ok(())
}
