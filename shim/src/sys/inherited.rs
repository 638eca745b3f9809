//! Descriptors that a process was started with, taken by their numbers.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;

/// Takes the descriptor with this number and marks it close-on-exec. To be called once for a number, of those that the previous executable has
/// handed over.
///
/// Errors: EBADF if it did not.
pub(crate) fn take(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call takes integers and changes one flag; a number that is not open gives EBADF.
    let result = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    Errno::result(result)?;
    // SAFETY: it is open, and the caller promises that nothing else owns the number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Takes the descriptor with this number and marks it close-on-exec. To be called once for a number, before anything else is opened.
///
/// Errors: EBADF if this process was not started with such a descriptor, ENOTSOCK if it is not a socket.
pub(crate) fn take_socket(number: RawFd) -> io::Result<OwnedFd> {
    let mut kind: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: SO_TYPE writes at most `length` bytes to `kind`; both are valid for the call. A bad number gives EBADF.
    let result = unsafe { libc::getsockopt(number, libc::SOL_SOCKET, libc::SO_TYPE, (&raw mut kind).cast(), &raw mut length) };
    Errno::result(result)?;
    // SAFETY: the number was just found to be open; the flag changes nothing for other owners.
    let result = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    Errno::result(result)?;
    // SAFETY: the parent process passed it for this purpose, and the caller promises to take a number once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
