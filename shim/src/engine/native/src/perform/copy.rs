//! Copies what a new file system is to cover into it.
//!
//! **Invariant:** no link is followed: each step is by a descriptor of its folder, whatever is exchanged meanwhile.
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, UtimensatFlags, fstat, fstatat, mkdirat, mknodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, LinkatFlags, Uid, fchownat, linkat, symlinkat};

use super::root::in_folder;
use crate::sys;

/// Copies the content of a folder: owners, permissions, times, links and hard links, as they are.
pub(super) fn content(from: &OwnedFd, to: BorrowedFd<'_>) -> io::Result<()> {
    let mut copy = Copy { top: to, linked: HashMap::new() };
    copy.folder(from, to, Path::new(""), 0)
}

struct Copy<'a> {
    top: BorrowedFd<'a>,
    /// Files of several names that were copied, by device and number: their path below `top`.
    linked: HashMap<(u64, u64), PathBuf>,
}

impl Copy<'_> {
    fn folder(&mut self, from: &OwnedFd, to: BorrowedFd<'_>, path: &Path, depth: u32) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        let mut folder = Dir::from_fd(in_folder(from.as_fd(), Path::new("."), OFlag::O_RDONLY | OFlag::O_DIRECTORY)?)?;
        for entry in folder.iter() {
            let entry = entry?;
            let name = Path::new(std::ffi::OsStr::from_bytes(entry.file_name().to_bytes()));
            if name != Path::new(".") && name != Path::new("..") {
                self.entry(from, to, name, &path.join(name), depth)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, from: &OwnedFd, to: BorrowedFd<'_>, name: &Path, path: &Path, depth: u32) -> io::Result<()> {
        let about = fstatat(from, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let kind = SFlag::from_bits_truncate(about.st_mode) & SFlag::S_IFMT;
        let is_shared = kind != SFlag::S_IFDIR && about.st_nlink > 1;
        if let Some(first) = self.linked.get(&(about.st_dev, about.st_ino)).filter(|_| is_shared) {
            return Ok(linkat(self.top, first, to, name, LinkatFlags::empty())?);
        }
        match kind {
            SFlag::S_IFDIR => {
                mkdirat(to, name, Mode::S_IRWXU)?;
                let source = in_folder(from.as_fd(), name, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
                let target = in_folder(to, name, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
                self.folder(&source, target.as_fd(), path, depth + 1)?;
            }
            SFlag::S_IFLNK => symlinkat(readlinkat(from, name)?.as_os_str(), to, name)?,
            SFlag::S_IFREG => {
                let mut source = File::from(in_folder(from.as_fd(), name, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?);
                // A fifo or a device could be in its place by now: neither has an end.
                if !source.metadata()?.is_file() {
                    return Err(Errno::ESTALE.into());
                }
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
                let mut target = File::from(openat(to, name, flags, Mode::S_IRUSR)?);
                io::copy(&mut source, &mut target)?;
            }
            kind => mknodat(to, name, kind, Mode::S_IRUSR, about.st_rdev)?,
        }
        describe(to, name, kind, &about)?;
        if is_shared {
            self.linked.insert((about.st_dev, about.st_ino), path.to_owned());
        }
        Ok(())
    }
}

/// Owner, then permissions, which a change of owner would reduce, then times.
fn describe(to: BorrowedFd<'_>, name: &Path, kind: SFlag, about: &FileStat) -> io::Result<()> {
    fchownat(to, name, Some(Uid::from_raw(about.st_uid)), Some(Gid::from_raw(about.st_gid)), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if kind != SFlag::S_IFLNK {
        sys::set_mode(&in_folder(to, name, OFlag::O_PATH)?, about.st_mode & 0o7777)?;
    }
    let time = |seconds: i64, nanoseconds: i64| TimeSpec::new(seconds, nanoseconds);
    let (accessed, modified) = (time(about.st_atime, about.st_atime_nsec), time(about.st_mtime, about.st_mtime_nsec));
    Ok(utimensat(to, name, &accessed, &modified, UtimensatFlags::NoFollowSymlink)?)
}

/// Gives a new file system's folder the owner of the one that it covers.
pub(super) fn owner(from: &OwnedFd, to: BorrowedFd<'_>) -> io::Result<()> {
    let about = fstat(from)?;
    Ok(fchownat(to, "", Some(Uid::from_raw(about.st_uid)), Some(Gid::from_raw(about.st_gid)), AtFlags::AT_EMPTY_PATH)?)
}

const MAX_DEPTH: u32 = 256;
