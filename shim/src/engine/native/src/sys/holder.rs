//! The calls of a process that holds namespaces and does nothing else.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use super::check;

/// The user namespace that owns a namespace: `NS_GET_USERNS` of ioctl_ns(2).
pub(crate) fn owner_of_namespace(namespace: &OwnedFd) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument.
    let fd = check(libc::c_long::from(unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS) }))?;
    // SAFETY: a descriptor that the kernel has just given to this process alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// `_IO(0xb7, 1)`.
const NS_GET_USERNS: libc::Ioctl = 0xb701;

/// Has the kernel reap the children of this process, adopted ones too.
pub(crate) fn ignore_children() -> io::Result<()> {
    // SAFETY: the disposition is no function.
    if unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) } == libc::SIG_ERR { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Overwrites the command line that procfs shows with zeros.
///
/// Source: proc_pid_stat(5), fields 48 and 49: `arg_start` and `arg_end`.
pub(crate) fn clear_command_line() -> io::Result<()> {
    let malformed = || io::Error::from_raw_os_error(libc::EIO);
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // The name, in parentheses, may contain anything.
    let (_, fields) = stat.rsplit_once(") ").ok_or_else(malformed)?;
    let mut fields = fields.split(' ').skip(48 - 3).map(|field| field.trim().parse::<usize>());
    let (Some(Ok(start)), Some(Ok(end))) = (fields.next(), fields.next()) else { return Err(malformed()) };
    if start == 0 || end < start {
        return Err(malformed());
    }
    // SAFETY: the kernel has put the arguments there when the program was executed: memory of this process that can be written to. It has one thread, and
    // no reference to it: `std` copies arguments, and nothing asks for them any more.
    unsafe { ptr::write_bytes(ptr::with_exposed_provenance_mut::<u8>(start), 0, end - start) };
    Ok(())
}

/// Does nothing, until a signal ends the process.
pub(crate) fn wait_for_ever() -> ! {
    loop {
        // SAFETY: no descriptors, no time, no mask.
        unsafe { libc::syscall(libc::SYS_ppoll, ptr::null_mut::<libc::pollfd>(), 0, ptr::null::<libc::timespec>(), ptr::null::<u64>(), 0) };
    }
}
