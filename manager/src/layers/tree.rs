//! Files in an open folder, one path component at a time: nothing here follows a link out of it.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, XattrFlags, fgetxattr, flistxattr, flistxattr_query,
    lgetxattr, llistxattr, llistxattr_query, lsetxattr, openat, openat2, readlinkat, statat, unlinkat,
};
use rustix::io::Errno;

use super::tar::Time;

/// What is under a name.
#[derive(Debug, Clone)]
pub(super) enum Found {
    Absent,
    Folder(Stat),
    Symlink(Stat),
    /// An overlay's mark that the lower layers' file of that name is deleted.
    Whiteout,
    Other(Stat),
}

/// The names of a path from the root of a layer on, without `.`, empty ones and resolved `..`; none if it leads out.
pub(super) fn components(path: &[u8]) -> Option<Vec<&[u8]>> {
    let mut names = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => drop(names.pop()?),
            name => names.push(name),
        }
    }
    Some(names)
}

/// What is under a name in a folder.
pub(super) fn look(folder: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<Found> {
    match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(found(stat)),
        Err(Errno::NOENT) => Ok(Found::Absent),
        Err(error) => Err(error),
    }
}

pub(super) fn found(stat: Stat) -> Found {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Found::Folder(stat),
        FileType::Symlink => Found::Symlink(stat),
        FileType::CharacterDevice if stat.st_rdev == 0 => Found::Whiteout,
        _ => Found::Other(stat),
    }
}

