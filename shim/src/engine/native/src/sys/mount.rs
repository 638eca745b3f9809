//! The mount API of file descriptors: fsopen(2), open_tree(2), mount_setattr(2), move_mount(2).
#![allow(unsafe_code)]
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

use super::{c_string, check};

/// Attributes of a mount to set and to clear, as `MOUNT_ATTR_*`, and a propagation as `MS_*` or 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Attributes {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    pub(crate) propagation: u64,
    /// A user namespace; only used with `MOUNT_ATTR_IDMAP`.
    pub(crate) user_namespace: u64,
}

/// Which part of a tree of mounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tree {
    /// One mount, without those below it.
    Top,
    Recursive,
}

/// A file system that is being configured.
pub(crate) struct FsContext(OwnedFd);

impl FsContext {
    /// fsopen(2).
    pub(crate) fn open(kind: &str) -> io::Result<Self> {
        let kind = c_string(kind.as_bytes())?;
        // SAFETY: the name is a valid string for the time of the call.
        let fd = check(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })?;
        Ok(Self(own(fd)))
    }

    /// The file system of the mount that `mount` is open on: fspick(2).
    pub(crate) fn pick(mount: BorrowedFd<'_>) -> io::Result<Self> {
        // SAFETY: the path is the empty string.
        let fd = check(unsafe { libc::syscall(libc::SYS_fspick, mount.as_raw_fd(), c"".as_ptr(), FSPICK_CLOEXEC | FSPICK_EMPTY_PATH) })?;
        Ok(Self(own(fd)))
    }

    /// Changes a file system that was picked to what was set.
    pub(crate) fn reconfigure(self) -> io::Result<()> {
        self.configure(FSCONFIG_CMD_RECONFIGURE, ptr::null(), ptr::null())
    }

    /// Sets `key`, with a value or as a flag.
    pub(crate) fn set(&self, key: &str, value: Option<&str>) -> io::Result<()> {
        let key = c_string(key.as_bytes())?;
        let value = value.map(|value| c_string(value.as_bytes())).transpose()?;
        let command = if value.is_some() { FSCONFIG_SET_STRING } else { FSCONFIG_SET_FLAG };
        self.configure(command, key.as_ptr(), value.as_ref().map_or(ptr::null(), |value| value.as_ptr()))
    }

    /// Makes the file system, and a mount of it that is attached nowhere.
    pub(crate) fn mount(&self, attributes: u64) -> io::Result<OwnedFd> {
        self.configure(FSCONFIG_CMD_CREATE, ptr::null(), ptr::null())?;
        // SAFETY: integers only.
        let fd = check(unsafe { libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), FSMOUNT_CLOEXEC, attributes as libc::c_uint) })?;
        Ok(own(fd))
    }

    /// What the file system itself says about the last call that has failed; few say anything.
    pub(crate) fn complaint(&self) -> Option<String> {
        let mut last = None;
        let mut buffer = [0; 512];
        // Each read gives one message, `e` before an error's, until there is none.
        while let Ok(length @ 1..) = nix::unistd::read(&self.0, &mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..length]);
            last = text.strip_prefix("e ").map(|text| text.trim_end().to_owned()).or(last);
        }
        last
    }

    fn configure(&self, command: libc::c_uint, key: *const libc::c_char, value: *const libc::c_char) -> io::Result<()> {
        // SAFETY: both are null or strings that the callers keep for the time of the call.
        check(unsafe { libc::syscall(libc::SYS_fsconfig, self.0.as_raw_fd(), command, key, value, 0) })?;
        Ok(())
    }
}

/// Sets an extended attribute of what `node` is a handle of, through the link of procfs: a handle that was opened as a path takes none itself.
pub(crate) fn set_extended_attribute(node: &OwnedFd, name: &str, value: &str) -> io::Result<()> {
    let (path, name) = (c_string(format!("/proc/self/fd/{}", node.as_raw_fd()).as_bytes())?, c_string(name.as_bytes())?);
    // SAFETY: both are valid strings for the time of the call; pointer and length describe the value.
    check(libc::c_long::from(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) }))?;
    Ok(())
}

/// Clones a mount; the clone is attached nowhere. An empty path means `folder` itself.
pub(crate) fn open_tree(folder: BorrowedFd<'_>, path: &Path, tree: Tree) -> io::Result<OwnedFd> {
    let path = c_string(path.as_os_str().as_bytes())?;
    let recursive = if tree == Tree::Recursive { libc::AT_RECURSIVE as libc::c_uint } else { 0 };
    let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as libc::c_uint | recursive;
    // SAFETY: the path is a valid string for the time of the call.
    let fd = check(unsafe { libc::syscall(libc::SYS_open_tree, folder.as_raw_fd(), path.as_ptr(), flags) })?;
    Ok(own(fd))
}

/// Attaches a mount on what `target` is open on.
pub(crate) fn move_mount(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let empty = c"";
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both paths are the empty string.
    check(unsafe { libc::syscall(libc::SYS_move_mount, mount.as_raw_fd(), empty.as_ptr(), target.as_raw_fd(), empty.as_ptr(), flags) })?;
    Ok(())
}

/// mount_setattr(2) on the mount that `mount` is open on.
pub(crate) fn set_attributes(mount: BorrowedFd<'_>, attributes: &Attributes, tree: Tree) -> io::Result<()> {
    let empty = c"";
    let recursive = if tree == Tree::Recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the structure has the kernel's layout (`struct mount_attr`, version 0) and is valid for the time of the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            ptr::from_ref(attributes),
            size_of::<Attributes>(),
        )
    })?;
    Ok(())
}

fn own(fd: libc::c_long) -> OwnedFd {
    // SAFETY: a descriptor that the kernel has just given to this process alone.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FSCONFIG_CMD_RECONFIGURE: libc::c_uint = 7;
const FSPICK_CLOEXEC: libc::c_uint = 1;
const FSPICK_EMPTY_PATH: libc::c_uint = 8;
const OPEN_TREE_CLONE: libc::c_uint = 1;
const OPEN_TREE_CLOEXEC: libc::c_uint = libc::O_CLOEXEC as libc::c_uint;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x04;
const MOVE_MOUNT_T_EMPTY_PATH: libc::c_uint = 0x40;
