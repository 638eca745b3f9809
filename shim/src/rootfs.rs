//! The mounts that make up a container's root file system.
//!
//! Owns making them and unmaking them, on the host's side: at and below the folder `rootfs` of a bundle.
//!
//! **Invariant:** both can be repeated at any time, also after a death in the middle: a mount that is there stays, since a container
//! may already use it, and an overlay must not be mounted twice over the same upper folder. No symbolic link is followed out of
//! `rootfs`, no working directory of the process is changed.
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::sys::statvfs::{FsFlags, fstatvfs};

use crate::mountinfo::{self, MountEntry};
use crate::sys;

mod options;

use options::{Options, compact_overlay};

/// One mount, as containerd's snapshotters describe it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Mount {
    /// `overlay`, `bind`, `ext4`, …
    pub(crate) kind: String,
    pub(crate) source: String,
    /// Where, below `rootfs`; empty for `rootfs` itself.
    pub(crate) target: String,
    /// As in fstab: flags and what the file system understands.
    pub(crate) options: Vec<String>,
}

/// Mounts that could not be made or unmade.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    /// Something in it is in use: worth another try.
    #[error("unmount {}: it is in use", path.display())]
    Busy { path: PathBuf },
    #[error("mount {kind} from {origin:?} at {}", path.display())]
    Refused { kind: String, origin: String, path: PathBuf, source: Errno },
    #[error("{op} {}", path.display())]
    System { op: &'static str, path: PathBuf, source: Errno },
    #[error("mount {kind} at {}: {why}", path.display())]
    Unsupported { kind: String, path: PathBuf, why: &'static str },
    #[error("mount {kind} at {}: {found} is mounted there already", path.display())]
    Occupied { kind: String, path: PathBuf, found: String },
}

/// How hard to unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unmount {
    /// Fails with [`MountError::Busy`] while anything is in use.
    Clean,
    /// Takes the mounts out of sight at once; they end with their last user.
    Detach,
}

/// Makes `mounts` at and below `rootfs`, in this order, and `rootfs` itself if needed. Those that are there already, from an earlier
/// try, stay.
pub(crate) fn blocking_mount_all(rootfs: &Path, mounts: &[Mount]) -> Result<(), MountError> {
    if mounts.is_empty() {
        return Ok(());
    }
    match DirBuilder::new().mode(0o711).create(rootfs) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(system("make", rootfs)(errno(&error))),
        _ => {}
    }
    let mut done: Vec<PathBuf> = Vec::new();
    for mount in mounts {
        let options = Options::parse(&mount.options);
        let place = Place::open(rootfs, &mount.target)?;
        refuse_unsupported(mount, &options, &place.path)?;
        // Mounts lie on top of each other: of those at this place, so many are earlier ones of this list.
        let below = done.iter().filter(|path| **path == place.path).count();
        let stack = place.stack()?;
        match stack.get(below) {
            None => first_mount(mount, &options, &place)?,
            Some(entry) if entry.kind == mount.kind || options.flags.contains(MsFlags::MS_BIND) => {}
            Some(entry) => {
                return Err(MountError::Occupied { kind: mount.kind.clone(), path: place.path, found: entry.kind.clone() });
            }
        }
        done.push(place.path);
        // One that others lie on was finished before they came. For the one on top it changes nothing to finish it again.
        if stack.len() <= below + 1 {
            // Opened again: now it is the mount's root.
            finish_mount(mount, &options, &Place::open(rootfs, &mount.target)?)?;
        }
    }
    Ok(())
}

