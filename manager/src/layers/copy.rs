//! A copy of a tree, for snapshotters without overlays: every file as it is, whatever its name means in a layer.
//!
//! Data is shared where the file system can (reflinks), and copied within the kernel elsewhere. Holes stay holes, however large they are.

use std::ffi::CString;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, SeekFrom, Stat, Uid, chmodat, chownat, copy_file_range, fstat, ftruncate, ioctl_ficlone, linkat,
    mkdirat, mknodat, openat, seek, statat, symlinkat, utimensat,
};
use rustix::io::Errno;

use super::apply::copy_attributes;
use super::tree::{self, FirstNames};
use super::{OnFile as _, Result};

/// A folder that is being copied.
struct Level {
    from: OwnedFd,
    to: OwnedFd,
    stat: Stat,
    /// From the root on.
    path: Vec<u8>,
    /// What is left to copy.
    names: Vec<Vec<u8>>,
}

/// Copies what is in a folder to an empty one, with owners, modes, times, attributes and hard links, until it is to stop.
///
/// Errors: ECANCELED when it stops.
pub(crate) fn copy_tree(from: &Path, to: &Path, stops: &dyn Fn() -> bool) -> Result<()> {
    let open = |path: &Path| tree::open_root(path).file("open folder", path.as_os_str().as_encoded_bytes());
    let (from, root) = (open(from)?, open(to)?);
    let mut links = FirstNames::new();
    let to = root.try_clone().file("open folder", b"/")?;
    let mut levels = vec![Level::new(from, to, Vec::new())?];
    loop {
        let Some(level) = levels.last_mut() else { return Ok(()) };
        let Some(name) = level.names.pop() else {
            // its times are those of before its files came
            copy_attributes(&level.from, &level.stat, &level.to).file("set owner and mode of", &level.path)?;
            utimensat(&level.to, ".", &tree::timestamps(tree::mtime(&level.stat)), AtFlags::empty()).file("set times of", &level.path)?;
            levels.pop();
            continue;
        };
        if stops() {
            return Err(Errno::CANCELED).file("copy", &level.path);
        }
        let path = [&level.path[..], b"/", &name].concat();
        let stat = statat(&level.from, &*name, AtFlags::SYMLINK_NOFOLLOW).file("look at", &path)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            mkdirat(&level.to, &*name, Mode::RWXU).file("make folder", &path)?;
            let from = tree::open_folder(level.from.as_fd(), &name).file("open folder", &path)?;
            let to = tree::open_folder(level.to.as_fd(), &name).file("open folder", &path)?;
            levels.push(Level::new(from, to, path)?);
            continue;
        }
        if stat.st_nlink > 1 {
            if let Some(first) = links.get(&(stat.st_dev, stat.st_ino)) {
                linkat(&root, &first[1..], &level.to, &*name, AtFlags::empty()).file("make link", &path)?;
                continue;
            }
            links.insert((stat.st_dev, stat.st_ino), path.clone());
        }
        copy_file(level.from.as_fd(), level.to.as_fd(), &name, &stat, stops).file("copy", &path)?;
    }
}

impl Level {
    fn new(from: OwnedFd, to: OwnedFd, path: Vec<u8>) -> Result<Self> {
        let stat = fstat(&from).file("look at", &path)?;
        let names = tree::names(from.as_fd()).file("read folder", &path)?;
        Ok(Self { from, to, stat, path, names })
    }
}

fn copy_file(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &[u8], stat: &Stat, stops: &dyn Fn() -> bool) -> rustix::io::Result<()> {
    let kind = FileType::from_raw_mode(stat.st_mode);
    match kind {
        FileType::RegularFile => {
            let source = openat(from, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let target = openat(to, name, flags, Mode::RUSR | Mode::WUSR)?;
            copy_data(&source, &target, stat, stops)?;
        }
        FileType::Symlink => symlinkat(CString::new(tree::link_target(from, name)?).map_err(|_| Errno::INVAL)?, to, name)?,
        kind => mknodat(to, name, kind, Mode::RUSR | Mode::WUSR, stat.st_rdev)?,
    }
    // the owner first: that clears set-id bits and capabilities
    chownat(to, name, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)), AtFlags::SYMLINK_NOFOLLOW)?;
    if kind != FileType::Symlink {
        chmodat(to, name, Mode::from_raw_mode(stat.st_mode & 0o7777), AtFlags::empty())?;
    }
    for (key, value) in tree::xattrs(from, name)? {
        tree::set_xattr(to, name, &key, &value)?;
    }
    utimensat(to, name, &tree::timestamps(tree::mtime(stat)), AtFlags::SYMLINK_NOFOLLOW)
}

/// Copies the data of a file, without its holes.
fn copy_data(from: &OwnedFd, to: &OwnedFd, stat: &Stat, stops: &dyn Fn() -> bool) -> rustix::io::Result<()> {
    if ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let size = u64::try_from(stat.st_size).unwrap_or_default();
    // what a hole at the end makes of the length
    ftruncate(to, size)?;
    let mut at = 0;
    while at < size {
        let begin = match seek(from, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => return Ok(()),
            begin => begin?,
        };
        let end = seek(from, SeekFrom::Hole(begin))?.min(size);
        at = begin;
        while at < end {
            if stops() {
                return Err(Errno::CANCELED);
            }
            at += copy_part(from, to, at, usize::try_from(end - at).unwrap_or(usize::MAX).min(PART_BYTES))?;
        }
    }
    Ok(())
}

/// Copies some bytes at an offset, and returns how many.
fn copy_part(from: &OwnedFd, to: &OwnedFd, at: u64, bytes: usize) -> rustix::io::Result<u64> {
    let (mut read, mut write) = (at, at);
    match copy_file_range(from, Some(&mut read), to, Some(&mut write), bytes) {
        // it became shorter meanwhile
        Ok(0) => return Err(Errno::IO),
        Ok(count) => return Ok(count as u64),
        // some file systems cannot
        Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM) => {}
        Err(error) => return Err(error),
    }
    let mut buffer = vec![0; bytes.min(BUFFER_BYTES)];
    let count = rustix::io::pread(from, &mut buffer[..], at)?;
    let mut written = 0;
    while written < count {
        written += rustix::io::pwrite(to, &buffer[written..count], at + written as u64)?;
    }
    if count == 0 { Err(Errno::IO) } else { Ok(count as u64) }
}

/// What is copied before it is looked at whether to stop.
const PART_BYTES: usize = 16 << 20;
/// Where the kernel does not copy by itself.
const BUFFER_BYTES: usize = 256 << 10;
