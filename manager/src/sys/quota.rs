//! Quotas of projects: folders whose files count together, and the bounds of what they may have.
//!
//! Source: quotactl_fd(2), Linux ≥ 5.14; `linux/quota.h`, `linux/dqblk_xfs.h` and `linux/fs.h`, whose structures are the same on all machines
//! of 64 bits.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

use nix::errno::Errno;
use nix::libc;

/// `struct fsxattr`
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[allow(dead_code)] // the kernel's
struct Attributes {
    flags: u32,
    extent_bytes: u32,
    extents: u32,
    project: u32,
    copy_extent_bytes: u32,
    padding: [u8; 8],
}

/// `struct if_dqblk`
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[allow(dead_code)] // the kernel's
struct Block {
    hard_kib: u64,
    soft_kib: u64,
    bytes: u64,
    hard_inodes: u64,
    soft_inodes: u64,
    inodes: u64,
    kib_time: u64,
    inodes_time: u64,
    valid: u32,
}

/// The beginning of `struct fs_quota_stat`, and room for the rest of it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
#[allow(dead_code)] // the kernel's
struct State {
    version: i8,
    flags: u16,
    rest: [u64; 16],
}

/// What the files of a project take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    /// What they may take; 0 for any amount.
    pub(crate) limit_bytes: u64,
}

/// The project of a file or folder; 0 for none, also where the file system knows no projects.
pub(crate) fn project(file: impl AsFd) -> io::Result<u32> {
    match attributes(&file) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS)) => Ok(0),
        attributes => Ok(attributes?.project),
    }
}

/// Gives a folder a project, which is also that of what is made in it.
pub(crate) fn set_project(folder: impl AsFd, project: u32) -> io::Result<()> {
    let mut attributes = attributes(&folder)?;
    attributes.project = project;
    attributes.flags |= INHERIT;
    // SAFETY: the descriptor is open, as it is borrowed; the kernel reads as many bytes as the number of the request says, which are those of
    // the structure.
    let set = unsafe { libc::ioctl(folder.as_fd().as_raw_fd(), SET_ATTRIBUTES as _, &raw const attributes) };
    Errno::result(set).map(drop).map_err(Into::into)
}

fn attributes(file: &impl AsFd) -> io::Result<Attributes> {
    let mut attributes = Attributes::default();
    // SAFETY: the descriptor is open, as it is borrowed; the kernel writes as many bytes as the number of the request says, which are those of
    // the structure.
    let got = unsafe { libc::ioctl(file.as_fd().as_raw_fd(), GET_ATTRIBUTES as _, &raw mut attributes) };
    Errno::result(got)?;
    Ok(attributes)
}

/// Whether the file system of a folder holds projects to their bounds.
pub(crate) fn is_enforced(on: impl AsFd) -> io::Result<bool> {
    let mut state = State { version: 1, flags: 0, rest: [0; 16] };
    match quotactl(&on, GET_STATE, 0, &mut state) {
        // there is no quota at all, or no such system call
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL | libc::EOPNOTSUPP | libc::ESRCH)) => Ok(false),
        got => got.map(|()| state.flags & ENFORCED != 0),
    }
}

/// Bounds what the files of a project may take, in bytes; 0 takes the bound away.
pub(crate) fn limit(on: impl AsFd, project: u32, bytes: u64) -> io::Result<()> {
    let kib = bytes.div_ceil(1024);
    let mut block = Block { hard_kib: kib, soft_kib: kib, valid: LIMITS_OF_SPACE, ..Block::default() };
    quotactl(&on, SET, project, &mut block)
}

/// What the files of a project take.
pub(crate) fn used(on: impl AsFd, project: u32) -> io::Result<Used> {
    let mut block = Block::default();
    match quotactl(&on, GET, project, &mut block) {
        // never used
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Used::default()),
        got => got.map(|()| Used { bytes: block.bytes, inodes: block.inodes, limit_bytes: block.hard_kib.saturating_mul(1024) }),
    }
}

fn quotactl<T>(on: &impl AsFd, command: u32, project: u32, about: &mut T) -> io::Result<()> {
    let command = (command << 8) | PROJECTS;
    // SAFETY: the descriptor is open, as it is borrowed; each command that is used here reads or writes the structure that it is called with,
    // or the beginning of it.
    let done = unsafe { libc::syscall(QUOTACTL_FD, on.as_fd().as_raw_fd(), command, project, &raw mut *about) };
    Errno::result(done).map(drop).map_err(Into::into)
}

/// `SYS_quotactl_fd`, on all machines.
const QUOTACTL_FD: libc::c_long = 443;
/// `PRJQUOTA`
const PROJECTS: u32 = 2;
/// `Q_GETQUOTA`, `Q_SETQUOTA`, `Q_XGETQSTAT`
const GET: u32 = 0x80_0007;
const SET: u32 = 0x80_0008;
const GET_STATE: u32 = 0x5805;
/// `QIF_BLIMITS`
const LIMITS_OF_SPACE: u32 = 1;
/// `FS_QUOTA_PDQ_ENFD`
const ENFORCED: u16 = 1 << 5;
/// `FS_XFLAG_PROJINHERIT`
const INHERIT: u32 = 0x200;
/// `FS_IOC_FSGETXATTR` and `FS_IOC_FSSETXATTR`
const GET_ATTRIBUTES: u32 = request(2, 31);
const SET_ATTRIBUTES: u32 = request(1, 32);

/// `_IOR('X', number, struct fsxattr)` and `_IOW`
const fn request(direction: u32, number: u32) -> u32 {
    (direction << 30) | ((size_of::<Attributes>() as u32) << 16) | (0x58 << 8) | number
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn structures_and_numbers_are_the_kernels() {
        assert_eq!((size_of::<Attributes>(), offset_of!(Attributes, project)), (28, 12));
        assert_eq!((GET_ATTRIBUTES, SET_ATTRIBUTES), (0x801c_581f, 0x401c_5820));
        assert_eq!((size_of::<Block>(), offset_of!(Block, bytes), offset_of!(Block, inodes), offset_of!(Block, valid)), (72, 16, 40, 64));
        assert_eq!((offset_of!(State, flags), size_of::<State>() >= 80), (2, true));
        assert_eq!(((GET << 8) | PROJECTS, (SET << 8) | PROJECTS, (GET_STATE << 8) | PROJECTS), (0x8000_0702, 0x8000_0802, 0x58_0502));
    }

    #[test]
    fn a_folder_without_a_project_has_none() {
        let folder = scratch::Folder::new("no-project");
        assert_eq!(project(std::fs::File::open(&*folder).expect("a folder")).expect("it is asked"), 0);
    }
}
