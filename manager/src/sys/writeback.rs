//! Writing of dirty pages to the disk, begun early.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

use nix::errno::Errno;
use nix::libc;

/// Begins to write a part of a file to the disk, without waiting for it: a later fsync has less to do.
///
/// Errors: those of the file system, or EINVAL for a part that no file can have.
pub(crate) fn begin(file: impl AsFd, offset: u64, bytes: u64) -> io::Result<()> {
    let (Ok(offset), Ok(bytes)) = (i64::try_from(offset), i64::try_from(bytes)) else { return Err(Errno::EINVAL.into()) };
    let file = file.as_fd();
    // SAFETY: the descriptor is open, as it is borrowed; the others are integers, which the kernel checks.
    let begun = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, bytes, libc::SYNC_FILE_RANGE_WRITE) };
    Errno::result(begun).map(drop).map_err(Into::into)
}
