//! The root of a container, seen from outside.
//!
//! Owns every resolution of a path in it.
//!
//! **Invariant:** no symbolic link, absolute or not, and no `..` leads out, also while the content changes: openat2(2) with RESOLVE_IN_ROOT; and what was
//! resolved is a descriptor, never a path again. Links of procfs that jump (`/proc/self/fd/3`) are not followed.
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat};

/// The root: a descriptor of the mount.
#[derive(Debug)]
pub(super) struct Root(OwnedFd);

/// A folder in the root and a name in it.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) folder: OwnedFd,
    pub(super) name: PathBuf,
}

impl Root {
    pub(super) fn new(mount: OwnedFd) -> Self {
        Self(mount)
    }

    /// Opens what exists.
    pub(super) fn open(&self, path: &str, flags: OFlag) -> io::Result<OwnedFd> {
        self.resolve(Path::new(path), flags, ResolveFlag::empty())
    }

    /// A handle of what exists.
    pub(super) fn find(&self, path: &str) -> io::Result<OwnedFd> {
        self.open(path, OFlag::O_PATH)
    }

    /// A folder on whose path there is no symbolic link. It is made if it is missing.
    pub(super) fn strict_folder(&self, path: &str) -> io::Result<OwnedFd> {
        let strict = || self.resolve(Path::new(path), OFlag::O_PATH | OFlag::O_DIRECTORY, ResolveFlag::RESOLVE_NO_SYMLINKS);
        match strict() {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                self.folder(path)?;
                strict()
            }
            other => other,
        }
    }

    /// A folder, made with its parents if it is missing. Links that lead to what is missing are followed, and it is made there.
    pub(super) fn folder(&self, path: &str) -> io::Result<OwnedFd> {
        self.make(Path::new(path), 0)
    }

    /// A file to mount on: whatever exists, or an empty file.
    pub(super) fn file(&self, path: &str) -> io::Result<OwnedFd> {
        self.make_file(Path::new(path), 0)
    }

    /// Where something is to be made. The parents are made if they are missing.
    pub(super) fn place(&self, path: &str) -> io::Result<Place> {
        let path = Path::new(path);
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(Errno::EINVAL.into()) };
        Ok(Place { folder: self.make(parent, 0)?, name: name.into() })
    }

    fn make(&self, path: &Path, depth: u32) -> io::Result<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
        match self.resolve(path, flags, ResolveFlag::empty()) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && depth < MAX_DEPTH => {}
            other => return other,
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(Errno::ENOENT.into()) };
        let folder = self.make(parent, depth + 1)?;
        match mkdirat(&folder, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
        match in_folder(folder.as_fd(), Path::new(name), flags) {
            // A link that leads nowhere: make what it leads to.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR)) => {
                self.make(&follow(&folder, parent, name.as_ref())?, depth + 1)
            }
            other => other,
        }
    }

    fn make_file(&self, path: &Path, depth: u32) -> io::Result<OwnedFd> {
        match self.resolve(path, OFlag::O_PATH, ResolveFlag::empty()) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && depth < MAX_DEPTH => {}
            other => return other,
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(Errno::EINVAL.into()) };
        let folder = self.make(parent, depth + 1)?;
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        match openat(&folder, name, flags, Mode::from_bits_truncate(0o644)) {
            Ok(_) => in_folder(folder.as_fd(), Path::new(name), OFlag::O_PATH),
            Err(Errno::EEXIST) => self.make_file(&follow(&folder, parent, name.as_ref())?, depth + 1),
            Err(error) => Err(error.into()),
        }
    }

    fn resolve(&self, path: &Path, flags: OFlag, more: ResolveFlag) -> io::Result<OwnedFd> {
        let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS | more;
        open_how(self.0.as_fd(), path, OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve))
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Opens a name in a folder without following a link.
pub(super) fn in_folder(folder: BorrowedFd<'_>, name: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    open_how(folder, name, OpenHow::new().flags(flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).resolve(resolve))
}

/// Opens a path below a folder on whose way there is no link and no other mount.
pub(super) fn beneath(folder: BorrowedFd<'_>, path: &str, flags: OFlag) -> io::Result<OwnedFd> {
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
    open_how(folder, Path::new(path), OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve))
}

/// A handle of a file or folder of the host.
pub(super) fn absolute(path: &Path) -> io::Result<OwnedFd> {
    Ok(nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?)
}

fn open_how(folder: BorrowedFd<'_>, path: &Path, how: OpenHow) -> io::Result<OwnedFd> {
    for _attempt in 0..MAX_ATTEMPTS {
        match openat2(folder, path, how) {
            // Something was renamed meanwhile, so that the kernel cannot say whether `..` leads out.
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
    Err(Errno::EAGAIN.into())
}

/// What a link in a folder leads to, as a path in the root.
fn follow(folder: &OwnedFd, path: &Path, name: &Path) -> io::Result<PathBuf> {
    Ok(path.join(readlinkat(folder, name)?))
}

/// Whether a file is a device of this kind and number.
pub(super) fn is_device(about: &FileStat, kind: SFlag, major: u32, minor: u32) -> bool {
    SFlag::from_bits_truncate(about.st_mode) & SFlag::S_IFMT == kind && about.st_rdev == libc::makedev(major, minor)
}

/// Whether a descriptor is of the null device.
pub(super) fn is_null(fd: impl AsFd) -> bool {
    fstat(fd.as_fd()).is_ok_and(|about| is_device(&about, SFlag::S_IFCHR, 1, 3))
}

/// Whether a descriptor is of a folder.
pub(super) fn is_folder(fd: impl AsFd) -> io::Result<bool> {
    Ok(SFlag::from_bits_truncate(fstat(fd.as_fd())?.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR)
}

/// Of links that lead to links, and of missing folders.
const MAX_DEPTH: u32 = 64;

const MAX_ATTEMPTS: u32 = 128;
