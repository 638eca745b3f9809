//! A copy of this process that goes on with the same program.
#![allow(unsafe_code)]
use std::ffi::{CStr, OsStr, c_char};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::process;

use nix::libc;
use nix::unistd::{ForkResult, fork};

/// Forks. Returns the child's pid, and `None` in the child, which is in a process group of its own and is killed when this process exits.
///
/// Only for a process with one thread: then no lock is held by another, and the child may do all that this process may.
pub(crate) fn copy() -> io::Result<Option<u32>> {
    let parent = process::id();
    // SAFETY: the caller has no other thread, so that the child's copy of the memory is consistent.
    if let ForkResult::Parent { child } = unsafe { fork() }? {
        return Ok(Some(child.as_raw() as u32));
    }
    // SAFETY: the calls take integers.
    unsafe {
        libc::setpgid(0, 0);
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong, 0, 0, 0);
        if libc::getppid() as u32 != parent {
            libc::_exit(127);
        }
    }
    Ok(None)
}

unsafe extern "C" {
    /// The first argument. The C library sets it before `main`.
    static program_invocation_name: *mut c_char;
}

/// Replaces the last argument that is `from` by `to` in the command line that `ps` shows.
///
/// Errors: there is none, or their lengths differ.
/// Source: proc(5), `/proc/PID/cmdline`: the kernel puts the arguments one behind the other, each with a zero at its end, and shows that memory.
pub(crate) fn rename_argument(from: &CStr, to: &CStr) -> io::Result<()> {
    let arguments: Vec<_> = std::env::args_os().collect();
    let index = arguments.iter().rposition(|argument| argument == OsStr::from_bytes(from.to_bytes())).ok_or(io::ErrorKind::NotFound)?;
    if from.count_bytes() != to.count_bytes() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let offset: usize = arguments[..index].iter().map(|argument| argument.len() + 1).sum();
    // SAFETY: the C library sets the pointer once, before `main`, to the first argument, and the arguments before this one have `offset` bytes.
    // The memory is this process's, can be written to, and is as long as both texts; no reference to it exists, since `std` copies it.
    unsafe {
        let argument = program_invocation_name.add(offset);
        if CStr::from_ptr(argument) != from {
            return Err(io::ErrorKind::NotFound.into());
        }
        argument.copy_from_nonoverlapping(to.as_ptr(), to.count_bytes());
    }
    Ok(())
}