/// Opens a folder by one name, which must not be a link.
pub(super) fn open_folder(folder: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<OwnedFd> {
    openat(folder, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Opens a folder by a path, whose links are resolved as if `root` were `/`.
pub(super) fn open_in_root(root: BorrowedFd<'_>, path: &[u8]) -> rustix::io::Result<OwnedFd> {
    let path: &[u8] = if path.is_empty() { b"." } else { path };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    loop {
        match openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS) {
            // something was renamed meanwhile
            Err(Errno::AGAIN) => {}
            opened => return opened,
        }
    }
}

/// The names in a folder, in no order.
pub(super) fn names(folder: BorrowedFd<'_>) -> rustix::io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// Removes what is under a name, with everything in it. That there is nothing is fine.
pub(super) fn remove(folder: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<()> {
    remove_unless(folder, name, &|| false)
}

/// The same, until it is to stop.
///
/// Errors: ECANCELED, with a part of it removed.
pub(super) fn remove_unless(folder: BorrowedFd<'_>, name: &[u8], stops: &dyn Fn() -> bool) -> rustix::io::Result<()> {
    match unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(error),
    }
    clear(open_unmounted(folder, name)?, &mut |_, _, _| Fate::Removed, stops)?;
    unlinkat(folder, name, AtFlags::REMOVEDIR)
}

/// Whether nothing is in a folder.
pub(super) fn is_empty(folder: BorrowedFd<'_>) -> rustix::io::Result<bool> {
    for entry in Dir::read_from(folder)? {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Opens a folder of the same mount: what is mounted on a file of ours is not ours to remove.
fn open_unmounted(folder: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    openat2(folder, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// A folder on the way down a tree: closed when the way has gone far below it, and opened again from below on the way back. However deep a tree is,
/// few descriptors are open.
#[derive(Debug)]
pub(super) struct Rung {
    folder: Option<OwnedFd>,
    id: (u64, u64),
}

impl Rung {
    pub(super) fn new(folder: OwnedFd) -> rustix::io::Result<Self> {
        let id = id(&folder)?;
        Ok(Self { folder: Some(folder), id })
    }

    /// It, while it is open: the lowest ones always are.
    pub(super) fn fd(&self) -> rustix::io::Result<BorrowedFd<'_>> {
        self.folder.as_ref().map(AsFd::as_fd).ok_or(Errno::BADF)
    }
}

fn id(folder: &OwnedFd) -> rustix::io::Result<(u64, u64)> {
    rustix::fs::fstat(folder).map(|stat| (stat.st_dev, stat.st_ino))
}

/// Closes the folder that is far above the lowest, which was just added.
pub(super) fn shed<L>(levels: &mut [L], rung: impl Fn(&mut L) -> &mut Rung) {
    if let Some(level) = levels.len().checked_sub(OPEN_LEVELS + 1).and_then(|far| levels.get_mut(far)) {
        rung(level).folder = None;
    }
}

/// Opens the folder above the lowest, which is about to be left.
///
/// Errors: ESTALE when that was moved elsewhere meanwhile.
pub(super) fn climb<L>(levels: &mut [L], rung: impl Fn(&mut L) -> &mut Rung) -> rustix::io::Result<()> {
    let [.., above, lowest] = levels else { return Ok(()) };
    let above = rung(above);
    if above.folder.is_some() {
        return Ok(());
    }
    let folder = openat(rung(lowest).fd()?, "..", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    if id(&folder)? != above.id {
        return Err(Errno::STALE);
    }
    above.folder = Some(folder);
    Ok(())
}

/// What becomes of a file in a folder that is cleared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes; a folder stays if something in it does.
    Removed,
    Kept,
    /// A folder is kept with everything in it, which is not looked at.
    Whole,
}

/// What is asked about each file in a folder that is cleared: its folder's inode, its name there, and itself.
pub(super) type Judge<'a> = dyn FnMut(u64, &[u8], &Stat) -> Fate + 'a;

/// Removes everything in a folder but what is to be kept, and folders that it is in. Whether anything was kept.
///
/// Not by recursion: a layer's folders can be deeper than a stack.
pub(super) fn clear(folder: OwnedFd, judge: &mut Judge<'_>, stops: &dyn Fn() -> bool) -> rustix::io::Result<bool> {
    struct Level {
        folder: Rung,
        names: Vec<Vec<u8>>,
        /// Its own name in the one above, and whether it stays itself.
        name: Vec<u8>,
        kept: bool,
    }
    let level = |folder: OwnedFd, name, kept| -> rustix::io::Result<Level> {
        let names = names(folder.as_fd())?;
        Ok(Level { folder: Rung::new(folder)?, names, name, kept })
    };
    let mut levels = vec![level(folder, Vec::new(), false)?];
    loop {
        let Some(top) = levels.last_mut() else { return Ok(false) };
        let Some(name) = top.names.pop() else {
            climb(&mut levels, |level| &mut level.folder)?;
            let Some(Level { name, kept, .. }) = levels.pop() else { return Ok(false) };
            let Some(above) = levels.last_mut() else { return Ok(kept) };
            if kept {
                above.kept = true;
            } else {
                unlinkat(above.folder.fd()?, name, AtFlags::REMOVEDIR)?;
            }
            continue;
        };
        if stops() {
            return Err(Errno::CANCELED);
        }
        let stat = match statat(top.folder.fd()?, &*name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            stat => stat?,
        };
        let is_folder = matches!(found(stat), Found::Folder(_));
        match judge(top.folder.id.1, &name, &stat) {
            fate @ (Fate::Removed | Fate::Kept) if is_folder => {
                let folder = open_unmounted(top.folder.fd()?, &name)?;
                levels.push(level(folder, name, fate == Fate::Kept)?);
                shed(&mut levels, |level| &mut level.folder);
            }
            Fate::Removed => unlinkat(top.folder.fd()?, name, AtFlags::empty())?,
            Fate::Kept | Fate::Whole => top.kept = true,
        }
    }
}

pub(super) fn link_target(folder: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<Vec<u8>> {
    readlinkat(folder, name, Vec::new()).map(|target| target.into_bytes())
}

/// A path to a file of any type for system calls that take no folder: its last component must not be followed.
pub(super) fn path_of(folder: BorrowedFd<'_>, name: &[u8]) -> PathBuf {
    let mut path = format!("/proc/self/fd/{}/", folder.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    OsString::from_vec(path).into()
}

pub(super) fn set_xattr(folder: BorrowedFd<'_>, name: &[u8], key: &[u8], value: &[u8]) -> rustix::io::Result<()> {
    lsetxattr(path_of(folder, name), key, value, XattrFlags::empty())
}

/// Whether a folder hides those of its name in lower layers.
pub(super) fn is_opaque(folder: BorrowedFd<'_>) -> bool {
    let mut value = [0; 8];
    [OPAQUE, USER_OPAQUE].into_iter().any(|key| fgetxattr(folder, key, &mut value[..]).is_ok_and(|length| &value[..length] == b"y"))
}

/// The extended attributes of a file that belong to it rather than to the overlay or to the host.
pub(super) fn xattrs(folder: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let path = path_of(folder, name);
    listed(|| llistxattr_query(&path), |buffer| llistxattr(&path, buffer), |key, buffer| lgetxattr(&path, key, buffer))
}

/// The same for an open folder.
pub(super) fn xattrs_of(folder: BorrowedFd<'_>) -> rustix::io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    listed(|| flistxattr_query(folder), |buffer| flistxattr(folder, buffer), |key, buffer| fgetxattr(folder, key, buffer))
}

fn listed(
    query: impl Fn() -> rustix::io::Result<usize>,
    list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
    get: impl Fn(&[u8], &mut [u8]) -> rustix::io::Result<usize>,
) -> rustix::io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    match query() {
        // nearly every file
        Ok(0) | Err(Errno::NOTSUP) => return Ok(Vec::new()),
        length => length?,
    };
    let mut buffer = vec![0; XATTR_BYTES];
    let length = list(&mut buffer)?;
    let keys = buffer[..length].to_vec();
    let mut found = Vec::new();
    for key in keys.split(|byte| *byte == 0).filter(|key| !key.is_empty() && belongs_to_file(key)) {
        match get(key, &mut buffer) {
            Err(Errno::NODATA) => {}
            length => found.push((key.to_owned(), buffer[..length?].to_owned())),
        }
    }
    found.sort();
    Ok(found)
}

/// Whether an extended attribute is part of a layer: the overlay's own would change what is seen of other layers, and SELinux' labels come from the host's policy.
pub(super) fn belongs_to_file(key: &[u8]) -> bool {
    !(key.starts_with(b"trusted.overlay.") || key.starts_with(b"user.overlay.") || key == b"security.selinux")
}

pub(super) fn timestamps(time: Time) -> Timestamps {
    let time = Timespec { tv_sec: time.seconds, tv_nsec: i64::from(time.nanos) };
    Timestamps { last_access: time, last_modification: time }
}

pub(super) fn mtime(stat: &Stat) -> Time {
    Time { seconds: stat.st_mtime, nanos: u32::try_from(stat.st_mtime_nsec).unwrap_or_default() }
}

pub(super) fn open_root(path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// The first names of files with several, by device and inode.
pub(super) type FirstNames = HashMap<(u64, u64), Vec<u8>>;

/// Folders that are open at once on the way down a tree.
const OPEN_LEVELS: usize = 64;
/// The longest value, and the longest list of names, that Linux has.
const XATTR_BYTES: usize = 64 << 10;
/// Marks a folder that hides those of its name in lower layers.
pub(super) const OPAQUE: &str = "trusted.overlay.opaque";
const USER_OPAQUE: &str = "user.overlay.opaque";
