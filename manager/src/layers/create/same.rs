//! Whether a file is the same in two trees.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, openat};

use crate::layers::tree;

/// A file: the folder it is in, its name there, and what the kernel says of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct File1<'a> {
    pub(super) folder: &'a OwnedFd,
    pub(super) name: &'a [u8],
    pub(super) stat: &'a Stat,
}

/// Whether a layer need not have the file. Times of folders do not count: what is made in them changes them.
pub(super) fn is_same(one: File1<'_>, other: File1<'_>) -> std::io::Result<bool> {
    let (a, b) = (one.stat, other.stat);
    let kind = FileType::from_raw_mode(a.st_mode);
    if (a.st_mode, a.st_uid, a.st_gid) != (b.st_mode, b.st_uid, b.st_gid) {
        return Ok(false);
    }
    if kind != FileType::Directory && (tree::mtime(a).seconds, a.st_size) != (tree::mtime(b).seconds, b.st_size) {
        return Ok(false);
    }
    if tree::xattrs(one.folder.as_fd(), one.name)? != tree::xattrs(other.folder.as_fd(), other.name)? {
        return Ok(false);
    }
    let same_file = (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino);
    Ok(match kind {
        FileType::Directory => true,
        FileType::Symlink => tree::link_target(one.folder.as_fd(), one.name)? == tree::link_target(other.folder.as_fd(), other.name)?,
        FileType::CharacterDevice | FileType::BlockDevice => a.st_rdev == b.st_rdev,
        FileType::RegularFile if same_file => true,
        // one that a layer has made has whole seconds
        FileType::RegularFile if a.st_mtime_nsec == 0 || b.st_mtime_nsec == 0 => has_same_bytes(one, other)?,
        _ => a.st_mtime_nsec == b.st_mtime_nsec,
    })
}

fn has_same_bytes(one: File1<'_>, other: File1<'_>) -> std::io::Result<bool> {
    let open = |file: File1<'_>| open_file(file.folder, file.name);
    let (mut one, mut other) = (open(one)?, open(other)?);
    let mut buffers = (vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]);
    loop {
        let count = one.read(&mut buffers.0)?;
        if count == 0 {
            return Ok(other.read(&mut buffers.1)? == 0);
        }
        if other.read_exact(&mut buffers.1[..count]).is_err() || buffers.0[..count] != buffers.1[..count] {
            return Ok(false);
        }
    }
}

/// Opens a regular file.
///
/// Errors: it is none. A container may write to the tree: what was a file a moment ago can be a device of the host, which even to open does
/// something.
pub(super) fn open_file(folder: &OwnedFd, name: &[u8]) -> std::io::Result<File> {
    let place = openat(folder, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if FileType::from_raw_mode(fstat(&place)?.st_mode) != FileType::RegularFile {
        return Err(std::io::Error::other("it is no file any more"));
    }
    File::open(format!("/proc/self/fd/{}", place.as_raw_fd()))
}

const BUFFER_BYTES: usize = 64 << 10;
