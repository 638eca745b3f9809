//! Re-exec: another program in the same process, with the same children and exactly the chosen descriptors.
#![allow(unsafe_code)]
use std::convert::Infallible;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::libc;

/// This process's environment as bytes, in the form of execve(2).
pub(crate) fn environment() -> Vec<CString> {
    let entries = std::env::vars_os().map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat());
    entries.filter_map(|entry| CString::new(entry).ok()).collect()
}

/// Executes `program`, which inherits the descriptors in `kept` under their numbers. Every other one must be close-on-exec.
///
/// Returns only after a failure; then nothing has changed. For a process with one thread: no other must fork meanwhile.
pub(crate) fn execute(program: BorrowedFd<'_>, argv: &[CString], env: &[CString], kept: &[RawFd]) -> io::Result<Infallible> {
    let path = CString::new(format!("/proc/self/fd/{}", program.as_raw_fd()))?;
    for number in kept {
        set_flags(*number, 0)?;
    }
    let result = nix::unistd::execve(&path, argv, env);
    for number in kept {
        set_flags(*number, libc::FD_CLOEXEC)?;
    }
    Ok(result?)
}

fn set_flags(number: RawFd, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: the call takes integers and changes one flag; a number that is not open gives EBADF.
    Errno::result(unsafe { libc::fcntl(number, libc::F_SETFD, flags) })?;
    Ok(())
}