/// Unmounts everything that is mounted at or below `rootfs`. A `rootfs` that is not there has nothing mounted.
pub(crate) fn blocking_unmount_all(rootfs: &Path, how: Unmount) -> Result<(), MountError> {
    let (Some(bundle), Some(name)) = (rootfs.parent(), rootfs.file_name()) else {
        return Err(system("unmount", rootfs)(Errno::EINVAL));
    };
    let bundle = match bundle.canonicalize() {
        Ok(bundle) => bundle,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(system("resolve", bundle)(errno(&error))),
    };
    let top = bundle.join(name);
    let bundle_fd = open_folder(&bundle)?;
    let mut before = usize::MAX;
    for _ in 0..MAX_ROUNDS {
        let mut entries = list(|entry| entry.mount_point.starts_with(&top))?;
        if entries.is_empty() {
            return Ok(());
        }
        // A mount may hide others below it, so that only the next round reaches those. A round that changes nothing is the last.
        let is_last = entries.len() >= before;
        before = entries.len();
        // The deepest first, and at one place the last first: the sort keeps the kernel's order, and is walked backwards.
        entries.sort_by_key(|entry| entry.mount_point.components().count());
        for entry in entries.iter().rev() {
            let relative = entry.mount_point.strip_prefix(&bundle).unwrap_or(&entry.mount_point);
            match unmount_one(&bundle_fd, relative, how) {
                Err(Errno::EBUSY) if is_last => return Err(MountError::Busy { path: entry.mount_point.clone() }),
                Err(source) if is_last => return Err(system("unmount", &entry.mount_point)(source)),
                Ok(()) | Err(_) => {}
            }
        }
    }
    Err(MountError::Busy { path: top })
}

/// Where a mount goes: a folder or file that is held open, so that its name cannot be bent meanwhile.
struct Place {
    fd: OwnedFd,
    /// Its real path.
    path: PathBuf,
}

impl Place {
    /// Opens `target` below `rootfs`; links in it lead nowhere but below `rootfs`.
    fn open(rootfs: &Path, target: &str) -> Result<Self, MountError> {
        let fd = open_folder(rootfs)?;
        let target = target.trim_start_matches('/');
        let fd = if target.is_empty() {
            fd
        } else {
            let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
            openat2(&fd, target, how).map_err(system("open", &rootfs.join(target)))?
        };
        let path = std::fs::read_link(link_to(&fd)).map_err(|error| system("resolve", rootfs)(errno(&error)))?;
        Ok(Self { fd, path })
    }

    /// The mounts that lie here on top of each other.
    fn stack(&self) -> Result<Vec<MountEntry>, MountError> {
        if matches!(sys::mount::is_mount_root(self.fd.as_fd()), Ok(false)) {
            Ok(Vec::new())
        } else {
            list(|entry| entry.mount_point == self.path)
        }
    }

    fn link(&self) -> PathBuf {
        link_to(&self.fd)
    }
}

fn refuse_unsupported(mount: &Mount, options: &Options, path: &Path) -> Result<(), MountError> {
    let why = if mount.kind.starts_with("fuse.") || mount.kind.starts_with("fuse3.") {
        "file systems in user space need a helper program that this shim does not start"
    } else if options.is_idmapped {
        "uidmap= and gidmap= are not supported"
    } else if options.managers.is_some() {
        "its options X-containerd.… are for containerd's mount manager, which has not handled them"
    } else {
        return Ok(());
    };
    Err(MountError::Unsupported { kind: mount.kind.clone(), path: path.to_owned(), why })
}

/// The call that makes the mount.
fn first_mount(wanted: &Mount, options: &Options, place: &Place) -> Result<(), MountError> {
    let refused =
        |source| MountError::Refused { kind: wanted.kind.clone(), origin: wanted.source.clone(), path: place.path.clone(), source };
    let mut data = options.data.clone();
    let mut base = None;
    if wanted.kind == "overlay" && data.iter().map(|option| option.len() + 1).sum::<usize>() >= MAX_DATA_BYTES - 512 {
        (base, data) = compact_overlay(&data).map_or((None, data), |(base, data)| (Some(base), data));
    }
    let (mut origin, mut device) = (PathBuf::from(&wanted.source), None);
    if options.is_loop {
        let direct = data.iter().position(|option| option == "direct-io").map(|at| data.remove(at)).is_some();
        let read_only = options.flags.contains(MsFlags::MS_RDONLY);
        let attached = File::options()
            .read(true)
            .write(!read_only)
            .open(&origin)
            .and_then(|file| sys::mount::attach_loop(&file, read_only, direct))
            .map_err(|error| MountError::System { op: "attach a loop device to", path: origin.clone(), source: errno(&error) })?;
        origin.clone_from(&attached.path);
        device = Some(attached);
    }
    let data = data.join(",");
    if data.len() >= MAX_DATA_BYTES {
        let (kind, path) = (wanted.kind.clone(), place.path.clone());
        return Err(MountError::Unsupported { kind, path, why: "its options are longer than the page that mount(2) takes" });
    }
    let flags = options.flags;
    let kind = (!flags.contains(MsFlags::MS_BIND)).then_some(wanted.kind.as_str());
    let data = (!data.is_empty()).then_some(data.as_str());
    let call = || mount(Some(&origin), &place.link(), kind, flags, data);
    match base {
        None => call(),
        Some(base) => in_folder(&base, call),
    }
    .map_err(refused)?;
    // The mount holds the device from here on.
    drop(device);
    Ok(())
}

