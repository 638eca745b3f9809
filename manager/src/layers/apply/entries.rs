//! Files, folders, links and devices of a layer, each with owner, mode, attributes and times.

use std::io::BufRead;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Uid, XattrFlags, chmodat, chownat, fchmod, fchown, fremovexattr, fsetxattr, fstat, futimens,
    linkat, makedev, mkdirat, mknodat, openat, statat, symlinkat, utimensat,
};
use rustix::io::Errno;

use super::{Layer, Place, checked_path, data, refused};
use crate::layers::tar::{Entry, Kind, Reader, shown};
use crate::layers::tree::{self, Found};
use crate::layers::{OnFile as _, Result};

impl Layer {
    /// The entry of the layer's root: `./`.
    pub(super) fn root_entry(&mut self, entry: &Entry) -> Result<()> {
        if entry.kind != Kind::Folder {
            return Err(refused(&entry.path, "the root of a layer is a folder"));
        }
        let root = self.root.try_clone().file("open", b"/")?;
        self.implicit.remove(&b""[..]);
        self.own.insert(fstat(&root).file("look at", b"/")?.st_ino);
        self.folder_attributes(&root, entry, b"")
    }

    pub(super) fn make<R: BufRead>(&mut self, place: &Place, entry: &Entry, reader: &mut Reader<R>) -> Result<()> {
        match &entry.kind {
            Kind::File { size } => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                // nearly always the mode that it is to have, which is one call less; no other process can look into the folder
                let create = || openat(&place.folder, &*place.name, flags, Mode::from_raw_mode(entry.mode & PERMISSIONS));
                let file = self.replacing(place, create)?.file("make file", &place.path)?;
                data::write(&file, *size, reader, &place.path)?;
                self.file_attributes(&file, entry, &place.path)
            }
            Kind::Folder => {
                let (folder, is_new) = self.folder_at(place, Mode::from_raw_mode(entry.mode & PERMISSIONS))?;
                self.implicit.remove(&place.path);
                if !is_new {
                    remove_attributes(folder.as_fd(), entry).file("remove attributes of", &place.path)?;
                }
                self.folder_attributes(&folder, entry, &place.path)
            }
            Kind::Symlink { target } => {
                if target.is_empty() || target.len() > super::PATH_BYTES {
                    return Err(refused(&entry.path, &format!("a link to a name of {} bytes", target.len())));
                }
                let create = || symlinkat(&**target, &place.folder, &*place.name);
                self.replacing(place, create)?.file("make link", &place.path)?;
                self.other_attributes(place, entry)
            }
            Kind::HardLink { target } => self.hard_link(place, target, &entry.path),
            // a whiteout as overlayfs has it, from a program that has copied an upper folder
            Kind::Char { major: 0, minor: 0 } => self.whiteout_at(place),
            Kind::Char { major, minor } => self.node(place, entry, FileType::CharacterDevice, makedev(*major, *minor)),
            Kind::Block { major, minor } => self.node(place, entry, FileType::BlockDevice, makedev(*major, *minor)),
            Kind::Fifo => self.node(place, entry, FileType::Fifo, 0),
        }
    }

    fn node(&mut self, place: &Place, entry: &Entry, kind: FileType, device: u64) -> Result<()> {
        let create = || mknodat(&place.folder, &*place.name, kind, Mode::from_raw_mode(entry.mode), device);
        match self.replacing(place, create)? {
            Err(Errno::PERM) => return Err(refused(&entry.path, "a user namespace allows no devices")),
            made => made.file("make device", &place.path)?,
        }
        self.other_attributes(place, entry)
    }

    /// Makes a file under a name, and removes the one that had it: of entries with one name the last counts.
    fn replacing<T>(&mut self, place: &Place, create: impl Fn() -> rustix::io::Result<T>) -> Result<rustix::io::Result<T>> {
        let made = create();
        if !matches!(made, Err(Errno::EXIST)) {
            return Ok(made);
        }
        self.remove(place)?;
        Ok(create())
    }

    /// The folder under a name, made unless it is there, and whether it was made.
    pub(super) fn folder_at(&mut self, place: &Place, mode: Mode) -> Result<(OwnedFd, bool)> {
        let make = || mkdirat(&place.folder, &*place.name, mode | Mode::RWXU);
        let (mut is_new, mut replaces) = (true, false);
        match make() {
            Err(Errno::EXIST) => match tree::look(place.folder.as_fd(), &place.name).file("look at", &place.path)? {
                Found::Folder(_) => is_new = false,
                _ => {
                    self.remove(place)?;
                    make().file("make folder", &place.path)?;
                    replaces = true;
                }
            },
            made => made.file("make folder", &place.path)?,
        }
        let folder = tree::open_folder(place.folder.as_fd(), &place.name).file("open", &place.path)?;
        if replaces && self.is_overlay {
            // what was there hid the lower layers' folder of that name
            self.set_opaque(&folder, &place.path)?;
        }
        self.own.insert(fstat(&folder).file("look at", &place.path)?.st_ino);
        Ok((folder, is_new))
    }

    fn hard_link(&mut self, place: &Place, target: &[u8], entry: &[u8]) -> Result<()> {
        let names = checked_path(target, entry)?;
        let Some((name, folders)) = names.split_last() else { return Err(refused(entry, "a hard link to the root")) };
        let path = names.join(&b'/');
        let parent = folders.join(&b'/');
        let absent = || refused(entry, &format!("a hard link to {:?}, which is not there", shown(target)));
        let found = match tree::open_in_root(self.root.as_fd(), &parent) {
            Ok(folder) => match tree::look(folder.as_fd(), name).file("look at target of", entry)? {
                Found::Absent => None,
                Found::Folder(_) => return Err(refused(entry, "a hard link to a folder")),
                Found::Whiteout => return Err(absent()),
                Found::Symlink(_) | Found::Other(_) => Some(folder),
            },
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => None,
            Err(error) => return Err(error).file("open folder of target of", entry),
        };
        let copied;
        let folder = match &found {
            Some(folder) => folder.as_fd(),
            None => {
                copied = self.copy_up(&path, entry)?.ok_or_else(absent)?;
                copied.folder.as_fd()
            }
        };
        let link = || linkat(folder, *name, &place.folder, &*place.name, AtFlags::empty());
        match link() {
            Err(Errno::EXIST) => {
                let inode = |folder: BorrowedFd<'_>, name: &[u8]| statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).map(|stat| stat.st_ino);
                let same =
                    inode(folder, name).file("look at", &path)? == inode(place.folder.as_fd(), &place.name).file("look at", &place.path)?;
                if !same {
                    self.remove(place)?;
                    link().file("make link", &place.path)?;
                }
            }
            made => made.file("make link", &place.path)?,
        }
        // its attributes are those of the other name
        self.own_links.insert(fstat(&place.folder).file("look at folder of", &place.path)?.st_ino, &place.name);
        Ok(())
    }

    fn file_attributes(&mut self, file: &OwnedFd, entry: &Entry, path: &[u8]) -> Result<()> {
        let stat = fstat(file).file("look at", path)?;
        // in this order: a new owner takes away set-id bits and capabilities
        let has_owner = (stat.st_uid, stat.st_gid) == (entry.uid, entry.gid);
        if !has_owner {
            fchown(file, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid))).file("set owner of", path)?;
        }
        if !has_owner || stat.st_mode & MODE != entry.mode & MODE {
            fchmod(file, Mode::from_raw_mode(entry.mode)).file("set mode of", path)?;
        }
        for (key, value) in attributes(entry) {
            match fsetxattr(file, key, value, XattrFlags::empty()) {
                Err(error @ Errno::NOTSUP) => self.warn_of_attribute(path, key, error),
                result => result.file("set extended attribute of", path)?,
            }
        }
        futimens(file, &tree::timestamps(entry.mtime)).file("set times of", path)?;
        self.own.insert(stat.st_ino);
        Ok(())
    }

    fn folder_attributes(&mut self, folder: &OwnedFd, entry: &Entry, path: &[u8]) -> Result<()> {
        self.file_attributes(folder, entry, path)?;
        self.bounds.keep(path)?;
        self.folder_times.insert(path.to_owned(), entry.mtime);
        Ok(())
    }

    /// Those of what cannot be opened, or should not be.
    fn other_attributes(&mut self, place: &Place, entry: &Entry) -> Result<()> {
        let (folder, name, path) = (&place.folder, &*place.name, &place.path);
        let (uid, gid) = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
        chownat(folder, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW).file("set owner of", path)?;
        if !matches!(entry.kind, Kind::Symlink { .. }) {
            // it was just made, and is no link
            chmodat(folder, name, Mode::from_raw_mode(entry.mode), AtFlags::empty()).file("set mode of", path)?;
        }
        for (key, value) in attributes(entry) {
            match tree::set_xattr(folder.as_fd(), name, key, value) {
                // only files and folders have those of users
                Err(error @ (Errno::NOTSUP | Errno::PERM)) => self.warn_of_attribute(path, key, error),
                result => result.file("set extended attribute of", path)?,
            }
        }
        utimensat(folder, name, &tree::timestamps(entry.mtime), AtFlags::SYMLINK_NOFOLLOW).file("set times of", path)?;
        self.own.insert(statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).file("look at", path)?.st_ino);
        Ok(())
    }
}

fn attributes(entry: &Entry) -> impl Iterator<Item = (&[u8], &[u8])> {
    entry.xattrs.iter().map(|(key, value)| (&**key, &**value)).filter(|(key, _)| tree::belongs_to_file(key))
}

/// Those of a folder of a lower layer that the entry does not have.
fn remove_attributes(folder: BorrowedFd<'_>, entry: &Entry) -> rustix::io::Result<()> {
    for (key, _) in tree::xattrs_of(folder)? {
        if !entry.xattrs.iter().any(|(other, _)| *other == key) {
            fremovexattr(folder, &*key)?;
        }
    }
    Ok(())
}

/// Of a mode: what a file can be made with.
const PERMISSIONS: u32 = 0o777;
/// The same with the bits that a new owner takes away.
const MODE: u32 = 0o7777;
