//! Whiteouts: what a layer deletes of the layers below.

use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Mode, Stat, fstat, mknodat, unlinkat};
use rustix::io::Errno;

use super::{Layer, Place, refused};
use crate::layers::lower::Below;
use crate::layers::tree::{self, Fate, Found};
use crate::layers::{OnFile as _, Result};

impl Layer {
    /// `.wh.NAME`: the lower layers' file of that name is deleted, not this layer's.
    pub(super) fn whiteout(&mut self, parent: &[u8], name: &[u8]) -> Result<()> {
        let mut path = parent.to_owned();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        let folder = self.folder(parent, &path)?;
        let place = Place { path, folder, name: name.to_owned() };
        self.whiteout_at(&place)
    }

    pub(super) fn whiteout_at(&mut self, place: &Place) -> Result<()> {
        self.has_whiteouts = true;
        match tree::look(place.folder.as_fd(), &place.name).file("look at", &place.path)? {
            Found::Absent if self.is_overlay && self.hides_something(&place.path)? => self.make_whiteout(place),
            Found::Absent | Found::Whiteout => Ok(()),
            Found::Folder(stat) => {
                let is_own = self.own.contains(&stat.st_ino);
                let folder = tree::open_folder(place.folder.as_fd(), &place.name).file("open", &place.path)?;
                let kept = self.clear(&folder, &place.path)?;
                if (is_own || kept) && self.is_overlay {
                    self.set_opaque(&folder, &place.path)?;
                }
                if !is_own && !kept {
                    self.last = None;
                    unlinkat(&place.folder, &*place.name, AtFlags::REMOVEDIR).file("remove", &place.path)?;
                    return if self.is_overlay && self.hides_something(&place.path)? { self.make_whiteout(place) } else { Ok(()) };
                }
                Ok(())
            }
            Found::Symlink(stat) | Found::Other(stat) if self.is_own(&stat, place) => Ok(()),
            Found::Symlink(_) | Found::Other(_) => {
                self.remove(place)?;
                if self.is_overlay && self.hides_something(&place.path)? { self.make_whiteout(place) } else { Ok(()) }
            }
        }
    }

    /// `.wh..wh..opq`: everything that lower layers have in this folder is deleted. Where they have a link, it is the link that goes.
    pub(super) fn opaque(&mut self, folders: &[&[u8]], entry: &[u8]) -> Result<()> {
        self.has_whiteouts = true;
        let Some((name, above)) = folders.split_last() else { return self.opaque_root() };
        let folder = self.folder(&above.join(&b'/'), entry)?;
        let place = Place { path: folders.join(&b'/'), folder, name: (*name).to_owned() };
        let found = tree::look(place.folder.as_fd(), &place.name).file("look at", &place.path)?;
        let folder = match found {
            Found::Folder(stat) => {
                self.own.insert(stat.st_ino);
                tree::open_folder(place.folder.as_fd(), &place.name).file("open", &place.path)?
            }
            Found::Symlink(stat) | Found::Other(stat) if self.is_own(&stat, &place) => {
                return Err(refused(entry, "the layer itself has no folder there"));
            }
            Found::Absent | Found::Symlink(_) | Found::Whiteout | Found::Other(_) => {
                self.remove(&place)?;
                let names: Vec<Vec<u8>> = folders.iter().map(|name| (*name).to_owned()).collect();
                let below = self.lowers.find(&names).file("look below at", &place.path)?;
                self.make_implicit(&place, &below)?
            }
        };
        self.clear(&folder, &place.path)?;
        if self.is_overlay { self.set_opaque(&folder, &place.path) } else { Ok(()) }
    }

    /// The kernel knows no opaque root.
    fn opaque_root(&mut self) -> Result<()> {
        self.needs_lowers |= self.is_overlay && self.lowers.is_empty();
        let root = self.root.try_clone().file("open", b"/")?;
        self.clear(&root, b"")?;
        let root = Rc::new(root);
        for name in self.lowers.root_names().file("look below at", b"/")? {
            let place = Place { path: name.clone(), folder: Rc::clone(&root), name };
            self.whiteout_at(&place)?;
        }
        Ok(())
    }

    /// Removes what is not this layer's. Whether anything stays.
    fn clear(&mut self, folder: &OwnedFd, path: &[u8]) -> Result<bool> {
        self.last = None;
        let inode = fstat(folder).file("look at", path)?.st_ino;
        if self.cleared.contains(&inode) {
            return tree::is_empty(folder.as_fd()).map(|is_empty| !is_empty).file("read folder", path);
        }
        let (own, links, cleared) = (&self.own, &self.own_links, &self.cleared);
        #[cfg(test)]
        let judged = &mut self.judged;
        let mut judge = |above: u64, name: &[u8], stat: &Stat| {
            #[cfg(test)]
            {
                *judged += 1;
            }
            let is_folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            if is_folder && cleared.contains(&stat.st_ino) {
                Fate::Whole
            } else if own.contains(&stat.st_ino) || links.contains(above, name) {
                Fate::Kept
            } else {
                Fate::Removed
            }
        };
        let folder = folder.try_clone().file("open", path)?;
        let kept = tree::clear(folder, &mut judge, &|| false).file("clear", path)?;
        // what comes later is this layer's: marks may be repeated as often as an archive has room, and each folder is gone through once
        self.cleared.insert(inode);
        Ok(kept)
    }

    /// Whether lower layers have something of that path, as far as they are known: a whiteout that hides nothing is seen in lists of the folder.
    fn hides_something(&self, path: &[u8]) -> Result<bool> {
        if self.lowers.is_empty() {
            return Ok(true);
        }
        match self.is_hidden(path)? {
            Some(true) => Ok(false),
            Some(false) => {
                let names: Vec<Vec<u8>> = path.split(|byte| *byte == b'/').map(ToOwned::to_owned).collect();
                Ok(!matches!(self.lowers.find(&names).file("look below at", path)?, Below::Absent))
            }
            // there may be something
            None => Ok(true),
        }
    }

    /// Whether this layer has deleted or replaced a folder on the way to a path, so that nothing of lower layers is seen there. None if it has a
    /// link, or no folder yet, on the way.
    pub(super) fn is_hidden(&self, path: &[u8]) -> Result<Option<bool>> {
        let mut folder = self.root.try_clone().file("open", b"/")?;
        let names: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
        for name in names.split_last().map_or(&[][..], |(_, folders)| folders) {
            match tree::look(folder.as_fd(), name).file("look at", path)? {
                Found::Folder(_) => {}
                Found::Whiteout | Found::Other(_) => return Ok(Some(true)),
                Found::Absent | Found::Symlink(_) => return Ok(None),
            }
            folder = tree::open_folder(folder.as_fd(), name).file("open folder of", path)?;
            if tree::is_opaque(folder.as_fd()) {
                return Ok(Some(true));
            }
        }
        Ok(Some(false))
    }

    fn make_whiteout(&self, place: &Place) -> Result<()> {
        match mknodat(&place.folder, &*place.name, FileType::CharacterDevice, Mode::empty(), 0) {
            Err(Errno::PERM) => Err(refused(&place.path, "a user namespace allows no whiteouts of overlayfs")),
            result => result.file("make whiteout", &place.path),
        }
    }
}

/// What the names of whiteouts begin with.
pub(super) const PREFIX: &[u8] = b".wh.";
/// The name of the one that is about its folder.
pub(super) const OPAQUE_MARK: &[u8] = b".wh..wh..opq";