/// The calls that change a mount: its propagation, and the flags that bind(2) ignores at first.
fn finish_mount(wanted: &Mount, options: &Options, place: &Place) -> Result<(), MountError> {
    let refused =
        |source| MountError::Refused { kind: wanted.kind.clone(), origin: wanted.source.clone(), path: place.path.clone(), source };
    let none = None::<&str>;
    if !options.propagation.is_empty() {
        mount(none, &place.link(), none, options.propagation, none).map_err(refused)?;
    }
    let flags = options.flags & PER_MOUNT;
    if options.flags.contains(MsFlags::MS_BIND) && !(flags.is_empty() && (options.cleared & PER_MOUNT).is_empty()) {
        // What the source had stays, unless it was taken back by name.
        let kept = inherited_flags(&place.fd).map_err(refused)? - options.cleared;
        mount(none, &place.link(), none, flags | kept | MsFlags::MS_BIND | MsFlags::MS_REMOUNT, none).map_err(refused)?;
    }
    Ok(())
}

fn inherited_flags(fd: &OwnedFd) -> Result<MsFlags, Errno> {
    let has = fstatvfs(fd)?.flags();
    let pairs = [
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    Ok(pairs.into_iter().filter(|(has_flag, _)| has.contains(*has_flag)).map(|(_, flag)| flag).collect())
}

/// Runs `call` with `folder` as the working directory of a thread that has one of its own, and ends with it.
fn in_folder(folder: &str, call: impl FnOnce() -> Result<(), Errno> + Send) -> Result<(), Errno> {
    std::thread::scope(|scope| {
        let work = || {
            unshare(CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(folder)?;
            call()
        };
        let thread = std::thread::Builder::new().stack_size(64 << 10).spawn_scoped(scope, work).map_err(|error| errno(&error))?;
        thread.join().unwrap_or(Err(Errno::EFAULT))
    })
}

/// Unmounts what is mounted at `relative`, whose folder is reached from the bundle without any link.
///
/// The mount itself must not be open meanwhile: that would keep it busy. So its folder is, and the name is not followed.
fn unmount_one(bundle: &OwnedFd, relative: &Path, how: Unmount) -> Result<(), Errno> {
    let (folder, name) = (relative.parent().ok_or(Errno::EINVAL)?, relative.file_name().ok_or(Errno::EINVAL)?);
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let folder = openat2(bundle, folder, OpenHow::new().flags(FOLDER).resolve(resolve))?;
    let detach = if how == Unmount::Detach { MntFlags::MNT_DETACH } else { MntFlags::empty() };
    umount2(&link_to(&folder).join(name), MntFlags::UMOUNT_NOFOLLOW | detach)
}

fn open_folder(path: &Path) -> Result<OwnedFd, MountError> {
    openat(AT_FDCWD, path, FOLDER | OFlag::O_NOFOLLOW, Mode::empty()).map_err(system("open", path))
}

fn list(wanted: impl FnMut(&MountEntry) -> bool) -> Result<Vec<MountEntry>, MountError> {
    mountinfo::blocking_list(wanted).map_err(|error| system("read", Path::new(mountinfo::PATH))(errno(&error)))
}

fn link_to(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

fn system(op: &'static str, path: &Path) -> impl FnOnce(Errno) -> MountError {
    move |source| MountError::System { op, path: path.to_owned(), source }
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

const FOLDER: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

/// Flags of one mount, which bind(2) takes from the source first.
const PER_MOUNT: MsFlags = MsFlags::MS_RDONLY
    .union(MsFlags::MS_NOSUID)
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC)
    .union(MsFlags::MS_NOATIME)
    .union(MsFlags::MS_NODIRATIME)
    .union(MsFlags::MS_RELATIME);

/// How many mounts may hide each other at one place, or appear while others are unmounted.
const MAX_ROUNDS: usize = 1000;

/// mount(2) takes one page of options, with its final NUL.
const MAX_DATA_BYTES: usize = 4096;

#[cfg(test)]
mod tests;
