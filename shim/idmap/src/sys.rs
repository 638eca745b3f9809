//! The system calls.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, pipe2};

/// Makes a user namespace with these maps, in the format of `/proc/PID/uid_map`. It exists while the descriptor is open.
///
/// Blocks for a moment, on a short-lived child in the namespace.
///
/// Errors: `ENOSPC` when there are too many of them; those of writing the maps.
pub fn blocking_user_namespace(uid_map: &str, gid_map: &str) -> io::Result<OwnedFd> {
    let (ready_read, ready_write) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let ready = ready_write.as_raw_fd();
    let parent = std::process::id();
    // SAFETY: other threads may hold any lock at this moment. The child therefore allocates nothing, takes no lock, runs no
    // destructor and no code but the system calls of `be_in_a_user_namespace`, which never returns.
    let child = Errno::result(unsafe { libc::fork() })?;
    if child == 0 {
        be_in_a_user_namespace(ready, parent);
    }
    drop(ready_write);
    let opened = wait_for_byte(ready_read.as_fd()).and_then(|()| {
        fs::write(format!("/proc/{child}/uid_map"), uid_map)?;
        fs::write(format!("/proc/{child}/gid_map"), gid_map)?;
        File::open(format!("/proc/{child}/ns/user"))
    });
    let child = Pid::from_raw(child);
    nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL)?;
    while waitpid(child, Some(WaitPidFlag::__WALL)) == Err(Errno::EINTR) {}
    opened.map(OwnedFd::from)
}

/// The forked child: enters a user namespace, reports it, and stays until it is killed. No allocation, no locks here.
fn be_in_a_user_namespace(ready: i32, parent: u32) -> ! {
    // SAFETY: plain system calls on integers and on a constant byte; none of them touches memory of other threads.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        // It may have exited before.
        if libc::getppid() as u32 != parent {
            libc::_exit(1);
        }
        if libc::unshare(libc::CLONE_NEWUSER) == 0 {
            libc::write(ready, c"1".as_ptr().cast(), 1);
            loop {
                libc::pause();
            }
        }
        libc::_exit(1)
    }
}

fn wait_for_byte(fd: BorrowedFd<'_>) -> io::Result<()> {
    loop {
        match nix::unistd::read(fd, &mut [0]) {
            Err(Errno::EINTR) => {}
            // The child could not enter a namespace of its own; the usual reason is a limit of them.
            Ok(0) => return Err(Errno::ENOSPC.into()),
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Mounts a copy of the tree at `source` on `target`, its files mapped by `user_namespace`.
///
/// Errors: `EINVAL` when its file system cannot be mapped; `EPERM`.
/// Source: mount_setattr(2), MOUNT_ATTR_IDMAP, Linux ≥ 5.12.
pub fn mount_mapped(source: BorrowedFd<'_>, target: BorrowedFd<'_>, user_namespace: BorrowedFd<'_>) -> io::Result<()> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | EMPTY_PATH | RECURSIVE;
    // SAFETY: the empty path makes the call look at the descriptor, which is borrowed for the call.
    let tree = Errno::result(unsafe { libc::syscall(libc::SYS_open_tree, source.as_raw_fd(), c"".as_ptr(), flags) })?;
    // SAFETY: the kernel has just made this descriptor and nothing else owns its number.
    let tree = unsafe { OwnedFd::from_raw_fd(tree as i32) };
    let attributes =
        libc::mount_attr { attr_set: libc::MOUNT_ATTR_IDMAP, attr_clr: 0, propagation: 0, userns_fd: user_namespace.as_raw_fd() as u64 };
    let size = size_of::<libc::mount_attr>();
    // SAFETY: the kernel reads `size` bytes of attributes from a pointer that is valid for the call; descriptors are borrowed for it.
    let result = unsafe {
        libc::syscall(libc::SYS_mount_setattr, tree.as_raw_fd(), c"".as_ptr(), EMPTY_PATH | RECURSIVE, &raw const attributes, size)
    };
    Errno::result(result)?;
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: empty paths make the call look at both descriptors, which are borrowed for the call.
    let result = unsafe { libc::syscall(libc::SYS_move_mount, tree.as_raw_fd(), c"".as_ptr(), target.as_raw_fd(), c"".as_ptr(), flags) };
    Errno::result(result)?;
    Ok(())
}

const EMPTY_PATH: u32 = libc::AT_EMPTY_PATH as u32;
const RECURSIVE: u32 = libc::AT_RECURSIVE as u32;
